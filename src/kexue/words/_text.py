"""Reading text into word ids: files, strings and token lists all become ids, document offsets and a list of words.

Text without a tokeniser of the user's is split at white space exactly as ``str.split()`` does it, by a scanner over
UTF-8 bytes with a hash table whose hits are compared byte by byte (no collision can join two words).
"""

from __future__ import annotations

import itertools
import json
import os
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from kexue._progress import Bar
from kexue.words._executors import check_wanted
from kexue.words._numba import kernel
from kexue.words._shards import Source, Span, file_size, not_utf8
from kexue.words._spill import ArrayWriter, mapped

Tokenize = Callable[[str], Sequence[str]]

_READ = 1 << 25  # bytes of a file that are read at once, at most
_JOIN = 1 << 22  # characters of texts that are joined for one call of the scanner
_TOKEN_BYTES = 6  # size of a word in a token list, for cutting a corpus into shards

Kind = Literal["paths", "texts", "tokens"]


class Encoded:
    """A corpus as ids.

    Attributes:
        ids: (T,) int32, words numbered by first appearance.
        offsets: (documents + 1,) int64, where each document starts in ``ids``.
        words: The words by number.
    """

    def __init__(self, ids: npt.NDArray[np.int32], offsets: npt.NDArray[np.int64], words: list[str]) -> None:
        self.ids = ids
        self.offsets = offsets
        self.words = words

    def counts(self) -> npt.NDArray[np.int64]:
        """(words,) occurrences of each."""
        found = np.zeros(len(self.words), np.int64)
        for start in range(0, len(self.ids), _JOIN):  # ids that are mapped from disk come into memory piece by piece
            found += np.bincount(self.ids[start : start + _JOIN], minlength=len(found))
        return found

    def save(self, folder: Path) -> None:
        """Write to a folder that exists (ids only if they do not lie there yet)."""
        if not (folder / "ids.npy").exists():
            with ArrayWriter(folder / "ids.npy", "<i4") as out:
                out.append(self.ids)
        np.save(folder / "offsets.npy", self.offsets, allow_pickle=False)
        (folder / "words.json").write_text(json.dumps(self.words), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Encoded:
        """Read what :meth:`save` wrote; the ids stay on disk until they are used."""
        offsets = np.load(folder / "offsets.npy", allow_pickle=False)
        return cls(mapped(folder / "ids.npy"), offsets, json.loads((folder / "words.json").read_text(encoding="utf-8")))


def encode(data: Any, tokenize: Tokenize | None, bar: Bar | None = None) -> Encoded:
    """Read paths, texts or token lists into ids.

    Args:
        data: One path or an iterable of paths (files, one document a line), of str (one document each) or of
            sequences of str (tokenised documents). It is read once, so a generator will do.
        tokenize: Splits a text or line into words; None splits at white space.
        bar: Progress, advanced by documents.

    Raises:
        TypeError: Any other type, or a mixture.
        ValueError: A file is not UTF-8 (names file, line and byte offset), or a string holds lone surrogates.
    """
    kind, source = classify(data)
    items = [Span(os.fspath(item), 0, file_size(item)) for item in source] if kind == "paths" else source
    return encode_items(kind, items, tokenize, bar=bar)


def encode_items(
    kind: Kind,
    items: Iterable[Any],
    tokenize: Tokenize | None,
    keep: Callable[[npt.NDArray[np.int32]], None] | None = None,
    read: int = _READ,
    bar: Bar | None = None,
) -> Encoded:
    """Number the words of the items of a shard.

    Args:
        kind: Of the items.
        items: Spans of files, texts or token lists.
        tokenize: Splits a text or line into words; None splits at white space.
        keep: Takes the ids piece by piece; the result then holds none.
        read: Bytes of a file that are read at once.
        bar: Progress, advanced by documents.
    """
    bar = bar if bar is not None else Bar()
    if kind == "tokens":
        found = _encode_tokens(_checked_tokens(items), bar)
    elif tokenize is not None:
        found = _encode_tokens(_tokenized(_lines(items, read) if kind == "paths" else items, tokenize), bar)
    else:
        return _encode_bytes(_span_chunks(items, read) if kind == "paths" else _text_chunks(items), bar, keep)
    if keep is not None:
        keep(found.ids)
        found.ids = np.empty(0, np.int32)
    return found


def classify(data: Any, on_error: str = "raise") -> tuple[Kind, Source]:
    """Tell what an input holds from its first element: ("paths" | "texts" | "tokens", the elements)."""
    if isinstance(data, os.PathLike):
        return "paths", Source([Path(data)], on_error)
    if isinstance(data, str | bytes | Mapping) or not isinstance(data, Iterable):
        raise TypeError(
            "expected an iterable of texts or of token lists, a pathlib.Path or several of them; "
            f"got {type(data).__name__}" + (" (put a single text into a list)" if isinstance(data, str) else "")
        )
    if isinstance(data, list) and data and set(map(type, data)) == {str}:
        return "texts", Source(data, on_error)  # many small texts: no look at each of them
    if isinstance(data, Sequence) and data and isinstance(data[0], os.PathLike):
        return "paths", Source([*_same(data, os.PathLike, "a path")], on_error)
    items = iter(data)
    try:
        first = next(items)
    except StopIteration:
        return "texts", Source([], on_error)
    rest = itertools.chain([first], items)
    if isinstance(first, os.PathLike):
        return "paths", Source(_same(rest, os.PathLike, "a path"), on_error)
    if isinstance(first, str):
        return "texts", Source(_same(rest, str, "a str"), on_error)
    if isinstance(first, Sequence | np.ndarray) and not isinstance(first, bytes):
        return "tokens", Source(rest, on_error)
    raise TypeError(f"item 0 must be a str, a pathlib.Path or a sequence of str; got {type(first).__name__}")


def item_size(item: Any, number: int) -> int:
    """Size of a text or token list, for cutting a corpus into shards; TypeError for anything else."""
    if isinstance(item, str):
        return len(item)
    if isinstance(item, bytes) or not isinstance(item, Sequence | np.ndarray):
        raise TypeError(f"item {number} must be a sequence of str like item 0; got {type(item).__name__}")
    return _TOKEN_BYTES * len(check_words(item, f"item {number}"))


def _same(items: Iterable[Any], kind: type, name: str) -> Iterator[Any]:
    for number, item in enumerate(items):
        if not isinstance(item, kind):
            raise TypeError(f"item {number} must be {name} like item 0; got {type(item).__name__}")
        yield item


def _checked_tokens(items: Iterable[Any]) -> Iterator[list[str]]:
    for number, item in enumerate(items):
        if isinstance(item, str | bytes) or not isinstance(item, Sequence | np.ndarray):
            raise TypeError(f"item {number} must be a sequence of str like item 0; got {type(item).__name__}")
        yield check_words(item, f"item {number}")


def check_words(tokens: Iterable[Any], where: str) -> list[str]:
    """The tokens as a list without empty strings; TypeError names the first that is not a str."""
    words = list(tokens)
    if not all(isinstance(word, str) for word in words):
        place, bad = next((k, word) for k, word in enumerate(words) if not isinstance(word, str))
        raise TypeError(f"{where}: token {place} must be a str; got {bad!r} of type {type(bad).__name__}")
    return list(filter(None, words))


def _tokenized(texts: Iterable[str], tokenize: Tokenize) -> Iterator[list[str]]:
    for number, text in enumerate(texts):
        check_wanted()
        tokens = tokenize(text)
        if not isinstance(tokens, Iterable):
            raise TypeError(f"tokenize must return a sequence of str; got {tokens!r} for document {number}")
        yield check_words(tokens, f"tokenize(document {number})")


def _encode_tokens(documents: Iterable[list[str]], bar: Bar) -> Encoded:
    class Numbers(dict[str, int]):
        def __missing__(self, word: str) -> int:
            self[word] = number = len(self)
            return number

    numbers = Numbers()
    ids, offsets = array("i"), array("q", [0])
    look_up = numbers.__getitem__
    for words in documents:
        ids.extend(map(look_up, words))
        offsets.append(len(ids))
        bar.advance()
    words = list(numbers)
    check_encodable(words)
    return Encoded(np.frombuffer(ids, np.int32) if ids else np.empty(0, np.int32), np.array(offsets, np.int64), words)


def check_encodable(words: Sequence[str]) -> None:
    """Raise ValueError if a word holds lone surrogates: it could not be written to any file."""
    try:
        "".join(words).encode()
    except UnicodeEncodeError:
        bad = next(word for word in words if any("\ud800" <= letter <= "\udfff" for letter in word))
        raise ValueError(f"words must be valid Unicode; {bad!r} holds a lone surrogate") from None


_Chunk = tuple[bytes, npt.NDArray[np.int64], bool]  # UTF-8, the ends of its documents, whether the last one ends here


def _span_chunks(spans: Iterable[Span], read: int) -> Iterator[_Chunk]:
    """Pieces of files, checked to be UTF-8, with the end of each line; a very long line is cut at white space."""
    for span in spans:
        base, rest, inside = span.start, b"", False
        with open(span.path, "rb") as file:
            file.seek(span.start)
            while True:
                # A line without any white space grows: reading as much again keeps the work linear.
                block = file.read(min(max(read, len(rest)), span.stop - base - len(rest)))
                data = rest + block
                cut, whole = (data.rfind(b"\n") + 1, True) if block else (len(data), True)
                if not cut and block:
                    cut, whole = max(data.rfind(b" "), data.rfind(b"\t")) + 1, False
                chunk, rest = data[:cut], data[cut:]
                if chunk:
                    _check_utf8(chunk, span.path, base)
                    text = chunk[3:] if base == 0 and chunk.startswith(b"\xef\xbb\xbf") else chunk  # byte order mark
                    ends = np.flatnonzero(np.frombuffer(text, np.uint8) == 10) + 1
                    if text and (not len(ends) or ends[-1] < len(text)):
                        ends = np.append(ends, len(text))
                    yield text, ends.astype(np.int64), whole
                    base, inside = base + len(chunk), not whole
                if not block:
                    break
        if inside:  # the file ended right behind the white space at which its last line was cut
            yield b"\n", np.ones(1, np.int64), True


def _check_utf8(chunk: bytes, path: str, base: int) -> None:
    try:
        chunk.decode()
    except UnicodeDecodeError as error:
        raise not_utf8(path, base + error.start, error.reason) from None


def _lines(spans: Iterable[Span], read: int) -> Iterator[str]:
    begun: list[bytes] = []
    for chunk, ends, whole in _span_chunks(spans, read):
        start = 0
        for number, end in enumerate(ends.tolist()):
            begun.append(chunk[start:end])
            start = end
            if whole or number < len(ends) - 1:
                yield b"".join(begun).decode().rstrip("\r\n")
                begun = []


def _text_chunks(texts: Iterable[str]) -> Iterator[_Chunk]:
    """Texts joined into UTF-8 buffers, with the end of each text."""
    pending: list[str] = []
    size = done = 0
    items, at_once = iter(texts), 1
    while some := list(itertools.islice(items, at_once)):
        pending += some
        length = sum(map(len, some))
        size += length
        if size > _JOIN:
            yield _joined(pending, done)
            done += len(pending)
            pending, size = [], 0
        at_once = int(min(1024, max(1, _JOIN * len(some) // (8 * (length + 1)))))  # as many as are small together
    if pending:
        yield _joined(pending, done)


def _joined(texts: list[str], number: int) -> _Chunk:
    """One buffer of texts, the first of which has this number."""
    try:
        data = ("\n".join(texts) + "\n").encode()
    except UnicodeEncodeError:
        for text in texts:
            try:
                text.encode()
            except UnicodeEncodeError as error:
                reason = f"{error.reason} at character {error.start}"
                raise ValueError(f"text {number} is not valid Unicode: {reason}") from None
            number += 1
        raise
    ends = np.cumsum(np.fromiter(map(len, texts), np.int64, len(texts)) + 1)  # in characters
    if ends[-1] != len(data):
        first = np.flatnonzero((np.frombuffer(data, np.uint8) & 0xC0) != 0x80)  # where each character begins
        ends = np.append(first, len(data))[ends]
    return data, ends, True


def _encode_bytes(
    chunks: Iterable[_Chunk], bar: Bar, keep: Callable[[npt.NDArray[np.int32]], None] | None = None
) -> Encoded:
    table = np.zeros((1 << 13, 2), np.uint64)
    starts = np.zeros(len(table) // 2 + 1, np.int64)  # word k is arena[starts[k] : starts[k + 1]]
    arena = np.empty(1 << 16, np.uint8)
    known = 0
    ids: list[npt.NDArray[np.int32]] = []
    offsets = [np.zeros(1, np.int64)]
    total = 0
    if keep is None:
        keep = ids.append
    for data, ends, whole in chunks:
        check_wanted()
        buffer = np.frombuffer(data, np.uint8)
        out = np.empty(len(buffer) // 2 + 1, np.int32)
        bounds = np.zeros(len(ends), np.int64)
        position = document = filled = 0
        while True:
            position, document, filled, known = scan(
                buffer, position, ends, document, bounds, out, filled, table, starts, arena, known
            )
            if document == len(ends):
                break
            if known == len(starts) - 1:
                starts = np.append(starts, np.zeros(len(starts) - 1, np.int64))
                table = rehash(table)
            else:
                arena = np.append(arena, np.empty(max(len(arena), len(data)), np.uint8))
        keep(out[:filled].copy())
        offsets.append((bounds if whole else bounds[:-1]) + total)
        total += filled
        bar.advance(len(ends))
    arena, starts = arena[: starts[known]], starts[: known + 1]
    # One text for all words: characters before each start are bytes that do not continue a character.
    cuts = np.concatenate([np.zeros(1, np.int64), np.cumsum((arena & 0xC0) != 0x80)])[starts].tolist()
    letters = arena.tobytes().decode()
    words = [letters[a:b] for a, b in itertools.pairwise(cuts)]
    return Encoded(np.concatenate(ids) if ids else np.empty(0, np.int32), np.concatenate(offsets), words)


@kernel
def _space(buffer: Any, place: int, size: int) -> int:
    """Length in bytes of the white space (as of str.split) at ``place``, 0 if there is none."""
    first = buffer[place]
    if first <= 32:
        return 1 if first == 32 or 9 <= first <= 13 or 28 <= first <= 31 else 0
    if first < 0xC2 or first > 0xE3:
        return 0
    if first == 0xC2:
        return 2 if buffer[place + 1] == 0x85 or buffer[place + 1] == 0xA0 else 0
    if place + 2 >= size:
        return 0
    second, third = buffer[place + 1], buffer[place + 2]
    if first == 0xE1:
        return 3 if second == 0x9A and third == 0x80 else 0
    if first == 0xE2:
        if second == 0x80:
            return 3 if third <= 0x8A or third == 0xA8 or third == 0xA9 or third == 0xAF else 0
        return 3 if second == 0x81 and third == 0x9F else 0
    return 3 if first == 0xE3 and second == 0x80 and third == 0x80 else 0


@kernel
def _slot(key: Any, mask: int) -> Any:
    mixed = key * np.uint64(0x9E3779B97F4A7C15)
    return np.int64((mixed ^ (mixed >> np.uint64(32))) & np.uint64(mask))


@kernel
def scan(
    buffer: Any,
    position: int,
    ends: Any,
    document: int,
    bounds: Any,
    out: Any,
    filled: int,
    table: Any,
    starts: Any,
    arena: Any,
    known: int,
) -> Any:
    """Number the words of a UTF-8 buffer; stops early when the tables are full, to be called again after they grew.

    ``table`` (open addressing) holds for each word a key and its number + 1. The key of a word of up to seven bytes is
    the word itself with its length; that of a longer one is a hash, and its bytes are compared. ``bounds[d]`` becomes
    the number of words up to the end of document d.

    Returns:
        (position, document, filled, known) to go on from.
    """
    mask = len(table) - 1
    while document < len(ends):
        end = ends[document]
        while position < end:
            gap = _space(buffer, position, end)
            if gap > 0:
                position += gap
                continue
            begin = position
            key = np.uint64(0)
            while position < end:
                byte = buffer[position]
                if (byte <= 32 or 0xC2 <= byte <= 0xE3) and _space(buffer, position, end) > 0:
                    break
                key = (key << np.uint64(8)) | np.uint64(byte)
                position += 1
            length = position - begin
            if length < 8:
                key |= np.uint64(length) << np.uint64(56)
            else:
                key = np.uint64(14695981039346656037)
                for k in range(begin, position):
                    key = (key ^ np.uint64(buffer[k])) * np.uint64(1099511628211)
                key |= np.uint64(255) << np.uint64(56)
            slot = _slot(key, mask)
            number: Any = -1
            while table[slot, 1] != 0:
                if table[slot, 0] == key:
                    candidate = np.int64(table[slot, 1]) - 1
                    same = True
                    if length >= 8:
                        first = starts[candidate]
                        same = starts[candidate + 1] - first == length
                        if same:
                            for k in range(length):
                                if arena[first + k] != buffer[begin + k]:
                                    same = False
                                    break
                    if same:
                        number = candidate
                        break
                slot = (slot + 1) & mask
            if number < 0:
                if known == len(starts) - 1 or starts[known] + length > len(arena):
                    return begin, document, filled, known
                first = starts[known]
                for k in range(length):
                    arena[first + k] = buffer[begin + k]
                starts[known + 1] = first + length
                table[slot, 0] = key
                table[slot, 1] = known + 1
                number = known
                known += 1
            out[filled] = number
            filled += 1
        bounds[document] = filled
        document += 1
    return position, document, filled, known


@kernel
def rehash(table: Any) -> Any:
    """A table of twice the size with the same words."""
    larger = np.zeros((2 * len(table), 2), np.uint64)
    mask = len(larger) - 1
    for old in range(len(table)):
        if table[old, 1] == 0:
            continue
        slot = _slot(table[old, 0], mask)
        while larger[slot, 1] != 0:
            slot = (slot + 1) & mask
        larger[slot, 0] = table[old, 0]
        larger[slot, 1] = table[old, 1]
    return larger
