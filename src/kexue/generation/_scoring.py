"""log rho of the states of many chains, new states only: a causal model continues from the edit, not from the start.

The keys and values of each chain's sentence are kept, and so are its hidden states and the log-probability of each
token. An edit at position i leaves all before i as it was. What stands at i is predicted by the hidden state of i - 1,
which is kept: the factor of the new token costs one row of the vocabulary matrix, the same row that ranks the
candidates when the target's model proposes. The model runs on the tokens from i on, and only for states that may be
accepted. Chains with similar numbers of tokens to go are run together, so that little is padding.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kexue.generation._edits import Batch, Floats, Ints
from kexue.generation._states import Ids, evaluation, logits_of
from kexue.generation.constraints import ContainsKeywords
from kexue.generation.targets import Target

_MAX_LOGITS = 2**24  # of one product with the vocabulary: 64 MiB in float32
_GROUP_WORK = 2**27  # multiplications that a further call of the model must save


class TargetScorer:
    """Scores whole sentences; for language models that are functions, and where prefixes cannot be kept."""

    def __init__(self, target: Target) -> None:
        self.target = target
        parts = getattr(target.constraint, "parts", (target.constraint,))
        # The kernel itself sees to the keywords.
        self._rest = [part for part in parts if part is not None and not isinstance(part, ContainsKeywords)]

    def begin(self, batch: Batch) -> Floats:
        """(C,) log rho of the first states; chain c is row c from now on."""
        return self.target.log_rho(batch.tuples())

    def score(self, rows: Ints, new: Batch, changed: Ints) -> Floats:
        """(N,) log rho of new states of the chains ``rows``, equal to the current ones before token ``changed``."""
        texts = new.tuples()
        log_rho = self.relations(texts)
        some = np.flatnonzero(np.isfinite(log_rho))
        if len(some) and self.target.gamma > 0:
            log_rho[some] += self.target.gamma * self.log_p(rows[some], new.rows(some), changed[some], some)
        return log_rho

    def relations(self, texts: list[Ids]) -> Floats:
        """(N,) log sim + log chi."""
        allowed = np.array([all(part(text) for part in self._rest) for text in texts], dtype=bool)
        values = np.full(len(texts), -np.inf)
        if self.target.sim is None:
            values[allowed] = 0.0
        elif allowed.any():
            values[allowed] = self.target.log_sim([t for t, ok in zip(texts, allowed, strict=True) if ok])
        return values

    def log_p(self, rows: Ints, new: Batch, changed: Ints, place: Ints) -> Floats:
        """(N,) log p of new states; ``place``: their index in the call of :meth:`score`."""
        return self.target.log_p(new.tuples())

    def keep(self, accepted: Ints) -> None:
        """Which of the states scored last (by index) their chains have moved to."""


@dataclass
class _Part:
    """What one forward pass has found, until it is known which of the new states are accepted.

    ``index`` (n,) of the states among those scored, ``begin`` (n,) and ``count`` (n,) of the tokens that were run,
    ``hidden`` (n, S, D) and, for each layer, keys and values (n, H, S, d).
    """

    index: Ints
    begin: Ints
    count: Ints
    hidden: Tensor
    layers: list[tuple[Tensor, Tensor]]


class CausalScorer(TargetScorer):
    """Scores with a causal module, from the first changed token on.

    Raises:
        ValueError: The model cannot be continued from kept keys and values; :meth:`fits` says so beforehand.
    """

    def __init__(self, target: Target, width: int) -> None:
        super().__init__(target)
        lm = target.lm
        if not isinstance(lm, nn.Module):
            raise ValueError(f"lm must be a module; got {type(lm).__name__}")
        self.lm, self.width = lm, width
        self.body: Any = lm.base_model
        self.head: Callable[[Tensor], Tensor] = _head(lm)
        self.device = next(lm.parameters()).device
        self.before = int(target.bos_id is not None)
        self.work = sum(p.numel() for p in self.body.parameters() if p.dim() > 1)
        self._layers: list[tuple[Tensor, Tensor]] = []
        self._slot: tuple[Ints, Tensor] | None = None
        self._parts: list[_Part] = []

    @staticmethod
    def fits(target: Target) -> bool:
        """Whether continuing from kept keys and values gives the model's own logits, tried on a few tokens."""
        lm = target.lm
        base = getattr(lm, "base_model", None)
        if not isinstance(lm, nn.Module) or not isinstance(base, nn.Module) or base is lm:
            return False
        names = set(inspect.signature(base.forward).parameters)
        if not {"attention_mask", "position_ids", "past_key_values", "use_cache"} <= names:
            return False
        try:
            head = _head(lm)
            size = target.vocab_size or 2
            device = next(lm.parameters()).device
            ids = (torch.arange(10, device=device) * 7 % size).view(2, 5)
            with torch.inference_mode(), evaluation(lm):
                whole = logits_of(lm(ids))
                first = base(ids[:, :3], use_cache=True)
                mask = torch.tensor([[1, 1, 0, 1, 1], [1, 1, 1, 1, 1]], device=device)
                places = torch.tensor([[2, 3], [3, 4]], device=device)
                tokens = torch.stack([ids[0, 2:4], ids[1, 3:5]])
                pairs = _pairs(first.past_key_values)
                hidden = base(
                    tokens, attention_mask=mask, position_ids=places, past_key_values=_cache(pairs), use_cache=True
                )[0]
                found = head(hidden)
            expected = torch.stack([whole[0, 2:4], whole[1, 3:5]])
            return found.shape == expected.shape and torch.allclose(
                found.float(), expected.float(), rtol=1e-2, atol=1e-2 if whole.dtype != torch.float32 else 1e-3
            )
        except (TypeError, ValueError, RuntimeError, AttributeError, IndexError):
            return False

    def begin(self, batch: Batch) -> Floats:
        """(C,) log rho; fills what is kept."""
        chains, places = len(batch), self.before + self.width
        self._layers, self._slot = [], None
        self.terms = np.zeros((chains, places + 1))
        rows = np.arange(chains)
        values = self.relations(batch.tuples())
        start = np.full(chains, -self.before)  # BOS, too, is run
        values = values + self.target.gamma * self._continue(rows, batch, start, np.arange(chains))
        self.keep(np.arange(chains))
        return values

    def log_slots(self, rows: Ints, position: Ints) -> Tensor:
        """(N, V) log-probabilities of what stands at ``position`` of chains (ascending), from kept hidden states.

        Without BOS nothing is known of the first token: all alike.
        """
        place = self._to(np.maximum(position + self.before - 1, 0))
        with torch.inference_mode():
            found = _wide(self.head(self.hidden[self._to(rows), place])).log_softmax(-1)
            if not self.before:
                found[self._to(position == 0)] = 0.0
        self._slot = (rows, found)
        return found

    def _to(self, x: Any) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(x)).to(self.device)

    def log_p(self, rows: Ints, new: Batch, changed: Ints, place: Ints) -> Floats:
        """(N,) log p: the kept factors before the edit, the factor at it, and those that follow."""
        return self._continue(rows, new, changed, place)

    def _continue(self, rows: Ints, new: Batch, changed: Ints, place: Ints) -> Floats:
        self._parts = []
        first = changed + self.before  # of the sequence with BOS
        ends = new.lengths + self.before
        eos = self.target.eos_id
        full = np.zeros((len(new), self.before + self.width + 1), np.int64)
        if self.before:
            full[:, 0] = self.target.bos_id
        full[:, self.before : -1] = new.ids
        index = np.arange(len(new))
        full[index, ends] = 0 if eos is None else eos
        terms = self.terms[rows].copy()
        terms[np.arange(terms.shape[1]) >= first[:, None]] = 0.0
        # The factor at the edit, from the hidden state before it.
        known = np.flatnonzero((first > 0) & ((first < ends) | (eos is not None)))
        if len(known):
            terms[known, first[known]] = self._at_edit(rows[known], changed[known], full[known, first[known]])
        todo = np.flatnonzero(ends > first)
        for group in self._groups(ends[todo] - first[todo]):
            self._run(todo[group], rows, full, first, ends, terms)
        used = np.arange(terms.shape[1]) <= (ends - (eos is None))[:, None]
        log_p: Floats = np.where(used, terms, 0.0).sum(1)
        self._scored = (rows, place, new, terms)
        return log_p

    def _at_edit(self, rows: Ints, position: Ints, tokens: Ints) -> Floats:
        """(N,) log-probability of the token at the edit, from the rows that ranked the candidates if there are any."""
        slot = self._slot
        if slot is not None and np.isin(rows, slot[0]).all():
            found = slot[1][self._to(np.searchsorted(slot[0], rows))]
        else:
            found = self.log_slots(rows, position)
        values: Floats = found.gather(1, self._to(tokens)[:, None])[:, 0].double().cpu().numpy()
        return values

    def _groups(self, counts: Ints) -> list[Ints]:
        """Rows with similar numbers of tokens together, as long as the padding saved is worth a call."""
        order = np.argsort(counts, kind="stable")
        groups: list[Ints] = []
        while len(order):
            size = len(order)
            # Splitting off the longest rows saves the others their padding: take the best split.
            sorted_ = counts[order]
            saved = (np.arange(1, size)) * (sorted_[-1] - sorted_[:-1])
            cut = 0
            if size > 1 and int(saved.max()) * self.work > _GROUP_WORK:
                cut = int(saved.argmax()) + 1
            groups.append(order[cut:])
            order = order[:cut]
        return groups

    def _run(self, chosen: Ints, rows: Ints, full: Ints, first: Ints, ends: Ints, terms: Floats) -> None:
        """One forward pass for some of the new states; fills their factors and remembers what may be kept."""
        begin, count = first[chosen], ends[chosen] - first[chosen]
        steps, past = int(count.max()), int(begin.max())
        offset = np.arange(steps)
        real = offset < count[:, None]
        place = np.minimum(begin[:, None] + offset, full.shape[1] - 2)
        to = self._to
        tokens = to(np.where(real, np.take_along_axis(full, place, 1), 0))
        chain = to(rows[chosen])
        options: dict[str, Any] = {"use_cache": True, "position_ids": to(place)}
        if past:
            seen = np.concatenate([np.arange(past) < begin[:, None], np.ones((len(chosen), steps), bool)], 1)
            options["attention_mask"] = to(seen.astype(np.int64))
            options["past_key_values"] = _cache([(k[chain, :, :past], v[chain, :, :past]) for k, v in self._layers])
        with torch.inference_mode(), evaluation(self.lm):
            output = self.body(tokens, **options)
            hidden = output[0]
            layers = [(k[:, :, past:], v[:, :, past:]) for k, v in _pairs(output.past_key_values)]
            # Factors of what follows each token that was run: of the next token, or of EOS.
            predicts = real & (offset < (count if self.target.eos_id is not None else count - 1)[:, None])
            r, s = np.nonzero(predicts)
            if len(r):
                following = full[chosen[r], begin[r] + s + 1]
                terms[chosen[r], begin[r] + s + 1] = self._log_probs(hidden[to(r), to(s)], following)
        self._parts.append(_Part(chosen, begin, count, hidden, layers))

    def _log_probs(self, hidden: Tensor, tokens: Ints) -> Floats:
        """(M,) log-probabilities of tokens after hidden states (M, D), a block of logits at a time."""
        values = []
        target = self._to(tokens)
        block = max(1, _MAX_LOGITS // (self.target.vocab_size or 1))
        for at in range(0, len(tokens), block):
            logits = _wide(self.head(hidden[at : at + block]))
            picked = logits.gather(1, target[at : at + block, None])[:, 0]
            values.append((picked - logits.logsumexp(-1)).double())
        return torch.cat(values).cpu().numpy()

    def keep(self, accepted: Ints) -> None:
        """Write what was found for the accepted states over what is kept of their chains."""
        rows, place, new, terms = self._scored
        taken = np.isin(place, accepted)
        self.terms[rows[taken]] = terms[taken]
        for part in self._parts:
            if not self._layers:
                self._allocate(part.hidden, part.layers)
            real = np.arange(part.hidden.shape[1]) < part.count[:, None]
            r, s = np.nonzero(real & taken[part.index][:, None])
            if not len(r):
                continue
            to = self._to
            chain, where, r_, s_ = to(rows[part.index[r]]), to(part.begin[r] + s), to(r), to(s)
            with torch.inference_mode():
                self.hidden[chain, where] = part.hidden[r_, s_]
                for (keys, values), (k, v) in zip(self._layers, part.layers, strict=True):
                    keys[chain, :, where] = k[r_, :, s_]
                    values[chain, :, where] = v[r_, :, s_]
        self._parts = []
        self._slot = None

    def _allocate(self, hidden: Tensor, layers: list[tuple[Tensor, Tensor]]) -> None:
        chains, places = len(self.terms), self.before + self.width
        with torch.inference_mode():
            self.hidden = hidden.new_zeros((chains, places, hidden.shape[-1]))
            self._layers = [
                tuple(x.new_zeros((chains, x.shape[1], places, x.shape[3])) for x in pair)  # type: ignore[misc]
                for pair in layers
            ]


def _head(lm: nn.Module) -> Callable[[Tensor], Tensor]:
    """The map from hidden states to logits."""
    head = lm.get_output_embeddings() if hasattr(lm, "get_output_embeddings") else None
    if not callable(head):
        raise ValueError(f"{type(lm).__name__} has no output embeddings")
    return head


def _wide(logits: Tensor) -> Tensor:
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


def _cache(pairs: list[tuple[Tensor, Tensor]]) -> Any:
    from kexue._transformers import DynamicCache

    cache = DynamicCache()
    for layer, (keys, values) in enumerate(pairs):
        cache.update(keys, values, layer)
    return cache


def _pairs(cache: Any) -> list[tuple[Tensor, Tensor]]:
    return [(layer.keys, layer.values) for layer in cache.layers]
