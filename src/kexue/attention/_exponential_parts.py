"""Attention with exponential features: the state that keys make, and what queries read from it.

See ``_exponential_kernel`` for the formulas. Every operator maps its own chunks and maps them again in the backward;
each feature has a level of its own, the largest logarithm that any key had.

Shapes: B batch, H heads of k and v, G query heads for each of them, T time, D width, M features, E width of v, c chunk.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

LOG2E = math.log2(math.e)
WORKING_SET = 2**18  # features of one chunk of all heads, where the chunk is free to choose


def lowest(x: Tensor) -> float:
    """A finite logarithm of nothing: differences of two of them are 0, not NaN."""
    return torch.finfo(x.dtype).min / 4


def exp_(x: Tensor) -> Tensor:
    """Exp in place, by way of exp2, which is vectorised everywhere."""
    return x.mul_(LOG2E).exp2_()


def inverse_of(den: Tensor) -> Tensor:
    """1 / den, or 0 where next to nothing was seen: the products of the backward would overflow."""
    seen = den > torch.finfo(den.dtype).tiny * 2**26
    return torch.where(seen, den, 1.0).reciprocal_().mul_(seen)


def chunks(t: int, chunk: int) -> list[slice]:
    """Slices of at most ``chunk`` tokens."""
    return [slice(i, min(i + chunk, t)) for i in range(0, t, chunk)]


def _free_chunk(rows: int, groups: int, features: int) -> int:
    return min(256, max(32, WORKING_SET // max(1, rows * groups * features)))


class Scratch:
    """Memory for the large tensors of a chunk, used again for every chunk: fresh pages cost as much as the work."""

    def __init__(self, like: Tensor, *sizes: int) -> None:
        self.memory = [like.new_empty(size) for size in sizes]

    def __call__(self, i: int, *shape: int) -> Tensor:
        """Tensor number ``i`` in this shape, not initialised."""
        return self.memory[i][: math.prod(shape)].view(shape)


def map_keys(
    k: Tensor, mask: Tensor | None, at: slice, weight: Tensor, rows: int, out: Tensor
) -> tuple[Tensor, Tensor]:
    """[k; |k|^2; 1] (rows * c, D + 2) and L (rows, c, M) of a chunk; masked keys are 0 and -inf."""
    x = k[:, :, at]
    if mask is not None:
        x = torch.where(mask[:, :, at], x, 0.0)
    x = torch.cat([x, x.square().sum(-1, keepdim=True), x.new_ones(()).expand(*x.shape[:-1], 1)], -1)
    x = x.reshape(-1, x.shape[-1])
    logs = torch.mm(x, weight.mT, out=out.view(len(x), len(weight))).view(out.shape)
    if mask is not None:
        live = mask[:, :, at].expand(*k.shape[:2], -1, 1).reshape(rows, out.shape[1], 1)
        logs.masked_fill_(~live, -torch.inf)
    return x, logs


def values_of(v: Tensor, mask: Tensor | None, at: slice, rows: int) -> Tensor:
    """Values (rows, c, E) of a chunk; masked ones are 0."""
    x = v[:, :, at]
    if mask is not None:
        x = torch.where(mask[:, :, at], x, 0.0)
    return x.reshape(rows, at.stop - at.start, v.shape[-1])


def map_queries(q: Tensor, at: slice, weight: Tensor, level: Tensor, out: Tensor) -> Tensor:
    """P or Q^ (rows, G * c, M) of a chunk; ``level`` (rows, 1, M)."""
    x = q[:, :, :, at].reshape(-1, q.shape[-1])
    logs = torch.mm(x, weight[:, :-2].mT, out=out.view(len(x), len(weight))).view(out.shape)
    logs.add_(level + weight[:, -1])
    return exp_(logs.sub_(logs.amax(-1, keepdim=True)))


def to_k(x: Tensor, to_logs: Tensor, weight: Tensor) -> Tensor:
    """Gradient (rows * c, D) of keys, from that of L and [k; |k|^2; 1]."""
    grad = to_logs.view(len(x), len(weight)) @ weight[:, :-1]
    return grad[:, :-1].add_(x[:, :-2] * (2 * grad[:, -1:]))


def write(out: Tensor, at: slice, x: Tensor, mask: Tensor | None) -> None:
    """Put the gradient of a chunk of keys or values in its place; that of masked ones is 0."""
    x = x.view(*out.shape[:2], at.stop - at.start, out.shape[-1])
    out[:, :, at] = x if mask is None else torch.where(mask[:, :, at], x, 0.0)


# --- absorb -----------------------------------------------------------------------------------------------------------


@torch.library.custom_op("kexue::exponential_absorb", mutates_args=())
def absorb(
    k: Tensor, v: Tensor, mask: Tensor | None, weight: Tensor, s: Tensor, z: Tensor, level: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Take keys and values into the state: S, z and the level after them."""
    b, h, m, e = s.shape
    rows = b * h
    s, z, level = s.reshape(rows, m, e).clone(), z.reshape(rows, 1, m).clone(), level.reshape(rows, 1, m).clone()
    chunk = _free_chunk(rows, 1, m)
    scratch = Scratch(s, rows * chunk * m)
    for at in chunks(k.shape[2], chunk):
        _, logs = map_keys(k, mask, at, weight, rows, scratch(0, rows, at.stop - at.start, m))
        _add(logs, values_of(v, mask, at, rows), s, z, level)
    return s.view(b, h, m, e), z.view(b, h, m), level.view(b, h, m)


