"""Closed-form logistic regression: values, streaming, degenerate and hostile data, bad input."""

import pickle
import subprocess
import sys
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csc_matrix, csr_matrix, random_array
from sklearn.base import clone
from sklearn.covariance import oas
from sklearn.datasets import load_breast_cancer, load_digits, load_wine
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis, QuadraticDiscriminantAnalysis
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import check_estimator

from kexue.stats import AnalyticLogisticRegression, AnalyticLogisticRegressionCV
from reference import analytic_logistic_regression as reference

PLAIN = {"shrinkage": 0.0, "ridge": 0.0}


def data(n=120, d=4, classes=3, seed=0, dtype=np.float64, offset=0.0):
    rng = np.random.default_rng(seed)
    y = rng.permutation(np.arange(n) % classes)
    mix = rng.normal(size=(d, d))
    return ((rng.normal(size=(n, d)) + 1.5 * rng.normal(size=(classes, d))[y]) @ mix + offset).astype(dtype), y


def same(a, b, rtol=1e-9):
    np.testing.assert_allclose(a.coef_, b.coef_, rtol=rtol, atol=rtol * np.abs(b.coef_).max())
    np.testing.assert_allclose(a.intercept_, b.intercept_, rtol=rtol, atol=rtol * np.abs(b.intercept_).max())


@pytest.mark.parametrize("classes", [2, 3, 7])
@pytest.mark.parametrize(("shrinkage", "ridge"), [(0.0, 0.0), (0.3, 1e-3), (1.0, 0.0), ("auto", 1e-6)])
def test_weights_are_those_of_the_reference(classes, shrinkage, ridge):
    X, y = data(classes=classes, offset=2.0)
    model = AnalyticLogisticRegression(shrinkage=shrinkage, ridge=ridge).fit(X, y)
    W, b, s = reference.linear(X, y, shrinkage=shrinkage, ridge=ridge)
    if classes == 2:
        W, b = W[1:] - W[:1], b[1:] - b[:1]
    np.testing.assert_allclose(model.coef_, W, rtol=1e-8, atol=1e-8)
    np.testing.assert_allclose(model.intercept_, b, rtol=1e-8, atol=1e-8)
    assert model.shrinkage_ == pytest.approx(s)
    logits = X @ model.coef_.T + model.intercept_
    np.testing.assert_allclose(model.decision_function(X), logits[:, 0] if classes == 2 else logits, atol=1e-8)
    scores = np.concatenate([np.zeros_like(logits), logits], 1) if classes == 2 else logits
    np.testing.assert_allclose(model.predict_proba(X), reference.softmax(scores), atol=1e-9)
    np.testing.assert_allclose(np.exp(model.predict_log_proba(X)), model.predict_proba(X), atol=1e-12)
    assert (model.predict(X) == scores.argmax(1)).all()


def test_plain_form_is_the_articles_law_of_total_covariance():
    X, y = data()
    model = AnalyticLogisticRegression(**PLAIN).fit(X, y)
    W, p = reference.article(X, y)
    np.testing.assert_allclose(model.coef_, W, rtol=1e-9)
    np.testing.assert_allclose(model.priors_, p)
    _, means, covariances = reference.moments(X, y, range(3))
    np.testing.assert_allclose(model.means_, means)
    np.testing.assert_allclose(model.covariance_, np.tensordot(p, covariances, 1))


def test_total_covariance_would_shrink_the_binary_direction():
    X, y = data(classes=2)
    w = AnalyticLogisticRegression(**PLAIN).fit(X, y).coef_[0]
    p, delta = np.bincount(y) / len(y), X[y == 1].mean(0) - X[y == 0].mean(0)
    wrong = np.linalg.solve(np.cov(X.T, ddof=0), delta)
    np.testing.assert_allclose(wrong, w / (1 + p[0] * p[1] * delta @ w), rtol=1e-9)


def test_agrees_with_scikit_learns_lda_up_to_a_common_vector():
    X, y = data()
    mine = AnalyticLogisticRegression(**PLAIN).fit(X, y)
    lda = LinearDiscriminantAnalysis(solver="lsqr").fit(X, y)
    np.testing.assert_allclose(mine.coef_ - mine.coef_[0], lda.coef_ - lda.coef_[0], rtol=1e-7, atol=1e-9)
    np.testing.assert_allclose(mine.predict_proba(X), lda.predict_proba(X), atol=1e-9)


