"""The folder of a run: continuing what it holds, metrics, checkpoints. With several processes, rank 0 alone sees it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer

from kexue.training.checkpoint import (
    Checkpoint,
    newest_checkpoint,
    remove_all,
    remove_unfinished,
    sent,
    snapshot,
    write_snapshot,
)
from kexue.training.metrics import MetricsLog
from kexue.training.order import set_random_states
from kexue.training.processes import Processes


class Run:
    """State of a run and its folder.

    Args:
        folder: Where metrics and checkpoints go.
        model: What is trained.
        optimizers: Its optimizers, with their rates at the top of the schedule.
        config: Settings that a run has to keep.
        processes: Who takes part.
        keep: Checkpoints that stay.

    Attributes:
        done: Steps that are done.
        loss: Loss of the last of them.
        rates: Rate of each group of the optimizers at the top of the schedule.
        failure: What went wrong on this rank since the ranks last spoke to each other.
    """

    def __init__(
        self,
        folder: Path,
        model: nn.Module,
        optimizers: list[Optimizer],
        config: dict[str, Any],
        processes: Processes,
        keep: int,
    ) -> None:
        self.folder = folder
        self.model = model
        self.optimizers = optimizers
        self.config = config
        self.processes = processes
        self.keep = keep
        self.done = 0
        self.loss = math.nan
        self.rates = [float(group["lr"]) for o in optimizers for group in o.param_groups]
        self.failure: Exception | None = None
        self._rng: dict[str, Any] | None = None
        self._log: MetricsLog | None = None

    def open(self, resume: bool) -> None:
        """Make the folder; continue what it holds, or delete it."""
        found: list[Checkpoint | None] = [None]

        def look() -> None:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not resume:
                remove_all(self.folder)
            remove_unfinished(self.folder)
            found[0] = newest_checkpoint(self.folder)
            if found[0] is not None:
                self._check(found[0].config)

        self.processes.first(look)
        checkpoint = sent(found[0], self.processes)
        if checkpoint is not None:
            checkpoint.restore(self.model, self.optimizers)
            self.done, self.loss, self._rng = checkpoint.step, checkpoint.loss, checkpoint.rng

    def _check(self, then: dict[str, Any]) -> None:
        now = json.loads(json.dumps(self.config))
        # Options that only one side knows come from another version of torch.
        differing = [key for key in now if key in then and now[key] != then[key]]
        if differing:
            listing = "; ".join(
                "data or model are others (fingerprint)" if key == "fingerprint" and then[key] and now[key]
                else f"{key} was {then[key]!r} and is {now[key]!r}"
                for key in differing
            )  # fmt: skip
            raise ValueError(
                f"{self.folder} holds a run with other settings: {listing}. Use the old ones to continue it, or give "
                "another folder; to start over delete this one (kexue.training.fit: resume=False)"
            )

    def restore_random_states(self) -> None:
        """Put the global generators where they stood when the checkpoint was written."""
        if self._rng is not None:
            set_random_states(self._rng)
            self._rng = None

    @contextmanager
    def metrics(self) -> Iterator[MetricsLog]:
        """The open metrics file, on the other ranks a list of losses."""
        path = self.folder / "metrics.jsonl" if self.processes.rank == 0 else None
        made: list[MetricsLog] = []

        def look() -> list[float]:
            made.append(MetricsLog(path, self.done))
            return made[0].losses

        losses = self.processes.first(look)
        log = made[0] if made else MetricsLog(None, 0)
        with log:
            log.losses = losses
            self._log = log
            yield log

    def note(self, record: dict[str, Any]) -> None:
        """Write the metrics of a step."""
        if self._log is None:
            raise RuntimeError("metrics() has not been entered")
        try:
            self._log.write(record)
        except OSError as error:
            if self.processes.world == 1:
                raise
            self.failure = error  # told when the ranks speak next

    def answer(self, on_step: Callable[[dict[str, Any]], bool | None], record: dict[str, Any]) -> bool:
        """Whether ``on_step`` wants the run to end, on any rank."""
        if self.processes.world == 1:
            return on_step(record) is True
        stop, error = False, self.failure
        try:
            stop = on_step(record) is True
        except Exception as caught:
            error = caught
        stops, failed = self.processes.totals(stop, error is not None)
        self.processes.agree(error, f"after step {self.done}", failed > 0)
        return stops > 0

    def save(self) -> Path:
        """Write a checkpoint."""
        state = snapshot(self.model, self.optimizers, keep=self.processes.rank == 0)

        def write() -> Path:
            if self.failure is not None:
                raise self.failure
            if self._log is not None:
                self._log.sync()
            return write_snapshot(
                self.folder, state, step=self.done, loss=self.loss, config=self.config, keep=self.keep
            )

        return self.processes.first(write)
