"""Sections of docstrings: the See Also entries and the summary."""

from __future__ import annotations

import re

_UNDERLINE = re.compile(r"\s*(-{3,}|={3,})\s*$")
_TITLE = re.compile(r"\s*[A-Z][A-Za-z ]*$")
_SEE_ALSO = re.compile(r"\s*see\s+also\s*$", re.I)
_DIRECTIVE = re.compile(r"(\s*)\.\.\s+seealso::(.*)$", re.I)
_NAME = r"(?::[\w:+-]+:)?`?[~!.]?[\w.]+(?:\(\))?`?"
_ENTRY = re.compile(rf"({_NAME}(?:\s*,\s*{_NAME})*)[,.]?\s*(?::.*)?$")
_ROLE = re.compile(r":[\w:+-]+:`([^`]+)`|(?<![`\w])`([\w.~!]+)(?:\(\))?`(?![`\w])")
_ROLE_PREFIX = re.compile(r"^(?::[\w:+-]+:)?`?")


def _bare(name: str) -> str:
    """Strip the markup from one reference: role, backquotes, ``~``, leading dot, call brackets."""
    name = _ROLE_PREFIX.sub("", name.strip()).rstrip("`").removesuffix("()").lstrip("~!.")
    if name.endswith(">") and "<" in name:  # a role with its own text: `text <target>`
        name = name[name.rindex("<") + 1 : -1].lstrip("~!.")
    return name.strip(". ")


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def _entries(body: list[str]) -> list[str]:
    """Names of the entries of a numpydoc section: ``a``, ``a : description`` or ``a, b, c``; deeper lines describe."""
    filled = [line for line in body if line.strip()]
    least = min(map(_indent, filled), default=0)
    names: list[str] = []
    for line in filled:
        if _indent(line) == least and (match := _ENTRY.match(line.strip())):
            names += [_bare(name) for name in match[1].split(",")]
    return names


def split_see_also(docstring: str) -> tuple[str, list[str]]:
    r"""Cut the See Also sections out of a docstring.

    Two forms are known: the numpydoc section (a line ``See Also`` underlined with at least three ``-`` or ``=``, up to
    the next underlined heading of letters and spaces) and the Sphinx directive ``.. seealso::`` with what is indented
    under it. Google style ``See Also:`` blocks are left where they are.

    Args:
        docstring: Cleaned docstring, as :func:`inspect.getdoc` gives it.

    Returns:
        The text without these sections, and the names of their entries without markup, in order, each once.

    Example:
        >>> text, names = split_see_also("Sine.\n\nSee Also\n--------\ncos, tan\nnumpy.arcsin : Inverse.\n")
        >>> text, names
        ('Sine.', ['cos', 'tan', 'numpy.arcsin'])
    """
    if re.search(r"see\s*also", docstring, re.I) is None:
        return docstring, []
    lines = docstring.split("\n")
    kept: list[str] = []
    names: list[str] = []
    i, count = 0, len(lines)

    def is_heading(k: int) -> bool:
        return k + 1 < count and _TITLE.match(lines[k]) is not None and _UNDERLINE.match(lines[k + 1]) is not None

    while i < count:
        directive = _DIRECTIVE.match(lines[i])
        if directive:
            end = i + 1
            while end < count and (not lines[end].strip() or _indent(lines[end]) > len(directive[1])):
                end += 1
            body = "\n".join([directive[2], *lines[i + 1 : end]])
            names += [_bare(a or b) for a, b in _ROLE.findall(body)]
        elif _SEE_ALSO.match(lines[i]) and i + 1 < count and _UNDERLINE.match(lines[i + 1]):
            end = i + 2
            while end < count and not is_heading(end):
                end += 1
            names += _entries(lines[i + 2 : end])
        else:
            kept.append(lines[i])
            i += 1
            continue
        while kept and not kept[-1].strip():
            kept.pop()
        if kept and any(line.strip() for line in lines[end:]):
            kept.append("")
        i = end
        while i < count and not lines[i].strip():
            i += 1
    return "\n".join(kept).rstrip() if len(kept) < count else docstring, [n for n in dict.fromkeys(names) if n]


_SIGNATURE = re.compile(r"[A-Za-z_][\w.]*\s*\(.*\)(?:\s*->\s*[^\n]+)?$", re.S)
_PARAGRAPH_END = re.compile(r"\n(?=[ \t]*(?:\n|\.\. |>>> |[-*] |:\w+[^`\n:]*:(?=\s)|\d+[.)] ))")
_ANY_UNDERLINE = re.compile(r"\n[ \t]*([=\-~^\"'#*+])\1{2,}[ \t]*(?=\n|$)")
_OVERLINE = re.compile(r"\A([=\-~^\"'#*+])\1{2,}[ \t]*\n")
_SENTENCE = re.compile(r"(?<!\be\.g)(?<!\bi\.e)(?<!\bvs)(?<!\bcf)(?<!\bal)(?<!\betc)[.!?](?=\s+[^a-z\s])|[。！？]")
_LONGEST = 300


def split_summary(text: str) -> tuple[str, str]:
    r"""Split a docstring into its summary, on one line, and the rest.

    The summary is the first sentence of the first paragraph (a first paragraph that is only a call signature, or a
    heading of one word, is passed over and stays in the rest). If it is longer than 300 characters it ends at the last
    space before that. A heading loses its underline. Summary and rest together are all of the text, so that the rest
    never repeats the summary's end.

    Example:
        >>> split_summary("Sum of array elements\nover a given axis. More.\n\nParameters")
        ('Sum of array elements over a given axis.', 'More.\n\nParameters')
    """
    text = _OVERLINE.sub("", text.strip())
    start = 0
    end = _paragraph(text, 0)
    line = text.find("\n")
    if 0 < line < end and _SIGNATURE.match(text[:line]):
        start = line + 1
    else:
        # Compiled functions have up to two: their own and the one for people.
        while end < len(text) and _SIGNATURE.match(text[start:end]):
            following = len(text) - len(text[end:].lstrip())
            if text[following:].startswith((".. ", ">>> ")):
                break
            start, end = following, _paragraph(text, following)
    underline = _ANY_UNDERLINE.search(text, start, end)
    if underline is not None:
        line_end, rest = underline.start(), underline.end()
        if " " not in (word := text[start:line_end].strip()) and start == 0:
            title, body = split_summary(text[rest:])
            if title:
                return title, _join(word, body)
        if "\n" in text[start:line_end]:  # the heading is not the first line: it begins another section
            line_end = rest = text.rindex("\n", start, line_end)
        return " ".join(text[start:line_end].split()), _join(text[:start], text[rest:])
    if sentence := _SENTENCE.search(text, start, end):
        end = sentence.end()
    if end - start > _LONGEST:
        space = max(text.rfind(" ", start, start + _LONGEST), text.rfind("\n", start, start + _LONGEST))
        end = space if space > start else start + _LONGEST
    return " ".join(text[start:end].split()), _join(text[:start], text[end:])


def _paragraph(text: str, start: int) -> int:
    """Return where the paragraph that begins at ``start`` ends."""
    match = _PARAGRAPH_END.search(text, start)
    return match.start() if match else len(text)


def _join(before: str, after: str) -> str:
    return "\n\n".join(part for part in (before.strip(), after.strip()) if part)
