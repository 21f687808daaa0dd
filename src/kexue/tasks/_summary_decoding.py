"""Beam search of the summary generator (带复制约束的束搜索): all beams of a row share one cache.

    keys of a row      [source | K tokens of step 1 | K tokens of step 2 | ...]     K beams
    beam k sees        the source, and of each step the one token that is its ancestor (a row of a boolean mask)

Nothing of the cache is ever repeated or reordered: when beams change places, rows of the mask do. The copy constraint
is that of :mod:`kexue.generation.copy_constraint`; its state follows the hypothesis. After it the ``top_k`` best tokens
count, renormalised. [SEP], which ends the text, is always allowed, but not first: an empty summary is none.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kexue._transformers import DynamicCache
from kexue.generation.copy_constraint import CopyConstraint
from kexue.models.prefix_lm import KexueForPrefixLM
from kexue.tasks._summary_vocabulary import CLS, PAD, RARE, SEP

__all__ = ["Search", "beam_search"]


@dataclass(frozen=True)
class Search:
    """What is searched for.

    Args:
        beams: K.
        top_k: Tokens of a step that count, or None for all.
        copy: Keep the copy constraint.
        longest: Tokens of a target at most.
        length_penalty: alpha; sums of log-probabilities are divided by length^alpha.
        rare: Number of rare units that have a token.
    """

    beams: int
    top_k: int | None
    copy: bool
    longest: int
    length_penalty: float
    rare: int


class _Rows:
    """State of the rows that are still searched: R rows, K beams, S positions of the source."""

    def __init__(self, model: KexueForPrefixLM, sources: list[list[int]], search: Search) -> None:
        self.model, self.search = model, search
        device = model.device
        lengths = torch.tensor([len(s) for s in sources], device=device)
        longest = max(len(s) for s in sources)
        self.ids = torch.tensor([s + [PAD] * (longest - len(s)) for s in sources], device=device)
        self.lengths = lengths[:, None]
        self.there = torch.arange(longest, device=device) < self.lengths
        out = model.kexue(self.ids, self.there, torch.zeros_like(self.ids), use_cache=True)
        self.cache: DynamicCache = out.past_key_values
        self.memory = model.remember(self.ids, model.lm_head.features(out.last_hidden_state), self.there)
        n, k = len(sources), search.beams
        self.number = list(range(n))
        self.tokens = torch.full((n, k), CLS, device=device)
        self.older = torch.full((n, k), -2, device=device)
        self.totals = torch.full((n, k), -torch.inf, dtype=torch.float64, device=device)
        self.totals[:, 0] = 0
        self.seen = torch.zeros(n, k, 0, dtype=torch.bool, device=device)
        self.said = torch.zeros(n, k, longest, dtype=torch.bool, device=device)
        self.constraint: CopyConstraint | None = None
        if search.copy:
            self.constraint = CopyConstraint(
                self.ids, SEP, model.config.vocab_size, source_mask=self.there, special_ids=(CLS,)
            )
            self.state, self.use = self.constraint.start(n * k), self.there
        self.written: list[list[list[int]]] = [[[] for _ in range(k)] for _ in range(n)]
        self.banned = self._banned()

    def _banned(self) -> Tensor:
        """(R, V) what is never written: marks, and numbers of rare units that the source does not have."""
        size = self.model.config.vocab_size
        banned = torch.zeros(len(self.ids), size, dtype=torch.bool, device=self.ids.device)
        banned[:, RARE : RARE + self.search.rare] = True
        banned.scatter_(1, self.ids, False)
        banned[:, [PAD, CLS]] = True
        return banned

    def select(self, rows: list[int]) -> None:
        """Drop the other rows."""
        index = torch.tensor(rows, device=self.ids.device)
        for name in ("ids", "lengths", "there", "tokens", "older", "totals", "seen", "said", "banned"):
            setattr(self, name, getattr(self, name)[index])
        self.number, self.written = [self.number[r] for r in rows], [self.written[r] for r in rows]
        self.memory = None if self.memory is None else self.memory.select(index)
        self.cache.batch_select_indices(index)
        if self.constraint is not None:
            k = self.search.beams
            each = (index[:, None] * k + torch.arange(k, device=index.device)).flatten()
            # numpy takes a tensor of one number for that number
            chosen = each.numpy() if isinstance(self.use, np.ndarray) else each
            self.state, self.use = self.constraint.reorder(self.state, each), self.use[chosen]

    def step(self, t: int) -> tuple[Tensor, Tensor]:
        """Scores of the best continuations (R, K, C), and their tokens."""
        n, k = self.tokens.shape
        own = torch.eye(k, dtype=torch.bool, device=self.ids.device).expand(n, k, k)
        self.seen = torch.cat([self.seen, own], -1)
        mask = torch.cat([self.there[:, None].expand(n, k, -1), self.seen], -1)[:, None]
        out = self.model.kexue(
            self.tokens, mask, torch.ones_like(self.tokens), (self.lengths + t).expand(n, k), None, self.cache
        )
        features = self.model.lm_head.features(out.last_hidden_state)
        written = torch.stack([self.tokens, self.older], -1)
        scores = (
            self.model.scores(features, self.memory, written, self.said)
            .float()
            .masked_fill(self.banned[:, None], -torch.inf)
        )
        if t == 0:
            scores[..., SEP] = -torch.inf
        if self.constraint is not None:
            z = self.constraint.choose(self.state, self.model.copy_head(features).flatten(0, 1))
            self.use, allowed = self.constraint.allow(self.state, z)
            # a token that is banned may be all there is: then the constraint gives way
            scores, free = scores.masked_fill(~allowed.view(scores.shape), -torch.inf), scores
            scores = torch.where((scores > -torch.inf).any(-1, keepdim=True), scores, free)
        size = scores.shape[-1]
        kept = size if self.search.top_k is None else min(self.search.top_k, size)
        best, tokens = scores.topk(kept, -1)
        return best.double().log_softmax(-1) + self.totals[..., None], tokens

    def move(self, parents: Tensor, tokens: Tensor, totals: Tensor) -> None:
        """Go on with these beams: (R, K) where each comes from, its new token and its sum."""
        index = parents[..., None]
        self.seen = self.seen.gather(1, index.expand(-1, -1, self.seen.shape[-1]))
        if self.constraint is not None:
            first = torch.arange(len(parents), device=parents.device)[:, None] * parents.shape[1]
            self.state = self.constraint.advance(self.state, self.use, tokens.flatten(), (first + parents).flatten())
        said = self.said.gather(1, index.expand(-1, -1, self.said.shape[-1]))
        self.said = said | (self.ids[:, None] == tokens[..., None])
        self.older = self.tokens.gather(1, parents)
        self.tokens, self.totals = tokens, totals
        self.written = [
            [[*old[p], token] for p, token in zip(row, new, strict=True)]
            for old, row, new in zip(self.written, parents.tolist(), tokens.tolist(), strict=True)
        ]


@torch.no_grad()
def beam_search(model: KexueForPrefixLM, sources: list[list[int]], search: Search) -> list[list[int]]:
    """The best target of each source, without [SEP].

    Args:
        model: In eval mode.
        sources: Ids with [CLS] and [SEP].
        search: Settings.
    """
    best: list[tuple[float, list[int]]] = [(-math.inf, []) for _ in sources]
    rows = _Rows(model, sources, search)
    alpha, k = search.length_penalty, search.beams
    for t in range(search.longest):
        scores, candidates = rows.step(t)
        width = scores.shape[-1]
        top, index = scores.flatten(1).topk(min(2 * k, k * width), -1)
        tokens = candidates.flatten(1).gather(1, index)
        parents = torch.div(index, width, rounding_mode="floor")
        going, chosen = [], []
        for r, (totals, words, origins) in enumerate(zip(top.tolist(), tokens.tolist(), parents.tolist(), strict=True)):
            number = rows.number[r]
            live: list[tuple[int, int, float]] = []
            for rank, (total, token, parent) in enumerate(zip(totals, words, origins, strict=True)):
                if total == -math.inf or len(live) == k:
                    break
                if token != SEP:
                    live.append((parent, token, total))
                elif rank < k:
                    found = (total / (t + 1) ** alpha, rows.written[r][parent])
                    best[number] = max(best[number], found, key=lambda item: item[0])
            reach = search.longest if alpha > 0 else t + 2
            if live and live[0][2] / reach**alpha > best[number][0]:
                if t + 1 < search.longest:
                    going.append(r)
                    chosen.append(live + [(live[0][0], live[0][1], -math.inf)] * (k - len(live)))
                elif best[number][0] == -math.inf:  # nothing has ended
                    parent, token, _ = live[0]
                    best[number] = (0.0, [*rows.written[r][parent], token])
        if not going:
            break
        if len(going) < len(rows.number):
            rows.select(going)
        device = rows.ids.device
        table = torch.tensor(chosen, dtype=torch.float64, device=device)
        rows.move(table[..., 0].long(), table[..., 1].long(), table[..., 2])
    return [tokens for _, tokens in best]
