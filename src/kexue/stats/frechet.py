"""Frechet distance between two sets of features (Fréchet 距离, FID), from samples or from streams.

Source: 科学空间 8512 (两个多元正态分布的KL散度、巴氏距离和W距离); Heusel et al. 2017, https://arxiv.org/abs/1706.08500

    |mean_X - mean_Y|^2 + tr Sx + tr Sy - 2 tr (Sx Sy)^1/2

What is different here: the usual code takes a square root of the product of two covariances, which is slow, not
symmetric, and may come out complex. Here the trace is the sum of sqrt(eig(L' Sy L)) with Sx = L L'; when there are
fewer samples than dimensions it is the nuclear norm of Xc Yc' (centred rows), and no covariance is built. Everything is
in float64.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from kexue._tensors import check_float
from kexue.stats._bures_kernel import cholesky, eigen_factor, gram, large, symmetric
from kexue.stats.bures import w2
from kexue.stats.gaussian import Gaussian

__all__ = ["FrechetAccumulator", "frechet_distance"]

LARGEST = 1e70  # of a feature: fourth powers stay within float64
BLOCK = 2**24  # entries of a block of rows that is converted to float64 at a time


def _features(name: str, x: Any) -> Tensor:
    if not isinstance(x, Tensor) and hasattr(x, "__array__"):
        x = torch.as_tensor(x)
    check_float(name, x)
    if x.dim() != 2 or x.shape[1] == 0:
        raise ValueError(f"{name} must have shape (N, d) with d >= 1; got {tuple(x.shape)}")
    if not bool(torch.isfinite(x).all()):
        raise ValueError(f"{name} must be finite; got {int((~torch.isfinite(x)).sum())} values that are not")
    if x.numel() and float(x.detach().abs().max()) > LARGEST:
        raise ValueError(f"{name} must be at most {LARGEST:g} in size; got {float(x.detach().abs().max()):.3g}")
    return x


class FrechetAccumulator:
    """Count, mean and co-moment of features that come in batches, in float64; any split gives the same result.

    Memory is d x d numbers, whatever the number of rows. :meth:`merge` joins accumulators of several processes.

    Args:
        features: A first batch, as for :meth:`update`.

    Example:
        >>> x, y = torch.randn(50, 3), torch.randn(60, 3) + 1
        >>> a, b = FrechetAccumulator(), FrechetAccumulator()
        >>> for batch in x.split(20):
        ...     a.update(batch)
        >>> b.update(y)
        >>> torch.allclose(a.compute(b), frechet_distance(x, y))
        True
    """

    def __init__(self, features: Any = None) -> None:
        self.count = 0
        self._mean: Tensor | None = None
        self._moment: Tensor | None = None
        if features is not None:
            self.update(features)

    @property
    def dim(self) -> int | None:
        """Width of the features, None before the first batch."""
        return None if self._mean is None else self._mean.shape[0]

    @torch.no_grad()
    def update(self, features: Any) -> None:
        """Take in a batch.

        Args:
            features: (N, d) tensor or array; N may be 0.

        Raises:
            TypeError: Not floating.
            ValueError: Another width than before, or values that are not finite; nothing is taken in then.
        """
        x = _features("features", features)
        self._check_width("features", x.shape[1])
        if len(x) == 0:
            return
        rows = max(1, BLOCK // x.shape[1])
        with torch.autocast(x.device.type, enabled=False):
            for block in x.split(rows):
                part = block.double()
                mean = part.mean(0)
                part = part - mean
                self._join(len(part), mean, gram(part))

    @torch.no_grad()
    def merge(self, other: FrechetAccumulator) -> FrechetAccumulator:
        """Take in all that another accumulator has seen; it stays as it was.

        Args:
            other: Of the same width, or empty.

        Returns:
            This accumulator.

        Raises:
            TypeError: No accumulator.
            ValueError: Another width.
        """
        if not isinstance(other, FrechetAccumulator):
            raise TypeError(f"other must be a FrechetAccumulator; got {type(other).__name__}")
        if other._mean is None or other._moment is None:
            return self
        self._check_width("other", other._mean.shape[0])
        self._join(other.count, other._mean, other._moment)
        return self

    def _check_width(self, name: str, width: int) -> None:
        if self._mean is not None and width != self._mean.shape[0]:
            raise ValueError(f"{name} must have width {self._mean.shape[0]}, as before; got {width}")

    def _join(self, count: int, mean: Tensor, moment: Tensor) -> None:
        if self._mean is None or self._moment is None:
            self.count, self._mean, self._moment = count, mean.clone(), moment.clone()
            return
        total = self.count + count
        shift = mean.to(self._mean.device) - self._mean
        self._moment += moment.to(self._mean.device)
        self._moment.addr_(shift, shift, alpha=self.count * count / total)
        self._mean += shift * (count / total)
        self.count = total

    def gaussian(self) -> Gaussian:
        """Mean and covariance (divided by N - 1) as a :class:`Gaussian`.

        Raises:
            ValueError: Fewer than two rows so far.
        """
        if self._mean is None or self._moment is None or self.count < 2:
            raise ValueError(f"at least 2 rows are needed for a covariance; got {self.count}")
        return Gaussian(self._mean.clone(), symmetric(self._moment / (self.count - 1)), validate=False)

    def compute(self, other: Any) -> Tensor:
        """Squared Frechet distance from another accumulator or from features (N, d), float64.

        Args:
            other: An accumulator or features.

        Raises:
            ValueError: Fewer than two rows on either side, or widths that differ.
        """
        return frechet_distance(self, other)

    def state_dict(self) -> dict[str, Any]:
        """Everything that has been seen: ``count``, ``mean`` and ``moment``, as copies."""
        mean, moment = (None if x is None else x.clone() for x in (self._mean, self._moment))
        return {"count": self.count, "mean": mean, "moment": moment}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over the state of another accumulator.

        Args:
            state: What :meth:`state_dict` gave.

        Raises:
            TypeError: A mean or moment that is neither a tensor nor None.
            ValueError: Other keys, or shapes and a count that do not belong together.
        """
        if set(state) != {"count", "mean", "moment"}:
            raise ValueError(f"state must have the keys count, mean and moment; got {sorted(state)}")
        count, mean, moment = int(state["count"]), state["mean"], state["moment"]
        if (count, mean, moment) != (0, None, None):
            check_float("mean", mean)
            check_float("moment", moment)
            width = mean.shape[0] if mean.dim() == 1 else 0
            if count < 1 or width < 1 or moment.shape != (width, width):
                raise ValueError(
                    "state must have a count, a mean (d,) and a moment (d, d); "
                    f"got {count}, {tuple(mean.shape)} and {tuple(moment.shape)}"
                )
            mean, moment = (x.detach().double().clone() for x in (mean, moment))
        self.count, self._mean, self._moment = count, mean, moment


