"""Inverse transform and alias table (逆变换采样, Alias Method): the base tools under every sampler.

Sources: inverse transform, folklore; alias tables: Walker 1977, built as in Vose 1991.

    one dimension     x = F^-1(u), u uniform in [0, 1)
    categories        k = the first with c_k > u c_K, c the cumulated weights: O(log K) for each draw
    alias table       i = floor(u K); i itself with probability p_i, else its alias: O(1) for each draw

What differs from the usual script: weights need not sum to 1 and may be given as logarithms (float32 probabilities that
sum to 1 - 1e-7 cannot fail), a weight of 0 is never drawn, and the edges are in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kexue._checks import check_int
from kexue.words._numba import kernel

__all__ = ["AliasTable", "inverse_transform"]


def _weights(weights: Any, log: bool) -> NDArray[np.float64]:
    """(K,) float64, largest 1 for logarithms."""
    if isinstance(weights, Tensor):
        weights = weights.detach().cpu().double().numpy()
    w = np.asarray(weights, dtype=np.float64)
    if w.ndim != 1 or not len(w):
        raise ValueError(f"weights must be one-dimensional and hold at least one; got the shape {w.shape}")
    if log:
        if np.isnan(w).any() or w.max() in (-np.inf, np.inf):
            raise ValueError("log weights must be numbers or -inf, one of them finite")
        w = np.exp(w - w.max())
    if not (np.isfinite(w).all() and (w >= 0).all() and w.max() > 0):
        bad = w[~(np.isfinite(w) & (w >= 0))]
        raise ValueError(
            f"weights must be finite, at least 0 and not all 0; got {bad[0] if len(bad) else 'zeros only'}"
        )
    return w / w.max()  # the sum of many large weights would overflow


def _shape(shape: Any) -> tuple[int, ...]:
    sizes = tuple(shape) if isinstance(shape, tuple | list | torch.Size) else (shape,)
    for size in sizes:
        check_int("shape", size, 0)
    return sizes


def inverse_transform(
    law: Callable[[Any], Any] | Any,
    shape: int | tuple[int, ...],
    *,
    grid: Any = None,
    log: bool = False,
    seed: int | np.random.Generator = 0,
) -> NDArray[Any]:
    """Draw from a law on the line or over K categories by its inverse distribution function.

    Args:
        law: The inverse distribution function, callable on an array of u in [0, 1); or (K,) weights of categories;
            with ``grid`` the density at its points, as (M,) values or a callable.
        shape: Number of draws, or a shape.
        grid: (M,) increasing points: the density is taken as linear between them and as 0 outside, and its inverse is
            exact (a square root, no search for a zero).
        log: Whether weights or densities are logarithms.
        seed: Seed, or a numpy Generator to go on with.

    Returns:
        Category numbers, int64, for weights; otherwise numbers.

    Raises:
        ValueError: Weights that are negative, not finite, or all 0; a grid that does not increase.

    Example:
        >>> inverse_transform([0.0, 1.0, 0.0], 4)
        array([1, 1, 1, 1])
        >>> x = inverse_transform(lambda u: -np.log1p(-u), 10000)  # exponential
        >>> y = inverse_transform(lambda x: np.exp(-x), 10000, grid=np.linspace(0, 20, 2001))
        >>> bool(abs(x.mean() - 1) < 0.05), bool(abs(y.mean() - 1) < 0.05)
        (True, True)
    """
    sizes = _shape(shape)
    u = np.random.default_rng(seed).random(sizes)
    if grid is not None:
        points = np.asarray(grid, dtype=np.float64)
        if points.ndim != 1 or len(points) < 2 or not np.isfinite(points).all() or not (np.diff(points) > 0).all():
            raise ValueError("grid must hold at least two finite points in increasing order")
        density = _weights(law(points) if callable(law) else law, log)
        if len(density) != len(points):
            raise ValueError(f"the density must be given at the {len(points)} points of the grid; got {len(density)}")
        return _piecewise_linear(points, density, u)
    if callable(law):
        x = np.asarray(law(u))
        if x.shape != u.shape:
            raise ValueError(f"the inverse distribution function must keep the shape {u.shape}; got {x.shape}")
        return x
    edges = np.cumsum(_weights(law, log))
    found = np.searchsorted(edges, u * edges[-1], side="right")
    last = int(np.flatnonzero(np.diff(edges, prepend=0.0))[-1])  # u * total may round up to the total
    return np.minimum(found, last).astype(np.int64)


def _piecewise_linear(
    points: NDArray[np.float64], density: NDArray[np.float64], u: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Exact inverse for a density that is linear between points."""
    width = np.diff(points)
    mass = width * (density[:-1] + density[1:]) / 2
    edges = np.concatenate([[0.0], np.cumsum(mass)])
    goal = u * edges[-1]
    last = int(np.flatnonzero(mass)[-1])
    k = np.minimum(np.searchsorted(edges, goal, side="right") - 1, last)
    rest, a, slope = goal - edges[k], density[k], (density[k + 1] - density[k]) / width[k]
    # slope s^2 / 2 + a s = rest, in the form that also holds for slope 0
    root = np.sqrt(np.maximum(a * a + 2 * slope * rest, 0.0))
    step = np.divide(2 * rest, a + root, out=np.zeros_like(rest), where=a + root > 0)
    return points[k] + np.minimum(step, width[k])


