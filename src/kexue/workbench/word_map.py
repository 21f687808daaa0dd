"""A map of words for people: positions in the plane, and labels that do not lie upon each other."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

WIDTH, HEIGHT = 1000.0, 640.0
_FONT = 12.0
_MARGIN = 14.0


@dataclass(frozen=True)
class Mark:
    """A word on the map: its dot, and its label or None where there was no room for one."""

    word: str
    x: float
    y: float
    label: tuple[float, float] | None


def word_map(vectors: Any, rows: Sequence[int], labels: Sequence[str], seed: int = 0) -> list[Mark]:
    """Lay words out by t-SNE on the directions of their vectors.

    Args:
        vectors: (V, D) table.
        rows: The words to show, the most important first: they get their labels first.
        labels: What is written for each of them.
        seed: Seed of the layout.

    Returns:
        A mark for each word on a canvas of ``WIDTH`` x ``HEIGHT``; none for fewer than five words, or for
        words that all have the same vector but for its length.
    """
    if len(rows) < 5:
        return []
    from sklearn.manifold import TSNE

    table = np.asarray(vectors)[list(rows)]
    table = table / np.maximum(np.linalg.norm(table, axis=1, keepdims=True), 1e-12)
    if float(np.ptp(table, axis=0).max()) < 1e-6:
        return []  # all in one direction: there is nothing to lay out, and t-SNE would crash
    perplexity = min(12.0, (len(rows) - 1) / 3)
    flat = TSNE(2, perplexity=perplexity, init="pca", random_state=seed, metric="cosine").fit_transform(table)
    return place(_on_canvas(flat), labels)


def _on_canvas(points: NDArray[Any]) -> NDArray[Any]:
    low, high = points.min(0), points.max(0)
    size = np.array([WIDTH - 6 * _MARGIN, HEIGHT - 2 * _MARGIN])  # labels stand to the right of their dots
    return _MARGIN + size * (points - low) / np.maximum(high - low, 1e-12)


def place(points: NDArray[Any], labels: Sequence[str]) -> list[Mark]:
    """Give each label the first free place beside its dot: right, left, below, above; or none.

    Example:
        >>> import numpy as np
        >>> [mark.label is None for mark in place(np.full((6, 2), 300.0), ["same", "place", "for", "all", "of", "us"])]
        [False, False, False, False, True, True]
    """
    taken: list[tuple[float, float, float, float]] = []
    marks = []
    for (x, y), word in zip(points.tolist(), labels, strict=True):
        width = text_width(word)
        found = None
        middle = x - width / 2
        beside = ((x + 5, y + 4), (x - 5 - width, y + 4))
        places = (*beside, *((middle, y + down) for down in (15, -6, 20, -12)))
        for left, base in places:
            box = (left - 1, base - _FONT, left + width + 1, base + 3)
            inside = box[0] >= 0 and box[2] <= WIDTH and box[1] >= 0 and box[3] <= HEIGHT
            if inside and not any(_overlap(box, other) for other in taken):
                found = (left, base)
                taken.append(box)
                break
        marks.append(Mark(word, x, y, found))
    return marks


def text_width(text: str) -> float:
    """Width of a label in units of the canvas, a little more than browsers need."""
    return sum(_FONT if unicodedata.east_asian_width(c) in "WF" else 0.58 * _FONT for c in text)


def _overlap(first: tuple[float, float, float, float], second: tuple[float, float, float, float]) -> bool:
    return first[0] < second[2] and second[0] < first[2] and first[1] < second[3] and second[1] < first[3]
