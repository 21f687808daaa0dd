"""Cut long text into pieces of bounded length, at the best boundary that is near."""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections.abc import Iterable, Iterator

_SENTENCE = re.compile(r"[.!?…][\"'”’)\]]*(?=\s)|[。！？；…][”’」』）]*")
_SPACE = re.compile(r"\s+")
_BLANK_LINE = re.compile(r"\S[^\S\n]*\n(?:[^\S\n]*\n)+[^\S\n]*\S")
_FARTHEST = 256  # how far to move back to keep a user-perceived character whole
_ZWJ = "\u200d"


def _is_regional(char: str) -> bool:
    return "\U0001f1e6" <= char <= "\U0001f1ff"


def is_boundary(text: str, position: int) -> bool:
    """Whether ``text`` can be cut before ``position`` without cutting a user-perceived character.

    Covers combining marks, variation selectors, joined emoji, skin tones, flags, tags, Hangul syllables in parts and
    consonants joined by a virama; a close approximation of the grapheme clusters of Unicode Standard Annex 29.

    Args:
        text: Any text.
        position: Index into it; the two ends are always boundaries.

    Example:
        >>> is_boundary("e\\u0301", 1), is_boundary("ab", 1)
        (False, True)
    """
    if not 0 < position < len(text):
        return True
    before, after = text[position - 1], text[position]
    if before < "\u0300" and after < "\u0300":
        return not (before == "\r" and after == "\n")
    if after == _ZWJ or before == _ZWJ or unicodedata.category(after) in ("Mn", "Mc", "Me"):
        return False
    if "\U0001f3fb" <= after <= "\U0001f3ff" or "\U000e0020" <= after <= "\U000e007f":
        return False
    if "\u1160" <= after <= "\u11ff" and ("\u1100" <= before <= "\u11ff" or "\uac00" <= before <= "\ud7a3"):
        return False
    if _is_regional(before) and _is_regional(after):  # flags are pairs, counted from where the run starts
        start = position
        while start > 0 and _is_regional(text[start - 1]):
            start -= 1
        return (position - start) % 2 == 0
    # A virama (combining class 9) joins the next consonant to this one.
    return not (unicodedata.combining(before) == 9 and unicodedata.category(after) == "Lo")


def find_cut(text: str, start: int, limit: int) -> int:
    r"""Find where to end a piece of at most ``limit`` characters that begins at ``start``.

    The last blank line in the second half of the piece wins; then the last line end, sentence end, white space there;
    then the last place that cuts no user-perceived character.

    Args:
        text: Text longer than ``start + limit``.
        start: Where the piece begins.
        limit: Greatest length in characters.

    Returns:
        End of the piece, greater than ``start``.

    Example:
        >>> text = "One sentence. Another one."
        >>> text[:find_cut(text, 0, 20)]
        'One sentence.'
    """
    end, middle = start + limit, start + (limit + 1) // 2
    for mark in ("\n\n", "\n"):
        position = text.rfind(mark, middle, end)
        if position > start and is_boundary(text, position):
            return position
    for pattern in (_SENTENCE, _SPACE):
        ends = [m.end() for m in pattern.finditer(text, middle, end)]
        for position in reversed(ends[-8:]):
            if position > start and is_boundary(text, position):
                return position
    for position in range(end, max(start, end - _FARTHEST), -1):
        if is_boundary(text, position):
            return position
    return end


class Cutter:
    """Collect the text of one document and hand out its pieces as soon as they are complete.

    Args:
        limit: Greatest length of a piece in characters; None never cuts.

    Example:
        >>> cutter = Cutter(12)
        >>> list(cutter.feed("One two three four"))
        ['One two']
        >>> list(cutter.finish())
        ['three four']
        >>> cutter.count
        2
    """

    def __init__(self, limit: int | None) -> None:
        self.limit = limit
        self.count = 0  # pieces handed out
        self._parts: list[str] = []
        self._length = 0

    def feed(self, text: str) -> Iterator[str]:
        """Add ``text``; yield the pieces that are complete."""
        self._parts.append(text)
        self._length += len(text)
        if self.limit is None or self._length <= self.limit:
            return
        buffer, start = "".join(self._parts), 0
        while len(buffer) - start > self.limit:
            end = find_cut(buffer, start, self.limit)
            yield from self._piece(buffer[start:end])
            start = end
        self._parts = [buffer[start:]]
        self._length = len(buffer) - start

    def finish(self) -> Iterator[str]:
        """Yield what is left."""
        yield from self._piece("".join(self._parts))
        self._parts, self._length = [], 0

    def _piece(self, text: str) -> Iterator[str]:
        # Indentation of the first line is kept; blank lines around the piece and space at its end are not.
        stripped = text.rstrip()
        if stripped:
            self.count += 1
            yield stripped.lstrip("\n").lstrip(" ") if self.count > 1 else stripped.lstrip("\n")


#: (line where a unit begins, a part of its text, whether the unit ends here)
Event = tuple[int, str, bool]


def pieces(events: Iterable[Event], limit: int | None) -> Iterator[tuple[int, int, str]]:
    """Yield (line, number of the piece, piece) for units that arrive in parts.

    The number counts from 1; it is 0 for a unit that needed no cut. Units without text yield nothing. At most one piece
    and the latest part are held.

    Example:
        >>> list(pieces([(1, "One two three", True), (2, "Four", True)], 8))
        [(1, 1, 'One two'), (1, 2, 'three'), (2, 0, 'Four')]
    """
    cutter, held, count = Cutter(limit), "", 0
    for line, part, ends in events:
        ready = cutter.feed(part)
        for piece in itertools.chain(ready, cutter.finish()) if ends else ready:
            if held:
                count += 1
                yield line, count, held
            held = piece
        if ends:
            if held:
                yield line, count + 1 if count else 0, held
            cutter, held, count = Cutter(limit), "", 0


def whole(chunks: Iterable[str]) -> Iterator[Event]:
    """Make one unit of all chunks."""
    for chunk in chunks:
        yield 1, chunk, False
    yield 1, "", True


def lines(chunks: Iterable[str]) -> Iterator[Event]:
    """Make a unit of each line; a line longer than a chunk arrives in parts."""
    number = 1
    for chunk in chunks:
        split = chunk.split("\n")
        for part in split[:-1]:
            yield number, part, True
            number += 1
        if split[-1]:
            yield number, split[-1], False
    yield number, "", True


def paragraphs(chunks: Iterable[str]) -> Iterator[Event]:
    """Make a unit of each run of lines that are not blank."""
    start, filled = 0, False  # the line where the open paragraph begins, or 0; whether this line has text
    for number, part, ends in lines(chunks):
        if not filled and part and not part.isspace():
            filled = True
            if start:
                yield start, "\n", False
            else:
                start = number
        if filled:
            yield start, part, False
        if ends:
            if start and not filled:
                yield start, "", True
                start = 0
            filled = False
    if start:
        yield start, "", True


def has_paragraphs(text: str) -> bool:
    """Whether a blank line stands between two lines with text."""
    return _BLANK_LINE.search(text) is not None
