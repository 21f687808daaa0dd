"""Summaries of long documents, learned from pairs (长文本摘要:抽取,再生成; SPACES).

Source: 科学空间 8046 (SPACES:“抽取-生成”式长文本摘要).

A document is cut into pieces finer than sentences; gated convolutions over their vectors say which pieces the summary
was made from; a prefix language model that copies polishes the extract. The steps of :meth:`Summarizer.fit`:

    labels      each piece of a summary is matched with the most similar piece of its document, without crossings
    folds       one labeller for each; the extract of a document comes from the labeller that did not see it
    selection   how long an extract is and how sure a piece must be: what gives the best out-of-fold extracts
    generator   trained on out-of-fold extracts (p > 0.2, low on purpose: it deletes well, but what is missing stays
                missing) and on the labels themselves, each half of the time

What we do differently, and why: everything is trained on the user's pairs, without downloaded weights. A generator
trained from scratch on few pairs does worse than the extract, so it is only used where it is measured to do better on
documents that nothing was trained on. In use the mean of all labellers speaks, where the published code takes the first
one. The epoch of a labeller is not chosen on the fold that it extracts, and equal documents share a fold.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, clone
from sklearn.utils.validation import check_is_fitted

from kexue._checks import check_int, check_real
from kexue.tasks import _summary_files as files
from kexue.tasks._piece_features import PieceEncoder
from kexue.tasks._summary_data import Texts, beyond_noise, check_pairs, check_texts, document_folds, language_of, scores
from kexue.tasks._summary_extractor import Pieces, Settings, passing, probabilities, train_labeler
from kexue.tasks._summary_generator import SummaryGenerator
from kexue.tasks._summary_selection import tune_selection
from kexue.tasks._summary_trimmer import learn_to_trim
from kexue.tasks._text_words import tokens
from kexue.tasks.graph_rank import text_rank
from kexue.tasks.pieces import join_pieces, split_pieces

__all__ = ["Summarizer"]

LEAST_PAIRS = 50  # fewer are no training for a generator
MOST_SET_ASIDE = 200
EXTRACTION = 0.2  # threshold of the generator's input
TOGETHER = 1 << 18  # characters of documents whose vectors are in memory at a time in predict


class Summarizer(BaseEstimator):
    """Learn to summarize from documents and their summaries.

    Args:
        language: "zh": the metric counts characters and pieces end at Chinese marks; "en": words and English marks;
            "auto": characters if a quarter of the words of the documents are Chinese characters, marks of both. A
            tuple of separators cuts there, and the metric goes by the documents.
        extract_only: True: summaries are extracts. False: the generator always writes them. "auto": it is trained and
            used if it is better than the extract on held-out documents by more than noise, see ``uses_generator_``.
        folds: Number of folds, or a splitter of scikit-learn that leaves each document out once.
        epochs: Passes over the documents of each labeller, at least 10 steps each; the best one is taken.
        random_state: Seed.
        encoder: The vectors of pieces: "hash" (n-grams, place, length; no model), a function from a list of N texts to
            an (N, D) array, or the folder of a BERT checkpoint, which is not trained.
        hidden_size: Width of the convolutions; the 384 of the article are for vectors of BERT.
        batch_size: Documents in a step.
        lr: Learning rate of Adam.
        max_pieces: Pieces of a document that a labeller is trained on: the stretch that has most of the labelled ones.
            (The article takes the last 256, as judgments end with the decision.) ``predict`` reads all.
        trim: Whether to learn which words of the pieces to leave out; it is done if it is better by more than noise.
        generator: A SummaryGenerator with settings of your own; it is copied.
        show_progress: None shows a bar if standard error is a terminal.

    Attributes:
        unit_: What the metric counts, "char" or "word".
        out_of_fold_extracts_: For each document of ``fit`` the pieces, as :func:`kexue.tasks.split_pieces` numbers
            them, chosen by a labeller that never saw it: those with p > 0.2, the likeliest one if there is none.
        uses_generator_: Whether ``predict`` generates.
        scores_: Mean main metric of "extractor", "generator" (if trained), "lead-1", "lead-3" (the first pieces) and
            "text_rank" (the most central piece).
        scored_on_: What ``scores_`` were measured on: "validation", documents that nothing was trained on, or
            "out-of-fold" extracts, on which the two numbers of the selection were chosen.
        length_, threshold_: The selection: wanted length of an extract, in words (characters of Chinese), and least
            probability of a piece beyond the first.
        trims_: Whether words are left out of the extracts.
        epochs_: Epoch that each labeller was taken from.

    Raises:
        TypeError: In ``fit``: documents or summaries that are no list of str, settings of the wrong kind.
        ValueError: In ``fit``: lengths that differ, blank texts, fewer different documents than folds, settings out of
            range.

    Reference:
        https://spaces.ac.cn/archives/8046

    Example:
        >>> documents = [f"Notes of day {i}. The result is {i} points. Thanks to all who came." for i in range(8)]
        >>> summaries = [f"Result: {i} points" for i in range(8)]
        >>> model = Summarizer(extract_only=True, folds=2, epochs=2).fit(documents, summaries)
        >>> len(model.predict(documents[:2])), model.uses_generator_
        (2, False)
    """

    def __init__(
        self,
        language: Any = "auto",
        extract_only: bool | str = "auto",
        folds: Any = 5,
        epochs: int = 20,
        random_state: int = 0,
        *,
        encoder: Any = "hash",
        hidden_size: int = 32,
        batch_size: int = 16,
        lr: float = 3e-3,
        max_pieces: int = 128,
        trim: bool = True,
        generator: Any = None,
        show_progress: bool | None = None,
    ) -> None:
        self.language = language
        self.extract_only = extract_only
        self.folds = folds
        self.epochs = epochs
        self.random_state = random_state
        self.encoder = encoder
        self.hidden_size = hidden_size
        self.batch_size = batch_size
        self.lr = lr
        self.max_pieces = max_pieces
        self.trim = trim
        self.generator = generator
        self.show_progress = show_progress

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.required = True
        tags.input_tags.two_d_array = False
        tags.input_tags.string = True
        return tags

    def fit(
        self,
        documents: Iterable[str],
        summaries: Iterable[str],
        *,
        validation: tuple[Iterable[str], Iterable[str]] | None = None,
        checkpoint: str | os.PathLike[str] | None = None,
    ) -> Self:
        """Learn from pairs.

        Args:
            documents: N texts.
            summaries: Their N summaries.
            validation: Documents and summaries that nothing is trained on, for ``scores_`` and the choice of
                "auto". None: with a generator, 20 % of the pairs (at most 200) are set aside for it, if there are 50.
            checkpoint: Folder in which the run is saved. Called again with the same arguments after a crash or Ctrl-C,
                ``fit`` continues there and ends with the same weights, bit by bit, as an undisturbed run.

        Raises:
            KeyboardInterrupt: Ctrl-C. With a checkpoint everything is saved, see
                :class:`kexue.training.TrainingInterrupted`; the estimator stays as it was before.
        """
        texts, wanted = check_pairs(documents, summaries)
        held_out = None if validation is None else check_validation(validation)
        settings = self._settings()
        encode = PieceEncoder(self.encoder)
        unit, separators = language_of(self.language, texts)
        learned, set_aside = self._split(len(texts), held_out is not None, settings.seed)
        folds = document_folds(self.folds, texts, learned, settings.seed)

        data = Texts(texts, wanted, unit, separators)
        given = Pieces.joined([encode(pieces) for pieces in data.pieces])
        values: list[NDArray[np.float32]] = [np.zeros(0, np.float32)] * len(texts)
        labelers, epochs = [], []
        with _folder(checkpoint) as folder:
            for k, (train, test) in enumerate(folds):
                labeler, epoch = train_labeler(
                    given, data.labels, train, data.measure, settings, folder / f"fold-{k}",
                    f"learning to extract, {k + 1} of {len(folds)}",
                )  # fmt: skip
                labelers.append(labeler)
                epochs.append(epoch)
                part = given.take(test)
                for i, p in zip(test, part.split(probabilities([labeler], part)), strict=True):
                    values[i] = p
            selection, score = tune_selection(values, data, learned, settings.seed)
            trimmer = None
            if self.trim:
                halves = document_folds(2, texts, learned, settings.seed)
                trimmer, score = learn_to_trim(data, values, selection, halves, settings, folder)
            generator = self._train_generator(data, values, learned, folder / "generator")
        if len(set_aside):
            part = given.take(set_aside)
            for i, p in zip(set_aside, part.split(probabilities(labelers, part)), strict=True):
                values[i] = p
        self.unit_, self._separators, self._encode = unit, separators, encode
        self._labelers, self._selection, self._trimmer, self.epochs_ = labelers, selection, trimmer, epochs
        self.trims_ = trimmer is not None
        self.length_, self.threshold_ = selection.length, selection.threshold
        self.out_of_fold_extracts_ = [passing(p, EXTRACTION) for p in values]
        self._generator, self.uses_generator_ = None, False
        if held_out is None and len(set_aside):
            held_out = [texts[i] for i in set_aside], [wanted[i] for i in set_aside]
        self.scores_, self.scored_on_ = self._baselines(*(held_out or (texts, wanted))), "out-of-fold"
        self.scores_["extractor"] = score
        if held_out is not None:
            self.scored_on_ = "validation"
            extracts = scores(self._extracts(held_out[0]), held_out[1], unit)
            self.scores_["extractor"] = float(extracts.mean())
        if generator is not None:
            self._generator = generator
            self.uses_generator_ = True
            if held_out is not None:
                gain = scores(self.predict(held_out[0]), held_out[1], unit) - extracts
                self.scores_["generator"] = float((extracts + gain).mean())
                if self.extract_only == "auto":
                    self.uses_generator_ = beyond_noise(gain)
                    self._generator = generator if self.uses_generator_ else None
        return self

    def _train_generator(
        self, data: Texts, values: list[NDArray[np.float32]], rows: NDArray[np.int64], folder: Path
    ) -> SummaryGenerator | None:
        """The generator, unless it is not wanted or there are too few pairs to try it."""
        if self.extract_only is True or (self.extract_only == "auto" and len(values) < LEAST_PAIRS):
            return None
        generator = SummaryGenerator(random_state=int(self.random_state)) if self.generator is None else self.generator
        sources = [join_pieces([data.pieces[i][j] for j in passing(values[i], EXTRACTION)]) for i in rows]
        oracle = [join_pieces([data.pieces[i][j] for j in np.flatnonzero(data.labels[i])]) for i in rows]
        return clone(generator).fit(
            sources, [data.summaries[i] for i in rows], alternatives=oracle, checkpoint=folder,
            show_progress=self.show_progress,
        )  # fmt: skip

    def _baselines(self, texts: Sequence[str], wanted: Sequence[str]) -> dict[str, float]:
        """What the first pieces and the most central piece score."""
        pieces = [split_pieces(text, self._separators) for text in texts]
        found = {f"lead-{n}": [join_pieces(row[:n]) for row in pieces] for n in (1, 3)}
        found["text_rank"] = [row[int(np.argmax(text_rank(row)))] for row in pieces]
        return {name: float(scores(given, wanted, self.unit_).mean()) for name, given in found.items()}

    def _settings(self) -> Settings:
        for name in ("epochs", "hidden_size", "batch_size", "max_pieces"):
            check_int(name, getattr(self, name), 1)
        check_int("random_state", self.random_state, 0)
        if self.random_state >= 1 << 63:
            raise ValueError(f"random_state must be below 2 ** 63; got {self.random_state}")
        check_real("lr", self.lr, above=0.0)
        if self.extract_only not in ("auto", True, False) or isinstance(self.extract_only, int | float) != isinstance(
            self.extract_only, bool
        ):
            raise ValueError(f"extract_only must be True, False or 'auto'; got {self.extract_only!r}")
        return Settings(
            int(self.epochs), int(self.hidden_size), int(self.batch_size), float(self.lr), int(self.max_pieces),
            int(self.random_state), self.show_progress,
        )  # fmt: skip

    def _split(self, n: int, given: bool, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Pairs to learn from, and pairs set aside to compare extractor and generator."""
        rows = np.arange(n)
        if self.extract_only is True or given or n < LEAST_PAIRS:
            return rows, rows[:0]
        order = np.random.default_rng(seed).permutation(n)
        held = min(n // 5, MOST_SET_ASIDE)
        return np.sort(order[held:]), np.sort(order[:held])

    def predict(self, documents: Iterable[str]) -> list[str]:
        """Summaries of the documents.

        Args:
            documents: Texts; a blank one gets an empty summary.
        """
        check_is_fitted(self, "unit_")
        texts = check_texts("documents", documents)
        if self._generator is not None:
            return self._generator.generate(self._extracts(texts, EXTRACTION))
        return self._extracts(texts)

    def _extracts(self, texts: Sequence[str], threshold: float | None = None) -> list[str]:
        """Extracts as summaries; with a threshold, the pieces above it as the input of the generator."""
        out = [""] * len(texts)
        for rows in self._groups(texts):
            pieces = [split_pieces(texts[i], self._separators) for i in rows]
            given = Pieces.joined([self._encode(row) for row in pieces])
            values = given.split(probabilities(self._labelers, given))
            for i, row, p in zip(rows, pieces, values, strict=True):
                words = [tokens(piece) for piece in row]
                if threshold is not None:
                    out[i] = join_pieces([row[j] for j in passing(p, threshold)])
                elif self._trimmer is not None:
                    out[i] = self._trimmer(row, words, p)
                else:
                    out[i] = join_pieces([row[j] for j in self._selection(p, words)])
        return out

    def _groups(self, texts: Sequence[str]) -> Iterator[list[int]]:
        """Documents with words, some at a time, so that memory does not grow with their number."""
        group: list[int] = []
        size = 0
        for i, text in enumerate(texts):
            if not text.strip():
                continue
            if group and size + len(text) > TOGETHER:
                yield group
                group, size = [], 0
            group.append(i)
            size += len(text)
        if group:
            yield group

    def score(self, documents: Iterable[str], summaries: Iterable[str]) -> float:
        """Mean main metric of the predicted summaries, 0.2 ROUGE-1 + 0.4 ROUGE-2 + 0.4 ROUGE-L in ``unit_``."""
        check_is_fitted(self, "unit_")
        texts, wanted = check_pairs(documents, summaries)
        return float(scores(self.predict(texts), wanted, self.unit_).mean())

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write labellers, selection and generator into a folder, replacing an earlier one in one step.

        A function as encoder is not stored, and :meth:`load` asks for it.

        Raises:
            ValueError: The folder exists and holds something else.
        """
        check_is_fitted(self, "unit_")
        files.save(self, folder)

    @classmethod
    def load(cls, folder: str | os.PathLike[str], encoder: Any = None) -> Self:
        """Read what :meth:`save` wrote.

        Args:
            folder: The folder.
            encoder: The encoder, if it was a function; the folder of a BERT checkpoint, if that has moved.

        Raises:
            ValueError: The folder holds something else, another format version, or weights that do not fit.
        """
        return files.load(cls, folder, encoder)


def check_validation(validation: Any) -> tuple[list[str], list[str]]:
    """Refuse bad validation data before the training, not after it."""
    if not isinstance(validation, tuple | list) or len(validation) != 2:
        raise TypeError(f"validation must be a pair (documents, summaries); got {type(validation).__name__}")
    return check_pairs(validation[0], validation[1], what="validation ")


@contextmanager
def _folder(checkpoint: Any) -> Iterator[Path]:
    if checkpoint is not None:
        Path(checkpoint).mkdir(parents=True, exist_ok=True)
        yield Path(checkpoint)
        return
    with tempfile.TemporaryDirectory(prefix="kexue-summarizer-") as folder:
        yield Path(folder)