def test_per_class_is_the_reference_and_scikit_learns_qda():
    X, y = data(n=150)
    model = AnalyticLogisticRegression(covariance="per_class", **PLAIN).fit(X, y)
    np.testing.assert_allclose(
        model.predict_proba(X), reference.softmax(reference.quadratic_scores(X, X, y)), atol=1e-9
    )
    peer = QuadraticDiscriminantAnalysis().fit(X, y)  # divides by N_k - 1
    assert np.abs(model.predict_proba(X) - peer.predict_proba(X)).max() < 0.1
    shrunk = AnalyticLogisticRegression(covariance="per_class", shrinkage=0.4, ridge=1e-3).fit(X, y)
    expected = reference.quadratic_scores(X, X[:20], y, shrinkage=0.4, ridge=1e-3)
    np.testing.assert_allclose(shrunk.predict_proba(X[:20]), reference.softmax(expected), atol=1e-9)
    assert shrunk.shrinkage_.tolist() == [0.4] * 3
    assert not hasattr(shrunk, "coef_")


def test_auto_shrinkage_is_scikit_learns_oas_of_the_scaled_residuals():
    X, y = load_digits(return_X_y=True)
    X, y = X[:200], y[:200]
    model = AnalyticLogisticRegression().fit(X, y)
    residuals = X - model.means_[y]
    varying = residuals.std(0) > 0
    expected = oas(residuals[:, varying] / residuals[:, varying].std(0), assume_centered=True)[1]
    assert model.shrinkage_ == pytest.approx(expected)


@pytest.mark.parametrize("covariance", ["shared", "per_class"])
def test_stream_merge_and_forget_equal_one_fit(covariance):
    X, y = data(n=200, offset=50.0)
    w = np.random.default_rng(1).integers(0, 3, 200).astype(float)
    settings = {"covariance": covariance}
    whole = AnalyticLogisticRegression(**settings).fit(X, y, w)
    stream = AnalyticLogisticRegression(**settings)
    for rows in np.array_split(np.arange(200), [1, 7, 90]):
        stream.partial_fit(X[rows], y[rows], classes=[0, 1, 2], sample_weight=w[rows])
    left = AnalyticLogisticRegression(**settings).fit(X[:80], y[:80], w[:80])
    merged = left.merge(AnalyticLogisticRegression(**settings).fit(X[80:], y[80:], w[80:]))
    extra, labels = data(n=60, seed=5, offset=40.0)
    rows, weights = np.concatenate([X, extra]), np.append(w, np.ones(60))
    longer = AnalyticLogisticRegression(**settings).fit(rows, np.append(y, labels), weights)
    forgot = longer.forget(extra, labels)
    for model in (stream, merged, forgot):
        np.testing.assert_allclose(model.predict_proba(X), whole.predict_proba(X), atol=1e-8)
        np.testing.assert_allclose(model.class_count_, whole.class_count_)
        np.testing.assert_allclose(model.moments_.scatter, whole.moments_.scatter, rtol=1e-9, atol=1e-7)


def test_rows_that_never_came_cannot_be_forgotten():
    with pytest.raises(ValueError, match="whose squares exceed the fitted ones"):
        AnalyticLogisticRegression().fit(*data()).forget(100 * data()[0][:40], data()[1][:40])


def test_merge_joins_different_classes_and_leaves_the_other_alone():
    X, y = data(classes=4)
    first = y < 3
    a = AnalyticLogisticRegression().fit(X[first], y[first])
    b = AnalyticLogisticRegression().partial_fit(X[~first], y[~first], classes=[1, 3])
    before = pickle.dumps(b.moments_)
    same(a.merge(b), AnalyticLogisticRegression().fit(X, y))
    assert pickle.dumps(b.moments_) == before
    assert a.classes_.tolist() == [0, 1, 2, 3]


def test_stream_waits_for_every_class():
    X, y = data()
    model = AnalyticLogisticRegression().partial_fit(X[y < 2], y[y < 2], classes=[0, 1, 2])
    with pytest.raises(NotFittedError, match=r"none of \[2\]"):
        model.predict(X)
    model.partial_fit(X[y == 2], y[y == 2])
    same(model, AnalyticLogisticRegression().fit(X, y))
    model.forget(X[y == 2], y[y == 2])
    assert not hasattr(model, "coef_")


