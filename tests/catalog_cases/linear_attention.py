"""Attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from catalog_cases.base import EstimatorCase, TensorCase, normal

CASES: dict[str, list[TensorCase | EstimatorCase]] = {}


def _linear(feature_map: str, causal: bool, backend: str = "auto") -> Callable[..., Any]:
    def build(rows: int, dtype: Any, generator: Any) -> Any:
        from kexue.attention import linear_attention

        inputs = tuple(normal(rows, 2, 9, 4, dtype=dtype, generator=generator) for _ in range(3))
        return lambda q, k, v: linear_attention(q, k, v, feature_map, causal=causal, backend=backend), inputs

    return build


def _linear_layer(rows: int, dtype: Any, generator: Any) -> Any:
    import torch

    from kexue.attention import LinearAttention

    layer = LinearAttention(8, 2, "relu2", causal=True, rope="before").to(dtype)
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(normal(*p.shape, dtype=dtype, generator=generator) * 0.3)
    return layer, (normal(rows, 9, 8, dtype=dtype, generator=generator),)


CASES["linear-attention"] = [
    *(TensorCase(f"{name}, causal", _linear(name, True), row_independent=True) for name in ("elu1", "exp", "cosine1")),
    *(TensorCase(name, _linear(name, False), row_independent=True) for name in ("elu1", "softmax_qk", "softmax_exp")),
    TensorCase("exp, causal, plain", _linear("exp", True, "plain"), row_independent=True),
    TensorCase("layer", _linear_layer, row_independent=True, module=True),
]
