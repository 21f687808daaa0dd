"""A corpus as numbers: words become ids, documents become rows of a ragged array, on disk and memory-mapped.

Each document is kept in three fields, because the encoder, the ranking and the evaluation treat them differently: its
*head* (the title, or the first line where there is no title), its *body* (the rest) and the words of its own *name*
(``numpy.linalg.norm``, ``guide/setup.md``). Text is read once and streamed: token ids are spilled to disk as they come
and renumbered in a second pass, so memory grows with the vocabulary and never with the text.

What a corpus does not have must not hurt it. Numbers and hashes are ids without being names; whether names say anything
is decided by a measurement (:func:`names_are_informative`), not by their look.
"""

from __future__ import annotations

import os
import re
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kexue._checks import check_int
from kexue._files import atomic_path, write_json
from kexue._progress import track

FORMAT = 1
FIELDS = ("head", "body", "name")
HEAD_LIMIT = 200  # characters; a longer first line is a paragraph, of which the first sentence may be the head
_SENTENCE = re.compile(r".*?(?:[.!?](?=\s)|[。！？])", re.S)
_SEPARATORS = re.compile(r"[./\\:#]+")
_NAME = re.compile(r"(?=.*[^\W\d_])[\w.\-/\\:#$<>+]+")
_SUFFIX = re.compile(r"\.(?:txt|md|rst|html?|jsonl?|csv|parquet|py|tex|pdf|docx?|log)$", re.I)


