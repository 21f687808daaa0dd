"""The one-pass masked language model in plain float64: one token at a time, without a mask and without batches."""

import math

import torch


def attend(q, k, v, own, keep, scale=None):
    """One query (D,) over the keys (S, D) that take part and are not its own; 0 if there is none."""
    seen = [j for j in range(len(k)) if j != own and keep[j]]
    if not seen:
        return (v.sum(0) + (q.sum() + k.sum()) * 0) * 0
    scores = torch.stack([q @ k[j] for j in seen]) * (len(q) ** -0.5 if scale is None else scale)
    weights = torch.exp(scores - scores.detach().max())
    return sum(w * v[j] for w, j in zip(weights / weights.sum(), seen, strict=True))


def diagonal_attention(q, k, v, keep=None, own=None, scale=None):
    """(B, H, T, D), (B, H, S, D), (B, H, S, E), (B, S), (B, T) -> (B, H, T, E)."""
    batch, heads, rows, _ = q.shape
    keys = k.shape[2]
    out = []
    for b in range(batch):
        mask = [True] * keys if keep is None else keep[b].tolist()
        for h in range(heads):
            for i in range(rows):
                key = i + keys - rows if own is None else int(own[b, i])
                out.append(attend(q[b, h, i], k[b, h], v[b, h], key, mask, scale))
    return torch.stack(out).view(batch, heads, rows, v.shape[3]) if out else q.new_zeros(*q.shape[:3], v.shape[3])
