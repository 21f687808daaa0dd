"""Rates per layer: transforms of one gradient, and a module with rescaled parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from catalog_cases.base import EstimatorCase, TensorCase, normal


def _transform(make: Callable[[Any], Any]) -> Callable[..., Any]:
    """One gradient of shape (rows, 5), through a transform."""

    def build(rows: int, dtype: Any, generator: Any) -> Any:
        import kexue.training as training

        transform = make(training)
        inputs = (normal(rows, 5, dtype=dtype, generator=generator), normal(rows, 5, dtype=dtype, generator=generator))
        return lambda gradient, parameter: transform("weight", parameter, gradient) + 0 * parameter, inputs

    return build


def _rescaled(rows: int, dtype: Any, generator: Any) -> Any:
    import torch

    from kexue.training import scale_lr_

    module = torch.nn.Linear(5, 3).to(dtype)
    with torch.no_grad():
        module.weight.copy_(normal(3, 5, dtype=dtype, generator=generator))
        module.bias.copy_(normal(3, dtype=dtype, generator=generator))
    return scale_lr_(module, 0.3, "sgd"), (normal(rows, 5, dtype=dtype, generator=generator),)


CASES: dict[str, list[TensorCase | EstimatorCase]] = {
    "layerwise-learning-rates": [
        TensorCase("clip_norm", _transform(lambda t: t.clip_norm(0.5))),
        TensorCase("clip_norm of order 1", _transform(lambda t: t.clip_norm(0.5, p=1, per_tensor=True))),
        TensorCase("clip_value", _transform(lambda t: t.clip_value(0.5)), row_independent=True),
        TensorCase("centralize", _transform(lambda t: t.centralize()), row_independent=True),
        TensorCase("project", _transform(lambda t: t.project())),
        TensorCase("scale_lr_", _rescaled, row_independent=True, module=True),
    ]
}
