"""Linear attention whose features are exp(W [x; |x|^2; 1]), without the features ever existing as a whole.

Random features of exp(x.y) have this form. Three operators, each with a backward of its own that maps its chunks again:

    absorb:  S += sum_j exp(L_j - m') v_j^T,  z += sum_j exp(L_j - m'),  m' = max(m, max_j L_j),  L = W [k; |k|^2; 1]
    read:    o_i = P_i S / (P_i z),  P_i = exp(W [q_i; 0; 1] + m - top_i),  top_i = the maximum over features
    causal:  both at once, chunk by chunk

Bidirectional attention is absorb, then read. Each feature has a level m of its own, the largest logarithm that any key
had: then z is between 1 and the number of keys, no sum can underflow, and queries and keys cannot miss each other
because their largest features differ. Queries need no |q|^2: it is common to their features and cancels.

The causal form knows only the level before a chunk (for the first one: that of the first token), so that nothing
depends on later tokens. It is raised only after a key that exceeded it by exp(LIMIT): then, inside the chunk, a scalar
per token, lambda, the running maximum of L - m over features and tokens (0 up to LIMIT), takes up what exceeds it:

    K^ = exp(L - m - lambda),  Q^ = exp(W [q; 0; 1] + m - top),  P = tril(Q^ K^^T * exp(lambda_j - lambda_i))
    o = (P V + exp(-lambda_i) Q^ S) / (rowsum P + exp(-lambda_i) Q^ z)

Outputs depend on no level: levels get no gradient. W neither.

Shapes: B batch, H heads of k and v, G query heads for each of them, T time, D width, M features, E width of v, c chunk.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kexue.attention._exponential_parts import (
    Scratch,
    absorb,
    chunks,
    exp_,
    inverse_of,
    lowest,
    map_keys,
    map_queries,
    no_gradients,
    read,
    to_k,
    values_of,
    write,
)

CHUNK = 64
LIMIT = 30.0  # a feature may exceed the level by exp of it: enough for nearly all data, and far from an overflow


# --- causal -----------------------------------------------------------------------------------------------------------


class _Chunk:
    """One chunk mapped; ``level`` (rows, 1, M) is that before it. Takes numbers 1 to 3 of the scratch memory.

    Attributes:
        k: K^ (rows, c, M).
        q: Q^ (rows, G * c, M).
        scores: P (rows, G * c, c).
        above: lambda (rows, c, 1), or None where it is 0 everywhere.
    """

    above: Tensor | None = None

    def __init__(self, q: Tensor, logs: Tensor, level: Tensor, at: slice, weight: Tensor, scratch: Scratch) -> None:
        (rows, c, m), self.groups = logs.shape, q.shape[2]
        self.k = torch.sub(logs, level, out=scratch(1, rows, c, m))
        if float(self.k.max()) > LIMIT:
            above = self.k.amax(-1, keepdim=True).cummax(1).values
            self.above = above = torch.where(above > LIMIT, above, 0.0)
            self.k.sub_(above)
            self.pairs = (above.mT - above).clamp_(max=0).exp_().repeat(1, self.groups, 1)
            self.carry = above.neg().exp_().repeat(1, self.groups, 1)
        exp_(self.k)
        self.q = map_queries(q, at, weight, level, scratch(2, rows, self.groups * c, m))
        scores = torch.bmm(self.q, self.k.mT, out=scratch(3, rows, self.groups * c, c))
        self.scores = self.lower(scores)

    def lower(self, x: Tensor) -> Tensor:
        """Scale and cut the c x c block of every group, in place."""
        c = x.shape[-1]
        if self.above is not None:
            x.mul_(self.pairs)
        x.view(len(x), self.groups, c, c).tril_()
        return x

    def carried(self, x: Tensor) -> Tensor:
        """Scale what has to do with the state before the chunk, in place."""
        return x if self.above is None else x.mul_(self.carry)

    def next_level(self, logs: Tensor, level: Tensor) -> Tensor:
        """Raised in the rows that went beyond the limit; those that did not keep their bits."""
        if self.above is None:
            return level
        return torch.where(self.above[:, -1:] > 0, torch.maximum(level, logs.amax(1, keepdim=True)), level)


def _first_level(logs: Tensor, z: Tensor, level: Tensor, live: Tensor | None) -> Tensor:
    """The level before a chunk: where nothing was seen yet, that of the first token that takes part."""
    if live is None:
        first = logs[:, :1]
    else:
        at = live.long().argmax(1).repeat_interleave(len(logs) // len(live))  # (rows,)
        first = logs[torch.arange(len(logs), device=logs.device), at].unsqueeze(1)
    return torch.where(z > 0, level, first.clamp(min=lowest(logs)))


def _causal_memory(rows: int, groups: int, m: int) -> tuple[int, ...]:
    """Sizes: L, K^, Q^, scores; backward also gradients of scores, of queries' and of keys' logarithms."""
    keys, queries, scores = rows * CHUNK * m, rows * groups * CHUNK * m, rows * groups * CHUNK * CHUNK
    return keys, keys, queries, scores, scores, queries, keys


@torch.library.custom_op("kexue::exponential_causal", mutates_args=())
def _causal(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    s: Tensor,
    z: Tensor,
    level: Tensor,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    b, h, g, t, _ = q.shape
    m, e = s.shape[2:]
    rows, parts = b * h, chunks(t, CHUNK)
    s, z, level = s.reshape(rows, m, e).clone(), z.reshape(rows, 1, m).clone(), level.reshape(rows, 1, m)
    o, inverse = q.new_empty(b, h, g, t, e), q.new_empty(b, h, g, t if save else 0, 1)
    n = len(parts) if save else 0
    states, sums, levels = s.new_empty(n, rows, m, e), s.new_empty(n, rows, 1, m), s.new_empty(n, rows, 1, m)
    scratch = Scratch(s, *_causal_memory(rows, g, m)[:4])
    for i, at in enumerate(parts):
        c = at.stop - at.start
        _, logs = map_keys(k, mask, at, weight, rows, scratch(0, rows, c, m))
        if i == 0 or mask is not None:
            level = _first_level(logs, z, level, None if mask is None else mask[:, 0, at, 0])
        if save:
            states[i], sums[i], levels[i] = s, z, level
        values = values_of(v, mask, at, rows)
        chunk = _Chunk(q, logs, level, at, weight, scratch)
        carried = chunk.carried(chunk.q)
        inv = inverse_of(chunk.scores.sum(-1, keepdim=True).baddbmm_(carried, z.mT))
        o[:, :, :, at] = torch.bmm(chunk.scores, values).baddbmm_(carried, s).mul_(inv).view(b, h, g, c, e)
        if save:
            inverse[:, :, :, at] = inv.view(b, h, g, c, 1)
        features = chunk.k
        if chunk.above is not None:
            higher = chunk.next_level(logs, level)
            fall = (level - higher).exp_()
            s.mul_(fall.mT)
            z.mul_(fall)
            features, level = exp_(logs.sub_(higher)), higher
        s.baddbmm_(features.mT, values)
        z.add_(features.sum(1, keepdim=True))
    return o, inverse, states, sums, levels, s.view(b, h, m, e), z.view(b, h, m), level.reshape(b, h, m)


@_causal.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    s: Tensor,
    z: Tensor,
    level: Tensor,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    b, h, g, t, _ = q.shape
    m, e = s.shape[2:]
    n = (t + CHUNK - 1) // CHUNK if save else 0
    return (
        q.new_empty(b, h, g, t, e),
        q.new_empty(b, h, g, t if save else 0, 1),
        s.new_empty(n, b * h, m, e),
        s.new_empty(n, b * h, 1, m),
        s.new_empty(n, b * h, 1, m),
        s.new_empty(s.shape),
        z.new_empty(z.shape),
        level.new_empty(level.shape),
    )


@torch.library.custom_op("kexue::exponential_causal_backward", mutates_args=())
def _causal_backward(
    grad: Tensor,
    grad_s: Tensor,
    grad_z: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    start: Tensor,
    o: Tensor,
    inverse: Tensor,
    states: Tensor,
    sums: Tensor,
    levels: Tensor,
    end: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    b, h, g, t, d = q.shape
    m, e = grad_s.shape[2:]
    rows = b * h
    to_s, to_z = grad_s.reshape(rows, m, e).clone(), grad_z.reshape(rows, 1, m).clone()
    end = end.reshape(rows, 1, m)
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    scratch = Scratch(k, *_causal_memory(rows, g, m))
    for i, at in reversed(list(enumerate(chunks(t, CHUNK)))):
        level, c = levels[i], at.stop - at.start
        x, logs = map_keys(k, mask, at, weight, rows, scratch(0, rows, c, m))
        values = values_of(v, mask, at, rows)
        chunk = _Chunk(q, logs, level, at, weight, scratch)
        gc = grad[:, :, :, at] * inverse[:, :, :, at]
        r = (gc * o[:, :, :, at]).sum(-1, keepdim=True).neg_().view(rows, g * c, 1)
        gc = gc.reshape(rows, g * c, e)
        pairs = chunk.lower(torch.bmm(gc, values.mT, out=scratch(4, rows, g * c, c)).add_(r))
        # queries: what they read from the state before the chunk, and from the chunk
        to_logs = torch.bmm(gc, states[i].mT, out=scratch(5, rows, g * c, m)).addcmul_(r, sums[i])
        chunk.carried(to_logs).baddbmm_(pairs, chunk.k).mul_(chunk.q)
        dq[:, :, :, at] = (to_logs.view(rows * g * c, m) @ weight[:, :-2]).view(b, h, g, c, d)
        # keys and values: what later chunks read through the state after this one, and what the chunk reads
        to_logs = torch.bmm(values, to_s.mT, out=scratch(6, rows, c, m)).add_(to_z)
        if chunk.above is None:
            features = chunk.k
            to_logs.baddbmm_(pairs.mT, chunk.q).mul_(chunk.k)
        else:
            features = exp_(logs.sub_(end))
            to_logs.mul_(features).addcmul_(torch.bmm(pairs.mT, chunk.q), chunk.k)
        write(dv, at, torch.bmm(features, to_s).baddbmm_(chunk.scores.mT, gc), mask)
        write(dk, at, to_k(x, to_logs, weight), mask)
        # the state before the chunk
        carried = chunk.carried(chunk.q)
        if chunk.above is not None:
            fall = (level - end).exp_()
            to_s.mul_(fall.mT)
            to_z.mul_(fall)
        to_s.baddbmm_(carried.mT, gc)
        to_z.baddbmm_(r.mT, carried)
        end = level
    fall = (start.reshape(rows, 1, m) - end).clamp_(max=0).exp_()  # 0 where nothing was seen before
    return dq, dk, dv, to_s.mul_(fall.mT).view(b, h, m, e), to_z.mul_(fall).view(b, h, m)


@_causal_backward.register_fake
def _(
    grad: Tensor,
    grad_s: Tensor,
    grad_z: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    start: Tensor,
    o: Tensor,
    inverse: Tensor,
    states: Tensor,
    sums: Tensor,
    levels: Tensor,
    end: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    new_s, new_z = grad_s.new_empty(grad_s.shape), grad_z.new_empty(grad_z.shape)
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), new_s, new_z


def _causal_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, mask, weight, _, _, level, save = inputs
    o, inverse, states, sums, levels, _, _, end = output
    if not save:
        raise RuntimeError("exponential_causal: save must be True where a gradient is wanted")
    ctx.save_for_backward(q, k, v, mask, weight, level, o, inverse, states, sums, levels, end)
    ctx.mark_non_differentiable(inverse, states, sums, levels, end)


def _causal_gradients(ctx: Any, grad: Tensor, *grads: Tensor) -> tuple[Any, ...]:
    dq, dk, dv, ds, dz = _causal_backward(grad, grads[4], grads[5], *ctx.saved_tensors)
    return dq, dk, dv, None, None, ds, dz, None, None


# --- together ---------------------------------------------------------------------------------------------------------


_causal.register_autograd(_causal_gradients, setup_context=_causal_setup)
_causal_backward.register_autograd(no_gradients)


def exponential_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    s: Tensor,
    z: Tensor,
    shift: Tensor,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Normalised attention with features exp(weight [x; |x|^2; 1]).

    Args:
        q: (B, H, G, T, D), in the dtype of the computation, as everything else.
        k: (B, H, S, D); causal: S >= T, the queries are the last ones.
        v: (B, H, S, E).
        mask: (B, 1, S, 1) bool, True = takes part; None = all.
        weight: (M, D + 2).
        s: (B, H, M, E), state before.
        z: (B, H, M).
        shift: (B, H, M), logarithm of what the state was divided by.
        causal: Query i sees no key after its own.

    Returns:
        o (B, H, G, T, E), and the state after: S, z, shift.
    """
    if not z.shape[0] * z.shape[1]:
        return q.new_zeros(*q.shape[:-1], v.shape[-1]) + 0 * q.sum(), s, z, shift
    # On the level at which the sum of each feature is 1.
    seen = z.detach() > torch.finfo(z.dtype).tiny
    level = torch.where(seen, shift + torch.where(seen, z.detach(), 1.0).log(), lowest(z))
    onto = torch.where(seen, (shift - level).exp(), 0.0)
    s, z = s * onto.unsqueeze(-1), z * onto
    t, keys = q.shape[3], k.shape[2]
    early = keys - t if causal else keys
    if early:
        part = None if mask is None else mask[:, :, :early]
        s, z, level = absorb(k[:, :, :early], v[:, :, :early], part, weight, s, z, level)
    if causal:
        k, v, mask = k[:, :, early:], v[:, :, early:], None if mask is None else mask[:, :, early:]
        save = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, s, z))
        o, _, _, _, _, s, z, level = _causal(q, k, v, mask, weight, s, z, level, save)
    else:
        o, _ = read(q, weight, s, z, level)
    return o, s, z, level.detach()
