"""Grams as integer keys: packing, counting by one sort, merging, and reading lower orders off the sorted keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kexue.words._numba import compiled
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
    """Sorted unique keys (M, words) of the longest grams, their counts (M,), and the alphabet (sorted code points).

    ``mapped`` tells that keys and counts outgrew the memory budget and lie on disk.
    """

    alphabet: NDArray[np.uint32]
    layout: Layout
    keys: NDArray[np.uint64]
    counts: NDArray[np.int64]
    mapped: bool = False

    @property
    def nbytes(self) -> int:
        """Size of keys and counts."""
        return self.keys.nbytes + self.counts.nbytes

    def grams(self, n: int, minimum: int, block: int = 1 << 20) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
        """Grams of exactly n characters with count >= minimum: code points (M, n), sorted, and counts (M,)."""
        found: list[tuple[NDArray[np.uint32], NDArray[np.int64]]] = []
        held: tuple[NDArray[np.uint32], NDArray[np.int64]] | None = None  # the last gram, which may go on
        for start in range(0, len(self.counts), block):
            keys, counts = self.keys[start : start + block], self.counts[start : start + block]
            if self.mapped:  # copies of blocks: the table itself must not come into memory
                keys, counts = np.array(keys), np.array(counts)
            rows, sums = prefixes(keys, counts, n, minimum, self.layout.bits, self.layout.per_word)
            if not len(rows):
                continue
            points = self._points(keys[rows], n)
            if held is not None and np.array_equal(held[0][0], points[0]):
                sums[0] += held[1][0]
            elif held is not None:
                found.append(held)
            found.append((points[:-1], sums[:-1]))
            held = points[-1:], sums[-1:]
        if held is None:
            return np.empty((0, n), np.uint32), np.empty(0, np.int64)
        points, sums = (np.concatenate(part) for part in zip(*found, held, strict=True))
        good = sums >= minimum
        return points[good], sums[good]

    def _points(self, keys: NDArray[np.uint64], n: int) -> NDArray[np.uint32]:
        layout = self.layout
        mask = np.uint64((1 << layout.bits) - 1)
        points = np.empty((len(keys), n), np.uint32)
        for j in range(n):
            shift = np.uint64(layout.bits * (layout.per_word - 1 - j % layout.per_word))
            points[:, j] = self.alphabet[((keys[:, j // layout.per_word] >> shift) & mask).astype(np.int64) - 1]
        return points


@compiled(nogil=True)
def _mark(points: NDArray[np.uint32], in_run: NDArray[np.bool_], own: int) -> tuple[NDArray[np.bool_], int]:
    """Which run characters occur, and how many of the first ``own`` positions hold one."""
    present = np.zeros(in_run.size, np.bool_)
    size = 0
    for i in range(points.size):
        if in_run[points[i]]:
            present[points[i]] = True
            size += i < own
    return present, size


@compiled(nogil=True)
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


@compiled(nogil=True)
def _sorted(keys: NDArray[np.uint64], low: int, high: int) -> NDArray[np.uint64]:
    """Sort by the bits low .. high (radix, least significant byte first); the input serves as a buffer."""
    passes = (high - low + 7) // 8
    starts = np.zeros((passes, 256), np.int64)
    for i in range(keys.size):
        key = keys[i] >> np.uint64(low)
        for p in range(passes):
            starts[p, key & np.uint64(255)] += 1
            key >>= np.uint64(8)
    other = np.empty_like(keys)
    for p in range(passes):
        row = starts[p]
        total = 0
        for byte in range(256):
            count = row[byte]
            row[byte] = total
            total += count
        shift = np.uint64(low + 8 * p)
        for i in range(keys.size):
            key = keys[i]
            byte = (key >> shift) & np.uint64(255)
            other[row[byte]] = key
            row[byte] += 1
        keys, other = other, keys
    return keys


@compiled(nogil=True)
def _unique_words(keys: NDArray[np.uint64]) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """Collapse sorted keys of one word to unique keys and counts."""
    n = keys.size
    starts = 1 if n else 0
    for i in range(1, n):
        starts += keys[i] != keys[i - 1]
    unique, counts = np.empty(starts, np.uint64), np.empty(starts, np.int64)
    m, last = 0, 0
    for i in range(1, n):
        if keys[i] != keys[i - 1]:
            unique[m], counts[m] = keys[last], i - last
            m, last = m + 1, i
    if n:
        unique[m], counts[m] = keys[last], n - last
    return unique, counts


@compiled(nogil=True)
def _unique(keys: NDArray[np.uint64]) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """Collapse sorted keys of several words to unique keys and counts."""
    n, words = keys.shape
    fresh = np.ones(n, np.bool_)
    for i in range(1, n):
        same = True
        for w in range(words):
            same &= keys[i, w] == keys[i - 1, w]
        fresh[i] = not same
    rows = np.flatnonzero(fresh)
    unique, counts = np.empty((rows.size, words), np.uint64), np.empty(rows.size, np.int64)
    for m in range(rows.size):
        for w in range(words):
            unique[m, w] = keys[rows[m], w]
        counts[m] = (rows[m + 1] if m + 1 < rows.size else n) - rows[m]
    return unique, counts


@compiled(nogil=True)
def _recode(
    keys: NDArray[np.uint64], mapping: NDArray[np.uint64], order: int, old: tuple[int, int], new: tuple[int, int, int]
) -> NDArray[np.uint64]:
    """Rewrite keys for a larger alphabet. ``mapping`` is increasing, so sorted keys stay sorted."""
    old_bits, old_per = old
    bits, per, words = new
    mask = (np.uint64(1) << np.uint64(old_bits)) - np.uint64(1)
    out = np.zeros((keys.shape[0], words), np.uint64)
    if words == 1 and keys.shape[1] == 1:
        step, width = np.uint64(old_bits), np.uint64(bits)
        for i in range(keys.shape[0]):
            rest, code = keys[i, 0] >> np.uint64(old_bits * (old_per - order)), np.uint64(0)
            place = np.uint64(bits * (per - order))
            for _ in range(order):
                code |= mapping[rest & mask] << place
                rest >>= step
                place += width
            out[i, 0] = code
        return out
    for i in range(keys.shape[0]):
        for j in range(order):
            code = mapping[(keys[i, j // old_per] >> np.uint64(old_bits * (old_per - 1 - j % old_per))) & mask]
            out[i, j // per] |= code << np.uint64(bits * (per - 1 - j % per))
    return out


@compiled(nogil=True)
def add_tables(
    a: NDArray[np.uint64], ca: NDArray[np.int64], b: NDArray[np.uint64], cb: NDArray[np.int64]
) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """Merge two sorted tables of equal layout, adding the counts of common keys."""
    words = a.shape[1]
    keys = np.empty((a.shape[0] + b.shape[0], words), np.uint64)
    counts = np.empty(a.shape[0] + b.shape[0], np.int64)
    i = j = m = 0
    if words == 1:
        while i < a.shape[0] and j < b.shape[0]:
            x, y = a[i, 0], b[j, 0]
            keys[m, 0] = min(x, y)
            counts[m] = (ca[i] if x <= y else 0) + (cb[j] if y <= x else 0)
            i += x <= y
            j += y <= x
            m += 1
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


@compiled(nogil=True)
def prefixes(
    keys: NDArray[np.uint64], counts: NDArray[np.int64], n: int, minimum: int, bits: int, per_word: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Grams of exactly n characters: (first row that begins with it, count), in sorted order.

    Those below ``minimum`` are left out, but never the first and the last one: they may go on in neighbouring blocks.
    """
    # The words up to that of the n-th character, the last one cut behind it, are the gram; it is whole if that
    # character is not 0.
    last = (n - 1) // per_word
    shift = np.uint64(bits * (per_word - 1 - (n - 1) % per_word))
    low = (np.uint64(1) << np.uint64(bits)) - np.uint64(1)
    rows = np.empty(1 << 10, np.int64)
    sums = np.empty(1 << 10, np.int64)
    m, size, column = 0, keys.shape[0], keys[:, last]
    i = 0
    while i < size:
        head = column[i] >> shift
        if head & low == 0:
            i += 1
            continue
        start, total = i, counts[i]
        i += 1
        while i < size and column[i] >> shift == head:
            same = True
            for w in range(last):
                same &= keys[i, w] == keys[start, w]
            if not same:
                break
            total += counts[i]
            i += 1
        if total >= minimum or m == 0 or i == size:
            if m == rows.size:
                grown, more = np.empty(4 * m, np.int64), np.empty(4 * m, np.int64)
                grown[:m], more[:m] = rows, sums
                rows, sums = grown, more
            rows[m], sums[m] = start, total
            m += 1
    return rows[:m].copy(), sums[:m].copy()


