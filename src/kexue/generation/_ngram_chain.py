"""CGMH over an n-gram table, compiled: the same law as the general kernel, a million steps per second and more.

All that an edit at position i changes are the factors of the n tokens from i on. With a hole at i the factor at t >= i
is the entry ``base_t + y * (V + 1)^(t - i)`` of the flat table, so the weight of a candidate y is a product of at most
n entries. Random numbers: one SplitMix64 sequence for each chain, so that no run depends on how it is cut into blocks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numba
import numpy as np

from kexue._progress import progress as progress_bar
from kexue.generation._edits import Batch, Floats, Ints, parts_of
from kexue.generation._interrupt import noted_interrupt
from kexue.generation._states import Ids
from kexue.generation.cgmh_result import CGMHResult, Recorder
from kexue.generation.constraints import ContainsKeywords, LengthBetween
from kexue.generation.ngram_lm import NGramLM

if TYPE_CHECKING:
    from kexue.generation.cgmh import CGMH

_BLOCK = 2**18  # steps of all chains together between two looks at the progress bar
_INSERT, _DELETE, _REPLACE, _SKIP = 0, 1, 2, 4


@numba.njit(cache=True, nogil=True, inline="always")
def _uniform(states, chain):  # type: ignore[no-untyped-def]
    """The next number in [0, 1) of a chain."""
    states[chain] += np.uint64(0x9E3779B97F4A7C15)
    z = states[chain]
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z = z ^ (z >> np.uint64(31))
    return (z >> np.uint64(11)) * (1.0 / 9007199254740992.0)


@numba.njit(cache=True, nogil=True, inline="always")
def _base(s, m, t, order, size):  # type: ignore[no-untyped-def]
    """Index of the factor at t in the flat table, for the sentence s of m tokens; token m is the end."""
    h = 0
    for j in range(t - order + 1, t):
        h = h * size + (s[j] if j >= 0 else size - 1)
    return h * size + (s[t] if t < m else size - 1)


@numba.njit(cache=True, nogil=True)
def _log_p(s, m, logs, order, size):  # type: ignore[no-untyped-def]
    total = 0.0
    for t in range(m + 1):
        total += logs[_base(s, m, t, order, size)]
    return total


@numba.njit(cache=True, nogil=True)
def _advance(  # type: ignore[no-untyped-def]
    ids, lengths, starts, log_p, random,
    widths, low, high, gamma,
    probs, logs, order, size, tops, vocab, eps,
    edges, log_op,
    first, steps, burn_in, thin,
    out_ids, out_lengths, out_starts, out_rho,
    tries, best, best_ids,
    trace, trace_rho,
):  # fmt: skip
    """Steps ``first + 1`` to ``first + steps`` of every chain, in place; returns the number of edits traced."""
    chains, keywords, words, count = len(lengths), len(widths), len(vocab), tops.shape[1]
    inner, covered = 0, 0
    for k in range(keywords):
        inner += widths[k] - 1
        covered += widths[k]
    width = ids.shape[1]
    s = np.zeros(width + 1, np.int64)
    weights = np.empty(count)
    base = np.empty(order, np.int64)
    traced = 0
    for c in range(chains):
        log_p[c] = _log_p(ids[c], lengths[c], logs, order, size)
        for step in range(first + 1, first + steps + 1):
            n = lengths[c]
            u = _uniform(random, c)
            op = 0
            while op < 4 and u >= edges[op]:
                op += 1
            tries[0, op] += 1
            possible = op != _SKIP
            if op == _INSERT:
                possible = n < high
            elif op == _DELETE:
                possible = n > low and n > covered
            elif op == _REPLACE:
                possible = n > covered
            if not possible:
                if op != _SKIP:
                    tries[1, op] += 1
            else:
                # A place: uniform over all, again until one is open.
                places = n + 1 if op == _INSERT else n
                while True:
                    i = int(_uniform(random, c) * places)
                    open_ = True
                    for k in range(keywords):
                        a = starts[c, k]
                        if op == _INSERT:
                            if a < i < a + widths[k]:
                                open_ = False
                        elif a <= i < a + widths[k]:
                            open_ = False
                    if open_:
                        break
                m = n + 1 if op == _INSERT else n
                for j in range(i):
                    s[j] = ids[c, j]
                old = -1
                if op == _INSERT:
                    for j in range(i, n):
                        s[j + 1] = ids[c, j]
                else:
                    old = ids[c, i]
                    for j in range(i + 1, n):
                        s[j] = ids[c, j]
                s[i] = 0
                reach = min(order, m - i + 1)  # factors that the token in the hole takes part in
                for d in range(reach):
                    base[d] = _base(s, m, i + d, order, size)
                history = base[0] // size
                total = 0.0
                for r in range(count):
                    y = tops[history, r]
                    w, stride = 1.0, 1
                    for d in range(reach):
                        w *= probs[base[d] + y * stride]
                        stride *= size
                    weights[r] = w
                    total += w
                if total <= 0.0:  # a context that excludes every candidate says nothing
                    for r in range(count):
                        weights[r] = 1.0
                    total = float(count)
                new = -1
                if op != _DELETE:
                    mix = _uniform(random, c)
                    u = _uniform(random, c)
                    if mix < eps:
                        new = vocab[int(u * words)]
                    else:
                        part, chosen = 0.0, count - 1
                        for r in range(count):
                            part += weights[r]
                            if u * total < part:
                                chosen = r
                                break
                        new = tops[history, chosen]
                if new != old:
                    q_old, q_new = 0.0, 0.0
                    for r in range(count):
                        y = tops[history, r]
                        if y == old:
                            q_old = weights[r]
                        if y == new:
                            q_new = weights[r]
                    q_old = (1.0 - eps) * q_old / total + eps / words
                    q_new = (1.0 - eps) * q_new / total + eps / words
                    gain, factor = 0.0, 0.0
                    stride = 1
                    for d in range(reach):
                        if new >= 0:
                            gain += logs[base[d] + new * stride]
                        if old >= 0:
                            gain -= logs[base[d] + old * stride]
                        stride *= size
                    if op == _INSERT:
                        for t in range(i, min(n, i + order - 2) + 1):
                            gain -= logs[_base(ids[c], n, t, order, size)]
                        factor = (
                            log_op[_DELETE] - log_op[_INSERT]
                            + np.log((n + 1.0 - inner) / (n + 1.0 - covered)) - np.log(q_new)
                        )  # fmt: skip
                    elif op == _DELETE:
                        for j in range(i, n - 1):
                            s[j] = ids[c, j + 1]
                        for t in range(i, min(n - 1, i + order - 2) + 1):
                            gain += logs[_base(s, n - 1, t, order, size)]
                        factor = -np.inf
                        if q_old > 0.0:
                            factor = (
                                log_op[_INSERT] - log_op[_DELETE]
                                + np.log((n - covered) / (n * 1.0 - inner)) + np.log(q_old)
                            )  # fmt: skip
                    elif q_old > 0.0:
                        factor = np.log(q_old) - np.log(q_new)
                    else:
                        factor = -np.inf
                    exponent = gamma * gain + factor
                    if exponent >= 0.0 or np.log(_uniform(random, c)) < exponent:
                        if op == _DELETE:
                            n -= 1
                        else:
                            s[i] = new
                            n = m
                        for j in range(i, n):
                            ids[c, j] = s[j]
                        lengths[c] = n
                        for k in range(keywords):
                            if op == _INSERT and starts[c, k] >= i:
                                starts[c, k] += 1
                            elif op == _DELETE and starts[c, k] > i:
                                starts[c, k] -= 1
                        log_p[c] = _log_p(ids[c], n, logs, order, size)  # anew: no rounding adds up
                        tries[2, op] += 1
                        if gamma * log_p[c] > best[0]:
                            best[0] = gamma * log_p[c]
                            best[1] = n
                            for j in range(n):
                                best_ids[j] = ids[c, j]
                        if len(trace):
                            trace[traced, 0], trace[traced, 1], trace[traced, 2] = step, c, op
                            trace[traced, 3], trace[traced, 4], trace[traced, 5] = i, old, new
                            trace_rho[traced] = gamma * log_p[c]
                            traced += 1
            if step > burn_in and (step - burn_in) % thin == 0:
                kept = (step - burn_in) // thin - 1
                n = lengths[c]
                for j in range(n):
                    out_ids[c, kept, j] = ids[c, j]
                out_lengths[c, kept] = n
                for k in range(keywords):
                    out_starts[c, kept, k] = starts[c, k]
                out_rho[c, kept] = gamma * log_p[c]
    return traced


class TableChain:
    """A run of :class:`CGMH` over an :class:`NGramLM`, as compiled code.

    Args:
        sampler: A sampler that :meth:`fits`.
    """

    def __init__(self, sampler: CGMH) -> None:
        lm = sampler.target.lm
        if not isinstance(lm, NGramLM):
            raise TypeError(f"the language model must be an NGramLM; got {type(lm).__name__}")
        self.sampler, self.size, self.order = sampler, lm.vocab_size + 1, lm.order
        rows = lm.table.reshape(-1, self.size)
        count = min(sampler.candidates, len(sampler.vocab))
        order = np.argsort(-rows[:, sampler.vocab], axis=1, kind="stable")[:, :count]
        self.tops = sampler.vocab[order].astype(np.int32)
        self.logs = np.ascontiguousarray(rows.ravel())
        self.probs = np.exp(self.logs)
        bounds = [p for p in parts_of(sampler.target.constraint) if isinstance(p, LengthBetween)]
        self.low = max([sampler.edits.low, *(p.low for p in bounds)])
        self.high = min([sampler.edits.high, *(p.high for p in bounds if p.high is not None)])

    @staticmethod
    def fits(sampler: CGMH) -> bool:
        """Whether the compiled kernel knows everything that this sampler asks for."""
        target = sampler.target
        return (
            isinstance(target.lm, NGramLM)
            and target.sim is None
            and target.gamma > 0
            and sampler.proposal is None
            and sampler.screen is None
            and sampler.operations[3] == 0
            and all(isinstance(part, ContainsKeywords | LengthBetween) for part in parts_of(target.constraint))
        )

    def run(
        self,
        pairs: list[tuple[Ids, tuple[int, ...]]],
        recorder: Recorder,
        generator: np.random.Generator,
        progress: bool | None,
    ) -> CGMHResult:
        """All steps of all chains."""
        sampler, edits = self.sampler, self.sampler.edits
        chains = Batch.of(pairs, edits.high, len(edits.keywords))
        log_rho = sampler.target.log_rho(chains.tuples())
        if not np.isfinite(log_rho).all():
            bad = int((~np.isfinite(log_rho)).argmax())
            raise ValueError(f"the start must have rho > 0; got log rho = {log_rho[bad]} for {pairs[bad][0]}")
        recorder.begin(chains, log_rho)
        random = generator.integers(0, 2**64, size=len(pairs), dtype=np.uint64)
        best, best_ids = np.array([recorder.best_log_rho, -1.0]), np.zeros(edits.high, np.int64)
        block = max(1, min(recorder.steps, _BLOCK // len(pairs)))
        room = block * len(pairs) if recorder.traced else 0
        trace, trace_rho = np.zeros((room, 6), np.int64), np.zeros(room)
        log_p, done = np.zeros(len(pairs)), 0
        with progress_bar("CGMH", recorder.steps, progress) as bar, noted_interrupt() as interrupt:
            while done < recorder.steps:
                now = min(block, recorder.steps - done)
                traced = _advance(
                    chains.ids, chains.lengths, chains.starts, log_p, random,
                    edits.widths, self.low, self.high, sampler.target.gamma,
                    self.probs, self.logs, self.order, self.size, self.tops, sampler.vocab, sampler.eps,
                    sampler.op_edges, sampler.log_op,
                    done, now, recorder.burn_in, recorder.thin,
                    recorder.ids, recorder.lengths, recorder.positions, recorder.log_rho,
                    recorder.tries, best, best_ids, trace, trace_rho,
                )  # fmt: skip
                self._record(recorder, trace[:traced], trace_rho[:traced])
                done += now
                bar.advance(now, f"best {best[0]:.2f}")
                if interrupt.came:
                    recorder.interrupted = True
                    break
        recorder.kept = max(0, done - recorder.burn_in) // recorder.thin
        if best[1] >= 0:  # better than every start
            recorder.visit([tuple(best_ids[: int(best[1])].tolist())], best[:1])
        self._remember(recorder)
        return recorder.result(chains)

    @staticmethod
    def _record(recorder: Recorder, trace: Ints, log_rho: Floats) -> None:
        if len(trace):
            order = np.lexsort((trace[:, 1], trace[:, 0]))
            step, chain, op, place, old, new = trace[order].T
            recorder.add_trace(step, chain, op, place, old, new, log_rho[order])

    @staticmethod
    def _remember(recorder: Recorder) -> None:
        """The best of the kept states count as visited."""
        flat = recorder.log_rho[:, : recorder.kept].ravel()
        best = np.argsort(-flat, kind="stable")[:65536]
        chain, place = np.divmod(best, max(1, recorder.kept))
        texts = [
            tuple(row[:n])
            for row, n in zip(recorder.ids[chain, place].tolist(), recorder.lengths[chain, place].tolist(), strict=True)
        ]
        recorder.visit(texts, flat[best])
