"""How well vectors find their own group: exact retrieval report (检索评估).

Source: evaluation of 科学空间 5743 (基于GRU和AM-Softmax的句子相似度模型).

Every row queries all other rows by cosine. With r_i the rank of the best-placed row of i's own group (1: the nearest),

    top-n = share of i with r_i <= n,     mean rank = mean r_i,     MRR = mean 1 / r_i

Threshold curve: a query is answered with its nearest row if their cosine reaches t, and right if that row is of its
group.

    coverage = answered / queries,   precision = right / answered,   recall = right / queries,   F1 of the two,
    accuracy = (right and answered + wrong and not answered) / queries

What we do differently, and why: the usual code sorts the whole N x N matrix. A rank is a count, so each block of rows
is passed once and nothing is sorted. A query is left out of its own answers by its number, not by its cosine of 1,
which other rows may have too. Of equal cosines the row with the higher number loses, and equal means equal: the product
is computed in float32, and wherever its rounding could decide an order, again in float64 to 12 digits.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kexue._checks import check_int, check_real
from kexue.tasks._cosines import GRID, block_rows, cosines, distinct_rows, rounding_bound, scan_block, unit_rows

__all__ = ["retrieval_report"]


def retrieval_report(
    vectors: Any, groups: Iterable[Hashable], ks: Sequence[int] = (1, 5, 10), *, thresholds: ArrayLike | None = None
) -> dict[str, Any]:
    """Evaluate retrieval of rows of the same group.

    Time is O(N^2 D), memory O(N D) and about 32 MB for a block of cosines (16 rows of N if those need more).

    Args:
        vectors: (N, D) array or tensor of any real dtype, rows of any length. A row of zeros has cosine 0 with
            everything.
        groups: N hashable values; rows with equal values belong together. A row that is alone in its group queries
            nothing but is among the answers of the others.
        ks: The n of the top-n figures.
        thresholds: Where the curve is evaluated; None: 0, .01, ..., 1.

    Returns:
        Plain Python values:

        - ``top<n>`` for each n, ``mean_rank``, ``mrr``;
        - ``queries``, ``singletons`` (rows alone in their group, which are not queries), ``groups``: counts;
        - ``threshold_curve``: equally long lists ``threshold``, ``coverage``, ``precision`` (1 where nothing is
          answered), ``recall``, ``f1``, ``accuracy``;
        - ``best_threshold``: the cosine of a query at which F1 is highest (of equal ones the highest, which answers
          least), and there ``best_f1``, ``best_coverage``, ``best_precision``, ``best_accuracy``.

    Raises:
        TypeError: Vectors that are no numbers, groups that cannot be hashed, ks that are no integers.
        ValueError: A shape that does not fit, NaN or infinity, no group with two rows, a k below 1.

    Reference:
        https://spaces.ac.cn/archives/5743

    Example:
        >>> report = retrieval_report([[1.0, 0.0], [2.0, 0.1], [0.0, 1.0], [0.9, 0.2]], ["a", "a", "b", "b"], ks=(1, 2))
        >>> report["top1"], report["top2"], report["mean_rank"]
        (0.75, 0.75, 1.5)
    """
    rows = _vectors(vectors)
    names, starts, members = _groups(groups, len(rows))
    ks = _ks(ks)
    curve_at = _thresholds(thresholds)
    counts = np.diff(starts)
    queries = counts[names] > 1
    if not queries.any():
        raise ValueError(f"at least one group must have two rows; got {len(rows)} rows in {len(counts)} groups")
    units, inverse = distinct_rows(unit_rows(rows))
    fast = units.astype(np.float32)
    n, error = len(rows), rounding_bound(units.shape[1])
    every = np.arange(n) if inverse is None else inverse
    rank, top = np.zeros(n, np.int64), np.zeros(n)
    size = block_rows(n, 4)
    kernel: Any = scan_block
    for first in range(0, n, size):
        block = cosines(fast[every[first : first + size]], fast, inverse)
        kernel(block, first, names, starts, members, units, every, error, rank, top)
    rank, top = rank[queries], top[queries]
    hit = rank == 1
    report: dict[str, Any] = {f"top{k}": float((rank <= k).mean()) for k in ks}
    report |= {
        "mean_rank": float(rank.mean()),
        "mrr": float((1 / rank).mean()),
        "queries": int(queries.sum()),
        "singletons": int(n - queries.sum()),
        "groups": len(counts),
        "threshold_curve": {key: value.tolist() for key, value in _curve(top, hit, curve_at).items()},
    }
    every_score = _curve(top, hit, np.unique(top)[::-1])
    place = int(every_score["f1"].argmax())
    report["best_threshold"] = float(every_score["threshold"][place])
    return report | {
        f"best_{key}": float(every_score[key][place]) for key in ("f1", "coverage", "precision", "accuracy")
    }


def _curve(top: NDArray[Any], hit: NDArray[np.bool_], thresholds: NDArray[np.float64]) -> dict[str, NDArray[Any]]:
    """The columns of the curve for thresholds in any order."""
    order = np.argsort(top, kind="stable")
    right_below = np.concatenate([[0], np.cumsum(hit[order])])
    # on the grid of the cosines: a cosine of exactly .7 reaches a threshold of .7
    below = np.searchsorted(top[order], np.round(thresholds * GRID) / GRID, side="left")
    n, rights = len(top), int(hit.sum())
    answered, right = n - below, rights - right_below[below]
    precision = np.where(answered > 0, right / np.maximum(answered, 1), 1.0)
    recall = right / n
    wrong_below = below - right_below[below]
    return {
        "threshold": thresholds,
        "coverage": answered / n,
        "precision": precision,
        "recall": recall,
        "f1": 2 * right / (answered + n),  # of precision right / answered and recall right / n
        "accuracy": (right + wrong_below) / n,
    }


def _vectors(vectors: Any) -> NDArray[Any]:
    """(N, D) float64, finite."""
    if hasattr(vectors, "detach"):  # a tensor, which may have a gradient, be on another device, or be bfloat16
        vectors = vectors.detach()
        vectors = (vectors.float() if str(vectors.dtype) == "torch.bfloat16" else vectors).cpu().numpy()
    try:
        rows = np.asarray(vectors)
    except ValueError as error:  # rows of different lengths
        raise ValueError(f"vectors must have shape (N, D): {error}") from None
    if rows.dtype.kind not in "fiub":
        raise TypeError(f"vectors must be real numbers; got dtype {rows.dtype}")
    if rows.ndim != 2 or rows.shape[1] == 0:
        raise ValueError(f"vectors must have shape (N, D), D at least 1; got {rows.shape}")
    rows = rows.astype(np.float64, copy=False)
    if not np.isfinite(rows).all():
        place = int(np.flatnonzero(~np.isfinite(rows).all(1))[0])
        raise ValueError(f"vectors must be finite; row {place} holds NaN or infinity")
    return rows


def _groups(groups: Any, n: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Number of the group of each row; the rows of group g are ``members[starts[g]:starts[g + 1]]``."""
    numbers = number_groups(groups, n)[0]
    members = np.argsort(numbers, kind="stable")
    starts = np.concatenate([[0], np.cumsum(np.bincount(numbers))]).astype(np.int64)
    return numbers, starts, members


