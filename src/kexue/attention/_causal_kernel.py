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


def _times_slope(grad: Tensor, x: Tensor, phi: Tensor, activation: str, groups: int) -> Tensor:
    """The gradient of the features times phi'(x), in place; overwrites phi."""
    if activation == "elu1":  # phi' = min(phi, 1); a masked key has phi = 0
        return grad.mul_(phi.clamp_(max=1))
    if activation == "none":
        return grad
    x = _rows_of(x.to(phi.dtype), len(phi), groups)
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


def _parts(x: Tensor | None, chunk: int, n: int) -> Sequence[Any]:
    """Chunks of the axis before the last."""
    return (None,) * n if x is None else x.split(chunk, -2)


def _per_head(x: Tensor, rows: int) -> Tensor:
    """(B, H, T, .) or (B, H, G, T, .) with B and H in one axis, and without G = 1: fewer calls for every chunk."""
    x = x.reshape(rows, *x.shape[2:])
    return x.squeeze(1) if x.dim() == 4 and x.shape[1] == 1 else x


def _mask_per_head(mask: Tensor | None, b: int, h: int) -> Tensor | None:
    return None if mask is None else mask.expand(b, h, -1, -1).reshape(b * h, -1, 1)


def _rows_of(x: Tensor, rows: int, groups: int) -> Tensor:
    """A chunk of queries (rows, G, c, .) with its groups among the rows: (rows, G * c, .)."""
    return x if groups == 1 else x.reshape(rows, -1, x.shape[-1])


def _cut(x: Tensor, groups: int) -> Tensor:
    """Zero above the diagonal of every c x c block, in place."""
    (x if groups == 1 else x.view(len(x), groups, -1, x.shape[-1])).tril_()
    return x


