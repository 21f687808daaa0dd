"""What the methods of optimal transport share: points, weights, ground costs.

The solvers compute in float64 numpy on the CPU; tensors come in through here and results go back as tensors.
Shapes: n and m points of width D, costs (n, m), weights (n,) and (m,).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kexue._tensors import compute_dtype

Array = np.ndarray[Any, np.dtype[np.float64]]
Metric = str | Callable[[Any, Any], Any]

# name -> whether it is a metric: the square of a distance violates the triangle inequality
METRICS = {"euclidean": True, "cityblock": True, "chebyshev": True, "sqeuclidean": False}
_NORMS = {"euclidean": 2.0, "cityblock": 1.0, "chebyshev": float("inf"), "sqeuclidean": 2.0}


def check_finite(name: str, array: Array) -> None:
    """Raise ValueError unless all numbers are finite."""
    if not np.isfinite(array).all():
        bad = np.argwhere(~np.isfinite(array))[0]
        raise ValueError(f"{name} must be finite; got {array[tuple(bad)]} at {tuple(int(i) for i in bad)}")


def to_array(name: str, x: Any, dims: tuple[int, ...], finite: bool = True) -> Array:
    """Finite float64 array with one of the numbers of dimensions, not empty; TypeError or ValueError otherwise.

    ``finite=False`` leaves that check to the caller.
    """
    if isinstance(x, Tensor):
        if x.is_complex():
            raise TypeError(f"{name} must hold real numbers; got dtype {x.dtype}")
        raw = x.detach().cpu().to(torch.float64).numpy()
    else:
        raw = np.asarray(x)
        if raw.dtype.kind not in "fiub":
            raise TypeError(f"{name} must hold real numbers; got dtype {raw.dtype} of {type(x).__name__}")
    array: Array = np.ascontiguousarray(raw, dtype=np.float64) if raw.ndim else np.asarray(raw, dtype=np.float64)
    if array.ndim not in dims:
        raise ValueError(f"{name} must have {' or '.join(map(str, dims))} dimensions; got shape {array.shape}")
    if array.size == 0:
        raise ValueError(f"{name} must not be empty; got shape {array.shape}")
    if finite:
        check_finite(name, array)
    return array


def to_points(name: str, x: Any) -> Array:
    """(n, D) points; a flat array holds n numbers."""
    array = to_array(name, x, (1, 2))
    return array[:, None] if array.ndim == 1 else array


def check_pair(x: Any, y: Any) -> None:
    """Raise ValueError unless both sets of points have equal width."""
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"X and Y must have points of equal width; got {x.shape[1]} and {y.shape[1]}")


def check_metric(metric: Any) -> None:
    """Raise unless ``metric`` is a known name or callable."""
    if callable(metric):
        return
    if not isinstance(metric, str):
        raise TypeError(f"metric must be a name or a callable; got {metric!r} of type {type(metric).__name__}")
    if metric not in METRICS:
        raise ValueError(f"metric must be one of {', '.join(map(repr, METRICS))} or a callable; got {metric!r}")


def _tolerance(x: Any) -> float:
    """How far totals may differ relatively: sums of low-precision weights are only that accurate."""
    if isinstance(x, Tensor) and x.is_floating_point():
        return {torch.float64: 1e-9, torch.float32: 1e-5}.get(x.dtype, 2e-2)
    kind = getattr(x, "dtype", None)
    return 1e-5 if kind == np.float32 else 2e-2 if kind == np.float16 else 1e-9


def to_weights(p: Any, q: Any, n: int, m: int, normalize: bool = False, names: str = "pq") -> tuple[Array, Array]:
    """Weights of n and m points in float64 with exactly comparable totals; None is uniform with total 1.

    ``normalize`` divides each by its total; without it different totals are an error.
    """
    found, slack = [], 1e-9
    for name, w, count in ((names[0], p, n), (names[1], q, m)):
        if w is None:
            found.append(np.full(count, 1.0 / count))
            continue
        array = to_array(name, w, (1,))
        if len(array) != count:
            raise ValueError(f"{name} must have shape ({count},); got {array.shape}")
        if array.min() < 0:
            raise ValueError(f"{name} must be non-negative; got {array.min()} at {int(array.argmin())}")
        total = float(array.sum())
        if not 0 < total < np.inf:
            raise ValueError(f"{name} must have a positive finite total; got {total}")
        if normalize:
            array = array / total
        found.append(array)
        slack = max(slack, _tolerance(w))
    a, b = found
    total, other = float(a.sum()), float(b.sum())
    if abs(total - other) > slack * max(total, other):
        raise ValueError(
            f"{names[0]} and {names[1]} must have equal totals; got {total:.12g} and {other:.12g} "
            "(normalize=True divides each by its total)"
        )
    return a, b * (total / other)


def named_costs(x: Array, y: Array, metric: str, power: float) -> Array:
    """(n, m) costs metric(x_i, y_j) ** power in float64."""
    from scipy.spatial.distance import cdist

    costs: Array = cdist(x, y, metric)
    if power != 1:
        with np.errstate(over="ignore"):
            np.multiply(costs, costs, out=costs) if power == 2 else np.power(costs, power, out=costs)
    if not np.isfinite(costs).all():
        raise ValueError(f"the costs overflow float64; got points up to {max(abs(x).max(), abs(y).max()):.3g} apart")
    return costs


def called_costs(x: Any, y: Any, metric: Callable[[Any, Any], Any]) -> Any:
    """(n, m) costs of a callable, which takes two points (D,) or, failing that, (n, D) and (m, D) at once."""
    n, m = len(x), len(y)
    try:
        first = metric(x[0], y[0])
        single = np.ndim(first.detach() if isinstance(first, Tensor) else first) == 0
    except Exception:  # it wants matrices; its own error comes out below if it does not
        single = False
    if not single:
        costs = metric(x, y)
        if tuple(np.shape(costs)) != (n, m):
            raise ValueError(f"metric must return a number for two points or ({n}, {m}); got shape {np.shape(costs)}")
        return costs
    rows = [metric(a, b) for a in x for b in y]
    if isinstance(rows[0], Tensor):
        return torch.stack(rows).reshape(n, m)
    return np.array(rows, dtype=np.float64).reshape(n, m)


def costs_of(x: Array, y: Array, metric: Metric, power: float = 1.0) -> Array:
    """(n, m) costs of numpy points."""
    if isinstance(metric, str):
        return named_costs(x, y, metric, power)
    costs = to_array("the costs of metric", called_costs(x, y, metric), (2,))
    if power != 1 and costs.min() < 0:
        raise ValueError(f"metric must be non-negative for p = {power:g}; got {costs.min()}")
    return costs if power == 1 else costs**power


def tensor_costs(x: Tensor, y: Tensor, metric: Metric, power: float) -> Tensor:
    """:func:`costs_of` for tensors, differentiable; a distance of 0 has gradient 0."""
    if callable(metric):
        costs = called_costs(x, y, metric)
        if not isinstance(costs, Tensor):
            raise TypeError(f"metric must return tensors for tensors; got {type(costs).__name__}")
    else:
        costs = torch.cdist(x, y, _NORMS[metric], compute_mode="donot_use_mm_for_euclid_dist")
        power = 2 * power if metric == "sqeuclidean" else power
    return costs if power == 1 else costs**power


def paired_costs(x: Tensor, y: Tensor, metric: str, power: float) -> Tensor:
    """Costs (k,) of k pairs (k, D), differentiable; a distance of 0 has gradient 0."""
    apart = x - y
    if metric == "sqeuclidean":
        metric, power = "euclidean", 2 * power
    if metric == "euclidean" and x.shape[1] > 1:
        if power == 2:
            return apart.square().sum(1)
        top = apart.detach().abs().amax(1, keepdim=True)  # squares of tiny and huge differences leave the range
        safe = torch.where(top > 0, top, 1.0)
        squares = (apart / safe).square().sum(1)
        distance = torch.where(squares > 0, squares, 1.0).sqrt() * safe.squeeze(1)
        distance = torch.where(squares > 0, distance, 0.0)
    elif metric == "chebyshev":
        distance = apart.abs().amax(1)
    else:
        distance = apart.abs().sum(1)
    return distance if power == 1 else distance**power


def is_traced() -> bool:
    """Whether torch.compile traces: values cannot be looked at then."""
    return torch.compiler.is_compiling()


def working(*tensors: Any) -> tuple[torch.dtype, torch.device]:
    """Dtype and device of results: float64 if a tensor is float64, else float32; the device of the first tensor."""
    found = [t for t in tensors if isinstance(t, Tensor)]
    return compute_dtype(*found), found[0].device


def attach(value: Tensor, *parts: tuple[Any, Tensor]) -> Tensor:
    """``value`` with the given gradients: pairs of (input, gradient). Inputs that are no tensors have none."""
    for x, grad in parts:
        if isinstance(x, Tensor) and x.requires_grad:
            x = x.to(value.dtype)
            value = value + ((x - x.detach()) * grad.to(value.dtype)).sum()
    return value
