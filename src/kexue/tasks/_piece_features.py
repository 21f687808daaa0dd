"""Vectors of the pieces of a document, for :class:`kexue.tasks.GatedConvLabeler`.

Three encoders: "hash" needs no model; a callable maps a list of N texts to an (N, D) array; a path is the folder of a
BERT checkpoint, whose last layer is averaged over the tokens, the special ones included (at most 512), and not trained.

"hash" counts words (in Chinese, characters), their bigrams and trigrams, and beginnings and ends of long words, each
in one of ``WIDTH`` columns chosen by a hash of it, with the length of a row brought to 1. To these come columns that
say what kind of piece it is: where it stands, how long it is, whether it is text or markup, and how much it has in
common with the document (by TextRank too), its beginning and the pieces beside it. All of them are cheap and
need no training.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from kexue.tasks._text_words import tokens
from kexue.tasks.graph_rank import text_rank

__all__ = ["WIDTH", "PieceEncoder"]

WIDTH = 256
MARKS = 17  # columns after those of the hash
BATCH = 64  # pieces at a time through BERT
_BEGIN, _END = 4, 3  # characters of the beginning and of the end of a word


@lru_cache(1 << 16)
def hashes_of(word: str) -> tuple[int, ...]:
    """The word, and of a long one its beginning and its end, which inflected forms share."""
    whole = zlib.crc32(word.encode("utf-8", "surrogatepass"))
    if len(word) <= _BEGIN:
        return (whole,)
    parts = (f"^{word[:_BEGIN]}", f"{word[-_END:]}$")
    return (whole, *(zlib.crc32(part.encode("utf-8", "surrogatepass")) for part in parts))


def mixed(a: NDArray[np.uint64], b: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The hash of two hashes side by side."""
    return ((a * np.uint64(0x9E3779B1)) ^ (b + np.uint64(0x7F4A7C15))) & np.uint64(0xFFFFFFFF)


def columns_of(h: NDArray[np.uint64], width: int) -> NDArray[np.int64]:
    """The column of each hash."""
    h = h ^ (h >> np.uint64(15))
    h = (h * np.uint64(0x2C1B3C6D)) & np.uint64(0xFFFFFFFF)
    return ((h ^ (h >> np.uint64(12))) % np.uint64(width)).astype(np.int64)


def hashed(pieces: Sequence[str]) -> tuple[sparse.csr_array, list[list[str]]]:
    """Counts of n-grams, (N, WIDTH) with rows of length 1 (of 0 for a piece without words), and the words."""
    words = [tokens(piece) for piece in pieces]
    counts = np.fromiter(map(len, words), np.int64, len(words))
    found = [hashes_of(word) for row in words for word in row]
    whole = np.fromiter((h[0] for h in found), np.uint64, len(found))
    row = np.repeat(np.arange(len(words)), counts)
    parts = np.fromiter((x for h in found for x in h[1:]), np.uint64)
    rows, hashes = [row, np.repeat(row, [len(h) - 1 for h in found])], [whole, parts]
    wide = whole
    for n in (2, 3):
        wide = mixed(wide[:-1], whole[n - 1 :])
        same = row[: max(len(row) - n + 1, 0)] == row[n - 1 :]
        rows.append(row[n - 1 :][same])
        hashes.append(wide[same])
    columns = columns_of(np.concatenate(hashes), WIDTH)
    values = np.ones(len(columns), np.float32)
    out = sparse.csr_array((values, (np.concatenate(rows), columns)), (len(pieces), WIDTH), dtype=np.float32)
    out.sum_duplicates()
    np.sqrt(out.data, out=out.data)
    length = np.sqrt(out.multiply(out).sum(1))
    scale = np.repeat(1 / np.maximum(length, 1e-9), np.diff(out.indptr))
    out.data *= scale.astype(np.float32)
    return out, words


