"""From counts to the pairs of the regression: targets (PMI) and weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import sparse

from kexue.words._numba import kernel
from kexue.words.cooccurrence import CooccurrenceCounter


@dataclass
class Pairs:
    """The pairs of words that were seen together, in rows.

    Attributes:
        indptr: (V + 1,) row starts.
        indices: Columns, ascending within a row, without the diagonal. One table: both directions of each pair.
        weights: lambda of each entry.
        targets: PMI of each entry.
        one_table: The arrays are symmetric and each unordered pair counts once.
    """

    indptr: npt.NDArray[Any]
    indices: npt.NDArray[np.int32]
    weights: npt.NDArray[Any]
    targets: npt.NDArray[Any]
    one_table: bool

    @property
    def size(self) -> int:
        """Number of pairs that the loss sums over."""
        return len(self.indices) // 2 if self.one_table else len(self.indices)

    def mean_square(self) -> float:
        """Mean of lambda PMI^2 over the pairs: the error of zero vectors."""
        both = float(np.sum(self.weights * self.targets.astype(np.float64) ** 2))
        return both / max(len(self.indices), 1)

    def transposed(self) -> Pairs:
        """The same pairs by columns."""
        size = len(self.indptr) - 1
        indptr, indices, (weights, targets) = _by_columns(size, self.indptr, self.indices, (self.weights, self.targets))
        return Pairs(indptr, indices, weights, targets, self.one_table)


@dataclass(frozen=True)
class Counts:
    """Checked counts: entries of the matrix without the diagonal, in full counts.

    Attributes:
        indptr: (V + 1,) row starts.
        indices: Columns.
        values: Counts, in units of 1/``unit``.
        unit: Worth of one count.
        symmetric: The entries are the strictly lower triangle of a symmetric matrix.
        words: (V,) occurrences of each word.
    """

    indptr: npt.NDArray[Any]
    indices: npt.NDArray[np.int32]
    values: npt.NDArray[Any]
    unit: float
    symmetric: bool
    words: npt.NDArray[Any]


def from_counter(counter: CooccurrenceCounter) -> Counts:
    """Counts of a fitted counter."""
    lower = counter.lower_
    return Counts(lower.indptr, lower.indices, lower.data, float(counter.unit_), True, counter.counts_)


def from_matrix(matrix: Any, words: Any | None, one_table: bool) -> Counts:
    """Check a matrix of counts.

    Raises:
        ValueError: Not square, NaN, infinite or negative counts, or not symmetric although one table is to be fitted.
    """
    full = sparse.csr_matrix(matrix)
    if full.shape[0] != full.shape[1] or full.shape[0] == 0:
        raise ValueError(f"counts must be a square matrix with at least one row; got shape {full.shape}")
    if full.dtype.kind not in "iuf":
        raise TypeError(f"counts must be numbers; got dtype {full.dtype}")
    full = full.copy()
    full.sum_duplicates()
    if not np.isfinite(full.data).all() or (full.data < 0).any():
        bad = full.data[~(np.isfinite(full.data) & (full.data >= 0))][0]
        raise ValueError(f"counts must be finite and not negative; got {bad}")
    symmetric = (abs(full - full.T) > 1e-9 * abs(full)).nnz == 0
    if one_table and not symmetric:
        difference = abs(full - full.T).tocoo()
        k = int(np.argmax(difference.data))
        i, j = difference.row[k], difference.col[k]
        raise ValueError(
            f"model='shared' needs symmetric counts; got X[{i}, {j}] = {full[i, j]} and X[{j}, {i}] = {full[j, i]}"
        )
    totals = np.asarray(full.sum(1)).ravel() if words is None else np.asarray(words)
    if totals.shape != (full.shape[0],) or totals.dtype.kind not in "iuf":
        raise ValueError(f"counts of the words must be {full.shape[0]} numbers; got shape {totals.shape}")
    if not np.isfinite(totals).all() or (totals < 0).any():
        raise ValueError("counts of the words must be finite and not negative")
    part = sparse.tril(full, -1).tocsr() if symmetric else (full - sparse.diags(full.diagonal())).tocsr()
    part.eliminate_zeros()
    part.sort_indices()
    seen = np.unique(np.r_[part.indices, np.flatnonzero(np.diff(part.indptr))])
    if (totals[seen] <= 0).any():
        word = int(seen[totals[seen] <= 0][0])
        raise ValueError(f"word {word} has pairs but its count is {totals[word]}")
    return Counts(part.indptr, part.indices.astype(np.int32), part.data, 1.0, symmetric, totals)


def make_pairs(
    counts: Counts,
    *,
    one_table: bool,
    x_max: float,
    alpha: float,
    truncate: bool,
    marginal: str,
    cds: float,
    shift: float,
    dtype: Any,
) -> Pairs:
    """Targets and weights of all pairs.

    PMI_ij = ln X_ij - ln X_tot - ln n_i - ln n_j + 2 ln n_tot, X_tot over ordered pairs i != j, with n the counts of
    the words ("unigram") or the row and column sums of X ("rowsum"). ``cds`` smooths the context's distribution to
    n_j^cds; one table uses the mean of both directions, so that the target stays symmetric. ``shift`` k lowers the
    target by ln k.
    """
    size = len(counts.words)
    values = counts.values / counts.unit
    rows = np.repeat(np.arange(size, dtype=np.int32), np.diff(counts.indptr))
    columns = counts.indices
    by_row = np.bincount(rows, values, minlength=size)
    by_column = np.bincount(columns, values, minlength=size)
    if counts.symmetric:
        by_row = by_column = by_row + by_column
    total = by_row.sum()
    first, second = (by_row, by_column) if marginal == "rowsum" else (counts.words, counts.words)
    log_first = _log_share(first, 1.0)
    log_context = _log_share(second, cds)
    targets = np.log(values)
    targets -= np.log(total) + np.log(shift)
    weights = values / x_max
    if truncate:
        np.minimum(weights, 1.0, out=weights)
    weights **= alpha
    weights, values = weights.astype(dtype), np.empty(0)
    if one_table or (counts.symmetric and cds == 1.0):
        targets -= ((log_first + log_context) / 2)[rows]
        targets -= ((log_first + log_context) / 2)[columns]
        indptr, indices, (weights, targets) = _mirrored(size, counts.indptr, columns, (weights, targets.astype(dtype)))
    elif counts.symmetric:
        indptr, indices, (weights, targets) = _mirrored(size, counts.indptr, columns, (weights, targets.astype(dtype)))
        rows = np.repeat(np.arange(size, dtype=np.int32), np.diff(indptr))
        targets -= (log_first[rows] + log_context[indices]).astype(dtype)
    else:
        targets -= log_first[rows] + log_context[columns]
        indptr, indices, targets = counts.indptr, columns, targets.astype(dtype)
    return Pairs(np.asarray(indptr, np.int64), indices, weights, targets, one_table)


def _log_share(counts: npt.NDArray[Any], power: float) -> npt.NDArray[np.float64]:
    with np.errstate(divide="ignore"):
        logs = power * np.log(np.asarray(counts, np.float64))
    largest = logs.max()
    return logs - (largest + np.log(np.exp(logs - largest).sum()))


def _mirrored(size: int, indptr: Any, columns: Any, data: tuple[Any, Any]) -> tuple[Any, Any, tuple[Any, Any]]:
    """A symmetric matrix from its strictly lower triangle."""
    full = np.diff(indptr) + np.bincount(columns, minlength=size)
    starts = np.zeros(size + 1, np.int64)
    np.cumsum(full, out=starts[1:])
    indices = np.empty(starts[-1], np.int32)
    out = (np.empty(starts[-1], data[0].dtype), np.empty(starts[-1], data[1].dtype))
    _scatter(np.asarray(indptr, np.int64), columns, *data, starts, indices, *out, True)
    return starts, indices, out


def _by_columns(size: int, indptr: Any, columns: Any, data: tuple[Any, Any]) -> tuple[Any, Any, tuple[Any, Any]]:
    """The transpose."""
    starts = np.zeros(size + 1, np.int64)
    np.cumsum(np.bincount(columns, minlength=size), out=starts[1:])
    indices = np.empty(starts[-1], np.int32)
    out = (np.empty(starts[-1], data[0].dtype), np.empty(starts[-1], data[1].dtype))
    _scatter(np.asarray(indptr, np.int64), columns, *data, starts, indices, *out, False)
    return starts, indices, out


@kernel
def _scatter(
    indptr: Any, columns: Any, first: Any, second: Any, starts: Any, indices: Any, out_first: Any, out_second: Any,
    mirror: bool,
) -> None:  # fmt: skip
    """Write entry (i, j) to row j, and with ``mirror`` to row i as well; rows come out sorted."""
    filled = starts[:-1].copy()
    for row in range(len(indptr) - 1):  # a row's own entries lie below the diagonal: they precede the mirrored ones
        for k in range(indptr[row], indptr[row + 1]):
            column = columns[k]
            place = filled[column]
            filled[column] += 1
            indices[place] = row
            out_first[place] = first[k]
            out_second[place] = second[k]
            if mirror:
                place = filled[row]
                filled[row] += 1
                indices[place] = column
                out_first[place] = first[k]
                out_second[place] = second[k]
