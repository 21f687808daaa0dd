"""Copying of extract-then-generate summarization: the loss of the copy tags."""

from __future__ import annotations

from typing import Any

from catalog_cases.base import EstimatorCase, TensorCase, normal

CASES: dict[str, list[TensorCase | EstimatorCase]] = {}


def _loss(rows: int, dtype: Any, generator: Any) -> Any:
    import torch

    from kexue.tasks import copy_loss

    labels = torch.arange(rows * 5).reshape(rows, 5) % 4
    labels[labels == 3] = -100
    is_source = (torch.arange(5) < 3).expand(rows, 5)

    def function(logits: Any) -> Any:
        return copy_loss(logits, labels[: len(logits)], is_source[: len(logits)])

    return function, (normal(rows, 5, 3, dtype=dtype, generator=generator),)


CASES["spaces-summarization"] = [TensorCase("copy loss", _loss)]
