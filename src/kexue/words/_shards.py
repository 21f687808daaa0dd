"""Cutting a corpus into shards: texts, token lists and lines of files that are counted apart, in any order."""

from __future__ import annotations

import codecs
import hashlib
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

_READ = 1 << 22
_ENDLESS = 1 << 62


class Span(NamedTuple):
    """Whole lines of a file: the bytes from ``start`` to ``stop``."""

    path: str
    start: int
    stop: int


@dataclass
class Shard:
    """Part of a corpus.

    Attributes:
        items: Its texts, token lists and :class:`Span` of files, in order.
        key: Digest of what is in it (of files: name, size and time of change); empty when it was not asked for.
        size: Bytes of files, characters of texts.
    """

    items: list[Any] = field(default_factory=list)
    key: str = ""
    size: int = 0


class Source:
    """A corpus whose files are looked at before they are counted.

    Args:
        items: Texts, token lists or paths.
        on_error: "raise" stops at a file that cannot be read; "skip" leaves out files that cannot be opened or are not
            UTF-8, which takes one more pass over each file.

    Attributes:
        skipped: (path, reason) of the files left out so far.
    """

    def __init__(self, items: Iterable[Any], on_error: str) -> None:
        self.items = items
        self.on_error = on_error
        self.skipped: list[tuple[str, str]] = []
        self._known: dict[str, bool] = {}
        if isinstance(items, Sequence):  # before anything is counted: a missing file costs no work
            for item in items if on_error == "raise" else ():
                if type(item) is not str and isinstance(item, os.PathLike):
                    with open(item, "rb"):
                        pass

    def __iter__(self) -> Iterator[Any]:
        if self.on_error == "raise":
            return iter(self.items)
        return (item for item in self.items if not isinstance(item, os.PathLike) or self._good(os.fspath(item)))

    def _good(self, path: str) -> bool:
        if path not in self._known:
            reason = why_unreadable(path)
            if reason is not None:
                self.skipped.append((path, reason))
            self._known[path] = reason is None
        return self._known[path]


def why_unreadable(path: str) -> str | None:
    """Why a file cannot be read as UTF-8 text, or None."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset = 0
    try:
        with open(path, "rb") as file:
            while True:
                block = file.read(_READ)
                try:
                    decoder.decode(block, final=not block)
                except UnicodeDecodeError as error:
                    # What was left of the last block stands before this one.
                    place = offset - (len(error.object) - len(block)) + error.start
                    return str(not_utf8(path, place, error.reason)).removeprefix(f"{path}: ")
                offset += len(block)
                if not block:
                    return None
    except OSError as error:
        return error.strerror or str(error)


def not_utf8(path: str | os.PathLike[str], offset: int, reason: str) -> ValueError:
    """The error for bytes that are not UTF-8, with line and offset in the file."""
    lines, left, byte = 1, offset, b""
    with open(path, "rb") as file:
        while left:
            block = file.read(min(left, _READ))
            if not block:
                break
            lines += block.count(b"\n")
            left -= len(block)
        byte = file.read(1)
    shown = f"byte 0x{byte[0]:02x}: {reason}" if byte else reason
    return ValueError(f"{path}: not UTF-8 at line {lines}, byte offset {offset} ({shown})")


def file_size(path: str | os.PathLike[str]) -> int:
    """Bytes of a file; of a pipe, whose end is not known, a number that is never reached."""
    state = os.stat(path)
    return state.st_size if stat.S_ISREG(state.st_mode) else _ENDLESS


def spans(path: str | os.PathLike[str], size: int) -> Iterator[Span]:
    """Cut a file at line ends into spans of at least ``size`` bytes; a longer line is never cut."""
    name = os.fspath(path)
    total = file_size(name)
    if total <= size or total == _ENDLESS:
        yield Span(name, 0, total)
        return
    start = 0
    with open(name, "rb") as file:
        while start < total:
            stop = start + size
            if stop >= total:
                stop = total
            else:
                file.seek(stop - 1)
                while True:
                    block = file.readline(_READ)
                    if not block or block.endswith(b"\n"):
                        break
                stop = file.tell()
            yield Span(name, start, stop)
            start = stop


def shards(source: Iterable[Any], size: int, check: Callable[[Any, int], int], keys: bool = False) -> Iterator[Shard]:
    """Cut a corpus into shards of about ``size`` (bytes of files, characters of texts).

    Args:
        source: Texts, token lists and paths.
        size: Of a shard; small items share one.
        check: Called with an item that is no path, and its number; returns its size or raises.
        keys: Whether to compute the digests, for which texts have to be hashed.
    """
    current, hashed = Shard(), hashlib.blake2b(digest_size=12)

    def finish() -> Shard:
        nonlocal current, hashed
        full, current = current, Shard()
        full.key = hashed.hexdigest() if keys else ""
        hashed = hashlib.blake2b(digest_size=12)
        return full

    for number, item in enumerate(source):
        if type(item) is str and not keys:  # nearly all texts, and there may be millions
            current.items.append(item)
            current.size += len(item)
            if current.size >= size:
                yield finish()
            continue
        if isinstance(item, os.PathLike):
            state = os.stat(item)
            for span in spans(item, size):
                if keys:
                    hashed.update(repr((*span, state.st_size, state.st_mtime_ns)).encode())
                current.items.append(span)
                current.size += min(span.stop - span.start, size)
                if current.size >= size:
                    yield finish()
            continue
        amount = check(item, number)
        if keys:
            parts = [item] if isinstance(item, str) else item
            for part in parts:
                hashed.update(str(part).encode("utf-8", "surrogatepass") + b"\0")
            hashed.update(b"\1")
        current.items.append(item)
        current.size += amount
        if current.size >= size:
            yield finish()
    if current.items:
        yield finish()


def in_mb(size: int | None) -> float | None:
    """A size for a progress bar."""
    return None if size is None else size / 1e6


def total_size(source: Source) -> int | None:
    """Bytes of a list of files; None when it cannot be known beforehand."""
    items = source.items
    if not isinstance(items, Sequence) or not all(isinstance(item, os.PathLike) for item in items):
        return None
    return sum(os.path.getsize(item) for item in items if Path(item).is_file())
