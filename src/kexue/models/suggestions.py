"""Suggestions of other tokens (逐字纠错建议): what the model would rather read at each position, and by how much.

    gain = max over v != x_i of log p(v | all other tokens) - log p(x_i | all other tokens)

Positions in order of falling gain are a spelling and fluency check; special tokens are never suggested.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from kexue._checks import check_int
from kexue._tensors import compute_dtype

__all__ = ["Candidate", "Suggestion", "special_ids", "suggestions"]

CHUNK_BYTES = 1 << 25


class Candidate(NamedTuple):
    """A token that could stand at a position.

    Args:
        token: Its id.
        log_prob: log p(token | all other tokens).

    Example:
        >>> Candidate(7, -0.5).token
        7
    """

    token: int
    log_prob: float


@dataclass(frozen=True)
class Suggestion:
    """What the model would rather read at one position.

    Args:
        position: Column of the token, from 0.
        token: Id of the token that stands there.
        log_prob: log p(token | all other tokens).
        candidates: Other tokens, most probable first.

    Example:
        >>> suggestion = Suggestion(3, 8, -4.0, (Candidate(7, -0.5), Candidate(2, -2.0)))
        >>> suggestion.gain
        3.5
    """

    position: int
    token: int
    log_prob: float
    candidates: tuple[Candidate, ...]

    @property
    def gain(self) -> float:
        """By how much the best candidate is more probable, in nats; negative if the token is the best; -inf without."""
        return self.candidates[0].log_prob - self.log_prob if self.candidates else -math.inf


def special_ids(config: Any, given: Iterable[int] | None, mask_token_id: int | None) -> tuple[set[int], set[int]]:
    """Ids that are never suggested, and those of them at whose positions nothing is suggested either.

    Args:
        config: A configuration with ``pad_token_id``, ``bos_token_id``, ``eos_token_id`` and others, each perhaps None.
        given: Ids to be added.
        mask_token_id: [MASK], whose positions are there to be filled.
    """
    names = ("pad", "bos", "eos", "cls", "sep", "unk", "decoder_start")
    found: set[int] = set()
    for name in names:
        value = getattr(config, f"{name}_token_id", None)
        found.update(value if isinstance(value, list | tuple) else [] if value is None else [value])
    for token in () if given is None else given:
        check_int("special_ids", token, 0)
        if token >= config.vocab_size:
            raise ValueError(f"special_ids must be below vocab_size, {config.vocab_size}; got {token}")
        found.add(int(token))
    mask = set() if mask_token_id is None else {mask_token_id}
    return found | mask, found - mask


@torch.no_grad()
def suggestions(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    places: Sequence[tuple[int, int]],
    tokens: Tensor,
    batch: int,
    top_k: int,
    forbidden: Iterable[int],
    min_gain: float,
    chunk_bytes: int = CHUNK_BYTES,
) -> list[list[Suggestion]]:
    """Suggestions for rows of hidden states, in chunks of rows.

    Args:
        hidden: (N, D), inputs of the decoder.
        weight: (V, D).
        bias: (V,), or None.
        places: Text and column of each row.
        tokens: (N,) ids that stand there.
        batch: Number of texts.
        top_k: Candidates per position.
        forbidden: Ids that are no candidates.
        min_gain: Positions with a smaller gain are left out.
        chunk_bytes: Bound on the memory of the scores of a chunk, in float32.

    Returns:
        For each text its suggestions, largest gain first; equal gains in order of position.
    """
    out: list[list[Suggestion]] = [[] for _ in range(batch)]
    banned = torch.tensor(sorted(forbidden), dtype=torch.long, device=hidden.device)
    size = max(1, chunk_bytes // (4 * weight.shape[0]))
    top_k = min(top_k, weight.shape[0])
    for start in range(0, len(places), size):
        part = slice(start, start + size)
        scores = F.linear(hidden[part], weight, bias)
        scores = scores.to(compute_dtype(scores))
        total = scores.logsumexp(1, keepdim=True)
        index = tokens[part].unsqueeze(1)
        own = (scores.gather(1, index) - total).squeeze(1).tolist()
        scores.index_fill_(1, banned, -math.inf).scatter_(1, index, -math.inf)
        best, ids = scores.topk(top_k, dim=1)
        table = zip(places[part], tokens[part].tolist(), own, (best - total).tolist(), ids.tolist(), strict=True)
        for (text, column), token, log_prob, values, others in table:
            found = tuple(Candidate(i, v) for i, v in zip(others, values, strict=True) if v > -math.inf)
            suggestion = Suggestion(column, token, log_prob, found)
            if suggestion.gain >= min_gain:
                out[text].append(suggestion)
    for row in out:
        row.sort(key=lambda s: (-s.gain, s.position))
    return out
