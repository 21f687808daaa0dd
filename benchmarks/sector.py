"""The common sector's upper tail: against scipy's Irwin-Hall density, exact rationals, and at n = 10^9."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
from scipy.stats import irwinhall

from benchmarks.harness import Table, compare
from kexue.stats import common_sector, common_sector_probability

SECTION = "Common sector"
POINTS, PLACES = 200, 200


def exact(n: int, a: float) -> Fraction:
    x = 1 - Fraction(a)
    return sum(
        ((-1) ** (k - 1) * math.comb(n, k) * (1 - k * x) ** (n - 1) for k in range(1, n + 1) if k * x < 1), Fraction(0)
    )


def with_scipy() -> Table:
    n = POINTS
    x = np.linspace(0.008, 0.026, PLACES)
    theirs, factor = irwinhall(n), math.lgamma(n)
    here = common_sector(n, period=1)
    contenders = {
        "scipy irwinhall": lambda: np.exp(factor + (n - 1) * np.log(x)) * theirs.pdf(1 / x),
        "sf": lambda: here.sf(1 - x),
        "exact rationals, 10 of the angles": lambda: [exact(n, 1 - v) for v in x[::20]],
    }
    wanted = [1 - exact(n, 1 - v) for v in x[::20]]
    extra = {
        name: {
            "largest relative error": f"{max(abs(float((Fraction(float(g)) - w) / w)) for g, w in zip(got, wanted, strict=True)):.1e}"
        }
        for name, got in (("scipy irwinhall", contenders["scipy irwinhall"]()[::20]), ("sf", here.sf(1 - x[::20])))
    }
    return compare(
        "Upper tail, 200 points",
        f"1 - P at {PLACES} angles, n = {n}, float64, one thread.",
        contenders,
        peer="scipy irwinhall",
        packages=("scipy", "numba"),
        repeats=3,
        extra=extra,
    )


def many_points() -> Table:
    def step(n: int) -> object:
        a = 1 - (math.log(n) + np.linspace(-2, 5, 1000)) / n
        return lambda: common_sector_probability(n, a, period=1)

    contenders = {f"n = 10^{k}": step(10**k) for k in (2, 3, 6, 9)}
    return compare(
        "Many points",
        "P at 1000 angles around the median, float64, one thread; no peer computes these.",
        contenders,  # type: ignore[arg-type]
        peer="n = 10^2",
        packages=("numba",),
        repeats=3,
    )


def run() -> list[Table]:
    """All comparisons of this method."""
    return [with_scipy(), many_points()]
