"""Closed-form classifiers."""

from __future__ import annotations

from typing import Any

from catalog_cases.base import EstimatorCase, TensorCase, normal

CASES: dict[str, list[TensorCase | EstimatorCase]] = {}


def _labelled(seed: int) -> tuple[Any, Any]:
    import numpy as np

    rng = np.random.default_rng(seed)
    y = np.arange(60) % 3
    return rng.normal(size=(60, 5)) + 2 * np.eye(5)[y], y


def _pair_fit(kind: str, **arguments: Any) -> Any:
    def build(seed: int) -> tuple[Any, Any]:
        import kexue.stats

        estimator = getattr(kexue.stats, kind)

        class OnPair(estimator):  # the shared tests call fit(data); here data is (X, y)
            def fit(self, data: Any) -> Any:
                return super().fit(*data)

        return OnPair(**arguments), _labelled(seed)

    return build


def _head(rows: int, dtype: Any, generator: Any) -> tuple[Any, tuple[Any, ...]]:
    import torch

    from kexue.stats import analytic_head_

    features = normal(40, 4, dtype=torch.float64, generator=generator)
    head = torch.nn.Linear(4, 3, dtype=torch.float64)
    return analytic_head_(head, features, torch.arange(40) % 3).to(dtype), (
        normal(rows, 4, dtype=dtype, generator=generator),
    )


EMPTY = ([[]], [0])

CASES["analytic-logistic-regression"] = [
    *(
        EstimatorCase(f"{kind}-{name}", _pair_fit(kind, **arguments), lambda f: f.predict_proba(_labelled(1)[0]), EMPTY)
        for kind, name, arguments in (
            ("AnalyticLogisticRegression", "shared", {}),
            ("AnalyticLogisticRegression", "per_class", {"covariance": "per_class"}),
            ("AnalyticLogisticRegression", "polish", {"polish": 2}),
            ("AnalyticLogisticRegressionCV", "shared", {"shrinkages": 4}),
        )
    ),
    TensorCase("analytic_head_", _head, row_independent=True, module=True),
]
