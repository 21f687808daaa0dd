"""Soft relations sim(x, c) >= 0 of a sentence to what is wanted: words, meaning, other wording (软约束).

Source: 科学空间 8062, 8194; Miao et al., https://arxiv.org/abs/1811.10996; Liu et al. (UPSA),
https://arxiv.org/abs/1909.03588.

    words      min over the keywords of max over the tokens of cos(keyword, token)
    meaning    cos(mean vector of the sentence, mean vector of the source)
    wording    1 - BLEU(sentence, source)

each raised to an exponent (``sim_hardness`` of the CGMH code is 5 for words). What differs from the published code: a
cosine below ``floor`` counts as ``floor``, so that no sentence is cut off and a chain can come back; whole batches are
scored by one gather from a table of cosines.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kexue._checks import check_real
from kexue.generation._states import Ids, as_ids

__all__ = ["Diversity", "JointRelation", "SentenceMatch", "WordMatch"]


def _unit(embeddings: Any) -> NDArray[np.float64]:
    """(V, D) rows of length 1; zero rows stay zero, so that their cosines are 0."""
    if isinstance(embeddings, Tensor):
        embeddings = embeddings.detach().to("cpu", torch.float64).numpy()
    table = np.asarray(embeddings, dtype=np.float64)
    if table.ndim != 2 or not np.isfinite(table).all():
        raise ValueError(f"embeddings must be a finite table (V, D); got the shape {table.shape}")
    norms = np.linalg.norm(table, axis=1, keepdims=True)
    return table / np.where(norms > 0, norms, 1.0)


class Relation:
    """Base: a function of one sentence from a function of many."""

    def __init__(self, exponent: float, floor: float) -> None:
        check_real("exponent", exponent, minimum=0.0)
        check_real("floor", floor, above=0.0)
        if floor >= 1:
            raise ValueError(f"floor must be below 1; got {floor!r}")
        self.exponent, self.floor = float(exponent), float(floor)

    def raw(self, texts: list[Ids]) -> NDArray[np.float64]:
        """(N,) before the floor and the exponent."""
        raise NotImplementedError

    def batch(self, texts: list[Ids]) -> NDArray[np.float64]:
        """(N,) values in (0, 1]."""
        return np.clip(self.raw(texts), self.floor, 1.0) ** self.exponent

    def __call__(self, ids: Ids) -> float:
        """The value for one sentence."""
        return float(self.batch([tuple(ids)])[0])


def _inside(texts: list[Ids], size: int) -> None:
    highest = max((max(text) for text in texts if text), default=-1)
    if highest >= size:
        raise ValueError(f"token ids must be below the number of embeddings, {size}; got {highest}")


class WordMatch(Relation):
    """How well each keyword is matched by some token of the sentence: the worst keyword counts.

    Args:
        keywords: Token ids; a keyword of several tokens is a sequence, matched token by token.
        embeddings: (V, D) vectors of the tokens, an array or a tensor.
        exponent: The value is raised to it, at least 0.
        floor: Least cosine, in (0, 1).

    Raises:
        TypeError: Keywords that are no ids.
        ValueError: No keyword, an id without an embedding, numbers out of range.

    Example:
        >>> near = WordMatch([0], [[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]], exponent=2)
        >>> round(near((2, 1)), 2), near((0, 2)), near.batch([(1,)]).shape
        (0.36, 1.0, (1,))
    """

    def __init__(
        self,
        keywords: Sequence[int] | Sequence[Sequence[int]],
        embeddings: Any,
        exponent: float = 5.0,
        floor: float = 1e-3,
    ) -> None:
        super().__init__(exponent, floor)
        unit = _unit(embeddings)
        flat: list[int] = []
        for word in keywords:
            flat += as_ids(word if hasattr(word, "__len__") else (word,), "a keyword")
        if not flat:
            raise ValueError("keywords must hold at least one token; got none")
        _inside([tuple(flat)], len(unit))
        self.keywords = tuple(dict.fromkeys(flat))
        self.cosines = unit[list(self.keywords)] @ unit.T  # (k, V)

    def raw(self, texts: list[Ids]) -> NDArray[np.float64]:
        """(N,) worst best cosines."""
        _inside(texts, self.cosines.shape[1])
        return np.array([self.cosines[:, list(t)].max(1).min() if t else 0.0 for t in texts], dtype=np.float64)


class SentenceMatch(Relation):
    """Cosine between the mean vectors of the sentence and of a source.

    Args:
        source: Token ids.
        embeddings: (V, D) vectors of the tokens.
        weights: (V,) weights of the tokens in the mean, such as inverse frequencies; None: 1.
        exponent: The value is raised to it, at least 0.
        floor: Least cosine, in (0, 1).

    Raises:
        TypeError: A source that holds no ids.
        ValueError: An empty source, shapes that do not fit, numbers out of range.

    Example:
        >>> near = SentenceMatch((0, 1), [[1.0, 0.0], [0.0, 1.0]], exponent=1)
        >>> round(near((0,)), 3), round(near((1, 0)), 3)
        (0.707, 1.0)
    """

    def __init__(
        self, source: Sequence[int], embeddings: Any, weights: Any = None, exponent: float = 1.0, floor: float = 1e-3
    ) -> None:
        super().__init__(exponent, floor)
        unit = _unit(embeddings)
        scale = np.ones(len(unit)) if weights is None else np.asarray(weights, dtype=np.float64)
        if scale.shape != (len(unit),) or (scale < 0).any() or not np.isfinite(scale).all():
            raise ValueError(f"weights must be {len(unit)} numbers of at least 0; got the shape {scale.shape}")
        self.source = as_ids(source, "the source")
        if not self.source:
            raise ValueError("the source must hold at least one token; got none")
        _inside([self.source], len(unit))
        self.vectors = unit * scale[:, None]
        mean = self.vectors[list(self.source)].sum(0)
        self._mean = mean / (np.linalg.norm(mean) or 1.0)

    def raw(self, texts: list[Ids]) -> NDArray[np.float64]:
        """(N,) cosines."""
        _inside(texts, len(self.vectors))
        sums = np.stack([self.vectors[list(t)].sum(0) for t in texts]) if texts else np.zeros((0, len(self._mean)))
        norms = np.linalg.norm(sums, axis=1)
        return (sums @ self._mean) / np.where(norms > 0, norms, 1.0)


class Diversity(Relation):
    """1 - BLEU with the source: larger for other wording (n-grams up to 4, brevity penalty, +1 for n >= 2).

    Args:
        source: Token ids.
        exponent: The value is raised to it, at least 0.
        floor: Least value, which the source itself gets.

    Raises:
        TypeError: A source that holds no ids.
        ValueError: An empty source, numbers out of range.

    Example:
        >>> other = Diversity((1, 2, 3, 4))
        >>> other((5, 6, 7)), other((1, 2, 3, 4)) == other.floor
        (1.0, True)
    """

    def __init__(self, source: Sequence[int], exponent: float = 1.0, floor: float = 1e-2) -> None:
        super().__init__(exponent, floor)
        self.source = as_ids(source, "the source")
        if not self.source:
            raise ValueError("the source must hold at least one token; got none")
        self._counts = [_ngrams(self.source, n) for n in range(1, 5)]

    def raw(self, texts: list[Ids]) -> NDArray[np.float64]:
        """(N,) 1 - BLEU."""
        return np.array([1.0 - self._bleu(text) for text in texts], dtype=np.float64)

    def _bleu(self, text: Ids) -> float:
        total, orders = 0.0, min(4, len(text), len(self.source))
        for n in range(1, orders + 1):
            mine = _ngrams(text, n)
            matched, smooth = sum((mine & self._counts[n - 1]).values()), float(n > 1)
            if matched + smooth == 0:
                return 0.0
            total += math.log((matched + smooth) / (len(text) - n + 1 + smooth)) / orders
        if not orders:
            return 0.0
        return math.exp(total + min(0.0, 1.0 - len(self.source) / len(text)))


def _ngrams(text: Ids, n: int) -> Counter[Ids]:
    return Counter(text[i : i + n] for i in range(len(text) - n + 1))


class JointRelation:
    """The product of several relations.

    Args:
        *relations: Callables ``ids -> number >= 0``; those with ``batch`` are given all sentences at once.

    Raises:
        TypeError: Something that is not callable.
        ValueError: None given.

    Example:
        >>> both = JointRelation(lambda ids: 0.5, Diversity((1, 2)))
        >>> both((3, 4))
        0.5
    """

    def __init__(self, *relations: Callable[[Ids], float]) -> None:
        if not relations:
            raise ValueError("JointRelation needs at least one relation; got none")
        for relation in relations:
            if not callable(relation):
                raise TypeError(f"a relation must be callable, ids -> number; got {type(relation).__name__}")
        self.relations = relations

    def batch(self, texts: list[Ids]) -> NDArray[np.float64]:
        """(N,) products."""
        value = np.ones(len(texts))
        for relation in self.relations:
            many = getattr(relation, "batch", None)
            value = value * np.asarray(many(texts) if callable(many) else [relation(t) for t in texts], np.float64)
        return value

    def __call__(self, ids: Ids) -> float:
        """The product for one sentence."""
        return float(self.batch([tuple(ids)])[0])
