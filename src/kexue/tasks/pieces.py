"""Pieces of a text: sentences and their parts, the units that an extract is made of (切分句子片段).

Source: 科学空间 8046 (SPACES:“抽取-生成”式长文本摘要), whose extractor chooses among pieces finer than sentences.

    zh    cut after newlines and after 。 ； ： ， (the article's marks) and ！ ？ (added: they end sentences too)
    en    cut after newlines and after . ! ? ; where white space or the end follows
    auto  both, mark by mark: the marks of the other one hardly occur in a text, and where they do they mean the same.
          An ASCII comma or colon cuts beside a Chinese character only. ｡ ．and the full stops and question marks of
          Arabic, Urdu and Hindi cut as well.

A mark stays with the piece on its left, with all its repetitions (a。。b are two pieces, 真的？！ is one) and the
brackets and quotes that close after it. Newlines are dropped, pieces are stripped, and none is empty.

What we do differently, and why: the author's code cuts by one mark after the other, over the whole list each time; one
pass finds the same pieces (the marks need no priorities when every one of them cuts). Numbers (3.14, 1,000), names with
full stops (numpy.linalg), ellipses (... and . . .), abbreviations (e.g., Dr.), the initials of names and the number of
an item are never cut off, since a quarter of a number is worse than a long piece.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from kexue.words._display import join_words

__all__ = ["join_pieces", "piece_spans", "split_pieces"]

_NEWLINES = "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"
_BREAK = f"[{_NEWLINES}]+"
_FULL = "。+|；+|：+|，+|[！？]+"
_PATTERNS = {
    "zh": re.compile(f"{_BREAK}|{_FULL}"),
    "en": re.compile(f"{_BREAK}|[.!?;]+"),
    "auto": re.compile(f"{_BREAK}|。+|；+|：+|，+|[!?]*[！？][！？!?]*|[؟۔।॥｡．]+|[.!?;]+|,+|:+"),
}
_NARROW = frozenset(".!?;,:．")  # marks that cut only in some places
_CLOSING = frozenset("”’」』）】》〉〕〗〙〛］｝＂＇｣)]}›»")
_QUOTES = frozenset("\"'")
_CHINESE = re.compile("[\u2e80-\u312f\u31a0-\ua4cf\uf900-\ufaff\ufe30-\ufe4f\uff00-\uffef\U00020000-\U0003ffff]")
_SPACE = re.compile(r"\s*")
_LAST_WORD = re.compile(r"[^\W\d_](?:[^\W\d_]|\.)*\Z")
_NUMBERED = re.compile(r"(?:\A|:\s)\s*\d{1,3}\Z")  # the number of an item at the beginning of its piece
_DOTTED = re.compile(r"[a-z]{1,2}(?:\.[a-z]{1,2})+")  # U.S., p.m., Ph.D.
_NAME = re.compile(r"(?:[^\W\d_]\.\s{1,3}){0,4}([^\W\d_]{2,})")  # more initials, and a word
# Abbreviations: never the end of a sentence; the end where a capital follows; no end before a number.
_is_never_last = re.compile(r"approx|ca|capt|cf|dr|e\.g|gov|i\.e|lt|mr|mrs|ms|prof|resp|sen|viz|vs").fullmatch
_is_maybe_last = re.compile("al|co|corp|dept|est|etc|inc|incl|jr|ltd|max|min|sr|st").fullmatch
_is_before_number = re.compile(
    "app|art|ch|def|eqs?|figs?|nos?|pp?|para|refs?|sec|tab|thm|vol|jan|feb|mar|apr|jun|jul|aug|sept?|oct|nov|dec"
).fullmatch
# Words that begin a sentence rather than go on with a name: "the matrix A. The rows".
_begins = re.compile(
    "all|an|and|as|at|both|but|by|each|every|for|from|he|here|his|how|however|if|in|its?|let|many|most|no|"
    "note|now|on|one|or|our|see|she|since|so|some|such|that|the|their|then|there|these|they|this|those|thus|to|"
    "we|what|when|where|which|while|with|you|your"
).fullmatch
_WORD = 24  # characters before a full stop that are looked at


def split_pieces(text: str, separators: str | Iterable[str] = "auto") -> list[str]:
    """Cut a text into pieces, in linear time.

    Args:
        text: Any text. Line breaks are those of ``str.splitlines``.
        separators: ``"zh"``, ``"en"`` or ``"auto"`` (see the head of this module), or separators of your own, each one
            or more characters: they cut wherever they stand, except inside a number (``.``, ``,`` and ``:``
            between two digits). A line break cuts only if it is among them.

    Returns:
        The pieces, stripped, none empty; an empty or blank text has none. :func:`join_pieces` writes them in a row.

    Raises:
        TypeError: ``text`` is no str, or a separator is none.
        ValueError: Another name, no separator at all, or an empty one.

    Reference:
        https://spaces.ac.cn/archives/8046

    Example:
        >>> split_pieces("原告诉称：被告借款3.14万元，至今未还。。“请求判令偿还。”")
        ['原告诉称：', '被告借款3.14万元，', '至今未还。。', '“请求判令偿还。”']
        >>> split_pieces("See numpy.linalg, e.g. for 1,000 rows. It is fast!", "en")
        ['See numpy.linalg, e.g. for 1,000 rows.', 'It is fast!']
        >>> split_pieces("a/b//c", ("/",))
        ['a/', 'b//', 'c']
    """
    return [text[start:stop] for start, stop in piece_spans(text, separators)]


def join_pieces(pieces: Iterable[str]) -> str:
    """Write pieces in a row: with a space between two of them, unless Chinese, Japanese or Thai letters meet there.

    Example:
        >>> join_pieces(["至今未还。", "请求判令偿还。"]), join_pieces(["It is fast!", "It is small."])
        ('至今未还。请求判令偿还。', 'It is fast! It is small.')
    """
    return join_words(list(pieces))


def piece_spans(text: str, separators: str | Iterable[str] = "auto") -> list[tuple[int, int]]:
    """Where the pieces of :func:`split_pieces` stand: (start, stop) in characters of ``text``."""
    if not isinstance(text, str):
        raise TypeError(f"text must be a str; got {text!r} of type {type(text).__name__}")
    if isinstance(separators, str):
        if separators not in _PATTERNS:
            raise ValueError(
                f"separators must be one of {', '.join(map(repr, _PATTERNS))} or a tuple of separators; "
                f"got {separators!r}"
            )
        ends = _ends(text, _PATTERNS[separators])
    else:
        ends = _own_ends(text, separators)
    spans, start = [], 0
    for stop in (*ends, len(text)):
        piece = text[start:stop]
        left = start + len(piece) - len(piece.lstrip())
        right = left + len(piece.strip())
        if right > left:
            spans.append((left, right))
        start = max(start, stop)
    return spans


def _ends(text: str, pattern: re.Pattern[str]) -> Iterator[int]:
    """Where pieces end, by a preset."""
    counted, odd = 0, False  # how many straight quotes the line has had, to tell one that closes from one that opens
    last = 0  # where the piece begins
    for found in pattern.finditer(text):
        start, stop = found.span()
        if text[start] in _NEWLINES:
            counted, odd = stop, False
            after = stop
        elif _NARROW.issuperset(found.group()):
            after = _closed(text, stop, quotes=True)
            if not _cuts(text, last, start, stop, after):
                continue
        else:
            after = _closed(text, stop)
            if text[after : after + 1] == '"':
                odd ^= bool(text.count('"', counted, after) & 1)
                counted = after
                if odd:
                    after = _closed(text, after + 1)
        yield after
        last = after


def _own_ends(text: str, separators: Iterable[str]) -> Iterator[int]:
    """Where pieces end, by separators of the user's."""
    try:
        own = list(dict.fromkeys(separators))
    except TypeError as error:
        raise TypeError(f"separators must be a preset or an iterable of str; got {separators!r}") from error
    for separator in own:
        if not isinstance(separator, str):
            raise TypeError(f"separators must be str; got {separator!r} of type {type(separator).__name__}")
        if not separator:
            raise ValueError(f"separators must not be empty; got {own!r}")
    if not own:
        raise ValueError(f"there must be at least one separator; got {separators!r}")
    own.sort(key=len, reverse=True)
    for found in re.finditer("|".join(f"(?:{re.escape(separator)})+" for separator in own), text):
        start, stop = found.span()
        if not (found.group() in ".,:" and _inside_number(text, start, stop)):
            yield _closed(text, stop)


