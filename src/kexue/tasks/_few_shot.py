"""Few-shot tuning of a next-sentence model: (text, prompt of its label) = IsNext, the other prompts = NotNext."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from kexue.tasks._cls_forward import head_of
from kexue.tasks._nsp_model import NextSentenceModel
from kexue.tasks.next_sentence import SPECIALS, NextSentenceScorer

#: Texts in one step.
TEXTS = 8


class _PairLoss(nn.Module):
    """Next-sentence cross entropy; the one right prompt of a text weighs as much as the K - 1 wrong ones together."""

    def __init__(self, trained: nn.Module, index: int) -> None:
        super().__init__()
        self.trained, self.index = trained, index

    def logits(self, **inputs: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, gold: Tensor, **inputs: Tensor) -> Tensor:
        logits = self.logits(**inputs)
        odds = (logits[:, self.index] - logits[:, 1 - self.index]).to(torch.promote_types(logits.dtype, torch.float32))
        return (F.softplus(-odds[gold]).mean() + F.softplus(odds[~gold]).mean()) / 2


class _HeadLoss(_PairLoss):
    """From states of [CLS] that do not change while only pooler and head are trained."""

    def __init__(self, model: nn.Module, index: int) -> None:
        head = head_of(model)
        if head is None:
            raise ValueError(f"{type(model).__name__} has no pooler that is known; few_shot='all' trains it whole")
        super().__init__(nn.ModuleList([head.pooler, head.last]), index)
        self.head = head

    def logits(self, **inputs: Tensor) -> Tensor:
        return self.head(inputs["states"])


class _WholeLoss(_PairLoss):
    """Through the whole model, with its dropout."""

    def __init__(self, scorer: NextSentenceModel, index: int) -> None:
        super().__init__(scorer.model, index)
        self._scorer = [scorer]  # in a list: it is not a part of this module

    def logits(self, **inputs: Tensor) -> Tensor:
        return self._scorer[0].forward(inputs)


def few_shot_model(
    scorer: NextSentenceScorer,
    texts: Sequence[str],
    gold: NDArray[np.int64],
    prompts: Sequence[str],
    owners: NDArray[np.int64],
    *,
    prefix: bool,
    whole: bool,
    steps: int,
    lr: float,
    seed: int,
    show_progress: bool | None,
) -> nn.Module:
    """A tuned copy of the scorer's model.

    Args:
        scorer: The model as it is; it is not changed.
        texts: N texts.
        gold: Class of each text, (N,).
        prompts: P prompts.
        owners: Class of each prompt, (P,).
        prefix: Where the prompt stands.
        whole: Train everything instead of pooler and head only.
        steps: Steps of 8 texts with all prompts.
        lr: Learning rate.
        seed: Of order and dropout.
        show_progress: As in :func:`kexue.training.fit`.
    """
    from kexue.training import batch_indices, fit

    model = copy.deepcopy(scorer.model.model)
    bodies, heads = scorer.encode(texts), scorer.encode(prompts, "prompts")
    scorer.check_prompts(heads, prompts)
    pairs = []
    for body in bodies:
        for head in heads:
            text = body[: scorer.max_length - SPECIALS - len(head)]
            pairs.append(scorer.join(head, text) if prefix else scorer.join(text, head))
    width, number = len(heads), len(bodies)
    right = torch.from_numpy(gold[:, None] == owners[None])  # (N, P)
    size = min(TEXTS, number)

    loss: _PairLoss
    if whole and not scorer.model.pads:
        raise ValueError(f"few_shot='all' pads; {type(model).__name__} takes no attention_mask. Use few_shot='head'")
    if whole:
        # The copy is what is trained, so its own forward is called, with gradients.
        loss = _WholeLoss(NextSentenceModel(model, None, None, False), scorer.is_next_index)
    else:
        states = _states(scorer, pairs).view(number, width, -1)
        loss = _HeadLoss(model, scorer.is_next_index)

    loss.requires_grad_(True)  # the copy's; the given model may be frozen

    def batch(step: int) -> dict[str, Any]:
        rows = batch_indices(seed, step, size, number).copy()
        marks = right[rows].flatten().to(scorer.model.device)
        if not whole:
            return {"states": states[rows].flatten(0, 1), "gold": marks}
        return {**scorer.model.padded([pairs[r * width + k] for r in rows for k in range(width)]), "gold": marks}

    with tempfile.TemporaryDirectory() as out:
        fit(
            loss, batch, steps=steps, out=out, save_every=steps, lr=lr, seed=seed, warmup=max(1, steps // 10),
            label="few-shot tuning", show_progress=show_progress,
        )  # fmt: skip
    return model.eval()


def _states(scorer: NextSentenceScorer, pairs: Sequence[tuple[list[int], list[int]]]) -> Tensor:
    """States of [CLS] of all pairs, (N P, D), in batches by length."""
    lengths = np.array([len(ids) for ids, _ in pairs], np.int64)
    parts, order = [], []
    for rows in scorer.batches(lengths):
        parts.append(scorer.model.states([pairs[row] for row in rows]))
        order.append(rows)
    inverse = np.argsort(np.concatenate(order), kind="stable")
    return torch.cat(parts)[torch.from_numpy(inverse).to(parts[0].device)]
