"""Exact counts of all character n-grams of a text, for every n up to an order (N元计数).

Source: the counting step of word discovery, Scientific Spaces articles 4256 and 6920 (there: a Python dictionary, later
KenLM's `count_ngrams`); it is step 1 of the lexicon under article 5577.

Method: each character gets a number of b bits, by code point, 0 being "the run has ended". The gram that starts at a
position is one integer key (several 64-bit words when order * b > 64), so counting is one sort. A key whose run ends
early is padded with 0; all lower orders are prefixes of the same sorted keys, so one array holds every order.

What we do differently, and why:
- Numbers go by code point, not by frequency. Widening the alphabet is then monotone: it keeps sorted keys sorted, so
  tables of different shards merge without sorting again, and any order of merging gives the same bits.
- b follows the alphabet, so order 4 of Chinese and order 12 of 26 letters both fit one machine word.
- Text is counted in chunks whose working memory obeys ``memory``; chunk tables merge like the runs of a merge sort.
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kexue._checks import check_int
from kexue.words._keys import Table, bound, count_text, merge, prefixes
from kexue.words._runs import as_source, chunks, code_points, parse_memory, rereadable

_BYTES_PER_CHARACTER = 48  # text, code points, keys, sorted copy and table of one chunk, per character
_MAX_CHUNK = 1 << 22  # larger chunks are not faster


class _Stack:
    """Chunk tables, merged when neighbours have similar size, so that the total work is O(n log n)."""

    def __init__(self, budget: int) -> None:
        self.tables: list[Table] = []
        self._budget = budget
        self._warned = False

    def push(self, table: Table) -> None:
        self.tables.append(table)
        while len(self.tables) > 1 and self.tables[-2].counts.size < 2 * self.tables[-1].counts.size:
            self._join()
        size = sum(t.keys.nbytes + t.counts.nbytes for t in self.tables)
        if size > self._budget and not self._warned:
            self._warned = True
            warnings.warn(
                f"the table of distinct n-grams has grown to {size / 1e9:.1f} GB, past memory={self._budget / 1e9:.1f} "
                "GB; counts stay exact. Lower order, raise memory, or count a sample of the text.",
                ResourceWarning,
                stacklevel=4,
            )

    def _join(self) -> None:
        second, first = self.tables.pop(), self.tables.pop()
        self.tables.append(merge(first, second))

    def finish(self) -> Table:
        while len(self.tables) > 1:
            self._join()
        return self.tables[0]


class NGramCounter:
    """Count every character n-gram of 1 to ``order`` characters, exactly.

    Grams are counted inside runs: maximal sequences of letters (with their combining marks), digits, CJK ideographs,
    kana and hangul; everything else separates, and so do the borders of texts and files. Characters are taken as they
    stand (no folding of case or width).

    Memory: chunks are counted within ``memory``; the table itself holds each distinct gram of the highest order once
    (16 bytes when order * bits <= 64, bits = bit length of the alphabet's size) and nothing is pruned, so that counts
    and merges are exact. If that table outgrows ``memory`` a ResourceWarning says so. Merging needs it twice for a
    moment.

    Args:
        order: Longest gram, in characters; any number >= 1. Up to 64 bits per key (order 4 for alphabets below 65 536
            characters, order 12 for 26 letters) is the fast case; beyond it keys take several words (slower sort).
        min_count: Grams seen less often are reported as 0 and left out of :meth:`items`. They stay in the table, so
            that :meth:`merge` is exact.
        memory: Budget for counting, bytes or text such as "2GB".
        n_jobs: Chunks counted at a time, in threads. The result does not depend on it.

    Attributes:
        total_: Number of characters counted (N).
        alphabet_: The characters seen, by code point.

    Raises:
        ValueError: order, min_count, memory or n_jobs out of range; a text without any run; a file that is not UTF-8
            (with line and byte offset).
        TypeError: Something that is neither str nor pathlib.Path in the input.

    Example:
        >>> counter = NGramCounter(order=2).fit(["平方和, 平方根"])
        >>> counter.count("平方"), counter.count("方和"), counter.count("和平")
        (2, 1, 0)
        >>> counter.merge(NGramCounter(order=2).fit(["平方"])).count("平方")
        3
    """

    def __init__(self, order: int = 4, min_count: int = 1, memory: int | str = "2GB", n_jobs: int = 1) -> None:
        check_int("order", order, 1)
        check_int("min_count", min_count, 1)
        check_int("n_jobs", n_jobs, 1)
        parse_memory(memory)
        self.order = int(order)
        self.min_count = int(min_count)
        self.memory = memory
        self.n_jobs = int(n_jobs)
        self._table: Table | None = None
        self._sums: NDArray[np.int64] | None = None
        self.source_: list[Any] | None = []

    def __getstate__(self) -> dict[str, Any]:
        # The texts are not part of the counts: a pickled counter answers count() and merge(), nothing is read again.
        return {**self.__dict__, "source_": None}

    def fit(self, source: Any) -> NGramCounter:
        """Count ``source``, forgetting earlier counts.

        Args:
            source: One str (a text) or pathlib.Path (a UTF-8 file), or an iterable of them. A list keeps its
                reference, so that :class:`WordDiscovery` can read the text again.

        Returns:
            The counter.
        """
        self._table, self._sums, self.source_ = None, None, []
        self.partial_fit(source)
        if self.total_ == 0:
            raise ValueError("expected text with letters, digits or ideographs; got a corpus without any")
        return self

    def partial_fit(self, source: Any) -> NGramCounter:
        """Count ``source`` on top of earlier counts; a source without any run is allowed here."""
        texts = as_source(source)
        if self.source_ is not None:
            self.source_ = [*self.source_, texts] if rereadable(texts) else None
        budget = parse_memory(self.memory)
        size = max(1024, min(_MAX_CHUNK, budget // (2 * _BYTES_PER_CHARACTER * self.n_jobs)))
        stack = _Stack(budget)
        if self._table is not None:
            stack.tables.append(self._table)
            self._table = None
        for table in self._count_chunks(chunks(texts, size, self.order - 1)):
            stack.push(table)
        self._table = stack.finish() if stack.tables else count_text("", 0, self.order)
        self._sums = None
        return self

    def _count_chunks(self, pieces: Iterable[tuple[str, int]]) -> Iterator[Table]:
        if self.n_jobs == 1:
            yield from (count_text(text, own, self.order) for text, own in pieces)
            return
        with ThreadPoolExecutor(self.n_jobs) as pool:
            waiting: deque[Future[Table]] = deque()
            for text, own in pieces:
                waiting.append(pool.submit(count_text, text, own, self.order))
                if len(waiting) > self.n_jobs:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()

    @property
    def table_(self) -> Table:
        """The counts as sorted keys; ValueError before :meth:`fit`."""
        if self._table is None:
            raise ValueError("this NGramCounter has not counted anything yet; call fit(texts) first")
        return self._table

    @property
    def total_(self) -> int:
        """Number of characters counted."""
        return int(self.table_.counts.sum())

    @property
    def alphabet_(self) -> str:
        """The characters seen, by code point."""
        return self.table_.alphabet.tobytes().decode("utf-32-le")

    def count(self, gram: str) -> int:
        """How often ``gram`` occurs (overlapping occurrences count).

        Args:
            gram: 1 to ``order`` characters.

        Returns:
            The exact count, or 0 when it is below ``min_count``.

        Raises:
            ValueError: An empty gram, or one longer than ``order``.
            TypeError: Not a str.
        """
        if not isinstance(gram, str):
            raise TypeError(f"gram must be a str; got {gram!r} of type {type(gram).__name__}")
        if not 1 <= len(gram) <= self.order:
            raise ValueError(f"gram must have 1 to {self.order} characters (order={self.order}); got {len(gram)}")
        table = self.table_
        points = code_points(gram)
        at = np.searchsorted(table.alphabet, points)
        if (at == table.alphabet.size).any() or (
            table.alphabet[np.minimum(at, table.alphabet.size - 1)] != points
        ).any():
            return 0
        layout = table.layout
        low, high = np.zeros(layout.words, np.uint64), np.zeros(layout.words, np.uint64)
        for j in range(self.order):
            shift = np.uint64(layout.bits * (layout.per_word - 1 - j % layout.per_word))
            if j < len(gram):
                low[j // layout.per_word] |= np.uint64(at[j] + 1) << shift
                high[j // layout.per_word] |= np.uint64(at[j] + 1) << shift
            else:
                high[j // layout.per_word] |= np.uint64((1 << layout.bits) - 1) << shift
        if self._sums is None:
            self._sums = np.concatenate([np.zeros(1, np.int64), np.cumsum(table.counts)])
        found = self._sums[bound(table.keys, high, True)] - self._sums[bound(table.keys, low, False)]
        return int(found) if found >= self.min_count else 0

    def grams(self, n: int, min_count: int | None = None) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
        """All grams of exactly ``n`` characters, sorted by code points.

        Args:
            n: 1 to ``order``.
            min_count: Least count; None means the counter's own.

        Returns:
            Code points (M, n) and counts (M,).
        """
        check_int("n", n, 1)
        if n > self.order:
            raise ValueError(f"n must be at most order={self.order}; got {n}")
        least = self.min_count if min_count is None else min_count
        check_int("min_count", least, 1)
        table, layout = self.table_, self.table_.layout
        rows, counts = prefixes(table.keys, table.counts, n, least, layout.bits, layout.per_word)
        mask = np.uint64((1 << layout.bits) - 1)
        points = np.empty((rows.size, n), np.uint32)
        for j in range(n):
            shift = np.uint64(layout.bits * (layout.per_word - 1 - j % layout.per_word))
            points[:, j] = table.alphabet[
                ((table.keys[rows, j // layout.per_word] >> shift) & mask).astype(np.int64) - 1
            ]
        return points, counts

    def items(self, n: int) -> Iterator[tuple[str, int]]:
        """Iterate over (gram, count) of exactly ``n`` characters, by code points."""
        points, counts = self.grams(n)
        text = points.tobytes().decode("utf-32-le")
        return ((text[i * n : i * n + n], count) for i, count in enumerate(counts.tolist()))

    def to_arrow(self) -> Any:
        """All grams of all orders as a pyarrow Table with columns ``gram``, ``n``, ``count`` (imports pyarrow here)."""
        import pyarrow as pa

        rows = [(gram, n, count) for n in range(1, self.order + 1) for gram, count in self.items(n)]
        gram, length, count = zip(*rows, strict=True) if rows else ((), (), ())
        return pa.table(
            {
                "gram": pa.array(gram, pa.string()),
                "n": pa.array(length, pa.int32()),
                "count": pa.array(count, pa.int64()),
            }
        )

    def to_polars(self) -> Any:
        """The same as a polars DataFrame; polars is not a dependency and must be installed."""
        try:
            import polars
        except ImportError as error:
            raise ImportError("to_polars() needs polars (pip install polars); to_arrow() does not") from error
        return polars.from_arrow(self.to_arrow())

    def merge(self, other: NGramCounter) -> NGramCounter:
        """Counts of both counters together, as a new counter; exact in any order and grouping.

        Raises:
            ValueError: The counters differ in ``order`` or ``min_count``.
        """
        if not isinstance(other, NGramCounter):
            raise TypeError(f"other must be an NGramCounter; got {type(other).__name__}")
        if (self.order, self.min_count) != (other.order, other.min_count):
            raise ValueError(
                f"counters must agree in order and min_count; got order {self.order} and {other.order}, "
                f"min_count {self.min_count} and {other.min_count}"
            )
        result = NGramCounter(self.order, self.min_count, self.memory, self.n_jobs)
        result._table = merge(self.table_, other.table_)
        both = self.source_ is not None and other.source_ is not None
        result.source_ = [*(self.source_ or []), *(other.source_ or [])] if both else None
        return result
