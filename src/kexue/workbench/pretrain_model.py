"""The models of ``kexue pretrain``, the batches they are trained on, and what is measured at the end."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from kexue.training import batch_indices, mask_tokens
from kexue.workbench.pieces import Pieces

if TYPE_CHECKING:
    from kexue.workbench.pretrain import PretrainSettings

__all__ = ["Batches", "build_model", "evaluate"]

_MODES = {"one-pass": "diagonal", "mlm": "bidirectional", "clm": "causal"}
_MEASURED = 256  # pieces that are held out and measured


def build_model(objective: str, tokenizer: Any, width: int, layers: int, heads: int, max_length: int, seed: int) -> Any:
    """An untrained model for the objective; the seed decides its weights."""
    from kexue.models import KexueConfig, KexueForCausalLM, KexueForMaskedLM, KexueForTextAutoencoding

    kind = {"one-pass": KexueForTextAutoencoding, "mlm": KexueForMaskedLM, "clm": KexueForCausalLM}[objective]
    config = KexueConfig(
        len(tokenizer),
        width,
        layers,
        heads,
        _MODES[objective],
        "learned",
        max_length,
        tokenizer.mask_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return kind(config)


class Batches:
    """Step -> packed batch: a pure function of (seed, step), so that a run resumes where it was.

    Args:
        pieces: What to train on.
        tokenizer: For the ids of special tokens.
        settings: Objective, batch size, mask rate, seed.
    """

    def __init__(self, pieces: Pieces, tokenizer: Any, settings: PretrainSettings) -> None:
        self.pieces, self.settings = pieces, settings
        self.special = tuple(sorted(set(tokenizer.all_special_ids)))
        self.mask, self.vocabulary = tokenizer.mask_token_id, len(tokenizer)
        self.size = min(settings.batch_size, len(pieces.trained))

    def __call__(self, step: int) -> dict[str, Tensor]:
        """The batch of a step."""
        rows = batch_indices(self.settings.seed, step, self.size, len(self.pieces.trained))
        return self.packed([self.pieces[i] for i in self.pieces.trained[rows]], step)

    def packed(self, rows: list[np.ndarray], step: int) -> dict[str, Tensor]:
        """One packed batch of pieces."""
        ids = torch.from_numpy(np.concatenate(rows).astype(np.int64))
        bounds = torch.from_numpy(np.concatenate([[0], np.cumsum([len(row) for row in rows])]))
        batch = {"input_ids": ids, "cu_seqlens": bounds}
        if self.settings.objective == "mlm":
            inputs, labels = mask_tokens(
                ids, self.settings.seed, step, mask_token_id=self.mask, vocab_size=self.vocabulary,
                special_ids=self.special, rate=self.settings.mask_rate,
            )  # fmt: skip
            return batch | {"input_ids": inputs, "labels": labels}
        labels = ids
        if self.settings.objective == "one-pass":  # [CLS] and [SEP] are given, there is nothing to learn
            labels = ids.masked_fill(torch.isin(ids, torch.tensor(self.special)), -100)
        return batch | {"labels": labels}


@torch.inference_mode()
def evaluate(model: Any, pieces: Pieces, tokenizer: Any, settings: PretrainSettings) -> dict[str, Any]:
    """Mean loss of held-out tokens in nats, with that of the frequencies of tokens beside it."""
    batches = Batches(pieces, tokenizer, settings)
    training = model.training
    model.eval()
    total = count = 0.0
    counted = np.bincount(pieces.ids, minlength=len(tokenizer)).astype(float)
    frequency = torch.from_numpy(np.log((counted + 1) / (counted + 1).sum()))
    plain = 0.0
    held = pieces.held[:_MEASURED]
    for start in range(0, len(held), settings.batch_size):
        rows = [pieces[i] for i in held[start : start + settings.batch_size]]
        # The noise of "mlm" is that of steps that training never sees.
        batch = batches.packed(rows, (1 << 40) + start)
        labels = batch["labels"]
        output = model(**batch)
        number = float(output.num_items)
        total += float(output.loss) * number
        count += number
        if settings.objective == "clm":
            labels = labels.clone()
            labels[batch["cu_seqlens"][:-1]] = -100
        plain -= float(frequency[labels[labels != -100]].sum())
    model.train(training)
    if not count:
        return {"held-out loss": None, "perplexity": None, "unigram loss": None, "held-out tokens": 0}
    return {
        "held-out loss": round(total / count, 4),
        "perplexity": round(math.exp(total / count), 2),
        "unigram loss": round(plain / count, 4),
        "held-out tokens": int(count),
    }
