"""Sparse softmax, its cross entropy, and the fused head."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from catalog_cases.base import EstimatorCase, TensorCase, normal


def _labels(rows: int, generator: Any) -> Any:
    import torch

    return torch.randint(9, (rows,), generator=generator)


def _softmax(**kept: Any) -> Callable[..., Any]:
    def build(rows: int, dtype: Any, generator: Any) -> Any:
        from kexue.losses import sparse_softmax

        factor = normal(9, dtype=dtype, generator=generator)  # the sum of the probabilities alone has no gradient
        return lambda s: sparse_softmax(s, **kept) * factor.to(s.dtype), (_spread(rows, dtype, generator),)

    return build


def _spread(rows: int, dtype: Any, generator: Any) -> Any:
    """Scores whose order no rounding changes: permutations of numbers 0.25 apart."""
    import torch

    steps = [torch.randperm(9, generator=generator) for _ in range(rows)]
    return (torch.stack(steps) if steps else torch.zeros(0, 9)).to(dtype) / 4


def _module(rows: int, dtype: Any, generator: Any) -> Any:
    import torch

    from kexue.losses import SparseCrossEntropyLoss

    weight = torch.linspace(0.5, 1.5, 9, dtype=dtype)
    module = SparseCrossEntropyLoss(k=4, weight=weight, reduction="none", label_smoothing=0.25)
    return module, (_spread(rows, dtype, generator), _labels(rows, generator))


def _head(rows: int, dtype: Any, generator: Any) -> Any:
    import torch

    from kexue.losses import linear_sparse_cross_entropy

    table = torch.eye(9, dtype=dtype)
    inputs = (_spread(rows, dtype, generator), table, _labels(rows, generator))
    return lambda h, w, y: linear_sparse_cross_entropy(h, w, y, k=4, reduction="none"), inputs


CASES: dict[str, list[TensorCase | EstimatorCase]] = {
    "spaces-summarization": [
        TensorCase("sparse softmax", _softmax(k=4), row_independent=True),
        TensorCase("nucleus softmax", _softmax(p=0.7), row_independent=True),
        TensorCase("sparse cross entropy", _module, row_independent=True, module=True),
        TensorCase("sparse head", _head, row_independent=True),
    ]
}
