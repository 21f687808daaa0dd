"""Attention whose similarity is a polynomial of the score: the loops of its forward and of its backward.

Two forms of the same sum, mixed as is cheapest:

- tiles: the polynomial P = sim(Q K^T) of blocks of 128 x 512 scores, at a cost of T^2 (D + E), no features anywhere;
  backward R = (G V^T + r) * sim'(Q K^T);  dQ = R K;  dK = R^T Q;  dV = P^T G
- the state S = phi(K)^T V, z = sum of phi(K), read as phi(Q) S, at a cost of T M E; features exist for blocks of a few
  hundred tokens at a time;
  backward with U = phi(Q)^T G, u = phi(Q)^T r of all that was read from it:  d phi(Q) = G S^T + r z^T;
  d phi(K) = V U^T + u;  dV = phi(K) U

The causal form goes by chunks: tiles inside a chunk (those in the future are skipped), the state between chunks. Up to
a length of about 4 M E / (D + E) one chunk is cheapest, and then no features are needed at all. Beyond it the products
would be fewest in short chunks, but a state is saved for each of them for the backward: chunks are as long as a state
has features, from 128 to 512, which was also fastest.

Here G = g / den, r = -rowsum(G * o) carries the gradient of the denominator. Padded keys have zeros in V and in the
column of ones whose product with P is the denominator: the constant term of the polynomial does not count them.

Everything accumulates in float32 for lower precision.

Shapes: B batch, H heads of k and v, G query heads for each of them, T queries, S keys, D width, M features, E width of
v, R = B H rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from kexue.attention import _polynomial as poly

ROWS, COLUMNS = 128, 512  # scores of one tile: with its slope and its gradient within the second-level cache
FEATURE_BLOCK = 2**19  # features that exist at a time
GPU_FACTOR = 64
MOST_FEATURES = 2**40


def _room(x: Tensor) -> int:
    """How many times larger blocks may be than on a CPU, whose caches they should fit."""
    return 1 if x.device.type == "cpu" else GPU_FACTOR


def _blocks(start: int, stop: int, size: int) -> Iterator[slice]:
    for at in range(start, stop, size):
        yield slice(at, min(at + size, stop))


def working_dtype(q: Tensor) -> torch.dtype:
    """float64 stays, everything else is computed in float32."""
    return torch.float64 if q.dtype == torch.float64 else torch.float32


class _Work:
    """What the loops share: sizes, the kernel, memory for features."""

    def __init__(self, q: Tensor, v: Tensor, kind: str, degree: int, scale: float) -> None:
        self.b, self.h, self.g, self.t, self.d = q.shape
        self.s, self.e = v.shape[2], v.shape[3]
        self.rows, self.kind, self.degree, self.dtype = self.b * self.h, kind, degree, working_dtype(q)
        self.root = scale**0.5
        self.like = q.new_empty((), dtype=self.dtype)
        self.m = poly.num_monomials(self.d, degree)
        self._weights: Tensor | None = None
        self._monomials: poly.Monomials | None = None

    @property
    def weights(self) -> Tensor:
        """(M, 1), made when the state is first needed."""
        if self._weights is None:
            self._weights = poly.weights(self.d, self.degree, self.like)
        return self._weights

    @property
    def monomials(self) -> poly.Monomials:
        if self._monomials is None:
            self._monomials = poly.monomials(self.d, self.kind, self.degree, self.like)
        return self._monomials

    def groups(self, numbers: int, budget: int = ROWS * COLUMNS) -> Iterator[slice]:
        """Rows (batch and heads) that are computed together: many of short sequences, one of long ones."""
        size = max(1, budget * _room(self.like) // max(1, numbers))
        return _blocks(0, self.rows, size)

    def feature_groups(self, tokens: int) -> Iterator[slice]:
        """Rows whose features are made together."""
        return self.groups(tokens * self.m, FEATURE_BLOCK)

    def feature_blocks(self, rows: int, tokens: int) -> Iterator[slice]:
        size = max(1, FEATURE_BLOCK * _room(self.like) // (self.m * max(1, rows)))
        size = size if size < 32 else size // 32 * 32
        return _blocks(0, tokens, size)

    def queries(self, q: Tensor, at: slice) -> Tensor:
        """(R, G, C, D)."""
        return (q[:, :, :, at].to(self.dtype) * self.root).reshape(self.rows, self.g, at.stop - at.start, self.d)

    def keys(self, k: Tensor, mask: Tensor | None, at: slice) -> Tensor:
        """(R, C, D); masked keys are 0."""
        x = k[:, :, at].to(self.dtype) * self.root
        if mask is not None:
            x = torch.where(mask[:, :, at], x, 0.0)
        return x.reshape(self.rows, at.stop - at.start, self.d)

    def values(self, v: Tensor, mask: Tensor | None, at: slice, ones: bool) -> tuple[Tensor, Tensor | None]:
        """(R, C, E), and (R, C, 1): 1, or 0 for masked keys."""
        x = v[:, :, at].to(self.dtype)
        one = None
        if ones:
            one = x.new_ones(self.b, self.h, x.shape[2], 1)
        if mask is not None:
            live = mask[:, :, at]
            x = torch.where(live, x, 0.0)
            one = None if one is None else torch.where(live, one, 0.0)
        c = at.stop - at.start
        return x.reshape(self.rows, c, self.e), None if one is None else one.view(self.rows, c, 1)


def _column(a: Tensor, x: Tensor) -> Tensor:
    """A X for X of one column: batched products are many times slower at that than a product and a sum."""
    return torch.bmm(a, x) if a.shape[0] == 1 else (a * x.mT).sum(-1, keepdim=True)


def _tiles(total: int, seen: int, causal: bool, room: int) -> Iterator[tuple[slice, list[tuple[slice, bool]]]]:
    """Blocks of queries with the blocks of keys that they see and whether the keys' diagonal runs through the block.

    Args:
        total: Queries.
        seen: Keys; of causal attention those before the first query's own.
        causal: Query i sees ``seen`` + i + 1 keys; otherwise all see ``seen``.
        room: How many times larger than on a CPU blocks may be.
    """
    for rows in _blocks(0, total, ROWS * room):
        before = seen + rows.start if causal else seen
        columns = [(block, False) for block in _blocks(0, before, COLUMNS * room)]
        if causal:
            columns.append((slice(before, seen + rows.stop), True))
        yield rows, columns


def _tile_forward(
    work: _Work,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    one: Tensor | None,
    out: Tensor,
    den: Tensor | None,
    causal: bool,
    seen: int,
) -> None:
    """Out (N, G, T, E) and den (N, G, T, 1) of queries (N, G, T, D) against keys (N, S, D)."""
    n, g, t, _ = q.shape
    for rows, columns in _tiles(t, seen, causal, _room(q)):
        size = rows.stop - rows.start
        qr = q[:, :, rows].reshape(n, g * size, q.shape[-1])
        acc = total = None
        for at, diagonal in columns:
            p = poly.value(torch.bmm(qr, k[:, at].mT), work.kind, work.degree)
            if diagonal:
                p.view(n, g, size, size).tril_()
            if acc is None:
                acc = torch.bmm(p, v[:, at])
                total = None if one is None else _column(p, one[:, at])
            else:
                acc.baddbmm_(p, v[:, at])
                if one is not None and total is not None:
                    total.add_(_column(p, one[:, at]))
        if acc is not None:
            out[:, :, rows] = acc.view(n, g, size, v.shape[-1])
        if den is not None and total is not None:
            den[:, :, rows] = total.view(n, g, size, 1)


def _tile_backward(
    work: _Work,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grad: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    causal: bool,
    seen: int,
) -> None:
    """Adds to dq (N, G, T, D), dk and dv (N, S, ...); v and grad may have a column for the denominator."""
    n, g, t, d = q.shape
    e = dv.shape[-1]
    for rows, columns in _tiles(t, seen, causal, _room(q)):
        size = rows.stop - rows.start
        qr = q[:, :, rows].reshape(n, g * size, d)
        gr = grad[:, :, rows].reshape(n, g * size, grad.shape[-1])
        ge = gr[..., :e].contiguous()
        to_q = torch.zeros_like(qr)
        for at, diagonal in columns:
            p, slope = poly.value_and_slope(torch.bmm(qr, k[:, at].mT), work.kind, work.degree)
            pairs = torch.bmm(gr, v[:, at].mT).mul_(slope)
            if diagonal:
                p.view(n, g, size, size).tril_()
                pairs.view(n, g, size, size).tril_()
            to_q.baddbmm_(pairs, k[:, at])
            dk[:, at].baddbmm_(pairs.mT, qr)
            dv[:, at].baddbmm_(p.mT, ge)
        dq[:, :, rows] += to_q.view(n, g, size, d)


def _absorb(work: _Work, k: Tensor, v: Tensor, one: Tensor | None, s: Tensor, z: Tensor) -> None:
    """S (N, M, E) += phi(K)^T V and z (N, M, 1) += phi(K)^T 1, without weights."""
    for at in work.feature_blocks(k.shape[0], k.shape[1]):
        phi = work.monomials.build(k[:, at])
        s.baddbmm_(phi, v[:, at])
        if one is not None:
            z.add_(_column(phi, one[:, at]))


def _read(work: _Work, q: Tensor, s: Tensor, z: Tensor, out: Tensor, den: Tensor | None) -> None:
    """Out += phi(Q) S and den += phi(Q) z for queries (N, G, T, D); the state has the weights in it."""
    n, g, t, _ = q.shape
    for head in range(g):
        for at in work.feature_blocks(n, t):
            phi = work.monomials.build(q[:, head, at]).mT
            out[:, head, at] += torch.bmm(phi, s)
            if den is not None:
                den[:, head, at] += _column(phi, z)


def _read_backward(work: _Work, q: Tensor, state: Tensor, grad: Tensor, dq: Tensor, s: Tensor, z: Tensor) -> None:
    """Adds to dq, and to the sums (U, u) of what was read; state and grad may have a column for the denominator."""
    n, g, t, _ = q.shape
    e = s.shape[-1]
    for head in range(g):
        for at in work.feature_blocks(n, t):
            phi = work.monomials.build(q[:, head, at])
            upstream = grad[:, head, at]
            s.baddbmm_(phi, upstream[..., :e])
            if upstream.shape[-1] > e:
                z.add_(_column(phi, upstream[..., e:]))
            torch.bmm(state, upstream.mT, out=work.monomials.gradient(n, phi.shape[2]))
            dq[:, head, at] += work.monomials.back(n, phi.shape[2])


def _absorb_backward(work: _Work, k: Tensor, v: Tensor, sums: Tensor, dk: Tensor, dv: Tensor) -> None:
    """Adds to dk and dv what was read from the state; sums (N, M, E or E + 1) has the weights in it, v its column."""
    n, e = k.shape[0], dv.shape[-1]
    plain = sums[..., :e].contiguous()
    for at in work.feature_blocks(n, k.shape[1]):
        phi = work.monomials.build(k[:, at])
        dv[:, at] += torch.bmm(phi.mT, plain)
        torch.bmm(sums, v[:, at].mT, out=work.monomials.gradient(n, phi.shape[2]))
        dk[:, at] += work.monomials.back(n, phi.shape[2])


def _absorb_backward_all(work: _Work, k: Tensor, v: Tensor, s: Tensor, z: Tensor, dk: Tensor, dv: Tensor) -> None:
    """The same for all rows, from the sums (U, u) without weights."""
    sums = (torch.cat([s, z], -1) if v.shape[-1] > s.shape[-1] else s) * work.weights
    for n in work.feature_groups(k.shape[1]):
        _absorb_backward(work, k[n], v[n], sums[n], dk[n], dv[n])


class _Steps:
    """Which chunks of keys there are, which queries belong to them, and where the state is read and fed."""

    def __init__(self, t: int, s: int, causal: bool, chunk: int, initial: bool, wanted: bool) -> None:
        self.early = s - t if causal else 0
        self.causal, self.initial, self.wanted, self.s, self.t = causal, initial, wanted, s, t
        self.state_first = not causal and chunk == 0  # every query reads the state of all keys
        self.chunk = chunk if causal and chunk else max(s, 1)
        self.count = -(-s // self.chunk) if causal else 1

    def __len__(self) -> int:
        return self.count

    def keys(self, i: int) -> slice:
        return slice(i * self.chunk, min((i + 1) * self.chunk, self.s))

    def queries(self, i: int) -> slice:
        """Queries of chunk i."""
        if not self.causal:
            return slice(0, self.t)
        at = self.keys(i)
        return slice(max(at.start - self.early, 0), max(at.stop - self.early, 0))

    def seen(self, i: int) -> int:
        """Keys of chunk i before the first query's own; all keys when not causal."""
        return self.queries(i).start + self.early - self.keys(i).start if self.causal else self.s

    def reads(self, i: int) -> bool:
        at = self.queries(i)
        return at.stop > at.start and (i > 0 or self.initial or self.state_first)

    def feeds(self, i: int) -> bool:
        return i + 1 < self.count or self.wanted or self.state_first

    @property
    def slots(self) -> int:
        """States that are saved for the backward."""
        return saved_states(self.t, self.s, self.causal, 0 if self.state_first else self.chunk, self.initial)

    def slot(self, i: int) -> int:
        return i - (self.count - self.slots)


