"""An n-gram language model in one table (n 元语言模型): a target whose samplers can be compiled, and a cheap screen.

    p(w | h) = (c(h, w) + a p(w | h')) / (c(h) + a),   h' = h without its oldest word,   p(w | nothing) = 1 / (V + 1)

(Dirichlet smoothing; the V + 1 are the words and the end of the text.) The table holds log p for every history of
order - 1 tokens, (V + 1)^order numbers: for toys, characters and small vocabularies of words.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kexue._checks import check_int, check_real
from kexue.generation._states import Ids, as_ids, as_states

__all__ = ["NGramLM"]

_LARGEST = 2**27  # 1 GiB in float64


class NGramLM:
    """Log-probabilities of whole texts, the end included, from a table of n-grams.

    It is a callable ``list of ids -> (N,)``, so that ``Target(lm)`` takes it; :class:`kexue.generation.CGMH` runs
    millions of steps per second over it.

    Args:
        table: (V + 1,) * order, log p of the last index after the others. Index V stands for the beginning of the text
            in the history and for its end as the word. Every row must sum to 1 in probabilities.

    Raises:
        TypeError: A table that is no array of numbers.
        ValueError: Fewer than two dimensions, unequal sizes, rows that are not log-probabilities.

    Example:
        >>> lm = NGramLM.fit([[0, 1], [0, 1, 1]], vocab_size=2, order=2, smoothing=0.1)
        >>> p = np.exp(lm([(0, 1), (1, 0)]))
        >>> bool(p[0] > 100 * p[1])
        True
    """

    def __init__(self, table: Any) -> None:
        values = np.array(table, dtype=np.float64)
        if values.ndim < 2 or len(set(values.shape)) != 1 or values.shape[0] < 2:
            raise ValueError(f"table must have shape (V + 1,) * order with order >= 2 and V >= 1; got {values.shape}")
        if np.isnan(values).any() or (values > 1e-9).any() or not np.allclose(np.exp(values).sum(-1), 1, atol=1e-6):
            raise ValueError("table must hold log-probabilities: rows of exp(table) that sum to 1")
        self.table = values
        self.order, self.vocab_size = values.ndim, values.shape[0] - 1

    @classmethod
    def fit(cls, texts: Iterable[Sequence[int]], vocab_size: int, order: int = 2, smoothing: float = 1.0) -> NGramLM:
        """Estimate from texts.

        Args:
            texts: Sequences of ids below ``vocab_size``.
            vocab_size: V.
            order: n, at least 2; the table has (V + 1)^n entries.
            smoothing: a, above 0: how many observations the shorter history counts for.

        Returns:
            The model.

        Raises:
            TypeError: Ids that are no integers.
            ValueError: A table of more than 2^27 entries, an id outside the vocabulary, no texts.
        """
        check_int("vocab_size", vocab_size, 1)
        check_int("order", order, 2)
        check_real("smoothing", smoothing, above=0.0)
        size = vocab_size + 1
        if size**order > _LARGEST:
            raise ValueError(f"the table would have {size}^{order} entries; at most {_LARGEST}")
        counts = np.zeros((size,) * order)
        seen = 0
        for text in texts:
            ids = as_ids(text, f"text {seen}")
            if ids and max(ids) >= vocab_size:
                raise ValueError(f"texts must hold ids below vocab_size = {vocab_size}; got {max(ids)}")
            row = np.array((vocab_size,) * (order - 1) + ids + (vocab_size,))
            np.add.at(counts, tuple(row[i : len(row) - order + 1 + i] for i in range(order)), 1)
            seen += 1
        if not seen:
            raise ValueError("texts must hold at least one text; got none")
        # Counts of shorter histories are sums over the oldest word; the beginning counts as one.
        p: NDArray[np.float64] = np.full(size, 1 / size)
        for length in range(1, order + 1):
            some = counts.sum(axis=tuple(range(order - length)))
            p = (some + smoothing * p) / (some.sum(-1, keepdims=True) + smoothing)
        return cls(np.log(p))

    def __call__(self, texts: Any) -> NDArray[np.float64]:
        """Log-probabilities.

        Args:
            texts: N sequences of ids.

        Returns:
            (N,) float64, with the probability of the end.

        Raises:
            ValueError: An id outside the vocabulary.
        """
        return np.array([self._score(text) for text in as_states(texts)], dtype=np.float64)

    def _score(self, ids: Ids) -> float:
        if ids and max(ids) >= self.vocab_size:
            raise ValueError(f"ids must be below {self.vocab_size}; got {max(ids)}")
        row = (self.vocab_size,) * (self.order - 1) + ids + (self.vocab_size,)
        return float(sum(self.table[row[i : i + self.order]] for i in range(len(ids) + 1)))

    def __repr__(self) -> str:
        return f"NGramLM(order={self.order}, vocab_size={self.vocab_size})"
