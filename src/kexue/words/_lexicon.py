"""Judging a lexicon: how briefly it describes a text, and which of its words the others explain."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kexue.words._numba import compiled
from kexue.words._runs import code_points, run_table, whole_runs
from kexue.words._trie import Trie
from kexue.words.segmenter import best_path

_PIECE = 1 << 21  # characters read at a time, at most


def piece_size(memory: int) -> int:
    """Characters of text that are cut at a time within a budget."""
    return int(np.clip(memory // 128, 1 << 16, _PIECE))


@compiled()
def _usage(
    points: NDArray[np.uint32],
    borders: NDArray[np.int64],
    in_run: NDArray[np.bool_],
    numbers: NDArray[np.int32],
    base: NDArray[np.int32],
    check: NDArray[np.int32],
    value: NDArray[np.int32],
    used: NDArray[np.int64],
    unknown: NDArray[np.int64],
) -> None:
    """Add how often each word, and each character outside the vocabulary, stands on a path."""
    for t in range(borders.size - 1):
        a, b = borders[t], borders[t + 1]
        if not in_run[points[a]]:
            continue
        state = 0
        for j in range(a, b):
            number = numbers[points[j]]
            child = base[state] + number
            state = child if number != 0 and check[child] == state else 0
        if state != 0 and value[state] >= 0:
            used[value[state]] += 1
        else:
            unknown[points[a]] += 1


class Lexicon:
    """Words with counts, as arrays.

    Attributes:
        rows: Code points (M, n) of the words of each length n, ascending, sorted within a length.
        counts: (words,) their counts, through all lengths.
    """

    def __init__(self, rows: list[NDArray[np.uint32]], counts: NDArray[np.int64]) -> None:
        self.rows, self.counts = rows, counts

    @classmethod
    def of(cls, groups: Iterable[tuple[NDArray[np.uint32], NDArray[np.int64]]]) -> Lexicon:
        """From (code points (M, n), counts (M,)) in any order; words with count 0 leave."""
        by_length: dict[int, list[tuple[NDArray[np.uint32], NDArray[np.int64]]]] = {}
        for rows, counts in groups:
            by_length.setdefault(rows.shape[1], []).append((rows[counts > 0], counts[counts > 0]))
        kept, totals = [], [np.empty(0, np.int64)]
        for n in sorted(by_length):
            rows, counts = (np.concatenate(part) for part in zip(*by_length[n], strict=True))
            order = np.lexsort(rows.T[::-1])
            kept.append(rows[order])
            totals.append(counts[order])
        return cls(kept, np.concatenate(totals))

    @classmethod
    def of_words(cls, vocabulary: Mapping[str, int]) -> Lexicon:
        """From words and counts."""
        by_length: dict[int, list[str]] = {}
        for word in vocabulary:
            by_length.setdefault(len(word), []).append(word)
        return cls.of(
            (code_points("".join(words)).reshape(-1, n), np.array([vocabulary[word] for word in words], np.int64))
            for n, words in by_length.items()
        )

    def groups(self) -> Iterator[tuple[NDArray[np.uint32], NDArray[np.int64]]]:
        """(Code points, counts) of each length."""
        first = 0
        for rows in self.rows:
            yield rows, self.counts[first : first + len(rows)]
            first += len(rows)

    def __len__(self) -> int:
        return len(self.counts)

    def at_least(self, minimum: int) -> Lexicon:
        """The words with this count."""
        return Lexicon.of((rows, np.where(counts >= minimum, counts, 0)) for rows, counts in self.groups())

    def lengths(self) -> NDArray[np.int64]:
        """(words,) characters of each."""
        return np.repeat([rows.shape[1] for rows in self.rows], [len(rows) for rows in self.rows]).astype(np.int64)

    def words(self) -> dict[str, int]:
        """Word -> count."""
        found: dict[str, int] = {}
        for rows, counts in self.groups():
            n, text = rows.shape[1], rows.tobytes().decode("utf-32-le", "surrogatepass")
            found.update((text[k * n : k * n + n], count) for k, count in enumerate(counts.tolist()))
        return found


def description(texts: Iterable[Any], lexicon: Lexicon, character_entropy: float, size: int = _PIECE) -> float:
    """Length in nats of the text under the vocabulary, plus that of the vocabulary itself.

    The text is cut into its most probable words and costs n H, n words of empirical entropy H; each word in use is
    written once, at (length + 1) times the entropy of single characters. A lexicon that merges too little leaves H per
    character high, one that merges too much pays for its many words.
    """
    trie = Trie.of_grams(lexicon.rows)
    total = math.log(lexicon.counts.sum())
    scores = np.log(lexicon.counts) - total
    used, unknown = np.zeros(len(lexicon), np.int64), np.zeros(run_table().size, np.int64)
    for text in whole_runs(texts, size):
        points = code_points(text)
        arrays = (trie.numbers, trie.base, trie.check, trie.value)
        borders, _ = best_path(trie.numbers, points, *arrays[1:], scores, -total)
        _usage(points, borders, run_table(), *arrays, used, unknown)
    counts = np.concatenate([used[used > 0], unknown[unknown > 0]]).astype(np.float64)
    letters = int((lexicon.lengths()[used > 0] + 1).sum()) + 2 * int((unknown > 0).sum())
    return float(counts.sum() * math.log(counts.sum()) - (counts * np.log(counts)).sum() + letters * character_entropy)


@compiled()
def _remove(
    codes: NDArray[np.int32],
    starts: NDArray[np.int64],
    order: NDArray[np.int64],
    base: NDArray[np.int32],
    check: NDArray[np.int32],
    value: NDArray[np.int32],
    counts: NDArray[np.int64],
    by_length: bool,
) -> None:
    """Take the words in ``order``; one that its parts explain gets count 0 and gives its count to them."""
    longest = 0
    for w in order:
        longest = max(longest, starts[w + 1] - starts[w])
    best = np.empty(longest + 1)
    back, part = np.empty(longest + 1, np.int64), np.empty(longest + 1, np.int64)
    total = counts.sum()
    for w in order:
        first, n, count = starts[w], starts[w + 1] - starts[w], counts[w]
        counts[w] = 0
        unit = math.log(total)
        best[0] = 0.0
        best[1 : n + 1] = -np.inf
        for i in range(n):
            state = 0
            for j in range(i, n):
                child = base[state] + codes[first + j]
                if check[child] != state:
                    break
                state = child
                found = counts[value[state]] if value[state] >= 0 else 0
                if found == 0 and j > i:
                    continue
                score = best[i] + (math.log(found) if found > 0 else 0.0) - unit
                if score > best[j + 1]:
                    best[j + 1], back[j + 1], part[j + 1] = score, i, value[state]
        gain = math.log(count) - unit - best[n]
        if (gain >= n - 1) if by_length else (gain > 1):
            counts[w] = count
            continue
        total -= count
        end = n
        while end > 0:
            counts[part[end]] += count
            total += count
            end = back[end]


def remove_redundant(lexicon: Lexicon, rule: str) -> Lexicon:
    """Drop words that their parts explain, longest first; a dropped word gives its count to its parts.

    Args:
        lexicon: Words and counts.
        rule: "article": keep a word when ln p(w) - sum ln p(parts) > 1; "length": when it is >= len(w) - 1.

    Returns:
        What is left, with the new counts. Characters that were no words become some if they are parts.
    """
    groups = list(lexicon.groups())
    letters = np.unique(np.concatenate([np.empty(0, np.uint32), *(rows.ravel() for rows, _ in groups)]))
    single = np.concatenate([np.empty(0, np.uint32), *(rows[:, 0] for rows, _ in groups if rows.shape[1] == 1)])
    missing = np.setdiff1d(letters, single).astype(np.uint32)
    rows = [missing[:, None], *(rows for rows, _ in groups)]
    counts = np.concatenate([np.zeros(len(missing), np.int64), lexicon.counts])
    trie = Trie.of_grams(rows)
    lengths = np.repeat([part.shape[1] for part in rows], [len(part) for part in rows]).astype(np.int64)
    starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
    codes = trie.numbers[np.concatenate([part.ravel() for part in rows])]
    longer = np.flatnonzero(lengths > 1)
    order = longer[np.argsort(-lengths[longer], kind="stable")]  # within a length as they are: sorted
    _remove(codes, starts, order, trie.base, trie.check, trie.value, counts, rule == "length")
    first, left = 0, []
    for part in rows:
        left.append((part, counts[first : first + len(part)]))
        first += len(part)
    return Lexicon.of(left)
