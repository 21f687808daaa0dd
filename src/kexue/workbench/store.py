"""The documents of a workspace in one SQLite file, with an FTS5 index over their words.

Rows are numbered 0, 1, ... in the order of the corpus, the same numbers as in every array of the workspace. The words
in the index are those of the project's own tokenizer (split identifiers, stems, Chinese words), joined by spaces, so
plain keyword search treats text the same way as the models do. It also knows the words that stand in one document
only, which the models leave out.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

from kexue.corpus import Document
from kexue.workbench.errors import WorkspaceError

_SCHEMA = """
create table documents (
    row integer primary key, id text not null unique, title text not null, text text not null,
    labels text not null, meta text not null);
create virtual table words using fts5(
    body, content='', columnsize=1, detail=full,
    tokenize = "unicode61 remove_diacritics 0 categories 'L* M* N* P* S* Co'");
"""
_BATCH = 2000


class DocumentStore:
    """Documents and their words on disk.

    Args:
        path: The SQLite file.
        write: Open for writing; otherwise the file is opened read-only.

    Raises:
        WorkspaceError: the file is missing, or is not such a database.
    """

    def __init__(self, path: Path, write: bool = False) -> None:
        self.path = path
        if not path.is_file():
            raise WorkspaceError(f"{path} is missing; build the workspace again with --force")
        mode = "rw" if write else "ro"
        try:
            # The server answers from several threads; SQLite itself serialises the access.
            self._db = sqlite3.connect(f"{path.absolute().as_uri()}?mode={mode}", uri=True, check_same_thread=False)
            self._size = int(self._db.execute("select count(*) from documents").fetchone()[0])
        except sqlite3.DatabaseError as error:
            raise WorkspaceError(f"{path} is damaged ({error}); build the workspace again with --force") from None

    @classmethod
    def create(
        cls, path: Path, documents: Iterable[Document], progress: Callable[[int], None] | None = None
    ) -> tuple[DocumentStore, str, int]:
        """Write all documents into a new file.

        Args:
            path: The file; an old one is replaced.
            documents: Read once, in order.
            progress: Called with the number of documents after each batch.

        Returns:
            The open store, a fingerprint of the content (hexadecimal), and the number of characters of text.

        Raises:
            ValueError: two documents have the same id, or there is none at all.
            TypeError: something in ``documents`` is not a Document.
        """
        path.unlink(missing_ok=True)
        db = sqlite3.connect(path)
        digest, characters, row = hashlib.sha256(), 0, 0
        try:
            db.execute("pragma journal_mode = memory")  # an unfinished file is thrown away, never repaired
            db.executescript(_SCHEMA)
            source = iter(documents)
            while batch := list(islice(source, _BATCH)):
                rows = []
                for document in batch:
                    if not isinstance(document, Document):
                        raise TypeError(f"a corpus holds Documents; got {document!r} of type {type(document).__name__}")
                    labels = json.dumps(document.labels, ensure_ascii=False)
                    meta = json.dumps(document.meta, ensure_ascii=False, sort_keys=True)
                    fields = (document.id, document.title, document.text, labels, meta)
                    digest.update("\0".join(fields).encode("utf-8") + b"\0\0")
                    characters += len(document.text)
                    rows.append((row, *fields))
                    row += 1
                with db:
                    try:
                        db.executemany("insert into documents values (?, ?, ?, ?, ?, ?)", rows)
                    except sqlite3.IntegrityError:
                        raise ValueError(_duplicate(db, rows)) from None
                if progress is not None:
                    progress(len(batch))
            if not row:
                raise ValueError("the corpus holds no documents; expected at least one")
        finally:
            db.close()
        return cls(path, write=True), digest.hexdigest(), characters

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[Document]:
        cursor = self._db.cursor()
        for record in cursor.execute("select id, title, text, labels, meta from documents order by row"):
            yield _document(record)

    def fetch(self, rows: Sequence[int]) -> list[Document]:
        """The documents of the given rows, in the given order."""
        query = "select id, title, text, labels, meta from documents where row = ?"
        return [_document(self._db.execute(query, (int(row),)).fetchone()) for row in rows]

    def row(self, identifier: str) -> int | None:
        """Row of a document id, or None."""
        found = self._db.execute("select row from documents where id = ?", (identifier,)).fetchone()
        return None if found is None else int(found[0])

    def like(self, identifier: str, k: int = 3) -> list[str]:
        """Up to ``k`` ids that end like ``identifier`` or contain it, shortest first, for error messages."""
        pattern = identifier.replace("\\", "\\\\").replace("%", "\\%").replace("_", "\\_")
        query = "select id from documents where id like ? escape '\\' order by length(id), id limit ?"
        return [found[0] for found in self._db.execute(query, (f"%{pattern}%", k))]

    def clear_words(self) -> None:
        """Empty the word index."""
        with self._db:
            self._db.execute("insert into words(words) values ('delete-all')")

    def index_words(self, texts: Iterable[Sequence[str]]) -> None:
        """Fill the word index; ``texts`` yields the tokens of each document in row order."""
        with self._db:
            self._db.executemany(
                "insert into words(rowid, body) values (?, ?)",
                ((row, " ".join(tokens)) for row, tokens in enumerate(texts)),
            )
            self._db.execute("insert into words(words) values ('optimize')")

    def keywords(self, tokens: Sequence[str], k: int) -> list[tuple[int, float]]:
        """Plain keyword search: the best rows by FTS5's BM25 for any of ``tokens``, best first, with their scores."""
        # What FTS5 would split at, it would take for a phrase; a token is one word.
        text = " ".join("".join(c if c.isprintable() else " " for c in token) for token in tokens)
        words = list(dict.fromkeys(text.split()))
        if not words:
            return []
        match = " OR ".join('"' + word.replace('"', '""') + '"' for word in words)
        query = "select rowid, bm25(words) as score from words where words match ? order by score, rowid limit ?"
        return [(int(row), -float(score)) for row, score in self._db.execute(query, (match, k))]


def _document(record: tuple[str, str, str, str, str]) -> Document:
    identifier, title, text, labels, meta = record
    return Document(identifier, text, title=title, labels=tuple(json.loads(labels)), meta=json.loads(meta))


def _duplicate(db: sqlite3.Connection, rows: list[tuple[int, str, str, str, str, str]]) -> str:
    seen: set[str] = set()
    for record in rows:
        identifier = record[1]
        if identifier in seen or db.execute("select 1 from documents where id = ?", (identifier,)).fetchone():
            return f"document ids must be unique; {identifier!r} comes twice"
        seen.add(identifier)
    return "document ids must be unique"
