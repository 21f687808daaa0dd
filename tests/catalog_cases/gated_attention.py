"""Attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from catalog_cases.base import EstimatorCase, TensorCase, normal

CASES: dict[str, list[TensorCase | EstimatorCase]] = {}


def _gated(normalization: str, **options: Any) -> Callable[..., Any]:
    def build(rows: int, dtype: Any, generator: Any) -> Any:
        from kexue.attention import gated_attention

        widths = (4, 4, 5, 5)
        inputs = tuple(normal(rows, 6, width, dtype=dtype, generator=generator) for width in widths)
        return lambda *x: gated_attention(*x, normalization=normalization, **options), inputs

    return build


def _gated_unit(padded: bool = False, **options: Any) -> Callable[..., Any]:
    def build(rows: int, dtype: Any, generator: Any) -> Any:
        import torch

        from kexue.attention import GatedAttentionUnit

        unit = GatedAttentionUnit(6, key_size=4, **options).to(dtype)
        with torch.no_grad():
            for parameter in unit.parameters():
                parameter.copy_(normal(*parameter.shape, dtype=dtype, generator=generator) / 2)
        x = normal(rows, 5, 6, dtype=dtype, generator=generator)
        return unit, (x, torch.arange(5).expand(rows, 5) < 3) if padded else (x,)

    return build


CASES["gated-attention-softmax"] = [
    *(
        TensorCase(name, _gated(name), row_independent=True)
        for name in ("relu2_n", "relu2_const", "relu2_sum", "softmax", "softmax_plus")
    ),
    TensorCase("causal", _gated("softmax_plus", causal=True, min_length=2), row_independent=True),
    TensorCase("unit", _gated_unit(), row_independent=True, module=True),
    TensorCase("unit padded", _gated_unit(True, bias=True), row_independent=True, module=True),
    TensorCase("unit causal", _gated_unit(causal=True, normalization="relu2_n"), row_independent=True, module=True),
    TensorCase("unit chunked", _gated_unit(normalization="relu2_n", chunk_size=2), row_independent=True, module=True),
]
