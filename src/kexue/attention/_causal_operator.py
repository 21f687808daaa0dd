"""Causal linear attention as an operator of torch (the loops are in ``_causal_kernel``).

Being an operator it is one node for torch.compile and torch.export; a second derivative is an error (the plain form in
``_contraction`` has one).

Shapes: B batch, H heads of k and v, G query heads for each of them, T time, M features, E width of v.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kexue.attention._causal_kernel import block_rows, chunk_length, run_backward, run_forward


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
        return run_forward(q, k, v, mask, log_scale, s, z, start, activation, eps, normalize, chunk, save)


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
        s.new_empty(b, h, n if save else 0, m, e),
        s.new_empty(b, h, n if save else 0, 1, m),
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
        return run_backward(
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
    q, k, v, mask, log_scale, _, _, start, activation, _, normalize, chunk, save = inputs
    o, inverse, states, sums, _, _ = output
    if not save:
        raise RuntimeError("causal_linear_attention: save must be True where a gradient is wanted")
    ctx.save_for_backward(q, k, v, mask, log_scale, start, o, inverse, states, sums)
    ctx.mark_non_differentiable(inverse, states, sums)
    ctx.options = (activation, normalize, chunk)


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
    groups = q.shape[2] or 1
    fitting, heads = max(1, block_rows(q.shape[-1], v.shape[-1]) // groups), k.shape[0] * k.shape[1]
    rows = min(heads, fitting) if isinstance(heads, int) else fitting  # a symbolic batch may be of any size
    chunk = chunk_length(rows * groups, q.shape[-1], v.shape[-1])
    o, _, _, _, s, z = _forward(q, k, v, mask, log_scale, s, z, start, activation, float(eps), normalize, chunk, wanted)
    return o, s, z
