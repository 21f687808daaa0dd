"""Attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from catalog_cases.base import EstimatorCase, TensorCase, normal

CASES: dict[str, list[TensorCase | EstimatorCase]] = {}


def _series(name: str, degree: int, causal: bool, options: dict[str, Any]) -> Callable[..., Any]:
    def build(rows: int, dtype: Any, generator: Any) -> Any:
        import torch

        import kexue.attention as attention

        phi = getattr(attention, name)(degree, **options)
        q = normal(rows, 4, 7, 3, dtype=dtype, generator=generator)
        k, v = (normal(rows, 2, 7, width, dtype=dtype, generator=generator) for width in (3, 5))
        mask = torch.rand(rows, 7, generator=generator) < 0.7

        def run(q: Any, k: Any, v: Any, mask: Any) -> Any:
            normalize = phi.positive
            return attention.linear_attention(
                q, k, v, phi, causal=causal, key_padding_mask=mask, normalize=normalize, eps=1e-3
            )

        return run, (q, k, v, mask)

    return build


def _series_state(rows: int, dtype: Any, generator: Any) -> Any:
    from kexue.attention import TaylorFeatures, linear_attention

    phi = TaylorFeatures(2)

    def run(q: Any, k: Any, v: Any, s: Any, z: Any) -> Any:
        out, state = linear_attention(
            q, k, v, phi, causal=True, initial_state=(s, z.square()), return_state=True, eps=20.0
        )
        return out + state.s.sum((1, 2, 3))[:, None, None, None].to(out.dtype) / 100

    q, k = (normal(rows, 2, 6, 3, dtype=dtype, generator=generator) for _ in range(2))
    v = normal(rows, 2, 6, 4, dtype=dtype, generator=generator)
    s = normal(rows, 2, 10, 4, dtype=dtype, generator=generator)
    return run, (q, k, v, s, normal(rows, 2, 10, dtype=dtype, generator=generator))


CASES["infinite-dimensional-attention"] = [
    TensorCase("taylor causal", _series("TaylorFeatures", 2, True, {}), row_independent=True),
    TensorCase("taylor bidirectional", _series("TaylorFeatures", 4, False, {}), row_independent=True),
    TensorCase("power causal", _series("ExpPowerFeatures", 4, True, {"scale": 0.5}), row_independent=True),
    TensorCase(
        "odd, unit vectors",
        _series("TaylorFeatures", 3, True, {"normalize_inputs": True, "scale": 1.0}),
        row_independent=True,
    ),
    TensorCase("odd, not normalised", _series("ExpPowerFeatures", 3, False, {}), row_independent=True),
    TensorCase("taylor with a state", _series_state, row_independent=True),
]
