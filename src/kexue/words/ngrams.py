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
  When the table outgrows the budget, it goes to disk as sorted runs (`_spill`) that are merged in one stream.
- Shards of the text can be counted by processes, a Ray cluster or any executor (`_jobs`), to the same bits.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kexue._checks import check_int
from kexue._files import replaced_folder
from kexue._progress import Bar, progress
from kexue.words._executors import Executor, check_wanted
from kexue.words._jobs import Job, Task, check_counting, digest, in_order
from kexue.words._keys import Table, bound, count_text, merge
from kexue.words._merge import Merging, describe_table, merge_runs, read_table, write_table
from kexue.words._runs import as_source, check_text, chunks, code_points, parse_memory, rereadable
from kexue.words._shards import Source, in_mb, shards, total_size
from kexue.words._spill import ArrayWriter, group_rows, in_batches

_BYTES_PER_CHARACTER = 48  # text, code points, keys, sorted copy and table of one chunk, per character
_MAX_CHUNK = 1 << 22  # larger chunks are not faster
_MOST_SHARD = 1 << 28  # bytes of text of one task


class _Stack:
    """Chunk tables, merged when neighbours have similar size, so that the total work is O(n log n).

    Args:
        limit: Bytes of tables from which they are written to disk as runs; a merge needs them three times.
        new_run: Gives the path of the next run.
        rows: Rows of a row group of a run.
    """

    def __init__(self, limit: int, new_run: Any, rows: int) -> None:
        self.tables: list[Table] = []
        self.runs: list[Path] = []
        self._limit, self._new_run, self._rows = limit, new_run, rows

    def push(self, table: Table) -> None:
        if not len(table.counts):
            return
        self.tables.append(table)
        while len(self.tables) > 1 and self.tables[-2].counts.size < 2 * self.tables[-1].counts.size:
            self._join()
        if sum(table.nbytes for table in self.tables) > self._limit:
            self.spill()

    def spill(self) -> None:
        """Write what is in memory to disk."""
        for table in self.tables:
            path = Path(self._new_run(len(self.runs)))
            write_table(path, table, self._rows)
            self.runs.append(path)
        self.tables = []

    def _join(self) -> None:
        second, first = self.tables.pop(), self.tables.pop()
        self.tables.append(merge(first, second))

    def finish(self, order: int) -> Table:
        """Everything in memory as one table."""
        while len(self.tables) > 1:
            self._join()
        return self.tables[0] if self.tables else count_text("", 0, order)


