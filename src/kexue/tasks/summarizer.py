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
one. The epoch of a labeller is not chosen on the fold that it extracts. Wherever documents are divided, equal ones stay
together.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, clone
from sklearn.utils.validation import check_is_fitted

from kexue._checks import check_int, check_real
from kexue._files import run_folder
from kexue.tasks import _summary_files as files
from kexue.tasks._piece_features import PieceEncoder
from kexue.tasks._summary_data import (
    Texts,
    beyond_noise,
    check_pairs,
    check_texts,
    document_folds,
    fingerprint,
    language_of,
    number_documents,
    scores,
    set_aside,
)
from kexue.tasks._summary_extractor import Pieces, Settings, passing, probabilities, train_labeler
from kexue.tasks._summary_selection import sampled, tune_selection
from kexue.tasks._text_words import tokens
from kexue.tasks.graph_rank import text_rank
from kexue.tasks.pieces import join_pieces, piece_spans, split_pieces
from kexue.training import TrainingInterrupted

if TYPE_CHECKING:
    from kexue.tasks.summary_generator import SummaryGenerator

__all__ = ["ExplainedPiece", "Summarizer"]

LEAST_PAIRS = 50  # fewer are no training for a generator
MOST_SET_ASIDE = 200
EXTRACTION = 0.2  # threshold of the generator's input
TOGETHER = 1 << 18  # characters of documents whose vectors are in memory at a time in predict


class ExplainedPiece(NamedTuple):
    """A piece of a document in :meth:`Summarizer.explain`.

    Args:
        text: The piece.
        start: Where it begins in the document, in characters.
        stop: Where it ends.
        probability: How likely it belongs into the summary, the mean of the labellers.
        chosen: Whether the summary is made of it.
    """

    text: str
    start: int
    stop: int
    probability: float
    chosen: bool


