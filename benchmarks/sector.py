"""The common sector's tails: against scipy's Irwin-Hall density, exact rationals, and at n = 10^9."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from typing import Any

import numpy as np
from scipy.stats import irwinhall

from benchmarks.harness import Table, compare
from kexue.stats import common_sector, common_sector_probability

SECTION = "Common sector"
SIZES = {10: 5000, 63: 5000, 200: 2000, 1000: 200}  # points -> angles, of which scipy takes some 0.1 s
RANGES = (
    ("1 - P from .9 to 1e-9", 0.9, 1e-9, True),
    ("1 - P from 1e-9 to 1e-90", 1e-9, 1e-90, True),
    ("P from .5 to 1e-9", 0.5, 1e-9, False),
)


def exact(n: int, x: float) -> Fraction:
    """P as a rational number; with x = i / d it is a sum of integers over d^(n-1)."""
    i, d = Fraction(x).as_integer_ratio()
    terms = ((-1) ** (k - 1) * math.comb(n, k) * (d - k * i) ** (n - 1) for k in range(1, n + 1) if k * i < d)
    return Fraction(sum(terms), d ** (n - 1))


def gaps(n: int, first: float, last: float, upper: bool, count: int) -> np.ndarray:
    """``count`` gaps x at which the tail goes from first to last, with few digits, so that 1 - x is exact."""
    d, q = common_sector(n, period=1), np.geomspace(first, last, count)
    return 1 - (d.isf if upper else d.ppf)(q).astype(np.float32).astype(np.float64)


def scipy_tail(n: int, upper: bool) -> Callable[[Any], Any]:
    """1 - P or P from irwinhall's logpdf; with pdf, (n-1)! overflows at n = 1000."""
    theirs, factor = irwinhall(n), math.lgamma(n)

    def tail(x: Any) -> Any:
        covered = np.exp(factor + (n - 1) * np.log(x) + theirs.logpdf(1 / x))
        return covered if upper else 1 - covered

    return tail


def with_scipy(n: int, title: str, first: float, last: float, upper: bool) -> Table:
    """One range of one tail as an array."""
    x, here, peer = gaps(n, first, last, upper, SIZES[n]), common_sector(n, period=1), scipy_tail(n, upper)
    name, ours = ("sf", here.sf) if upper else ("cdf", here.cdf)
    some = slice(None, None, SIZES[n] // 12)
    wanted = [1 - p if upper else p for p in (exact(n, v) for v in x[some])]
    extra = {}
    for key, got in (("scipy irwinhall", peer(x)), (name, ours(1 - x))):
        errors = [abs(float(Fraction(float(g)) / w - 1)) for g, w in zip(got[some], wanted, strict=True)]
        extra[key] = {"largest relative error": f"{max(errors):.1e}"}
    return compare(
        f"{title}, n = {n}",
        f"{SIZES[n]} angles in one array, float64, one thread; errors at 12 of them.",
        {"scipy irwinhall": partial(peer, x), name: partial(ours, 1 - x)},
        peer="scipy irwinhall",
        packages=("scipy", "numba"),
        repeats=3,
        extra=extra,
    )


def one_by_one() -> Table:
    """A call for each angle."""
    n = 200
    x, here, peer = gaps(n, *RANGES[0][1:], 100), common_sector(n, period=1), scipy_tail(n, True)
    return compare(
        f"{RANGES[0][0]}, n = {n}, a call for each angle",
        "100 angles, float64, one thread.",
        {
            "scipy irwinhall": lambda: [peer(v) for v in x],
            "sf": lambda: [here.sf(1 - v) for v in x],
            "exact rationals": lambda: [1 - exact(n, v) for v in x],
        },
        peer="scipy irwinhall",
        packages=("scipy", "numba"),
        repeats=3,
    )


def many_points() -> Table:
    """Sizes that no peer computes."""

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
    return [*(with_scipy(n, *place) for n in SIZES for place in RANGES), one_by_one(), many_points()]
