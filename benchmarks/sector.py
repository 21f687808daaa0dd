"""The common sector's upper tail: against scipy's Irwin-Hall density, exact rationals, and at n = 10^9."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from functools import partial

import numpy as np
from scipy.stats import irwinhall

from benchmarks.harness import Table, compare
from kexue.stats import common_sector, common_sector_probability

SECTION = "Common sector"
POINTS, PLACES = 200, 100


def exact(n: int, a: float) -> Fraction:
    x = 1 - Fraction(a)
    return sum(
        ((-1) ** (k - 1) * math.comb(n, k) * (1 - k * x) ** (n - 1) for k in range(1, n + 1) if k * x < 1), Fraction(0)
    )


def with_scipy() -> list[Table]:
    n = POINTS
    theirs, factor, here = irwinhall(n), math.lgamma(n), common_sector(n, period=1)

    def peer(x: np.ndarray) -> np.ndarray:
        return np.exp(factor + (n - 1) * np.log(x)) * theirs.pdf(1 / x)

    tables = []
    for title, x in (
        ("Upper tail, 1 - P from .99 to 1e-9", np.linspace(0.0135, 0.048, PLACES)),
        ("Upper tail, 1 - P from 1e-9 to 1e-90", np.linspace(0.0078, 0.0135, PLACES)),
    ):
        wanted = [1 - exact(n, 1 - v) for v in x[::20]]
        extra = {}
        for name, got in (("scipy irwinhall", peer(x)), ("sf", here.sf(1 - x))):
            errors = [abs(float(Fraction(float(g)) / w - 1)) for g, w in zip(got[::20], wanted, strict=True)]
            extra[name] = {"largest relative error": f"{max(errors):.1e}"}
        contenders = {
            "scipy irwinhall": partial(peer, x),
            "scipy irwinhall, a call for each angle": partial(lambda x: [peer(v) for v in x], x),
            "exact rationals": partial(lambda x: [exact(n, 1 - v) for v in x], x),
            "sf": partial(lambda x: here.sf(1 - x), x),
        }
        tables.append(
            compare(
                title,
                f"{PLACES} angles, n = {n}, float64, one thread.",
                contenders,
                peer="scipy irwinhall",
                packages=("scipy", "numba"),
                repeats=3,
                extra=extra,
            )
        )
    return tables


def many_points() -> Table:
    def step(n: int) -> Callable[[], object]:
        a = 1 - (math.log(n) + np.linspace(-2, 5, 1000)) / n
        return lambda: common_sector_probability(n, a, period=1)

    contenders = {f"n = 10^{k}": step(10**k) for k in (2, 3, 6, 9)}
    return compare(
        "Many points",
        "P at 1000 angles around the median, float64, one thread; no peer computes these.",
        contenders,
        peer="n = 10^2",
        packages=("numba",),
        repeats=3,
    )


def run() -> list[Table]:
    """All comparisons of this method."""
    return [*with_scipy(), many_points()]
