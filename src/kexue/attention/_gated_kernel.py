"""Attention with one head and wide values, by blocks of rows of the score matrix: memory O(T E), never O(T^2).

    out_i = sum_j P_ij v_j,    S = q k^T

"softmax": P_ij = exp(S_ij - L_i), L_i the log-sum-exp of the row. "relu2": P_ij = relu(S_ij)^2. "relu2_sum": the same
divided by the sum of its row. Scales and divisors that depend on the row alone (1/sqrt(s), log n, 1/n) are no business
of this file: the caller folds them into q.

Forward, for each block of rows: one tile of scores, the weights in its place, one product with v. One number of each
row is kept, from which the backward pass makes the weights again in one step. With G = g v^T (upstream gradient g) and
D_i = sum_j P_ij G_ij the gradient of the scores is

    softmax: P (G - D)        relu2: 2 relu(S) G        relu2_sum: 2 relu(S / r) / r (G - D),  r = root of the row's sum

Both passes take the same tiles in the same order, so dropout draws the same numbers twice from one seed and stores no
masks. Keys that nobody sees (padding at either end, the future of a block) are cut off before anything is computed.
At large lengths nearly all time is in the products, which run at the speed of one large product; exponentials are to
base 2, twice as fast as base e.

Shapes: B batch, T queries, S keys, D width of the keys, E width of the values.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kexue._tensors import compute_dtype, once_differentiable

WEIGHTS = ("softmax", "relu2", "relu2_sum")
LOG2E = math.log2(math.e)
ROWS = 256  # of a tile; with fewer the products are slower
CAUSAL_ROWS = 128  # with more, more of the future is computed and thrown away
BUDGET = 2**20  # scores in a tile, 4 MiB in float32
NARROWEST = 64


class _Place(NamedTuple):
    """A tile: which sequences, rows and keys, and which of the keys are padded (None: none)."""

    sequences: slice
    rows: slice
    keys: slice
    padded: Tensor | None


class _Tiles:
    """The blocks of rows, with what all of them share."""

    def __init__(self, q: Tensor, k: Tensor, mask: Tensor | None, causal: bool, dropout: float, seed: Tensor | None):
        self.batch, self.length, self.width = q.shape[0], q.shape[1], k.shape[1]
        self.mask, self.causal, self.like = mask, causal, q
        rows = max(NARROWEST, min(CAUSAL_ROWS if causal else ROWS, BUDGET // self.width))
        self.rows = min(rows, self.length)
        # sequences share a tile only if one block holds all their rows: then the slices of a block are contiguous
        self.group = min(self.batch, max(1, BUDGET // (self.rows * self.width))) if self.rows == self.length else 1
        self.keep, self.generator = 1.0 - dropout, None
        if dropout > 0 and seed is not None:
            self.generator = torch.Generator(q.device).manual_seed(int(seed))

    def buffer(self) -> Tensor:
        return self.like.new_empty(self.group * self.rows * self.width)

    def __iter__(self) -> Iterator[_Place]:
        for first in range(0, self.batch, self.group):
            sequences = slice(first, min(first + self.group, self.batch))
            low, high, holes = 0, self.width, None
            if self.mask is not None:
                shown = self.mask[sequences]
                seen = shown.any(0).nonzero()
                if len(seen) == 0:
                    continue  # these rows stay as they were initialised
                low, high = int(seen[0]), int(seen[-1]) + 1
                shown = shown[:, low:high]
                holes = None if bool(shown.all()) else ~shown
            for row in range(0, self.length, self.rows):
                end = min(row + self.rows, self.length)
                last = min(end, high) if self.causal else high
                if last > low:
                    padded = None if holes is None else holes[:, None, : last - low]
                    yield _Place(sequences, slice(row, end), slice(low, last), padded)

    def hide(self, scores: Tensor, place: _Place, value: float) -> None:
        """Put ``value`` where a key is padded or later than its query."""
        if place.padded is not None:
            scores.masked_fill_(place.padded, value)
        ahead = place.rows.start - place.keys.start
        if self.causal and scores.shape[2] > ahead + 1:
            corner = scores[:, :, max(ahead, 0) :]
            later = torch.ones(corner.shape[1:], dtype=torch.bool, device=scores.device)
            corner.masked_fill_(later.triu_(min(ahead, 0) + 1), value)

    def drop(self, weights: Tensor) -> Tensor | None:
        """The factors of dropout for the next tile, or None."""
        if self.generator is None:
            return None
        return torch.empty_like(weights).bernoulli_(self.keep, generator=self.generator).div_(self.keep)


def _product(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """The product a b for (G, ., .), written to ``out``."""
    if a.shape[0] == 1:
        torch.mm(a[0], b[0], out=out[0])
    else:
        torch.bmm(a, b, out=out)
    return out


def _add_product(out: Tensor, a: Tensor, b: Tensor) -> None:
    if a.shape[0] == 1:
        out[0].addmm_(a[0], b[0])
    else:
        out.baddbmm_(a, b)


def _put_product(out: Tensor, a: Tensor, b: Tensor) -> None:
    _product(a, b, out)


def _needed(mask: Tensor | None) -> Tensor | None:
    """None for a mask that hides nothing."""
    return None if mask is None or bool(mask.all()) else mask


def _view(buffer: Tensor, *shape: int) -> Tensor:
    return buffer[: math.prod(shape)].view(shape)


def _scores(buffer: Tensor, q: Tensor, k: Tensor, place: _Place) -> Tensor:
    a, b = q[place.sequences, place.rows], k[place.sequences, place.keys]
    return _product(a, b.mT, _view(buffer, a.shape[0], a.shape[1], b.shape[1]))


def forward_pass(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, seed: Tensor | None, kind: str, causal: bool, dropout: float
) -> tuple[Tensor, Tensor]:
    """The output and the number of each row that the backward pass needs.

    Args:
        q: (B, T, D), scaled.
        k: (B, S, D); S = T if causal.
        v: (B, S, E).
        mask: (B, S) bool, True = takes part, or None.
        seed: Integer scalar on the CPU; needed by dropout.
        kind: One of ``WEIGHTS``.
        causal: Query i sees the keys j <= i.
        dropout: Probability that a weight is dropped.

    Returns:
        (B, T, E) in the dtype of v; (B, T): log2 of the sum of exponentials for softmax (inf without any key), the
        inverse root of the row's sum for relu2_sum (0 without any), nothing for relu2.
    """
    dtype, kept, mask = compute_dtype(q, k, v), v.dtype, _needed(mask)
    # without padding every row is written by a tile
    make = q.new_empty if mask is None and k.shape[1] else q.new_zeros
    out = make((*q.shape[:2], v.shape[2]), dtype=dtype)
    nothing = math.inf if kind == "softmax" else 0.0
    row_stat = q.new_full(q.shape[:2] if kind != "relu2" else (0,), nothing, dtype=dtype)
    if out.numel() == 0 or k.shape[1] == 0:
        return out.to(kept), row_stat
    q, k, v = (q * LOG2E if kind == "softmax" else q).to(dtype), k.to(dtype), v.to(dtype)
    tiles = _Tiles(q, k, mask, causal, dropout, seed)
    buffer = tiles.buffer()
    for place in tiles:
        sequences, rows, keys, _ = place
        p = _scores(buffer, q, k, place)
        tiles.hide(p, place, -math.inf if kind == "softmax" else 0.0)
        if kind == "relu2":
            p.relu_().square_()
            scale = None
        elif kind == "softmax":
            top = p.amax(2, keepdim=True)
            top = torch.where(top > -math.inf, top, 0.0)
            total = p.sub_(top).exp2_().sum(2, keepdim=True)
            row_stat[sequences, rows] = torch.where(total > 0, top + total.log2(), math.inf).squeeze(2)
            scale = torch.where(total > 0, total, 1.0).reciprocal()
        else:
            top = p.relu_().amax(2, keepdim=True)
            inverse = torch.where(top > torch.finfo(dtype).tiny, top, math.inf).reciprocal()
            total = p.mul_(inverse).square_().sum(2, keepdim=True)
            scale = torch.where(total > 0, total, 1.0).reciprocal()
            row_stat[sequences, rows] = (inverse * scale.sqrt()).squeeze(2)
        factors = tiles.drop(p)
        if factors is not None:
            p.mul_(factors)
        part = _product(p, v[sequences, keys], out[sequences, rows])
        if scale is not None:
            part.mul_(scale)
    return out.to(kept), row_stat


def backward_pass(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    seed: Tensor | None,
    row_stat: Tensor,
    kind: str,
    causal: bool,
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, in their dtypes; arguments as in :func:`forward_pass`."""
    dtype, kept, mask = compute_dtype(q, k, v), (q.dtype, k.dtype, v.dtype), _needed(mask)
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    if grad.numel() == 0 or k.shape[1] == 0:
        grad_q, grad_k, grad_v = (x.new_zeros(x.shape) for x in (q, k, v))
    else:
        tiles = _Tiles(q, k, mask, causal, dropout, seed)
        scaled = q * (LOG2E if kind == "softmax" else row_stat[..., None] if kind == "relu2_sum" else 1.0)
        first, second, third = tiles.buffer(), tiles.buffer(), tiles.buffer() if kind == "relu2_sum" else q
        # The first block of rows writes the gradients of all keys, unless it does not see them all.
        partial = causal and tiles.rows < tiles.length
        grad_q = q.new_empty(q.shape) if mask is None else q.new_zeros(q.shape)
        grad_k, grad_v = (x.new_zeros(x.shape) if partial or mask is not None else x.new_empty(x.shape) for x in (k, v))
        for place in tiles:
            sequences, rows, keys, _ = place
            p = _scores(first, scaled, k, place)
            tiles.hide(p, place, -math.inf if kind == "softmax" else 0.0)
            g = grad[sequences, rows].to(dtype)
            d = _product(g, v[sequences, keys].mT, _view(second, *p.shape))
            factors = tiles.drop(p)
            if factors is not None:
                d.mul_(factors)
            if kind == "softmax":  # P (d - D)
                weights = p.sub_(row_stat[sequences, rows, None]).exp2_()
                d.mul_(p)
                d.addcmul_(p, d.sum(2, keepdim=True), value=-1)
            elif kind == "relu2":
                d.mul_(p.relu_())
                weights = p.square_()
            else:
                weights = torch.mul(p.relu_(), p, out=_view(third, *p.shape))
                share = p.new_empty(p.shape[:2])
                torch.linalg.vecdot(weights, d, out=share)
                d.sub_(share[..., None]).mul_(p)
            if factors is not None:
                weights.mul_(factors)
            into_keys = _add_product if partial or rows.start > 0 else _put_product
            into_keys(grad_v[sequences, keys], weights.mT, g)
            if kind != "softmax":
                d.mul_(2.0 if kind == "relu2" else 2.0 * row_stat[sequences, rows, None])
            _product(d, k[sequences, keys], grad_q[sequences, rows])
            into_keys(grad_k[sequences, keys], d.mT, q[sequences, rows])
    return grad_q.to(kept[0]), grad_k.to(kept[1]), grad_v.to(kept[2])


