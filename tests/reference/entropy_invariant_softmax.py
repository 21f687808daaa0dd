"""Entropy-invariant attention in plain float64, row by row."""

import math

import mpmath
import torch

GOLDEN = (1 + math.sqrt(5)) / 2


def scale(n, d, base=512, min_length=16, mode="log512", kappa=None):
    """The factor on q·k at n keys."""
    n = max(n, min_length)
    if mode == "log512":
        return math.log(n) / math.log(base) / math.sqrt(d)
    if mode == "kappa":
        return (1 / (0.5 * math.log(GOLDEN)) if kappa is None else kappa) * math.log(n) / d
    with mpmath.workdps(50):  # 1 - t^2 cancels
        t = mpmath.sqrt(1 - mpmath.mpf(n) ** (-2 / mpmath.mpf(d)))
        return float(t / (1 - t * t))


def row_scale(n, d, base, min_length, mode, scale_mode, kappa):
    """The same with the mode of the attention function: train or inference."""
    if mode == "train":
        return scale(n, d, base, min_length, scale_mode, kappa)
    grown = scale(n, d, base, 1, scale_mode, kappa) / scale(base, d, base, 1, scale_mode, kappa) if n > 1 else 0.0
    return max(1.0, grown) / math.sqrt(d)


def attention(
    q, k, v, causal=False, key_padding_mask=None, base=512, min_length=16, mode="train", per_row=True,
    scale_mode="log512", kappa=None, offset=None,
):  # fmt: skip
    """(B, H, T, E); every row is a loop over the keys that it sees."""
    batch, heads, rows, d = q.shape
    keys = k.shape[2]
    group = heads // k.shape[1]
    offset = keys - rows if offset is None else offset
    out = []
    for b in range(batch):
        kept = [j for j in range(keys) if key_padding_mask is None or bool(key_padding_mask[b, j])]
        for h in range(heads):
            for i in range(rows):
                visible = [j for j in kept if not causal or j <= offset + i]
                if not visible:
                    out.append(0 * (q[b, h, i].sum() + k[b].nan_to_num(0, 0, 0).sum() + v[b].nan_to_num(0, 0, 0).sum())
                               + torch.zeros(v.shape[3], dtype=v.dtype))  # fmt: skip
                    continue
                last = [j for j in kept if not causal or j <= offset + rows - 1]
                n = len(visible) if per_row else len(last)
                factor = row_scale(n, d, base, min_length, mode, scale_mode, kappa)
                scores = torch.stack([factor * (q[b, h, i] * k[b, h // group, j]).sum() for j in visible])
                p = torch.exp(scores - scores.max().detach())
                p = p / p.sum()
                out.append(sum(p[x] * v[b, h // group, j] for x, j in enumerate(visible)))
    return torch.stack(out).view(batch, heads, rows, v.shape[3])
