"""Co-occurrence counts — 共现计数 — for PMI word vectors (科学空间 article 4671).

    X_ij = sum over pairs of places in one document, 1 <= |distance| <= window, that hold words i and j of w(distance)

with w = 1/distance ("harmonic") or 1 ("flat"). Differences from GloVe's ``cooccur``: the counts are exact integers in
units of 1/lcm(1..window), so that any split of a corpus and any order of merging gives the same bits; rows are
accumulated from an inverted index instead of hashing, sorting and shuffling pairs on disk; pairs of a word with itself
are left out, as the article's model needs it. Words outside the vocabulary leave before the windows are laid, as in
GloVe.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import sparse
from sklearn.base import BaseEstimator
from sklearn.exceptions import NotFittedError

from kexue._checks import check_choice, check_int
from kexue._progress import progress
from kexue.words import _count
from kexue.words._text import Encoded, Tokenize, check_encodable, encode

__all__ = ["CooccurrenceCounter"]

_CHUNK = 1 << 22  # ids that are converted at a time


class CooccurrenceCounter(BaseEstimator):
    """Count how often words stand near each other, exactly.

    Memory: 12 bytes per unordered pair that occurs, plus 12 bytes per token while counting.

    Args:
        window: Words to each side, at least 1. Windows end at the document.
        min_count: Rarer words are dropped before windowing (GloVe's default 5). Not applied to a given vocabulary.
        weighting: "harmonic" counts a pair at distance d as 1/d, "flat" as 1.
        n_jobs: Threads for the pair counts; the result is the same for every number.
        tokenize: Callable str -> list of str for texts and files; None splits at white space like ``str.split()``.
        vocabulary: Count these words only: a list of distinct words (ids in this order), or a mapping word -> count as
            of :meth:`count_words` (``min_count`` applies, ids by count). Give all shards the same one to merge them.
        progress: Whether to show a progress bar; None shows it on a terminal.

    Attributes:
        vocabulary_: (V,) list of words, by descending count, ties alphabetical (or in the given order).
        counts_: (V,) int64, occurrences of each word.
        unit_: A count of 1 is this many units: lcm(1..window) or 1.
        n_documents_: Documents read, empty ones included.
        n_tokens_: Words read that are in the vocabulary.

    Raises:
        ValueError: A parameter is out of range, or in :meth:`fit` nothing is left to count.
        TypeError: A parameter has the wrong type.

    Example:
        >>> X = CooccurrenceCounter(window=2, min_count=1).fit(["a b c", "b a"])
        >>> X.vocabulary_, X.counts_.tolist(), X.unit_
        (['a', 'b', 'c'], [2, 2, 1], 2)
        >>> X.matrix_.toarray().tolist()                 # in half counts: a and c stand 2 apart
        [[0, 4, 1], [4, 0, 2], [1, 2, 0]]
    """

    def __init__(
        self,
        window: int = 10,
        min_count: int = 5,
        weighting: str = "harmonic",
        n_jobs: int = 1,
        tokenize: Tokenize | None = None,
        vocabulary: Sequence[str] | Mapping[str, int] | None = None,
        progress: bool | None = None,
    ) -> None:
        self.window = window
        self.min_count = min_count
        self.weighting = weighting
        self.n_jobs = n_jobs
        self.tokenize = tokenize
        self.vocabulary = vocabulary
        self.progress = progress
        self._check()

    def _check(self) -> npt.NDArray[np.int64]:
        check_int("window", self.window, 1)
        check_int("min_count", self.min_count, 1)
        check_choice("weighting", self.weighting, ("harmonic", "flat"))
        check_int("n_jobs", self.n_jobs, 1)
        if self.tokenize is not None and not callable(self.tokenize):
            raise TypeError(f"tokenize must be callable or None; got {self.tokenize!r}")
        weights, unit = _count.window_weights(int(self.window), self.weighting)
        self._unit = unit
        return weights

    def fit(self, X: Any, y: Any = None) -> CooccurrenceCounter:
        """Count a corpus.

        Args:
            X: Texts (iterable of str, one document each), a ``pathlib.Path`` or several (files, one document a line),
                or tokenised documents (iterable of lists of str; empty strings are skipped). Read once: generators
                will do.
            y: Ignored.

        Returns:
            self.

        Raises:
            TypeError: A single string, or items that are not all of one of these types.
            ValueError: A file is not UTF-8 (names file, line, byte offset); or no word reaches ``min_count``.
        """
        weights = self._check()
        with progress("reading words", enabled=self.progress) as bar:
            corpus = encode(X, self.tokenize, bar)
        given = self._given_vocabulary()
        if given is None:
            counts = np.bincount(corpus.ids, minlength=len(corpus.words))
            words, order = self._select(corpus.words, counts.tolist())
            if not words:
                raise ValueError(
                    f"no word occurs min_count={self.min_count} times: the corpus has {len(corpus.ids)} words, "
                    f"{len(corpus.words)} different ones"
                )
            ids = np.full(len(corpus.words), -1, np.int32)
            ids[order] = np.arange(len(words), dtype=np.int32)
        else:
            words = given
            number = {word: k for k, word in enumerate(words)}
            ids = np.array([number.get(word, -1) for word in corpus.words], np.int32)
        if not len(ids):
            ids = np.full(1, -1, np.int32)
        return self._fit(corpus, ids, words, weights)

    def fit_ids(self, ids: Any, offsets: Any, vocabulary: Sequence[str]) -> CooccurrenceCounter:
        """Count a corpus that is already numbered, for example a memory-mapped one.

        Args:
            ids: (T,) integers, word numbers of all documents one after the other. Numbers below 0 or from V on are
                dropped before windowing. The input is copied once (as int32).
            offsets: (documents + 1,) integers from 0 to T, not descending: document d is
                ``ids[offsets[d]:offsets[d+1]]``.
            vocabulary: (V,) distinct words; ``min_count`` is not applied, ids stay as they are.

        Returns:
            self.

        Raises:
            ValueError: Offsets that do not fit, or an empty vocabulary or one with duplicates.
            TypeError: Ids or offsets that are not integers.

        Example:
            >>> import numpy as np
            >>> X = CooccurrenceCounter(window=1).fit_ids(np.array([0, 1, -1, 0]), np.array([0, 4]), ["x", "y"])
            >>> X.counts_.tolist(), int(X.matrix_[0, 1])   # the dropped word leaves no gap
            ([2, 1], 2)
        """
        weights = self._check()
        words = distinct_words(vocabulary)
        ids = ids if isinstance(ids, np.ndarray) else np.asarray(ids)
        bounds = np.asarray(offsets)
        for name, values in (("ids", ids), ("offsets", bounds)):
            if values.ndim != 1 or (values.size and values.dtype.kind not in "iu"):
                raise TypeError(f"{name} must be a 1-d array of integers; got {values.dtype} of shape {values.shape}")
        bounds = bounds.astype(np.int64)
        if not len(bounds) or bounds[0] != 0 or bounds[-1] != len(ids) or (np.diff(bounds) < 0).any():
            raise ValueError(
                f"offsets must start at 0, never descend and end at len(ids) = {len(ids)}; "
                f"got {bounds[:3].tolist()}...{bounds[-3:].tolist()}"
            )
        return self._fit(Encoded(ids, bounds, words), np.empty(0, np.int32), words, weights)

    @classmethod
    def from_counts(cls, lower: Any, vocabulary: Sequence[str], counts: Any, **settings: Any) -> CooccurrenceCounter:
        """A fitted counter from what another one has counted, such as stored arrays.

        Args:
            lower: (V, V) sparse, its :attr:`lower_`: the strictly lower triangle in units of 1/``unit_``.
            vocabulary: (V,) its words.
            counts: (V,) occurrences of each.
            **settings: Its parameters, ``window`` and ``weighting`` above all.

        Raises:
            ValueError: Sizes that do not fit each other.

        Example:
            >>> X = CooccurrenceCounter(window=2, min_count=1).fit(["a b c", "b a"])
            >>> Y = CooccurrenceCounter.from_counts(X.lower_, X.vocabulary_, X.counts_, window=2)
            >>> bool((Y.matrix_ != X.matrix_).nnz == 0), Y.n_tokens_
            (True, 5)
        """
        counter = cls(**settings)
        words, occurrences = distinct_words(vocabulary), np.asarray(counts, np.int64)
        size = len(words)
        if lower.shape != (size, size) or occurrences.shape != (size,):
            raise ValueError(
                f"expected pairs of shape {(size, size)} and counts of shape {(size,)} for {size} words; "
                f"got {lower.shape} and {occurrences.shape}"
            )
        counter._lower, counter.vocabulary_, counter.counts_ = lower, words, occurrences
        counter.unit_, counter.n_tokens_, counter.n_documents_ = counter._unit, int(occurrences.sum()), 0
        counter._ordered = True
        return counter

    def count_words(self, X: Any) -> Counter[str]:
        """First pass over a sharded corpus: how often each word occurs.

        The sum of the shards' counters is the ``vocabulary`` of the second pass.

        Args:
            X: As for :meth:`fit`.

        Returns:
            Mapping word -> occurrences.

        Example:
            >>> counter = CooccurrenceCounter(min_count=1)
            >>> words = counter.count_words(["a b"]) + counter.count_words(["b c"])
            >>> shards = [CooccurrenceCounter(min_count=1, vocabulary=words).fit([text]) for text in ("a b", "b c")]
            >>> shards[0].merge(shards[1]).counts_.tolist()
            [2, 1, 1]
        """
        with progress("reading words", enabled=self.progress) as bar:
            corpus = encode(X, self.tokenize, bar)
        counts = np.bincount(corpus.ids, minlength=len(corpus.words)).tolist()
        return Counter(dict(zip(corpus.words, counts, strict=True)))

    def merge(self, other: CooccurrenceCounter) -> CooccurrenceCounter:
        """The counts of both corpora together; exact, in any order and grouping.

        Args:
            other: Fitted with the same window, weighting and min_count, and with the same vocabulary. Where the
                vocabulary was given, its order must agree too; where it was found, ids are renumbered by the new
                counts.

        Returns:
            A new fitted counter.

        Raises:
            ValueError: Settings or vocabularies differ (shards that dropped different words cannot be added).
            TypeError: ``other`` is not a CooccurrenceCounter.
        """
        if not isinstance(other, CooccurrenceCounter):
            raise TypeError(f"expected a CooccurrenceCounter; got {type(other).__name__}")
        self._fitted()
        other._fitted()
        for name in ("window", "weighting", "min_count"):
            if getattr(self, name) != getattr(other, name):
                raise ValueError(
                    f"cannot merge counts with different {name}: {getattr(self, name)!r} and {getattr(other, name)!r}"
                )
        if self._ordered != other._ordered:
            raise ValueError("cannot merge counts with a given vocabulary and counts with one that was found")
        right = other._lower
        right_counts = other.counts_
        if self.vocabulary_ != other.vocabulary_:
            only = sorted(set(self.vocabulary_) ^ set(other.vocabulary_))
            if only or self._ordered:
                detail = f"{len(only)} words are in one only, such as {only[0]!r}" if only else "the order differs"
                raise ValueError(f"cannot merge counts with different vocabularies: {detail}; give both `vocabulary=`")
            place = {word: k for k, word in enumerate(other.vocabulary_)}
            order = np.array([place[word] for word in self.vocabulary_])
            right, right_counts = _renumbered(right, order), right_counts[order]
        _count.check_range(self.n_tokens_ + other.n_tokens_, _count.window_weights(self.window, self.weighting)[0])
        merged = copy.copy(self)
        merged.n_documents_ = self.n_documents_ + other.n_documents_
        merged.n_tokens_ = self.n_tokens_ + other.n_tokens_
        merged.vocabulary_, merged.counts_ = list(self.vocabulary_), self.counts_ + right_counts
        merged._lower = _canonical(self._lower + right)
        if not self._ordered:
            ranks = _by_count(merged.vocabulary_, merged.counts_.tolist())
            merged._lower = _renumbered(merged._lower, np.array(ranks))
            merged.vocabulary_ = [merged.vocabulary_[k] for k in ranks]
            merged.counts_ = merged.counts_[ranks]
        return merged

    @property
    def matrix_(self) -> sparse.csr_matrix:
        """(V, V) symmetric int64 counts in units of 1/``unit_``, empty diagonal; built at each access (24 B a pair)."""
        self._fitted()
        return _canonical(self._lower + self._lower.T.tocsr())

    @property
    def lower_(self) -> sparse.csr_matrix:
        """(V, V) the strictly lower triangle of :attr:`matrix_`, as it is stored (12 B a pair)."""
        self._fitted()
        return self._lower

    def _fitted(self) -> None:
        if not hasattr(self, "_lower"):
            raise NotFittedError("this CooccurrenceCounter has not been fitted; call fit(corpus) first")

    def _given_vocabulary(self) -> list[str] | None:
        if self.vocabulary is None:
            return None
        if isinstance(self.vocabulary, Mapping):
            words, _ = self._select(list(self.vocabulary), list(self.vocabulary.values()))
            return distinct_words(words)
        return distinct_words(self.vocabulary)

    def _select(self, words: list[str], counts: list[int]) -> tuple[list[str], list[int]]:
        order = [k for k in _by_count(words, counts) if counts[k] >= self.min_count]
        return [words[k] for k in order], order

    def _fit(
        self, corpus: Encoded, ids: npt.NDArray[np.int32], words: list[str], weights: npt.NDArray[np.int64]
    ) -> CooccurrenceCounter:
        size = len(words)
        counts = np.zeros(size, np.int64)
        documents = len(corpus.offsets) - 1
        tokens = np.empty(len(corpus.ids) + documents + 2, np.int32)
        tokens[0] = -1
        document, filled = 0, 1
        for start in range(0, len(corpus.ids), _CHUNK):
            chunk = _as_int32(corpus.ids[start : start + _CHUNK])
            document, filled = _count.fill(chunk, start, corpus.offsets, document, ids, size, tokens, filled, counts)
        tokens[filled] = -1
        tokens = tokens[: filled + 1]
        total = int(counts.sum())
        _count.check_range(total, weights)
        corpus.ids = np.empty(0, np.int32)  # frees our own copy; a caller's array is merely let go
        with progress("counting pairs", total=size, enabled=self.progress) as bar:
            indptr, columns, values = _count.count_pairs(tokens, counts, weights, int(self.n_jobs), bar.advance)
        self.vocabulary_ = words
        self.counts_ = counts
        self.unit_ = self._unit
        self.n_documents_ = documents
        self.n_tokens_ = total
        self._ordered = self.vocabulary is not None or not len(ids)
        self._lower = _csr(values, columns, indptr)
        return self


def _by_count(words: Sequence[str], counts: Sequence[int]) -> list[int]:
    return sorted(range(len(words)), key=lambda k: (-counts[k], words[k]))


def distinct_words(words: Iterable[Any]) -> list[str]:
    """A vocabulary as a list; ValueError if it is empty or repeats a word, TypeError if an item is not a str."""
    if isinstance(words, str):
        raise TypeError("vocabulary must be a sequence of words; got a single str")
    found = list(words)
    seen: set[str] = set()
    for place, word in enumerate(found):
        if not isinstance(word, str):
            raise TypeError(f"vocabulary[{place}] must be a str; got {word!r} of type {type(word).__name__}")
        if word in seen:
            raise ValueError(f"vocabulary must not repeat words; {word!r} occurs again at position {place}")
        seen.add(word)
    if not found:
        raise ValueError("the vocabulary is empty; expected at least one word")
    check_encodable(found)
    return found


def _as_int32(chunk: npt.NDArray[Any]) -> npt.NDArray[np.int32]:
    """A copy as int32; what does not fit can be no word number and becomes -1."""
    if chunk.dtype.itemsize > 4 or chunk.dtype == np.uint32:
        return np.where((chunk >= 0) & (chunk < 1 << 31), chunk, -1).astype(np.int32)
    return np.array(chunk, np.int32)


def _csr(
    values: npt.NDArray[np.int64], columns: npt.NDArray[np.int32], indptr: npt.NDArray[np.int64]
) -> sparse.csr_matrix:
    size = len(indptr) - 1
    if indptr[-1] < 1 << 31:  # scipy wants equal index types and would otherwise widen the columns
        indptr = indptr.astype(np.int32)
    matrix = sparse.csr_matrix((size, size), dtype=np.int64)
    matrix.data, matrix.indices, matrix.indptr = values, columns, indptr
    matrix.has_sorted_indices = matrix.has_canonical_format = True
    return matrix


def _canonical(matrix: Any) -> sparse.csr_matrix:
    result = sparse.csr_matrix(matrix)
    result.sort_indices()
    return result


def _renumbered(lower: sparse.csr_matrix, order: npt.NDArray[np.int64]) -> sparse.csr_matrix:
    """The triangle after word ``order[k]`` became word k."""
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order))
    pairs = lower.tocoo()
    first, second = rank[pairs.row], rank[pairs.col]
    place = (np.maximum(first, second), np.minimum(first, second))
    return _canonical(sparse.csr_matrix((pairs.data, place), shape=lower.shape))
