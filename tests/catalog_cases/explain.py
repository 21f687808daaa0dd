"""Explanation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from catalog_cases.base import EstimatorCase, TensorCase, normal

CASES: dict[str, list[TensorCase | EstimatorCase]] = {}


class _Fit:
    """A training with settings, fitted to (examples, targets)."""

    def __init__(self, explained: Any, settings: dict[str, Any]) -> None:
        self.explained, self.settings = explained, settings

    def fit(self, data: Any) -> _Fit:
        self.explained.fit(*data, **self.settings)
        return self


def _path_kernel(loss: str, **settings: Any) -> Callable[[int], tuple[Any, Any]]:
    def build(seed: int) -> tuple[Any, Any]:
        import torch

        from kexue.explain import PathKernel

        g = torch.Generator().manual_seed(seed)
        model = torch.nn.Sequential(torch.nn.Linear(5, 6), torch.nn.Tanh(), torch.nn.Linear(6, 3)).double()
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(normal(*p.shape, dtype=p.dtype, generator=g))
        x = normal(20, 5, dtype=torch.float64, generator=g)
        y = torch.randint(3, (20,), generator=g) if loss == "ce" else normal(20, 3, dtype=x.dtype, generator=g)
        return _Fit(PathKernel(model, loss=loss), settings), (x, y)

    return build


def _nothing() -> Any:
    import torch

    return torch.zeros(0, 5, dtype=torch.float64), torch.zeros(0, 3, dtype=torch.float64)


def _shares(fitted: _Fit) -> Any:
    import torch

    return fitted.explained.contributions(torch.linspace(-1, 1, 15, dtype=torch.float64).view(3, 5)).numpy()


CASES["path-kernel"] = [
    EstimatorCase("full batch", _path_kernel("mse", steps=10), _shares, _nothing()),
    EstimatorCase("minibatches", _path_kernel("ce", steps=10, batch_size=6, momentum=0.9), _shares, _nothing()),
    EstimatorCase("adam", _path_kernel("ce", steps=10, optimizer="adam", weight_decay=0.1), _shares, _nothing()),
]