def forward_loop(tensors: Sequence[Any], activation: str, eps: float, normalize: bool, chunk: int) -> None:
    """Fill o, inverse, states and sums; turn s and z into the state after the last key."""
    q, k, v, mask, log_scale, s, z, start, o, inverse, states, sums = tensors
    b, h, g, t, m = q.shape
    dtype, rows, n = s.dtype, b * h, -(-t // chunk)
    s, z = s.view(rows, m, -1), z.view(rows, 1, m)
    start = start.reshape(rows, 1, 1)
    levels = None if log_scale is None else log_scale.reshape(rows, t, 1)
    pieces = zip(
        *(_parts(_per_head(x, rows), chunk, n) for x in (q, k, v, o)), _parts(_mask_per_head(mask, b, h), chunk, n),
        _parts(levels, chunk, n), _parts(None if inverse is None else _per_head(inverse, rows), chunk, n),
        (None,) * n if states is None else states.unbind(), (None,) * n if sums is None else sums.unbind(),
        strict=True,
    )  # fmt: skip
    for qc, kc, vc, oc, live, level, inverse_c, state, total in pieces:
        qc = _rows_of(_features(qc, None, activation, dtype), rows, g)
        kc, vc = _features(kc, live, activation, dtype), _values(vc, live, dtype)
        if state is not None:
            state.view(s.shape).copy_(s)
            total.view(z.shape).copy_(z)
        scores = torch.bmm(qc, kc.mT)
        if level is not None:
            falls = _Falls(level, start, g)
            scores.mul_(falls.pairs)
            qc, kc = qc * falls.carry, kc * falls.adds
        _cut(scores, g)
        out = torch.bmm(scores, vc).baddbmm_(qc, s)
        inv: Any = 1.0
        if normalize:
            den = scores.sum(-1, keepdim=True).add_((qc * z).sum(-1, keepdim=True))
            inv = _inverse(den.add_(eps) if eps else den)
            if inverse_c is not None:
                inverse_c.copy_(inv.view(inverse_c.shape))
        if g == 1:
            torch.mul(out, inv, out=oc)
        else:
            oc.copy_(out.mul_(inv).view(oc.shape))
        if level is not None:
            s.mul_(falls.keep)
            z.mul_(falls.keep)
            start = level[:, -1:]
        s.baddbmm_(kc.mT, vc)
        z.add_(kc.sum(1, keepdim=True))


def backward_loop(tensors: Sequence[Any], activation: str, chunk: int) -> None:
    """Fill dq, dk and dv; turn later_s and later_z, gradients of the last state, into those of the first."""
    grad, later_s, later_z, q, k, v, mask, log_scale, start, o, inverse, states, sums, dq, dk, dv = tensors
    b, h, g, t, m = q.shape
    dtype, rows, n = states.dtype, b * h, -(-t // chunk)
    u, w = later_s.view(rows, m, -1), later_z.view(rows, 1, m)
    start = start.reshape(rows, 1, 1)
    levels = None if log_scale is None else log_scale.reshape(rows, t, 1)
    pieces = list(
        zip(
            *(_parts(_per_head(x, rows), chunk, n) for x in (q, k, v, grad, o, dq, dk, dv)),
            _parts(_mask_per_head(mask, b, h), chunk, n), _parts(levels, chunk, n),
            _parts(None if inverse is None else _per_head(inverse, rows), chunk, n), states.unbind(), sums.unbind(),
            strict=True,
        )
    )  # fmt: skip
    for i in reversed(range(n)):
        qc, kc, vc, gc, oc, dqc, dkc, dvc, live, level, inv, s, z = pieces[i]
        s, z = s.reshape(u.shape), z.reshape(w.shape)
        qc = phi_q = _rows_of(_features(qc, None, activation, dtype), rows, g)
        kc = phi_k = _features(kc, live, activation, dtype)
        vc = _values(vc, live, dtype)
        if inv is not None:
            gc = gc * inv  # in the dtype of the computation: inv is
            rounded = oc.dtype != dtype
            r = None if rounded else _rows_of((gc * oc).sum(-1, keepdim=True).neg_(), rows, g)
        else:
            r, rounded = None, False
        gc = _rows_of(gc if gc.dtype == dtype else gc.to(dtype), rows, g)
        scores = torch.bmm(qc, kc.mT)
        if level is not None:
            falls = _Falls(level, start if i == 0 else pieces[i - 1][9][:, -1:], g)
            scores.mul_(falls.pairs)
            phi_q, phi_k = qc * falls.carry, kc * falls.adds
        _cut(scores, g)
        # queries: what they read from the state before the chunk, and from the chunk
        to_q = torch.bmm(gc, s.mT)
        pairs = torch.bmm(gc, vc.mT) if r is None else torch.baddbmm(r, gc, vc.mT)
        if rounded:  # the output is, too: r comes from what it was made of
            r = (scores * pairs).sum(-1, keepdim=True).add_((to_q * phi_q).sum(-1, keepdim=True))
            r = r.mul_(_rows_of(inv, rows, g)).neg_()
            pairs.add_(r)
        if level is not None:
            pairs.mul_(falls.pairs)
        _cut(pairs, g)
        if r is not None:
            to_q.addcmul_(r, z)
        if level is not None:
            to_q.mul_(falls.carry)
        to_q.baddbmm_(pairs, kc)
        # keys and values: what the later chunks read from them, and what the chunk reads
        to_k = torch.baddbmm(w, vc, u.mT)
        to_v = torch.bmm(phi_k, u)
        if level is not None:
            to_k.mul_(falls.adds)
        to_k.baddbmm_(pairs.mT, qc)
        to_v.baddbmm_(scores.mT, gc)
        if level is not None:
            u.mul_(falls.keep)
            w.mul_(falls.keep)
        u.baddbmm_(phi_q.mT, gc)
        if r is not None:
            w.add_((phi_q * r).sum(1, keepdim=True))
        to_q, to_k = (
            _times_slope(to_q, pieces[i][0], qc, activation, g), _times_slope(to_k, pieces[i][1], kc, activation, 1)
        )  # fmt: skip
        dqc.copy_(to_q.view(dqc.shape))
        dkc.copy_(to_k if live is None else torch.where(live, to_k, 0.0))
        dvc.copy_(to_v if live is None else torch.where(live, to_v, 0.0))


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


def _states_of(block: tuple[slice, slice], *tensors: Tensor) -> list[Any]:
    return [x[:, block[0], block[1]] for x in tensors]


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
    b, h, g, t, m = q.shape
    e, n = v.shape[-1], -(-t // chunk)
    s, z = s.clone(memory_format=torch.contiguous_format), z.clone(memory_format=torch.contiguous_format)
    o = v.new_empty(b, h, g, t, e)
    inverse = s.new_empty(b, h, g, t if normalize and save else 0, 1)
    states = s.new_empty(n if save else 0, b, h, m, e)
    sums = s.new_empty(n if save else 0, b, h, 1, m)
    blocks = _blocks(q, v)

    def part(i: int) -> None:
        tensors = _of(blocks[i], q, k, v, mask, log_scale, s, z, start, o, inverse if normalize and save else None)
        tensors += _states_of(blocks[i], states, sums) if save else [None, None]
        forward_loop(tensors, activation, eps, normalize, chunk)

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
    dq, dk, dv = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    ds, dz = (x.to(states.dtype).clone(memory_format=torch.contiguous_format) for x in (grad_s, grad_z))
    blocks = _blocks(q, v)

    def part(i: int) -> None:
        tensors = _of(blocks[i], grad, ds, dz, q, k, v, mask, log_scale, start, o, inverse if normalize else None)
        tensors += _states_of(blocks[i], states, sums) + _of(blocks[i], dq, dk, dv)
        backward_loop(tensors, activation, chunk)

    run_parts(part, len(blocks), q.shape[3] * q.shape[-1] * v.shape[-1] >= 2**18)
    return dq, dk, dv, ds, dz
