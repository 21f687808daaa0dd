"""CGMH: constrained sentences by Metropolis-Hastings over words (CGMH:带约束的文本采样).

Source: 科学空间 8194 (【搜出来的文本】(四)通过增、删、改来用词造句), under article 8062; Miao et al.,
https://arxiv.org/abs/1811.10996.

A step draws an operation (insert, delete, replace; also swap), a place, and for a new word one of the candidates of
that place, y ~ q(. | context). The move is accepted with min(1, A), else the state stays and counts again:

    A_replace = rho(y) q(x) / (rho(x) q(y))                              x, y at the same place, q of the same context
    A_insert  = p_del rho(y) slots(x) / (p_ins rho(x) deletable(y) q(y))
    A_delete  = p_ins rho(y) deletable(x) q(x) / (p_del rho(x) slots(y))

so that the stationary law is proportional to rho over the sentences in which the keywords stand where they are tracked.
What differs from the published code, whose stationary law is another one (total variation .21 to .42 on a toy):

- slots and deletable tokens are counted with the keywords protected, and no word is put inside a keyword;
- the candidates are a function of the context, never of the word that stands there, mixed with eps of the uniform law;
- [MASK] and other special tokens are no candidates; scores are log-softmaxes, nothing is added inside a logarithm;
- an impossible operation leaves the state and counts it; every acceptance is random, none is decided by a threshold.

Speed: C chains advance together. One proposal pass gives q in both directions, the target's model runs once, on new
states only, from the edit on (``_scoring.py``); with an n-gram target all of it is compiled (``_ngram_chain.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from kexue._checks import check_int, check_real
from kexue._progress import progress as progress_bar
from kexue.generation._cgmh_setup import (
    allowed_ids,
    check_operations,
    choose_ranker,
    default_operations,
    first_states,
    length_bounds,
)
from kexue.generation._cgmh_step import Chains
from kexue.generation._edits import DELETE, INSERT, REPLACE, SWAP, Batch, Edits, Floats, Ints
from kexue.generation._interrupt import noted_interrupt
from kexue.generation._ngram_chain import TableChain
from kexue.generation._scoring import CausalScorer, TargetScorer, token_terms
from kexue.generation._slots import Candidates, CausalRanker, Context, contexts_of, select
from kexue.generation._states import Ids
from kexue.generation.cgmh_result import CGMHResult, Recorder
from kexue.generation.constraints import keywords_of
from kexue.generation.targets import Target
from kexue.generation.transition import check_run

__all__ = ["CGMH"]

_MEMO = 2**25  # float64 numbers of remembered proposals: 256 MiB


@dataclass(frozen=True)
class _Move:
    """An edit: the new state, the probability of its being proposed, and what its acceptance is multiplied by."""

    ids: Ids
    starts: tuple[int, ...]
    chance: float
    log_hastings: float
    op: int
    position: int


class CGMH:
    """Sample sentences from an unnormalised law by inserting, deleting and replacing words; exact.

    A chain's state is the sentence and where its keywords stand (nothing touches them); with keywords it is written
    (ids, starts), else ids. Over these states the stationary law is proportional to rho(ids): a sentence in which the
    keywords can be found in two ways counts twice.

    Args:
        target: The law, a :class:`kexue.generation.Target`. The keywords are those of its constraint; the rest of the
            constraint is asked for every new state.
        proposal: What ranks the words for a place. A masked language model (or a one-pass one): one forward pass for
            all chains. A callable: ``list of (left ids, right ids) -> (N, V)`` log-scores, a function of the context.
            None: the target's language model, p(y | left context); for a language model that is a plain function the
            probabilities of the whole sentence with each allowed token.
        vocab: Allowed ids (or their number) of words that are not keywords. None: all that the model knows except
            special tokens. The mask token, BOS and EOS of the target and the tokenizer's special tokens are never
            among them.
        max_length: Greatest number of tokens. None: that of a LengthBetween in the constraint, else 32.
        min_length: Least number of tokens. None: that of a LengthBetween in the constraint, else 1.
        n_chains: C, the number of chains.
        candidates: K, how many words a place considers apart from the uniform part.
        eps: Share of the uniform law over the allowed ids in [0, 1]. With 0 some sentences may be out of reach.
        seed: Of all random numbers: an integer, or a numpy Generator.
        operations: Probabilities of "insert", "delete", "replace", "swap" (exchanges a keyword, or without keywords any
            word, with another word or keyword) and "skip", with sum 1. None: a third for each of the first three; .3
            each and .1 for "swap" where two or more keywords may change their order.
        reweight: Draw among the K candidates by the probability of the whole sentence, as the article does: K more
            sentences to score for each step, a higher acceptance.
        screen: A first stage that a move must pass before log rho is computed (delayed acceptance); the stationary law
            stays the same. "next": the target's own causal model, the factors of the edited token and of the one after
            it; one token is run instead of the rest of the sentence. Or a cheap approximation of log rho, ``list of
            ids -> (N,)``, such as an n-gram :class:`Target`, finite where rho > 0. None: one stage.
        mask_token_id: Mask token of the proposal. None: from its configuration or the target's tokenizer.
        prefix: Ids before every text in the input of the proposal; None: the tokenizer's [CLS], if it has one.
        suffix: Ids after every text likewise; None: the tokenizer's [SEP].

    Raises:
        TypeError: A proposal that is not callable, a number that is none.
        ValueError: K < 1, eps outside [0, 1], keywords longer than ``max_length``, an empty vocabulary, probabilities
            that do not sum to 1, no mask token.

    Reference:
        Scientific Spaces, article 8194; CGMH, https://arxiv.org/abs/1811.10996.

    Example:
        >>> from kexue.generation import ContainsKeywords, Target, transition_matrix
        >>> target = Target(lambda texts: [-0.5 * len(t) for t in texts], constraint=ContainsKeywords([[2]]))
        >>> sampler = CGMH(target, vocab=3, max_length=3, n_chains=2, seed=1)
        >>> states = sampler.states()
        >>> states[:2], len(states)
        ([((2,), (0,)), ((2, 0), (0,))], 34)
        >>> pi = np.exp(target.log_rho([ids for ids, _ in states]))
        >>> bool(abs(pi @ transition_matrix(sampler, states) - pi).max() < 1e-12 * pi.sum())
        True
        >>> result = sampler.run([2], steps=500, burn_in=100, thin=10, progress=False)
        >>> result.log_rho.shape, all(2 in ids for chain in result.samples for ids in chain)
        ((2, 40), True)
    """

    def __init__(
        self,
        target: Target,
        proposal: nn.Module | Callable[[list[Context]], Any] | None = None,
        vocab: int | Sequence[int] | None = None,
        max_length: int | None = None,
        min_length: int | None = None,
        n_chains: int = 1,
        candidates: int = 64,
        eps: float = 0.05,
        seed: int | np.random.Generator = 0,
        *,
        operations: Mapping[str, float] | None = None,
        reweight: bool = False,
        screen: Callable[[list[Ids]], Any] | str | None = None,
        mask_token_id: int | None = None,
        prefix: Sequence[int] | None = None,
        suffix: Sequence[int] | None = None,
    ) -> None:
        if not isinstance(target, Target):
            raise TypeError(f"target must be a kexue.generation.Target; got {type(target).__name__}")
        if proposal is not None and not callable(proposal):
            raise TypeError(f"proposal must be callable or None; got {type(proposal).__name__}")
        if screen is not None and screen != "next" and not callable(screen):
            raise TypeError(f"screen must be callable, 'next' or None; got {screen!r}")
        check_int("n_chains", n_chains, 1)
        check_int("candidates", candidates, 1)
        check_real("eps", eps, minimum=0.0)
        if eps > 1:
            raise ValueError(f"eps must be in [0, 1]; got {eps!r}")
        self.target, self.proposal, self.n_chains, self.seed = target, proposal, n_chains, seed
        self.candidates, self.eps, self.reweight, self.screen = candidates, float(eps), bool(reweight), screen
        words = keywords_of(target.constraint)
        keywords = () if words is None else words.keywords
        low, high = length_bounds(target, min_length, max_length, keywords)
        self.edits = Edits(keywords, bool(words is not None and words.ordered), low, high)
        if operations is None:
            operations = default_operations(self.edits)
        self.operations = check_operations(operations)
        self.vocab = np.array(allowed_ids(target, proposal, vocab, mask_token_id), np.int64)
        self.column = np.full(int(self.vocab.max()) + 1, -1, np.int64)
        self.column[self.vocab] = np.arange(len(self.vocab))
        self._rank = choose_ranker(target, proposal, self.vocab, mask_token_id, prefix, suffix)
        self._stable = not isinstance(target.lm if proposal is None else proposal, nn.Module)
        self.log_op = np.log(np.maximum(self.operations, 1e-300))
        self.log_op[self.operations == 0] = -np.inf
        self.op_edges = np.cumsum(self.operations)
        self.op_edges[self.op_edges >= self.op_edges[-1] - 1e-15] = (
            2.0  # rounding never draws an operation of probability 0
        )
        self._memo: dict[Context, Floats] = {}
        self._terms: dict[Ids, list[float]] = {}

    # -- the law of one step ------------------------------------------------------------------------------------------

    def law_of(self, hole: Batch, position: Ints, rows: Ints | None) -> Candidates:
        """The law q of each hole."""
        weigh = None
        if self.reweight or getattr(self._rank, "reweights", False):
            weigh = lambda columns: self._sentences(hole, position, columns)  # noqa: E731
        return select(self._rank(hole, position, rows), self.candidates, self.eps, weigh, self._stable)

    def _sentences(self, hole: Batch, position: Ints, columns: Ints) -> Floats:
        """(N, K) log p of the sentences with each candidate in its hole."""
        texts = [
            (*left, v, *right)
            for (left, right), row in zip(contexts_of(hole, position), columns, strict=True)
            for v in self.vocab[row].tolist()
        ]
        return self.target.log_p(texts).reshape(columns.shape)

    def log_hastings(self, op: Ints, lengths: Ints, log_q_old: Floats, log_q_new: Floats) -> Floats:
        """(N,) log of what the acceptance multiplies rho(y) / rho(x) by; ``lengths`` of x."""
        edits, log_op = self.edits, self.log_op
        with np.errstate(divide="ignore", invalid="ignore"):
            slots, free = np.log(edits.slots(lengths)), np.log(edits.deletable(lengths))
            grown = log_op[DELETE] - log_op[INSERT] + slots - np.log(edits.deletable(lengths + 1)) - log_q_new
            shrunk = log_op[INSERT] - log_op[DELETE] + free - np.log(edits.slots(lengths - 1)) + log_q_old
            return np.where(op == INSERT, grown, np.where(op == DELETE, shrunk, log_q_old - log_q_new))

    def surrogate(self, texts: list[Ids]) -> Floats:
        """(N,) values of the user's screen."""
        values = np.asarray(self.screen(texts), dtype=np.float64)  # type: ignore[operator,misc]
        if values.shape != (len(texts),) or np.isnan(values).any() or (values == np.inf).any():
            raise ValueError(f"screen must return ({len(texts)},) numbers below +inf; got {values!r}")
        return values

    # -- the whole law, for enumerable targets ------------------------------------------------------------------------

    def states(self, vocab: int | Sequence[int] | None = None, max_length: int | None = None) -> list[Any]:
        """All states with rho > 0, for :func:`kexue.generation.transition_matrix`.

        Args:
            vocab: Ids (or their number) of words that are not keywords; None: those of the sampler.
            max_length: Greatest number of tokens; None: that of the sampler.

        Returns:
            List of (ids, starts), or of ids if there are no keywords. Their number grows as V^T.

        Raises:
            ValueError: Ids or a length that the sampler does not allow.
        """
        given = self.vocab.tolist() if vocab is None else vocab
        found = range(int(given)) if isinstance(given, int | np.integer) else list(given)
        wrong = sorted(set(found) - set(self.vocab.tolist()))
        if wrong:
            raise ValueError(f"vocab must be among the {len(self.vocab)} allowed ids; got {wrong[0]}")
        high = self.edits.high if max_length is None else max_length
        check_int("max_length", high, 0)
        if high > self.edits.high:
            raise ValueError(f"max_length must be at most {self.edits.high}, that of the sampler; got {high}")
        listed = list(self.edits.enumerate(list(dict.fromkeys(found)), high))
        rho = self.target.log_rho([ids for ids, _ in listed])
        kept = [state for state, value in zip(listed, rho, strict=True) if value > -np.inf]
        return kept if self.edits.keywords else [ids for ids, _ in kept]

    def transitions(self, state: Any) -> list[tuple[Any, float]]:
        """All next states of one step with their probabilities, refused mass included; see :meth:`states`.

        Args:
            state: (ids, starts), or ids if there are no keywords.

        Returns:
            List of (next state, probability) with sum 1; a state may come more than once.

        Raises:
            ValueError: A state outside the chain's space.
        """
        ids, starts = self._pair(state)
        moves = [m for m in self._moves(ids, starts) if m.chance > 0 and (m.ids, m.starts) != (ids, starts)]
        texts = [ids] + [move.ids for move in moves]
        rho = self.target.log_rho(texts)
        if not np.isfinite(rho[0]):
            raise ValueError(f"a chain must be where rho > 0; got log rho = {rho[0]} for {state!r}")
        hastings = np.array([move.log_hastings for move in moves])
        gain = rho[1:] - rho[0]
        passed = self._accepted(hastings, gain, self._first_stage(texts, moves))
        found, staying = [], 1.0
        for move, probability in zip(moves, passed.tolist(), strict=True):
            found.append((self._state(move.ids, move.starts), move.chance * probability))
            staying -= move.chance * probability
        return [*found, (self._state(ids, starts), max(0.0, staying))]

    def _first_stage(self, texts: list[Ids], moves: list[_Move]) -> Floats | None:
        """(N,) what a screen takes for the gain of log rho from texts[0] to each other; None without one."""
        if self.screen is None:
            return None
        if self.screen != "next":
            values = self.surrogate(texts)
            return values[1:] - values[0]
        fresh = [text for text in dict.fromkeys(texts) if text not in self._terms]
        self._terms.update(zip(fresh, token_terms(self.target, fresh), strict=True))
        old = [*self._terms[texts[0]], 0.0, 0.0]
        gains = self.target.log_sim(texts)[1:] - self.target.log_sim(texts[:1])
        for k, move in enumerate(moves):
            if move.op == SWAP:
                continue
            i, new = move.position, [*self._terms[texts[k + 1]], 0.0, 0.0]
            gain = new[i] - old[i] + (new[i + 1] if move.op != DELETE else 0.0)
            gains[k] += self.target.gamma * (gain - (old[i + 1] if move.op != INSERT else 0.0))
        return gains

    @staticmethod
    def _accepted(hastings: Floats, gain: Floats, first: Floats | None) -> Floats:
        """(N,) probability of acceptance, of both stages if there are two."""
        with np.errstate(invalid="ignore"):
            if first is None:
                exponent = np.minimum(hastings + gain, 0.0)
            else:
                exponent = np.minimum(hastings + first, 0.0) + np.minimum(gain - first, 0.0)
            return np.where(np.isnan(exponent), 0.0, np.exp(exponent))

    def _moves(self, ids: Ids, starts: tuple[int, ...]) -> Iterator[_Move]:
        """All edits of a state."""
        edits, one = self.edits, Batch.of([(ids, starts)], self.edits.high, len(self.edits.keywords))
        chance = self.operations
        for op in (INSERT, DELETE, REPLACE):
            if chance[op] == 0 or not edits.possible(np.array([op]), one.lengths)[0]:
                continue
            mask = edits.slot_mask(one)[0] if op == INSERT else edits.free_mask(one)[0]
            places = np.flatnonzero(mask)
            batch, ops = one.rows(np.zeros(len(places), np.int64)), np.full(len(places), op)
            hole = edits.open_hole(batch, ops, places)
            log_q = self._remembered(hole, places)
            each = chance[op] / len(places)
            index = np.arange(len(places))
            old = np.zeros(len(places)) if op == INSERT else log_q[index, self._columns(batch.ids[index, places])]
            if op == DELETE:
                new = edits.close(hole, places)
                factor = self.log_hastings(ops, batch.lengths, old, old)
                for k, text in enumerate(new.tuples()):
                    yield _Move(text, tuple(new.starts[k].tolist()), each, float(factor[k]), op, int(places[k]))
                continue
            for column, token in enumerate(self.vocab.tolist()):
                factor = self.log_hastings(ops, batch.lengths, old, log_q[:, column])
                new = edits.fill(hole, places, np.full(len(places), token))
                chances = each * np.exp(log_q[:, column])
                for k, text in enumerate(new.tuples()):
                    where = tuple(new.starts[k].tolist())
                    yield _Move(text, where, float(chances[k]), float(factor[k]), op, int(places[k]))
        if chance[SWAP] > 0:
            for a, b, share in edits.swap_pairs(len(ids), starts):
                moved = edits.swap(ids, starts, a, b)
                if moved is not None:
                    yield _Move(*moved, chance[SWAP] * share, 0.0, SWAP, 0)

    def _columns(self, tokens: Ints) -> Ints:
        """Columns of tokens that are not keywords; ids that are not allowed are refused before."""
        return self.column[tokens]

    def _remembered(self, hole: Batch, position: Ints) -> Floats:
        """(N, V') log q, the same numbers for the same context whichever state asks."""
        contexts = contexts_of(hole, position)
        fresh = [i for i, c in enumerate(contexts) if c not in self._memo]
        if fresh:
            if len(self._memo) * len(self.vocab) > _MEMO:
                self._memo.clear()
                fresh = list(range(len(contexts)))
            rows = np.array(fresh)
            for i, law in zip(fresh, self.law_of(hole.rows(rows), position[rows], None).dense(), strict=True):
                self._memo[contexts[i]] = law
        return np.stack([self._memo[c] for c in contexts])

    def _pair(self, state: Any) -> tuple[Ids, tuple[int, ...]]:
        """A state as (ids, starts), checked."""
        (pair,) = first_states(state, 1, self.edits, self.vocab, keywords_of(self.target.constraint), None)
        return pair

    def _state(self, ids: Ids, starts: tuple[int, ...]) -> Any:
        return (ids, starts) if self.edits.keywords else ids

    # -- running ------------------------------------------------------------------------------------------------------

    def run(
        self,
        init_ids: Any = None,
        steps: int = 1000,
        burn_in: int = 100,
        thin: int = 10,
        progress: bool | None = None,
        trace: bool = True,
    ) -> CGMHResult:
        """Run the chains.

        Args:
            init_ids: Where to start: ids for all chains, a list of C such, or states (ids, starts). None: the keywords
                one after the other, filled up with random words to the least length.
            steps: Steps of each chain.
            burn_in: Steps before anything is kept.
            thin: Every how many steps after that the states are kept: n = (steps - burn_in) // thin.
            progress: Whether to show a bar; None: if standard error is a terminal.
            trace: Record the accepted edits (48 bytes each).

        Returns:
            A :class:`CGMHResult`. Ctrl-C ends the run and keeps what there is. A second call starts anew, with the
            same random numbers if ``seed`` is an integer.

        Raises:
            TypeError: A start that is no sequence of ids.
            ValueError: A start with rho = 0, without the keywords, too short or too long, or with words that are not
                allowed; numbers out of range.
        """
        check_run(steps, burn_in, thin)
        generator = np.random.default_rng(self.seed)
        words = keywords_of(self.target.constraint)
        pairs = first_states(init_ids, self.n_chains, self.edits, self.vocab, words, generator)
        recorder = Recorder(self.edits, self.n_chains, steps, burn_in, thin, trace)
        if TableChain.fits(self):
            return TableChain(self).run(pairs, recorder, generator, progress)
        chains = Chains(self, pairs, self._scorer(), recorder, generator)
        with progress_bar("CGMH", steps, progress) as bar, noted_interrupt() as interrupt:
            for step in range(1, steps + 1):
                chains.advance(step)
                recorder.keep(step, chains.batch, chains.log_rho)
                bar.advance(1, f"best {recorder.best_log_rho:.2f}" if step % 16 == 0 else None)
                if interrupt.came:
                    recorder.interrupted = True
                    break
        return recorder.result(chains.batch)

    def step(self, state: Any, generator: np.random.Generator) -> Any:
        """One step of one chain, for :func:`kexue.generation.run_chain`; :meth:`run` is the fast way.

        Args:
            state: (ids, starts), or ids if there are no keywords.
            generator: Source of random numbers.

        Returns:
            The next state.

        Raises:
            ValueError: A state outside the chain's space.
        """
        scorer = self._scorer() if self.screen == "next" else TargetScorer(self.target)
        if type(scorer) is TargetScorer and isinstance(self._rank, CausalRanker):
            self._rank.kept = None
        recorder = Recorder(self.edits, 1, 1, 0, 1, False)
        chains = Chains(self, [self._pair(state)], scorer, recorder, generator)
        chains.advance(1)
        return self._state(chains.batch.tuples()[0], tuple(chains.batch.starts[0].tolist()))

    def continues(self) -> bool:
        """Whether the target's model can go on from the edit: what ``screen="next"`` needs."""
        return self.target.gamma > 0 and CausalScorer.fits(self.target)

    def _scorer(self) -> TargetScorer:
        """What scores the chains of a run; a causal model continues from the edit where it can."""
        if isinstance(self._rank, CausalRanker):
            self._rank.kept = None
        if not self.continues():
            return TargetScorer(self.target)
        scorer = CausalScorer(self.target, self.edits.high)
        if isinstance(self._rank, CausalRanker):
            self._rank.kept = scorer.log_slots
        return scorer
