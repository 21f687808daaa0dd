"""Documents from files: text, JSON lines, JSON, CSV, TSV, Parquet, compressed or not, and folders of them.

How a plain text file becomes documents (``split``):

- ``"file"``: one document.
- ``"line"``: one document for each line that is not blank.
- ``"paragraph"``: one document for each run of lines between blank lines.
- ``"auto"``: the only file of a corpus is split; into paragraphs if there is a blank line between two others within its
  first 262,144 characters, else into lines. Of several files each is one document, unless it is longer than 262,144
  characters: then it is split in the same way.

Whatever the format, a text longer than ``max_chars`` is cut at the last blank line, line end, sentence end or white
space in the second half of the piece, and never inside a user-perceived character unless that alone is very long.

Ids: the id column; else ``folder/file.txt`` for a whole file, ``file.txt:17`` for a paragraph or line (where it
begins), ``file.jsonl:17`` and ``file.csv:17`` for a record (its line), ``file.json:3`` and ``file.parquet:3`` (its
position); all counted from 1. The pieces of a text that was cut add ``#1``, ``#2``, ... . An id that was used before
gets ``~2``, ``~3``, ... : two files whose id columns both start at 1 are usual and no reason to stop.
"""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from kexue._checks import check_choice, check_int
from kexue.corpus.columns import Roles, choose, fields
from kexue.corpus.cutting import has_paragraphs, lines, paragraphs, pieces, whole
from kexue.corpus.discovery import FORMATS, Source, discover
from kexue.corpus.document import Document
from kexue.corpus.records import Item, parquet_columns, read_json, read_jsonl, read_parquet, read_table
from kexue.corpus.streams import BinaryFileError, CorpusError, TextStream, check_encoding, printable

SPLITS = ("auto", "file", "line", "paragraph")
WHOLE = 1 << 18  # characters up to which a text file among others is one document
_RECORDED = 10_000  # entries kept in `skipped`
_RECORDED_PER_FILE = 100


class _Skipped:
    """What was left out, bounded: a file of a million bad lines does not fill the memory."""

    def __init__(self) -> None:
        self.entries: list[tuple[str, str]] = []
        self.count = 0
        self._path, self._in_path = "", 0

    def add(self, path: str, reason: str) -> None:
        self.count += 1
        self._in_path = self._in_path + 1 if path == self._path else 1
        self._path = path
        if self._in_path <= _RECORDED_PER_FILE and len(self.entries) < _RECORDED:
            self.entries.append((path, reason))

    def error(self, error: CorpusError) -> None:
        where = f"line {error.line}" if error.line is not None else ""
        where += f"{', ' if where else ''}byte offset {error.offset}" if error.offset is not None else ""
        self.add(error.path, f"{where}: {error.reason}" if where else error.reason)


class _Ids:
    """Makes ids unique. Remembers a number for each id that came from a column, and nothing for generated ones."""

    def __init__(self) -> None:
        self._columns: set[int] = set()
        self._files: set[str] = set()
        self._again: dict[str, int] = {}
        self.repeated = 0

    def file(self, name: str) -> str:
        """Return a name for a file under which no file and no record is known."""
        unique, number = name, 2
        while unique in self._files or hash(unique) in self._columns:
            unique, number = f"{name}~{number}", number + 1
        self._files.add(unique)
        return unique

    def generated(self, name: str) -> str:
        """Return ``name``, which is unique among generated ids, changed if a column has used it."""
        return self.column(name) if self._columns and hash(name) in self._columns else name

    def column(self, name: str) -> str:
        """Return ``name`` changed if it was used before."""
        unique = name
        while hash(unique) in self._columns or self._is_generated(unique):
            self._again[name] = self._again.get(name, 1) + 1
            unique = f"{name}~{self._again[name]}"
        self.repeated += unique != name
        self._columns.add(hash(unique))
        return unique

    def _is_generated(self, name: str) -> bool:
        stem = name.partition("#")[0]
        return stem in self._files or (":" in stem and stem.rpartition(":")[0] in self._files)


