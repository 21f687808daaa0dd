"""The contraction of linear attention in plain torch operations: differentiable any number of times, exportable.

Features are mapped already. ``log_scale`` is the logarithm of the factor that the features of a key were divided by: a
running maximum over time for maps in log space. The causal form goes by chunks of c, all chunks at once: inside a chunk
the c x c block of scores, between chunks the state (S, z).

Shapes: B batch, H heads of k and v, G query heads for each of them, T time, M features, E width of v.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class State(NamedTuple):
    """What the keys seen so far amount to.

    Attributes:
        s: (B, H, M, E), sum of phi(k) v^T.
        z: (B, H, M), sum of phi(k).
        shift: (B, H, M), logarithm of the factor that both were divided by; None without one.
    """

    s: Tensor
    z: Tensor
    shift: Tensor | None


def safe_divide(x: Tensor, den: Tensor) -> Tensor:
    """Quotient, 0 where nothing was seen (den = 0) or nothing is left of it (den below the normal numbers).

    Its gradient never squares a denominator, which would overflow.
    """
    return x / torch.where(den.abs() > torch.finfo(den.dtype).tiny, den, torch.inf)


def bidirectional(
    q: Tensor, k: Tensor, v: Tensor, before: State | None, eps: float, normalize: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Every query sees every key.

    Args:
        q: (B, H, G * T, M).
        k: (B, H, T, M).
        v: (B, H, T, E).
        before: State of earlier keys, on the same scale as ``k``.
        eps: Added to the denominators.
        normalize: Divide by them.

    Returns:
        o (B, H, G * T, E), and the new S and z.
    """
    s, z = k.mT @ v, k.sum(-2)
    if before is not None:
        s, z = s + before.s, z + before.z
    o = q @ s
    if normalize:
        o = safe_divide(o, q @ z.unsqueeze(-1) + eps)
    return o, s, z


def causal(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_scale: Tensor | None,
    before: State | None,
    eps: float,
    normalize: bool,
    chunk: int = 64,
) -> tuple[Tensor, Tensor, Tensor]:
    """Query i sees keys j <= i.

    Args:
        q: (B, H, G, T, M).
        k: (B, H, T, M).
        v: (B, H, T, E).
        log_scale: (B, H, T), from 0 on never falling over time, or None.
        before: State of earlier keys, on the scale 0 of ``log_scale``.
        eps: Added to the denominators.
        normalize: Divide by them.
        chunk: c.

    Returns:
        o (B, H, G, T, E), and S and z after the last key, on the scale of the last ``log_scale``.
    """
    b, h, g, t, m = q.shape
    e = v.shape[-1]
    n = -(-t // chunk)
    pad = n * chunk - t
    q = F.pad(q, (0, 0, 0, pad)).view(b, h, g, n, chunk, m).transpose(2, 3)  # (B, H, n, G, c, M)
    k = F.pad(k, (0, 0, 0, pad)).view(b, h, n, 1, chunk, m)
    v = F.pad(v, (0, 0, 0, pad)).view(b, h, n, 1, chunk, e)
    causal_tile = torch.ones(chunk, chunk, dtype=torch.bool, device=q.device).tril()
    scores = (q @ k.mT).where(causal_tile, 0.0)
    s, z = (k.mT @ v).squeeze(3), k.sum(-2).squeeze(3)  # what each chunk adds
    if before is None:
        before = State(s.new_zeros(b, h, m, e), z.new_zeros(b, h, m), None)
    s, z = torch.cat([before.s.unsqueeze(2), s], 2), torch.cat([before.z.unsqueeze(2), z], 2)
    if log_scale is None:
        s, z = s.cumsum(2), z.cumsum(2)
        start_s, start_z = s[:, :, :-1, None], z[:, :, :-1, None]
        o = q @ start_s + scores @ v
        den = q @ start_z.unsqueeze(-1) + scores.sum(-1, keepdim=True)
    else:
        # Replicated at the end: a padded token is on the scale of the last one.
        level = torch.cat([log_scale, log_scale[..., -1:].expand(b, h, pad)], -1).view(b, h, n, 1, chunk)
        ends = torch.cat([torch.zeros_like(level[:, :, 0, 0, :1]), level[:, :, :, 0, -1]], -1)  # (B, H, n + 1)
        scores = scores * (level.unsqueeze(-2) - level.unsqueeze(-1)).clamp(max=0).exp()
        adds = (level[..., -1:] - level).neg().exp().unsqueeze(-1)  # each key on the scale of its chunk's end
        s = torch.cat([s[:, :, :1], ((k * adds).mT @ v).squeeze(3)], 2)
        z = torch.cat([z[:, :, :1], (k * adds).sum(-2).squeeze(3)], 2)
        falls = (ends.unsqueeze(-2) - ends.unsqueeze(-1)).clamp(max=0).exp().tril()  # (B, H, to, from)
        s = torch.einsum("bhij,bhjme->bhime", falls, s)
        z = falls @ z
        carried = q * (ends[:, :, :-1, None, None] - level).clamp(max=0).exp().unsqueeze(-1)
        o = carried @ s[:, :, :-1, None] + scores @ v
        den = carried @ z[:, :, :-1, None, :, None] + scores.sum(-1, keepdim=True)
    if normalize:
        o = safe_divide(o, den + eps)
    return o.transpose(2, 3).reshape(b, h, g, n * chunk, e)[..., :t, :], s[:, :, -1], z[:, :, -1]
