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
from kexue.words._numba import compiled
from kexue.workbench.fields import is_title, name_and_parent, split_head

FORMAT = 1
FIELDS = ("head", "body", "name", "last")
_MOST_WORDS = 500_000  # the commonest ones; a row of every table in training each, so they bound the memory
_AT_ONCE = 1 << 22  # tokens that are renumbered together, at least one document


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
        values = np.empty(offsets[-1], np.int32)
        _copy_rows(self.values, self.offsets[index], lengths, values, offsets)
        return Ragged(values, offsets)

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
        _copy_rows(part.values, part.offsets, part.lengths, values, start)
        start += part.lengths
    return Ragged(values, offsets)


@compiled()
def _copy_rows(source, begins, lengths, out, starts):  # type: ignore[no-untyped-def]
    """Copy runs of ``source`` to their places. An index of all values would take several times their memory."""
    for row in range(len(lengths)):
        begin, start = begins[row], starts[row]
        for t in range(lengths[row]):
            out[start + t] = source[begin + t]


@dataclass
class TokenizedCorpus:
    """A corpus as ids.

    Attributes:
        vocabulary: Words, most frequent (by documents) first, ties alphabetical.
        df: In how many documents each word stands, int64 ``(V,)``.
        head: Title or first line of each document.
        body: The rest of its text.
        name: Words of its own name; empty rows where names say nothing.
        last: Words of the last part of the name only (``norm`` of ``numpy.linalg.norm``).
        own: The last part of each name as one word, an id or -1, int32 ``(N,)``: what other documents call it.
        labels: That last part as text, lower-cased ("" without names): compared letter by letter.
        parent: Number of the container (module, folder) each document stands in, int32 ``(N,)``, -1 for none.
        position: Place in the order of the corpus, int32 ``(N,)``.
        flags: What the corpus has: ``names``, ``order``, ``heads``; ``titles`` if heads are no first lines (bool).
    """

    vocabulary: list[str]
    df: NDArray[np.int64]
    head: Ragged
    body: Ragged
    name: Ragged
    last: Ragged
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
        flags = {**self.flags, "titles": True}  # from now on some have a head and others none
        return TokenizedCorpus(**{**self.__dict_fields(), "head": self.head.masked(~rows), "flags": flags})

    def take(self, rows: Sequence[int] | NDArray[Any]) -> TokenizedCorpus:
        """The given documents only, in the given order; vocabulary and ``df`` stay."""
        index = np.asarray(rows, np.int64)
        fields = {name: getattr(self, name).take(index) for name in FIELDS}
        numbers = {name: getattr(self, name)[index] for name in ("own", "parent", "position")}
        labels = [self.labels[i] for i in index.tolist()]
        return TokenizedCorpus(**{**self.__dict_fields(), **fields, **numbers, "labels": labels})

    def without_names(self) -> TokenizedCorpus:
        """The same corpus as plain text: no names, no order."""
        n = len(self)
        empty = Ragged(np.empty(0, np.int32), np.zeros(n + 1, np.int64))
        flags = {**self.flags, "names": False, "order": False}
        replaced = {"name": empty, "last": empty, "own": np.full(n, -1, np.int32), "labels": [""] * n, "flags": flags}
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
        everything: dict[str, Any] = {**text, **arrays, **fields}
        return cls(**everything, flags=dict(head["flags"]))


def _load(path: str | os.PathLike[str], mmap: bool) -> NDArray[Any]:
    # An empty array cannot be mapped.
    small = os.path.getsize(path) < 4096
    return np.asarray(np.load(path, mmap_mode="r" if mmap and not small else None, allow_pickle=False))


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").split("\n")[:-1]


