"""From labels and templates to the prompts that are ranked."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

_PLACE = re.compile(r"\{(?:label)?\}")


def check_texts(name: str, texts: Any) -> list[str]:
    """A list of the texts; a list, tuple, array or Series of str, of one dimension.

    Raises:
        TypeError: One string instead of a list of them, or an entry that is no str (also None and NaN).
        ValueError: An array of another shape, or an entry that is no text (a lone surrogate).
    """
    if isinstance(texts, str | bytes) or not hasattr(texts, "__iter__") or isinstance(texts, Mapping):
        raise TypeError(f"{name} must be a list of str; got {type(texts).__name__}")
    shape = getattr(texts, "shape", None)
    if shape is not None and len(shape) != 1:
        raise ValueError(f"{name} must have one dimension; got shape {tuple(shape)}")
    found = list(texts)
    for number, text in enumerate(found):
        if not isinstance(text, str):
            raise TypeError(f"{name} must be str; entry {number} is {text!r} of type {type(text).__name__}")
        try:
            text.encode()
        except UnicodeEncodeError as error:  # from a file read with errors="surrogateescape"; tokenizers fail on it
            raise ValueError(f"entry {number} of {name} has a lone surrogate at place {error.start}") from None
    return [str(text) for text in found]  # numpy.str_ to str, which tokenizers ask for


def fill(template: str, word: str) -> str:
    """Put ``word`` in every place ``{}`` or ``{label}`` of the template.

    Example:
        >>> fill("这是一则{label}新闻", "体育")
        '这是一则体育新闻'
    """
    return _PLACE.sub(lambda _: word, template)


def build_prompts(labels: Any, template: Any) -> tuple[NDArray[Any], list[str], NDArray[np.int64]]:
    """The classes, all prompts, and the class of each prompt.

    Args:
        labels: List of str, or mapping label -> word, or list of words, to be put into the template.
        template: str or list of str with a place ``{}`` or ``{label}``.

    Raises:
        TypeError: Labels, words or templates that are not str (the keys of a mapping may be anything hashable).
        ValueError: Fewer than 2 labels, empty or duplicate ones, a template without a place, equal prompts.
    """
    names, words = _words(labels)
    templates = [template] if isinstance(template, str) else check_texts("template", template)
    if not templates:
        raise ValueError("template must hold at least one template; got an empty list")
    for text in templates:
        if _PLACE.search(text) is None:
            raise ValueError(f"a template needs a place {{}} or {{label}} for the label; got {text!r}")
    prompts: list[str] = []
    owners: list[int] = []
    owner: dict[str, int] = {}
    for number, own in enumerate(words):
        for prompt in (fill(text, word) for word in own for text in templates):
            if not prompt.strip():
                raise ValueError(f"the prompt of label {names[number]!r} is empty: {prompt!r}")
            if prompt in owner:
                other = names[owner[prompt]]
                raise ValueError(f"duplicate prompt {prompt!r}, of the labels {other!r} and {names[number]!r}")
            owner[prompt] = number
            prompts.append(prompt)
            owners.append(number)
    return _class_array(names), prompts, np.array(owners, np.int64)


def _words(labels: Any) -> tuple[list[Any], list[list[str]]]:
    if isinstance(labels, Mapping):
        names = list(labels)
        words = []
        for name, given in labels.items():
            own = [given] if isinstance(given, str) else check_texts(f"labels[{name!r}]", given)
            if not own:
                raise ValueError(f"labels[{name!r}] must hold at least one word; got an empty list")
            words.append(own)
    else:
        if labels is None:
            raise ValueError("labels must be a list of at least 2 labels, or a mapping of them to words; got None")
        names = list(check_texts("labels", labels))
        words = [[name] for name in names]
    if len(names) < 2:
        raise ValueError(f"labels must hold at least 2 labels; got {len(names)}")
    for name, own in zip(names, words, strict=True):
        if any(not word.strip() for word in own):
            raise ValueError(f"labels must not be empty; got {next(w for w in own if not w.strip())!r} for {name!r}")
    if len(set(names)) != len(names):
        twice = next(name for number, name in enumerate(names) if name in names[:number])
        raise ValueError(f"duplicate label {twice!r}")
    return names, words


def _class_array(names: Sequence[Any]) -> NDArray[Any]:
    """The labels as an array that keeps their type; numbers of numpy count as numbers."""
    plain = [name.item() if isinstance(name, np.generic) else name for name in names]
    kinds = {type(name) for name in plain}
    if len(kinds) == 1 and kinds <= {str, int, bool, float}:
        return np.array(plain)
    array = np.empty(len(names), object)
    array[:] = names
    return array
