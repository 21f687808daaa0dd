"""From strings to strings by CGMH: keywords to a sentence, paraphrase, compression (用词造句、改写与压缩).

Source: 科学空间 8062, 8194. All three sample rho(x) = p(x)^gamma sim(x) chi(x) with many chains and return the best
distinct sentences that were visited:

    keywords     chi = all keywords occur; sim = nearness to a text, if one is given
    paraphrase   sim = informative words matched x meaning x other wording than the source
    compression  sim = informative words matched x meaning, at most so many tokens; from an extraction of words

The informative tokens of a source are the half that the language model finds least expected.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from kexue._checks import check_int, check_real
from kexue.generation._mlm import special_ids
from kexue.generation._scoring import token_terms
from kexue.generation._states import Ids, encode
from kexue.generation.cgmh import CGMH
from kexue.generation.constraints import Constraint, ContainsKeywords, LengthBetween
from kexue.generation.extraction import extract_words, split_words
from kexue.generation.relations import Diversity, JointRelation, SentenceMatch, WordMatch
from kexue.generation.targets import Target

__all__ = ["SearchSettings", "SentenceFound", "compress", "informative_tokens", "keywords_to_sentence", "paraphrase"]

_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")


@dataclass(frozen=True)
class SentenceFound:
    """A sentence that a search has visited.

    Args:
        text: The sentence.
        ids: Its tokens.
        log_rho: Log of the unnormalised law, fluency and relations.

    Example:
        >>> SentenceFound("a b", (1, 2), -3.0).text
        'a b'
    """

    text: str
    ids: Ids
    log_rho: float


@dataclass(frozen=True)
class SearchSettings:
    """How long and how widely to search.

    Args:
        steps: Steps of each chain.
        chains: Number of chains.
        candidates: Words considered for a place.
        eps: Share of the uniform law in the proposals.
        gamma: Exponent of the language model; below 1 favours longer sentences.
        word_exponent: Of the match of the informative words.
        meaning_exponent: Of the similarity of the mean vectors.
        diversity_exponent: Of 1 - BLEU, for paraphrases.
        screen: As in :class:`CGMH`; "auto": "next" where the model allows it.
        seed: Of all random numbers.

    Raises:
        TypeError: A number that is none.
        ValueError: A number out of range.

    Example:
        >>> SearchSettings(steps=50).chains
        32
    """

    steps: int = 300
    chains: int = 32
    candidates: int = 64
    eps: float = 0.05
    gamma: float = 0.8
    word_exponent: float = 5.0
    meaning_exponent: float = 5.0
    diversity_exponent: float = 1.0
    screen: Any = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        check_int("steps", self.steps, 1)
        check_int("chains", self.chains, 1)
        for name in ("gamma", "word_exponent", "meaning_exponent", "diversity_exponent"):
            check_real(name, getattr(self, name), minimum=0.0)


def keywords_to_sentence(
    lm: nn.Module,
    keywords: Sequence[str],
    tokenizer: Any,
    mlm: nn.Module | None = None,
    *,
    near: str | None = None,
    ordered: bool = False,
    min_length: int | None = None,
    max_length: int | None = None,
    count: int = 5,
    embeddings: Any = None,
    settings: SearchSettings | None = None,
    progress: bool | None = None,
) -> list[SentenceFound]:
    """Sentences that contain all the keywords.

    Args:
        lm: Causal language model, the law of fluency.
        keywords: Words that must occur; none, if ``near`` is given.
        tokenizer: Of both models: ``encode`` and ``decode``.
        mlm: Masked or one-pass model that proposes words; None: the causal model.
        near: A text whose meaning the sentences should have.
        ordered: Keep the order of the keywords.
        min_length: Least number of tokens; None: twice those of the keywords, at most 16.
        max_length: Greatest number of tokens; None: 32 or what the model has positions for.
        count: How many sentences to return.
        embeddings: (V, D) vectors of tokens for ``near``; None: the input embeddings of ``lm``.
        settings: Length and width of the search.
        progress: Whether to show a bar; None: if standard error is a terminal.

    Returns:
        At most ``count`` distinct sentences, the largest log rho first.

    Raises:
        TypeError: A model that is no module.
        ValueError: Neither keywords nor ``near``, an empty keyword, lengths that do not fit.

    Example:
        >>> from kexue.models import KexueConfig, KexueForCausalLM
        >>> from kexue.words import train_tokenizer
        >>> tokenizer = train_tokenizer(["the cat sat on the mat", "a dog ran home"] * 4, 300)
        >>> config = KexueConfig(len(tokenizer), 16, 1, 2, attn_mode="causal", bos_token_id=2, eos_token_id=3)
        >>> quick = SearchSettings(steps=20, chains=4)
        >>> found = keywords_to_sentence(
        ...     KexueForCausalLM(config), ["cat", "home"], tokenizer, count=2, settings=quick, progress=False
        ... )
        >>> len(found), all(" cat" in f.text and " home" in f.text for f in found)
        (2, True)
    """
    settings = settings or SearchSettings()
    if isinstance(keywords, str):
        raise TypeError(f"keywords must be a list of strings; got the string {keywords!r}")
    words = [_keyword_ids(tokenizer, word) for word in keywords]
    if not words and near is None:
        raise ValueError("keywords must hold at least one word, or near a text; got neither")
    total = sum(map(len, words))
    low = min(16, max(2 * total, 4)) if min_length is None else min_length
    sim = None
    if near is not None:
        source = _source(tokenizer, near)
        table = _embeddings(lm, embeddings)
        sim = SentenceMatch(source, table, exponent=settings.meaning_exponent)
    constraint: Constraint | None = ContainsKeywords(words, ordered=ordered) if words else None
    high = None if max_length is None else max_length
    target = Target(lm, sim, constraint, settings.gamma, tokenizer)
    return _search(target, mlm, tokenizer, None, low, high, count, settings, progress)


def paraphrase(
    lm: nn.Module,
    text: str,
    tokenizer: Any,
    mlm: nn.Module | None = None,
    *,
    contains: Sequence[str] = (),
    count: int = 5,
    embeddings: Any = None,
    settings: SearchSettings | None = None,
    progress: bool | None = None,
) -> list[SentenceFound]:
    """Other wordings of a sentence, by search from the sentence itself.

    Args:
        lm: As in :func:`keywords_to_sentence`, as all arguments that are not named here.
        text: The sentence; at most as many tokens as the model has positions for, less a third.
        tokenizer: As above.
        mlm: As above.
        contains: Words of the sentence that must stay as they are.
        count: As above.
        embeddings: (V, D) vectors of tokens in which nearness is measured; None: the input embeddings of ``lm``.
        settings: As above.
        progress: As above.

    Returns:
        At most ``count`` distinct sentences other than ``text``, the largest log rho first.

    Raises:
        TypeError: A model that is no module.
        ValueError: An empty text, a word of ``contains`` that does not occur in it.
    """
    settings = settings or SearchSettings()
    source = _source(tokenizer, text)
    table = _embeddings(lm, embeddings)
    sim = JointRelation(
        WordMatch(informative_tokens(Target(lm, tokenizer=tokenizer), source), table, settings.word_exponent),
        SentenceMatch(source, table, exponent=settings.meaning_exponent),
        Diversity(source, settings.diversity_exponent),
    )
    constraint = _contained(tokenizer, source, contains)
    target = Target(lm, sim, constraint, settings.gamma, tokenizer)
    low, high = max(1, len(source) * 2 // 3), len(source) + max(2, len(source) // 3)
    found = _search(target, mlm, tokenizer, source, low, high, count + 1, settings, progress)
    return [one for one in found if one.ids != source][:count]


def compress(
    lm: nn.Module,
    text: str,
    tokenizer: Any,
    mlm: nn.Module | None = None,
    *,
    ratio: float = 0.5,
    max_length: int | None = None,
    contains: Sequence[str] = (),
    count: int = 5,
    embeddings: Any = None,
    settings: SearchSettings | None = None,
    progress: bool | None = None,
) -> list[SentenceFound]:
    """Shorter sentences with the meaning of a text: words are extracted first, then rewritten by CGMH.

    Args:
        lm: As in :func:`keywords_to_sentence`, as all arguments that are not named here.
        text: What is to be shortened.
        tokenizer: As above.
        mlm: As above.
        ratio: Greatest share of the tokens that is kept, in (0, 1), unless ``max_length`` is given.
        max_length: Greatest number of tokens.
        contains: Words that must stay.
        count: As above.
        embeddings: As in :func:`paraphrase`.
        settings: As above.
        progress: As above.

    Returns:
        At most ``count`` distinct sentences, the largest log rho first.

    Raises:
        TypeError: A model that is no module.
        ValueError: An empty text, a length that leaves nothing out, words of ``contains`` that do not occur or are
            longer than it.
    """
    settings = settings or SearchSettings()
    source = _source(tokenizer, text)
    check_real("ratio", ratio, above=0.0)
    high = max(1, math.floor(ratio * len(source))) if max_length is None else max_length
    check_int("max_length", high, 1)
    if high >= len(source):
        raise ValueError(f"the result must be shorter than the text's {len(source)} tokens; got {high}")
    table = _embeddings(lm, embeddings)
    base = Target(lm, tokenizer=tokenizer)
    kept = informative_tokens(base, source)[: max(1, high // 2)]
    sim = JointRelation(
        WordMatch(kept, table, settings.word_exponent),
        SentenceMatch(source, table, exponent=settings.meaning_exponent),
    )
    constraint = _contained(tokenizer, source, contains)
    if constraint is not None and sum(map(len, constraint.keywords)) > high:
        raise ValueError(f"the words that must stay have more than {high} tokens, the greatest length")
    start = _extraction(lm, text, source, sim, tokenizer, high, constraint, settings)
    limits: Constraint = LengthBetween(1, high)
    target = Target(lm, sim, limits if constraint is None else limits & constraint, settings.gamma, tokenizer)
    return _search(target, mlm, tokenizer, start, max(1, high // 2), high, count, settings, progress)


def informative_tokens(target: Target, source: Sequence[int]) -> list[int]:
    """The half of a text's distinct tokens that its language model expects least, the least expected first.

    Args:
        target: Holds the causal language model.
        source: Token ids.

    Returns:
        Token ids.

    Example:
        >>> from kexue.models import KexueConfig, KexueForCausalLM
        >>> lm = KexueForCausalLM(KexueConfig(9, 8, 1, 2, attn_mode="causal", bos_token_id=0))
        >>> len(informative_tokens(Target(lm), (3, 4, 5, 4)))
        2
    """
    ids = tuple(source)
    (terms,) = token_terms(target, [ids])
    surprise: dict[int, float] = {}
    for token, term in zip(ids, terms, strict=False):  # the end has a factor, too
        surprise[token] = max(surprise.get(token, -math.inf), -term)
    return sorted(surprise, key=lambda token: (-surprise[token], token))[: max(1, (len(surprise) + 1) // 2)]


def _keyword_ids(tokenizer: Any, word: str) -> Ids:
    """A word as it stands inside a sentence: with the space before it, unless that costs a token of its own."""
    if not isinstance(word, str) or not word.strip():
        raise ValueError(f"a keyword must be a string with at least one letter; got {word!r}")
    plain, spaced = encode(tokenizer, word.strip()), encode(tokenizer, " " + word.strip())
    return spaced if 0 < len(spaced) <= len(plain) else plain


def _source(tokenizer: Any, text: str) -> Ids:
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"the text must be a string with at least one letter; got {text!r}")
    return encode(tokenizer, text.strip())


def _embeddings(lm: nn.Module, given: Any) -> Any:
    if not isinstance(lm, nn.Module):
        raise TypeError(f"lm must be a causal language model, a module; got {type(lm).__name__}")
    return lm.get_input_embeddings().weight if given is None else given  # type: ignore[operator]


def _contained(tokenizer: Any, source: Ids, words: Sequence[str]) -> ContainsKeywords | None:
    """The constraint that words of the source stay, in the form in which they stand there."""
    found: list[Ids] = []
    for word in words:
        forms = [_keyword_ids(tokenizer, word), encode(tokenizer, word.strip())]
        here = [form for form in forms if any(source[i : i + len(form)] == form for i in range(len(source)))]
        if not here:
            raise ValueError(f"the word {word!r} that must stay does not occur in the text")
        found.append(here[0])
    if not found:
        return None
    constraint = ContainsKeywords(found)
    if not constraint(source):
        raise ValueError(f"the words {list(words)!r} that must stay do not all occur in the text beside each other")
    return constraint


def _extraction(
    lm: nn.Module,
    text: str,
    source: Ids,
    sim: Any,
    tokenizer: Any,
    high: int,
    constraint: ContainsKeywords | None,
    settings: SearchSettings,
) -> Ids:
    """A start of at most ``high`` tokens: the best extraction of words that holds what must stay."""
    units = split_words(text.strip(), tokenizer)
    longest = sorted((len(unit) for unit in units), reverse=True)
    length = max([k for k in range(1, len(units) + 1) if sum(longest[:k]) <= high], default=0)
    if length and constraint is None:
        target = Target(lm, sim, None, settings.gamma, tokenizer)
        return extract_words(target, units, length, restarts=8, steps=60, seed=settings.seed, progress=False)[0].ids
    if constraint is None:
        return source[:high]
    starts = next(iter(constraint.placements(source)))
    order = sorted(range(len(starts)), key=starts.__getitem__)
    return tuple(token for k in order for token in constraint.keywords[k])


def _vocabulary(target: Target, mlm: nn.Module | None, source: Ids | None) -> list[int]:
    """Ids that may be written: no special tokens, no single bytes; what the source holds may stay."""
    models = [model for model in (target.lm, mlm) if isinstance(model, nn.Module)]
    size = min(int(model.config.vocab_size) for model in models)  # type: ignore[union-attr,arg-type]
    banned = set().union(*(special_ids(model, target.tokenizer) for model in models))
    names: dict[str, int] = getattr(target.tokenizer, "get_vocab", dict)()
    bytes_ = {number for name, number in names.items() if _BYTE.fullmatch(name)}
    known = set(names.values()) if names else set(range(size))
    allowed = {token for token in range(size) if token in known} - banned - bytes_
    return sorted(allowed | (set(source or ()) - banned))


def _search(
    target: Target,
    mlm: nn.Module | None,
    tokenizer: Any,
    start: Ids | None,
    low: int,
    high: int | None,
    count: int,
    settings: SearchSettings,
    progress: bool | None,
) -> list[SentenceFound]:
    check_int("count", count, 1)
    if not isinstance(target.lm, nn.Module):
        raise TypeError(f"lm must be a causal language model, a module; got {type(target.lm).__name__}")
    options: dict[str, Any] = {
        "proposal": mlm,
        "vocab": _vocabulary(target, mlm, start),
        "n_chains": settings.chains,
        "candidates": settings.candidates,
        "eps": settings.eps,
        "seed": settings.seed,
    }
    if start is not None:
        low = min(low, len(start))
        high = None if high is None else max(high, len(start))
    sampler = CGMH(target, max_length=high, min_length=low, **options)
    if settings.screen == "auto":
        sampler.screen = "next" if sampler.continues() else None
    else:
        sampler.screen = settings.screen
    result = sampler.run(start, settings.steps, 0, settings.steps, progress, trace=False)
    found: list[SentenceFound] = []
    seen: set[str] = set()
    for ids, log_rho in result.ranked():
        text = str(tokenizer.decode(list(ids)))
        if text not in seen and np.isfinite(log_rho):
            seen.add(text)
            found.append(SentenceFound(text, ids, log_rho))
        if len(found) == count:
            break
    return found
