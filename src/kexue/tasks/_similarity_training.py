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

from kexue.losses import MarginSoftmax
from kexue.models.char_gru import CharGRUEncoder
from kexue.tasks._text_encoders import TextEncoder, Vectors, text_encoder
from kexue.training import batch_indices
from kexue.training.order import kept_random_state

if TYPE_CHECKING:
    from kexue.tasks.sentence_similarity import SentenceSimilarity

USUAL_PASSES, MOST_PASSES, LEAST_STEPS = 20, 200, 400
USUAL_COUNT, TEXTS_PER_COUNT = 5, 2000
POOL = 50  # batches among which texts of similar length are brought together
START = 0.05  # of the class vectors' entries: only their direction counts, and Adam's steps turn a short vector faster


def usual_epochs(texts: int, batch_size: int) -> int:
    """The 20 passes of the article; of few texts more, up to 200, so that there are 400 steps.

    Example:
        >>> usual_epochs(100_000, 100), usual_epochs(1000, 100), usual_epochs(50, 100)
        (20, 40, 200)
    """
    steps = -(-texts // batch_size)
    return max(USUAL_PASSES, min(-(-LEAST_STEPS // steps), MOST_PASSES))


def usual_min_count(texts: int) -> int:
    """The 5 of the article; of fewer than 10 000 texts less, down to 1.

    Example:
        >>> usual_min_count(100_000), usual_min_count(5000), usual_min_count(50)
        (5, 2, 1)
    """
    return max(1, min(texts // TEXTS_PER_COUNT, USUAL_COUNT))


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
            width = _width(self.encoder.module, vectors)
            head = MarginSoftmax(width, classes, owner.kind, owner.scale, owner.margin, owner.sample_rate)
            nn.init.normal_(head.weight, std=START)
        self.classifier = _Classifier(self.encoder.module, head.to(device), vectors, labels)
        self.optimizer = lambda parameters: torch.optim.Adam(parameters, lr=float(owner.lr))
        self._epoch = lru_cache(2)(lambda epoch: _batches(lengths, int(owner.batch_size), seed, epoch))
        self._steps = -(-len(texts) // int(owner.batch_size))
        epochs = usual_epochs(len(texts), int(owner.batch_size)) if owner.epochs is None else int(owner.epochs)
        self.steps = self._steps * epochs
        self.fingerprint = self._hash(texts, lengths, labels)

    def batch(self, step: int) -> dict[str, Tensor]:
        """Rows of a step."""
        return {"rows": torch.from_numpy(self._epoch(step // self._steps)[step % self._steps])}

    def _hash(self, texts: list[str], lengths: NDArray[np.int64], labels: NDArray[np.int64]) -> str:
        """Identifies texts, how much of them is read, groups, settings of the head, and the weights at the start."""
        kind = self.classifier.head.kind
        name = kind if isinstance(kind, str) else getattr(kind, "__qualname__", type(kind).__name__)
        head = self.classifier.head
        digest = hashlib.sha256(f"{name} {head.scale} {head.margin} {head.sample_rate}".encode())
        for text in texts:
            digest.update(f"{len(text)} {text}".encode("utf-8", "surrogatepass"))
        digest.update(lengths.tobytes())
        digest.update(labels.tobytes())
        for name, value in sorted(self.classifier.state_dict().items()):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


def _own_encoder(owner: SentenceSimilarity, texts: list[str]) -> TextEncoder:
    """A copy of the given encoder, or a new one over the frequent characters."""
    if owner.encoder is not None:
        return text_encoder(copy.deepcopy(owner.encoder), owner.maxlen)
    least = usual_min_count(len(texts)) if owner.min_count is None else owner.min_count
    counts = Counter("".join(texts))
    vocab = sorted(c for c, count in counts.items() if count >= least)
    if not vocab:
        raise ValueError(f"no character occurs min_count={least} times in {len(texts)} texts; lower it or give more")
    module = CharGRUEncoder(vocab, owner.d, embedding_dim=owner.embedding_dim, maxlen=owner.maxlen)
    return text_encoder(module, owner.maxlen)


def _width(module: nn.Module, vectors: Vectors) -> int:
    """Width of the vectors, from that of the first text.

    Raises:
        ValueError: No gradient reaches the weights.
    """
    module.eval()  # a batch norm cannot train on one text
    with torch.enable_grad():
        first = vectors(np.zeros(1, np.int64))
    if not first.requires_grad and any(weight.requires_grad for weight in module.parameters()):
        raise ValueError(
            "the encoder must return vectors that depend on its weights with gradients; got a tensor without (is it "
            "made under no_grad, or detached?)"
        )
    return first.shape[1]


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
