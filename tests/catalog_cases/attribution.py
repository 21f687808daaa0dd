"""Integrated gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from catalog_cases.base import EstimatorCase, TensorCase, normal

CASES: dict[str, list[TensorCase | EstimatorCase]] = {}


class _Explain:
    """An explanation of examples, with ``fit`` as its name."""

    def __init__(self, f: Callable[[Any], Any], options: dict[str, Any]) -> None:
        self.f, self.options = f, options

    def fit(self, x: Any) -> _Explain:
        from kexue.explain import integrated_gradients

        self.found = integrated_gradients(self.f, x, **self.options)
        return self


def _case(**options: Any) -> Callable[[int], tuple[Any, Any]]:
    def build(seed: int) -> tuple[Any, Any]:
        import torch

        g = torch.Generator().manual_seed(seed)
        w = normal(6, 3, dtype=torch.float64, generator=g)
        x = normal(4, 6, dtype=torch.float64, generator=g)
        return _Explain(lambda v: torch.sigmoid(40 * (v @ w) - 9) + (v**2).sum(1, keepdim=True), options), x

    return build


def _nothing() -> Any:
    import torch

    return torch.zeros((), dtype=torch.float64)  # no examples axis


def _shares(fitted: _Explain) -> Any:
    return fitted.found.attributions.numpy()


CASES["integrated-gradients"] = [
    EstimatorCase("adaptive", _case(), _shares, _nothing()),
    EstimatorCase("gauss", _case(method="gauss", n=8, target=1), _shares, _nothing()),
    EstimatorCase("article", _case(method="right", n=20, absolute=True), _shares, _nothing()),
]
