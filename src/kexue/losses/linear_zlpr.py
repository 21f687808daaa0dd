"""Multi-label softmax behind a linear map to a huge label space (分块的线性多标签 Softmax), without all the scores.

Source: 科学空间 7359 (将"Softmax+交叉熵"推广到多标签分类问题) and 8888 (the sparse form). The loss is that of
``zlpr.py`` on the scores W h + b.

At a million labels one row of scores takes 4 MB, and their gradient as much again. Here rows are taken in chunks of
bounded memory. For a scalar loss a chunk's part of dH, dW and db is computed at once, while its scores are there, so
that nothing is recomputed: three matrix products, as in the usual way. ``reduction="none"`` computes the scores again
in the backward pass.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kexue._checks import check_choice, check_int, check_real
from kexue._tensors import check_float, compute_dtype, once_differentiable
from kexue.losses._common import REDUCTIONS
from kexue.losses._zlpr_kernel import rows_of, run, take
from kexue.losses.linear_cross_entropy import _products
from kexue.losses.zlpr import check_ignore, check_target, check_threshold, threshold_rows

__all__ = ["LinearZLPR", "linear_zlpr"]

CHUNK_BYTES = 1 << 25


def linear_zlpr(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    threshold: float | Tensor = 0.0,
    ignore_index: int = -1,
    reduction: str = "mean",
    chunk_bytes: int = CHUNK_BYTES,
    validate: bool = True,
) -> Tensor:
    """:func:`zlpr_loss` of ``hidden @ weight.T + bias``, in chunks of rows. Differentiable once.

    Scores are computed in the dtype of ``hidden`` (under autocast, in its dtype), their sums and the loss in float32;
    all in float64 if ``hidden`` or ``weight`` is.

    Args:
        hidden: (..., D) floating.
        weight: (n, D), a row for each label.
        target: Integer label indices (..., k), padded with ``ignore_index`` (a repeated index counts once); or dense
            (..., n) as bool, or as soft labels in [0, 1] that require no gradient.
        bias: (n,), or None. A label whose bias is -inf is masked.
        threshold: s_0: a number, or a tensor broadcastable to (..., 1), which may require a gradient.
        ignore_index: Padding of label indices.
        reduction: "mean" over rows (0 if there are none), "sum", or "none" (...).
        chunk_bytes: Bound on the memory of the scores of a chunk, in float32, which their gradient overwrites; a chunk
            has at least one row. More rows in a chunk make the products faster.
        validate: Check the values of the target, and that no positive is masked (never done under torch.compile).

    Returns:
        The loss in float32 (float64 for float64).

    Raises:
        TypeError: Wrong kind of argument.
        ValueError: Shapes that do not fit, a label index out of range, a label outside [0, 1] or NaN, a positive that
            is masked, soft labels that require a gradient.

    Reference:
        https://spaces.ac.cn/archives/7359, https://spaces.ac.cn/archives/8888

    Example:
        >>> from kexue.losses import zlpr_loss
        >>> h, w = torch.eye(3, 4), torch.arange(40.0).reshape(10, 4) / 10 - 2
        >>> labels = torch.tensor([[1, -1], [9, 7], [-1, -1]])
        >>> usual = zlpr_loss(h @ w.T, labels, indices=True)
        >>> torch.allclose(linear_zlpr(h, w, labels), usual)
        True
    """
    check_choice("reduction", reduction, REDUCTIONS)
    check_float("hidden", hidden)
    check_float("weight", weight, 2)
    if hidden.dim() == 0 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(f"hidden must be (..., {weight.shape[1]}), the width of weight; got {tuple(hidden.shape)}")
    batch, n = hidden.shape[:-1], weight.shape[0]
    if n == 0:
        raise ValueError(f"weight must have at least one label; got shape {tuple(weight.shape)}")
    if bias is not None:
        check_float("bias", bias, 1)
        if bias.shape[0] != n:
            raise ValueError(f"bias must have {n} entries, one for each row of weight; got {len(bias)}")
    check_int("chunk_bytes", chunk_bytes, 1)
    check_ignore(ignore_index)
    check_threshold(batch, threshold)
    indices = isinstance(target, Tensor) and target.dtype != torch.bool and not target.is_floating_point()
    check = validate and not torch.compiler.is_compiling()
    check_target((*batch, n), target, indices, ignore_index, check)
    if target.requires_grad:
        raise ValueError("soft labels must not require a gradient here; zlpr_loss on the scores gives it")
    count = batch.numel()
    edge = threshold_rows(threshold, batch, hidden, compute_dtype(hidden, weight))
    size = max(chunk_bytes // (4 * n), 1)
    flat = target.reshape(count, target.shape[-1])
    rows = hidden.reshape(count, hidden.shape[-1])
    ignore, scalar = ignore_index if indices else None, reduction != "none"
    # While torch.compile traces, gradients are made in the backward pass: it keeps nothing but saved tensors.
    early = scalar and torch.is_grad_enabled() and not torch.compiler.is_compiling()
    loss = _LinearZLPR.apply(rows, weight, bias, flat, edge, ignore, size, scalar, check, early)
    if reduction == "mean":
        return loss / max(count, 1)
    return loss if scalar else loss.reshape(batch)


class _LinearZLPR(torch.autograd.Function):
    """The loss of each row, or (scalar) their sum, whose gradients are made in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, threshold: Tensor | None,
        ignore: int | None, size: int, scalar: bool, check: bool, early: bool,
    ) -> Tensor:  # fmt: skip
        ctx.ignore, ctx.size, ctx.scalar = ignore, size, scalar
        ctx.product = torch.float64 if compute_dtype(hidden, weight) == torch.float64 else _products(hidden)
        upstream = _ones(hidden, weight) if early and any(ctx.needs_input_grad) else None
        inputs = hidden, weight, bias, target, threshold
        loss, *made = _passes(*inputs, upstream, ignore, size, ctx.product, ctx.needs_input_grad[:3], check)
        ctx.made = [] if upstream is None else [made]
        ctx.save_for_backward(*inputs)
        return loss.sum() if scalar else loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, target, threshold = ctx.saved_tensors
        made = take(ctx.made)
        if made is None:
            upstream = _ones(hidden, weight) if ctx.scalar else grad.to(compute_dtype(hidden, weight)).unsqueeze(1)
            inputs = hidden, weight, bias, target, threshold, upstream
            made = _passes(*inputs, ctx.ignore, ctx.size, ctx.product, ctx.needs_input_grad[:3], False)[1:]
        if ctx.scalar:  # after the products, which a small factor in low precision would spoil
            made = [None if x is None else x.mul_(grad) for x in made]
        like = hidden, weight, bias
        out = [None if g is None else g.to(x.dtype) for g, x in zip(made[:3], like, strict=True)]
        return (*out, None, made[3] if ctx.needs_input_grad[4] else None, None, None, None, None, None)


