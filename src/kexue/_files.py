"""Writing files so that a reader sees either the old content or the new one, never a part."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

_DTYPES = {
    "BOOL": "?", "U8": "u1", "I8": "i1", "U16": "<u2", "I16": "<i2", "F16": "<f2", "U32": "<u4", "I32": "<i4",
    "F32": "<f4", "U64": "<u8", "I64": "<i8", "F64": "<f8",
}  # fmt: skip


def fsync_directory(path: Path) -> None:
    """Make renames inside ``path`` durable, where the system allows it."""
    with contextlib.suppress(OSError):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path next to ``path``; on success it is flushed to disk and renamed to ``path``.

    If the block raises, the temporary file is removed and ``path`` is left as it was.
    """
    target = Path(path)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_directory(target.parent)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write ``value`` as indented UTF-8 JSON, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def map_tensors(path: str | os.PathLike[str], mmap: bool = True) -> dict[str, NDArray[Any]]:
    """The arrays of a safetensors file, read-only and mapped into memory: read from disk when they are used.

    Args:
        path: The file.
        mmap: False reads everything now, into arrays of their own.

    Raises:
        ValueError: It is no such file, is cut short, or holds a kind of number that numpy does not have.
    """
    if not mmap:
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        try:
            return dict(load_file(path))
        except SafetensorError as error:
            raise ValueError(f"{path} is no safetensors file or is damaged: {error}") from None
    found: dict[str, NDArray[Any]] = {}
    try:
        with open(path, "rb") as file:
            start = 8 + int.from_bytes(file.read(8), "little")
            # The length comes first and is not to be trusted: a damaged one must not ask for exabytes.
            head = json.loads(file.read(min(start - 8, os.path.getsize(path))))
        data = np.memmap(path, np.uint8, "r")
        for name, entry in head.items():
            if name != "__metadata__":
                first, last = entry["data_offsets"]
                part = np.asarray(data[start + first : start + last])
                found[name] = part.view(_DTYPES[entry["dtype"]]).reshape(entry["shape"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no safetensors file or is damaged: {error}") from None
    return found


def replace_directory(new: Path, target: Path) -> None:
    """Put the folder ``new`` in the place of ``target`` and remove what stood there.

    On Linux the two are exchanged in one step. Elsewhere the old folder is first set aside under the name that
    :func:`recover_directory` looks for, so that being killed in between loses nothing.
    """
    old = _set_aside(target)
    if target.exists():
        if _exchange(new, target):
            os.replace(new, old)
        else:
            os.replace(target, old)
            os.replace(new, target)
    else:
        os.replace(new, target)
    fsync_directory(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def recover_directory(target: Path) -> None:
    """Undo or finish a :func:`replace_directory` that was killed half-way."""
    old = _set_aside(target)
    if old.is_dir():
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.replace(old, target)


@contextlib.contextmanager
def replaced_folder(path: str | os.PathLike[str], mark: str, content: str) -> Iterator[Path]:
    """Yield an empty folder that takes the place of ``path`` when the block is done.

    Args:
        path: The folder to be written; an existing one is replaced if it is empty or holds the file ``mark``.
        mark: A file that every such folder has.
        content: What the folder holds, for the error message.

    Raises:
        ValueError: ``path`` exists and holds something else.
    """
    target = Path(path).absolute()
    if target.exists() and not (target / mark).is_file() and not (target.is_dir() and not any(target.iterdir())):
        raise ValueError(f"{target} exists and holds no {content}; choose another folder")
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    try:
        yield temporary
        os.chmod(temporary, 0o777 & ~_umask())
        replace_directory(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


@contextlib.contextmanager
def run_folder(checkpoint: str | os.PathLike[str] | None) -> Iterator[Path]:
    """Yield the folder of a training: ``checkpoint``, made if it is not there; without one a folder that goes away."""
    if checkpoint is not None:
        Path(checkpoint).mkdir(parents=True, exist_ok=True)
        yield Path(checkpoint)
        return
    with tempfile.TemporaryDirectory(prefix="kexue-run-") as folder:
        yield Path(folder)


def _set_aside(target: Path) -> Path:
    return target.with_name(f".{target.name}.old")


def _exchange(first: Path, second: Path) -> bool:
    """Swap two folders atomically with renameat2; False where the system has no such call."""
    try:
        call = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE of the Linux headers
    return bool(call(here, os.fsencode(first), here, os.fsencode(second), exchange) == 0)
