"""Closed-form logistic regression and softmax classifier (有解析解的逻辑回归).

Source: 科学空间 8578 (概率视角下的线性模型:逻辑回归有解析解吗?); code bojone/analytical-classification

If x | class k is N(mu_k, Sigma), with one Sigma as a linear model implies, then the logits are

    x w_k^T + b_k,    w_k = mu_k Sigma^-1,    b_k = log p_k - 1/2 mu_k Sigma^-1 mu_k^T,

with p_k the class frequencies, mu_k the class means and Sigma the covariance within classes (each divided by N). Two
classes give w = (mu_1 - mu_0) Sigma^-1. This is linear discriminant analysis read as a way to fit a logistic model;
scikit-learn's LDA(solver="lsqr") has the same weights up to a vector that is common to all classes.

What we do differently, and why: Sigma is summed from rows shifted by the mean of their class instead of by subtracting
large matrices (see ``_moments``), it is shrunk on the correlation scale so that few rows and any units work, and the
moments are kept, so that models can be updated, merged and cross-validated without a second pass. The author's code
whitens with the covariance that divides by N - 1 and goes on with the formula for N; we divide by N throughout.
"""

from __future__ import annotations

from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.utils.metaestimators import available_if
from sklearn.utils.validation import check_is_fitted

from kexue._checks import check_choice, check_int, check_real
from kexue.stats._class_rule import LinearRule, check_regularisation, linear_path, quadratic_path, row_blocks
from kexue.stats._closed_form import COVARIANCES, ClosedForm, check_priors, class_places, encode, finite_moments
from kexue.stats._folds import held_out
from kexue.stats._moments import Array, Moments
from kexue.stats._newton import newton

__all__ = ["AnalyticLogisticRegression", "AnalyticLogisticRegressionCV"]

SCORINGS = ("accuracy", "log_loss")


def _streams(model: Any) -> bool:
    """Whether moments are all that the model needs."""
    if model.polish:
        raise AttributeError(f"polish needs all rows at once, in fit; got polish={model.polish!r}")
    return True


