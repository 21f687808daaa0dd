"""Simulated annealing and hill climbing over any states (模拟退火、爬山法): the state of the highest value.

Source: 科学空间 8084 (【搜出来的文本】(二)从MCMC到模拟退火); UPSA (Liu et al. 2020).

    p_tau proportional to exp(f / tau);     A = min(1, exp((f(y) - f(x)) / tau) q(x<-y) / q(y<-x));     tau -> 0 slowly

f is maximised. At tau = 0 a move is taken iff f(y) >= f(x): hill climbing.

What differs from the usual script: the best state that was visited is returned, not the last one; the ratio of the
proposal's two directions stays in, so that moves need not be symmetric; restarts go on together, their new states
scored in one batch; an impossible move counts as a step that stayed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kexue._checks import check_int
from kexue._progress import progress as progress_bar
from kexue.generation._interrupt import noted_interrupt
from kexue.generation._random import MoveGenerator
from kexue.generation._states import log_rho_of
from kexue.generation.schedules import Constant, Schedule

__all__ = ["AnnealingResult", "SimulatedAnnealing"]

Move = Callable[[Any, Any], "tuple[Any, float] | None"]
_TRACE = 1000  # points kept of a run


@dataclass
class AnnealingResult:
    """What a search found.

    Attributes:
        best: The best state of all restarts.
        best_value: Its value f.
        bests: The best state of each of R restarts.
        best_values: (R,) their values.
        states: The last states.
        values: (R,) their values.
        trace: (points, R) values on the way, about a thousand points.
        acceptance: Share of the steps whose move was taken.
        steps: Steps done.
        interrupted: Whether Ctrl-C ended the run; hand the result to ``run(resume=...)`` to go on.
    """

    best: Any
    best_value: float
    bests: list[Any]
    best_values: NDArray[np.float64]
    states: list[Any]
    values: NDArray[np.float64]
    trace: NDArray[np.float64]
    acceptance: float
    steps: int
    interrupted: bool = False
    _accepted: int = 0
    _generator: Any = field(default=None, repr=False)


class SimulatedAnnealing:
    """Search for the state of the highest f by a Markov chain that is cooled down.

    Args:
        target: f: a :class:`kexue.generation.Target` (f = log rho; asked for all restarts at once), or a callable from
            one state to its value. -inf forbids a state.
        moves: A move or several, one of which is drawn uniformly in each step. A move takes ``(state, generator)``
            and returns ``(new state, log q(x<-y) - log q(y<-x))``, 0 for a symmetric one, or None if it is impossible
            here. It must not change the state in place. The generator has the methods of numpy's Generator
            (``random``, ``integers``, ``choice``) and is a ``torch.Generator`` too.
        schedule: Temperatures: a callable ``(t, steps) -> tau`` such as :class:`Geometric`, or a constant number; 0 is
            hill climbing.
        batched: Whether a callable target takes a list of states and returns their (N,) values.

    Raises:
        TypeError: A target, move or schedule that is not callable.
        ValueError: No moves, a negative temperature.

    Example:
        >>> from kexue.generation import Geometric
        >>> def step(x, generator):
        ...     return x + int(generator.choice([-1, 1])), 0.0
        >>> valley = lambda x: -abs(x - 30) + 8 * (x % 10 == 0)  # a local maximum at every tenth place
        >>> result = SimulatedAnnealing(valley, step, Geometric(5.0, 0.1)).run(0, steps=3000, restarts=4)
        >>> result.best, result.best_value
        (30, 8.0)
    """

    def __init__(
        self,
        target: Any,
        moves: Move | Sequence[Move],
        schedule: Schedule | float = 0.0,
        *,
        batched: bool = False,
    ) -> None:
        if not (callable(moves) or isinstance(moves, Iterable)):
            raise TypeError(f"moves must be a callable or a list of such; got {type(moves).__name__}")
        self.moves: list[Move] = [moves] if callable(moves) else list(moves)
        if not self.moves:
            raise ValueError("moves must hold at least one move; got none")
        for move in self.moves:
            if not callable(move):
                raise TypeError(f"a move must be callable, (state, generator); got {type(move).__name__}")
        if not callable(schedule):
            schedule = Constant(schedule)
        self.schedule = schedule
        if hasattr(target, "log_rho") or batched:
            self.values = log_rho_of(target)
        elif callable(target):
            self.values = log_rho_of(lambda states: [float(target(state)) for state in states])
        else:
            raise TypeError(f"target must be a Target or a callable, state -> value; got {type(target).__name__}")

    def run(
        self,
        init: Any = None,
        steps: int = 1000,
        restarts: int = 1,
        seed: int = 0,
        *,
        starts: Sequence[Any] | None = None,
        resume: AnnealingResult | None = None,
        progress: bool | None = None,
    ) -> AnnealingResult:
        """Search.

        Args:
            init: Where to start: one state for all restarts, or a callable ``generator -> state`` asked for each.
            steps: Steps of every restart, and the length of the schedule.
            restarts: R, at least 1.
            seed: Seed.
            starts: Instead of ``init`` and ``restarts``: the R states to start from.
            resume: Instead of both: the result of an interrupted run, which goes on as if it had not been.
            progress: Whether to show a bar with the best value; None: if standard error is a terminal.

        Returns:
            An :class:`AnnealingResult`. Ctrl-C ends the run and keeps what there is.

        Raises:
            TypeError: A move that does not return a pair or None.
            ValueError: No start, a start with f = -inf; NaN or +inf as a value, a log ratio or a temperature;
                a negative temperature.
        """
        check_int("steps", steps, 0)
        found = self._begin(init, restarts, seed, starts) if resume is None else _copy(resume)
        every = max(1, steps // _TRACE)
        trace = [found.trace]
        interrupted = False
        with noted_interrupt() as interrupt, progress_bar("annealing", steps - found.steps, progress) as bar:
            try:
                while found.steps < steps and not interrupt.came:
                    self._step(found, steps)
                    if found.steps % every == 0 or found.steps == steps:
                        trace.append(found.values[None].copy())
                        bar.advance(every, f"best {found.best_values.max():.4g}")
            except KeyboardInterrupt:  # raised by a move or the target, or a second Ctrl-C
                interrupted = True
        interrupted |= found.steps < steps
        k = int(found.best_values.argmax())
        return AnnealingResult(
            found.bests[k],
            float(found.best_values[k]),
            list(found.bests),
            found.best_values.copy(),
            list(found.states),
            found.values.copy(),
            np.concatenate(trace),
            found._accepted / max(1, found.steps * len(found.states)),
            found.steps,
            interrupted,
            found._accepted,
            found._generator,
        )

    def _begin(self, init: Any, restarts: int, seed: int, starts: Sequence[Any] | None) -> AnnealingResult:
        check_int("restarts", restarts, 1)
        check_int("seed", seed, 0)
        generator = MoveGenerator(seed)
        if starts is not None:
            states = [_frozen(state) for state in starts]
        elif callable(init):
            states = [_frozen(init(generator)) for _ in range(restarts)]
        elif init is not None:
            states = [_frozen(init)] * restarts
        else:
            states = []
        if not states:
            raise ValueError("a state to start from is needed: init or starts; got none")
        values = self.values(states)
        if (values == -np.inf).any():
            raise ValueError(f"a start must have rho > 0; got f = -inf for {states[int(values.argmin())]!r}")
        none = np.empty((0, len(states)))
        trace = np.concatenate([none, values[None]])
        return AnnealingResult(
            states[0],
            float(values[0]),
            list(states),
            values.copy(),
            states,
            values,
            trace,
            0.0,
            0,
            _generator=generator,
        )

    def _step(self, run: AnnealingResult, steps: int) -> None:
        """One step of every restart; ``run`` is changed only when it is complete."""
        tau = float(self.schedule(run.steps, steps))
        if not (math.isfinite(tau) and tau >= 0):
            raise ValueError(f"the schedule must give temperatures of at least 0; got {tau} at step {run.steps}")
        generator, count = run._generator, len(run.states)
        thresholds = np.log1p(-generator.random(count))
        chosen = generator.integers(len(self.moves), size=count) if len(self.moves) > 1 else np.zeros(count, np.int64)
        rows, new, ratios = [], [], []
        for r, (state, number) in enumerate(zip(run.states, chosen.tolist(), strict=True)):
            moved = self.moves[number](state, generator)
            if moved is not None:
                y, ratio = _pair(moved)
                rows.append(r)
                new.append(y)
                ratios.append(ratio)
        if rows:
            values, old, log_q = self.values(new), run.values[rows], np.array(ratios)
            if tau == 0:
                taken = (values >= old) & (log_q > -np.inf)
            else:
                taken = thresholds[rows] < (values - old) / tau + log_q
            taken &= values > -np.inf
            for k in np.flatnonzero(taken):
                r = rows[k]
                run.states[r], run.values[r] = new[k], values[k]
                if values[k] > run.best_values[r]:
                    run.bests[r], run.best_values[r] = new[k], values[k]
            run._accepted += int(taken.sum())
        run.steps += 1


def _copy(run: AnnealingResult) -> AnnealingResult:
    """A run that can go on without changing the result it comes from."""
    return replace(
        run,
        bests=list(run.bests),
        best_values=run.best_values.copy(),
        states=list(run.states),
        values=run.values.copy(),
        _generator=run._generator.copy(),
    )


def _frozen(state: Any) -> Any:
    """Lists become tuples: a move that changed one in place would change the chain's past."""
    return tuple(state) if isinstance(state, list) else state


def _pair(moved: Any) -> tuple[Any, float]:
    """The new state and the log ratio that a move returned."""
    if not isinstance(moved, tuple) or len(moved) != 2:
        raise TypeError(f"a move must return (new state, log q ratio) or None; got {moved!r}")
    ratio = float(moved[1])
    if math.isnan(ratio) or ratio == math.inf:
        raise ValueError(f"the log q ratio of a move must be a number or -inf; got {ratio}")
    return _frozen(moved[0]), ratio
