"""Counts, means and within-class scatter of labelled rows, in one pass; they add and subtract.

For class k: count N_k (sum of weights), mean m_k, and the scatter sum_i w_i (x_i - m_k)(x_i - m_k)^T, either summed
over the classes, (D, D), or for each class, (C, D, D).

The article's Sigma = E[x x^T] - sum_k p_k m_k m_k^T subtracts two large matrices where classes lie far apart. Here a
row of class k is shifted by (about) the mean of its own class before it is multiplied, so that the subtraction happens
on the rows and what is left to correct is small. Blocks are multiplied in the dtype of the input and added up in
float64. The shift is a first row plus a mean difference to it: features that are constant give exact zeros.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

BLOCK_BYTES = 2**21  # of shifted rows: they stay in the cache between the shift, the sums and the product
DENSE = 0.1  # share of stored numbers above which a sparse matrix is multiplied in dense blocks


@dataclass
class Moments:
    """What a Gaussian rule needs of the data.

    Attributes:
        counts: Sum of the weights of each class, (C,).
        rows: Number of rows of each class with a weight above 0, (C,).
        means: (C, D), 0 for a class without rows.
        scatter: (D, D) summed over the classes, or (C, D, D).
    """

    counts: Array
    rows: NDArray[np.int64]
    means: Array
    scatter: Array

    @classmethod
    def zeros(cls, classes: int, width: int, per_class: bool) -> Moments:
        """The moments of no rows."""
        shape = (classes, width, width) if per_class else (width, width)
        return cls(np.zeros(classes), np.zeros(classes, np.int64), np.zeros((classes, width)), np.zeros(shape))

    @property
    def per_class(self) -> bool:
        """Whether each class has a scatter of its own."""
        return self.scatter.ndim == 3

    def pooled(self) -> Array:
        """Scatter within classes, summed over them, (D, D)."""
        return self.scatter.sum(0) if self.per_class else self.scatter

    def expand(self, places: NDArray[np.int64], classes: int) -> Moments:
        """The same moments among ``classes`` classes, class k at ``places[k]``."""
        out = Moments.zeros(classes, self.means.shape[1], self.per_class)
        out.counts[places], out.rows[places], out.means[places] = self.counts, self.rows, self.means
        if self.per_class:
            out.scatter[places] = self.scatter
        else:
            out.scatter = self.scatter.copy()
        return out

    def take(self, places: NDArray[np.intp]) -> Moments:
        """The moments of some of the classes; a shared scatter keeps that of all, so the others must have no rows."""
        scatter = self.scatter[places] if self.per_class else self.scatter
        return Moments(self.counts[places], self.rows[places], self.means[places], scatter)

    def __add__(self, other: Moments) -> Moments:
        """The moments of the rows of both (Chan et al. 1979)."""
        counts = self.counts + other.counts
        share = np.divide(other.counts, counts, out=np.zeros_like(counts), where=counts > 0)
        gap = other.means - self.means
        between = _outer(self.counts * share, gap, self.per_class)
        return Moments(
            counts, self.rows + other.rows, self.means + share[:, None] * gap, self.scatter + other.scatter + between
        )

    def __sub__(self, other: Moments) -> Moments:
        """The moments of the rows that are left when those of ``other`` are taken out.

        Raises:
            ValueError: ``other`` has more rows or weight in a class than there are, or leaves a negative variance.
        """
        rows, counts = self.rows - other.rows, self.counts - other.counts
        bad = (rows < 0) | (counts < -1e-9 * self.counts)
        if bad.any():
            k = int(np.flatnonzero(bad)[0])
            raise ValueError(
                f"only rows that were fitted can be taken out; class number {k} has {self.rows[k]} rows of total "
                f"weight {self.counts[k]:.6g}, got {other.rows[k]} of {other.counts[k]:.6g}"
            )
        left = rows > 0
        counts = np.where(left, counts, 0.0)
        share = np.divide(other.counts, counts, out=np.zeros_like(counts), where=counts > 0)
        # mean + (mean - other) share is exact where the two agree: constant features stay constant
        means = np.where(left[:, None], self.means + share[:, None] * (self.means - other.means), 0.0)
        scale = np.divide(counts * other.counts, self.counts, out=np.zeros_like(counts), where=self.counts > 0)
        scatter = self.scatter - other.scatter - _outer(scale, other.means - means, self.per_class)
        if self.per_class:
            scatter[~left] = 0.0
        diagonal = np.einsum("...ii->...i", scatter)
        if (diagonal < -1e-3 * np.einsum("...ii->...i", self.scatter)).any():
            raise ValueError(
                "only rows that were fitted can be taken out; got some whose squares exceed the fitted ones"
            )
        np.maximum(diagonal, 0.0, out=diagonal)  # rounding may leave a variance just below 0
        return Moments(counts, rows, means, scatter)


def _outer(weights: Array, rows: Array, per_class: bool) -> Array:
    """sum_k w_k r_k r_k^T, or each term."""
    scaled = rows * np.sqrt(weights)[:, None]
    return scaled[:, :, None] * scaled[:, None, :] if per_class else scaled.T @ scaled


def moments(
    X: Any,
    y: NDArray[np.intp],
    classes: int,
    *,
    weight: Array | None = None,
    rows: NDArray[np.intp] | None = None,
    per_class: bool = False,
) -> Moments:
    """One pass over the rows.

    Args:
        X: (N, D) in float32 or float64, or a sparse matrix in the CSR layout; finite.
        y: Class of each row, (N,), in [0, C).
        classes: C.
        weight: Not negative, (N,); None weighs each row 1. Rows of weight 0 count as absent.
        rows: Rows that take part; None for all.
        per_class: Keep a scatter for each class.

    Memory: a block or two of rows (2 MiB or 256 rows each) beside D x D numbers (C D x D with ``per_class``).
    """
    if weight is not None and not weight.all():
        rows = np.flatnonzero(weight) if rows is None else rows[weight[rows] > 0]
    n, width = (X.shape[0] if rows is None else len(rows)), X.shape[1]
    if n == 0:
        return Moments.zeros(classes, width, per_class)
    sparse = not isinstance(X, np.ndarray)
    if sparse and X.nnz < DENSE * X.shape[0] * width:
        return _sparse_moments(X, y, weight, rows, Moments.zeros(classes, width, per_class))

    def one_pass(dtype: Any) -> Moments:
        stream = _Stream(Moments.zeros(classes, width, per_class), dtype)
        step = max(256, BLOCK_BYTES // (width * stream.shift.itemsize))
        for start in range(0, n, step):
            take: Any = slice(start, start + step) if rows is None else rows[start : start + step]
            stream.add(X, take, y[take], None if weight is None else weight[take])
        return stream.finish()

    if sparse or X.dtype != np.float32:
        return one_pass(np.float64)
    out = one_pass(np.float32)
    return one_pass(np.float64) if _out_of_range(out, X) else out


def _out_of_range(m: Moments, X: NDArray[Any]) -> bool:
    """Whether squares overflowed in float32, or came too near to its smallest number in a feature that varies."""
    squares = np.diag(m.pooled())
    if not np.isfinite(squares.sum()):
        return True
    small = X[:, squares < 1e-30 * max(m.counts.sum(), m.rows.sum())]  # features or weights are small
    return bool((small != small[:1]).any())


class _Stream:
    """Adds up blocks of dense rows about a shift for each class."""

    def __init__(self, out: Moments, dtype: Any) -> None:
        self.out = out
        self.shift = np.zeros(out.means.shape, dtype)
        self.seen = np.zeros(len(out.counts), bool)
        self.buffers = [np.empty((0, out.means.shape[1]), dtype) for _ in range(2)]
        self.indicator: Any = None
        self.product = np.empty(out.scatter.shape[-2:], dtype)

    def add(self, X: Any, take: Any, y: NDArray[np.intp], weight: Array | None) -> None:
        """Take in the rows ``take`` of X, with their classes and weights above 0."""
        out, classes, n = self.out, len(self.out.counts), len(y)
        if len(self.buffers[0]) < n:
            self.buffers = [np.empty((n, X.shape[1]), self.shift.dtype) for _ in range(2)]
        b, rest = (buffer[:n] for buffer in self.buffers)
        if not isinstance(X, np.ndarray):
            x = X[take].toarray()
        elif isinstance(take, slice):
            x = X[take]
        else:  # into memory that is in the cache already
            x = np.take(X, take, 0, out=rest, mode="clip") if X.dtype == rest.dtype else X[take]
        if out.per_class:  # rows of one class side by side
            order = np.argsort(y, kind="stable")
            x, y, weight = x[order], y[order], None if weight is None else weight[order]
        rows = np.bincount(y, minlength=classes)
        root = np.ones(n, b.dtype) if weight is None else np.sqrt(weight).astype(b.dtype)
        indicator = self._indicator(root, y.astype(np.int32), classes)
        new = np.flatnonzero((rows > 0) & ~self.seen)
        if len(new):  # their shift: a first row, and then the mean
            first = np.empty(classes, np.intp)
            first[y[::-1]] = np.arange(n)[::-1]
            self.shift[new] = x[first[new]]
            self.seen[new] = True
            gap = indicator @ self._shifted(x, y, b)
            total = np.maximum(np.bincount(y, root, classes), np.finfo(b.dtype).tiny)  # roots may be too small
            self.shift[new] += gap[new] / total[new, None].astype(b.dtype)
        self._shifted(x, y, b)
        if weight is not None:
            b *= root[:, None]
        out.means += indicator @ b
        out.rows += rows
        out.counts += rows if weight is None else np.bincount(y, weight, classes)
        if not out.per_class:
            out.scatter += np.dot(b.T, b, out=self.product)  # numpy multiplies half of it and mirrors
            return
        ends = np.cumsum(rows)
        for k in np.flatnonzero(rows):
            part = b[ends[k] - rows[k] : ends[k]]
            out.scatter[k] += np.dot(part.T, part, out=self.product)

    def _indicator(self, root: NDArray[Any], y: NDArray[np.int32], classes: int) -> Any:
        """(C, n), one number in a column: its product with rows adds each row once, to the sum of its class."""
        from scipy.sparse import csc_array

        if self.indicator is None or self.indicator.shape[1] != len(y):
            self.indicator = csc_array((root, y, np.arange(len(y) + 1, dtype=np.int32)), (classes, len(y)))
        else:  # most blocks have one length, and making the matrix costs as much as its product
            self.indicator.data, self.indicator.indices = root, y
        return self.indicator

    def _shifted(self, x: NDArray[Any], y: NDArray[np.intp], b: NDArray[Any]) -> NDArray[Any]:
        """Rows minus the shifts of their classes, in b."""
        np.take(self.shift, y, 0, out=b, mode="clip")
        return np.subtract(x, b, out=b)

    def finish(self) -> Moments:
        """From sums about the shift to means, and to the scatter about the means."""
        out = self.out
        offset = np.divide(out.means, out.counts[:, None], out=np.zeros_like(out.means), where=out.counts[:, None] > 0)
        out.means = np.where(self.seen[:, None], self.shift + offset, 0.0)
        out.scatter = out.scatter - _outer(out.counts, offset, out.per_class)
        return out


def _sparse_moments(
    X: Any, y: NDArray[np.intp], weight: Array | None, rows: NDArray[np.intp] | None, out: Moments
) -> Moments:
    """The same from products of sparse matrices in float64, centred afterwards: no row is made dense."""
    from scipy.sparse import csr_array, diags_array

    if rows is not None:
        X, y, weight = X[rows], y[rows], None if weight is None else weight[rows]
    X = csr_array(X, dtype=np.float64)
    w = np.ones(len(y)) if weight is None else weight
    classes = len(out.counts)
    indicator = csr_array((w, (y, np.arange(len(y)))), (classes, len(y)))
    out.counts = np.bincount(y, w, classes).astype(np.float64)
    out.rows = np.bincount(y, minlength=classes).astype(np.int64)
    sums = (indicator @ X).toarray()
    out.means = np.divide(sums, out.counts[:, None], out=sums, where=out.counts[:, None] > 0)
    root = diags_array(np.sqrt(w)) @ X if weight is not None else X
    if out.per_class:
        for k in np.flatnonzero(out.rows):
            part = root[y == k]
            out.scatter[k] = (part.T @ part).toarray()
    else:
        out.scatter = (root.T @ root).toarray()
    raw = np.einsum("...ii->...i", out.scatter).copy()
    out.scatter = out.scatter - _outer(out.counts, out.means, out.per_class)
    diagonal = np.einsum("...ii->...i", out.scatter)
    diagonal[diagonal <= 1e-14 * raw] = 0.0  # a constant feature: what is left is rounding
    return out
