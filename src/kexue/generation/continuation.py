"""Continue prompts token by token: greedy, or drawn from the filtered distribution, each row by its own random numbers.

Source: 科学空间 7912. Row r of the output belongs to prompt r // num_return and draws from a counter-based generator
keyed by (seed, r), one number a token: what a row draws does not depend on which other rows there are, nor on when they
end. Greedy rows of the same prompt are equal.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kexue._checks import check_choice, check_int, check_real
from kexue.generation.decoding import Decoder
from kexue.generation.filters import check_options, check_rows, filter_logits, sample_tokens

__all__ = ["Options", "check_prompts", "continue_prompts"]

_DRAWS_AT_ONCE = 256


@dataclass(frozen=True)
class Options:
    """How to continue; the fields are arguments of :func:`kexue.generation.generate_fast`."""

    max_new_tokens: int = 64
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    no_repeat_ngram: int = 0
    stop_ids: frozenset[int] = frozenset()
    num_return: int = 1
    seed: int = 0
    quantize: str | None = None
    beams: int = 1
    length_penalty: float = 1.0

    def check(self, vocabulary: int) -> None:
        """Raise TypeError or ValueError for values out of range."""
        check_int("max_new_tokens", self.max_new_tokens, 0)
        check_options(
            vocabulary, self.temperature, self.top_k, self.top_p, self.min_p, self.repetition_penalty,
            self.no_repeat_ngram,
        )  # fmt: skip
        for token in self.stop_ids:
            check_int("a stop id", token, 0)
            if token >= vocabulary:
                raise ValueError(f"stop_ids must be below the size of the vocabulary, {vocabulary}; got {token}")
        check_int("num_return", self.num_return, 1)
        check_int("seed", self.seed, 0)
        if self.seed >= 2**64:
            raise ValueError(f"seed must be below 2^64; got {self.seed}")
        if self.quantize is not None:
            check_choice("quantize", self.quantize, ("int8",))
        check_int("beams", self.beams, 1)
        check_real("length_penalty", self.length_penalty)
        if 1 < self.beams < self.num_return:
            raise ValueError(f"num_return must be at most the number of beams, {self.beams}; got {self.num_return}")

    @property
    def filters(self) -> bool:
        """Whether something besides the temperature changes the distribution."""
        return bool(self.top_k or self.top_p < 1 or self.min_p or self.repetition_penalty != 1 or self.no_repeat_ngram)


def check_prompts(prompts: Any, vocabulary: int, limit: int | None, new: int) -> list[list[int]]:
    """Prompts as lists of ids.

    Args:
        prompts: Sequence of non-empty sequences of ids; a tensor (B, T) or an array is one as well.
        vocabulary: V.
        limit: Largest number of tokens of a text, or None.
        new: Tokens that are to be appended.

    Raises:
        TypeError: Something else.
        ValueError: An empty prompt, an id outside the vocabulary, a prompt that leaves no room for the new tokens.
    """
    if isinstance(prompts, str | bytes) or not hasattr(prompts, "__iter__"):
        raise TypeError(f"prompts must be a list of lists of token ids; got {type(prompts).__name__}")
    checked = []
    for row, prompt in enumerate(prompts):
        if isinstance(prompt, str | bytes) or not hasattr(prompt, "__iter__") or getattr(prompt, "ndim", 1) != 1:
            raise TypeError(f"prompts must be a list of lists of token ids; element {row} is {prompt!r}")
        ids = prompt.tolist() if hasattr(prompt, "tolist") else list(prompt)
        for token in ids:
            check_int(f"a token of prompt {row}", token, 0)
            if token >= vocabulary:
                raise ValueError(f"token ids must be below the size of the vocabulary, {vocabulary}; got {token}")
        if not ids:
            raise ValueError(f"prompts must have at least one token; prompt {row} is empty")
        if limit is not None and len(ids) + new > limit:
            raise ValueError(
                f"prompt and new tokens must be at most max_position = {limit} together; prompt {row} has {len(ids)} "
                f"tokens and max_new_tokens is {new}"
            )
        checked.append([int(token) for token in ids])
    return checked


def continue_prompts(decoder: Decoder, prompts: list[list[int]], options: Options) -> Iterator[tuple[int, int]]:
    """Yield (row, token) as tokens come: all rows that go on, in ascending order, then again."""
    if not prompts or not options.max_new_tokens:
        return
    count = len(prompts) * options.num_return
    logits, places = start_rows(decoder, prompts)
    logits = logits[[places[row // options.num_return] for row in range(count)]]
    decoder.select([places[row // options.num_return] for row in range(count)])
    active, slots = list(range(count)), list(range(count))  # rows that go on, and where the cache has them
    chooser = _Chooser(options, [prompts[row // options.num_return] for row in range(count)], logits)
    for produced in range(1, options.max_new_tokens + 1):
        tokens = chooser(logits, active, produced - 1)
        yield from zip(active, tokens, strict=True)
        if produced == options.max_new_tokens:
            return
        going = [i for i, token in enumerate(tokens) if token not in options.stop_ids]
        if not going:
            return
        if len(going) < len(active):
            active, slots, tokens = ([values[i] for i in going] for values in (active, slots, tokens))
            if 2 * len(active) < decoder.cache.rows:  # what has ended costs no time, only memory
                decoder.select(slots)
                slots = list(range(len(active)))
        logits = decoder.advance(slots, tokens)


def start_rows(decoder: Decoder, prompts: list[list[int]]) -> tuple[Tensor, list[int]]:
    """Take in each distinct prompt once; the logits, and for each prompt the row that has it."""
    distinct: dict[tuple[int, ...], int] = {}
    places = [distinct.setdefault(tuple(prompt), len(distinct)) for prompt in prompts]
    return decoder.start(list(distinct)), places


class History:
    """What the filters of repetition need to know of each row."""

    def __init__(self, options: Options, prompts: Sequence[Sequence[int]], logits: Tensor) -> None:
        self.penalized, self.ngram = options.repetition_penalty != 1, options.no_repeat_ngram
        self.sequences = [list(prompt) for prompt in prompts] if self.ngram else []
        self.seen: Tensor | None = None
        if self.penalized:
            self.seen = torch.zeros(len(prompts), logits.shape[-1], dtype=torch.bool, device=logits.device)
            for row, prompt in enumerate(prompts):
                self.seen[row, torch.tensor(list(prompt), device=logits.device)] = True

    def of(self, rows: list[int]) -> dict[str, Any]:
        """Arguments of :func:`filter_logits`."""
        return {
            "seen": None if self.seen is None else self.seen[rows],
            "sequences": [self.sequences[row] for row in rows] if self.ngram else None,
        }

    def append(self, rows: list[int], tokens: list[int]) -> None:
        """Note new tokens."""
        if self.seen is not None:
            self.seen[rows, tokens] = True
        if self.ngram:
            for row, token in zip(rows, tokens, strict=True):
                self.sequences[row].append(token)

    def select(self, rows: list[int]) -> None:
        """Make row i the old row ``rows[i]``."""
        if self.seen is not None:
            self.seen = self.seen[rows]
        if self.ngram:
            self.sequences = [list(self.sequences[row]) for row in rows]


class _Chooser:
    """The next token of each row."""

    def __init__(self, options: Options, prompts: Sequence[Sequence[int]], logits: Tensor) -> None:
        self.options, self.history = options, History(options, prompts, logits)
        self.generators = [
            np.random.Generator(np.random.Philox(key=options.seed + (r << 64))) for r in range(len(prompts))
        ]
        self.draws = np.empty((len(prompts), 0))

    def __call__(self, logits: Tensor, rows: list[int], index: int) -> list[int]:
        """Tokens number ``index`` of these rows, from logits (len(rows), V)."""
        options = self.options
        if options.temperature == 0:
            if self.history.penalized or self.history.ngram:
                logits = filter_logits(
                    logits, 0.0, repetition_penalty=options.repetition_penalty,
                    no_repeat_ngram=options.no_repeat_ngram, **self.history.of(rows),
                )  # fmt: skip
            tokens = _largest(logits)
        else:
            kept = filter_logits(
                logits, options.temperature, options.top_k, options.top_p, options.min_p, options.repetition_penalty,
                no_repeat_ngram=options.no_repeat_ngram, **self.history.of(rows),
            )  # fmt: skip
            place = index % _DRAWS_AT_ONCE
            if place == 0:
                size = min(_DRAWS_AT_ONCE, options.max_new_tokens - index)
                self.draws = np.stack([generator.random(size) for generator in self.generators])
            uniforms = torch.from_numpy(self.draws[rows, place]).to(logits.device)
            tokens = sample_tokens(kept.softmax(-1), uniforms).tolist()
        self.history.append(rows, tokens)
        return tokens


def _largest(logits: Tensor) -> list[int]:
    """The first index of the maximum of each row; a row without one raises."""
    if logits.device.type == "cpu" and logits.dtype in (torch.float32, torch.float64):
        values = logits.numpy()
        tokens = values.argmax(-1)  # ten times as fast as torch's; finds NaN, too
        if not np.isfinite(values[np.arange(len(values)), tokens]).all():
            check_rows(logits)
        return tokens.tolist()
    check_rows(logits)
    return logits.argmax(-1).tolist()
