"""The steps of copy-constrained decoding on the CPU, compiled: no temporary of the vocabulary's size, no n-grams.

Arrays: ids (B, S) int64, V where not usable; usable (B, S) bool; owner (N,) int64; match, use (N, S) bool;
mask (N, V) bool; the tags 0 O, 1 B, 2 I.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from kexue.words._numba import compiled

DONE, NOT_FOUND, NOT_A_NUMBER = 0, 1, 2  # what ``follow`` and ``step`` return
BROKEN = -1  # number of the kept scores of a row with NaN

LARGEST_K = 128  # beyond it, inserting into a sorted list is no longer the way to find the k largest


@compiled(nogil=True)
def choose(logits: Any, match: Any, z: Any) -> bool:
    """The largest of O, B, I; the first of equal ones; I where a run is. False if there is NaN."""
    for row in range(len(match)):
        o, b, i = logits[row, 0], logits[row, 1], logits[row, 2]
        if math.isnan(o) or math.isnan(b) or math.isnan(i):
            return False
        tag = 1 if b > o else 0
        if i > max(o, b):
            for j in range(match.shape[1]):
                if match[row, j]:
                    tag = 2
                    break
        z[row] = tag
    return True


@compiled(nogil=True)
def allow(ids: Any, usable: Any, ends: Any, owner: Any, match: Any, z: Any, use: Any, mask: Any) -> None:
    """Fill ``use`` and ``mask``."""
    length = match.shape[1]
    for row in range(len(match)):
        source, tag = owner[row], z[row]
        use[row] = False
        found = False
        if tag == 2:
            for j in range(1, length):
                if match[row, j - 1] and usable[source, j]:
                    if not found:
                        found = True
                        mask[row] = False
                    use[row, j] = True
                    mask[row, ids[source, j]] = True
        if tag != 0 and not found:
            for j in range(length):
                if usable[source, j]:
                    if not found:
                        found = True
                        mask[row] = False
                    use[row, j] = True
                    mask[row, ids[source, j]] = True
        if found:
            for end in ends:
                mask[row, end] = True
        else:
            mask[row] = True


@compiled(nogil=True)
def advance(ids: Any, owner: Any, use: Any, index: Any, tokens: Any, match: Any, owners: Any) -> bool:
    """Fill ``match`` and ``owners`` for the rows that continue ``index`` with ``tokens``; False if there is no such."""
    for row in range(len(match)):
        old, token = index[row], tokens[row]
        if old < 0 or old >= len(use):
            return False
        source = owner[old]
        owners[row] = source
        for j in range(match.shape[1]):
            match[row, j] = use[old, j] & (ids[source, j] == token)
    return True


@compiled(nogil=True)
def find(ids: Any, length: int, before: Any, sources: int, rows: Any) -> bool:
    """For each row's first ``length`` ids a row of ``before`` of the same source; False if one has none."""
    each, each_before = len(ids) // max(sources, 1), len(before) // max(sources, 1)
    for row in range(len(ids)):
        first = row // each * each_before
        found = False
        for k in range(each_before):
            # The row at the same place first: that is the one unless beams are reordered
            old = first + (row % each + k) % each_before
            same = True
            for t in range(length - 1, -1, -1):
                if before[old, t] != ids[row, t]:
                    same = False
                    break
            if same:
                rows[row] = old
                found = True
                break
        if not found:
            return False
    return True


@compiled(nogil=True)
def keep(value: Any, place: int, count: int, top_k: int, values: Any, places: Any) -> int:
    """Put a score among the largest so far, unless it is there; their new number, or BROKEN for NaN."""
    if value == -math.inf:
        return count
    if math.isnan(value):
        return BROKEN
    k = count
    while k > 0 and (values[k - 1] < value or (values[k - 1] == value and places[k - 1] >= place)):
        k -= 1
        if places[k] == place:
            return count
    if k == top_k:
        return count
    for m in range(count, k, -1):
        values[m], places[m] = values[m - 1], places[m - 1]
    values[k], places[k] = value, place
    return min(count + 1, top_k)


