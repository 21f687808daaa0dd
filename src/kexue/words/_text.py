"""Reading text into word ids: files, strings and token lists all become ids, document offsets and a list of words.

Text without a tokeniser of the user's is split at white space exactly as ``str.split()`` does it, by a scanner over
UTF-8 bytes with a hash table whose hits are compared byte by byte (no collision can join two words).
"""

from __future__ import annotations

import itertools
import os
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kexue._progress import Bar
from kexue.words._numba import kernel

Tokenize = Callable[[str], Sequence[str]]

_READ = 1 << 25  # bytes of a file that are read at once
_JOIN = 1 << 22  # characters of texts that are joined for one call of the scanner


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
    bar = bar if bar is not None else Bar()
    kind, items = classify(data)
    if kind == "tokens":
        return _encode_tokens(_checked_tokens(items), bar)
    if tokenize is not None:
        lines = _lines(items) if kind == "paths" else items
        return _encode_tokens(_tokenized(lines, tokenize), bar)
    return _encode_bytes(_file_chunks(items) if kind == "paths" else _text_chunks(items), bar)


def classify(data: Any) -> tuple[str, Iterable[Any]]:
    """Tell what an input holds from its first element: ("paths" | "texts" | "tokens", the elements)."""
    if isinstance(data, os.PathLike):
        return "paths", [Path(data)]
    if isinstance(data, str | bytes) or not isinstance(data, Iterable):
        raise TypeError(
            "expected an iterable of texts or of token lists, a pathlib.Path or several of them; "
            f"got {type(data).__name__}" + (" (put a single text into a list)" if isinstance(data, str) else "")
        )
    items = iter(data)
    try:
        first = next(items)
    except StopIteration:
        return "texts", []
    rest = itertools.chain([first], items)
    if isinstance(first, os.PathLike):
        return "paths", _same(rest, os.PathLike, "a path")
    if isinstance(first, str):
        return "texts", _same(rest, str, "a str")
    if isinstance(first, Sequence | np.ndarray) and not isinstance(first, bytes):
        return "tokens", rest
    raise TypeError(f"item 0 must be a str, a pathlib.Path or a sequence of str; got {type(first).__name__}")


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
        yield check_words(tokenize(text), f"tokenize(document {number})")


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


def _file_chunks(paths: Iterable[Path]) -> Iterator[tuple[bytes, npt.NDArray[np.int64]]]:
    """Whole lines of the files, checked to be UTF-8, with the end of each line."""
    for path in paths:
        base, line, rest = 0, 1, b""
        with open(path, "rb") as file:
            while True:
                block = file.read(_READ)
                data = rest + block
                cut = data.rfind(b"\n") + 1 if block else len(data)
                chunk, rest = data[:cut], data[cut:]
                if chunk:
                    _check_utf8(chunk, path, base, line)
                    text = chunk[3:] if base == 0 and chunk.startswith(b"\xef\xbb\xbf") else chunk  # byte order mark
                    ends = np.flatnonzero(np.frombuffer(text, np.uint8) == 10) + 1
                    line += len(ends)
                    if text and (not len(ends) or ends[-1] < len(text)):
                        ends = np.append(ends, len(text))
                    yield text, ends.astype(np.int64)
                    base += len(chunk)
                if not block:
                    break


def _check_utf8(chunk: bytes, path: Path, base: int, line: int) -> None:
    try:
        chunk.decode()
    except UnicodeDecodeError as error:
        place = error.start
        raise ValueError(
            f"{path}: not UTF-8 at line {line + chunk.count(bytes([10]), 0, place)}, byte offset {base + place} "
            f"(byte 0x{chunk[place]:02x}: {error.reason})"
        ) from None


def _lines(paths: Iterable[Path]) -> Iterator[str]:
    for chunk, ends in _file_chunks(paths):
        start = 0
        for end in ends.tolist():
            yield chunk[start:end].decode().rstrip("\r\n")
            start = end


def _text_chunks(texts: Iterable[str]) -> Iterator[tuple[bytes, npt.NDArray[np.int64]]]:
    """Texts joined into UTF-8 buffers, with the end of each text."""
    pending: list[bytes] = []
    size = 0
    for number, text in enumerate(texts):
        try:
            data = text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"text {number} is not valid Unicode: {error.reason} at character {error.start}") from None
        pending.append(data + b"\n")
        size += len(data)
        if size > _JOIN:
            yield b"".join(pending), np.cumsum([len(item) for item in pending])
            pending, size = [], 0
    if pending:
        yield b"".join(pending), np.cumsum([len(item) for item in pending])


