"""Zero-shot classification by next sentence prediction: ours against single pairs and the published padded batches."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertForNextSentencePrediction, PreTrainedTokenizerFast

from benchmarks.harness import Table, compare
from kexue.tasks import NSPZeroShotClassifier

SECTION = "Zero-shot classification"

LABELS, VOCABULARY = 15, 4000


def _tokenizer() -> PreTrainedTokenizerFast:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{k}" for k in range(VOCABULARY - 5))]
    made = Tokenizer(models.WordPiece({word: k for k, word in enumerate(words)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        mask_token="[MASK]", model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )  # fmt: skip


def _model(width: int, layers: int) -> BertForNextSentencePrediction:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        intermediate_size=4 * width,
        max_position_embeddings=256,
    )
    model = BertForNextSentencePrediction(config).eval()
    with torch.no_grad():
        for module in model.modules():  # so that scores differ by more than rounding
            if isinstance(module, torch.nn.Linear):
                module.weight.mul_(4)
    return model


def _texts(count: int, low: int, high: int) -> list[str]:
    rng = random.Random(0)
    return [" ".join(f"w{rng.randrange(VOCABULARY - 5)}" for _ in range(rng.randint(low, high))) for _ in range(count)]


@torch.no_grad()
def _single(model: Any, tokenizer: Any, prompts: list[str], texts: list[str]) -> np.ndarray:
    """One forward for each pair, each tokenised on its own."""
    out = [model(**tokenizer(p, x, return_tensors="pt")).logits[0] for x in texts for p in prompts]
    logits = torch.stack(out)
    return (logits[:, 0] - logits[:, 1]).view(len(texts), -1).numpy()


@torch.no_grad()
def _padded(model: Any, tokenizer: Any, prompts: list[str], texts: list[str]) -> np.ndarray:
    """As published: one pass over the data for each label, batches of 40, padded to 256."""
    columns = []
    for prompt in prompts:
        parts = []
        for start in range(0, len(texts), 40):
            own = texts[start : start + 40]
            batch = tokenizer([prompt] * len(own), own, padding="max_length", max_length=256, return_tensors="pt")
            parts.append(model(**batch).logits)
        logits = torch.cat(parts)
        columns.append(logits[:, 0] - logits[:, 1])
    return torch.stack(columns, 1).numpy()


def _ours(model: Any, tokenizer: Any, prompts: list[str], precision: str | None = None) -> Any:
    return NSPZeroShotClassifier(
        model, prompts, max_length=256, tokenizer=tokenizer, sanity_pairs=[], precision=precision, show_progress=False
    ).fit()


def _compare(title: str, width: int, layers: int, texts: list[str], padded: bool, repeats: int) -> Table:
    tokenizer, model = _tokenizer(), _model(width, layers)
    rng = random.Random(1)
    prompts = [
        " ".join(f"w{rng.randrange(VOCABULARY - 5)}" for _ in range(rng.choice([3, 3, 4, 5]))) for _ in range(15)
    ]
    fitted = {name: _ours(model, tokenizer, prompts, kind) for name, kind in
              (("kexue", None), ("kexue, bf16", "bf16"), ("kexue, int8", "int8"))}  # fmt: skip
    peer = "batches of 40 padded to 256" if padded else "one pair at a time"
    run = _padded if padded else _single
    expected = run(model, tokenizer, prompts, texts)
    extra: dict[str, dict[str, str]] = {}
    for name, clf in fitted.items():
        got = clf.decision_function(texts)
        difference, same = float(np.abs(got - expected).max()), float((got.argmax(1) == expected.argmax(1)).mean())
        extra[name] = {"largest difference": f"{difference:.1g}", "same label": f"{same:.3f}"}
        if name == "kexue" and (difference > 1e-4 or same < 1):
            raise RuntimeError(
                f"{title}: log-odds differ from {peer}'s by {difference:.2g}, labels agree on {same:.3f}"
            )
    contenders: dict[str, Callable[[], Any]] = {peer: lambda: run(model, tokenizer, prompts, texts)}
    contenders |= {name: lambda clf=clf: clf.decision_function(texts) for name, clf in fitted.items()}
    mean = np.mean([len(tokenizer(p, x)["input_ids"]) for x in texts for p in prompts])
    return compare(
        title,
        f"{len(texts)} texts x {LABELS} prompts, {mean:.0f} tokens in a pair on average, a random BERT of width "
        f"{width} with {layers} layers, float32 if nothing else is said, {torch.get_num_threads()} thread(s); "
        f"tokenising included. The scores have standard deviation {expected.std():.2g}.",
        contenders,
        peer=peer,
        packages=("torch", "transformers", "tokenizers"),
        repeats=repeats,
        extra=extra,
    )


def run() -> list[Table]:
    """Measure the comparisons; the log-odds must equal the peer's to 1e-4 and every label must be the same."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    short, medium = _texts(12, 8, 18), _texts(40, 20, 50)
    return [
        _compare("Short texts, one pair at a time, width 256", 256, 4, short, False, 5),
        _compare("Short texts, one pair at a time, width 128", 128, 4, short, False, 5),
        _compare("Padded batches as published", 256, 4, medium, True, 3),
    ]
