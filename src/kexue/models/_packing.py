"""Attention over packed texts: the plan is made once a batch and used by every layer."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["Packing"]

# A bucket may hold texts down to this part of its longest one: at most that much of it is padding.
_SHORTEST = 0.8


@dataclass
class Packing:
    """Texts that stand in one row of N tokens.

    On a GPU in half precision attention is torch's kernel for rows of several lengths. Elsewhere texts of like length
    are put into one padded batch: what is lost to padding is below 20 % of the attention, and nothing of the rest.

    Args:
        boundaries: (B + 1,) int32, from 0 to N.
        longest: Tokens of the longest text.
        positions: (N,) position of each token in its text.
        buckets: (index (b, t) into the row, padding mask (b, 1, 1, t) or None) for each bucket.
        order: (N,) where each token's output stands in the buckets, one after the other without padding.
    """

    boundaries: Tensor
    longest: int
    positions: Tensor
    buckets: list[tuple[Tensor, Tensor | None]] = field(repr=False)
    order: Tensor = field(repr=False)

    @classmethod
    def of(cls, cu_seqlens: Tensor, n: int) -> Packing:
        """Check the boundaries and make the plan."""
        if not isinstance(cu_seqlens, Tensor) or cu_seqlens.is_floating_point() or cu_seqlens.dtype == torch.bool:
            kind = getattr(cu_seqlens, "dtype", type(cu_seqlens).__name__)
            raise TypeError(f"cu_seqlens must be a tensor of integers; got {kind}")
        if cu_seqlens.dim() != 1 or len(cu_seqlens) < 1:
            raise ValueError(f"cu_seqlens must be (B + 1,); got shape {tuple(cu_seqlens.shape)}")
        bounds = cu_seqlens.tolist()
        if bounds[0] != 0 or bounds[-1] != n or any(a > b for a, b in pairwise(bounds)):
            raise ValueError(f"cu_seqlens must rise from 0 to the number of tokens, {n}; got {bounds[:8]}")
        device = cu_seqlens.device
        texts = sorted(((b - a, a) for a, b in pairwise(bounds) if b > a), reverse=True)
        buckets, flat = [], []
        start = 0
        while start < len(texts):
            longest = texts[start][0]
            end = start
            while end < len(texts) and texts[end][0] >= _SHORTEST * longest:
                end += 1
            lengths = torch.tensor([length for length, _ in texts[start:end]], device=device).unsqueeze(1)
            starts = torch.tensor([first for _, first in texts[start:end]], device=device).unsqueeze(1)
            steps = torch.arange(longest, device=device)
            valid = steps < lengths
            index = torch.where(valid, starts + steps, starts)  # padding repeats a token that exists
            mask = None if texts[end - 1][0] == longest else valid[:, None, None, :]
            buckets.append((index, mask))
            flat.append(index[valid])
            start = end
        packed = torch.cat(flat) if flat else torch.zeros(0, dtype=torch.long, device=device)
        order = torch.empty_like(packed)
        order[packed] = torch.arange(n, device=device)
        sizes = torch.tensor([b - a for a, b in pairwise(bounds)], dtype=torch.long, device=device)
        first = torch.repeat_interleave(cu_seqlens[:-1].long(), sizes)
        positions = torch.arange(n, device=device) - first
        return cls(cu_seqlens.to(torch.int32), texts[0][0] if texts else 0, positions, buckets, order)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, causal: bool, dropout: float) -> Tensor:
        """Attention inside each text; q, k, v and the result are (N, H, d)."""
        if q.is_cuda and q.dtype in (torch.float16, torch.bfloat16) and dropout == 0:
            kernel = _varlen_kernel()
            if kernel is not None:
                bounds, longest = self.boundaries, self.longest
                window = (-1, 0) if causal else (-1, -1)
                out: Tensor = kernel(q, k, v, bounds, bounds, longest, longest, window_size=window)
                return out
        outputs = []
        for index, mask in self.buckets:
            b, t = index.shape
            queries, keys, values = (
                x.index_select(0, index.flatten()).unflatten(0, (b, t)).transpose(1, 2) for x in (q, k, v)
            )
            # In a causal batch padding stands behind the tokens, which do not see it.
            seen = None if causal else mask
            out = F.scaled_dot_product_attention(
                queries, keys, values, attn_mask=seen, dropout_p=dropout, is_causal=causal
            ).transpose(1, 2)
            outputs.append(out.flatten(0, 1) if mask is None else out[mask[:, 0, 0]])
        return torch.cat(outputs)[self.order] if outputs else q


@lru_cache(maxsize=1)
def _varlen_kernel() -> Any:
    """Torch's attention for rows of several lengths, if this version has it in the form that is used here."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn if "window_size" in inspect.signature(varlen_attn).parameters else None
