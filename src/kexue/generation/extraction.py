"""Summaries by extraction of words: search over subsets of fixed size (抽词式摘要:爬山与模拟退火).

Source: 科学空间 8062 (summaries as a target); Schumann et al. 2020, https://arxiv.org/abs/2005.01791 (hill climbing
over extracted words).

A state is a choice of k of the n words of a text, kept in their order. A move exchanges a chosen word for one that is
not chosen: symmetric, so at temperature tau it is accepted with min(1, exp((f(y) - f(x)) / tau)), f = log rho. At tau =
0 this is hill climbing. C restarts are scored in one batch.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kexue._checks import check_int, check_real
from kexue._progress import progress as progress_bar
from kexue.generation._interrupt import noted_interrupt
from kexue.generation._states import Ids, as_ids, encode
from kexue.generation.targets import Target

__all__ = ["Extract", "extract_words", "split_words"]


class Extract(NamedTuple):
    """A choice of words.

    Args:
        words: Their numbers, in order.
        ids: Their tokens.
        log_rho: The objective.
    """

    words: tuple[int, ...]
    ids: Ids
    log_rho: float


def split_words(text: str, tokenizer: Any) -> list[Ids]:
    """The words of a text, each with the white space before it, as token ids; without white space: its tokens.

    Args:
        text: The text.
        tokenizer: As for :class:`ContainsKeywords`.

    Returns:
        One id tuple for each word.

    Example:
        >>> split_words("ab c", lambda text: [ord(x) for x in text])
        [(97, 98), (32, 99)]
    """
    pieces = re.findall(r"\s*\S+", text)
    if len(pieces) > 1:
        return [ids for ids in (encode(tokenizer, piece) for piece in pieces) if ids]
    return [(token,) for token in encode(tokenizer, text)]


def extract_words(
    target: Target,
    words: Sequence[Sequence[int]],
    length: int,
    *,
    restarts: int = 16,
    steps: int = 300,
    temperature: tuple[float, float] = (1.0, 0.05),
    seed: int = 0,
    progress: bool | None = None,
) -> list[Extract]:
    """The best choices of ``length`` words under a target.

    Args:
        target: The objective, log rho; for a summary p(x)^gamma times a :class:`SentenceMatch` with the text.
        words: n sequences of token ids.
        length: k, how many words to keep, 1 to n.
        restarts: C, searches that run side by side: one from the first k words, the others from random choices.
        steps: Moves that each search tries.
        temperature: First and last tau of a geometric schedule; 0 for both: hill climbing.
        seed: Of all random numbers.
        progress: Whether to show a bar; None: if standard error is a terminal.

    Returns:
        The best distinct choice of each search, the best first. Ctrl-C ends the search with what there is.

    Raises:
        TypeError: Words that are no ids.
        ValueError: Numbers out of range, a target that forbids every start.

    Example:
        >>> target = Target(lambda texts: [-float(sum(t)) for t in texts])
        >>> best = extract_words(target, [[5], [1], [4], [2]], 2, steps=50)[0]
        >>> best.ids, best.log_rho
        ((1, 2), -3.0)
    """
    units = [as_ids(word, f"word {i}") for i, word in enumerate(words)]
    n = len(units)
    check_int("length", length, 1)
    check_int("restarts", restarts, 1)
    check_int("steps", steps, 0)
    if length > n:
        raise ValueError(f"length must be at most the number of words, {n}; got {length}")
    if not isinstance(temperature, tuple | list) or len(temperature) != 2:
        raise ValueError(f"temperature must be (first, last); got {temperature!r}")
    for name, tau in zip(("first", "last"), temperature, strict=True):
        check_real(f"the {name} temperature", tau, minimum=0.0)
    first, last = map(float, temperature)
    if (first == 0) != (last == 0):
        raise ValueError(f"temperature must be above 0, or 0 for both ends; got {temperature!r}")
    generator = np.random.default_rng(seed)
    chosen = np.zeros((restarts, n), bool)
    chosen[0, :length] = True
    for row in range(1, restarts):
        chosen[row, generator.permutation(n)[:length]] = True
    value = target.log_rho(_texts(chosen, units))
    if not np.isfinite(value).any():
        raise ValueError("the target gives log rho = -inf to every start")
    best, best_value = chosen.copy(), value.copy()
    if length == n:
        steps = 0
    every = np.arange(restarts)
    with progress_bar("extraction", steps, progress) as bar, noted_interrupt() as interrupt:
        for step in range(steps):
            tau = first * (last / first) ** (step / max(1, steps - 1)) if first else 0.0
            # One of each kind, uniformly: the largest of random keys among them.
            keys = generator.random((2, restarts, n))
            out = np.where(chosen, keys[0], -1.0).argmax(1)
            into = np.where(chosen, -1.0, keys[1]).argmax(1)
            new = chosen.copy()
            new[every, out], new[every, into] = False, True
            found = target.log_rho(_texts(new, units))
            u = generator.random(restarts)
            with np.errstate(invalid="ignore", divide="ignore"):
                gain = found - value
                taken = gain >= 0 if tau == 0 else np.log(u) < gain / tau
            taken = (taken | np.isneginf(value)) & np.isfinite(found)
            chosen[taken], value[taken] = new[taken], found[taken]
            better = value > best_value
            best[better], best_value[better] = chosen[better], value[better]
            bar.advance(1, f"best {best_value.max():.2f}")
            if interrupt.came:
                break
    distinct: dict[tuple[int, ...], float] = {}
    for picks, score in zip(best, best_value.tolist(), strict=True):
        if math.isfinite(score):
            distinct[tuple(np.flatnonzero(picks).tolist())] = score
    ranked = sorted(distinct.items(), key=lambda item: (-item[1], item[0]))
    return [Extract(picked, _join(picked, units), score) for picked, score in ranked]


def _join(picked: Sequence[int], units: list[Ids]) -> Ids:
    return tuple(token for i in picked for token in units[i])


def _texts(chosen: NDArray[np.bool_], units: list[Ids]) -> list[Ids]:
    return [_join(np.flatnonzero(row).tolist(), units) for row in chosen]
