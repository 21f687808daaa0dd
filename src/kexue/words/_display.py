"""Writing words in a row again."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence

# Scripts that are written without spaces between words, with their punctuation: first and last code point.
_UNSPACED = (
    (0x0E00, 0x0EFF),  # Thai, Lao
    (0x1000, 0x109F),  # Myanmar
    (0x1780, 0x17FF),  # Khmer
    (0x2E80, 0x312F),  # CJK radicals, symbols, punctuation, kana, bopomofo
    (0x31A0, 0xA4CF),  # CJK extensions and ideographs, Yi
    (0xF900, 0xFAFF),
    (0xFE30, 0xFE4F),
    (0xFF00, 0xFFEF),  # full-width forms
    (0x1B000, 0x1B16F),
    (0x20000, 0x3FFFF),
)
_STARTS = [start for start, _ in _UNSPACED]


def _unspaced(letter: str) -> bool:
    point = ord(letter)
    place = bisect.bisect_right(_STARTS, point) - 1
    return letter.isspace() or (place >= 0 and point <= _UNSPACED[place][1])


def gap(left: str, right: str) -> str:
    """What stands between two words: a space, unless one of the letters that meet is Chinese, Japanese, Thai, ..."""
    return " " if left and right and not _unspaced(left[-1]) and not _unspaced(right[0]) else ""


def join_words(words: Sequence[str]) -> str:
    """The words as text: 苹果的颜色, but "the colour of apples"."""
    parts = list(words[:1])
    for left, right in itertools.pairwise(words):
        parts.append(gap(left, right))
        parts.append(right)
    return "".join(parts)
