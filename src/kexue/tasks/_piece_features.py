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

import importlib
import os
import zlib
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from kexue.tasks._text_words import tokens
from kexue.tasks.graph_rank import text_rank

__all__ = ["WIDTH", "PieceEncoder"]

#: (N, D): sparse, or an array
Vectors: TypeAlias = "sparse.csr_array | NDArray[np.float32]"

WIDTH = 256
MARKS = 17  # columns after those of the hash
BATCH = 64  # pieces at a time through BERT
PROBE = ("A piece of the document, number 1.", "文档的第二段，", "Summaries are short!")
SAME = 0.01  # relative distance of the probes of two encoders that are the same, on another machine too
_BEGIN, _END = 4, 3  # characters of the beginning and of the end of a word
_KEPT = 64  # characters of a word whose hashes are remembered; encoded data has words of megabytes


def hashes_of(word: str) -> tuple[int, ...]:
    """The word, and of a long one its beginning and its end, which inflected forms share."""
    return _kept_hashes(word) if len(word) <= _KEPT else _hashes(word)


def _hashes(word: str) -> tuple[int, ...]:
    parts = (word,) if len(word) <= _BEGIN else (word, f"^{word[:_BEGIN]}", f"{word[-_END:]}$")
    return tuple(zlib.crc32(part.encode("utf-8", "surrogatepass")) for part in parts)


_kept_hashes = lru_cache(1 << 16)(_hashes)


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

    A copy and a pickle hold where a checkpoint is, not its weights.

    Args:
        encoder: "hash", a function from a list of N texts to an (N, D) array, or the folder of a BERT checkpoint.
        width: D, if it is known.
        probe: The :attr:`probe` of an earlier one, if it has to be the same encoder.

    Attributes:
        encoder: The same, a folder as an absolute path.
        width: D once a document has been read.

    Raises:
        TypeError: It is none of these.
        ValueError: No such folder, no checkpoint in it, or a probe that differs.
    """

    def __init__(self, encoder: Any = "hash", width: int | None = None, probe: list[float] | None = None) -> None:
        self.encoder, self.width = encoder, width
        self._call: Callable[[list[str]], Any] | None = None
        if callable(encoder):
            self._call = encoder
        elif isinstance(encoder, os.PathLike) or (isinstance(encoder, str) and encoder != "hash"):
            self.encoder = str(Path(encoder).absolute())
            self._call = _bert(Path(self.encoder))
        elif not isinstance(encoder, str):
            raise TypeError(
                'encoder must be "hash", a function from a list of texts to an (N, D) array, or the folder of a BERT '
                f"checkpoint; got {type(encoder).__name__}"
            )
        if probe is not None and (mine := self.probe) is not None:
            a, b = np.asarray(mine), np.asarray(probe, np.float64)
            if a.shape != b.shape or not np.linalg.norm(a - b) <= SAME * np.linalg.norm(b):
                raise ValueError(f"the encoder {self.encoder!r} gives other vectors than the one of the training")

    @property
    def probe(self) -> list[float] | None:
        """The mean vector of a fixed document, by which another encoder is told; a function of the user's has none."""
        if callable(self.encoder):
            return None
        return [float(f"{x:.5g}") for x in np.asarray(self(PROBE).mean(0)).tolist()]

    def __reduce__(self) -> Any:
        return PieceEncoder, (self.encoder, self.width, self.probe)

    def __call__(self, pieces: Sequence[str]) -> Vectors:
        """Vectors of the pieces of ONE document, (N, D) float32, sparse for "hash".

        Raises:
            TypeError: The function returns no array of numbers.
            ValueError: It returns another number of rows, another width than before, or numbers that are not finite.
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
        if self.width not in (None, out.shape[1]):
            raise ValueError(f"encoder must return vectors of width {self.width} as before; got {out.shape}")
        with np.errstate(over="ignore"):
            out = out.astype(np.float32)
        if not np.isfinite(out).all():
            place = int(np.flatnonzero(~np.isfinite(out).all(1))[0])
            raise ValueError(f"encoder must return finite numbers; got others for text {place}, {pieces[place]!r:.80}")
        self.width = out.shape[1]
        return out


def _bert(folder: Path) -> Callable[[list[str]], NDArray[np.float32]]:
    """Masked mean of the last layer of a checkpoint on disk; nothing is downloaded.

    Raises:
        ValueError: There is no folder, or it lacks a model, weights of it or its tokenizer.
    """
    if not folder.is_dir():
        raise ValueError(f'encoder must be "hash" or the folder of a BERT checkpoint; there is no folder {folder}')
    import torch
    from safetensors import SafetensorError

    importlib.import_module("kexue.models.family")  # makes the Auto classes know the Kexue models
    from kexue._transformers import AutoModel
    from kexue.tasks._nsp_loading import load_tokenizer
    from kexue.tasks._text_encoders import text_encoder

    try:
        model, report = AutoModel.from_pretrained(folder, local_files_only=True, output_loading_info=True)
    except (ValueError, KeyError, OSError, RuntimeError, SafetensorError) as error:
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"encoder {folder} holds no BERT checkpoint that can be loaded: {why:.200}") from error
    missing = sorted(name for name in report["missing_keys"] if not name.startswith("pooler."))  # which is not used
    if missing:
        raise ValueError(f"encoder {folder} lacks {len(missing)} weights, among them {missing[0]}")
    tokenizer = load_tokenizer(None, folder)
    known, most = model.get_input_embeddings().weight.shape[0], max(tokenizer.get_vocab().values())
    if most >= known:
        raise ValueError(f"encoder {folder} has the tokenizer of another model: token {most}, but {known} embeddings")
    model = model.float().eval()
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
