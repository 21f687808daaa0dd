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
def _offer(row, start, stop, offset, keys, index):  # type: ignore[no-untyped-def]
    """Take what is better than the worst of the heap."""
    for i in range(start, stop):
        key = row[i]
        if key != key:
            key = np.inf  # NaN ranks with the largest
        if key > keys[0]:
            keys[0], index[0] = key, offset + i
            _sink(keys, index, 0)


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
                heap[i] = row[i] if row[i] == row[i] else np.inf
                at[i] = i
            for place in range(k // 2 - 1, -1, -1):
                _sink(heap, at, place)
            start = k
        while start + BLOCK <= n:
            block, worst = row[start : start + BLOCK], heap[0]
            hit = 0
            for i in range(BLOCK):  # of fixed length, without a branch, no index below 0: or it is not vectorised
                hit |= not (block[i] <= worst)  # also for NaN
            if hit:
                _offer(row, start, start + BLOCK, offset, heap, at)
            start += BLOCK
        _offer(row, start, n, offset, heap, at)
