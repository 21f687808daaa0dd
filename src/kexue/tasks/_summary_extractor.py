"""The extractor of :class:`kexue.tasks.Summarizer`: documents as rows of vectors, and the labellers of the folds.

A labeller extracts too well on documents that it was trained on. So the documents are split into folds, and the pieces
of each are chosen by the labeller that did not see it; whatever is learned from extracts (the length of a summary, the
generator) learns from these. The epoch of a labeller is chosen on an inner part of its own training rows:
chosen on the fold that it then extracts, as in the published code, it would have seen it after all.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from torch import Tensor, nn

from kexue.tasks._piece_features import Vectors
from kexue.tasks._summary_data import set_aside
from kexue.tasks.gated_conv import GatedConvLabeler, labeler_loss
from kexue.training import batch_indices, fit
from kexue.training.order import kept_random_state

#: (documents, chosen pieces of each) -> main metric of each
Measure = Callable[[Sequence[int], Sequence[Sequence[int]]], NDArray[np.float64]]

__all__ = ["Measure", "Pieces", "Settings", "passing", "probabilities", "train_labeler"]

STOPPING = 0.3  # threshold when epochs are compared
PATIENCE = 3  # epochs without a better one that end a training
LEAST_STEPS = 10  # of an epoch: few documents are seen several times in it
INNER = 0.1  # share of the training rows that choose the epoch
MOST_INNER = 100
POOL = 8  # batches among which documents of similar length are brought together
WINDOW = 4096  # pieces at a time in prediction
SAVE_EVERY = 200  # steps between checkpoints


@dataclass
class Pieces:
    """Rows of vectors, document after document.

    Attributes:
        vectors: (N, D), sparse or an array; row ``offsets[i] + j`` is piece j of document i.
        offsets: (documents + 1,).
    """

    vectors: Vectors
    offsets: NDArray[np.int64]

    @classmethod
    def joined(cls, documents: Sequence[Vectors]) -> Pieces:
        """From the vectors of each document."""
        offsets = np.concatenate([[0], np.cumsum([x.shape[0] for x in documents])])
        if isinstance(documents[0], np.ndarray):
            return cls(np.concatenate(documents), offsets)
        return cls(sparse.csr_array(sparse.vstack(documents)), offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def take(self, rows: Sequence[int] | NDArray[np.int64]) -> Pieces:
        """Some of the documents."""
        return Pieces.joined([self.vectors[self.offsets[i] : self.offsets[i + 1]] for i in rows])

    def dense(self, start: int, stop: int) -> Tensor:
        """The rows from ``start`` to ``stop``."""
        part = self.vectors[start:stop]
        return torch.from_numpy(part if isinstance(part, np.ndarray) else part.toarray())

    def split(self, values: NDArray[Any]) -> list[NDArray[Any]]:
        """One array for each document of one value for each piece."""
        return np.split(values, self.offsets[1:-1])


def probabilities(labelers: Sequence[GatedConvLabeler], given: Pieces) -> NDArray[np.float32]:
    """Mean probability of each piece over the labellers, (N,).

    The documents are laid into one row with gaps between them that no convolution jumps over, and the row is cut into
    windows that overlap by as much as a logit depends on: the values are those of each document alone, and memory does
    not grow with its length.
    """
    gap = max((block.dilation * (block.kernel_size // 2) for block in labelers[0].blocks), default=0)  # type: ignore[operator]
    reach = labelers[0].reach
    document = np.repeat(np.arange(len(given)), np.diff(given.offsets))
    place = np.arange(len(document)) + gap * document
    total = int(place[-1]) + 1 if len(place) else 0
    found = np.zeros(len(place), np.float32)
    with torch.inference_mode():
        for at in range(0, total, WINDOW):
            start, stop = max(at - reach, 0), min(at + WINDOW + reach, total)
            a, b = np.searchsorted(place, [start, stop])
            here = torch.from_numpy(place[a:b] - start)
            x = torch.zeros(1, stop - start, given.vectors.shape[1])
            mask = torch.zeros(1, stop - start, dtype=torch.bool)
            x[0, here] = given.dense(a, b)
            mask[0, here] = True
            mean = torch.stack([torch.sigmoid(labeler(x, mask)[0]) for labeler in labelers]).mean(0)
            c, d = np.searchsorted(place, [at, at + WINDOW])
            found[c:d] = mean[torch.from_numpy(place[c:d] - start)].numpy()
    return found


def passing(values: NDArray[np.float32], threshold: float) -> list[int]:
    """The pieces above the threshold; the best one if there is none."""
    chosen = np.flatnonzero(values > threshold)
    return chosen.tolist() if len(chosen) else [int(values.argmax())]


class _Training(nn.Module):
    """A labeller, and the best one so far; both are in a checkpoint, so that a run continues with its choice."""

    best_score: Tensor
    best_epoch: Tensor
    epoch: Tensor

    def __init__(self, labeler: GatedConvLabeler) -> None:
        super().__init__()
        self.labeler = labeler
        self.best = copy.deepcopy(labeler).requires_grad_(False)
        self.register_buffer("best_score", torch.tensor(-1.0, dtype=torch.float64))
        self.register_buffer("best_epoch", torch.tensor(0))
        self.register_buffer("epoch", torch.tensor(0))

    def forward(self, x: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
        return labeler_loss(self.labeler(x, mask), labels, mask)

    def note(self, score: float, epoch: int) -> None:
        """Keep the weights of this epoch unless an earlier one was better."""
        self.epoch.fill_(epoch)
        if score >= float(self.best_score):
            self.best.load_state_dict(self.labeler.state_dict())
            self.best_score.fill_(score)
            self.best_epoch.fill_(epoch)

    def over(self) -> bool:
        """Whether the last epochs brought nothing; also true when a finished run is opened again."""
        return int(self.epoch - self.best_epoch) >= PATIENCE


@dataclass(frozen=True)
class Settings:
    """How labellers are trained.

    Attributes:
        same: Of each document a number that equal ones share: they stay on one side of the inner split.
        data: Identifies documents, summaries and metric, so that no run is continued with others.
    """

    epochs: int
    hidden_size: int
    batch_size: int
    lr: float
    max_pieces: int
    seed: int
    show_progress: bool | None
    same: NDArray[np.int64]
    data: str


def window(labels: NDArray[np.bool_], most: int) -> tuple[int, int]:
    """The part of at most ``most`` pieces that holds most of the labelled ones, the first of equal parts."""
    if len(labels) <= most:
        return 0, len(labels)
    sums = np.concatenate([[0], np.cumsum(labels)])
    start = int((sums[most:] - sums[:-most]).argmax())
    return start, start + most


def inner_rows(
    rows: NDArray[np.int64], same: NDArray[np.int64], seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows to train on and rows that choose the epoch; none of the latter if there are fewer than 5 documents."""
    different = len(np.unique(same[rows]))
    if different < 5:
        return rows, rows[:0]
    return set_aside(rows, same, min(max(1, round(INNER * different)), MOST_INNER), seed)


