"""Threads that each run a part of the heads from beginning to end.

torch's own threads split every operation: a loop over small chunks then meets at a barrier thousands of times, which
costs much on a busy machine. These workers meet once. Each has one thread of its own for torch's operations.
"""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

_lock = threading.Lock()
_pool: tuple[int, int, ThreadPoolExecutor] | None = None  # (process, threads, workers)


def _workers(threads: int) -> ThreadPoolExecutor:
    global _pool
    with _lock:
        if _pool is None or _pool[:2] != (os.getpid(), threads):  # a fork does not inherit threads
            ready = threading.Barrier(threads + 1)

            def start() -> None:
                torch.get_num_threads()  # a thread takes over the common number when it is first asked for
                torch.set_num_threads(1)  # holds for this thread, and is the common number from now on
                ready.wait()

            pool = ThreadPoolExecutor(threads, "kexue-attention")
            for _ in range(threads):
                pool.submit(start)
            ready.wait()
            torch.set_num_threads(threads)  # the common number is what it was
            _pool = (os.getpid(), threads, pool)
        return _pool[2]


def run_parts(function: Callable[[int], None], parts: int, worthwhile: bool) -> None:
    """Call ``function(0), ..., function(parts - 1)``, on torch's number of threads if it is worthwhile."""
    threads = torch.get_num_threads()
    if parts < 2 or threads < 2 or not worthwhile:
        for i in range(parts):
            function(i)
        return

    def quiet(i: int) -> None:
        with torch.no_grad():
            function(i)

    jobs = [_workers(threads).submit(quiet, i) for i in range(parts)]
    for job in jobs:
        job.result()


def split_heads(batch: int, heads: int, rows: int) -> Sequence[tuple[slice, slice]]:
    """Cut B x H heads into blocks of at most ``rows``: whole items of the batch, or heads of one item."""
    if heads <= rows:
        step = max(1, rows // max(heads, 1))
        return [(slice(i, min(i + step, batch)), slice(0, heads)) for i in range(0, batch, step)]
    parts = -(-heads // rows)
    edges = [heads * i // parts for i in range(parts + 1)]
    return [(slice(i, i + 1), slice(a, b)) for i in range(batch) for a, b in itertools.pairwise(edges)]
