"""Divergences of normals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from catalog_cases.base import TensorCase, normal

CASES: dict[str, list[Any]] = {}


def _covariance(a: Any) -> Any:
    """Well conditioned, from any square matrix; in float32 for half precision, as the methods compute."""
    import torch

    a = a if a.dtype == torch.float64 else a.float()
    return 0.1 * (a @ a.mT) + torch.eye(a.shape[-1], dtype=a.dtype)


def _full(call: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    def build(rows: int, dtype: Any, generator: Any) -> Any:
        from kexue.stats import Gaussian

        inputs = tuple(normal(rows, *shape, dtype=dtype, generator=generator) for shape in ((4,), (4, 4)) * 2)

        def function(mean: Any, a: Any, other_mean: Any, b: Any) -> Any:
            return call(Gaussian(mean, _covariance(a)), Gaussian(other_mean, _covariance(b)))

        return function, inputs

    return build


def _diagonal(name: str) -> Callable[..., Any]:
    def build(rows: int, dtype: Any, generator: Any) -> Any:
        from kexue import stats

        inputs = tuple(normal(rows, 4, dtype=dtype, generator=generator) for _ in range(4))

        def function(mean: Any, a: Any, other_mean: Any, b: Any) -> Any:
            p, q = (stats.Gaussian(m, diag=0.5 + x.square()) for m, x in ((mean, a), (other_mean, b)))
            return getattr(stats, name)(p, q)

        return function, inputs

    return build


def _named(name: str, **keywords: Any) -> Callable[..., Any]:
    def call(p: Any, q: Any) -> Any:
        from kexue import stats

        return getattr(stats, name)(p, q, **keywords)

    return _full(call)


def _samples(rows: int, dtype: Any, generator: Any) -> Any:
    from kexue.stats import Gaussian, w2

    inputs = tuple(normal(rows, 9, 3, dtype=dtype, generator=generator) for _ in range(2))
    return lambda x, y: w2(Gaussian.from_samples(x), Gaussian.from_samples(y)), inputs


def _map(p: Any, q: Any) -> Any:
    from kexue.stats import ot_map

    t, shift = ot_map(p, q)
    return t.sum(-1) + shift


def _entropy(p: Any, q: Any) -> Any:
    return p.entropy() - q.entropy() + 0 * (p.mean + q.mean).sum(-1)


CASES["gaussian-divergences"] = [
    *(
        TensorCase(name, _named(name), row_independent=True)
        for name in ("kl", "jeffreys", "bhattacharyya", "hellinger")
    ),
    TensorCase("renyi 1.1", _named("renyi", alpha=1.1), row_independent=True),
    TensorCase("w2", _named("w2"), row_independent=True),
    TensorCase("w2, not squared", _named("w2", squared=False), row_independent=True),
    TensorCase("map", _full(_map), row_independent=True),
    TensorCase("entropy", _full(_entropy), row_independent=True),
    TensorCase("w2 of samples", _samples, row_independent=True),
    *(TensorCase(f"{name}, diagonal", _diagonal(name), row_independent=True) for name in ("kl", "w2")),
]
