"""Entity linking, typing, cloze and coreference by next sentence prediction (实体链接、分类、完形填空、指代消解).

Source: NSP-BERT (Scientific Spaces article 8671), the two-stage prompt: the mention is named again after the text, so
that the head judges the word and not the sentence,

    first   x + 上文中{mention}是指
    second  这个词是指{abstract without the mention}        (linking)
            这个词的{predicate}是{object};...               (linking, from triples)
            这个词是指一类{type}                             (typing)

and the candidate with the largest log-odds wins. A mention that the knowledge base does not have goes to typing, with
the types that stand for "not in the knowledge base" (NIL).

What we do differently, and why: the first stage is never cut away (only the text before it is), candidates have the
same budget of tokens, and the phrases can be replaced; English ones are included.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from kexue._checks import check_choice, check_int, check_real
from kexue.tasks._prompts import check_texts, fill
from kexue.tasks.next_sentence import SPECIALS, NextSentenceScorer

#: Phrases of the two stages: cue after the text, linking, one triple, typing.
PHRASES = {
    "zh": ("上文中{}是指", "这个词是指{}", "这个词的{predicate}是{object};", "这个词是指一类{}"),
    "en": (" Above, {} means", "The word means {}", "Its {predicate} is {object}; ", "The word means a kind of {}"),
}


class RankedCandidate(NamedTuple):
    """One candidate of a ranking.

    Args:
        candidate: As it was given: the text, the key of a mapping, the type.
        score: Log-odds that it follows.
        nil: Whether it is a type for a mention without an entity.

    Example:
        >>> RankedCandidate("the fruit", 2.5).nil
        False
    """

    candidate: Any
    score: float
    nil: bool = False


def link_entities(
    text: str,
    mention: str,
    candidates: Any,
    model: Any = None,
    *,
    tokenizer: Any = None,
    nil_types: Sequence[str] | None = None,
    nil_threshold: float | None = None,
    language: str = "zh",
    max_candidate: int = 60,
    **options: Any,
) -> list[RankedCandidate]:
    """Rank the entities that a mention in a text may mean, best first.

    Args:
        text: The text; cut at its end to fit.
        mention: The words in question.
        candidates: Descriptions (list of str), or a mapping from an entity to its description or to its triples, a list
            of (predicate, object). The mention is taken out of a description, as it would give every one a high score.
            Empty: the mention is not in the knowledge base, which needs ``nil_types``.
        model: A :class:`NextSentenceScorer`, a fitted :class:`NSPZeroShotClassifier`, a folder or a module.
        tokenizer: For a module.
        nil_types: Types for a mention that has no entity.
        nil_threshold: If the best candidate's log-odds are below this, the mention counts as having no entity.
        language: "zh" or "en", of the phrases around mention and candidates.
        max_candidate: Tokens that a candidate may have; the rest is cut.
        **options: Further arguments of :class:`NextSentenceScorer`, only for a folder or a module.

    Returns:
        All candidates by falling score; or, for a mention without entity, all types, with ``nil=True``. Equal scores
        keep their order.

    Raises:
        ValueError: An empty mention or candidate, equal candidates, no candidates and no types, no model, or a mention
            that leaves no room for the text.
        TypeError: Arguments of the wrong kind.

    Reference:
        Scientific Spaces, article 8671.

    Example:
        >>> from kexue._transformers import BertConfig, BertForNextSentencePrediction
        >>> from kexue.words import Segmenter
        >>> tokenizer = Segmenter({"苹果": 3, "手机": 2, "水果": 2, "品牌": 2, "这个": 3, "词": 3}).to_hf_tokenizer()
        >>> config = BertConfig(vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
        >>> model = BertForNextSentencePrediction(config)  # random weights
        >>> entities = {"Q89": "苹果,一种水果", "Q312": [("类型", "手机品牌")]}
        >>> ranked = link_entities("苹果手机", "苹果", entities, model, tokenizer=tokenizer)
        >>> sorted(entity for entity, score, nil in ranked)
        ['Q312', 'Q89']
    """
    check_choice("language", language, tuple(PHRASES))
    if nil_threshold is not None:
        check_real("nil_threshold", nil_threshold)
        if nil_types is None:
            raise ValueError("nil_threshold needs nil_types, the types of mentions without an entity; got none")
    mention = _filled("mention", mention)
    names, descriptions = _candidates(candidates, mention, language)
    if not names and nil_types is None:
        raise ValueError("candidates must hold at least one entity, or nil_types say what a mention without one may be")
    scorer = _scorer(model, tokenizer, options)
    if names:
        ranked = _rank(scorer, text, mention, names, descriptions, language, max_candidate)
        if nil_threshold is None or ranked[0].score >= nil_threshold:
            return ranked
    types = type_entity(text, mention, nil_types, scorer, language=language, max_candidate=max_candidate)
    return [RankedCandidate(name, score, True) for name, score, _ in types]


def type_entity(
    text: str,
    mention: str,
    types: Any,
    model: Any = None,
    *,
    tokenizer: Any = None,
    language: str = "zh",
    max_candidate: int = 60,
    **options: Any,
) -> list[RankedCandidate]:
    """Rank the types that a mention in a text may have, best first.

    Args:
        text: As in :func:`link_entities`, as all arguments that are not named here.
        mention: As above.
        types: Names of types, at least one.
        model: As above.
        tokenizer: As above.
        language: As above.
        max_candidate: As above.
        **options: As above.

    Raises:
        ValueError: As above.
        TypeError: As above.

    Example:
        >>> from kexue._transformers import BertConfig, BertForNextSentencePrediction
        >>> from kexue.words import Segmenter
        >>> tokenizer = Segmenter({"苹果": 3, "手机": 2, "水果": 2, "品牌": 2, "这个": 3, "词": 3}).to_hf_tokenizer()
        >>> config = BertConfig(vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
        >>> model = BertForNextSentencePrediction(config)  # random weights
        >>> ranked = type_entity("苹果手机", "苹果", ["水果", "品牌"], model, tokenizer=tokenizer)
        >>> sorted(entity for entity, score, nil in ranked)
        ['品牌', '水果']
    """
    check_choice("language", language, tuple(PHRASES))
    names = [_filled("a type", name) for name in check_texts("types", types)]
    if not names:
        raise ValueError("types must hold at least one type; got none")
    _distinct("types", names)
    prompts = [fill(PHRASES[language][3], name) for name in names]
    scorer = _scorer(model, tokenizer, options)
    return _rank(scorer, text, _filled("mention", mention), names, prompts, language, max_candidate)


def rank_cloze(
    text: str, candidates: Any, model: Any = None, *, blank: str = "____", tokenizer: Any = None, **options: Any
) -> list[RankedCandidate]:
    """Rank what may stand in a blank (完形填空): the text with the candidate in its place, followed by the candidate.

    Of a text that is too long the tokens around the blank stay, as many for every candidate.

    Weak with every published model: next sentence prediction judges sentences, not words.

    Args:
        text: A text with exactly one blank.
        candidates: Words or idioms, at least one.
        model: As in :func:`link_entities`.
        blank: How the blank is written.
        tokenizer: As in :func:`link_entities`.
        **options: As in :func:`link_entities`.

    Raises:
        ValueError: Not exactly one blank, an empty or repeated candidate, or one that leaves no room for the text.
        TypeError: Arguments of the wrong kind.

    Example:
        >>> rank_cloze("no blank here", ["a", "b"], "some/model")
        Traceback (most recent call last):
        ValueError: text must have exactly one blank '____'; got 0
    """
    found = _check_text(text).count(_filled("blank", blank))
    if found != 1:
        raise ValueError(f"text must have exactly one blank {blank!r}; got {found}")
    names = [_filled("a candidate", name) for name in check_texts("candidates", candidates)]
    if not names:
        raise ValueError("candidates must hold at least one word; got none")
    _distinct("candidates", names)
    scorer = _scorer(model, tokenizer, options)
    second = scorer.encode(names, "candidates")
    scorer.check_prompts(second, names)
    longest = max(map(len, second))
    room = scorer.max_length - SPECIALS - longest
    if room < longest:
        raise ValueError(
            f"the longest candidate has {longest} tokens and stands twice in a pair; with {SPECIALS} special ones that "
            f"leaves no room for the text in max_length={scorer.max_length}"
        )
    place = len(scorer.encode([text[: text.index(blank)]])[0])
    first = []
    for ids in scorer.encode([text.replace(blank, name) for name in names]):
        start = max(0, min(place - (room - longest) // 2, len(ids) - room))
        first.append(ids[start : start + room])
    return _sorted(names, scorer.score_ids(first, second))


def coreference_prompt(pronoun: str, span: str, language: str = "zh") -> str:
    """The second text of a coreference pair (指代消解), for :meth:`NextSentenceScorer.pairs` and ``SamplesContrast``.

    Args:
        pronoun: The pronoun.
        span: What it may stand for.
        language: "zh" or "en".

    Raises:
        ValueError: An empty pronoun or span, another language.
        TypeError: Not str.

    Example:
        >>> coreference_prompt("它", "新手机")
        '其中它指的是新手机'
    """
    check_choice("language", language, tuple(PHRASES))
    pronoun, span = _filled("pronoun", pronoun), _filled("span", span)
    return f"其中{pronoun}指的是{span}" if language == "zh" else f"Here {pronoun} means {span}"


def _rank(
    scorer: NextSentenceScorer,
    text: str,
    mention: str,
    names: Sequence[Any],
    prompts: Sequence[str],
    language: str,
    max_candidate: int,
) -> list[RankedCandidate]:
    """The two-stage pairs: only the text itself is cut."""
    check_int("max_candidate", max_candidate, 1)
    body, cue = scorer.encode([_check_text(text), fill(PHRASES[language][0], mention)])
    second = [ids[:max_candidate] for ids in scorer.encode(prompts, "candidates")]
    longest = max(map(len, second))
    if len(cue) + longest + SPECIALS >= scorer.max_length:
        raise ValueError(
            f"the mention with its phrase has {len(cue)} tokens and the longest candidate {longest}; with {SPECIALS} "
            f"special ones they leave no room for the text in max_length={scorer.max_length}"
        )
    first = [[*body[: scorer.max_length - SPECIALS - len(cue) - len(ids)], *cue] for ids in second]
    return _sorted(names, scorer.score_ids(first, second))


def _sorted(names: Sequence[Any], scores: Any) -> list[RankedCandidate]:
    order = sorted(range(len(names)), key=lambda k: -scores[k])
    return [RankedCandidate(names[k], float(scores[k])) for k in order]


def _candidates(given: Any, mention: str, language: str) -> tuple[list[Any], list[str]]:
    """Names and second texts."""
    _, link, triple, _ = PHRASES[language]
    if not isinstance(given, Mapping):
        names: list[Any] = check_texts("candidates", given)
        _distinct("candidates", names)
        given = dict(zip(names, names, strict=True))
    prompts = []
    for name, what in given.items():
        if isinstance(what, str):
            rest = _filled(f"candidate {name!r}", what).replace(mention, "").strip()
            prompts.append(fill(link, rest or what))  # nothing but the mention: better than an empty one
            continue
        if not isinstance(what, Sequence) or not all(_is_pair(x) for x in what):
            raise TypeError(f"candidate {name!r} must be a str or a list of (predicate, object); got {what!r}")
        if not what:
            raise ValueError(f"candidate {name!r} must not be empty")
        prompts.append(
            "".join(triple.format(predicate=_filled("predicate", p), object=_filled("object", o)) for p, o in what)
        )
    return list(given), prompts


def _is_pair(given: Any) -> bool:
    return isinstance(given, Sequence) and not isinstance(given, str) and len(given) == 2


def _scorer(model: Any, tokenizer: Any, options: Mapping[str, Any]) -> NextSentenceScorer:
    fitted = getattr(model, "scorer_", model)
    if isinstance(fitted, NextSentenceScorer):
        if options:
            raise ValueError(f"a scorer has its settings already; got {', '.join(options)} for {type(model).__name__}")
        return fitted
    if model is None:
        raise ValueError("model is needed: a NextSentenceScorer, a fitted NSPZeroShotClassifier, a folder or a module")
    if not isinstance(model, str | os.PathLike) and not hasattr(model, "parameters"):
        raise TypeError(
            f"model must be a scorer, a fitted classifier, a folder or a module; got {type(model).__name__}"
        )
    return NextSentenceScorer(model, tokenizer, **options)


def _check_text(text: Any) -> str:
    return check_texts("text", [text])[0]


def _filled(name: str, text: Any) -> str:
    if not isinstance(text, str):
        raise TypeError(f"{name} must be str; got {text!r} of type {type(text).__name__}")
    if not text.strip():
        raise ValueError(f"{name} must not be empty; got {text!r}")
    return text


def _distinct(name: str, items: Sequence[Any]) -> None:
    if len(set(items)) != len(items):
        twice = next(item for number, item in enumerate(items) if item in items[:number])
        raise ValueError(f"{name} must be distinct; got {twice!r} twice")
