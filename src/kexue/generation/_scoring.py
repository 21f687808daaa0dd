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
from torch.nn import functional as F

from kexue.generation._edits import DELETE, INSERT, SWAP, Batch, Floats, Ints, parts_of
from kexue.generation._states import Ids, evaluation, logits_of
from kexue.generation.constraints import ContainsKeywords
from kexue.generation.targets import Target

_MAX_LOGITS = 2**24  # of one product with the vocabulary: 64 MiB in float32
_GROUP_WORK = 2**27  # multiplications that a further call of the model must save


class TargetScorer:
    """Scores whole sentences; for language models that are functions, and where prefixes cannot be kept."""

    def __init__(self, target: Target) -> None:
        self.target = target
        # The kernel itself sees to the keywords.
        self._rest = [part for part in parts_of(target.constraint) if not isinstance(part, ContainsKeywords)]

    def begin(self, batch: Batch) -> Floats:
        """(C,) log rho of the first states; chain c is row c from now on."""
        return self.target.log_rho(batch.tuples())

    def score(self, rows: Ints, new: Batch, changed: Ints) -> Floats:
        """(N,) log rho of new states of the chains ``rows``, equal to the current ones before token ``changed``."""
        log_rho = self.relations(new.tuples())
        some = np.flatnonzero(np.isfinite(log_rho))
        if len(some) and self.target.gamma > 0:
            log_rho[some] += self.target.gamma * self.log_p(rows[some], new.rows(some), changed[some])
        return log_rho

    def local(self, rows: Ints, new: Batch, changed: Ints, op: Ints) -> Floats:
        """(N,) how much the factors next to the edit gain, see :class:`CausalScorer`."""
        raise ValueError("screen='next' needs a causal model that can continue from kept keys and values")

    def relations(self, texts: list[Ids]) -> Floats:
        """(N,) log sim + log chi."""
        allowed = np.array([all(part(text) for part in self._rest) for text in texts], dtype=bool)
        values = np.full(len(texts), -np.inf)
        if self.target.sim is None:
            values[allowed] = 0.0
        elif allowed.any():
            values[allowed] = self.target.log_sim([t for t, ok in zip(texts, allowed, strict=True) if ok])
        return values

    def log_p(self, rows: Ints, new: Batch, changed: Ints) -> Floats:
        """(N,) log p of new states."""
        return self.target.log_p(new.tuples())

    def keep(self, accepted: Ints) -> None:
        """Chains that have moved to the states scored last."""


