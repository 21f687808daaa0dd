"""How many pieces make a summary: learned from extracts that no labeller had seen.

The labellers say how likely each piece is; which of them are written out follows from two numbers, a length and a
threshold: pieces are taken from the likeliest on while they bring the length nearer to the wanted one, none that is
less likely than the threshold, and none that repeats the others; the likeliest one always. Both numbers are those with
which the main metric of the out-of-fold extracts is highest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kexue.tasks._summary_data import Texts

__all__ = ["Selection", "sampled", "tune_selection"]

LENGTHS = (0.4, 0.6, 0.8, 1.0, 1.2, 1.5, 2.0)  # times the mean length of a summary
THRESHOLDS = (0.0, 0.05, 0.1, 0.2, 0.3, 0.5)
REPEATED = 0.8  # share of a piece's words that the chosen ones have already
MOST_ROWS = 400  # documents on which the numbers are chosen


@dataclass(frozen=True)
class Selection:
    """The rule.

    Attributes:
        length: Wanted length in words (characters of Chinese).
        threshold: Least probability.
    """

    length: float
    threshold: float

    def __call__(self, values: NDArray[np.float32], words: Sequence[list[str]]) -> list[int]:
        """The chosen pieces in the order of the document.

        Args:
            values: (n,) probability of each piece.
            words: Words of each piece.
        """
        chosen: list[int] = []
        total, seen = 0, set[str]()
        for j in np.argsort(-values, kind="stable").tolist():
            if chosen:
                if values[j] < self.threshold or total >= self.length:
                    break
                size = len(words[j])
                if not size or total + size - self.length > self.length - total:
                    continue
                if sum(word in seen for word in words[j]) > REPEATED * size:
                    continue
            chosen.append(j)
            total += len(words[j])
            seen.update(words[j])
        return sorted(chosen)


def sampled(learned: NDArray[np.int64], seed: int) -> list[int]:
    """The documents on which the numbers are chosen."""
    rows: list[int] = np.random.default_rng(seed).permutation(learned)[:MOST_ROWS].tolist()
    return rows


def tune_selection(
    values: Sequence[NDArray[np.float32]], data: Texts, learned: NDArray[np.int64], seed: int
) -> tuple[Selection, float]:
    """The rule with the highest mean metric, and that mean.

    Args:
        values: Out-of-fold probabilities of each document.
        data: The documents.
        learned: Those that take part.
        seed: For the choice among them, where there are many.
    """
    rows = sampled(learned, seed)
    mean = float(np.mean([data.lengths[i] for i in learned]))
    rules = [Selection(share * mean, threshold) for share in LENGTHS for threshold in THRESHOLDS]
    chosen = [[(i, tuple(rule(values[i], data.words[i]))) for i in rows] for rule in rules]
    distinct = list(dict.fromkeys(key for keys in chosen for key in keys))
    scores = data.measure([i for i, _ in distinct], [pieces for _, pieces in distinct]).tolist()
    known = dict(zip(distinct, scores, strict=True))
    means = [float(np.mean([known[key] for key in keys])) for keys in chosen]
    best = int(np.argmax(means))
    return rules[best], means[best]
