"""Attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from catalog_cases.base import EstimatorCase, TensorCase, normal

CASES: dict[str, list[TensorCase | EstimatorCase]] = {}


def _entropy(padded: bool, **options: Any) -> Callable[..., Any]:
    def build(rows: int, dtype: Any, generator: Any) -> Any:
        import torch

        from kexue.attention import entropy_invariant_attention

        q, k, v = (normal(rows, h, n, 4, dtype=dtype, generator=generator) for h, n in ((4, 5), (2, 7), (2, 7)))
        mask = torch.arange(7)[None] >= torch.arange(rows)[:, None] if padded else None
        if not padded:
            return lambda a, b, c: entropy_invariant_attention(a, b, c, base=3, min_length=2, **options), (q, k, v)
        return (
            lambda a, b, c, m: entropy_invariant_attention(
                a, b, c, key_padding_mask=m, base=3, min_length=2, **options
            ),
            (q, k, v, mask),
        )

    return build


CASES["entropy-invariant-softmax"] = [
    TensorCase("whole", _entropy(False), row_independent=True),
    TensorCase("causal", _entropy(False, causal=True, scale_mode="sphere_exact"), row_independent=True),
    TensorCase("padded", _entropy(True, mode="inference"), row_independent=True),
    TensorCase("causal, left padding", _entropy(True, causal=True), row_independent=True),
]
