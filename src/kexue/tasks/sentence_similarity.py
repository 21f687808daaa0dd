"""Sentence similarity by classification, then retrieval (句子相似度:先分类,后检索).

Source: 科学空间 5743 (基于GRU和AM-Softmax的句子相似度模型).

In use a sentence is compared with all stored ones and answered only above a threshold; training on pairs or triplets
sees too few of the wrong ones. So every group of synonymous sentences becomes a class:

    z = encoder(x) / |encoder(x)|,   c_j = W_j / |W_j|
    L = -log( e^{s psi(<z, c_t>)} / ( e^{s psi(<z, c_t>)} + sum over j != t of e^{s <z, c_j>} ) )

The margin (psi(cos) = cos - m for AM-Softmax) makes the classifier's features good for ranking. After training the
class vectors are thrown away and sentences are ranked by the cosine of their vectors.

What we do differently, and why: padding never reaches the encoder; every step is a function of (seed, step), so that
a killed run continues bit by bit; texts in different compositions of Unicode ("é" as one or two characters) are
the same; the search is exact, in blocks, also about equal scores.
"""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.exceptions import NotFittedError
from sklearn.utils.validation import check_is_fitted

from kexue._checks import check_int, check_real
from kexue._files import run_folder
from kexue.models.char_gru import by_length
from kexue.tasks import _similarity_files as files
from kexue.tasks._cosines import unit_rows
from kexue.tasks._prompts import check_texts
from kexue.tasks._similarity_training import Run
from kexue.tasks._vector_index import VectorIndex
from kexue.tasks.retrieval import number_groups, retrieval_report
from kexue.training import TrainingInterrupted, fit

__all__ = ["SentenceSimilarity"]

_HALF_WIDTH = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | {0x3000: 0x20}
ENCODED = 512  # texts at a time in transform


def fold(text: str) -> str:
    """Full width to half width, lower case, composed characters.

    Example:
        >>> fold("\\uff28ello\\uff0c世界")
        'hello,世界'
    """
    return unicodedata.normalize("NFC", text.translate(_HALF_WIDTH).lower())


