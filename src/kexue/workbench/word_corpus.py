"""The text that words are learned from: looked through once before any work begins, then read as often as needed.

Plain UTF-8 files are handed to the counters as paths, the fast way: they cut them where they like, and a line is a
document. Everything else (records, compressed files, other encodings) comes as texts through the readers of
:mod:`kexue.corpus`, a line or a record being a document.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from kexue.corpus import BinaryFileError, CorpusError, read_documents
from kexue.corpus.cutting import lines, pieces
from kexue.corpus.discovery import Source, discover
from kexue.corpus.streams import COMPRESSED, TextStream, check_encoding
from kexue.workbench.word_tokens import unspaced_share

LONG_LINE = 1_000_000  # characters; a longer document is cut before it becomes a list of words
_WHOLE, _SLICE = 1 << 15, 500  # characters that are looked at to tell the script: all of so many, or slices
_EXPECTED = ("hidden", "a workspace of kexue", "a word model of kexue")  # left out without a word
_SHOWN = 20  # left out files that are named in a model
_WIDE = (b"\xff\xfe", b"\xfe\xff", b"\x00\x00\xfe\xff")  # byte-order marks of UTF-16 and UTF-32


class WordCorpus:
    """Files and folders as a source of words. Making one reads everything once and finds what cannot be read.

    Args:
        paths: Text files, folders, .jsonl, .csv, .parquet.
        skip_bad: Leave out files (and records) that cannot be read and list them in ``skipped``, instead of stopping.
        encoding: Encoding of text files.
        **columns: Column options of :func:`kexue.corpus.read_documents`.

    Attributes:
        documents: Lines or records with text.
        characters: Characters of all of them.
        share: Share of letters of unspaced scripts, from 0 to 1, told from a sample.
        skipped: What was left out, as (path, reason); ``skipped_count`` counts also what the list has no room for.

    Raises:
        CorpusError: Something cannot be read (names file, line and byte offset) and ``skip_bad`` is False.
        ValueError: There is no text at all.

    Example:
        >>> import pathlib, tempfile
        >>> file = pathlib.Path(tempfile.mkdtemp()) / "a.txt"
        >>> _ = file.write_text("One line.\\n\\n另一行。\\n", encoding="utf-8")
        >>> corpus = WordCorpus([file])
        >>> list(corpus), corpus.documents
        (['One line.', '另一行。'], 2)
    """

    def __init__(
        self,
        paths: Iterable[str | os.PathLike[str]],
        *,
        skip_bad: bool = False,
        encoding: str = "utf-8",
        **columns: Any,
    ) -> None:
        self.paths = [Path(path) for path in paths]
        self.documents = self.characters = self.skipped_count = 0
        self.skipped: list[tuple[str, str]] = []
        self.share = 0.0
        self._files: list[Source] | None = None
        self._long = False
        # Checks all arguments at once, also those that only a part of the files needs.
        self._reader = read_documents(
            self.paths, encoding=encoding, split="line", max_chars=LONG_LINE,
            on_error="skip" if skip_bad else "raise", **columns,
        )  # fmt: skip
        sources = discover([os.fspath(path) for path in self.paths], None, self._skip, not skip_bad)
        if (
            sources
            and not any(columns.values())
            and all(_plain(source, check_encoding(encoding)) for source in sources)
        ):
            self._survey(sources, skip_bad)
        else:
            self._survey_texts()
        if not self.documents:
            named = ", ".join(str(path) for path in self.paths)
            left_out = "; ".join(f"{path}: {reason}" for path, reason in self.skipped[:5])
            why = f"left out: {left_out}" if left_out else "there is only white space"
            raise ValueError(f"no text in {named}; {why}")

    def _skip(self, path: str, reason: str) -> None:
        if reason not in _EXPECTED:
            self.skipped_count += 1
            self.skipped.append((path, reason))

    def _survey(self, sources: list[Source], skip_bad: bool) -> None:
        """Decode every file to its end: what is wrong shows now, and not after hours of counting."""
        self._files, samples = [], []
        for source in sources:
            found = _Survey()
            try:
                for chunk in TextStream(source.path).chunks():
                    found.add(chunk)
                found.add("\n")
            except BinaryFileError as error:  # inside of a folder these are always left out
                if source.named and not skip_bad:
                    raise
                self._skip(error.path, error.reason)
                continue
            except CorpusError as error:
                if not skip_bad:
                    raise
                self._skip(error.path, _reason(error))
                continue
            self._files.append(source)
            self.characters += found.characters
            self.documents += found.documents
            self._long = self._long or found.longest >= LONG_LINE
            samples += found.sample
        self.share = unspaced_share(samples)

    def _survey_texts(self) -> None:
        def sample() -> Iterator[str]:
            for document in self._reader:
                self.documents += 1
                self.characters += len(document.text)
                if self.characters < 20_000_000 or self.documents % 50 == 0:  # many short documents are many slices
                    yield from spread(document.text)

        self.share = unspaced_share(sample())
        kept = [entry for entry in self._reader.skipped if entry[1] not in _EXPECTED]
        self.skipped_count = self._reader.skipped_count - (len(self._reader.skipped) - len(kept))
        self.skipped = kept

    @property
    def source(self) -> Any:
        """What a counter of characters reads: paths, or this corpus as texts that can be read again."""
        return self if self._files is None else [Path(source.path) for source in self._files]

    @property
    def documents_source(self) -> Any:
        """What a counter of words reads: the same, but never a document too long to become one list of words."""
        return self if self._long else self.source

    def __iter__(self) -> Iterator[str]:
        """The documents; longer ones than ``LONG_LINE`` characters in pieces that end between sentences."""
        for _, text in self.located():
            yield text

    def located(self) -> Iterator[tuple[str, str]]:
        """The documents with what they are called: ``file.txt:17`` or the id of a record."""
        if self._files is None:
            for document in self._reader:
                yield document.id, document.text
            return
        for source in self._files:
            for line, part, piece in pieces(lines(TextStream(source.path).chunks()), LONG_LINE):
                yield f"{source.name}:{line}" + (f"#{part}" if part else ""), piece

    def describe(self) -> dict[str, Any]:
        """Where the text came from, for the notes of a model."""
        return {
            "paths": [str(path) for path in self.paths],
            "documents": self.documents,
            "characters": self.characters,
            "unspaced_share": round(self.share, 4),
            "skipped": self.skipped_count,
            "skipped_examples": [f"{path}: {reason}" for path, reason in self.skipped[:_SHOWN]],
        }


def _plain(source: Source, encoding: str) -> bool:
    """Whether a counter can read the file itself."""
    if source.format != "text" or encoding not in ("utf-8", "utf-8-sig") or source.path.lower().endswith(COMPRESSED):
        return False
    try:
        with open(source.path, "rb") as file:
            return not file.read(4).startswith(_WIDE)
    except OSError:
        return True  # the survey says what is wrong


class _Survey:
    """What one file holds, chunk by chunk."""

    def __init__(self) -> None:
        self.characters = self.documents = self.longest = 0
        self.sample: list[str] = []
        self._length, self._filled = 0, False  # of the line that is still open

    def add(self, chunk: str) -> None:
        self.sample += spread(chunk)
        for number, part in enumerate(chunk.split("\n")):
            if number:  # a line has ended
                self.documents += self._filled
                self.longest = max(self.longest, self._length)
                self.characters += self._length
                self._length, self._filled = 0, False
            self._length += len(part)
            self._filled = self._filled or not (part == "" or part.isspace())


def spread(text: str) -> list[str]:
    """Short text as it is; of long text a tenth, in slices from all over it."""
    return (
        [text] if len(text) <= _WHOLE else [text[start : start + _SLICE] for start in range(0, len(text), 10 * _SLICE)]
    )


def _reason(error: CorpusError) -> str:
    where = f"line {error.line}" if error.line is not None else ""
    where += f"{', ' if where else ''}byte offset {error.offset}" if error.offset is not None else ""
    return f"{where}: {error.reason}" if where else error.reason
