"""Slow, obvious float64 versions: distributions and moments by numerical integration, layers as written."""

import itertools
import math

import numpy as np
from scipy import integrate, special, stats


def gamma(cutoff):
    """Variance of the standard normal cut at -cutoff and cutoff, by integration."""
    weight = integrate.quad(lambda x: math.exp(-x * x / 2), 0, cutoff, epsrel=1e-13)[0]
    return integrate.quad(lambda x: x * x * math.exp(-x * x / 2), 0, cutoff, epsrel=1e-13)[0] / weight


def truncated_cdf(x, std, cutoff):
    """CDF of the truncated normal of realised std."""
    own = std / math.sqrt(gamma(cutoff))
    return np.clip((special.erf(x / own / math.sqrt(2)) / math.erf(cutoff / math.sqrt(2)) + 1) / 2, 0, 1)


def moments(f, kinks=()):
    """E[f(z)], E[f(z)^2] for z ~ N(0, 1)."""
    ends = [-14.0, *sorted({-6.0, -3.0, -1.0, 0.0, 1.0, 3.0, 6.0, *kinks}), 14.0]

    def expectation(g):
        pieces = itertools.pairwise(ends)
        return sum(
            integrate.quad(lambda z: g(z) * stats.norm.pdf(z), a, b, epsabs=1e-13, epsrel=1e-12)[0] for a, b in pieces
        )

    return expectation(f), expectation(lambda z: f(z) ** 2)


def scheduled_residual(x, branch, step, final, forwards):
    """Outputs of that many forwards in training."""
    outs, alpha = [], 0.0
    for _ in range(forwards):
        outs.append(x + alpha * branch(x))
        alpha = min(alpha + step, final)
    return outs


def ntk_linear(x, weight, bias):
    """y_i = sum_j W_ij x_j / sqrt(m) + b_i, number by number."""
    m = len(weight[0])
    return [
        [sum(row[j] * line[j] for j in range(m)) / math.sqrt(m) + b for row, b in zip(weight, bias, strict=True)]
        for line in x
    ]
