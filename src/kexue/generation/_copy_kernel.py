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

LARGEST_K = 128  # beyond it, inserting into a sorted list is no longer the way to find the k largest
BLOCK = 32  # scores that are compared at once


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
def reach(usable: Any, owner: Any, match: Any, z: Any, use: Any) -> None:
    """Fill ``use``; a row of it without any position is not constrained."""
    length = match.shape[1]
    for row in range(len(match)):
        source, found = owner[row], False
        use[row] = False
        if z[row] == 2:
            for j in range(1, length):
                following = match[row, j - 1] & usable[source, j]
                use[row, j] = following
                found |= following
        if z[row] != 0 and not found:
            use[row] = usable[source]


@compiled(nogil=True)
def allow(ids: Any, usable: Any, ends: Any, owner: Any, match: Any, z: Any, use: Any, mask: Any) -> None:
    """Fill ``use`` and ``mask``."""
    reach(usable, owner, match, z, use)
    for row in range(len(match)):
        mask[row] = not use[row].any()
        for j in range(match.shape[1]):
            if use[row, j]:
                mask[row, ids[owner[row], j]] = True
        for end in ends:
            mask[row, end] = True


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
def insert(value: Any, place: int, values: Any, places: Any, count: int) -> int:
    """Into a list of the largest values (the lowest places of equal ones), unless it is there; its new length."""
    k = count
    while k > 0 and (values[k - 1] < value or (values[k - 1] == value and places[k - 1] > place)):
        k -= 1
    if k == len(values) or (k > 0 and values[k - 1] == value and places[k - 1] == place):
        return count
    count = min(count + 1, len(values))
    for m in range(count - 1, k, -1):
        values[m], places[m] = values[m - 1], places[m - 1]
    values[k], places[k] = value, place
    return count


@compiled(nogil=True)
def largest(scores: Any, values: Any, places: Any) -> int:
    """The list for all of ``scores``; its length, -1 if there is NaN."""
    count, floor = 0, scores.dtype.type(-math.inf)
    for start in range(0, len(scores), BLOCK):
        part = scores[start : start + BLOCK]
        news = 0
        for value in part:  # without a branch, so that the processor compares several at once
            news += not value <= floor
        if news == 0:
            continue
        for k in range(len(part)):
            if part[k] <= floor:
                continue
            if math.isnan(part[k]):
                return -1
            count = insert(part[k], start + k, values, places, count)
            if count == len(values):
                floor = values[count - 1]
    return count


@compiled(nogil=True)
def survivors(scores: Any, ids: Any, ends: Any, owner: Any, use: Any, top_k: int, out: Any) -> None:
    """Log-softmax over the ``top_k`` largest of the allowed scores (the lowest ids of equal ones), -inf elsewhere.

    A constrained row costs no look at the vocabulary: its candidates are read off the source.
    """
    values, places = np.empty(top_k, scores.dtype), np.empty(top_k, np.int64)
    for row in range(len(scores)):
        source, count, constrained = owner[row], 0, False
        for j in range(use.shape[1]):
            if use[row, j]:
                constrained = True
                value = scores[row, ids[source, j]]
                if math.isnan(value):
                    count = -1
                    break
                if value > -math.inf and (count < top_k or value >= values[count - 1]):
                    count = insert(value, ids[source, j], values, places, count)
        if constrained and count >= 0:
            for end in ends:
                value = scores[row, end]
                if math.isnan(value):
                    count = -1
                    break
                if value > -math.inf:
                    count = insert(value, end, values, places, count)
        if count == 0:  # not constrained, or nothing that is allowed is left
            count = largest(scores[row], values, places)
        if count < 0 or (count > 0 and values[0] == math.inf):
            out[row] = math.nan
            continue
        out[row] = -math.inf
        top, total = float(values[0]), 0.0
        for k in range(count):
            total += math.exp(values[k] - top)
        for k in range(count):
            out[row, places[k]] = values[k] - top - math.log(total)


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
    ids: Any, usable: Any, ends: Any, owner: Any, use: Any, before: Any, now: Any, logits: Any, scores: Any, top_k: int,
    match: Any, owners: Any, used: Any, out: Any,
) -> int:  # fmt: skip
    """What a logits processor does for rows that are one token longer than those before; no mask is made."""
    length = before.shape[1]
    rows, z = np.empty(len(now), np.int64), np.empty(len(now), np.int64)
    if not find(now, length, before, len(ids), rows):
        return NOT_FOUND
    if not advance(ids, owner, use, rows, now[:, length], match, owners):
        return NOT_FOUND
    if not choose(logits, match, z):
        return NOT_A_NUMBER
    reach(usable, owners, match, z, used)
    survivors(scores, ids, ends, owners, used, top_k, out)
    return DONE