class _Spill:
    """Rows of provisional ids on their way to disk."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lengths = array("q")
        self._file = open(path, "wb", buffering=1 << 20)  # noqa: SIM115 (closed by finish)

    def add(self, ids: list[int]) -> None:
        self.lengths.append(len(ids))
        array("i", ids).tofile(self._file)

    def finish(self, renumber: NDArray[np.int32], target: Path) -> Ragged:
        """Renumber into ``target``, drop words without a number, remove the spilled file."""
        self._file.close()
        lengths = np.frombuffer(self.lengths, np.int64) if self.lengths else np.empty(0, np.int64)
        old = np.concatenate([[0], np.cumsum(lengths)])
        offsets = np.zeros(len(old), np.int64)
        kept = 0
        with open(self.path, "rb") as source, open(f"{target}.raw", "wb") as sink:
            first = 0
            while first < len(lengths):
                last = max(first + 1, int(np.searchsorted(old, old[first] + _AT_ONCE, side="right")) - 1)
                values = renumber[np.fromfile(source, np.int32, int(old[last] - old[first]))]
                keep = values >= 0
                values[keep].tofile(sink)
                running = np.concatenate([[0], np.cumsum(keep)])
                offsets[first + 1 : last + 1] = kept + running[old[first + 1 : last + 1] - old[first]]
                kept = int(offsets[last])
                first = last
        self.path.unlink()
        raw = Path(f"{target}.raw")
        values = np.memmap(raw, np.int32, "r") if kept else np.empty(0, np.int32)
        ragged = Ragged(values, offsets)
        ragged.save(target)
        del values, ragged
        raw.unlink()
        return Ragged.load(target)

    def close(self) -> None:
        self._file.close()
        self.path.unlink(missing_ok=True)


class _Ids(dict[str, int]):
    """Word -> provisional id, given on first sight."""

    def __missing__(self, word: str) -> int:
        self[word] = number = len(self)
        return number


def _titled(documents: Iterable[Any], limit: int = 2000) -> bool:
    """Whether documents of this corpus bring titles that are sentences; then a missing title is not the first line."""
    seen = titled = 0
    for document in documents:
        seen += 1
        titled += is_title(document.title)
        if seen == limit:
            break
    return titled > 0.1 * seen


def tokenize_corpus(
    documents: Iterable[Any],
    tokenizer: Callable[[str], list[str]],
    folder: str | os.PathLike[str],
    *,
    min_df: int | None = None,
    progress: bool | None = None,
    total: int | None = None,
) -> TokenizedCorpus:
    """Turn documents into ids, streaming, and save the result into ``folder``.

    Args:
        documents: Documents (``id``, ``text``, ``title``); iterated once, after a look at the first 2000, so it must be
            an iterable that starts anew each time, not a generator.
        tokenizer: Text -> tokens; a method ``parts`` (name -> tokens without compounds) is used when there is one.
        folder: Where the arrays go.
        min_df: Documents a word must stand in; None is 2, or 1 for a corpus under 50 documents. Words of names always
            stay: a name that only one document has is the best of all queries. Of more than 500 000 words the commonest
            are taken; the word index of the store knows the others.
        progress: Show a bar; None if standard error is a terminal.
        total: Number of documents, for the bar.

    Returns:
        The corpus, its arrays memory-mapped.

    Raises:
        TypeError: ``documents`` is a generator, or the tokenizer is not callable.
        ValueError: There is no document, or no word in any of them.

    Example:
        >>> import tempfile
        >>> from kexue.corpus import Document
        >>> texts = ["Matrix norm.\\nA norm of a matrix.", "Vector norm.\\nA norm of a vector."]
        >>> pile = [Document(str(i), text) for i, text in enumerate(texts)]
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     corpus = tokenize_corpus(pile, lambda text: text.lower().replace(".", "").split(), folder)
        >>> corpus.vocabulary[:2], corpus.flags["names"], [corpus.vocabulary[i] for i in corpus.head[0]]
        (['a', 'norm'], False, ['matrix', 'norm'])
    """
    if isinstance(documents, Iterator):
        raise TypeError(
            f"documents must start anew each time it is iterated; got {type(documents).__name__}, use a list"
        )
    if not callable(tokenizer):
        raise TypeError(f"tokenizer must be callable; got {type(tokenizer).__name__}")
    if min_df is not None:
        check_int("min_df", min_df, 1)
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    parts: Callable[[str], list[str]] = getattr(tokenizer, "parts", tokenizer)
    first_line = not _titled(documents)
    ids, counts = _Ids(), array("q")
    own_ids, labels, parents, container = array("q"), [], array("q"), _Ids()
    spills = {name: _Spill(target / f"{name}.spill") for name in FIELDS}
    named: set[int] = set()
    try:
        for document in track(documents, "tokenise", total, progress):
            head, body = split_head(document.title, document.text, first_line)
            label, parent = name_and_parent(document.id, document.title)
            rows = {"head": [ids[word] for word in tokenizer(head)], "body": [ids[word] for word in tokenizer(body)]}
            rows["name"] = [ids[word] for word in parts(f"{parent} {label}".translate(_SPACES))]
            rows["last"] = [ids[word] for word in parts(label.translate(_SPACES))]
            whole = tokenizer(label)
            own_ids.append(ids[whole[-1]] if whole else -1)
            labels.append(label.lower())
            parents.append(container[parent] if parent else -1)
            named.update(rows["name"])
            if whole:
                named.add(own_ids[-1])
            counts.extend([0] * (len(ids) - len(counts)))
            for word in {number for row in rows.values() for number in row}:
                counts[word] += 1
            for name, row in rows.items():
                spills[name].add(row)
        if not labels:
            raise ValueError("a corpus needs at least one document; got none")
        if not ids:
            raise ValueError(
                f"no word in any of the {len(labels)} documents: is the text in another encoding, or empty?"
            )
        minimum = min_df if min_df is not None else 2 if len(labels) >= 50 else 1
        vocabulary, df, renumber = _rank_words(ids, counts, named, minimum)
        fields: dict[str, Any] = {n: spill.finish(renumber, target / n) for n, spill in spills.items()}
    except BaseException:
        for spill in spills.values():
            spill.close()
        raise
    own = np.frombuffer(own_ids, np.int64)
    corpus = TokenizedCorpus(
        vocabulary,
        df,
        **fields,
        own=np.where(own >= 0, renumber[own], -1).astype(np.int32),
        labels=labels,
        parent=np.frombuffer(parents, np.int64).astype(np.int32),
        position=np.arange(len(labels), dtype=np.int32),
    )
    corpus.flags = {"names": names_are_informative(corpus), "order": False, "heads": bool(len(corpus.head.values))}
    corpus.flags["titles"] = corpus.flags["heads"] and not first_line
    if not corpus.flags["names"]:
        corpus.name = corpus.last = Ragged(np.empty(0, np.int32), np.zeros(len(labels) + 1, np.int64))
        corpus.own, corpus.labels = np.full(len(labels), -1, np.int32), [""] * len(labels)
    corpus.flags["order"] = order_is_informative(corpus)
    corpus.save(target)
    return TokenizedCorpus.load(target)


_SPACES = str.maketrans("./\\:#<>$", " " * 8)


def _rank_words(
    ids: dict[str, int], counts: array[int], named: set[int], minimum: int
) -> tuple[list[str], NDArray[np.int64], NDArray[np.int32]]:
    """Final order of the words, their document frequencies, and the map from provisional to final ids (-1: dropped)."""
    df = np.frombuffer(counts, np.int64)
    keep = df >= minimum
    # Letters only: the digits and hexadecimal pieces of generated ids are not worth a row each.
    words = list(ids)
    keep[[number for number in named if df[number] and words[number].replace("_", "").isalpha()]] = True
    kept = sorted(np.flatnonzero(keep).tolist(), key=lambda number: (-df[number], words[number]))[:_MOST_WORDS]
    renumber = np.full(len(words), -1, np.int32)
    renumber[kept] = np.arange(len(kept), dtype=np.int32)
    return [words[number] for number in kept], df[kept].copy(), renumber


def _sample(count: int, size: int) -> NDArray[np.int64]:
    return np.linspace(0, count - 1, min(count, size)).astype(np.int64)


def names_are_informative(corpus: TokenizedCorpus, sample: int = 2000) -> bool:
    """Whether names speak about their documents: their words stand in the own text far more often than in another's.

    Row numbers, hashes and dates fail this test, and so does a prefix that all ids share.

    Args:
        corpus: Corpus with its ``name`` rows.
        sample: Documents looked at.
    """
    rows = _sample(len(corpus), sample)
    if len(rows) < 2:
        return False
    other = np.roll(rows, len(rows) // 2)
    own = foreign = 0
    for row, stranger in zip(rows.tolist(), other.tolist(), strict=True):
        words = corpus.name[row]
        words = words[corpus.df[words] < 0.2 * len(corpus) + 1]
        if len(words):
            own += bool(np.isin(words, np.concatenate([corpus.head[row], corpus.body[row]])).any())
            foreign += bool(np.isin(words, np.concatenate([corpus.head[stranger], corpus.body[stranger]])).any())
    return bool(own >= 0.1 * len(rows) and own >= 2 * foreign)


def order_is_informative(corpus: TokenizedCorpus, sample: int = 1000) -> bool:
    """Whether neighbours in the same container are alike: they share twice the rare words that strangers share.

    Args:
        corpus: Corpus with its ``parent`` numbers.
        sample: Pairs looked at.
    """
    n = len(corpus)
    near = np.flatnonzero((corpus.parent[:-1] == corpus.parent[1:]) & (corpus.parent[1:] >= 0))
    if len(near) < max(2, n // 20):
        return False
    near = near[_sample(len(near), sample)]
    idf = np.log((1 + n) / (1 + corpus.df))

    def alike(one: int, two: int) -> float:
        a, b = (np.unique(np.concatenate([corpus.head[i], corpus.body[i]])) for i in (one, two))
        total = idf[np.union1d(a, b)].sum()
        return float(idf[np.intersect1d(a, b, assume_unique=True)].sum() / total) if total > 0 else 0.0

    close = np.mean([alike(i, i + 1) for i in near.tolist()])
    far = np.mean([alike(i, j) for i, j in zip(near.tolist(), np.roll(near, len(near) // 2).tolist(), strict=True)])
    return bool(close >= 2 * far and close > 0)
