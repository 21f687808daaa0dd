"""Hierarchical positions in plain float64: the u-form of the article, one position at a time."""

import torch


def table(weight, m, alpha):
    """(n, D) -> (m, D): q = alpha u_i + (1 - alpha) u_j with u = (p - alpha p_0) / (1 - alpha)."""
    n = len(weight)
    u = [(p - alpha * weight[0]) / (1 - alpha) for p in weight]
    return torch.stack([alpha * u[x // n] + (1 - alpha) * u[x % n] for x in range(m)])
