"""Initialisation and parameterisation."""

from __future__ import annotations

from typing import Any

from catalog_cases.base import EstimatorCase, TensorCase, normal


def _unit_activation(rows: int, dtype: Any, generator: Any) -> Any:
    from kexue.models import unit_activation

    return unit_activation("sigmoid", center=True), (normal(rows, 5, dtype=dtype, generator=generator),)


def _ntk(rows: int, dtype: Any, generator: Any) -> Any:
    from kexue.models import NTKLinear

    layer = NTKLinear(5, 4, dtype=dtype, generator=generator)
    return layer, (normal(rows, 3, 5, dtype=dtype, generator=generator),)


def _residual(rows: int, dtype: Any, generator: Any) -> Any:
    import torch

    from kexue.models import NTKLinear, ScheduledResidual

    layer = ScheduledResidual(NTKLinear(5, 5, dtype=dtype, generator=generator), step=0.25)
    layer(torch.zeros(1, 5, dtype=dtype))  # alpha 1/4; in evaluation it stays
    return layer.eval(), (normal(rows, 5, dtype=dtype, generator=generator),)


def _rezero(rows: int, dtype: Any, generator: Any) -> Any:
    import torch

    from kexue.models import NTKLinear, ScheduledResidual

    layer = ScheduledResidual(NTKLinear(5, 5, dtype=dtype, generator=generator), learnable=True).to(dtype)
    with torch.no_grad():
        layer.alpha.fill_(0.5)
    return layer, (normal(rows, 5, dtype=dtype, generator=generator),)


def _stack(rows: int, dtype: Any, generator: Any) -> Any:
    from torch import nn

    from kexue.models import initialize_model

    stack = nn.Sequential(nn.Linear(5, 20), nn.GELU(), nn.Linear(20, 5)).to(dtype)
    initialize_model(stack, "xavier", generator, mode="geometric", distribution="normal")
    return stack, (normal(rows, 5, dtype=dtype, generator=generator),)


CASES: dict[str, list[TensorCase | EstimatorCase]] = {
    "transformer-initialization": [
        TensorCase("unit_activation", _unit_activation, row_independent=True),
        TensorCase("NTKLinear", _ntk, row_independent=True, module=True),
        TensorCase("ScheduledResidual", _residual, row_independent=True, module=True),
        TensorCase("ReZero", _rezero, row_independent=True, module=True),
    ],
    "non-square-initialization": [TensorCase("stack", _stack, row_independent=True, module=True)],
}
