"""Slow, obvious versions: the means of two fans, and gains of a linear stack from explicit matrices."""

import itertools
import math

import numpy as np

MEANS = {
    "fan_in": lambda m, n: m,
    "fan_out": lambda m, n: n,
    "arithmetic": lambda m, n: (m + n) / 2,
    "geometric": lambda m, n: (m * n) ** 0.5,
    "harmonic": lambda m, n: 2 / (1 / m + 1 / n),
    "quadratic": lambda m, n: ((m**2 + n**2) / 2) ** 0.5,
    "contraharmonic": lambda m, n: (m**2 + n**2) / (m + n),
}


def gain(widths, mode):
    """(forward, backward) factors on the second moment, multiplied up layer by layer."""
    forward = backward = 1.0
    for m, n in itertools.pairwise(widths):
        variance = 1 / MEANS[mode](m, n)
        forward *= m * variance
        backward *= n * variance
    return forward, backward


def measured_gain(widths, mode, seed):
    """log10 of the forward gain of one draw of matrices."""
    random = np.random.default_rng(seed)
    x = random.standard_normal((64, widths[0]))
    start = np.mean(x**2)
    for m, n in itertools.pairwise(widths):
        x = x @ (random.standard_normal((m, n)) / math.sqrt(MEANS[mode](m, n)))
    return math.log10(np.mean(x**2) / start)
