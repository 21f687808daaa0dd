"""The article's insert / delete / replace recipe on an enumerable target, re-implemented with its two faults.

Without the placeholder [MASK] among its candidates (there is none on the toy). The faults can be mended one by one:

- positions: acceptances as if every place were free, although the keyword's is not (``counted`` puts in the factors);
- candidates: the K best by the left context, with the current token forced among them, so that the set depends on it.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

State = tuple[tuple[int, ...], int]  # a text and the place of its keyword


class ArticleEdits:
    """The kernel over (text, place of the keyword), one keyword of one token.

    Args:
        table: (V + 1, V + 1) probabilities of a Markov chain, V: start and end.
        log_p: Log-probability of a text.
        candidates: K.
        max_length: Insertions stop here.
        counted: Multiply acceptances by the ratio of the numbers of places.
    """

    def __init__(
        self,
        table: NDArray[np.float64],
        log_p: Callable[[tuple[int, ...]], float],
        candidates: int,
        max_length: int,
        counted: bool,
    ) -> None:
        self.vocabulary = len(table) - 1
        self.table, self.log_p, self.k, self.high, self.counted = table, log_p, candidates, max_length, counted

    def _ranked(self, left: tuple[int, ...]) -> list[int]:
        row = self.table[left[-1] if left else self.vocabulary][: self.vocabulary]
        return [int(y) for y in np.argsort(-row, kind="stable")[: self.k]]

    def _forced(self, left: tuple[int, ...], current: int) -> list[int]:
        ranked = self._ranked(left)
        return ranked if current in ranked else [current, *ranked[:-1]]

    def _weights(self, texts: list[tuple[int, ...]]) -> NDArray[np.float64]:
        z = np.array([self.log_p(text) for text in texts])
        z = np.exp(z - z.max())
        return z / z.sum()

    def transitions(self, state: State) -> list[tuple[State, float]]:
        """All next states with their probabilities; refused mass stays."""
        x, key = state
        n, free = len(x), [i for i in range(len(x)) if i != key]
        found: list[tuple[State, float]] = []

        def add(y: tuple[int, ...], place: int, probability: float, ratio: float) -> None:
            found.append(((y, place), probability * min(1.0, math.exp(self.log_p(y) - self.log_p(x)) * ratio)))

        for i in free:  # replace
            tokens = self._forced(x[:i], x[i])
            texts = [(*x[:i], y, *x[i + 1 :]) for y in tokens]
            q = self._weights(texts)
            mine = q[tokens.index(x[i])]
            for token, text, weight in zip(tokens, texts, q, strict=True):
                if token != x[i]:
                    add(text, key, weight / len(free) / 3, mine / weight)
        if n < self.high:
            for i in range(n + 1):  # insert
                texts = [(*x[:i], y, *x[i:]) for y in self._ranked(x[:i])]
                ratio = (n + 1) / n if self.counted else 1.0
                for text, weight in zip(texts, self._weights(texts), strict=True):
                    add(text, key + (key >= i), weight / (n + 1) / 3, ratio / weight)
        for i in free:  # delete
            tokens = self._forced(x[:i], x[i])
            weight = self._weights([(*x[:i], y, *x[i + 1 :]) for y in tokens])[tokens.index(x[i])]
            ratio = weight * ((n - 1) / n if self.counted else 1.0)
            add((*x[:i], *x[i + 1 :]), key - (key >= i), 1 / len(free) / 3, ratio)
        return [*found, (state, 1 - sum(p for _, p in found))]
