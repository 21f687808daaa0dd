"""Compiled Markov chains over n-gram targets (n-gram目标的快速采样): millions of steps a second on one core.

Source: 科学空间 8084; n-gram models, folklore.

    rho(x) = p(x)^gamma,   p(x) = prod_{t=0..n} p(x_t | x_{t-k+1} ... x_{t-1}),   x_n = the end

For screening, for tests of samplers against enumeration, and where a model of a few neighbours is enough; texts with
keywords: :class:`kexue.generation.CGMH`, compiled as well. A step looks at the factors around the changed place only;
the laws are those of :class:`kexue.generation.MetropolisHastings` with :class:`ReplaceToken` or :class:`RandomEdit`,
and of :class:`kexue.generation.Gibbs`, which the tests compare.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kexue._checks import check_choice, check_int, check_real
from kexue._progress import progress as progress_bar
from kexue.generation import _ngram_moves
from kexue.generation._interrupt import noted_interrupt
from kexue.generation._states import Ids, as_ids, as_states
from kexue.generation.ngram_lm import NGramLM
from kexue.generation.transition import check_run

__all__ = ["NGramChains", "NGramSampler"]

_KINDS = {"replace": _ngram_moves.REPLACE, "edit": _ngram_moves.EDIT, "gibbs": _ngram_moves.GIBBS}
_PIECE = 2**20  # steps between two looks at Ctrl-C


@dataclass
class NGramChains:
    """What :meth:`NGramSampler.run` collected.

    Attributes:
        tokens: (C, n, capacity) int32 ids, -1 after the end of a text.
        lengths: (C, n) int32 numbers of tokens.
        acceptance: Share of the steps whose move was taken (1 for Gibbs, which refuses nothing).
        states: The last text of each chain.
        interrupted: Whether Ctrl-C ended the run; chains that were not reached have the length -1 throughout.
    """

    tokens: NDArray[np.int32]
    lengths: NDArray[np.int32]
    acceptance: float
    states: list[Ids]
    interrupted: bool = False

    @property
    def samples(self) -> list[list[Ids]]:
        """C lists of texts."""
        return [
            [tuple(row[:n].tolist()) for row, n in zip(rows, sizes, strict=True) if n >= 0]
            for rows, sizes in zip(self.tokens, self.lengths, strict=True)
        ]


class NGramSampler:
    """The law p(x)^gamma of an n-gram language model, and chains over it.

    A target like :class:`kexue.generation.Target` (it has ``log_rho``), with :meth:`run` for compiled chains.

    Args:
        lm: The language model.
        gamma: Exponent, at least 0.

    Raises:
        TypeError: A language model of another kind, gamma that is no number.
        ValueError: gamma < 0.

    Example:
        >>> from kexue.generation import NGramLM
        >>> lm = NGramLM(np.log([[0.5, 0.2, 0.3], [0.6, 0.1, 0.3], [0.4, 0.5, 0.1]]))
        >>> chains = NGramSampler(lm).run((0, 1), steps=100_000, kernel="edit", max_length=4, seed=1)
        >>> chains.tokens.shape, 0.2 < chains.acceptance < 0.9
        ((1, 100000, 4), True)
    """

    def __init__(self, lm: NGramLM, gamma: float = 1.0) -> None:
        if not isinstance(lm, NGramLM):
            raise TypeError(f"lm must be a kexue.generation.NGramLM; got {type(lm).__name__}")
        check_real("gamma", gamma, minimum=0.0)
        self.lm, self.gamma = lm, float(gamma)
        powers = np.exp(lm.table * self.gamma) if self.gamma else np.ones(lm.table.shape)
        self._powers = np.where(np.isneginf(lm.table), 0.0, powers).reshape(-1)

    def log_rho(self, states: Sequence[Sequence[int]]) -> NDArray[np.float64]:
        """Gamma log p.

        Args:
            states: N sequences of token ids.

        Returns:
            (N,) float64.
        """
        log_p = self.lm(states)
        return np.where(np.isneginf(log_p), -np.inf, self.gamma * np.where(np.isneginf(log_p), 0.0, log_p))

    def __call__(self, states: Sequence[Sequence[int]]) -> NDArray[np.float64]:
        """The same as :meth:`log_rho`."""
        return self.log_rho(states)

    def run(
        self,
        init: Any,
        steps: int,
        burn_in: int = 0,
        thin: int = 1,
        kernel: str = "replace",
        *,
        n_chains: int = 1,
        min_length: int = 1,
        max_length: int = 32,
        seed: int = 0,
        progress: bool | None = None,
    ) -> NGramChains:
        """Run chains one after another on one core.

        Args:
            init: A text to start from, or one for each chain.
            steps: Steps of each chain.
            burn_in: Steps before anything is kept.
            thin: Every how many steps after that the text is kept.
            kernel: "replace": Metropolis-Hastings that replaces a token; "gibbs": Gibbs at a random place, V products
                a step; "edit": Metropolis-Hastings that inserts, deletes or replaces.
            n_chains: C, if ``init`` is one text.
            min_length: Of "edit".
            max_length: Of "edit".
            seed: Seed.
            progress: Whether to show a bar; None: if standard error is a terminal.

        Returns:
            An :class:`NGramChains`; Ctrl-C ends the run and keeps what there is.

        Raises:
            ValueError: An unknown kernel, numbers out of range, a start of a forbidden length or with rho = 0.
        """
        check_choice("kernel", kernel, tuple(_KINDS))
        check_run(steps, burn_in, thin)
        check_int("n_chains", n_chains, 1)
        check_int("min_length", min_length, 0)
        check_int("max_length", max_length, min_length)
        check_int("seed", seed, 0)
        starts = self._starts(init, n_chains, kernel, min_length, max_length)
        capacity = max_length if kernel == "edit" else max(map(len, starts))
        count = (steps - burn_in) // thin
        tokens = np.full((len(starts), count, capacity), -1, np.int32)
        lengths = np.full((len(starts), count), -1, np.int32)
        words = np.random.SeedSequence(seed).generate_state(4 * len(starts), np.uint64).reshape(-1, 4)
        scratch, states = np.empty(self.lm.vocab_size), []
        accepted = total = 0
        with noted_interrupt() as interrupt, progress_bar("n-gram", steps * len(starts), progress) as bar:
            for c, start in enumerate(starts):
                lead, n = self.lm.order - 1, len(start)
                y = np.full(capacity + lead + 2, self.lm.vocab_size)
                y[lead : lead + n] = start
                done = kept = 0
                while done < steps and not interrupt.came:
                    piece = min(_PIECE, steps - done)
                    n, taken, fresh = _ngram_moves.chain(
                        _KINDS[kernel], y, n, piece, done, burn_in, thin, min_length, max_length, self._powers,
                        self.lm.vocab_size + 1, self.lm.order, words[c], tokens[c, kept:], lengths[c, kept:], scratch,
                    )  # fmt: skip
                    done, kept, accepted, total = done + piece, kept + fresh, accepted + taken, total + piece
                    bar.advance(piece)
                states.append(tuple(y[lead : lead + n].tolist()))
        return NGramChains(tokens, lengths, accepted / max(1, total), states, total < steps * len(starts))

    def _starts(self, init: Any, chains: int, kernel: str, low: int, high: int) -> list[Ids]:
        if hasattr(init, "tolist"):
            init = init.tolist()
        single = not len(init) or hasattr(init[0], "__index__")
        starts = [as_ids(init, "init")] * chains if single else as_states(init)
        if not single and chains not in (1, len(starts)):
            raise ValueError(f"init must hold one text for each of {chains} chains; got {len(starts)}")
        for start, rho in zip(starts, self.log_rho(starts), strict=True):
            if rho == -math.inf:
                raise ValueError(f"a chain must start where rho > 0; got log rho = -inf for {start}")
            if kernel == "edit" and not low <= len(start) <= high:
                raise ValueError(f"a start must have {low} to {high} tokens; got {len(start)}")
            if kernel == "gibbs" and not start:
                raise ValueError("Gibbs sampling needs a start of at least one token; got none")
        return starts
