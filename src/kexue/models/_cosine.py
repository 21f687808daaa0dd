"""Cosines of pairs of rows with their gradient in closed form; used by ``simsiam.py``.

With u = p / |p| and v = z / |z|:

    cos = 1 - |u - v|^2 / 2        d cos / dp = (v - cos u) / |p|

The difference gives exactly 1 for equal rows, where a dot product of the rounded u and v is off by an ulp or two. Norms
are taken in float64, where the squares of float32 entries neither overflow nor vanish. A row without a direction (norm
up to ``MIN_NORM``) has cosine 0 with everything and gets no gradient.

On a CPU one kernel reads each pair of rows while it is in the cache and writes value and gradients at once, instead of
a dozen passes of torch over the whole. ``_torch_rows`` is the same in torch, for other devices and under torch.compile.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kexue._tensors import as_recorded, compute_dtype, once_differentiable
from kexue.words._numba import compiled

__all__ = ["MIN_NORM", "negative_cosines"]

MIN_NORM = 1e-12  # a shorter row counts as zero: its direction is rounding noise and its gradient would be 1 / norm
# Only sums are reordered: NaN and infinity keep their meaning, so that a run that diverges is seen.
FAST = {"reassoc", "contract", "nsz"}


@compiled(fastmath=FAST, nogil=True)
def _kernel(p, z, shift, weight, least, loss, gp, gz):  # type: ignore[no-untyped-def]
    """Row i of p against row i + shift of z: minus the cosine, and ``weight`` times its gradients where wanted."""
    n, width = p.shape
    real = p.dtype.type
    one, none = real(1), real(0)
    for i in range(n):
        k = (i + shift) % n
        a, b = 0.0, 0.0
        for d in range(width):
            x, y = np.float64(p[i, d]), np.float64(z[k, d])  # float() would stay float32
            a += x * x
            b += y * y
        a, b = math.sqrt(a), math.sqrt(b)
        known_a, known_b = not a <= least, not b <= least  # a norm that is NaN stays NaN
        inverse_a = real(1 / a) if known_a else none
        inverse_b = real(1 / b) if known_b else none
        gap = none
        for d in range(width):
            t = p[i, d] * inverse_a - z[k, d] * inverse_b
            gap += t * t
        cosine = one - gap * real(0.5) if known_a and known_b else none
        loss[i] = -cosine
        if len(gp):
            scale = real(-weight) * inverse_a
            for d in range(width):
                gp[i, d] = scale * (z[k, d] * inverse_b - cosine * (p[i, d] * inverse_a))
        if len(gz):
            scale = real(-weight) * inverse_b
            for d in range(width):
                gz[k, d] = scale * (p[i, d] * inverse_a - cosine * (z[k, d] * inverse_b))


def _torch_rows(p: Tensor, z: Tensor, shift: int, weight: float, needs: list[bool]) -> tuple[Tensor, ...]:
    """What the kernel computes, for any device: losses (N,), gradients of p and of z (no rows where not wanted)."""
    z = z.roll(-shift, 0)
    norms = torch.stack([torch.linalg.vector_norm(x, 2, -1, True, dtype=torch.float64) for x in (p, z)])
    known = ~(norms <= MIN_NORM)
    inverse = torch.where(known, norms.reciprocal(), 0.0).to(p.dtype)
    u, v = p * inverse[0], z * inverse[1]
    gap = torch.linalg.vector_norm(u - v, 2, -1, True).square()
    cosine = torch.where(known.all(0), 1 - gap * 0.5, 0.0)
    gp = (v - cosine * u) * (inverse[0] * -weight) if needs[0] else p[:0]
    gz = ((u - cosine * v) * (inverse[1] * -weight)).roll(shift, 0) if needs[1] else p[:0]
    return -cosine.squeeze(-1), gp, gz


def _numba_rows(p: Tensor, z: Tensor, shift: int, weight: float, needs: list[bool]) -> tuple[Tensor, ...]:
    p, z = p.contiguous(), z.contiguous()
    out = (p.new_empty(len(p)), *(torch.empty_like(p if need else p[:0]) for need in needs))
    _kernel(p.numpy(), z.numpy(), shift, weight, MIN_NORM, *(x.numpy() for x in out))
    return out


class _NegativeCosines(torch.autograd.Function):
    """Minus the cosines: their mean, or each, (N,)."""

    @staticmethod
    def forward(ctx: Any, p: Tensor, z: Tensor, shift: int, mean: bool) -> Tensor:
        dtype = compute_dtype(p, z)
        weight = 1.0 / max(p.shape[0], 1) if mean else 1.0
        on_cpu = p.device.type == "cpu" and not torch.compiler.is_compiling()
        rows = _numba_rows if on_cpu else _torch_rows
        loss, *grads = rows(p.detach().to(dtype), z.detach().to(dtype), shift, weight, list(ctx.needs_input_grad[:2]))
        ctx.save_for_backward(*grads, p, z)  # the inputs: see once_differentiable
        ctx.shift = shift
        return loss.sum() * weight if mean else loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gp, gz, p, z = ctx.saved_tensors
        need_p, need_z = ctx.needs_input_grad[:2]
        if grad.dim():
            grad = grad.unsqueeze(-1)
        out_p = (gp * grad).to(p.dtype) if need_p else None
        out_z = (gz * (grad.roll(ctx.shift, 0) if grad.dim() else grad)).to(z.dtype) if need_z else None
        return out_p, out_z, None, None


def negative_cosines(p: Tensor, z: Tensor, shift: int = 0, mean: bool = True) -> Tensor:
    """Minus the cosine of row i of p and row i + shift (modulo N) of z, both (N, D).

    Returns:
        The mean (0 over no rows), or (N,); in float32, or float64 if one of the tensors is.
    """
    p, z = as_recorded(p, z)
    return _NegativeCosines.apply(p, z, shift, mean)
