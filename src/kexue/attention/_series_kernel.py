"""Attention whose similarity is a polynomial of the score, as an operator of torch with a backward of its own.

The loops are in ``_series_loops``; here is what makes them one node for torch.compile and torch.export, and the choice
between tiles of scores (T^2) and the state (T M E). A second derivative is an error.

Shapes: B batch, H heads of k and v, G query heads for each of them, T queries, S keys, D width, M features, E width of
v.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kexue.attention._polynomial import num_monomials
from kexue.attention._series_loops import backward_loop, forward_loop, saved_states, state_size, working_dtype

PAIR_COST, FEATURE_COST = 8, 24  # of a score and of a feature beside the products, in the same units: multiplications
EXPORT_BREAK_EVEN = 16384  # tiles are exported if they are cheaper up to this length


@torch.library.custom_op("kexue::series_attention", mutates_args=())
def _forward(
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
    with torch.autocast(q.device.type, enabled=False):
        return forward_loop(
            q, k, v, mask, s, z, kind, degree, scale, causal, eps, normalize, chunk, wanted, save
        )  # fmt: skip


@_forward.register_fake
def _(
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
    (b, h, g, t, d), e = q.shape, v.shape[-1]
    m, dtype = state_size(d, degree), working_dtype(q)
    slots = saved_states(t, k.shape[2], causal, chunk, s is not None) if save else 0
    return (
        q.new_empty(b, h, g, t, e, dtype=v.dtype),
        q.new_empty(b, h, g, t if normalize and save else 0, 1, dtype=dtype),
        q.new_empty(slots, b * h, m, e, dtype=dtype),
        q.new_empty(slots, b * h, m, 1, dtype=dtype),
        q.new_empty((b, h, m, e) if wanted else 0, dtype=dtype),
        q.new_empty((b, h, m) if wanted else 0, dtype=dtype),
    )


@torch.library.custom_op("kexue::series_attention_backward", mutates_args=())
def _backward(
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
    with torch.autocast(q.device.type, enabled=False):
        return backward_loop(
            grad, grad_s, grad_z, q, k, v, mask, o, inverse, states, sums,
            kind, degree, scale, causal, normalize, chunk, initial, wanted,
        )  # fmt: skip


@_backward.register_fake
def _(
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
    b, h, _, _, d = q.shape
    m, dtype = state_size(d, degree), working_dtype(q)
    return (
        q.new_empty(q.shape),
        k.new_empty(k.shape),
        v.new_empty(v.shape),
        q.new_empty((b, h, m, v.shape[-1]) if initial else 0, dtype=dtype),
        q.new_empty((b, h, m) if initial else 0, dtype=dtype),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, mask, s, _, kind, degree, scale, causal, _, normalize, chunk, wanted, save = inputs
    o, inverse, states, sums, _, _ = output
    if not save:
        raise RuntimeError("series_attention: save must be True where a gradient is wanted")
    ctx.save_for_backward(q, k, v, mask, o, inverse, states, sums)
    ctx.mark_non_differentiable(inverse, states, sums)
    ctx.initial = s is not None
    ctx.options = (kind, degree, scale, causal, normalize, chunk, ctx.initial, wanted)


def _gradients(ctx: Any, grad: Tensor, _i: Any, _s: Any, _z: Any, grad_s: Tensor, grad_z: Tensor) -> tuple[Any, ...]:
    dq, dk, dv, ds, dz = _backward(grad, grad_s, grad_z, *ctx.saved_tensors, *ctx.options)
    return (dq, dk, dv, None, *((ds, dz) if ctx.initial else (None, None)), *([None] * 9))


def _no_gradients(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
    raise RuntimeError(
        "attention with TaylorFeatures or ExpPowerFeatures is differentiable once: its gradient cannot be "
        "differentiated again; use backend='plain' for second derivatives"
    )


_forward.register_autograd(_gradients, setup_context=_setup)
_backward.register_autograd(_no_gradients)


def chunk_length(t: Any, s: Any, d: int, e: int, degree: int, causal: bool, initial: bool, wanted: bool) -> Any:
    """How the work is split.

    Args:
        t: Queries.
        s: Keys.
        d: Width of q and k.
        e: Width of v.
        degree: Of the polynomial.
        causal: Query i sees no key after its own.
        initial: There is a state before.
        wanted: The state after is asked for.

    Returns:
        Keys of a chunk when causal; otherwise 0 for the state form and 1 for tiles.
    """
    m = num_monomials(d, degree)
    pair, token = d + e + PAIR_COST * degree, m * (e + FEATURE_COST)
    chunk = max(128, min(512, m // 128 * 128))
    if torch.compiler.is_exporting():  # a choice that depends on the length would fix the length
        quadratic = 2 * token > EXPORT_BREAK_EVEN * pair
        return (s if causal else 1) if quadratic else (chunk if causal else 0)
    if not causal:
        tiles = t * s * pair + (t * token if initial else 0) + (s * token if wanted else 0)
        return 1 if tiles < (t + s) * token else 0
    one = t * (s - t / 2) * pair
    parts = t * (chunk / 2 * pair + token) + (s - chunk) * token
    if one <= parts or not s:
        return max(s, 1)
    n = -(-s // chunk)
    return -(-s // n)


def series_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    s: Tensor | None,
    z: Tensor | None,
    *,
    kind: str,
    degree: int,
    scale: float,
    causal: bool,
    eps: float,
    normalize: bool,
    wanted: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention with similarity sim(scale * q.k), sim a polynomial, as one operator.

    Args:
        q: (B, H, G, T, D).
        k: (B, H, S, D).
        v: (B, H, S, E).
        mask: (B, 1 or H, S, 1), True = takes part; None = all.
        s: (B, H, M, E) state before, in the dtype of the computation, or None.
        z: (B, H, M) state before, or None.
        kind: "taylor" or "power".
        degree: Of the polynomial.
        scale: Positive.
        causal: The queries are the last T of S tokens and see nothing after themselves.
        eps: Added to the denominators.
        normalize: Divide by them.
        wanted: Return the state after the last key.

    Returns:
        o (B, H, G, T, E) in the dtype of ``v``, S and z after the last key (empty unless wanted).
    """
    t, n = q.shape[3], k.shape[2]
    if wanted and not state_size(q.shape[4], degree):
        raise ValueError(
            f"a state of degree {degree} at width {q.shape[4]} has {num_monomials(q.shape[4], degree):.0e} features: "
            "use a lower degree, or whole sequences without a state"
        )
    save = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v, s, z))
    causal = causal and t != 1
    chunk = chunk_length(t, n, q.shape[4], v.shape[3], degree, causal, s is not None, wanted)
    o, _, _, _, s, z = _forward(
        q, k, v, mask, s, z, kind, degree, float(scale), causal, float(eps), normalize, chunk, wanted, save
    )  # fmt: skip
    return o, s, z
