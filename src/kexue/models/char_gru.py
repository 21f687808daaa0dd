"""Character GRU sentence encoder (字符 GRU 句向量编码器).

Source: 科学空间 5743 (基于GRU和AM-Softmax的句子相似度模型).

    e_t = E[c_t],   h_t = GRU(e_t, h_{t-1}),   h_0 = 0,   z = h_n with n the number of characters

What differs from the published Keras model: it feeds the zeros that fill up a row to the GRU, so that the vector of a
sentence depends on how far it was filled up. Here the state after the last character is taken, and padding is never
read. A text without characters is read as one unknown character, so that every text has a direction.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence

from kexue._checks import check_int
from kexue._files import atomic_path, write_json
from kexue.models._gru_kernel import LastStates, steps_of

__all__ = ["CharGRUEncoder"]

FORMAT, KIND = 1, "char-gru"
PAD, UNKNOWN = 0, 1


class CharGRUEncoder(nn.Module):
    """Encode texts by the last state of a GRU over their characters.

    A character is one Unicode code point. The texts are taken as they are;
    :class:`kexue.tasks.SentenceSimilarity` folds width and case before it calls the encoder.

    Args:
        vocab: The known characters, a list or a string; they get the ids 2, 3, ... in this order (0 pads, 1 is
            unknown).
        d: Width D of the state.
        embedding_dim: Width of the character embeddings.
        maxlen: Characters of a text that are read; the rest is cut off.

    Raises:
        TypeError: ``vocab`` is no sequence of strings.
        ValueError: ``vocab`` is empty, holds a character twice or an entry that is not one character; a size below 1.

    Reference:
        https://spaces.ac.cn/archives/5743

    Example:
        >>> encoder = CharGRUEncoder("深度学习", d=8)
        >>> encoder.lookup(["学习", "学a"]).tolist()
        [[4, 5], [4, 1]]
        >>> encoder(["学习", "深度学习", ""]).shape
        torch.Size([3, 8])
    """

    def __init__(self, vocab: Sequence[str], d: int = 128, *, embedding_dim: int = 128, maxlen: int = 32) -> None:
        super().__init__()
        for name, value in (("d", d), ("embedding_dim", embedding_dim), ("maxlen", maxlen)):
            check_int(name, value, 1)
        self.vocab = _check_vocab(vocab)
        self.d, self.embedding_dim, self.maxlen = int(d), int(embedding_dim), int(maxlen)
        points = np.array([ord(c) for c in self.vocab])
        self._ids = np.full(points.max() + 2, UNKNOWN, np.int32)  # by code point; the last one stands for all above
        self._ids[points] = np.arange(len(points)) + 2
        self.embedding = nn.Embedding(len(self.vocab) + 2, self.embedding_dim, padding_idx=PAD)
        self.gru = nn.GRU(self.embedding_dim, self.d, batch_first=True)

    def extra_repr(self) -> str:
        """What print shows."""
        return f"{len(self.vocab)} characters, d={self.d}, maxlen={self.maxlen}"

    def flat_ids(self, texts: Sequence[str]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """Ids of all texts one after another, and where each text starts (N + 1,); no row is empty.

        Raises:
            TypeError: ``texts`` is one string, or an entry is no string.
        """
        if isinstance(texts, str):
            raise TypeError("texts must be a sequence of strings; got one string, write [text]")
        cut = [text[: self.maxlen] if isinstance(text, str) else _refuse(text) for text in texts]
        lengths = np.fromiter((len(text) for text in cut), np.int64, len(cut))
        # the placeholder of an empty text is beyond the table or unknown, whatever the vocabulary
        joined = "".join(text or "\0" for text in cut).encode("utf-32-le", "surrogatepass")
        ids = self._ids[np.minimum(np.frombuffer(joined, np.uint32), len(self._ids) - 1)]
        offsets = np.concatenate([[0], np.cumsum(np.maximum(lengths, 1))]).astype(np.int64)
        ids[offsets[:-1][lengths == 0]] = UNKNOWN
        return ids, offsets

    def lookup(self, texts: Sequence[str]) -> Tensor:
        """Ids of the texts, cut to ``maxlen`` and filled up with 0; (N, T) on the encoder's device.

        Raises:
            TypeError: ``texts`` is one string, or an entry is no string.
        """
        ids, offsets = self.flat_ids(texts)
        return padded_rows(ids, offsets, np.arange(len(offsets) - 1)).to(self.embedding.weight.device)

    def forward(self, ids: Tensor | Sequence[str]) -> Tensor:
        """The state after the last character of each row.

        Args:
            ids: (B, T) integers, 0 only behind the characters of a row; or B texts.

        Returns:
            (B, D), not normalised; zeros for a row that is 0 throughout.

        Raises:
            TypeError: Neither integers nor texts.
            ValueError: Another shape, an id that is not in the table, or a 0 in front of a character.
        """
        if not isinstance(ids, Tensor):
            ids = self.lookup(ids)
        lengths = self._lengths(ids)
        if ids.shape[0] == 0 or ids.shape[1] == 0:
            return self.embedding.weight.new_zeros(ids.shape[0], self.d)
        ids, filled = ids.long(), (lengths > 0).to(ids.device)
        lengths = lengths.clamp(min=1)
        dtype = self.embedding.weight.dtype
        own = ids.device.type == "cpu" and dtype in (torch.float32, torch.float64)
        if own and not torch.is_autocast_enabled("cpu"):
            state = self._last_states(ids, lengths)
        else:
            embedded = self.embedding(ids)
            state = self.gru(pack_padded_sequence(embedded, lengths, batch_first=True, enforce_sorted=False))[1][0]
        return torch.where(filled[:, None], state, 0.0)

    def _last_states(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """What the GRU gives, in a few large operations (see ``_gru_kernel.py``)."""
        gru: Any = self.gru
        lengths, order = lengths.sort(descending=True, stable=True)
        sizes, ends = steps_of(lengths)
        steps = ids[order, : len(sizes)].T
        flat = steps[torch.arange(len(sizes))[:, None] < lengths]
        bias = gru.bias_ih_l0 + torch.cat([gru.bias_hh_l0[: 2 * self.d], gru.bias_hh_l0.new_zeros(self.d)])
        known, place = torch.unique(flat, return_inverse=True)  # multiply each character of the batch once
        table = F.linear(self.embedding(known), gru.weight_ih_l0, bias)
        rz, n = (F.embedding(place, part) for part in table.split((2 * self.d, self.d), dim=1))
        last = LastStates.apply(rz, n, gru.weight_hh_l0, gru.bias_hh_l0[2 * self.d :], sizes, ends)
        return last[torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))]

    def _lengths(self, ids: Tensor) -> Tensor:
        """Characters of each row, on the CPU, where packing wants them; refuses what is no padded row of ids."""
        if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
            raise TypeError(f"ids must be integers or texts; got a tensor of dtype {ids.dtype}")
        if ids.dim() != 2:
            raise ValueError(f"ids must have shape (B, T); got {tuple(ids.shape)}")
        host = ids.detach().cpu()
        if host.numel():
            low, high = (int(x) for x in torch.aminmax(host))
            if low < 0 or high >= len(self.vocab) + 2:
                raise ValueError(f"ids must lie in [0, {len(self.vocab) + 2}); got values from {low} to {high}")
            if bool(((host[:, 1:] != PAD) & (host[:, :-1] == PAD)).any()):
                raise ValueError("the padding (0) of a row must stand behind its characters; got a 0 in front of one")
        return (host != PAD).sum(1)

    @torch.no_grad()
    def encode(self, texts: Sequence[str], batch_size: int = 512) -> NDArray[np.float32]:
        """Encode many texts without gradients, in batches of equal length.

        Args:
            texts: N texts.
            batch_size: Texts at a time; bounds the working memory.

        Returns:
            (N, D) float32, in the order of the texts, not normalised.

        Raises:
            TypeError: ``texts`` is one string, or an entry is no string.
        """
        check_int("batch_size", batch_size, 1)
        ids, offsets = self.flat_ids(texts)
        out = np.empty((len(offsets) - 1, self.d), np.float32)
        device = self.embedding.weight.device
        for rows in by_length(np.diff(offsets), batch_size):
            out[rows] = self(padded_rows(ids, offsets, rows).to(device)).float().cpu().numpy()
        return out

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write ``encoder.safetensors`` and, last, ``encoder.json`` into ``folder``."""
        from safetensors.torch import save_file

        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        with atomic_path(target / "encoder.safetensors") as temporary:
            save_file({key: value.detach().cpu().contiguous() for key, value in self.state_dict().items()}, temporary)
        sizes = {"d": self.d, "embedding_dim": self.embedding_dim, "maxlen": self.maxlen}
        write_json(target / "encoder.json", {"format": FORMAT, "kind": KIND, **sizes, "vocab": "".join(self.vocab)})

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> CharGRUEncoder:
        """Read what :meth:`save` wrote.

        Raises:
            ValueError: The folder holds something else, another format version, or weights that do not fit.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        source = Path(folder)
        head = read_head(source / "encoder.json", KIND, FORMAT)
        try:
            encoder = cls(head["vocab"], head["d"], embedding_dim=head["embedding_dim"], maxlen=head["maxlen"])
            encoder.load_state_dict(load_file(source / "encoder.safetensors"), strict=True)
        except (KeyError, TypeError, RuntimeError, OSError, SafetensorError) as error:
            raise ValueError(f"{source} holds no complete character encoder: {error}") from None
        return encoder


def read_head(path: Path, kind: str, version: int) -> dict[str, Any]:
    """The JSON file of a saved part.

    Raises:
        ValueError: It is missing, is no JSON object, or has another kind or version.
    """
    try:
        head = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    if not isinstance(head, dict) or (head.get("format"), head.get("kind")) != (version, kind):
        found = (head.get("format"), head.get("kind")) if isinstance(head, dict) else type(head).__name__
        raise ValueError(f"{path}: expected format {version}, kind {kind!r}; got {found}")
    return head


def padded_rows(ids: NDArray[np.int32], offsets: NDArray[np.int64], rows: NDArray[np.int64]) -> Tensor:
    """Rows ``ids[offsets[i]:offsets[i + 1]]`` filled up with 0 to the longest of them; (B, T)."""
    starts, lengths = offsets[rows], offsets[rows + 1] - offsets[rows]
    place = np.arange(lengths.max(initial=0))
    inside = place < lengths[:, None]
    out = np.zeros(inside.shape, np.int64)
    out[inside] = ids[(starts[:, None] + place)[inside]]
    return torch.from_numpy(out)


def by_length(lengths: NDArray[np.int64], batch_size: int) -> Iterator[NDArray[np.int64]]:
    """Batches of row numbers, rows of similar length together, the longest first (so that memory shows at once)."""
    order = np.argsort(-lengths, kind="stable")
    for first in range(0, len(order), batch_size):
        yield order[first : first + batch_size]


def _check_vocab(vocab: Any) -> list[str]:
    if isinstance(vocab, bytes) or not isinstance(vocab, Sequence | np.ndarray):
        raise TypeError(f"vocab must be a list or a string of characters; got {type(vocab).__name__}")
    found: dict[str, None] = {}
    for entry in vocab:
        if not isinstance(entry, str):
            raise TypeError(f"vocab must hold characters; got {entry!r} of type {type(entry).__name__}")
        if len(entry) != 1 or "\ud800" <= entry <= "\udfff":
            raise ValueError(f"an entry of vocab must be one character (code point, no surrogate); got {entry!r}")
        if entry in found:
            raise ValueError(f"vocab must hold each character once; got {entry!r} twice")
        found[str(entry)] = None
    if not found:
        raise ValueError("vocab must hold at least one character; got none")
    return list(found)


def _refuse(text: Any) -> str:
    raise TypeError(f"texts must be strings; got {text!r} of type {type(text).__name__}")