class Summarizer(BaseEstimator):
    """Learn to summarize from documents and their summaries.

    Args:
        language: "zh": the metric counts characters and pieces end at Chinese marks (at ， and not at the comma of
            ASCII); "en": words and English marks; "auto": characters if a quarter of the words of the documents are
            Chinese characters, marks of both. A tuple of separators cuts there, and the metric goes by the documents.
        extract_only: True: summaries are extracts. False: the generator always writes them. "auto": it is trained and
            used if it is better than the extract on held-out documents by more than noise, see ``uses_generator_``.
        folds: Number of folds, or a splitter of scikit-learn that leaves each document out once, such as a
            PredefinedSplit. The groups that it gets are equal documents, and its classes are all the same.
        epochs: Passes over the documents of each labeller, at least 10 steps each; the best one is taken.
        random_state: Seed.
        encoder: The vectors of pieces: "hash" (n-grams, place, length; no model), a function from a list of N texts to
            an (N, D) array, or the folder of a BERT checkpoint, which is not trained.
        hidden_size: Width of the convolutions; the 384 of the article are for vectors of BERT.
        batch_size: Documents in a step.
        lr: Learning rate of Adam.
        max_pieces: Pieces of a document that a labeller is trained on: the stretch that has most of the labelled ones.
            (The article takes the last 256, as judgments end with the decision.) ``predict`` reads all.
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
            "out-of-fold" extracts (of at most 400 documents), on which the two numbers of the selection were chosen.
        length_, threshold_: The selection: wanted length of an extract, in words (characters of Chinese), and least
            probability of a piece beyond the first.
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

    _generator: SummaryGenerator | None

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
                "auto". None: with a generator, 20 % of the documents (at most 200) are set aside for it, if there are
                50 pairs.
            checkpoint: Folder in which the run is saved. Called again with the same arguments after a crash or Ctrl-C,
                ``fit`` continues there and ends with the same weights, bit by bit, as an undisturbed run.

        Raises:
            KeyboardInterrupt: Ctrl-C. With a checkpoint everything is saved, see
                :class:`kexue.training.TrainingInterrupted`; the estimator stays as it was before.
        """
        texts, wanted = check_pairs(documents, summaries)
        held_out = None if validation is None else check_validation(validation, texts)
        self._check()
        seed = int(self.random_state)
        unit, separators = language_of(self.language, texts)
        same = number_documents(texts)
        learned, aside = self._split(same, held_out is not None, seed)
        folds = document_folds(self.folds, same, learned, seed)
        settings = Settings(
            int(self.epochs), int(self.hidden_size), int(self.batch_size), float(self.lr), int(self.max_pieces), seed,
            self.show_progress, same, fingerprint(texts, wanted, unit, separators),
        )  # fmt: skip

        values: list[NDArray[np.float32]] = [np.zeros(0, np.float32)] * len(texts)
        labelers, epochs = [], []
        encode = PieceEncoder(self.encoder)
        with _folder(checkpoint) as folder:
            data = Texts(texts, wanted, unit, separators)
            given = Pieces.joined([encode(pieces) for pieces in data.pieces])
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
            selection, score = tune_selection(values, data, learned, seed)
            generator = self._train_generator(data, values, learned, folder / "generator")
        if len(aside):
            part = given.take(aside)
            for i, p in zip(aside, part.split(probabilities(labelers, part)), strict=True):
                values[i] = p
            held_out = held_out or ([texts[i] for i in aside], [wanted[i] for i in aside])
        made = copy.copy(self)  # so that whatever happens from here on, this estimator is the old one or the new one
        made.unit_, made._separators, made._encode = unit, separators, encode
        made._labelers, made._selection, made.epochs_ = labelers, selection, epochs
        made.length_, made.threshold_ = selection.length, selection.threshold
        made.out_of_fold_extracts_ = [passing(p, EXTRACTION) for p in values]
        made._generator, made.uses_generator_ = generator, generator is not None
        if held_out is None:
            rows = sampled(learned, seed)
            made.scores_ = made._baselines([texts[i] for i in rows], [wanted[i] for i in rows])
            made.scores_["extractor"], made.scored_on_ = score, "out-of-fold"
        else:
            made._compare(*held_out)
        self.__dict__.update(made.__dict__)
        return self

    def _compare(self, texts: list[str], wanted: list[str]) -> None:
        """Score extracts and generated summaries; keep the generator only if it is wanted or better."""
        self.scores_, self.scored_on_ = self._baselines(texts, wanted), "validation"
        extracts = scores(self._extracts(texts), wanted, self.unit_)
        self.scores_["extractor"] = float(extracts.mean())
        if self._generator is None:
            return
        generated = scores(self.predict(texts), wanted, self.unit_)
        self.scores_["generator"] = float(generated.mean())
        if self._mode == "auto" and not beyond_noise(generated - extracts):
            self._generator, self.uses_generator_ = None, False

    @property
    def _mode(self) -> bool | str:
        """``extract_only`` as "auto" or a bool, also where it is a bool of numpy."""
        return "auto" if isinstance(self.extract_only, str) else bool(self.extract_only)

    def _train_generator(
        self, data: Texts, values: list[NDArray[np.float32]], rows: NDArray[np.int64], folder: Path
    ) -> SummaryGenerator | None:
        """The generator, unless it is not wanted or there are too few pairs to try it."""
        if self._mode is True or (self._mode == "auto" and len(values) < LEAST_PAIRS):
            return None
        generator = self.generator
        if generator is None:
            from kexue.tasks.summary_generator import SummaryGenerator  # imports transformers: seconds

            generator = SummaryGenerator(random_state=int(self.random_state))
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

    def _check(self) -> None:
        """Refuse bad settings before anything is trained."""
        for name in ("epochs", "hidden_size", "batch_size", "max_pieces"):
            check_int(name, getattr(self, name), 1)
        check_int("random_state", self.random_state, 0)
        if self.random_state >= 1 << 63:
            raise ValueError(f"random_state must be below 2 ** 63; got {self.random_state}")
        check_real("lr", self.lr, above=0.0)
        if not isinstance(self.show_progress, bool | None):
            raise TypeError(f"show_progress must be a bool or None; got {self.show_progress!r}")
        if not isinstance(self.extract_only, bool | np.bool_) and not (
            isinstance(self.extract_only, str) and self.extract_only == "auto"
        ):
            raise ValueError(f"extract_only must be True, False or 'auto'; got {self.extract_only!r}")
        if self.generator is not None and not isinstance(self.generator, BaseEstimator):
            raise TypeError(f"generator must be a SummaryGenerator; got {self.generator!r}")
        check = getattr(self.generator, "_check", None)
        if check is not None:
            check()

    def _split(self, same: NDArray[np.int64], given: bool, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Pairs to learn from, and pairs set aside to compare extractor and generator."""
        rows = np.arange(len(same))
        if self._mode is True or given or len(rows) < LEAST_PAIRS:
            return rows, rows[:0]
        return set_aside(rows, same, min((int(same.max()) + 1) // 5, MOST_SET_ASIDE), seed)

    def predict(self, documents: Iterable[str]) -> list[str]:
        """Summaries of the documents.

        Args:
            documents: Texts; a blank one gets an empty summary.
        """
        check_is_fitted(self, "unit_")
        texts = check_texts("documents", documents)
        if self._generator is None:
            return self._extracts(texts)
        sources = [""] * len(texts)
        for i, _, pieces, values in self._read(texts):
            sources[i] = join_pieces([pieces[j] for j in self._chosen(pieces, values)])
        return self._generator.generate(sources)

    def explain(self, documents: Iterable[str]) -> list[list[ExplainedPiece]]:
        """The pieces of the documents: where they stand, how likely they belong into the summary, which are chosen.

        Args:
            documents: Texts.

        Returns:
            For each document its pieces in their order, none for a blank one. The chosen ones are those that
            :meth:`predict` makes the summary of: it joins them, or writes from them if ``uses_generator_``.

        Example:
            >>> documents = [f"Notes of day {i}. The result is {i} points. Thanks to all." for i in range(8)]
            >>> summaries = [f"The result is {i} points." for i in range(8)]
            >>> model = Summarizer(extract_only=True, folds=2).fit(documents, summaries)
            >>> [(piece.text, piece.start, piece.chosen) for piece in model.explain(documents[:1])[0]]
            [('Notes of day 0.', 0, False), ('The result is 0 points.', 16, True), ('Thanks to all.', 40, False)]
        """
        check_is_fitted(self, "unit_")
        texts = check_texts("documents", documents)
        found: list[list[ExplainedPiece]] = [[] for _ in texts]
        for i, spans, pieces, values in self._read(texts):
            chosen = set(self._chosen(pieces, values))
            found[i] = [
                ExplainedPiece(piece, *span, float(p), j in chosen)
                for j, (piece, span, p) in enumerate(zip(pieces, spans, values, strict=True))
            ]
        return found

    def _extracts(self, texts: Sequence[str]) -> list[str]:
        """Summaries without the generator."""
        out = [""] * len(texts)
        for i, _, pieces, values in self._read(texts):
            chosen = self._selection(values, [tokens(piece) for piece in pieces])
            out[i] = join_pieces([pieces[j] for j in chosen])
        return out

    def _chosen(self, pieces: list[str], values: NDArray[np.float32]) -> list[int]:
        """The pieces that a summary is made of."""
        if self._generator is not None:
            return passing(values, EXTRACTION)
        return self._selection(values, [tokens(piece) for piece in pieces])

    def _read(self, texts: Sequence[str]) -> Iterator[tuple[int, list[tuple[int, int]], list[str], NDArray[Any]]]:
        """Number, pieces with their places, and probabilities of each document that is not blank."""
        for rows in self._groups(texts):
            spans = [piece_spans(texts[i], self._separators) for i in rows]
            pieces = [[texts[i][a:b] for a, b in each] for i, each in zip(rows, spans, strict=True)]
            given = Pieces.joined([self._encode(row) for row in pieces])
            values = given.split(probabilities(self._labelers, given))
            yield from zip(rows, spans, pieces, values, strict=True)

    @staticmethod
    def _groups(texts: Sequence[str]) -> Iterator[list[int]]:
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

        A function as encoder is not stored, and :meth:`load` asks for it; of a checkpoint the path is. ``folds``, if it
        is a splitter, and ``generator`` come back as their defaults: they matter for further training only.

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
            ValueError: The folder holds something else, another format version, or weights that do not fit; or the
                encoder gives other vectors than that of the training.
        """
        return files.load(cls, folder, encoder)


def check_validation(validation: Any, documents: Sequence[str]) -> tuple[list[str], list[str]]:
    """Refuse bad validation data before the training, not after it."""
    if not isinstance(validation, tuple | list) or len(validation) != 2:
        raise TypeError(f"validation must be a pair (documents, summaries); got {type(validation).__name__}")
    texts, wanted = check_pairs(validation[0], validation[1], what="validation ")
    number = number_documents([*documents, *texts])
    seen = np.isin(number[len(documents) :], number[: len(documents)])
    if seen.any():
        raise ValueError(
            f"{seen.sum()} of {len(texts)} validation documents are trained on too, the first is number "
            f"{int(seen.argmax())}; leave them out"
        )
    return texts, wanted


@contextmanager
def _folder(checkpoint: Any) -> Iterator[Path]:
    """The folder of the training; an interruption does not point to one that goes away."""
    with run_folder(checkpoint) as folder:
        try:
            yield folder
        except TrainingInterrupted:
            if checkpoint is not None:
                raise
            raise KeyboardInterrupt(
                "training stopped, and nothing of it is kept; with checkpoint=FOLDER it could be continued"
            ) from None
