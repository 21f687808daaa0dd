"""Residual attention scores in plain float64: one query row at a time."""

import torch


def attend(scores, v, keep):
    """softmax over the keys that take part, times v; 0 where there is none. scores (S,), v (S, E), keep (S,) bool."""
    if not keep.any():
        return v.sum(0) * 0
    weights = torch.exp(scores[keep] - scores[keep].detach().max())
    return weights / weights.sum() @ v[keep]


def realformer(qs, ks, vs, *, padding=None, causal=False, scale=None, mean=False, detach=False):
    """Outputs of all layers, and the summed scores of all layers before mask and division."""
    batch, heads, rows, width = qs[0].shape
    keys = ks[0].shape[2]
    scale = width**-0.5 if scale is None else scale
    outs, sums, total = [], [], torch.zeros(batch, heads, rows, keys, dtype=torch.float64)
    for n, (q, k, v) in enumerate(zip(qs, ks, vs, strict=True), 1):
        total = (total.detach() if detach else total) + scale * torch.einsum("bhid,bhjd->bhij", q, k)
        sums.append(total)
        lines = []
        for b in range(batch):
            for h in range(heads):
                for i in range(rows):
                    keep = torch.ones(keys, dtype=torch.bool) if padding is None else padding[b].clone()
                    if causal:
                        keep &= torch.arange(keys) <= i + keys - rows
                    lines.append(attend(total[b, h, i] / (n if mean else 1), v[b, h], keep))
        outs.append(torch.stack(lines).view(batch, heads, rows, -1))
    return outs, sums
