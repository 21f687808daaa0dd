"""Collapse meter (坍缩检测): whether a representation has collapsed, told by its spread and by its effective rank.

Source: 科学空间 7980 (从动力学角度看优化算法(六):为什么SimSiam不退化?); the spread is that of Chen and He,
https://arxiv.org/abs/2011.10566.

With u = z / |z| for each row, and C the centred covariance of the u:

    std  = sqrt(D) times the mean over the columns of the standard deviation of u       1: isotropic, 0: one point
    rank = (sum of the eigenvalues of C)^2 / (sum of their squares) = tr(C)^2 / |C|_F^2   1 to min(D, N - 1)
    knn  = share of the rows whose nearest neighbours (cosine, the row itself left out) vote for its label

Neither of the first two is enough. Batch norm on the output forces the std of each column to 1, so that a collapse can
only show as rank (all columns say the same); without it the rows shrink to one point, and the rank is that of the noise
around it. What differs from the meters in use, which look at std alone: both decide, and the rank needs no eigenvalues.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kexue._checks import check_int, check_real
from kexue._tensors import check_float, compute_dtype
from kexue.models.simsiam import SimSiam

__all__ = ["CollapseMeter", "CollapseReport"]

BLOCK = 2**23  # numbers in a temporary matrix


@dataclass(frozen=True)
class CollapseReport:
    """What a CollapseMeter found.

    Attributes:
        std: Spread of the unit rows; 1: isotropic, 0: all rows point the same way.
        rank: Effective number of directions in which they vary; 0 if they do not.
        knn: Accuracy of the nearest neighbours, None without labels.
        rows: N.
        dim: D.
        reasons: Why the representation counts as collapsed; empty if it does not.
    """

    std: float
    rank: float
    knn: float | None
    rows: int
    dim: int
    reasons: tuple[str, ...]

    @property
    def collapsed(self) -> bool:
        """Whether spread or rank is below its limit."""
        return bool(self.reasons)

    def __str__(self) -> str:
        knn = "" if self.knn is None else f", kNN accuracy {self.knn:.3f}"
        verdict = f"collapsed: {'; '.join(self.reasons)}" if self.reasons else "not collapsed"
        figures = f"std {self.std:.3f} (1 = isotropic), effective rank {self.rank:.2f} of {self.dim}{knn}"
        return f"{figures}, {self.rows} rows: {verdict}"


class CollapseMeter:
    """Measure whether a representation has collapsed.

    ``meter(z)`` reads features, which should come from evaluation mode (batch norms with running statistics);
    :meth:`measure` sees to that.

    The limits are conventions. std < .1 means that two rows have a cosine above .99 on average, if the columns spread
    alike (the mean cosine is then 1 - std^2). The limit of the rank, 3.5, lies between the runs without stop-gradient
    or predictor of ``kexue reproduce simsiam-dynamics`` (2.0 to 2.6; digits, D = 32) and those with a slow or frozen
    predictor (3.6 to 5.6; healthy ones: 7 to 9): features that vary in fewer directions cannot keep more than a handful
    of groups apart. Where few directions are possible, m = min(D, N - 1), it is (1 + m) / 2 at most. Give limits of
    your own for data of a known structure: two classes that are well apart need no more than one direction.

    Args:
        min_std: std below this is a collapse.
        min_rank: rank below this is a collapse.
        k: Number of neighbours that vote.

    Raises:
        TypeError: Wrong kind of argument; in a call: not floating features, not integer labels.
        ValueError: A value out of range; in a call: fewer than 2 rows or columns, entries that are not finite, k not
            below the number of rows.

    Reference:
        https://spaces.ac.cn/archives/7980

    Example:
        >>> z = torch.randn(500, 32, generator=torch.Generator().manual_seed(0))
        >>> CollapseMeter()(z).collapsed, CollapseMeter()(z + 100).collapsed  # all rows near one direction
        (False, True)
        >>> print(CollapseMeter()(z[:, :1].sign() * torch.ones(32)))  # what batch norm makes of it: columns that agree
        std 0.999 (1 = isotropic), effective rank 1.00 of 32, 500 rows: collapsed: rank 1.00 < 3.50, few directions
    """

    def __init__(self, min_std: float = 0.1, min_rank: float = 3.5, k: int = 5) -> None:
        check_real("min_std", min_std, minimum=0.0)
        check_real("min_rank", min_rank, minimum=0.0)
        check_int("k", k, 1)
        self.min_std, self.min_rank, self.k = float(min_std), float(min_rank), int(k)

    def __repr__(self) -> str:
        return f"CollapseMeter(min_std={self.min_std:g}, min_rank={self.min_rank:g}, k={self.k})"

    @torch.no_grad()
    def __call__(self, z: Tensor, labels: Tensor | None = None) -> CollapseReport:
        """Measure features.

        Memory: two copies of ``z`` in float32 (float64 stays) and blocks of 2^23 numbers. Time: N D min(N, D); with
        labels N^2 D.

        Args:
            z: (N, D) features, fp16, bf16, float32 or float64; not changed. Only directions count; a zero row has none.
            labels: (N,) integers, for the accuracy of the nearest neighbours. Equally near ones: the first rows count;
                equal votes: the smallest label wins.

        Returns:
            A :class:`CollapseReport`.
        """
        check_float("z", z, 2)
        rows, dim = z.shape
        if rows < 2 or dim < 2:
            raise ValueError(f"z must have at least 2 rows and 2 columns; got shape {tuple(z.shape)}")
        if not bool(torch.isfinite(z).all()):
            raise ValueError(f"z must be finite; got {int((~torch.isfinite(z)).sum())} entries that are not")
        self._check_labels(labels, rows)
        unit = _unit_rows(z)
        knn = None if labels is None else _neighbours(unit, labels, self.k)
        std, rank = _spread(unit, torch.finfo(z.dtype).eps)
        reasons = []
        if std < self.min_std:
            reasons.append(f"std {std:.3f} < {self.min_std:.3f}, rows point the same way")
        limit = min(self.min_rank, (1 + min(dim, rows - 1)) / 2)
        if rank < limit:
            reasons.append(f"rank {rank:.2f} < {limit:.2f}, few directions")
        return CollapseReport(std, rank, knn, rows, dim, tuple(reasons))

    def _check_labels(self, labels: Any, rows: int) -> None:
        if labels is None:
            return
        if not isinstance(labels, Tensor):
            raise TypeError(f"labels must be a tensor; got {type(labels).__name__}")
        if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
            raise TypeError(f"labels must be integers; got dtype {labels.dtype}")
        if tuple(labels.shape) != (rows,):
            raise ValueError(f"labels must have shape ({rows},); got {tuple(labels.shape)}")
        if self.k >= rows:
            raise ValueError(f"k must be below the number of rows, {rows}; got {self.k}")

    @torch.no_grad()
    def measure(self, model: nn.Module, batches: Iterable[Any], labels: Tensor | None = None) -> CollapseReport:
        """Measure a model on batches, in evaluation mode.

        The model's training flags are left as found, those of its parts too.

        Args:
            model: A :class:`SimSiam` (or BYOL), whose z is measured, or any Module that maps a batch to (B, D).
            batches: What the model (the encoder of a SimSiam) takes, one after the other.
            labels: (N,) integers for all rows.

        Example:
            >>> model = SimSiam(torch.nn.Linear(8, 16), dim=16)
            >>> report = CollapseMeter().measure(model, torch.randn(4, 32, 8))  # four batches
            >>> report.rows, model.training
            (128, True)
        """
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a Module; got {type(model).__name__}")
        flags = [(m, m.training) for m in model.modules()]
        try:
            model.eval()
            made = [model.project(x) if isinstance(model, SimSiam) else model(x) for x in batches]
        finally:
            for m, training in flags:
                m.training = training
        if not made:
            raise ValueError("batches must hold at least one batch; got none")
        for z in made:
            check_float("the model's output", z, 2)
        return self(torch.cat(made), labels)


def _unit_rows(z: Tensor) -> Tensor:
    """Rows divided by their norms, a copy in float32 or float64; zero rows stay zero."""
    unit = z.detach().to(compute_dtype(z), copy=True)
    top = unit.abs().amax(1, keepdim=True)  # divided out first: squares would overflow, or vanish
    unit /= torch.where(top > 0, top, 1.0)
    norm = torch.linalg.vector_norm(unit, dim=1, keepdim=True)
    unit /= torch.where(norm > 0, norm, 1.0)
    return unit


def _spread(unit: Tensor, eps: float) -> tuple[float, float]:
    """(std, rank) of unit rows, which are centred in place."""
    rows, dim = unit.shape
    unit -= unit.mean(0, dtype=torch.float64).to(unit.dtype)
    variances = torch.linalg.vector_norm(unit, dim=0, dtype=torch.float64).square() / (rows - 1)
    std = float(variances.sqrt().mean()) * dim**0.5
    trace = float(variances.sum())
    if trace <= (4 * eps) ** 2:  # rows that differ by rounding alone
        return std, 0.0
    unit /= trace**0.5  # the fourth powers of a small spread would vanish in float32
    tall = unit if dim <= rows else unit.T  # C and the matrix of inner products have the same eigenvalues
    step = max(BLOCK // tall.shape[1], 1)
    squares = sum(
        float(torch.linalg.vector_norm(tall[:, i : i + step].T @ tall, dtype=torch.float64)) ** 2
        for i in range(0, tall.shape[1], step)
    )
    return std, (rows - 1) ** 2 / squares


def _neighbours(unit: Tensor, labels: Tensor, k: int) -> float:
    """Leave-one-out accuracy of the k nearest rows by cosine."""
    rows = len(unit)
    classes, own = torch.unique(labels.to(unit.device), return_inverse=True)
    hits = 0
    step = max(BLOCK // rows, 1)
    for i in range(0, rows, step):
        scores = unit[i : i + step] @ unit.T
        here = torch.arange(len(scores), device=unit.device)
        scores[here, here + i] = -torch.inf
        values, nearest = scores.topk(k, sorted=True)
        tied = ((scores >= values[:, -1:]).sum(1) > k).nonzero().squeeze(1)
        if len(tied):  # topk takes any of them
            nearest[tied] = scores[tied].argsort(dim=1, descending=True, stable=True)[:, :k]
        votes = torch.zeros(len(scores), len(classes), device=unit.device)
        votes.scatter_add_(1, own[nearest], torch.ones_like(nearest, dtype=votes.dtype))
        hits += int((votes.argmax(1) == own[i : i + step]).sum())
    return hits / rows
