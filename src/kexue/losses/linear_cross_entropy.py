"""Cross entropy behind a linear map to a large vocabulary (分块的线性交叉熵), without ever holding all the scores.

    loss_n = logsumexp(W h_n + b) - (W h_n + b)[label_n]

The usual way writes N x V scores, their softmax and their gradient: at V = 30 000 some 100 KB a row, three times over.
Here rows are taken in chunks of bounded memory. If a gradient is wanted, a chunk's part of dH, dW and db is computed
at once, while its scores are there, so that nothing is recomputed: three matrix products as in the usual way.
Rows whose label is ``ignore_index`` cost nothing: they are left out before the first product.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from kexue._checks import check_choice, check_int
from kexue._tensors import check_float, compute_dtype, once_differentiable

__all__ = ["linear_cross_entropy"]

REDUCTIONS = ("mean", "sum", "none")
_LOG2_E = math.log2(math.e)
_BLOCK = 768  # rows of the table in one product on a CPU


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    chunk_bytes: int = 1 << 25,
) -> Tensor:
    """Cross entropy of ``hidden @ weight.T + bias`` against ``labels``, in chunks of rows.

    Differentiable once. Scores are computed in the dtype of ``hidden`` (under autocast, in its dtype); their softmax,
    the loss and the sums over chunks in float32, or float64 for float64.

    Args:
        hidden: (..., D) floating.
        weight: (V, D).
        labels: (...) integers in [0, V), or ``ignore_index``.
        bias: (V,), or None.
        ignore_index: Label of rows that do not count.
        reduction: "mean" over the rows that count (0 if none does), "sum", or "none" (0 for rows that do not count).
        chunk_bytes: Bound on the memory of the scores of a chunk, in float32; a chunk has at least one row.

    Returns:
        A scalar, or (...) for "none"; float32, or float64 for float64.

    Raises:
        TypeError: Not floating tensors, or labels that are no integers.
        ValueError: Shapes that do not fit, or a label out of range.

    Example:
        >>> torch.manual_seed(0)  # doctest: +ELLIPSIS
        <torch._C.Generator object at ...>
        >>> h, w = torch.randn(3, 4), torch.randn(10, 4)
        >>> labels = torch.tensor([1, -100, 7])
        >>> usual = torch.nn.functional.cross_entropy(h @ w.T, labels)
        >>> torch.allclose(linear_cross_entropy(h, w, labels), usual)
        True
    """
    _check(hidden, weight, labels, bias, ignore_index, reduction, chunk_bytes)
    labels = labels.long()
    rows, flat = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    counted = flat != ignore_index
    shape, kept = labels.shape, None
    if not torch.compiler.is_compiling():  # a data-dependent number of rows would break the graph
        kept = counted.nonzero().squeeze(1)
        if len(kept) < len(flat):
            rows, flat, counted = rows[kept], flat[kept], counted[kept]
        else:
            kept = None
    # The gradients are made while the chunk is there, but only a scalar's scale can be put in afterwards.
    size = chunk_bytes // (4 * max(weight.shape[0], 1))
    early = torch.is_grad_enabled()  # inside the Function a parameter looks the same under torch.no_grad
    losses = _LinearCrossEntropy.apply(rows, weight, flat, counted, bias, max(size, 1), reduction != "none", early)
    if reduction == "none":
        return losses.reshape(shape) if kept is None else losses.new_zeros(shape.numel()).index_put(
            (kept,), losses
        ).reshape(shape)  # fmt: skip
    return losses if reduction == "sum" else losses / counted.sum().clamp(min=1)


def _check(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, ignore: int, reduction: str, chunk: int
) -> None:
    check_float("hidden", hidden)
    check_float("weight", weight, 2)
    if hidden.dim() == 0 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(f"hidden must be (..., {weight.shape[1]}), the width of weight; got {tuple(hidden.shape)}")
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.dtype == torch.bool:
        raise TypeError(f"labels must be a tensor of integers; got {getattr(labels, 'dtype', type(labels).__name__)}")
    if labels.shape != hidden.shape[:-1]:
        raise ValueError(f"labels must have shape {tuple(hidden.shape[:-1])}; got {tuple(labels.shape)}")
    if bias is not None:
        check_float("bias", bias, 1)
        if bias.shape[0] != weight.shape[0]:
            raise ValueError(f"bias must have {weight.shape[0]} entries, one for each row of weight; got {len(bias)}")
    check_choice("reduction", reduction, REDUCTIONS)
    check_int("chunk_bytes", chunk, 1)
    if isinstance(ignore, bool) or not isinstance(ignore, int):
        raise TypeError(f"ignore_index must be an integer; got {ignore!r}")
    if labels.device.type == "cpu" and labels.numel() and not torch.compiler.is_compiling():
        bad = (labels != ignore) & ((labels < 0) | (labels >= weight.shape[0]))
        if bool(bad.any()):
            raise ValueError(
                f"labels must be in [0, {weight.shape[0]}) or {ignore}; got {int(labels[bad].flatten()[0])}"
            )


def _products(hidden: Tensor) -> torch.dtype:
    """The dtype of the matrix products: autocast's where it is on, as for torch's own linear layers."""
    kind = hidden.device.type
    if hidden.dtype != torch.float64 and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return hidden.dtype


class _LinearCrossEntropy(torch.autograd.Function):
    """The loss of each row, or their sum with its gradients."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, counted: Tensor, bias: Tensor | None, size: int,
        scalar: bool, early: bool,
    ) -> Tensor:  # fmt: skip
        ctx.dtypes = hidden.dtype, weight.dtype, None if bias is None else bias.dtype
        ctx.products = product = _products(hidden)
        ctx.size, ctx.scalar = size, scalar
        needs = ctx.needs_input_grad[0], ctx.needs_input_grad[1], bias is not None and ctx.needs_input_grad[4]
        inputs = hidden, weight, labels, counted, bias
        if scalar and early and any(needs):
            grads = _gradients(*inputs, None, product, size, needs)
            # The inputs are kept so that a second differentiation is noticed; they are alive anyway.
            ctx.save_for_backward(hidden, weight, bias, *grads[1:])
            return grads[0].sum()
        losses = torch.cat([loss for loss, *_ in _chunks(*inputs, product, size)] or [_empty(hidden)])
        ctx.save_for_backward(hidden, weight, labels, counted, bias)
        return losses.sum() if scalar else losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.scalar:
            _, _, _, *grads = ctx.saved_tensors
            scaled = [None if g is None else g * upstream for g in grads]
        else:
            hidden, weight, labels, counted, bias = ctx.saved_tensors
            needs = ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[4]
            scaled = list(
                _gradients(hidden, weight, labels, counted, bias, upstream, ctx.products, ctx.size, needs)[1:]
            )
        d_hidden, d_weight, d_bias = (
            None if g is None else g.to(dtype) for g, dtype in zip(scaled, ctx.dtypes, strict=True)
        )
        return d_hidden, d_weight, None, None, d_bias, None, None, None


