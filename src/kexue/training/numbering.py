"""Which batch belongs to which step and rank."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from kexue.training.order import seed_step
from kexue.training.processes import Processes


@dataclass
class Numbering:
    """Which batch belongs to a step, and which noise to a batch.

    Args:
        batch_at: Function from the number of a batch to the batch.
        accumulate: Batches of one step on one rank.
        processes: The ranks.
        per_rank: ``batch_at`` already gives this rank's own part and is called with the same number on every rank.
            Else the ranks take turns: the numbers of a step are those of ``accumulate * world`` batches in one process.
    """

    batch_at: Callable[[int], Any]
    accumulate: int
    processes: Processes
    per_rank: bool = False

    def place(self, step: int, number: int) -> tuple[int, int]:
        """Number of a batch in the run and rank of its noise, for batch ``number`` of ``step`` on this rank."""
        mine = step * self.accumulate + number
        if self.per_rank:
            return mine, self.processes.rank
        return mine * self.processes.world + self.processes.rank, 0


def batch_source(batches: Any) -> tuple[Callable[[int], Any], int | None]:
    """Function from the number of a batch to the batch, and how many there are if that is known."""
    if callable(batches) and not hasattr(batches, "__getitem__"):
        return batches, None
    if isinstance(batches, (Mapping, str)) or not (hasattr(batches, "__getitem__") and hasattr(batches, "__len__")):
        raise TypeError(
            "batches must be a sequence of dicts or a function step -> dict (an iterator cannot be resumed); got "
            f"{type(batches).__name__}"
        )
    length = len(batches)
    if length == 0:
        raise ValueError("batches must hold at least one batch; got an empty sequence")
    return lambda number: batches[number % length], length


def numbering_of(
    batch_at: Callable[[int], Any],
    length: int | None,
    accumulate: int,
    processes: Processes,
    per_rank: bool | None,
    seed: int,
    device: torch.device,
) -> Numbering:
    """The numbering of a run. Whether a function knows its rank is found by comparing batch 0 between the ranks."""
    if per_rank is None and (processes.world == 1 or length is not None):
        per_rank = False
    if per_rank is None:
        digest, error = b"", None
        seed_step(seed, 0, 0, device)  # what reads the global generators is no difference between the ranks
        try:
            digest = _digest(batch_at(0))
        except Exception as caught:
            error = caught
        processes.agree(error, "to make batch 0")
        per_rank = len(set(processes.gather(digest))) > 1
    return Numbering(batch_at, accumulate, processes, per_rank)


def _digest(batch: Any) -> bytes:
    """A hash of what is in a batch."""
    state = hashlib.blake2b(digest_size=16)
    for name, value in sorted(batch.items()) if isinstance(batch, Mapping) else [("", batch)]:
        if isinstance(value, torch.Tensor):
            flat = value.detach().cpu().contiguous().view(-1)
            content = flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
            text = f"{name} {value.dtype} {tuple(value.shape)}"
        elif isinstance(value, np.ndarray):
            content, text = value.tobytes(), f"{name} {value.dtype} {value.shape}"
        else:
            content, text = b"", f"{name} {value!r}"
        state.update(text.encode() + b"\0" + content)
    return state.digest()