class SentenceSimilarity(TransformerMixin, BaseEstimator):
    """Train a sentence encoder on groups of synonymous sentences, and find the stored sentences nearest to a query.

    Args:
        encoder: What maps texts to vectors, see below; it is copied, not changed. None builds a CharGRUEncoder of
            width ``d`` over the characters that occur at least ``min_count`` times.
        kind: Margin of the classifier, as in :class:`kexue.losses.MarginSoftmax`: "am", "softmax", "arc", "a",
            "simpler_a", "combined", "metric".
        scale: s.
        margin: m; None is the usual one of the kind (.35 for "am").
        d: Width of the encoder that is built.
        embedding_dim: Width of its character embeddings.
        maxlen: Characters (or tokens, for a pair) of a text that are read.
        min_count: Characters seen less often are unknown; None: the 5 of the article, of fewer than 10 000 texts less.
        epochs: Passes over the texts; None: the 20 of the article, of few texts more, so that there are 400 steps (at
            most 200 passes). A margin asks for more than plain softmax (25-30 in the article).
        batch_size: Texts of a step.
        lr: Learning rate of Adam.
        sample_rate: Share of the classes in a step (PartialFC), for very many groups; 1 takes all.
        fold_text: Fold width, case and composition of the texts first; False hands them over as they are.
        random_state: Seed.
        show_progress: None shows a bar if standard error is a terminal.

    The encoder is one of

    - a :class:`kexue.models.CharGRUEncoder`;
    - any ``torch.nn.Module`` that maps a list of N texts to an (N, D) tensor with gradients;
    - a pair (tokenizer, model) as in transformers; the states of the model are averaged over the tokens.

    Attributes:
        encoder_: The trained encoder, in eval mode.
        classes_: The groups, in order of first sight; their numbers after :meth:`load`, if they are not str or int.
        losses_: Loss of each step.
        threshold_: Cosine at which F1 on the validation groups is highest; None without validation.
        validation_: The :func:`retrieval_report` of the validation groups; None without.
        texts_, ids_: What :meth:`index` stored.
        recall_: Share of the true neighbours that an approximate index finds; None for the exact one.

    Raises:
        TypeError: In ``fit``: arguments of the wrong kind, texts that are not a list of str, groups that cannot be
            hashed.
        ValueError: In ``fit``: no texts, one group only, lengths that differ, settings out of range.

    Reference:
        https://spaces.ac.cn/archives/5743

    Example:
        >>> texts = ["how old are you", "what is your age", "where do you live", "what is your address"] * 2
        >>> sim = SentenceSimilarity(d=16, embedding_dim=16, min_count=1, epochs=3, random_state=0)
        >>> sim = sim.fit(texts, ["age", "age", "home", "home"] * 2).index(texts[:4])
        >>> sim.query("HOW old are you", k=1)[0][0]
        'how old are you'
    """

    def __init__(
        self,
        encoder: Any = None,
        kind: Any = "am",
        *,
        scale: float = 30.0,
        margin: Any = None,
        d: int = 128,
        embedding_dim: int = 128,
        maxlen: int = 32,
        min_count: int | None = None,
        epochs: int | None = None,
        batch_size: int = 100,
        lr: float = 1e-3,
        sample_rate: float = 1.0,
        fold_text: bool = True,
        random_state: int = 0,
        show_progress: bool | None = None,
    ) -> None:
        self.encoder = encoder
        self.kind = kind
        self.scale = scale
        self.margin = margin
        self.d = d
        self.embedding_dim = embedding_dim
        self.maxlen = maxlen
        self.min_count = min_count
        self.epochs = epochs
        self.batch_size = batch_size
        self.lr = lr
        self.sample_rate = sample_rate
        self.fold_text = fold_text
        self.random_state = random_state
        self.show_progress = show_progress

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.required = True
        tags.input_tags.two_d_array = False
        tags.input_tags.string = True
        return tags

    def fit(
        self,
        texts: Iterable[str],
        groups: Iterable[Hashable],
        *,
        validation: tuple[Iterable[str], Iterable[Hashable]] | None = None,
        checkpoint: str | os.PathLike[str] | None = None,
        checkpoint_every: int = 500,
        on_step: Callable[[dict[str, Any]], bool | None] | None = None,
    ) -> Self:
        """Train the encoder as a classifier over the groups.

        Args:
            texts: N texts.
            groups: N hashable values, at least two different ones; texts with equal values mean the same.
            validation: Texts and groups, best ones that training does not see; they choose ``threshold_``.
            checkpoint: Folder in which the run is saved. Called again with the same arguments after a crash or Ctrl-C,
                ``fit`` continues there and ends with the same weights, bit by bit, as an undisturbed run.
            checkpoint_every: Steps between checkpoints.
            on_step: Called after each step with its metrics (``step``, ``loss``, ``lr``, ``seconds``, ...); returning
                True ends the training.

        Raises:
            KeyboardInterrupt: Ctrl-C. The step is finished first, and the estimator is left usable with the weights of
                that step; a second Ctrl-C stops at once and leaves it as it was before.
        """
        prepared = self._prepared(texts)
        numbers, classes = number_groups(groups, len(prepared))
        if len(classes) < 2:
            raise ValueError(f"fit needs at least two groups; got {len(prepared)} texts in {len(classes)}")
        for name in ("min_count", "epochs", "batch_size"):
            if getattr(self, name) is not None or name == "batch_size":
                check_int(name, getattr(self, name), 1)
        check_real("lr", self.lr, above=0.0)
        check_int("random_state", self.random_state, 0)
        if self.random_state >= 1 << 63:
            raise ValueError(f"random_state must be below 2 ** 63; got {self.random_state}")
        held_out = None if validation is None else _validation(validation)
        run = Run(self, prepared, numbers, len(classes))
        interrupt: TrainingInterrupted | None = None
        with run_folder(checkpoint) as folder:
            try:
                result = fit(
                    run.classifier, run.batch, steps=run.steps, out=folder, save_every=checkpoint_every,
                    seed=int(self.random_state), optimizer=run.optimizer, schedule="constant", clip=None,
                    fingerprint=run.fingerprint, keep=1, on_step=on_step, label="learning sentences",
                    show_progress=self.show_progress,
                )  # fmt: skip
                losses = result.history
            except TrainingInterrupted as error:
                interrupt, losses = error, []
        self._forget_index()
        self.encoder_, self.classes_, self.losses_ = run.encoder.module.eval(), classes, losses
        self._text_encoder, self._width = run.encoder, run.classifier.head.in_features
        self.threshold_, self.validation_ = None, None
        if interrupt is not None:
            if checkpoint is not None:
                raise interrupt
            raise KeyboardInterrupt(
                f"training stopped after step {interrupt.step} of {run.steps}; the estimator holds the weights of that "
                "step. With checkpoint=FOLDER it could be continued"
            )
        if held_out is not None:
            self.validation_ = self.evaluate(*held_out)
            self.threshold_ = self.validation_["best_threshold"]
        return self

    def _prepared(self, texts: Any) -> list[str]:
        found = check_texts("texts", texts)
        if not isinstance(self.fold_text, bool | np.bool_):
            raise TypeError(f"fold_text must be a bool; got {self.fold_text!r}")
        return [fold(text) for text in found] if self.fold_text else found

    def transform(self, texts: Iterable[str]) -> NDArray[np.float32]:
        """Vectors of the texts.

        Args:
            texts: N texts.

        Returns:
            (N, D) float32, rows of length 1 (of 0 only if the encoder itself gives a row of zeros).
        """
        check_is_fitted(self, "encoder_")
        prepared = self._prepared(texts)
        # each distinct text once: in another batch its vector might be rounded differently, and a tie be none
        numbers: dict[str, int] = {}
        which = np.array([numbers.setdefault(text, len(numbers)) for text in prepared], np.int64)
        out = np.empty((len(numbers), self._width), np.float32)
        lengths, vectors = self._text_encoder.prepare(list(numbers))
        with torch.no_grad():
            for rows in by_length(lengths, ENCODED):
                out[rows] = vectors(rows).float().cpu().numpy()
        finite = np.asarray(np.isfinite(out).all(axis=1))[which]
        if not finite.all():
            place = int(np.flatnonzero(~finite)[0])
            raise ValueError(f"the encoder gives a vector that is not finite for text {place}")
        return unit_rows(out)[which]

    def index(
        self, texts: Iterable[str], ids: Iterable[str | int] | None = None, *, approximate: bool | None = None
    ) -> Self:
        """Store texts for :meth:`query`; what was stored before is dropped.

        Args:
            texts: N texts.
            ids: A str or int for each, see :meth:`search`; None numbers them from 0.
            approximate: None searches exactly up to 100 000 texts, and above through a usearch graph if usearch (extra
                ``index``) is installed; True and False force one of the two. A graph's recall is measured: ``recall_``.
        """
        found = check_texts("texts", texts)
        numbers = list(range(len(found))) if ids is None else _check_ids(ids, len(found))
        self._store(found, numbers, VectorIndex(self.transform(found), approximate))
        return self

    def _store(self, texts: list[str], ids: list[Any], vectors: VectorIndex) -> None:
        self.texts_, self.ids_, self._index, self.recall_ = texts, ids, vectors, vectors.recall

    def _forget_index(self) -> None:
        for name in ("texts_", "ids_", "_index", "recall_"):
            self.__dict__.pop(name, None)

    def search(
        self, texts: Iterable[str], k: int = 10, threshold: float | None = None
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """The k stored texts nearest to each text, by number.

        Args:
            texts: Q texts.
            k: Answers to each.
            threshold: Lowest cosine of an answer; None gives all k.

        Returns:
            Positions in ``texts_`` and ``ids_``, (Q, min(k, N)), and cosines; highest first, of equal ones the lower
            position first. -1 and -inf stand where fewer answers reach the threshold.

        Raises:
            NotFittedError: Nothing is stored yet.
        """
        check_is_fitted(self, "encoder_")
        if not hasattr(self, "_index"):
            raise NotFittedError("nothing is stored yet; call index(texts) first")
        check_int("k", k, 1)
        if threshold is not None:
            check_real("threshold", threshold)
        return self._index.search(self.transform(texts), int(k), threshold)

    def query(self, text: str, k: int = 10, threshold: float | None = None) -> list[tuple[str, float]]:
        """The stored texts nearest to ``text`` and their cosines, nearest first; see :meth:`search`."""
        if not isinstance(text, str):
            raise TypeError(f"text must be a str; got {type(text).__name__}; query_many takes several")
        return self.query_many([text], k, threshold)[0]

    def query_many(
        self, texts: Iterable[str], k: int = 10, threshold: float | None = None
    ) -> list[list[tuple[str, float]]]:
        """:meth:`query` for several texts at once."""
        positions, scores = self.search(texts, k, threshold)
        return [
            [(self.texts_[p], float(s)) for p, s in zip(row, values, strict=True) if p >= 0]
            for row, values in zip(positions.tolist(), scores, strict=True)
        ]

    def evaluate(
        self, texts: Iterable[str], groups: Iterable[Hashable], ks: Sequence[int] = (1, 5, 10)
    ) -> dict[str, Any]:
        """:func:`kexue.tasks.retrieval_report` of the texts; use groups that training has not seen."""
        return retrieval_report(self.transform(texts), groups, ks)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write encoder, settings and stored texts into a folder, replacing an earlier one in one step.

        A CharGRUEncoder is stored whole; of another encoder the weights are, and :meth:`load` asks for the encoder.

        Raises:
            ValueError: The folder exists and holds something else.
        """
        check_is_fitted(self, "encoder_")
        files.save(self, folder)

    @classmethod
    def load(cls, folder: str | os.PathLike[str], encoder: Any = None) -> Self:
        """Read what :meth:`save` wrote; the encoder is the trained one, which :meth:`fit` would train further.

        Args:
            folder: The folder.
            encoder: An encoder of the same kind and shape, if it is not a CharGRUEncoder; it is copied.

        Raises:
            ValueError: The folder holds something else, another format version, or weights that do not fit.
        """
        return files.load(cls, folder, encoder)


def _validation(validation: Any) -> tuple[list[str], list[Hashable]]:
    """Refuse bad validation data before the training, not after it."""
    if not isinstance(validation, tuple | list) or len(validation) != 2:
        raise TypeError(f"validation must be a pair (texts, groups); got {type(validation).__name__}")
    texts = check_texts("validation texts", validation[0])
    numbers, classes = number_groups(validation[1], len(texts))
    if not len(texts) or np.bincount(numbers).max() < 2:
        raise ValueError(f"no validation group has two texts; got {len(texts)} texts in {len(classes)} groups")
    return texts, [classes[i] for i in numbers]


def _check_ids(ids: Any, n: int) -> list[str | int]:
    if isinstance(ids, str | bytes) or not hasattr(ids, "__iter__"):
        raise TypeError(f"ids must be one str or int for each text; got {ids!r} of type {type(ids).__name__}")
    found = ids.tolist() if hasattr(ids, "tolist") else [int(x) if isinstance(x, np.integer) else x for x in ids]
    if len(found) != n:
        raise ValueError(f"ids must have one entry for each of the {n} texts; got {len(found)}")
    for place, value in enumerate(found):
        if isinstance(value, bool) or not isinstance(value, str | int):
            raise TypeError(f"ids must be str or int; entry {place} is {value!r} of type {type(value).__name__}")
    return found
