"""Few-shot tuning of a next-sentence model: (text, prompt of its label) = IsNext, the other prompts = NotNext."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Sequence
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


class PairLoss(nn.Module):
    """Next-sentence cross entropy; the one right prompt of a text weighs as much as the K - 1 wrong ones together.

    Args:
        trained: What is trained.
        index: Which logit means IsNext.
        logits: The inputs of a batch -> logits (N, 2).
    """

    def __init__(self, trained: nn.Module, index: int, logits: Callable[..., Tensor]) -> None:
        super().__init__()
        self.trained, self.index, self.logits = trained, index, logits

    def forward(self, gold: Tensor, **inputs: Tensor) -> Tensor:
        """Loss of pairs, of which ``gold`` (N,) follow each other."""
        logits = self.logits(**inputs)
        odds = (logits[:, self.index] - logits[:, 1 - self.index]).to(torch.promote_types(logits.dtype, torch.float32))
        return (F.softplus(-odds[gold]).mean() + F.softplus(odds[~gold]).mean()) / 2


def head_loss(model: nn.Module, index: int) -> PairLoss:
    """From ``states`` of [CLS] (N, D), which do not change while only pooler and head are trained."""
    head = head_of(model)
    if head is None:
        raise ValueError(f"{type(model).__name__} has no pooler that is known; few_shot='all' trains it whole")
    return PairLoss(nn.ModuleList([head.pooler, head.last]), index, lambda states: head(states))


def whole_loss(model: nn.Module, index: int) -> PairLoss:
    """From padded pairs through the whole model, with its dropout."""
    own = NextSentenceModel(model, None, None, False)
    return PairLoss(model, index, lambda **inputs: own.forward(inputs))


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

    if whole and not scorer.model.pads:
        raise ValueError(f"few_shot='all' pads; {type(model).__name__} takes no attention_mask. Use few_shot='head'")
    loss = (whole_loss if whole else head_loss)(model, scorer.is_next_index)
    states = None if whole else _states(scorer, pairs).view(number, width, -1)
    loss.requires_grad_(True)  # the copy's; the given model may be frozen

    def batch(step: int) -> dict[str, Any]:
        rows = batch_indices(seed, step, size, number).copy()
        marks = right[rows].flatten().to(scorer.model.device)
        if states is not None:
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
