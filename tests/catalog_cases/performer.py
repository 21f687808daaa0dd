"""Attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from catalog_cases.base import EstimatorCase, TensorCase, normal

CASES: dict[str, list[TensorCase | EstimatorCase]] = {}


def _favor(variant: str, causal: bool, num_features: int = 6) -> Callable[..., Any]:
    def build(rows: int, dtype: Any, generator: Any) -> Any:
        import torch

        from kexue.attention import FavorFeatures, linear_attention

        class Attention(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.phi = FavorFeatures(4, num_features, variant=variant, generator=generator)
                if variant == "optimal":  # otherwise the first call fits A, rounded or not, to what it is given
                    self.phi.calibrate(torch.full((3, 4), 0.5), torch.full((3, 4), 0.5))

            def forward(self, q: Any, k: Any, v: Any) -> Any:
                normalize = variant != "trig" and num_features > 1  # a single feature gives equal weights
                return linear_attention(q, k, v, self.phi, causal=causal, normalize=normalize)

        inputs = tuple(0.5 * normal(rows, 2, 5, width, dtype=dtype, generator=generator) for width in (4, 4, 3))
        return Attention().to(dtype).eval(), inputs

    return build


CASES["performer"] = [
    *(
        TensorCase(f"{variant} {kind}", _favor(variant, kind == "causal"), row_independent=True, module=True)
        for variant in ("positive", "cosh", "optimal", "relu", "trig")
        for kind in ("bidirectional", "causal")
    ),
    TensorCase("one feature", _favor("positive", True, 1), row_independent=True, module=True),
]