@kernel
def _build(scaled, keep, alias):  # type: ignore[no-untyped-def]
    """Vose's construction: every cell holds its own category and at most one other."""
    count = scaled.shape[0]
    small, large = np.empty(count, np.int64), np.empty(count, np.int64)
    smalls = larges = 0
    for i in range(count):
        if scaled[i] < 1.0:
            small[smalls] = i
            smalls += 1
        else:
            large[larges] = i
            larges += 1
    while smalls > 0 and larges > 0:
        smalls -= 1
        less, more = small[smalls], large[larges - 1]
        keep[less], alias[less] = scaled[less], more
        scaled[more] -= 1.0 - scaled[less]
        if scaled[more] < 1.0:
            larges -= 1
            small[smalls] = more
            smalls += 1
    # What is left is 1 up to rounding.
    for i in range(larges):
        keep[large[i]], alias[large[i]] = 1.0, large[i]
    for i in range(smalls):
        keep[small[i]], alias[small[i]] = 1.0, small[i]


@kernel
def _draw(u, keep, alias, out):  # type: ignore[no-untyped-def]
    count = keep.shape[0]
    for n in range(u.shape[0]):
        scaled = u[n] * count
        i = min(int(scaled), count - 1)
        out[n] = i if scaled - i < keep[i] else alias[i]


class AliasTable:
    """K categories, drawn in constant time each; a proposal for the samplers of this package.

    Building costs O(K); each draw takes one uniform number and two look-ups.

    Args:
        weights: (K,) weights, at least 0, not all 0.
        log: Whether they are logarithms.

    Raises:
        ValueError: Weights that are negative, not finite, or all 0.

    Example:
        >>> table = AliasTable([1.0, 0.0, 4.0])
        >>> x = table.sample((10000,), generator=torch.Generator().manual_seed(0))
        >>> torch.bincount(x, minlength=3)[1].item(), round(float((x == 2).double().mean()), 1)
        (0, 0.8)
        >>> table.log_prob(torch.tensor([2])).exp()
        tensor([0.8000], dtype=torch.float64)
    """

    def __init__(self, weights: Any, log: bool = False) -> None:
        w = _weights(weights, log)
        p = w / w.sum()
        self.probs = torch.from_numpy(p)
        self._keep, self._alias = np.empty(len(p)), np.empty(len(p), np.int64)
        _build(p * len(p), self._keep, self._alias)
        # Rounding may leave a category of weight 0 with its own cell: point it at the most likely one.
        empty = p == 0
        self._keep[empty] = 0.0
        self._alias[empty & (self._alias == np.arange(len(p)))] = int(p.argmax())

    def sample(self, shape: int | tuple[int, ...] = (), generator: torch.Generator | None = None) -> Tensor:
        """Draw.

        Args:
            shape: Number of draws, or a shape.
            generator: Source of randomness; None: torch's global one.

        Returns:
            int64 tensor of category numbers.
        """
        sizes = _shape(shape)
        u = torch.rand(sizes, dtype=torch.float64, generator=generator)
        out = np.empty(u.numel(), np.int64)
        _draw(u.numpy().reshape(-1), self._keep, self._alias, out)
        return torch.from_numpy(out).view(sizes)

    def log_prob(self, x: Tensor) -> Tensor:
        """Log-probabilities of category numbers, float64; -inf for a weight of 0.

        Args:
            x: int64 tensor of category numbers.

        Returns:
            A tensor of the same shape.

        Raises:
            ValueError: A number outside 0 ... K - 1.
        """
        x = torch.as_tensor(x)
        if x.numel() and not 0 <= int(x.min()) <= int(x.max()) < len(self.probs):
            raise ValueError(f"category numbers must be in 0 ... {len(self.probs) - 1}; got {x.min()} to {x.max()}")
        return self.probs[x].log()
