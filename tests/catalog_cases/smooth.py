"""Smooth approximations of functions that have no useful derivative."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from catalog_cases.base import EstimatorCase, TensorCase, normal

CASES: dict[str, list[TensorCase | EstimatorCase]] = {}


def _function(name: str, *args: Any, **options: Any) -> Callable[..., Any]:
    def build(rows: int, dtype: Any, generator: Any) -> Any:
        import torch

        from kexue import losses

        function = getattr(losses, name)

        def weighted(x: Any) -> Any:  # a sum of weights alone would be constant
            out = function(x, *args, **options)
            return out * torch.linspace(-1, 2, 7, dtype=out.dtype) if out.dim() == 2 else out

        return weighted, (normal(rows, 7, dtype=dtype, generator=generator),)

    return build


def _points(rows: int, dtype: Any, generator: Any) -> Any:
    from kexue.losses import soft_argmax

    inputs = (normal(rows, 5, dtype=dtype, generator=generator), normal(5, 2, dtype=dtype, generator=generator))
    return lambda x, p: soft_argmax(x, K=3.0, positions=p), inputs


def _accuracy(rows: int, dtype: Any, generator: Any) -> Any:
    import torch

    from kexue.losses import smooth_accuracy_loss

    y = torch.randint(6, (rows,), generator=generator)
    logits = normal(rows, 6, dtype=dtype, generator=generator)
    return lambda x, labels: smooth_accuracy_loss(x, labels, reduction="none"), (logits, y)


def _f1(average: str, **options: Any) -> Callable[..., Any]:
    def build(rows: int, dtype: Any, generator: Any) -> Any:
        import torch

        from kexue.losses import smooth_f1_loss

        shape = (rows,) if average == "binary" else (rows, 4)
        t = torch.rand(*shape, generator=generator) < 0.4
        logits = normal(*shape, dtype=dtype, generator=generator)
        return lambda x, labels: smooth_f1_loss(x, labels, average=average, **options), (logits, t)

    return build


def _f1_classes(rows: int, dtype: Any, generator: Any) -> Any:
    import torch

    from kexue.losses import smooth_f1_loss

    y = torch.randint(4, (rows,), generator=generator)
    logits = normal(rows, 4, dtype=dtype, generator=generator)
    return lambda x, labels: smooth_f1_loss(x, labels, 2.0, "macro"), (logits, y)


def _running(rows: int, dtype: Any, generator: Any) -> Any:
    import torch

    from kexue.losses import SmoothF1Loss

    loss = SmoothF1Loss(momentum=0.9, average="macro", num_classes=4).to(dtype).eval()
    t = (torch.rand(rows, 4, generator=generator) < 0.4).to(torch.long)
    return loss, (normal(rows, 4, dtype=dtype, generator=generator), t)


def _switch(rows: int, dtype: Any, generator: Any) -> Any:
    import torch

    from kexue.losses import SmoothF1Loss, SwitchLoss, smooth_accuracy_loss

    loss = SwitchLoss(smooth_accuracy_loss, SmoothF1Loss(), at_epoch=1)
    loss.set_epoch(1)
    t = (torch.rand(rows, generator=generator) < 0.4).to(torch.long)
    return loss, (normal(rows, dtype=dtype, generator=generator), t)


CASES["smooth-approximations"] = [
    TensorCase("max", _function("smooth_max", K=3.0), row_independent=True),
    TensorCase("min", _function("smooth_min"), row_independent=True),
    TensorCase("abs", _function("smooth_abs", K=2.0), row_independent=True),
    TensorCase("relu", _function("smooth_relu", K=2.0), row_independent=True),
    TensorCase("step", _function("smooth_step", K=2.0), row_independent=True),
    TensorCase("one-hot", _function("soft_onehot", K=2.0), row_independent=True),
    TensorCase("argmax", _function("soft_argmax", K=2.0), row_independent=True),
    TensorCase("argmax of points", _points),
    TensorCase("top-k", _function("soft_topk", 3, K=2.0), row_independent=True),
    TensorCase("top-k turned over", _function("soft_topk", 5), row_independent=True),
    TensorCase("top-k recursive", _function("soft_topk", 3, method="recursive"), row_independent=True),
    TensorCase("accuracy", _accuracy, row_independent=True),
    TensorCase("f1", _f1("binary")),
    TensorCase("f1 macro", _f1("macro", beta=2.0)),
    TensorCase("f1 micro", _f1("micro", smooth=1.0)),
    TensorCase("f1 of classes", _f1_classes),
    TensorCase("f1 module", _running, module=True),
    TensorCase("switch", _switch, module=True),
]
