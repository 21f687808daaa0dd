"""Optimizers as flows."""

from __future__ import annotations

from typing import Any

from catalog_cases.base import EstimatorCase, TensorCase, normal

CASES: dict[str, list[TensorCase | EstimatorCase]] = {}


def _in_norm(norm: str) -> Any:
    def build(rows: int, dtype: Any, generator: Any) -> Any:
        from kexue.training import steepest_direction

        x = normal(rows, 4, dtype=dtype, generator=generator)
        return lambda g, w: steepest_direction(g, norm) * w, (x, normal(4, dtype=dtype, generator=generator))

    return build


def _metric(rows: int, dtype: Any, generator: Any) -> Any:
    from kexue.training import steepest_direction

    x, m = (normal(rows, 4, dtype=dtype, generator=generator) for _ in range(2))
    return lambda g, m: steepest_direction(g, metric=1 + m.square()), (x, m)


CASES["optimizer-dynamics"] = [
    *(TensorCase(norm, _in_norm(norm)) for norm in ("l2", "l1", "linf", "spectral")),
    TensorCase("metric", _metric),
]
