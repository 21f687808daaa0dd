"""Points in a common sector."""

from __future__ import annotations

from typing import Any

from catalog_cases.base import EstimatorCase, TensorCase, normal

CASES: dict[str, list[TensorCase | EstimatorCase]] = {}


def _angles(rows: int, dtype: Any, generator: Any) -> Any:
    """Angles within the circle, away from the kinks of small n."""
    import torch

    return (3.6 + 0.5 * torch.sigmoid(normal(rows, 3, dtype=torch.float64, generator=generator))).to(dtype)


def _probability(points: int) -> Any:
    def build(rows: int, dtype: Any, generator: Any) -> Any:
        from kexue.stats import common_sector_probability

        return lambda theta: common_sector_probability(points, theta), (_angles(rows, dtype, generator),)

    return build


def _sector(rows: int, dtype: Any, generator: Any) -> Any:
    import torch

    from kexue.stats import smallest_sector

    inputs = (normal(rows, 5, dtype=dtype, generator=generator),)
    return lambda angles: torch.stack(smallest_sector(angles), 1), inputs


def _test(rows: int, dtype: Any, generator: Any) -> Any:
    from kexue.stats import circular_range_test

    inputs = (normal(rows, 5, dtype=dtype, generator=generator),)
    return lambda angles: circular_range_test(angles).pvalue, inputs


CASES["common-sector"] = [
    *(TensorCase(f"probability, {points} points", _probability(points), row_independent=True) for points in (2, 4, 9)),
    TensorCase("smallest sector", _sector, row_independent=True),
    TensorCase("circular range test", _test, row_independent=True),
]