@torch.library.custom_op(
    "kexue::gated_attention",
    mutates_args=(),
    schema=(
        "(Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? seed, str kind, bool causal, float dropout)"
        " -> (Tensor, Tensor)"
    ),
)
def _forward_op(q, k, v, *rest):  # type: ignore[no-untyped-def]
    with torch.autocast(q.device.type, enabled=False):
        return forward_pass(q, k, v, *rest)


@_forward_op.register_fake
def _(q, k, v, mask, seed, kind, causal, dropout):  # type: ignore[no-untyped-def]
    out = q.new_empty((*q.shape[:2], v.shape[2]), dtype=v.dtype)
    return out, q.new_empty(q.shape[:2] if kind != "relu2" else (0,), dtype=compute_dtype(q, k, v))


@torch.library.custom_op(
    "kexue::gated_attention_backward",
    mutates_args=(),
    schema=(
        "(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? seed, Tensor row_stat, str kind,"
        " bool causal, float dropout) -> (Tensor, Tensor, Tensor)"
    ),
)
def _backward_op(grad, *rest):  # type: ignore[no-untyped-def]
    with torch.autocast(grad.device.type, enabled=False):
        return backward_pass(grad, *rest)


@_backward_op.register_fake
def _(grad, q, k, v, *rest):  # type: ignore[no-untyped-def]
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:5], output[1])
    ctx.options = inputs[5:]
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 8
    return (*_backward_op(grad, *ctx.saved_tensors, *ctx.options), *(None,) * 5)


torch.library.register_autograd("kexue::gated_attention", _differentiate, setup_context=_keep)


class _Attend(torch.autograd.Function):
    """The operator without the dispatcher, whose cost shows on short sequences."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        with torch.autocast(inputs[0].device.type, enabled=False):
            out, row_stat = forward_pass(*inputs)
        ctx.save_for_backward(*inputs[:5], row_stat)
        ctx.options = inputs[5:]
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        with torch.autocast(grad.device.type, enabled=False):
            grads = backward_pass(grad, *ctx.saved_tensors, *ctx.options)
        return (*grads, *(None,) * 5)


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, seed: Tensor | None, kind: str, causal: bool, dropout: float
) -> Tensor:
    """:func:`forward_pass` with its gradients; one opaque node while torch.compile or torch.export traces."""
    if torch.compiler.is_compiling():
        return _forward_op(q, k, v, mask, seed, kind, causal, dropout)[0]
    return _Attend.apply(q, k, v, mask, seed, kind, causal, dropout)
