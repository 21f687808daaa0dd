"""Rotary positions (RoPE, 旋转位置编码) on interleaved pairs of coordinates."""

from __future__ import annotations

import torch
from torch import Tensor


def rotate(x: Tensor, base: float = 10000.0, positions: Tensor | None = None) -> Tensor:
    """Turn the pairs (2i, 2i + 1) of every vector by position * base^(-2i / D).

    Args:
        x: (..., T, D) with even D.
        base: Of the geometric series of angles.
        positions: (..., T), broadcast against the leading axes of ``x``; None = 0, 1, ..., T - 1.

    Returns:
        Like ``x``; angles are computed in float32 (float64 for float64).
    """
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    dim = x.shape[-1]
    if positions is None:
        positions = torch.arange(x.shape[-2], device=x.device)
    frequencies = base ** (-torch.arange(0, dim, 2, device=x.device, dtype=dtype) / dim)
    angles = positions.to(dtype).unsqueeze(-1) * frequencies
    cos, sin = angles.cos(), angles.sin()
    even, odd = x[..., 0::2].to(dtype), x[..., 1::2].to(dtype)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2).to(x.dtype)
