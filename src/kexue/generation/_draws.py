"""Draws of a proposal with torch.distributions' interface: batches, their weights, parts of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """Torch's global generator, which distributions draw from, at ``seed`` within the block and as before after it."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def draw(q: Any, n: int) -> Any:
    """N draws: a tensor or array with n rows, or a list."""
    with torch.no_grad():
        x = q.sample((n,))
    if not hasattr(x, "__len__") or len(x) != n:
        got = tuple(x.shape) if hasattr(x, "shape") else type(x).__name__
        raise ValueError(f"q.sample(({n},)) must give {n} draws; got {got}")
    return x


def select(x: Any, rows: NDArray[np.int64]) -> Any:
    """Some of the draws."""
    if isinstance(x, Tensor):
        return x[torch.as_tensor(rows, device=x.device)]
    return x[rows] if isinstance(x, np.ndarray) else [x[i] for i in rows.tolist()]


def stack(parts: list[Any]) -> Any:
    """Batches of draws one after another."""
    if isinstance(parts[0], Tensor):
        return torch.cat(parts)
    return np.concatenate(parts) if isinstance(parts[0], np.ndarray) else [x for part in parts for x in part]


def _numbers(values: Any, n: int, name: str) -> tuple[NDArray[np.float64], float]:
    """(n,) float64 and the rounding unit of what came."""
    unit = 2.0**-52
    if isinstance(values, Tensor):
        if values.is_floating_point():
            unit = torch.finfo(values.dtype).eps
        values = values.detach().cpu().double().numpy()
    elif isinstance(values, np.ndarray) and values.dtype.kind == "f":
        unit = float(np.finfo(values.dtype).eps)
    found = np.asarray(values, dtype=np.float64)
    if found.shape != (n,):
        raise ValueError(
            f"{name} must give one number for each of {n} draws; got the shape {found.shape}"
            + (" (several dimensions of one draw: torch.distributions.Independent)" if found.ndim > 1 else "")
        )
    return found, unit


def log_ratio(target: Any, q: Any) -> Callable[[Any], tuple[NDArray[np.float64], float]]:
    """The function from a batch of draws of q to log rho - log q, (n,) float64, and the rounding error in it.

    Raises:
        TypeError: A target that is not callable, a proposal without ``sample`` and ``log_prob``.
    """
    rho = target if callable(target) else getattr(target, "log_rho", None)
    if not callable(rho):
        raise TypeError(f"target must be callable, x -> log rho(x); got {type(target).__name__}")
    for name in ("sample", "log_prob"):
        if not callable(getattr(q, name, None)):
            raise TypeError(f"q must have sample(shape) and log_prob(x); {type(q).__name__} has no {name}")

    def ratio(x: Any) -> tuple[NDArray[np.float64], float]:
        with torch.no_grad():
            above, unit = _numbers(rho(x), len(x), "target")
            below, other = _numbers(q.log_prob(x), len(x), "q.log_prob")
        if np.isnan(above).any() or (above == np.inf).any():
            raise ValueError("the target must give log rho as numbers or -inf; got NaN or +inf")
        if not np.isfinite(below).all():
            raise ValueError(f"q.log_prob must be finite at draws of q; got {below[~np.isfinite(below)][0]}")
        finite = above[np.isfinite(above)]
        size = max(1.0, float(np.abs(below).max(initial=0.0)), float(np.abs(finite).max(initial=0.0)))
        return above - below, 16 * max(unit, other) * size

    return ratio
