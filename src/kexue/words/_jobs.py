"""Who counts, and where the results lie: threads, processes, a Ray cluster or any executor; resuming after a kill.

A count consists of tasks: pure functions ``task(path, *arguments)`` that write the file ``path``. A file appears under
its name only when it is complete, and the name holds a digest of everything the result depends on. So a task that is
run again, on another machine or after the worker was killed, cannot lose or double a count, and a count that was killed
goes on with the tasks whose files are missing. No scheduler is written here: tasks go to an executor.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import multiprocessing
import os
import pickle
import shutil
import sys
import tempfile
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import BrokenExecutor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from types import BuiltinFunctionType, CodeType, FunctionType
from typing import Any, NamedTuple

from kexue._checks import check_int
from kexue._files import write_json
from kexue.words._runs import parse_memory

_FORMAT, _VERSION = "kexue.count", 1
_NAME = "count.json"
_TRIES = 3  # of a task whose worker died
_HIDING = threading.RLock()
_FLIGHT = 64  # tasks that an executor of unknown size is given at a time

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


def check_counting(memory: int | str, n_jobs: int, executor: Executor, folder: Any, on_error: str) -> None:
    """Check the arguments that all counters share."""
    parse_memory(memory)
    check_int("n_jobs", n_jobs, 1)
    check_executor(executor)
    if folder is not None and not isinstance(folder, str | os.PathLike):
        raise TypeError(f"folder must be a path or None; got {type(folder).__name__}")
    if on_error not in ("raise", "skip"):
        raise ValueError(f"on_error must be 'raise' or 'skip'; got {on_error!r}")


class Task(NamedTuple):
    """One piece of work.

    Attributes:
        key: Names everything the result depends on.
        function: Called as ``function(path, *arguments)``; has to write ``path`` atomically.
        arguments: Picklable.
        amount: How far it moves the progress bar.
    """

    key: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    amount: float = 1.0


def digest(*values: Any) -> str:
    """Short digest of JSON values."""
    return hashlib.blake2b(json.dumps(values, ensure_ascii=True).encode(), digest_size=12).hexdigest()


def identity(function: Callable[..., Any]) -> str:
    """What tells one function (a tokenizer) from another: its configuration, or its name with what it consists of."""
    config = getattr(function, "to_config", None)
    if callable(config):
        return digest(config())
    kind = function if hasattr(function, "__qualname__") else type(function)
    name = f"{getattr(kind, '__module__', '')}.{kind.__qualname__}"
    if isinstance(function, FunctionType):  # many functions share the name "<lambda>"
        cells = [_state(cell.cell_contents) for cell in function.__closure__ or ()]
        defaults = [_state(value) for value in (function.__defaults__, function.__kwdefaults__)]
        return f"{name} {digest(_code(function.__code__), cells, defaults)}"
    return name if isinstance(function, BuiltinFunctionType | type) else f"{name} {_state(function)}"


def _code(code: CodeType) -> list[Any]:
    """Code without its place in a file."""
    parts = [_code(part) if isinstance(part, CodeType) else _state(part) for part in code.co_consts]
    return [code.co_code.hex(), code.co_names, parts]


def _state(value: Any) -> str:
    """Digest of a value that can be pickled; of others, the type."""
    if isinstance(value, FunctionType):
        return identity(value)
    if isinstance(value, frozenset):  # what `in {"a", "b"}` becomes; its order differs between processes
        value = sorted(map(_state, value))
    import joblib  # its hash does not depend on the order of a set, unlike a pickle

    try:
        return str(joblib.hash(value))
    except Exception:  # whatever a class raises that cannot be pickled
        return type(value).__qualname__


class Job:
    """The tasks of one count: a folder for their files, and an executor.

    Args:
        settings: What tasks of this count have in common; a folder is used for one of them only.
        memory: Budget in bytes, shared by the workers.
        n_jobs: Threads or processes.
        executor: None runs tasks in this process, in ``n_jobs`` threads.
        folder: Keeps the files, so that a killed count goes on; None is a temporary folder.
    """

    def __init__(
        self,
        settings: dict[str, Any],
        memory: int,
        n_jobs: int,
        executor: Executor,
        folder: str | os.PathLike[str] | None,
    ) -> None:
        self.memory = memory
        self.kept = folder is not None
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        self._lock: Any = None
        self._used: set[Path] = set()
        if folder is None:
            self._temporary = tempfile.TemporaryDirectory(prefix="kexue-count-")
            self.folder = Path(self._temporary.name)
        else:
            self.folder = Path(folder).absolute()
            self._open(settings)
        try:
            self._workers = _workers(executor, n_jobs)
        except BaseException:
            if self._lock is not None:
                self._lock.release()
            raise
        self.parallel = self._workers.size if self._workers is not None else 1

    def _open(self, settings: dict[str, Any]) -> None:
        from filelock import FileLock, Timeout

        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(self.folder / ".lock", timeout=0)
        try:
            self._lock.acquire()
        except Timeout:
            raise ValueError(
                f"another count is running in {self.folder}; wait for it or choose another folder"
            ) from None
        head = {"format": _FORMAT, "version": _VERSION, "settings": settings}
        about = self.folder / _NAME
        try:
            found = json.loads(about.read_text(encoding="utf-8")) if about.exists() else None
        except ValueError:
            found = "damaged"
        if found is None:
            if any(path.name != ".lock" for path in self.folder.iterdir()):
                self._lock.release()
                raise ValueError(f"{self.folder} holds other files; a count needs a folder of its own")
            write_json(about, head)
        elif found != head:
            self._lock.release()
            theirs = found.get("settings") if isinstance(found, dict) else found
            raise ValueError(
                f"{self.folder} holds a count with other settings ({theirs}, not {settings}); choose another folder or "
                "remove it"
            )

    def path(self, stage: str, key: str, ending: str) -> Path:
        """Where the result of a task lies."""
        path = self.folder / f"{stage}-{key}{ending}"
        self._used.add(path)
        return path

    def run(
        self, stage: str, tasks: Iterable[Task], ending: str, advance: Callable[[float], None] = lambda amount: None
    ) -> Iterator[Path]:
        """Run tasks whose files are missing; yields the files in the order of the tasks."""
        waiting: deque[tuple[Task, Path, Any]] = deque()
        limit = 1 if self._workers is None else self._workers.flight

        def finish() -> Path:
            task, path, future = waiting.popleft()
            if future is not None and self._workers is not None:
                self._workers.result(future)
            advance(task.amount)
            return path

        for task in tasks:
            path = self.path(stage, task.key, ending)
            future = None
            if not path.exists():
                if self._workers is None:
                    task.function(str(path), *task.arguments)
                else:
                    future = self._workers.submit(task.function, str(path), *task.arguments)
            waiting.append((task, path, future))
            while len(waiting) >= limit:
                yield finish()
        while waiting:
            yield finish()

    def close(self, done: bool) -> Any:
        """Let workers and lock go. After a finished count, files that it did not use are removed.

        Returns:
            The temporary folder, to be kept as long as files in it are used; None when the folder is the user's.
        """
        if self._workers is not None:
            self._workers.close(done)
        if self.kept:
            if done:
                for path in self.folder.iterdir():
                    if path not in self._used and path.name not in (_NAME, ".lock"):
                        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
            self._lock.release()
        elif not done and self._temporary is not None:
            self._temporary.cleanup()
        return self._temporary

    def forget(self, paths: Iterable[Path]) -> None:
        """Remove files that a later stage has taken in; a kept folder still finds the later file."""
        for path in paths:
            self._used.discard(path)
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def publish(temporary: Path, target: Path) -> None:
    """Give a complete folder its name; if another worker was faster, its folder stays."""
    os.chmod(temporary, 0o755)
    try:
        os.replace(temporary, target)
    except OSError:
        if not target.is_dir():
            raise
        shutil.rmtree(temporary, ignore_errors=True)


def in_order(pool: ThreadPoolExecutor, function: Callable[..., Any], items: Iterable[Any], ahead: int) -> Iterator[Any]:
    """Results of a function over items, in order, never more than ``ahead`` of them waiting to be taken."""
    waiting: deque[Future[Any]] = deque()
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) > ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


class _Workers:
    """Any object with ``submit(function, *arguments)`` that returns futures."""

    def __init__(self, executor: Any, size: int, flight: int) -> None:
        self._executor, self.size, self.flight = executor, size, flight

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return self._executor.submit(function, *arguments)

    def result(self, future: Any) -> Any:
        return future.result()

    def close(self, done: bool) -> None:
        """The executor is the user's."""


