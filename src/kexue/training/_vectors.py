"""Lists of tensors as one vector: what the flows and the optimizers that act on the joint gradient share."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from kexue._tensors import compute_dtype

__all__ = ["joint_norm", "step_along_"]

# Norms in this range were computed without overflow, and without losing components to underflow that would count.
_SAFE = {torch.float32: (1e-10, 1e17), torch.float64: (1e-100, 1e150)}


def joint_norm(tensors: Sequence[Tensor]) -> float:
    """Euclidean norm of all entries together; sparse tensors must be coalesced.

    Half precision is summed in float32. Entries whose squares over- or underflow are scaled first, so that 1e30 and
    1e-40 in float32 have their norms. NaN and infinity come back as such.
    """
    dense = [x.values() if x.is_sparse else x for x in tensors]
    dense = [x for x in dense if x.numel()]
    if not dense:
        return 0.0
    norms = torch._foreach_norm([x.to(compute_dtype(x)) for x in dense])
    parts = []
    for x, norm in zip(dense, _numbers(norms), strict=True):
        low, high = _SAFE[compute_dtype(x)]
        if not low < norm < high:
            largest = float(x.abs().max())
            if largest > 0 and math.isfinite(largest):
                norm = largest * float((x.double() / largest).norm())
            else:
                norm = largest
        parts.append(norm)
    return math.hypot(*parts) if not any(map(math.isnan, parts)) else math.nan


def _numbers(scalars: Sequence[Tensor]) -> list[float]:
    """The values of 0-d tensors, read at once where they lie on one device."""
    if len({x.device for x in scalars}) == 1:
        values: list[float] = torch.stack([x.double() for x in scalars]).tolist()
        return values
    return [float(x) for x in scalars]


def step_along_(xs: Sequence[Tensor], gs: Sequence[Tensor], norm: float, amount: float) -> None:
    """Do x -= amount g / norm in place for all; ``norm`` is that of all g (0: nothing moves). g stays as it is."""
    if norm == 0 or amount == 0:
        return
    factor = -amount / norm
    if not 1e-30 < abs(factor) < 1e30:  # as a factor of float32 entries it would over- or underflow: divide first
        gs = [(g.double() / norm).to(x.dtype) for x, g in zip(xs, gs, strict=True)]
        factor = -amount
    torch._foreach_add_(list(xs), list(gs), alpha=factor)
