"""Routing by agreement with its gradient, by blocks of examples, keeping nothing between the passes but the sums.

Votes v_ij of n inputs for k capsules of width o, t = 1 ... r, scale = 1 / temperature:

    s_1 = sum_i v_ij / k,    s_t,j = sum_i c_t,ij v_ij,    c_t = softmax over j of scale <v_ij, G_t,j>
    G_t = s_{t-1} / |s_{t-1}| (kmeans),  squash(s_{t-1}) (squash),  G_{t-1} + squash(s_{t-1}) (hinton)

Hinton's logits accumulate, but they are linear in the votes: it is enough to accumulate G. So every rule needs only the
sums s_t, (r, B, k, o), to find all coefficients again. With ds_t the gradient of s_t,

    dc_ij = <v_ij, ds_j>,   db_ij = scale c_ij (dc_ij - sum_l c_il dc_il),   dG_j = sum_i db_ij v_ij
    dv_ij = sum_t c_t,ij ds_t,j + db_t,ij G_t,j

Softmaxes are taken in base 2: queries are q_t = scale log2(e) G_t. What depends on how the votes come about (given,
dense, shared) is in ``_capsule_keys.py``.

Shapes: B batch, n inputs, k capsules, o their width.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from kexue._tensors import compute_dtype, once_differentiable
from kexue.models._capsule_keys import Blocks

LOG2E = 1.4426950408889634
SQUASH_EPS = 1e-7  # added to the squared norm, as in the article's code
NORM_EPS = 1e-12


def lengths(s: Tensor, eps: float, dim: int = -1) -> Tensor:
    """sqrt(|s|^2 + eps), also where the squares would overflow."""
    top = s.detach().abs().amax(dim, keepdim=True).clamp(min=1.0) if s.numel() else s.new_ones(())
    return top * ((s / top).square().sum(dim, keepdim=True) + eps / top.square()).sqrt()


def _direction(s: Tensor, rule: str) -> Tensor:
    """What agreement is measured with: the unit vector, or the squashed one (kappa = 1)."""
    if rule == "kmeans":
        return s / lengths(s, NORM_EPS)
    m = lengths(s, SQUASH_EPS)
    return s / (m.reciprocal() + m)


def _through_direction(grad: Tensor, s: Tensor, rule: str) -> Tensor:
    m = lengths(s, NORM_EPS if rule == "kmeans" else SQUASH_EPS)
    unit = s / m
    along = unit * (unit * grad).sum(-1, keepdim=True)
    if rule == "kmeans":
        return (grad - along) / m
    inverse = m.reciprocal()
    return (grad + along * ((inverse - m) / (inverse + m))) / (inverse + m)


def _queries(states: Tensor, rule: str, scale: float) -> Iterator[Tensor]:
    """What the votes are compared with in iterations 2, 3, ...; made when asked for, as the states come one by one."""
    direction: Tensor | float = 0.0
    for s in states:
        found = _direction(s, rule)
        direction = direction + found if rule == "hinton" else found
        yield direction * (scale * LOG2E)


def route_forward(
    x: Tensor,
    weight: Tensor | None,
    mask: Tensor | None,
    capsules: int,
    routings: int,
    rule: str,
    scale: float,
    hard: bool,
    coupling: bool,
) -> tuple[Tensor, Tensor]:
    """Sums s_t of all iterations (r, B, k, o) and, if asked for, the last coefficients (B, n, k)."""
    blocks = Blocks(x, weight, mask, capsules)
    batch, inputs = x.shape[:2]
    states = x.new_empty(routings, batch, capsules, blocks.width, dtype=blocks.dtype)
    last = x.new_empty((batch, inputs, capsules) if coupling else 0, dtype=blocks.dtype)
    if coupling:
        last.fill_(1.0 / capsules)
    for block, keys in blocks:
        torch.div(keys.total(), capsules, out=states[0, block])
        for t, query in enumerate(_queries(states[:-1, block], rule, scale), 1):
            states[t, block] = keys.collect(query, hard, last[block] if coupling and t == routings - 1 else None)
    if coupling and mask is not None:
        last.masked_fill_(~mask[..., None], 0.0)
    return states, last


def route_backward(
    grad: Tensor,
    grad_coupling: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    mask: Tensor | None,
    states: Tensor,
    rule: str,
    scale: float,
    hard: bool,
    detach: bool,
    weight_needed: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of x and of the weight (empty if not needed), from those of s_r (B, k, o) and of c_r (B, n, k)."""
    routings, _, k = states.shape[:3]
    blocks = Blocks(x, weight, mask, k)
    grad_x = torch.empty(0)
    grad_w = None if blocks.weight is None or not weight_needed else blocks.weight.new_zeros(blocks.weight.shape)
    if grad_coupling is not None and mask is not None:
        grad_coupling = grad_coupling.masked_fill(~mask[..., None], 0.0)
    for block, keys in blocks:
        queries = list(_queries(states[:-1, block], rule, scale))
        slope, carried = grad[block], torch.zeros_like(grad[block])
        for t in range(routings - 1, 0, -1):
            upstream = None if grad_coupling is None or t < routings - 1 else grad_coupling[block]
            back = keys.push(queries[t - 1], slope, upstream, hard, detach)
            if detach:
                break
            carried = carried + back if rule == "hinton" else back
            slope = _through_direction(carried * (scale * LOG2E), states[t - 1, block], rule)
        first = torch.zeros_like(slope) if detach and routings > 1 else slope / k
        made = keys.gradient(first, grad_w)
        if made.shape == x.shape and made.dtype == x.dtype and made.is_contiguous():
            grad_x = made  # one block, in its final place
        else:
            grad_x = grad_x if len(grad_x) else torch.empty(x.shape, dtype=x.dtype, device=x.device)
            grad_x[block] = made
    grad_x = grad_x.view(x.shape) if x.numel() else torch.zeros_like(x)
    if mask is not None:
        grad_x.masked_fill_(~mask.view(*mask.shape, *(1,) * (x.dim() - 2)), 0.0)
    if grad_w is None or weight is None:
        return grad_x, x.new_empty(0)
    return grad_x, grad_w.to(weight.dtype)


