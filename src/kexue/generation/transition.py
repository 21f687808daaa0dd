"""Transition laws of Markov chains over texts: their exact matrix, and running a chain (马尔可夫链的转移矩阵).

Source: 科学空间 8084 (【搜出来的文本】(二)从MCMC到模拟退火).

    stationary:         p(y) = sum_x p(y<-x) p(x)            (matrix: pi P = pi)
    detailed balance:   p(y<-x) p(x) = p(x<-y) p(y)          (sufficient)

A kernel is an object with two methods:

    transitions(state) -> [(next state, probability), ...]    everything that one step can do; repeats are added up
    step(state, generator) -> next state                      one step, with numpy's Generator

``transitions`` must describe ``step`` exactly; the mass of refused moves goes to staying, never to the other moves.
:func:`transition_matrix` then proves on a small space what a simulation can only make likely.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from kexue._checks import check_int
from kexue._progress import progress as progress_bar
from kexue.generation._interrupt import noted_interrupt

__all__ = ["Chain", "Kernel", "run_chain", "transition_matrix"]

S = TypeVar("S", bound=Hashable)
_ROUNDING = 1e-9


class Kernel(Protocol[S]):
    """What :func:`transition_matrix` and :func:`run_chain` need of a kernel."""

    def transitions(self, state: S) -> Iterable[tuple[S, float]]:
        """All next states with their probabilities, which sum to 1."""

    def step(self, state: S, generator: np.random.Generator) -> S:
        """One step of the chain."""


def transition_matrix(kernel: Any, states: Sequence[Any]) -> NDArray[np.float64]:
    """The exact transition matrix of a kernel on a finite space.

    Memory: 8 n^2 bytes; one call of ``kernel.transitions`` for each state.

    Args:
        kernel: Object with ``transitions(state) -> [(next state, probability)]``, or that function.
        states: All n states, hashable and different: id tuples, or what ``kernel.states(...)`` lists where a state
            holds more than the ids. The chain must not leave them.

    Returns:
        (n, n) float64, entry (i, j) the probability of going from state i to state j; rows sum to 1.

    Raises:
        TypeError: A kernel without ``transitions``, a state that cannot be hashed.
        ValueError: No states, a state twice, a step out of the list, probabilities that are negative or do not sum
            to 1.

    Example:
        >>> class Flip:
        ...     def transitions(self, state):
        ...         return [(state, 0.75), (1 - state, 0.25)]
        >>> transition_matrix(Flip(), [0, 1])
        array([[0.75, 0.25],
               [0.25, 0.75]])
    """
    law = getattr(kernel, "transitions", kernel)
    if not callable(law):
        raise TypeError(f"kernel must have transitions(state) -> [(state, probability)]; got {type(kernel).__name__}")
    listed = [_hashable(state) for state in states]
    if not listed:
        raise ValueError("states must hold at least one state; got none")
    place = {state: i for i, state in enumerate(listed)}
    if len(place) < len(listed):
        twice = next(state for i, state in enumerate(listed) if place[state] != i)
        raise ValueError(f"states must be different; got {twice!r} twice")
    matrix = np.zeros((len(listed), len(listed)))
    for i, state in enumerate(listed):
        for following, probability in law(state):
            if not probability >= 0:
                raise ValueError(f"a probability must be at least 0; got {probability} from {state!r} to {following!r}")
            if probability == 0:  # a refused move may lead out of the list
                continue
            j = place.get(_hashable(following))
            if j is None:
                raise ValueError(
                    f"the kernel goes from {state!r} to {following!r}, which is not among the {len(listed)} states"
                )
            matrix[i, j] += probability
        if not abs(matrix[i].sum() - 1) <= _ROUNDING:
            raise ValueError(f"the probabilities from {state!r} must sum to 1; got {matrix[i].sum()}")
    return matrix


def _hashable(state: Any) -> Hashable:
    """A state as a key: lists, arrays and tensors of ids become tuples."""
    if hasattr(state, "tolist"):
        state = state.tolist()
    if isinstance(state, list):
        state = tuple(state)
    try:
        hash(state)
    except TypeError:
        raise TypeError(f"a state must be hashable, such as a tuple of ids; got {state!r}") from None
    return state


@dataclass
class Chain:
    """States that a chain went through.

    Attributes:
        samples: Kept states, the current one counted again where a move was refused.
        state: The last state: go on from here.
        moved: Share of the steps that changed the state.
        interrupted: Whether Ctrl-C ended the run early; the samples up to then are kept.
    """

    samples: list[Any]
    state: Any
    moved: float
    interrupted: bool = False


def check_run(steps: int, burn_in: int, thin: int) -> None:
    """Raise unless a run of that many steps keeps its samples."""
    check_int("steps", steps, 0)
    check_int("burn_in", burn_in, 0)
    check_int("thin", thin, 1)
    if burn_in > steps:
        raise ValueError(f"burn_in must be at most steps, {steps}; got {burn_in}")


def run_chain(
    kernel: Any,
    state: Any,
    steps: int,
    burn_in: int = 0,
    thin: int = 1,
    seed: int | np.random.Generator = 0,
    progress: bool | None = None,
) -> Chain:
    """Run a chain in Python: for checks and small jobs.

    Args:
        kernel: Object with ``step(state, generator)``.
        state: Where to start.
        steps: Number of steps.
        burn_in: Steps before anything is kept.
        thin: Every how many steps after that the state is kept: (steps - burn_in) // thin samples.
        seed: Seed, or a numpy Generator to go on with.
        progress: Whether to show a bar; None: if standard error is a terminal.

    Returns:
        A :class:`Chain`. Ctrl-C ends the run and keeps what there is.

    Raises:
        TypeError: A kernel without ``step``.
        ValueError: Numbers out of range.

    Example:
        >>> class Walk:
        ...     def step(self, state, generator):
        ...         return (state + int(generator.choice([-1, 1]))) % 5
        >>> chain = run_chain(Walk(), 0, steps=100, burn_in=10, thin=3)
        >>> len(chain.samples), chain.moved
        (30, 1.0)
    """
    if not callable(getattr(kernel, "step", None)):
        raise TypeError(f"kernel must have step(state, generator); got {type(kernel).__name__}")
    check_run(steps, burn_in, thin)
    generator = np.random.default_rng(seed)
    samples, moved, done = [], 0, 0
    with noted_interrupt() as interrupt, progress_bar("chain", steps, progress) as bar:
        try:
            while done < steps and not interrupt.came:
                new = kernel.step(state, generator)
                moved += bool(new != state)
                state, done = new, done + 1
                if done > burn_in and (done - burn_in) % thin == 0:
                    samples.append(state)
                if done % 256 == 0:
                    bar.advance(256)
        except KeyboardInterrupt:  # raised by the kernel, or a second Ctrl-C
            pass
    return Chain(samples, state, moved / max(1, done), done < steps)
