"""Cosines of many vectors against many: rows of length 1, exact ties between equal rows, one pass over a block.

Nothing here holds more than a block of rows of the matrix of cosines.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from kexue.words._numba import compiled

BLOCK_BYTES = 1 << 25  # of cosines at a time


def unit_rows(vectors: NDArray[Any]) -> NDArray[Any]:
    """Rows divided by their lengths (a row of zeros stays), float32 or float64; parallel rows become equal bit by bit.

    Dividing by the largest entry first keeps the square of a large or a small number in range, and makes rows that are
    exact multiples of each other equal before anything is rounded.
    """
    top = np.abs(vectors).max(axis=1, keepdims=True, initial=0)
    scaled = vectors / np.where(top > 0, top, 1)
    # + 0.0: a negative zero is a zero, also to the comparison of bytes in distinct_rows
    return scaled / np.where(top > 0, np.linalg.norm(scaled, axis=1, keepdims=True), 1) + vectors.dtype.type(0)


def distinct_rows(rows: NDArray[Any]) -> tuple[NDArray[Any], NDArray[np.int64] | None]:
    """The distinct rows, and for each row which of them it is; None if no row occurs twice.

    A matrix product may round equal rows differently, depending on where they stand. Computing each distinct row once
    makes their ties exact.
    """
    if len(rows) < 2 or rows.shape[1] == 0:
        return rows, None
    keys = _hashes(rows)
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    if len(first) == len(rows):
        return rows, None
    if not np.array_equal(rows, rows[first[inverse]]):  # two different rows with one hash
        whole = np.ascontiguousarray(rows).view(np.dtype((np.void, rows.itemsize * rows.shape[1]))).ravel()
        _, first, inverse = np.unique(whole, return_index=True, return_inverse=True)
        if len(first) == len(rows):
            return rows, None
    return rows[first], inverse.astype(np.int64)


def _hashes(rows: NDArray[Any]) -> NDArray[np.uint64]:
    """A 64-bit number for each row, equal for equal rows."""
    words = np.ascontiguousarray(rows).view(np.uint32).reshape(len(rows), -1)
    factors = np.random.default_rng(0).integers(1, 1 << 63, words.shape[1], np.uint64, endpoint=False) | np.uint64(1)
    out = np.empty(len(rows), np.uint64)
    for start in range(0, len(rows), 4096):
        part = words[start : start + 4096].astype(np.uint64)
        part ^= part << np.uint64(29)  # the high bits of a product depend on all bits below, never the other way round
        out[start : start + 4096] = (part * factors).sum(1, dtype=np.uint64)
    return out


def cosines(queries: NDArray[Any], distinct: NDArray[Any], inverse: NDArray[np.int64] | None) -> NDArray[Any]:
    """Block of cosines (b, N) of unit rows, within [-1, 1]."""
    block = queries @ distinct.T
    np.clip(block, -1, 1, out=block)
    return block if inverse is None else block[:, inverse]


def block_rows(columns: int, itemsize: int) -> int:
    """Rows of a block: about 32 MB of cosines, at least 16 rows and at most 1024."""
    return int(min(1024, max(16, BLOCK_BYTES // max(1, columns * itemsize))))


def rounding_bound(width: int) -> float:
    """Largest error of a cosine of unit rows (D,) computed in float32: of the entries, the products and their sum."""
    return (width + 6) * 2.0**-24


GRID = 2.0**40  # cosines of the exact kind are rounded to 1 / GRID: the same value by another way is a tie


@njit(inline="always")
def _exact(a, b):  # type: ignore[no-untyped-def]
    """Cosine of two unit rows in float64, to 12 digits."""
    total = 0.0
    for d in range(a.size):
        total += a[d] * b[d]
    return min(1.0, max(-1.0, np.round(total * GRID) / GRID))


@compiled(nogil=True)
def scan_block(block, first, group, starts, members, units, inverse, error, rank, top):  # type: ignore[no-untyped-def]
    """For each query of a block the rank of its best sibling and its highest cosine, both as in float64.

    block (b, N): query ``first + i`` against all rows, in float32, right to ``error``; where that does not settle an
    order, the cosine is computed again from ``units[inverse[j]]``, the distinct rows in float64. group (N,): group of
    each row; the rows of group g are ``members[starts[g]:starts[g + 1]]``, ascending. Of equal cosines the lower row
    counts as higher; the query itself is left out by its number. rank and top (N,) receive the results; rank 0: the
    query has no sibling.
    """
    known = np.empty(len(units))
    known_for = np.full(len(units), -1)
    for i in range(block.shape[0]):
        query, row = first + i, block[i]
        row[query] = -3
        g = group[query]
        if starts[g + 1] - starts[g] < 2:
            continue
        me = units[inverse[query]]
        high = np.float32(-3)
        for m in range(starts[g], starts[g + 1]):
            high = max(high, row[members[m]])
        best, place = -3.0, -1
        for m in range(starts[g], starts[g + 1]):
            j = members[m]
            if j != query and row[j] >= high - 2 * error:
                u = inverse[j]
                if known_for[u] != query:
                    known[u], known_for[u] = _exact(me, units[u]), query
                if known[u] > best:
                    best, place = known[u], j
        low, up = np.float32(best - error), np.float32(best + error)
        above, near = 0, 0
        for j in range(row.size):
            above += row[j] > up
            near += row[j] >= low
        if near > above + 1:  # more than the sibling itself
            for j in range(row.size):
                if low <= row[j] <= up and j != place:
                    u = inverse[j]
                    if known_for[u] != query:
                        known[u], known_for[u] = _exact(me, units[u]), query
                    above += known[u] > best or (known[u] == best and j < place)
        rank[query], top[query] = above + 1, best
        if above > 0:
            high = row[0]
            for j in range(1, row.size):
                high = max(high, row[j])
            for j in range(row.size):
                if row[j] >= high - 2 * error and j != query:
                    u = inverse[j]
                    if known_for[u] != query:
                        known[u], known_for[u] = _exact(me, units[u]), query
                    top[query] = max(top[query], known[u])


@compiled(nogil=True)
def top_of_block(block, positions, scores):  # type: ignore[no-untyped-def]
    """The k highest entries of each row of block (b, N), highest first, of equal ones the lower column first.

    positions and scores (b, k), k <= N, receive them.
    """
    k = positions.shape[1]
    for i in range(block.shape[0]):
        row, where, what = block[i], positions[i], scores[i]
        count = 0
        for j in range(row.size):
            value = row[j]
            if count == k and not value > what[k - 1]:
                continue
            at = count if count < k else k - 1
            while at > 0 and value > what[at - 1]:
                where[at], what[at] = where[at - 1], what[at - 1]
                at -= 1
            where[at], what[at] = j, value
            count = min(count + 1, k)