class AnalyticLogisticRegression(ClosedForm):
    """Softmax classifier from class means and one covariance: no optimiser, one pass over the data.

    Args:
        shrinkage: Share s of the diagonal in (1 - s) R + s I, R the correlations within classes; "auto" is the oracle
            approximating shrinkage of Chen et al. (2010), or a number in [0, 1]. 0 with ``ridge=0`` is the plain form.
        covariance: "shared" gives linear scores; "per_class" gives each class its covariance and quadratic scores.
        priors: Probability of each class for the intercepts, (C,), in the order of ``classes_``; None takes the
            frequencies.
        polish: Newton steps on the cross-entropy after the closed form, whose logits get a temperature first (with the
            penalty of LogisticRegression(C=1) on scaled features), 0 to 10; with "shared" only. 1 to 3 repair data
            that are far from normal. They need all rows at once: ``partial_fit``, ``merge`` and ``forget`` exist for
            0 only.
        ridge: Added to the diagonal, relative to the mean variance, which the scaling of each feature by its deviation
            within classes makes 1; not negative.

    Attributes:
        classes_: Labels in order, (C,).
        coef_, intercept_: Weights in the article's form, (C, D) and (C,); two classes have (1, D) and (1,). Only for
            "shared".
        shrinkage_: The s that was used; (C,) for "per_class".
        means_: Mean of each class, (C, D).
        covariance_: Covariance within classes before shrinkage, (D, D), or of each class, (C, D, D).
        priors_: Probability of each class, (C,).
        class_count_: Sum of the weights of each class, (C,).
        moments_: All that was kept of the data.
        n_features_in_: D.

    Features without variance get the weight 0. Sample weights count as repetitions of a row. Memory beside the data:
    D x D numbers in float64 (C times for "per_class").

    Raises:
        ValueError: In ``fit``: one class, fewer than 2 rows, NaN or infinity, negative weights, a class whose weights
            are all 0, arguments out of range.

    Reference:
        Scientific Spaces, article 8578.

    Example:
        >>> import numpy as np
        >>> X, y = np.array([[0.0, 1.0], [1.0, 0.0], [4.0, 5.0], [5.0, 4.5]]), np.array(["a", "a", "b", "b"])
        >>> model = AnalyticLogisticRegression(shrinkage=0.5).fit(X, y)
        >>> model.predict([[0.0, 0.0], [5.0, 5.0]]).tolist(), model.coef_.shape
        (['a', 'b'], (1, 2))
        >>> stream = AnalyticLogisticRegression(shrinkage=0.5)
        >>> for rows in (slice(0, 3), slice(3, 4)):
        ...     _ = stream.partial_fit(X[rows], y[rows], classes=["a", "b"])
        >>> bool(np.allclose(stream.coef_, model.coef_))
        True
    """

    def __init__(
        self,
        shrinkage: str | float = "auto",
        covariance: str = "shared",
        priors: ArrayLike | None = None,
        polish: int = 0,
        ridge: float = 1e-6,
    ) -> None:
        self.shrinkage = shrinkage
        self.covariance = covariance
        self.priors = priors
        self.polish = polish
        self.ridge = ridge

    def _check_params(self) -> None:
        check_regularisation(self.shrinkage, self.ridge)
        check_choice("covariance", self.covariance, COVARIANCES)
        check_int("polish", self.polish, 0)
        if self.polish > 10:
            raise ValueError(f"polish must be at most 10 steps; got {self.polish}")
        if self.polish and self.covariance != "shared":
            raise ValueError("polish needs linear scores, covariance='shared'; got covariance='per_class'")

    def fit(self, X: Any, y: ArrayLike, sample_weight: ArrayLike | None = None) -> Self:
        """Fit from scratch.

        Args:
            X: (N, D), N at least 2, dense or sparse; float32 is multiplied in float32 and summed in float64.
            y: Labels, (N,).
            sample_weight: (N,), not negative; None weighs each row 1.
        """
        self._check_params()
        X, y, weight = self._data(X, y, sample_weight, reset=True)
        self.classes_, places = encode(y)
        if len(self.classes_) < 2:
            raise ValueError(f"a classifier needs at least 2 classes; got one class: {self.classes_.tolist()}")
        self.moments_ = finite_moments(X, places, len(self.classes_), weight, self.covariance == "per_class")
        self._solve(self.shrinkage, strict=True)
        if self.polish and isinstance(self._rule, LinearRule):
            self._rule = newton(self._rule, X, places, weight, self.moments_, int(self.polish))
            self.coef_, self.intercept_ = self._rule.article()
        return self

    @available_if(_streams)
    def partial_fit(
        self, X: Any, y: ArrayLike, classes: ArrayLike | None = None, sample_weight: ArrayLike | None = None
    ) -> Self:
        """Take in further rows; the result is that of one ``fit`` on all of them, up to rounding.

        Args:
            X: (N, D), N at least 1.
            y: Labels, (N,).
            classes: All labels that will come; needed in the first call.
            sample_weight: (N,), not negative.

        Raises:
            ValueError: The first call has no ``classes``, a later one has others; a label that is not among them.
        """
        self._check_params()
        first = not hasattr(self, "moments_")
        if first and classes is None:
            raise ValueError("the first call of partial_fit needs classes; got None")
        X, y, weight = self._data(X, y, sample_weight, reset=first)
        if classes is not None:
            known = np.unique(np.asarray(classes))
            if len(known) < 2:
                raise ValueError(f"classes must have at least 2 labels; got one class: {known.tolist()}")
            if not first and not np.array_equal(known, self.classes_):
                raise ValueError(f"classes must stay {self.classes_.tolist()}; got {known.tolist()}")
        else:
            known = self.classes_
        per_class = self.covariance == "per_class"
        if not first and per_class != self.moments_.per_class:
            raise ValueError(f"covariance must stay as it was in the first call; got {self.covariance!r}")
        part = finite_moments(X, class_places(y, known), len(known), weight, per_class)
        return self._update(part if first else self.moments_ + part, known)

    @available_if(_streams)
    def forget(self, X: Any, y: ArrayLike, sample_weight: ArrayLike | None = None) -> Self:
        """Take rows out that were fitted before, with the weights they had; what remains is as if they never came.

        Args:
            X: (N, D).
            y: Labels, (N,).
            sample_weight: (N,), not negative.

        Raises:
            ValueError: An unknown label, or more rows of a class than were fitted.
        """
        check_is_fitted(self, "moments_")
        self._check_params()
        X, y, weight = self._data(X, y, sample_weight, reset=False)
        known = self.classes_
        gone = finite_moments(X, class_places(y, known), len(known), weight, self.moments_.per_class)
        return self._update(self.moments_ - gone, known)

    @available_if(_streams)
    def merge(self, other: AnalyticLogisticRegression) -> Self:
        """Add what another model has seen; the result is that of one fit on the rows of both, up to rounding.

        Args:
            other: A fitted model with the same features and ``covariance``; its classes are added. It stays as it is.

        Raises:
            TypeError: ``other`` is another kind of object, or one has text as labels and the other numbers.
            ValueError: Other features or another ``covariance``.
        """
        check_is_fitted(self, "moments_")
        if not isinstance(other, AnalyticLogisticRegression):
            raise TypeError(f"other must be an AnalyticLogisticRegression; got {type(other).__name__}")
        check_is_fitted(other, "moments_")
        self._check_params()
        if self.n_features_in_ != other.n_features_in_:
            raise ValueError(f"other must have {self.n_features_in_} features; got {other.n_features_in_}")
        mine, theirs = (getattr(m, "feature_names_in_", None) for m in (self, other))
        if mine is not None and theirs is not None and not np.array_equal(mine, theirs):
            raise ValueError(f"other must have the features {mine.tolist()}; got {theirs.tolist()}")
        if self.moments_.per_class != other.moments_.per_class:
            raise ValueError(f"other must have covariance={self.covariance!r}; got {other.covariance!r}")
        if (self.classes_.dtype.kind in "OSU") != (other.classes_.dtype.kind in "OSU"):
            raise TypeError(f"other must have labels like {self.classes_.tolist()}; got {other.classes_.tolist()}")
        classes = np.union1d(self.classes_, other.classes_)
        parts = [m.moments_.expand(np.searchsorted(classes, m.classes_), len(classes)) for m in (self, other)]
        return self._update(parts[0] + parts[1], classes)

    def _update(self, moments: Moments, classes: NDArray[Any]) -> Self:
        """Take over a new state, unless something is wrong with it."""
        check_priors(self.priors, len(classes))
        if not np.isfinite(moments.scatter).all():
            raise ValueError("the squares of X must not exceed float64; got rows that lie too far from the others")
        self.classes_, self.moments_ = classes, moments
        self._solve(self.shrinkage, strict=False)
        return self


