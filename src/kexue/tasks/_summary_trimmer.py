"""Trimming an extract to the words that a summary takes over (摘录压缩).

A title or a first line says in ten words what a sentence says in thirty. So a second labeller, of the same kind as that
of the pieces, reads the words of a generous extract and says how likely the summary has each. Written out are the runs
of words that maximise

    sum over written words of (p - threshold) - cost * (number of runs)

by dynamic programming with two states (written or not), in linear time: a run goes on over an unlikely word if that
is cheaper than a new one. Threshold and cost are those with the highest main metric on extracts of documents that
neither labeller saw, and nothing is trimmed unless that beats whole pieces there by more than noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from kexue.tasks._piece_features import columns_of, hashes_of, mixed
from kexue.tasks._summary_data import Texts, beyond_noise
from kexue.tasks._summary_extractor import Pieces, Settings, probabilities, train_labeler
from kexue.tasks._summary_selection import MOST_ROWS, Selection
from kexue.tasks._text_words import TOKEN, tokens
from kexue.tasks.gated_conv import GatedConvLabeler
from kexue.tasks.pieces import join_pieces

__all__ = ["RULES", "Runs", "Trimmer", "Words", "learn_to_trim", "runs"]

WIDTH = 512
MARKS = 12
GENEROUS = 3.0  # times the length of a summary that the trimmer reads
_LONG = 4  # letters of a word that counts when it is matched alone


class Words:
    """The words of an extract, with where they stand.

    Args:
        pieces: The pieces of the document.
        chosen: Which of them the extract has.
        values: Probability of each piece.

    Attributes:
        text: The extract.
        words: In lower case.
        spans: (W, 2) in characters of ``text``.
        vectors: (W, D) sparse.
    """

    def __init__(self, pieces: Sequence[str], chosen: Sequence[int], values: NDArray[np.float32]) -> None:
        parts = [pieces[j] for j in chosen]
        self.text = join_pieces(parts)
        found: list[tuple[int, int]] = []
        piece: list[int] = []
        inside: list[int] = []
        length: list[int] = []
        at = 0
        for j, part in zip(chosen, parts, strict=True):
            at = self.text.index(part, at)
            here = [(m.start() + at, m.end() + at) for m in TOKEN.finditer(part)]
            found += here
            piece += [j] * len(here)
            inside += range(len(here))
            length += [len(here)] * len(here)
            at += len(part)
        self.spans = np.array(found, np.int64).reshape(-1, 2)
        self.words = [self.text[a:b].lower() for a, b in found]
        self.vectors = self._vectors(np.array(piece, np.int64), np.array(inside), np.array(length), values, pieces)

    def _vectors(
        self,
        piece: NDArray[np.int64],
        inside: NDArray[np.int64],
        length: NDArray[np.int64],
        values: NDArray[np.float32],
        pieces: Sequence[str],
    ) -> sparse.csr_array:
        n = len(self.words)
        if not n:
            return sparse.csr_array((0, WIDTH + MARKS), dtype=np.float32)
        parts = [hashes_of(word) for word in self.words]
        whole = np.fromiter((h[0] for h in parts), np.uint64, n)
        before = np.concatenate([[np.uint64(1)], whole[:-1]])
        after = np.concatenate([whole[1:], [np.uint64(2)]])
        kinds = [
            whole, mixed(before, whole), mixed(whole, after) + np.uint64(3), before + np.uint64(5),
            after + np.uint64(7), mixed(mixed(before, whole), after),
            np.fromiter((h[-1] for h in parts), np.uint64, n) + np.uint64(11),
        ]  # fmt: skip
        columns = np.concatenate([columns_of(h, WIDTH) for h in kinds])
        rows = np.tile(np.arange(n), len(kinds))
        hashed = sparse.csr_array((np.full(len(columns), 0.4, np.float32), (rows, columns)), (n, WIDTH))
        whole_text = [m.group() for part in pieces for m in TOKEN.finditer(part.lower())]
        counts: dict[object, int] = {}
        for word in whole_text:
            counts[word] = counts.get(word, 0) + 1
        for pair in pairwise(whole_text):
            counts[pair] = counts.get(pair, 0) + 1
        pairs = np.array([counts.get(pair, 0) for pair in pairwise(self.words)], np.float64)
        gap = np.concatenate([[0], self.spans[1:, 0] - self.spans[:-1, 1]]) > 0
        marks = np.stack([
            values[piece], values[piece] / max(float(values.max()), 1e-9), piece / len(pieces), 1 / (1 + piece),
            inside / 30, (length - 1 - inside) / 30, inside == 0, inside == length - 1,
            np.log([counts.get(word, 1) for word in self.words]) / 2,
            np.log1p(np.concatenate([[0], pairs])) / 2, np.log1p(np.concatenate([pairs, [0]])) / 2, gap,
        ], 1).astype(np.float32)  # fmt: skip
        return sparse.csr_array(sparse.hstack([hashed, sparse.csr_array(marks)]))

    def labels(self, summary: Sequence[str]) -> NDArray[np.bool_]:
        """Which words the summary has: two in a row, or a long one alone."""
        alone, both = set(summary), set(pairwise(summary))
        found = np.array([len(word) >= _LONG and word in alone for word in self.words], np.bool_)
        for k, pair in enumerate(pairwise(self.words)):
            if pair in both:
                found[k] = found[k + 1] = True
        return found

    def write(self, chosen: Sequence[tuple[int, int]]) -> str:
        """The text of runs of words (first, last + 1)."""
        return join_pieces([self.text[self.spans[a, 0] : self.spans[b - 1, 1]] for a, b in chosen])


def runs(values: NDArray[np.float32], threshold: float, cost: float) -> list[tuple[int, int]]:
    """The runs of words with the highest sum of (value - threshold) - cost * runs; at least one word.

    Example:
        >>> runs(np.array([0.9, 0.1, 0.9, 0.0, 0.0, 0.0, 0.6]), 0.4, 0.5)
        [(0, 3)]
        >>> runs(np.array([0.1, 0.2]), 0.4, 0.5)
        [(1, 2)]
    """
    gains = [float(v) - threshold for v in values]
    off, on = 0.0, -np.inf
    entered, left = [], []  # whether the best way to be written (not written) here changed state
    for gain in gains:
        enter = off - cost > on
        leave = on > off
        entered.append(enter)
        left.append(leave)
        off, on = max(off, on), max(off - cost, on) + gain
    found, stop, written = [], len(gains), on > off
    for k in range(len(gains) - 1, -1, -1):
        if written:
            if entered[k]:
                found.append((k, stop))
                written = False
        elif left[k]:
            written, stop = True, k
    if not found and len(gains):
        best = int(np.argmax(values))
        return [(best, best + 1)]
    return found[::-1]


@dataclass(frozen=True)
class Runs:
    """Threshold and cost of :func:`runs`."""

    threshold: float
    cost: float

    def __call__(self, values: NDArray[np.float32]) -> list[tuple[int, int]]:
        return runs(values, self.threshold, self.cost)


RULES = tuple(Runs(t, c) for t in (0.15, 0.2, 0.25, 0.3, 0.35, 0.4) for c in (0.7, 1.5, 100.0))


@dataclass(frozen=True)
class Trimmer:
    """What writes summaries from generous extracts.

    Attributes:
        labelers: Of words.
        extract: How the generous extract is chosen.
        rule: Which runs of words are written.
    """

    labelers: list[GatedConvLabeler]
    extract: Selection
    rule: Runs

    def __call__(self, pieces: Sequence[str], words: Sequence[list[str]], values: NDArray[np.float32]) -> str:
        """The summary of a document from the probabilities of its pieces."""
        found = Words(pieces, self.extract(values, words), values)
        if not found.words:
            return found.text
        return found.write(self.rule(probabilities(self.labelers, Pieces.joined([found.vectors]))))


def learn_to_trim(
    data: Texts,
    values: Sequence[NDArray[np.float32]],
    selection: Selection,
    folds: Sequence[tuple[NDArray[np.int64], NDArray[np.int64]]],
    settings: Settings,
    folder: Path,
) -> tuple[Trimmer | None, float]:
    """A trimmer if it beats whole pieces, and the main metric of what is better, on documents that nothing has seen.

    Args:
        data: All documents.
        values: Out-of-fold probabilities of their pieces.
        selection: How whole pieces are chosen.
        folds: Rows to learn from and rows to measure on.
        settings: Of the labellers.
        folder: Folder of the runs.
    """
    learned = np.sort(np.concatenate([test for _, test in folds]))
    place = {int(i): k for k, i in enumerate(learned)}
    extract = Selection(GENEROUS * float(np.mean([data.lengths[i] for i in learned])), 0.0)
    found = [Words(data.pieces[i], extract(values[i], data.words[i]), values[i]) for i in learned]
    labels = [x.labels(tokens(data.summaries[i])) for x, i in zip(found, learned, strict=True)]
    given = Pieces.joined([x.vectors for x in found])

    def measure(rows: Sequence[int], chosen: Sequence[Sequence[int]]) -> NDArray[np.float64]:
        texts = [" ".join(found[k].words[j] for j in words) for k, words in zip(rows, chosen, strict=True)]
        return data.score([int(learned[k]) for k in rows], texts)

    labelers, sure = [], [np.zeros(0, np.float32)] * len(learned)
    for k, (train, test) in enumerate(folds):
        here = np.array([place[int(i)] for i in train])
        label = f"learning to trim, {k + 1} of {len(folds)}"
        labeler, _ = train_labeler(given, labels, here, measure, settings, folder / f"words-{k}", label)
        labelers.append(labeler)
        left = np.array([place[int(i)] for i in test])
        part = given.take(left)
        for i, p in zip(left, part.split(probabilities([labeler], part)), strict=True):
            sure[i] = p
    rows = np.random.default_rng(settings.seed).permutation(len(learned))[:MOST_ROWS].tolist()
    documents = [int(learned[k]) for k in rows]
    whole = data.measure(documents, [selection(values[i], data.words[i]) for i in documents])
    trimmed = [data.score(documents, [found[k].write(rule(sure[k])) for k in rows]) for rule in RULES]
    best = int(np.argmax([scores.mean() for scores in trimmed]))
    if beyond_noise(trimmed[best] - whole):
        return Trimmer(labelers, extract, RULES[best]), float(trimmed[best].mean())
    return None, float(whole.mean())
