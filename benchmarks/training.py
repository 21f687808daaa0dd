"""The cost of the training loop itself, and of masking a batch, against transformers and accelerate."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from transformers import BertConfig, BertForMaskedLM

from benchmarks.harness import Table, compare, installed
from kexue.training import batch_indices, default_optimizers, fit, mask_tokens, shuffled_batches

SECTION = "Training loop"

STEPS, BATCH, LENGTH, VOCABULARY = 100, 8, 32, 512


def _data() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, VOCABULARY, (STEPS * BATCH, LENGTH), generator=generator)
    masked = torch.rand(ids.shape, generator=generator) < 0.15
    return {"input_ids": ids, "labels": torch.where(masked, ids, -100)}


def _model() -> BertForMaskedLM:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=256,
        max_position_embeddings=64,
    )
    return BertForMaskedLM(config)


def _bare(data: dict[str, torch.Tensor]) -> None:
    """What everybody writes: no resume, no metrics, no schedule, the loss never looked at."""
    model = _model().train()
    (optimizer,) = default_optimizers(model)
    for step in range(STEPS):
        chosen = torch.from_numpy(batch_indices(0, step, BATCH, STEPS * BATCH).copy())
        model(input_ids=data["input_ids"][chosen], labels=data["labels"][chosen]).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def _fit(data: dict[str, torch.Tensor]) -> None:
    with tempfile.TemporaryDirectory() as out:
        fit(_model(), shuffled_batches(data, BATCH), steps=STEPS, out=out, show_progress=False)


def _trainer(data: dict[str, torch.Tensor]) -> None:
    from transformers import Trainer, TrainingArguments, logging

    class Rows(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return STEPS * BATCH

        def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
            return {name: values[row] for name, values in data.items()}

    logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as out:
        arguments = TrainingArguments(
            out,
            per_device_train_batch_size=BATCH,
            max_steps=STEPS,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
        )
        Trainer(_model(), arguments, train_dataset=Rows()).train()


def _accelerate(data: dict[str, torch.Tensor]) -> None:
    """The loop of accelerate's documentation, with clipping."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model = _model().train()
    (optimizer,) = default_optimizers(model)
    dataset = torch.utils.data.TensorDataset(data["input_ids"], data["labels"])
    loader = torch.utils.data.DataLoader(dataset, batch_size=BATCH, shuffle=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    for ids, labels in loader:
        accelerator.backward(model(input_ids=ids, labels=labels).loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def _masking() -> Table:
    """Masking of one batch that is tokenized already."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerFast

    rows, length, vocabulary, special = 32, 512, 30_000, (0, 1, 2, 3, 4)
    words = {name: number for number, name in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"])}
    words |= {f"w{number}": number for number in range(len(words), vocabulary)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="[UNK]")), pad_token="[PAD]", unk_token="[UNK]",
        cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]",
    )  # fmt: skip
    ids = torch.randint(5, vocabulary, (rows, length), generator=torch.Generator().manual_seed(0))
    ids[:, 0], ids[:, -1] = 2, 3
    marks = ((ids == 2) | (ids == 3)).long()
    collator = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.15)
    starts = ids % 3 != 0
    calls = 20

    def ours(**options: Any) -> None:
        for step in range(calls):
            mask_tokens(ids, 0, step, mask_token_id=4, vocab_size=vocabulary, special_ids=special, **options)

    def theirs(given: torch.Tensor | None) -> None:
        for _ in range(calls):
            collator.torch_mask_tokens(ids.clone(), given)

    contenders = {
        "kexue mask_tokens": ours,
        "kexue, whole words": lambda: ours(word_starts=starts),
        "kexue, spans": lambda: ours(mean_span=5.0),
        "DataCollatorForLanguageModeling": lambda: theirs(None),
        "the same, special tokens marked beforehand": lambda: theirs(marks),
    }
    return compare(
        "Masking a batch",
        f"{calls} batches of {rows} x {length} ids, vocabulary {vocabulary:,}, 15 % selected, split 80 / 10 / 10.",
        contenders,
        peer="the same, special tokens marked beforehand",
        packages=("torch", "transformers", "numpy"),
        repeats=5,
        remarks=[
            "Only the masking itself is timed (torch_mask_tokens). kexue also finds the special tokens, checks that "
            "all ids are in the vocabulary, and draws from a generator keyed by (seed, step, rank)."
        ],
    )


def run() -> list[Table]:
    """Measure both comparisons."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    data = _data()
    contenders: dict[str, Callable[[], Any]] = {
        "bare loop": lambda: _bare(data),
        "kexue fit": lambda: _fit(data),
    }
    packages = ["torch", "transformers"]
    remarks = [
        "kexue writes a line of metrics for every step and one checkpoint, and checks that loss and gradient are "
        "finite; the bare loop and accelerate's do none of this; Trainer was told to log nothing and to write no "
        "checkpoint."
    ]
    if installed("accelerate"):
        contenders["accelerate, hand-written loop"] = lambda: _accelerate(data)
        contenders["transformers.Trainer"] = lambda: _trainer(data)
        packages.append("accelerate")
    else:
        remarks.append("transformers.Trainer needs accelerate, which is not installed here: not measured.")
    return [
        compare(
            "Cost of the loop",
            f"Building and training a BERT of width 64, 2 layers, batch {BATCH} x {LENGTH}, {STEPS} steps, float32, "
            f"{torch.get_num_threads()} thread(s); AdamW, gradient clipping.",
            contenders,
            peer="transformers.Trainer",
            packages=tuple(packages),
            repeats=5,
            remarks=remarks,
        ),
        _masking(),
    ]
