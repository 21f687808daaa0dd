"""SimSiam: its loss as a tensor function, and the model in evaluation mode."""

from __future__ import annotations

from typing import Any

from catalog_cases.base import EstimatorCase, TensorCase, normal

CASES: dict[str, list[TensorCase | EstimatorCase]] = {}


def _loss(reduction: str, stop_gradient: bool) -> Any:
    def build(rows: int, dtype: Any, generator: Any) -> Any:
        from kexue.models import simsiam_loss

        tensors = [normal(rows, 7, dtype=dtype, generator=generator) for _ in range(4)]
        if not stop_gradient:
            return lambda *inputs: simsiam_loss(*inputs, stop_gradient=False, reduction=reduction), tuple(tensors)
        z1, z2 = tensors[2:]

        def function(p1: Any, p2: Any) -> Any:
            return simsiam_loss(p1, p2, z1[: len(p1)].to(p1), z2[: len(p1)].to(p1), reduction=reduction)

        return function, tuple(tensors[:2])

    return build


def _model(rows: int, dtype: Any, generator: Any) -> Any:
    import torch

    from kexue.models import SimSiam

    torch.manual_seed(int(torch.randint(1000, (), generator=generator)))
    model = SimSiam(torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.Tanh()), dim=8, stop_gradient=False)
    inputs = tuple(normal(rows, 5, dtype=dtype, generator=generator) for _ in range(2))
    return model.to(dtype).eval(), inputs


CASES["simsiam-dynamics"] = [
    TensorCase("loss-rows", _loss("none", False), row_independent=True),
    TensorCase("loss-mean", _loss("mean", False)),
    TensorCase("loss-sum", _loss("sum", False)),
    TensorCase("stop-gradient", _loss("mean", True)),
    TensorCase("model", _model, module=True, dtypes=("float64", "float32")),
]