def _closed(text: str, stop: int, quotes: bool = False) -> int:
    """The first position from ``stop`` on that is no closing bracket or quote."""
    while stop < len(text) and (text[stop] in _CLOSING or (quotes and text[stop] in _QUOTES)):
        stop += 1
    return stop


def _inside_number(text: str, start: int, stop: int) -> bool:
    return text[start - 1 : start].isdigit() and text[stop : stop + 1].isdigit()


def _cuts(text: str, last: int, start: int, stop: int, after: int) -> bool:
    """Whether the mark ``text[start:stop]``, which closes at ``after``, ends the piece begun at ``last``."""
    if _inside_number(text, start, stop):
        return False
    mark = text[start:stop]
    follows = text[after : after + 1]
    chinese = bool(_CHINESE.match(text[start - 1 : start]) or _CHINESE.match(follows))
    if mark[0] in ",:":
        return chinese or (follows == " " and bool(_CHINESE.match(text[after + 1 : after + 2])))
    if len(mark) > 2 and set(mark) == {"."}:  # an ellipsis
        return False
    if not follows:
        return True
    before = text[last:start] if start - last <= _WORD else "…" + text[start - _WORD : start]
    if mark in (".", "．") and _NUMBERED.search(before):
        return False
    if chinese:
        return True
    if not follows.isspace():
        return mark == "．"
    return mark != "." or _ends_sentence(text, before, after)


def _ends_sentence(text: str, before: str, after: int) -> bool:
    """Whether a full stop after ``before``, with white space at ``after``, ends a sentence, not an abbreviation."""
    resume = _space_end(text, after)
    follows = text[resume : resume + 1]
    spaced = follows == "." and not text[resume + 1 : resume + 2].isalnum()  # an ellipsis with spaces
    if spaced or (before[-1:].isspace() and before.rstrip().endswith(".")):
        return False
    found = _LAST_WORD.search(before)
    if found is None:
        return True
    word = found.group()
    low = word.lower()
    if _is_never_last(low):
        return False
    if _is_before_number(low) and (follows.isdigit() or follows == "("):
        return False
    if _is_maybe_last(low) or _DOTTED.fullmatch(low):
        return (follows.isalpha() and not follows.islower()) or follows in "\"'“‘"
    if len(word) == 1 and word.isupper() and resume == after + 1:  # "E. Knuth", but not "the matrix A. The rows"
        name = _NAME.match(text, resume)
        return not (name and follows.isupper() and not _begins(name.group(1).lower()))
    return True


def _space_end(text: str, start: int) -> int:
    found = _SPACE.match(text, start)
    return found.end() if found else start
