"""Counting word pairs in bounded memory: numbered shards on disk become runs of pairs, runs become one triangle.

read   each shard: words are numbered in order of appearance, ids go to disk            (numbers, words)
all    shards: the vocabulary, by descending count
pairs  groups of shards: ids are renumbered, pairs within the window counted row by row  (a sorted run)
merge  all runs: the strictly lower triangle, row by row
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kexue._progress import Bar
from kexue.words import _count
from kexue.words._executors import check_wanted
from kexue.words._jobs import Job, Task, digest
from kexue.words._merge import merge_runs, write_batches
from kexue.words._spill import Batch, group_rows
from kexue.words._text import Encoded
from kexue.words._triangle import read_triangle, write_triangle

_CHUNK = 1 << 20  # ids that are renumbered at a time
_WORD_COST = 300  # bytes of a word of the vocabulary: the str, its number, its places in list, dict and arrays
_TOKEN_COST = 24  # bytes of a token while its windows are counted: word, position, copies, what allocators keep


@functools.lru_cache(maxsize=2)
def _numbers(path: str) -> dict[str, int]:
    """Word -> number of a vocabulary file; a worker reads it once."""
    return {word: number for number, word in enumerate(json.loads(Path(path).read_text(encoding="utf-8")))}


def renumbering(words: Sequence[str], number: dict[str, int]) -> npt.NDArray[np.int32]:
    """For each word its number, or -1; never empty."""
    found = [number.get(word, -1) for word in words]
    return np.array(found or [-1], np.int32)


def count_group(
    path: str, parts: list[str], vocabulary: str, window: int, weighting: str, memory: int, n_jobs: int
) -> None:
    """Task: count the pairs of some shards and write them as a run."""
    number = _numbers(vocabulary)
    target = Path(path)
    rows = group_rows(memory, 1)
    capacity = max(memory // (2 * _TOKEN_COST), 64 * (window + 1))
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".pairs-") as folder:
        done: list[str] = []
        for tokens, counts, own in _buffers(map(Path, parts), number, window, capacity):
            weights, _ = _count.window_weights(window, weighting)
            done.append(os.path.join(folder, str(len(done))))
            found = _count.pair_rows(tokens, counts, weights, n_jobs, memory, own)
            write_batches(done[-1], _while_wanted(found), rows)
        if len(done) > 1:
            merge_runs(os.path.join(folder, "all"), done, None, None, memory)
            done = [os.path.join(folder, "all")]
        elif not done:
            done = [os.path.join(folder, "none")]
            write_batches(done[0], [], rows)
        os.replace(done[0], target)


def _while_wanted(parts: Iterable[_count.Rows]) -> Iterator[Batch]:
    for part in parts:
        check_wanted()
        yield part.batch()


def token_stream(
    parts: list[Encoded], words: Sequence[str], numbered: bool
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
    """All words of the parts in one array, with -1 between documents and at both ends; and how often each occurs.

    Args:
        parts: Emptied: our own copies are freed one by one; a caller's array is merely let go.
        words: The vocabulary; other words leave.
        numbered: The ids of the parts are numbers of ``words`` already.
    """
    number = {} if numbered else {word: k for k, word in enumerate(words)}
    counts = np.zeros(len(words), np.int64)
    room = sum(len(part.ids) + len(part.offsets) for part in parts) + 1
    tokens = np.empty(room, np.int32)
    tokens[0], filled = -1, 1
    parts.reverse()
    while parts:
        part = parts.pop()
        ids, document = np.empty(0, np.int32) if numbered else renumbering(part.words, number), 0
        for start in range(0, len(part.ids), _CHUNK):
            chunk = _as_int32(part.ids[start : start + _CHUNK])
            document, filled = _count.fill(
                chunk, start, part.offsets, document, ids, len(words), tokens, filled, counts
            )
        if tokens[filled - 1] >= 0:
            tokens[filled] = -1
            filled += 1
    return tokens[:filled], counts


def _as_int32(chunk: npt.NDArray[Any]) -> npt.NDArray[np.int32]:
    """A copy as int32; what does not fit can be no word number and becomes -1."""
    if chunk.dtype.itemsize > 4 or chunk.dtype == np.uint32:
        return np.where((chunk >= 0) & (chunk < 1 << 31), chunk, -1).astype(np.int32)
    return np.array(chunk, np.int32)


def pairs_of_tokens(
    tokens: npt.NDArray[np.int32],
    counts: npt.NDArray[np.int64],
    weights: npt.NDArray[np.int64],
    n_jobs: int,
    memory: int,
    new_job: Callable[[], Job],
    bar: Bar,
) -> tuple[tuple[Any, Any, Any, bool], Any]:
    """Count the pairs of words that lie in memory; the pairs go to disk when they outgrow it.

    Returns:
        (indptr, columns, values, whether they are mapped), and the temporary folder that they are mapped from.
    """
    found: list[_count.Rows] = []
    rows = _count.pair_rows(tokens, counts, weights, n_jobs, memory)
    held = 0
    for some in rows:
        found.append(some)
        held += some.nbytes
        bar.advance(len(some.ends))
        if 4 * held > memory:
            break
    else:
        return (*_count.assemble(found, len(counts)), False), None
    job, done = new_job(), False
    try:
        path = job.path("triangle", "0", "")
        path.mkdir()
        batches = (some.batch() for some in itertools.chain(_count.emptied(found), rows))
        write_triangle(path, batches, len(counts), lambda amount: bar.advance(0))
        pairs = read_triangle(path, job.memory // 4)
        done = True
    finally:
        files = job.close(done)
    return pairs, files


def _buffers(
    parts: Iterable[Path], number: dict[str, int], window: int, capacity: int
) -> Iterator[tuple[npt.NDArray[np.int32], npt.NDArray[np.int64], tuple[int, int]]]:
    """The words of some shards in pieces of about ``capacity`` tokens, with as much context as the window needs.

    Yields:
        (tokens with -1 between documents and at both ends, (V,) occurrences of the own tokens, own tokens from, to).
    """
    size = len(number)
    chunk_size = min(_CHUNK, max(capacity // 4, 16))
    tokens = np.empty(capacity + 2 * chunk_size + 2 * window + 16, np.int32)
    tokens[0], start, filled = -1, 1, 1
    unused = np.zeros(size, np.int64)

    def piece(stop: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64], tuple[int, int]]:
        tokens[filled] = -1
        return tokens[: filled + 1], _count.tally(tokens[start:stop], size), (start, stop)

    for part in map(Encoded.load, parts):
        ids, offsets, document = renumbering(part.words, number), part.offsets, 0
        for base in range(0, len(part.ids), chunk_size):
            chunk = np.array(part.ids[base : base + chunk_size], np.int32)
            document, filled = _count.fill(chunk, base, offsets, document, ids, size, tokens, filled, unused)
            if filled >= capacity:
                stop = filled - window  # the last tokens wait for what follows them
                if stop > start:
                    yield piece(stop)
                    kept = max(1, stop - window)
                    tokens[1 : 1 + filled - kept] = tokens[kept:filled].copy()
                    start, filled = 1 + stop - kept, 1 + filled - kept
        if tokens[filled - 1] >= 0:
            tokens[filled] = -1
            filled += 1
    if filled > start:
        yield piece(filled)


def vocabulary_file(job: Job, words: list[str]) -> Path:
    """Write the vocabulary where all workers find it."""
    text = json.dumps(words)
    path = job.path("vocabulary", hashlib.blake2b(text.encode(), digest_size=12).hexdigest(), ".json")
    if not path.exists():
        temporary = path.with_suffix(".tmp")
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    return path


def pairs_of_parts(
    job: Job, parts: list[Path], words: list[str], window: int, weighting: str, n_jobs: int, bar: Bar
) -> list[Path]:
    """Count the pairs of all shards; returns the runs."""
    share = job.memory // job.parallel
    share = max(1, share // 2, share - _WORD_COST * len(words))  # every worker holds the vocabulary
    capacity = max(share // (2 * _TOKEN_COST), 1)
    groups: list[list[Path]] = [[]]
    size = 0
    for part in parts:
        amount = (part / "ids.npy").stat().st_size // 4
        if groups[-1] and size + amount > capacity:
            groups.append([])
            size = 0
        groups[-1].append(part)
        size += amount
    file = vocabulary_file(job, words)
    tasks = (
        Task(
            digest([part.name for part in group], file.name, window, weighting),
            count_group,
            ([str(part) for part in group], str(file), window, weighting, share, n_jobs),
            len(group),
        )
        for group in groups
    )
    return list(job.run("pairs", tasks, ".parquet", bar.advance))
