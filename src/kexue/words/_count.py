"""Counting pairs of words within a window: the kernels of :class:`kexue.words.CooccurrenceCounter`.

Row accumulation (Gustavson): an inverted index lists where each word stands; the row of word i is one dense vector of
exact integers to which all windows around i are added. No pair is hashed, nothing is sorted, nothing goes to disk, and
rows are independent, so that threads may share them out without changing a bit.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from kexue.words._jobs import in_order
from kexue.words._numba import kernel, prefetch
from kexue.words._spill import Batch

_AHEAD = 8  # occurrences between the request for a window and its use; the windows lie all over the corpus
_SHIFT = 3
_GROUP = 1 << _SHIFT  # neighbouring words that share one mark "touched"; their totals fill one cache line
_ROW_WORK = 1 << 17  # positions per task, so that the copies of a task are small beside the result


def window_weights(window: int, weighting: str) -> tuple[npt.NDArray[np.int64], int]:
    """Integer weight of each distance 0..window (0 unused) and the unit: what one full count is worth."""
    if weighting == "flat":
        weights = np.ones(window + 1, np.int64)
        unit = 1
    else:
        unit = math.lcm(*range(1, min(window, 64) + 1))  # beyond 42 it is too large anyway, and soon has 1e5 digits
        if unit >= 1 << 62:
            raise ValueError(
                f"window {window} is too wide for exact harmonic weights (at most 42); use weighting='flat'"
            )
        weights = np.array([0, *(unit // d for d in range(1, window + 1))], np.int64)
    weights[0] = 0
    return weights, unit


def check_range(tokens: int, weights: npt.NDArray[np.int64]) -> None:
    """Raise ValueError if the total weight of so many tokens could exceed an int64."""
    if tokens * 2 * sum(weights.tolist()) >= 1 << 63:
        raise ValueError(
            f"{tokens} tokens with window {len(weights) - 1} could overflow exact 64-bit counts; "
            "use a smaller window or weighting='flat'"
        )


@kernel
def fill(
    chunk: Any, base: int, offsets: Any, document: int, ids: Any, size: int, out: Any, filled: int, counts: Any
) -> Any:
    """Append the words of a chunk that are in the vocabulary, with -1 between documents; count them.

    Args:
        chunk: Old ids; those outside 0..len(ids) are dropped.
        base: Position of the chunk in the corpus.
        offsets: Document starts of the whole corpus.
        document: Document in which the chunk starts.
        ids: New id of each old one, negative to drop it; when empty, the ids stay and those >= ``size`` are dropped.
        size: Number of words.
        out: Receives the words.
        filled: How many are there already.
        counts: (size,) number of occurrences, increased.
    """
    same = len(ids) == 0
    for k in range(len(chunk)):
        while offsets[document + 1] <= base + k:
            document += 1
            if out[filled - 1] >= 0:  # no two separators in a row
                out[filled] = -1
                filled += 1
        word = chunk[k]
        if not same:
            word = ids[word] if 0 <= word < len(ids) else -1
        if 0 <= word < size:
            out[filled] = word
            filled += 1
            counts[word] += 1
    return document, filled


@kernel
def tally(tokens: Any, size: int) -> Any:
    """(size,) occurrences of each word."""
    counts = np.zeros(size, np.int64)
    for word in tokens:
        if word >= 0:
            counts[word] += 1
    return counts


@kernel
def index(tokens: Any, first: int, last: int, starts: Any, positions: Any) -> None:
    """List the positions of each word from first to last: word i has ``positions[starts[i] : starts[i + 1]]``."""
    following = starts[:-1].copy()
    for place in range(first, last):
        word = tokens[place]
        if word >= 0:
            positions[following[word]] = place
            following[word] += 1


@kernel
def rows(
    tokens: Any,
    positions: Any,
    starts: Any,
    low: int,
    high: int,
    weights: Any,
    total: Any,
    touched: Any,
    columns: Any,
    values: Any,
    size: int,
    ends: Any,
) -> Any:
    """Rows of the strictly lower triangle of the counts, from ``low`` until ``high`` or until there is no room.

    Args:
        tokens: Words with -1 between documents and at both ends.
        positions: Where each word stands.
        starts: Where each word's positions start.
        low: First row.
        high: One past the last row.
        weights: Weight of each distance; its length is window + 1.
        total: Zeros, one for each word, rounded up to whole groups of groups; zeros again afterwards.
        touched: Zeros, one for each group; zeros again afterwards.
        columns: Receives the columns, ascending within a row.
        values: Receives the counts.
        size: How many of both are filled.
        ends: (V,) receives the end of each row within ``columns``.

    Returns:
        (next row, size).
    """
    window = len(weights) - 1
    blocks = len(touched) // 8
    touched_blocks = touched.view(np.uint64)  # eight marks at a time
    last = len(positions) - 1
    for word in range(low, high):
        if size + word > len(columns):
            return word, size
        for k in range(starts[word], starts[word + 1]):
            place = np.int64(positions[k])
            coming = np.int64(positions[min(k + _AHEAD, last)])
            prefetch(tokens, max(coming - window, 0))
            prefetch(tokens, min(coming + window, len(tokens) - 1))
            for distance in range(1, window + 1):
                other = tokens[place - distance]
                if other < 0:
                    break
                total[other] += weights[distance]
                touched[other >> _SHIFT] = 1
            for distance in range(1, window + 1):
                other = tokens[place + distance]
                if other < 0:
                    break
                total[other] += weights[distance]
                touched[other >> _SHIFT] = 1
        for block in range(blocks):
            if touched_blocks[block] == 0:
                continue
            for group in range(8 * block, 8 * block + 8):
                if touched[group] == 0:
                    continue
                for other in range(group << _SHIFT, (group + 1) << _SHIFT):
                    value = total[other]
                    if value != 0:
                        total[other] = 0
                        if other < word:
                            columns[size] = other
                            values[size] = value
                            size += 1
            touched_blocks[block] = 0
        ends[word] = size
    return high, size


class Rows(NamedTuple):
    """Some rows of the strictly lower triangle of the pair counts.

    Attributes:
        low: The first row.
        ends: (rows,) where each ends in the columns.
        columns: Ascending within a row.
        values: The counts.
    """

    low: int
    ends: npt.NDArray[np.int64]
    columns: npt.NDArray[np.int32]
    values: npt.NDArray[np.int64]

    @property
    def nbytes(self) -> int:
        """Size of columns and values."""
        return self.columns.nbytes + self.values.nbytes

    def batch(self) -> Batch:
        """Sorted keys (row << 32 | column), (n, 1), and counts."""
        rows = np.arange(self.low, self.low + len(self.ends)).astype(np.uint64)
        keys = np.repeat(rows << np.uint64(32), np.diff(self.ends, prepend=0)) | self.columns.astype(np.uint64)
        return np.asarray(keys.reshape(-1, 1), np.uint64), self.values


def pair_rows(
    tokens: npt.NDArray[np.int32],
    counts: npt.NDArray[np.int64],
    weights: npt.NDArray[np.int64],
    n_jobs: int,
    memory: int,
    own: tuple[int, int] | None = None,
) -> Iterator[Rows]:
    """Strictly lower triangle of the weighted pair counts, in ranges of rows.

    Args:
        tokens: Words with -1 between documents and at both ends.
        counts: (V,) occurrences of each word among the own tokens.
        weights: Of :func:`window_weights`.
        n_jobs: Threads; the result does not depend on it.
        memory: Budget in bytes; decides how many rows come at a time.
        own: Tokens from .. to whose windows are counted; the others are only looked at. None means all.
    """
    size = len(counts)
    first, last = (0, len(tokens)) if own is None else own
    starts = np.zeros(size + 1, np.int64)
    np.cumsum(counts, out=starts[1:])
    positions = np.empty(int(starts[-1]), np.int32 if len(tokens) < 1 << 31 else np.int64)
    index(tokens, first, last, starts, positions)
    # Rows cost their occurrences plus a look at every group of words, and occurrences cost memory: each meets at most
    # 2 * window different words, some tasks are in memory at a time, and their arrays grow by copying.
    work = int(np.clip(memory // (32 * 12 * 2 * (len(weights) - 1) * n_jobs), 1 << 10, _ROW_WORK))
    looks = np.arange(1, size + 1) * (size // (64 * _GROUP) + 1)
    cost = starts[1:] / work + looks / _ROW_WORK
    tasks = max(1, int(cost[-1])) if size else 1
    bounds = np.searchsorted(cost, np.linspace(0, cost[-1] if size else 0, tasks + 1)[1:-1]).tolist()
    bounds = sorted({0, *bounds, size})
    ends = np.zeros(size, np.int64)
    blocks = size // (8 * _GROUP) + 1

    kept = threading.local()  # buffers that the tasks of a thread share

    def task(number: int) -> Rows:
        low, high = bounds[number], bounds[number + 1]
        if not hasattr(kept, "total"):
            kept.total, kept.touched = np.zeros(blocks * 8 * _GROUP, np.int64), np.zeros(blocks * 8, np.uint8)
            kept.columns, kept.values = np.empty(size + (1 << 12), np.int32), np.empty(size + (1 << 12), np.int64)
        row, filled = low, 0
        while True:
            row, filled = rows(
                tokens, positions, starts, row, high, weights, kept.total, kept.touched, kept.columns, kept.values,
                filled, ends,
            )  # fmt: skip
            if row == high:
                return Rows(low, ends[low:high].copy(), kept.columns[:filled].copy(), kept.values[:filled].copy())
            kept.columns = np.append(kept.columns[:filled], np.empty(filled + high, np.int32))
            kept.values = np.append(kept.values[:filled], np.empty(filled + high, np.int64))

    numbers = range(len(bounds) - 1)
    if n_jobs == 1:
        yield from map(task, numbers)
    else:
        with ThreadPoolExecutor(n_jobs) as pool:
            yield from in_order(pool, task, numbers, 2 * n_jobs)


def emptied(parts: list[Rows]) -> Iterator[Rows]:
    """The parts in order; each leaves the list when it is taken."""
    parts.reverse()
    while parts:
        yield parts.pop()


def assemble(
    parts: list[Rows], size: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int32], npt.NDArray[np.int64]]:
    """Join all rows to CSR arrays (indptr, columns, values); empties the list."""
    indptr = np.zeros(size + 1, np.int64)
    total = sum(len(part.columns) for part in parts)
    columns = np.empty(total, np.int32)
    values = np.empty(total, np.int64)
    done = 0
    for part in emptied(parts):  # each part is freed once it is copied: the peak stays near the size of the result
        indptr[part.low + 1 : part.low + 1 + len(part.ends)] = part.ends + done
        columns[done : done + len(part.columns)] = part.columns
        values[done : done + len(part.columns)] = part.values
        done += len(part.columns)
    return indptr, columns, values