class AnalyticLogisticRegressionCV(ClosedForm):
    """The closed form with the shrinkage chosen by cross-validation, whose folds come from one pass over the data.

    The moments of each fold are summed once; the model of the other folds is that of all rows minus the fold, so that
    every further value of the shrinkage costs a solve and the scores of the held-out rows, and no further fit.

    Args:
        shrinkages: Values of the shrinkage to try, in [0, 1]; a number stands for 0 and values from 1e-6 to 1 in equal
            ratios, so many in all.
        cv: Number of stratified folds, or what scikit-learn takes as ``cv``; every row must be held out once,
            and all others train. Folds by groups: ``GroupKFold().split(X, y, groups)``.
        covariance, priors, ridge: As in :class:`AnalyticLogisticRegression`.
        scoring: "accuracy", or "log_loss" (its negative, so that higher is better).
        score_rows: Held-out rows of each fold that are scored, evenly spaced, when there are more; None for all.

    Attributes:
        shrinkage_: The value with the best mean score, the lowest of equals; further attributes are those of
            :class:`AnalyticLogisticRegression`, from a fit to all rows with it.
        shrinkages_: Values tried, (S,).
        scores_: Score of each value in each fold, (S, folds).
        best_score_: Its best mean over the folds.

    Raises:
        ValueError: As in :class:`AnalyticLogisticRegression`; folds that do not hold out every row once.

    Example:
        >>> import numpy as np
        >>> rng = np.random.default_rng(0)
        >>> y = np.repeat([0, 1, 2], 20)
        >>> X = rng.normal(size=(60, 30)) + 2 * np.eye(30)[y]
        >>> model = AnalyticLogisticRegressionCV(shrinkages=[0.0, 0.3, 1.0]).fit(X, y)
        >>> model.scores_.shape, bool(model.shrinkage_ > 0)
        ((3, 5), True)
    """

    def __init__(
        self,
        shrinkages: int | ArrayLike = 20,
        cv: Any = 5,
        covariance: str = "shared",
        priors: ArrayLike | None = None,
        ridge: float = 1e-6,
        scoring: str = "accuracy",
        score_rows: int | None = 10_000,
    ) -> None:
        self.shrinkages = shrinkages
        self.cv = cv
        self.covariance = covariance
        self.priors = priors
        self.ridge = ridge
        self.scoring = scoring
        self.score_rows = score_rows

    def _grid(self) -> Array:
        if np.ndim(self.shrinkages) == 0:
            check_int("shrinkages", self.shrinkages, 1)
            return np.append(0.0, np.logspace(-6, 0, int(self.shrinkages) - 1))  # type: ignore[arg-type]
        values = list(np.asarray(self.shrinkages).ravel())
        if not values:
            raise ValueError("shrinkages must hold at least one value; got none")
        for value in values:
            check_real("shrinkages", value, minimum=0.0)
            if value > 1:
                raise ValueError(f"shrinkages must be in [0, 1]; got {value}")
        return np.array(values, np.float64)

    def fit(self, X: Any, y: ArrayLike, sample_weight: ArrayLike | None = None) -> Self:
        """Choose the shrinkage and fit to all rows.

        Args:
            X: (N, D), dense or sparse.
            y: Labels, (N,).
            sample_weight: (N,), not negative; it also weighs the scores.
        """
        check_choice("covariance", self.covariance, COVARIANCES)
        check_choice("scoring", self.scoring, SCORINGS)
        check_regularisation(0.0, self.ridge)
        if self.score_rows is not None:
            check_int("score_rows", self.score_rows, 1)
        grid = self._grid()
        X, y, weight = self._data(X, y, sample_weight, reset=True)
        self.classes_, places = encode(y)
        classes = len(self.classes_)
        if classes < 2:
            raise ValueError(f"a classifier needs at least 2 classes; got one class: {self.classes_.tolist()}")
        priors = check_priors(self.priors, classes)
        folds = held_out(self.cv, X, y, places)
        per_class = self.covariance == "per_class"
        parts = [finite_moments(X, places, classes, weight, per_class, test) for test in folds]
        self.moments_ = parts[0]
        for part in parts[1:]:
            self.moments_ = self.moments_ + part
        self.shrinkages_, self.scores_ = grid, np.empty((len(grid), len(parts)))
        for fold, (part, test) in enumerate(zip(parts, folds, strict=True)):
            if weight is not None:
                test = test[weight[test] > 0]
            if self.score_rows is not None and len(test) > self.score_rows:
                test = test[np.linspace(0, len(test) - 1, int(self.score_rows)).astype(np.intp)]
            share = np.ones(len(test)) if weight is None else weight[test]
            self.scores_[:, fold] = self._fold(self.moments_ - part, grid, X[test], places[test], share, priors)
        mean = self.scores_.mean(1)
        best = int(mean.argmax())
        self.best_score_ = float(mean[best])
        self._solve(float(grid[best]), strict=True)
        if per_class:
            self.shrinkage_ = float(grid[best])
        return self

    def _fold(
        self, train: Moments, grid: Array, X: Any, y: NDArray[np.intp], weight: Array, priors: Array | None
    ) -> Array:
        """Score of each shrinkage on the held-out rows."""
        present = np.flatnonzero(train.rows)
        if len(present) < 2:
            raise ValueError(f"each fold must leave rows of at least 2 classes; got {len(present)}")
        if len(y) == 0:
            raise ValueError("each fold must hold out a row with a weight above 0; got a fold without")
        train = train.take(present)
        if priors is not None:
            priors = priors[present] / priors[present].sum()
        path = (quadratic_path if train.per_class else linear_path)(train, grid, float(self.ridge), priors)
        total = np.zeros(len(grid))
        for rows in row_blocks(X, len(grid) * len(present)):
            total += self._goodness(path(X[rows]), present, y[rows]) @ weight[rows]
        return total / weight.sum()

    def _goodness(self, scores: Array, present: NDArray[np.intp], y: NDArray[np.intp]) -> Array:
        """Of each prediction (S, n), from the scores (S, C', n) of the classes ``present``."""
        best = scores.max(1)
        accuracy = self.scoring == "accuracy"
        if accuracy and np.count_nonzero(scores == best[:, None]) > best.size:  # equals: as predict, the first
            return np.asarray(present[scores.argmax(1)] == y, np.float64)
        places = np.searchsorted(present, y)
        places[places == len(present)] = 0
        mine = scores[:, places, np.arange(len(y))]
        mine[:, present[places] != y] = -np.inf
        if accuracy:
            return np.asarray(mine == best, np.float64)
        scores -= best[:, None]
        mine -= best + np.log(np.exp(scores).sum(1))
        return np.maximum(mine, np.log(np.finfo(float).eps))  # as sklearn's log_loss
