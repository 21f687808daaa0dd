"""Runs of text, and reading them in pieces of bounded size.

A run is a maximal sequence of letters, digits, CJK ideographs, kana or hangul. A combining mark belongs to the letter
that it stands on (Arabic, Hindi and Thai are not shredded). Everything else separates: white space, punctuation,
symbols, emoji, control characters, lone surrogates.
"""

from __future__ import annotations

import functools
import os
import sys
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kexue.words._shards import Source, Span, file_size, not_utf8

CODE_POINTS = sys.maxunicode + 1
_IN_RUN = frozenset(("Lu", "Ll", "Lt", "Lm", "Lo", "Nd", "Nl", "Mn", "Mc"))


@functools.cache
def run_table() -> NDArray[np.bool_]:
    """For each code point, whether it belongs to a run. Computed on first use (0.1 s), then shared; read-only."""
    table = np.fromiter((unicodedata.category(chr(i)) in _IN_RUN for i in range(CODE_POINTS)), np.bool_, CODE_POINTS)
    table[0xFE00:0xFE10] = False  # variation selectors are marks by category, but they follow emoji, too
    table[0xE0100:0xE01F0] = False
    table.setflags(write=False)
    return table


def code_points(text: str) -> NDArray[np.uint32]:
    """The code points of ``text`` as an array, lone surrogates included."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)


def parse_memory(memory: int | str) -> int:
    """Turn ``"2GB"``, ``"512MB"`` or a number of bytes into bytes.

    Raises:
        ValueError: Not a positive amount in one of the units B, KB, MB, GB, TB.
        TypeError: Neither a string nor an integer.
    """
    if isinstance(memory, bool) or not isinstance(memory, (str, int, np.integer)):
        raise TypeError(f"memory must be bytes or text such as '2GB'; got {memory!r} of type {type(memory).__name__}")
    if not isinstance(memory, str):
        size = float(min(memory, 1 << 62))  # more is no limit, and float() refuses very long integers
    else:
        text = memory.strip().upper()
        unit = next((u for u in ("KB", "MB", "GB", "TB", "B") if text.endswith(u)), "")
        scale = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}[unit]
        try:
            size = float(text[: len(text) - len(unit)]) * scale
        except ValueError:
            raise ValueError(f"memory must be bytes or text such as '2GB'; got {memory!r}") from None
    if not 1 <= size < float("inf"):
        raise ValueError(f"memory must be a positive amount, at least one byte; got {memory!r}")
    return int(size)


def as_source(source: Any, on_error: str = "raise") -> Source:
    """Accept what a counter can read: one text, one path, or an iterable of texts and paths."""
    if isinstance(source, Source):
        return source
    if isinstance(source, (str, os.PathLike)):
        source = [source]
    if isinstance(source, (bytes, bytearray, Mapping)) or not isinstance(source, Iterable):
        raise TypeError(f"expected an iterable of str (texts) or pathlib.Path (files); got {type(source).__name__}")
    return Source(source, on_error)


def rereadable(source: Iterable[Any]) -> bool:
    """Whether iterating over ``source`` a second time starts again (a list does, a generator does not)."""
    items = source.items if isinstance(source, Source) else source
    return iter(items) is not items


def check_text(item: Any, number: int) -> int:
    """The size of a text; TypeError for anything else."""
    if not isinstance(item, str):
        raise TypeError(f"item {number} must be a str (text) or pathlib.Path (file); got {type(item).__name__}")
    return len(item)


def _file_pieces(span: Span, size: int) -> Iterator[str]:
    """Decode lines of a UTF-8 file block by block; broken bytes are reported with line and offset."""
    offset, pending = span.start, b""
    with open(span.path, "rb") as file:
        file.seek(span.start)
        while True:
            block = file.read(min(size, span.stop - offset - len(pending)))
            data = pending + block
            try:
                text, pending = data.decode("utf-8"), b""
            except UnicodeDecodeError as error:
                incomplete = error.reason == "unexpected end of data" and error.end == len(data)
                if not (incomplete and block):
                    raise not_utf8(span.path, offset + error.start, error.reason) from None
                text, pending = data[: error.start].decode("utf-8"), data[error.start :]
            if text:
                yield text
            offset += len(data) - len(pending)
            if not block:
                return


def _pieces(source: Iterable[Any], size: int) -> Iterator[str]:
    for number, item in enumerate(source):
        if type(item) is str and len(item) < size:  # nearly all texts, and there may be millions
            yield item + "\n"
            continue
        if isinstance(item, Span):
            yield from _file_pieces(item, size)
        elif isinstance(item, os.PathLike):
            yield from _file_pieces(Span(os.fspath(item), 0, file_size(item)), size)
        else:
            yield from (item[start : start + size] for start in range(0, check_text(item, number), size))
        yield "\n"  # a run never crosses from one text or file into the next


def chunks(source: Iterable[Any], size: int, overlap: int) -> Iterator[tuple[str, int]]:
    """Join small texts and cut large ones into pieces of about ``size`` characters.

    Yields ``(text, own)``: the piece answers for the grams that start in its first ``own`` characters; the last
    ``overlap`` characters are only there to be looked at, and come again at the start of the next piece.
    """
    buffer: list[str] = []
    length = 0
    for piece in _pieces(source, size):
        buffer.append(piece)
        length += len(piece)
        if length >= size + overlap:
            text = "".join(buffer)
            yield text, length - overlap
            tail = text[length - overlap :]
            buffer, length = [tail], len(tail)
    if length:
        yield "".join(buffer), length


def whole_runs(source: Iterable[Any], size: int) -> Iterator[str]:
    """Like :func:`chunks`, but cut between runs only: a piece is longer than ``size`` when one run is."""
    table = run_table()
    buffer: list[str] = []
    length, limit = 0, size
    for piece in _pieces(source, size):
        buffer.append(piece)
        length += len(piece)
        if length < limit:
            continue
        text = "".join(buffer)
        ends = np.flatnonzero(~table[code_points(text)])
        if ends.size == 0:
            buffer, limit = [text], 2 * limit  # doubling keeps the total work linear
            continue
        cut = int(ends[-1]) + 1
        yield text[:cut]
        buffer, length, limit = [text[cut:]], length - cut, size
    if length:
        yield "".join(buffer)
