"""What the closed-form classifiers share: checks, the step from moments to a rule, predictions."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.exceptions import NotFittedError
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import _check_sample_weight, assert_all_finite, check_is_fitted, validate_data

from kexue.stats._class_rule import LinearRule, QuadraticRule, linear_rule, quadratic_rule
from kexue.stats._moments import Array, Moments, moments

if TYPE_CHECKING:
    from torch import nn

LATER = {"ensure_all_finite": False}  # see finite_moments
COVARIANCES = ("shared", "per_class")


def check_priors(priors: ArrayLike | None, classes: int) -> Array | None:
    """The priors as an array (C,), or None."""
    if priors is None:
        return None
    try:
        p = np.asarray(priors, np.float64)
    except (TypeError, ValueError):
        raise TypeError(f"priors must be numbers or None; got {priors!r}") from None
    if p.shape != (classes,):
        raise ValueError(f"priors must have one share for each of the {classes} classes; got shape {p.shape}")
    if not (np.isfinite(p).all() and (p > 0).all() and abs(p.sum() - 1) <= 1e-6):
        raise ValueError(f"priors must be above 0 and sum to 1; got {p.tolist()}")
    return p / p.sum()


def encode(y: NDArray[Any]) -> tuple[NDArray[Any], NDArray[np.intp]]:
    """The classes in order, and the place of each label among them."""
    if y.dtype.kind in "iu" and len(y):
        low, high = int(y.min()), int(y.max())
        if high - low < 2**16:  # counts and a table: np.unique would sort or hash all labels
            steps = ((y if y.dtype.itemsize == 8 else y.astype(np.int64)) - low).astype(np.intp, copy=False)
            present = np.bincount(steps) > 0
            classes = np.flatnonzero(present).astype(y.dtype if y.dtype.itemsize == 8 else np.int64) + low
            return classes.astype(y.dtype), (np.cumsum(present) - 1)[steps]
    return np.unique(y, return_inverse=True)


def class_places(y: NDArray[Any], classes: NDArray[Any]) -> NDArray[np.intp]:
    """Place of each label among the classes."""
    found = np.unique(y)
    foreign = found[~np.isin(found, classes)]
    if len(foreign):
        raise ValueError(f"labels must be among the classes {classes.tolist()}; got {foreign.tolist()}")
    return np.searchsorted(classes, y)


def finite_moments(
    X: Any, places: NDArray[np.intp], classes: int, weight: Array | None, per_class: bool, rows: Any = None
) -> Moments:
    """Moments of rows; NaN, infinity and overflow show in them, which saves a pass over X to look for them."""
    if weight is not None and not weight.all():  # such rows leave no trace
        assert_all_finite(X, input_name="X")
    with np.errstate(all="ignore"):
        m = moments(X, places, classes, weight=weight, rows=rows, per_class=per_class)
        fine = np.isfinite(m.scatter.sum() + m.means.sum())
    if not fine:
        assert_all_finite(X, input_name="X")
        raise ValueError(f"the squares of X must not exceed float64; got values up to {abs(X).max():.3g}")
    return m


class ClosedForm(ClassifierMixin, BaseEstimator):
    """A classifier whose state is moments; subclasses have the parameters ``priors`` and ``ridge``."""

    classes_: NDArray[Any]
    moments_: Moments
    priors: ArrayLike | None
    ridge: float

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = True
        return tags

    def _data(self, X: Any, y: Any, weight: Any, reset: bool) -> tuple[Any, NDArray[Any], Array | None]:
        X, y = validate_data(self, X, y, accept_sparse="csr", dtype=[np.float64, np.float32], reset=reset, **LATER)
        if y.dtype.kind not in "iub":  # integers are classes, and looking at them all takes time
            check_classification_targets(y)
        if weight is None:
            return X, y, None
        weight = _check_sample_weight(weight, X, dtype=np.float64, ensure_non_negative=True)
        return X, y, weight

    def _solve(self, shrinkage: str | float, strict: bool) -> None:
        """From moments to the rule; a stream that lacks a class waits (``strict`` raises)."""
        m = self.moments_
        missing = self.classes_[m.rows == 0].tolist()
        if strict and missing:
            raise ValueError(f"every class needs a row with a weight above 0; got none of {missing}")
        if strict and m.rows.sum() < 2:
            raise ValueError(f"at least 2 rows are needed; got {m.rows.sum()}")
        self.class_count_, self.means_ = m.counts, m.means
        for name in ("coef_", "intercept_", "_rule", "shrinkage_", "covariance_", "priors_"):
            self.__dict__.pop(name, None)
        if missing:
            return
        priors = check_priors(self.priors, len(self.classes_))
        degrees = int(m.rows.sum()) - len(self.classes_)
        if shrinkage == 0 and degrees < self.n_features_in_:
            warnings.warn(
                f"{m.rows.sum()} rows of {len(self.classes_)} classes do not determine a covariance of "
                f"{self.n_features_in_} features; use shrinkage='auto'",
                UserWarning,
                stacklevel=3,
            )
        counts = m.counts[:, None, None] if m.per_class else m.counts.sum()
        self.covariance_ = m.scatter / counts
        self.priors_ = m.counts / m.counts.sum() if priors is None else priors
        solve: Any = quadratic_rule if m.per_class else linear_rule
        self._rule: LinearRule | QuadraticRule = solve(m, shrinkage, float(self.ridge), priors)
        self.shrinkage_ = self._rule.shrinkage
        if isinstance(self._rule, LinearRule):
            self.coef_, self.intercept_ = self._rule.article()

    def _scores(self, X: Any) -> tuple[Any, Array]:
        check_is_fitted(self, "moments_")
        if not hasattr(self, "_rule"):
            missing = self.classes_[self.moments_.rows == 0].tolist()
            raise NotFittedError(f"every class needs a row before the first prediction; got none of {missing} so far")
        X = validate_data(self, X, accept_sparse="csr", dtype=[np.float64, np.float32], reset=False)
        return X, self._rule.scores(X)

    def decision_function(self, X: Any) -> Array:
        """Logits.

        Args:
            X: (N, D).

        Returns:
            ``X @ coef_.T + intercept_``, (N, C); for two classes the log-odds of ``classes_[1]``, (N,). With
            "per_class" log p(k) + log p(x | k) up to what all classes share.
        """
        X, scores = self._scores(X)
        if scores.shape[1] == 2:
            return scores[:, 1] - scores[:, 0]
        if isinstance(self._rule, LinearRule):
            scores += (X @ self._rule.common - 0.5 * self._rule.common @ self._rule.centre)[:, None]
        return scores

    def predict(self, X: Any) -> NDArray[Any]:
        """The most probable class of each row of X (N, D), (N,)."""
        scores = self._scores(X)[1]
        return self.classes_[scores.argmax(1)]

    def predict_log_proba(self, X: Any) -> Array:
        """Logarithm of the probability of each class for X (N, D), (N, C)."""
        scores = self._scores(X)[1]
        scores -= scores.max(1, keepdims=True)
        return scores - np.log(np.exp(scores).sum(1, keepdims=True))

    def predict_proba(self, X: Any) -> Array:
        """Probability of each class for X (N, D), (N, C)."""
        scores = self._scores(X)[1]
        p = np.exp(scores - scores.max(1, keepdims=True))
        return p / p.sum(1, keepdims=True)

    def to_linear(self, dtype: Any = None) -> nn.Linear:
        """The model as a torch ``nn.Linear`` from D features to the logits (to 1 log-odds for two classes).

        Args:
            dtype: Of the layer; torch's default dtype by default.

        Raises:
            ValueError: ``covariance="per_class"``, whose scores are not linear; weights beyond the range of ``dtype``.
        """
        import torch
        from torch import nn

        from kexue.stats.analytic_head import set_linear

        check_is_fitted(self, "moments_")
        if not hasattr(self, "coef_"):
            raise ValueError("a linear layer needs linear scores (covariance='shared') of all classes")
        head = nn.utils.skip_init(
            nn.Linear, self.n_features_in_, len(self.coef_), dtype=dtype or torch.get_default_dtype()
        )
        set_linear(head, self.coef_, self.intercept_)
        return head
