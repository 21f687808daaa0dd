"""Word discovery: a lexicon from raw text without labels (新词发现与词库构建).

Source: Scientific Spaces articles 4256 and 6920 (solidity of n-grams), 5476 (minimum entropy, part 2: adjacent pairs);
the lexicon under article 5577 (minimum entropy, part 3).

Method "solidity" (default). c(w) counts, N characters:
1. count all n-grams of 2 .. order characters in runs of text;
2. G = grams with c >= min_count and  min over the splits w = uv of  ln(N c(w) / (c(u) c(v))) >= min_pmi[n];
3. a border between characters stays uncut if any gram of G covers it; what lies between cuts is a piece;
4. keep the pieces with count >= min_count that are shorter than 3, or up to `order` characters and in G, or longer with
   every order-gram in G.
Method "adjacent": cut between neighbours with p(ab) <= min_proba or ln(p(ab) / (p(a) p(b))) <= min_pmi.
Redundancy (optional, both): longest first, a word is dropped when the other words explain it, that is when
ln p(w) - sum ln p(parts) of its best segmentation is not above 1 ("article") or below len(w) - 1 ("length").

What we do differently, and why:
- The author's thresholds (2, 4, 6) fit Chinese; on a small alphabet they find almost nothing. ``min_pmi="auto"`` tries
  multiples of (1, 2, 3), measures how briefly each lexicon describes the text (`_lexicon.description`), and takes the
  largest multiple within 3 % of the shortest description. The 3 % were chosen on Chinese text (a novel gets the
  author's thresholds, other kinds of text half or one and a half times these) and on synthetic languages of 40 and 400
  letters.
- Counts are exact for every order (the author's reader of KenLM files sums surviving 4-grams only).
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kexue._checks import check_choice, check_int, check_real
from kexue.words._cutting import Cutter
from kexue.words._executors import Executor
from kexue.words._jobs import check_counting
from kexue.words._keys import bound
from kexue.words._lexicon import Lexicon, description, piece_size, remove_redundant
from kexue.words._numba import compiled
from kexue.words._runs import as_source, parse_memory, rereadable, whole_runs
from kexue.words.ngrams import NGramCounter
from kexue.words.segmenter import Segmenter

_Levels = list[tuple[NDArray[np.uint32], NDArray[np.float64]]]  # for n = 2, 3, ...: grams (M, n), solidity (M,)


@compiled()
def _links(rows: NDArray[np.uint32], shorter: NDArray[np.uint32]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """For each n-gram the index of its first and of its last n - 1 characters among the (n - 1)-grams."""
    n = rows.shape[1]
    prefix, suffix = np.empty(rows.shape[0], np.int64), np.empty(rows.shape[0], np.int64)
    for i in range(rows.shape[0]):
        prefix[i] = bound(shorter, rows[i, : n - 1], False)
        suffix[i] = bound(shorter, rows[i, 1:], False)
    return prefix, suffix


def solidity(counter: NGramCounter, min_count: int) -> _Levels:
    """Grams of 2 .. order characters seen at least ``min_count`` times, and their solidity.

    Solidity is the least PMI over the ways to split the gram in two: min_j ln(N c(w) / (c(w[:j]) c(w[j:]))).

    Returns:
        For n = 2 .. order: code points (M, n) sorted, solidity (M,).
    """
    total = math.log(counter.total_)
    # Parts of a gram are at least as frequent as the gram, so tables cut at min_count hold every part that is needed.
    levels = [counter.grams(n, min_count) for n in range(1, counter.order + 1)]
    logs = [np.log(counts) for _, counts in levels]
    links = [_links(levels[n][0], levels[n - 1][0]) for n in range(1, counter.order)]
    found = []
    for n in range(2, counter.order + 1):
        rows = levels[n - 1][0]
        weakest = np.full(rows.shape[0], np.inf)
        for j in range(1, n):  # w = w[:j] + w[j:]
            left = right = np.arange(rows.shape[0])
            for step in range(n - j):
                left = links[n - 2 - step][0][left]
            for step in range(j):
                right = links[n - 2 - step][1][right]
            weakest = np.minimum(weakest, total + logs[n - 1] - logs[j - 1][left] - logs[n - j - 1][right])
        found.append((rows, weakest))
    return found


class WordDiscovery:
    """Find the words of a language in raw text.

    Args:
        order: Longest n-gram that is tested; words may be longer (chains of overlapping grams).
        min_count: Least count of a gram and of a word.
        min_pmi: Least PMI in nats. "solidity": one number for each n of 2 .. order (the author: (2, 4, 6)), or one
            number t for (t, 2t, 3t, ...). "adjacent": one number (the author: 1). "auto": for "solidity" chosen on the
            first half million characters by description length; for "adjacent" 1, where merging starts to pay (F* = 0).
        method: "solidity" (articles 4256, 6920) or "adjacent" (article 5476).
        redundancy: None, "length" or "article": whether, and by which rule, words that their parts explain go.
        min_proba: Only for "adjacent": least probability of a pair and of a word.
        n_jobs: Threads or processes for counting.
        memory: Budget for counting, as of :class:`NGramCounter`.
        executor: Who counts, as of :class:`NGramCounter`.
        folder: Where counts are kept, so that a killed one goes on, as of :class:`NGramCounter`.
        on_error: "raise" or "skip" files that cannot be read, as of :class:`NGramCounter`.
        progress: Whether to show a progress bar; None shows it on a terminal.

    Attributes:
        vocabulary_: Word -> count, most frequent first (ties alphabetical). Single characters are words too.
        min_pmi_: The thresholds that were used.
        skipped_: (path, reason) of the files left out.
        entropy_per_char_: H / l in nats: the entropy of a word of the vocabulary over its mean length.

    Raises:
        ValueError: A parameter out of range; an empty corpus; nothing seen ``min_count`` times; texts that can be read
            only once (counting and cutting are two passes).

    Reference:
        Scientific Spaces, articles 4256, 5476, 5577 and 6920.

    Example:
        >>> fruits = ["雪梨", "苹果", "香蕉", "葡萄"]
        >>> texts = [first + link + second for first in fruits for link in "和与或" for second in fruits]
        >>> words = WordDiscovery(min_count=8).fit(texts)
        >>> sorted(words.vocabulary_)
        ['与', '和', '或', '苹果', '葡萄', '雪梨', '香蕉']
        >>> words.segmenter().tokenize("苹果和雪梨")
        ['苹果', '和', '雪梨']
    """

    _SAMPLE = 1 << 19  # characters on which "auto" compares thresholds
    _GRID = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0)
    # The curve of Chinese text is flat and its minimum glues words into phrases; that of a language whose words are
    # independent is steep. Of the lexicons within 3 % of the shortest description, the one that merges least is taken.
    _SLACK = 1.03

    def __init__(
        self,
        order: int = 4,
        min_count: int = 32,
        min_pmi: float | Sequence[float] | str = "auto",
        method: str = "solidity",
        redundancy: str | None = "length",
        min_proba: float = 1e-7,
        n_jobs: int = 1,
        memory: int | str = "2GB",
        executor: Executor = None,
        folder: str | os.PathLike[str] | None = None,
        on_error: str = "raise",
        progress: bool | None = None,
    ) -> None:
        check_int("order", order, 2)
        check_int("min_count", min_count, 1)
        check_counting(memory, n_jobs, executor, folder, on_error)
        check_choice("method", method, ("solidity", "adjacent"))
        check_real("min_proba", min_proba, minimum=0.0)
        if redundancy is not None:
            check_choice("redundancy", redundancy, ("length", "article"))
        self.order = int(order)
        self.min_count = int(min_count)
        self.method = method
        self.redundancy = redundancy
        self.min_proba = float(min_proba)
        self.n_jobs = int(n_jobs)
        self.memory = memory
        self.executor = executor
        self.folder = folder
        self.on_error = on_error
        self.progress = progress
        self.min_pmi = min_pmi
        self._thresholds()

    def _thresholds(self) -> tuple[float, ...] | None:
        """The thresholds for n = 2, 3, ...; None for "auto" that has to be measured."""
        needed = self.order - 1 if self.method == "solidity" else 1
        if isinstance(self.min_pmi, str):
            check_choice("min_pmi", self.min_pmi, ("auto",))
            return None if self.method == "solidity" else (1.0,)
        if isinstance(self.min_pmi, (Sequence, np.ndarray)):
            values: tuple[Any, ...] = tuple(self.min_pmi)
            if len(values) != needed:
                wanted = f"{needed} numbers (n = 2 .. {self.order})" if needed > 1 else "one number"
                raise ValueError(f"min_pmi must be {wanted} for method={self.method!r}; got {self.min_pmi!r}")
        else:
            check_real("min_pmi", self.min_pmi)
            values = tuple(float(self.min_pmi) * n for n in range(1, needed + 1))
        for value in values:
            check_real("min_pmi", value)
        return tuple(float(value) for value in values)

    def fit(self, source: Any, texts: Any = None) -> WordDiscovery:
        """Find the words.

        Args:
            source: Texts or files, as for :meth:`NGramCounter.fit`, or a fitted :class:`NGramCounter` of at least this
                order, which saves the first pass.
            texts: With a counter: the text that it counted, if it cannot read it again itself.

        Returns:
            The fitted object.
        """
        order = self.order if self.method == "solidity" else 2
        if isinstance(source, NGramCounter):
            counter, texts = source, _sources(source) if texts is None else as_source(texts, self.on_error)
            if counter.order < order:
                raise ValueError(f"the counter must have counted order {order} or more; got order {counter.order}")
        else:
            if texts is not None:
                raise TypeError(f"texts is only used with an NGramCounter; got {type(source).__name__} as source")
            counter, texts = None, as_source(source, self.on_error)
        if not rereadable(texts):
            raise ValueError(
                "word discovery reads the text twice, and an iterator can be read only once; pass a list, paths, or an "
                "object whose __iter__ starts again"
            )
        if counter is None:
            counter = NGramCounter(
                order, 1, self.memory, self.n_jobs, self.executor, self.folder, self.on_error, self.progress
            ).fit(texts)
        self.skipped_ = list(counter.skipped_)
        thresholds = self._thresholds()
        if thresholds is None:
            thresholds = self._choose(texts)
        self.min_pmi_ = thresholds
        found = self._lexicon(texts, counter, thresholds).words()
        if not found:
            raise ValueError(f"no word was seen min_count={self.min_count} times in {counter.total_} characters")
        self.vocabulary_: dict[str, int] = dict(sorted(found.items(), key=lambda item: (-item[1], item[0])))
        counts = np.fromiter(self.vocabulary_.values(), np.float64, len(self.vocabulary_))
        p = counts / counts.sum()
        lengths = np.fromiter(map(len, self.vocabulary_), np.float64, p.size)
        self.entropy_per_char_ = float(-(p * np.log(p)).sum() / (p * lengths).sum())
        return self

    def segmenter(self, max_words: int | None = 50_000) -> Segmenter:
        """A :class:`Segmenter` over the ``max_words`` most frequent words."""
        if not hasattr(self, "vocabulary_"):
            raise ValueError("this WordDiscovery has no vocabulary yet; call fit(texts) first")
        return Segmenter(self.vocabulary_, max_words)

    def _cutter(self, thresholds: tuple[float, ...], levels: _Levels) -> Cutter:
        """Cuts between the grams that must not be cut."""
        solid = self.method == "solidity"
        grams = [
            rows[weakest >= least] if solid else rows[weakest > least]
            for (rows, weakest), least in zip(levels, thresholds, strict=False)
        ]
        return Cutter(grams, self.order if solid else 2, solid)

    def _piece(self) -> int:
        return piece_size(parse_memory(self.memory) // self.n_jobs)

    def _levels(self, counter: NGramCounter) -> _Levels:
        if self.method == "solidity":
            return solidity(counter, self.min_count)[: self.order - 1]
        (characters, single), (pairs, double) = counter.grams(1, 1), counter.grams(2, 1)
        p, both = np.log(single / single.sum()), double / double.sum()
        left, right = (np.searchsorted(characters[:, 0], pairs[:, side]) for side in (0, 1))
        return [(pairs, np.where(both > self.min_proba, np.log(both) - p[left] - p[right], -np.inf))]

    def _lexicon(
        self, texts: Iterable[Any], counter: NGramCounter, thresholds: tuple[float, ...], levels: _Levels | None = None
    ) -> Lexicon:
        cutter = self._cutter(thresholds, self._levels(counter) if levels is None else levels)
        lexicon, pieces = cutter.count(whole_runs(texts, self._piece()), self.n_jobs)
        solid = self.method == "solidity"
        least = self.min_count if solid else max(self.min_count, math.floor(self.min_proba * pieces) + 1)
        lexicon = lexicon.at_least(least)
        return lexicon if self.redundancy is None else remove_redundant(lexicon, self.redundancy)

    def _choose(self, texts: Iterable[Any]) -> tuple[float, ...]:
        """The multiple of (1, 2, 3, ...) whose lexicon describes the first part of the text most briefly."""
        sample = list(islice(whole_runs(texts, self._SAMPLE), 1))  # the same for every budget
        counter = NGramCounter(self.order, 1, self.memory, self.n_jobs, progress=False).fit(sample)
        counts = counter.grams(1, 1)[1]
        entropy = float(math.log(counts.sum()) - (counts * np.log(counts)).sum() / counts.sum())
        levels = self._levels(counter)
        lengths = []
        for scale in self._GRID:
            thresholds = tuple(scale * n for n in range(1, self.order))
            lexicon = self._lexicon(sample, counter, thresholds, levels)
            lengths.append(description(sample, lexicon, entropy, self._piece()) if len(lexicon) else math.inf)
        good = [
            scale for scale, length in zip(self._GRID, lengths, strict=True) if length <= min(lengths) * self._SLACK
        ]
        return tuple(good[-1] * n for n in range(1, self.order))


def _sources(counter: NGramCounter) -> Iterable[Any]:
    """What the counter read, to be read again."""
    if counter.source_ is None:
        raise ValueError(
            "the counter's text can be read only once (an iterator, or a counter that was loaded); pass it again: "
            "fit(counter, texts)"
        )
    return [item for source in counter.source_ for item in source]