def _chunk_size(memory: int) -> int:
    return int(np.clip(memory // (4 * _BYTES_PER_CHARACTER), 1024, _MAX_CHUNK))


def count_shard(path: str, items: list[Any], order: int, memory: int) -> None:
    """Task: count the grams of texts and spans of files and write them as a run."""
    target, rows = Path(path), group_rows(memory, 2)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".") as folder:
        stack = _Stack(memory // 6, lambda number: Path(folder) / f"{number}", rows)
        for text, own in chunks(items, _chunk_size(memory), order - 1):
            check_wanted()
            stack.push(count_text(text, own, order))
        if stack.runs:
            stack.spill()
            merge_runs(os.path.join(folder, "all"), [str(run) for run in stack.runs], None, None, memory)
        else:
            write_table(Path(folder) / "all", stack.finish(order), rows)
        os.replace(Path(folder) / "all", target)


class NGramCounter:
    """Count every character n-gram of 1 to ``order`` characters, exactly.

    Grams are counted inside runs: maximal sequences of letters (with their combining marks), digits, CJK ideographs,
    kana and hangul; everything else separates, and so do the borders of texts and files. Characters are taken as they
    stand (no folding of case or width).

    Memory: counting holds at most about ``memory``. Nothing is pruned, so that counts and merges are exact: the table
    holds each distinct gram of the highest order once (16 bytes when order * bits <= 64, bits = bit length of the
    alphabet's size). A table that outgrows the budget lies on disk (in the folder for temporary files, or in
    ``folder``) and is read from there.

    Args:
        order: Longest gram, in characters; any number >= 1. Up to 64 bits per key (order 4 for alphabets below 65 536
            characters, order 12 for 26 letters) is the fast case; beyond it keys take several words (slower sort).
        min_count: Grams seen less often are reported as 0 and left out of :meth:`items`. They stay in the table, so
            that :meth:`merge` is exact.
        memory: Budget for counting, bytes or text such as "2GB", shared by all workers.
        n_jobs: Threads, or processes. The result does not depend on it.
        executor: None counts in this process; "processes" in ``n_jobs`` processes; "ray" on the Ray cluster that is
            running or that RAY_ADDRESS names, else on a local one (extra ``ray``); or any object with
            ``submit(function, *arguments)`` that returns futures (``concurrent.futures``, a dask ``Client``,
            ``mpi4py.futures``) or with ``apply_async`` (pools). Workers on other machines must see the files and
            ``folder``.
        folder: Where :meth:`fit` keeps what it has counted. If it is killed, the same call goes on from there; after
            it has finished, the same call (same settings and texts) reads the result. One folder for one count.
        on_error: "raise" stops at a file that cannot be read or is not UTF-8 (what was counted stays in ``folder``);
            "skip" leaves such files out and lists them in ``skipped_``.
        progress: Whether to show a progress bar; None shows it on a terminal.

    Attributes:
        total_: Number of characters counted (N).
        alphabet_: The characters seen, by code point.
        skipped_: (path, reason) of the files left out.

    Raises:
        ValueError: order, min_count, memory or n_jobs out of range; a text without any run; a file that is not UTF-8
            (with line and byte offset); a folder that holds another count.
        TypeError: Something that is neither str nor pathlib.Path in the input.

    Example:
        >>> counter = NGramCounter(order=2).fit(["平方和, 平方根"])
        >>> counter.count("平方"), counter.count("方和"), counter.count("和平")
        (2, 1, 0)
        >>> counter.merge(NGramCounter(order=2).fit(["平方"])).count("平方")
        3
    """

    def __init__(
        self,
        order: int = 4,
        min_count: int = 1,
        memory: int | str = "2GB",
        n_jobs: int = 1,
        executor: Executor = None,
        folder: str | os.PathLike[str] | None = None,
        on_error: str = "raise",
        progress: bool | None = None,
    ) -> None:
        check_int("order", order, 1)
        check_int("min_count", min_count, 1)
        check_counting(memory, n_jobs, executor, folder, on_error)
        self.order = int(order)
        self.min_count = int(min_count)
        self.memory = memory
        self.n_jobs = int(n_jobs)
        self.executor = executor
        self.folder = folder
        self.on_error = on_error
        self.progress = progress
        self._table: Table | None = None
        self._sums: NDArray[np.int64] | None = None
        self._files: Any = None  # the temporary folder that the table is mapped from
        self.source_: list[Any] | None = []
        self.skipped_: list[tuple[str, str]] = []

    def __getstate__(self) -> dict[str, Any]:
        # The texts are not part of the counts: a pickled counter answers count() and merge(), nothing is read again.
        table = self._table
        if table is not None:
            table = Table(table.alphabet, table.layout, np.array(table.keys), np.array(table.counts))
        return {**self.__dict__, "source_": None, "_files": None, "_table": table, "executor": None}

    def fit(self, source: Any) -> NGramCounter:
        """Count ``source``, forgetting earlier counts.

        Args:
            source: One str (a text) or pathlib.Path (a UTF-8 file), or an iterable of them. A list keeps its
                reference, so that :class:`WordDiscovery` can read the text again.

        Returns:
            The counter.
        """
        self._table, self._sums, self._files, self.source_, self.skipped_ = None, None, None, [], []
        self._add(source, self.folder)
        if self.total_ == 0:
            raise ValueError("expected text with letters, digits or ideographs; got a corpus without any")
        return self

    def partial_fit(self, source: Any) -> NGramCounter:
        """Count ``source`` on top of earlier counts, without ``folder``; a source without any run is allowed here."""
        self._add(source, None)
        return self

    def _add(self, source: Any, folder: str | os.PathLike[str] | None) -> None:
        texts = as_source(source, self.on_error)
        if self.source_ is not None:
            self.source_ = [*self.source_, texts] if rereadable(texts) else None
        if folder is None and self.executor is None:
            with progress("counting n-grams (M characters)", enabled=self.progress) as bar:
                table, files = self._count_here(texts, bar)
        else:
            with progress("counting n-grams (MB)", in_mb(total_size(texts)), enabled=self.progress) as bar:
                table, files = self._count_shards(texts, folder, bar)
        if self._table is not None and len(self._table.counts):
            table, files = self._sum([self._table, table])
        self._table, self._files, self._sums = table, files, None
        self.skipped_ = [*self.skipped_, *texts.skipped]

    def _count_here(self, texts: Source, bar: Bar) -> tuple[Table, Any]:
        """Count chunks in threads of this process."""
        budget = parse_memory(self.memory)
        job: list[Job] = []

        def new_run(number: int) -> Path:
            if not job:
                job.append(Job({}, budget, self.n_jobs, None, None))
            return job[0].path("run", f"{number:06d}", ".parquet")

        stack = _Stack(budget // 6, new_run, group_rows(budget, 2))
        done = False
        try:
            for table in self._count_chunks(chunks(texts, _chunk_size(budget // self.n_jobs), self.order - 1)):
                stack.push(table)
                bar.advance(float(table.counts.sum()) / 1e6)
            if not job:
                return stack.finish(self.order), None
            stack.spill()
            found = self._collect(job[0], stack.runs, bar)
            done = True
        finally:
            files = job[0].close(done) if job else None
        return found, files if found.mapped else None

    def _count_shards(self, texts: Source, folder: Any, bar: Bar) -> tuple[Table, Any]:
        """Count shards by an executor, or so that the count can be resumed."""
        budget = parse_memory(self.memory)
        job = Job({"counts": "character n-grams", "order": self.order}, budget, self.n_jobs, self.executor, folder)
        share = max(1, budget // job.parallel)
        size = int(np.clip(share // _BYTES_PER_CHARACTER, 1 << 16, _MOST_SHARD))
        done = False
        try:
            tasks = (
                Task(shard.key, count_shard, (shard.items, self.order, share), shard.size / 1e6)
                for shard in shards(texts, size, check_text, keys=True)
            )
            paths = list(job.run("shard", tasks, ".parquet", bar.advance))
            if not paths:
                table: Table = count_text("", 0, self.order)
            else:
                table = self._collect(job, paths, bar)  # a path comes twice where two shards hold the same text
            done = True
        finally:
            files = job.close(done)
        return table, files if table.mapped else None

    def _collect(self, job: Job, runs: list[Path], bar: Bar) -> Table:
        """The table of all runs: in memory if it is small enough, else mapped."""
        final = job.path("table", digest([run.name for run in runs]), "")
        if not final.exists():
            temporary = Path(tempfile.mkdtemp(dir=job.folder, prefix=".table-"))
            merging = Merging(job, runs)
            with (
                ArrayWriter(temporary / "keys.npy", "<u8", merging.words) as keys_out,
                ArrayWriter(temporary / "counts.npy", "<i8") as counts_out,
            ):
                for keys, counts in merging:
                    keys_out.append(keys)
                    counts_out.append(counts)
                    bar.advance(0, "merging")
            describe_table(temporary, merging.alphabet, self.order, self.min_count)
            os.chmod(temporary, 0o755)
            os.replace(temporary, final)
        return read_table(final, parse_memory(self.memory) // 4)

    def _sum(self, tables: list[Table]) -> tuple[Table, Any]:
        """Add tables, on disk when their sum may outgrow the budget."""
        budget = parse_memory(self.memory)
        if 3 * sum(table.nbytes for table in tables) <= budget:
            return reduce(merge, tables), None
        job, done = Job({}, budget, self.n_jobs, None, None), False
        try:
            runs = []
            for number, table in enumerate(tables):
                runs.append(job.path("run", f"{number:06d}", ".parquet"))
                write_table(runs[-1], table, group_rows(budget, table.layout.words))
            found = self._collect(job, runs, Bar())
            done = True
        finally:
            files = job.close(done)
        return found, files if found.mapped else None

    def _count_chunks(self, pieces: Iterable[tuple[str, int]]) -> Iterator[Table]:
        if self.n_jobs == 1:
            yield from (count_text(text, own, self.order) for text, own in pieces)
            return
        with ThreadPoolExecutor(self.n_jobs) as pool:
            yield from in_order(pool, lambda piece: count_text(piece[0], piece[1], self.order), pieces, self.n_jobs - 1)

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
        first, last = bound(table.keys, low, False), bound(table.keys, high, True)
        if not table.mapped and self._sums is None:
            self._sums = np.concatenate([np.zeros(1, np.int64), np.cumsum(table.counts)])
        found = table.counts[first:last].sum() if self._sums is None else self._sums[last] - self._sums[first]
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
        return self.table_.grams(n, least)

    def items(self, n: int) -> Iterator[tuple[str, int]]:
        """Iterate over (gram, count) of exactly ``n`` characters, by code points."""
        points, counts = self.grams(n)
        text = points.tobytes().decode("utf-32-le")
        return ((text[i * n : i * n + n], count) for i, count in enumerate(counts.tolist()))

    def to_arrow(self) -> Any:
        """All grams of all orders as a pyarrow Table with columns ``gram``, ``n``, ``count`` (imports pyarrow here)."""
        import pyarrow as pa

        schema = pa.schema([("gram", pa.string()), ("n", pa.int32()), ("count", pa.int64())])
        parts = []
        for n in range(1, self.order + 1):
            points, counts = self.grams(n)
            grams = pa.array(np.ascontiguousarray(points).view(f"<U{n}").ravel(), pa.string())
            parts.append(
                pa.table([grams, pa.array(np.full(len(counts), n, np.int32)), pa.array(counts)], schema=schema)
            )
        return pa.concat_tables(parts)

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
        result = NGramCounter(self.order, self.min_count, self.memory, self.n_jobs, self.executor, None, self.on_error)
        result._table, result._files = result._sum([self.table_, other.table_])
        both = self.source_ is not None and other.source_ is not None
        result.source_ = [*(self.source_ or []), *(other.source_ or [])] if both else None
        result.skipped_ = [*self.skipped_, *other.skipped_]
        return result

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the counts to a folder (``keys.npy``, ``counts.npy``, ``table.json`` with a format version).

        Args:
            path: The folder; an older one of counts is replaced when the new one is complete.

        Raises:
            ValueError: The folder holds something else.
        """
        table = self.table_
        with replaced_folder(path, "table.json", "n-gram counts") as folder:
            with (
                ArrayWriter(folder / "keys.npy", "<u8", table.layout.words) as keys_out,
                ArrayWriter(folder / "counts.npy", "<i8") as counts_out,
            ):
                for keys, counts in in_batches(table.keys, table.counts):
                    keys_out.append(keys)
                    counts_out.append(counts)
            describe_table(folder, table.alphabet, self.order, self.min_count)

    @classmethod
    def load(cls, path: str | os.PathLike[str], memory: int | str = "2GB") -> NGramCounter:
        """Read what :meth:`save` wrote; a table of more than a quarter of ``memory`` stays on disk.

        Raises:
            ValueError: Not such a folder, damaged, or another format version.
            FileNotFoundError: There is none.
        """
        folder = Path(path)
        table = read_table(folder, parse_memory(memory) // 4)
        about = json.loads((folder / "table.json").read_text(encoding="utf-8"))
        counter = cls(table.layout.order, int(about.get("min_count", 1)), memory)
        counter._table, counter.source_ = table, None
        return counter
