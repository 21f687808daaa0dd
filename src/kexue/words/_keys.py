"""Grams as integer keys: packing, counting by one sort, merging, and reading lower orders off the sorted keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from kexue.words._runs import CODE_POINTS, code_points, run_table


@dataclass(frozen=True)
class Layout:
    """How a gram becomes a key: ``bits`` per character, ``per_word`` characters per 64-bit word, ``words`` words."""

    order: int
    bits: int
    per_word: int
    words: int

    @classmethod
    def of(cls, order: int, alphabet: int) -> Layout:
        bits = max(1, alphabet.bit_length())
        per_word = 64 // bits
        return cls(order, bits, per_word, -(-order // per_word))


@dataclass
class Table:
    """Sorted unique keys (M, words) of the longest grams, their counts (M,), and the alphabet (sorted code points)."""

    alphabet: NDArray[np.uint32]
    layout: Layout
    keys: NDArray[np.uint64]
    counts: NDArray[np.int64]


@numba.njit(cache=True, nogil=True)
def _mark(points: NDArray[np.uint32], in_run: NDArray[np.bool_], own: int) -> tuple[NDArray[np.bool_], int]:
    """Which run characters occur, and how many of the first ``own`` positions hold one."""
    present = np.zeros(in_run.size, np.bool_)
    size = 0
    for i in range(points.size):
        if in_run[points[i]]:
            present[points[i]] = True
            size += i < own
    return present, size


@numba.njit(cache=True, nogil=True)
def _pack(
    points: NDArray[np.uint32], numbers: NDArray[np.int32], own: int, size: int, layout: tuple[int, int, int, int]
) -> NDArray[np.uint64]:
    """Keys of the grams that start in the first ``own`` positions: one backward pass, each key from its successor."""
    order, bits, per_word, words = layout
    keys = np.empty((size, words), np.uint64)
    shift, top = np.uint64(bits), np.uint64(bits * (per_word - 1))
    used = order - per_word * (words - 1)  # characters in the last word
    spare = np.uint64(bits * (per_word - used))
    if words == 1:
        key = np.uint64(0)
        for i in range(points.size - 1, -1, -1):
            number = numbers[points[i]]
            if number == 0:
                key = np.uint64(0)
                continue
            key = (((key >> shift) | (np.uint64(number) << top)) >> spare) << spare
            if i < own:
                size -= 1
                keys[size, 0] = key
        return keys
    long_key = np.zeros(words, np.uint64)
    low = (np.uint64(1) << shift) - np.uint64(1)
    for i in range(points.size - 1, -1, -1):
        number = numbers[points[i]]
        if number == 0:
            long_key[:] = 0
            continue
        for w in range(words - 1, 0, -1):
            long_key[w] = (long_key[w] >> shift) | ((long_key[w - 1] & low) << top)
        long_key[0] = (long_key[0] >> shift) | (np.uint64(number) << top)
        long_key[words - 1] = (long_key[words - 1] >> spare) << spare
        if i < own:
            size -= 1
            for w in range(words):
                keys[size, w] = long_key[w]
    return keys


@numba.njit(cache=True, nogil=True)
def _unique(keys: NDArray[np.uint64]) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """Collapse sorted keys to unique keys and counts."""
    n, words = keys.shape
    starts = 0
    for i in range(n):
        for w in range(words):
            if i == 0 or keys[i, w] != keys[i - 1, w]:
                starts += 1
                break
    unique = np.empty((starts, words), np.uint64)
    counts = np.empty(starts, np.int64)
    m, last = -1, 0
    for i in range(n):
        fresh = i == 0
        for w in range(words):
            if fresh or keys[i, w] != keys[i - 1, w]:
                fresh = True
                break
        if fresh:
            if m >= 0:
                counts[m] = i - last
            m, last = m + 1, i
            for w in range(words):
                unique[m, w] = keys[i, w]
    if m >= 0:
        counts[m] = n - last
    return unique, counts


@numba.njit(cache=True, nogil=True)
def _recode(
    keys: NDArray[np.uint64], mapping: NDArray[np.uint64], order: int, old: tuple[int, int], new: tuple[int, int, int]
) -> NDArray[np.uint64]:
    """Rewrite keys for a larger alphabet. ``mapping`` is increasing, so sorted keys stay sorted."""
    old_bits, old_per = old
    bits, per, words = new
    mask = (np.uint64(1) << np.uint64(old_bits)) - np.uint64(1)
    out = np.zeros((keys.shape[0], words), np.uint64)
    for i in range(keys.shape[0]):
        for j in range(order):
            code = mapping[(keys[i, j // old_per] >> np.uint64(old_bits * (old_per - 1 - j % old_per))) & mask]
            out[i, j // per] |= code << np.uint64(bits * (per - 1 - j % per))
    return out


@numba.njit(cache=True, nogil=True)
def _add(
    a: NDArray[np.uint64], ca: NDArray[np.int64], b: NDArray[np.uint64], cb: NDArray[np.int64]
) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """Merge two sorted tables of equal layout, adding the counts of common keys."""
    words = a.shape[1]
    keys = np.empty((a.shape[0] + b.shape[0], words), np.uint64)
    counts = np.empty(a.shape[0] + b.shape[0], np.int64)
    i = j = m = 0
    while i < a.shape[0] or j < b.shape[0]:
        side = 0  # -1: take a, 1: take b, 0: both
        if i == a.shape[0]:
            side = 1
        elif j == b.shape[0]:
            side = -1
        else:
            for w in range(words):
                if a[i, w] != b[j, w]:
                    side = -1 if a[i, w] < b[j, w] else 1
                    break
        count = 0
        if side <= 0:
            for w in range(words):
                keys[m, w] = a[i, w]
            count += ca[i]
            i += 1
        if side >= 0:
            for w in range(words):
                keys[m, w] = b[j, w]
            count += cb[j]
            j += 1
        counts[m] = count
        m += 1
    return keys[:m].copy(), counts[:m].copy()


@numba.njit(cache=True, nogil=True)
def _shared(a: NDArray[np.uint64], b: NDArray[np.uint64], order: int, bits: int, per_word: int) -> int:
    """Number of leading characters that two keys share."""
    mask = (np.uint64(1) << np.uint64(bits)) - np.uint64(1)
    for j in range(order):
        shift = np.uint64(bits * (per_word - 1 - j % per_word))
        w = j // per_word
        if ((a[w] ^ b[w]) >> shift) & mask != 0:
            return j
    return order


@numba.njit(cache=True, nogil=True)
def _length(key: NDArray[np.uint64], order: int, bits: int, per_word: int) -> int:
    """Number of characters before the padding."""
    mask = (np.uint64(1) << np.uint64(bits)) - np.uint64(1)
    for j in range(order):
        if (key[j // per_word] >> np.uint64(bits * (per_word - 1 - j % per_word))) & mask == 0:
            return j
    return order


@numba.njit(cache=True, nogil=True)
def prefixes(
    keys: NDArray[np.uint64], counts: NDArray[np.int64], n: int, minimum: int, bits: int, per_word: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """All grams of exactly n characters: (first row that begins with it, count), in sorted order."""
    rows = np.empty(16, np.int64)
    sums = np.empty(16, np.int64)
    m, start, total = 0, -1, 0
    for i in range(keys.shape[0] + 1):
        end = i == keys.shape[0]
        if not end and i > 0 and start >= 0 and _shared(keys[i], keys[start], n, bits, per_word) == n:
            total += counts[i]
            continue
        if start >= 0 and total >= minimum:
            if m == rows.size:
                grown, more = np.empty(2 * m, np.int64), np.empty(2 * m, np.int64)
                grown[:m], more[:m] = rows, sums
                rows, sums = grown, more
            rows[m], sums[m] = start, total
            m += 1
        start = -1
        if not end and _length(keys[i], n, bits, per_word) == n:
            start, total = i, counts[i]
    return rows[:m].copy(), sums[:m].copy()


@numba.njit(cache=True, nogil=True)
def bound(keys: NDArray[Any], key: NDArray[Any], strict: bool) -> int:
    """First of the sorted rows that is >= key (> key when ``strict``)."""
    low, high = 0, keys.shape[0]
    while low < high:
        middle = (low + high) // 2
        less = strict
        for w in range(key.size):
            if keys[middle, w] != key[w]:
                less = keys[middle, w] < key[w]
                break
        if less:
            low = middle + 1
        else:
            high = middle
    return low


def count_text(text: str, own: int, order: int) -> Table:
    """Count the n-grams of up to ``order`` characters that begin among the first ``own`` of ``text``."""
    points = code_points(text)
    present, size = _mark(points, run_table(), own)
    alphabet = np.flatnonzero(present).astype(np.uint32)
    layout = Layout.of(order, alphabet.size)
    numbers = np.zeros(CODE_POINTS, np.int32)
    numbers[alphabet] = np.arange(1, alphabet.size + 1, dtype=np.int32)
    keys = _pack(points, numbers, own, size, (order, layout.bits, layout.per_word, layout.words))
    if layout.words == 1:
        keys[:, 0].sort()
    else:
        keys = np.ascontiguousarray(keys[np.lexsort(keys.T[::-1])])
    return Table(alphabet, layout, *_unique(keys))


def _widen(table: Table, alphabet: NDArray[np.uint32]) -> Table:
    if alphabet.size == table.alphabet.size:
        return table
    layout = Layout.of(table.layout.order, alphabet.size)
    mapping = np.zeros(table.alphabet.size + 1, np.uint64)
    mapping[1:] = np.searchsorted(alphabet, table.alphabet) + 1
    old, new = (table.layout.bits, table.layout.per_word), (layout.bits, layout.per_word, layout.words)
    return Table(alphabet, layout, _recode(table.keys, mapping, layout.order, old, new), table.counts)


def merge(a: Table, b: Table) -> Table:
    """Add the counts of two tables."""
    alphabet = np.union1d(a.alphabet, b.alphabet)
    a, b = _widen(a, alphabet), _widen(b, alphabet)
    return Table(alphabet, a.layout, *_add(a.keys, a.counts, b.keys, b.counts))
