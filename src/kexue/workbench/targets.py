"""The folder that a command writes: one run at a time, and nothing that stands there is lost."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from kexue._files import recover_directory, replace_directory, write_json
from kexue.workbench.errors import WorkspaceError

__all__ = ["begin", "check_free", "locked", "marked", "publish", "resolved"]


def resolved(out: str | Path) -> Path:
    """The absolute path of a folder that can be replaced as a whole.

    Raises:
        WorkspaceError: It is a root or a mount point.
    """
    target = Path(out).resolve()
    if not target.name or target.is_mount():
        raise WorkspaceError(f"cannot write a model at {target}, which cannot be replaced; give a folder inside it")
    return target


@contextmanager
def locked(target: Path) -> Iterator[None]:
    """Keep other runs from writing ``target``.

    Raises:
        WorkspaceError: Another run is writing it, or nobody can.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(target.with_name(f".{target.name}.lock"), timeout=0)
    try:
        lock.acquire()
    except Timeout:
        if not Path(lock.lock_file).exists():
            raise WorkspaceError(f"{target.parent} cannot be written to; choose another folder") from None
        raise WorkspaceError(
            f"another run is writing {target} (it holds {lock.lock_file}); wait for it or choose another folder"
        ) from None
    try:
        yield
    finally:
        lock.release()


def check_free(target: Path, manifest: str, what: str, force: bool) -> None:
    """Raise unless ``target`` is empty, or holds a model of the same kind that ``force`` says to replace.

    Args:
        target: The folder.
        manifest: Name of the file that marks a model of this kind.
        what: The kind in words, as in "is no language model of kexue".
        force: Whether a model of this kind may be replaced.

    Raises:
        WorkspaceError: The folder is taken.
    """
    recover_directory(target)
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        if not (target / manifest).is_file():
            raise WorkspaceError(f"{target} exists and is no {what} of kexue; choose another folder")
        if not force:
            raise WorkspaceError(f"{target} exists; choose another folder, or --force to replace it")


def begin(partial: Path, key: dict[str, Any], what: str, say: Callable[[str], None]) -> None:
    """The folder of an unfinished run on the same data with the same settings, or a new one.

    Args:
        partial: The folder.
        key: What the data and settings are told by, JSON-compatible.
        what: What the data are called.
        say: Called with a line if another unfinished run is thrown away.
    """
    state = partial / "state.json"
    try:
        found = json.loads(state.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = None
    if found == key:
        return
    if partial.exists():
        if found is not None:
            say(f"an unfinished run with other {what} or settings was found; starting over")
        shutil.rmtree(partial)
    partial.mkdir()
    write_json(state, key)


def publish(finished: Path, target: Path, partial: Path) -> None:
    """Put a finished model in its place, and remove what only the run needed.

    Args:
        finished: The complete model, inside ``partial``.
        target: Where it belongs; an empty folder or an older model there is replaced.
        partial: The folder of the run.
    """
    if target.is_dir() and not any(target.iterdir()):
        target.rmdir()
    replace_directory(finished, target)
    shutil.rmtree(partial, ignore_errors=True)


def marked(folder: Path, manifest: str, what: str, command: str) -> Path:
    """The file that marks a model of a kind.

    Args:
        folder: The folder of the model.
        manifest: Name of the file.
        what: The kind in words, as in "is no model of summaries".
        command: What makes such a model.

    Raises:
        WorkspaceError: The folder holds none.
    """
    path = folder / manifest
    if not path.is_file():
        found = "does not exist" if not folder.exists() else "is a file" if folder.is_file() else f"is no {what}"
        raise WorkspaceError(f"{folder} {found}; make one with: {command}")
    return path