class DocumentReader:
    """Documents of files and folders; every iteration reads them again. Made by :func:`read_documents`.

    Attributes:
        paths: The paths that were given.
        skipped: What the latest iteration left out, as (path, reason): at most 100 entries a file and 10,000 in all.
        skipped_count: How many it left out.
        repeated_ids: How many ids of the latest iteration had been used before and got a suffix.

    Example:
        >>> import pathlib, tempfile
        >>> folder = pathlib.Path(tempfile.mkdtemp())
        >>> _ = (folder / "a.txt").write_text("First text."), (folder / "b.csv").write_text("id,review\\n7,Good")
        >>> reader = DocumentReader(folder)
        >>> [(d.id, d.text) for d in reader]
        [('a.txt', 'First text.'), ('7', 'Good')]
    """

    def __init__(
        self,
        paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
        *,
        format: str | None = None,
        id_column: str | None = None,
        title_column: str | None = None,
        text_column: str | None = None,
        label_column: str | None = None,
        encoding: str = "utf-8",
        split: str = "auto",
        max_chars: int | None = 20_000,
        on_error: str = "raise",
        progress: Callable[[float, float], None] | None = None,
    ) -> None:
        given = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
        if not given:
            raise ValueError("paths must name at least one file or folder; got none")
        for path in given:
            if not isinstance(path, (str, os.PathLike)) or not isinstance(os.fspath(path), str):
                raise TypeError(f"paths must be str or os.PathLike; got {path!r} of type {type(path).__name__}")
        self.paths = [Path(path) for path in given]
        if format is not None:
            check_choice("format", format, FORMATS)
        check_choice("split", split, SPLITS)
        check_choice("on_error", on_error, ("raise", "skip"))
        if max_chars is not None:
            check_int("max_chars", max_chars, 16)
        columns = {"id": id_column, "text": text_column, "title": title_column, "label": label_column}
        for role, column in columns.items():
            if column is not None and not isinstance(column, str):
                raise TypeError(f"{role}_column must be a str; got {column!r} of type {type(column).__name__}")
        if progress is not None and not callable(progress):
            raise TypeError(f"progress must be a function of (done, total) or None; got {progress!r}")
        for path in self.paths:
            if not os.path.lexists(path):
                raise FileNotFoundError(f"no such file or folder: {printable(path)}")
            if not os.path.exists(path) and os.path.islink(path):
                raise FileNotFoundError(f"{printable(path)} is a link to {os.readlink(path)!r}, which does not exist")
        self.format, self.split, self.max_chars, self.on_error = format, split, max_chars, on_error
        self.encoding = check_encoding(encoding)
        self.skipped: list[tuple[str, str]] = []
        self.skipped_count = 0
        self.repeated_ids = 0
        self._roles = Roles(id=id_column, text=text_column, title=title_column, label=label_column)
        self._progress = progress

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(repr(str(path)) for path in self.paths)})"

    def fingerprint(self) -> str:
        """Return 64 hexadecimal digits that change when a file or a setting does.

        Reads names, sizes and times of change, no content; the place of a folder does not count.

        Raises:
            ValueError: as iterating does, for what can be told without reading the files.
        """
        digest = hashlib.sha256()
        settings = (self.format, self.split, self.max_chars, self.on_error, self.encoding, self._roles)
        digest.update(repr(settings).encode("utf-8", "replace"))
        for source in self._sources(_Skipped()):
            digest.update(repr((source.name, source.format, source.size, source.modified)).encode())
        return digest.hexdigest()

    def _sources(self, skipped: _Skipped) -> list[Source]:
        return discover([os.fspath(path) for path in self.paths], self.format, skipped.add, self.on_error == "raise")

    def __iter__(self) -> Iterator[Document]:
        skipped, ids = _Skipped(), _Ids()
        self.skipped, self.skipped_count, self.repeated_ids = skipped.entries, 0, 0
        sources = self._sources(skipped)
        total, done, count = sum(source.size for source in sources), 0, 0
        for source in sources:
            self.skipped_count = skipped.count
            try:
                for document in self._read(source, len(sources) == 1, ids, skipped):
                    count += 1
                    yield document
            except BinaryFileError as error:
                if source.named and self.on_error == "raise":
                    raise
                skipped.error(error)
            except CorpusError as error:
                if self.on_error == "raise":
                    raise
                skipped.error(error)
            done += source.size
            self.skipped_count, self.repeated_ids = skipped.count, ids.repeated
            if self._progress is not None:
                self._progress(done, total)
        if not count:
            listed = "; ".join(f"{path}: {reason}" for path, reason in skipped.entries[:5])
            more = f" and {skipped.count - 5} more" if skipped.count > 5 else ""
            raise ValueError(
                f"no document in {', '.join(printable(path) for path in self.paths)}"
                + (f"; left out: {listed}{more}" if listed else ": there is only white space")
            )

    def _read(self, source: Source, alone: bool, ids: _Ids, skipped: _Skipped) -> Iterator[Document]:
        name = ids.file(source.name)
        shown = printable(source.path)
        if source.format == "parquet":
            yield from self._records(source, name, self._parquet(source.path, shown), ids, skipped)
            return
        stream = TextStream(source.path, self.encoding, shown)
        if source.format == "text":
            yield from self._text(stream, name, alone, ids)
            return
        items: Iterator[Item]
        if source.format == "jsonl":
            items = read_jsonl(stream)
        elif source.format == "json":
            items = read_json(stream)
        else:
            items = read_table(stream, self._roles, "\t" if source.format == "tsv" else None)
        yield from self._records(source, name, items, ids, skipped)

    def _parquet(self, path: str, shown: str) -> Iterator[Item]:
        names = parquet_columns(path, shown)
        try:
            roles = choose(names, self._roles)
        except ValueError as error:
            raise CorpusError(shown, str(error)) from error
        wanted = {column for _, column in roles.items() if column is not None} | {"meta"}
        yield from read_parquet(path, shown, [name for name in names if name in wanted])

    def _records(
        self, source: Source, name: str, items: Iterator[Item], ids: _Ids, skipped: _Skipped
    ) -> Iterator[Document]:
        """Turn records into documents; a record that cannot be one is an error or left out."""
        shown = printable(source.path)
        free = source.format in ("jsonl", "json")  # keys may differ from record to record
        at_line = source.format != "json" and source.format != "parquet"
        known: dict[tuple[str, ...], Roles] = {}
        used: set[str] = set()
        count = 0
        for number, record in items:
            try:
                if isinstance(record, CorpusError):
                    raise record
                keys = tuple(record)
                roles = known.get(keys)
                if roles is None:
                    if len(known) > 1000:
                        known.clear()
                    roles = known[keys] = choose(keys, self._roles, required=not free)
                    used |= {role for role, column in roles.items() if column is not None}
                given, text, title, labels, meta = fields(record, roles)
                if not text.strip():
                    skipped.add(shown, f"{'line' if at_line else 'record'} {number}: the text is empty")
                    continue
                own = ids.column(given) if given else ids.generated(f"{name}:{number}")
                for _, part, piece in pieces([(number, text, True)], self.max_chars):
                    yield Document(f"{own}#{part}" if part else own, piece, title, labels, meta)
                count += 1
            except (ValueError, TypeError) as error:
                if not isinstance(error, CorpusError):
                    reason = str(error) if at_line else f"record {number}: {error}"
                    error = CorpusError(shown, reason, number if at_line else None)
                if self.on_error == "raise":
                    raise error from None
                skipped.error(error)
        absent = [(role, flag) for role, flag in self._roles.items() if flag is not None and role not in used]
        if free and count and absent:
            role, flag = absent[0]
            raise CorpusError(shown, f"no record has the key {flag!r} for the {role}")

    def _text(self, stream: TextStream, name: str, alone: bool, ids: _Ids) -> Iterator[Document]:
        """Split a text file by the rule that the head of this module states."""
        split, chunks = self.split, stream.chunks()
        if split == "auto":
            head, length = [], 0
            for chunk in chunks:
                head.append(chunk)
                length += len(chunk)
                if length > WHOLE:
                    break
            if length <= WHOLE and not alone:
                split = "file"
            else:
                split = "paragraph" if has_paragraphs("".join(head)[:WHOLE]) else "line"
            chunks = itertools.chain(head, chunks)
            del head
        units = {"file": whole, "line": lines, "paragraph": paragraphs}[split]
        own = name
        for line, part, piece in pieces(units(chunks), self.max_chars):
            own = ids.generated(name if split == "file" else f"{name}:{line}") if part < 2 else own
            yield Document(f"{own}#{part}" if part else own, piece)


