"""Why a margin: the triangle inequality (从三角不等式到Margin Softmax).

Source: 科学空间 8656.

For a metric d on directions, such as d(x, y) = sqrt(1 - cos(x, y)), ranking asks d(z1, z3) < d(z1, z2) for z1, z3 of
one class and z2 of another. Two uses of the triangle inequality show that

    d(z1, c1) + d(z3, c1) + d(z2, c2) < d(z1, c2)

is sufficient, while classification only asks d(z1, c1) < d(z1, c2): the surplus, the mean class diameter, is the margin
of kind "metric". 1 - cos itself is no metric: at the angles 0, 45 and 90 degrees 1 > 2 (1 - cos 45) = .586.
Everything here takes one gather of the centres, O(N D), except the certificate, which is blocked.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from kexue._checks import check_choice, check_int, check_real
from kexue._tensors import check_float, compute_dtype
from kexue.losses._common import check_labels, unit_rows
from kexue.losses.margin_softmax import MarginSoftmax

__all__ = ["ClassDiameter", "MarginSchedule", "class_diameter", "ranking_certificate"]

METRICS = ("sqrt_cos", "angle", "euclidean")
BLOCK = 2**22  # distances held at a time by the certificate


class ClassDiameter(float):
    """The diameter, a float to be used as a margin, with what it was made of.

    Attributes:
        per_class: (C,) diameter of each class, NaN where it has no sample.
        counts: (C,) samples of each class.
        empty_classes: How many classes have no sample; they do not enter the diameter.
    """

    per_class: Tensor
    counts: Tensor
    empty_classes: int


def _checked(z: Tensor, y: Tensor, centres: Tensor, metric: str) -> None:
    check_choice("metric", metric, METRICS)
    check_float("z", z, 2)
    check_float("centres", centres, 2)
    if z.shape[1] != centres.shape[1]:
        raise ValueError(f"z and centres must have equal width; got {tuple(z.shape)} and {tuple(centres.shape)}")
    check_labels(y, (z.shape[0],), centres.shape[0], True)
    if z.shape[0] == 0:
        raise ValueError(f"z must have at least one row; got shape {tuple(z.shape)}")


def _directions(x: Tensor, metric: str, dtype: torch.dtype) -> Tensor:
    return x.to(dtype) if metric == "euclidean" else unit_rows(x, dtype)[0]


def _paired_distance(a: Tensor, b: Tensor, metric: str) -> Tensor:
    """Row-wise distance; from |a - b|, which keeps its precision where the cosine is near 1."""
    chord = torch.linalg.vector_norm(a - b, dim=-1)
    if metric == "sqrt_cos":
        return chord / math.sqrt(2.0)
    return 2 * torch.asin((chord / 2).clamp(max=1.0)) if metric == "angle" else chord


@torch.no_grad()
def class_diameter(
    z: Tensor, y: Tensor, centres: Tensor, metric: str = "sqrt_cos", stat: str = "mean", q: float = 0.9
) -> ClassDiameter:
    """Estimate the margin from the data: twice the distance of a sample from the centre of its class.

    Args:
        z: (N, D) embeddings.
        y: (N,) integers in [0, C).
        centres: (C, D) class vectors, for example ``head.weight``.
        metric: "sqrt_cos" (sqrt(1 - cos), the unit of kind "metric"), "angle" in radians, or "euclidean".
        stat: "mean" over samples or "quantile".
        q: The quantile, in [0, 1].

    Returns:
        A :class:`ClassDiameter`: a float with ``per_class``, ``counts`` and ``empty_classes``.

    Raises:
        TypeError: Wrong kind of argument.
        ValueError: Shapes that do not fit, labels outside the centres, no rows.

    Reference:
        https://spaces.ac.cn/archives/8656

    Example:
        >>> z = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> diameter = class_diameter(z, torch.tensor([0, 0]), torch.tensor([[1.0, 1.0], [1.0, 0.0]]))
        >>> round(diameter, 4), diameter.empty_classes  # 2 sqrt(1 - cos 45 degrees)
        (1.0824, 1)
    """
    check_choice("stat", stat, ("mean", "quantile"))
    check_real("q", q, minimum=0.0)
    if q > 1:
        raise ValueError(f"q must be at most 1; got {q}")
    _checked(z, y, centres, metric)
    dtype, y = compute_dtype(z, centres), y.long()
    distance = 2 * _paired_distance(_directions(z, metric, dtype), _directions(centres[y], metric, dtype), metric)
    classes = centres.shape[0]
    counts = torch.bincount(y, minlength=classes)
    if stat == "mean":
        value = float(distance.mean())
        per_class = distance.new_zeros(classes).index_add_(0, y, distance) / counts  # 0 / 0 is the NaN of no sample
    else:
        value = _quantile(distance, q)
        per_class = distance.new_full((classes,), math.nan)
        order = torch.argsort(y, stable=True)
        start = 0
        for label, count in enumerate(counts.tolist()):
            if count:
                per_class[label] = _quantile(distance[order[start : start + count]], q)
            start += count
    result = ClassDiameter(value)
    result.per_class, result.counts, result.empty_classes = per_class, counts, int((counts == 0).sum())
    return result


def _quantile(x: Tensor, q: float) -> float:
    """Linear interpolation between order statistics; torch.quantile refuses more than 2^24 values."""
    ordered = torch.sort(x).values
    position = q * (len(ordered) - 1)
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return float(ordered[low] + (position - low) * (ordered[high] - ordered[low]))


class MarginSchedule:
    """Re-estimate the margin of a head from its class diameter while it trains.

    The recipe of the article: start at 0, train, set the margin to the mean class diameter, train on, and so on.

    Args:
        head: A :class:`MarginSoftmax` of kind "metric" that holds all classes.
        every: Epochs between two estimates.
        momentum: Share of the old estimate that is kept, in [0, 1); the first estimate counts in full.
        stat: "mean" or "quantile", as in :func:`class_diameter`.
        maximum: Upper bound of the margin; sqrt(1 - cos) is at most sqrt 2.

    Raises:
        TypeError: Wrong kind of argument.
        ValueError: A head of another kind, a sharded head, or a value out of range.

    Example:
        >>> head = MarginSoftmax(4, 3, kind="metric", margin=0.0)
        >>> schedule = MarginSchedule(head, every=2)
        >>> z, y = torch.randn(12, 4), torch.arange(12) % 3
        >>> schedule.step(z, y), head.margin > 0  # epoch 1: nothing yet
        (0.0, False)
        >>> schedule.step(z, y) == head.margin > 0  # epoch 2
        True
    """

    def __init__(
        self,
        head: MarginSoftmax,
        every: int = 1,
        momentum: float = 0.5,
        stat: str = "mean",
        maximum: float = math.sqrt(2.0),
    ) -> None:
        if not isinstance(head, MarginSoftmax):
            raise TypeError(f"head must be a MarginSoftmax; got {type(head).__name__}")
        if head.kind != "metric" or head.shards is not None or isinstance(head.margin, Tensor):
            raise ValueError(
                f"head must be of kind 'metric' with a number as margin and all classes; got kind {head.kind!r}"
            )
        check_int("every", every, 1)
        check_real("momentum", momentum, minimum=0.0)
        if momentum >= 1:
            raise ValueError(f"momentum must be below 1; got {momentum}")
        check_choice("stat", stat, ("mean", "quantile"))
        check_real("maximum", maximum, minimum=0.0)
        self.head, self.every, self.momentum, self.stat, self.maximum = head, every, momentum, stat, maximum
        self.epoch = 0
        self.estimate: float | None = None

    def step(self, z: Tensor, y: Tensor) -> float:
        """Call after each epoch with embeddings of training rows.

        Args:
            z: (N, D) embeddings.
            y: (N,) their classes.

        Returns:
            The margin of the head from now on.
        """
        self.epoch += 1
        if self.epoch % self.every == 0:
            new = float(class_diameter(z, y, self.head.weight, stat=self.stat))
            old = self.estimate
            self.estimate = new if old is None else self.momentum * old + (1 - self.momentum) * new
            self.head.margin = min(self.estimate, self.maximum)
        return float(self.head.margin)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs; the head's own state_dict does not hold a margin that is a number."""
        return {"epoch": self.epoch, "estimate": self.estimate, "margin": float(self.head.margin)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore, and set the margin of the head."""
        if set(state) != {"epoch", "estimate", "margin"}:
            raise ValueError(f"state must have the keys epoch, estimate, margin; got {sorted(state)}")
        self.epoch, self.estimate, self.head.margin = state["epoch"], state["estimate"], state["margin"]


@torch.no_grad()
def ranking_certificate(z: Tensor, y: Tensor, centres: Tensor, metric: str = "sqrt_cos") -> float:
    """Share of (sample, other class) pairs whose correct ranking is guaranteed.

    A pair (z1, class i) is certified if d(z1, c_t) + R_t + R_i < d(z1, c_i), R the largest distance of a class's
    samples from its centre: then every sample of z1's class is nearer to z1 than every sample of class i.

    Args:
        z: (N, D) embeddings.
        y: (N,) integers in [0, C).
        centres: (C, D) class vectors; classes without a sample are left out.
        metric: "sqrt_cos", "angle" or "euclidean".

    Returns:
        The share, in [0, 1]; 1.0 when only one class has samples.

    Raises:
        TypeError: Wrong kind of argument.
        ValueError: Shapes that do not fit, labels outside the centres, no rows.

    Example:
        >>> z = torch.tensor([[1.0, 0.01], [1.0, 0.0], [0.0, 1.0]])
        >>> ranking_certificate(z, torch.tensor([0, 0, 1]), torch.eye(2))
        1.0
    """
    _checked(z, y, centres, metric)
    dtype = compute_dtype(z, centres)
    present, label = torch.unique(y.long(), return_inverse=True)
    points, middles = _directions(z, metric, dtype), _directions(centres[present], metric, dtype)
    own = _paired_distance(points, middles[label], metric)
    radius = own.new_zeros(len(present)).scatter_reduce_(0, label, own, "amax")
    certified, rows = 0, max(1, BLOCK // max(len(present), 1))
    for start in range(0, len(points), rows):
        block = slice(start, start + rows)
        chord = torch.cdist(points[block], middles, compute_mode="donot_use_mm_for_euclid_dist")
        far = chord
        if metric == "sqrt_cos":
            far = chord / math.sqrt(2.0)
        elif metric == "angle":
            far = 2 * torch.asin((chord / 2).clamp(max=1.0))
        safe = own[block, None] + radius[label[block], None] + radius < far
        safe[torch.arange(len(safe)), label[block]] = False
        certified += int(safe.sum())
    pairs = len(points) * (len(present) - 1)
    return certified / pairs if pairs else 1.0
