"""Gibbs sampling with a masked language model (MLM模型的Gibbs采样), and its exact form.

Source: 科学空间 8119 (【搜出来的文本】(三)基于BERT的文本采样); Wang and Cho 2019, "BERT has a Mouth, and It Must
Speak", with its later correction (the "Markov random field" of the title was withdrawn).

    draw a position i, put [MASK] there, draw y_i from softmax(logits_i / temperature), write it

The conditionals of a masked model belong to no joint law: two orders of the same updates have different stationary
laws, and no text probability can be read off. There is no acceptance to report, and an "acceptance of 1" would not
mean exactness. The exact form takes the masked model as a *proposal* and a :class:`Target` as the law:

    q(y<-x) = prod over i in B of [(1 - eps) p(y_i | x without B) + eps / V']
    A = min(1, rho(y) q(x<-y) / (rho(x) q(y<-x)))

x without B = y without B, so that one forward pass gives both directions. A one-pass model (T-TA) sees the other tokens
of B, so that blocks of several cost a second pass.

What differs from the published scripts: C chains in one batch, each with its own position and length, one forward pass
for a step, the decoder on the drawn rows only; special tokens, also [MASK] itself, are never drawn; drawing is in
float64 from logarithms; the length is never changed, as texts of different lengths live in different spaces.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations, product
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kexue._checks import check_choice, check_int, check_real
from kexue._progress import progress as progress_bar
from kexue.generation._interrupt import noted_interrupt
from kexue.generation._mlm import Conditionals, pick
from kexue.generation._states import Ids, as_ids, as_states, evaluation, log_rho_of
from kexue.generation.transition import check_run

__all__ = ["GibbsResult", "MLMGibbs"]

_FILLS = ("random", "left-to-right", "uniform")


@dataclass
class GibbsResult:
    """What :meth:`MLMGibbs.run` collected.

    Attributes:
        samples: C lists of n texts each, token ids without prefix and suffix.
        log_rho: (C, n) values of the target; None without one: there is no law to give them.
        acceptance: Share of accepted steps; None without a target: nothing is accepted or refused.
        states: The last text of each chain.
        steps: Steps done.
        interrupted: Whether Ctrl-C ended the run; hand the result to ``run(resume=...)`` to go on.
    """

    samples: list[list[Ids]]
    log_rho: NDArray[np.float64] | None
    acceptance: float | None
    states: list[Ids]
    steps: int
    interrupted: bool = False
    _run: _Run | None = field(default=None, repr=False)


@dataclass
class _Run:
    """Everything a run goes on from."""

    ids: Tensor  # (C, T) with prefix and suffix
    real: Tensor  # (C, T), False at padding
    free: Tensor  # (C, T), True where tokens may change
    lengths: list[int]
    generator: torch.Generator
    rho: NDArray[np.float64] | None
    accepted: int = 0
    steps: int = 0

    def copy(self) -> _Run:
        generator = torch.Generator()
        generator.set_state(self.generator.get_state())
        rho = None if self.rho is None else self.rho.copy()
        parts = (self.ids.clone(), self.real, self.free, self.lengths, generator, rho)
        return _Run(*parts, self.accepted, self.steps)


class MLMGibbs:
    """Chains of texts of fixed length, updated by a masked language model.

    Args:
        mlm: Masked language model: ``forward(input_ids, attention_mask=)`` gives logits (B, T, V) and
            ``config.vocab_size`` is V. :class:`kexue.models.KexueForMaskedLM`, any masked model of transformers, or a
            one-pass model (:class:`kexue.models.KexueForTextAutoencoding`), which is given no [MASK].
        length: Number of tokens, or (low, high), from which every chain draws its own.
        temperature: Logits are divided by it, above 0.
        top_k: Only so many of the likeliest tokens; 0: all.
        ban: Ids that are never drawn; "special": all that the tokenizer or the configuration names ([CLS], [SEP],
            [PAD], [MASK], [UNK], begin, end, unused). [MASK] never is, whatever is given.
        tokenizer: Names special ids; optional.
        mask_token_id: Id of [MASK]; None: that of the configuration or the tokenizer.
        prefix: Ids before every text, such as ([CLS],); not part of the samples.
        suffix: Ids after every text, such as ([SEP],).
        target: The exact form: a :class:`Target`, or a callable from a list of texts to their (N,) log rho. The chain
            then samples rho over texts of its length, with the model as the proposal.
        eps: Of the exact form: share of uniform draws in the proposal, in [0, 1], so that every text can be reached,
            also with ``top_k``.
        block: Positions that are redrawn in one step, drawn uniformly.
        n_chains: C.
        fill: First fill of an empty text: by the model in "random" order or "left-to-right", or "uniform" tokens.
        seed: Seed; equal seeds give equal runs.

    Raises:
        TypeError: A model that is no module, a number that is none.
        ValueError: Numbers out of range, ids outside the vocabulary, no id of [MASK], nothing left to draw.

    Example:
        >>> from kexue.models import KexueConfig, KexueForMaskedLM
        >>> mlm = KexueForMaskedLM(KexueConfig(20, hidden_size=8, num_layers=1, num_heads=2, mask_token_id=0))
        >>> result = MLMGibbs(mlm, length=(3, 5), n_chains=2).run(steps=20, burn_in=10, thin=5)
        >>> len(result.samples), len(result.samples[0]), any(0 in text for text in result.samples[0])
        (2, 2, False)
        >>> result.acceptance is None
        True
    """

    def __init__(
        self,
        mlm: Any,
        length: int | tuple[int, int] = (8, 32),
        temperature: float = 1.0,
        top_k: int = 0,
        ban: str | Sequence[int] = "special",
        *,
        tokenizer: Any = None,
        mask_token_id: int | None = None,
        prefix: Sequence[int] = (),
        suffix: Sequence[int] = (),
        target: Any = None,
        eps: float = 0.05,
        block: int = 1,
        n_chains: int = 1,
        fill: str = "random",
        seed: int = 0,
    ) -> None:
        low, high = length if isinstance(length, tuple | list) else (length, length)
        check_int("length", low, 1)
        check_int("length", high, low)
        check_int("block", block, 1)
        check_int("n_chains", n_chains, 1)
        check_int("seed", seed, 0)
        check_choice("fill", fill, _FILLS)
        check_real("eps", eps, minimum=0.0)
        if eps > 1:
            raise ValueError(f"eps must be at most 1; got {eps}")
        self.model = Conditionals(mlm, tokenizer, mask_token_id, temperature, top_k, ban)
        self.prefix, self.suffix = as_ids(prefix, "prefix"), as_ids(suffix, "suffix")
        for ids in (self.prefix, self.suffix):
            self._check_ids(ids)
        self.length, self.block, self.n_chains, self.fill, self.seed = (low, high), block, n_chains, fill, seed
        self.log_rho = None if target is None else log_rho_of(target)
        self.eps = float(eps) if target is not None else 0.0
        self._check_length(high)

    def _check_ids(self, ids: Ids) -> None:
        if ids and max(ids) >= self.model.vocab_size:
            raise ValueError(f"ids must be below the size of the vocabulary, {self.model.vocab_size}; got {max(ids)}")

    def _check_length(self, length: int) -> None:
        total, limit = length + len(self.prefix) + len(self.suffix), self.model.limit
        if limit is not None and total > limit:
            raise ValueError(
                f"a text of {total} tokens, prefix and suffix counted, exceeds the model's {limit} positions"
            )

    def run(
        self,
        init_ids: Any = None,
        steps: int = 1000,
        burn_in: int = 100,
        thin: int = 10,
        *,
        resume: GibbsResult | None = None,
        progress: bool | None = None,
    ) -> GibbsResult:
        """Run the chains.

        Args:
            init_ids: A text for all chains to start from, or one for each; special tokens in it stay where they are,
                [MASK] is filled first. None: empty texts of random lengths.
            steps: Steps of each chain.
            burn_in: Steps before anything is kept.
            thin: Every how many steps after that the texts are kept: n = (steps - burn_in) // thin.
            resume: The result of an interrupted run: goes on as if it had not been (same steps, burn-in and thinning).
            progress: Whether to show a bar; None: if standard error is a terminal.

        Returns:
            A :class:`GibbsResult`. Ctrl-C ends the run after the current step and keeps what there is.

        Raises:
            ValueError: Numbers out of range; a text that is too long, has nothing to change, or has rho = 0.
        """
        check_run(steps, burn_in, thin)
        with torch.no_grad(), evaluation(self.model.model):
            if resume is None:
                state = self._begin(init_ids)
                samples: list[list[Ids]] = [[] for _ in state.lengths]
                values: list[NDArray[np.float64]] = []
            else:
                if resume._run is None:
                    raise ValueError("resume must be a result of run(); this one holds no state to go on from")
                state, samples = resume._run.copy(), [list(texts) for texts in resume.samples]
                values = [] if resume.log_rho is None else list(resume.log_rho.T)
            label = "MLM Gibbs" if self.log_rho is None else "MLM proposals"
            with noted_interrupt() as interrupt, progress_bar(label, steps - state.steps, progress) as bar:
                try:
                    while state.steps < steps and not interrupt.came:
                        self._step(state)
                        if state.steps > burn_in and (state.steps - burn_in) % thin == 0:
                            for texts, text in zip(samples, self._texts(state), strict=True):
                                texts.append(text)
                            if state.rho is not None:
                                values.append(state.rho.copy())
                        bar.advance()
                except KeyboardInterrupt:  # a second Ctrl-C, or one raised by the target
                    pass
        chains = len(state.lengths)
        exact = self.log_rho is not None
        return GibbsResult(
            samples,
            (np.stack(values, 1) if values else np.empty((chains, 0))) if exact else None,
            state.accepted / max(1, state.steps * chains) if exact else None,
            self._texts(state),
            state.steps,
            state.steps < steps,
            state,
        )

    def _begin(self, init_ids: Any) -> _Run:
        """Chains at their starts, filled."""
        generator = torch.Generator().manual_seed(self.seed)
        special, mask = self.model.special, self.model.mask_id
        if init_ids is None:
            low, high = self.length
            sizes = torch.randint(low, high + 1, (self.n_chains,), generator=generator).tolist()
            hole = self.model.allowed[0] if mask is None else mask
            texts = [(hole,) * size for size in sizes]
            free = [[True] * size for size in sizes]
            empty = free
        else:
            texts = _starts(init_ids, self.n_chains)
            for text in texts:
                self._check_ids(text)
                self._check_length(len(text))
            empty = [[token == mask for token in text] for text in texts]
            free = [[token == mask or token not in special for token in text] for text in texts]
        least = min(map(sum, free))
        if least < self.block:
            raise ValueError(f"every text needs at least block = {self.block} tokens that may change; got {least}")
        rows = [self.prefix + text + self.suffix for text in texts]
        longest = max(map(len, rows))
        device, a = self.model.device, len(self.prefix)
        ids = torch.tensor([row + (self.model.pad_id,) * (longest - len(row)) for row in rows], device=device)
        real = torch.tensor([[t < len(row) for t in range(longest)] for row in rows], device=device)

        def wide(flags: list[list[bool]]) -> Tensor:
            padded = [[False] * a + row + [False] * (longest - a - len(row)) for row in flags]
            return torch.tensor(padded, device=device)

        state = _Run(ids, real, wide(free), [len(text) for text in texts], generator, None)
        self._fill(state, wide(empty))
        if self.log_rho is not None:
            self._check_support(state)
            state.rho = self.log_rho(self._texts(state))
            if not np.isfinite(state.rho).all():
                raise ValueError(
                    f"a chain must start where rho > 0; got log rho = {state.rho.min()} for "
                    f"{self._texts(state)[int(state.rho.argmin())]}; give init_ids"
                )
        return state

    def _check_support(self, state: _Run) -> None:
        """A token that is never proposed could be left but not come back: every such move would be refused."""
        stuck = state.free & self.model._ban[state.ids]
        if bool(stuck.any()):
            raise ValueError(
                f"a start must hold no banned token where tokens may change; got {state.ids[stuck][0].item()}"
            )

    def _fill(self, state: _Run, empty: Tensor) -> None:
        """Put a token into every empty place."""
        if not bool(empty.any()):
            return
        generator, device = state.generator, state.ids.device
        if self.fill == "uniform":
            allowed = torch.tensor(self.model.allowed, device=device)
            drawn = torch.randint(len(allowed), empty.shape, generator=generator).to(device)
            state.ids[empty] = allowed[drawn][empty]
            return
        keys = torch.rand(empty.shape, generator=generator, dtype=torch.float64).to(device)
        if self.fill == "left-to-right":
            keys = torch.arange(empty.shape[1], device=device, dtype=torch.float64).expand(empty.shape) / empty.shape[1]
        order = keys.masked_fill(~empty, 2.0).argsort(1)
        counts = empty.sum(1)
        for k in range(int(counts.max())):
            rows = (counts > k).nonzero()[:, 0]
            place = order[rows, k : k + 1]
            log_p = self.model.log_probs(state.ids[rows], state.real[rows], place, empty[rows])
            u = torch.rand((len(rows), 1), generator=generator, dtype=torch.float64).to(device)
            state.ids[rows] = state.ids[rows].scatter(1, place, pick(log_p, u))
            empty[rows] = empty[rows].scatter(1, place, False)

    def _texts(self, state: _Run) -> list[Ids]:
        a = len(self.prefix)
        return [tuple(row[a : a + n]) for row, n in zip(state.ids.tolist(), state.lengths, strict=True)]

    def _log_q(self, ids: Tensor, real: Tensor, places: Tensor) -> Tensor:
        """Proposal (C, k, V) at the places, mixed with uniform draws."""
        log_p = self.model.log_probs(ids, real, places)
        if self.eps == 0:
            return log_p
        uniform = torch.zeros_like(self.model._ban, dtype=torch.float64).masked_fill(self.model._ban, -math.inf)
        uniform -= math.log(len(self.model.allowed))
        mixed = uniform + math.log(self.eps)
        if self.eps == 1:
            return mixed.expand(log_p.shape)
        return torch.logaddexp(log_p.double() + math.log1p(-self.eps), mixed)

    def _law(self, ids: Tensor, real: Tensor, places: Tensor) -> NDArray[np.float64]:
        """The same in float64, as ``pick`` draws from it: probabilities of a float32 model sum to 1 up to 1e-7 only."""
        return self._log_q(ids, real, places).double().log_softmax(-1).cpu().numpy()

    def _step(self, state: _Run) -> None:
        """One step of every chain."""
        device, generator, chains = state.ids.device, state.generator, len(state.lengths)
        keys = torch.rand(state.free.shape, generator=generator, dtype=torch.float64).to(device)
        places = keys.masked_fill(~state.free, -1.0).topk(self.block, 1).indices
        u = torch.rand((chains, self.block), generator=generator, dtype=torch.float64).to(device)
        log_q = self._log_q(state.ids, state.real, places)
        drawn = pick(log_q, u)
        new = state.ids.scatter(1, places, drawn)
        if self.log_rho is None or state.rho is None:
            state.ids = new
        else:
            threshold = torch.log1p(-torch.rand(chains, generator=generator, dtype=torch.float64)).numpy()
            there = log_q.gather(-1, drawn[..., None]).double().sum((1, 2))
            if self.model.one_pass and self.block > 1:
                log_q = self._log_q(new, state.real, places)
            back = log_q.gather(-1, state.ids.gather(1, places)[..., None]).double().sum((1, 2))
            a = len(self.prefix)
            texts = [tuple(row[a : a + n]) for row, n in zip(new.tolist(), state.lengths, strict=True)]
            rho = self.log_rho(texts)
            taken = threshold < rho - state.rho + (back - there).cpu().numpy()
            taken &= rho > -np.inf
            state.ids = torch.where(torch.from_numpy(taken).to(device)[:, None], new, state.ids)
            state.rho = np.where(taken, rho, state.rho)
            state.accepted += int(taken.sum())
        state.steps += 1

    def transitions(self, state: Ids) -> list[tuple[Ids, float]]:
        """The exact law of one step from a text: what :func:`kexue.generation.transition_matrix` needs.

        Memory and time grow as (choices of places) x V^block: for small vocabularies.

        Args:
            state: Token ids without prefix and suffix.

        Returns:
            Next texts with their probabilities.

        Raises:
            ValueError: As :meth:`run`.
        """
        with torch.no_grad(), evaluation(self.model.model):
            return self._transitions(as_ids(state))

    def _transitions(self, text: Ids) -> list[tuple[Ids, float]]:
        self._check_ids(text)
        a, special = len(self.prefix), self.model.special
        free = [t for t, token in enumerate(text) if token not in special]
        if len(free) < self.block:
            raise ValueError(f"a text needs at least block = {self.block} tokens that may change; got {len(free)}")
        choices = list(combinations(free, self.block))
        device = self.model.device
        places = torch.tensor(choices, device=device) + a
        row = torch.tensor([self.prefix + text + self.suffix], device=device)
        real = torch.ones_like(row, dtype=torch.bool)
        # One text at a time where _accept asks for y so: in float32 the size of a batch changes the last digits.
        size = 1 if self.model.one_pass else len(choices)
        laws = [self._law(row.expand(len(p), -1), real.expand(len(p), -1), p) for p in places.split(size)]
        found: list[tuple[Ids, float]] = []
        for places_of, law in zip(choices, np.concatenate(laws), strict=True):
            for filling in product(self.model.allowed, repeat=self.block):
                there = sum(law[k, token] for k, token in enumerate(filling))
                if there == -math.inf:
                    continue
                new = list(text)
                for place, token in zip(places_of, filling, strict=True):
                    new[place] = token
                q = math.exp(there) / len(choices)
                found.append((tuple(new), q * self._accept(text, tuple(new), places_of, law, float(there))))
        staying = 1.0 - math.fsum(p for _, p in found)
        return [*found, (text, max(0.0, staying))]

    def _accept(self, x: Ids, y: Ids, places: tuple[int, ...], law: NDArray[np.float64], there: float) -> float:
        """Probability that a proposed text is taken."""
        if self.log_rho is None:
            return 1.0
        rho_x, rho_y = self.log_rho([x, y])
        if rho_x == -math.inf:
            raise ValueError(f"a chain must be where rho > 0; got log rho = -inf for {x}")
        if self.model.one_pass and self.block > 1:
            row = torch.tensor([self.prefix + y + self.suffix], device=self.model.device)
            where = torch.tensor([places], device=self.model.device) + len(self.prefix)
            law = self._law(row, torch.ones_like(row, dtype=torch.bool), where)[0]
        back = float(sum(law[k, x[place]] for k, place in enumerate(places)))
        if rho_y == -math.inf or back == -math.inf:
            return 0.0
        return math.exp(min(0.0, rho_y - rho_x + back - there))


def _starts(init_ids: Any, chains: int) -> list[Ids]:
    """The start of every chain."""
    if hasattr(init_ids, "tolist"):
        init_ids = init_ids.tolist()
    if not isinstance(init_ids, list | tuple):
        raise TypeError(f"init_ids must be a text of token ids, or a list of such; got {type(init_ids).__name__}")
    if init_ids and hasattr(init_ids[0], "__index__"):
        return [as_ids(init_ids, "init_ids")] * chains
    texts = as_states(init_ids)
    if len(texts) == 1:
        return texts * chains
    if len(texts) != chains and chains != 1:
        raise ValueError(f"init_ids must hold one text, or one for each of {chains} chains; got {len(texts)}")
    if not texts:
        raise ValueError("init_ids must hold at least one text; got none")
    return texts
