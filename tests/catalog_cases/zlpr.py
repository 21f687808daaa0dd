"""Multi-label softmax with hard and soft labels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from catalog_cases.base import EstimatorCase, TensorCase, normal

CASES: dict[str, list[TensorCase | EstimatorCase]] = {}


def _indices(rows: int, generator: Any) -> Any:
    import torch

    labels = torch.randint(9, (rows, 3), generator=generator)
    labels[::2, 1:] = -1
    labels[3:4] = -1
    return labels


def _sparse(rows: int, dtype: Any, generator: Any) -> Any:
    from kexue.losses import zlpr_loss

    scores = normal(rows, 9, dtype=dtype, generator=generator)
    return lambda s, y: zlpr_loss(s, y, indices=True, reduction="none"), (scores, _indices(rows, generator))


def _dense(rows: int, dtype: Any, generator: Any) -> Any:
    import torch

    from kexue.losses import zlpr_loss

    scores = normal(rows, 9, dtype=dtype, generator=generator)
    target = torch.rand(rows, 9, generator=generator) < 0.3
    mask = target | (torch.rand(rows, 9, generator=generator) < 0.7)
    edge = normal(rows, 1, dtype=dtype, generator=generator)

    def function(s: Any, t: Any, m: Any, e: Any) -> Any:
        return zlpr_loss(s, t, mask=m, threshold=e, reduction="none")

    return function, (scores, target, mask, edge)


def _module(indices: bool) -> Callable[..., Any]:
    def build(rows: int, dtype: Any, generator: Any) -> Any:
        import torch

        from kexue.losses import ZLPRLoss

        scores = normal(rows, 9, dtype=dtype, generator=generator)
        module = ZLPRLoss(0.2, learn_threshold=True, reduction="none", indices=indices).to(dtype)
        with torch.no_grad():
            module.threshold.copy_(normal(1, dtype=dtype, generator=generator)[0])
        return module, (scores, _indices(rows, generator))

    return build


def _head(rows: int, dtype: Any, generator: Any) -> Any:
    import torch

    from kexue.losses import LinearZLPR

    head = LinearZLPR(5, 9, reduction="none").to(dtype)
    with torch.no_grad():
        head.weight.copy_(normal(9, 5, dtype=dtype, generator=generator))
    return head, (normal(rows, 5, dtype=dtype, generator=generator), _indices(rows, generator))


def _soft(rows: int, dtype: Any, generator: Any) -> Any:
    from kexue.losses import zlpr_loss

    scores = normal(rows, 9, dtype=dtype, generator=generator)
    weights = normal(rows, 9, dtype=dtype, generator=generator).sigmoid()
    return lambda s, t: zlpr_loss(s, t, reduction="none"), (scores, weights)


def _smoothed(rows: int, dtype: Any, generator: Any) -> Any:
    from kexue.losses import ZLPRLoss

    prior = normal(9, dtype=dtype, generator=generator).sigmoid()
    module = ZLPRLoss(label_smoothing=0.1, smoothing_prior=prior, reduction="none", indices=True).to(dtype)
    return module, (normal(rows, 9, dtype=dtype, generator=generator), _indices(rows, generator))


def _proba(rows: int, dtype: Any, generator: Any) -> Any:
    from kexue.losses import zlpr_proba

    return lambda s: zlpr_proba(s, 0.3), (normal(rows, 9, dtype=dtype, generator=generator),)


CASES["multilabel-softmax"] = [
    TensorCase("sparse", _sparse, row_independent=True),
    TensorCase("dense, masked, with thresholds", _dense, row_independent=True),
    TensorCase("module", _module(True), row_independent=True, module=True),
    TensorCase("linear head", _head, row_independent=True, module=True),
]
CASES["multilabel-soft-labels"] = [
    TensorCase("soft", _soft, row_independent=True),
    TensorCase("smoothed", _smoothed, row_independent=True, module=True),
    TensorCase("probabilities", _proba, row_independent=True),
]
