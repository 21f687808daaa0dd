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
def survivors(scores: Any, mask: Any, top_k: int, out: Any) -> None:
    """Log-softmax over the ``top_k`` largest of the allowed scores (the lowest ids of equal ones), -inf elsewhere."""
    values, places = np.empty(top_k + 1), np.empty(top_k + 1, np.int64)
    for row in range(len(scores)):
        count, broken = 0, False
        for attempt in range(2):
            for v in range(scores.shape[1]):
                if attempt == 0 and not mask[row, v]:
                    continue
                value = scores[row, v]
                if count == top_k and value <= values[count - 1]:
                    continue
                if value == -math.inf:
                    continue
                if math.isnan(value):
                    broken = True
                    break
                k = count
                while k > 0 and values[k - 1] < value:
                    values[k], places[k] = values[k - 1], places[k - 1]
                    k -= 1
                values[k], places[k] = value, v
                count = min(count + 1, top_k)
            if count > 0 or broken:
                break  # otherwise nothing that is allowed is left: the row is not constrained
        if broken or (count > 0 and values[0] == math.inf):
            out[row] = math.nan
            continue
        out[row] = -math.inf
        total = 0.0
        for k in range(count):
            total += math.exp(values[k] - values[0])
        for k in range(count):
            out[row, places[k]] = values[k] - values[0] - math.log(total)


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
    match: Any, owners: Any, used: Any, mask: Any, out: Any,
) -> int:  # fmt: skip
    """All of the above for rows that are one token longer than those before."""
    length = before.shape[1]
    rows = np.empty(len(now), np.int64)
    if not find(now, length, before, len(ids), rows):
        return NOT_FOUND
    done = follow(ids, usable, ends, owner, use, rows, now[:, length], logits, match, owners, used, mask)
    if done == DONE:
        survivors(scores, mask, top_k, out)
    return int(done)
