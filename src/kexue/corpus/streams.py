"""Bytes to text: compression, byte-order marks, encodings, line ends, and errors that say where they are."""

from __future__ import annotations

import codecs
import gzip
import os
import zlib
from collections.abc import Iterator
from typing import Any

CHUNK = 1 << 18
HEAD = 8192  # a NUL byte in so many first bytes makes a file binary
_MARKS = (  # the mark of UTF-32 begins with that of UTF-16, so it is looked for first
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
    (codecs.BOM_UTF8, "utf-8"),
)
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")


def printable(path: str | os.PathLike[str]) -> str:
    """Return ``path`` as text that can be printed and stored: undecodable bytes and control characters replaced."""
    name = os.fsencode(path).decode("utf-8", "replace")
    return "".join(c if c.isprintable() else "\ufffd" for c in name)


class CorpusError(ValueError):
    """Something in a corpus cannot be read.

    Attributes:
        path: The file.
        reason: What is wrong with it.
        line: Line number, counted from 1, or None.
        offset: Byte offset in the file (after decompression), counted from 0, or None.
    """

    def __init__(self, path: str, reason: str, line: int | None = None, offset: int | None = None) -> None:
        self.path, self.reason, self.line, self.offset = path, reason, line, offset
        where = path
        if line is not None:
            where += f", line {line}"
        if offset is not None:
            where += f", byte offset {offset}"
        super().__init__(f"{where}: {reason}")

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.path, self.reason, self.line, self.offset)


class BinaryFileError(CorpusError):
    """The file holds no text. Inside a folder such files are left out; named directly they are an error."""


def check_encoding(encoding: str) -> str:
    """Return the canonical name of a text encoding.

    Raises:
        ValueError: if Python knows no text encoding of that name.
    """
    try:
        info = codecs.lookup(encoding)
    except (LookupError, TypeError, ValueError):
        info = None
    if info is None or not getattr(info, "_is_text_encoding", True) or info.incrementaldecoder is None:
        raise ValueError(f"encoding must be a text encoding such as 'utf-8' or 'gb18030'; got {encoding!r}")
    return info.name


def open_binary(path: str) -> Any:
    """Open ``path`` for reading bytes, decompressing .gz, .bz2, .xz and .zst."""
    suffix = os.path.splitext(path)[1].lower()
    if suffix == ".gz":
        return gzip.open(path, "rb")
    if suffix == ".bz2":
        import bz2

        return bz2.open(path, "rb")
    if suffix == ".xz":
        import lzma

        return lzma.open(path, "rb")
    if suffix == ".zst":
        import pyarrow

        return pyarrow.CompressedInputStream(pyarrow.OSFile(path, "rb"), "zstd")
    return open(path, "rb")


class TextStream:
    """The text of one file in chunks, with line ends as ``\\n`` and NUL characters removed.

    A byte-order mark of UTF-8, UTF-16 or UTF-32 decides the encoding unless another one than UTF-8 was asked for.

    Args:
        path: File to read.
        encoding: Canonical name of a text encoding.
        name: How errors call the file; its path if None.
    """

    def __init__(self, path: str, encoding: str = "utf-8", name: str | None = None) -> None:
        self.path = path
        self.name = printable(path) if name is None else name
        self.encoding = encoding
        self.bytes_read = 0

    def _blocks(self) -> Iterator[bytes]:
        import lzma

        try:
            with open_binary(self.path) as file:
                while block := file.read(CHUNK):
                    self.bytes_read += len(block)
                    yield block
        except OSError as error:
            raise CorpusError(self.name, f"cannot be read: {error.strerror or error}") from error
        except (EOFError, zlib.error, lzma.LZMAError) as error:
            raise CorpusError(self.name, f"the compressed data are damaged: {error}") from error

    def _start(self, head: bytes) -> tuple[str, int]:
        """Return the encoding and the length of the byte-order mark."""
        mark = next(((bom, name) for bom, name in _MARKS if head.startswith(bom)), None)
        wide = self.encoding.replace("_", "-").startswith(("utf-16", "utf-32"))
        if self.encoding in ("utf-8", "utf-8-sig", "utf-16", "utf-32"):
            if mark is not None:
                return mark[1], len(mark[0])
            if wide:
                return self.encoding + "-le", 0
        if not wide and b"\0" in head[:HEAD]:
            raise BinaryFileError(
                self.name,
                "a binary file (it has NUL bytes); for UTF-16 without a byte-order mark give encoding='utf-16'",
            )
        return "utf-8" if self.encoding == "utf-8-sig" else self.encoding, 0

    def chunks(self) -> Iterator[str]:
        """Yield the text.

        Raises:
            CorpusError: for bytes that are not valid in the encoding (with line and byte offset), for files that
                cannot be read, and for damaged compressed files.
        """
        blocks = self._blocks()
        block = next(blocks, b"")
        encoding, skip = self._start(block)
        decoder = codecs.getincrementaldecoder(encoding)("strict")
        block, position, line, held = block[skip:], skip, 1, ""
        while True:
            final = not block
            pending = len(decoder.getstate()[0])
            try:
                text = decoder.decode(block, final)
            except UnicodeDecodeError as error:
                good = held + error.object[: error.start].decode(encoding, "ignore")
                line += good.replace("\r\n", "\n").replace("\r", "\n").count("\n")
                wrong = " ".join(f"{byte:02x}" for byte in error.object[error.start : error.end][:4])
                raise CorpusError(
                    self.name,
                    f"not valid {encoding} (bytes {wrong}: {error.reason}); if the file has another encoding, name it",
                    line,
                    position - pending + error.start,
                ) from error
            position += len(block)
            text, held = held + text, ""
            if "\r" in text:
                if text.endswith("\r") and not final:  # the \n of this \r\n may be in the next block
                    text, held = text[:-1], "\r"
                text = text.replace("\r\n", "\n").replace("\r", "\n")
            line += text.count("\n")
            if "\0" in text:
                text = text.replace("\0", "")
            if text:
                yield text
            if final:
                return
            block = next(blocks, b"")

    def lines(self) -> Iterator[tuple[int, str]]:
        """Yield (line number, line without its end), split at ``\\n`` only: U+2028 and its like are text."""
        number, parts = 1, []
        for chunk in self.chunks():
            pieces = chunk.split("\n")
            parts.append(pieces[0])
            if len(pieces) == 1:
                continue
            line = "".join(parts)
            parts = [pieces[-1]]
            yield number, line
            for offset, piece in enumerate(pieces[1:-1], start=1):
                yield number + offset, piece
            number += len(pieces) - 1
        line = "".join(parts)
        del parts
        if line:
            yield number, line
