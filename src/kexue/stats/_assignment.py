"""Exact assignment of n rows to n columns: an auction with falling prices finds good prices, shortest paths finish.

Bertsekas' auction (https://doi.org/10.1007/BF02186476) with a tolerance that is divided at every stage leaves prices v
that are nearly optimal. From them, rows that can be matched to their best column are; bids without tolerance match
most of the rest; the last ones are matched along shortest augmenting paths (Jonker and Volgenant,
https://doi.org/10.1007/BF02278710), which makes the result exact whatever the auction did.
Throughout, row i wants the column with the smallest c_ij - v_j, and g = v, f_i = min_j (c_ij - v_j) are feasible.
"""

from __future__ import annotations

import numpy as np

from kexue.words._numba import compiled

LANES = 16

_fast = compiled(nogil=True, error_model="numpy", fastmath={"nnan", "nsz", "reassoc", "contract"})
_exact = compiled(nogil=True, error_model="numpy")


@_fast
def _best_two(row, v):  # type: ignore[no-untyped-def]
    """Smallest and second smallest of row - v and the column of the first.

    The minimum of sixteen entries is vector code; only blocks that hold a better entry are looked into.
    """
    n = row.shape[0]
    first = second = np.inf
    column = 0
    full = n - n % LANES
    for start in range(0, full, LANES):
        low = np.inf
        for k in range(LANES):
            low = min(low, row[start + k] - v[start + k])
        if low < second:
            for j in range(start, start + LANES):
                d = row[j] - v[j]
                if d < second:
                    if d < first:
                        first, second, column = d, first, j
                    else:
                        second = d
    for j in range(full, n):
        d = row[j] - v[j]
        if d < second:
            if d < first:
                first, second, column = d, first, j
            else:
                second = d
    return first, second, column


@_exact
def _auction(costs, v, eps, column_of, row_of, stack, top, limit):  # type: ignore[no-untyped-def]
    """Let the rows on the stack bid until none is left or ``limit`` bids are made."""
    bids = 0
    while top > 0 and bids < limit:
        bids += 1
        i = stack[top - 1]
        first, second, j = _best_two(costs[i], v)
        if second == np.inf:
            second = first
        step = second - first + eps
        top -= 1
        if step == 0.0 and row_of[j] >= 0:  # a tie: nothing is gained by taking the column away
            continue
        v[j] -= step
        if row_of[j] >= 0:
            stack[top] = row_of[j]
            column_of[row_of[j]] = -1
            top += 1
        row_of[j] = i
        column_of[i] = j


@_exact
def _augment(costs, v, column_of, row_of, limit):  # type: ignore[no-untyped-def]
    """Match the free rows along shortest augmenting paths, which keeps every matched row at its best column.

    No path starts once ``limit`` rows were read.
    """
    read = 0
    n = v.shape[0]
    distance, before = np.empty(n), np.empty(n, np.int64)
    open_, scanned = np.empty(n, np.int64), np.empty(n, np.int64)
    for free in range(n):
        if column_of[free] >= 0:
            continue
        if read > limit:
            return
        for j in range(n):
            distance[j] = costs[free, j] - v[j]
            before[j] = free
            open_[j] = j
        left, done, last = n, 0, -1
        reached = 0.0
        while last < 0:
            best = 0
            for k in range(1, left):
                if distance[open_[k]] < distance[open_[best]]:
                    best = k
            j = open_[best]
            left -= 1
            open_[best] = open_[left]
            reached = distance[j]
            if row_of[j] < 0:
                last = j
                break
            scanned[done] = j
            done += 1
            i = row_of[j]
            shift = reached - (costs[i, j] - v[j])
            for k in range(left):
                other = open_[k]
                through = costs[i, other] - v[other] + shift
                if through < distance[other]:
                    distance[other] = through
                    before[other] = i
        read += done + 1
        for k in range(done):
            j = scanned[k]
            v[j] += distance[j] - reached
        j = last
        while True:
            i = before[j]
            row_of[j] = i
            j, column_of[i] = column_of[i], j
            if i == free:
                break


@_exact
def assign(costs, unit, factor, smallest, limit):  # type: ignore[no-untyped-def]
    """Columns of an optimal assignment and its column potentials, for costs (n, n) of the order of ``unit``.

    ``factor`` divides the tolerance of the auction until it is below ``smallest`` units. Paths that
    read more than ``limit`` rows in all are given up: the rows left have the column -1.
    """
    n = costs.shape[0]
    v = np.empty(n)
    v[:] = costs[0]
    for i in range(1, n):
        for j in range(n):
            v[j] = min(v[j], costs[i, j])
    column_of, row_of = np.full(n, -1), np.full(n, -1)
    stack = np.empty(n, np.int64)
    eps = 0.25 * unit
    while eps > smallest * unit:
        column_of[:] = -1
        row_of[:] = -1
        for i in range(n):
            stack[i] = n - 1 - i
        _auction(costs, v, eps, column_of, row_of, stack, n, 50 * n)
        eps /= factor
    column_of[:] = -1
    row_of[:] = -1
    top = 0
    for i in range(n):
        _, _, j = _best_two(costs[i], v)
        if row_of[j] < 0:
            row_of[j] = i
            column_of[i] = j
        else:
            stack[top] = i
            top += 1
    _auction(costs, v, 0.0, column_of, row_of, stack, top, 4 * n)
    _augment(costs, v, column_of, row_of, limit)
    return column_of, v