@pytest.mark.parametrize("polish", [0, 2])
def test_weights_are_repetitions_and_zero_is_absence(polish):
    X, y = data()
    w = np.random.default_rng(2).integers(0, 4, len(y))
    weighted = AnalyticLogisticRegression(polish=polish).fit(X, y, w)
    repeated = AnalyticLogisticRegression(polish=polish).fit(np.repeat(X, w, 0), np.repeat(y, w))
    same(weighted, repeated, 1e-7)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("factor", [1e-100, 1e-43, 1e-35, 1e35])
def test_only_ratios_of_weights_matter(dtype, factor):
    X, y = data(dtype=dtype, offset=5.0)
    w = np.random.default_rng(2).random(len(y))
    expected = AnalyticLogisticRegression(shrinkage=0.1).fit(X, y, w).predict_proba(X)
    got = AnalyticLogisticRegression(shrinkage=0.1).fit(X, y, factor * w).predict_proba(X)
    np.testing.assert_allclose(got, expected, atol=1e-5)


@pytest.mark.parametrize("density", [0.02, 0.5])
@pytest.mark.parametrize("settings", [{}, {"covariance": "per_class"}, {"polish": 2}])
def test_sparse_equals_dense(density, settings):
    X = random_array((300, 12), density=density, rng=np.random.default_rng(0), format="csr")
    y = np.arange(300) % 3
    w = np.random.default_rng(1).random(300)
    for form in (csr_matrix(X), csc_matrix(X), X):
        sparse = AnalyticLogisticRegression(**settings).fit(form, y, w)
        dense = AnalyticLogisticRegression(**settings).fit(X.toarray(), y, w)
        np.testing.assert_allclose(sparse.predict_proba(form), dense.predict_proba(X.toarray()), atol=1e-7)


def test_many_blocks_and_late_classes(monkeypatch):
    monkeypatch.setattr("kexue.stats._moments.BLOCK_BYTES", 1)
    X, y = data(n=3000, offset=1e3)
    order = np.argsort(y, kind="stable")  # class 2 appears in the last blocks only
    W, _, _ = reference.linear(X, y)
    got = AnalyticLogisticRegression(**PLAIN).fit(X[order], y[order]).coef_
    np.testing.assert_allclose(got - got[0], W - W[0], rtol=1e-6)


def test_float32_is_close_to_float64_far_from_the_origin_and_far_between_classes():
    X, y = data(n=4000, d=6)
    X = (X + 1000.0 + 500.0 * y[:, None]).astype(np.float32)
    low = AnalyticLogisticRegression(**PLAIN).fit(X, y)
    high = AnalyticLogisticRegression(**PLAIN).fit(X.astype(np.float64), y)
    np.testing.assert_allclose(low.covariance_, high.covariance_, rtol=1e-4, atol=1e-4 * np.abs(high.covariance_).max())
    assert low.coef_.dtype == np.float64
    assert (low.predict(X) == high.predict(X)).all()


def test_probabilities_survive_means_far_above_the_spread():
    X, y = data()
    near = AnalyticLogisticRegression().fit(X, y).predict_proba(X)
    far = AnalyticLogisticRegression().fit(X + 1e8, y).predict_proba(X + 1e8)
    np.testing.assert_allclose(far, near, atol=1e-5)


@pytest.mark.parametrize("factor", [1e-25, 1e30])
@pytest.mark.parametrize("covariance", ["shared", "per_class"])
def test_float32_whose_squares_leave_its_range(covariance, factor):
    X, y = data(n=60, dtype=np.float32)
    moved = np.insert(X * np.float32(factor), 2, 7.0, axis=1)  # and a constant feature
    got = AnalyticLogisticRegression(covariance=covariance).fit(moved, y)
    expected = AnalyticLogisticRegression(covariance=covariance).fit(X, y)
    np.testing.assert_allclose(got.predict_proba(moved), expected.predict_proba(X), atol=1e-4)


@pytest.mark.parametrize("covariance", ["shared", "per_class"])
def test_rows_far_away_have_probabilities(covariance):
    X, y = data()
    model = AnalyticLogisticRegression(covariance=covariance).fit(X, y)
    for far in (1e6, 1e200):
        logs = model.predict_log_proba(X[:9] * far)
        assert np.isfinite(logs).all()
        np.testing.assert_allclose(np.exp(logs).sum(1), 1.0)
        assert (model.predict(X[:9] * far) == logs.argmax(1)).all()


