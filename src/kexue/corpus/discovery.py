"""From paths to the files that will be read, each real file once, in a fixed order."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from kexue.corpus.streams import COMPRESSED, BinaryFileError, CorpusError, printable

FORMATS = ("text", "jsonl", "json", "csv", "tsv", "parquet")
_SUFFIXES = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".tab": "tsv",
    ".parquet": "parquet",
    ".pq": "parquet",
}
_DOCUMENTS = {
    ".pdf": "a PDF",
    ".doc": "a Word document",
    ".docx": "a Word document",
    ".odt": "an OpenDocument text",
    ".epub": "an e-book",
    ".xls": "a spreadsheet",
    ".xlsx": "a spreadsheet",
    ".ppt": "a presentation",
    ".pptx": "a presentation",
}
_BINARY = frozenset(
    (
        *(".png", ".jpg", ".jpeg", ".gif", ".bmp", ".tif", ".tiff", ".webp", ".ico", ".heic", ".psd", ".mp3", ".wav"),
        *(".flac", ".ogg", ".m4a", ".mp4", ".mkv", ".avi", ".mov", ".webm", ".zip", ".tar", ".tgz", ".tbz2", ".txz"),
        *(".7z", ".rar", ".jar", ".whl", ".egg", ".deb", ".rpm", ".iso", ".dmg", ".exe", ".dll", ".so", ".dylib", ".a"),
        *(".o", ".obj", ".lib", ".bin", ".class", ".pyc", ".pyo", ".pyd", ".wasm", ".npy", ".npz", ".pt", ".pth"),
        *(".ckpt", ".onnx", ".safetensors", ".gguf", ".h5", ".hdf5", ".pkl", ".pickle", ".joblib", ".feather"),
        *(".arrow", ".avro", ".orc", ".db", ".sqlite", ".sqlite3", ".mdb", ".ttf", ".otf", ".woff", ".woff2", ".eot"),
    )
)
_WORD_MODEL = frozenset(("segmenter.json", "phrases.json", "templates.json", "vectors", "vectors.safetensors"))
_SPECIAL = (
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


@dataclass(frozen=True, slots=True)
class Source:
    """One file to read.

    Attributes:
        path: What to open.
        name: Path relative to the folder it was found in, with ``/``, or the file name if it was named directly.
        format: One of :data:`FORMATS`.
        size: Bytes on disk.
        modified: Time of the last change in nanoseconds.
        named: Whether the caller named the file itself and not a folder above it.
    """

    path: str
    name: str
    format: str
    size: int
    modified: int
    named: bool


def format_of(path: str) -> str:
    """Return the format that the file name tells; "text" when it tells none.

    Raises:
        BinaryFileError: if the name is that of a binary file.
    """
    stem, suffix = os.path.splitext(path.lower())
    if suffix in COMPRESSED:
        suffix = os.path.splitext(stem)[1]
    if suffix in _DOCUMENTS:
        raise BinaryFileError(printable(path), f"{_DOCUMENTS[suffix]} ({suffix}); convert it to text first")
    if suffix in _BINARY:
        raise BinaryFileError(printable(path), f"a binary file ({suffix})")
    return _SUFFIXES.get(suffix, "text")


def discover(
    paths: list[str], format: str | None, report: Callable[[str, str], None], strict: bool = True
) -> list[Source]:
    """List the files to read: named files as they come, folders recursively in the order of their names.

    Hidden entries, workspaces and word models of kexue, binary files, pipes, devices, empty files, dangling links and
    files seen before are left out of folders and told to ``report(path, reason)``; the same problem with a file that
    was named directly is an error.

    Args:
        paths: Files and folders that exist.
        format: One of :data:`FORMATS` for all files, or None to go by the file name.
        report: Called for everything that is left out.
        strict: Whether a folder or file that cannot be examined is an error; if not, it is told to ``report``.

    Raises:
        CorpusError: for a named file that cannot be read, and for a folder without anything to read.
    """
    seen: set[tuple[int, int]] = set()
    sources: list[Source] = []
    left_out: list[tuple[str, str]] = []  # of the folder that is being walked

    def skip(path: str, reason: str) -> None:
        left_out.append((path, reason))
        report(path, reason)

    def consider(path: str, name: str, named: bool) -> Iterator[tuple[str, str]]:
        """Add a file to ``sources``; yield (path, name) of the entries of a folder."""
        try:
            info = os.stat(path)
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise _Unfit("a link that leads in a circle") from error
            if error.errno == errno.ENOENT and os.path.islink(path):
                raise _Unfit("a link to nothing") from error
            raise CorpusError(printable(path), f"cannot be read: {error.strerror}") from error
        key = (info.st_dev, info.st_ino)
        if key in seen:
            kind = "folder" if stat.S_ISDIR(info.st_mode) else "file"
            skip(printable(path), f"the same {kind} as one before it")
            return
        seen.add(key)
        if stat.S_ISDIR(info.st_mode):
            try:
                with os.scandir(path) as entries:
                    names = sorted(entry.name for entry in entries)
            except OSError as error:
                raise CorpusError(printable(path), f"cannot be read: {error.strerror}") from error
            if {"manifest.json", "documents.sqlite"} <= set(names):
                raise _Unfit("a workspace of kexue")  # built in the folder of its texts
            if "model.json" in names and not _WORD_MODEL.isdisjoint(names):
                raise _Unfit("a word model of kexue")
            for entry in names:
                yield os.path.join(path, entry), f"{name}/{entry}" if name else entry
            return
        special = next((what for test, what in _SPECIAL if test(info.st_mode)), None)
        if special is not None:
            raise _Unfit(f"{special}: it cannot be read twice, save its content to a file first")
        if info.st_size == 0:
            raise _Unfit("empty")
        # Inside a folder a known binary file stays one, whatever format the others are said to have.
        guessed = format_of(path) if format is None or not named else format
        found = format or guessed
        sources.append(Source(path, printable(name), found, info.st_size, info.st_mtime_ns, named))

    def walk(top: str) -> None:
        named = not os.path.isdir(top)
        stack = [iter([(top, os.path.basename(top) if named else "")])]
        while stack:
            entry = next(stack[-1], None)
            if entry is None:
                stack.pop()
                continue
            path, name = entry
            inside = len(stack) > 1
            if inside and os.path.basename(path).startswith("."):
                skip(printable(path), "hidden")
                continue
            try:
                stack.append(iter(list(consider(path, name, named))))
            except (_Unfit, BinaryFileError) as error:
                reason = error.reason if isinstance(error, CorpusError) else str(error)
                if named and strict:
                    raise CorpusError(printable(path), reason) from error
                skip(printable(path), reason)
            except CorpusError as error:
                if strict:
                    raise
                skip(printable(path), error.reason)

    for path in paths:
        before, left_out[:] = len(sources), []
        walk(path)
        if os.path.isdir(path) and len(sources) == before and not any(r.startswith("the same ") for _, r in left_out):
            reason = "nothing to read in this folder"
            if left_out:
                listed = "; ".join(f"{os.path.relpath(p, path)} ({r})" for p, r in left_out[:5])
                rest = len(left_out) - 5
                reason += f"; left out: {listed}" + (f" and {rest} more" if rest > 0 else "")
            else:
                reason += ": it is empty"
            if strict:
                raise CorpusError(printable(path), reason)
            skip(printable(path), reason)
    return sources


class _Unfit(Exception):
    """A file that is left out of folders."""
