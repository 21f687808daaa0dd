"""One face for the encoders that :class:`kexue.tasks.SentenceSimilarity` can train.

An encoder is a :class:`~kexue.models.CharGRUEncoder`, any Module that is called with a list of texts, or a pair of a
transformers tokenizer and a model. A ``TextEncoder`` splits its work in two: ``prepare`` reads the texts once (ids,
lengths), ``batch`` gives the vectors of some of them, with gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from kexue.models.char_gru import CharGRUEncoder, padded_rows

Vectors = Callable[[NDArray[np.int64]], Tensor]


class TextEncoder:
    """What the three kinds have in common.

    Attributes:
        module: The Module that is trained and stored.
    """

    module: nn.Module

    def prepare(self, texts: list[str]) -> tuple[NDArray[np.int64], Vectors]:
        """Lengths of the texts (N,), in any unit, and a function from row numbers (B,) to vectors (B, D)."""
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        """Where the module is."""
        return next((p.device for p in self.module.parameters()), torch.device("cpu"))


class _Characters(TextEncoder):
    def __init__(self, module: CharGRUEncoder) -> None:
        self.module = module

    def prepare(self, texts: list[str]) -> tuple[NDArray[np.int64], Vectors]:
        module: Any = self.module
        ids, offsets = module.flat_ids(texts)
        return np.diff(offsets), lambda rows: self.module(padded_rows(ids, offsets, rows).to(self.device))


class _Texts(TextEncoder):
    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def prepare(self, texts: list[str]) -> tuple[NDArray[np.int64], Vectors]:
        def vectors(rows: NDArray[np.int64]) -> Tensor:
            return _checked(self.module([texts[i] for i in rows]), len(rows))

        return np.fromiter(map(len, texts), np.int64, len(texts)), vectors


class _Tokens(TextEncoder):
    """A tokenizer as in transformers and a model over ``input_ids`` and ``attention_mask``."""

    def __init__(self, tokenizer: Any, module: nn.Module, maxlen: int) -> None:
        self.tokenizer, self.module, self.maxlen = tokenizer, module, maxlen

    def prepare(self, texts: list[str]) -> tuple[NDArray[np.int64], Vectors]:
        ids = self.tokenizer(texts, truncation=True, max_length=self.maxlen)["input_ids"] if texts else []
        offsets = np.concatenate([[0], np.cumsum([len(row) for row in ids])]).astype(np.int64)
        flat = np.array([token for row in ids for token in row], np.int32)

        def vectors(rows: NDArray[np.int64]) -> Tensor:
            lengths = torch.from_numpy(offsets[rows + 1] - offsets[rows])
            tokens = padded_rows(flat, offsets, rows)
            if tokens.shape[1] == 0:  # nothing but texts without tokens
                tokens = tokens.new_zeros(len(rows), 1)
            mask = (torch.arange(tokens.shape[1]) < lengths[:, None]).to(self.device)
            out = self.module(input_ids=tokens.to(self.device), attention_mask=mask.long())
            states = out if isinstance(out, Tensor) else _states(out)
            if states.dim() == 2:
                return _checked(states, len(rows))
            weights = mask[..., None].to(states.dtype)
            mean = torch.where(mask[..., None], states, 0).sum(1) / weights.sum(1).clamp(min=1)
            return _checked(mean, len(rows))

        return np.diff(offsets), vectors


def text_encoder(encoder: Any, maxlen: int) -> TextEncoder:
    """The face of an encoder.

    Raises:
        TypeError: It is none of the three kinds.
    """
    if isinstance(encoder, CharGRUEncoder):
        return _Characters(encoder)
    if isinstance(encoder, nn.Module):
        return _Texts(encoder)
    if isinstance(encoder, tuple) and len(encoder) == 2 and callable(encoder[0]) and isinstance(encoder[1], nn.Module):
        return _Tokens(*encoder, maxlen)
    raise TypeError(
        "encoder must be None, a CharGRUEncoder, a Module that maps a list of texts to (N, D), or a pair (tokenizer, "
        f"model); got {type(encoder).__name__}"
    )


def _states(out: Any) -> Tensor:
    states = getattr(out, "last_hidden_state", None)
    if states is None and isinstance(out, tuple) and out:
        states = out[0]
    if not isinstance(states, Tensor):
        raise TypeError(f"the model must return a tensor or last_hidden_state; got {type(out).__name__}")
    return states


def _checked(vectors: Any, rows: int) -> Tensor:
    if not isinstance(vectors, Tensor) or not vectors.is_floating_point():
        raise TypeError(f"the encoder must return a floating tensor; got {type(vectors).__name__}")
    if vectors.dim() != 2 or vectors.shape[0] != rows:
        raise ValueError(f"the encoder must return one row for each of {rows} texts; got {tuple(vectors.shape)}")
    return vectors
