"""Losses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from catalog_cases.base import EstimatorCase, TensorCase, normal

CASES: dict[str, list[TensorCase | EstimatorCase]] = {}


def _labels(rows: int, classes: int, generator: Any) -> Any:
    import torch

    return torch.randint(classes, (rows,), generator=generator)


def _margin(kind: str, reduction: str) -> Callable[..., Any]:
    def build(rows: int, dtype: Any, generator: Any) -> Any:
        from kexue.losses import margin_softmax_loss

        weight = normal(9, 5, dtype=dtype, generator=generator)
        inputs = (normal(rows, 5, dtype=dtype, generator=generator), _labels(rows, 9, generator), weight)
        return lambda z, y, w: margin_softmax_loss(z, w, y, kind, 10.0, reduction=reduction), inputs

    return build


def _margin_head(rows: int, dtype: Any, generator: Any) -> Any:
    import torch

    from kexue.losses import MarginSoftmax

    head = MarginSoftmax(5, 9, scale=10.0, reduction="none").to(dtype)
    with torch.no_grad():
        head.weight.copy_(normal(9, 5, dtype=dtype, generator=generator))
    return head, (normal(rows, 5, dtype=dtype, generator=generator), _labels(rows, 9, generator))


def _margin_cosines(rows: int, dtype: Any, generator: Any) -> Any:
    from kexue.losses import margin_cross_entropy

    cosines = normal(rows, 9, dtype=dtype, generator=generator).tanh()
    inputs = (cosines, _labels(rows, 9, generator))
    return lambda c, y: margin_cross_entropy(c, y, "arc", 10.0, reduction="none"), inputs


def _margin_soft(rows: int, dtype: Any, generator: Any) -> Any:
    from kexue.losses import margin_softmax_loss

    soft = normal(rows, 9, dtype=dtype, generator=generator).softmax(-1)
    weight = normal(9, 5, dtype=dtype, generator=generator)
    z = normal(rows, 5, dtype=dtype, generator=generator)
    return lambda a, w: margin_softmax_loss(a, w, soft.to(a.dtype), "am", 10.0), (z, weight)


def _flat_scores(mode: str) -> Callable[..., Any]:
    def build(rows: int, dtype: Any, generator: Any) -> Any:
        from kexue.losses import flat_cross_entropy

        inputs = (normal(rows, 6, dtype=dtype, generator=generator), _labels(rows, 6, generator))
        return lambda s, t: flat_cross_entropy(s, t, mode=mode, reduction="none"), inputs

    return build


def _info_nce(shared: bool, **options: Any) -> Callable[..., Any]:
    def build(rows: int, dtype: Any, generator: Any) -> Any:
        from kexue.losses import info_nce

        q, k = (normal(rows, 5, dtype=dtype, generator=generator) for _ in range(2))
        negatives = normal(4, 5, dtype=dtype, generator=generator)
        if shared:
            return lambda a, b, n: info_nce(a, b, n, temperature=0.3, **options), (q, k, negatives)
        return lambda a, b: info_nce(a, b, negatives.to(a.dtype), temperature=0.3, in_batch=True, **options), (q, k)

    return build


def _views(rows: int, dtype: Any, generator: Any) -> Any:
    import torch

    from kexue.losses import nt_xent

    extra = normal(2, 2, 5, dtype=dtype, generator=generator)  # one pair alone has no negatives, by design

    def function(a: Any, b: Any) -> Any:
        more = extra.to(a.dtype)
        return nt_xent(torch.cat([a, more[0]]), torch.cat([b, more[1]]), 0.3)

    return function, tuple(normal(rows, 5, dtype=dtype, generator=generator) for _ in range(2))


def _flat_module(rows: int, dtype: Any, generator: Any) -> Any:
    from kexue.losses import FlatNCELoss

    module = FlatNCELoss(0.3)
    q, k = (normal(rows, 5, dtype=dtype, generator=generator) for _ in range(2))
    return module, (q, k, normal(4, 5, dtype=dtype, generator=generator))


CASES["margin-softmax"] = [
    *(TensorCase(kind, _margin(kind, "none"), row_independent=True) for kind in ("am", "arc", "a", "metric")),
    TensorCase("mean", _margin("simpler_a", "mean")),
    TensorCase("head", _margin_head, row_independent=True, module=True),
    TensorCase("cosines", _margin_cosines, row_independent=True),
    TensorCase("soft labels", _margin_soft),
]
CASES["flatnce"] = [
    TensorCase("scores", _flat_scores("flat"), row_independent=True),
    TensorCase("scores info", _flat_scores("info"), row_independent=True),
    TensorCase("shared negatives", _info_nce(True, reduction="none"), row_independent=True),
    TensorCase("in batch", _info_nce(False, mode="flat")),
    TensorCase("views", _views),
    TensorCase("module", _flat_module, module=True),
]
