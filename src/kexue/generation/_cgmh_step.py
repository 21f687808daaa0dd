"""One step of all chains of CGMH at once: draws, proposals, the stages of acceptance."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kexue.generation._edits import DELETE, INSERT, REPLACE, SWAP, Batch
from kexue.generation._scoring import TargetScorer
from kexue.generation._states import Ids
from kexue.generation.cgmh_result import Recorder

if TYPE_CHECKING:
    from kexue.generation.cgmh import CGMH


class Chains:
    """The current states of C chains.

    Args:
        sampler: Knows the law of a step.
        pairs: The first states (ids, starts).
        scorer: Computes log rho of new states.
        recorder: Is told what happens.
        generator: Source of random numbers.

    Raises:
        ValueError: A start with rho = 0, or one that the screen forbids.
    """

    def __init__(
        self,
        sampler: CGMH,
        pairs: list[tuple[Ids, tuple[int, ...]]],
        scorer: TargetScorer,
        recorder: Recorder,
        generator: np.random.Generator,
    ) -> None:
        self.sampler, self.scorer, self.recorder, self.generator = sampler, scorer, recorder, generator
        self.batch = Batch.of(pairs, sampler.edits.high, len(sampler.edits.keywords))
        self.log_rho = scorer.begin(self.batch)
        bad = np.flatnonzero(~np.isfinite(self.log_rho))
        if len(bad):
            raise ValueError(
                f"a chain must be where rho > 0; got log rho = {self.log_rho[bad[0]]} for {pairs[bad[0]][0]}"
            )
        self.screened = sampler.surrogate(self.batch.tuples()) if callable(sampler.screen) else None
        if self.screened is not None and not np.isfinite(self.screened).all():
            raise ValueError("screen must be finite where rho > 0; got -inf at the start")
        recorder.begin(self.batch, self.log_rho)

    def advance(self, step: int) -> None:
        """One step of every chain, in place."""
        sampler, chains = self.sampler, self.batch
        edits, count = sampler.edits, len(chains)
        draws = self.generator.random((8, count))
        op = np.searchsorted(sampler.op_edges, draws[0], side="right")
        possible = edits.possible(op, chains.lengths)
        self.recorder.tried(op, possible)
        rows = np.flatnonzero(possible & (op != SWAP))
        new = Batch(chains.ids.copy(), chains.lengths.copy(), chains.starts.copy())
        hastings, changed = np.zeros(count), np.zeros(count, np.int64)
        old_token, new_token = np.full(count, -1), np.full(count, -1)
        moves = np.zeros(count, bool)
        if len(rows):
            x, o = chains.rows(rows), op[rows]
            place = edits.choose(x, o, draws[1, rows])
            hole = edits.open_hole(x, o, place)
            q = sampler.law_of(hole, place, rows)
            column = q.draw(draws[2, rows], draws[3, rows])
            before = x.ids[np.arange(len(rows)), place]
            held = np.where(o == INSERT, -1, sampler.column[np.where(o == INSERT, sampler.vocab[0], before)])
            hastings[rows] = sampler.log_hastings(o, x.lengths, q.log_q(held), q.log_q(column))
            filled, closed = edits.fill(hole, place, sampler.vocab[column]), edits.close(hole, place)
            gone = o == DELETE
            new.put(rows, filled)
            new.put(rows[gone], closed.rows(gone))
            changed[rows] = place
            old_token[rows] = np.where(o == INSERT, -1, before)
            new_token[rows] = np.where(gone, -1, sampler.vocab[column])
            moves[rows] = (o != REPLACE) | (column != held)
        for row in np.flatnonzero(op == SWAP).tolist():
            moved = self._swapped(row, draws[4, row], draws[5, row])
            if moved is not None:
                ids, starts, changed[row] = moved
                new.put(np.array([row]), Batch.of([(ids, starts)], edits.high, len(starts)))
                moves[row] = True
        fresh = np.flatnonzero(moves)
        with np.errstate(divide="ignore"):
            threshold = np.log(draws[6:])
        if sampler.screen is not None and len(fresh):
            cheap = np.full(count, -np.inf)
            if self.screened is None:
                gain = self.scorer.local(fresh, new.rows(fresh), changed[fresh], op[fresh])
            else:
                cheap[fresh] = sampler.surrogate(new.rows(fresh).tuples())
                gain = cheap[fresh] - self.screened[fresh]
            passed = threshold[1, fresh] < hastings[fresh] + gain
            fresh = fresh[passed]
            hastings[fresh] = -gain[passed]  # what the first stage has judged is not judged again
        if not len(fresh):
            return
        found = self.scorer.score(fresh, new.rows(fresh), changed[fresh])
        taken = threshold[0, fresh] < hastings[fresh] + found - self.log_rho[fresh]
        winners = fresh[taken]
        self.scorer.keep(winners)
        chains.put(winners, new.rows(winners))
        self.log_rho[winners] = found[taken]
        if self.screened is not None:
            self.screened[winners] = cheap[winners]
        self.recorder.moved(step, winners, op, changed, old_token, new_token, chains, self.log_rho)

    def _swapped(self, row: int, u: float, v: float) -> tuple[Ids, tuple[int, ...], int] | None:
        """New ids and starts of a swap and the first position that changes; None if nothing does."""
        chains, edits = self.batch, self.sampler.edits
        length = int(chains.lengths[row])
        ids, starts = tuple(chains.ids[row, :length].tolist()), tuple(chains.starts[row].tolist())
        pair = edits.draw_swap(length, starts, u, v)
        moved = None if pair is None else edits.swap(ids, starts, *pair)
        if moved is None or moved == (ids, starts):
            return None
        differ = [i for i, (a, b) in enumerate(zip(ids, moved[0], strict=True)) if a != b]
        return (*moved, differ[0] if differ else length)