@settings(max_examples=25, deadline=None)
@given(scale=st.lists(st.floats(-8, 8), min_size=4, max_size=4), shift=st.floats(-100, 100), seed=st.integers(0, 9))
def test_units_do_not_matter(scale, shift, seed):
    X, y = data(n=40, seed=seed)
    factor = 10.0 ** np.array(scale)
    expected = AnalyticLogisticRegression().fit(X, y).predict_proba(X)
    moved = (X + shift) * factor
    np.testing.assert_allclose(AnalyticLogisticRegression().fit(moved, y).predict_proba(moved), expected, atol=1e-7)


@pytest.mark.parametrize("covariance", ["shared", "per_class"])
def test_constant_features_get_weight_0(covariance):
    X, y = data()
    wide = np.insert(X, [0, 2], [[0.1, 1e9]], axis=1)
    model = AnalyticLogisticRegression(covariance=covariance).fit(wide, y)
    narrow = AnalyticLogisticRegression(covariance=covariance).fit(X, y)
    np.testing.assert_allclose(model.predict_proba(wide), narrow.predict_proba(X), atol=1e-12)
    if covariance == "shared":
        assert (model.coef_[:, [0, 3]] == 0).all()
        nothing = AnalyticLogisticRegression().fit(np.ones((5, 2)), [0, 0, 1, 2, 2])
        np.testing.assert_allclose(nothing.predict_proba(np.zeros((1, 2))), [[0.4, 0.2, 0.4]])


def test_constant_features_stay_constant_through_merge_and_forget():
    X, y = data()
    X[:, 1] = 0.1
    model = AnalyticLogisticRegression().fit(X[:70], y[:70])
    model.merge(AnalyticLogisticRegression().fit(X[70:], y[70:])).forget(X[30:50], y[30:50])
    assert (model.coef_[:, 1] == 0).all()


def test_a_feature_that_is_constant_within_classes_decides_with_a_warning():
    y = np.arange(20) % 2
    X = np.stack([y.astype(float), np.random.default_rng(0).normal(size=20)], 1)
    with pytest.warns(UserWarning, match="constant in every class"):
        model = AnalyticLogisticRegression().fit(X, y)
    assert np.isfinite(model.coef_).all()
    assert (model.predict(X) == y).all()


