"""Gaussian classes to decision rules: from moments to linear scores (one covariance) or quadratic ones (one for each).

Features are scaled by their standard deviation within classes, so that the matrix R that is regularised is a
correlation and no unit matters: R <- (1 - s) R + (s + ridge) I. Scores are computed about the overall mean c,
(x - c) Sigma^-1 (m_k - c)^T, which spoils no digits when the means are far from 0; the article's x Sigma^-1 m_k^T
differs from it by the same number for all classes.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from kexue._checks import check_choice, check_real
from kexue.stats._moments import Array, Moments

FLOOR = 1e-12  # smallest variance within classes, relative to the total variance of the feature
FAR = 1e140  # deviations from the mean
BLOCK = 2**16  # numbers of a block of rows that are scored


def check_regularisation(shrinkage: Any, ridge: Any) -> None:
    """Raise unless shrinkage is "auto" or in [0, 1] and ridge is not negative."""
    if isinstance(shrinkage, str):
        check_choice("shrinkage", shrinkage, ("auto",))
    else:
        check_real("shrinkage", shrinkage, minimum=0.0)
        if shrinkage > 1:
            raise ValueError(f"shrinkage must be 'auto' or in [0, 1]; got {shrinkage!r}")
    check_real("ridge", ridge, minimum=0.0)


def oas(R: Array, n: float) -> float:
    """Oracle approximating shrinkage (Chen et al. 2010) of a covariance (D, D) of n rows, as in scikit-learn."""
    d = len(R)
    if d == 0:
        return 1.0
    square, mean = float((R * R).sum()) / d**2, (float(np.trace(R)) / d) ** 2
    spread = (n + 1) * (square - mean / d)
    return 1.0 if spread <= 0 else min(1.0, (square + mean) / spread)


@dataclass
class Scaled:
    """Moments in units of each feature's deviation within classes, features without any variance left out.

    Attributes:
        priors: Share of each class in the data, (C,).
        centre: Overall mean, (D,).
        scale: Deviation of each active feature, (A,).
        active: Places of the features that vary, (A,).
        means: (m_k - c) / scale, (C, A).
        floored: Which active features are constant in every class, (A,).
    """

    priors: Array
    centre: Array
    scale: Array
    active: Any
    means: Array
    floored: Any

    def units(self, x: Array) -> Array:
        """Rows (n, D) in these units, (n, A); beyond FAR they come nearer, since their squares would overflow."""
        x = (x[:, self.active] - self.centre[self.active]) / self.scale
        far = np.maximum(x.max(1, initial=0.0), -x.min(1, initial=0.0))
        if far.max(initial=0.0) > FAR:
            x /= np.maximum(far / FAR, 1.0)[:, None]
        return x


def scaled(m: Moments) -> Scaled:
    """See :class:`Scaled`."""
    n = m.counts.sum()
    shares = m.counts / n
    gap = m.means - m.means[0]
    centre = m.means[0] + shares @ gap  # exact for a constant feature
    gap = m.means - centre
    within = np.diag(m.pooled()) / n
    total = within + shares @ (gap * gap)
    active = np.flatnonzero(total > 0)
    within, least = within[active], FLOOR * total[active]
    scale = np.sqrt(np.maximum(within, least))
    return Scaled(shares, centre, scale, active, gap[:, active] / scale, within <= least)


def correlation(scatter: Array, n: float, s: Scaled) -> Array:
    """Scatter / n in the units of ``s``, (A, A)."""
    return scatter[np.ix_(s.active, s.active)] / n / s.scale / s.scale[:, None]


def regularise(R: Array, n: float, shrinkage: str | float, ridge: float) -> tuple[Array, float]:
    """(1 - s) R + (s + ridge) I and s."""
    s = oas(R, n) if shrinkage == "auto" else float(shrinkage)
    R = (1 - s) * R if len(R) else R
    R[np.diag_indices(len(R))] += s + ridge
    return R, s


def whitener(R: Array, floor: bool) -> tuple[Array, float]:
    """T (r, A) with T^T T = R^-1, and log det R.

    A singular R gets its pseudo-inverse, or with ``floor`` its eigenvalues raised to FLOOR, and a warning.
    """
    from scipy.linalg.lapack import dtrtri

    size = len(R)
    try:
        L = np.linalg.cholesky(R)
        pivots = np.diag(L)
        if size == 0 or pivots.min() ** 2 > size * np.finfo(float).eps * pivots.max() ** 2:
            inverse: Array = np.asarray(dtrtri(L, lower=1)[0] if size else L)
            return inverse, 2 * float(np.log(pivots).sum())
    except np.linalg.LinAlgError:
        pass
    warnings.warn(
        "the covariance within classes is singular and its pseudo-inverse is used; "
        "shrinkage='auto' or a ridge above 0 give better weights",
        UserWarning,
        stacklevel=2,
    )
    values, vectors = np.linalg.eigh(R)
    if floor:  # one value for all classes: what is constant in each of them must not decide between them
        values = np.maximum(values, FLOOR)
    else:
        keep = values > max(size * np.finfo(float).eps * values[-1], np.finfo(float).tiny)
        values, vectors = values[keep], vectors[:, keep]
    return vectors.T / np.sqrt(values)[:, None], float(np.log(values).sum())


def row_blocks(X: Any, width: int) -> Iterator[slice]:
    """Slices of rows with about BLOCK numbers, when a row has ``width``."""
    step = max(64, BLOCK // max(1, width))
    for start in range(0, X.shape[0], step):
        yield slice(start, start + step)


@dataclass
class LinearRule:
    """Scores log p_k - 1/2 (m_k - c) S (m_k - c)^T + (x - c) S (m_k - c)^T with S the inverse covariance.

    Attributes:
        weights: S (m_k - c), (C, D).
        bias: (C,).
        centre: c, (D,).
        common: S c, (D,): what the article's weights S m_k have in addition.
        shrinkage: s.
    """

    weights: Array
    bias: Array
    centre: Array
    common: Array
    shrinkage: float

    def scores(self, X: Any) -> Array:
        """(N, C), up to a constant in each row."""
        if not isinstance(X, np.ndarray):
            return X @ self.weights.T + (self.bias - self.weights @ self.centre)
        out = np.empty((len(X), len(self.bias)))
        for rows in row_blocks(X, X.shape[1]):
            out[rows] = (X[rows] - self.centre) @ self.weights.T
        return out + self.bias

    def article(self) -> tuple[Array, Array]:
        """Weights and bias in the article's form, w_k = m_k S; for two classes their difference, (1, D) and (1,)."""
        bias = self.bias - self.weights @ self.centre
        if len(bias) == 2:
            return self.weights[1:] - self.weights[:1], bias[1:] - bias[:1]
        # -1/2 m S m = -1/2 (m-c) S (m-c) - (m-c) S c - 1/2 c S c
        return self.weights + self.common, bias - 0.5 * self.common @ self.centre


