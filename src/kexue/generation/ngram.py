"""n-gram targets with compiled Markov chains (n-gram目标的快速采样): millions of steps a second on one core.

Source: 科学空间 8084; n-gram models, folklore.

    rho(x) = p(x)^gamma,   p(x) = prod_{t=0..n} p(x_t | x_{t-k+1} ... x_{t-1}),   x_n = the end

For screening, for tests of samplers against enumeration, and where a model of a few neighbours is enough. A step looks
at the factors around the changed place only, in machine code; the laws are those of
:class:`kexue.generation.MetropolisHastings` with :class:`ReplaceToken` or :class:`RandomEdit`, and of
:class:`kexue.generation.Gibbs`, which the tests compare.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kexue._checks import check_choice, check_int, check_real
from kexue._progress import progress as progress_bar
from kexue.generation import _ngram_kernel
from kexue.generation._interrupt import noted_interrupt
from kexue.generation._states import Ids, as_ids, as_states
from kexue.generation.transition import check_run

__all__ = ["NGramChains", "NGramTarget"]

_KINDS = {"replace": _ngram_kernel.REPLACE, "edit": _ngram_kernel.EDIT, "gibbs": _ngram_kernel.GIBBS}
_PIECE = 2**20  # steps between two looks at Ctrl-C
_MAX_CELLS = 2**27  # 1 GiB of float64


@dataclass
class NGramChains:
    """What :meth:`NGramTarget.run` collected.

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


class NGramTarget:
    """A text law from a table of n-gram probabilities; a target, and a language model for :class:`Target`.

    Memory: two tables of (V + 1)^k float64.

    Args:
        table: (V + 1, ..., V + 1), k axes: probability of the last index given those before it. Index V stands for
            "before the beginning" in the context and for the end as the outcome. Rows sum to 1.
        gamma: Exponent, at least 0.

    Raises:
        TypeError: gamma that is no number.
        ValueError: A table with axes of different sizes, negative or not finite entries, or rows that do not sum to 1.

    Example:
        >>> target = NGramTarget([[0.5, 0.2, 0.3], [0.6, 0.1, 0.3], [0.5, 0.5, 0.0]])
        >>> round(math.exp(target.log_p([(0, 1)])[0]), 4)  # .5 (start) x .2 x .3 (end)
        0.03
        >>> chains = target.run((0, 1), steps=100_000, kernel="edit", max_length=4, seed=1)
        >>> chains.tokens.shape, 0.2 < chains.acceptance < 0.9
        ((1, 100000, 4), True)
    """

    def __init__(self, table: Any, gamma: float = 1.0) -> None:
        probs = np.array(table, dtype=np.float64)
        check_real("gamma", gamma, minimum=0.0)
        if probs.ndim < 1 or len(set(probs.shape)) != 1 or probs.shape[0] < 2:
            raise ValueError(f"table must have k axes of V + 1 >= 2 each; got the shape {probs.shape}")
        if not (np.isfinite(probs).all() and (probs >= 0).all()):
            raise ValueError("table must hold finite probabilities of at least 0")
        self.vocab_size, self.order, self.gamma = probs.shape[0] - 1, probs.ndim, float(gamma)
        for context in self._contexts():
            total = probs[context].sum()
            if not abs(total - 1) < 1e-6:
                raise ValueError(f"the row of context {context} must sum to 1; it sums to {total}")
        self.probs = probs
        self._powers = np.where(probs > 0, probs, 0.0) ** self.gamma * (probs > 0)

    def _contexts(self) -> Iterable[tuple[int, ...]]:
        """Contexts that occur: "before the beginning" only in front."""
        for lead in range(self.order):
            yield from (
                (self.vocab_size,) * lead + rest
                for rest in product(range(self.vocab_size), repeat=self.order - 1 - lead)
            )

    @classmethod
    def fit(
        cls,
        texts: Iterable[Sequence[int]],
        order: int = 2,
        vocab_size: int | None = None,
        smoothing: float = 0.1,
        gamma: float = 1.0,
    ) -> NGramTarget:
        """Count n-grams and add ``smoothing`` to each count.

        Args:
            texts: Sequences of token ids.
            order: k, 1 or more: a token depends on the k - 1 before it.
            vocab_size: V; None: the largest id + 1.
            smoothing: Above 0.
            gamma: Exponent of the target.

        Returns:
            The target.

        Raises:
            ValueError: No text, ids outside the vocabulary, a table above 1 GiB.

        Example:
            >>> NGramTarget.fit([(0, 1), (0, 1, 0)], smoothing=1.0).probs[0]
            array([0.16666667, 0.5       , 0.33333333])
        """
        check_int("order", order, 1)
        check_real("smoothing", smoothing, above=0.0)
        rows = as_states(texts)
        top = max((max(row) for row in rows if row), default=-1)
        if vocab_size is None:
            vocab_size = top + 1
        check_int("vocab_size", vocab_size, 1)
        if not rows or top >= vocab_size:
            raise ValueError(f"texts must hold at least one text of ids below {vocab_size}; got the largest id {top}")
        cells = (vocab_size + 1) ** order
        if cells > _MAX_CELLS:
            raise ValueError(
                f"a table of {vocab_size + 1}^{order} probabilities is too large, above {_MAX_CELLS} cells"
            )
        counts = np.full((vocab_size + 1,) * order, float(smoothing))
        for row in rows:
            padded = (vocab_size,) * (order - 1) + row + (vocab_size,)
            for t in range(len(row) + 1):
                counts[padded[t : t + order]] += 1
        return cls(counts / counts.sum(-1, keepdims=True), gamma)

    def log_p(self, states: Sequence[Sequence[int]]) -> NDArray[np.float64]:
        """Log-probabilities without gamma.

        Args:
            states: N sequences of token ids.

        Returns:
            (N,) float64.

        Raises:
            ValueError: An id outside the vocabulary.
        """
        rows, end = as_states(states), self.vocab_size
        with np.errstate(divide="ignore"):
            log_probs = np.log(self.probs)
        values = np.empty(len(rows))
        for i, row in enumerate(rows):
            if row and max(row) >= end:
                raise ValueError(f"token ids must be below the size of the vocabulary, {end}; got {row}")
            padded = (end,) * (self.order - 1) + row + (end,)
            values[i] = math.fsum(log_probs[padded[t : t + self.order]] for t in range(len(row) + 1))
        return values

    def log_rho(self, states: Sequence[Sequence[int]]) -> NDArray[np.float64]:
        """Gamma log p.

        Args:
            states: N sequences of token ids.

        Returns:
            (N,) float64.
        """
        log_p = self.log_p(states)
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
        scratch, states = np.empty(self.vocab_size), []
        accepted = total = 0
        table = self._powers.reshape(-1)
        with noted_interrupt() as interrupt, progress_bar("n-gram", steps * len(starts), progress) as bar:
            for c, start in enumerate(starts):
                x, n = np.zeros(capacity + 1, np.int64), len(start)
                x[:n] = start
                done = kept = 0
                while done < steps and not interrupt.came:
                    piece = min(_PIECE, steps - done)
                    n, taken, fresh = _ngram_kernel.chain(
                        _KINDS[kernel], x, n, piece, done, burn_in, thin, min_length, max_length, table,
                        self.vocab_size + 1, self.order, words[c], tokens[c, kept:], lengths[c, kept:], scratch,
                    )  # fmt: skip
                    done, kept, accepted, total = done + piece, kept + fresh, accepted + taken, total + piece
                    bar.advance(piece)
                states.append(tuple(x[:n].tolist()))
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
