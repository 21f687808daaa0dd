"""Documents and summaries of :class:`kexue.tasks.Summarizer`: checks, pieces, labels, folds and the metric."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.model_selection import KFold

from kexue._checks import check_choice, check_int
from kexue.tasks._text_words import has_chinese, tokens, word_list
from kexue.tasks.extract_labels import align_extract
from kexue.tasks.pieces import split_pieces
from kexue.tasks.rouge_metric import rouge_corpus

__all__ = ["Texts", "beyond_noise", "check_pairs", "check_texts", "document_folds", "language_of", "scores"]

LANGUAGES = ("auto", "zh", "en")
CHINESE_SHARE = 0.25
NOISE = 2.0  # standard errors
SAMPLED = 100_000  # characters of the documents by which the language is told


def check_texts(name: str, given: Any) -> list[str]:
    """The texts as a list.

    Raises:
        TypeError: A single str, no iterable, or an entry that is no str, with its index.
    """
    if isinstance(given, str | bytes) or not isinstance(given, Iterable):
        raise TypeError(f"{name} must be a list of str; got {type(given).__name__}")
    found = list(given)
    for i, text in enumerate(found):
        if not isinstance(text, str):
            raise TypeError(f"{name} must be a list of str; {name}[{i}] is {text!r} of type {type(text).__name__}")
    return [str(text) for text in found]


def check_pairs(documents: Any, summaries: Any, what: str = "") -> tuple[list[str], list[str]]:
    """Documents and summaries of the same number, none blank, at least one."""
    texts = check_texts(f"{what}documents", documents)
    wanted = check_texts(f"{what}summaries", summaries)
    if len(texts) != len(wanted):
        raise ValueError(f"each document needs a summary; got {len(texts)} {what}documents and {len(wanted)} summaries")
    if not texts:
        raise ValueError(f"at least one pair is needed; got no {what}documents")
    for name, found in (("documents", texts), ("summaries", wanted)):
        for i, text in enumerate(found):
            if not tokens(text):
                raise ValueError(f"{what}{name}[{i}] holds no word; leave the pair out; got {text[:50]!r}")
    return texts, wanted


def language_of(language: Any, documents: Sequence[str]) -> tuple[str, Any]:
    """The unit of the metric ("char" or "word") and the separators of pieces.

    Raises:
        ValueError: An unknown language.
        TypeError: Neither a name nor separators.
    """
    if isinstance(language, str):
        check_choice("language", language, LANGUAGES)
        if language != "auto":
            return ("char" if language == "zh" else "word"), language
        separators: Any = "auto"
    elif isinstance(language, Iterable):
        separators = tuple(language)
        split_pieces("", separators)  # refuses bad ones
    else:
        raise TypeError(f"language must be one of {LANGUAGES} or separators; got {language!r}")
    share = max(1, SAMPLED // max(1, len(documents)))
    words = [word for text in documents for word in tokens(text[:share])]
    chinese = sum(has_chinese(word) for word in words)
    return ("char" if chinese >= CHINESE_SHARE * max(1, len(words)) else "word"), separators


def scores(hypotheses: Sequence[Any], references: Sequence[Any], unit: str) -> NDArray[np.float64]:
    """The main metric of each summary; English words also where a text has a Chinese character in it."""
    if not len(hypotheses):
        return np.zeros(0)
    tokenizer = None if unit == "char" else word_list
    return rouge_corpus(hypotheses, references, "char" if unit == "char" else "word", tokenizer=tokenizer)["main"]


def beyond_noise(gain: NDArray[np.float64]) -> bool:
    """Whether paired differences are above zero by more than two standard errors of their mean.

    Example:
        >>> beyond_noise(np.array([0.1, 0.2, 0.1, 0.2])), beyond_noise(np.array([0.3, -0.3, 0.1]))
        (True, False)
    """
    if len(gain) < 2:
        return False
    return bool(gain.mean() > NOISE * gain.std(ddof=1) / np.sqrt(len(gain)))


class Texts:
    """Documents as pieces with their labels, and the metric of chosen pieces.

    Args:
        documents, summaries: N texts each.
        unit: "char" or "word".
        separators: As in :func:`kexue.tasks.split_pieces`.

    Attributes:
        pieces: Of each document.
        words: Words of each of these.
        labels: Which pieces belong into the summary, a bool array for each document.
        lengths: Words of each summary.
    """

    def __init__(self, documents: Sequence[str], summaries: Sequence[str], unit: str, separators: Any) -> None:
        self.unit, self.summaries = unit, list(summaries)
        self.pieces = [split_pieces(text, separators) for text in documents]
        self.words = [[tokens(piece) for piece in row] for row in self.pieces]
        self.lengths = [len(tokens(text)) for text in summaries]
        self.labels = []
        tokenizer = None if unit == "char" else word_list
        self._parts = self.pieces if unit == "char" else [[word_list(piece) for piece in row] for row in self.pieces]
        self._wanted: list[Any] = self.summaries if unit == "char" else [word_list(text) for text in self.summaries]
        for pieces, summary in zip(self.pieces, summaries, strict=True):
            found = align_extract(pieces, split_pieces(summary, separators), tokenizer=tokenizer)
            labels = np.zeros(len(pieces), np.bool_)
            labels[found] = True
            self.labels.append(labels)

    def measure(self, rows: Sequence[int], chosen: Sequence[Sequence[int]]) -> NDArray[np.float64]:
        """Main metric of the chosen pieces of each of the documents ``rows``."""
        joined: list[Any] = []
        for i, pieces in zip(rows, chosen, strict=True):
            parts: list[Any] = [self._parts[i][j] for j in pieces]
            joined.append("".join(parts) if self.unit == "char" else [word for part in parts for word in part])
        return scores(joined, [self._wanted[i] for i in rows], self.unit)

    def score(self, rows: Sequence[int], texts: Sequence[str]) -> NDArray[np.float64]:
        """Main metric of texts as summaries of the documents ``rows``."""
        return scores(texts, [self.summaries[i] for i in rows], self.unit)


def document_folds(
    folds: Any, documents: Sequence[str], rows: NDArray[np.int64], seed: int
) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """The rows that each fold trains on and those that it leaves out.

    Args:
        folds: Number of folds, or a splitter of scikit-learn.
        documents: All documents; equal ones share a fold if ``folds`` is a number.
        rows: Those that take part.
        seed: Of the order.

    Raises:
        TypeError: Neither an integer nor a splitter.
        ValueError: Fewer than two folds, fewer documents than folds, a splitter that does not leave each document out
            once or leaves nothing to train on.
    """
    if hasattr(folds, "split") and not isinstance(folds, str):
        parts = [(np.asarray(a), np.asarray(b)) for a, b in folds.split(np.zeros((len(rows), 1)))]
        count = np.zeros(len(rows), np.int64)
        for train, test in parts:
            np.add.at(count, test, 1)
            if not len(train) or len(np.intersect1d(train, test)):
                raise ValueError(f"folds must train on other documents than it leaves out; got {train} and {test}")
        if (count != 1).any():
            place = int(np.flatnonzero(count != 1)[0])
            raise ValueError(f"folds must leave each document out once; document {place}: {count[place]} times")
        return [(rows[train], rows[test]) for train, test in parts]
    check_int("folds", folds, 2)
    known: dict[str, int] = {}
    number = np.array([known.setdefault(documents[i], len(known)) for i in rows])
    if len(known) < folds:
        raise ValueError(f"folds={folds} needs at least as many different documents; got {len(known)}")
    splitter = KFold(int(folds), shuffle=True, random_state=seed % (1 << 32))
    left_out = [np.isin(number, test) for _, test in splitter.split(np.zeros((len(known), 1)))]
    return [(rows[~out], rows[out]) for out in left_out]
