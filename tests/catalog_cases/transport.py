"""Optimal transport."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from catalog_cases.base import EstimatorCase, TensorCase, normal

CASES: dict[str, list[TensorCase | EstimatorCase]] = {}


def _distance(width: int, **keywords: Any) -> Callable[..., Any]:
    def build(rows: int, dtype: Any, generator: Any) -> Any:
        from kexue.stats import wasserstein

        inputs = (
            normal(rows, width, dtype=dtype, generator=generator),
            normal(5, width, dtype=dtype, generator=generator),
        )
        return lambda x, y: wasserstein(x, y, **keywords), inputs

    return build


def _plan(rows: int, dtype: Any, generator: Any) -> Any:
    """Costs and logits of the masses."""
    from kexue.stats import transport

    inputs = tuple(normal(*shape, dtype=dtype, generator=generator) for shape in ((rows, 4), (rows,), (4,)))
    return lambda c, s, t: transport(c, s.softmax(0), t.softmax(0)).cost, inputs


def _entropic(rows: int, dtype: Any, generator: Any) -> Any:
    from kexue.stats import sinkhorn

    inputs = tuple(normal(k, 2, dtype=dtype, generator=generator) for k in (rows, 5))
    return lambda x, y: sinkhorn(x, y, 0.5, tol=1e-11, max_iter=20_000).divergence, inputs


def _critic(rows: int, dtype: Any, generator: Any) -> Any:
    """The critic of fixed samples, at points that vary."""
    from kexue.stats import kr_potential

    samples = [normal(k, 3, dtype=dtype, generator=generator).double() for k in (6, 5)]
    return kr_potential(*samples), (normal(rows, 3, dtype=dtype, generator=generator),)


CASES["wasserstein-duality"] = [
    TensorCase("plane, order 2", _distance(2, p=2), empty=ValueError),
    TensorCase("line, order 3", _distance(1, p=3), empty=ValueError),
    TensorCase("costs and masses", _plan, empty=ValueError),
    TensorCase("Sinkhorn divergence", _entropic, empty=ValueError),
    TensorCase("critic", _critic, row_independent=True),
]
