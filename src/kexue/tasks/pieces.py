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
full stops (numpy.linalg), ellipses, abbreviations (e.g., Dr.) and initials are never cut, since a quarter of a number
is worse than a long piece.
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
    "auto": re.compile(f"{_BREAK}|{_FULL}|[؟۔।॥｡．]+|[.!?;]+|,+|:+"),
}
_CLOSING = frozenset("”’」』）】》〉〕〗〙〛］｝＂＇｣)]}›»")
_QUOTES = frozenset("\"'")
_CHINESE = re.compile("[\u2e80-\u312f\u31a0-\ua4cf\uf900-\ufaff\ufe30-\ufe4f\uff00-\uffef\U00020000-\U0003ffff]")
_SPACE = re.compile(r"\s*")
_LAST_WORD = re.compile(r"[^\W\d_](?:[^\W\d_]|\.)*\Z")
_NUMBERED = re.compile(rf"[{_NEWLINES}][ \t]*\d{{1,3}}\Z")  # of an item of a list
_DOTTED = re.compile(r"[a-z](?:\.[a-z])+")
_NEVER_LAST = frozenset(
    ["approx", "ca", "cf", "dr", "e.g", "i.e", "mr", "mrs", "ms", "prof", "resp", "viz", "vs"]
)  # never the end of a sentence
_MAYBE_LAST = frozenset(["al", "co", "corp", "etc", "inc", "jr", "ltd", "sr", "st"])  # the end where a capital follows
_BEFORE_NUMBER = frozenset(["ch", "eq", "eqs", "fig", "figs", "no", "nos", "p", "pp", "sec", "tab", "vol"])
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
    for found in pattern.finditer(text):
        start, stop = found.span()
        mark = text[start]
        if mark in _NEWLINES:
            counted, odd = stop, False
            yield stop
        elif mark in ".!?;,:．":
            after = _closed(text, stop, quotes=True)
            if _cuts_ascii(text, start, stop, after):
                yield after
        else:
            after = _closed(text, stop)
            if text[after : after + 1] == '"':
                odd ^= bool(text.count('"', counted, after) & 1)
                counted = after
                if odd:
                    after = _closed(text, after + 1)
            yield after


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


def _cuts_ascii(text: str, start: int, stop: int, after: int) -> bool:
    """Whether the mark ``text[start:stop]``, whose closing brackets end at ``after``, ends a piece."""
    if _inside_number(text, start, stop):
        return False
    mark = text[start:stop]
    follows = text[after : after + 1]
    chinese = bool(_CHINESE.match(text[start - 1 : start]) or _CHINESE.match(follows))
    if mark[0] in ",:":
        return chinese or (follows == " " and bool(_CHINESE.match(text[after + 1 : after + 2])))
    if len(mark) > 2 and set(mark) == {"."}:  # an ellipsis
        return False
    if chinese or not follows:
        return True
    if not follows.isspace():
        return mark == "．"
    return mark != "." or _ends_sentence(text, start, after)


def _ends_sentence(text: str, stop: int, after: int) -> bool:
    """Whether a full stop at ``stop`` before white space ends a sentence, rather than an abbreviation."""
    resume = _space_end(text, after)
    follows = text[resume : resume + 1]
    before = text[max(0, stop - _WORD) : stop]
    if _NUMBERED.search(before if stop > _WORD else "\n" + before):
        return False
    found = _LAST_WORD.search(before)
    if found is None:
        return True
    word = found.group()
    low = word.lower()
    if low in _NEVER_LAST:
        return False
    if low in _BEFORE_NUMBER and (follows.isdigit() or follows == "("):
        return False
    if low in _MAYBE_LAST or _DOTTED.fullmatch(low):
        return not follows.islower()
    if len(word) == 1 and word.isupper() and word != "I" and text[resume + 1 : resume + 2].islower():
        previous = before[: found.start()].split()  # "Donald E. Knuth", but not "the matrix A. The rows"
        return not follows.isupper() or (bool(previous) and previous[-1][0].islower() and previous[-1] != "and")
    return True


def _space_end(text: str, start: int) -> int:
    found = _SPACE.match(text, start)
    return found.end() if found else start
