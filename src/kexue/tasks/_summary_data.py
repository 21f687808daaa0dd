"""Documents and summaries of :class:`kexue.tasks.Summarizer`: checks, pieces, labels, folds and the metric."""

from __future__ import annotations

import hashlib
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.model_selection import KFold

from kexue._checks import check_choice, check_int
from kexue.tasks._text_words import has_chinese, tokens, word_list
from kexue.tasks.extract_labels import align_extract
from kexue.tasks.pieces import split_pieces
from kexue.tasks.rouge_metric import rouge_corpus

__all__ = [
    "Texts", "beyond_noise", "check_pairs", "check_texts", "document_folds", "fingerprint", "language_of",
    "number_documents", "scores", "set_aside",
]  # fmt: skip

LANGUAGES = ("auto", "zh", "en")
CHINESE_SHARE = 0.25
NOISE = 2.0  # standard errors
SAMPLED = 100_000  # characters of the documents by which the language is told
_SURROGATE = re.compile("[\ud800-\udfff]")


def check_texts(name: str, given: Any) -> list[str]:
    """The texts as a list; half a surrogate pair, which no file can hold, becomes the replacement character.

    Raises:
        TypeError: A single str, no iterable, or an entry that is no str, with its index.
    """
    if isinstance(given, str | bytes | Mapping) or not isinstance(given, Iterable) or getattr(given, "ndim", 1) == 0:
        raise TypeError(f"{name} must be a list of str; got {type(given).__name__}")
    found = list(given)
    for i, text in enumerate(found):
        if not isinstance(text, str):
            raise TypeError(f"{name} must be a list of str; {name}[{i}] is {text!r} of type {type(text).__name__}")
    return [_SURROGATE.sub("\ufffd", str(text)) for text in found]


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


def number_documents(documents: Iterable[str]) -> NDArray[np.int64]:
    """A number for each document, the same for documents that differ in white space only.

    Example:
        >>> number_documents(["a b", "c", "a  b\\n"]).tolist()
        [0, 1, 0]
    """
    known: dict[str, int] = {}
    return np.array([known.setdefault(" ".join(text.split()), len(known)) for text in documents], np.int64)


def fingerprint(documents: Sequence[str], summaries: Sequence[str], *settings: Any) -> str:
    """Identifies pairs and settings, so that no run is continued with others."""
    digest = hashlib.sha256(repr((len(documents), *settings)).encode())
    for text in (*documents, *summaries):
        data = text.encode()
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()


def set_aside(
    rows: NDArray[np.int64], same: NDArray[np.int64], count: int, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The rows that stay and those set aside, at random; equal documents stay together.

    Args:
        rows: Row numbers, ascending.
        same: Of all rows the number of the document, see :func:`number_documents`.
        count: How many different documents are set aside.
        seed: For the choice.
    """
    names, number = np.unique(same[rows], return_inverse=True)
    order = np.random.default_rng(seed).permutation(len(names))
    out = np.isin(number, order[:count])
    return rows[~out], rows[out]


def document_folds(
    folds: Any, same: NDArray[np.int64], rows: NDArray[np.int64], seed: int
) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """The rows that each fold trains on and those that it leaves out.

    Args:
        folds: Number of folds, or a splitter of scikit-learn, which is asked for the folds of all rows. If it takes
            groups, these are equal documents; otherwise a fold does not train on what equals one that it leaves out.
        same: Of all rows the number of the document, see :func:`number_documents`.
        rows: Those that take part.
        seed: Of the order.

    Raises:
        TypeError: Neither an integer nor a splitter.
        ValueError: Fewer than two folds, fewer documents than folds, a splitter that does not leave each document out
            once or leaves nothing to train on.
    """
    if hasattr(folds, "split") and not isinstance(folds, str | type):
        return _folds_of(folds, same, rows)
    check_int("folds", folds, 2)
    names, number = np.unique(same[rows], return_inverse=True)
    if len(names) < folds:
        raise ValueError(f"folds={folds} needs at least as many different documents; got {len(names)}")
    splitter = KFold(int(folds), shuffle=True, random_state=seed % (1 << 32))
    left_out = [np.isin(number, test) for _, test in splitter.split(np.zeros((len(names), 1)))]
    return [(rows[~out], rows[out]) for out in left_out]


def _folds_of(
    splitter: Any, same: NDArray[np.int64], rows: NDArray[np.int64]
) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    n = len(same)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The groups parameter is ignored")
        parts = list(splitter.split(np.zeros((n, 1)), np.zeros(n), same))
    count = np.zeros(n, np.int64)
    found = []
    for part in parts:
        train, test = (_row_numbers(x, n) for x in part)
        np.add.at(count, test, 1)
        if len(np.intersect1d(train, test)):
            raise ValueError(f"folds must train on other documents than it leaves out; got {train} and {test}")
        train, test = np.intersect1d(train, rows), np.intersect1d(test, rows)
        train = train[~np.isin(same[train], same[test])]
        if len(test):
            found.append((train, test))
            if not len(train):
                raise ValueError(f"folds must train on documents other than {test}; nothing is left")
    if (count != 1).any():
        place = int(np.flatnonzero(count != 1)[0])
        raise ValueError(f"folds must leave each document out once; document {place}: {count[place]} times")
    return found


def _row_numbers(given: Any, n: int) -> NDArray[np.int64]:
    found = np.asarray(given)
    if found.dtype != bool and len(found) and (found.dtype.kind not in "iu" or found.min() < 0 or found.max() >= n):
        raise ValueError(f"folds must number the {n} documents from 0; got {found}")
    return np.flatnonzero(found) if found.dtype == bool else found.astype(np.int64)
