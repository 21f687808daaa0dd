"""The pass over rows of scores that keeps the k largest, for CPU tensors; see ``_topk_kernel.py``.

This module imports numba, so it is imported where it is needed.
"""

from __future__ import annotations

import numpy as np

from kexue.words._numba import kernel

__all__ = ["scan"]

BLOCK = 64  # scores compared at once
FEW = BLOCK // 2  # the largest k that is taken from a short row without a heap
SHORT = BLOCK * BLOCK  # scores


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
def _heapify(row, first, keys, index):  # type: ignore[no-untyped-def]
    """Make a heap of the k scores from ``first`` on."""
    for i in range(len(keys)):
        key = row[first + i]
        keys[i] = key if key == key else np.inf  # NaN ranks with the largest
        index[i] = first + i
    for place in range(len(keys) // 2 - 1, -1, -1):
        _sink(keys, index, place)


@kernel
def _offer(row, start, stop, offset, keys, index):  # type: ignore[no-untyped-def]
    """Take what is better than the worst of the heap."""
    for i in range(start, stop):
        key = row[i]
        if key != key:
            key = np.inf
        if key > keys[0]:
            keys[0], index[0] = key, offset + i
            _sink(keys, index, 0)


@kernel
def _edge(row, best, keys, index):  # type: ignore[no-untyped-def]
    """A score that at least k scores reach: the k-th largest of the largest of each lane, every len(best)-th score."""
    lanes = len(best)
    best[:] = row[:lanes]
    for first in range(lanes, len(row) - lanes + 1, lanes):
        part = row[first : first + lanes]
        for i in range(lanes):
            best[i] = part[i] if part[i] > best[i] else best[i]
    _heapify(best, 0, keys, index)
    _offer(best, len(keys), lanes, 0, keys, index)
    return keys[0]


@kernel
def _begin(row, edge, keys, index):  # type: ignore[no-untyped-def]
    """Make a heap of the first k scores that reach the edge, of which there are as many; return where to go on."""
    k, n, filled, start = len(keys), len(row), 0, 0
    while filled < k and start < n:
        stop = min(start + BLOCK, n)
        hit = 1
        if stop - start == BLOCK:
            hit = 0
            block = row[start:stop]
            for i in range(BLOCK):
                hit |= not (block[i] < edge)
        if hit:
            for i in range(start, stop):
                key = row[i]
                if key != key:
                    key = np.inf
                if key >= edge:
                    keys[filled], index[filled] = key, i
                    filled += 1
                    if filled == k:
                        stop = i + 1
                        break
        start = stop
    for place in range(k // 2 - 1, -1, -1):
        _sink(keys, index, place)
    return start


@kernel
def _lane_tops(row, best):  # type: ignore[no-untyped-def]
    """The largest score of each lane of BLOCK, every BLOCK-th score; return whether one is NaN."""
    odd, full = 0, len(row) - len(row) % BLOCK
    best[:] = row[:BLOCK]
    for first in range(0, full, BLOCK):
        part = row[first : first + BLOCK]
        for i in range(BLOCK):
            best[i] = part[i] if part[i] > best[i] else best[i]
            odd |= part[i] != part[i]
    part = row[full:]
    for i in range(len(part)):
        best[i] = part[i] if part[i] > best[i] else best[i]
        odd |= part[i] != part[i]
    return odd != 0


@kernel
def _take(row, best, rank, seats, keys, index):  # type: ignore[no-untyped-def]
    """Find the k largest of a short row almost without a branch; return whether this was possible.

    Only lanes whose largest score is among the k largest of all lanes' can hold one of the k. With NaN or many equal
    scores it is not possible; the heap is for these.
    """
    if _lane_tops(row, best):
        return False
    k, n, hits = len(keys), len(row), 0
    rank[:] = 0
    for j in range(BLOCK):
        pivot = best[j]
        for i in range(BLOCK):
            rank[i] += np.int32(pivot > best[i])
    for i in range(BLOCK):
        seats[hits] = i
        hits += rank[i] < k
    if hits > 2 * k:
        return False
    edge = best[seats[0]]
    for i in range(1, hits):
        edge = min(edge, best[seats[i]])
    if edge == -np.inf:
        return False
    end = BLOCK
    for lane in seats[:hits]:
        for i in range(lane, n, BLOCK):
            seats[end] = i
            end += row[i] >= edge
        if end > BLOCK + 4 * k:
            return False
    found, size = seats[BLOCK:end], end - BLOCK
    while size > k:  # drop the worst
        worst = 0
        for i in range(1, size):
            here, there = row[found[i]], row[found[worst]]
            worst = i if here < there or (here == there and found[i] > found[worst]) else worst
        size -= 1
        found[worst] = found[size]
    for i in range(k):
        keys[i], index[i] = row[found[i]], found[i]
    for place in range(k // 2 - 1, -1, -1):
        _sink(keys, index, place)
    return True


@kernel
def scan(scores, offset, keys, index):  # type: ignore[no-untyped-def]
    """Scores (R, n) of the columns from ``offset`` on go into the heaps keys (R, k), index (R, k).

    With offset 0 the heaps are made of k columns, n of them at least. Columns come in ascending order, so that of
    equal scores the earlier one is in the heap first and stays. A heap of the first k columns would be replaced
    k log(n / k) times over: in a short row the k are found in another way, in a long one another pass finds a score to
    begin with that few are above.
    """
    k, n = keys.shape[1], scores.shape[1]
    lanes = BLOCK
    while lanes < 4 * k:
        lanes *= 2
    best = np.empty(lanes, scores.dtype)
    short = offset == 0 and k <= FEW and 2 * BLOCK <= n <= SHORT
    rank, seats = np.empty(BLOCK, np.int32), np.empty(BLOCK + 4 * k + SHORT // BLOCK + 1, np.int64)
    for r in range(scores.shape[0]):
        row, heap, at = scores[r], keys[r], index[r]
        start = 0
        if short and _take(row, best[:BLOCK], rank, seats, heap, at):
            start = n
        elif offset == 0 and n >= 4 * lanes:
            start = _begin(row, _edge(row, best, heap, at), heap, at)
        elif offset == 0:
            _heapify(row, 0, heap, at)
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
