"""Polynomial attention in plain float64: full outer products, one query at a time."""

import math

import torch


def sim(x, kind, degree):
    """The polynomial, term by term."""
    if kind == "power":
        return (1 + x / degree) ** degree
    return sum(x**m / math.factorial(m) for m in range(degree + 1))


def full_features(x, kind, degree):
    """Outer products of one vector with itself, as the article has them: sum d^m or (d + 1)^p numbers."""
    out = torch.ones(1, dtype=torch.float64)
    if kind == "power":
        for _ in range(degree):
            out = torch.outer(out, torch.cat([out.new_ones(1), x / math.sqrt(degree)])).flatten()
        return out
    levels = [out]
    for m in range(1, degree + 1):
        out = torch.outer(out, x).flatten()
        levels.append(out / math.sqrt(math.factorial(m)))
    return torch.cat(levels)


def attention(q, k, v, kind, degree, scale, causal=False, mask=None, eps=0.0, normalize=True, before=None):
    """Output (B, H, T, E) of queries (B, H, T, D) against keys (B, H', S, D), one at a time.

    ``before`` is (k, v) of earlier tokens; ``mask`` (B, S), True = takes part.
    """
    batch, heads, t, _ = q.shape
    own, s = k.shape[1:3]
    rows = []
    for b in range(batch):
        for h in range(heads):
            kv = h // (heads // own)
            for i in range(t):
                keys, values = [], []
                if before is not None:
                    keys += list(before[0][b, kv])
                    values += list(before[1][b, kv])
                for j in range(s - t + i + 1 if causal else s):
                    if mask is None or mask[b, j]:
                        keys.append(k[b, kv, j])
                        values.append(v[b, kv, j])
                num = torch.zeros(v.shape[-1], dtype=torch.float64)
                den = torch.tensor(eps, dtype=torch.float64)
                for key, value in zip(keys, values, strict=True):
                    w = sim(scale * torch.dot(q[b, h, i], key), kind, degree)
                    num, den = num + w * value, den + w
                rows.append((num / den if normalize else num) if keys else num)
    return torch.stack(rows).view(batch, heads, t, v.shape[-1])


def largest_error(kind, degree, r, relative, points=20001):
    """Largest error on a dense grid over [-r, r]."""
    x = torch.linspace(-r, r, points, dtype=torch.float64)
    error = (sim(x, kind, degree) - x.exp()).abs()
    return float((error / x.exp() if relative else error).max())
