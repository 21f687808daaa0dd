"""The training of :class:`kexue.tasks.SentenceSimilarity`: a classifier over groups, batches of similar length."""

from __future__ import annotations

import copy
import hashlib
from collections import Counter
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from kexue._checks import check_int
from kexue.losses import MarginSoftmax
from kexue.models.char_gru import CharGRUEncoder
from kexue.tasks._text_encoders import TextEncoder, Vectors, text_encoder
from kexue.training import batch_indices
from kexue.training.order import kept_random_state

if TYPE_CHECKING:
    from kexue.tasks.sentence_similarity import SentenceSimilarity

POOL = 50  # batches among which texts of similar length are brought together
START = 0.05  # of the class vectors' entries: only their direction counts, and Adam's steps turn a short vector faster


class _Classifier(nn.Module):
    """Loss of a batch of rows."""

    def __init__(self, module: nn.Module, head: MarginSoftmax, vectors: Vectors, labels: NDArray[np.int64]) -> None:
        super().__init__()
        self.encoder, self.head = module, head
        self._vectors, self._labels = vectors, torch.from_numpy(labels)

    def forward(self, rows: Tensor) -> Tensor:
        z = self._vectors(rows.cpu().numpy())
        return self.head(z, self._labels[rows.cpu()].to(z.device))


class Run:
    """What :func:`kexue.training.fit` needs for one training: model, batches, optimizer, fingerprint."""

    def __init__(self, owner: SentenceSimilarity, texts: list[str], labels: NDArray[np.int64], classes: int) -> None:
        seed = int(owner.random_state)
        device = text_encoder(owner.encoder, owner.maxlen).device if owner.encoder is not None else torch.device("cpu")
        with kept_random_state(device):
            torch.manual_seed(seed)
            self.encoder = _own_encoder(owner, texts)
            lengths, vectors = self.encoder.prepare(texts)
            with torch.no_grad():
                width = vectors(np.zeros(1, np.int64)).shape[1]
            head = MarginSoftmax(width, classes, owner.kind, owner.scale, owner.margin, owner.sample_rate)
            nn.init.normal_(head.weight, std=START)
        self.classifier = _Classifier(self.encoder.module, head.to(device), vectors, labels)
        self.optimizer = lambda parameters: torch.optim.Adam(parameters, lr=float(owner.lr))
        self._epoch = lru_cache(2)(lambda epoch: _batches(lengths, int(owner.batch_size), seed, epoch))
        self._steps = -(-len(texts) // int(owner.batch_size))
        self.steps = self._steps * int(owner.epochs)
        self.fingerprint = self._hash(texts, labels)

    def batch(self, step: int) -> dict[str, Tensor]:
        """Rows of a step."""
        return {"rows": torch.from_numpy(self._epoch(step // self._steps)[step % self._steps])}

    def _hash(self, texts: list[str], labels: NDArray[np.int64]) -> str:
        """Identifies texts, groups, settings of the head, and the weights at the start."""
        kind = self.classifier.head.kind
        name = kind if isinstance(kind, str) else getattr(kind, "__qualname__", type(kind).__name__)
        head = self.classifier.head
        digest = hashlib.sha256(f"{name} {head.scale} {head.margin} {head.sample_rate}".encode())
        for text in texts:
            digest.update(f"{len(text)} {text}".encode("utf-8", "surrogatepass"))
        digest.update(labels.tobytes())
        for name, value in sorted(self.classifier.state_dict().items()):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


def _own_encoder(owner: SentenceSimilarity, texts: list[str]) -> TextEncoder:
    """A copy of the given encoder, or a new one over the frequent characters."""
    if owner.encoder is not None:
        return text_encoder(copy.deepcopy(owner.encoder), owner.maxlen)
    check_int("min_count", owner.min_count, 1)
    counts = Counter("".join(texts))
    vocab = sorted(c for c, count in counts.items() if count >= owner.min_count)
    if not vocab:
        raise ValueError(
            f"no character occurs min_count={owner.min_count} times in {len(texts)} texts; lower min_count or give "
            "more texts"
        )
    module = CharGRUEncoder(vocab, owner.d, embedding_dim=owner.embedding_dim, maxlen=owner.maxlen)
    return text_encoder(module, owner.maxlen)


def _batches(lengths: NDArray[np.int64], size: int, seed: int, epoch: int) -> list[NDArray[np.int64]]:
    """The batches of an epoch: texts in random order, sorted by length within pools of 50 batches, batches shuffled.

    Both orders are those of :func:`kexue.training.batch_indices`, a function of (seed, epoch) alone.
    """
    n = len(lengths)
    order = batch_indices(seed, epoch, n, n)
    pools = [order[first : first + POOL * size] for first in range(0, n, POOL * size)]
    order = np.concatenate([pool[np.argsort(lengths[pool], kind="stable")] for pool in pools])
    batches = [order[first : first + size] for first in range(0, n, size)]
    return [batches[i] for i in batch_indices(seed, epoch, len(batches), len(batches))]
