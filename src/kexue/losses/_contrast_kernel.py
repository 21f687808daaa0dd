"""Contrastive losses on embeddings, gradient built in the forward pass, by blocks of the score matrix.

For row i with similarity c_ij = cos(q_i, k_j), temperature T and margin m:

    v_i = log sum over the negatives j of exp(c_ij / T)  -  (c_ii - m) / T
    FlatNCE = v,  InfoNCE = softplus(v),  d InfoNCE = sigmoid(v) d v

so that both need the same sums and differ in the weight of a row. The positive is left out of the sum, never
subtracted from it. Cosines are bounded, so up to 1/T = 40 the exponent needs no shift; above it the maximum of
each row is subtracted.

``pair_pass`` takes rows against columns. Its symmetric form uses one matrix for both directions. ``self_pass`` is the
SimCLR layout (every view against every other): the matrix is symmetric and only its upper triangle is computed.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from kexue._tensors import compute_dtype
from kexue.losses._common import LOG2E, through_norm, unit_rows

BUDGET = 4 * 2**20  # scores kept at a time, 16 MiB in float32; larger problems are computed in blocks
UNSHIFTED = 40.0
TILE = 256  # rows of a square of the triangle


def _weights(v: Tensor, total: Tensor, coef: Tensor, flat: bool, inverse_t: float) -> tuple[Tensor, Tensor]:
    """D loss / d v of each row times 1 / T, and the same divided by its sum of exponentials."""
    weight = coef * inverse_t if flat else coef * inverse_t * torch.sigmoid(v)
    return weight, weight / torch.where(total > 0, total, 1.0)


def rows_pass(
    q: Tensor,
    positive: Tensor,
    columns: Tensor,
    exclude: list[Tensor],
    mask: Tensor | None,
    coef: Tensor | None,
    inverse_t: float,
    margin: float,
    flat: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One direction on unit vectors: v (N,), gradients of q, of the negatives' columns and of the positives."""
    n, m = q.shape[0], columns.shape[0]
    v = q.new_empty(n)
    similarity = ((q * positive).sum(1) - margin) * inverse_t
    make = coef is not None
    grad_q, grad_p = q.new_empty((n, q.shape[1]) if make else 0), q.new_empty((n, q.shape[1]) if make else 0)
    grad_c = columns.new_zeros(columns.shape if make else 0)
    rows = max(1, min(n, BUDGET // 4 // max(m, 1)))
    buffer = q.new_empty(rows * m)
    local = torch.arange(rows, device=q.device)
    for start in range(0, n, rows):
        block = slice(start, min(start + rows, n))
        qb = q[block]
        size = qb.shape[0]
        e = buffer[: size * m].view(size, m)
        torch.mm(qb * (inverse_t * LOG2E), columns.T, out=e)
        for index in exclude:
            e[local[:size], index[block]] = -math.inf
        if mask is not None:
            e.masked_fill_(~mask[block], -math.inf)
        shift: Tensor | float = 0.0
        if inverse_t > UNSHIFTED:
            shift = e.amax(1, keepdim=True)
            shift = torch.where(shift > -math.inf, shift, 0.0)
            e.sub_(shift)
            shift = shift.squeeze(1) / LOG2E
        total = e.exp2_().sum(1)
        v[block] = total.log() + shift - similarity[block]
        if coef is not None:
            weight, factor = _weights(v[block], total, coef[block], flat, inverse_t)
            torch.mul(torch.mm(e, columns), factor[:, None], out=grad_q[block])
            grad_q[block].addcmul_(positive[block], weight[:, None], value=-1)
            grad_c.addmm_(e.T, qb * factor[:, None])
            torch.mul(qb, -weight[:, None], out=grad_p[block])
    return v, grad_q, grad_c, grad_p


def _symmetric_pass(
    q: Tensor,
    k: Tensor,
    mask: Tensor | None,
    coef: Tensor | None,
    inverse_t: float,
    margin: float,
    flat: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Both directions from one matrix, on unit vectors: v of the rows, v of the columns, gradients of q and k."""
    n = q.shape[0]
    similarity = ((q * k).sum(1) - margin) * inverse_t
    rows = max(1, min(n, BUDGET // max(n, 1)))
    buffer = q.new_empty(rows * n)
    across, down = q.new_empty(n), q.new_zeros(n)
    blocks = [slice(start, min(start + rows, n)) for start in range(0, n, rows)]
    scaled = q * (inverse_t * LOG2E)

    def exponentials(block: slice) -> Tensor:
        e = buffer[: (block.stop - block.start) * n].view(-1, n)
        torch.mm(scaled[block], k.T, out=e)
        e.diagonal(block.start).fill_(-math.inf)
        if mask is not None:
            e.masked_fill_(~mask[block], -math.inf)
        return e.exp2_()

    for block in blocks:
        e = exponentials(block)
        across[block] = e.sum(1)
        down += e.sum(0)
    v_row, v_col = across.log() - similarity, down.log() - similarity
    if coef is None:
        return v_row, v_col, q.new_empty(0), k.new_empty(0)
    half = coef / 2
    w_row, f_row = _weights(v_row, across, half, flat, inverse_t)
    w_col, f_col = _weights(v_col, down, half, flat, inverse_t)
    grad_q, grad_k = torch.empty_like(q), torch.zeros_like(k)
    pull = -(w_row + w_col)
    for block in blocks:
        e = e if len(blocks) == 1 else exponentials(block)
        e.mul_(f_row[block, None] + f_col)
        e.diagonal(block.start).copy_(pull[block])  # the positives pull with the same product
        torch.mm(e, k, out=grad_q[block])
        grad_k.addmm_(e.T, q[block])
    return v_row, v_col, grad_q, grad_k


def pair_pass(
    q: Tensor,
    k: Tensor,
    extra: Tensor | None,
    mask: Tensor | None,
    coef: Tensor | None,
    inverse_t: float,
    margin: float,
    flat: bool,
    symmetric: bool,
    in_batch: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """V of the rows and (symmetric) of the columns, and with ``coef`` the gradients of q, k and extra.

    Args:
        q: (N, D) queries.
        k: (N, D) positives.
        extra: (K, D) shared negatives, or None.
        mask: (N, M) bool, True = takes part; M counts k (when ``in_batch``), then extra.
        coef: (N,) upstream gradient of each row, or None.
        inverse_t: 1 / temperature.
        margin: Subtracted from the positive's cosine.
        flat: Gradient of v instead of softplus(v).
        symmetric: Average of both directions; needs ``in_batch`` and no ``extra``.
        in_batch: The other rows of k are negatives.
    """
    dtype = compute_dtype(q, k)
    (uq, iq), (uk, ik) = unit_rows(q, dtype), unit_rows(k, dtype)
    if symmetric and inverse_t <= UNSHIFTED:
        v, v_col, gq, gk = _symmetric_pass(uq, uk, mask, coef, inverse_t, margin, flat)
        gx = uq.new_empty(0)
    elif symmetric:  # rows and columns need shifts of their own: two matrices
        index = [torch.arange(uq.shape[0], device=q.device)]
        half = None if coef is None else coef / 2
        v, gq, gk, gp = rows_pass(uq, uk, uk, index, mask, half, inverse_t, margin, flat)
        turned = None if mask is None else mask.T
        v_col, hk, hq, hp = rows_pass(uk, uq, uq, index, turned, half, inverse_t, margin, flat)
        gq, gk, gx = gq + hq + hp, gk + gp + hk, uq.new_empty(0)
    else:
        ux, ix = unit_rows(extra, dtype) if extra is not None else (uk[:0], ik[:0])
        columns = torch.cat([uk, ux]) if in_batch and extra is not None else uk if in_batch else ux
        index = [torch.arange(uq.shape[0], device=q.device)] if in_batch else []
        v, gq, gc, gk = rows_pass(uq, uk, columns, index, mask, coef, inverse_t, margin, flat)
        v_col, gx = uq.new_empty(0), uq.new_empty(0)
        if coef is not None:
            if in_batch:
                gk = gk + gc[: uk.shape[0]]
                gc = gc[uk.shape[0] :]
            if extra is not None:
                gx = through_norm(gc, ux, ix)
    if coef is None:
        gq, gk, gx = (uq.new_empty(0) for _ in range(3))
    else:
        gq, gk = through_norm(gq, uq, iq), through_norm(gk, uk, ik)
    return v, v_col, gq, gk, gx


def _one_tile(unit: Tensor, coef: Tensor | None, inverse_t: float, flat: bool) -> tuple[Tensor, Tensor]:
    """A small batch, where every call counts: the whole square at once; v and the gradient on unit vectors."""
    n = unit.shape[0]
    half = n // 2
    e = torch.addmm(unit[:1, :1], unit, unit.T, beta=0, alpha=inverse_t * LOG2E)  # beta = 0: the first is not read
    # (i, i) and (i, i + N): in the view (2, N, 2, N) these are the entries with equal second and last index
    special = e.view(2, half, 2, half).diagonal(dim1=1, dim2=3)
    positive = special[0, 1] / LOG2E
    special.fill_(-math.inf)
    shift = e.amax(1, keepdim=True) if inverse_t > UNSHIFTED else None
    if shift is not None:
        e.sub_(shift)
    total = e.exp2_().sum(1)
    log_total = total.log() if shift is None else total.log() + shift.squeeze(1) / LOG2E
    v = (log_total.view(2, half) - positive).view(n)
    if coef is None:
        return v, unit.new_empty(0)
    weight = coef * inverse_t if flat else torch.sigmoid(v).mul_(coef).mul_(inverse_t)
    factor = weight / total  # not 0: no exponent is below -40, or the largest is 0
    if shift is None:
        e.mul_(factor[:, None] + factor)
    else:  # shifted by rows, e is not symmetric
        e.mul_(factor[:, None])
        e = e + e.T
        special = e.view(2, half, 2, half).diagonal(dim1=1, dim2=3)
    pull = weight.view(2, half).sum(0).neg_()
    special[0, 1].copy_(pull)
    special[1, 0].copy_(pull)
    return v, torch.mm(e, unit)


def self_pass(z: Tensor, coef: Tensor | None, inverse_t: float, flat: bool) -> tuple[Tensor, Tensor]:
    """The SimCLR layout: z (2N, D), the positive of row i is row i + N modulo 2N, negatives are the other 2N - 2.

    Returns:
        v (2N,) and, with ``coef`` (2N,), the gradient of z.
    """
    unit, inverse = unit_rows(z, compute_dtype(z))
    n = unit.shape[0]
    half = n // 2
    if n <= TILE:
        v, grad = _one_tile(unit, coef, inverse_t, flat)
        return v, grad if coef is None else through_norm(grad, unit, inverse)
    if inverse_t > UNSHIFTED:  # each row needs a shift of its own, which breaks the symmetry
        rows = torch.arange(n, device=z.device)
        v, gq, gc, gp = rows_pass(
            unit, unit.roll(half, 0), unit, [rows, (rows + half) % max(n, 1)], None, coef, inverse_t, 0.0, flat
        )
        if coef is None:
            return v, unit.new_empty(0)
        return v, through_norm(gq + gc + gp.roll(half, 0), unit, inverse)
    scaled = unit * (inverse_t * LOG2E)
    starts = range(0, n, TILE)
    tiles = [(slice(i, min(i + TILE, n)), slice(j, min(j + TILE, n))) for i in starts for j in starts if j >= i]
    keep = n * (n + TILE) // 2 <= BUDGET
    buffer = unit.new_empty(TILE * TILE if not keep else 0)
    kept: list[Tensor] = []
    total, positive = unit.new_zeros(n), unit.new_empty(half)

    def exponentials(a: slice, b: slice) -> Tensor:
        height, width = a.stop - a.start, b.stop - b.start
        e = None if keep else buffer[: height * width].view(height, width)
        e = torch.mm(scaled[a], unit[b].T, out=e)
        for first, entries in partners(a, b, e)[:1]:
            positive[first : first + len(entries)] = entries
        e.exp2_()
        if a == b:
            e.fill_diagonal_(0.0)
        for _, entries in partners(a, b, e):
            entries.zero_()
        return e

    def partners(a: slice, b: slice, e: Tensor) -> list[tuple[int, Tensor]]:
        """Entries (i, i + N) of a tile with the first i; in a tile on the diagonal also their mirror images."""
        offset = half - (b.start - a.start)
        if not a.start - a.stop < offset < b.stop - b.start:
            return []
        found = [(a.start + max(0, -offset), e.diagonal(offset))]
        return [*found, (0, e.diagonal(-half))] if a == b else found

    for a, b in tiles:
        e = exponentials(a, b)
        total[a] += e.sum(1)
        if a != b:
            total[b] += e.sum(0)
        if keep and coef is not None:
            kept.append(e)
    v = (total.log().view(2, half) - positive / LOG2E).view(n)
    if coef is None:
        return v, unit.new_empty(0)
    weight, factor = _weights(v, total, coef, flat, inverse_t)
    pull = -(weight[:half] + weight[half:])
    grad = torch.zeros_like(unit)
    for number, (a, b) in enumerate(tiles):
        e = kept[number] if keep else exponentials(a, b)
        e.mul_(factor[a, None] + factor[b])
        for first, entries in partners(a, b, e):  # the positives pull with the same product that the negatives push
            entries.copy_(pull[first : first + len(entries)])
        grad[a].addmm_(e, unit[b])
        if a != b:
            grad[b].addmm_(e.T, unit[a])
    return v, through_norm(grad, unit, inverse)


@torch.library.custom_op(
    "kexue::pair_pass",
    mutates_args=(),
    schema=(
        "(Tensor q, Tensor k, Tensor? extra, Tensor? mask, Tensor? coef, float inverse_t, float margin, bool flat,"
        " bool symmetric, bool in_batch) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
    ),
)
def _pair_op(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return pair_pass(*args)


@_pair_op.register_fake
def _(q, k, extra, mask, coef, inverse_t, margin, flat, symmetric, in_batch):  # type: ignore[no-untyped-def]
    dtype = compute_dtype(q, k)

    def like(x: Tensor | None) -> Tensor:
        return q.new_empty((0,) if coef is None or x is None else x.shape, dtype=dtype)

    v = q.new_empty(q.shape[0], dtype=dtype)
    return v, q.new_empty(q.shape[0] if symmetric else 0, dtype=dtype), like(q), like(k), like(extra)


@torch.library.custom_op(
    "kexue::self_pass",
    mutates_args=(),
    schema="(Tensor z, Tensor? coef, float inverse_t, bool flat) -> (Tensor, Tensor)",
)
def _self_op(z: Tensor, coef: Tensor | None, inverse_t: float, flat: bool) -> tuple[Tensor, Tensor]:
    return self_pass(z, coef, inverse_t, flat)


@_self_op.register_fake
def _(z, coef, inverse_t, flat):  # type: ignore[no-untyped-def]
    dtype = compute_dtype(z)
    return z.new_empty(z.shape[0], dtype=dtype), z.new_empty((0,) if coef is None else z.shape, dtype=dtype)


def run_pairs(device: str, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """:func:`pair_pass`; one opaque node while torch.compile traces, never in the precision of autocast."""
    if torch.compiler.is_compiling():
        return _pair_op(*args)
    with torch.autocast(device, enabled=False):
        return pair_pass(*args)


def run_self(z: Tensor, coef: Tensor | None, inverse_t: float, flat: bool) -> tuple[Tensor, Tensor]:
    """:func:`self_pass`, in the same way."""
    if torch.compiler.is_compiling():
        return _self_op(z, coef, inverse_t, flat)
    if not torch.is_autocast_enabled(z.device.type):
        return self_pass(z, coef, inverse_t, flat)
    with torch.autocast(z.device.type, enabled=False):
        return self_pass(z, coef, inverse_t, flat)