def marks(pieces: Sequence[str], vectors: sparse.csr_array, words: list[list[str]]) -> NDArray[np.float32]:
    """What kind of piece each is, (N, MARKS), all about 0 to 1."""
    n = len(pieces)
    out = np.zeros((n, MARKS), np.float32)
    place = np.arange(n)
    chars = np.fromiter(map(len, pieces), np.float64, n)
    length = np.fromiter(map(len, words), np.float64, n)
    used = np.fromiter((sum(map(len, row)) for row in words), np.float64, n)
    counts: dict[str, int] = {}
    for row in words:
        for word in set(row):
            counts[word] = counts.get(word, 0) + 1
    shared = [np.log1p([counts[word] - 1 for word in row]).mean() if row else 0.0 for row in words]
    total = np.asarray(vectors.sum(0))
    total /= max(float(np.linalg.norm(total)), 1e-9)
    first = vectors[:3].sum(0)
    first = np.asarray(first) / max(float(np.linalg.norm(first)), 1e-9)
    beside = np.zeros(n)
    if n > 1:
        beside[1:] = vectors[1:].multiply(vectors[:-1]).sum(1)
    central = text_rank(list(pieces)) if n else np.zeros(0)
    columns = (
        place / n, (n - 1 - place) / n, 1 / (1 + place), 1 / (n - place), np.minimum(place, 20) / 20,
        np.full(n, min(n, 100) / 100), np.minimum(length, 60) / 60, np.log1p(length) / 5,
        used / np.maximum(chars, 1), [float(p[:1].isupper()) for p in pieces],
        [float(p[-1:] in ".。!！?？") for p in pieces], shared, vectors @ total, vectors @ first, beside,
        np.minimum(central * n, 6) / 3, 1 / (1 + np.argsort(np.argsort(-central, kind="stable"))),
    )  # fmt: skip
    for column, values in enumerate(columns):
        out[:, column] = values
    return out


class PieceEncoder:
    """The vectors of pieces by one of the three kinds of encoder.

    Args:
        encoder: "hash", a function from a list of N texts to an (N, D) array, or the folder of a BERT checkpoint.

    Raises:
        TypeError: It is none of these.
        ValueError: No such folder.
    """

    def __init__(self, encoder: Any = "hash") -> None:
        self.encoder = encoder
        self._call: Callable[[list[str]], Any] | None = None
        if isinstance(encoder, str) and encoder == "hash":
            return
        if callable(encoder):
            self._call = encoder
        elif isinstance(encoder, str | os.PathLike):
            self._call = _bert(Path(encoder))
        else:
            raise TypeError(
                'encoder must be "hash", a function from a list of texts to an (N, D) array, or the folder of a BERT '
                f"checkpoint; got {type(encoder).__name__}"
            )

    def __call__(self, pieces: Sequence[str]) -> sparse.csr_array:
        """Vectors of the pieces of ONE document, (N, D) float32, mostly zeros for "hash".

        Raises:
            TypeError: The function returns no array of numbers.
            ValueError: It returns another number of rows, or numbers that are not finite.
        """
        if self._call is None:
            vectors, words = hashed(pieces)
            return sparse.csr_array(sparse.hstack([vectors, sparse.csr_array(marks(pieces, vectors, words))]))
        out = self._call(list(pieces))
        out = out.detach().cpu().float().numpy() if hasattr(out, "detach") else np.asarray(out)
        if not (np.issubdtype(out.dtype, np.number) or out.dtype == bool) or np.iscomplexobj(out):
            raise TypeError(f"encoder must return numbers; got an array of {out.dtype}")
        if out.ndim != 2 or len(out) != len(pieces) or not out.shape[1]:
            raise ValueError(f"encoder must return ({len(pieces)}, D) for {len(pieces)} texts; got {out.shape}")
        out = out.astype(np.float32)
        if not np.isfinite(out).all():
            place = int(np.flatnonzero(~np.isfinite(out).all(1))[0])
            raise ValueError(f"encoder must return finite numbers; got others for text {place}, {pieces[place]!r}")
        return sparse.csr_array(out)


def _bert(folder: Path) -> Callable[[list[str]], NDArray[np.float32]]:
    """Masked mean of the last layer of a checkpoint on disk; nothing is downloaded."""
    if not folder.is_dir():
        raise ValueError(f'encoder must be "hash" or the folder of a BERT checkpoint; there is no folder {folder}')
    import torch

    from kexue._transformers import find_class
    from kexue.tasks._text_encoders import text_encoder

    tokenizer = find_class("AutoTokenizer").from_pretrained(folder, local_files_only=True)
    model = find_class("AutoModel").from_pretrained(folder, local_files_only=True, add_pooling_layer=False).eval()
    longest = min(512, int(getattr(model.config, "max_position_embeddings", 512)))
    face = text_encoder((tokenizer, model), longest)

    def encode(texts: list[str]) -> NDArray[np.float32]:
        lengths, vectors = face.prepare(texts)
        order = np.argsort(lengths, kind="stable")
        found = np.zeros((len(texts), model.config.hidden_size), np.float32)
        with torch.no_grad():
            for at in range(0, len(order), BATCH):
                rows = order[at : at + BATCH]
                found[rows] = vectors(rows).float().numpy()
        return found

    return encode
