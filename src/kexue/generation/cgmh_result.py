"""What a run of CGMH gives back, and how it is collected."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kexue.generation._edits import OPERATIONS, SKIP, Batch, Edits, Floats, Ints
from kexue.generation._states import Ids

__all__ = ["CGMHResult"]

TRACE = np.dtype(
    [
        ("step", np.int64),
        ("chain", np.int32),
        ("operation", "U7"),
        ("position", np.int32),
        ("old", np.int64),
        ("new", np.int64),
        ("log_rho", np.float64),
    ]
)
_VISITED = 4096  # distinct sentences that are remembered, the best ones


@dataclass
class CGMHResult:
    """Samples of C chains and what happened on the way.

    Args:
        ids: (C, n, T) ids of the kept states, padded with 0.
        lengths: (C, n) their lengths.
        positions: (C, n, k) where the k keywords stand.
        log_rho: (C, n) log rho of the kept states.
        acceptance: Operation -> share of the tries that changed the state.
        counts: Operation -> {"tried", "impossible", "accepted"}; an impossible operation has been tried.
        best: The sentence with the largest log rho that any chain has visited.
        best_log_rho: Its log rho.
        trace: Accepted edits in order: a structured array with step (from 1), chain, operation, position, old and new
            token (-1: none) and log_rho after it.
        visited: Distinct sentences that the chains have accepted -> log rho; the best 4096 at least.
        state: The last state of each chain; ``run`` takes it as a start.
        interrupted: Ctrl-C ended the run; n is what had been kept by then.

    Example:
        >>> from kexue.generation import CGMH, Target
        >>> sampler = CGMH(Target(lambda texts: [-float(len(t)) for t in texts]), vocab=2, max_length=3)
        >>> result = sampler.run([0], steps=60, burn_in=10, thin=5, progress=False)
        >>> len(result.samples[0]), len(result.best), result.ranked(1)[0][1] == result.best_log_rho
        (10, 1, True)
    """

    ids: Ints
    lengths: Ints
    positions: Ints
    log_rho: Floats
    acceptance: dict[str, float]
    counts: dict[str, dict[str, int]]
    best: Ids
    best_log_rho: float
    trace: NDArray[np.void]
    visited: dict[Ids, float] = field(repr=False)
    state: list[Any] = field(repr=False)
    interrupted: bool = False

    @cached_property
    def samples(self) -> list[list[Ids]]:
        """C lists of the n kept sentences as id tuples."""
        return [
            [tuple(row[:n]) for row, n in zip(ids, lengths, strict=True)]
            for ids, lengths in zip(self.ids.tolist(), self.lengths.tolist(), strict=True)
        ]

    def ranked(self, count: int | None = None) -> list[tuple[Ids, float]]:
        """Distinct sentences that were visited with their log rho, the best first.

        Args:
            count: How many; None: all that are remembered.

        Returns:
            List of (ids, log rho).
        """
        order = sorted(self.visited.items(), key=lambda item: (-item[1], item[0]))
        return order[:count]

    def changes(self) -> list[dict[str, Any]]:
        """The trace as dictionaries."""
        names = TRACE.names or ()
        return [dict(zip(names, row, strict=True)) for row in self.trace.tolist()]


class Recorder:
    """Collects a run."""

    def __init__(self, edits: Edits, chains: int, steps: int, burn_in: int, thin: int, trace: bool) -> None:
        self.edits, self.burn_in, self.thin, self.steps = edits, burn_in, thin, steps
        n, k = (steps - burn_in) // thin, len(edits.keywords)
        self.ids = np.zeros((chains, n, edits.high), np.int64)
        self.lengths = np.zeros((chains, n), np.int64)
        self.positions = np.zeros((chains, n, k), np.int64)
        self.log_rho = np.zeros((chains, n))
        self.kept = 0
        self.traced = trace
        self.traces: list[NDArray[np.void]] = []
        self.tries = np.zeros((3, len(OPERATIONS)), np.int64)  # tried, impossible, accepted
        self.best: Ids = ()
        self.best_log_rho = -np.inf
        self.visited: dict[Ids, float] = {}
        self.interrupted = False

    def begin(self, chains: Batch, log_rho: Floats) -> None:
        """The first states count as visited."""
        self.visit(chains.tuples(), log_rho)

    def visit(self, texts: list[Ids], log_rho: Floats) -> None:
        """Sentences that a chain has moved to."""
        for text, value in zip(texts, log_rho.tolist(), strict=True):
            if value > self.best_log_rho:
                self.best, self.best_log_rho = text, value
            self.visited[text] = value
        if len(self.visited) > 2 * _VISITED:
            ranked = sorted(self.visited.items(), key=lambda item: -item[1])
            self.visited = dict(ranked[:_VISITED])

    def tried(self, op: Ints, possible: NDArray[np.bool_]) -> None:
        """Operations drawn in a step, and which can be carried out."""
        self.tries[0] += np.bincount(op, minlength=len(OPERATIONS))
        self.tries[1] += np.bincount(op[~possible & (op != SKIP)], minlength=len(OPERATIONS))

    def moved(
        self, step: int, rows: Ints, op: Ints, position: Ints, old: Ints, new: Ints, chains: Batch, log_rho: Floats
    ) -> None:
        """Chains ``rows`` have accepted their edits."""
        self.tries[2] += np.bincount(op[rows], minlength=len(OPERATIONS))
        if not len(rows):
            return
        self.visit(chains.rows(rows).tuples(), log_rho[rows])
        if self.traced:
            self.add_trace(
                np.full(len(rows), step), rows, op[rows], position[rows], old[rows], new[rows], log_rho[rows]
            )

    def add_trace(
        self, step: Ints, chain: Ints, op: Ints, position: Ints, old: Ints, new: Ints, log_rho: Floats
    ) -> None:
        """Accepted edits, in order."""
        part = np.empty(len(step), TRACE)
        part["step"], part["chain"], part["position"] = step, chain, position
        part["operation"] = np.array(OPERATIONS)[op]
        part["old"], part["new"], part["log_rho"] = old, new, log_rho
        self.traces.append(part)

    def keep(self, step: int, chains: Batch, log_rho: Floats) -> None:
        """A step is over."""
        if step > self.burn_in and (step - self.burn_in) % self.thin == 0:
            n = self.kept
            self.ids[:, n], self.lengths[:, n], self.positions[:, n] = chains.ids, chains.lengths, chains.starts
            self.log_rho[:, n] = log_rho
            self.kept += 1

    def result(self, chains: Batch) -> CGMHResult:
        """Everything that was collected."""
        n = self.kept
        width = int(self.lengths[:, :n].max(initial=0))
        tried, impossible, accepted = self.tries.tolist()
        counts = {
            name: {"tried": tried[i], "impossible": impossible[i], "accepted": accepted[i]}
            for i, name in enumerate(OPERATIONS)
            if i != SKIP and tried[i]
        }
        starts = [tuple(row) for row in chains.starts.tolist()]
        state: list[Any] = chains.tuples()
        if self.edits.keywords:
            state = list(zip(state, starts, strict=True))
        return CGMHResult(
            ids=self.ids[:, :n, :width],
            lengths=self.lengths[:, :n],
            positions=self.positions[:, :n],
            log_rho=self.log_rho[:, :n],
            acceptance={name: c["accepted"] / c["tried"] for name, c in counts.items()},
            counts=counts,
            best=self.best,
            best_log_rho=self.best_log_rho,
            trace=np.concatenate(self.traces) if self.traces else np.empty(0, TRACE),
            visited=self.visited,
            state=state,
            interrupted=self.interrupted,
        )
