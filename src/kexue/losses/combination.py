"""Combination softmax (组合版 Softmax): cross-entropy over all sets of k classes.

Source: 科学空间 7359 (将“Softmax+交叉熵”推广到多标签分类问题), its first attempt.

A row with k labels is one choice among the sets of k classes, scored by the sum of their scores:

    L = log Z_k - sum of the targets' scores,    Z_k = sum over |S| = k of exp(sum of s over S)

so that k = 1 is cross-entropy. With a pad class of score s_0 that a set may hold any number of times, the sets have
K members and up to K of them are labels:

    L = log Zbar_K - sum of the targets' scores - (K - k) s_0,    Zbar_K = Z_K + exp(s_0) Zbar_{K-1}

which is binary cross-entropy of s - s_0, summed, as soon as K reaches the number of classes.

What we do differently: the article's Newton identities subtract numbers of equal size; here only positive numbers are
added, at any scores, in O(n k) and log2(n) steps (``_combination_kernel.py``). The gradient is the inclusion
probability of each class minus its label, exact, and computed along with the value.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from kexue._checks import check_choice, check_int, check_real
from kexue._tensors import as_recorded, compute_dtype, once_differentiable
from kexue.losses._combination_kernel import run_combination
from kexue.losses._common import REDUCTIONS, reduce_loss
from kexue.losses._label_sets import split_labels

__all__ = ["combination_cross_entropy"]


class _Combination(torch.autograd.Function):
    """Losses of rows; the gradient is made in the forward pass."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, positive: Tensor, pad: Tensor | None, most: int) -> Tensor:
        loss, grad = run_combination(scores, positive, pad, most, any(ctx.needs_input_grad))
        ctx.save_for_backward(grad, scores, pad)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        made, scores, _ = ctx.saved_tensors
        made = made * grad[:, None]
        of_scores = made.to(scores.dtype) if ctx.needs_input_grad[0] else None
        of_pad = made.sum(1).neg() if ctx.needs_input_grad[2] else None
        return of_scores, None, of_pad, None


def _pad_rows(pad_score: Any, scores: Tensor, validate: bool) -> Tensor:
    """The pad class's score of each row, (N,)."""
    rows = scores.shape[:-1]
    dtype = compute_dtype(scores)
    if not isinstance(pad_score, Tensor):
        check_real("pad_score", pad_score)
        if abs(float(pad_score)) > torch.finfo(dtype).max:
            raise ValueError(f"pad_score must be finite in {dtype}; got {pad_score!r}")
        return scores.new_full((math.prod(rows),), float(pad_score), dtype=dtype)
    if not pad_score.is_floating_point():
        raise TypeError(f"pad_score must be a number or a floating tensor; got dtype {pad_score.dtype}")
    try:
        pad = pad_score.to(dtype).expand(*rows, 1)
    except RuntimeError:
        raise ValueError(f"pad_score must broadcast to {(*rows, 1)}; got shape {tuple(pad_score.shape)}") from None
    if validate and not torch.compiler.is_compiling() and not bool(torch.isfinite(pad).all()):
        raise ValueError(f"pad_score must be finite in {dtype}; got an infinite or NaN value")
    return pad.reshape(-1)


def combination_cross_entropy(
    scores: Tensor,
    target: Tensor,
    max_k: int | None = None,
    *,
    pad_score: float | Tensor | None = None,
    indices: bool = False,
    ignore_index: int = -1,
    mask: Tensor | None = None,
    reduction: str = "mean",
    validate: bool = True,
) -> Tensor:
    """Cross-entropy of the target set among all sets of as many classes.

    Costs O(n k) with k the largest number of labels. Memory: one buffer of the size of the scores, and scratch of a few
    MiB or, if that is more, of about 2 n log2(16 k) numbers (one row). Differentiable once.

    Args:
        scores: (..., n) logits; -inf excludes a class, which must not be a positive, and neither must a class at
            -1e12, which common code takes for -inf. fp16 and bf16 are computed in float32.
        target: (..., n) multi-hot, bool or 0 and 1 of any dtype; with ``indices`` (..., k) integers. Rows may have
            unequal numbers of labels.
        max_k: Bound on the number of labels of a row; None is the largest of the batch. Without ``pad_score`` the
            loss does not depend on it.
        pad_score: None: a row with k labels chooses among sets of exactly k classes, and a row without labels has
            loss 0. A number, or a tensor that broadcasts to (..., 1): score of the pad class, which may be repeated,
            so that the row chooses among sets of up to ``max_k`` classes; then pass ``max_k``, for the loss depends
            on it (until it reaches n). 0 makes 0 the threshold of a single class.
        indices: The target lists the positives of each row; repetitions count once.
        ignore_index: Pads rows of indices.
        mask: Bool, broadcastable to the scores; True = takes part. A positive must take part.
        reduction: "none" (...), "mean" or "sum" over rows.
        validate: Check the content of the target (a few reductions; never done under torch.compile). When it is off,
            a positive that takes no part is left out.

    Returns:
        The loss in float32 (float64 for float64 scores), never negative.

    Raises:
        TypeError: Wrong kind of argument.
        ValueError: Shapes that do not fit, indices out of range, a positive that takes no part, more labels in a row
            than ``max_k``.

    Reference:
        https://spaces.ac.cn/archives/7359

    Example:
        >>> scores = torch.tensor([[2.0, 1.0, -1.0]], requires_grad=True)
        >>> loss = combination_cross_entropy(scores, torch.tensor([[1, 1, 0]]))
        >>> loss  # -log(e^3 / (e^3 + e^1 + e^0))
        tensor(0.1698, grad_fn=<DivBackward0>)
        >>> loss.backward()
        >>> scores.grad  # inclusion probability minus label
        tensor([[-0.0420, -0.1142,  0.1562]])
    """
    if max_k is not None:
        check_int("max_k", max_k, 0)
    check_choice("reduction", reduction, REDUCTIONS)
    scores, positive = split_labels(scores, target, indices, ignore_index, mask, validate)
    pad = None if pad_score is None else _pad_rows(pad_score, scores, validate)
    rows, classes = scores.shape[:-1], scores.shape[-1]
    most = -1 if max_k is None else min(int(max_k), classes)  # a bound beyond the number of classes bounds nothing
    count = math.prod(rows)
    scores, pad = as_recorded(scores, pad)
    loss = _Combination.apply(scores.reshape(count, classes), positive.reshape(count, classes), pad, most)
    return reduce_loss(loss.reshape(rows), reduction)
