"""The tasks of a count and where their results lie, so that a killed count goes on.

A count consists of tasks: pure functions ``task(path, *arguments)`` that write the file ``path``. A file appears under
its name only when it is complete, and the name holds a digest of everything the result depends on. So a task that is
run again, on another machine or after the worker was killed, cannot lose or double a count, and a count that was killed
goes on with the tasks whose files are missing. No scheduler is written here: tasks go to an executor.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import BuiltinFunctionType, CodeType, FunctionType
from typing import Any, NamedTuple

from kexue._checks import check_int
from kexue._files import write_json
from kexue.words._executors import Executor, check_executor, workers_of
from kexue.words._runs import parse_memory

_FORMAT, _VERSION = "kexue.count", 1
_NAME = "count.json"


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
            self._workers = workers_of(executor, n_jobs)
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