@compiled(nogil=True)
def finish(scores: Any, count: int, top_k: int, values: Any, places: Any, out: Any) -> None:
    """Log-softmax of the kept scores of a row; of all its scores if nothing was kept."""
    if count == 0:
        least = values[0]
        for v in range(len(scores)):
            value = scores[v]
            if count == top_k and value <= least:
                continue
            count = keep(value, v, count, top_k, values, places)
            if count == BROKEN:
                break
            least = values[top_k - 1]
    if count == BROKEN or (count > 0 and values[0] == math.inf):
        out[:] = math.nan
        return
    out[:] = -math.inf
    total, largest = 0.0, np.float64(values[0])
    for k in range(count):
        total += math.exp(values[k] - largest)
    for k in range(count):
        out[places[k]] = values[k] - largest - math.log(total)


@compiled(nogil=True)
def survivors(scores: Any, mask: Any, top_k: int, out: Any) -> None:
    """Log-softmax over the ``top_k`` largest of the allowed scores (the lowest ids of equal ones), -inf elsewhere."""
    values, places = np.empty(top_k + 1, scores.dtype), np.empty(top_k + 1, np.int64)
    for row in range(len(scores)):
        count = 0
        for v in range(scores.shape[1]):
            if mask[row, v]:
                count = keep(scores[row, v], v, count, top_k, values, places)
                if count == BROKEN:
                    break
        finish(scores[row], count, top_k, values, places, out[row])


@compiled(nogil=True)
def follow(
    ids: Any, usable: Any, ends: Any, owner: Any, use: Any, index: Any, tokens: Any, logits: Any,
    match: Any, owners: Any, used: Any, mask: Any,
) -> int:  # fmt: skip
    """``advance``, ``choose`` and ``allow``."""
    z = np.empty(len(index), np.int64)
    if not advance(ids, owner, use, index, tokens, match, owners):
        return NOT_FOUND
    if not choose(logits, match, z):
        return NOT_A_NUMBER
    allow(ids, usable, ends, owners, match, z, used, mask)
    return DONE


@compiled(nogil=True)
def step(
    ids: Any, usable: Any, ends: Any, use: Any, before: Any, now: Any, logits: Any, scores: Any, top_k: int, match: Any,
    used: Any, out: Any,
) -> int:  # fmt: skip
    """All of the above for rows that are one token longer than those before.

    A row that copies looks at the scores of what its source allows only, and no mask of the vocabulary is made.
    """
    length, size, sources = before.shape[1], ids.shape[1], len(ids)
    rows, z = np.empty(len(now), np.int64), np.empty(len(now), np.int64)
    if not find(now, length, before, sources, rows):
        return NOT_FOUND
    each = len(now) // max(sources, 1)
    for row in range(len(now)):
        old, source, token = rows[row], row // each, now[row, length]
        for j in range(size):
            match[row, j] = use[old, j] & (ids[source, j] == token)
    if not choose(logits, match, z):
        return NOT_A_NUMBER
    values, places = np.empty(top_k + 1, scores.dtype), np.empty(top_k + 1, np.int64)
    for row in range(len(now)):
        source, tag, count, found = row // each, z[row], 0, False
        used[row] = False
        if tag == 2:
            for j in range(1, size):
                if match[row, j - 1] and usable[source, j]:
                    found = used[row, j] = True
                    if count != BROKEN:
                        count = keep(scores[row, ids[source, j]], ids[source, j], count, top_k, values, places)
        if tag != 0 and not found:
            for j in range(size):
                if usable[source, j]:
                    found = used[row, j] = True
                    value = scores[row, ids[source, j]]
                    if count != BROKEN and not (count == top_k and value < values[top_k - 1]):
                        count = keep(value, ids[source, j], count, top_k, values, places)
        if found:
            for end in ends:
                if count != BROKEN:
                    count = keep(scores[row, end], end, count, top_k, values, places)
        finish(scores[row], count, top_k, values, places, out[row])
    return DONE
