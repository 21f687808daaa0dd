"""Lists of words: checked, and ordered by count."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from kexue.words._text import check_encodable


def by_count(words: Sequence[str], counts: Sequence[int], minimum: int = 0) -> list[int]:
    """The order of the words with at least ``minimum`` occurrences by descending count, ties alphabetical."""
    kept = [k for k, count in enumerate(counts) if count >= minimum]
    return sorted(kept, key=lambda k: (-counts[k], words[k]))


def distinct_words(words: Iterable[Any]) -> list[str]:
    """A vocabulary as a list; ValueError if it is empty or repeats a word, TypeError if an item is not a str."""
    if isinstance(words, str):
        raise TypeError("vocabulary must be a sequence of words; got a single str")
    found = list(words)
    seen: set[str] = set()
    for place, word in enumerate(found):
        if not isinstance(word, str):
            raise TypeError(f"vocabulary[{place}] must be a str; got {word!r} of type {type(word).__name__}")
        if word in seen:
            raise ValueError(f"vocabulary must not repeat words; {word!r} occurs again at position {place}")
        seen.add(word)
    if not found:
        raise ValueError("the vocabulary is empty; expected at least one word")
    check_encodable(found)
    return found