def _ones(hidden: Tensor, weight: Tensor) -> Tensor:
    return torch.ones((len(hidden), 1), dtype=compute_dtype(hidden, weight), device=hidden.device)


def _scores(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, size: int, product: torch.dtype
) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
    """Yield which rows, the rows, the table and the scores of each chunk; the scores are overwritten by the next."""
    table = weight.to(product)
    shift = None if bias is None else bias.to(product)
    buffer = None
    if not torch.compiler.is_compiling():
        buffer = hidden.new_empty((min(size, len(hidden)), len(weight)), dtype=product)
    for start in range(0, len(hidden), size):
        part = slice(start, min(start + size, len(hidden)))
        rows = hidden[part].to(product)
        out = None if buffer is None else buffer[: len(rows)]
        if shift is None:
            scores = torch.mm(rows, table.T, out=out)
        else:
            scores = torch.addmm(shift, rows, table.T, out=out)
        yield part, rows, table, scores


def _passes(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, threshold: Tensor | None,
    upstream: Tensor | None, ignore: int | None, size: int, product: torch.dtype,
    needs: tuple[bool, bool, bool], check: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Losses (N,); with ``upstream`` (N, 1) also the gradients of hidden, weight, bias (where needed) and threshold."""
    dtype = compute_dtype(hidden, weight)
    make = upstream is not None
    d_hidden = hidden.new_empty(hidden.shape, dtype=dtype) if make and needs[0] else None
    d_weight = weight.new_zeros(weight.shape, dtype=dtype) if make and needs[1] else None
    d_bias = weight.new_zeros(len(weight), dtype=dtype) if make and needs[2] else None
    losses, slopes = [hidden.new_zeros(0, dtype=dtype)], [hidden.new_zeros((0, 1), dtype=dtype)]
    for part, rows, table, scores in _scores(hidden, weight, bias, size, product):
        loss, slope, grad, _ = run(
            scores, target[part], rows_of(threshold, part), None, rows_of(upstream, part), ignore,
            (make and any(needs), False), check, True,
        )  # fmt: skip
        losses.append(loss.to(dtype))
        slopes.append(slope.to(dtype))
        if d_hidden is not None:
            d_hidden[part] = grad @ table
        if d_weight is not None:
            if product == dtype:
                d_weight.addmm_(grad.T, rows)
            else:
                d_weight += grad.T @ rows
        if d_bias is not None:
            d_bias += grad.sum(0, dtype=dtype)
    return torch.cat(losses), d_hidden, d_weight, d_bias, torch.cat(slopes) if make and threshold is not None else None


class LinearZLPR(nn.Module):
    """Linear head for huge label spaces whose scores are never stored whole; see :func:`linear_zlpr`.

    Args:
        in_features: D, width of the rows.
        num_labels: n.
        bias: Whether scores have a bias of each label.
        threshold: s_0, a number.
        ignore_index: Padding of label indices.
        reduction: "none", "mean" or "sum".
        chunk_bytes: As in :func:`linear_zlpr`.
        validate: As in :func:`linear_zlpr`.
        device: Where the parameters are created.
        dtype: Their dtype.

    Raises:
        TypeError: Wrong kind of argument.
        ValueError: A value out of range.

    Reference:
        https://spaces.ac.cn/archives/7359

    Example:
        >>> head = LinearZLPR(16, 100_000)
        >>> loss = head(torch.randn(8, 16), torch.randint(100_000, (8, 5)))
        >>> loss.backward()
        >>> head.weight.grad.shape
        torch.Size([100000, 16])
    """

    def __init__(
        self,
        in_features: int,
        num_labels: int,
        bias: bool = True,
        threshold: float = 0.0,
        *,
        ignore_index: int = -1,
        reduction: str = "mean",
        chunk_bytes: int = CHUNK_BYTES,
        validate: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_int("in_features", in_features, 1)
        check_int("num_labels", num_labels, 1)
        check_real("threshold", threshold)
        check_ignore(ignore_index)
        check_choice("reduction", reduction, REDUCTIONS)
        check_int("chunk_bytes", chunk_bytes, 1)
        self.in_features, self.num_labels, self.threshold = in_features, num_labels, float(threshold)
        self.ignore_index, self.reduction, self.chunk_bytes = ignore_index, reduction, chunk_bytes
        self.validate = validate
        self.weight = nn.Parameter(torch.empty(num_labels, in_features, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(num_labels, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights as nn.Linear does, within 1 / sqrt(D); biases start at 0."""
        bound = 1 / math.sqrt(self.in_features)
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def extra_repr(self) -> str:
        """What print shows."""
        return (
            f"in_features={self.in_features}, num_labels={self.num_labels}, bias={self.bias is not None}, "
            f"threshold={self.threshold:g}"
        )

    def scores(self, hidden: Tensor) -> Tensor:
        """All scores (..., n) of rows (..., D); predict the labels whose score exceeds the threshold."""
        return F.linear(hidden, self.weight, self.bias)

    def forward(self, hidden: Tensor, target: Tensor) -> Tensor:
        """Loss of a batch; arguments as in :func:`linear_zlpr`."""
        return linear_zlpr(
            hidden, self.weight, target, self.bias, threshold=self.threshold, ignore_index=self.ignore_index,
            reduction=self.reduction, chunk_bytes=self.chunk_bytes, validate=self.validate,
        )  # fmt: skip