def _empty(hidden: Tensor) -> Tensor:
    return hidden.new_zeros(0, dtype=compute_dtype(hidden))


def _chunks(
    hidden: Tensor, weight: Tensor, labels: Tensor, counted: Tensor, bias: Tensor | None, product: torch.dtype,
    size: int,
) -> Any:  # fmt: skip
    """Yield loss (n,), unnormalised softmax (n, V), its sums (n, 1), rows (n, D), labels, counted, chunk by chunk.

    The scores are overwritten by the next chunk.
    """
    dtype = compute_dtype(hidden, weight)
    table = weight.to(product)
    shift = None if bias is None else bias.to(product)
    own = product == dtype
    if own and shift is not None:
        shift = shift * _LOG2_E
    blocks = None
    if own and hidden.device.type == "cpu" and not torch.compiler.is_compiling():
        blocks = _Blocks(table, shift, min(size, hidden.shape[0]))
    for start in range(0, hidden.shape[0], size):
        part = slice(start, start + size)
        rows, valid = hidden[part].to(product), counted[part]
        target = labels[part].masked_fill(~valid, 0).unsqueeze(1)
        # exp2 is the faster one on CPUs; where no rounding to a lower precision is between, its factor goes in first.
        scaled = rows * _LOG2_E if own else rows
        if blocks is not None:
            scores = blocks.scores(scaled)
        else:
            scores = scaled @ table.T if shift is None else torch.addmm(shift, scaled, table.T)
        if not own:
            scores = scores.to(dtype).mul_(_LOG2_E)
        top = scores.amax(1, keepdim=True)
        picked = scores.gather(1, target)
        scores = scores.sub_(top).exp2_()
        total = scores.sum(1, keepdim=True)
        loss = (total.log() + (top - picked) / _LOG2_E).squeeze(1).masked_fill(~valid, 0)
        yield loss, scores, total, rows, target, valid
        del scores  # or it would stay beside the next chunk's


class _Blocks:
    """rows @ table.T + shift by blocks of the vocabulary, into one buffer; in one product MKL takes longer."""

    def __init__(self, table: Tensor, shift: Tensor | None, rows: int) -> None:
        self.tables = table.split(_BLOCK)
        self.shifts = [None] * len(self.tables) if shift is None else shift.split(_BLOCK)
        self.buffer = table.new_empty(rows, table.shape[0])

    def scores(self, rows: Tensor) -> Tensor:
        """(n, D) -> (n, V), n at most the rows of the buffer."""
        out = self.buffer[: len(rows)]
        for block, table, shift in zip(out.split(_BLOCK, 1), self.tables, self.shifts, strict=True):
            if shift is None:
                torch.mm(rows, table.T, out=block)
            else:
                torch.addmm(shift, rows, table.T, out=block)
        return out


def _gradients(
    hidden: Tensor, weight: Tensor, labels: Tensor, counted: Tensor, bias: Tensor | None, upstream: Tensor | None,
    product: torch.dtype, size: int, needs: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Losses (N,), and the gradients of sum_n upstream_n loss_n in the dtype of the sums."""
    dtype = compute_dtype(hidden, weight)
    table = weight.to(product)
    d_weight = torch.zeros_like(weight, dtype=dtype) if needs[1] else None
    d_bias = weight.new_zeros(weight.shape[0], dtype=dtype) if needs[2] else None
    losses, d_hidden = [_empty(hidden)], [hidden.new_zeros(0, hidden.shape[1], dtype=dtype)]
    done = 0
    for loss, scores, total, rows, target, valid in _chunks(hidden, weight, labels, counted, bias, product, size):
        scale = valid.to(dtype).unsqueeze(1) / total
        if upstream is not None:
            scale = scale * upstream[done : done + len(rows)].unsqueeze(1)
        scores.scatter_add_(1, target, -total)
        done += len(rows)
        losses.append(loss)
        # Each row's factor is put where it is cheapest: on rows of D numbers, not of V.
        if d_bias is not None:
            d_bias += scores.T.mv(scale.squeeze(1))
        if product != dtype:  # sums over the vocabulary in low precision must not overflow
            scores, scale = scores.mul_(scale).to(product), torch.ones_like(scale)
        if needs[0]:
            d_hidden.append((scores @ table).to(dtype) * scale)
        if d_weight is not None:
            if product == dtype:
                d_weight.addmm_(scores.T, rows * scale)
            else:
                d_weight += scores.T @ rows
        del scores
    return torch.cat(losses), torch.cat(d_hidden) if needs[0] else None, d_weight, d_bias
