"""Causal linear attention as an operator of torch: a loop over chunks, with a backward of its own.

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

Being operators, they are one node for torch.compile and torch.export; a second derivative is an error (the plain form
in ``_contraction`` has one). Everything accumulates in float32 for lower precision.

Shapes: B batch, H heads of k and v, G query heads for each of them, T time, M features, E width of v, c chunk.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kexue.attention._contraction import safe_inverse

ACTIVATIONS = ("none", "elu1")


def chunk_length(features: int) -> int:
    """The chunk that was fastest: the block of scores should cost about as much as the state."""
    return 64 if features <= 96 else 128


def _features(x: Tensor, mask: Tensor | None, activation: str, dtype: torch.dtype) -> Tensor:
    """One chunk (..., c, M) mapped, in the dtype of the computation, contiguous; masked tokens are 0."""
    x = x.to(dtype)
    if activation == "elu1":
        x = x.clamp(max=0).exp_().add_(x.clamp(min=0))
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
        self.pairs = (level.mT - level).clamp_(max=0).exp_().repeat(1, groups, 1)  # (B * H, G * c, c)
        self.carry = (start - level).clamp_(max=0).exp_().repeat(1, groups, 1)  # (B * H, G * c, 1)
        self.end = level[:, -1:]
        self.adds = (level - self.end).clamp_(max=0).exp_()  # (B * H, c, 1)
        self.keep = (start - self.end).clamp_(max=0).exp_()  # (B * H, 1, 1)


def _forward_loop(
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
    e, dtype, rows = v.shape[-1], s.dtype, b * h
    n = -(-t // chunk)
    s = s.reshape(rows, m, e).clone()
    z = z.reshape(rows, m, 1).clone()
    o = q.new_empty(b, h, g, t, e, dtype=v.dtype)
    inverse = s.new_empty(b, h, g, t if normalize and save else 0, 1)
    states = s.new_empty(n if save else 0, rows, m, e)
    sums = s.new_empty(n if save else 0, rows, m, 1)
    level = None if log_scale is None else log_scale.reshape(rows, t, 1)
    start = start.reshape(rows, 1, 1)
    for i in range(n):
        at = slice(i * chunk, min((i + 1) * chunk, t))
        c = at.stop - at.start
        live = None if mask is None else mask[:, :, at]
        qc = _features(q[:, :, :, at], None, activation, dtype).view(rows, g * c, m)
        kc = _features(k[:, :, at], live, activation, dtype).view(rows, c, m)
        vc = _values(v[:, :, at], live, dtype).reshape(rows, c, e)
        if save:
            states[i], sums[i] = s, z
        scores = torch.bmm(qc, kc.mT)
        if level is not None:
            falls = _Falls(level[:, at], start, g)
            scores.mul_(falls.pairs)
            qc = qc * falls.carry
            kc = kc * falls.adds
        scores.view(rows, g, c, c).tril_()
        out = torch.bmm(scores, vc).baddbmm_(qc, s)
        if normalize:
            inv = safe_inverse(scores.sum(-1, keepdim=True).baddbmm_(qc, z).add_(eps))
            out.mul_(inv)
            if save:
                inverse[:, :, :, at] = inv.view(b, h, g, c, 1)
        o[:, :, :, at] = out.view(b, h, g, c, e)
        if level is not None:
            s.mul_(falls.keep)
            z.mul_(falls.keep)
            start = falls.end
        s.baddbmm_(kc.mT, vc)
        z.add_(kc.sum(1).unsqueeze(-1))
    return o, inverse, states, sums, s.view(b, h, m, e), z.view(b, h, m)


def _backward_loop(
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
    b, h, g, t, m = q.shape
    e, dtype, rows = v.shape[-1], states.dtype, b * h
    n = -(-t // chunk)
    dq, dk, dv = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    later_s = grad_s.to(dtype).reshape(rows, m, e).clone()
    later_z = grad_z.to(dtype).reshape(rows, 1, m).clone()
    level = None if log_scale is None else log_scale.reshape(rows, t, 1)
    for i in reversed(range(n)):
        at = slice(i * chunk, min((i + 1) * chunk, t))
        c = at.stop - at.start
        live = None if mask is None else mask[:, :, at]
        qc = phi_q = _features(q[:, :, :, at], None, activation, dtype).view(rows, g * c, m)
        kc = phi_k = _features(k[:, :, at], live, activation, dtype).view(rows, c, m)
        vc = _values(v[:, :, at], live, dtype).reshape(rows, c, e)
        gc = grad[:, :, :, at].to(dtype)
        scores = torch.bmm(qc, kc.mT)
        if normalize:
            gc = gc * inverse[:, :, :, at]
            r = (gc * o[:, :, :, at]).sum(-1, keepdim=True).neg_().view(rows, g * c, 1)
            gc = gc.reshape(rows, g * c, e)
            pairs = torch.baddbmm(r, gc, vc.mT)
        else:
            gc = gc.reshape(rows, g * c, e)
            pairs = torch.bmm(gc, vc.mT)
        if level is not None:
            before = start.reshape(rows, 1, 1) if i == 0 else level[:, at.start - 1 : at.start]
            falls = _Falls(level[:, at], before, g)
            scores.mul_(falls.pairs)
            pairs.mul_(falls.pairs)
            phi_q, phi_k = qc * falls.carry, kc * falls.adds
        scores.view(rows, g, c, c).tril_()
        pairs.view(rows, g, c, c).tril_()
        # queries: what they read from the chunk, and from the state before it
        carried = torch.bmm(gc, states[i].mT)
        if normalize:
            carried.baddbmm_(r, sums[i].mT)
        if level is not None:
            carried.mul_(falls.carry)
        carried.baddbmm_(pairs, kc)
        # keys and values: what the chunk reads from them, and what the later chunks read
        to_k = torch.baddbmm(later_z, vc, later_s.mT)
        to_v = torch.bmm(phi_k, later_s)
        if level is not None:
            to_k.mul_(falls.adds)
        to_k.baddbmm_(pairs.mT, qc)
        to_v.baddbmm_(scores.mT, gc)
        if activation == "elu1":  # phi' = min(phi, 1); a masked key has phi = 0
            carried.mul_(qc.clamp(max=1))
            to_k.mul_(kc.clamp(max=1))
        to_k, to_v = to_k.view(b, h, c, m), to_v.view(b, h, c, e)
        if live is not None:
            to_k, to_v = torch.where(live, to_k, 0.0), torch.where(live, to_v, 0.0)
        dq[:, :, :, at] = carried.view(b, h, g, c, m)
        dk[:, :, at] = to_k
        dv[:, :, at] = to_v
        if level is not None:
            later_s.mul_(falls.keep)
            later_z.mul_(falls.keep)
        later_s.baddbmm_(phi_q.mT, gc)
        if normalize:
            later_z.baddbmm_(r.mT, phi_q)
    return dq, dk, dv, later_s.view(b, h, m, e), later_z.view(b, h, m)


@torch.library.custom_op("kexue::causal_linear_attention", mutates_args=())
def _forward(
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
    with torch.autocast(q.device.type, enabled=False):
        return _forward_loop(q, k, v, mask, log_scale, s, z, start, activation, eps, normalize, chunk, save)


@_forward.register_fake
def _(
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
    e, n = v.shape[-1], (t + chunk - 1) // chunk
    return (
        q.new_empty(b, h, g, t, e, dtype=v.dtype),
        s.new_empty(b, h, g, t if normalize and save else 0, 1),
        s.new_empty(n if save else 0, b * h, m, e),
        s.new_empty(n if save else 0, b * h, m, 1),
        s.new_empty(b, h, m, e),
        z.new_empty(b, h, m),
    )


@torch.library.custom_op("kexue::causal_linear_attention_backward", mutates_args=())
def _backward(
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
    with torch.autocast(q.device.type, enabled=False):
        return _backward_loop(
            grad,
            grad_s,
            grad_z,
            q,
            k,
            v,
            mask,
            log_scale,
            start,
            o,
            inverse,
            states,
            sums,
            activation,
            normalize,
            chunk,
        )


@_backward.register_fake
def _(
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
    b, h, _, _, m = q.shape
    return (
        q.new_empty(q.shape),
        k.new_empty(k.shape),
        v.new_empty(v.shape),
        states.new_empty(b, h, m, v.shape[-1]),
        states.new_empty(b, h, m),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, mask, log_scale, s, z, start, activation, _, normalize, chunk, save = inputs
    o, inverse, states, sums, _, _ = output
    if not save:
        raise RuntimeError("causal_linear_attention: save must be True where a gradient is wanted")
    ctx.save_for_backward(q, k, v, mask, log_scale, start, o, inverse, states, sums)
    ctx.mark_non_differentiable(inverse, states, sums)
    ctx.options = (activation, normalize, chunk)
    ctx.dtypes = (s.dtype, z.dtype)


def _gradients(ctx: Any, grad: Tensor, _i: Any, _s: Any, _z: Any, grad_s: Tensor, grad_z: Tensor) -> tuple[Any, ...]:
    q, k, v, mask, log_scale, start, o, inverse, states, sums = ctx.saved_tensors
    dq, dk, dv, ds, dz = _backward(
        grad, grad_s, grad_z, q, k, v, mask, log_scale, start, o, inverse, states, sums, *ctx.options
    )
    return (dq, dk, dv, None, None, ds, dz, None, None, None, None, None, None)


def _no_gradients(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
    raise RuntimeError(
        "causal linear attention is differentiable once: its gradient cannot be differentiated again; "
        "use backend='plain' for second derivatives"
    )


_forward.register_autograd(_gradients, setup_context=_setup)
_backward.register_autograd(_no_gradients)


def causal_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    log_scale: Tensor | None,
    s: Tensor,
    z: Tensor,
    start: Tensor,
    *,
    activation: str,
    eps: float,
    normalize: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Causal contraction as one operator.

    Args:
        q: (B, H, G, T, M).
        k: (B, H, T, M).
        v: (B, H, T, E).
        mask: (B, 1 or H, T, 1), True = takes part; None = all.
        log_scale: (B, H, T), logarithm of what each key was divided by, never falling; None = nothing.
        s: (B, H, M, E) state before, in the dtype of the computation.
        z: (B, H, M) state before.
        start: (B, H), logarithm of what the state before was divided by, not above ``log_scale``; unused without it.
        activation: "none" (mapped already) or "elu1".
        eps: Added to the denominators.
        normalize: Divide by them.

    Returns:
        o (B, H, G, T, E) in the dtype of ``v``, and S and z after the last key.
    """
    wanted = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, s, z))
    chunk = chunk_length(q.shape[-1])
    o, _, _, _, s, z = _forward(q, k, v, mask, log_scale, s, z, start, activation, float(eps), normalize, chunk, wanted)
    return o, s, z
