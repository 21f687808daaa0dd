"""Exact Markov kernels over token sequences: Metropolis, Metropolis-Hastings, Gibbs, replica exchange (MCMC采样).

Source: 科学空间 8084 (【搜出来的文本】(二)从MCMC到模拟退火), 8119 (三,Gibbs).

    from any q:      alpha(y<-x) = q(x<-y) p(y)        p(y<-x) = alpha q + (1 - sum_y alpha q) delta(y, x)
    Metropolis:      accept if u <= q(x<-y) p(y)                             (p normalised; accepts almost nothing)
    M.-Hastings:     A = min(1, q(x<-y) p(y) / (q(y<-x) p(x)))
    at tau:          p_tau proportional to exp(f / tau); f = log rho
    Gibbs:           positions B at random (or in turn), y_B ~ p(. | x without B), A = 1
    replicas:        swap neighbours with A = min(1, exp((1/tau_1 - 1/tau_2) (f_2 - f_1)))

Every kernel has ``step`` and ``transitions`` (see :mod:`kexue.generation.transition`), so that its stationary law is
checked by the matrix, not believed: max |pi P - pi| is below 1e-12 in the tests.

What differs from the articles: a refused move counts the current state again and an impossible one too; the ratio of
the proposal stays in at every tau, also where the text of an article leaves it out because its proposal is symmetric.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kexue._checks import check_choice, check_int, check_real
from kexue.generation._states import Ids, log_rho_of
from kexue.generation.proposals import as_vocabulary

__all__ = ["Gibbs", "Metropolis", "MetropolisHastings", "ReplicaExchange"]

_MAX_BLOCK = 2**20  # texts that one block draw compares


def _acceptance(exponent: float) -> float:
    """min(1, exp(x)); NaN (-inf minus -inf) refuses."""
    return math.exp(min(0.0, exponent)) if exponent > -math.inf else 0.0


class MetropolisHastings:
    """Metropolis-Hastings at a fixed temperature.

    Args:
        target: A :class:`kexue.generation.Target`, or a callable from a list of states to their (N,) log rho.
        proposal: See :mod:`kexue.generation.proposals`.
        tau: Temperature, above 0: the stationary law is proportional to rho^(1 / tau).

    Raises:
        TypeError: A target that is not callable, a proposal without ``moves`` and ``sample``.
        ValueError: tau <= 0.

    Example:
        >>> from kexue.generation import ReplaceToken, transition_matrix
        >>> kernel = MetropolisHastings(lambda texts: [float(t[0]) for t in texts], ReplaceToken(2))
        >>> pi = np.exp([0.0, 1.0]) / (1 + math.e)
        >>> bool(abs(pi @ transition_matrix(kernel, [(0,), (1,)]) - pi).max() < 1e-12)
        True
    """

    def __init__(self, target: Any, proposal: Any, tau: float = 1.0) -> None:
        check_real("tau", tau, above=0.0)
        for name in ("moves", "sample"):
            if not callable(getattr(proposal, name, None)):
                raise TypeError(f"proposal must have moves(state) and sample(state, generator); {name} is missing")
        self.log_rho, self.proposal, self.tau = log_rho_of(target), proposal, float(tau)

    def _log_acceptance(self, rho_x: float, rho_y: float, log_q: float, log_back: float) -> float:
        """Log A, not yet cut at 0; -inf refuses."""
        if rho_y == -math.inf or log_back == -math.inf:
            return -math.inf
        return (rho_y - rho_x) / self.tau + log_back - log_q

    def transitions(self, state: Ids) -> list[tuple[Ids, float]]:
        """All next states with their probabilities; refused mass stays."""
        routes = [route for route in self.proposal.moves(state) if route[1] > 0]
        rho = self.log_rho([state] + [y for y, _, _ in routes])
        _check_inside(state, rho[0])
        found, staying = [], 1.0
        for (y, q, back), rho_y in zip(routes, rho[1:], strict=True):
            log_back = math.log(back) if back > 0 else -math.inf
            moved = q * _acceptance(self._log_acceptance(rho[0], rho_y, math.log(q), log_back))
            found.append((y, moved))
            staying -= moved
        return [*found, (state, max(0.0, staying))]

    def step(self, state: Ids, generator: np.random.Generator) -> Ids:
        """One step."""
        route = self.proposal.sample(state, generator)
        if route is None:
            return state
        y, log_q, log_back = route
        rho_x, rho_y = self.log_rho([state, y])
        _check_inside(state, rho_x)
        accepted = generator.random() < _acceptance(self._log_acceptance(rho_x, rho_y, log_q, log_back))
        return y if accepted else state


class Metropolis(MetropolisHastings):
    """The article's first sampler: accept if u <= q(x<-y) p(y). Correct, and hardly ever accepts.

    It is here to be compared with: on a toy the mean acceptance is some 1e-3 where Metropolis-Hastings has .6.

    Args:
        target: Normalised: log p <= 0 everywhere.
        proposal: See :mod:`kexue.generation.proposals`.

    Raises:
        TypeError: As :class:`MetropolisHastings`.
        ValueError: While running: a target above 1.

    Example:
        >>> from kexue.generation import ReplaceToken, transition_matrix
        >>> kernel = Metropolis(lambda texts: [math.log((0.25, 0.75)[t[0]]) for t in texts], ReplaceToken(2))
        >>> transition_matrix(kernel, [(0,), (1,)])
        array([[0.8125, 0.1875],
               [0.0625, 0.9375]])
    """

    def __init__(self, target: Any, proposal: Any) -> None:
        super().__init__(target, proposal)

    def _log_acceptance(self, rho_x: float, rho_y: float, log_q: float, log_back: float) -> float:
        if rho_y > 1e-9:
            raise ValueError(
                f"Metropolis needs a normalised target, log p <= 0; got {rho_y} (MetropolisHastings does not)"
            )
        return rho_y + log_back


class Gibbs:
    """Gibbs sampling of texts of a fixed length from the exact conditionals of a target.

    Args:
        target: A :class:`kexue.generation.Target`, or a callable from a list of states to their (N,) log rho.
        vocab: Allowed ids, or their number V.
        scan: "random": a step draws one block at a uniform place. "systematic": a step goes through all blocks from
            left to right (invariant, not reversible).
        block: Number of adjacent tokens drawn together: V^block texts are scored for each draw, at most 2^20.
        tau: Temperature, above 0.

    Raises:
        TypeError: A target that is not callable.
        ValueError: Numbers out of range, an unknown scan.

    Example:
        >>> kernel = Gibbs(lambda texts: [-float(sum(t)) for t in texts], vocab=3)
        >>> y, p = max(kernel.transitions((2, 0)), key=lambda item: item[1])
        >>> y, round(float(p), 4)
        ((0, 0), 0.3326)
    """

    def __init__(
        self, target: Any, vocab: int | Sequence[int], scan: str = "random", block: int = 1, tau: float = 1.0
    ) -> None:
        check_choice("scan", scan, ("random", "systematic"))
        check_int("block", block, 1)
        check_real("tau", tau, above=0.0)
        self.vocab = as_vocabulary(vocab)
        if len(self.vocab) ** block > _MAX_BLOCK:
            raise ValueError(
                f"a block of {block} out of {len(self.vocab)} tokens has {len(self.vocab) ** block} values; "
                f"at most {_MAX_BLOCK} can be compared"
            )
        self.log_rho, self.scan, self.block, self.tau = log_rho_of(target), scan, block, float(tau)
        self._fillings = list(product(self.vocab, repeat=block))

    def _starts(self, state: Ids) -> list[int]:
        """Where the blocks begin: every place, or those of one sweep."""
        last = len(state) - self.block
        if last < 0:
            raise ValueError(f"a state must have at least block = {self.block} tokens; got {len(state)}: {state}")
        if self.scan == "random":
            return list(range(last + 1))
        return [*range(0, last, self.block), last]

    def _conditional(self, state: Ids, start: int) -> tuple[list[Ids], NDArray[np.float64]]:
        """The texts that differ in the block only, with their probabilities."""
        texts = [state[:start] + filling + state[start + self.block :] for filling in self._fillings]
        rho = self.log_rho(texts) / self.tau
        if rho.max() == -np.inf:
            raise ValueError(f"no filling of the tokens from {start} has rho > 0; start where rho > 0, got {state}")
        weights = np.exp(rho - rho.max())
        return texts, weights / weights.sum()

    def transitions(self, state: Ids) -> list[tuple[Ids, float]]:
        """All next states with their probabilities."""
        starts = self._starts(state)
        if self.scan == "random":
            found = []
            for start in starts:
                found += [(y, p / len(starts)) for y, p in zip(*self._conditional(state, start), strict=True)]
            return found
        law = {state: 1.0}
        for start in starts:
            following: dict[Ids, float] = {}
            for x, mass in law.items():
                for y, p in zip(*self._conditional(x, start), strict=True):
                    if p > 0:
                        following[y] = following.get(y, 0.0) + mass * float(p)
            law = following
        return list(law.items())

    def step(self, state: Ids, generator: np.random.Generator) -> Ids:
        """One block, or one sweep."""
        starts = self._starts(state)
        if self.scan == "random":
            starts = [starts[int(generator.integers(len(starts)))]]
        for start in starts:
            texts, p = self._conditional(state, start)
            edges = np.cumsum(p)
            k = int(np.searchsorted(edges, generator.random() * edges[-1], side="right"))
            state = texts[min(k, len(texts) - 1)]
        return state


class ReplicaExchange:
    """Chains at several temperatures that swap their states: the hot ones cross valleys for the cold ones.

    A state is a tuple of states, one for each temperature; its law is the product of rho^(1/tau_k). A step moves every
    replica by Metropolis-Hastings at its temperature and then offers one uniform pair of neighbours a swap.

    Args:
        target: As for :class:`MetropolisHastings`.
        proposal: As for :class:`MetropolisHastings`.
        taus: At least two temperatures above 0; the replica of interest usually has 1.

    Raises:
        TypeError: As :class:`MetropolisHastings`.
        ValueError: Fewer than two temperatures, or one that is not above 0.

    Example:
        >>> from kexue.generation import ReplaceToken
        >>> kernel = ReplicaExchange(lambda texts: [float(t[0]) for t in texts], ReplaceToken(2), taus=(1.0, 4.0))
        >>> kernel.swap_acceptance(0, 0.0, 1.0), round(kernel.swap_acceptance(0, 1.0, 0.0), 4)
        (1.0, 0.4724)
    """

    def __init__(self, target: Any, proposal: Any, taus: Sequence[float]) -> None:
        if not hasattr(taus, "__len__"):
            raise TypeError(f"taus must be a list of temperatures; got {taus!r}")
        if len(taus) < 2:
            raise ValueError(f"taus must hold at least two temperatures; got {list(taus)}")
        self.kernels = [MetropolisHastings(target, proposal, tau) for tau in taus]
        self.log_rho = self.kernels[0].log_rho

    def swap_acceptance(self, k: int, f_first: float, f_second: float) -> float:
        """Probability that replicas k and k + 1 swap, from the log rho of their states."""
        first, second = self.kernels[k].tau, self.kernels[k + 1].tau
        return _acceptance((1 / first - 1 / second) * (f_second - f_first))

    def _check(self, state: Sequence[Ids]) -> None:
        if len(state) != len(self.kernels):
            raise ValueError(
                f"a state must hold one text for each of {len(self.kernels)} temperatures; got {len(state)}"
            )

    def transitions(self, state: tuple[Ids, ...]) -> list[tuple[tuple[Ids, ...], float]]:
        """All next states with their probabilities."""
        self._check(state)
        found = []
        pairs = len(self.kernels) - 1
        parts = [kernel.transitions(x) for kernel, x in zip(self.kernels, state, strict=True)]
        for combination in product(*parts):
            moved, mass = tuple(y for y, _ in combination), math.prod(p for _, p in combination)
            if mass == 0:
                continue
            rho, staying = self.log_rho(list(moved)), mass
            for k in range(pairs):
                swapped = mass / pairs * self.swap_acceptance(k, rho[k], rho[k + 1])
                staying -= swapped
                found.append((_swap(moved, k), swapped))
            found.append((moved, max(0.0, staying)))
        return found

    def step(self, state: tuple[Ids, ...], generator: np.random.Generator) -> tuple[Ids, ...]:
        """Every replica moves, then one pair may swap."""
        self._check(state)
        moved = tuple(kernel.step(x, generator) for kernel, x in zip(self.kernels, state, strict=True))
        k = int(generator.integers(len(self.kernels) - 1))
        f_first, f_second = self.log_rho([moved[k], moved[k + 1]])
        return _swap(moved, k) if generator.random() < self.swap_acceptance(k, f_first, f_second) else moved


def _swap(states: tuple[Ids, ...], k: int) -> tuple[Ids, ...]:
    return (*states[:k], states[k + 1], states[k], *states[k + 2 :])


def _check_inside(state: Any, rho: float) -> None:
    if not math.isfinite(rho):
        raise ValueError(f"a chain must be where rho > 0; got log rho = {rho} for {state!r}")
