"""Gradient-normalised critics and their neighbours.

A critic is a module, whose trace and double backward torch.compile cannot take into a graph: it breaks the graph there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from catalog_cases.base import EstimatorCase, TensorCase, normal


def _network(dtype: Any, smooth: bool = False) -> Any:
    """Weights that every dtype represents exactly."""
    import torch
    from torch import nn

    net = nn.Sequential(nn.Linear(3, 6), nn.Tanh() if smooth else nn.LeakyReLU(0.25), nn.Linear(6, 1))
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randint(-8, 9, p.shape, generator=g) / 8)
    return net.to(dtype)


def _normalized(kind: str, smooth: bool) -> Callable[..., Any]:
    def build(rows: int, dtype: Any, generator: Any) -> Any:
        from kexue.adversarial import gradient_normalize

        inputs = (normal(rows, 3, dtype=dtype, generator=generator),)
        return lambda x: gradient_normalize(_network(x.dtype, smooth), x, kind), inputs

    return build


def _generator_loss(method: str) -> Callable[..., Any]:
    def build(rows: int, dtype: Any, generator: Any) -> Any:
        from kexue.adversarial import LipschitzCritic

        inputs = (normal(rows, 3, dtype=dtype, generator=generator),)
        return lambda x: LipschitzCritic(_network(x.dtype), method).generator_loss(x), inputs

    return build


def _critic(method: str) -> Callable[..., Any]:
    def build(rows: int, dtype: Any, generator: Any) -> Any:
        from kexue.adversarial import LipschitzCritic

        critic = LipschitzCritic(_network(dtype), method).eval()
        return critic, (normal(rows, 3, dtype=dtype, generator=generator),)

    return build


CASES: dict[str, list[TensorCase | EstimatorCase]] = {
    "gradient-normalization": [
        *(
            TensorCase(
                f"{kind}, {'smooth' if smooth else 'piecewise linear'}",
                _normalized(kind, smooth),
                compile=False,
                row_independent=True,
            )
            for kind in ("gn", "gran")
            for smooth in (False, True)
        ),
        *(
            TensorCase(f"critic {m}", _critic(m), row_independent=True, compile=False, module=True)
            for m in ("gn", "sn")
        ),
        *(
            TensorCase(f"generator loss {m}", _generator_loss(m), empty=ValueError, compile=False)
            for m in ("gn", "gp", "qp")
        ),
    ]
}
