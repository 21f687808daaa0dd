"""Which piece of a document answers a query: a window of its text with the words that matched."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence

from kexue.workbench.fields import UNSPACED

# Runs without white space and punctuation; combining marks of every script stay with their letters.
_CHUNK = re.compile(r"[^\s!-/:-@\[-^`{-~。，、；：？！．・～“”‘’（）《》【】「」『』…—]+")
_LIMIT = 50_000  # characters looked at; longer documents are cut into pieces when they are read
_BREAK = re.compile(r"[\s。！？；，、．]")


def find_words(
    text: str, weights: Mapping[str, float], tokenize: Callable[[str], Sequence[str]]
) -> list[tuple[int, int, str]]:
    """Where words of a query stand in a text.

    Args:
        text: The document.
        weights: Query tokens; only the keys are used.
        tokenize: The tokenizer that made them.

    Returns:
        ``(start, end, token)`` in order of ``start``; spans may overlap.
    """
    spans: list[tuple[int, int, str]] = []
    known: dict[str, str | None] = {}
    for match in _CHUNK.finditer(text, 0, _LIMIT):
        chunk = match[0]
        if chunk not in known:
            known[chunk] = next((token for token in tokenize(chunk) if token in weights), None)
        token = known[chunk]
        if token is None:
            continue
        inside: list[tuple[int, int, str]] = []
        if UNSPACED.search(chunk) or (len(chunk) > len(token) + 4 and token in chunk.casefold()):
            # A run without spaces (Chinese, or a joined identifier): mark the words inside, not the run.
            for word in weights:
                begin = chunk.casefold().find(word)
                while begin >= 0:
                    inside.append((match.start() + begin, match.start() + begin + len(word), word))
                    begin = chunk.casefold().find(word, begin + len(word))
        spans += inside or [(match.start(), match.end(), token)]
    return _without_strays(text, sorted(set(spans)))


def _without_strays(text: str, spans: list[tuple[int, int, str]]) -> list[tuple[int, int, str]]:
    """Leave out lone characters of an unspaced script that elsewhere in the text stand in a longer match.

    The tokens of a Chinese word are the word and its characters; where the word is there, a character that happens to
    stand in another word says nothing.
    """
    runs: list[list[int]] = []
    for begin, end, _ in spans:
        if runs and begin <= runs[-1][1]:
            runs[-1][1] = max(end, runs[-1][1])
        else:
            runs.append([begin, end])
    longer = {character for begin, end in runs if end - begin > 1 for character in text[begin:end]}
    stray = {begin for begin, end in runs if end - begin == 1 and text[begin] in longer and UNSPACED.match(text[begin])}
    return [span for span in spans if span[0] not in stray]


def whole_words(words: Iterable[str]) -> list[str]:
    """The words without the single characters of an unspaced script that another of the words contains.

    Example:
        >>> whole_words(["房价", "涨", "价", "房", "a"])
        ['房价', '涨', 'a']
    """
    known = list(dict.fromkeys(words))
    inside = {character for word in known if len(word) > 1 for character in word}
    return [word for word in known if not (len(word) == 1 and word in inside and UNSPACED.match(word))]


def surface_forms(text: str, tokenize: Callable[[str], Sequence[str]]) -> dict[str, str]:
    """Token -> the piece of ``text`` that it comes from, so that people see words and not stems.

    Example:
        >>> surface_forms("Splitting arrays", lambda s: [s.lower()[:5]])
        {'split': 'Splitting', 'array': 'arrays'}
    """
    forms: dict[str, str] = {}
    for match in _CHUNK.finditer(text, 0, _LIMIT):
        tokens = tokenize(match[0])
        for token in tokens:
            # A run without spaces gives many tokens; each of them stands for itself.
            forms.setdefault(token, match[0] if len(tokens) == 1 else token)
    return forms


def best_passage(
    text: str, weights: Mapping[str, float], tokenize: Callable[[str], Sequence[str]], width: int = 240
) -> tuple[str, list[tuple[int, int]]]:
    """Choose the window of a document that covers the most weight of distinct query words.

    Args:
        text: The document.
        weights: Query token -> weight (idf).
        tokenize: The tokenizer that made them.
        width: Characters of the window.

    Returns:
        The passage (white space collapsed) and the spans of the matched words in it. Without any match, the
        beginning of the text.

    Example:
        >>> best_passage("First words. Then the norm of a matrix.", {"norm": 2.0}, lambda s: [s.lower()], width=20)
        ('the norm of a …', [(4, 8)])
    """
    spans = find_words(text, weights, tokenize)
    start = 0
    best = -1.0
    for number, (begin, _, _) in enumerate(spans):
        seen: dict[str, float] = {}
        for _, end, token in spans[number : number + 50]:
            if end > begin + width * 3 // 4:
                break
            seen[token] = weights[token]
        score = sum(seen.values())
        if score > best + 1e-9:
            best, start = score, begin
    if best < 0 or start < width // 2:
        start = 0
    else:
        # Begin at a line or sentence shortly before the first match.
        lead = text.rfind("\n", max(0, start - width // 3), start)
        if lead < 0:
            lead = max(text.rfind(mark, max(0, start - width // 3), start) for mark in (". ", "。", "！", "？", "．"))
        start = lead + 1 if lead >= 0 else max(0, start - width // 6)
        while start > 0 and start < len(text) and not _BREAK.match(text[start - 1]):
            start -= 1
    stop = min(len(text), start + width)
    if stop < len(text):
        cut = max((m.start() for m in _BREAK.finditer(text, start + width // 2, stop)), default=stop)
        stop = cut
    return _collapse(text, start, stop, spans)


def _collapse(
    text: str, start: int, stop: int, spans: Sequence[tuple[int, int, str]]
) -> tuple[str, list[tuple[int, int]]]:
    """Collapse white space in ``text[start:stop]`` and carry the spans over."""
    marks = [(b, e) for b, e, _ in spans if start <= b and e <= stop]
    place: dict[int, int] = {}
    out: list[str] = []
    length = 0
    for position in range(start, stop):
        character = text[position]
        if character.isspace():
            if out and out[-1] != " ":
                place[position] = length
                out.append(" ")
                length += 1
            else:
                place[position] = max(length - 1, 0)
            continue
        place[position] = length
        out.append(character)
        length += 1
    place[stop] = length
    passage = "".join(out).rstrip()
    merged: list[tuple[int, int]] = []
    for begin, end in sorted((place[b], place[e - 1] + 1) for b, e in marks):
        if merged and begin <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((begin, end))
    if stop < len(text) and text[stop:].strip():
        passage += " …"
    return passage, merged
