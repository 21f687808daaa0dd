"""A text and the pieces of it that make a summary: soft line breaks, sentences, places in the text."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import Any, NamedTuple

from kexue._checks import check_choice, check_int
from kexue.corpus.cutting import find_cut

__all__ = [
    "METHODS", "Summary", "SummaryPiece", "check_request", "chosen", "sentence_spans", "unwrapped",
]  # fmt: skip

METHODS = ("auto", "trained", "vectors")

LONGEST = 500  # characters of a sentence
_LEAST = 40  # characters of a line that can have been broken because it was full
_FULL = 0.6  # of the longest line of its paragraph
_ENDS = re.compile(r"[.!?:;。！？：；…|\\]\s*$|[-=~^*#+]{3,}\s*$")  # what closes a line for a reason of its own
_BEGINS = re.compile(r"\s*(?:[-*+•>|=~^#]|\.\. |\d+[.)]\s|:\w|@\w|\w+\s:\s)")  # list, code, field, heading, parameter
_CLAUSE = "，,：:、"
_UNSPACED = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3000-\u9fff\uac00-\ud7a3\uf900-\ufaff\uff00-\uffef]")


def _longest(lines: Sequence[str]) -> list[int]:
    """For each line the length of the longest one of its paragraph."""
    out: list[int] = []
    for blank, group in groupby(lines, lambda line: not line.strip()):
        paragraph = list(group)
        out += [0 if blank else max(map(len, paragraph))] * len(paragraph)
    return out


class SummaryPiece(NamedTuple):
    """A piece of the text that the summary takes.

    Args:
        position: Its number among the pieces of the text, from 0.
        start: Where it begins in the text, in characters.
        end: Where it ends.
        text: The piece, with its white space collapsed.
        score: What chose it: a probability of a trained summarizer, a cosine with a bonus for the opening otherwise.
    """

    position: int
    start: int
    end: int
    text: str
    score: float | None = None


class Summary(NamedTuple):
    """A summary and where it comes from.

    Args:
        text: The summary.
        pieces: The pieces of the text that it was made of, in the order of the text.
        method: How it was made: "trained", of whole pieces;
            "generated", written from ``pieces``; or "vectors", of whole sentences.
    """

    text: str
    pieces: list[SummaryPiece]
    method: str


def unwrapped(text: str) -> str:
    r"""The text with the line breaks that only keep lines short turned into spaces; its length stays.

    A break is soft if the line before it is long for its paragraph and does not end a sentence, and the line after it
    goes on as text: no list item, heading, code, field or blank line. Where words are not divided by spaces a line
    break is left alone.

    Example:
        >>> unwrapped("A line that was broken because it was full,\nso it goes on here.\n\n- item")
        'A line that was broken because it was full, so it goes on here.\n\n- item'
    """
    lines = text.split("\n")
    longest = _longest(lines)
    out = [lines[0]]
    for width, before, after in zip(longest, lines, lines[1:], strict=False):
        said = before.strip()
        soft = (
            len(said) >= max(_LEAST, _FULL * width)
            and bool(after.strip())
            and not _ENDS.search(before)
            and not _BEGINS.match(after)
            and said[0] not in "|>"
            and not _UNSPACED.match(said[-1])
        )
        out.append(" " if soft else "\n")
        out.append(after)
    return "".join(out)


def sentence_spans(text: str) -> list[tuple[int, int]]:
    """Where the sentences of a text stand: its pieces, those that end with a comma or colon joined to the next.

    What has no mark for 500 characters is cut at a space, if there is one.

    Example:
        >>> text = "原告诉称：被告借款，至今未还。请求偿还。"
        >>> [text[start:stop] for start, stop in sentence_spans(text)]
        ['原告诉称：被告借款，至今未还。', '请求偿还。']
    """
    from kexue.tasks.pieces import piece_spans

    out: list[tuple[int, int]] = []
    open_ = False
    for start, stop in piece_spans(text):
        if open_ and stop - out[-1][0] <= LONGEST and "\n" not in text[out[-1][1] : start]:
            out[-1] = (out[-1][0], stop)
        else:
            out.append((start, stop))
        open_ = text[stop - 1] in _CLAUSE
    return [part for start, stop in out for part in _parts(text, start, stop)]


def _parts(text: str, start: int, stop: int) -> Iterator[tuple[int, int]]:
    """The span, or parts of it of at most LONGEST characters."""
    while stop - start > LONGEST:
        end = find_cut(text, start, LONGEST)
        if found := text[start:end].rstrip():
            yield start, start + len(found)
        start = end
        while start < stop and text[start].isspace():
            start += 1
    if start < stop:
        yield start, stop


def chosen(
    text: str, spans: Sequence[tuple[int, int]], taken: Iterable[int], scores: Sequence[float] | None
) -> list[SummaryPiece]:
    """The pieces of a summary.

    Args:
        text: The text.
        spans: Where its pieces stand.
        taken: Numbers of pieces.
        scores: One for each piece of the text, if there are any.
    """
    return [
        SummaryPiece(
            i,
            *spans[i],
            " ".join(text[slice(*spans[i])].split()),
            None if scores is None else round(float(scores[i]), 4),
        )
        for i in sorted(taken)
    ]


def check_request(text: Any, length: int | None, pieces: int | None, method: str) -> None:
    """Refuse what cannot be summarised.

    Raises:
        TypeError: The text is not a str.
        ValueError: A length or a number of pieces below 1, another method.
    """
    if not isinstance(text, str):
        raise TypeError(f"text must be a str; got {text!r:.80} of type {type(text).__name__}")
    for name, value in (("length", length), ("pieces", pieces)):
        if value is not None:
            check_int(name, value, 1)
    check_choice("method", method, METHODS)