@torch.library.custom_op(
    "kexue::capsule_routing",
    mutates_args=(),
    schema=(
        "(Tensor x, Tensor? weight, Tensor? mask, int capsules, int routings, str rule, float scale, bool hard,"
        " bool coupling) -> (Tensor, Tensor)"
    ),
)
def _forward_op(x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    with torch.autocast(x.device.type, enabled=False):
        return route_forward(x, *args)


@_forward_op.register_fake
def _(x, weight, mask, capsules, routings, rule, scale, hard, coupling):  # type: ignore[no-untyped-def]
    dtype = compute_dtype(x) if weight is None else compute_dtype(x, weight)
    width = x.shape[3] if weight is None else weight.shape[-1] // capsules
    last = (x.shape[0], x.shape[1], capsules) if coupling else (0,)
    return x.new_empty(routings, x.shape[0], capsules, width, dtype=dtype), x.new_empty(last, dtype=dtype)


@torch.library.custom_op(
    "kexue::capsule_routing_backward",
    mutates_args=(),
    schema=(
        "(Tensor grad, Tensor? grad_coupling, Tensor x, Tensor? weight, Tensor? mask, Tensor states, str rule,"
        " float scale, bool hard, bool detach, bool weight_needed) -> (Tensor, Tensor)"
    ),
)
def _backward_op(grad: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    with torch.autocast(grad.device.type, enabled=False):
        return route_backward(grad, *args)


@_backward_op.register_fake
def _(grad, grad_c, x, weight, mask, states, rule, scale, hard, detach, needed):  # type: ignore[no-untyped-def]
    shape = weight.shape if needed and weight is not None else (0,)
    found = x if weight is None or not needed else weight
    return x.new_empty(x.shape), found.new_empty(shape)


class Route(torch.autograd.Function):
    """(x, weight, mask, capsules, routings, rule, scale, hard, detach, coupling) -> s_r (B, k, o), c_r (B, n, k)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        mask: Tensor | None,
        capsules: int,
        routings: int,
        rule: str,
        scale: float,
        hard: bool,
        detach: bool,
        coupling: bool,
    ) -> tuple[Tensor, Tensor]:
        states, last = _forward_op(x, weight, mask, capsules, routings, rule, scale, hard, coupling)
        ctx.save_for_backward(x, weight, mask, states)
        ctx.options = (rule, scale, hard, detach or hard)
        ctx.coupling = coupling and routings > 1 and not (detach or hard)
        return states[-1].clone(), last

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_coupling: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mask, states = ctx.saved_tensors
        needed = ctx.needs_input_grad[1]
        grad_x, grad_w = _backward_op(
            grad, grad_coupling if ctx.coupling else None, x, weight, mask, states, *ctx.options, needed
        )
        return grad_x, grad_w if needed else None, *(None,) * 8
