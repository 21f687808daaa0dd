"""Sparse softmax and its cross entropy (稀疏 Softmax): only the k largest scores take part.

Source: 科学空间 8046 (SPACES:“抽取-生成”式长文本摘要) and 10145; Sparse-softmax, https://arxiv.org/abs/2112.12433.

With Omega the indices of the k largest scores of a row s (of equal scores the one of lower index comes first):

    p_i  = exp(s_i) / sum over j in Omega of exp(s_j)  for i in Omega, else 0
    loss = log( sum over j in Omega of exp(s_j) ) - s_t          (t the target)
    d loss / d s_i = p_i - [i = t]                               (at most k + 1 entries are not 0)

The loss is at least 0, and finite also if the target is not in Omega, where it is at least log k: then it is not
-log p_t. Dense cross entropy can only fall to log 2 if the largest and the smallest score are log(n - 1) apart; here it
is log(k - 1), between the largest and the k-th. That is the point: fewer demands on scores that rank rightly anyway.
The price: scores outside Omega get no gradient. Fine-tune with this loss, from scratch it under-fits.

Instead of k a probability p may be given: Omega is then the nucleus, the smallest set of largest probabilities whose
sum is at least p. With k >= n or p = 1 all is as in the dense functions of torch.

What we do differently from topk + logsumexp: ties have a rule, so that devices agree; one pass finds Omega (see
``_topk_kernel.py``); the target's two parts of the gradient meet in float32; rows that do not count contribute exactly
0, whatever they hold. Everything behind Omega is done on k + 1 scores a row.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kexue._checks import check_choice, check_int, check_real
from kexue._tensors import check_float, compute_dtype
from kexue.losses._common import REDUCTIONS
from kexue.losses._topk_kernel import nucleus, run_top

__all__ = ["SparseCrossEntropyLoss", "sparse_cross_entropy", "sparse_softmax"]

K = 10


def sparse_softmax(logits: Tensor, k: int | None = K, dim: int = -1, *, p: float | None = None) -> Tensor:
    """Softmax over the k largest scores, 0 elsewhere. Differentiable any number of times, with Omega held fixed.

    Args:
        logits: Scores, any shape with at least one dimension; fp16 and bf16 are computed in float32.
        k: How many scores are kept, of equal ones those of the lowest index; all of them from k = n on.
        dim: The dimension of the n classes.
        p: Keep the nucleus of mass p in (0, 1] instead; k has to stay as it is, or None.

    Returns:
        Probabilities of the shape and dtype of the scores. They are all 0 where every score is -inf, and NaN in Omega
        where a score is NaN.

    Raises:
        TypeError: Scores that are not floating, a k that is no integer, a p that is no number.
        ValueError: A k below 1, a p outside (0, 1], both of them, no classes, a dimension that does not exist.

    Reference:
        https://spaces.ac.cn/archives/8046

    Example:
        >>> sparse_softmax(torch.tensor([0.0, 2.0, 2.0, 1.0]), k=2)
        tensor([0.0000, 0.5000, 0.5000, 0.0000])
        >>> sparse_softmax(torch.tensor([0.5, 0.3, 0.15, 0.05]).log(), p=0.7)
        tensor([0.6250, 0.3750, 0.0000, 0.0000])
    """
    check_float("logits", logits)
    k = check_kept(k, p)
    if logits.dim() == 0:
        raise ValueError("logits must have at least one dimension; got a number")
    check_int("dim", dim, -logits.dim())
    if dim >= logits.dim():
        raise ValueError(f"dim must be in [{-logits.dim()}, {logits.dim()}); got {dim} for shape {tuple(logits.shape)}")
    if logits.shape[dim] == 0:
        raise ValueError(f"logits must have at least one class; got shape {tuple(logits.shape)} with dim {dim}")
    rows = logits.movedim(dim, -1)
    n = rows.shape[-1]
    if (k is None or k >= n) and (p is None or p >= 1):
        return _softmax(rows).movedim(-1, dim)
    index, kept = _omega(rows.reshape(-1, n), k, p)
    index = index.view(*rows.shape[:-1], index.shape[-1])
    chosen = rows.gather(-1, index)
    if kept is not None:
        chosen = torch.where(kept.view(index.shape), chosen, -math.inf)
    return torch.zeros_like(rows).scatter(-1, index, _softmax(chosen)).movedim(-1, dim)


def _omega(rows: Tensor, k: int | None, p: float | None) -> tuple[Tensor, Tensor | None]:
    """Indices (R, m) of rows (R, n), and which of them are in Omega, None for all."""
    if k is not None:
        return run_top(rows, k), None
    if p is None:
        raise TypeError("k or p must be given; got neither")
    return nucleus(rows, p)


def _softmax(scores: Tensor) -> Tensor:
    """Softmax over the last dimension in the dtype of the scores; 0 where all are -inf."""
    empty = (scores == -math.inf).all(-1, keepdim=True)
    chance = torch.softmax(scores.masked_fill(empty, 0).to(compute_dtype(scores)), -1)
    return chance.masked_fill(empty, 0).to(scores.dtype)


def check_kept(k: Any, p: Any) -> int | None:
    """Raise unless one of k and p is given, and well; return k, or None where p counts."""
    if p is None:
        check_int("k", k, 1)
        return int(k)
    check_real("p", p, above=0.0)
    if p > 1:
        raise ValueError(f"p must be in (0, 1]; got {p!r}")
    if k is not None and (type(k) is not int or k != K):
        raise ValueError(f"give k or p, not both; got k = {k!r} and p = {p!r}")
    return None


def check_target(target: Any, shape: tuple[int, ...], classes: int, ignore_index: Any) -> None:
    """Raise unless ``target`` holds integers of this shape in [0, classes), or ``ignore_index``."""
    if not isinstance(target, Tensor):
        raise TypeError(f"target must be a tensor of integers; got {type(target).__name__}")
    if target.is_floating_point() or target.is_complex() or target.dtype == torch.bool:
        raise TypeError(
            f"target must be a tensor of integers (class probabilities are not offered); got {target.dtype}"
        )
    if tuple(target.shape) != shape:
        raise ValueError(f"target must have shape {shape}; got {tuple(target.shape)}")
    check_ignored(ignore_index)
    if target.numel() and not torch.compiler.is_compiling():
        wide = target.long()
        low, high = (int(end) for end in torch.aminmax(wide))
        if low >= 0 and high < classes:  # the usual case, in one operation
            return
        bad = (wide != ignore_index) & ((wide < 0) | (wide >= classes))
        if bool(bad.any()):
            raise ValueError(f"target must be in [0, {classes}) or {ignore_index}; got {int(wide[bad].flatten()[0])}")


def check_ignored(ignore_index: Any) -> None:
    """Raise unless ``ignore_index`` is an integer."""
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index must be an integer; got {ignore_index!r}")


def check_options(weight: Any, classes: int | None, reduction: Any, label_smoothing: Any, name: str = "weight") -> None:
    """Raise unless the options that both losses share are good; None for a number of classes that is not known."""
    check_choice("reduction", reduction, REDUCTIONS)
    check_real("label_smoothing", label_smoothing, minimum=0.0)
    if label_smoothing > 1:
        raise ValueError(f"label_smoothing must be in [0, 1]; got {label_smoothing!r}")
    if weight is not None:
        check_float(name, weight, 1)
        if classes is not None and weight.shape[0] != classes:
            raise ValueError(f"{name} must have {classes} entries, one for each class; got {weight.shape[0]}")


def picked_losses(
    picked: Tensor, index: Tensor, within: Tensor | None, target: Tensor, ignored: Tensor, weight: Tensor | None,
    smoothing: float,
) -> Tensor:  # fmt: skip
    """Losses of rows from the scores of Omega and of the target.

    Args:
        picked: (R, k + 1) the scores at ``index``, then that of the target, in the dtype of the loss.
        index: (R, k) Omega.
        within: (R, k) bool, which of them are in Omega after all; None for all of them.
        target: (R,) in [0, n).
        ignored: (R,) bool, rows whose loss and gradient are 0.
        weight: (n,) of the classes, or None.
        smoothing: Label smoothing.
    """
    if within is None and not smoothing and not torch.compiler.is_compiling():
        return _PlainLosses.apply(picked, index, target, ignored, weight)
    return _differentiable_losses(picked, index, within, target, ignored, weight, smoothing)


class _PlainLosses(torch.autograd.Function):
    """:func:`picked_losses` without label smoothing, its first gradient written out."""

    @staticmethod
    def forward(
        ctx: Any, picked: Tensor, index: Tensor, target: Tensor, ignored: Tensor, weight: Tensor | None
    ) -> Tensor:
        top = picked[:, :-1].amax(1, keepdim=True)
        silent = (top == -math.inf).logical_or_(ignored.unsqueeze(1))
        chance = picked - top
        own = chance[:, -1].clone()
        chance.exp_()
        total = chance[:, :-1].sum(1, keepdim=True)
        loss = total.log().squeeze(1).sub_(own)
        chance.div_(total)
        at = index == target.unsqueeze(1)
        chance[:, :-1].sub_(at.to(chance.dtype))
        torch.sub(at.any(1).to(chance.dtype), 1, out=chance[:, -1])
        if weight is not None:
            factor = weight[target]
            loss.mul_(factor)
            chance.mul_(factor.unsqueeze(1))
        ctx.save_for_backward(picked, index, target, ignored, weight, chance.masked_fill_(silent, 0))
        return loss.masked_fill_(silent.squeeze(1), 0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        picked, index, target, ignored, weight, slope = ctx.saved_tensors
        if torch.is_grad_enabled():  # somebody will differentiate once more
            losses = _differentiable_losses(picked, index, None, target, ignored, weight, 0.0)
            (result,) = torch.autograd.grad(losses, picked, grad, create_graph=True)
        else:
            result = slope * grad.unsqueeze(1)
        return result, None, None, None, None


def _differentiable_losses(
    picked: Tensor, index: Tensor, within: Tensor | None, target: Tensor, ignored: Tensor, weight: Tensor | None,
    smoothing: float,
) -> Tensor:  # fmt: skip
    """:func:`picked_losses` of torch functions alone, which can be differentiated and compiled as they are."""
    at = index == target.unsqueeze(1)
    if within is not None:
        at = at & within
    inside = at.any(1)
    silent = ignored | (picked[:, :-1] == -math.inf).all(1)
    picked = torch.where(silent.unsqueeze(1), 0.0, picked)
    picked = picked - picked[:, :-1].detach().amax(1, keepdim=True)  # or the digits of a log-sum of 1e4 are few
    kept, own = picked[:, :-1], picked[:, -1]
    # A target in Omega counts there: its two parts of the gradient are summed before they are rounded.
    own = torch.where(inside, torch.where(at, kept, 0.0).sum(1), own)
    total = (kept if within is None else torch.where(within, kept, -math.inf)).logsumexp(1)
    loss = short = total - own
    if weight is not None:
        loss = loss * weight[target]
    if smoothing:
        others = total.unsqueeze(1) - kept
        if weight is not None:
            others, short = others * weight[index], loss
        size = torch.full_like(target, index.shape[1]) if within is None else within.sum(1)
        if within is not None:
            others = torch.where(within, others, 0.0)
        spread = (others.sum(1) + torch.where(inside, 0.0, short)) / (size + (~inside).to(loss.dtype))
        loss = (1 - smoothing) * loss + smoothing * spread
    return torch.where(silent, 0.0, loss)


def _dense_losses(rows: Tensor, target: Tensor, ignored: Tensor, weight: Tensor | None, smoothing: float) -> Tensor:
    """Plain cross entropy of each row, 0 where it does not count or all its scores are -inf."""
    silent = ignored | (rows == -math.inf).all(1)
    rows = torch.where(silent.unsqueeze(1), 0.0, rows.to(compute_dtype(rows)))
    loss = F.cross_entropy(rows, target, weight, ignore_index=-1, reduction="none", label_smoothing=smoothing)
    return torch.where(silent, 0.0, loss)


def reduce_counted(losses: Tensor, target: Tensor, ignored: Tensor, weight: Tensor | None, reduction: str) -> Tensor:
    """Sum, or mean by the weights of the rows that count: 0 if none does."""
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    counted = ~ignored
    if weight is None:
        return losses.sum() / counted.sum().clamp(min=1)
    mass = torch.where(counted, weight[target], 0.0).sum()
    return losses.sum() / torch.where(counted.any(), mass, 1.0)


def sparse_cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    k: int | None = K,
    p: float | None = None,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """Cross entropy in which only the k largest scores compete with the target. Differentiable any number of times.

    Arguments are those of ``torch.nn.functional.cross_entropy`` with class indices, whose value and gradients come out
    from k = n on, up to two definitions: a row all of whose scores are -inf has loss and gradient 0, and the mean over
    no rows is 0. With k < n the backward pass writes k + 1 entries a row.

    Args:
        logits: (C,), (N, C) or (N, C, d1, ...) scores; fp16 and bf16 are computed in float32.
        target: (), (N,) or (N, d1, ...) integers in [0, C), or ``ignore_index``.
        k: Size of Omega; all classes from k = C on.
        p: Let Omega be the nucleus of mass p in (0, 1] instead, at the price of a sort; k has to stay as it is, or
            None.
        weight: (C,) factors of the classes; the loss of a row is multiplied by that of its target, and "mean" divides
            by their sum over the rows that count. It gets no gradient.
        ignore_index: Target of rows that do not count, whatever their scores are (NaN too).
        reduction: "mean", "sum", or "none" (0 for rows that do not count).
        label_smoothing: eps in [0, 1]: the share of the target distribution that is spread evenly over the m members
            of Omega and the target, (1 - eps) w_t (L - s_t) + eps / m * sum over them of w_j (L - s_j) with
            L the log-sum-exp over Omega. A score of -inf among them makes the loss infinite, as in the dense function.

    Returns:
        The loss in float32 (float64 for float64). NaN where a row that counts has a NaN.

    Raises:
        TypeError: Wrong kind of argument, a floating target (class probabilities) among them.
        ValueError: Shapes that do not fit, a target out of range, k below 1, p outside (0, 1], both of them, or a
            smoothing outside [0, 1].

    Reference:
        https://spaces.ac.cn/archives/8046

    Example:
        >>> scores = torch.tensor([[3.0, 1.0, 0.0, 2.0]], requires_grad=True)
        >>> loss = sparse_cross_entropy(scores, torch.tensor([2]), k=2)  # the target is not among the two largest
        >>> loss.backward()
        >>> round(loss.item(), 4), [round(x, 4) for x in scores.grad[0].tolist()]
        (3.3133, [0.7311, 0.0, -1.0, 0.2689])
    """
    check_float("logits", logits)
    k = check_kept(k, p)
    if logits.dim() == 0:
        raise ValueError("logits must be (C,), (N, C) or (N, C, d1, ...); got a number")
    axis = min(logits.dim() - 1, 1)
    n = logits.shape[axis]
    if n == 0:
        raise ValueError(f"logits must have at least one class; got shape {tuple(logits.shape)}")
    check_options(weight, n, reduction, label_smoothing)
    shape = (*logits.shape[:axis], *logits.shape[axis + 1 :])
    check_target(target, shape, n, ignore_index)
    flat = target.reshape(-1).long()
    ignored = flat == ignore_index
    flat = torch.where(ignored, 0, flat)
    rows = logits.movedim(axis, -1).reshape(-1, n)
    dtype = compute_dtype(logits)
    weight = None if weight is None else weight.detach().to(dtype)
    if (k is None or k >= n) and (p is None or p >= 1):
        losses = _dense_losses(rows, flat, ignored, weight, label_smoothing)
    else:
        index, within = _omega(rows, k, p)
        picked = rows.gather(1, torch.cat([index, flat.unsqueeze(1)], 1)).to(dtype)
        losses = picked_losses(picked, index, within, flat, ignored, weight, label_smoothing)
    loss = reduce_counted(losses, flat, ignored, weight, reduction)
    return loss.view(shape) if reduction == "none" else loss


class SparseCrossEntropyLoss(nn.Module):
    """:func:`sparse_cross_entropy` as a Module, in the place of ``torch.nn.CrossEntropyLoss``.

    Args:
        k: Size of Omega.
        p: Mass of the nucleus, instead of k.
        weight: (C,) factors of the classes, kept as a buffer.
        ignore_index: Target of rows that do not count.
        reduction: "mean", "sum" or "none".
        label_smoothing: Share that is spread over Omega and the target.

    Raises:
        TypeError: Wrong kind of argument.
        ValueError: A value out of range.

    Reference:
        https://spaces.ac.cn/archives/8046

    Example:
        >>> loss = SparseCrossEntropyLoss(k=3, ignore_index=-1)
        >>> loss(torch.zeros(2, 5, 4), torch.tensor([[0, 1, 4, -1], [2, 2, 2, -1]]))
        tensor(1.0986)
    """

    weight: Tensor | None

    def __init__(
        self,
        k: int | None = K,
        *,
        p: float | None = None,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        check_kept(k, p)
        check_options(weight, None, reduction, label_smoothing)
        check_ignored(ignore_index)
        self.k, self.p, self.ignore_index = k, p, ignore_index
        self.reduction, self.label_smoothing = reduction, label_smoothing
        self.register_buffer("weight", weight)

    def extra_repr(self) -> str:
        """What print shows."""
        kept = f"k={self.k}" if self.p is None else f"p={self.p:g}"
        return f"{kept}, ignore_index={self.ignore_index}, reduction={self.reduction!r}"

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Loss of a batch; arguments as in :func:`sparse_cross_entropy`."""
        return sparse_cross_entropy(
            logits, target, k=self.k, p=self.p, weight=self.weight, ignore_index=self.ignore_index,
            reduction=self.reduction, label_smoothing=self.label_smoothing,
        )  # fmt: skip
