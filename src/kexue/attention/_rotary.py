"""Rotary positions (RoPE, 旋转位置编码) on the pairs (2i, 2i + 1) of coordinates."""

from __future__ import annotations

import torch
from torch import Tensor

from kexue._tensors import compute_dtype


def rotate(x: Tensor, base: float = 10000.0, positions: Tensor | None = None) -> Tensor:
    """Turn the pairs (2i, 2i + 1) of every vector by position * base^(-2i / D).

    The rotated pairs are put out as halves, not interleaved: a permutation of the width, the same for q and k, that
    leaves every product as it is.

    Args:
        x: (..., T, D) with even D.
        base: Of the geometric series of angles.
        positions: (..., T), broadcast against the leading axes of ``x``; None = 0, 1, ..., T - 1.

    Returns:
        Like ``x``; computed in float32 (float64 for float64).
    """
    dtype, dim = compute_dtype(x), x.shape[-1]
    if positions is None:
        positions = torch.arange(x.shape[-2], device=x.device)
    steps = torch.arange(0, dim, 2, device=x.device, dtype=dtype) / dim
    angles = positions.to(dtype).unsqueeze(-1) * base**-steps
    cos, sin = angles.cos(), angles.sin()
    even, odd = x[..., 0::2].to(dtype), x[..., 1::2].to(dtype)
    return torch.cat([even * cos - odd * sin, even * sin + odd * cos], -1).to(x.dtype)
