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


def chunk_length(rows: int, features: int) -> int:
    """Length of a chunk: what it costs to call operations against the scores above the diagonal, computed in vain."""
    best = math.sqrt(2**21 / max(rows * features, 1))  # measured: 64 at 8 heads of 64
    return min(256, max(32, 2 ** round(math.log2(best))))


def block_rows(features: int, width: int) -> int:
    """How many heads advance together: as many as fit into the cache, in chunks of 64."""
    return max(1, CACHE // (64 * (features + width)))


def _features(x: Tensor, mask: Tensor | None, activation: str, dtype: torch.dtype) -> Tensor:
    """One chunk (..., c, M) mapped, in the dtype of the computation, contiguous; masked tokens are 0."""
    x = x.to(dtype)
    if activation == "elu1":  # exp2 is vectorised everywhere, exp is not
        x = x.clamp(max=0).mul_(LOG2E).exp2_().add_(x.clamp(min=0))
    if mask is not None:
        x = torch.where(mask, x, 0.0)
    return x.contiguous()


def _values(v: Tensor, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
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


def _parts(x: Tensor | None, chunk: int, axis: int, n: int) -> tuple[Tensor | None, ...]:
    return (None,) * n if x is None else x.split(chunk, axis)


def forward_loop(tensors: Sequence[Any], activation: str, eps: float, normalize: bool, chunk: int) -> None:
    """Fill o, inverse, states and sums; turn s and z into the state after the last key."""
    q, k, v, mask, log_scale, s, z, start, o, inverse, states, sums = tensors
    b, h, g, t, m = q.shape
    e, dtype, rows = v.shape[-1], s.dtype, b * h
    n = -(-t // chunk)
    s3, z3 = s.reshape(rows, m, e), z.reshape(rows, 1, m)
    start = start.reshape(rows, 1, 1)
    levels = None if log_scale is None else log_scale.reshape(rows, t, 1)
    pieces = zip(
        q.split(chunk, 3), k.split(chunk, 2), v.split(chunk, 2), o.split(chunk, 3), _parts(mask, chunk, 2, n),
        _parts(levels, chunk, 1, n), _parts(inverse, chunk, 3, n),
        strict=True,
    )  # fmt: skip
    for i, (qc, kc, vc, oc, live, level, inverse_c) in enumerate(pieces):
        c = kc.shape[2]
        qc = _features(qc, None, activation, dtype).view(rows, g * c, m)
        kc = _features(kc, live, activation, dtype).view(rows, c, m)
        vc = _values(vc, live, dtype).reshape(rows, c, e)
        if states is not None and sums is not None:
            states[i], sums[i] = s3.view(b, h, m, e), z3.view(b, h, 1, m)
        scores = torch.bmm(qc, kc.mT)
        if level is not None:
            falls = _Falls(level, start, g)
            scores.mul_(falls.pairs)
            qc, kc = qc * falls.carry, kc * falls.adds
        scores.view(rows, g, c, c).tril_()
        out = torch.bmm(scores, vc).baddbmm_(qc, s3)
        if normalize:
            inv = _inverse(scores.sum(-1, keepdim=True).add_((qc * z3).sum(-1, keepdim=True)).add_(eps))
            out.mul_(inv)
            if inverse_c is not None:
                inverse_c.copy_(inv.view(b, h, g, c, 1))
        oc.copy_(out.view(b, h, g, c, e))
        if level is not None:
            s3.mul_(falls.keep)
            z3.mul_(falls.keep)
            start = level[:, -1:]
        s3.baddbmm_(kc.mT, vc)
        z3.add_(kc.sum(1, keepdim=True))


def backward_loop(tensors: Sequence[Any], activation: str, chunk: int) -> None:
    """Fill dq, dk and dv; turn later_s and later_z, gradients of the last state, into those of the first."""
    grad, later_s, later_z, q, k, v, mask, log_scale, start, o, inverse, states, sums, dq, dk, dv = tensors
    b, h, g, t, m = q.shape
    e, dtype, rows = v.shape[-1], states.dtype, b * h
    n = -(-t // chunk)
    u, w = later_s.reshape(rows, m, e), later_z.reshape(rows, 1, m)
    start = start.reshape(rows, 1, 1)
    levels = None if log_scale is None else log_scale.reshape(rows, t, 1)
    pieces = list(
        zip(
            q.split(chunk, 3), k.split(chunk, 2), v.split(chunk, 2), grad.split(chunk, 3), o.split(chunk, 3),
            dq.split(chunk, 3), dk.split(chunk, 2), dv.split(chunk, 2), _parts(mask, chunk, 2, n),
            _parts(levels, chunk, 1, n), _parts(inverse, chunk, 3, n), states.unbind(), sums.unbind(),
            strict=True,
        )
    )  # fmt: skip
    for i in reversed(range(n)):
        qc, kc, vc, gc, oc, dqc, dkc, dvc, live, level, inv, s, z = pieces[i]
        c = kc.shape[2]
        s, z = s.reshape(rows, m, e), z.reshape(rows, 1, m)
        qc = phi_q = _features(qc, None, activation, dtype).view(rows, g * c, m)
        kc = phi_k = _features(kc, live, activation, dtype).view(rows, c, m)
        vc = _values(vc, live, dtype).reshape(rows, c, e)
        gc = gc.to(dtype)
        r = None
        if inv is not None:
            gc = gc * inv
            r = (gc * oc).sum(-1, keepdim=True).neg_().view(rows, g * c, 1)
        gc = gc.reshape(rows, g * c, e)
        scores = torch.bmm(qc, kc.mT)
        pairs = torch.bmm(gc, vc.mT) if r is None else torch.baddbmm(r, gc, vc.mT)
        if level is not None:
            before = start if i == 0 else pieces[i - 1][9][:, -1:]
            falls = _Falls(level, before, g)
            scores.mul_(falls.pairs)
            pairs.mul_(falls.pairs)
            phi_q, phi_k = qc * falls.carry, kc * falls.adds
        scores.view(rows, g, c, c).tril_()
        pairs.view(rows, g, c, c).tril_()
        # queries: what they read from the state before the chunk, and from the chunk
        to_q = torch.bmm(gc, s.mT)
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
        if activation == "elu1":  # phi' = min(phi, 1); a masked key has phi = 0
            to_q.mul_(qc.clamp_(max=1))
            to_k.mul_(kc.clamp_(max=1))
        to_k, to_v = to_k.view(b, h, c, m), to_v.view(b, h, c, e)
        if live is not None:
            to_k, to_v = torch.where(live, to_k, 0.0), torch.where(live, to_v, 0.0)
        dqc.copy_(to_q.view(b, h, g, c, m))
        dkc.copy_(to_k)
        dvc.copy_(to_v)


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
