"""Random features, the obvious way: loops over features, dense attention, variance by integration over the draws."""

import itertools
import math

import numpy as np


def logs(x, omega, variant="positive", a=0.0):
    """Logarithms of the features of one scaled vector; omega has one row for each direction."""
    m = len(omega)
    if variant == "optimal":
        d = len(x)
        return np.array(
            [
                d / 4 * math.log(1 - 4 * a) + a * w @ w + math.sqrt(1 - 4 * a) * w @ x - x @ x / 2 - math.log(m) / 2
                for w in omega
            ]
        )
    return np.array([w @ x - x @ x / 2 - math.log(m) / 2 for w in omega])


def estimate(x, y, omega, variant="positive", a=0.0):
    """phi(x).phi(y) of scaled vectors; cosh and trig use every direction twice."""
    if variant == "trig":
        return math.exp((x @ x + y @ y) / 2) * np.mean([math.cos(w @ (x - y)) for w in omega])
    if variant == "cosh":
        omega = np.concatenate([omega, -omega])
    if variant == "relu":
        return np.mean([(max(w @ x, 0) + 1e-3) * (max(w @ y, 0) + 1e-3) for w in omega])
    return np.exp(logs(x, omega, variant, a) + logs(y, omega, variant, a)).sum()


def attention(q, k, v, omega, *, scale, variant="positive", a=0.0, causal=False, mask=None):
    """(T, E) for q (T, D), k (S, D), v (S, E), from the matrix of estimates."""
    q, k = q * math.sqrt(scale), k * math.sqrt(scale)
    out = np.zeros((len(q), v.shape[1]))
    for i in range(len(q)):
        seen = [j for j in range(len(k)) if (mask is None or mask[j]) and not (causal and j > i + len(k) - len(q))]
        weights = np.array([estimate(q[i], k[j], omega, variant, a) for j in seen])
        if len(seen):
            out[i] = weights @ v[seen] / weights.sum()
    return out


def _chi2_nodes(count=40):
    """Lengths and weights that integrate over chi(2)."""
    x, w = np.polynomial.laguerre.laggauss(count)  # r^2 / 2 is exponential
    return np.sqrt(2 * x), w


def plane_moments(x, y, n, *, orthogonal, radii=None, **options):
    """Mean and variance of the estimate with n <= 3 directions in the plane, over all draws.

    Every draw: angles of independent directions on a grid (exact for periodic functions), the sign of the second
    vector of an orthogonal pair, lengths by Gauss-Laguerre or, given ``radii``, in every order.
    """
    grid = np.arange(48) * 2 * np.pi / 48
    # The estimate is a mean over directions: mean and products of two of them are enough.
    nodes, weights = _chi2_nodes()
    direction = {t: np.array([math.cos(t), math.sin(t)]) for t in grid}

    def term(t, r):
        return estimate(x, y, r * direction[t][None], **options)

    def table(r):
        return np.array([term(t, r) for t in grid])

    blocks = [list(range(n))[i : i + 2] for i in range(0, n, 2)] if orthogonal else [[i] for i in range(n)]
    turn = len(grid) // 4
    if radii is None:
        tables = np.array([table(r) for r in nodes])  # (radius, angle)
        mean = weights @ tables.mean(1)
        square = weights @ (tables**2).mean(1)
        right = np.roll(tables, -turn, 1), np.roll(tables, turn, 1)
        pair = sum(np.einsum("r,s,rt,st->", weights, weights, tables, z) for z in right) / (2 * len(grid))
        orders = [([mean] * n, [square] * n, lambda i, j: pair)]
    else:
        tables = {r: table(r) for r in radii}
        orders = []
        for order in itertools.permutations(radii):

            def pair_of(i, j, order=order):
                one, two = tables[order[i]], tables[order[j]]
                return np.mean([one * np.roll(two, -turn), one * np.roll(two, turn)])

            orders.append(([tables[r].mean() for r in order], [(tables[r] ** 2).mean() for r in order], pair_of))
    means, seconds = [], []
    for first, second, pair_of in orders:
        total = sum(second)
        for i in range(n):
            for j in range(n):
                if i != j:
                    same = any(i in b and j in b for b in blocks)
                    total += pair_of(i, j) if same else first[i] * first[j]
        means.append(sum(first) / n)
        seconds.append(total / n**2)
    return np.mean(means), np.mean(seconds) - np.mean(means) ** 2
