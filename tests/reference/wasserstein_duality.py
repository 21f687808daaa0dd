"""Optimal transport as the linear programme it is, and entropic transport as its formula, in float64."""

import numpy as np
import torch
from scipy.optimize import linprog


def constraints(n, m):
    """A (n + m, n m) of the equations: row sums, then column sums."""
    return np.vstack([np.kron(np.eye(n), np.ones((1, m))), np.kron(np.ones((1, n)), np.eye(m))])


def primal(costs, p, q):
    """Cost and plan."""
    n, m = costs.shape
    found = linprog(costs.ravel(), A_eq=constraints(n, m)[:-1], b_eq=np.concatenate([p, q])[:-1], method="highs-ds")
    assert found.status == 0, found.message
    return found.fun, found.x.reshape(n, m)


def dual(costs, p, q):
    """Largest <p, f> + <q, g> with f_i + g_j <= c_ij, and f, g."""
    n, m = costs.shape
    found = linprog(
        -np.concatenate([p, q]), A_ub=constraints(n, m).T, b_ub=costs.ravel(), bounds=(None, None), method="highs-ds"
    )
    assert found.status == 0, found.message
    return -found.fun, found.x[:n], found.x[n:]


def lipschitz_maximum(distances, weights):
    """Largest sum of w_k f_k over |f_k - f_l| <= d_kl: the dual with a single potential on the union of supports."""
    k = len(weights)
    rows, right = [], []
    for i in range(k):
        for j in range(k):
            if i != j:
                row = np.zeros(k)
                row[i], row[j] = 1, -1
                rows.append(row)
                right.append(distances[i, j])
    bounds = [(0, 0)] + [(None, None)] * (k - 1)
    found = linprog(-np.asarray(weights), A_ub=np.array(rows), b_ub=np.array(right), bounds=bounds, method="highs-ds")
    assert found.status == 0, found.message
    return -found.fun


def line(x, y, a, b, power):
    """Cost on the line: mass moved step by step from left to right."""
    left, right = sorted(zip(x, a, strict=True)), sorted(zip(y, b, strict=True))
    i = j = 0
    here, there = left[0][1], right[0][1]
    total = 0.0
    while True:
        moved = min(here, there)
        total += moved * abs(left[i][0] - right[j][0]) ** power
        here, there = here - moved, there - moved
        if here <= there:
            i += 1
            if i == len(left):
                return total
            here = left[i][1]
        else:
            j += 1
            if j == len(right):
                return total
            there = right[j][1]


def entropic(costs, p, q, eps, updates=20_000):
    """OT_eps, plan, f, g as tensors, by updates in the log domain."""
    f, g = torch.zeros_like(p), torch.zeros_like(q)
    for _ in range(updates):
        old = f
        f = -eps * torch.logsumexp((g - costs) / eps + q.log(), 1)
        g = -eps * torch.logsumexp((f[:, None] - costs) / eps + p.log()[:, None], 0)
        if float((f - old).detach().abs().max()) < 1e-14:
            break
    plan = p[:, None] * q * torch.exp((f[:, None] + g - costs) / eps)
    relative = torch.where(plan > 0, plan * (plan / (p[:, None] * q)).log(), 0.0)
    return (plan * costs).sum() + eps * relative.sum(), plan, f, g