def number_groups(groups: Any, n: int) -> tuple[NDArray[np.int64], list[Hashable]]:
    """Numbers of the groups in order of first sight, (n,), and the groups.

    Raises:
        TypeError: Not an iterable of hashable values.
        ValueError: Another number of values than n, or NaN, which equals nothing.
    """
    if isinstance(groups, str | bytes) or not hasattr(groups, "__iter__"):
        raise TypeError(f"groups must be one hashable value for each row; got {type(groups).__name__}")
    values = groups.tolist() if hasattr(groups, "tolist") else list(groups)
    if len(values) != n:
        raise ValueError(f"groups must have one value for each of the {n} rows; got {len(values)}")
    known: dict[Hashable, int] = {}
    numbers = np.empty(n, np.int64)
    for place, value in enumerate(values):
        try:
            numbers[place] = known.setdefault(value, len(known))
        except TypeError:
            raise TypeError(f"groups must be hashable; entry {place} is of type {type(value).__name__}") from None
        if isinstance(value, float) and value != value:
            raise ValueError(f"groups must not be NaN, which equals nothing; entry {place} is")
    return numbers, list(known)


def _ks(ks: Any) -> list[int]:
    if isinstance(ks, int | np.integer) or not hasattr(ks, "__iter__"):
        raise TypeError(f"ks must be a sequence of integers; got {ks!r}")
    found = list(ks)
    for k in found:
        check_int("each of ks", k, 1)
    return [int(k) for k in found]


def _thresholds(thresholds: Any) -> NDArray[np.float64]:
    if thresholds is None:
        return np.arange(101) / 100
    if not hasattr(thresholds, "__iter__"):
        raise TypeError(f"thresholds must be a sequence of numbers; got {thresholds!r}")
    found = list(thresholds)
    for threshold in found:
        check_real("each of thresholds", threshold)
    return np.array(found, np.float64)
