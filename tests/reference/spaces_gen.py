"""Slow, obvious versions of the parts of the generator of summaries, in Python and float64."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray


def visible(segments: Sequence[int], i: int, j: int) -> bool:
    """Whether position i of a row without padding sees j."""
    if segments[i] == 0:
        return segments[j] == 0
    return segments[j] == 0 or j <= i


def joined_scores(
    plain: NDArray[np.float64],
    pointed: NDArray[np.float64],
    source: Sequence[int],
    written: Sequence[int],
    follow: tuple[float, float],
    again: float,
    where: Sequence[float],
) -> NDArray[np.float64]:
    """Scores (V,) of the next token.

    Args:
        plain: (V,) of the decoder.
        pointed: (S,) products of query and keys.
        source: S ids, the first one a mark.
        written: What stands in the row after the source, the latest id last.
        follow: Bonus of a source position before which one id, or two, agree.
        again: Bonus of a token that is written already.
        where: Bonus of the half octaves of positions, counted from 1.
    """
    terms: list[list[float]] = [[score] for score in plain]
    for j, token in enumerate(source):
        agree = 0
        for back in (1, 2):
            if j - back < 1 or len(written) < back or source[j - back] != written[-back]:
                break
            agree = back
        bonus = (0.0, *follow)[agree] + (again if token in written else 0.0) + where[int(2 * math.log2(j + 1))]
        terms[token].append(pointed[j] + bonus)
    return np.array([math.log(sum(math.exp(x) for x in row)) for row in terms])


def best_text(
    score: Callable[[tuple[int, ...]], NDArray[np.float64]], end: int, longest: int
) -> tuple[float, tuple[int, ...]]:
    """The most probable text that ends within ``longest`` tokens, by trying all.

    Args:
        score: Log-probabilities (V,) of the token after these, -inf if it is not allowed.
        end: The id that ends a text.
        longest: Tokens, the end among them.
    """
    best: tuple[float, tuple[int, ...]] = (-math.inf, ())
    size = len(score(()))
    for length in range(longest):
        for text in itertools.product([v for v in range(size) if v != end], repeat=length):
            total = 0.0
            for n in range(length + 1):
                total += score(text[:n])[text[n] if n < length else end]
                if total == -math.inf:
                    break
            best = max(best, (total, text))
    return best
