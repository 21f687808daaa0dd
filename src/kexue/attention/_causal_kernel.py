"""Causal linear attention: a loop over chunks, forward and backward.

    forward, chunk by chunk:  P = tril(Q K^T);  den = rowsum(P) + Q z;  o = (P V + Q S) / den;  S += K^T V;  z += sum K
    backward, last chunk first, with U = sum of Q^T G and u = sum of r Q over the later chunks:
        G = g / den;  r = -rowsum(G * o);  R = tril(G V^T + r)
        dQ = R K + G S^T + r z^T;  dK = R^T Q + V U^T + u;  dV = P^T G + K U;  then U += Q^T G, u += r^T Q

The term r carries the gradient of the denominator through the same products. Of the T x M features only one chunk is
kept; elu + 1 is computed in the chunk, in both directions. What is saved for the backward are the inputs, the output,
the denominators and the state before every chunk: T / c times M x E numbers. All heads advance together, so that a
chunk stays in the cache.

With ``log_scale`` (features divided by exp of a running maximum m that never falls) the scores of a chunk carry the
factor exp(m_j - m_i) <= 1, and the state falls by exp(m_start - m_end). The output does not depend on m: it gets no
gradient.

Everything accumulates in float32 for lower precision.

Shapes: B batch, H heads of k and v, G query heads for each of them, T time, M features, E width of v, c chunk.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kexue.attention._threads import run_parts, split_heads

LOG2E = math.log2(math.e)


CACHE = 2**17  # numbers of one chunk and its scratch arrays that should stay near the core


def chunk_length(rows: int, features: int, width: int) -> int:
    """Length of a chunk: what it costs to call operations against the scores above the diagonal, computed in vain.

    The states of all chunks take at most half of the memory of q, k, v and o.
    """
    best = math.sqrt(2**21 / max(rows * features, 1))  # measured: 64 at 8 heads of 64
    spare = math.ceil(features * width / max(features + width, 1))
    return max(spare, min(256, max(32, 2 ** round(math.log2(best)))))


def block_rows(features: int, width: int) -> int:
    """How many heads advance together: as many as fit into the cache, in chunks of 64."""
    return max(1, CACHE // (64 * (features + width)))


def _features(x: Tensor, mask: Tensor | None, activation: str, dtype: torch.dtype) -> Tensor:
    """One chunk (..., c, M) mapped, in the dtype of the computation, contiguous; masked tokens are 0."""
    if x.dtype != dtype:
        x = x.to(dtype)
    if activation == "elu1":  # exp2 is vectorised everywhere, exp is not
        x = x.clamp(max=0).mul_(LOG2E).exp2_().add_(x.clamp(min=0))
    elif activation != "none":
        x = x.clamp(min=0)
        x = (x.square_() if activation == "relu2" else x).add_(1e-3)
    if mask is not None:
        x = torch.where(mask, x, 0.0)
    return x.contiguous()


def _times_slope(grad: Tensor, x: Tensor, phi: Tensor, activation: str, count: int) -> Tensor:
    """The gradient of the features times phi'(x), in place; overwrites phi."""
    if activation == "elu1":  # phi' = min(phi, 1); a masked key has phi = 0
        return grad.mul_(phi.clamp_(max=1))
    if activation == "none":
        return grad
    x = _chunks(x, count).to(phi.dtype)
    return grad.mul_(x > 0) if activation == "relu" else grad.mul_(x.clamp(min=0).mul_(2))


