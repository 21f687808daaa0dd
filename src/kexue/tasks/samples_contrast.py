"""Samples contrast (样本对比): ordered classes by cutting the ranking of one score, without labels.

Source: NSP-BERT (Scientific Spaces article 8671): sentence pairs have no candidates to be ranked against each other, so
the samples are. Sort n unlabelled scores; of C ordered classes the lowest n/C go to class 0 and so on:

    threshold_i = sorted(scores)[ceil(i n / C)],  i = 1 ... C - 1;      label(q) = number of thresholds <= q

With a known class prior p the cuts are ceil(n (p_0 + ... + p_(i-1))).

What we do differently, and why: the prior is an option (an equal split is wrong for unbalanced data), the cuts are
integers (0.3 times 10 is 3.0000000000000004, whose ceiling is 4), and a NaN is an error rather than the largest score.
"""

from __future__ import annotations

import math
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.validation import check_is_fitted

from kexue._checks import check_int, check_real


class SamplesContrast(ClassifierMixin, BaseEstimator):
    """Cut the ranking of a score into ordered classes 0 ... C - 1.

    The score says how far a sample is along the order, for example the log-odds that a sentence follows another one
    (contradiction < neutral < entailment).

    Args:
        n_classes: Number of classes C, at least 2.
        prior: Share of each class, lowest first, (C,), summing to 1; None is an equal split.

    Attributes:
        thresholds_: (C - 1,), not decreasing; a class is where the number of thresholds that are not above it ends.
            Where the classes below have prior 0 it is -inf, where those above have, inf.
        classes_: 0 ... C - 1.

    Raises:
        ValueError: In ``fit``: fewer than 2 classes, a prior that is no distribution over them, fewer scores than
            classes, scores that are not finite or not one per sample.

    Reference:
        Scientific Spaces, article 8671; Sun et al. 2021, NSP-BERT.

    Example:
        >>> contrast = SamplesContrast(n_classes=2).fit([0.1, 0.9, 0.3, 0.7])
        >>> contrast.thresholds_.tolist(), contrast.predict([0.2, 0.7, 5.0]).tolist()
        ([0.7], [0, 1, 1])
    """

    def __init__(self, n_classes: int = 2, prior: ArrayLike | None = None) -> None:
        self.n_classes = n_classes
        self.prior = prior

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.required = False
        return tags

    def fit(self, X: ArrayLike, y: Any = None) -> Self:
        """Take the thresholds from unlabelled scores.

        Args:
            X: Scores, (n,) or (n, 1), n at least the number of classes.
            y: Ignored.
        """
        cuts, values = self._cuts(X)
        ranked = np.append(np.sort(values), np.inf)  # a cut at n: nothing is that high
        self.thresholds_ = np.where(cuts > 0, ranked[cuts], -np.inf)  # a cut at 0: nothing is that low
        self.classes_ = np.arange(self.n_classes)
        self.n_features_in_ = 1
        return self

    def predict(self, X: ArrayLike) -> NDArray[np.int64]:
        """Number of thresholds that are not above each score; equal scores get equal classes.

        Args:
            X: Scores, (n,) or (n, 1).

        Returns:
            Classes, (n,).
        """
        check_is_fitted(self, "thresholds_")
        return np.searchsorted(self.thresholds_, _scores(X), side="right")

    def fit_predict(self, X: ArrayLike, y: Any = None) -> NDArray[np.int64]:
        """Cut the ranking of these samples themselves, so that the class sizes are exact.

        Of equal scores at a cut the earlier samples go to the lower class; ``fit(X).predict(X)``, which looks at the
        score alone, sends all of them to the upper one. Without ties the two agree.

        Args:
            X: Scores, (n,) or (n, 1).
            y: Ignored.
        """
        self.fit(X)
        cuts, values = self._cuts(X)
        ranks = np.empty(len(values), np.int64)
        ranks[np.argsort(values, kind="stable")] = np.arange(len(values))
        return np.searchsorted(cuts, ranks, side="right")

    def _cuts(self, X: ArrayLike) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Rank at which each class but the first begins, (C - 1,), and the scores."""
        check_int("n_classes", self.n_classes, 2)
        classes = int(self.n_classes)
        values = _scores(X)
        n = len(values)
        if self.prior is None:
            needed = classes
            cuts = [-(-i * n // classes) for i in range(1, classes)]
        else:
            prior = _prior(self.prior, classes)
            needed = int((prior > 0).sum())
            # the sum in one rounding; 1e-9 forgives the error of the given numbers themselves
            cuts = [min(n, math.ceil(n * math.fsum(prior[:i]) - 1e-9)) for i in range(1, classes)]
        if n < needed:
            raise ValueError(f"{needed} classes need at least as many scores; got {n}")
        return np.array(cuts, np.int64), values


def _scores(X: ArrayLike) -> NDArray[np.float64]:
    try:
        values = np.asarray(X, np.float64)
    except (TypeError, ValueError, RuntimeError):  # RuntimeError: a tensor with gradients
        raise TypeError(f"scores must be numbers; got {type(X).__name__} that numpy cannot convert") from None
    if values.ndim == 2 and values.shape[1] == 1:
        values = values[:, 0]
    if values.ndim != 1:
        raise ValueError(f"scores must have shape (n,) or (n, 1); got {values.shape}")
    if not np.isfinite(values).all():
        place = int(np.flatnonzero(~np.isfinite(values))[0])
        raise ValueError(f"scores must be finite; got {values[place]} at place {place}")
    return values


def _prior(prior: ArrayLike, classes: int) -> NDArray[np.float64]:
    try:
        shares = np.asarray(prior, np.float64)
    except (TypeError, ValueError):
        raise TypeError(f"prior must be numbers; got {prior!r}") from None
    if shares.shape != (classes,):
        raise ValueError(f"prior must have one share for each of the {classes} classes; got shape {shares.shape}")
    for number, share in enumerate(shares):
        check_real(f"prior[{number}]", share, minimum=0.0)
    if abs(shares.sum() - 1) > 1e-6:
        raise ValueError(f"prior must sum to 1; got {shares.sum():.6g}")
    return shares
