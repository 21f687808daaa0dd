"""Sorted runs on disk: counts that outgrow memory are written as sorted runs and merged in one stream.

A run is a Parquet file with the columns key0, key1, ... (uint64, the key from its most significant word) and count
(int64), sorted and without repeated keys. Its row groups are ranges of keys; the first key of each stands in the
metadata, so that a reader takes any range without reading the rest. Other programs read the same files (polars, DuckDB,
Spark: group by the keys, sum the counts).

Merging holds one row group of each run: at every step the keys up to the smallest last key of these groups are final.
"""

from __future__ import annotations

import heapq
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kexue.words._keys import add_tables, bound

Batch = tuple[NDArray[np.uint64], NDArray[np.int64]]  # keys (n, words), counts (n,)

_FORMAT, _VERSION = "kexue.run", 1
_COST = 6  # a row of a run that is being merged lies in memory about this many times (read, trimmed, merged, copied)


def group_rows(memory: int, words: int) -> int:
    """Rows of a row group, so that some dozens of runs can be merged within ``memory``."""
    return int(np.clip(memory // (8 * (words + 1) * _COST * 32), 1 << 10, 1 << 17))


def fan_in(memory: int, words: int, rows: int) -> int:
    """How many runs of row groups of ``rows`` rows are merged at a time within ``memory``."""
    return int(np.clip(memory // (8 * (words + 1) * _COST * rows), 2, 256))


class RunWriter:
    """Write one run from sorted batches.

    Args:
        path: The file, new.
        words: 64-bit words of a key.
        rows: Rows of a row group.
        extra: What a reader must know of the keys, JSON values.
    """

    def __init__(self, path: str | os.PathLike[str], words: int, rows: int, extra: Mapping[str, Any]) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        names = [f"key{w}" for w in range(words)]
        self._schema = pa.schema([*((name, pa.uint64()) for name in names), ("count", pa.int64())])
        # Differences of sorted keys and small counts take few bytes: 4 a row, in half the time of a compressor.
        encoding = dict.fromkeys(names[1:], "PLAIN") | dict.fromkeys(("key0", "count"), "DELTA_BINARY_PACKED")
        self._writer = pq.ParquetWriter(
            path,
            self._schema,
            compression="none" if words == 1 else "lz4",
            use_dictionary=False,
            column_encoding=encoding,
            write_statistics=False,
        )
        self._rows, self._extra = rows, dict(extra)
        self._firsts: list[list[int]] = []
        self._waiting: list[Batch] = []
        self._size = 0

    def append(self, keys: NDArray[np.uint64], counts: NDArray[np.int64]) -> None:
        """Add rows; all keys are larger than those before."""
        self._waiting.append((keys, counts))
        self._size += len(counts)
        if self._size >= self._rows:
            self._flush(whole=False)

    def close(self) -> None:
        """Write what is left, and the index."""
        import pyarrow as pa

        self._flush(whole=True)
        head = {"format": _FORMAT, "version": _VERSION, "firsts": self._firsts, "extra": self._extra}
        self._writer.add_key_value_metadata({_FORMAT: json.dumps(head)})
        self._writer.close()
        pa.default_memory_pool().release_unused()

    def _flush(self, whole: bool) -> None:
        if not self._size:
            return
        keys = np.concatenate([batch[0] for batch in self._waiting])
        counts = np.concatenate([batch[1] for batch in self._waiting])
        done = 0
        while self._size - done >= (1 if whole else self._rows):
            last = min(done + self._rows, self._size)
            self._group(keys[done:last], counts[done:last])
            done = last
        self._waiting = [(keys[done:].copy(), counts[done:].copy())] if done < self._size else []
        self._size -= done

    def _group(self, keys: NDArray[np.uint64], counts: NDArray[np.int64]) -> None:
        import pyarrow as pa

        columns = [pa.array(np.ascontiguousarray(keys[:, w])) for w in range(keys.shape[1])]
        self._writer.write_table(
            pa.table([*columns, pa.array(counts)], schema=self._schema), row_group_size=len(counts)
        )
        self._firsts.append(keys[0].tolist())

    def __enter__(self) -> RunWriter:
        return self

    def __exit__(self, kind: Any, *rest: Any) -> None:
        if kind is None:
            self.close()
        else:
            self._writer.close()


class Run:
    """A run on disk.

    Attributes:
        firsts: (groups, words) first key of each row group.
        sizes: (groups,) rows of each.
        extra: What the writer noted.

    Raises:
        ValueError: The file is no run, or damaged.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            self._file = pq.ParquetFile(path, memory_map=False, pre_buffer=False)
            about = self._file.metadata
            head = json.loads((about.metadata or {})[_FORMAT.encode()])
            if head["version"] != _VERSION:
                raise ValueError(f"version {head['version']}")
        except (pa.ArrowInvalid, KeyError, ValueError) as error:
            raise ValueError(f"{path} is no run of counts or is damaged ({error}); remove it and count again") from None
        self.words = about.num_columns - 1
        self.extra: dict[str, Any] = head["extra"]
        self.firsts = np.array(head["firsts"], np.uint64).reshape(-1, self.words)
        self.sizes = np.array([about.row_group(g).num_rows for g in range(about.num_row_groups)], np.int64)

    @property
    def rows(self) -> int:
        """Number of keys."""
        return int(self.sizes.sum())

    def groups(self, start: int = 0, stop: int | None = None) -> Iterator[Batch]:
        """The row groups start .. stop, one at a time."""
        for number in range(start, len(self.sizes) if stop is None else stop):
            table = self._file.read_row_group(number, use_threads=False)
            keys = np.empty((table.num_rows, self.words), np.uint64)
            for w in range(self.words):
                keys[:, w] = table.column(w).to_numpy()
            yield keys, np.array(table.column(self.words).to_numpy())


def within(
    batches: Iterable[Batch], low: NDArray[np.uint64] | None, high: NDArray[np.uint64] | None
) -> Iterator[Batch]:
    """The rows with low <= key < high."""
    for keys, counts in batches:
        first = 0 if low is None else bound(keys, low, False)
        last = len(keys) if high is None else bound(keys, high, False)
        if first < last:
            yield keys[first:last], counts[first:last]


def in_batches(keys: NDArray[np.uint64], counts: NDArray[np.int64], rows: int = 1 << 17) -> Iterator[Batch]:
    """A sorted table, in memory or mapped, as batches."""
    for start in range(0, len(counts), rows):
        yield np.array(keys[start : start + rows]), np.array(counts[start : start + rows])


class _Cursor:
    """The batch of a source that is being merged, and the part of it that is left."""

    def __init__(self, source: Iterator[Batch]) -> None:
        self._source = source
        self.keys = np.empty((0, 1), np.uint64)
        self.counts = np.empty(0, np.int64)
        self.alive = self.refill()

    def refill(self) -> bool:
        """Read on if everything is taken; False at the end."""
        while not len(self.counts):
            batch = next(self._source, None)
            if batch is None:
                return False
            self.keys, self.counts = batch
        return True

    def take(self, limit: NDArray[np.uint64]) -> Batch:
        """Remove and return the rows up to and including ``limit``."""
        cut = bound(self.keys, limit, True)
        taken = self.keys[:cut], self.counts[:cut]
        self.keys, self.counts = self.keys[cut:], self.counts[cut:]
        self.alive = self.refill()
        return taken


def merge_batches(sources: Iterable[Iterator[Batch]]) -> Iterator[Batch]:
    """Merge sorted sources into sorted batches without repeated keys, adding the counts of equal keys."""
    cursors = [cursor for cursor in map(_Cursor, sources) if cursor.alive]
    while cursors:
        limit = min((cursor.keys[-1] for cursor in cursors), key=lambda key: key.tolist())
        parts = [cursor.take(limit) for cursor in cursors]
        yield _sum([part for part in parts if len(part[1])])
        cursors = [cursor for cursor in cursors if cursor.alive]


def _sum(parts: Sequence[Batch]) -> Batch:
    """Add sorted tables, smallest first."""
    ticket = itertools.count()  # numpy arrays cannot be compared where two sizes are equal
    heap = [(len(counts), next(ticket), keys, counts) for keys, counts in parts]
    heapq.heapify(heap)
    while len(heap) > 1:
        _, _, a, ca = heapq.heappop(heap)
        _, _, b, cb = heapq.heappop(heap)
        keys, counts = add_tables(
            np.ascontiguousarray(a), np.ascontiguousarray(ca), np.ascontiguousarray(b), np.ascontiguousarray(cb)
        )
        heapq.heappush(heap, (len(counts), next(ticket), keys, counts))
    return heap[0][2], heap[0][3]


def cuts(firsts: Sequence[NDArray[np.uint64]], sizes: Sequence[NDArray[np.int64]], ranges: int) -> list[Any]:
    """Keys that cut the rows of several runs into at most ``ranges`` ranges of about equal size."""
    keys = np.concatenate([np.asarray(part, np.uint64) for part in firsts])
    if ranges < 2 or not len(keys):
        return []
    order = np.lexsort(keys.T[::-1])
    total = np.cumsum(np.concatenate(list(sizes))[order])
    wanted = np.linspace(0, int(total[-1]), ranges + 1)[1:-1]
    chosen = keys[order][np.minimum(np.searchsorted(total, wanted), len(order) - 1)]
    return list(np.unique(chosen, axis=0))


class ArrayWriter:
    """Append to a .npy file whose length is not known beforehand.

    Args:
        path: The file, new.
        dtype: Of its numbers.
        width: Columns of a two-dimensional array; None makes a one-dimensional one.
    """

    _HEAD = 128

    def __init__(self, path: str | os.PathLike[str], dtype: Any, width: int | None = None) -> None:
        self._file = open(path, "wb")  # noqa: SIM115 - closed by close()
        self._dtype, self._width = np.dtype(dtype), width
        self.rows = 0
        self._file.write(b" " * self._HEAD)

    def append(self, values: NDArray[Any]) -> None:
        """Add rows."""
        self._file.write(np.ascontiguousarray(values, self._dtype).data)
        self.rows += len(values)

    def close(self) -> None:
        """Write the header."""
        shape = (self.rows,) if self._width is None else (self.rows, self._width)
        head = repr({"descr": self._dtype.str, "fortran_order": False, "shape": shape}).encode()
        start = b"\x93NUMPY\x01\x00" + (self._HEAD - 10).to_bytes(2, "little")
        self._file.seek(0)
        self._file.write(start + head.ljust(self._HEAD - 11) + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def __enter__(self) -> ArrayWriter:
        return self

    def __exit__(self, kind: Any, *rest: Any) -> None:
        if kind is None:
            self.close()
        else:
            self._file.close()


def mapped(path: Path) -> NDArray[Any]:
    """The array of a .npy file, on disk until it is used."""
    values = np.load(path, mmap_mode="r", allow_pickle=False) if path.stat().st_size > ArrayWriter._HEAD else None
    return np.load(path, allow_pickle=False) if values is None else np.asarray(values)