@dataclass
class _Part:
    """What one forward pass has found, until it is known which of the new states are accepted.

    ``rows`` (n,) chains, ``begin`` (n,) and ``count`` (n,) of the tokens that were run, ``hidden`` (n, S, D) and, for
    each layer, keys and values (n, H, S, d).
    """

    rows: Ints
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
        body: Any = lm.base_model
        self.lm, self.width, self.body = lm, width, body
        self.head: Callable[[Tensor], Tensor] = _head(lm)
        self.device = next(lm.parameters()).device
        self.before = int(target.bos_id is not None)
        self.work = sum(int(p.numel()) for p in body.parameters() if p.dim() > 1)
        self._layers: list[tuple[Tensor, Tensor]] = []
        self._slot: tuple[Ints, Ints, Tensor] | None = None
        self._ahead: tuple[_Part, Ints, Floats, Ints] | None = None
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
                seen = torch.ones_like(ids)
                whole = logits_of(lm(ids, attention_mask=seen))
                first = base(ids[:, :3], attention_mask=seen[:, :3], use_cache=True)
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
        self._layers, self._slot, self._ahead, self._parts = [], None, None, []
        self.terms = np.zeros((chains, places + 1))
        rows = np.arange(chains)
        self._relation = self.relations(batch.tuples())
        self._new_relation = self._relation.copy()
        # BOS, too, is run.
        log_p = self.log_p(rows, batch, np.full(chains, -self.before))
        self.keep(rows)
        return self._relation + self.target.gamma * log_p

    def log_slots(self, rows: Ints, position: Ints) -> Tensor:
        """(N, V) log-probabilities of what stands at ``position`` of chains (ascending), from kept hidden states.

        Without BOS nothing is known of the first token: all alike.
        """
        place = self._to(np.maximum(position + self.before - 1, 0))
        with torch.inference_mode():
            found = _wide(self.head(self.hidden[self._to(rows), place])).log_softmax(-1)
            if not self.before:
                found[self._to(position == 0)] = 0.0
        self._slot = (rows, position, found)
        return found

    def _to(self, x: Any) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(x)).to(self.device)

    def relations(self, texts: list[Ids]) -> Floats:
        """(N,) log sim + log chi."""
        found = super().relations(texts)
        self._relations = found.copy()
        return found

    def score(self, rows: Ints, new: Batch, changed: Ints) -> Floats:
        """As :meth:`TargetScorer.score`; goes on from what :meth:`local` has run for these states."""
        log_rho = super().score(rows, new, changed)
        self._new_relation[rows] = self._relations
        return log_rho

    def local(self, rows: Ints, new: Batch, changed: Ints, op: Ints) -> Floats:
        """(N,) gain of log rho as far as it is known from the edit and the token after it.

        With t the log-probability of a token, y_i the token at the edit: t(y_i) + t(y_i+1) - t(x_i) - t(x_i+1) for a
        replacement, without t(x_i+1) for an insertion, without t(y_i+1) for a deletion; and the gain of log sim. The
        gain of the reverse edit is its negative, which is all that the first of two stages needs. A deletion costs
        nothing, the others one token; what was run is not run again for the states that pass. Of a
        swap log sim alone counts here.
        """
        found = self.relations(new.tuples()) - self._relation[rows]
        some = np.flatnonzero(np.isfinite(found) & (op != SWAP))
        self._parts, self._ahead = [], None
        if not len(some):
            return found
        chain, kinds, at = rows[some], op[some], changed[some]
        part = new.rows(some)
        full, first, ends = self._frame(part, at)
        last = ends - (self.target.eos_id is None)  # index of the last factor
        fresh = np.zeros((len(some), self.terms.shape[1] + 1))
        known = np.flatnonzero((first > 0) & (first <= last))
        if len(known):
            fresh[known, first[known]] = self._at_edit(chain[known], at[known], full[known, first[known]])
        longer = np.flatnonzero(kinds != DELETE)
        if len(longer):
            self._run(longer, np.ones(len(longer), np.int64), chain, full, first, last, fresh)
            self._ahead = (self._parts[0], chain[longer], fresh[longer], first[longer])
        old = np.pad(self.terms[chain], ((0, 0), (0, 1)))
        index = np.arange(len(some))
        gain = fresh[index, first] - old[index, first]
        gain += np.where(kinds != DELETE, fresh[index, first + 1], 0.0)
        gain -= np.where(kinds != INSERT, old[index, first + 1], 0.0)
        found[some] += self.target.gamma * gain
        return found

    def _frame(self, new: Batch, changed: Ints) -> tuple[Ints, Ints, Ints]:
        """(N, P + 1) sequences with BOS and EOS, (N,) index of the first changed token, (N,) index of EOS."""
        first, ends = changed + self.before, new.lengths + self.before
        full = np.zeros((len(new), self.before + self.width + 1), np.int64)
        if self.before:
            full[:, 0] = self.target.bos_id or 0
        full[:, self.before : -1] = new.ids
        full[np.arange(len(new)), ends] = 0 if self.target.eos_id is None else self.target.eos_id
        return full, first, ends

    def log_p(self, rows: Ints, new: Batch, changed: Ints) -> Floats:
        """(N,) log p: the kept factors before the edit, the factor at it, and those that follow."""
        full, first, ends = self._frame(new, changed)
        last = ends - (self.target.eos_id is None)
        terms = self.terms[rows].copy()
        terms[np.arange(terms.shape[1]) >= first[:, None]] = 0.0
        ran = np.zeros(len(rows), bool)
        if self._ahead is None:
            self._parts = []
        else:  # the token at the edit has been run for some
            _, chains, fresh, _ = self._ahead
            place = np.searchsorted(chains, rows)
            ran = (place < len(chains)) & (chains[np.minimum(place, len(chains) - 1)] == rows)
            terms[ran] += fresh[place[ran], :-1]
        known = np.flatnonzero((first > 0) & (first <= last) & ~ran)
        if len(known):
            terms[known, first[known]] = self._at_edit(rows[known], changed[known], full[known, first[known]])
        begin = first + ran
        todo = np.flatnonzero(ends > begin)
        for group in self._groups(ends[todo] - begin[todo]):
            chosen = todo[group]
            self._run(chosen, ends[chosen] - begin[chosen], rows, full, begin, last, terms)
        log_p: Floats = terms.sum(1)
        self._scored = (rows, terms)
        return log_p

    def _at_edit(self, rows: Ints, position: Ints, tokens: Ints) -> Floats:
        """(N,) log-probability of the token at the edit, from the rows that ranked the candidates if there are any."""
        found = None
        if self._slot is not None:
            held, places, kept = self._slot
            place = np.minimum(np.searchsorted(held, rows), max(0, len(held) - 1))
            if len(held) and (held[place] == rows).all() and (places[place] == position).all():
                found = kept[self._to(place)]
        if found is None:
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

    def _run(self, chosen: Ints, count: Ints, rows: Ints, full: Ints, begin: Ints, last: Ints, terms: Floats) -> None:
        """One forward pass over ``count`` tokens of some new states from ``begin`` on.

        Fills the factors of the tokens that follow each of them (up to ``last``), and remembers what may be kept.
        """
        first, chains = begin[chosen], rows[chosen]
        steps, past = int(count.max()), int(first.max())
        offset = np.arange(steps)
        real = offset < count[:, None]
        place = np.minimum(first[:, None] + offset, full.shape[1] - 2)
        tokens = self._to(np.where(real, np.take_along_axis(full[chosen], place, 1), 0))
        # What was not kept of a row lies between its prefix and its new tokens; what follows those is not looked at.
        seen = np.concatenate([np.arange(past) < first[:, None], np.ones((len(chosen), steps), bool)], 1)
        options: dict[str, Any] = {
            "use_cache": True, "position_ids": self._to(place), "attention_mask": self._to(seen * 1)
        }  # fmt: skip
        with torch.inference_mode(), evaluation(self.lm):
            if past:
                options["past_key_values"] = _cache(self._prefix(chains, past))
            output = self.body(tokens, **options)
            hidden = output[0]
            layers = [(k[:, :, past:], v[:, :, past:]) for k, v in _pairs(output.past_key_values)]
            r, s = np.nonzero(real & (place < last[chosen][:, None]))
            if len(r):
                following = place[r, s] + 1
                terms[chosen[r], following] = self._log_probs(
                    hidden[self._to(r), self._to(s)], full[chosen[r], following]
                )
        self._parts.append(_Part(chains, first, count, hidden, layers))

    def _prefix(self, chains: Ints, past: int) -> list[tuple[Tensor, Tensor]]:
        """Keys and values (n, H, past, d) of each layer, with those of the token that was run ahead."""
        index = self._to(chains)
        found = [(k[index, :, :past], v[index, :, :past]) for k, v in self._layers]
        if self._ahead is None:
            return found
        part, ahead, _, first = self._ahead
        place = np.minimum(np.searchsorted(ahead, chains), len(ahead) - 1)
        mine = np.flatnonzero((ahead[place] == chains) & (first[place] < past))
        if len(mine):
            to, at, source = self._to(mine), self._to(first[place[mine]]), self._to(place[mine])
            for (keys, values), (k, v) in zip(found, part.layers, strict=True):
                keys[to, :, at] = k[source, :, 0]
                values[to, :, at] = v[source, :, 0]
        return found

    def _log_probs(self, hidden: Tensor, tokens: Ints) -> Floats:
        """(M,) log-probabilities of tokens after hidden states (M, D), a block of logits at a time."""
        values = []
        target = self._to(tokens)
        block = max(1, _MAX_LOGITS // (self.target.vocab_size or 1))
        for at in range(0, len(tokens), block):
            logits = _wide(self.head(hidden[at : at + block]))
            values.append(-F.cross_entropy(logits, target[at : at + block], reduction="none").double())
        return torch.cat(values).cpu().numpy()

    def keep(self, accepted: Ints) -> None:
        """Write what was found for the chains that have moved over what is kept of them."""
        rows, terms = self._scored
        taken = np.isin(rows, accepted)
        self.terms[rows[taken]] = terms[taken]
        self._relation[accepted] = self._new_relation[accepted]
        for part in self._parts:
            if not self._layers:
                self._allocate(part.hidden, part.layers)
            real = np.arange(part.hidden.shape[1]) < part.count[:, None]
            r, s = np.nonzero(real & np.isin(part.rows, accepted)[:, None])
            if not len(r):
                continue
            chain, where = self._to(part.rows[r]), self._to(part.begin[r] + s)
            r_, s_ = self._to(r), self._to(s)
            with torch.inference_mode():
                self.hidden[chain, where] = part.hidden[r_, s_]
                for (keys, values), (k, v) in zip(self._layers, part.layers, strict=True):
                    keys[chain, :, where] = k[r_, :, s_]
                    values[chain, :, where] = v[r_, :, s_]
        self._parts, self._ahead, self._slot = [], None, None

    def _allocate(self, hidden: Tensor, layers: list[tuple[Tensor, Tensor]]) -> None:
        chains, places = len(self.terms), self.before + self.width
        with torch.inference_mode():
            self.hidden = hidden.new_zeros((chains, places, hidden.shape[-1]))
            self._layers = [
                tuple(x.new_zeros((chains, x.shape[1], places, x.shape[3])) for x in pair)  # type: ignore[misc]
                for pair in layers
            ]


def token_terms(target: Target, texts: list[Ids]) -> list[list[float]]:
    """For each text the log-probability of each token and of the end, as far as the law has these factors.

    For checks: one whole forward pass for each length.
    """
    lm = target.lm
    if not isinstance(lm, nn.Module):
        raise ValueError(f"screen='next' needs a causal language model, a module; got {type(lm).__name__}")
    head = () if target.bos_id is None else (target.bos_id,)
    tail = () if target.eos_id is None else (target.eos_id,)
    device = next((p.device for p in lm.parameters()), torch.device("cpu"))
    found: list[list[float]] = [[] for _ in texts]
    for length in sorted(set(map(len, texts))):
        some = [i for i, text in enumerate(texts) if len(text) == length]
        ids = torch.tensor([(*head, *texts[i], *tail) for i in some], device=device)
        with torch.inference_mode(), evaluation(lm):
            log_p = _wide(logits_of(lm(ids[:, :-1]))).log_softmax(-1) if ids.shape[1] > 1 else ids.new_zeros((0,))
        if ids.shape[1] > 1:
            values = log_p.gather(-1, ids[:, 1:, None])[..., 0].double().tolist()
        else:
            values = [[] for _ in some]
        for i, row in zip(some, values, strict=True):
            found[i] = row if head else [0.0, *row]
    return found


def _head(lm: nn.Module) -> Callable[[Tensor], Tensor]:
    """The map from hidden states to logits."""
    head = getattr(lm, "get_output_embeddings", lambda: None)()
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
