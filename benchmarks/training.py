"""The cost of the training loop itself: ours, a bare loop and transformers.Trainer on the same tiny masked LM."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from transformers import BertConfig, BertForMaskedLM

from benchmarks.harness import Table, compare, installed
from kexue.training import batch_indices, default_optimizers, fit, shuffled_batches

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


def run() -> list[Table]:
    """Measure one comparison."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    data = _data()
    contenders: dict[str, Callable[[], Any]] = {
        "bare loop": lambda: _bare(data),
        "kexue fit": lambda: _fit(data),
    }
    packages = ["torch", "transformers"]
    remarks = [
        "kexue writes a line of metrics for every step and one checkpoint, and checks that loss and gradient are "
        "finite; the bare loop does none of this; Trainer was told to log nothing and to write no checkpoint."
    ]
    if installed("accelerate"):
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
        )
    ]
