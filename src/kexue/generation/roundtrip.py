"""What a tokenizer loses of a text (往返检查).

Source: the pitfalls of Scientific Spaces article 7912, where a lost line break costs the model its few-shot ability.

Formula: the text is kept if decode(encode(text)) == text. Where it is not, each kind of character is sent through by
itself, which finds the reason in nearly every case; what only a combination loses is shown at the first difference.
"""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from typing import Any

__all__ = ["RoundTrip", "check_roundtrip"]

_SHOWN = 20  # kinds of characters that are named
_MARKS = {"\u2581": "nothing", "\u2582": "a space", "\u2583": "a line break"}


@dataclass(frozen=True)
class RoundTrip:
    """Whether a text survives a tokenizer. Its truth value is ``exact``.

    Attributes:
        text: What went in.
        decoded: What came back.
        losses: A sentence for each kind of loss, empty if there is none.
    """

    text: str
    decoded: str
    losses: tuple[str, ...]

    @property
    def exact(self) -> bool:
        """The text came back as it was."""
        return self.text == self.decoded

    def __bool__(self) -> bool:
        return self.exact

    def __str__(self) -> str:
        return "exact" if self.exact else "; ".join(self.losses)


def check_roundtrip(text: str, tokenizer: Any) -> RoundTrip:
    """Whether a tokenizer gives a text back, and what it loses.

    Args:
        text: Any text.
        tokenizer: Anything with ``encode(text) -> ids`` and ``decode(ids) -> text``. The two arguments may also come in
            the other order.

    Returns:
        A :class:`RoundTrip`, true if nothing is lost.

    Raises:
        TypeError: No text or no tokenizer.
        ValueError: What the tokenizer refuses.

    Example:
        >>> class Ascii:
        ...     def encode(self, text):
        ...         return list(text.encode("ascii", "replace"))
        ...     def decode(self, ids):
        ...         return bytes(ids).decode()
        >>> bool(check_roundtrip("dog", Ascii()))
        True
        >>> print(check_roundtrip("狗 dog", Ascii()))
        '狗' (U+72D7) becomes '?'
    """
    if isinstance(tokenizer, str):
        text, tokenizer = tokenizer, text
    if not isinstance(text, str):
        raise TypeError(f"text must be a string; got {type(text).__name__}")
    if not (callable(getattr(tokenizer, "encode", None)) and callable(getattr(tokenizer, "decode", None))):
        raise TypeError(f"tokenizer must have encode and decode; got {type(tokenizer).__name__}")
    decoded = _through(text, tokenizer)
    if decoded == text:
        return RoundTrip(text, decoded, ())
    losses = []
    kinds = [c for c in dict.fromkeys(text) if _through(c, tokenizer) != c]
    for c in kinds[:_SHOWN]:
        losses.append(f"{c!r} (U+{ord(c):04X}) {_reason(c, _through(c, tokenizer))}")
    if len(kinds) > _SHOWN:
        losses.append(f"and {len(kinds) - _SHOWN} more kinds of characters")
    if not kinds:
        pairs = enumerate(zip(text, decoded, strict=False))
        place = next((n for n, (a, b) in pairs if a != b), min(len(text), len(decoded)))
        here = slice(max(place - 5, 0), place + 6)
        losses.append(f"near character {place} {text[here]!r} becomes {decoded[here]!r}")
    return RoundTrip(text, decoded, tuple(losses))


def _through(text: str, tokenizer: Any) -> str:
    try:
        ids = tokenizer.encode(text, strict=False)
    except TypeError:  # most tokenizers do not know the word
        ids = tokenizer.encode(text)
    out: str = tokenizer.decode(ids)
    return out


def _reason(character: str, out: str) -> str:
    if character in _MARKS:
        return f"is a mark of the tokenizer and becomes {_MARKS[character]}"
    if out == "":
        return "is dropped"
    if "⁇" in out:
        return "has no piece and becomes <unk>"
    if out == unicodedata.normalize("NFKC", character):
        return f"is folded to {out!r} (NFKC)"
    return f"becomes {out!r}"