def _add(logs: Tensor, values: Tensor, s: Tensor, z: Tensor, level: Tensor) -> None:
    """Take a chunk into the state, in place; overwrites its logarithms."""
    higher = torch.maximum(level, logs.amax(1, keepdim=True))
    fall = (level - higher).exp_()
    features = exp_(logs.sub_(higher))
    s.mul_(fall.mT).baddbmm_(features.mT, values)
    z.mul_(fall).add_(features.sum(1, keepdim=True))
    level.copy_(higher)


@absorb.register_fake
def _(
    k: Tensor, v: Tensor, mask: Tensor | None, weight: Tensor, s: Tensor, z: Tensor, level: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return s.new_empty(s.shape), z.new_empty(z.shape), level.new_empty(level.shape)


@torch.library.custom_op("kexue::exponential_absorb_backward", mutates_args=())
def _absorb_backward(
    grad_s: Tensor, grad_z: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, weight: Tensor, end: Tensor
) -> tuple[Tensor, Tensor]:
    b, h, m, e = grad_s.shape
    rows = b * h
    to_s, to_z, end = grad_s.reshape(rows, m, e), grad_z.reshape(rows, 1, m), end.reshape(rows, 1, m)
    dk, dv = torch.empty_like(k), torch.empty_like(v)
    chunk = _free_chunk(rows, 1, m)
    scratch = Scratch(k, rows * chunk * m, rows * chunk * m)
    for at in chunks(k.shape[2], chunk):
        shape = rows, at.stop - at.start, m
        x, logs = map_keys(k, mask, at, weight, rows, scratch(0, *shape))
        features = exp_(logs.sub_(end))
        write(dv, at, torch.bmm(features, to_s), mask)
        to_logs = torch.bmm(values_of(v, mask, at, rows), to_s.mT, out=scratch(1, *shape)).add_(to_z).mul_(features)
        write(dk, at, to_k(x, to_logs, weight), mask)
    return dk, dv


@_absorb_backward.register_fake
def _(
    grad_s: Tensor, grad_z: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, weight: Tensor, end: Tensor
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(k), torch.empty_like(v)


def _absorb_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    k, v, mask, weight, _, _, level = inputs
    ctx.save_for_backward(k, v, mask, weight, level, output[2])
    ctx.mark_non_differentiable(output[2])


def _absorb_gradients(ctx: Any, grad_s: Tensor, grad_z: Tensor, _: Any) -> tuple[Any, ...]:
    k, v, mask, weight, level, end = ctx.saved_tensors
    dk, dv = _absorb_backward(grad_s, grad_z, k, v, mask, weight, end)
    fall = (level - end).exp()
    return dk, dv, None, None, grad_s * fall.unsqueeze(-1), grad_z * fall, None


# --- read -------------------------------------------------------------------------------------------------------------


@torch.library.custom_op("kexue::exponential_read", mutates_args=())
def read(q: Tensor, weight: Tensor, s: Tensor, z: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
    """What queries read from a state: o and the inverse denominators."""
    b, h, g, t, _ = q.shape
    m, e = s.shape[2:]
    rows = b * h
    s, z, level = s.reshape(rows, m, e), z.reshape(rows, m, 1), level.reshape(rows, 1, m)
    o, inverse = q.new_empty(b, h, g, t, e), q.new_empty(b, h, g, t, 1)
    chunk = _free_chunk(rows, g, m)
    scratch = Scratch(q, rows * g * chunk * m)
    for at in chunks(t, chunk):
        c = at.stop - at.start
        p = map_queries(q, at, weight, level, scratch(0, rows, g * c, m))
        inv = inverse_of(torch.bmm(p, z))
        o[:, :, :, at] = torch.bmm(p, s).mul_(inv).view(b, h, g, c, e)
        inverse[:, :, :, at] = inv.view(b, h, g, c, 1)
    return o, inverse


@read.register_fake
def _(q: Tensor, weight: Tensor, s: Tensor, z: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
    return q.new_empty(*q.shape[:-1], s.shape[-1]), q.new_empty(*q.shape[:-1], 1)


@torch.library.custom_op("kexue::exponential_read_backward", mutates_args=())
def _read_backward(
    grad: Tensor,
    q: Tensor,
    weight: Tensor,
    s: Tensor,
    z: Tensor,
    level: Tensor,
    o: Tensor,
    inverse: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    b, h, g, t, d = q.shape
    m, e = s.shape[2:]
    rows = b * h
    s, z, level = s.reshape(rows, m, e), z.reshape(rows, 1, m), level.reshape(rows, 1, m)
    dq, ds, dz = torch.empty_like(q), torch.zeros_like(s), torch.zeros_like(z)
    chunk = _free_chunk(rows, g, m)
    scratch = Scratch(q, rows * g * chunk * m, rows * g * chunk * m)
    for at in chunks(t, chunk):
        c = at.stop - at.start
        p = map_queries(q, at, weight, level, scratch(0, rows, g * c, m))
        gc = grad[:, :, :, at] * inverse[:, :, :, at]
        r = (gc * o[:, :, :, at]).sum(-1, keepdim=True).neg_().view(rows, g * c, 1)
        gc = gc.reshape(rows, g * c, e)
        ds.baddbmm_(p.mT, gc)
        dz.baddbmm_(r.mT, p)
        to_logs = torch.bmm(gc, s.mT, out=scratch(1, rows, g * c, m)).addcmul_(r, z).mul_(p)
        dq[:, :, :, at] = (to_logs.view(rows * g * c, m) @ weight[:, :-2]).view(b, h, g, c, d)
    return dq, ds.view(b, h, m, e), dz.view(b, h, m)


@_read_backward.register_fake
def _(
    grad: Tensor,
    q: Tensor,
    weight: Tensor,
    s: Tensor,
    z: Tensor,
    level: Tensor,
    o: Tensor,
    inverse: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), s.new_empty(s.shape), z.new_empty(z.shape)


def _read_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs, *output)
    ctx.mark_non_differentiable(output[1])


def _read_gradients(ctx: Any, grad: Tensor, _: Any) -> tuple[Any, ...]:
    dq, ds, dz = _read_backward(grad, *ctx.saved_tensors)
    return dq, None, ds, dz, None


def no_gradients(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
    """Refuse a second derivative."""
    raise RuntimeError(
        "attention with exponential features is differentiable once: its gradient cannot be differentiated again; "
        "use backend='plain' for second derivatives"
    )


absorb.register_autograd(_absorb_gradients, setup_context=_absorb_setup)
read.register_autograd(_read_gradients, setup_context=_read_setup)
for _op in (_absorb_backward, _read_backward):
    _op.register_autograd(no_gradients)
