"""Reparameterisation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from catalog_cases.base import EstimatorCase, TensorCase, normal

CASES: dict[str, list[TensorCase | EstimatorCase]] = {}


def _seeded() -> Any:
    import torch

    return torch.Generator().manual_seed(0)


def _soft(tau: float, dim: int) -> Callable[..., Any]:
    def build(rows: int, dtype: Any, generator: Any) -> Any:
        from kexue.stats import gumbel_softmax

        shape = (rows, 7) if dim == -1 else (rows, 7, 2)
        inputs = (normal(*shape, dtype=dtype, generator=generator),)
        return lambda x: gumbel_softmax(x, tau, dim=dim, generator=_seeded()), inputs

    return build


def _hard(rows: int, dtype: Any, generator: Any) -> Any:
    """A hard sample at tau = 0, times the logits, so that there is a gradient to compare."""
    from kexue.stats import gumbel_softmax

    inputs = (normal(rows, 7, dtype=dtype, generator=generator),)
    return lambda x: (x * gumbel_softmax(x, 0.0, generator=_seeded())).sum(1), inputs


def _score(baseline: str) -> Callable[..., Any]:
    def build(rows: int, dtype: Any, generator: Any) -> Any:
        from kexue.stats import score_function_loss

        logp = normal(3, rows, dtype=dtype, generator=generator).T  # three samples of each row's problem
        reward = normal(3, rows, dtype=dtype, generator=generator)
        return lambda x: score_function_loss(x.T, reward.to(x.dtype), baseline), (logp.contiguous(),)

    return build


def _divergence(rows: int, dtype: Any, generator: Any) -> Any:
    from kexue.stats import kl_to_uniform

    return kl_to_uniform, (normal(rows, 7, dtype=dtype, generator=generator),)


def _normal_sample(rows: int, dtype: Any, generator: Any) -> Any:
    from kexue.stats import rsample_normal

    inputs = tuple(normal(rows, 4, dtype=dtype, generator=generator) for _ in range(2))
    return lambda mu, log_var: rsample_normal(mu, log_var, _seeded()), inputs


# Equal seeds give other noise in other dtypes, and torch.compile takes no generator: both have tests of their own.
_DRAWS: dict[str, Any] = {"row_independent": True, "dtypes": ("float64",), "compile": False}
CASES["reparameterization"] = [
    TensorCase("soft", _soft(1.0, -1), **_DRAWS),
    TensorCase("soft, axis 1", _soft(0.5, 1), **_DRAWS),
    TensorCase("hard", _hard, **_DRAWS),
    TensorCase("normal sample", _normal_sample, dtypes=("float64",), compile=False),
    *(TensorCase(f"score function {name}", _score(name)) for name in ("none", "mean", "loo", "ema")),
    TensorCase("divergence from uniform", _divergence, row_independent=True),
]