def train_labeler(
    given: Pieces,
    labels: list[NDArray[np.bool_]],
    rows: NDArray[np.int64],
    measure: Measure,
    settings: Settings,
    folder: Path,
    label: str,
) -> tuple[GatedConvLabeler, int]:
    """Train a labeller on some of the documents.

    Args:
        given: All documents.
        labels: For each document which pieces belong into its summary.
        rows: The documents that may be looked at.
        measure: Main metric of the pieces chosen of each of some documents.
        settings: How.
        folder: Folder of the run; a run found there is continued.
        label: Name beside the progress bar.

    Returns:
        The labeller of the best epoch on inner rows, the later one of equal epochs, and the number of this epoch.
        Without inner rows it is the last epoch.
    """
    learned, held = inner_rows(rows, settings.same, settings.seed)
    with kept_random_state(torch.device("cpu")):
        torch.manual_seed(settings.seed)
        training = _Training(GatedConvLabeler(given.vectors.shape[1], settings.hidden_size))
    spans = [window(labels[i], settings.max_pieces) for i in learned]
    lengths = np.array([b - a for a, b in spans])
    size = min(settings.batch_size, len(learned))
    each = max(-(-len(learned) // size), LEAST_STEPS)
    seen = max(len(learned), LEAST_STEPS * size)

    @lru_cache(2)
    def epoch_batches(epoch: int) -> list[NDArray[np.int64]]:
        return _batches(lengths, size, seen, settings.seed, epoch)

    def batch(step: int) -> dict[str, Tensor]:
        chosen = epoch_batches(step // each)[step % each]
        longest = int(lengths[chosen].max())
        x = torch.zeros(len(chosen), longest, given.vectors.shape[1])
        mask = torch.arange(longest) < torch.from_numpy(lengths[chosen])[:, None]
        y = torch.zeros(len(chosen), longest)
        for k, c in enumerate(chosen):
            (a, b), i = spans[c], learned[c]
            first = given.offsets[i]
            x[k, : b - a] = given.dense(first + a, first + b)
            y[k, : b - a] = torch.from_numpy(labels[i][a:b].astype(np.float32))
        return {"x": x, "mask": mask, "labels": y}

    inner = given.take(held) if len(held) else None

    def on_step(record: dict[str, Any]) -> bool:
        epoch, rest = divmod(record["step"], each)
        if rest or training.over():
            return training.over()
        if inner is None:
            training.note(0.0, epoch)
            return False
        training.eval()
        values = inner.split(probabilities([training.labeler], inner))
        training.train()
        scores = measure(held.tolist(), [passing(p, STOPPING) for p in values])
        training.note(float(scores.mean()), epoch)
        return training.over()

    fit(
        training, batch, steps=each * settings.epochs, out=folder, save_every=SAVE_EVERY, seed=settings.seed,
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=settings.lr), schedule="constant", clip=None,
        fingerprint=_fingerprint(given, labels, rows, settings), keep=1, on_step=on_step, label=label,
        show_progress=settings.show_progress,
    )  # fmt: skip
    return training.best.eval(), int(training.best_epoch)


def _batches(lengths: NDArray[np.int64], size: int, seen: int, seed: int, epoch: int) -> list[NDArray[np.int64]]:
    """Batches of ``seen`` rows: passes in random order, sorted by length within pools, batches shuffled."""
    n = len(lengths)
    passes = -(-seen // n)
    order = np.concatenate([batch_indices(seed, epoch * passes + p, n, n) for p in range(passes)])[:seen]
    pools = [order[at : at + POOL * size] for at in range(0, seen, POOL * size)]
    order = np.concatenate([pool[np.argsort(lengths[pool], kind="stable")] for pool in pools])
    batches = [order[at : at + size] for at in range(0, seen, size)]
    return [batches[i] for i in batch_indices(seed, epoch, len(batches), len(batches))]


def _fingerprint(given: Pieces, labels: list[NDArray[np.bool_]], rows: NDArray[np.int64], settings: Settings) -> str:
    plain = settings.data, settings.hidden_size, settings.batch_size, settings.max_pieces
    digest = hashlib.sha256(repr(plain).encode())
    chosen = np.concatenate(labels)
    vectors = given.vectors
    numbers = (vectors,) if isinstance(vectors, np.ndarray) else (vectors.data, vectors.indices)
    for part in (*numbers, given.offsets, chosen, rows):
        digest.update(np.ascontiguousarray(part).tobytes())
    return digest.hexdigest()
