"""Co-occurrence counts — 共现计数 — for PMI word vectors (科学空间 article 4671).

    X_ij = sum over pairs of places in one document, 1 <= |distance| <= window, that hold words i and j of w(distance)

with w = 1/distance ("harmonic") or 1 ("flat"). Differences from GloVe's ``cooccur``: the counts are exact integers in
units of 1/lcm(1..window), so that any split of a corpus and any order of merging gives the same bits; rows are
accumulated from an inverted index instead of hashing, sorting and shuffling pairs; pairs of a word with itself are left
out, as the article's model needs it. Words outside the vocabulary leave before the windows are laid, as in GloVe. What
outgrows the memory budget goes to disk as sorted runs (`_windows`, `_spill`), and shards can be counted by processes, a
Ray cluster or any executor (`_jobs`), always to the same bits.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import sparse
from sklearn.base import BaseEstimator, clone
from sklearn.exceptions import NotFittedError

from kexue._checks import check_choice, check_int
from kexue._files import replaced_folder
from kexue._progress import Bar, progress
from kexue.words import _count
from kexue.words._executors import Executor
from kexue.words._jobs import Job, check_counting, identity
from kexue.words._merge import write_batches
from kexue.words._reading import count_words, read_here, read_shards, word_totals
from kexue.words._runs import parse_memory
from kexue.words._shards import in_mb, total_size
from kexue.words._spill import group_rows
from kexue.words._text import Encoded, Tokenize, classify
from kexue.words._triangle import (
    canonical,
    csr,
    ranks,
    read_triangle,
    renumbered,
    triangle,
    triangle_batches,
    write_triangle,
)
from kexue.words._vocabulary import by_count, distinct_words
from kexue.words._windows import pairs_of_parts, pairs_of_tokens, token_stream

__all__ = ["CooccurrenceCounter"]

_FORMAT, _VERSION = "kexue.cooccurrence", 1


class CooccurrenceCounter(BaseEstimator):
    """Count how often words stand near each other, exactly.

    Memory: at most about ``memory`` while counting; 12 bytes per unordered pair that occurs and 12 per token, when that
    fits, else both lie on disk (in the folder for temporary files, or in ``folder``) and pairs are read from there. The
    distinct words always have to fit, and with ``tokenize`` the longest line.

    Args:
        window: Words to each side, at least 1. Windows end at the document.
        min_count: Rarer words are dropped before windowing (GloVe's default 5). Not applied to a given vocabulary.
        weighting: "harmonic" counts a pair at distance d as 1/d, "flat" as 1.
        n_jobs: Threads, or processes; the result is the same for every number.
        tokenize: Callable str -> list of str for texts and files; None splits at white space like ``str.split()``.
        vocabulary: Count these words only: a list of distinct words (ids in this order), or a mapping word -> count as
            of :meth:`count_words` (``min_count`` applies, ids by count). Give all shards the same one to merge them.
        progress: Whether to show a progress bar; None shows it on a terminal.
        memory: Budget for counting, bytes or text such as "2GB", shared by all workers.
        executor: None counts in this process; "processes" in ``n_jobs`` processes; "ray" on the Ray cluster that is
            running or that RAY_ADDRESS names, else on a local one (extra ``ray``); or any object with
            ``submit(function, *arguments)`` that returns futures, or with ``apply_async``. Workers on other machines
            must see the files and ``folder``; ``tokenize`` must be picklable.
        folder: Where :meth:`fit` keeps what it has counted. If it is killed, the same call goes on from there; after
            it has finished, the same call (same settings and texts) reads the result. One folder for one count.
        on_error: "raise" stops at a file that cannot be read or is not UTF-8 (what was counted stays in ``folder``);
            "skip" leaves such files out and lists them in ``skipped_``.

    Attributes:
        vocabulary_: (V,) list of words, by descending count, ties alphabetical (or in the given order).
        counts_: (V,) int64, occurrences of each word.
        unit_: A count of 1 is this many units: lcm(1..window) or 1.
        n_documents_: Documents read, empty ones included.
        n_tokens_: Words read that are in the vocabulary.
        skipped_: (path, reason) of the files left out.

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
        memory: int | str = "2GB",
        executor: Executor = None,
        folder: str | os.PathLike[str] | None = None,
        on_error: str = "raise",
    ) -> None:
        self.window = window
        self.min_count = min_count
        self.weighting = weighting
        self.n_jobs = n_jobs
        self.tokenize = tokenize
        self.vocabulary = vocabulary
        self.progress = progress
        self.memory = memory
        self.executor = executor
        self.folder = folder
        self.on_error = on_error
        self._check()

    def _check(self) -> npt.NDArray[np.int64]:
        check_int("window", self.window, 1)
        check_int("min_count", self.min_count, 1)
        check_choice("weighting", self.weighting, ("harmonic", "flat"))
        check_counting(self.memory, self.n_jobs, self.executor, self.folder, self.on_error)
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
        self._check()
        given = self._given_vocabulary()
        kind, source = classify(X, self.on_error)
        budget, n_jobs = parse_memory(self.memory), int(self.n_jobs)
        with progress("reading words", in_mb(total_size(source)), enabled=self.progress) as bar:
            parts: list[Encoded] | list[Path]
            if self.executor is None and self.folder is None:
                parts, job = read_here(kind, source, self.tokenize, budget, n_jobs, self._job, bar)
            else:
                job = self._job(self.folder)
                parts = read_shards(kind, source, self.tokenize, job, bar)
        done = False
        try:
            self._count(parts, job, given)
            done = True
        finally:
            files = job.close(done) if job is not None else None
        if job is not None:
            self._files = files if self._mapped else None
        self.skipped_ = list(source.skipped)
        return self

    def _job(self, folder: Any = None) -> Job:
        settings = {
            "counts": "word pairs",
            "window": int(self.window),
            "weighting": self.weighting,
            "tokenize": None if self.tokenize is None else identity(self.tokenize),
        }
        return Job(settings, parse_memory(self.memory), int(self.n_jobs), self.executor, folder)

    def _count(self, parts: list[Any], job: Job | None, given: list[str] | None) -> None:
        """Find the vocabulary and count the pairs of what was read."""
        total, documents, tokens = word_totals(parts)
        if given is None:
            words = self._select(total)
            if not words:
                raise ValueError(
                    f"no word occurs min_count={self.min_count} times: the corpus has {tokens} words, "
                    f"{len(total)} different ones"
                )
        else:
            words = given
        self._ordered = self.vocabulary is not None
        counts = np.array([total[word] for word in words], np.int64)
        del total  # the rarer words are not needed any more
        if job is None:
            self._in_memory(parts, words, False, documents)
            return
        weights, _ = _count.window_weights(int(self.window), self.weighting)
        _count.check_range(int(counts.sum()), weights)
        with progress("counting pairs", total=len(parts), enabled=self.progress) as bar:
            inner = 1 if job.parallel > 1 else int(self.n_jobs)
            runs = pairs_of_parts(job, parts, words, int(self.window), self.weighting, inner, bar)
            self._finish(words, counts, documents, triangle(job, runs, len(words), bar))

    def _finish(self, words: list[str], counts: npt.NDArray[np.int64], documents: int, pairs: Any) -> None:
        indptr, columns, values, self._mapped = pairs
        self._files = None  # the temporary folder that the pairs are mapped from
        self.vocabulary_, self.counts_, self.unit_ = words, counts, self._unit
        self.n_documents_, self.n_tokens_ = documents, int(counts.sum())
        self._lower = csr(values, columns, indptr)

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
        self._check()
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
        self._ordered = True
        self._in_memory([Encoded(ids, bounds, words)], words, True, len(bounds) - 1)
        self.skipped_ = []
        return self

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
        counter._ordered, counter._mapped, counter._files, counter.skipped_ = True, False, None, []
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
        kind, source = classify(X, self.on_error)
        with progress("reading words", in_mb(total_size(source)), enabled=self.progress) as bar:
            return count_words(kind, source, self.tokenize, parse_memory(self.memory), bar)

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
        right, order = other._lower, None
        right_counts = other.counts_
        if self.vocabulary_ != other.vocabulary_:
            only = sorted(set(self.vocabulary_) ^ set(other.vocabulary_))
            if only or self._ordered:
                detail = f"{len(only)} words are in one only, such as {only[0]!r}" if only else "the order differs"
                raise ValueError(f"cannot merge counts with different vocabularies: {detail}; give both `vocabulary=`")
            place = {word: k for k, word in enumerate(other.vocabulary_)}
            order = np.array([place[word] for word in self.vocabulary_])
            right_counts = right_counts[order]
        _count.check_range(self.n_tokens_ + other.n_tokens_, _count.window_weights(self.window, self.weighting)[0])
        merged = CooccurrenceCounter(**{**self.get_params(deep=False), "folder": None})
        words, counts, documents = list(self.vocabulary_), self.counts_ + right_counts, 0
        documents = self.n_documents_ + other.n_documents_
        new: npt.NDArray[np.int64] | None = None
        if not self._ordered:
            new = np.array(by_count(words, counts.tolist()))
            words, counts = [words[k] for k in new], counts[new]
        size = 12 * (self._lower.nnz + right.nnz)
        if not (self._mapped or other._mapped) and 4 * size <= parse_memory(self.memory):
            if order is not None:
                right = renumbered(right, order)
            lower = canonical(self._lower + right)
            lower = lower if new is None else renumbered(lower, new)
            merged._finish(words, counts, documents, (lower.indptr, lower.indices, lower.data, False))
        else:
            first = None if new is None else ranks(new)
            second = first if order is None else (ranks(order) if first is None else first[ranks(order)])
            merged._add_on_disk([(self._lower, first), (right, second)], words, counts, documents)
        merged._ordered = self._ordered
        merged.skipped_ = [*self.skipped_, *other.skipped_]
        return merged

    def _add_on_disk(
        self, parts: list[tuple[Any, npt.NDArray[np.int64] | None]], words: list[str], counts: Any, documents: int
    ) -> None:
        """Add triangles, each with the new number of every word (None: as it is), on disk."""
        job, done = self._job(), False
        try:
            runs: list[Path] = []
            for lower, rank in parts:
                block = max(1 << 12, job.memory // 128)
                batches = triangle_batches(lower.indptr, lower.indices, lower.data, rank, block)
                # Rows in a new order are sorted block by block: each block is a run of its own.
                for some in [batches] if rank is None else ([batch] for batch in batches):
                    runs.append(job.path("run", f"{len(runs):06d}", ".parquet"))
                    write_batches(runs[-1], some, group_rows(job.memory, 1))
            self._finish(words, counts, documents, triangle(job, runs, len(words), Bar()))
            done = True
        finally:
            files = job.close(done)
        self._files = files if self._mapped else None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the counts to a folder: arrays as .npy files, and ``counter.json`` with a format version.

        Args:
            path: The folder; an older one of counts is replaced when the new one is complete. A ``tokenize`` function
                is not part of it.

        Raises:
            ValueError: The folder holds something else.
        """
        self._fitted()
        settings = {name: getattr(self, name) for name in ("window", "min_count", "weighting")}
        about = {
            "format": _FORMAT,
            "version": _VERSION,
            "settings": {name: getattr(value, "item", lambda v=value: v)() for name, value in settings.items()},
            "ordered": self._ordered,
            "documents": self.n_documents_,
            "counts": self.counts_.tolist(),
            "vocabulary": self.vocabulary_,
        }
        with replaced_folder(path, "counter.json", "word pair counts") as temporary:
            lower = self._lower
            batches = triangle_batches(lower.indptr, lower.indices, lower.data, None, 1 << 17)
            write_triangle(temporary, batches, len(self.vocabulary_), lambda amount: None)
            (temporary / "counter.json").write_text(json.dumps(about, ensure_ascii=False), encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str], memory: int | str = "2GB") -> CooccurrenceCounter:
        """Read what :meth:`save` wrote; pairs of more than a quarter of ``memory`` stay on disk.

        Raises:
            ValueError: Not such a folder, damaged, or another format version.
            FileNotFoundError: There is none.
        """
        folder = Path(path)
        try:
            about = json.loads((folder / "counter.json").read_text(encoding="utf-8"))
            kind, version = about["format"], about["version"]
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{folder} holds no word pair counts or is damaged") from None
        if kind != _FORMAT or version != _VERSION:
            raise ValueError(f"{folder}: expected {_FORMAT} version {_VERSION}; got {kind} version {version}")
        counter = cls(**about["settings"], memory=memory)
        pairs = read_triangle(folder, parse_memory(memory) // 4)
        counter._finish(about["vocabulary"], np.array(about["counts"], np.int64), about["documents"], pairs)
        counter._ordered, counter.skipped_ = about["ordered"], []
        if counter._ordered:
            counter.vocabulary = list(counter.vocabulary_)
        return counter

    def __getstate__(self) -> dict[str, Any]:
        state = dict(super().__getstate__())
        if state.get("_mapped"):  # a copy must not depend on a temporary folder
            lower = self._lower
            arrays = (np.array(part) for part in (lower.data, lower.indices, lower.indptr))
            state |= {"_lower": csr(*arrays), "_mapped": False}
        if not isinstance(state["executor"], str):  # pools cannot be pickled; the counts do not need one
            state["executor"] = None
        return {**state, "_files": None}

    def __sklearn_clone__(self) -> CooccurrenceCounter:
        # A clone counts with the same executor: pools cannot be copied, and `clone` copies what is no estimator.
        settings = self.get_params(deep=False)
        executor = settings.pop("executor")
        copied = {name: clone(value, safe=False) for name, value in settings.items()}
        return type(self)(**copied, executor=executor)

    @property
    def matrix_(self) -> sparse.csr_matrix:
        """(V, V) symmetric int64 counts in units of 1/``unit_``, empty diagonal; built at each access (24 B a pair)."""
        self._fitted()
        return canonical(self._lower + self._lower.T.tocsr())

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
            return distinct_words(self._select(self.vocabulary))
        return distinct_words(self.vocabulary)

    def _select(self, total: Mapping[str, int]) -> list[str]:
        names = list(total)
        return [names[k] for k in by_count(names, list(total.values()), self.min_count)]

    def _in_memory(self, parts: list[Encoded], words: list[str], numbered: bool, documents: int) -> None:
        """Count the pairs of words that fit in memory; the pairs themselves may go to disk."""
        weights, _ = _count.window_weights(int(self.window), self.weighting)
        tokens, counts = token_stream(parts, words, numbered)
        _count.check_range(int(counts.sum()), weights)
        budget = parse_memory(self.memory)
        with progress("counting pairs", total=len(words), enabled=self.progress) as bar:
            pairs, files = pairs_of_tokens(tokens, counts, weights, int(self.n_jobs), budget, self._job, bar)
        self._finish(words, counts, documents, pairs)
        self._files = files
