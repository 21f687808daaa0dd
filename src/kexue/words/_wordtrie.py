"""A trie over words, with or without a hole before each word: the index of phrases and of sentence templates."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kexue.words._numba import kernel


@dataclass(frozen=True)
class WordTrie:
    """Node 0 is the root; a node stands for a sequence of words with holes (or none) before and between them.

    Attributes:
        first: (nodes + 1,) int64, where the children of a node start in ``keys``; they are sorted by key.
        keys: (nodes - 1,) int64, 2 * word + (1 if a hole comes before the word).
        child: (nodes - 1,) int32, the node that the key leads to.
        depth: (nodes,) int32, number of words.
        closed: (nodes,) int64, index of the sequence that ends here, or -1.
        opened: (nodes,) int64, index of the sequence that ends here with a hole behind it, or -1.
        numbers: Word -> number.
    """

    first: NDArray[np.int64]
    keys: NDArray[np.int64]
    child: NDArray[np.int32]
    depth: NDArray[np.int32]
    closed: NDArray[np.int64]
    opened: NDArray[np.int64]
    numbers: dict[str, int]

    @classmethod
    def build(cls, patterns: Iterable[Sequence[str | None]]) -> WordTrie:
        """Build from distinct sequences of words and None (a hole), each with a word and no two holes in a row."""
        numbers: dict[str, int] = {}
        children: list[dict[int, int]] = [{}]
        depth, closed, opened = [0], [-1], [-1]
        for index, pattern in enumerate(patterns):
            node, hole = 0, 0
            for word in pattern:
                if word is None:
                    hole = 1
                    continue
                key = 2 * numbers.setdefault(word, len(numbers)) + hole
                following = children[node].get(key)
                if following is None:
                    following = children[node][key] = len(children)
                    children.append({})
                    depth.append(depth[node] + 1)
                    closed.append(-1)
                    opened.append(-1)
                node, hole = following, 0
            (opened if hole else closed)[node] = index
        first = np.zeros(len(children) + 1, np.int64)
        np.cumsum([len(item) for item in children], out=first[1:])
        links = [sorted(item.items()) for item in children]
        return cls(
            first,
            np.array([key for item in links for key, _ in item], np.int64),
            np.array([node for item in links for _, node in item], np.int32),
            np.array(depth, np.int32),
            np.array(closed, np.int64),
            np.array(opened, np.int64),
            numbers,
        )


@kernel
def step(first: NDArray[np.int64], keys: NDArray[np.int64], child: NDArray[np.int32], node: int, key: int) -> int:
    """The node that ``key`` leads to, or -1."""
    low, high = first[node], first[node + 1]
    while low < high:
        middle = (low + high) // 2
        if keys[middle] < key:
            low = middle + 1
        else:
            high = middle
    return child[low] if low < first[node + 1] and keys[low] == key else -1