class _Side:
    """One side of the comparison: its mean, trace, and either centred and scaled rows or a covariance."""

    def __init__(self, name: str, given: Any) -> None:
        self.rows: Any = None  # a tensor or None, like the next one
        self.cov: Any = None
        if isinstance(given, FrechetAccumulator):
            g = given.gaussian()
            self.mean, self.cov = g._mean, g._cov
            self.trace = self.cov.diagonal().sum()
            return
        x = _features(name, given)
        if len(x) < 2:
            raise ValueError(f"{name} must have at least 2 rows; got {len(x)}")
        x = x.double()
        self.mean = x.mean(0)
        self.rows = (x - self.mean) / (len(x) - 1) ** 0.5
        self.trace = self.rows.square().sum()
        if len(x) > x.shape[1]:  # more rows than dimensions: the covariance is the smaller of the two
            tracked = torch.is_grad_enabled() and x.requires_grad
            self.cov, self.rows = self.rows.mT @ self.rows if tracked else gram(self.rows), None

    def factor(self) -> Tensor:
        """F with F F' = S, (d, r)."""
        if self.rows is not None:
            return self.rows.mT
        cov: Tensor = self.cov
        factor, ok = cholesky(cov)
        if bool(ok):
            return factor
        v, root = eigen_factor(cov)
        kept = root > (len(cov) * torch.finfo(cov.dtype).eps) ** 0.5 * root.max()  # the others are rounding of zeros
        return (v * root)[:, kept]


def _nuclear(a: _Side, b: _Side) -> Tensor:
    """Tr (Sa Sb)^1/2."""
    if a.rows is not None and b.rows is not None:
        return torch.linalg.svdvals(a.rows @ b.rows.mT).sum()
    if a.rows is None and b.rows is not None:
        a, b = b, a
    factor = a.factor()
    if large(b.cov) and factor.shape[0] == factor.shape[1] and bool((factor.triu(1) == 0).all()):
        from kexue.stats import _gaussian_lapack

        w = _gaussian_lapack.congruent_eigen(factor[None], b.cov[None], False)[0]
    else:
        w = torch.linalg.eigvalsh(symmetric(factor.mT @ b.cov @ factor))
    return w.clamp(min=0).sqrt().sum()


def frechet_distance(x: Any, y: Any) -> Tensor:
    """Squared Frechet distance of the normals with the moments of two sets of features: the FID.

    Fewer rows than dimensions on both sides cost O(N^2 d); otherwise d x d covariances are built, in O(N d^2 + d^3).

    Args:
        x: Features (N, d), tensor or array, or a :class:`FrechetAccumulator`.
        y: The same, of the same width.

    Returns:
        A number in float64, never negative. Gradients reach features.

    Raises:
        TypeError: Features that are not floating.
        ValueError: Fewer than two rows, widths that differ, values that are not finite.

    Example:
        >>> x = torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 2.0]])
        >>> frechet_distance(x, x + 1)
        tensor(2., dtype=torch.float64)
    """
    tracked = torch.is_grad_enabled() and any(isinstance(z, Tensor) and z.requires_grad for z in (x, y))
    device = x.device.type if isinstance(x, Tensor) else "cpu"
    with torch.autocast(device, enabled=False):
        a, b = _Side("x", x), _Side("y", y)
        if a.mean.shape != b.mean.shape:
            raise ValueError(f"x and y must have the same width; got {len(a.mean)} and {len(b.mean)}")
        if tracked:
            sides = [
                Gaussian(s.mean, s.cov, factor=None if s.rows is None else s.rows.mT, validate=False) for s in (a, b)
            ]
            return w2(sides[0], sides[1])
        value = (a.mean - b.mean).square().sum() + a.trace + b.trace - 2 * _nuclear(a, b)
    return value.clamp(min=0)
