"""FLASH (混合块注意力): quadratic gated attention inside chunks plus linear attention between them, cost O(T).

Source: 科学空间 8934 (FLASH:可能是近来最有意思的高效Transformer设计); Hua et al., https://arxiv.org/abs/2202.10447.

    inside chunk g of c tokens:  relu(Q_g K_g^T / sqrt(s))^2 / c  V_g
    all tokens:                  Q' sum_j k'_j v_j^T / n          (n unpadded tokens)
    causal:                      Q'_g sum over chunks before g of k'_j v_j^T / (number of unpadded tokens in them)

A last chunk may be short; its divisor stays c. The published code divides the causal sums by c or T instead, so that
they grow with the position.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from kexue.attention._gated_kernel import attend


def chunked_attention(
    q: Tensor, k: Tensor, far_q: Tensor, far_k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, chunk: int
) -> Tensor:
    """(B, T, s) queries and keys of both parts and (B, T, E) values -> (B, T, E); memory O(T E + T / c s E)."""
    batch, length = v.shape[:2]
    extra = -length % chunk if length > chunk else 0
    size = min(chunk, length)
    if extra and mask is None:
        mask = torch.ones(batch, length, dtype=torch.bool, device=v.device)
    count = (length + extra) // max(size, 1)

    def split(x: Tensor) -> Tensor:
        """(B, T, W) -> (B, chunks, tokens of a chunk, W)."""
        return F.pad(x, (0, 0, 0, extra)).unflatten(1, (count, size))

    if length == 0 or batch == 0:
        return v * 1.0
    q, k, far_q, far_k, v = (split(x) for x in (q, k, far_q, far_k, v))
    if mask is not None:
        mask = F.pad(mask, (0, extra)).unflatten(1, (count, size))
        far_k = far_k.masked_fill(~mask[..., None], 0.0)
    scaled = q.flatten(0, 1) * (q.shape[-1] * chunk) ** -0.5
    flat = None if mask is None else mask.flatten(0, 1)
    near = attend(scaled, k.flatten(0, 1), v.flatten(0, 1), flat, None, "relu2", causal, 0.0).unflatten(
        0, (batch, count)
    )
    dtype = far_k.dtype  # of the scores: float32 at least
    with torch.autocast(v.device.type, enabled=False):
        sums = far_k.mT @ v.to(dtype)  # (B, chunks, s, E)
        if mask is None:
            tokens = sums.new_full((1, count), size)
        else:
            tokens = mask.sum(2).to(dtype)
        if causal:  # of the chunks before; shifted, as subtracting a chunk again would leave its rounding behind
            sums = F.pad(sums.cumsum(1)[:, :-1], (0, 0, 0, 0, 1, 0))
            tokens = F.pad(tokens.cumsum(1)[:, :-1], (1, 0))
        else:
            sums, tokens = sums.sum(1, keepdim=True), tokens.sum(1, keepdim=True)
        far = far_q @ (sums / tokens.clamp(min=1)[..., None, None])
    return (near + far.to(v.dtype)).flatten(1, 2)[:, :length]
