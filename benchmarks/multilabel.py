"""Losses over sets of labels: combination softmax and the unified pair loss, forward and backward, one thread."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.harness import Table
from benchmarks.losses import Step, table
from kexue.losses import combination_cross_entropy, unified_pair_loss

SECTION = "Losses over sets of labels"


def _sets(rows: int, classes: int, labels: int) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    scores = torch.randn(rows, classes, generator=g).requires_grad_()
    index = torch.stack([torch.randperm(classes, generator=g)[:labels] for _ in range(rows)])
    return scores, index, torch.zeros(rows, classes, dtype=torch.bool).scatter_(1, index, True)


def _recurrence(scores: Tensor, index: Tensor) -> Tensor:
    """Log Z_k by the positive recurrence over the classes in log space, left to autograd."""
    most = index.shape[1]
    # a finite stand-in for log 0: logaddexp has no gradient between two infinities
    log_z = scores.new_full((len(scores), most + 1), -1e9).index_fill(1, torch.tensor(0), 0.0)
    for column in scores.unbind(1):
        log_z = torch.cat([log_z[:, :1], torch.logaddexp(log_z[:, 1:], log_z[:, :-1] + column[:, None])], 1)
    return (log_z[:, -1] - scores.gather(1, index).sum(1)).mean()


def _newton(scores: Tensor, index: Tensor) -> Tensor:
    """Log Z_k by Newton's identities as in the article, on scores minus their maximum."""
    top = scores.detach().amax(1, keepdim=True)
    e = torch.exp(scores - top)
    sums = [(e**r).sum(1) for r in range(1, index.shape[1] + 1)]
    z = [torch.ones_like(sums[0])]
    for k in range(1, index.shape[1] + 1):
        z.append(sum((-1) ** (r - 1) * z[k - r] * sums[r - 1] for r in range(1, k + 1)) / k)
    return (z[-1].log() + index.shape[1] * top.squeeze(1) - scores.gather(1, index).sum(1)).mean()


def _newton_error() -> str:
    """Newton's identities in float32 where few scores stand out, against the exact value."""
    g = torch.Generator().manual_seed(1)
    scores = 10 * torch.randn(64, 1000, generator=g)
    index = torch.arange(5).expand(64, 5)
    exact = float(combination_cross_entropy(scores.double(), index, indices=True))
    newton, ours = float(_newton(scores, index)), float(combination_cross_entropy(scores, index, indices=True))
    shown = "NaN" if math.isnan(newton) else f"{abs(newton - exact) / exact:.1e}"
    return (
        f"Relative error of the loss in float32 on scores of standard deviation 10 (64 x 1000, 5 labels): Newton's "
        f"identities {shown}, combination_cross_entropy {abs(ours - exact) / exact:.1e}."
    )


def combination(rows: int, classes: int, labels: int, repeats: int) -> Table:
    scores, index, _ = _sets(rows, classes, labels)
    steps = {
        "recurrence, autograd": Step(lambda: _recurrence(scores, index), scores),
        "Newton's identities (inexact)": Step(lambda: _newton(scores, index), scores),
        "combination_cross_entropy": Step(lambda: combination_cross_entropy(scores, index, indices=True), scores),
    }
    return table(
        f"Combination softmax, {labels} of {classes} classes",
        f"B {rows}, float32, forward and backward.",
        steps,
        "recurrence, autograd",
        repeats=repeats,
    )


def pairs() -> Table:
    scores, index, dense = _sets(256, 10_000, 5)

    def plain() -> Tensor:
        negatives = torch.logsumexp((8 * (scores + 0.25)).masked_fill(dense, -math.inf), 1)
        positives = torch.logsumexp((-8 * scores).masked_fill(~dense, -math.inf), 1)
        return F.softplus(negatives + positives).mean()

    return table(
        "Unified pair loss",
        "B 256, C 10000, 5 labels per row, gamma 8, margin .25, float32, forward and backward.",
        {
            "two masked logsumexp": Step(plain, scores),
            "unified_pair_loss": Step(lambda: unified_pair_loss(scores, dense, 8.0, 0.25), scores),
            "unified_pair_loss, indices": Step(
                lambda: unified_pair_loss(scores, index, 8.0, 0.25, indices=True), scores
            ),
        },
        "two masked logsumexp",
        repeats=7,
    )


def run() -> list[Table]:
    """All comparisons of this file."""
    few, many = combination(32, 1000, 5, 5), combination(256, 10_000, 5, 3)
    few.remarks.append(_newton_error())
    return [few, many, pairs()]
