"""What CGMH works out from its arguments before the first step, and refuses."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import nn

from kexue._checks import check_int, check_real
from kexue.generation._edits import OPERATIONS, Edits, Floats, Ints, parts_of
from kexue.generation._mlm import special_ids
from kexue.generation._slots import CausalRanker, FunctionRanker, MaskedRanker, SentenceRanker, TableRanker
from kexue.generation._states import Ids, as_ids
from kexue.generation.constraints import ContainsKeywords, LengthBetween, keywords_of
from kexue.generation.ngram_lm import NGramLM
from kexue.generation.targets import Target

_DEFAULT_LENGTH = 32


def length_bounds(target: Target, low: int | None, high: int | None, keywords: tuple[Ids, ...]) -> tuple[int, int]:
    """Least and greatest length, from the arguments, the constraint and the positions of the model."""
    ranges = [part for part in parts_of(target.constraint) if isinstance(part, LengthBetween)]
    config = getattr(target.lm, "config", None)
    positions = getattr(config, "max_position_embeddings", None)
    room = positions - (target.bos_id is not None) if isinstance(positions, int) else None
    if getattr(config, "position", None) == "rope":
        room = None
    if low is None:
        low = max([1, *(part.low for part in ranges)])
    check_int("min_length", low, 0)
    if high is None:
        highs = [part.high for part in ranges if part.high is not None]
        high = min(highs) if highs else max(_DEFAULT_LENGTH, low)
        high = high if room is None else min(high, room)
    check_int("max_length", high, 1)
    if room is not None and high > room:
        raise ValueError(f"max_length must be at most {room}, the positions of the language model; got {high}")
    total = sum(map(len, keywords))
    if total > high:
        raise ValueError(f"the keywords have {total} tokens, max_length is {high}")
    if low > high:
        raise ValueError(f"min_length must be at most max_length = {high}; got {low}")
    if low == 0 and target.bos_id is None and isinstance(target.lm, nn.Module):
        raise ValueError("min_length must be at least 1 for a language model without BOS; got 0")
    return int(low), int(high)


def default_operations(edits: Edits) -> dict[str, float]:
    """A third each; with several keywords in free order also swaps, without which their order could not change."""
    if len(edits.keywords) > 1 and not edits.ordered:
        return {"insert": 0.3, "delete": 0.3, "replace": 0.3, "swap": 0.1}
    return {"insert": 1 / 3, "delete": 1 / 3, "replace": 1 / 3}


def check_operations(given: Mapping[str, float]) -> Floats:
    """(5,) probabilities of the operations."""
    if not isinstance(given, Mapping):
        raise TypeError(f"operations must be a dict of probabilities; got {type(given).__name__}")
    for name, value in given.items():
        if name not in OPERATIONS:
            raise ValueError(f"operations must be among {', '.join(OPERATIONS)}; got {name!r}")
        check_real(f"the probability of {name!r}", value, minimum=0.0)
    found = np.array([float(given.get(name, 0.0)) for name in OPERATIONS])
    if abs(found.sum() - 1.0) > 1e-6:
        raise ValueError(f"the probabilities of the operations must sum to 1; got {found.sum():.6g} of {dict(given)}")
    return found / found.sum()


def _banned(target: Target, proposal: Any, mask_token_id: int | None, everything: bool) -> set[int]:
    """Ids that are no words: of the target, the tokenizer and the mask; ``everything``: also of the configurations."""
    found = {target.bos_id, target.eos_id, mask_token_id}
    found.update(getattr(target.tokenizer, "all_special_ids", None) or ())
    for model in (target.lm, proposal):
        found.add(getattr(getattr(model, "config", None), "mask_token_id", None))
        if everything and isinstance(model, nn.Module):
            found |= special_ids(model, target.tokenizer)
    return {token for token in found if isinstance(token, int)}


def allowed_ids(target: Target, proposal: Any, vocab: int | Sequence[int] | None, mask_token_id: int | None) -> Ids:
    """Ids of words that may be written."""
    sizes = [getattr(getattr(model, "config", None), "vocab_size", None) for model in (target.lm, proposal)]
    sizes.append(target.lm.vocab_size if isinstance(target.lm, NGramLM) else None)
    limits = [size for size in sizes if isinstance(size, int)]
    given: Sequence[int]
    if vocab is None:
        if not limits:
            raise ValueError("vocab must be given, a list of ids or their number: the models do not say how many exist")
        given = range(min(limits))
    elif isinstance(vocab, int | np.integer) and not isinstance(vocab, bool):
        check_int("vocab", vocab, 1)
        given = range(int(vocab))
    else:
        given = as_ids(vocab, "vocab")
    if limits and given and max(given) >= min(limits):
        raise ValueError(
            f"vocab must hold ids below {min(limits)}, the size of the models' vocabulary; got {max(given)}"
        )
    words = keywords_of(target.constraint)
    highest = -1 if words is None else max(map(max, words.keywords))
    if limits and highest >= min(limits):
        raise ValueError(
            f"keywords must hold ids below {min(limits)}, the size of the models' vocabulary; got {highest}"
        )
    banned = _banned(target, proposal, mask_token_id, vocab is None)
    found = tuple(token for token in dict.fromkeys(given) if token not in banned)
    if not found:
        raise ValueError(f"vocab must hold at least one id that is no special token; got {list(given)[:8]}")
    return tuple(sorted(found))


def choose_ranker(
    target: Target,
    proposal: Any,
    vocab: Ints,
    mask_token_id: int | None,
    prefix: Sequence[int] | None,
    suffix: Sequence[int] | None,
) -> Any:
    """What scores the words for a hole."""
    if isinstance(proposal, nn.Module):
        tokenizer = target.tokenizer
        for source in (getattr(proposal, "config", None), tokenizer):
            found = getattr(source, "mask_token_id", None)
            mask_token_id = found if mask_token_id is None and isinstance(found, int) else mask_token_id
        if mask_token_id is None:
            raise ValueError(
                "the proposal's mask token is unknown: neither its configuration nor the target's tokenizer has "
                "mask_token_id; give mask_token_id"
            )
        check_int("mask_token_id", mask_token_id, 0)
        if not _inside(mask_token_id, proposal):
            raise ValueError(f"mask_token_id must be inside the proposal's vocabulary; got {mask_token_id}")
        ends = [getattr(tokenizer, f"{name}_token_id", None) for name in ("cls", "sep")]
        ends = [end if _inside(end, proposal) else None for end in ends]
        if prefix is None:
            prefix = () if ends[0] is None else (ends[0],)
        if suffix is None:
            suffix = () if ends[1] is None else (ends[1],)
        return MaskedRanker(proposal, mask_token_id, vocab, as_ids(prefix, "prefix"), as_ids(suffix, "suffix"))
    if proposal is not None:
        return FunctionRanker(proposal, vocab)
    if isinstance(target.lm, NGramLM):
        return TableRanker(target.lm, vocab)
    if isinstance(target.lm, nn.Module):
        return CausalRanker(target.lm, target.bos_id, vocab)
    return SentenceRanker(target.log_p, vocab)


def _inside(token: Any, model: nn.Module) -> bool:
    size = getattr(getattr(model, "config", None), "vocab_size", math.inf)
    return isinstance(token, int) and 0 <= token < size


def _is_many(x: Any) -> bool:
    """Whether it is a start by itself, not a token of one."""
    return isinstance(x, list | tuple) or getattr(x, "ndim", 0) > 0


def first_states(
    given: Any,
    chains: int,
    edits: Edits,
    vocab: Ints,
    words: ContainsKeywords | None,
    generator: np.random.Generator | None,
) -> list[tuple[Ids, tuple[int, ...]]]:
    """The first state (ids, starts) of each chain, checked in everything but rho > 0."""
    if hasattr(given, "tolist"):
        given = given.tolist()
    if given is None:
        if generator is None:
            raise TypeError("a state must be a sequence of token ids; got None")
        base = [token for word in edits.keywords for token in word]
        count = max(edits.low - len(base), 0 if base else 1)
        starts = np.cumsum([0, *edits.widths[:-1]]) if len(edits.keywords) else np.zeros(0, np.int64)
        filled = [(*base, *generator.choice(vocab, count).tolist()) for _ in range(chains)]
        return [_checked(ids, tuple(starts.tolist()), edits, vocab, words) for ids in filled]
    if _is_pair(given) or (isinstance(given, list | tuple) and not (given and all(map(_is_many, given)))):
        one = _checked(*_split(given), edits, vocab, words)
        return [one] * chains
    if not isinstance(given, list | tuple):
        raise TypeError(f"init_ids must be a sequence of token ids, or a list of such; got {type(given).__name__}")
    if len(given) != chains:
        raise ValueError(f"init_ids must hold one start for each of the {chains} chains; got {len(given)}")
    return [_checked(*_split(start), edits, vocab, words) for start in given]


def _is_pair(given: Any) -> bool:
    """Whether it is a state (ids, starts): a tuple of two tuples."""
    return isinstance(given, tuple) and len(given) == 2 and all(isinstance(part, tuple) for part in given)


def _split(given: Any) -> tuple[Any, Any]:
    return given if _is_pair(given) else (given, None)


def _checked(
    given: Any, starts: Any, edits: Edits, vocab: Ints, words: ContainsKeywords | None
) -> tuple[Ids, tuple[int, ...]]:
    ids = as_ids(given, "the start")
    if not edits.low <= len(ids) <= edits.high:
        raise ValueError(f"a start must have {edits.low} to {edits.high} tokens; got {len(ids)}: {ids}")
    places = [()] if words is None else words.placements(ids)
    if starts is None:
        starts = next(iter(places), None)
        if starts is None:
            raise ValueError(f"a start must contain the keywords {list(edits.keywords)}; got {ids}")
    else:
        starts = as_ids(starts, "the positions of the keywords")
        if starts not in set(places):
            raise ValueError(f"the keywords {list(edits.keywords)} do not stand at {starts} in {ids}")
    inside = {i for start, word in zip(starts, edits.keywords, strict=True) for i in range(start, start + len(word))}
    wrong = sorted({token for i, token in enumerate(ids) if i not in inside} - set(vocab.tolist()))
    if wrong:
        raise ValueError(
            f"a start may hold, apart from keywords, only the {len(vocab)} allowed ids; got {wrong[0]} in {ids}"
        )
    return ids, starts