def saved_states(t: Any, s: Any, causal: bool, chunk: Any, initial: bool) -> Any:
    """Chunks that have queries and a state before them; sizes may be symbolic."""
    if not causal:
        return int(initial or chunk == 0)
    return torch.sym_max((s + chunk - 1) // chunk - torch.sym_max((s - t) // chunk, 0 if initial else 1), 0)


def state_size(dim: int, degree: int) -> int:
    """M; 0 if there are more features than any memory holds: then there is no state, and tensors cannot be so long."""
    m = poly.num_monomials(dim, degree)
    return m if m < MOST_FEATURES else 0


def _safe_inverse(den: Tensor) -> Tensor:
    """1 / den, and 0 where no key was seen; the similarity is not negative, so that den <= 0 is rounding."""
    seen = den > torch.finfo(den.dtype).tiny
    return torch.where(seen, torch.where(seen, den, 1.0).reciprocal(), 0.0)


def _start(work: _Work, s: Tensor | None, z: Tensor | None, needed: bool) -> tuple[Tensor, Tensor]:
    """The state without weights, (R, M, E) and (R, M, 1)."""
    if s is not None and z is not None:
        root = work.weights.sqrt()
        return s.reshape(work.rows, work.m, work.e) / root, z.reshape(work.rows, work.m, 1) / root
    size = work.m if needed else 0
    return work.like.new_zeros(work.rows, size, work.e), work.like.new_zeros(work.rows, size, 1)


def forward_loop(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    s: Tensor | None,
    z: Tensor | None,
    kind: str,
    degree: int,
    scale: float,
    causal: bool,
    eps: float,
    normalize: bool,
    chunk: int,
    wanted: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Fill the output and the saved states; turn the state before into that after the last key."""
    work = _Work(q, v, kind, degree, scale)
    steps = _Steps(work.t, work.s, causal, chunk, s is not None, wanted)
    b, h, g, t, e, m, rows = work.b, work.h, work.g, work.t, work.e, work.m, work.rows
    state_s, state_z = _start(work, s, z, any(steps.feeds(i) for i in range(len(steps))) or wanted)
    o = q.new_empty(b, h, g, t, e, dtype=v.dtype)
    inverse = work.like.new_empty(b, h, g, t if normalize and save else 0, 1)
    slots = steps.slots if save else 0
    size = state_size(work.d, degree)
    states, sums = work.like.new_empty(slots, rows, size, e), work.like.new_empty(slots, rows, size, 1)
    for i in range(len(steps)):
        at_k, at_q = steps.keys(i), steps.queries(i)
        kc = work.keys(k, mask, at_k)
        vc, one = work.values(v, mask, at_k, normalize or wanted)
        qc = work.queries(q, at_q)
        c = qc.shape[2]
        out = qc.new_zeros(rows, g, c, e)
        den = qc.new_zeros(rows, g, c, 1) if normalize else None
        if steps.state_first:
            for n in work.feature_groups(kc.shape[1]):
                _absorb(work, kc[n], vc[n], None if one is None else one[n], state_s[n], state_z[n])
        elif c:
            for n in work.groups(g * min(c, ROWS) * min(kc.shape[1], COLUMNS)):
                _tile_forward(
                    work, qc[n], kc[n], vc[n], None if one is None or den is None else one[n], out[n],
                    None if den is None else den[n], causal, steps.seen(i),
                )  # fmt: skip
        if steps.reads(i):
            weighted_s, weighted_z = state_s * work.weights, state_z * work.weights
            if save:
                states[steps.slot(i)], sums[steps.slot(i)] = weighted_s, weighted_z
            for n in work.feature_groups(c):
                _read(work, qc[n], weighted_s[n], weighted_z[n], out[n], None if den is None else den[n])
        if steps.feeds(i) and not steps.state_first:
            for n in work.feature_groups(kc.shape[1]):
                _absorb(work, kc[n], vc[n], None if one is None else one[n], state_s[n], state_z[n])
        if den is not None:
            inv = _safe_inverse(den.add_(eps))
            out.mul_(inv)
            if save:
                inverse[:, :, :, at_q] = inv.view(b, h, g, c, 1)
        o[:, :, :, at_q] = out.view(b, h, g, c, e)
    if not wanted:
        return o, inverse, states, sums, work.like.new_empty(0), work.like.new_empty(0)
    root = work.weights.sqrt()
    return o, inverse, states, sums, state_s.mul_(root).view(b, h, m, e), state_z.mul_(root).view(b, h, m)


def backward_loop(
    grad: Tensor,
    grad_s: Tensor,
    grad_z: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    o: Tensor,
    inverse: Tensor,
    states: Tensor,
    sums: Tensor,
    kind: str,
    degree: int,
    scale: float,
    causal: bool,
    normalize: bool,
    chunk: int,
    initial: bool,
    wanted: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Fill the gradients of q, k and v; turn those of the last state into those of the first."""
    work = _Work(q, v, kind, degree, scale)
    steps = _Steps(work.t, work.s, causal, chunk, initial, wanted)
    b, h, g, d, e, m, rows = work.b, work.h, work.g, work.d, work.e, work.m, work.rows
    dq, dk, dv = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    # what was read from the state, without weights
    after = (grad_s, grad_z) if wanted else (None, None)
    later_s, later_z = _start(work, after[0], after[1], initial or steps.slots > 0)
    fed = wanted
    for i in reversed(range(len(steps))):
        at_k, at_q = steps.keys(i), steps.queries(i)
        kc = work.keys(k, mask, at_k)
        vc, one = work.values(v, mask, at_k, normalize or wanted)
        v1 = vc if one is None else torch.cat([vc, one], -1)
        qc = work.queries(q, at_q)
        c = qc.shape[2]
        gc = grad[:, :, :, at_q].to(work.dtype)
        if normalize:
            gc = gc * inverse[:, :, :, at_q]
            r = (gc * o[:, :, :, at_q]).sum(-1, keepdim=True).neg_()
            gc = torch.cat([gc, r], -1)
        gc = gc.reshape(rows, g, c, e + normalize)
        dqc, dkc, dvc = torch.zeros_like(qc), torch.zeros_like(kc), torch.zeros_like(vc)
        reads = steps.reads(i)
        if reads and steps.state_first:
            fed = True
        elif fed:  # before the reads of this chunk are added: they are of the state before it
            _absorb_backward_all(work, kc, v1, later_s, later_z, dkc, dvc)
        if reads:
            fed = True
            state = states[steps.slot(i)]
            if normalize:
                state = torch.cat([state, sums[steps.slot(i)]], -1)
            for n in work.feature_groups(c):
                _read_backward(work, qc[n], state[n], gc[n], dqc[n], later_s[n], later_z[n])
        if steps.state_first:
            if fed:
                _absorb_backward_all(work, kc, v1, later_s, later_z, dkc, dvc)
        elif c:
            for n in work.groups(g * min(c, ROWS) * min(kc.shape[1], COLUMNS)):
                _tile_backward(
                    work, qc[n], kc[n], v1[n, :, : e + normalize], gc[n], dqc[n], dkc[n], dvc[n], causal, steps.seen(i)
                )  # fmt: skip
        dkc, dvc = dkc.mul_(work.root).view(b, h, kc.shape[1], d), dvc.view(b, h, kc.shape[1], e)
        if mask is not None:
            dkc, dvc = torch.where(mask[:, :, at_k], dkc, 0.0), torch.where(mask[:, :, at_k], dvc, 0.0)
        dq[:, :, :, at_q] = dqc.mul_(work.root).view(b, h, g, c, d)
        dk[:, :, at_k] = dkc
        dv[:, :, at_k] = dvc
    if not initial:
        return dq, dk, dv, work.like.new_empty(0), work.like.new_empty(0)
    root = work.weights.sqrt()
    return dq, dk, dv, later_s.mul_(root).view(b, h, m, e), later_z.mul_(root).view(b, h, m)