@dataclass
class QuadraticRule:
    """Scores log p_k - 1/2 log det Sigma_k - 1/2 (x - m_k) Sigma_k^-1 (x - m_k)^T.

    Attributes:
        bias: log p_k - 1/2 log det, (C,), without what all classes share.
        means: (C, A) in the units of ``scaled``.
        whiteners: T_k of each class.
        scaled: Units.
        shrinkage: s of each class, (C,).
    """

    bias: Array
    means: Array
    whiteners: list[Array]
    scaled: Scaled
    shrinkage: Array

    def scores(self, X: Any) -> Array:
        """(N, C), up to a constant in each row."""
        s = self.scaled
        out = np.empty((X.shape[0], len(self.bias)))
        for rows in row_blocks(X, X.shape[1]):
            x = X[rows] if isinstance(X, np.ndarray) else X[rows].toarray()
            x = s.units(x)
            for k, T in enumerate(self.whiteners):
                white = (x - self.means[k]) @ T.T
                out[rows, k] = -0.5 * (white * white).sum(1)
        return out + self.bias


def linear_rule(m: Moments, shrinkage: str | float, ridge: float, priors: Array | None) -> LinearRule:
    """The rule for one covariance, that within classes."""
    s, n = scaled(m), float(m.counts.sum())
    R = correlation(m.pooled(), n, s)
    R[np.flatnonzero(s.floored), np.flatnonzero(s.floored)] = 1.0
    R, used = regularise(R, n, shrinkage, ridge)
    if s.floored.any():
        warnings.warn(
            f"{int(s.floored.sum())} features are constant in every class but not between them; they get a variance "
            f"of {FLOOR:g} of their total, so that probabilities will be 0 and 1",
            UserWarning,
            stacklevel=3,
        )
    T, _ = whitener(R, floor=False)
    white = s.means @ T.T
    weights, common = np.zeros(m.means.shape), np.zeros(len(s.centre))
    weights[:, s.active] = white @ T / s.scale
    common[s.active] = T.T @ (T @ (s.centre[s.active] / s.scale)) / s.scale
    bias = np.log(s.priors if priors is None else priors) - 0.5 * (white * white).sum(1)
    return LinearRule(weights, bias, s.centre, common, used)


