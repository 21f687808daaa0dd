"""What every reader yields: a document with an id, a text and, where the source has them, a title and labels."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

SURROGATE = re.compile("[\ud800-\udfff]")
_KEYS = ("id", "text", "title", "labels", "meta")


def _check_text(name: str, value: Any) -> None:
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a str; got {value!r} of type {type(value).__name__}")
    if "\0" in value:
        raise ValueError(f"{name} must not contain NUL characters; found one at position {value.index(chr(0))}")
    # isascii is a flag of the string, so the usual English text is not scanned.
    if not value.isascii() and (half := SURROGATE.search(value)):
        raise ValueError(
            f"{name} must be valid Unicode; found half of a surrogate pair, U+{ord(half[0]):04X}, "
            f"at position {half.start()}"
        )


@dataclass(frozen=True, slots=True)
class Document:
    r"""A piece of text with a name.

    NUL characters and halves of surrogate pairs are rejected in every field: they cannot be stored as UTF-8 text.
    (:func:`kexue.corpus.read_documents` removes NUL characters from what it reads and reports surrogates with file and
    line.) Line ends and Unicode normalisation are left as they are.

    Args:
        id: Name, unique in a corpus: not blank, one line.
        text: What is searched and learned from; may be empty.
        title: One-line name or summary; empty when the source has none.
        labels: Names of classes the document belongs to, none of them empty.
        meta: Anything else that belongs to the document; keys are strings, values are what JSON can hold.

    Raises:
        TypeError: if a field has the wrong type.
        ValueError: if ``id`` is blank or has a line break, a label is empty, or a field is not valid Unicode.

    Example:
        >>> document = Document("poem:1", "床前明月光", title="静夜思", labels=("李白",))
        >>> document.to_json()
        '{"id": "poem:1", "text": "床前明月光", "title": "静夜思", "labels": ["李白"]}'
        >>> Document.from_json(document.to_json()) == document
        True
    """

    id: str
    text: str
    title: str = ""
    labels: tuple[str, ...] = ()
    meta: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        _check_text("id", self.id)
        if not self.id.strip() or "\n" in self.id or "\r" in self.id:
            raise ValueError(f"id must be one line and not blank; got {self.id!r}")
        _check_text("text", self.text)
        _check_text("title", self.title)
        if "\n" in self.title or "\r" in self.title:
            raise ValueError(f"title must be one line; got {self.title!r}")
        if not isinstance(self.labels, (tuple, list)):
            raise TypeError(f"labels must be a tuple of str; got {self.labels!r} of type {type(self.labels).__name__}")
        for label in self.labels:
            _check_text("a label", label)
            if not label.strip():
                raise ValueError(f"labels must not be blank; got {self.labels!r}")
        if not isinstance(self.meta, Mapping):
            raise TypeError(f"meta must be a mapping; got {self.meta!r} of type {type(self.meta).__name__}")
        for key in self.meta:
            if not isinstance(key, str):
                raise TypeError(f"the keys of meta must be str; got {key!r} of type {type(key).__name__}")
        object.__setattr__(self, "labels", tuple(self.labels))
        object.__setattr__(self, "meta", dict(self.meta))  # a copy: changing the caller's mapping changes nothing here

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a JSON-compatible dict; ``meta`` only if it holds something.

        Example:
            >>> Document("1", "one").to_dict()
            {'id': '1', 'text': 'one', 'title': '', 'labels': []}
        """
        value: dict[str, Any] = {"id": self.id, "text": self.text, "title": self.title, "labels": list(self.labels)}
        if self.meta:
            value["meta"] = dict(self.meta)
        return value

    def to_json(self) -> str:
        """Return the document as one line of JSON (keys id, text, title, labels, and meta if there is any).

        Raises:
            TypeError: if ``meta`` holds something that JSON cannot.
            ValueError: if ``meta`` holds an infinite number or NaN.

        Example:
            >>> Document("1", "one", meta={"page": 3}).to_json()
            '{"id": "1", "text": "one", "title": "", "labels": [], "meta": {"page": 3}}'
        """
        return json.dumps(self.to_dict(), ensure_ascii=False, allow_nan=False)

    @classmethod
    def from_json(cls, value: str | bytes | Mapping[str, Any]) -> Document:
        """Build a document from a line of JSON, or from the mapping such a line holds.

        Args:
            value: JSON text, or a mapping with the keys id, text and optionally title, labels, meta.

        Raises:
            ValueError: if the text is not JSON, a key is missing or unknown, or a field is not valid.
            TypeError: if a field has the wrong type.

        Example:
            >>> Document.from_json('{"id": "1", "text": "one"}')
            Document(id='1', text='one', title='', labels=(), meta={})
        """
        record = json.loads(value) if isinstance(value, (str, bytes)) else value
        if not isinstance(record, Mapping):
            raise ValueError(f"a document must be a JSON object; got {record!r}")
        missing = [key for key in ("id", "text") if key not in record]
        unknown = [key for key in record if key not in _KEYS]
        if missing or unknown:
            raise ValueError(f"a document has the keys {', '.join(_KEYS)} (id, text required); got {', '.join(record)}")
        return cls(**record)
