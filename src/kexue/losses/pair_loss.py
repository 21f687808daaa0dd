"""Unified pair loss (统一的成对损失): every positive above every negative, the form behind softmax and circle loss.

Source: 科学空间 7359 (将“Softmax+交叉熵”推广到多标签分类问题); Sun et al., Circle Loss, https://arxiv.org/abs/2002.10857.

    L = log(1 + sum over i in Neg, j in P of exp(g (s_i - s_j + m)))
      = softplus(logsumexp over Neg of g (s_i + m)  +  logsumexp over P of -g s_j)

The pairs factor, so that n classes cost n exponentials, not |Neg| |P|. With one positive, g = 1 and m = 0 it is
cross-entropy. It orders classes and says nothing of a threshold: take the k best when k is known, and
``zlpr_loss`` (the same rule with a threshold class at 0) otherwise. One buffer of the size of the scores holds both
sides, each class being on one side only, and becomes the gradient.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kexue._checks import check_choice, check_real
from kexue._tensors import compute_dtype, once_differentiable
from kexue.losses._common import REDUCTIONS, reduce_loss
from kexue.losses._label_sets import split_labels

__all__ = ["unified_pair_loss"]

FARTHEST = 1e30  # as far as float32 reaches


def _top(u: Tensor, side: Tensor) -> Tensor:
    """Largest value of u within a side, 0 for a side without finite values."""
    top = u.masked_fill(~side, -math.inf).amax(-1, keepdim=True)
    return torch.where(top > -math.inf, top, 0.0)


class _Pairs(torch.autograd.Function):
    """Value v of each row, before the softplus."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, positive: Tensor, gamma: float, margin: float) -> Tensor:
        u = scores.to(compute_dtype(scores))
        negative = ~positive
        u = torch.where(positive, -u, u)
        top_p, top_n = _top(u, positive), _top(u, negative)
        # Differences first, then the scale and the margin: what the scores have in common costs no precision.
        u.sub_(torch.where(positive, top_p, top_n)).mul_(gamma).exp_()
        total_p = (u * positive).sum(-1, keepdim=True)
        total_n = (u * negative).sum(-1, keepdim=True)
        # Each side becomes a distribution; the sign is that of the gradient.
        u.mul_(torch.where(positive, -gamma / total_p, gamma / total_n).nan_to_num_(0.0, 0.0, 0.0))
        ctx.save_for_backward(u, scores)
        value = total_p.log() + total_n.log() + (top_p + top_n + margin) * gamma
        empty = (total_p == 0) | (total_n == 0)  # not left to -inf + value: the value may be inf
        return value.masked_fill_(empty, -math.inf).squeeze(-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weights, scores = ctx.saved_tensors
        return (weights * grad.unsqueeze(-1)).to(scores.dtype), None, None, None


def unified_pair_loss(
    scores: Tensor,
    target: Tensor,
    gamma: float = 1.0,
    margin: float = 0.0,
    *,
    indices: bool = False,
    ignore_index: int = -1,
    mask: Tensor | None = None,
    reduction: str = "mean",
    validate: bool = True,
) -> Tensor:
    """Loss that puts every positive above every negative by a margin.

    One buffer of the size of the scores; differentiable once.

    Args:
        scores: (..., n) logits; -inf excludes a class, which must not be a positive, and neither must a class at
            -1e12, which common code takes for -inf. fp16 and bf16 are computed in float32.
        target: (..., n) multi-hot, bool or 0 and 1 of any dtype; with ``indices`` (..., k) integers.
        gamma: g, positive: how hard the largest violation dominates.
        margin: m, by how much positives shall exceed negatives; may be negative.
        indices: The target lists the positives of each row; repetitions count once.
        ignore_index: Pads rows of indices.
        mask: Bool, broadcastable to the scores; True = takes part. A positive must take part.
        reduction: "none" (...), "mean" or "sum" over rows.
        validate: Check the content of the target (a few reductions; never done under torch.compile). When it is off,
            a positive that takes no part is left out.

    Returns:
        The loss in float32 (float64 for float64 scores); 0 with gradient 0 in a row without positives or negatives.

    Raises:
        TypeError: Wrong kind of argument.
        ValueError: Shapes that do not fit, indices out of range, a positive that takes no part, gamma not positive.

    Reference:
        https://spaces.ac.cn/archives/7359, https://arxiv.org/abs/2002.10857

    Example:
        >>> scores = torch.tensor([[2.0, 1.0, -1.0]])
        >>> unified_pair_loss(scores, torch.tensor([[1, 0, 0]]))  # one positive: cross-entropy
        tensor(0.3490)
        >>> unified_pair_loss(scores, torch.tensor([[0, 1]]), gamma=4.0, margin=0.5, indices=True)
        tensor(0.0025)
    """
    check_real("gamma", gamma, above=0.0)
    check_real("margin", margin)
    if not (1 / FARTHEST <= gamma <= FARTHEST and abs(margin) <= FARTHEST):
        raise ValueError(
            f"gamma must lie in [{1 / FARTHEST:g}, {FARTHEST:g}] and margin within {FARTHEST:g} of 0; "
            f"got {gamma!r} and {margin!r}"
        )
    check_choice("reduction", reduction, REDUCTIONS)
    scores, positive = split_labels(scores, target, indices, ignore_index, mask, validate)
    v = _Pairs.apply(scores, positive, float(gamma), float(margin))
    return reduce_loss(F.softplus(v, threshold=50.0), reduction)
