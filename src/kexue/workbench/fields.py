"""What the head, the body and the name of a document are: the rules for ids, titles and first lines."""

from __future__ import annotations

import re

HEAD_LIMIT = 200  # characters; a longer first line is a paragraph, of which the first sentence may be the head
_SENTENCE = re.compile(r".*?(?:[.!?](?=\s)|[。！？])", re.S)
_SEPARATORS = re.compile(r"[./\\:#]+")
_NAME = re.compile(r"(?=.*[^\W\d_])[\w.\-/\\:#$<>+]+")
UNSPACED = re.compile(  # ideographs, kana, Thai and its neighbours: words are not divided by spaces
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
)
_SUFFIX = re.compile(r"\.(?:txt|md|rst|html?|jsonl?|csv|parquet|py|tex|pdf|docx?|log)$", re.I)


def is_name(text: str) -> bool:
    """Whether ``text`` looks like an identifier or a path rather than a sentence.

    Example:
        >>> is_name("numpy.linalg.norm"), is_name("Matrix or vector norm."), is_name("2024-01")
        (True, False, False)
    """
    return bool(_NAME.fullmatch(text.strip()))


def is_title(text: str) -> bool:
    """Whether a given title says something as text rather than being an identifier.

    A title of an unspaced script is one run of letters without being a name, unless it has the separators of a path.

    Example:
        >>> is_title("Matrix or vector norm."), is_title("numpy.linalg.norm"), is_title("静夜思"), is_title("诗/静夜思")
        (True, False, True, False)
    """
    text = text.strip()
    if not is_name(text):
        return bool(text)
    return bool(UNSPACED.search(text)) and not _SEPARATORS.search(text)


def split_head(title: str, text: str, first_line: bool) -> tuple[str, str]:
    """Divide a document into head and body.

    Args:
        title: Its title; a title that is a name is no head.
        text: Its text.
        first_line: Whether the first line (or first sentence of a long line) stands in for a missing title.

    Example:
        >>> split_head("", "Matrix norm.\\nReturns a float.", True)
        ('Matrix norm.', 'Returns a float.')
        >>> split_head("norm", "Returns a float.", False)
        ('', 'Returns a float.')
    """
    title = title.strip()
    body = text.lstrip()
    if title and is_title(title):
        # A summary of several lines is given as one line: it is found again whatever its line breaks.
        start = re.match(r"\s+".join(map(re.escape, title.split())) + r"(?!\w)", body)
        return title, body[start.end() :] if start else body
    if not first_line:
        return "", body
    line, _, rest = body.partition("\n")
    if len(line) <= HEAD_LIMIT and rest.strip():
        return line.strip(), rest
    found = _SENTENCE.match(body[:HEAD_LIMIT])
    if found and body[found.end() :].strip():
        return found[0].strip(), body[found.end() :]
    return "", body


def name_and_parent(identifier: str, title: str) -> tuple[str, str]:
    """The own name of a document and its container, from a structured id or a title that is a name.

    Example:
        >>> name_and_parent("numpy.linalg.norm", ""), name_and_parent("guide/setup.md", "Setting up")
        (('norm', 'numpy.linalg'), ('setup', 'guide'))
    """
    # A title that is text already counts as such.
    candidates = [text.strip() for text in (identifier, "" if is_title(title) else title) if is_name(text)]
    if not candidates:
        return "", ""
    # A title such as ``norm`` may be all there is besides a number; a dotted id says more than a bare title.
    chosen = max(candidates, key=lambda text: len(_SEPARATORS.split(_SUFFIX.sub("", text))))
    pieces = [piece for piece in _SEPARATORS.split(_SUFFIX.sub("", chosen)) if piece]
    if not pieces:
        return "", ""
    own = next((piece for piece in reversed(pieces) if any(c.isalpha() for c in piece)), pieces[-1])
    return own, chosen[: chosen.rfind(own)].rstrip("./\\:#")