def linear_path(m: Moments, grid: Array, ridge: float, priors: Array | None) -> Callable[[Any], Array]:
    """The rules of many shrinkages from one decomposition, as a function from rows (n, D) to scores (S, C, n)."""
    s = scaled(m)
    R = correlation(m.pooled(), float(m.counts.sum()), s)
    R[np.flatnonzero(s.floored), np.flatnonzero(s.floored)] = 1.0
    values, vectors = np.linalg.eigh(R)
    turned = s.means @ vectors
    prior = np.log(s.priors if priors is None else priors)
    weights, biases = np.zeros((len(grid), *m.means.shape)), np.empty((len(grid), len(prior)))
    for i, shrinkage in enumerate(grid):
        shrunk = (1 - shrinkage) * values + shrinkage + ridge
        keep = shrunk > len(R) * np.finfo(float).eps * shrunk.max(initial=0.0)
        inverse = np.divide(1.0, shrunk, out=np.zeros_like(shrunk), where=keep)
        weights[i][:, s.active] = (turned * inverse) @ vectors.T / s.scale
        biases[i] = prior - 0.5 * (turned * turned) @ inverse
    flat, offset = weights.reshape(-1, m.means.shape[1]), weights @ s.centre

    def scores(X: Any) -> Array:
        dense = isinstance(X, np.ndarray)
        out = flat @ (X - s.centre).T if dense else (X @ flat.T).T  # one product for all shrinkages
        out = out.reshape(*biases.shape, -1)
        out += (biases if dense else biases - offset)[:, :, None]
        return out

    return scores


def quadratic_rule(m: Moments, shrinkage: str | float, ridge: float, priors: Array | None) -> QuadraticRule:
    """The rule for a covariance of each class; shrinkage pulls towards the pooled variances."""
    s = scaled(m)
    bias = np.log(s.priors if priors is None else priors)
    whiteners, used = [], np.empty(len(bias))
    for k, n in enumerate(m.counts):
        R, used[k] = regularise(correlation(m.scatter[k], n, s), n, shrinkage, ridge)
        T, logdet = whitener(R, floor=True)
        whiteners.append(T)
        bias[k] -= 0.5 * logdet
    return QuadraticRule(bias, s.means, whiteners, s, used)


def quadratic_path(m: Moments, grid: Array, ridge: float, priors: Array | None) -> Callable[[Any], Array]:
    """:func:`linear_path` for a covariance of each class: one decomposition of each."""
    s = scaled(m)
    biases = np.tile(np.log(s.priors if priors is None else priors), (len(grid), 1))
    turns, inverses = [], []
    for k, n in enumerate(m.counts):
        values, vectors = np.linalg.eigh(correlation(m.scatter[k], n, s))
        shrunk = np.maximum((1 - grid[:, None]) * values + grid[:, None] + ridge, FLOOR)
        turns.append(vectors)
        inverses.append(-0.5 / shrunk)
        biases[:, k] -= 0.5 * np.log(shrunk).sum(1)

    def scores(X: Any) -> Array:
        x = s.units(X if isinstance(X, np.ndarray) else X.toarray())
        out = np.empty((*biases.shape, len(x)))
        for k, (turn, inverse) in enumerate(zip(turns, inverses, strict=True)):
            white = (x - s.means[k]) @ turn
            out[:, k] = inverse @ (white * white).T
        out += biases[:, :, None]
        return out

    return scores