def _values(v: Tensor, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
    if v.dtype != dtype:
        v = v.to(dtype)
    return v if mask is None else torch.where(mask, v, 0.0)


class _Falls:
    """Factors of one chunk for features on a moving scale, each at most 1."""

    def __init__(self, level: Tensor, start: Tensor, groups: int) -> None:
        # level (B * H, c, 1), start (B * H, 1, 1): logarithms, at each token and before the chunk
        level, start = level * LOG2E, start * LOG2E
        end = level[:, -1:]
        self.pairs = (level.mT - level).clamp_(max=0).exp2_().repeat(1, groups, 1)  # (B * H, G * c, c)
        self.carry = (start - level).clamp_(max=0).exp2_().repeat(1, groups, 1)  # (B * H, G * c, 1)
        self.adds = (level - end).clamp_(max=0).exp2_()  # (B * H, c, 1)
        self.keep = (start - end).clamp_(max=0).exp2_()  # (B * H, 1, 1)


def _inverse(den: Tensor) -> Tensor:
    """1 / den, and 0 where den is 0 or below the normal numbers: nothing was seen. Overwrites den."""
    tiny = torch.finfo(den.dtype).tiny
    seen = den > tiny
    return den.clamp_(min=tiny).reciprocal_().mul_(seen)


def _per_head(x: Tensor, rows: int) -> Tensor:
    """(B, H, T, .) or (B, H, G, T, .) with B and H in one axis, and without G = 1: fewer calls for every chunk."""
    x = x.reshape(rows, *x.shape[2:])
    return x.squeeze(1) if x.dim() == 4 and x.shape[1] == 1 else x


def _stretches(t: int, chunk: int, together: int) -> list[int]:
    """Numbers of chunks that are taken together; the last stretch may be one shorter chunk."""
    full, rest = divmod(t, chunk)
    counts = [min(together, full - i) for i in range(0, full, together)]
    return counts + [1] * (rest > 0)


class _Pieces:
    """The tensors of all heads of a block, (rows, T, .) or (rows, G, T, .), cut into stretches of chunks."""

    def __init__(self, b: int, h: int, t: int, chunk: int, together: int) -> None:
        self.b, self.h, self.rows = b, h, b * h
        self.counts = _stretches(t, chunk, together)
        self.lengths = [min(count * chunk, t - i * chunk) for i, count in zip(self.starts(), self.counts, strict=True)]

    def starts(self) -> list[int]:
        """Numbers of the first chunks."""
        return list(itertools.accumulate([0, *self.counts[:-1]]))

    def along_time(self, x: Tensor | None) -> Sequence[Any]:
        """Stretches of (B, H, T, .) or (B, H, G, T, .)."""
        return [None] * len(self.counts) if x is None else _per_head(x, self.rows).split(self.lengths, -2)

    def mask(self, x: Tensor | None) -> Sequence[Any]:
        """Stretches of (B, 1 or H, T, 1)."""
        return self.along_time(None if x is None else x.expand(self.b, self.h, -1, -1))

    def by_chunk(self, x: Tensor | None) -> Sequence[Any]:
        """Stretches of (B, H, n, ., .), one matrix for each chunk."""
        if x is None:
            return [None] * len(self.counts)
        return x.view(self.rows, *x.shape[2:]).split(self.counts, 1)


def _chunks(x: Tensor, count: int) -> Tensor:
    """(rows, count * c, d) or (rows, G, count * c, d) -> (rows * count, G * c, d)."""
    if x.dim() == 4:
        x = x.unflatten(2, (count, -1)).transpose(1, 2)
    return x.reshape(len(x) * count, -1, x.shape[-1])


def _put(out: Tensor, x: Tensor, count: int) -> None:
    """The inverse of ``_chunks``, into ``out``."""
    if out.dim() == 3:
        out.copy_(x.view(out.shape))
        return
    target = out.unflatten(2, (count, -1)).transpose(1, 2)
    target.copy_(x.view(target.shape))


def _cut(x: Tensor, groups: int) -> Tensor:
    """Zero above the diagonal of every c x c block, in place."""
    (x if groups == 1 else x.view(len(x), groups, -1, x.shape[-1])).tril_()
    return x


def _falls(level: Tensor | None, start: Tensor, count: int, groups: int) -> tuple[_Falls | None, Tensor]:
    """Factors of the chunks of a stretch, and the level at its end."""
    if level is None:
        return None, start
    chunks = _chunks(level, count)
    ends = chunks[:, -1:].view(len(level), count, 1)
    starts = torch.cat([start, ends[:, :-1]], 1).view(-1, 1, 1)
    return _Falls(chunks, starts, groups), ends[:, -1:]


def forward_loop(
    tensors: Sequence[Any], activation: str, eps: float, normalize: bool, chunk: int, together: int
) -> None:
    """Fill o, inverse, states and sums; turn s and z into the state after the last key."""
    q, k, v, mask, log_scale, s, z, start, o, inverse, states, sums = tensors
    b, h, g, t, m = q.shape
    dtype, rows, e = s.dtype, b * h, v.shape[-1]
    s, z = s.view(rows, m, e), z.view(rows, 1, m)
    start = start.reshape(rows, 1, 1)
    cut = _Pieces(b, h, t, chunk, together)
    pieces = zip(
        cut.counts, *(cut.along_time(x) for x in (q, k, v, o)), cut.mask(mask),
        cut.along_time(None if log_scale is None else log_scale.unsqueeze(-1)), cut.along_time(inverse),
        cut.by_chunk(states), cut.by_chunk(sums), strict=True,
    )  # fmt: skip
    for count, qc, kc, vc, oc, live, level, inverse_c, kept_s, kept_z in pieces:
        qc = _chunks(_features(qc, None, activation, dtype), count)
        kc = _chunks(_features(kc, live, activation, dtype), count)
        vc = _chunks(_values(vc, live, dtype), count)
        falls, start = _falls(level, start, count, g)
        scores = torch.bmm(qc, kc.mT)
        if falls is not None:
            scores.mul_(falls.pairs)
            qc, kc = qc * falls.carry, kc * falls.adds
        _cut(scores, g)
        # what each chunk adds to the state, and the state before each
        more_s, more_z = torch.bmm(kc.mT, vc).view(rows, count, m, e), kc.sum(1, keepdim=True).view(rows, count, 1, m)
        before_s, before_z = torch.empty_like(more_s), torch.empty_like(more_z)
        for i in range(count):
            before_s[:, i], before_z[:, i] = s, z
            if falls is not None:
                keep = falls.keep.view(rows, count, 1, 1)[:, i]
                s.mul_(keep)
                z.mul_(keep)
            s.add_(more_s[:, i])
            z.add_(more_z[:, i])
        if kept_s is not None:
            kept_s.copy_(before_s)
            kept_z.copy_(before_z)
        before_s, before_z = before_s.view(-1, m, e), before_z.view(-1, 1, m)
        out = torch.bmm(scores, vc).baddbmm_(qc, before_s)
        if normalize:
            den = scores.sum(-1, keepdim=True).add_((qc * before_z).sum(-1, keepdim=True))
            inv = _inverse(den.add_(eps) if eps else den)
            out.mul_(inv)
            if inverse_c is not None:
                _put(inverse_c, inv, count)
        _put(oc, out, count)


def backward_loop(tensors: Sequence[Any], activation: str, chunk: int, together: int) -> None:
    """Fill dq, dk and dv; turn later_s and later_z, gradients of the last state, into those of the first."""
    grad, later_s, later_z, q, k, v, mask, log_scale, start, o, inverse, states, sums, dq, dk, dv = tensors
    b, h, g, t, m = q.shape
    dtype, rows, e = states.dtype, b * h, v.shape[-1]
    u, w = later_s.view(rows, m, e), later_z.view(rows, 1, m)
    start = start.reshape(rows, 1, 1)
    cut = _Pieces(b, h, t, chunk, together)
    levels = cut.along_time(None if log_scale is None else log_scale.unsqueeze(-1))
    starts = [start] + [None if level is None else level[:, -1:] for level in levels[:-1]]
    pieces = list(
        zip(
            cut.counts, *(cut.along_time(x) for x in (q, k, v, grad, o, dq, dk, dv)), cut.mask(mask), levels, starts,
            cut.along_time(inverse), cut.by_chunk(states), cut.by_chunk(sums), strict=True,
        )
    )  # fmt: skip
    for count, qx, kx, vc, gc, oc, dqc, dkc, dvc, live, level, first, inv, s, z in reversed(pieces):
        s, z = s.reshape(-1, m, e), z.reshape(-1, 1, m)
        qc = phi_q = _chunks(_features(qx, None, activation, dtype), count)
        kc = phi_k = _chunks(_features(kx, live, activation, dtype), count)
        vc = _chunks(_values(vc, live, dtype), count)
        rounded, r = False, None
        if inv is not None:
            gc = gc * inv  # in the dtype of the computation: inv is
            rounded = oc.dtype != dtype
            r = None if rounded else _chunks((gc * oc).sum(-1, keepdim=True).neg_(), count)
        gc = _chunks(gc if gc.dtype == dtype else gc.to(dtype), count)
        falls, _ = _falls(level, first, count, g)
        scores = torch.bmm(qc, kc.mT)
        if falls is not None:
            scores.mul_(falls.pairs)
            phi_q, phi_k = qc * falls.carry, kc * falls.adds
        _cut(scores, g)
        # queries: what they read from the state before the chunk, and from the chunk
        to_q = torch.bmm(gc, s.mT)
        pairs = torch.bmm(gc, vc.mT) if r is None else torch.baddbmm(r, gc, vc.mT)
        if rounded:  # the output is, too: r comes from what it was made of
            r = (scores * pairs).sum(-1, keepdim=True).add_((to_q * phi_q).sum(-1, keepdim=True))
            r = r.mul_(_chunks(inv, count)).neg_()
            pairs.add_(r)
        if falls is not None:
            pairs.mul_(falls.pairs)
        _cut(pairs, g)
        if r is not None:
            to_q.addcmul_(r, z)
        if falls is not None:
            to_q.mul_(falls.carry)
        to_q.baddbmm_(pairs, kc)
        # what each chunk sends back to the state before it, and what the state after each gets
        more_u = torch.bmm(phi_q.mT, gc).view(rows, count, m, e)
        more_w = None if r is None else (phi_q * r).sum(1, keepdim=True).view(rows, count, 1, m)
        after_u, after_w = torch.empty_like(more_u), u.new_empty(rows, count, 1, m)
        for i in reversed(range(count)):
            after_u[:, i], after_w[:, i] = u, w
            if falls is not None:
                keep = falls.keep.view(rows, count, 1, 1)[:, i]
                u.mul_(keep)
                w.mul_(keep)
            u.add_(more_u[:, i])
            if more_w is not None:
                w.add_(more_w[:, i])
        after_u, after_w = after_u.view(-1, m, e), after_w.view(-1, 1, m)
        # keys and values: what the later chunks read from them, and what the chunk reads
        to_k = torch.baddbmm(after_w, vc, after_u.mT)
        to_v = torch.bmm(phi_k, after_u)
        if falls is not None:
            to_k.mul_(falls.adds)
        to_k.baddbmm_(pairs.mT, qc)
        to_v.baddbmm_(scores.mT, gc)
        to_q = _times_slope(to_q, qx, qc, activation, count)
        to_k = _times_slope(to_k, kx, kc, activation, count)
        if live is not None:
            keep = _chunks(live, count)
            to_k, to_v = torch.where(keep, to_k, 0.0), torch.where(keep, to_v, 0.0)
        _put(dqc, to_q, count)
        _put(dkc, to_k, count)
        _put(dvc, to_v, count)


def _together(q: Tensor, chunk: int) -> int:
    """Chunks per call: operations large enough that threads do not wait for each other, small enough for the cache."""
    if q.device.type != "cpu":
        return 16
    return max(1, (512 if torch.get_num_threads() > 1 else 128) // chunk)


def _blocks(q: Tensor, v: Tensor) -> Sequence[tuple[slice, slice]]:
    """Blocks of heads that fit the cache, and at least as many as there are threads."""
    b, h, g, _, m = q.shape
    rows = max(1, block_rows(m, v.shape[-1]) // max(g, 1))
    if q.device.type != "cpu":
        rows = max(b * h, 1)
    return split_heads(b, h, max(1, min(rows, -(-b * h // torch.get_num_threads()))))


def _of(block: tuple[slice, slice], *tensors: Tensor | None) -> list[Any]:
    """The part of tensors (B, H or 1, ...) that belongs to a block of heads."""
    batch, heads = block
    return [None if x is None else x[batch, heads if x.shape[1] > 1 else slice(None)] for x in tensors]


def run_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    log_scale: Tensor | None,
    s: Tensor,
    z: Tensor,
    start: Tensor,
    activation: str,
    eps: float,
    normalize: bool,
    chunk: int,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The operator, forward: o, inverse denominators, states before the chunks, S and z after the last key."""
    b, h, g, t, m = q.shape
    e, n = v.shape[-1], -(-t // chunk)
    s, z = s.clone(memory_format=torch.contiguous_format), z.clone(memory_format=torch.contiguous_format)
    o = v.new_empty(b, h, g, t, e)
    inverse = s.new_empty(b, h, g, t if normalize and save else 0, 1)
    states = s.new_empty(b, h, n if save else 0, m, e)
    sums = s.new_empty(b, h, n if save else 0, 1, m)
    blocks, together = _blocks(q, v), _together(q, chunk)

    def part(i: int) -> None:
        tensors = _of(blocks[i], q, k, v, mask, log_scale, s, z, start, o, inverse if normalize and save else None)
        tensors += _of(blocks[i], states, sums) if save else [None, None]
        forward_loop(tensors, activation, eps, normalize, chunk, together)

    run_parts(part, len(blocks), t * m * e >= 2**18)
    return o, inverse, states, sums, s, z


def run_backward(
    grad: Tensor,
    grad_s: Tensor,
    grad_z: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    log_scale: Tensor | None,
    start: Tensor,
    o: Tensor,
    inverse: Tensor,
    states: Tensor,
    sums: Tensor,
    activation: str,
    normalize: bool,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The operator, backward: gradients of q, k, v and of the state before."""
    dq, dk, dv = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    ds, dz = (x.to(states.dtype).clone(memory_format=torch.contiguous_format) for x in (grad_s, grad_z))
    blocks, together = _blocks(q, v), _together(q, chunk)

    def part(i: int) -> None:
        tensors = _of(blocks[i], grad, ds, dz, q, k, v, mask, log_scale, start, o, inverse if normalize else None)
        tensors += _of(blocks[i], states, sums, dq, dk, dv)
        backward_loop(tensors, activation, chunk, together)

    run_parts(part, len(blocks), q.shape[3] * q.shape[-1] * v.shape[-1] >= 2**18)
    return dq, dk, dv, ds, dz
