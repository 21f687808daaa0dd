"""Attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from catalog_cases.base import EstimatorCase, TensorCase, normal

CASES: dict[str, list[TensorCase | EstimatorCase]] = {}


def _residual(form: str) -> Callable[..., Any]:
    def build(rows: int, dtype: Any, generator: Any) -> Any:
        import torch

        from kexue.attention import (
            ResidualScores,
            residual_attention,
            residual_attention_stack,
            residual_attention_step,
        )

        inputs = tuple(normal(rows, 2, 5, 4, dtype=dtype, generator=generator) for _ in range(6))
        keep = torch.ones(rows, 5, dtype=torch.bool)
        keep[:, 3:] = False

        def function(*x: Any) -> Any:
            qs, ks, vs = x[:2], x[2:4], x[4:]
            mask = keep[: len(x[0])]
            if form == "stack":
                return residual_attention_stack(qs, ks, vs, mask)[1] + x[4][:, :, :1]
            if form == "step":
                first, scores = residual_attention_step(qs[0], ks[0], vs[0], key_padding_mask=mask)
                return first + residual_attention_step(qs[1], ks[1], vs[1], scores, key_padding_mask=mask)[0]
            if form == "running":
                store = ResidualScores(causal=True)
                return store.step(qs[0], ks[0], vs[0], mask) + store.step(qs[1], ks[1], vs[1], mask)
            return residual_attention(qs, ks, vs[1], form, mask) + x[4][:, :, :1]

        return function, inputs

    return build


CASES["realformer"] = [
    TensorCase(form, _residual(form), row_independent=True)
    for form in ("mask", "concat", "qk_residual", "stack", "step", "running")
]
