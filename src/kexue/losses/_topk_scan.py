"""The pass over rows of scores that keeps the k largest, for CPU tensors; see ``_topk_kernel.py``.

This module imports numba, so it is imported where it is needed.
"""

from __future__ import annotations

import numpy as np

from kexue.words._numba import kernel

__all__ = ["scan"]

BLOCK = 64  # scores compared at once


@kernel
def _sink(keys, index, place):  # type: ignore[no-untyped-def]
    """Restore the heap, whose root is the worst: the smallest, and of equal ones that of the highest index."""
    size = len(keys)
    key, at = keys[place], index[place]
    while True:
        child = 2 * place + 1
        if child >= size:
            break
        other = child + 1
        if other < size and (keys[other] < keys[child] or (keys[other] == keys[child] and index[other] > index[child])):
            child = other
        if keys[child] > key or (keys[child] == key and index[child] < at):
            break
        keys[place], index[place] = keys[child], index[child]
        place = child
    keys[place], index[place] = key, at


@kernel
def scan(scores, offset, keys, index):  # type: ignore[no-untyped-def]
    """Scores (R, n) of the columns from ``offset`` on go into the heaps keys (R, k), index (R, k).

    With offset 0 the heaps are made of the first k columns. Columns come in ascending order, so that of equal scores
    the earlier one is in the heap first and stays.
    """
    k, n = keys.shape[1], scores.shape[1]
    for r in range(scores.shape[0]):
        row, heap, at = scores[r], keys[r], index[r]
        start = 0
        if offset == 0:
            for i in range(k):
                heap[i] = row[i] if row[i] == row[i] else np.inf  # NaN ranks with the largest
                at[i] = i
            for place in range(k // 2 - 1, -1, -1):
                _sink(heap, at, place)
            start = k
        worst = heap[0]
        while start < n:
            stop = min(start + BLOCK, n)
            hit = np.int32(0)
            for i in range(start, stop):
                hit |= np.int32(0) if row[i] <= worst else np.int32(1)  # also for NaN
            if hit:
                for i in range(start, stop):
                    if row[i] > worst:
                        heap[0], at[0] = row[i], offset + i
                    elif row[i] != row[i] and worst < np.inf:
                        heap[0], at[0] = np.inf, offset + i
                    else:
                        continue
                    _sink(heap, at, 0)
                    worst = heap[0]
            start = stop
