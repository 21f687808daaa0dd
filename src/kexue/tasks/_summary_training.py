"""The training of the summary generator: batches with noise, the two losses, the average of the weights.

    row       [CLS] source [SEP] [CLS] target [SEP], at most max_length ids: the longer side is cut, its [SEP] kept
    noise     each id of source and target, with probability p, becomes one drawn from the same row
    labels    clean ids; O, B, I from the alignment of the noisy source and the clean target
    loss      cross entropy of the target (dense, then over the k largest logits) + 1/2 * that of O, B, I
    average   w_avg <- d w_avg + (1 - d) w after each step

Marks are neither replaced nor drawn, where the article's code replaces any id: a row without its [SEP] in place is no
row that decoding ever sees. The tags count a quarter of what they count there: in a model that starts from nothing they
learn as much with it, and take less from the tokens. Everything is a function of (seed, step), so that a killed run
continues bit by bit.
"""

from __future__ import annotations

import copy
import hashlib
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from kexue.models.prefix_lm import KexueForPrefixLM
from kexue.tasks._summary_vocabulary import CLS, PAD, SEP
from kexue.tasks.copy_tags import copy_labels, copy_loss
from kexue.training import batch_indices, numpy_generator

__all__ = ["Objective", "Pair", "Rows", "framed"]

TAGS = 0.25  # of the published weight
POOL = 20  # batches among which rows of similar length are brought together
Pair = tuple[NDArray[np.int64], NDArray[np.int64]]


def framed(source: NDArray[np.int64], target: NDArray[np.int64], longest: int) -> Pair:
    """[CLS] source [SEP] and [CLS] target [SEP], together at most ``longest`` ids.

    Example:
        >>> a, b = framed(np.arange(10, 19), np.arange(30, 33), 10)
        >>> a.tolist(), b.tolist()
        ([1, 10, 11, 12, 2], [1, 30, 31, 32, 2])
    """
    room = longest - 4
    a, b = len(source), len(target)
    if a + b > room:  # what cutting the longer side one by one leads to
        small = min(a, b)
        half = room // 2
        short = min(small, half)
        a, b = (room - short, short) if a >= b else (short, room - short)
    ends = np.array([CLS]), np.array([SEP])
    return tuple(np.concatenate([ends[0], x, ends[1]]) for x in (source[:a], target[:b]))  # type: ignore[return-value]


class Rows:
    """The batches of a training, by number.

    Args:
        pairs: For each row its pairs of source and target ids: one, or two of which each draw takes one.
        batch_size: Rows of a step.
        longest: Ids of a row.
        noise: p.
        seed: Of order and noise.
        sparse_from: First step with the sparse loss.
        top_k: Its k; None: always dense.
    """

    def __init__(
        self,
        pairs: list[list[Pair]],
        batch_size: int,
        longest: int,
        noise: float,
        seed: int,
        sparse_from: int,
        top_k: int | None,
    ) -> None:
        self.pairs = [[framed(a, b, longest) for a, b in row] for row in pairs]
        self.size, self.noise, self.seed = batch_size, noise, seed
        self.sparse_from, self.top_k = sparse_from, top_k
        self.lengths = np.array([sum(map(len, row[0])) for row in self.pairs])
        self.per_epoch = -(-len(pairs) // batch_size)
        self._epoch = lru_cache(2)(self._batches)

    def _batches(self, epoch: int) -> list[NDArray[np.int64]]:
        """Rows in random order, sorted by length within pools, batches shuffled."""
        n, size = len(self.pairs), self.size
        order = batch_indices(self.seed, epoch, n, n)
        pools = [order[i : i + POOL * size] for i in range(0, n, POOL * size)]
        order = np.concatenate([pool[np.argsort(self.lengths[pool], kind="stable")] for pool in pools])
        batches = [order[i : i + size] for i in range(0, n, size)]
        return [batches[i] for i in batch_indices(self.seed, epoch, len(batches), len(batches))]

    def __call__(self, step: int) -> dict[str, Any]:
        """The arguments of :class:`Objective` in a step."""
        generator = numpy_generator(self.seed, step)
        chosen = self._epoch(step // self.per_epoch)[step % self.per_epoch]
        rows = [self.pairs[i][int(generator.integers(len(self.pairs[i])))] for i in chosen]
        longest = max(len(a) + len(b) for a, b in rows)
        shape = (len(rows), longest)
        ids, clean = np.full(shape, PAD), np.full(shape, PAD)
        segments, there = np.zeros(shape, np.int64), np.zeros(shape, bool)
        tags = np.full(shape, -100)
        for i, (a, b) in enumerate(rows):
            n, m = len(a), len(a) + len(b)
            clean[i, :n], clean[i, n:m] = a, b
            ids[i, :m] = self._noisy(clean[i, :m], generator)
            segments[i, n:m], there[i, :m] = 1, True
            source, target = copy_labels(ids[i, 1 : n - 1], b[1:-1])
            tags[i, 1 : n - 1], tags[i, n : m - 2], tags[i, m - 2] = source, target, 0  # [SEP] is not copied
        made = {"input_ids": ids, "attention_mask": there, "token_type_ids": segments, "labels": clean, "tags": tags}
        sparse = self.top_k is not None and step >= self.sparse_from
        return {name: torch.from_numpy(value) for name, value in made.items()} | {
            "top_k": self.top_k if sparse else None
        }

    def _noisy(self, row: NDArray[np.int64], generator: np.random.Generator) -> NDArray[np.int64]:
        words = np.flatnonzero((row != CLS) & (row != SEP))
        if not len(words):
            return row
        hit = generator.random(len(words)) < self.noise
        drawn = row[words[generator.integers(len(words), size=len(words))]]
        out = row.copy()
        out[words[hit]] = drawn[hit]
        return out

    def fingerprint(self) -> str:
        """Identifies the rows."""
        digest = hashlib.sha256(f"{self.size} {self.noise} {self.sparse_from} {self.top_k}".encode())
        for row in self.pairs:
            for part in (x for pair in row for x in pair):
                digest.update(len(part).to_bytes(8, "little") + part.tobytes())
        return digest.hexdigest()


class Objective(nn.Module):
    """Loss of a batch, and the average of the weights, which is saved with them.

    Args:
        model: What is trained.
        decay: d; 0: no average.
        copy: Train the copy head.
    """

    def __init__(self, model: KexueForPrefixLM, decay: float, copying: bool) -> None:
        super().__init__()
        self.model, self.decay, self.copying = model, decay, copying
        self.average = copy.deepcopy(model).requires_grad_(False) if decay else None

    def forward(self, tags: Tensor, **batch: Any) -> dict[str, Tensor]:
        """Loss and number of predicted tokens."""
        out = self.model(**batch)
        loss = out.loss
        if self.copying:
            loss = loss + TAGS * copy_loss(out.copy_logits, tags, batch["token_type_ids"] == 0)
        return {"loss": loss, "num_items": out.num_items}

    @torch.no_grad()
    def update(self, record: dict[str, Any]) -> None:
        """After a step: move the average; of the first steps it is a plain mean."""
        if self.average is None:
            return
        step = record["step"]
        decay = min(self.decay, step / (step + 10))
        for old, new in zip(self.average.parameters(), self.model.parameters(), strict=True):
            old.lerp_(new, 1 - decay)

    def result(self) -> KexueForPrefixLM:
        """The model to be used."""
        return (self.model if self.average is None else self.average).eval()
