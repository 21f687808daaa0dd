"""The text and binary formats of word2vec: read and write tables of word vectors.

Text: a line "V D", then for each word a line "word x1 ... xD". Binary: the same first line, then for each word its
UTF-8 bytes, a space, D little-endian float32 and a line feed (some writers leave the line feed out). float32 values
survive both.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from kexue._files import atomic_path

__all__ = ["read_word2vec", "write_word2vec"]


def write_word2vec(
    path: str | os.PathLike[str], words: Sequence[str], vectors: npt.NDArray[Any], binary: bool = False
) -> None:
    """Write a table of word vectors, atomically.

    Args:
        path: The file.
        words: (V,) distinct words without white space.
        vectors: (V, D), stored as float32.
        binary: Binary instead of text.

    Raises:
        ValueError: A word that the format cannot hold (empty, or with white space), or sizes that differ.
    """
    table = np.asarray(vectors, "<f4")
    if table.ndim != 2 or len(table) != len(words):
        raise ValueError(f"expected one vector for each of {len(words)} words; got shape {table.shape}")
    for word in words:
        if word.split() != [word]:
            raise ValueError(
                f"the word2vec format cannot hold {word!r}: words must not be empty or contain white space"
            )
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        file.write(f"{table.shape[0]} {table.shape[1]}\n".encode())
        for word, vector in zip(words, table, strict=True):
            if binary:
                file.write(word.encode() + b" " + vector.tobytes() + b"\n")
            else:
                file.write(f"{word} {' '.join(f'{x:.9g}' for x in vector)}\n".encode())  # nine digits are exact


def read_word2vec(path: str | os.PathLike[str]) -> tuple[list[str], npt.NDArray[np.float32]]:
    """Read a table of word vectors; text and binary are told apart by the first record.

    Args:
        path: The file.

    Returns:
        (words, (V, D) float32).

    Raises:
        ValueError: The file is damaged, too short, holds a word twice, or is not in this format (names file and
            record).
    """
    path = Path(path)
    with open(path, "rb") as file:
        head = file.readline(200)
        try:
            size, dim = (int(part) for part in head.split())
        except ValueError:
            raise ValueError(f"{path}: the first line must be 'words dimensions'; got {head[:60]!r}") from None
        if size < 1 or dim < 1 or size * dim > path.stat().st_size:  # before memory is reserved for a damaged header
            raise ValueError(f"{path}: announces {size} words of {dim} dimensions, but has {path.stat().st_size} bytes")
        start = file.tell()
        first = file.readline().split(b" ")
        file.seek(start)
        read = _read_text if _is_text(first, dim) else _read_binary
        words, vectors = read(file, path, size, dim)
    seen: dict[str, int] = {}
    for number, word in enumerate(words):
        if word in seen:
            raise ValueError(f"{path}: word {word!r} occurs twice, as records {seen[word] + 1} and {number + 1}")
        seen[word] = number
    return words, vectors


def _is_text(parts: list[bytes], dim: int) -> bool:
    numbers = [part for part in parts[1:] if part.strip()]
    try:
        return len([float(part) for part in numbers]) == dim
    except ValueError:
        return False


def _read_text(file: BinaryIO, path: Path, size: int, dim: int) -> tuple[list[str], npt.NDArray[np.float32]]:
    words, vectors = [], np.empty((size, dim), np.float32)
    for number in range(size):
        line = file.readline()
        parts = line.rstrip().split(b" ")
        if not line or len(parts) != dim + 1:
            raise ValueError(
                f"{path}: record {number + 1} of {size} must be a word and {dim} numbers; "
                + (f"got {len(parts)} parts" if line else "the file ends")
            )
        words.append(_word(parts[0], path, number))
        try:
            vectors[number] = [float(part) for part in parts[1:]]
        except ValueError:
            raise ValueError(f"{path}: record {number + 1} ({words[-1]!r}) holds something that is no number") from None
    return words, vectors


def _read_binary(file: BinaryIO, path: Path, size: int, dim: int) -> tuple[list[str], npt.NDArray[np.float32]]:
    words, vectors = [], np.empty((size, dim), np.float32)
    for number in range(size):
        letters = bytearray()
        while (letter := file.read(1)) != b" ":
            if not letter or len(letters) > 10_000:
                raise ValueError(f"{path}: record {number + 1} of {size} is damaged: no word in front of the vector")
            letters += letter
        words.append(_word(bytes(letters).lstrip(b"\n"), path, number))
        data = file.read(4 * dim)
        if len(data) < 4 * dim:
            raise ValueError(f"{path}: record {number + 1} of {size} ({words[-1]!r}) is cut off: the file ends")
        vectors[number] = np.frombuffer(data, "<f4")
    return words, vectors


def _word(letters: bytes, path: Path, number: int) -> str:
    try:
        return letters.decode()
    except UnicodeDecodeError:
        raise ValueError(f"{path}: the word of record {number + 1} is not UTF-8: {letters[:40]!r}") from None