@dataclass(frozen=True)
class Ragged:
    """Rows of unequal length in two flat arrays.

    Args:
        values: All rows one after another, int32, shape ``(n,)``.
        offsets: Row ``i`` is ``values[offsets[i]:offsets[i + 1]]``; int64, shape ``(N + 1,)``.

    Example:
        >>> rows = Ragged.from_rows([[3, 1], [], [2]])
        >>> len(rows), rows[0].tolist(), rows.take([2, 0]).lengths.tolist()
        (3, [3, 1], [1, 2])
    """

    values: NDArray[np.int32]
    offsets: NDArray[np.int64]

    def __post_init__(self) -> None:
        if self.offsets.ndim != 1 or len(self.offsets) < 1 or int(self.offsets[-1]) != len(self.values):
            raise ValueError(
                f"offsets must be one-dimensional and end at {len(self.values)}, the number of values; "
                f"got shape {self.offsets.shape} ending at {self.offsets[-1:].tolist()}"
            )

    @classmethod
    def from_rows(cls, rows: Iterable[Sequence[int] | NDArray[Any]]) -> Ragged:
        """Build from an iterable of rows."""
        parts = [np.asarray(row, np.int32).reshape(-1) for row in rows]
        offsets = np.zeros(len(parts) + 1, np.int64)
        np.cumsum([len(part) for part in parts], out=offsets[1:])
        return cls(np.concatenate(parts) if parts else np.empty(0, np.int32), offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> NDArray[np.int32]:
        if not -len(self) <= row < len(self):
            raise IndexError(f"row must be between 0 and {len(self) - 1}; got {row}")
        row %= len(self)
        return self.values[self.offsets[row] : self.offsets[row + 1]]

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Length of each row, shape ``(N,)``."""
        return np.diff(self.offsets)

    def take(self, rows: Sequence[int] | NDArray[Any]) -> Ragged:
        """The given rows, in the given order."""
        index = np.asarray(rows, np.int64)
        lengths = self.lengths[index]
        offsets = np.zeros(len(index) + 1, np.int64)
        np.cumsum(lengths, out=offsets[1:])
        source = np.repeat(self.offsets[index] - offsets[:-1], lengths) + np.arange(offsets[-1])
        return Ragged(self.values[source], offsets)

    def masked(self, keep: NDArray[np.bool_]) -> Ragged:
        """The same rows, those with ``keep`` False emptied."""
        lengths = np.where(keep, self.lengths, 0)
        offsets = np.zeros(len(self) + 1, np.int64)
        np.cumsum(lengths, out=offsets[1:])
        return Ragged(self.values[np.repeat(keep, self.lengths)], offsets)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write ``path.values.npy`` and ``path.offsets.npy``."""
        for part in ("values", "offsets"):
            with atomic_path(f"{os.fspath(path)}.{part}.npy") as temporary, open(temporary, "wb") as file:
                np.save(file, getattr(self, part), allow_pickle=False)

    @classmethod
    def load(cls, path: str | os.PathLike[str], mmap: bool = True) -> Ragged:
        """Read what :meth:`save` wrote; with ``mmap`` the values stay on disk until they are used."""
        name = os.fspath(path)
        values = _load(f"{name}.values.npy", mmap)
        return cls(values, _load(f"{name}.offsets.npy", False))


def concatenate(*fields: Ragged) -> Ragged:
    """Join fields document by document.

    Example:
        >>> concatenate(Ragged.from_rows([[1], [2]]), Ragged.from_rows([[5, 6], []]))[0].tolist()
        [1, 5, 6]
    """
    if len({len(part) for part in fields}) != 1:
        raise ValueError(f"all fields must have the same number of rows; got {[len(part) for part in fields]}")
    lengths = np.sum([part.lengths for part in fields], axis=0)
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    values = np.empty(offsets[-1], np.int32)
    start = offsets[:-1].copy()
    for part in fields:
        values[np.repeat(start - part.offsets[:-1], part.lengths) + np.arange(len(part.values))] = part.values
        start += part.lengths
    return Ragged(values, offsets)


@dataclass
class TokenizedCorpus:
    """A corpus as ids.

    Attributes:
        vocabulary: Words, most frequent (by documents) first, ties alphabetical.
        df: In how many documents each word stands, int64 ``(V,)``.
        head: Title or first line of each document.
        body: The rest of its text.
        name: Words of its own name; empty rows where names say nothing.
        own: The last part of each name as one word, an id or -1, int32 ``(N,)``: what other documents call it.
        labels: That last part as text, lower-cased ("" without names): compared letter by letter.
        parent: Number of the container (module, folder) each document stands in, int32 ``(N,)``, -1 for none.
        position: Place in the order of the corpus, int32 ``(N,)``.
        flags: What the corpus has: ``names``, ``order``, ``heads`` (bool).
    """

    vocabulary: list[str]
    df: NDArray[np.int64]
    head: Ragged
    body: Ragged
    name: Ragged
    own: NDArray[np.int32]
    labels: list[str]
    parent: NDArray[np.int32]
    position: NDArray[np.int32]
    flags: dict[str, bool] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.body)

    @property
    def ids(self) -> dict[str, int]:
        """Word -> id."""
        if not hasattr(self, "_ids"):
            self._ids = {word: number for number, word in enumerate(self.vocabulary)}
        return self._ids

    def lookup(self, tokens: Iterable[str]) -> NDArray[np.int32]:
        """Ids of the known ones among ``tokens``, in order."""
        ids = self.ids
        return np.array([ids[token] for token in tokens if token in ids], np.int32)

    def without_heads(self, rows: NDArray[np.bool_]) -> TokenizedCorpus:
        """The same corpus with the heads of ``rows`` (bool ``(N,)``) taken away."""
        return TokenizedCorpus(**{**self.__dict_fields(), "head": self.head.masked(~rows)})

    def without_names(self) -> TokenizedCorpus:
        """The same corpus as plain text: no names, no order."""
        n = len(self)
        empty = Ragged(np.empty(0, np.int32), np.zeros(n + 1, np.int64))
        flags = {**self.flags, "names": False, "order": False}
        replaced = {"name": empty, "own": np.full(n, -1, np.int32), "labels": [""] * n, "flags": flags}
        return TokenizedCorpus(**{**self.__dict_fields(), **replaced, "parent": np.full(n, -1, np.int32)})

    def __dict_fields(self) -> dict[str, Any]:
        return {key: getattr(self, key) for key in self.__dataclass_fields__}

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the arrays and the vocabulary into ``folder``; the small JSON file comes last and marks it complete."""
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        for name in FIELDS:
            getattr(self, name).save(target / name)
        for name in ("df", "own", "parent", "position"):
            with atomic_path(target / f"{name}.npy") as temporary, open(temporary, "wb") as file:
                np.save(file, getattr(self, name), allow_pickle=False)
        for name, lines in (("vocabulary", self.vocabulary), ("labels", self.labels)):
            with atomic_path(target / f"{name}.txt") as temporary:
                temporary.write_text("".join(line + "\n" for line in lines), encoding="utf-8", newline="\n")
        counts = {"documents": len(self), "words": len(self.vocabulary)}
        write_json(target / "tokens.json", {"format": FORMAT, **counts, "flags": self.flags})

    @classmethod
    def load(cls, folder: str | os.PathLike[str], mmap: bool = True) -> TokenizedCorpus:
        """Read what :meth:`save` wrote."""
        import json

        source = Path(folder)
        try:
            head = json.loads((source / "tokens.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ValueError(f"{source} holds no tokenised corpus: tokens.json is missing") from None
        if head.get("format") != FORMAT:
            raise ValueError(f"{source / 'tokens.json'}: expected format {FORMAT}, got {head.get('format')!r}")
        text = {name: _lines(source / f"{name}.txt") for name in ("vocabulary", "labels")}
        arrays = {name: _load(source / f"{name}.npy", mmap) for name in ("df", "own", "parent", "position")}
        fields = {name: Ragged.load(source / name, mmap) for name in FIELDS}
        found = {"documents": len(fields["body"]), "words": len(text["vocabulary"])}
        if any(head[key] != found[key] for key in found):
            raise ValueError(f"{source} is damaged: expected {head['documents']} documents and {head['words']} words, "
                             f"found {found['documents']} and {found['words']}")  # fmt: skip
        return cls(**text, **arrays, **fields, flags=dict(head["flags"]))


def is_name(text: str) -> bool:
    """Whether ``text`` looks like an identifier or a path rather than a sentence.

    Example:
        >>> is_name("numpy.linalg.norm"), is_name("Matrix or vector norm."), is_name("2024-01")
        (True, False, False)
    """
    return bool(_NAME.fullmatch(text.strip()))


def split_head(title: str, text: str, first_line: bool) -> tuple[str, str]:
    """Divide a document into head and body.

    Args:
        title: Its title; a title that is a name is no head.
        text: Its text.
        first_line: Whether the first line (or first sentence of a long line) stands in for a missing title.

    Example:
        >>> split_head("", "Matrix norm.\\nReturns a float.", True)
        ('Matrix norm.', 'Returns a float.')
        >>> split_head("norm", "Returns a float.", False)
        ('', 'Returns a float.')
    """
    title = title.strip()
    body = text.lstrip()
    if title and not is_name(title):
        line, _, rest = body.partition("\n")
        return title, rest if line.strip() == title else body
    if not first_line:
        return "", body
    line, _, rest = body.partition("\n")
    if len(line) <= HEAD_LIMIT and rest.strip():
        return line.strip(), rest
    found = _SENTENCE.match(body[:HEAD_LIMIT])
    if found and body[found.end() :].strip():
        return found[0].strip(), body[found.end() :]
    return "", body


def name_and_parent(identifier: str, title: str) -> tuple[str, str]:
    """The own name of a document and its container, from a structured id or a title that is a name.

    Example:
        >>> name_and_parent("numpy.linalg.norm", ""), name_and_parent("guide/setup.md", "Setting up")
        (('norm', 'numpy.linalg'), ('setup', 'guide'))
    """
    candidates = [text.strip() for text in (identifier, title) if is_name(text)]
    if not candidates:
        return "", ""
    # A title such as ``norm`` may be all there is besides a number; a dotted id says more than a bare title.
    chosen = max(candidates, key=lambda text: len(_SEPARATORS.split(_SUFFIX.sub("", text))))
    pieces = [piece for piece in _SEPARATORS.split(_SUFFIX.sub("", chosen)) if piece]
    if not pieces:
        return "", ""
    own = next((piece for piece in reversed(pieces) if any(c.isalpha() for c in piece)), pieces[-1])
    return own, chosen[: chosen.rfind(own)].rstrip("./\\:#")
