"""The law that a text is searched or sampled under (从文本生成到搜索采样): fluency, relation, constraint.

Source: 科学空间 8062 (【搜出来的文本】(一)从文本生成到搜索采样), 8194.

    log rho(x) = gamma log p(x) + log sim(x) + log chi(x)

p is a language model, sim >= 0 a soft relation to what is wanted, chi a hard constraint (log chi is 0 or -inf). Only
differences of log rho matter to a sampler: it need not be normalised, and a gamma below 1 favours longer texts.

Law of a causal language model, written out:

    log p(x) = log p(x_1 | BOS) + sum_{t >= 2} log p(x_t | BOS, x_<t) + log p(EOS | BOS, x)

BOS and EOS are the ids of the arguments, else those of the model's configuration, else those of the tokenizer. Without
BOS the first factor is left out (every first token is as likely), without EOS the last (a text that stops in the middle
of a sentence costs nothing). Ids of a configuration that lie outside the vocabulary count as missing: the defaults of
GPT-2's configuration do so in every small model.

What differs from the published scripts: a score is computed once for each text and kept (they score the current text
anew in every step), many texts are scored in one batch sorted by length, log p comes from logits and a logsumexp in
float32 at least, never from log(p + 1e-8).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from kexue._checks import check_int, check_real
from kexue.generation._states import Ids, as_ids, as_states, evaluation, forward_options, logits_of, vector
from kexue.generation.constraints import Constraint

__all__ = ["Target"]

_MAX_LOGITS = 2**26  # of one forward pass: 256 MiB in float32


class Target:
    """An unnormalised law rho(x) = p(x)^gamma sim(x) chi(x) over token sequences, in logarithms.

    Args:
        lm: A causal language model (a module whose ``forward(input_ids)`` gives logits (B, T, V):
            :class:`kexue.models.KexueForCausalLM`, any causal model of transformers), or a callable that takes a list
            of id tuples and returns their (N,) log-probabilities. It is scored in evaluation mode, without gradients.
        sim: ``ids -> number >= 0``, a soft relation; 0 forbids a text. An object that also has
            ``batch(list of ids) -> (N,)`` is given all texts at once. None: 1.
        constraint: ``ids -> bool``, see :mod:`kexue.generation.constraints`. None: everything is allowed. It is asked
            first: forbidden texts are never scored.
        gamma: Exponent of p, at least 0.
        tokenizer: Turns the strings of the constraint into ids, and knows BOS and EOS where the model does not.
        bos_id: Token before every text. "auto": as in the module's description; None: there is none.
        eos_id: Token after every text; likewise.
        batch_size: Largest number of texts in one forward pass; fewer where the logits would exceed 256 MiB.
        cache_size: Number of texts whose scores are kept; the oldest go first. 0 keeps none. The scores are those of
            the model as it was: call :meth:`clear` after training it further.

    Raises:
        TypeError: ``lm``, ``sim`` or ``constraint`` that is not callable; a number that is none.
        ValueError: gamma < 0, a BOS or EOS outside the vocabulary, strings to be turned into ids without a tokenizer.

    Example:
        >>> from kexue.generation import ContainsKeywords
        >>> target = Target(lambda texts: [-float(len(text)) for text in texts], constraint=ContainsKeywords([[3]]))
        >>> target.log_rho([(1, 3), (1, 2)])
        array([ -2., -inf])
    """

    def __init__(
        self,
        lm: nn.Module | Callable[[list[Ids]], Any],
        sim: Callable[[Ids], float] | None = None,
        constraint: Callable[[Ids], bool] | None = None,
        gamma: float = 1.0,
        tokenizer: Any = None,
        *,
        bos_id: int | str | None = "auto",
        eos_id: int | str | None = "auto",
        batch_size: int = 256,
        cache_size: int = 100_000,
    ) -> None:
        for name, part in (("lm", lm), ("sim", sim), ("constraint", constraint)):
            if not callable(part) and (part is not None or name == "lm"):
                raise TypeError(f"{name} must be callable; got {type(part).__name__}")
        check_real("gamma", gamma, minimum=0.0)
        check_int("batch_size", batch_size, 1)
        check_int("cache_size", cache_size, 0)
        self.lm, self.sim, self.gamma, self.tokenizer = lm, sim, float(gamma), tokenizer
        self.batch_size, self.cache_size = batch_size, cache_size
        self.constraint = constraint.bind(tokenizer) if isinstance(constraint, Constraint) else constraint
        parts = getattr(self.constraint, "parts", (self.constraint,))
        for part in parts:
            _ = getattr(part, "keywords", None)  # strings without a tokenizer raise here, not in the thousandth step
        self.vocab_size = _vocabulary(lm)
        self.bos_id = self._special("bos", bos_id)
        self.eos_id = self._special("eos", eos_id)
        self._log_p: dict[Ids, float] = {}
        self._log_sim: dict[Ids, float] = {}
        #: Texts that the language model has scored so far, repeats from the cache not counted.
        self.evaluations = 0

    def _special(self, name: str, given: int | str | None) -> int | None:
        """The id of BOS or EOS, or None."""
        if given is None or (given == "auto" and not isinstance(self.lm, nn.Module)):
            return None  # a callable returns the whole log-probability by itself
        inside = range(self.vocab_size) if self.vocab_size is not None else None
        if given == "auto":
            for source in (getattr(self.lm, "config", None), self.tokenizer):
                found = getattr(source, f"{name}_token_id", None)
                for token in found if isinstance(found, list | tuple) else (found,):  # several ends: the first
                    if isinstance(token, int) and (inside is None or token in inside):
                        return token
            return None
        check_int(f"{name}_id", given, 0)
        if inside is not None and given not in inside:
            raise ValueError(f"{name}_id must be below the size of the vocabulary, {len(inside)}; got {given}")
        return int(given)

    def log_p(self, states: Sequence[Sequence[int]]) -> NDArray[np.float64]:
        """Log-probabilities of the language model alone, without gamma.

        Args:
            states: N sequences of token ids.

        Returns:
            (N,) float64.

        Raises:
            ValueError: An empty sequence without BOS, an id outside the vocabulary, NaN or +inf from the model.
        """
        return self._kept(self._log_p, as_states(states), self._score)

    def log_sim(self, states: Sequence[Sequence[int]]) -> NDArray[np.float64]:
        """Logarithms of the soft relation, 0 without one.

        Args:
            states: N sequences of token ids.

        Returns:
            (N,) float64.

        Raises:
            ValueError: A relation that is negative, NaN or infinite.
        """
        states = as_states(states)
        if self.sim is None:
            return np.zeros(len(states))
        return self._kept(self._log_sim, states, self._relate)

    def allowed(self, states: Sequence[Sequence[int]]) -> NDArray[np.bool_]:
        """Where chi is 1.

        Args:
            states: N sequences of token ids.

        Returns:
            (N,) bool.
        """
        states = as_states(states)
        chi = self.constraint
        return np.array([chi is None or bool(chi(state)) for state in states], dtype=bool)

    def log_rho(self, states: Sequence[Sequence[int]]) -> NDArray[np.float64]:
        """Gamma log p + log sim + log chi.

        Args:
            states: N sequences of token ids.

        Returns:
            (N,) float64; -inf for a text that is forbidden.

        Raises:
            TypeError: Something else than sequences of integers.
            ValueError: As :meth:`log_p` and :meth:`log_sim`.
        """
        states = as_states(states)
        allowed = self.allowed(states)
        rho = np.full(len(states), -np.inf)
        if allowed.any():
            some = [state for state, keep in zip(states, allowed, strict=True) if keep]
            value = self.log_sim(some)
            if self.gamma > 0:  # 0 * -inf would be NaN, and the model need not be asked
                value = value + self.gamma * self.log_p(some)
            rho[allowed] = value
        return rho

    def __call__(self, states: Sequence[Sequence[int]]) -> NDArray[np.float64]:
        """The same as :meth:`log_rho`: a target is a callable x -> log rho(x)."""
        return self.log_rho(states)

    def clear(self) -> None:
        """Forget the scores, for example after training the model further."""
        self._log_p.clear()
        self._log_sim.clear()

    def _kept(
        self, cache: dict[Ids, float], states: list[Ids], compute: Callable[[list[Ids]], NDArray[np.float64]]
    ) -> NDArray[np.float64]:
        """Values from the cache, the others computed once each."""
        fresh = [state for state in dict.fromkeys(states) if state not in cache]
        new = dict(zip(fresh, compute(fresh).tolist(), strict=True)) if fresh else {}
        values = np.array([new[s] if s in new else cache[s] for s in states], dtype=np.float64)
        cache.update(new)
        for state in tuple(islice(cache, max(0, len(cache) - self.cache_size))):  # the oldest
            del cache[state]
        return values

    def _relate(self, states: list[Ids]) -> NDArray[np.float64]:
        batch = getattr(self.sim, "batch", None)
        found = batch(states) if callable(batch) else [self.sim(state) for state in states]  # type: ignore[misc]
        values = vector(found, len(states), "sim")
        bad = ~(np.isfinite(values) & (values >= 0))
        if bad.any():
            raise ValueError(f"sim must be finite and at least 0; got {values[bad][0]} for {states[int(bad.argmax())]}")
        with np.errstate(divide="ignore"):
            return np.log(values)

    def _score(self, states: list[Ids]) -> NDArray[np.float64]:
        self.evaluations += len(states)
        lm = self.lm
        values = self._score_module(lm, states) if isinstance(lm, nn.Module) else vector(lm(states), len(states), "lm")
        bad = np.isnan(values) | (values == np.inf)
        if bad.any():
            raise ValueError(
                f"the language model gives log-probability {values[bad][0]} for {states[int(bad.argmax())]}; "
                "expected a finite number or -inf"
            )
        return values

    def _score_module(self, lm: nn.Module, states: list[Ids]) -> NDArray[np.float64]:
        for state in states:
            if self.vocab_size is not None and state and max(state) >= self.vocab_size:
                raise ValueError(f"token ids must be below the size of the vocabulary, {self.vocab_size}; got {state}")
            if not state and self.bos_id is None:
                raise ValueError("an empty text has no probability under a model without BOS; give bos_id")
        values = np.empty(len(states))
        order = sorted(range(len(states)), key=lambda i: len(states[i]))  # little padding in each batch
        with torch.no_grad(), evaluation(lm):
            while order:
                longest = max(1, len(states[order[min(len(order), self.batch_size) - 1]]) + 1)
                size = max(1, min(self.batch_size, _MAX_LOGITS // (longest * (self.vocab_size or 1))))
                chosen, order = order[:size], order[size:]
                values[chosen] = self._forward(lm, [states[i] for i in chosen])
        return values

    def _forward(self, lm: nn.Module, states: list[Ids]) -> NDArray[np.float64]:
        """Log-probabilities of one batch, padded on the right, where a causal model does not look."""
        head = () if self.bos_id is None else (self.bos_id,)
        tail = () if self.eos_id is None else (self.eos_id,)
        rows = [(*head, *state, *tail) for state in states]
        longest = max(map(len, rows))
        if longest < 2:  # single tokens, neither BOS nor EOS: every factor is left out
            return np.zeros(len(rows))
        device = next((p.device for p in lm.parameters()), torch.device("cpu"))
        ids = torch.tensor([row + (row[-1],) * (longest - len(row)) for row in rows], device=device)
        options = forward_options(lm)
        pad = getattr(getattr(lm, "config", None), "pad_token_id", None)
        lengths = torch.tensor([len(row) - 1 for row in rows], device=device)
        real = torch.arange(longest - 1, device=device) < lengths[:, None]
        if pad is not None and bool((ids[:, :-1] == pad).any()):  # some models would hide these tokens of the text
            options["attention_mask"] = real.long()
        try:
            logits = logits_of(lm(ids[:, :-1], **options))
        except IndexError as error:  # a table of positions that ends
            raise ValueError(f"the model refuses a text of {longest - 1} tokens: {error}") from error
        if logits.dtype in (torch.float16, torch.bfloat16):
            logits = logits.float()
        terms = logits.gather(-1, ids[:, 1:, None])[..., 0] - logits.logsumexp(-1)
        return terms.double().masked_fill(~real, 0.0).sum(-1).cpu().numpy()


def _vocabulary(lm: Any) -> int | None:
    """V of a model that says so."""
    size = getattr(getattr(lm, "config", None), "vocab_size", None)
    return size if isinstance(size, int) else None


def start_state(target: Target, ids: Any) -> Ids:
    """A start for a chain, checked: a text that the target forbids can never be left properly.

    Raises:
        ValueError: log rho is -inf.
    """
    state = as_ids(ids, "the start")
    if not np.isfinite(target.log_rho([state])[0]):
        raise ValueError(f"the start must have rho > 0; got log rho = -inf for {state}")
    return state
