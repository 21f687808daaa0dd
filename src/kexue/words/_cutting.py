"""Cutting text into pieces that no strong gram crosses, and counting the pieces: steps 3 and 4 of word discovery.

A border stays uncut if a gram covers it, so a piece ends where the farthest gram that began in it ends. Pieces that are
single characters or grams (nearly all) are counted in arrays, the rest in a hash table that compares characters, so
that no collision can merge two.
"""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kexue.words._jobs import in_order
from kexue.words._lexicon import Lexicon
from kexue.words._numba import compiled
from kexue.words._runs import CODE_POINTS, code_points, run_table
from kexue.words._trie import Trie


@compiled(nogil=True)
def _cut(
    points: NDArray[np.uint32],
    codes: NDArray[np.int32],
    base: NDArray[np.int32],
    check: NDArray[np.int32],
    value: NDArray[np.int32],
    order: int,
    backtrack: bool,
    singles: NDArray[np.int64],
    grams: NDArray[np.int64],
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], int]:
    """Cut a text; counts single characters and grams in place.

    Args:
        points: The text.
        codes: For each place the number of its character in the trie, 0 when no gram has it, -1 outside of runs.
        base: Of the trie.
        check: Of the trie.
        value: Of the trie.
        order: Longest gram.
        backtrack: Leave out pieces of three or more characters that are no gram, and longer ones of which an
            order-gram is none.
        singles: (code points,) counts, increased.
        grams: (grams,) counts, increased.

    Returns:
        (start, length, count) of the distinct other pieces, and the number of all pieces.
    """
    size = 1 << 12
    table = np.full(size, -1, np.int64)
    start, length = np.empty(size, np.int64), np.empty(size, np.int64)
    count, hashes = np.empty(size, np.int64), np.empty(size, np.uint64)
    reach = np.empty(points.size + 1, np.int32)  # length of the longest gram at each place of the piece
    m, pieces, i, n = 0, 0, 0, points.size
    while i < n:
        if codes[i] < 0:
            i += 1
            continue
        begin, end, first = i, i + 1, -1
        while i < end:
            state, longest, hit = 0, 0, -1
            for j in range(i, min(n, i + order)):
                code = codes[j]
                if code <= 0:
                    break
                child = base[state] + code
                if check[child] != state:
                    break
                state = child
                if value[state] >= 0:
                    longest, hit = j + 1 - i, value[state]
            reach[i] = longest
            if i == begin:
                first = hit
            end = max(end, i + longest)
            i += 1
        pieces += 1
        width = end - begin
        if width == 1:
            singles[points[begin]] += 1
            continue
        if width <= order and reach[begin] == width:
            grams[first] += 1
            continue
        if backtrack and width > 2:
            whole = True
            for j in range(begin, max(begin, end - order) + 1):
                if reach[j] != min(order, width):
                    whole = False
                    break
            if not whole:
                continue
        hashed = np.uint64(0xCBF29CE484222325)
        for j in range(begin, end):
            hashed = (hashed ^ np.uint64(points[j])) * np.uint64(0x9E3779B97F4A7C15)
            hashed ^= hashed >> np.uint64(29)
        slot = hashed & np.uint64(size - 1)
        while table[slot] >= 0:
            k = table[slot]
            if hashes[k] == hashed and length[k] == width:
                same = True
                for j in range(width):
                    if points[start[k] + j] != points[begin + j]:
                        same = False
                        break
                if same:
                    count[k] += 1
                    break
            slot = (slot + np.uint64(1)) & np.uint64(size - 1)
        if table[slot] >= 0:
            continue
        table[slot] = m
        start[m], length[m], count[m], hashes[m] = begin, width, 1, hashed
        m += 1
        if 2 * m > size:
            size *= 4
            start, length, count = _grow(start, size), _grow(length, size), _grow(count, size)
            more = np.empty(size, np.uint64)
            more[:m] = hashes[:m]
            hashes = more
            table = np.full(size, -1, np.int64)
            for k in range(m):
                slot = hashes[k] & np.uint64(size - 1)
                while table[slot] >= 0:
                    slot = (slot + np.uint64(1)) & np.uint64(size - 1)
                table[slot] = k
    return start[:m].copy(), length[:m].copy(), count[:m].copy(), pieces


@compiled(nogil=True)
def _grow(values: NDArray[np.int64], size: int) -> NDArray[np.int64]:
    grown = np.empty(size, np.int64)
    grown[: values.size] = values
    return grown


class Cutter:
    """Cuts texts between strong grams.

    Args:
        grams: Code points (M, n) of the grams, for several n.
        order: Longest gram.
        backtrack: Whether pieces must consist of grams altogether.
    """

    def __init__(self, grams: list[NDArray[np.uint32]], order: int, backtrack: bool) -> None:
        self._grams, self._order, self._backtrack = grams, order, backtrack
        self._trie = Trie.of_grams(grams)
        self._codes = np.where(run_table(), self._trie.numbers, np.int32(-1))

    def count(self, texts: Iterable[str], n_jobs: int = 1) -> tuple[Lexicon, int]:
        """Cut texts, whose runs are whole.

        Returns:
            The pieces with their counts, and the number of pieces cut (those left out by ``backtrack``, too).
        """
        singles = np.zeros(CODE_POINTS, np.int64)
        grams = np.zeros(sum(map(len, self._grams)), np.int64)
        others: dict[str, int] = {}
        pieces = 0

        def found(results: Iterable[Any]) -> None:
            nonlocal pieces
            for text, one, several, (starts, lengths, counts, cut) in results:
                singles[:] += one
                grams[:] += several
                pieces += cut
                for start, length, count in zip(starts.tolist(), lengths.tolist(), counts.tolist(), strict=True):
                    word = text[start : start + length]
                    others[word] = others.get(word, 0) + count

        if n_jobs == 1:
            found(map(self._cut, texts))
        else:
            with ThreadPoolExecutor(n_jobs) as pool:
                found(in_order(pool, self._cut, texts, n_jobs - 1))
        seen = np.flatnonzero(singles)
        groups = [(seen.astype(np.uint32)[:, None], singles[seen])]
        first = 0
        for rows in self._grams:
            groups.append((rows, grams[first : first + len(rows)]))
            first += len(rows)
        return Lexicon.of([*groups, *Lexicon.of_words(others).groups()]), pieces

    def _cut(self, text: str) -> tuple[str, NDArray[np.int64], NDArray[np.int64], Any]:
        points, trie = code_points(text), self._trie
        singles = np.zeros(CODE_POINTS, np.int64)
        grams = np.zeros(sum(map(len, self._grams)), np.int64)
        arrays = (trie.base, trie.check, trie.value, self._order, self._backtrack)
        return text, singles, grams, _cut(points, self._codes[points], *arrays, singles, grams)
