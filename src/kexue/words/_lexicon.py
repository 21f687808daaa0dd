"""Judging a lexicon: how briefly it describes a text, and which of its words the others explain."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from kexue.words._runs import code_points, run_table, whole_runs
from kexue.words.segmenter import Segmenter, best_path

_PIECE = 1 << 21  # characters read at a time, at most


def piece_size(memory: int) -> int:
    """Characters of text that are cut at a time within a budget."""
    return int(np.clip(memory // 128, 1 << 16, _PIECE))


@numba.njit(cache=True)
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


def description(
    texts: Iterable[Any], vocabulary: dict[str, int], character_entropy: float, size: int = _PIECE
) -> float:
    """Length in nats of the text under the vocabulary, plus that of the vocabulary itself.

    The text is cut into its most probable words and costs n H, n words of empirical entropy H; each word in use is
    written once, at (length + 1) times the entropy of single characters. A lexicon that merges too little leaves H per
    character high, one that merges too much pays for its many words.
    """
    segmenter = Segmenter(vocabulary)
    trie = segmenter._trie
    used, unknown = np.zeros(len(vocabulary), np.int64), np.zeros(run_table().size, np.int64)
    for text in whole_runs(texts, size):
        points = code_points(text)
        arrays = (trie.numbers, trie.base, trie.check, trie.value)
        borders, _ = best_path(trie.numbers, points, *arrays[1:], segmenter._scores, segmenter.unknown_score)
        _usage(points, borders, run_table(), *arrays, used, unknown)
    counts = np.concatenate([used[used > 0], unknown[unknown > 0]]).astype(np.float64)
    lengths = np.fromiter(map(len, segmenter.vocabulary), np.int64, len(vocabulary))[used > 0]
    letters = int((lengths + 1).sum()) + 2 * int((unknown > 0).sum())
    return float(counts.sum() * math.log(counts.sum()) - (counts * np.log(counts)).sum() + letters * character_entropy)


def remove_redundant(vocabulary: dict[str, int], rule: str) -> dict[str, int]:
    """Drop words that their parts explain, longest first; a dropped word gives its count to its parts.

    Args:
        vocabulary: Word -> count.
        rule: "article": keep a word when ln p(w) - sum ln p(parts) > 1; "length": when it is >= len(w) - 1.

    Returns:
        What is left, with the new counts.
    """
    left = dict(vocabulary)
    total = sum(left.values())
    for word in sorted((w for w in left if len(w) > 1), key=lambda w: (-len(w), w)):
        count, n = left.pop(word), len(word)
        unit = math.log(total)
        best, back = [0.0] + [-math.inf] * n, [0] * (n + 1)
        for i in range(n):
            for j in range(i + 1, n + 1):
                found = left.get(word[i:j])
                if found is None and j > i + 1:
                    continue
                score = best[i] + (math.log(found) if found else 0.0) - unit
                if score > best[j]:
                    best[j], back[j] = score, i
        gain = math.log(count) - unit - best[n]
        if gain > 1 if rule == "article" else gain >= n - 1:
            left[word] = count
            continue
        total -= count
        end = n
        while end:
            part = word[back[end] : end]
            left[part] = left.get(part, 0) + count
            total += count
            end = back[end]
    return left
