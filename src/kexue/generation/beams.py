"""Beam search (束搜索) with scores normalised by length: sum of log-probabilities / length^alpha.

Each step keeps the ``beams`` best unfinished beginnings of every prompt. A beginning that takes a stop token becomes a
candidate if it is among the best ``beams`` continuations. A prompt is done as soon as no unfinished beginning can still
reach the result: log-probabilities only fall, so with alpha > 0 the best that a beginning of sum s can reach is
s / max_new_tokens^alpha (with alpha <= 0 what it would have after one more token). Stopping early changes nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

from kexue.generation.continuation import History, Options, start_rows
from kexue.generation.decoding import Decoder
from kexue.generation.filters import check_rows, filter_logits

__all__ = ["search_beams"]


@dataclass
class _Beam:
    """An unfinished beginning: its new tokens, sum of log-probabilities, and row of the cache."""

    tokens: list[int]
    total: float
    slot: int


@dataclass
class _Search:
    """The search for one prompt."""

    options: Options
    live: list[_Beam]
    done: list[tuple[float, list[int]]] = field(default_factory=list)

    def finish(self, total: float, tokens: list[int]) -> None:
        self.done.append((total / len(tokens) ** self.options.length_penalty, tokens))

    def over(self, length: int) -> bool:
        """Whether no unfinished beginning, of this length, can change the result."""
        if not self.live:
            return True
        if len(self.done) < self.options.num_return:
            return False
        alpha = self.options.length_penalty
        reach = self.options.max_new_tokens if alpha > 0 else length + 1
        best = max(beam.total for beam in self.live) / reach**alpha
        worst = sorted((score for score, _ in self.done), reverse=True)[self.options.num_return - 1]
        return best <= worst


def search_beams(decoder: Decoder, prompts: list[list[int]], options: Options) -> list[list[int]]:
    """The best ``num_return`` continuations of each prompt, best first; fewer only if there are no more."""
    if not prompts or not options.max_new_tokens:
        return [[] for _ in range(len(prompts) * options.num_return)]
    logits, places = start_rows(decoder, prompts)
    logits = logits[places]
    decoder.select(places)
    history = History(options, prompts, logits)
    searches = [_Search(options, [_Beam([], 0.0, row)]) for row in range(len(prompts))]
    for length in range(1, options.max_new_tokens + 1):
        beams = [beam for search in searches for beam in search.live]
        check_rows(logits)
        kept = filter_logits(
            logits, options.temperature or 1.0, options.top_k, options.top_p, options.min_p,
            options.repetition_penalty, no_repeat_ngram=options.no_repeat_ngram,
            **history.of([beam.slot for beam in beams]),
        )  # fmt: skip
        totals = torch.tensor([beam.total for beam in beams], dtype=torch.float64, device=kept.device)
        scores = kept.log_softmax(-1).to(torch.float64) + totals[:, None]
        start = 0
        for search in searches:
            stop = start + len(search.live)
            if search.live:
                _expand(search, scores[start:stop])
            start = stop
            if length == options.max_new_tokens:
                for beam in search.live:
                    search.finish(beam.total, beam.tokens)
                search.live = []
            elif search.over(length):
                search.live = []
        beams = [beam for search in searches for beam in search.live]
        if not beams:
            break
        parents = [beam.slot for beam in beams]
        decoder.select(parents)
        history.select(parents)
        for slot, beam in enumerate(beams):
            beam.slot = slot
        slots, tokens = list(range(len(beams))), [beam.tokens[-1] for beam in beams]
        history.append(slots, tokens)
        logits = decoder.advance(slots, tokens)
    results: list[list[int]] = []
    for search in searches:
        best = sorted(search.done, key=lambda item: -item[0])[: options.num_return]
        if len(best) < options.num_return:
            raise ValueError(
                f"num_return must be at most the number of continuations that the filters and max_new_tokens leave; "
                f"got {options.num_return}, and there are {len(best)}"
            )
        results += [tokens for _, tokens in best]
    return results


def _expand(search: _Search, scores: torch.Tensor) -> None:
    """Replace the beginnings by the best continuations of them; scores (beginnings, V)."""
    options, vocabulary = search.options, scores.shape[-1]
    wanted = min(options.beams * (1 + len(options.stop_ids)), scores.numel())
    values, indices = scores.flatten().topk(wanted)
    live: list[_Beam] = []
    for rank, (total, index) in enumerate(zip(values.tolist(), indices.tolist(), strict=True)):
        if total == -math.inf or len(live) == options.beams:
            break
        parent, token = search.live[index // vocabulary], index % vocabulary
        tokens = [*parent.tokens, token]
        if token not in options.stop_ids:
            live.append(_Beam(tokens, total, parent.slot))
        elif rank < options.beams:
            search.finish(total, tokens)
    search.live = live