@compiled(nogil=True)
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
        low, high = layout.bits * (layout.per_word - order), layout.bits * layout.per_word
        unique, counts = _unique_words(_sorted(keys.ravel(), low, high))
        return Table(alphabet, layout, unique.reshape(-1, 1), counts)
    keys = np.ascontiguousarray(keys[np.lexsort(keys.T[::-1])])
    return Table(alphabet, layout, *_unique(keys))


def widened(
    keys: NDArray[np.uint64], order: int, old: NDArray[np.uint32], new: NDArray[np.uint32]
) -> NDArray[np.uint64]:
    """Keys over the alphabet ``old`` rewritten for ``new``, which contains it; sorted keys stay sorted."""
    if new.size == old.size:
        return keys
    before, after = Layout.of(order, old.size), Layout.of(order, new.size)
    mapping = np.zeros(old.size + 1, np.uint64)
    mapping[1:] = np.searchsorted(new, old) + 1
    bits = (after.bits, after.per_word, after.words)
    return _recode(np.ascontiguousarray(keys), mapping, order, (before.bits, before.per_word), bits)


def _widen(table: Table, alphabet: NDArray[np.uint32]) -> Table:
    order = table.layout.order
    keys = widened(table.keys, order, table.alphabet, alphabet)
    return Table(alphabet, Layout.of(order, alphabet.size), keys, table.counts)


def merge(a: Table, b: Table) -> Table:
    """Add the counts of two tables."""
    alphabet = np.union1d(a.alphabet, b.alphabet)
    a, b = _widen(a, alphabet), _widen(b, alphabet)
    return Table(alphabet, a.layout, *add_tables(a.keys, a.counts, b.keys, b.counts))