@pytest.mark.parametrize("covariance", ["shared", "per_class"])
def test_singular_covariance_warns_and_predicts(covariance):
    X, y = data()
    twice = np.concatenate([X, X[:, :1]], 1)
    with pytest.warns(UserWarning, match="singular"):
        model = AnalyticLogisticRegression(covariance=covariance, **PLAIN).fit(twice, y)
    expected = AnalyticLogisticRegression(covariance=covariance, **PLAIN).fit(X, y).predict_proba(X)
    np.testing.assert_allclose(model.predict_proba(twice), expected, atol=1e-6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        AnalyticLogisticRegression(covariance=covariance).fit(twice, y)


def test_fewer_rows_than_features_need_shrinkage():
    X, y = data(n=12, d=30)
    with pytest.warns(UserWarning, match="do not determine a covariance of 30 features"):
        AnalyticLogisticRegression(shrinkage=0.0).fit(X, y)
    model = AnalyticLogisticRegression().fit(X, y)
    assert 0 < model.shrinkage_ <= 1
    assert (model.predict(X) == y).all()


@pytest.mark.parametrize("covariance", ["shared", "per_class"])
def test_one_row_for_each_class(covariance):
    X = np.array([[0.0, 0.0], [1.0, 1.0], [5.0, 0.0]])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AnalyticLogisticRegression(covariance=covariance).fit(X, ["a", "b", "c"])
    assert model.predict(X + 0.01).tolist() == ["a", "b", "c"]
    assert np.isfinite(model.predict_proba(X)).all()


def test_priors_move_the_intercepts_only():
    X, y = data()
    prior = np.array([0.5, 0.3, 0.2])
    model, plain = AnalyticLogisticRegression(priors=prior).fit(X, y), AnalyticLogisticRegression().fit(X, y)
    np.testing.assert_allclose(model.coef_, plain.coef_)
    np.testing.assert_allclose(model.intercept_ - plain.intercept_, np.log(prior) - np.log(1 / 3), atol=1e-12)
    assert model.priors_.tolist() == prior.tolist()


@pytest.mark.parametrize("load", [load_wine, load_breast_cancer])
def test_polish_goes_to_the_penalised_logistic_regression(load):
    X, y = load(return_X_y=True)
    residual = X - np.stack([X[y == k].mean(0) for k in np.unique(y)])[y]
    scaled = (X - X.mean(0)) / residual.std(0)
    peer = LogisticRegression(C=1.0, tol=1e-10, max_iter=10_000).fit(scaled, y)
    gaps = []
    for steps in (0, 1, 3, 10):
        model = AnalyticLogisticRegression(shrinkage=0.0, polish=steps).fit(X, y)
        gaps.append(np.abs(model.predict_proba(X) - peer.predict_proba(scaled)).max())
    assert gaps[3] < 1e-3 < gaps[0]
    assert gaps[2] < gaps[0]


@pytest.mark.parametrize("shrinkage", [0.0, "auto", 1.0])
def test_polish_starts_well_where_the_closed_form_is_certain(shrinkage):
    X, y = data(n=200, d=6)
    X += 50 * np.eye(6)[y]  # all probabilities are 0 or 1: only the penalty has a curvature there
    residual = X - np.stack([X[y == k].mean(0) for k in range(3)])[y]
    scaled = (X - X.mean(0)) / residual.std(0)
    peer = LogisticRegression(C=1.0, tol=1e-10, max_iter=10_000).fit(scaled, y)
    for steps, gap in ((1, 0.05), (10, 1e-3)):
        model = AnalyticLogisticRegression(shrinkage=shrinkage, polish=steps).fit(X, y)
        assert model.score(X, y) == 1
        assert np.abs(model.predict_proba(X) - peer.predict_proba(scaled)).max() < gap


def test_polish_calms_probabilities_on_digits():
    X, y = load_digits(return_X_y=True)
    losses = []
    for steps in (0, 1, 3):
        model = AnalyticLogisticRegression(polish=steps).fit(X[:1200], y[:1200])
        losses.append(log_loss(y[1200:], model.predict_proba(X[1200:])))
    assert losses[2] < losses[1] < 0.75 * losses[0]


def test_few_rows_tie_with_a_converged_logistic_regression_when_shrunk():
    X, y = load_digits(return_X_y=True)
    mine, peer = [], []
    for seed in range(3):
        order = np.random.default_rng(seed).permutation(len(y))
        train, test = order[:100], order[-540:]
        scaler = StandardScaler().fit(X[train])
        mine.append(AnalyticLogisticRegression().fit(X[train], y[train]).score(X[test], y[test]))
        model = LogisticRegression(max_iter=1000).fit(scaler.transform(X[train]), y[train])
        peer.append(model.score(scaler.transform(X[test]), y[test]))
    assert np.mean(mine) > np.mean(peer) - 0.03


@pytest.mark.slow
@pytest.mark.parametrize(
    "model",
    [
        AnalyticLogisticRegression(),
        AnalyticLogisticRegression(covariance="per_class"),
        AnalyticLogisticRegression(polish=2),
        AnalyticLogisticRegressionCV(shrinkages=3),
    ],
    ids=["shared", "per_class", "polish", "cv"],
)
def test_scikit_learns_checks_pass(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        results = check_estimator(model, on_skip=None)
    assert len(results) > 40


@pytest.mark.parametrize(
    "labels",
    [
        np.array([-128, -25, 2, 100], np.int8),
        np.array([0, 9, 200, 255], np.uint8),
        np.array([2**63 + 1, 2**63 + 2, 2**63 + 7, 2**64 - 1], np.uint64),
        np.array([2**63 + 1, 2**63 + 2, 2**63 + 7, 2**63 + 9], np.uint64),
        np.array([-(2**63), -(2**63) + 5, -(2**63) + 6, -(2**63) + 9]),
        np.array([-(2**40), -3, 5, 2**40]),
        np.array(["a", "b", "c", "d"], object),
    ],
    ids=lambda labels: f"{labels.dtype}{labels[-1]}",
)
def test_labels_of_any_kind_come_back(labels):
    X, y = data(classes=4)
    model, plain = AnalyticLogisticRegression().fit(X, labels[y]), AnalyticLogisticRegression().fit(X, y)
    same(model, plain)
    assert model.classes_.dtype == labels.dtype
    assert (model.predict(X) == labels[plain.predict(X)]).all()


def test_inputs_stay_as_they_were_and_models_pickle():
    X, y = data()
    w = np.ones(len(y))
    copies = X.copy(), y.copy(), w.copy()
    model = AnalyticLogisticRegression(polish=1).fit(X, y, w)
    model.predict_proba(X)
    for now, before in zip((X, y, w), copies, strict=True):
        np.testing.assert_array_equal(now, before)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(model)).predict_proba(X), model.predict_proba(X))
    assert clone(model).get_params() == model.get_params()
    same(AnalyticLogisticRegression(polish=1).fit(np.asfortranarray(X), y, w), model)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"shrinkage": 1.5}, "1.5"),
        ({"shrinkage": -0.1}, "-0.1"),
        ({"shrinkage": "lw"}, "'auto'; got 'lw'"),
        ({"shrinkage": float("nan")}, "nan"),
        ({"ridge": -1.0}, "-1"),
        ({"covariance": "full"}, "'per_class'; got 'full'"),
        ({"polish": -1}, "-1"),
        ({"polish": 11}, "11"),
        ({"polish": 1, "covariance": "per_class"}, "per_class"),
        ({"priors": [0.5, 0.5]}, r"3 classes; got shape \(2,\)"),
        ({"priors": [0.5, 0.6, 0.2]}, "sum to 1"),
        ({"priors": [0.5, 0.5, 0.0]}, "above 0"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        AnalyticLogisticRegression(**arguments).fit(*data())


@pytest.mark.parametrize("arguments", [{"shrinkage": None}, {"polish": 1.5}, {"ridge": "a"}, {"priors": "abc"}])
def test_wrong_kinds_are_type_errors(arguments):
    with pytest.raises(TypeError):
        AnalyticLogisticRegression(**arguments).fit(*data())


def test_bad_data_are_named():
    X, y = data()
    fresh = AnalyticLogisticRegression
    for bad in (np.nan, np.inf):
        broken = X.copy()
        broken[3, 1] = bad
        with pytest.raises(ValueError, match="NaN|infinity"):
            fresh().fit(broken, y)
    with pytest.raises(ValueError, match="must not exceed float64; got values up to"):
        fresh().fit(X * 1e200, y)
    with pytest.raises(ValueError, match="one class"):
        fresh().fit(X, np.zeros(len(y)))
    with pytest.raises(ValueError, match="one class"):
        fresh().fit(X[:1], y[:1])
    with pytest.raises(ValueError, match="[Nn]egative"):
        fresh().fit(X, y, np.where(np.arange(len(y)) == 5, -1.0, 1.0))
    with pytest.raises(ValueError, match=r"none of \[2\]"):
        fresh().fit(X, y, (y < 2).astype(float))
    with pytest.raises(ValueError, match="classes; got None"):
        fresh().partial_fit(X, y)
    with pytest.raises(ValueError, match=r"among the classes \[0, 1\]; got \[2\]"):
        fresh().partial_fit(X, y, classes=[0, 1])
    model = fresh().fit(X, y)
    with pytest.raises(ValueError, match=r"must stay \[0, 1, 2\]; got \[0, 1\]"):
        model.partial_fit(X, y, classes=[0, 1])
    with pytest.raises(ValueError, match="only rows that were fitted"):
        model.forget(np.concatenate([X, X]), np.concatenate([y, y]))
    with pytest.raises(ValueError, match="4 features; got 3"):
        model.merge(fresh().fit(X[:, :3], y))
    with pytest.raises(ValueError, match="per_class"):
        model.merge(fresh(covariance="per_class").fit(X, y))
    with pytest.raises(TypeError, match="got int"):
        model.merge(3)
    with pytest.raises(TypeError, match=r"labels like \[0, 1, 2\]; got \['a', 'b', 'c'\]"):
        model.merge(fresh().fit(X, np.array(["a", "b", "c"])[y]))
    with np.errstate(all="ignore"), pytest.raises(ValueError, match="too far from the others"):
        model.partial_fit(1e200 * X[:1], y[:1])
    model.set_params(priors=[0.5, 0.5])
    for method in (model.partial_fit, model.forget):
        with pytest.raises(ValueError, match="3 classes"):
            method(X[:9], y[:9])
    assert model.moments_.rows.sum() == len(y)
    same(model, fresh().fit(X, y))  # nothing of what failed was kept
    with pytest.raises(AttributeError):
        fresh(polish=1).partial_fit  # noqa: B018
    with pytest.raises(NotFittedError):
        fresh().merge(model)


def test_the_room_does_not_bring_scikit_learn():
    code = "import sys, kexue.stats; print('sklearn' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "False"
