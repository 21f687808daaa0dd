"""What the losses share: the precision they compute in, reductions, checks of labels, and two log-sum-exp primitives.

Shapes: B batch, N rows, C classes, K candidates.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kexue._checks import check_choice, check_real
from kexue._tensors import compute_dtype, once_differentiable

REDUCTIONS = ("none", "mean", "sum")
MODES = ("info", "flat")
LOG2E = math.log2(math.e)
MIN_NORM = 1e-12  # a vector shorter than this has no direction: it counts as zero and gets no gradient


def inverse_norms(x: Tensor) -> Tensor:
    """1 / norm of each row, (..., 1); 0 for a zero row, whose gradient is then 0 too."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    if x.is_cpu and x.numel() and not torch.compiler.is_compiling():
        low, high = (float(end) for end in torch.aminmax(norm.detach()))
        if low > MIN_NORM and high < torch.inf:  # the usual case, in two operations
            return norm.reciprocal()
    # the squares of a row beyond 1e19 overflow float32: it is divided by its largest entry first
    top = torch.where(norm.detach() == torch.inf, x.detach().abs().amax(-1, keepdim=True), 1.0)
    norm = torch.linalg.vector_norm(x / top, dim=-1, keepdim=True)
    return torch.where(norm > MIN_NORM, norm.clamp(min=MIN_NORM).reciprocal(), 0.0) / top


def unit_rows(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rows divided by their norms, in ``dtype``, and the inverse norms."""
    x = x.to(dtype)
    inverse = inverse_norms(x)
    return x * inverse, inverse


def through_norm(grad: Tensor, unit: Tensor, inverse: Tensor) -> Tensor:
    """Gradient with respect to x from that with respect to x / |x|."""
    return torch.addcmul(grad, unit, (grad * unit).sum(-1, keepdim=True), value=-1).mul_(inverse)


def check_temperature(temperature: Any) -> None:
    """Raise unless ``temperature`` is a positive finite number; scores of 1e30 are as far as float32 reaches."""
    check_real("temperature", temperature, above=0.0)
    check_real("temperature", temperature, minimum=1e-30)


def check_labels(labels: Any, rows: tuple[int, ...], classes: int, validate: bool) -> None:
    """Raise unless ``labels`` are integers of shape ``rows`` in ``[0, classes)``.

    The range costs one reduction; it is not looked at when ``validate`` is False or while torch.compile traces.
    """
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels must be a tensor; got {type(labels).__name__}")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"labels must be integers; got dtype {labels.dtype}")
    if tuple(labels.shape) != rows:
        raise ValueError(f"labels must have shape {rows}; got {tuple(labels.shape)}")
    if validate and not torch.compiler.is_compiling() and labels.numel():
        low, high = (int(x) for x in torch.aminmax(labels))
        if low < 0 or high >= classes:
            raise ValueError(f"labels must lie in [0, {classes}); got values from {low} to {high}")


def reduce_loss(rows: Tensor, reduction: str) -> Tensor:
    """Apply ``reduction``; the mean over no rows is 0, so that an empty last batch does no harm."""
    check_choice("reduction", reduction, REDUCTIONS)
    if reduction == "none":
        return rows
    total = rows.sum()
    return total if reduction == "sum" else total / max(rows.numel(), 1)


def lse0(u: Tensor, dim: int = -1) -> Tensor:
    """log(1 + sum exp(u)): log-sum-exp with an implicit zero, which stands for "already satisfied".

    Exact also where the sum is tiny (log1p) or overflows, and 0 where every entry is -inf or the axis is empty.

    Args:
        u: Scores, any shape; fp16 and bf16 are computed in float32.
        dim: Axis of the sum.

    Returns:
        The sum in float32 (float64 for float64 scores), without the axis.

    Example:
        >>> lse0(torch.tensor([0.0, -torch.inf]))
        tensor(0.6931)
    """
    u = u.to(compute_dtype(u))
    if u.shape[dim] == 0:
        return u.sum(dim)
    top = u.detach().amax(dim, keepdim=True).clamp(min=0)  # the implicit zero takes part in the maximum
    total = torch.exp(u - top).sum(dim)
    top = top.squeeze(dim)
    return top + torch.log1p(total + torch.expm1(-top))


class _SplitScores(torch.autograd.Function):
    """(log-sum-exp of the other scores, score of the target) with one buffer of the size of the scores."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, target: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        index = target.unsqueeze(-1)
        weights = scores.to(compute_dtype(scores)) * scale  # a copy even for scale = 1: it is overwritten below
        chosen = weights.gather(-1, index).squeeze(-1)
        weights.scatter_(-1, index, -math.inf)  # the target is taken out, never subtracted afterwards
        top = weights.amax(-1, keepdim=True)
        top = torch.where(top > -math.inf, top, 0.0)
        weights.sub_(top).mul_(LOG2E).exp2_()  # several times faster than exp_ on a CPU
        total = weights.sum(-1, keepdim=True)
        ctx.save_for_backward(weights, total, index, scores)
        ctx.scale, ctx.dtype = scale, scores.dtype
        return (total.log() + top).squeeze(-1), chosen

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_others: Tensor, grad_chosen: Tensor) -> tuple[Tensor | None, ...]:
        weights, total, index, _ = ctx.saved_tensors
        grad = weights * ((grad_others * ctx.scale).unsqueeze(-1) / torch.where(total > 0, total, 1.0))
        grad.scatter_(-1, index, (grad_chosen * ctx.scale).unsqueeze(-1))
        return grad.to(ctx.dtype), None, None


def split_scores(scores: Tensor, target: Tensor, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Scores (..., K), target (...) -> log sum over j != target of exp(scale s_j), and scale times the target's score.

    The first is -inf in a row whose other scores are all -inf, or that has no other score.
    """
    others, chosen = _SplitScores.apply(scores, target, scale)
    return others, chosen


def contrast_value(v: Tensor, report: str) -> Tensor:
    """FlatNCE v, or InfoNCE softplus(v)."""
    return v if report == "flat" else F.softplus(v, threshold=50.0)


def contrast_report(v: Tensor, mode: str, report: str) -> Tensor:
    """The value of ``report`` with the gradient of ``mode``."""
    loss = contrast_value(v, mode)
    if mode == report:
        return loss
    shown = contrast_value(v, report).detach()
    difference = torch.where(torch.isinf(loss), 0.0, loss - loss.detach())  # a row without negatives: -inf + inf
    return difference + shown


def check_modes(mode: str, report: str | None, reduction: str) -> str:
    """Check the three and return the report, which is the mode unless given."""
    check_choice("mode", mode, MODES)
    if report is not None:
        check_choice("report", report, MODES)
    check_choice("reduction", reduction, REDUCTIONS)
    return report or mode
