"""Wasserstein distance of two clouds of points (Wasserstein 距离).

Source: 科学空间 6280 (从Wasserstein距离、对偶理论到WGAN).

    W_p = (min over plans of sum plan_ij d(x_i, y_j)^p)^(1/p)

In one dimension the optimal plan is monotone: both sides are sorted and their distribution functions merged, which
takes O(n log n) and no matrix of costs; the potentials are running sums along the merged functions. Otherwise the plan
comes from :func:`kexue.stats.transport`. Gradients by the envelope theorem: only the at most n + m - 1 pairs that the
plan uses enter the backward pass.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from kexue._checks import check_real
from kexue.stats._ground import (
    METRICS,
    Array,
    Metric,
    attach,
    check_metric,
    check_pair,
    costs_of,
    is_traced,
    paired_costs,
    tensor_costs,
    to_points,
    to_weights,
    working,
)
from kexue.stats.transport import solve, transport, weight_tensor

__all__ = ["wasserstein"]


LARGE = 4096  # points on the line from which a compiled kernel pays
LIMIT = torch.finfo(torch.float64).max
ROOM = 400  # powers of two that the largest cost may be away from 1


def _power(x: Array, power: float) -> Array:
    return x if power == 1 else x * x if power == 2 else x**power


def _unit(x: Tensor, y: Tensor, power: float) -> Tensor:
    """What to divide points by, a power of two and mostly 1, so that powers of their distances stay in range."""
    (a, b), (c, d) = (z.aminmax() if z.shape[1] == 1 else z.aminmax(dim=0) for z in (x, y))
    lowest, highest = torch.minimum(a, c), torch.maximum(b, d)
    size = (highest / 2 - lowest / 2).amax().log2()
    unit = size.round().clamp(-1000, 1000).exp2()
    return torch.where((size.abs() * power <= ROOM) | ~size.isfinite(), 1.0, unit)


def _scaled(x: Tensor, value: Tensor, slope: Any) -> Tensor:
    """Return x times ``value`` whose gradient is that of x times ``slope``: a product of both could leave the range."""
    return x.detach() * value + (x - x.detach()) * slope


def _root(cost: Tensor, order: float) -> Tensor:
    if order == 1:
        return cost
    positive = cost > 0
    return torch.where(positive, torch.where(positive, cost, 1.0) ** (1 / order), 0.0)


def _order(x: Array) -> Any:
    if len(x) < LARGE:
        return np.argsort(x)
    from kexue.stats._line_kernel import sort_with

    return sort_with(x, np.arange(len(x)))[1]


def line(x: Array, y: Array, a: Array, b: Array) -> tuple[Any, Any, Any, Any, Array]:
    """The monotone plan on the line: sorting orders of both sides, and n + m - 1 pairs (i, j, mass) of ranks."""
    left, right = _order(x), _order(y)
    n, m = len(x), len(y)
    if n == m and a[0] == b[0] and (a == a[0]).all() and (b == b[0]).all():
        steps = np.arange(2 * n - 1)  # rank by rank; the pairs between them carry no mass
        return left, right, steps // 2, (steps + 1) // 2, np.where(steps % 2 == 0, a[0], 0.0)
    ca, cb = np.cumsum(a[left]), np.cumsum(b[right])
    cb *= ca[-1] / cb[-1]
    cb[cb >= cb[-1]] = ca[-1]  # a last point without mass gets none by rounding either: it may be far away
    ends = np.concatenate([ca[:-1], cb[:-1]])
    order = np.argsort(ends, kind="stable")  # two sorted runs: a merge
    first = order < n - 1
    i = np.concatenate([[0], np.cumsum(first)])
    j = np.arange(n + m - 1) - i
    mass = np.diff(ends[order], prepend=0.0, append=ca[-1])
    return left, right, i, j, mass


def _ordered(left: tuple[Array, Array], right: tuple[Array, Array]) -> tuple[Array, Array, Array, Array]:
    return left[0], right[0], left[1], right[1]


def line_cost(x: Array, y: Array, a: Array, b: Array, power: float) -> float:
    """Cost of the monotone plan, with equal weights without building it."""
    matched = len(x) == len(y) and (a == a[0]).all() and (b == b[0]).all()
    if not matched and (a.min() == 0 or b.min() == 0):  # or rounding could give mass to far points that have none
        (x, a), (y, b) = ((z[w > 0], w[w > 0]) for z, w in ((x, a), (y, b)))
    if len(x) + len(y) >= LARGE:
        from kexue.stats._line_kernel import matched_cost, merge_cost, sort, sort_with

        if matched:
            return float(matched_cost(sort(x), sort(y), power) * a.sum())
        return float(merge_cost(*_ordered(sort_with(x, a), sort_with(y, b)), power))
    if matched:
        return float(_power(abs(np.sort(x) - np.sort(y)), power).mean() * a.sum())
    first, second, i, j, mass = line(x, y, a, b)
    return float(mass @ _power(abs(x[first][i] - y[second][j]), power))


def _line_solution(x: Array, y: Array, a: Array, b: Array, power: float) -> tuple[Any, Any, Array, Array, Array]:
    """Pairs (rows, columns, mass) and potentials f, g; complementary slackness along the merged staircase."""
    left, right, i, j, mass = line(x, y, a, b)
    c = _power(abs(x[left][i] - y[right][j]), power)
    rise, moved = np.diff(c), np.diff(i) > 0
    f, g = np.empty(len(x)), np.empty(len(y))
    f[left] = np.concatenate([[0.0], np.cumsum(rise[moved])])
    g[right] = c[0] + np.concatenate([[0.0], np.cumsum(rise[~moved])])
    mean = float(f.mean())
    return left[i], right[j], mass, f - mean, g + mean


def _solution(X: Array, Y: Array, a: Array, b: Array, metric: str, power: float) -> tuple[Array, ...]:
    if X.shape[1] == 1:
        return _line_solution(X.ravel(), Y.ravel(), a, b, power * (1 if METRICS[metric] else 2))
    plan, f, g, _, _, _ = solve(costs_of(X, Y, metric, power), a, b)
    rows, columns = np.nonzero(plan)
    room = len(a) + len(b) - 1
    mass = plan[rows, columns]
    if len(rows) > room:  # the solver stopped early, with a plan that is no vertex; keep shapes fixed all the same
        raise RuntimeError("the solver found no vertex of the plans; use transport with a larger max_iter")
    pad = (0, room - len(rows))
    return np.pad(rows, pad), np.pad(columns, pad), np.pad(mass, pad), f, g


def _solve_tensors(
    X: Tensor, Y: Tensor, a: Tensor, b: Tensor, metric: str, power: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    x, y = to_points("X", X), to_points("Y", Y)
    found = _solution(x, y, *to_weights(a, b, len(x), len(y), names="ab"), metric, power)
    rows, columns, mass, f, g = (torch.from_numpy(np.ascontiguousarray(v)).to(X.device) for v in found)
    return rows, columns, mass, f, g


@torch.library.custom_op("kexue::wasserstein", mutates_args=())
def _wasserstein_op(
    X: Tensor, Y: Tensor, a: Tensor, b: Tensor, metric: str, power: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _solve_tensors(X, Y, a, b, metric, power)


@_wasserstein_op.register_fake
def _(X, Y, a, b, metric, power):  # type: ignore[no-untyped-def]
    n, m = X.shape[0], Y.shape[0]
    pairs = [X.new_empty(n + m - 1, dtype=torch.int64) for _ in range(2)]
    return *pairs, *(X.new_empty(k, dtype=torch.float64) for k in (n + m - 1, n, m))


def pair_of_tensors(X: Any, Y: Any) -> tuple[Tensor, Tensor, torch.dtype]:
    """Both sets of points as (n, D) tensors of one device, in float64, and the dtype of results."""
    dtype, device = working(X, Y)
    found = []
    for name, x in (("X", X), ("Y", Y)):
        x = x if isinstance(x, Tensor) else torch.from_numpy(to_points(name, x)).to(device)
        if x.is_complex():
            raise TypeError(f"{name} must hold real numbers; got dtype {x.dtype}")
        if x.dim() not in (1, 2):
            raise ValueError(f"{name} must have 1 or 2 dimensions; got shape {tuple(x.shape)}")
        if x.numel() == 0:
            raise ValueError(f"{name} must not be empty; got shape {tuple(x.shape)}")
        found.append((x[:, None] if x.dim() == 1 else x).to(torch.float64))
    check_pair(*found)
    return found[0], found[1], dtype


def check_weights_pair(weights: Any) -> tuple[Any, Any]:
    """The two of ``weights``, or two times None."""
    if weights is None:
        return None, None
    if not isinstance(weights, (tuple, list)) or len(weights) != 2:
        raise TypeError(f"weights must be a pair (a, b); got {type(weights).__name__}")
    return weights[0], weights[1]


def wasserstein(
    X: Any,
    Y: Any,
    p: float = 1,
    metric: Metric = "euclidean",
    weights: Any = None,
    *,
    normalize: bool = False,
) -> Any:
    """Wasserstein distance of order p of two weighted clouds of points.

    Computed in float64 on the CPU. Points on the line need O(n) memory, others the (n, m) matrix of costs.

    Args:
        X: (n, D) points, or (n,) numbers; array or tensor.
        Y: (m, D) points.
        p: Order, at least 1.
        metric: "euclidean", "cityblock", "chebyshev", "sqeuclidean" (no metric: p = 1 gives the mean squared distance,
            without a root), or a callable of two points (D,), or of (n, D) and (m, D) that returns (n, m).
        weights: Pair (a, b) of masses (n,) and (m,) with equal totals; None (also for one of them) is uniform.
        normalize: Divide the weights by their totals; without it unequal totals are an error.

    Returns:
        A float for arrays; for tensors a scalar in float32 (float64 for float64), differentiable for X, Y, a and b.
        Where the distance is 0 and p > 1 the gradient is 0.

    Raises:
        TypeError: Not numbers, unknown kind of metric.
        ValueError: Not finite, empty, shapes that do not fit, weights that are no weights, p < 1.

    Reference:
        https://spaces.ac.cn/archives/6280

    Example:
        >>> wasserstein([0.0, 1.0], [2.0, 5.0])
        3.0
        >>> x = torch.tensor([[0.0, 0.0], [0.0, 4.0]], requires_grad=True)
        >>> wasserstein(x, torch.tensor([[3.0, 0.0], [0.0, 5.0]])).backward()
        >>> x.grad
        tensor([[-0.5000,  0.0000],
                [ 0.0000, -0.5000]])
    """
    check_real("p", p, minimum=1.0)
    check_metric(metric)
    a, b = check_weights_pair(weights)
    order = float(p)
    if not any(isinstance(x, Tensor) for x in (X, Y, a, b)):
        u, v = to_points("X", X), to_points("Y", Y)
        check_pair(u, v)
        a, b = to_weights(a, b, len(u), len(v), normalize, "ab")
        if callable(metric):
            total, unit = solve(costs_of(u, v, metric, order), a, b)[3], 1.0
        else:
            power = order if METRICS[metric] else 2 * order
            unit = float(_unit(torch.from_numpy(u), torch.from_numpy(v), power))
            if unit != 1:
                u, v = u / unit, v / unit
            if u.shape[1] == 1:
                total = line_cost(u.ravel(), v.ravel(), a, b, power)
            else:
                total = solve(costs_of(u, v, metric, order), a, b)[3]
        value = max(total, 0.0) ** (1 / order) if order != 1 else total
        value = value * unit * (unit if metric == "sqeuclidean" else 1.0)  # the square of the unit may leave the range
        if not np.isfinite(value):
            raise ValueError(f"the distance overflows float64; got {value}")
        return value
    if not isinstance(X, Tensor) and not isinstance(Y, Tensor):
        device = next(w.device for w in (a, b) if isinstance(w, Tensor))
        X = torch.from_numpy(to_points("X", X)).to(device)
    x, y, dtype = pair_of_tensors(X, Y)
    a = weight_tensor("a", a, len(x), x.device, normalize)
    b = weight_tensor("b", b, len(y), x.device, normalize)
    if callable(metric):
        return _root(transport(tensor_costs(x, y, metric, order), a, b).cost, order).to(dtype)
    # D(x) = step^k D(x / step), so that the gradient for x is that for x / step, times the step if k = 2
    step = _unit(x.detach(), y.detach(), order if METRICS[metric] else 2 * order)
    whole = step if METRICS[metric] else (step * step).clamp(max=LIMIT)
    arguments = x.detach() / step, y.detach() / step, a.detach(), b.detach(), metric, order
    rows, columns, mass, f, g = (_wasserstein_op if is_traced() else _solve_tensors)(*arguments)
    x, y = (_scaled(z, 1 / step, 1.0 if METRICS[metric] else step) for z in (x, y))
    cost = (mass * paired_costs(x[rows], y[columns], metric, order)).sum()
    cost = attach(cost, *((w, (h * whole).clamp(-LIMIT, LIMIT)) for w, h in ((a, f), (b, g))))
    value = _root(cost, order)
    value = _scaled(value, step, 1.0)
    if not METRICS[metric]:
        value = _scaled(value, step, 1.0)
    if not is_traced() and not torch.isfinite(value.detach()):
        raise ValueError(f"the distance overflows float64; got {float(value.detach())}")
    return value.to(dtype)
