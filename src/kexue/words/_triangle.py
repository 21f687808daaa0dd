"""The strictly lower triangle of pair counts: as a matrix, as sorted keys, on disk, and with its words renumbered."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import sparse

from kexue._progress import Bar
from kexue.words._jobs import Job, digest, publish
from kexue.words._merge import Merging
from kexue.words._spill import ArrayWriter, Batch, mapped


def csr(
    values: npt.NDArray[np.int64], columns: npt.NDArray[np.int32], indptr: npt.NDArray[np.int64]
) -> sparse.csr_matrix:
    """A matrix of these arrays, without copies."""
    size = len(indptr) - 1
    if indptr[-1] < 1 << 31:  # scipy wants equal index types and would otherwise widen the columns
        indptr = indptr.astype(np.int32)
    matrix = sparse.csr_matrix((size, size), dtype=np.int64)
    matrix.data, matrix.indices, matrix.indptr = values, columns, indptr
    matrix.has_sorted_indices = matrix.has_canonical_format = True
    return matrix


def canonical(matrix: Any) -> sparse.csr_matrix:
    """CSR with sorted rows."""
    result = sparse.csr_matrix(matrix)
    result.sort_indices()
    return result


def ranks(order: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """The new number of each word, when word ``order[k]`` becomes word k."""
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order))
    return rank


def renumbered(lower: sparse.csr_matrix, order: npt.NDArray[np.int64]) -> sparse.csr_matrix:
    """The triangle after word ``order[k]`` became word k."""
    rank = ranks(order)
    pairs = lower.tocoo()
    first, second = rank[pairs.row], rank[pairs.col]
    place = (np.maximum(first, second), np.minimum(first, second))
    return canonical(sparse.csr_matrix((pairs.data, place), shape=lower.shape))


def triangle(
    job: Job, runs: list[Path], size: int, bar: Bar
) -> tuple[npt.NDArray[Any], npt.NDArray[np.int32], npt.NDArray[np.int64], bool]:
    """Merge runs to the CSR arrays (indptr, columns, values) of the lower triangle, and whether they are mapped."""
    final = job.path("triangle", digest([run.name for run in runs], size), "")
    if not final.exists():
        temporary = Path(tempfile.mkdtemp(dir=job.folder, prefix=".triangle-"))
        write_triangle(temporary, Merging(job, runs), size, lambda amount: bar.advance(0, "merging"))
        publish(temporary, final)
    return read_triangle(final, job.memory // 4)


def write_triangle(folder: Path, batches: Iterable[Batch], size: int, advance: Callable[[int], None]) -> None:
    """Write sorted pairs as CSR arrays."""
    indptr = np.zeros(size + 1, np.int64)
    with ArrayWriter(folder / "columns.npy", "<i4") as columns, ArrayWriter(folder / "values.npy", "<i8") as values:
        for keys, counts in batches:
            rows = (keys[:, 0] >> np.uint64(32)).astype(np.int64)
            starts = np.flatnonzero(np.diff(rows, prepend=-1))
            indptr[rows[starts] + 1] += np.diff(starts, append=len(rows))
            columns.append((keys[:, 0] & np.uint64(0xFFFFFFFF)).astype(np.int32))
            values.append(counts)
            advance(len(counts))
    np.save(folder / "indptr.npy", np.cumsum(indptr), allow_pickle=False)


def triangle_batches(
    indptr: npt.NDArray[Any],
    columns: npt.NDArray[np.int32],
    values: npt.NDArray[np.int64],
    rank: npt.NDArray[np.int64] | None,
    block: int,
) -> Iterator[Batch]:
    """The pairs of a triangle as keys, in blocks of about ``block``; sorted within each, and all of them without rank.

    Args:
        indptr: Row ends of the triangle.
        columns: Its columns.
        values: Its counts.
        rank: (V,) new number of each word; None keeps them.
        block: Pairs of a batch.
    """
    for start in range(0, len(columns), block):
        stop = min(start + block, len(columns))
        rows = np.searchsorted(indptr, np.arange(start, stop), side="right") - 1
        others, counts = np.array(columns[start:stop]), np.array(values[start:stop])
        if rank is None:
            keys = rows.astype(np.uint64) << np.uint64(32) | others.astype(np.uint64)
        else:
            first, second = rank[rows], rank[others]
            keys = np.maximum(first, second).astype(np.uint64) << np.uint64(32) | np.minimum(first, second).astype(
                np.uint64
            )
            order = np.argsort(keys)
            keys, counts = keys[order], counts[order]
        yield keys[:, None], counts


def read_triangle(
    folder: Path, memory: int
) -> tuple[npt.NDArray[Any], npt.NDArray[np.int32], npt.NDArray[np.int64], bool]:
    """What :func:`write_triangle` wrote: in memory when it takes at most ``memory`` bytes, else mapped."""
    indptr = np.load(folder / "indptr.npy", allow_pickle=False)
    columns, values = mapped(folder / "columns.npy"), mapped(folder / "values.npy")
    if len(columns) != indptr[-1] or len(values) != indptr[-1]:
        raise ValueError(f"{folder} is damaged: {indptr[-1]} pairs announced, {len(columns)} and {len(values)} found")
    if columns.nbytes + values.nbytes <= memory:
        return indptr, np.array(columns), np.array(values), False
    return indptr, columns, values, True
