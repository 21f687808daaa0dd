"""Variance of the random-feature estimators of exp(x.y), in closed form.

An estimator is a mean of terms exp(omega.z - ...), z = x + y (trigonometric: cos(omega.(x - y))). Its variance follows
from a few moments: the mean and the second moment of a term, the mean product of a term with its mirror image (cosh),
and the mean product of the terms of two orthogonal directions. Two orthogonal directions of Gaussian length add up to a
vector of uniform direction whose squared length is chi^2 with 2d degrees of freedom, so that the last one is, relative
to exp(x.y)^2,

    exp(-|z|^2) 1F1(d; d/2; |z|^2 / 2)  <  1        (trigonometric: 1F1(d; d/2; -|x - y|^2 / 2))

whatever A is; its first terms give the bound of the paper. For a fixed length r the mean of exp(r u.z) over all
directions u is 0F1(; d/2; r^2 |z|^2 / 4). Exact for independent directions and for orthogonal ones in blocks of d.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
SMALL = 3e-4  # below it two terms of a series are better than a difference
LARGE = 700.0  # exp of it is near the largest number
ELEMENTS = 10**6  # of one intermediate array


class Design(NamedTuple):
    """How features were made.

    Attributes:
        dim: d.
        features: M, the number of terms.
        mirrored: Directions that serve two terms (cosh, trig).
        block: How many directions are orthogonal to each other; 1 = all are independent.
        a: A of the optimal features, 0 for others.
        radii: Lengths of the directions, randomly assigned, or one length for all; None = chi(d).
    """

    dim: int
    features: int
    mirrored: int
    block: int
    a: float
    radii: Array | None


class _Moments(NamedTuple):
    """Of the terms; for exponentials the logarithms, relative to exp(x.y) or its square.

    Attributes:
        mean: Of a term.
        second: Mean square of exponentials; of cosines the variance, which for small angles is far smaller.
        orthogonal: Mean product of the terms of two orthogonal directions; of cosines minus the squared mean.
        independent: The same of two independent directions: nothing new, unless lengths are dealt out.
    """

    mean: Array
    second: Array
    orthogonal: Array
    independent: Array


def _pairs(design: Design) -> tuple[float, float]:
    """Numbers of ordered pairs of terms from different directions: in one block, in different blocks."""
    terms = np.ones(design.features - design.mirrored)
    terms[: design.mirrored] = 2
    blocks = np.split(terms, range(design.block, len(terms), design.block))
    inside = sum(float(block.sum() ** 2 - (block**2).sum()) for block in blocks)
    return inside, float(terms.sum() ** 2 - (terms**2).sum()) - inside


def _over(law: Callable[[Array, Array], Array], squares: Array, z: Array, log: bool) -> Array:
    """Mean of law(r^2, z) over the squared lengths; ``log``: of its exponential, as a logarithm."""
    total = np.full_like(z, -np.inf if log else 0.0)
    for part in np.array_split(squares, -(-squares.size * max(z.size, 1) // ELEMENTS)):
        values = law(part[:, None], z)
        total = np.logaddexp(total, np.logaddexp.reduce(values, 0)) if log else total + values.sum(0)
    return total - np.log(squares.size) if log else total / squares.size


def _sums(radii: Array) -> Array:
    """r_i^2 + r_j^2 of every two directions."""
    squares = radii**2
    return 2 * squares if squares.size == 1 else (squares[:, None] + squares)[np.triu_indices(squares.size, 1)]


def _log_0f1(b: float, x: Array) -> Array:
    """Logarithm of 0F1(; b; x), x >= 0."""
    from scipy.special import gammaln, hyp0f1, ive

    root = np.sqrt(x)
    small = np.minimum(2 * root, x / b) < LARGE
    far = np.where(small, 1.0, root)
    far = gammaln(b) - (b - 1) * np.log(far) + np.log(ive(b - 1, 2 * far)) + 2 * far
    return np.where(small, np.log(hyp0f1(b, np.where(small, x, 0.0))), far)


def _exponential(z: Array, design: Design) -> _Moments:
    """Of (1-4A)^(d/2) exp(2A r^2 + sqrt(1-4A) r u.z - |z|^2 / 2)."""
    d, a, radii = design.dim, design.a, design.radii
    c = d / 2 * np.log1p(-4 * a)
    if radii is None:
        from scipy.special import hyp1f1

        near = np.minimum(z, LARGE)  # further out the terms are independent but for less than a rounding error
        zero = np.zeros_like(z)
        second = 2 * c - d / 2 * np.log1p(-8 * a) + z / (1 - 8 * a)
        both = np.where(z < SMALL, -(z**2) / (2 * d + 4), np.log(hyp1f1(d, d / 2, near / 2)) - near)
        return _Moments(zero, second, both, zero)

    def mean(s: Array, z: Array) -> Array:
        return c + 2 * a * s + _log_0f1(d / 2, (1 - 4 * a) * s * z / 4) - z / 2

    one = _over(mean, radii**2, z, log=True)
    second = _over(lambda s, z: 2 * c + 4 * a * s + _log_0f1(d / 2, (1 - 4 * a) * s * z) - z, radii**2, z, log=True)
    both = _over(lambda s, z: c + mean(s, z) - z / 2, _sums(radii), z, log=True)
    apart, n = 2 * one, radii.size
    if n > 1:
        squared = _over(lambda s, z: 2 * mean(s, z), radii**2, z, log=True)
        with np.errstate(divide="ignore"):  # one length may outweigh the others
            apart = apart + np.log(np.maximum(n - np.exp(squared - apart), 0.0) / (n - 1))
    return _Moments(one, second, both, apart)


def _wave(z: Array, design: Design) -> tuple[_Moments, Callable[[Array], Array]]:
    """Of cos(omega.w), |w|^2 = z, and the function that gives its mean for other z."""
    from scipy.special import hyp0f1, hyp1f1

    d, radii = design.dim, design.radii
    if radii is None:
        one = np.exp(-z / 2)
        series = -(z**2) / (2 * d + 4) + z**3 / (2 * d + 8)
        both = np.where(z < SMALL, series, hyp1f1(d, d / 2, -z / 2) - np.exp(-z))
        return _Moments(one, np.expm1(-z) ** 2 / 2, both, np.zeros_like(z)), lambda z: np.exp(-z / 2)

    def law(s: Array, z: Array) -> Array:
        return np.asarray(hyp0f1(d / 2, -s * z / 4))

    def mean(z: Array) -> Array:
        return _over(law, radii**2, z, log=False)

    one, n = mean(z), radii.size
    apart = np.zeros_like(z)
    if n > 1:
        apart = (one**2 - _over(lambda s, z: law(s, z) ** 2, radii**2, z, log=False)) / (n - 1)
    both = _over(law, _sums(radii), z, log=False) - one**2
    return _Moments(one, (1 + mean(4 * z)) / 2 - one**2, both, apart), mean


def exponential_variance(dot: Array, z: Array, design: Design) -> Array:
    """Variance of the positive, cosh and optimal estimators of exp(x.y).

    Args:
        dot: (N,) x.y.
        z: (N,) |x + y|^2.
        design: How the features were made.
    """
    of, (inside, between), m = _exponential(z, design), _pairs(design), design.features
    # Everything is divided by the second moment of a term, the largest of these numbers.
    mean = np.exp(2 * of.mean - of.second)
    total = -m * np.expm1(2 * of.mean - of.second)
    total += 2 * design.mirrored * (np.exp(-z - of.second) - mean)
    total += inside * (np.exp(of.orthogonal - of.second) - mean) + between * (np.exp(of.independent - of.second) - mean)
    with np.errstate(over="ignore"):
        return np.maximum(total, 0.0) / m**2 * np.exp(2 * dot + of.second)


def trigonometric_variance(squares: Array, difference: Array, z: Array, design: Design) -> Array:
    """Variance of the trigonometric estimator of exp(x.y).

    Args:
        squares: (N,) |x|^2 + |y|^2.
        difference: (N,) |x - y|^2.
        z: (N,) |x + y|^2.
        design: How the features were made; an odd direction gives either a cosine or a sine.
    """
    (inside, between), m, pairs = _pairs(design), design.features, design.mirrored
    of, mean = _wave(difference, design)
    total = 4 * pairs * of.second + inside * of.orthogonal + between * of.independent
    if m > 2 * pairs:
        total = total + 1 + (mean(4 * difference) + mean(4 * z)) / 2 - of.mean**2
    with np.errstate(over="ignore"):
        return np.maximum(total, 0.0) / m**2 * np.exp(squares)
