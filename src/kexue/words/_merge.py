"""Merging the runs of a count into one table, range by range where there are several workers.

The runs of n-grams have alphabets of their own: their keys are rewritten for the union of all alphabets as they are
read. Keys of word pairs have no alphabet.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterable, Iterator
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kexue.words._jobs import Job, Task, digest
from kexue.words._keys import Layout, Table, bound, widened
from kexue.words._spill import (
    Batch,
    Run,
    RunWriter,
    cuts,
    fan_in,
    group_rows,
    in_batches,
    mapped,
    merge_batches,
    within,
)

_Border = list[int] | None
_FORMAT, _VERSION = "kexue.ngrams", 1


def write_batches(path: str | Path, batches: Iterable[Batch], rows: int) -> None:
    """Write sorted batches of pair keys as a run."""
    with RunWriter(path, 1, rows, _about(1, np.empty(0, np.uint32))) as writer:
        for keys, counts in batches:
            writer.append(keys, counts)


def write_table(path: str | Path, table: Table, rows: int) -> None:
    """Write a table of n-grams as a run."""
    with RunWriter(path, table.layout.words, rows, _about(table.layout.order, table.alphabet)) as writer:
        for keys, counts in in_batches(table.keys, table.counts, rows):
            writer.append(keys, counts)


def _about(order: int, alphabet: NDArray[np.uint32]) -> dict[str, Any]:
    return {"order": order, "alphabet": alphabet.tolist()}


def _alphabet(run: Run) -> NDArray[np.uint32]:
    return np.array(run.extra["alphabet"], np.uint32)


def _batches(run: Run, alphabet: NDArray[np.uint32], low: Any = None, high: Any = None) -> Iterator[Batch]:
    """Batches of a run over a larger alphabet; ``low`` and ``high`` are keys over that one."""
    order, own = run.extra["order"], _alphabet(run)
    firsts = widened(run.firsts, order, own, alphabet)
    start = 0 if low is None else max(0, bound(firsts, low, True) - 1)
    stop = None if high is None else bound(firsts, high, False)
    groups = ((widened(keys, order, own, alphabet), counts) for keys, counts in run.groups(start, stop))
    return within(groups, low, high)


def merge_runs(path: str, paths: list[str], low: _Border, high: _Border, memory: int) -> None:
    """Task: merge runs, or one range of their keys (over the union of their alphabets), into one run."""
    merging = Merging(None, [Path(name) for name in paths], memory)
    borders = [None if border is None else np.array(border, np.uint64) for border in (low, high)]
    temporary = f"{path}.{os.getpid()}.tmp"
    about = _about(merging.order, merging.alphabet)
    with RunWriter(temporary, merging.words, group_rows(memory, merging.words), about) as out:
        for keys, counts in merge_batches(_batches(run, merging.alphabet, *borders) for run in merging.runs):
            out.append(keys, counts)
    os.replace(temporary, path)


class Merging:
    """The sum of runs, to be iterated over once as sorted batches.

    Args:
        job: Runs what can be done by several workers, and keeps intermediate runs; None merges here, in one step.
        paths: The runs.
        memory: Budget in bytes; that of a worker of the job when there is one.

    Attributes:
        order: Of the grams.
        alphabet: Union of the alphabets.
        words: 64-bit words of a key.
    """

    def __init__(self, job: Job | None, paths: list[Path], memory: int = 0) -> None:
        self._job, self._paths = job, paths
        self._memory = memory if job is None else max(1, job.memory // job.parallel)
        self._open()
        while job is not None:
            most = fan_in(self._memory, self.words, group_rows(self._memory, self.words))
            if len(self._paths) <= most:
                break
            names = [str(path) for path in self._paths]
            groups = [names[k : k + most] for k in range(0, len(names), most)]
            tasks = [Task(digest(group), merge_runs, (group, None, None, self._memory), 0) for group in groups]
            self._paths = list(job.run("merge", tasks, ".parquet"))
            self._open()

    def _open(self) -> None:
        self.runs = [Run(path) for path in self._paths]
        union = reduce(np.union1d, map(_alphabet, self.runs), np.empty(0, np.uint32))
        self.alphabet, self.order = union.astype(np.uint32), int(self.runs[0].extra["order"])
        self.words = Layout.of(self.order, self.alphabet.size).words

    def __iter__(self) -> Iterator[Batch]:
        job = self._job
        if job is None or job.parallel == 1 or len(self.runs) == 1:
            yield from merge_batches(_batches(run, self.alphabet) for run in self.runs)
        else:
            names = [str(path) for path in self._paths]
            tasks = [
                Task(digest(names, low, high), merge_runs, (names, low, high, self._memory), 0)
                for low, high in itertools.pairwise(self._borders(4 * job.parallel))
            ]
            for path in job.run("range", tasks, ".parquet"):
                yield from _batches(Run(path), self.alphabet)
        if job is not None:
            job.forget(path for stage in ("merge", "range") for path in job.folder.glob(f"{stage}-*"))

    def _borders(self, ranges: int) -> list[_Border]:
        firsts = [widened(run.firsts, self.order, _alphabet(run), self.alphabet) for run in self.runs]
        return [None, *(key.tolist() for key in cuts(firsts, [run.sizes for run in self.runs], ranges)), None]


def describe_table(folder: Path, alphabet: NDArray[np.uint32], order: int, min_count: int) -> None:
    """Write what the arrays of a table in a folder mean."""
    about = {"format": _FORMAT, "version": _VERSION, "order": order, "min_count": min_count}
    text = json.dumps({**about, "alphabet": alphabet.tolist()})
    (folder / "table.json").write_text(text, encoding="utf-8")


def read_table(folder: Path, memory: int) -> Table:
    """A table that lies in a folder: in memory when it takes at most ``memory`` bytes, else mapped.

    Raises:
        ValueError: Not such a folder, damaged, or another format version.
    """
    try:
        about = json.loads((folder / "table.json").read_text(encoding="utf-8"))
        kind, version = about["format"], about["version"]
        alphabet, order = np.array(about["alphabet"], np.uint32), int(about["order"])
        keys, counts = mapped(folder / "keys.npy"), mapped(folder / "counts.npy")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder} holds no n-gram counts or is damaged: {error}") from None
    if kind != _FORMAT or version != _VERSION:
        raise ValueError(f"{folder}: expected {_FORMAT} version {_VERSION}; got {kind} version {version}")
    layout = Layout.of(order, alphabet.size)
    if keys.shape != (len(counts), layout.words):
        raise ValueError(f"{folder} is damaged: {len(counts)} counts for keys of shape {keys.shape}")
    if keys.nbytes + counts.nbytes <= memory:
        return Table(alphabet, layout, np.array(keys), np.array(counts))
    return Table(alphabet, layout, keys, counts, mapped=True)
