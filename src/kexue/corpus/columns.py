"""Which column is the text, the id, the title, the label; and from a record to the fields of a document."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kexue.corpus.document import SURROGATE

#: Names that are recognised for each role, best first; compared without case and surrounding space.
GUESSES: dict[str, tuple[str, ...]] = {
    "id": ("id", "_id", "doc_id", "docid", "uid", "uuid", "编号"),
    "text": (
        *(
            "text",
            "content",
            "body",
            "sentence",
            "review",
            "abstract",
            "paragraphs",
            "paragraph",
            "document",
            "passage",
        ),
        *("正文", "内容", "文本", "摘要"),
    ),
    "title": ("title", "headline", "name", "subject", "标题", "题目"),
    "label": (
        *("label", "labels", "category", "categories", "tags", "tag", "class", "group"),
        *("标签", "类别", "分类", "组"),
    ),
}
_KNOWN = frozenset(name for names in GUESSES.values() for name in names)
_LISTS = frozenset(("labels", "tags", "categories"))  # plural: a string there holds several labels
_SEPARATORS = re.compile(r"[,;|，；、]")


@dataclass(frozen=True, slots=True)
class Roles:
    """The name of the column for each role, or None."""

    id: str | None = None
    text: str | None = None
    title: str | None = None
    label: str | None = None

    def items(self) -> Iterable[tuple[str, str | None]]:
        """Iterate over (role, column)."""
        return (("id", self.id), ("text", self.text), ("title", self.title), ("label", self.label))


def fold(name: str) -> str:
    """Return the form of a column name in which names are compared."""
    return name.strip().casefold()


def is_header(row: Sequence[str], flags: Roles) -> bool:
    """Whether the first row of a table holds names: it has a recognised name or one that was asked for."""
    wanted = {fold(name) for _, name in flags.items() if name is not None and not name.strip().isdigit()}
    return any(fold(cell) in _KNOWN or fold(cell) in wanted for cell in row)


def choose(names: Sequence[str], flags: Roles, required: bool = True) -> Roles:
    """Give each role its column.

    A column that was asked for is looked up by its exact name, then without case, then as a number counted from 1.
    Otherwise the first recognised name wins. Without one for the text, the only column that has no other role is it.

    Args:
        names: The columns there are.
        flags: The columns that were asked for.
        required: Whether a column that was asked for must be there (not so in JSON, where keys may be absent).

    Raises:
        ValueError: if the text cannot be told or a column that was asked for is not there; it lists the columns.

    Example:
        >>> choose(["label", "review"], Roles())
        Roles(id=None, text='review', title=None, label='label')
    """
    exact = set(names)
    folded: dict[str, str] = {}
    for name in names:
        folded.setdefault(fold(name), name)
    found: dict[str, str | None] = {}
    for role, flag in flags.items():
        if flag is None:
            continue
        if flag in exact:
            found[role] = flag
        elif fold(flag) in folded:
            found[role] = folded[fold(flag)]
        elif flag.strip().isdigit() and 1 <= int(flag) <= len(names):
            found[role] = names[int(flag) - 1]
        elif required or role == "text":
            raise ValueError(f"there is no column {flag!r} for the {role}; columns found: {_listing(names)}")
        else:
            found[role] = None
    taken = set(found.values())
    for role, guesses in GUESSES.items():
        if role not in found:
            options = (folded[guess] for guess in guesses if guess in folded and folded[guess] not in taken)
            found[role] = next(options, None)
    if found["text"] is None:
        rest = [name for name in names if name not in found.values() and fold(name) != "meta"]
        if len(rest) != 1:
            raise ValueError(
                f"cannot tell which column is the text; name it with text_column. Columns found: {_listing(names)}"
            )
        found["text"] = rest[0]
    return Roles(**found)


def _listing(names: Sequence[str]) -> str:
    shown = ", ".join(repr(name if len(name) <= 40 else name[:37] + "...") for name in names[:20])
    return shown + (f" and {len(names) - 20} more" if len(names) > 20 else "") if names else "none"


def _plain(value: Any, what: str) -> str:
    """Return a scalar or a list of scalars as text, one item a line."""
    if isinstance(value, str):
        text = value
    elif value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    elif isinstance(value, bool):
        return "true" if value else "false"
    elif isinstance(value, (list, tuple)):
        text = "\n".join(_plain(item, what) for item in value)
    elif isinstance(value, float) and value.is_integer():
        return str(int(value))
    elif isinstance(value, Mapping):
        raise ValueError(f"{what} must be a string or a list of strings; got an object with {_listing(list(value))}")
    elif isinstance(value, bytes):
        raise ValueError(f"{what} must be a string or a list of strings; got bytes")
    else:
        text = str(value)
    if "\0" in text:
        text = text.replace("\0", "")
    if not text.isascii() and (half := SURROGATE.search(text)):
        raise ValueError(f"{what} holds half of a surrogate pair, U+{ord(half[0]):04X}")
    return text


def fields(record: Mapping[str, Any], roles: Roles) -> tuple[str, str, str, tuple[str, ...], Mapping[str, Any]]:
    """Return id, text, title, labels and meta of a record; the id is empty where it has none.

    Lists become lines of the text and several labels; a string is one label, except in columns called ``labels``,
    ``tags`` or ``categories``, where commas, semicolons and bars separate labels. Line ends become ``\\n``.

    Raises:
        ValueError: if a value cannot be text.
    """
    text = _plain(record.get(roles.text), "the text") if roles.text is not None else ""
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    name = " ".join(_plain(record.get(roles.id), "the id").split()) if roles.id is not None else ""
    title = " ".join(_plain(record.get(roles.title), "the title").split()) if roles.title is not None else ""
    labels: tuple[str, ...] = ()
    if roles.label is not None:
        value = record.get(roles.label)
        if isinstance(value, str) and fold(roles.label) in _LISTS:
            value = _SEPARATORS.split(value)
        items = value if isinstance(value, (list, tuple)) else [value]
        labels = tuple(label for item in items if (label := " ".join(_plain(item, "a label").split())))
    meta = record.get("meta")
    return name, text, title, labels, meta if isinstance(meta, Mapping) else {}
