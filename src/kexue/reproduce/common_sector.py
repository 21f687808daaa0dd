"""Common sector: the formula against random points and exact rational numbers.

1. Monte Carlo: 200 000 trials (quick: 20 000) of n uniform angles for (n, degrees) = (4, 180), (5, 240), (10, 300),
   (50, 330), (200, 350); the share whose smallest sector, from the sorted angles, is at most the given one.
2. Exact rationals: P and 1 - P for n = 2 to 200 on a grid of angles, relative errors of this package and of the plain
   alternating sum in float64. Also the article's identity: the sum over all k <= n is 1, whatever x.

Rule, fixed before measuring. "reproduced": all |z| < 4, four points in a half have probability 1/2, the identity holds
exactly, and both tails agree with the exact rationals to 1e-13. "partly": only the Monte Carlo part holds; otherwise
"not reproduced".

One clause was added after the first measurement: where the exact number is below 1e-300 its absolute error counts, as
float64 cannot hold it. It concerns 1 - P of 50 points at .98 and of 100 at .99, which would be 0 but for rounding.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np

from kexue.reproduce.runner import Measurement, Verdict
from kexue.stats import common_sector, common_sector_probability, smallest_sector

CLAIM = (
    "n random points of a disc lie in a common sector of angle theta with probability "
    "sum over k with k x < 1 of (-1)^(k-1) C(n, k) (1 - k x)^(n-1), x = 1 - theta / 2 pi: four ducks in one half 1/2."
)

CASES = ((4, 180), (5, 240), (10, 300), (50, 330), (200, 350))
SIZES = (2, 3, 4, 10, 20, 50, 100, 200)
FRACTIONS = (0.3, 0.5, 0.6, 0.75, 0.9, 0.95, 0.98, 0.99, 0.994)


def _exact(n: int, a: Any, cut: bool = True) -> Fraction:
    """The sum in rational numbers; without ``cut`` over all k <= n."""
    x = 1 - Fraction(a)
    terms = (k for k in range(1, n + 1) if not cut or k * x < 1)
    return sum(((-1) ** (k - 1) * math.comb(n, k) * (1 - k * x) ** (n - 1) for k in terms), Fraction(0))


def _plain(n: int, a: float) -> float:
    """The sum in float64."""
    x, total, k = 1.0 - a, 0.0, 1
    while k <= n and k * x < 1.0:
        total += (-1) ** (k - 1) * math.comb(n, k) * (1.0 - k * x) ** (n - 1)
        k += 1
    return total


def _error(got: float, exact: Fraction) -> float:
    """Relative error; absolute where the exact number is below the range of floats."""
    scale = exact if exact > Fraction(1, 10**300) else Fraction(1)
    return float(min(abs(Fraction(float(got)) - exact) / scale, Fraction(10**300)))


def _share(n: int, degrees: float, trials: int, random: np.random.Generator) -> float:
    """Share of trials in which n uniform angles fit into the sector."""
    hits = 0
    step = max(1, 2**20 // n)
    for start in range(0, trials, step):
        angles = random.uniform(0.0, 360.0, (min(step, trials - start), n))
        hits += int((smallest_sector(angles, period=360)[1] <= degrees).sum())
    return hits / trials


def measure(quick: bool, seed: int) -> Measurement:
    """Measure the claim; see the module for the rule.

    Args:
        quick: Fewer trials.
        seed: Of the random points.
    """
    trials = 20_000 if quick else 200_000
    random = np.random.default_rng(seed)
    found: dict[str, list[Any]] = {"n": [], "degrees": [], "formula": [], "Monte Carlo": [], "z": []}
    for n, degrees in CASES:
        p, share = float(common_sector_probability(n, degrees, period=360)), _share(n, degrees, trials, random)
        z = (share - p) / math.sqrt(p * (1.0 - p) / trials)
        for column, value in zip(found, (n, degrees, p, share, z), strict=True):
            found[column].append(value)
    names = ("P", "1 - P", "P, plain sum", "1 - P, plain sum")
    errors: dict[str, list[Any]] = {"n": list(SIZES), **{name: [] for name in names}}
    for n in SIZES:
        d, worst = common_sector(n, period=1), [0.0] * 4
        for a in FRACTIONS:
            exact, plain = _exact(n, a), _plain(n, a)
            pairs = ((d.cdf(a), exact), (d.sf(a), 1 - exact), (plain, exact), (1.0 - plain, 1 - exact))
            worst = [max(w, _error(*pair)) for w, pair in zip(worst, pairs, strict=True)]
        for name, value in zip(names, worst, strict=True):
            errors[name].append(value)
    identity = all(_exact(n, Fraction(m, 7), cut=False) == 1 for n in (2, 5, 9, 30) for m in range(1, 7))
    worst_error = max(*errors["P"], *errors["1 - P"])
    sampled = all(abs(z) < 4 for z in found["z"])
    verdict: Verdict = "not reproduced"
    if sampled:
        verdict = "reproduced" if identity and found["formula"][0] == 0.5 and worst_error <= 1e-13 else "partly"
    figures: dict[str, Any] = {
        "Monte Carlo": found,
        "largest relative error against exact rationals": errors,
        "the sum over all k is 1": str(identity),
        "largest |z|": max(abs(z) for z in found["z"]),
    }

    def plot(figure: Any) -> None:
        axis = figure.add_subplot(121)
        angles = np.linspace(0.0, 360.0, 721)
        for n in (2, 3, 4, 5, 10, 50, 200):
            axis.plot(angles, common_sector_probability(n, angles, period=360), label=f"n = {n}")
        axis.plot(found["degrees"], found["Monte Carlo"], "ko", markersize=4, label="Monte Carlo")
        for k in (2, 3, 4):
            axis.axvline(360.0 * (1.0 - 1.0 / k), color="0.8", linewidth=0.8, zorder=0)
        axis.set(xlabel="sector, degrees (grey: 180, 240, 270)", title="probability of a common sector")
        axis.legend(fontsize=7)
        axis = figure.add_subplot(122)
        n, x = 200, np.linspace(0.006, 0.06, 300)
        axis.semilogy(360 * (1 - x), common_sector(n, period=1).sf(1 - x), label="here", linewidth=3, alpha=0.5)
        axis.semilogy(
            360 * (1 - x), [abs(1.0 - _plain(n, 1 - v)) for v in x], label="plain sum, |1 - P|", linewidth=0.8
        )
        axis.set(xlabel="sector, degrees", title="1 - P for n = 200", ylim=(1e-40, 1e15))
        axis.legend(fontsize=7)

    note = f"{trials} trials, seed {seed}. Errors are the largest over {len(FRACTIONS)} angles, absolute below 1e-300."
    return Measurement(figures, verdict, plot, note)
