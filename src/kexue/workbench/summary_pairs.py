"""Texts with their summaries from files: JSON lines with id, text, summary, and tables with such columns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from kexue._checks import check_choice
from kexue.corpus import BinaryFileError, CorpusError
from kexue.corpus.columns import GUESSES, Roles, fields, fold
from kexue.corpus.discovery import Source, discover
from kexue.corpus.records import Item, parquet_columns, read_json, read_jsonl, read_parquet, read_table
from kexue.corpus.streams import TextStream, check_encoding, printable

__all__ = ["Pair", "read_pairs"]

_SUMMARIES = ("summary", "abstract", "highlights", "headline", "title", "摘要", "标题", "题目")
_FORMATS = "JSON lines with the keys id, text, summary, or a table (.tsv, .csv, .parquet) with columns text and summary"


class Pair(NamedTuple):
    """A text and its summary.

    Args:
        id: Its name; ``file:line`` where the file gives none.
        text: The text.
        summary: What it should become.
    """

    id: str
    text: str
    summary: str


def read_pairs(
    paths: Sequence[str | Path],
    *,
    id_column: str | None = None,
    text_column: str | None = None,
    summary_column: str | None = None,
    encoding: str = "utf-8",
    on_error: str = "raise",
) -> tuple[list[Pair], list[str]]:
    """Read pairs of a text and its summary.

    A table of two columns without a header is ``text<TAB>summary``. Columns are named by their name or number.

    Args:
        paths: Files or folders: .jsonl, .json, .csv, .tsv, .parquet, also compressed.
        id_column: Key or column of the ids; "id" without.
        text_column: Of the texts; "text" and the other names of :func:`kexue.corpus.read_documents` without.
        summary_column: Of the summaries; without, "summary", else "abstract", "highlights", "headline", "title",
            "摘要", "标题", "题目", if it is not that of the texts.
        encoding: Of text files.
        on_error: "raise", or "skip" to leave out records and files that cannot be read.

    Returns:
        The pairs, and for each record that was left out, where and why. Blank texts and blank summaries are left out.

    Raises:
        CorpusError: A file or record that cannot be read, with file and line.
        ValueError: No pair at all.
    """
    check_choice("on_error", on_error, ("raise", "skip"))
    encoding = check_encoding(encoding)
    asked = {"id": id_column, "text": text_column, "summary": summary_column}
    left_out: list[str] = []
    pairs: list[Pair] = []
    for path in paths:
        if not Path(path).exists():
            raise FileNotFoundError(f"no such file or folder: {printable(path)}")
    for source in _sources(paths, left_out, on_error == "raise"):
        try:
            for found in _pairs(source, asked, encoding):
                if isinstance(found, Pair):
                    pairs.append(found)
                elif isinstance(found, str):
                    left_out.append(found)
                elif on_error == "raise":
                    raise found
                else:
                    left_out.append(str(found))
        except BinaryFileError as error:
            if source.named and on_error == "raise":
                raise
            left_out.append(str(error))
        except CorpusError as error:
            if on_error == "raise":
                raise
            left_out.append(str(error))
    if not pairs:
        why = f": {'; '.join(left_out[:3])}" if left_out else ""
        raise ValueError(f"no text with a summary in {', '.join(printable(path) for path in paths)}{why}")
    return pairs, left_out


def _sources(paths: Sequence[str | Path], left_out: list[str], strict: bool) -> list[Source]:
    return discover([str(p) for p in paths], None, lambda path, why: left_out.append(f"{path}: {why}"), strict)


def _pairs(source: Source, asked: Mapping[str, str | None], encoding: str) -> Iterator[Pair | str | CorpusError]:
    """The pairs of a file; in the place of one that is not usable, the error, or in words what is blank."""
    shown = printable(source.path)
    if source.format == "text":
        raise CorpusError(shown, f"pairs of a text and its summary are {_FORMATS}")
    flags = Roles(id=asked["id"], text=asked["text"], title=asked["summary"])
    items: Iterator[Item]
    if source.format == "parquet":
        names = parquet_columns(source.path, shown)
        wanted = set(_choose(names, asked, shown).values())
        items = read_parquet(source.path, shown, [name for name in names if name in wanted])
    elif source.format in ("jsonl", "json"):
        stream = TextStream(source.path, encoding, shown)
        items = read_jsonl(stream) if source.format == "jsonl" else read_json(stream)
    else:
        names_known = Roles(id=flags.id, text=flags.text or "text", title=flags.title or "summary")
        stream = TextStream(source.path, encoding, shown)
        items = read_table(stream, names_known, "\t" if source.format == "tsv" else None)
    at_line = source.format not in ("json", "parquet")
    free = source.format in ("jsonl", "json")  # keys may differ from record to record
    chosen: dict[tuple[str, ...], dict[str, str]] = {}
    for number, record in items:
        where = number if at_line else None
        prefix = "" if at_line else f"record {number}: "
        if isinstance(record, CorpusError):
            yield record
            continue
        keys = tuple(record)
        try:
            if keys not in chosen:
                chosen[keys] = _choose(keys, asked, shown)
            columns = chosen[keys]
            name = fields(record, Roles(id=columns.get("id")))[0]
            text, summary = (_text(record, columns[role], role) for role in ("text", "summary"))
        except CorpusError as error:
            problem = CorpusError(shown, prefix + error.reason, where)
            if not free:
                raise problem from None  # a table whose columns are not known has no usable row
            yield problem
            continue
        except ValueError as error:
            yield CorpusError(shown, prefix + str(error), where)
            continue
        if record.get(columns["text"]) is None or record.get(columns["summary"]) is None:
            absent = "text" if record.get(columns["text"]) is None else "summary"
            yield CorpusError(shown, f"{prefix}there is no {absent} in this record", where)
        elif not text.strip() or not summary.strip():
            blank = "summary" if text.strip() else "text"
            yield f"{shown}, {'line' if at_line else 'record'} {number}: the {blank} is blank"
        else:
            yield Pair(name or f"{source.name}:{number}", text, summary)


def _text(record: Mapping[str, Any], column: str, role: str) -> str:
    try:
        return fields(record, Roles(text=column))[1]
    except ValueError as error:
        raise ValueError(str(error).replace("the text", f"the {role}", 1)) from None


def _choose(names: Sequence[str], asked: Mapping[str, str | None], shown: str) -> dict[str, str]:
    """Which column is the id, the text, the summary."""
    folded = {fold(name): name for name in reversed(names)}
    found: dict[str, str] = {}
    for role, column in asked.items():
        if column is None:
            continue
        if column in names:
            found[role] = column
        elif fold(column) in folded:
            found[role] = folded[fold(column)]
        elif column.strip().isdigit() and 1 <= int(column) <= len(names):
            found[role] = names[int(column) - 1]
        elif role != "id":
            raise CorpusError(shown, f"there is no column {column!r} for the {role}; columns found: {_listed(names)}")
    bare = list(names) == ["1", "2"]
    guesses = {
        "id": GUESSES["id"],
        "summary": ("2",) if bare else _SUMMARIES,
        "text": ("1",) if bare else GUESSES["text"],
    }
    taken = set(found.values())
    # "abstract" is the text of a title but the summary of an article: the text comes first, if it has a name of its own
    for role in ("id", "text", "summary"):
        if role not in found:
            options = [folded[guess] for guess in guesses[role] if guess in folded and folded[guess] not in taken]
            if options:
                found[role] = options[0]
                taken.add(options[0])
    for role in ("text", "summary"):
        if role not in found:
            raise CorpusError(
                shown,
                f"cannot tell which column is the {role}; name it with {role}_column. Columns found: {_listed(names)}",
            )
    return found


def _listed(names: Sequence[str]) -> str:
    return ", ".join(repr(name if len(name) <= 40 else name[:37] + "...") for name in names[:20]) or "none"
