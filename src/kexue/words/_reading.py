"""Reading a corpus into numbered words: in memory, or on disk when it outgrows memory or several workers share it."""

from __future__ import annotations

import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from kexue._progress import Bar
from kexue.words._jobs import Job, Task, in_order, publish
from kexue.words._shards import Shard, Source, shards, total_size
from kexue.words._spill import ArrayWriter
from kexue.words._text import Encoded, Kind, Tokenize, encode_items, item_size

_MOST_TEXT = 1 << 25  # bytes of text that are numbered together
_TOKEN_BYTES = 12  # of a word in memory: its id as read, its id in the vocabulary, its position


def read_here(
    kind: Kind,
    source: Source,
    tokenize: Tokenize | None,
    memory: int,
    n_jobs: int,
    new_job: Callable[[], Job],
    bar: Bar,
) -> tuple[list[Encoded] | list[Path], Job | None]:
    """Number the words of a corpus in threads of this process.

    Returns:
        The parts in memory and None; or, when they would outgrow it, their folders and the job that these belong to.
    """
    size = int(np.clip(memory // (16 * n_jobs), 1 << 16, _MOST_TEXT))
    files = total_size(source)
    if files is not None:  # a share for every thread
        size = max(1 << 16, min(size, files // n_jobs + 1))

    def read(shard: Shard) -> tuple[Encoded, int]:
        return encode_items(kind, shard.items, tokenize, read=read_size(memory // n_jobs)), shard.size

    parts: list[Encoded] = []
    held = 0
    with ThreadPoolExecutor(n_jobs) as pool:
        pieces = shards(source, size, item_size)
        found = in_order(pool, read, pieces, n_jobs - 1) if n_jobs > 1 else map(read, pieces)
        for part, amount in found:
            parts.append(part)
            bar.advance(amount / 1e6)
            held += 2 * _TOKEN_BYTES * len(part.ids)
            if held > memory:
                break
        else:
            return parts, None
        job = new_job()  # what was read goes to disk, and the rest after it
        try:
            folders = [_to_disk(job, number, part) for number, part in enumerate(parts)]
            parts.clear()
            for part, amount in found:
                folders.append(_to_disk(job, len(folders), part))
                bar.advance(amount / 1e6)
        except BaseException:
            job.close(False)
            raise
    return folders, job


def _to_disk(job: Job, number: int, part: Encoded) -> Path:
    path = job.path("read", f"{number:06d}", "")
    path.mkdir()
    part.save(path)
    return path


def read_shards(kind: Kind, source: Source, tokenize: Tokenize | None, job: Job, bar: Bar) -> list[Path]:
    """Number the words of all shards by the workers of a job; returns their folders. On failure the job is closed."""
    try:
        share = max(1, job.memory // job.parallel)
        size = int(np.clip(share // _TOKEN_BYTES, 1 << 16, 1 << 28))
        tasks = (
            Task(shard.key, encode_shard, (kind, shard.items, tokenize, share), shard.size / 1e6)
            for shard in shards(source, size, item_size, keys=True)
        )
        return list(job.run("read", tasks, "", bar.advance))
    except BaseException:
        job.close(False)
        raise


def encode_shard(path: str, kind: Kind, items: list[Any], tokenize: Tokenize | None, memory: int) -> None:
    """Task: number the words of a shard and write them to a folder."""
    target = Path(path)
    temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=".read-"))
    try:
        with ArrayWriter(temporary / "ids.npy", "<i4") as out:
            found = encode_items(kind, items, tokenize, out.append, read_size(memory))
        found.save(temporary)
        publish(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def read_size(memory: int) -> int:
    """Bytes of a file that are read at once within a budget."""
    return int(np.clip(memory // 32, 1 << 16, 1 << 25))


def count_words(kind: Kind, source: Source, tokenize: Tokenize | None, memory: int, bar: Bar) -> Counter[str]:
    """How often each word of a corpus occurs."""
    total: Counter[str] = Counter()
    for shard in shards(source, int(np.clip(memory // 16, 1 << 16, _MOST_TEXT)), item_size):
        part = encode_items(kind, shard.items, tokenize, read=read_size(memory))
        total.update(dict(zip(part.words, part.counts().tolist(), strict=True)))
        bar.advance(shard.size / 1e6)
    return total


def word_totals(parts: Iterable[Encoded] | Iterable[Path]) -> tuple[Counter[str], int, int]:
    """How often each word occurs in all parts; the number of documents and of words."""
    total: Counter[str] = Counter()
    documents = tokens = 0
    for part in parts:
        found = part if isinstance(part, Encoded) else Encoded.load(part)
        documents += len(found.offsets) - 1
        tokens += len(found.ids)
        total.update(dict(zip(found.words, found.counts().tolist(), strict=True)))
    return total, documents, tokens