class _Threads(_Workers):
    """Threads of this process; the kernels release the interpreter lock."""

    def __init__(self, n_jobs: int) -> None:
        super().__init__(ThreadPoolExecutor(n_jobs), n_jobs, 2 * n_jobs)

    def close(self, done: bool) -> None:
        self._executor.shutdown(wait=True, cancel_futures=True)


class _Pool(_Workers):
    """Objects with ``apply_async``: ``multiprocessing.Pool`` and its like on clusters."""

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return self._executor.apply_async(function, arguments)

    def result(self, future: Any) -> Any:
        return future.get()


class _Retried(NamedTuple):
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    future: list[Any]  # the current one, then how often it was tried, then the generation of the pool


class _Processes(_Workers):
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


class _Ray(_Workers):
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


def _workers(executor: Executor, n_jobs: int) -> _Workers | None:
    if executor is None:
        return _Threads(n_jobs) if n_jobs > 1 else None
    if executor == "processes":
        return _Processes(n_jobs)
    if executor == "ray":
        return _Ray(n_jobs)
    size = max(n_jobs, getattr(executor, "_max_workers", 0) or getattr(executor, "_processes", 0) or 0)
    kind = _Workers if callable(getattr(executor, "submit", None)) else _Pool
    return kind(executor, size, _FLIGHT)
