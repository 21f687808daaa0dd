"""Hard constraints chi(x) of a text: which token sequences are allowed at all.

Source: 科学空间 8062, 8194 (【搜出来的文本】); the indicator factor of rho(x, c) = p(x)^gamma sim(x, c) chi(x, c).

A constraint is any callable ``ids -> bool`` over a tuple of token ids; a function of yours will do. The classes here
can also be joined by ``&``. A sampler that moves words about needs more than the indicator: it must know *where* the
keywords stand, so that it never edits inside one. :meth:`ContainsKeywords.placements` lists the ways in which the
keywords lie in a sequence as disjoint spans, and :func:`keywords_of` finds the keywords inside a composition.

What differs from the published scripts: keywords may have several tokens, may be given twice (then the text holds two
copies), and never share a token with one another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from kexue._checks import check_int
from kexue.generation._states import Ids, as_ids, encode

__all__ = ["AllOf", "BannedTokens", "Constraint", "ContainsKeywords", "LengthBetween", "keywords_of"]


class Constraint:
    """Base of the constraints here: ``constraint(ids) -> bool``, joined by ``&``.

    A subclass defines ``__call__``; one that holds strings also ``bind``.
    """

    def __call__(self, ids: Ids) -> bool:
        """Whether the sequence is allowed."""
        raise NotImplementedError(f"{type(self).__name__} does not define __call__(ids) -> bool")

    def bind(self, tokenizer: Any) -> Constraint:
        """The constraint with its strings turned into token ids; itself if it has none."""
        return self

    def __and__(self, other: Callable[[Ids], bool]) -> AllOf:
        """Both."""
        return AllOf(self, other)

    def __rand__(self, other: Callable[[Ids], bool]) -> AllOf:
        """Both."""
        return AllOf(other, self)


class ContainsKeywords(Constraint):
    """Every keyword occurs, as a run of its tokens; no two share a token.

    Args:
        keywords: Strings, or sequences of token ids, each of at least one token. A keyword listed twice must occur
            twice. With a byte-level tokenizer " good" and "good" are different tokens: write the space if the word
            stands inside a sentence.
        tokenizer: Turns strings into ids (without special tokens); a :class:`Target` with a tokenizer supplies it too.
        ordered: Whether they must occur in the order of the list.

    Raises:
        TypeError: Keywords that are neither strings nor sequences of integers.
        ValueError: No keyword, or an empty one.

    Example:
        >>> both = ContainsKeywords([[3], [5, 6]])
        >>> both((5, 6, 1, 3)), both((5, 3, 6))
        (True, False)
        >>> list(both.placements((3, 5, 6, 3)))
        [(0, 1), (3, 1)]
        >>> ContainsKeywords([[3], [5, 6]], ordered=True)((5, 6, 1, 3))
        False
    """

    def __init__(
        self, keywords: Sequence[str] | Sequence[Sequence[int]], tokenizer: Any = None, ordered: bool = False
    ) -> None:
        if isinstance(keywords, str):
            raise TypeError(f"keywords must be a list of strings or of lists of token ids; got the string {keywords!r}")
        self._given: tuple[str | Ids, ...] = tuple(
            word if isinstance(word, str) else as_ids(word, f"keyword {i}") for i, word in enumerate(keywords)
        )
        if not self._given:
            raise ValueError("keywords must hold at least one keyword; got none (constraint=None is no constraint)")
        for word in self._given:
            if not len(word.strip() if isinstance(word, str) else word):
                raise ValueError(f"a keyword must have at least one token; got {word!r}")
        self.ordered = bool(ordered)
        self._tokens: tuple[Ids, ...] | None = None
        if tokenizer is not None or not any(isinstance(word, str) for word in self._given):
            self._tokens = tuple(encode(tokenizer, word) if isinstance(word, str) else word for word in self._given)
            for given, word in zip(self._given, self._tokens, strict=True):
                if not word:
                    raise ValueError(f"a keyword must have at least one token; the tokenizer gives none for {given!r}")

    @property
    def keywords(self) -> tuple[Ids, ...]:
        """Token ids of each keyword."""
        if self._tokens is None:
            raise ValueError(
                f"the keywords {list(self._given)!r} are strings and need a tokenizer: "
                "ContainsKeywords(..., tokenizer=...) or Target(..., tokenizer=...)"
            )
        return self._tokens

    def bind(self, tokenizer: Any) -> ContainsKeywords:
        """The constraint with its strings turned into token ids; itself where that is done."""
        if self._tokens is not None or tokenizer is None:
            return self
        return ContainsKeywords(self._given, tokenizer, self.ordered)  # type: ignore[arg-type]

    def placements(self, ids: Ids) -> Iterator[tuple[int, ...]]:
        """All ways to find the keywords in ``ids`` as disjoint runs.

        Args:
            ids: Token ids.

        Yields:
            The starts, one for each keyword in the order of the list. Two equal keywords are told apart only by their
            order: the earlier run belongs to the first.
        """
        words = self.keywords
        starts = [[i for i in range(len(ids) - len(w) + 1) if ids[i : i + len(w)] == w] for w in words]

        def extend(chosen: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
            k = len(chosen)
            if k == len(words):
                yield chosen
                return
            for start in starts[k]:
                end = start + len(words[k])
                if any(start < s + len(w) and s < end for s, w in zip(chosen, words, strict=False)):
                    continue
                if any(s > start and (self.ordered or w == words[k]) for s, w in zip(chosen, words, strict=False)):
                    continue
                yield from extend((*chosen, start))

        if all(starts):
            yield from extend(())

    def __call__(self, ids: Ids) -> bool:
        """Whether all keywords occur."""
        ids = tuple(ids)
        return next(self.placements(ids), None) is not None

    def __repr__(self) -> str:
        return f"ContainsKeywords({list(self._given)!r}, ordered={self.ordered})"


class LengthBetween(Constraint):
    """At least ``low`` and at most ``high`` tokens, both included.

    Args:
        low: Least number of tokens.
        high: Largest number; None: no limit.

    Raises:
        TypeError: A bound that is no integer.
        ValueError: ``low`` below 0 or ``high`` below ``low``.

    Example:
        >>> LengthBetween(2, 3)((7, 7, 7)), LengthBetween(2, 3)((7,))
        (True, False)
    """

    def __init__(self, low: int, high: int | None = None) -> None:
        check_int("low", low, 0)
        if high is not None:
            check_int("high", high, low)
        self.low, self.high = low, high

    def __call__(self, ids: Ids) -> bool:
        """Whether the length is in range."""
        return self.low <= len(ids) and (self.high is None or len(ids) <= self.high)

    def __repr__(self) -> str:
        return f"LengthBetween({self.low}, {self.high})"


class BannedTokens(Constraint):
    """None of the given tokens occurs.

    Args:
        ids: Token ids.

    Raises:
        TypeError: An id that is no integer.
        ValueError: A negative id.

    Example:
        >>> BannedTokens([0, 4])((1, 4)), BannedTokens([0, 4])((1, 2))
        (False, True)
    """

    def __init__(self, ids: Iterable[int]) -> None:
        self.ids = frozenset(as_ids(ids, "banned ids"))

    def __call__(self, ids: Ids) -> bool:
        """Whether the sequence is free of them."""
        return self.ids.isdisjoint(ids)

    def __repr__(self) -> str:
        return f"BannedTokens({sorted(self.ids)})"


class AllOf(Constraint):
    """Every one of several constraints holds: what ``a & b`` gives.

    Args:
        *constraints: Callables ``ids -> bool``.

    Raises:
        TypeError: Something that is not callable.
        ValueError: None given, or keywords that are longer together than the greatest length allowed.

    Example:
        >>> short = ContainsKeywords([[3]]) & LengthBetween(1, 4) & (lambda ids: ids[-1] == 9)
        >>> short((3, 1, 9)), short((3, 1))
        (True, False)
    """

    def __init__(self, *constraints: Callable[[Ids], bool]) -> None:
        if not constraints:
            raise ValueError("AllOf needs at least one constraint; got none")
        parts: list[Callable[[Ids], bool]] = []
        for constraint in constraints:
            if not callable(constraint):
                raise TypeError(f"a constraint must be callable, ids -> bool; got {type(constraint).__name__}")
            parts.extend(constraint.parts if isinstance(constraint, AllOf) else [constraint])
        self.parts: tuple[Callable[[Ids], bool], ...] = tuple(parts)
        highs = [p.high for p in parts if isinstance(p, LengthBetween) and p.high is not None]
        for part in parts:
            if isinstance(part, ContainsKeywords) and part._tokens is not None:
                total = sum(map(len, part.keywords))
                if highs and total > min(highs):
                    raise ValueError(f"the keywords have {total} tokens, the greatest length allowed is {min(highs)}")

    def bind(self, tokenizer: Any) -> AllOf:
        """The composition with every string turned into token ids."""
        return AllOf(*(part.bind(tokenizer) if isinstance(part, Constraint) else part for part in self.parts))

    def __call__(self, ids: Ids) -> bool:
        """Whether all hold."""
        return all(part(ids) for part in self.parts)

    def __repr__(self) -> str:
        return " & ".join(map(repr, self.parts))


def keywords_of(constraint: Callable[[Ids], bool] | None) -> ContainsKeywords | None:
    """The keyword constraint inside a constraint, for samplers that keep track of the spans.

    Args:
        constraint: None, a constraint, or a composition by ``&``.

    Returns:
        The :class:`ContainsKeywords`, or None if there is none.

    Raises:
        ValueError: Several of them (spans of two lists may overlap: give one list).

    Example:
        >>> keywords_of(LengthBetween(1, 9) & ContainsKeywords([[3]])).keywords
        ((3,),)
    """
    parts = constraint.parts if isinstance(constraint, AllOf) else (constraint,)
    found = [part for part in parts if isinstance(part, ContainsKeywords)]
    if len(found) > 1:
        raise ValueError(f"one list of keywords is expected; the constraint holds {len(found)}: {constraint!r}")
    return found[0] if found else None
