"""Formats made of records: JSON lines, JSON, CSV and TSV, Parquet. Each yields (number, record) without reading ahead.

The number is what identifies the record in its file: the line for JSON lines and tables, the position for JSON and
Parquet, both counted from 1. A record that cannot be used comes as a :class:`CorpusError` in the place of the record,
so that the caller can leave it out and go on; what makes the rest of the file unreadable is raised.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from kexue.corpus.columns import Roles, is_header
from kexue.corpus.streams import CorpusError, TextStream

Item = tuple[int, Mapping[str, Any] | CorpusError]

_BLANK = re.compile(r"[ \t\n\r]*")
_CELL_LIMIT = 1 << 28  # characters in one cell: more than that is a quote that was never closed
_PARQUET_ROWS = 512


def _record(value: Any, name: str, number: int, line: int | None) -> Item:
    if isinstance(value, str):
        value = {"text": value}
    if isinstance(value, dict):
        return number, value
    return number, CorpusError(name, f"expected a JSON object or string; got {type(value).__name__}", line)


def read_jsonl(stream: TextStream) -> Iterator[Item]:
    """Yield the objects of JSON lines; a line that is a string is a record with only a text. Blank lines are passed."""
    for number, line in stream.lines():
        if not line or line.isspace():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = error.msg + f" at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
            yield number, CorpusError(stream.name, f"not valid JSON: {reason}", number)
            continue
        yield _record(value, stream.name, number, number)


def read_json(stream: TextStream) -> Iterator[Item]:
    """Yield the objects of a JSON array, a single object, or objects one after another, one in memory at a time.

    Raises:
        CorpusError: if the file is not JSON, with the line where the value that cannot be read begins.
    """
    decode = json.JSONDecoder().raw_decode
    chunks = stream.chunks()
    buffer, position, line, number = "", 0, 1, 0
    array = closed = separated = False

    def fill(least: int) -> bool:
        """Drop what was read and add at least so many characters; False at the end of the file."""
        nonlocal buffer, position, line
        line += buffer.count("\n", 0, position)
        parts, length = [buffer[position:]], 0
        while length < least and (chunk := next(chunks, "")):
            parts.append(chunk)
            length += len(chunk)
        buffer, position = "".join(parts), 0
        return length > 0

    def fail(reason: str, at: int) -> CorpusError:
        return CorpusError(stream.name, f"not valid JSON: {reason}", line + buffer.count("\n", 0, at))

    while True:
        blank = _BLANK.match(buffer, position)
        position = blank.end() if blank else position
        if position == len(buffer):
            if fill(1):
                continue
            if array and not closed:
                raise fail("the array is never closed", position)
            return
        char = buffer[position]
        if closed:
            raise fail("more text after the end of the array", position)
        if char == "[" and not array and number == 0:
            array, separated, position = True, True, position + 1
            continue
        if array and char == "]" and (number == 0 or not separated):
            closed, position = True, position + 1
            continue
        if array and not separated:
            if char != ",":
                raise fail("expected ',' or ']'", position)
            separated, position = True, position + 1
            continue
        try:
            value, end = decode(buffer, position)
        except json.JSONDecodeError as error:
            # A value that ends with the buffer may only be cut off: read as much again, so the work stays linear.
            cut = error.msg.startswith("Unterminated string") or error.pos >= len(buffer) - 16
            if cut and fill(max(1, len(buffer) - position)):
                continue
            raise fail(error.msg, position) from error
        except (ValueError, RecursionError) as error:
            raise fail(str(error), position) from error
        number += 1
        start = line + buffer.count("\n", 0, position)
        position, separated = end, False
        yield _record(value, stream.name, number, start)


class _Rows:
    """Lines for :mod:`csv`, which remember the lines of the row that is being read."""

    def __init__(self, stream: TextStream) -> None:
        self._lines = stream.lines()
        self.pending: str | None = None
        self.row: list[str] = []
        self.number = 0

    def __iter__(self) -> _Rows:
        return self

    def __next__(self) -> str:
        if self.pending is not None:
            line, self.pending = self.pending, None
        else:
            self.number, line = next(self._lines)
            line += "\n"
        self.row.append(line)
        return line


def _delimiter(line: str) -> str:
    """Return which of ``, ; tab |`` stands most often in a line, outside quotes; a comma if none does."""
    bare = re.sub(r'"[^"]*"', "", line)
    return max(",;\t|", key=bare.count)  # the first of equals wins


def _next_row(reader: Any, name: str, start: int) -> list[str] | None:
    # The limit is a global of the csv module: widened only while it parses, for long texts are the point here.
    previous = csv.field_size_limit(_CELL_LIMIT)
    try:
        return next(reader, None)
    except csv.Error as error:
        raise CorpusError(name, f"not a valid table: {error}", start) from error
    finally:
        csv.field_size_limit(previous)


def _never_closed(lines: list[str], delimiter: str) -> bool:
    """Whether the last row of a file ends inside a quoted cell, which :mod:`csv` passes in silence."""
    if not any('"' in line for line in lines):
        return False
    previous = csv.field_size_limit(_CELL_LIMIT)
    try:
        for _ in csv.reader(lines, delimiter=delimiter, strict=True):
            pass
    except csv.Error as error:
        return "unexpected end of data" in str(error)
    finally:
        csv.field_size_limit(previous)
    return False


def read_table(stream: TextStream, flags: Roles, delimiter: str | None = None) -> Iterator[Item]:
    """Yield the rows of a CSV or TSV file as mappings from column name to cell.

    The first row is the header if it has a recognised or an asked-for name; otherwise the columns are called
    "1", "2", ... . Without a given delimiter, the one of ``, ; tab |`` that stands most often in the first line is
    taken. Cells may be quoted, hold line ends, and be of any length.

    Raises:
        CorpusError: if a quote is never closed.
    """
    rows = _Rows(stream)
    first = next(rows, None)
    if first is None:
        return
    rows.pending = first
    delimiter = delimiter or _delimiter(first)
    reader = csv.reader(rows, delimiter=delimiter)
    names: list[str] | None = None
    held: tuple[int, list[str], list[str]] | None = None  # a row is passed on when it is known not to be the last
    while True:
        start = rows.number + (rows.pending is None)
        rows.row.clear()
        following = _next_row(reader, stream.name, start)
        if held is not None:
            number, row, lines = held
            if following is None and _never_closed(lines, delimiter):
                raise CorpusError(stream.name, "a quote that opens in this row is never closed", number)
            if names is None and any(row):
                header = is_header(row, flags)
                names = [cell.strip() for cell in row] if header else [str(i + 1) for i in range(len(row))]
                row = [] if header else row
            if names is not None and len(row) > len(names):
                extra = f"expected {len(names)} cells, as in the first row; got {len(row)}"
                yield number, CorpusError(stream.name, extra, number)
            elif names is not None and any(row):
                yield number, dict(zip(names, row, strict=False))
        if following is None:
            return
        held = (start, following, list(rows.row))


def read_parquet(path: str, name: str, columns: list[str] | None = None) -> Iterator[Item]:
    """Yield the rows of a Parquet file, read in small batches.

    Args:
        path: The file.
        name: How errors call it.
        columns: The columns that are needed; None for all.

    Raises:
        CorpusError: if the file is damaged or not Parquet.
    """
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=_PARQUET_ROWS, columns=columns, use_threads=False):
                for record in batch.to_pylist():
                    number += 1
                    yield number, record
    except (pyarrow.ArrowException, OSError) as error:
        raise CorpusError(name, f"not a readable Parquet file: {error}") from error


def parquet_columns(path: str, name: str) -> list[str]:
    """Return the names of the columns of a Parquet file.

    Raises:
        CorpusError: if the file is damaged or not Parquet.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        return list(pyarrow.parquet.read_schema(path).names)
    except (pyarrow.ArrowException, OSError) as error:
        raise CorpusError(name, f"not a readable Parquet file: {error}") from error
