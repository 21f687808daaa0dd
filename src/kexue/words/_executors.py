"""Who runs the tasks of a count: threads, processes, a Ray cluster, or any executor of the user."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import pickle
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor, CancelledError, ProcessPoolExecutor, ThreadPoolExecutor
from typing import Any, NamedTuple

_TRIES = 3  # of a task whose worker died
_FLIGHT = 64  # tasks that an executor of unknown size is given at a time
_HIDING = threading.RLock()

Executor = Any  # None, "processes", "ray", or an object with submit(function, *arguments)


def check_executor(executor: Executor) -> None:
    """Raise TypeError or ValueError unless ``executor`` can run tasks."""
    if executor is None or callable(getattr(executor, "submit", None)):
        return
    if callable(getattr(executor, "apply_async", None)):
        return
    if not isinstance(executor, str):
        raise TypeError(
            "executor must be None, 'processes', 'ray' or an object with submit(function, *arguments); "
            f"got {type(executor).__name__}"
        )
    if executor not in ("processes", "ray"):
        raise ValueError(f"executor must be None, 'processes', 'ray' or an object with submit(); got {executor!r}")


_THREAD = threading.local()


def _listen(stop: threading.Event) -> None:
    _THREAD.stop = stop


def check_wanted() -> None:
    """To be called now and then by a task: ends it if it runs in a thread whose count was interrupted or has failed."""
    stop = getattr(_THREAD, "stop", None)
    if stop is not None and stop.is_set():
        raise CancelledError("the count was interrupted")


class Workers:
    """Any object with ``submit(function, *arguments)`` that returns futures."""

    def __init__(self, executor: Any, size: int, flight: int) -> None:
        self._executor, self.size, self.flight = executor, size, flight

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return self._executor.submit(function, *arguments)

    def result(self, future: Any) -> Any:
        return future.result()

    def close(self, done: bool) -> None:
        """The executor is the user's."""


class _Threads(Workers):
    """Threads of this process; the kernels release the interpreter lock."""

    def __init__(self, n_jobs: int) -> None:
        self._stop = threading.Event()
        pool = ThreadPoolExecutor(n_jobs, initializer=_listen, initargs=(self._stop,))
        super().__init__(pool, n_jobs, 2 * n_jobs)

    def close(self, done: bool) -> None:
        if not done:
            self._stop.set()  # a thread cannot be killed: tasks look whether they are still wanted
        self._executor.shutdown(wait=True, cancel_futures=True)


class _Pool(Workers):
    """Objects with ``apply_async``: ``multiprocessing.Pool`` and its like on clusters."""

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return self._executor.apply_async(function, arguments)

    def result(self, future: Any) -> Any:
        return future.get()


class _Retried(NamedTuple):
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    future: list[Any]  # the current one, then how often it was tried, then the generation of the pool


class _Processes(Workers):
    """Processes of this machine; when one dies, the pool is made anew and unfinished tasks run again."""

    def __init__(self, n_jobs: int) -> None:
        super().__init__(None, n_jobs, 2 * n_jobs)
        self._generation = 0
        self._script: bool | None = None  # whether workers run the calling script; known from the first task on
        self._make()

    def _make(self) -> None:
        # Fresh interpreters: a copy of a process with threads and open locks may hang.
        self._executor = ProcessPoolExecutor(self.size, mp_context=multiprocessing.get_context("spawn"))

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Any:
        if self._script is None:
            self._script = _needs_script([function, *arguments])
        retried = _Retried(function, arguments, [None, 0, 0])
        with contextlib.nullcontext() if self._script else _script_hidden():  # submitting may start a process
            self._start(retried)
        return retried

    def _start(self, retried: _Retried) -> None:
        try:
            future = self._executor.submit(retried.function, *retried.arguments)
        except BrokenExecutor:
            self._renew(self._generation)
            future = self._executor.submit(retried.function, *retried.arguments)
        retried.future[0], retried.future[2] = future, self._generation

    def _renew(self, generation: int) -> None:
        if generation == self._generation:
            self._executor.shutdown(wait=False, cancel_futures=True)
            self._generation += 1
            self._make()

    def result(self, future: Any) -> Any:
        while True:
            try:
                return future.future[0].result()
            except BrokenExecutor:
                future.future[1] += 1
                if future.future[1] >= _TRIES:
                    raise RuntimeError(
                        f"a worker process died {_TRIES} times over the same task (out of memory? lower n_jobs or "
                        "memory; a script that defines `tokenize` itself needs `if __name__ == '__main__':`). What was "
                        "finished is kept in the folder, if one was given"
                    ) from None
                warnings.warn("a worker process died; its task runs again", RuntimeWarning, stacklevel=4)
                with contextlib.nullcontext() if self._script else _script_hidden():
                    self._renew(future.future[2])
                    self._start(future)

    def close(self, done: bool) -> None:
        self._executor.shutdown(wait=done, cancel_futures=True)


def _needs_script(values: list[Any]) -> bool:
    """Whether a function among the values comes from the script that is running."""
    functions = [value for value in values if callable(value)]
    try:
        return any(b"__main__" in pickle.dumps(function) for function in functions)
    except Exception:  # submitting it will fail as well, with an error that says more
        return True


@contextlib.contextmanager
def _script_hidden() -> Iterator[None]:
    """Start processes that do not run the calling script again: it may have no `if __name__ == "__main__":`."""
    main = sys.modules["__main__"]
    with _HIDING:
        kept = {name: getattr(main, name) for name in ("__spec__", "__file__") if hasattr(main, name)}
        try:
            for name in kept:
                setattr(main, name, None)
            yield
        finally:
            for name, value in kept.items():
                setattr(main, name, value)


class RayWorkers(Workers):
    """A Ray cluster: the one that is running or named by RAY_ADDRESS, else one on this machine with ``n_jobs`` CPUs."""

    def __init__(self, n_jobs: int) -> None:
        try:
            import ray
        except ImportError:
            raise ImportError("executor='ray' needs Ray: pip install 'kexue[ray]'") from None
        self._ray = ray
        self._own = not ray.is_initialized()
        if self._own:
            local: dict[str, Any] = {} if os.environ.get("RAY_ADDRESS") else {"num_cpus": n_jobs}
            ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR, **local)
        size = int(ray.cluster_resources().get("CPU", n_jobs))
        super().__init__(None, size, 2 * size)
        self._remote = ray.remote(max_retries=_TRIES)(_apply)

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return self._remote.remote(function, arguments)

    def result(self, future: Any) -> Any:
        try:
            return self._ray.get(future)
        except self._ray.exceptions.RayTaskError as error:
            cause = error.cause if isinstance(error.cause, Exception) else error
            raise cause from None

    def close(self, done: bool) -> None:
        if self._own:
            with contextlib.suppress(Exception):
                self._ray.shutdown()


def _apply(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    return function(*arguments)


def workers_of(executor: Executor, n_jobs: int) -> Workers | None:
    """What runs tasks for an executor; None is this process, one task at a time."""
    if executor is None:
        return _Threads(n_jobs) if n_jobs > 1 else None
    if executor == "processes":
        return _Processes(n_jobs)
    if executor == "ray":
        return RayWorkers(n_jobs)
    size = max(n_jobs, getattr(executor, "_max_workers", 0) or getattr(executor, "_processes", 0) or 0)
    kind = Workers if callable(getattr(executor, "submit", None)) else _Pool
    return kind(executor, size, _FLIGHT)
