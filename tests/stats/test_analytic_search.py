"""Cross-validation of the closed-form logistic regression: folds by subtraction, scores, bad input."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_matrix
from sklearn.metrics import log_loss
from sklearn.model_selection import KFold, StratifiedKFold

from kexue.stats import AnalyticLogisticRegression, AnalyticLogisticRegressionCV
from kexue.stats._folds import held_out
from reference import analytic_logistic_regression as reference


def data(n=120, d=4, classes=3, seed=0, dtype=np.float64, offset=0.0):
    rng = np.random.default_rng(seed)
    y = rng.permutation(np.arange(n) % classes)
    mix = rng.normal(size=(d, d))
    return ((rng.normal(size=(n, d)) + 1.5 * rng.normal(size=(classes, d))[y]) @ mix + offset).astype(dtype), y


def test_folds_by_subtraction_equal_fits_of_their_own():
    X, y = data(n=90, d=6)
    grid = [0.0, 0.2, 1.0]
    model = AnalyticLogisticRegressionCV(grid, cv=3).fit(X, y)
    folds = list(StratifiedKFold(3).split(X, y))
    np.testing.assert_allclose(model.scores_, reference.accuracy_of_folds(X, y, folds, grid, 1e-6))
    assert model.shrinkage_ == grid[int(model.scores_.mean(1).argmax())]
    again = AnalyticLogisticRegression(shrinkage=model.shrinkage_).fit(X, y)
    np.testing.assert_allclose(model.coef_, again.coef_, rtol=1e-9)
    shuffled = StratifiedKFold(4, shuffle=True, random_state=0)
    per_class = AnalyticLogisticRegressionCV(grid, cv=shuffled, covariance="per_class", scoring="log_loss").fit(X, y)
    for j, (train, test) in enumerate(shuffled.split(X, y)):
        single = AnalyticLogisticRegression(shrinkage=0.2, covariance="per_class").fit(X[train], y[train])
        p = single.predict_proba(X[test])[np.arange(len(test)), y[test]]
        assert per_class.scores_[1, j] == pytest.approx(np.log(p).mean())


@pytest.mark.parametrize("covariance", ["shared", "per_class"])
@pytest.mark.parametrize("scoring", ["accuracy", "log_loss"])
@pytest.mark.parametrize("form", [np.asarray, csr_matrix])
def test_weighted_folds_of_any_splitter_equal_fits_of_their_own(covariance, scoring, form):
    X, y = data(n=160, d=5, offset=20.0)
    names, w = np.array(["c", "a", "b"])[y], np.random.default_rng(3).integers(0, 4, 160) / 2
    folds = list(KFold(3, shuffle=True, random_state=1).split(X))
    grid, priors = [0.0, 0.1, 1.0], [0.2, 0.5, 0.3]
    shared = {"covariance": covariance, "priors": priors, "ridge": 1e-3}
    search = AnalyticLogisticRegressionCV(grid, cv=folds, scoring=scoring, **shared).fit(form(X), names, w)
    for j, (train, test) in enumerate(folds):
        for i, s in enumerate(grid):
            model = AnalyticLogisticRegression(s, **shared).fit(X[train], names[train], w[train])
            if scoring == "accuracy":
                expected = model.score(X[test], names[test], w[test])
            else:
                expected = -log_loss(names[test], model.predict_proba(X[test]), sample_weight=w[test])
            assert search.scores_[i, j] == pytest.approx(expected, abs=1e-9)


def test_scores_that_tie_count_as_predict_decides():
    X, y = np.ones((40, 2)), np.arange(40) % 2  # nothing to tell the classes apart
    search = AnalyticLogisticRegressionCV([0.0, 1.0], cv=4).fit(X, y)
    assert (search.predict(X) == 0).all()
    assert (search.scores_ == 0.5).all()


@settings(max_examples=40, deadline=None)
@given(n=st.integers(12, 60), classes=st.integers(2, 4), folds=st.integers(2, 3), seed=st.integers(0, 99))
def test_folds_are_scikit_learns(n, classes, folds, seed):
    y = np.random.default_rng(seed).permutation(np.arange(n) % classes)
    expected = [test for _, test in StratifiedKFold(folds).split(y, y)]
    for mine, theirs in zip(held_out(folds, None, y, y), expected, strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_cross_validation_with_weights_sparse_rows_and_a_rare_class():
    X, y = data(n=91)
    y = np.where(np.arange(91) == 90, 7, y)
    w = np.random.default_rng(0).random(91)
    with pytest.warns(UserWarning, match="least populated class"):
        dense = AnalyticLogisticRegressionCV(5, cv=3).fit(X, y, w)
    with pytest.warns(UserWarning, match="least populated class"):
        sparse = AnalyticLogisticRegressionCV(5, cv=3).fit(csr_matrix(X), y, w)
    np.testing.assert_allclose(sparse.scores_, dense.scores_)
    assert dense.classes_.tolist() == [0, 1, 2, 7]
    thin = AnalyticLogisticRegressionCV(5, cv=3, score_rows=10).fit(X[:90], y[:90])
    np.testing.assert_allclose(thin.scores_ * 10, np.round(thin.scores_ * 10))


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"shrinkages": 0}, ValueError),
        ({"shrinkages": []}, ValueError),
        ({"shrinkages": [0.5, 2.0]}, ValueError),
        ({"shrinkages": "many"}, TypeError),
        ({"cv": 1}, ValueError),
        ({"scoring": "f1"}, ValueError),
        ({"score_rows": 0}, ValueError),
        ({"cv": [(np.arange(60), np.arange(60, 120))]}, ValueError),
    ],
)
def test_bad_arguments_of_the_search_are_errors(arguments, error):
    with pytest.raises(error):
        AnalyticLogisticRegressionCV(**arguments).fit(*data())


def test_splits_may_be_masks_but_train_on_all_other_rows():
    X, y = data(n=60)
    places = np.arange(60) % 3
    masks = [(places != i, places == i) for i in range(3)]
    indices = [tuple(np.flatnonzero(rows) for rows in split) for split in masks]
    mine, theirs = (AnalyticLogisticRegressionCV([0.0, 0.5], cv=cv).fit(X, y) for cv in (masks, indices))
    np.testing.assert_array_equal(mine.scores_, theirs.scores_)
    purged = [(train[::2], test) for train, test in indices]
    with pytest.raises(ValueError, match=r"cv must train on all 40 rows outside a fold; got 20"):
        AnalyticLogisticRegressionCV(cv=purged).fit(X, y)
