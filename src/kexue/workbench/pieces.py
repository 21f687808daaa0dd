"""The text of a corpus as pieces of token ids, on disk: what language models are trained on.

Texts are cut at the ends of sentences. A third of the pieces are single sentences, the others as many as fit: a model
that has only seen full windows judges a sentence by itself badly. Of every fifty runs of eight pieces one is held out.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kexue._files import atomic_path
from kexue.corpus import Document
from kexue.training.order import numpy_generator

__all__ = ["HELD_OUT", "Pieces", "sentences"]

HELD_OUT = 50
_RUN = 8
_SINGLE = 1 / 3
_BATCH = 256  # documents that are encoded at once
# A sentence: up to its final marks and closing quotes, or up to the end of a paragraph. Spaces begin the next one.
_SENTENCE = re.compile(r".+?(?:[。！？…]+[”’」』）)\"]*|[.!?]+[\"'”’)\]]*(?=\s)|(?=\n\s*\n)|\Z)", re.DOTALL)


def sentences(text: str) -> list[str]:
    """Cut a text into sentences that together are the text.

    Example:
        >>> sentences("It works. 真的吗?  真的！好。")
        ['It works.', ' 真的吗?', '  真的！', '好。']
    """
    return _SENTENCE.findall(text)


class Pieces:
    """Pieces of ids in two files, read when they are used.

    Args:
        folder: Where :meth:`write` put them.
    """

    def __init__(self, folder: Path) -> None:
        self.ids: NDArray[np.int32] = np.load(folder / "ids.npy", mmap_mode="r")
        self.offsets: NDArray[np.int64] = np.load(folder / "offsets.npy")
        held: NDArray[np.bool_] = np.load(folder / "held.npy")
        self.trained = np.flatnonzero(~held)
        self.held = np.flatnonzero(held)

    def __getitem__(self, index: int) -> NDArray[np.int32]:
        return self.ids[self.offsets[index] : self.offsets[index + 1]]

    @property
    def tokens(self) -> int:
        """Tokens of the pieces that are trained on."""
        return int((self.offsets[self.trained + 1] - self.offsets[self.trained]).sum())

    @classmethod
    def write(cls, folder: Path, documents: Iterable[Document], tokenizer: Any, max_length: int, seed: int) -> Pieces:
        """Encode the documents as pieces ``[CLS] text [SEP]`` of at most ``max_length`` ids."""
        first, last = tokenizer.cls_token_id, tokenizer.sep_token_id
        backend = tokenizer.backend_tokenizer
        literal, backend.encode_special_tokens = backend.encode_special_tokens, True  # "[MASK]" in a text is no mask
        ids: list[NDArray[np.int32]] = []
        lengths: list[int] = []
        try:
            for number, texts in enumerate(_batches(documents)):
                for pieces in _cut(backend, texts, max_length - 2, numpy_generator(seed, number)):
                    for piece in pieces:
                        ids.append(np.array([first, *piece, last], np.int32))
                        lengths.append(len(piece) + 2)
        finally:
            backend.encode_special_tokens = literal
        held = np.arange(len(ids)) // _RUN % HELD_OUT == HELD_OUT - 1
        if len(ids) > 1 and not held.any():
            held[-max(1, len(ids) // HELD_OUT) :] = True  # a small corpus
        folder.mkdir(parents=True, exist_ok=True)
        for name, array in (
            ("ids.npy", np.concatenate(ids) if ids else np.zeros(0, np.int32)),
            ("offsets.npy", np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)),
            ("held.npy", held),
        ):
            with atomic_path(folder / name) as path, open(path, "wb") as file:
                np.save(file, array)
        return cls(folder)


def _batches(documents: Iterable[Document]) -> Iterator[list[str]]:
    batch: list[str] = []
    for document in documents:
        batch.append(whole_text(document))
        if len(batch) == _BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


def whole_text(document: Document) -> str:
    """Title and text of a document."""
    text = document.text
    if document.title and not text.startswith(document.title):
        text = f"{document.title}\n\n{text}"
    return text.encode("utf-8", "replace").decode("utf-8")


def _cut(backend: Any, texts: list[str], limit: int, rng: np.random.Generator) -> Iterator[list[list[int]]]:
    """Yield the pieces of each document as ids."""
    cut = [[part for part in sentences(text) if part.strip()] for text in texts]
    flat = [part for parts in cut for part in parts]
    sizes = iter([len(e.ids) for e in backend.encode_batch(flat, add_special_tokens=False)])
    wholes: list[str] = []
    counts: list[int] = []
    for parts in cut:
        before, current, filled, single = len(wholes), "", 0, rng.random() < _SINGLE
        for part in parts:
            size = next(sizes)
            if current and (single or filled + size > limit):
                wholes.append(current.strip())
                current, filled, single = "", 0, rng.random() < _SINGLE
            current, filled = current + part, filled + size
        if current.strip():
            wholes.append(current.strip())
        counts.append(len(wholes) - before)
    encoded = iter([e.ids for e in backend.encode_batch(wholes, add_special_tokens=False)])
    for count in counts:
        pieces: list[list[int]] = []
        for _ in range(count):
            ids = next(encoded)
            pieces += [ids[start : start + limit] for start in range(0, len(ids), limit)]  # a very long sentence
        yield pieces