def _encode_bytes(chunks: Iterable[tuple[bytes, npt.NDArray[np.int64]]], bar: Bar) -> Encoded:
    table = np.full(1 << 12, -1, np.int32)
    hashes = np.empty(len(table) // 2, np.uint64)
    starts = np.zeros(len(hashes) + 1, np.int64)  # word k is arena[starts[k] : starts[k + 1]]
    arena = np.empty(1 << 16, np.uint8)
    known = 0
    ids: list[npt.NDArray[np.int32]] = []
    offsets = [np.zeros(1, np.int64)]
    total = 0
    for data, ends in chunks:
        buffer = np.frombuffer(data, np.uint8)
        out = np.empty(len(buffer) // 2 + 1, np.int32)
        bounds = np.zeros(len(ends), np.int64)
        position = document = filled = 0
        while True:
            position, document, filled, known = scan(
                buffer, position, ends, document, bounds, out, filled, table, hashes, starts, arena, known
            )
            if document == len(ends):
                break
            if known == len(hashes):
                hashes, starts = _grown(hashes), _grown(starts)
                table = np.full(4 * len(hashes), -1, np.int32)
                rehash(table, hashes, known)
            else:
                arena = np.append(arena, np.empty(max(len(arena), len(data)), np.uint8))
        ids.append(out[:filled].copy())
        offsets.append(bounds + total)
        total += filled
        bar.advance(len(ends))
    letters = arena[: starts[known]].tobytes()
    cuts = starts[: known + 1].tolist()
    words = [letters[a:b].decode() for a, b in itertools.pairwise(cuts)]
    return Encoded(np.concatenate(ids) if ids else np.empty(0, np.int32), np.concatenate(offsets), words)


def _grown(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return np.append(values, np.zeros(len(values), values.dtype))


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
def scan(
    buffer: Any,
    position: int,
    ends: Any,
    document: int,
    bounds: Any,
    out: Any,
    filled: int,
    table: Any,
    hashes: Any,
    starts: Any,
    arena: Any,
    known: int,
) -> Any:
    """Number the words of a UTF-8 buffer; stops early when the tables are full, to be called again after they grew.

    ``table`` (open addressing) maps an FNV-1a hash to a word number; ``bounds[d]`` becomes the number of words up to
    the end of document d.

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
            code = np.uint64(14695981039346656037)
            while position < end:
                byte = buffer[position]
                if (byte <= 32 or 0xC2 <= byte <= 0xE3) and _space(buffer, position, end) > 0:
                    break
                code = (code ^ np.uint64(byte)) * np.uint64(1099511628211)
                position += 1
            length = position - begin
            slot = np.int64((code ^ (code >> np.uint64(29))) & np.uint64(mask))
            number = -1
            while table[slot] >= 0:
                candidate = table[slot]
                if hashes[candidate] == code and starts[candidate + 1] - starts[candidate] == length:
                    same = True
                    first = starts[candidate]
                    for k in range(length):
                        if arena[first + k] != buffer[begin + k]:
                            same = False
                            break
                    if same:
                        number = candidate
                        break
                slot = (slot + 1) & mask
            if number < 0:
                first = starts[known] if known < len(hashes) else 0
                if known == len(hashes) or first + length > len(arena):
                    return begin, document, filled, known
                for k in range(length):
                    arena[first + k] = buffer[begin + k]
                hashes[known] = code
                starts[known + 1] = first + length
                table[slot] = known
                number = known
                known += 1
            out[filled] = number
            filled += 1
        bounds[document] = filled
        document += 1
    return position, document, filled, known


@kernel
def rehash(table: Any, hashes: Any, known: int) -> None:
    """Enter the first ``known`` hashes into an empty table."""
    mask = len(table) - 1
    for number in range(known):
        code = hashes[number]
        slot = np.int64((code ^ (code >> np.uint64(29))) & np.uint64(mask))
        while table[slot] >= 0:
            slot = (slot + 1) & mask
        table[slot] = number
