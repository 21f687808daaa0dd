"""The exact Wasserstein critic of two samples (Kantorovich-Rubinstein 对偶, WGAN 的最优判别器).

Source: 科学空间 6280 (从Wasserstein距离、对偶理论到WGAN); the extension: McShane 1934.

    W_1 = max over f with |f(x) - f(y)| <= d(x, y) of  E_p f - E_q f

From the column potentials g of the transport problem, f(x) = min_j (d(x, y_j) - g_j) is 1-Lipschitz everywhere and
attains the maximum. The form with a single f needs the triangle inequality: for a cost without it, such as the squared
distance, its maximum is smaller than the transport cost, so that such a cost is refused.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kexue.stats._ground import (
    METRICS,
    Array,
    Metric,
    check_metric,
    check_pair,
    costs_of,
    tensor_costs,
    to_array,
    to_points,
    to_weights,
)
from kexue.stats.transport import solve
from kexue.stats.wasserstein import check_weights_pair

__all__ = ["KRPotential", "kr_potential"]

SAMPLE = 96  # points whose triples are checked
SLACK = 1e-6  # relative: torch.cdist leaves about 1e-7 on the diagonal
BLOCK = 2**20  # distances computed together, 8 MiB


@dataclass(frozen=True)
class KRPotential:
    """The critic made by :func:`kr_potential`; call it with points.

    Attributes:
        value: W_1, which E_p f - E_q f attains.
        gap: Proven bound of its error.
        g: (m,) column potentials; f(x) = min_j (d(x, y_j) - g_j).
    """

    value: float
    gap: float
    g: Array = field(repr=False)
    _points: Array = field(repr=False)
    _metric: Metric = field(repr=False)
    _flat: bool = field(repr=False)
    _tensors: bool = field(repr=False)

    def __call__(self, x: Any) -> Any:
        """Values of the critic.

        Args:
            x: (..., D) points; numbers of any shape if the samples were flat. A tensor is differentiated, with the
                gradient of the point y_j that attains the minimum.

        Returns:
            (...) values: float64 for arrays; float32 for tensors (float64 for float64).
        """
        shape = tuple(x.shape) if isinstance(x, Tensor) else np.shape(x)
        width = self._points.shape[1]
        if not self._flat and (not shape or shape[-1] != width):
            raise ValueError(f"x must have points of width {width} on its last axis; got shape {shape}")
        out = shape if self._flat else shape[:-1]
        if isinstance(x, Tensor):
            flat = x.reshape(-1, width).to(torch.float64)
            y, g = (torch.from_numpy(v).to(x.device) for v in (self._points, self.g))
            made = (tensor_costs(flat, y, self._metric, 1.0) - g).amin(1) if len(flat) else flat.sum(1)
            return made.reshape(out).to(torch.float64 if x.dtype == torch.float64 else torch.float32)
        if 0 in shape:
            return np.zeros(out)
        points = to_points("x", np.reshape(np.asarray(x), (-1, width)))
        values = np.empty(len(points))
        step = max(1, BLOCK // len(self._points))
        for start in range(0, len(points), step):
            costs = _distances(points[start : start + step], self._points, self._metric, self._tensors)
            values[start : start + step] = (costs - self.g).min(1)
        return values.reshape(out)


def _distances(x: Array, y: Array, metric: Metric, tensors: bool) -> Array:
    """Distances (n, m); a callable gets what the samples were, arrays or tensors."""
    if not callable(metric) or not tensors:
        return costs_of(x, y, metric)
    with torch.no_grad():
        costs = tensor_costs(torch.from_numpy(x), torch.from_numpy(y), metric, 1.0)
    return to_array("the costs of metric", costs, (2,))


def _check_triangle(points: Array, metric: Metric, tensors: bool) -> None:
    """Raise ValueError unless the costs between some points are those of a metric.

    Also midpoints are looked at, because the critic is extended beyond the samples.
    """
    points = np.unique(points, axis=0)
    if len(points) > SAMPLE:
        points = points[np.random.default_rng(0).permutation(len(points))[:SAMPLE]]
    half = len(points) // 2
    points = np.concatenate([points, (points[:half] + points[half : 2 * half]) / 2])
    d = _distances(points, points, metric, tensors)
    slack = SLACK * float(abs(d).max())
    if d.min() < -slack or abs(np.diagonal(d)).max() > slack or abs(d - d.T).max() > slack:
        raise ValueError("metric must be a metric; got costs that are negative, asymmetric or not 0 from x to x")
    worst, where = 0.0, (0, 0, 0)
    for k in range(len(points)):
        excess = d - d[:, k, None] - d[k]
        if excess.max() > worst:
            i, j = np.unravel_index(int(excess.argmax()), excess.shape)
            worst, where = float(excess.max()), (int(i), k, int(j))
    if worst > slack:
        x, y, z = where
        raise ValueError(
            "metric must satisfy the triangle inequality, or no single potential attains the transport cost; "
            f"got d(x, z) = {d[x, z]:.6g} > d(x, y) + d(y, z) = {d[x, y] + d[y, z]:.6g}"
        )


def kr_potential(
    X: Any, Y: Any, metric: Metric = "euclidean", weights: Any = None, *, normalize: bool = False
) -> KRPotential:
    """The best 1-Lipschitz critic of two samples: what the critic of a WGAN is trained to be.

    Args:
        X: (n, D) points, or (n,) numbers; array or tensor.
        Y: (m, D) points.
        metric: A metric: "euclidean", "cityblock", "chebyshev", or a callable as in :func:`kexue.stats.wasserstein`,
            whose triangle inequality is checked on up to 96 of the points and on midpoints.
        weights: Pair (a, b) of masses with equal totals; None (also for one of them) is uniform.
        normalize: Divide the weights by their totals.

    Returns:
        :class:`KRPotential`.

    Raises:
        TypeError: Not numbers.
        ValueError: A cost that is no metric; otherwise as in :func:`kexue.stats.wasserstein`.

    Reference:
        https://spaces.ac.cn/archives/6280

    Example:
        >>> f = kr_potential([0.0, 1.0], [2.0, 5.0])
        >>> f.value, float(f([0.0, 1.0]).mean() - f([2.0, 5.0]).mean())
        (3.0, 3.0)
    """
    check_metric(metric)
    if isinstance(metric, str) and not METRICS[metric]:
        raise ValueError(
            f"metric must be a metric, for example 'euclidean'; got {metric!r}, which violates the triangle "
            "inequality: no single potential attains its transport cost"
        )
    x, y = to_points("X", X), to_points("Y", Y)
    check_pair(x, y)
    a, b = to_weights(*check_weights_pair(weights), len(x), len(y), normalize, "ab")
    tensors = isinstance(X, Tensor) or isinstance(Y, Tensor)
    if callable(metric):
        _check_triangle(np.concatenate([x, y]), metric, tensors)
    _, _, g, cost, gap, _ = solve(_distances(x, y, metric, tensors), a, b)
    flat = (X.dim() if isinstance(X, Tensor) else np.ndim(X)) == 1
    critic = KRPotential(cost, gap, g, y, metric, flat, tensors)
    attained = float(a @ critic(x[:, 0] if flat else x) - b @ critic(y[:, 0] if flat else y))
    if attained > cost + SLACK * max(abs(cost), float(abs(g).max())):  # no critic can: the Lipschitz bound is broken
        raise ValueError(f"metric must satisfy the triangle inequality; got a potential worth {attained} > {cost}")
    return critic
