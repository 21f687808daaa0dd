"""Losses over sets of labels, the multi-label head and mixup."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from catalog_cases.base import EstimatorCase, TensorCase, normal

CASES: dict[str, list[TensorCase | EstimatorCase]] = {}


def _sets(rows: int, classes: int, generator: Any) -> Any:
    """Multi-hot targets with 0 to 4 labels; row i is the same for every number of rows."""
    import torch

    positive = torch.zeros(rows, classes, dtype=torch.bool)
    for i in range(rows):
        positive[i, (torch.arange(i % 5) * 2 + i) % classes] = True
    return positive


def _pairs(rows: int, dtype: Any, generator: Any) -> Any:
    from kexue.losses import unified_pair_loss

    scores = normal(rows, 7, dtype=dtype, generator=generator)
    return lambda s, t: unified_pair_loss(s, t, 2.0, 0.25, reduction="none"), (scores, _sets(rows, 7, generator))


def _combination(**options: Any) -> Callable[..., Any]:
    def build(rows: int, dtype: Any, generator: Any) -> Any:
        from kexue.losses import combination_cross_entropy

        scores = normal(rows, 7, dtype=dtype, generator=generator)
        target = _sets(rows, 7, generator)
        return lambda s, t: combination_cross_entropy(s, t, reduction="none", **options), (scores, target)

    return build


def _combination_pad(rows: int, dtype: Any, generator: Any) -> Any:
    from kexue.losses import combination_cross_entropy

    scores, pad = (normal(rows, n, dtype=dtype, generator=generator) for n in (7, 1))
    target = _sets(rows, 7, generator)
    return lambda s, p, t: combination_cross_entropy(s, t, 5, pad_score=p), (scores, pad, target)


def _head(rows: int, dtype: Any, generator: Any) -> Any:
    import torch

    from kexue.losses import MultiLabelHead

    head = MultiLabelHead(5, 7).to(dtype)
    with torch.no_grad():
        head.weight.copy_(normal(7, 5, dtype=dtype, generator=generator))
        head.bias.copy_(normal(7, dtype=dtype, generator=generator))
    return head, (normal(rows, 5, dtype=dtype, generator=generator),)


def _mixup(rows: int, dtype: Any, generator: Any) -> Any:
    import torch

    from kexue.losses import mixup_multilabel, zlpr_loss

    x, t = normal(rows, 7, dtype=dtype, generator=generator), _sets(rows, 7, generator)

    def function(scores: Any, target: Any) -> Any:
        mixed, soft = mixup_multilabel(scores, target, 0.4, torch.Generator().manual_seed(0))
        return zlpr_loss(mixed, soft)

    return function, (x, t)


CASES["multilabel-softmax"] = [
    TensorCase("pairs", _pairs, row_independent=True),
    TensorCase("combination", _combination(max_k=4), row_independent=True),
    TensorCase("combination with pad", _combination_pad),
    TensorCase("head", _head, row_independent=True, module=True),
]
CASES["multilabel-soft-labels"] = [TensorCase("mixup", _mixup, compile=False)]
