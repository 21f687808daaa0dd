"""Overlaps of token lists: shared n-grams and the longest common subsequence, compiled.

The longest common subsequence goes 64 positions of one side at a time (Hyyrö 2004, "Bit-parallel LCS-length computation
revisited"): V starts as ones, and for each token of the other side, with M the positions that hold it,

    U = V & M,    V = (V + U) | (V - U);    at the end the zeros of V count the subsequence.

One word of the sum carries into the next. Instead of a table of all words for all tokens, the carries of one word are
kept for the whole other side (one byte a token) until the next word has had its turn, so that memory is linear.

Shapes: R texts, T tokens of all of them, N pairs, V distinct tokens. Text r holds ``ids[starts[r]:starts[r + 1]]``;
its sorted n-grams are ``grams[gram_starts[r]:gram_starts[r + 1]]``.
"""

from __future__ import annotations

import numpy as np

from kexue.words._numba import compiled

__all__ = ["greedy_choice", "overlaps"]

_ONE = np.uint64(1)
_ALL = np.uint64(0xFFFFFFFFFFFFFFFF)


@compiled(nogil=True)
def _shared(grams, starts, p, q, weights, width):  # type: ignore[no-untyped-def]
    """Shared members of two sorted lists with repetitions, each counted or weighted."""
    a, a_stop, b, b_stop = starts[p], starts[p + 1], starts[q], starts[q + 1]
    total = 0
    while a < a_stop and b < b_stop:
        x, y = grams[a], grams[b]
        if x == y:
            if weights.shape[0] == 0:
                total += 1
            elif x < width:
                total += weights[x]
            else:
                total += weights[x // width - 1] + weights[x % width]
            a += 1
            b += 1
        elif x < y:
            a += 1
        else:
            b += 1
    return total


@compiled(nogil=True)
def _subsequence(ids, a, a_stop, b, b_stop, mask, carry):  # type: ignore[no-untyped-def]
    """Length of the longest common subsequence; ``mask`` (V,) is all zeros before and after."""
    total = 0
    for first in range(a, a_stop, 64):
        last = min(first + 64, a_stop)
        for k in range(first, last):
            mask[ids[k]] |= _ONE << np.uint64(k - first)
        ones = _ALL
        for j in range(b, b_stop):
            common = ones & mask[ids[j]]
            added = ones + common
            out = added < ones
            if first > a and carry[j - b]:
                added += _ONE
                out = out or added == np.uint64(0)
            carry[j - b] = out
            ones = added | (ones - common)
        for k in range(first, last):
            mask[ids[k]] = np.uint64(0)
            if not (ones >> np.uint64(k - first)) & _ONE:
                total += 1
    return total


@compiled(nogil=True)
def _heaviest(ids, a, a_stop, b, b_stop, weights, row):  # type: ignore[no-untyped-def]
    """Weight of the heaviest common subsequence, by the usual table, of which one row is kept."""
    row[: b_stop - b + 1] = 0
    for i in range(a, a_stop):
        corner = 0
        for j in range(b, b_stop):
            above = row[j - b + 1]
            best = max(above, row[j - b])
            if ids[i] == ids[j]:
                best = max(best, corner + weights[ids[i]])
            row[j - b + 1] = best
            corner = above
    return row[b_stop - b]


@compiled(nogil=True)
def overlaps(ids, starts, ones, one_starts, twos, two_starts, weights, width, left, right):  # type: ignore[no-untyped-def]
    """Overlaps of the pairs of texts (left[n], right[n]).

    Args:
        ids: (T,) int32 tokens.
        starts: (R + 1,) int64.
        ones: 1-grams of each text, sorted: the token.
        one_starts: (R + 1,) int64.
        twos: 2-grams of each text, sorted: (first token + 1) * width + second token.
        two_starts: (R + 1,) int64.
        weights: (V,) int64 weight of each token, or (0,): everything counts 1.
        width: V.
        left: (N,) int64.
        right: (N,) int64.

    Returns:
        (N, 3) int64: 1-grams, 2-grams, longest (heaviest) common subsequence.
    """
    out = np.zeros((len(left), 3), np.int64)
    longest = 0
    for r in range(len(starts) - 1):
        longest = max(longest, starts[r + 1] - starts[r])
    weighted = weights.shape[0] > 0
    mask = np.zeros(0 if weighted else width, np.uint64)
    carry = np.zeros(0 if weighted else longest, np.bool_)
    row = np.zeros(longest + 1 if weighted else 0, np.int64)
    for n in range(len(left)):
        p, q = left[n], right[n]
        out[n, 0] = _shared(ones, one_starts, p, q, weights, width)
        if out[n, 0] == 0 and not weighted:
            continue  # no token in common, hence nothing else
        out[n, 1] = _shared(twos, two_starts, p, q, weights, width)
        a, a_stop, b, b_stop = starts[p], starts[p + 1], starts[q], starts[q + 1]
        if weighted:
            out[n, 2] = _heaviest(ids, a, a_stop, b, b_stop, weights, row)
        elif (a_stop - a + 63) // 64 * (b_stop - b) <= (b_stop - b + 63) // 64 * (a_stop - a):
            out[n, 2] = _subsequence(ids, a, a_stop, b, b_stop, mask, carry)
        else:
            out[n, 2] = _subsequence(ids, b, b_stop, a, a_stop, mask, carry)
    return out


@compiled(nogil=True)
def greedy_choice(grams, gram_starts, wanted, kinds, sizes, min_gain):  # type: ignore[no-untyped-def]
    """Pieces in the order in which each raises R1 + R2 (sets of n-grams, F1) most, until none does.

    A gram that a chosen piece has brought is struck off the counts of all pieces that have it too, once: the counts
    cost O(non-zeros) in total, and a step compares the pieces by two numbers each.

    Args:
        grams: (Z,) int64 numbers of the distinct n-grams of each piece, below G.
        gram_starts: (n + 1,) int64.
        wanted: (G,) bool, whether the reference has the n-gram.
        kinds: (G,) int64, 0 for 1-grams, 1 for 2-grams.
        sizes: (2,) int64, distinct 1-grams and 2-grams of the reference.
        min_gain: What a piece must add at least.

    Returns:
        (k,) int64 indices.
    """
    n = len(gram_starts) - 1
    holders = np.zeros(len(wanted) + 1, np.int64)  # the transposed table: which pieces have a gram
    for z in range(len(grams)):
        holders[grams[z] + 1] += 1
    for g in range(len(wanted)):
        holders[g + 1] += holders[g]
    filled = holders[:-1].copy()
    pieces = np.empty(len(grams), np.int64)
    new = np.zeros((n, 2), np.int64)  # distinct grams that a piece would add
    hits = np.zeros((n, 2), np.int64)  # those among them that the reference has
    for i in range(n):
        for z in range(gram_starts[i], gram_starts[i + 1]):
            g = grams[z]
            pieces[filled[g]] = i
            filled[g] += 1
            new[i, kinds[g]] += 1
            if wanted[g]:
                hits[i, kinds[g]] += 1
    covered = np.zeros(len(wanted), np.bool_)
    have, right = np.zeros(2, np.int64), np.zeros(2, np.int64)
    chosen = np.empty(n, np.int64)
    count, best = 0, 0.0
    while count < n:
        place, top = -1, best
        for i in range(n):
            if hits[i, 0] + hits[i, 1] == 0:
                continue  # such a piece, chosen or not, can only lower the score
            score = 0.0
            for k in range(2):
                overlap = right[k] + hits[i, k]
                if overlap > 0:
                    score += 2.0 * overlap / (have[k] + new[i, k] + sizes[k])
            if score > top:
                place, top = i, score
        if place < 0 or top - best < min_gain:
            break
        best = top
        chosen[count] = place
        count += 1
        for k in range(2):
            have[k] += new[place, k]
            right[k] += hits[place, k]
        for z in range(gram_starts[place], gram_starts[place + 1]):
            g = grams[z]
            if covered[g]:
                continue
            covered[g] = True
            for h in range(holders[g], holders[g + 1]):
                new[pieces[h], kinds[g]] -= 1
                if wanted[g]:
                    hits[pieces[h], kinds[g]] -= 1
    return chosen[:count]
