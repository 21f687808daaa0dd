"""How good generated samples are: precision, recall, density, coverage (精确率、召回率、密度、覆盖率), and modes found.

Source: Kynkäänniemi et al. 2019, https://arxiv.org/abs/1904.06991 (precision, recall); Naeem et al. 2020,
https://arxiv.org/abs/2002.09797 (density, coverage). With B(x) the ball around x up to its k-th neighbour in its set:

    precision = share of fakes inside some B(real)          recall   = share of reals inside some B(fake)
    density   = mean over fakes of #{reals whose B holds it} / k
    coverage  = share of reals with a fake inside their B

Precision and density ask whether samples are real, recall and coverage whether all of reality is sampled; a few
programs give the first two with their names exchanged. The Frechet distance of features (FID) is
:func:`kexue.stats.frechet_distance`.

What we do differently, and why: distances are one matrix product per block of rows, in float64 around the mean of the
data, so that memory is a block. A product is off by some rounding, which decides where distances tie (digits, counts,
duplicates) and where clusters are tight; whatever lies so close to the edge of a ball is measured again as
sum (x - y)^2. Balls are closed: what is as far as the k-th neighbour is inside.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kexue._checks import check_int, check_real
from kexue._tensors import check_float
from kexue.adversarial._arrays import as_tensor

__all__ = ["ModeCoverage", "SampleQuality", "mode_coverage", "nearest", "sample_quality"]

_BLOCK = 2**21  # distances at a time


@dataclass(frozen=True)
class SampleQuality:
    """What :func:`sample_quality` returns.

    Args:
        precision: Share of the fakes that look real.
        recall: Share of the reals that the fakes reach.
        density: How deep the fakes lie among the reals; 1 for samples of the same distribution, more in dense parts.
        coverage: Share of the reals that have a fake nearby.

    Example:
        >>> SampleQuality(1.0, 0.5, 1.0, 0.5).recall
        0.5
    """

    precision: float
    recall: float
    density: float
    coverage: float


@dataclass(frozen=True)
class ModeCoverage:
    """What :func:`mode_coverage` returns.

    Args:
        modes: Modes found.
        total: Modes there are.
        inside: Share of the samples that are near a mode.

    Example:
        >>> ModeCoverage(7, 8, 0.5).modes
        7
    """

    modes: int
    total: int
    inside: float


def _rows(name: str, x: Any) -> Tensor:
    x = as_tensor(name, x)
    check_float(name, x)
    if x.dim() != 2 or x.shape[1] == 0:
        raise ValueError(f"{name} must have shape (N, d) with d >= 1; got {tuple(x.shape)}")
    if not bool(torch.isfinite(x).all()):
        raise ValueError(f"{name} must be finite; got {int((~torch.isfinite(x)).sum())} values that are not")
    return x.double()


class _Distances:
    """Squared distances between two sets of rows, some rows of the first at a time.

    Args:
        a: (N, d) float64.
        b: (M, d) float64.
    """

    def __init__(self, a: Tensor, b: Tensor) -> None:
        centre = b.mean(0)
        self.a, self.b, self.near_a, self.near_b = a, b, a - centre, b - centre
        self.lengths_a, self.lengths_b = self.near_a.square().sum(1), self.near_b.square().sum(1)
        self.share = 4 * (a.shape[1] + 8) * torch.finfo(torch.float64).eps  # of the lengths: more than rounding can be

    def blocks(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Rows of the first set, their distances (n, M) to the second, and how far off these may be."""
        rows = max(1, _BLOCK // len(self.b))
        for start in range(0, len(self.a), rows):
            part = slice(start, start + rows)
            lengths = self.lengths_a[part, None] + self.lengths_b
            yield part, torch.addmm(lengths, self.near_a[part], self.near_b.T, alpha=-2), lengths.mul_(self.share)

    def exact(self, part: slice, pairs: Tensor) -> Tensor:
        """Distances of pairs (P, 2) of rows of a block, without rounding of the lengths."""
        rows = max(1, _BLOCK // self.a.shape[1])
        first = self.a[part]
        return torch.cat([(first[p[:, 0]] - self.b[p[:, 1]]).square_().sum(1) for p in pairs.split(rows)])

    def smallest(self, k: int) -> tuple[Tensor, Tensor]:
        """The k smallest of each row of the first set, (N, k), exact and in order, and where they are."""
        found = []
        for part, d, off in self.blocks():
            edge = d.topk(k, 1, largest=False).values[:, -1:]
            pairs = (d <= off.mul_(2).add_(edge)).nonzero()
            exact, columns = self.exact(part, pairs), pairs[:, 1]
            if len(pairs) == k * len(d):  # no row has a tie for its last place
                values, order = exact.view(-1, k).sort(stable=True)
                found.append((values, columns.view(-1, k).gather(1, order)))
            else:
                d[pairs[:, 0], columns] = exact
                nearest_k = d.topk(k, 1, largest=False)
                found.append((nearest_k.values, nearest_k.indices))
        return torch.cat([values for values, _ in found]), torch.cat([columns for _, columns in found])

    def within(self, part: slice, d: Tensor, off: Tensor, radius: Tensor) -> Tensor:
        """Which distances of a block are at most the squared radius, (n, 1) or (M,)."""
        gap = d - radius
        inside = gap <= 0
        pairs = (gap.abs_() <= off).nonzero()
        if len(pairs):
            rows, columns = pairs.T
            inside[rows, columns] = self.exact(part, pairs) <= radius.expand_as(d)[rows, columns]
        return inside


def nearest(queries: Tensor, stored: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Euclidean distances and numbers of the k nearest stored rows, (Q, k) each, nearest first.

    Args:
        queries: (Q, d) float64.
        stored: (N, d) float64.
        k: At most N.
    """
    distance, number = _Distances(queries, stored).smallest(k)
    return distance.sqrt_(), number


def sample_quality(real: Any, fake: Any, k: int = 5) -> SampleQuality:
    """Precision, recall, density and coverage from the k nearest neighbours.

    They are measured in the space of the given features: the last hidden layer of a classifier, or the samples as they
    are. Time O((N + M)^2 d), memory of a block of distances.

    Args:
        real: (N, d) features, tensor or array.
        fake: (M, d) features.
        k: Neighbour that ends a ball; below N and M.

    Returns:
        The four figures.

    Raises:
        TypeError: Features that are not floating.
        ValueError: Widths that differ, k not below the number of rows, values that are not finite.

    Reference:
        https://arxiv.org/abs/1904.06991, https://arxiv.org/abs/2002.09797

    Example:
        >>> real = torch.tensor([[0.0], [1.0], [10.0], [11.0]])
        >>> sample_quality(real, torch.tensor([[0.4], [0.5], [0.6]]), k=1)
        SampleQuality(precision=1.0, recall=0.0, density=2.0, coverage=0.5)
    """
    a, b = _rows("real", real), _rows("fake", fake)
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"real and fake must have the same width; got {a.shape[1]} and {b.shape[1]}")
    check_int("k", k, 1)
    if k >= min(len(a), len(b)):
        raise ValueError(f"k must be below the number of rows; got k {k} for {len(a)} real and {len(b)} fake rows")
    b = b.to(a.device)
    _, exponent = math.frexp(max(float(a.abs().max()), float(b.abs().max())))
    a, b = (torch.ldexp(x, torch.tensor(-exponent, device=a.device)) for x in (a, b))  # no square leaves the range
    radius_a, radius_b = (_Distances(x, x).smallest(k + 1)[0][:, -1] for x in (a, b))  # itself is not counted
    recalled = covered = 0
    balls = torch.zeros(len(b), dtype=torch.long, device=a.device)  # of reals that hold each fake
    both = _Distances(a, b)
    for part, d, off in both.blocks():
        inside = both.within(part, d, off, radius_a[part, None])
        balls += inside.sum(0)
        covered += int(inside.any(1).sum())
        recalled += int(both.within(part, d, off, radius_b).any(1).sum())
    n, m = len(a), len(b)
    return SampleQuality(int((balls > 0).sum()) / m, recalled / n, float(balls.sum()) / (k * m), covered / n)


def mode_coverage(samples: Any, centres: Any, radius: float, minimum: int = 2) -> ModeCoverage:
    """How many modes of a known mixture are found.

    Args:
        samples: (N, d) tensor or array.
        centres: (K, d) centres of the modes.
        radius: A sample belongs to its nearest mode if it is at most so far from it (4 standard deviations).
        minimum: Samples that make a mode count as found.

    Returns:
        Modes found, modes there are, and the share of samples that belong to one.

    Raises:
        TypeError: Samples that are not floating.
        ValueError: Widths that differ, no sample or centre, a radius that is not positive.

    Example:
        >>> mode_coverage(torch.tensor([[0.1], [-0.1], [5.0]]), torch.tensor([[0.0], [3.0]]), radius=0.5)
        ModeCoverage(modes=1, total=2, inside=0.6666666666666666)
    """
    x, c = _rows("samples", samples), _rows("centres", centres)
    if x.shape[1] != c.shape[1] or not len(x) or not len(c):
        raise ValueError(f"samples and centres must be (N, d) and (K, d); got {tuple(x.shape)} and {tuple(c.shape)}")
    check_real("radius", radius, above=0.0)
    check_int("minimum", minimum, 1)
    distance, mode = nearest(x, c.to(x.device), 1)
    near = distance[:, 0] <= radius
    counts = torch.bincount(mode[near, 0], minlength=len(c))
    return ModeCoverage(int((counts >= minimum).sum()), len(c), float(near.double().mean()))
