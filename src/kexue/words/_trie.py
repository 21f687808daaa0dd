"""A set of strings as a double-array trie: one memory access per character, built and walked in numba."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kexue.words._numba import compiled
from kexue.words._runs import CODE_POINTS, code_points


@dataclass(frozen=True)
class Trie:
    """Double-array trie. State 0 is the root; from state s, character number c leads to ``base[s] + c``.

    Attributes:
        numbers: Code point -> character number, 0 when no string contains it.
        base: Per state, offset of its children.
        check: Per state, its parent; -1 marks a free slot.
        value: Per state, index of the string that ends here, or -1.
        depth: Length of the longest string.
    """

    numbers: NDArray[np.int32]
    base: NDArray[np.int32]
    check: NDArray[np.int32]
    value: NDArray[np.int32]
    depth: int

    @classmethod
    def build(cls, words: Sequence[str]) -> Trie:
        """Build from distinct, non-empty strings in any order; ``value`` gives indices into ``words``."""
        ranking = sorted(range(len(words)), key=words.__getitem__)
        lengths = np.fromiter((len(words[i]) for i in ranking), np.int64, len(words))
        flat = code_points("".join(words[i] for i in ranking))
        return cls._of_sorted(flat, lengths, np.asarray(ranking, np.int32))

    @classmethod
    def of_grams(cls, grams: Sequence[NDArray[np.uint32]]) -> Trie:
        """Build from distinct grams as code points, (M, n) for several n; ``value`` counts through all of them."""
        widest = max((rows.shape[1] for rows in grams), default=1)
        total = sum(map(len, grams))
        padded = np.zeros((total, widest), np.uint32)  # no gram holds the character 0
        lengths = np.empty(total, np.int64)
        first = 0
        for rows in grams:
            padded[first : first + len(rows), : rows.shape[1]] = rows
            lengths[first : first + len(rows)] = rows.shape[1]
            first += len(rows)
        ranking = np.lexsort(padded.T[::-1])
        padded, lengths = padded[ranking], lengths[ranking]
        flat = padded[np.arange(widest) < lengths[:, None]]
        return cls._of_sorted(flat, lengths, ranking.astype(np.int32))

    @classmethod
    def _of_sorted(cls, flat: NDArray[np.uint32], lengths: NDArray[np.int64], ranking: NDArray[np.int32]) -> Trie:
        """From sorted strings one after the other, and the number of each."""
        counts = np.bincount(flat, minlength=1)
        used = np.flatnonzero(counts)
        numbers = np.zeros(CODE_POINTS, np.int32)
        # Frequent characters get small numbers: the children of a state lie close together, the arrays stay dense.
        numbers[used[np.argsort(-counts[used], kind="stable")]] = np.arange(1, used.size + 1, dtype=np.int32)
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
        base, check, value = _build(numbers[flat], offsets, used.size)
        value = np.where(value >= 0, np.append(ranking, np.int32(-1))[value], np.int32(-1))
        return cls(numbers, base, check, value, int(lengths.max(initial=0)))


@compiled()
def _build(
    flat: NDArray[np.int32], offsets: NDArray[np.int64], alphabet: int
) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int32]]:
    size = 2 * flat.size + 2 * alphabet + 64
    base = np.zeros(size, np.int32)
    check = np.full(size, -1, np.int32)
    value = np.full(size, -1, np.int32)
    check[0] = -2  # the root is nobody's child
    queue = np.empty((flat.size + 1, 4), np.int64)  # state, first word, end of words, depth
    queue[0] = (0, 0, offsets.size - 1, 0)
    head, tail, search, last = 0, 1, 1, 0
    codes = np.empty(alphabet + 1, np.int64)
    starts = np.empty(alphabet + 2, np.int64)
    while head < tail:
        state, low, high, depth = queue[head]
        head += 1
        if low < high and offsets[low] + depth == offsets[low + 1]:
            value[state] = low  # sorted: a string comes right before those that it begins
            low += 1
        k = 0
        for word in range(low, high):
            code = flat[offsets[word] + depth]
            if k == 0 or code != codes[k - 1]:
                codes[k], starts[k] = code, word
                k += 1
        if k == 0:
            continue
        starts[k] = high
        smallest = codes[:k].min()
        position, full, tries, first = max(search, smallest), 0, 0, True
        while True:
            if position + alphabet + 1 >= size:
                grown = np.zeros(2 * size, np.int32)
                grown[:size] = base
                base = grown
                grown = np.full(2 * size, -1, np.int32)
                grown[:size] = check
                check = grown
                grown = np.full(2 * size, -1, np.int32)
                grown[:size] = value
                value = grown
                size *= 2
            if check[position] != -1:
                full += 1
                position += 1
                continue
            if first and position > search and smallest <= search:
                search = position
            first = False
            fits = True
            for c in range(k):
                if check[position - smallest + codes[c]] != -1:
                    fits = False
                    break
            if fits:
                break
            tries += 1
            position += 1 + tries // 32  # many children seldom fit into old gaps: stride on, single children fill them
        if full >= 0.95 * (position - search + 1):
            search = position  # everything before is practically full: never look there again
        base[state] = position - smallest
        for c in range(k):
            slot = position - smallest + codes[c]
            check[slot] = state
            last = max(last, slot)
            queue[tail] = (slot, starts[c], starts[c + 1], depth + 1)
            tail += 1
    end = last + alphabet + 2  # every base + number stays inside the arrays
    return base[:end].copy(), check[:end].copy(), value[:end].copy()