def read_documents(
    paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    *,
    format: str | None = None,
    id_column: str | None = None,
    title_column: str | None = None,
    text_column: str | None = None,
    label_column: str | None = None,
    encoding: str = "utf-8",
    split: str = "auto",
    max_chars: int | None = 20_000,
    on_error: str = "raise",
    progress: Callable[[float, float], None] | None = None,
) -> DocumentReader:
    r"""Read documents from files and folders, in streams: memory does not grow with the corpus.

    Formats: text (.txt, .md, .rst and every other name that is not known), JSON lines (.jsonl, .ndjson), JSON (an array
    of objects, one object, or objects one after another), CSV and TSV, Parquet; text formats also with .gz, .bz2, .xz
    or .zst behind. Folders are read recursively in the order of names; links are followed, each real file is read once.
    How text files are split, texts cut and ids made is said at the head of this module (:mod:`kexue.corpus.readers`).

    Left out of folders, and listed in ``skipped``: hidden and empty files, workspaces and word models of kexue, pipes
    and devices, links to nothing, files that are binary by their name or by a NUL byte in the first 8,192 bytes. Named
    directly each of these is an error.
    Records with an empty text are left out and listed. Elsewhere NUL characters are removed, line ends become ``\n``,
    and a text loses blank lines at its start and white space at its end; nothing else is changed, in particular there
    is no Unicode normalisation.

    Memory: a few chunks of 256 KiB for text; three times the longest line for JSON lines and unquoted CSV, and seven
    times for quoted CSV; four times the longest record for JSON; 512 rows and a row group's pages for Parquet; about
    80 bytes for each record that has an id column.

    Args:
        paths: A file or folder, or several.
        format: "text", "jsonl", "json", "csv", "tsv" or "parquet" for all files; None goes by the file name.
        id_column: Column or key of the ids; None guesses (id, doc_id, uuid, ...), and makes them if there is none.
        title_column: Column of the titles; None guesses (title, headline, name, subject, 标题, ...).
        text_column: Column of the texts; None guesses (text, content, body, sentence, review, abstract, 正文, ...). In
            tables without header all columns are called by their number, from "1".
        label_column: Column of the labels; None guesses (label, labels, category, tags, 标签, ...).
        encoding: Of files without byte-order mark, such as "utf-8" or "gb18030".
        split: How a text file is split: "auto", "file", "line" or "paragraph".
        max_chars: Longer texts are cut into pieces of at most so many characters; None never cuts.
        on_error: "raise" stops at the first problem. "skip" notes it in ``skipped`` and goes on, with the next record
            if the record was the problem, else with the next file.
        progress: Called as ``progress(done, total)`` with bytes on disk after each file.

    Returns:
        An iterable that reads the files anew every time, with ``skipped`` and ``fingerprint()``.

    Raises:
        FileNotFoundError: if a path does not exist (at once).
        TypeError, ValueError: for an argument that is not one of the above (at once); ValueError while iterating, with
            file, line and byte offset where they are known, for files that cannot be read, bytes that are not valid in
            the encoding, damaged files, a text column that cannot be told, and if there is no document at all.

    Example:
        >>> import pathlib, tempfile
        >>> file = pathlib.Path(tempfile.mkdtemp()) / "notes.jsonl"
        >>> _ = file.write_text('{"text": "One.", "title": "First"}\n{"text": "Two.", "label": "b"}\n')
        >>> for document in read_documents(file):
        ...     print(document.id, document.text, document.title, document.labels)
        notes.jsonl:1 One. First ()
        notes.jsonl:2 Two.  ('b',)
    """
    return DocumentReader(
        paths,
        format=format,
        id_column=id_column,
        title_column=title_column,
        text_column=text_column,
        label_column=label_column,
        encoding=encoding,
        split=split,
        max_chars=max_chars,
        on_error=on_error,
        progress=progress,
    )
