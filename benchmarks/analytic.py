"""Closed-form logistic regression against scikit-learn: a million rows, a search for the shrinkage, small data."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import lru_cache

import numpy as np
from sklearn.datasets import load_breast_cancer, load_digits, load_wine
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis, QuadraticDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from benchmarks.harness import Table, compare
from kexue.stats import AnalyticLogisticRegression, AnalyticLogisticRegressionCV

SECTION = "Closed-form logistic regression"
ROWS, WIDTH, CLASSES, PEER_ROWS, SEARCH_ROWS = 1_000_000, 100, 10, 100_000, 10_000


@lru_cache(1)
def ill_conditioned() -> tuple[np.ndarray, np.ndarray]:
    """Covariance of condition 1e6, all means 5, ten classes."""
    rng = np.random.default_rng(0)
    turn = np.linalg.qr(rng.standard_normal((WIDTH, WIDTH)))[0] * np.logspace(0, -3, WIDTH)
    y = rng.integers(0, CLASSES, ROWS)
    means = 0.35 * rng.standard_normal((CLASSES, WIDTH)).astype(np.float32)
    x = rng.standard_normal((ROWS, WIDTH), dtype=np.float32)
    for rows in np.array_split(np.arange(ROWS), 20):
        x[rows] = (x[rows] + means[y[rows]]) @ turn.T.astype(np.float32) + 5
    return x, y


def _accuracy(model: object, rows: int = PEER_ROWS) -> dict[str, str]:
    x, y = ill_conditioned()
    return {"accuracy": f"{(model.predict(x[-rows:]) == y[-rows:]).mean():.3f}"}  # type: ignore[attr-defined]


def million() -> Table:
    x, y = ill_conditioned()
    fitted: dict[str, object] = {}

    def fit(name: str, model: Callable[[], object]) -> Callable[[], None]:
        def run() -> None:
            fitted[name] = model().fit(x, y)  # type: ignore[attr-defined]

        return run

    contenders = {
        "X.T @ X, the bare product": lambda: x.T @ x,
        "AnalyticLogisticRegression": fit("AnalyticLogisticRegression", AnalyticLogisticRegression),
        "AnalyticLogisticRegressionCV, 5 folds, 20 values": fit(
            "AnalyticLogisticRegressionCV, 5 folds, 20 values", AnalyticLogisticRegressionCV
        ),
        "LDA, lsqr": fit("LDA, lsqr", lambda: LinearDiscriminantAnalysis(solver="lsqr")),
    }
    table = compare(
        "A million rows",
        f"{ROWS} x {WIDTH} float32, {CLASSES} classes, covariance of condition 1e6, one thread.",
        contenders,
        peer="X.T @ X, the bare product",
        packages=("numpy", "scikit-learn"),
        repeats=3,
    )
    for row in table.rows:
        row.extra = _accuracy(fitted[row.name]) if row.name in fitted else {}
    return table


def peers() -> Table:
    x, y = ill_conditioned()
    x, y = x[:PEER_ROWS], y[:PEER_ROWS]
    fitted: dict[str, object] = {}
    models: dict[str, Callable[[], object]] = {
        "AnalyticLogisticRegression": AnalyticLogisticRegression,
        "AnalyticLogisticRegression, shrinkage=0": lambda: AnalyticLogisticRegression(shrinkage=0.0),
        "LDA, lsqr": lambda: LinearDiscriminantAnalysis(solver="lsqr"),
        "LDA, svd": LinearDiscriminantAnalysis,
        "LogisticRegression, lbfgs, 100 steps": lambda: LogisticRegression(max_iter=100),
    }

    def fit(name: str) -> Callable[[], None]:
        def run() -> None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                fitted[name] = models[name]().fit(x, y)  # type: ignore[attr-defined]

        return run

    table = compare(
        "Against scikit-learn",
        f"{PEER_ROWS} of these rows, so that the peers take seconds; lbfgs stops before it has converged.",
        {name: fit(name) for name in models},
        peer="LDA, lsqr",
        packages=("scikit-learn",),
        repeats=2,
    )
    for row in table.rows:
        row.extra = _accuracy(fitted[row.name])
    return table


def search() -> Table:
    x, y = ill_conditioned()
    x, y = x[:SEARCH_ROWS], y[:SEARCH_ROWS]
    grid = np.append(0.0, np.logspace(-6, 0, 19))
    lda = GridSearchCV(LinearDiscriminantAnalysis(solver="lsqr"), {"shrinkage": grid}, cv=5)
    qda = GridSearchCV(QuadraticDiscriminantAnalysis(), {"reg_param": grid}, cv=5)
    contenders: dict[str, Callable[[], object]] = {
        "AnalyticLogisticRegressionCV": lambda: AnalyticLogisticRegressionCV(grid).fit(x, y),
        "the same, per_class": lambda: AnalyticLogisticRegressionCV(grid, covariance="per_class").fit(x, y),
        "GridSearchCV, LDA, lsqr": lambda: lda.fit(x, y),
        "GridSearchCV, QDA": lambda: qda.fit(x, y),
    }

    def quietly(work: Callable[[], object]) -> Callable[[], None]:
        def run() -> None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                work()

        return run

    return compare(
        "A search for the shrinkage",
        f"{SEARCH_ROWS} of these rows, 20 values, 5 folds.",
        {name: quietly(work) for name, work in contenders.items()},
        peer="GridSearchCV, LDA, lsqr",
        packages=("scikit-learn",),
        repeats=2,
    )


def small() -> list[Table]:
    tables = []
    for name, load in (("digits", load_digits), ("breast cancer", load_breast_cancer), ("wine", load_wine)):
        x, y = load(return_X_y=True)
        order = np.random.default_rng(0).permutation(len(y))[: int(0.7 * len(y))]
        x, y = x[order], y[order]
        models: dict[str, Callable[[], object]] = {
            "AnalyticLogisticRegression": AnalyticLogisticRegression,
            "LDA, svd": LinearDiscriminantAnalysis,
            "LDA, lsqr, auto": lambda: LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto"),
            "LogisticRegression, scaled": lambda: make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)),
        }
        tables.append(
            compare(
                f"Small data: {name}",
                f"{len(y)} x {x.shape[1]} float64, one thread.",
                {key: lambda model=model, x=x, y=y: model().fit(x, y) for key, model in models.items()},
                peer="LogisticRegression, scaled",
                packages=("scikit-learn",),
            )
        )
    return tables


def run() -> list[Table]:
    return [million(), peers(), search(), *small()]
