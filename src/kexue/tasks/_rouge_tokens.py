"""From texts to what the overlaps are counted on: token ids and sorted n-grams of many texts at once."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kexue._checks import check_choice

__all__ = [
    "Text",
    "Tokenizer",
    "Tokens",
    "as_tokens",
    "check_tokenizer",
    "check_unit",
    "cut_by",
    "numbered",
    "token_table",
]

Text = str | Sequence[Hashable]
Tokenizer = Callable[[str], Iterable[Hashable]]


@dataclass(frozen=True)
class Tokens:
    """R texts as ids with their n-grams; the arrays that :func:`kexue.tasks._rouge_kernel.overlaps` wants.

    Attributes:
        ids: (T,) int32; text r is ``ids[starts[r]:starts[r + 1]]``.
        ones, one_starts: Sorted 1-grams of each text: the id.
        twos, two_starts: Sorted 2-grams of each text: (first id + 1) * width + second id.
        weights: (width,) int64 weight of each token; (0,) if everything counts 1.
        width: Distinct tokens, at least 1.
        sizes: (R, 3) int64: how much the 1-grams, 2-grams and tokens of each text count.
    """

    ids: NDArray[np.int32]
    starts: NDArray[np.int64]
    ones: NDArray[np.int64]
    one_starts: NDArray[np.int64]
    twos: NDArray[np.int64]
    two_starts: NDArray[np.int64]
    weights: NDArray[np.int64]
    width: int
    sizes: NDArray[np.int64]


def token_table(texts: Sequence[Text], unique: bool, weighted: bool) -> Tokens:
    """Number the tokens of all texts (the characters of a str, white space left out) and sort their n-grams.

    ``unique`` drops repeated n-grams of a text; ``weighted`` weighs a token, a str, by its length.
    """
    if not weighted and all(isinstance(text, str) for text in texts):
        ids, starts, width = _characters([text for text in texts if isinstance(text, str)])
        weights = np.zeros(0, np.int64)
    else:
        ids, starts, known = numbered(texts)
        width = max(1, len(known))
        weights = np.array([len(_str_token(token)) for token in known] if weighted else [], np.int64)
        if (weights == 1).all():  # as without weights, which is much faster
            weights, weighted = np.zeros(0, np.int64), False
    rows = np.repeat(np.arange(len(texts)), np.diff(starts))
    wide = ids.astype(np.int64)
    ones, one_rows = _sorted_grams(wide, rows, len(texts), unique)
    inside = rows[1:] == rows[:-1]
    twos, two_rows = _sorted_grams(((wide[:-1] + 1) * width + wide[1:])[inside], rows[1:][inside], len(texts), unique)
    counted: list[tuple[NDArray[Any], NDArray[Any] | None]] = [(one_rows, None), (two_rows, None), (rows, None)]
    if weighted:
        pairs = weights[twos // width - 1] + weights[twos % width]
        counted = [(one_rows, weights[ones]), (two_rows, pairs), (rows, weights[ids])]
    sizes = np.stack([np.bincount(where, mass, len(texts)).astype(np.int64) for where, mass in counted], axis=1)
    return Tokens(
        ids, starts, ones, _bounds(one_rows, len(texts)), twos, _bounds(two_rows, len(texts)), weights, width, sizes
    )


def as_tokens(name: str, text: Any) -> Text:
    """Check that a text is a str or a list of hashable tokens."""
    if isinstance(text, str):
        return text
    if isinstance(text, np.ndarray) and text.ndim == 1:
        text = text.tolist()
    if not isinstance(text, Sequence) or isinstance(text, (bytes, bytearray, memoryview)):
        raise TypeError(f"{name} must be a str or a list of tokens; got {text!r} of type {type(text).__name__}")
    return text


def check_unit(unit: Any, weight: Any, unique: Any, tokenizer: Any) -> None:
    """Check the options that say what is counted."""
    check_choice("unit", unit, ("char", "word"))
    check_choice("weight", weight, (None, "chars"))  # type: ignore[arg-type]
    if not isinstance(unique, (bool, np.bool_)):
        raise TypeError(f"unique must be True or False; got {unique!r} of type {type(unique).__name__}")
    check_tokenizer(tokenizer)


def check_tokenizer(tokenizer: Any) -> None:
    """Check that it is a function, or None."""
    if tokenizer is not None and not callable(tokenizer):
        raise TypeError(f"tokenizer must be a function from a text to its tokens; got {tokenizer!r}")


def cut_by(tokenizer: Tokenizer, text: str) -> list[Hashable]:
    """The tokens that a function of the user's finds."""
    found = tokenizer(text)
    if not isinstance(found, Iterable):
        raise TypeError(f"tokenizer must return an iterable of tokens; got {found!r} of type {type(found).__name__}")
    return list(found)


def _characters(texts: list[str]) -> tuple[NDArray[np.int32], NDArray[np.int64], int]:
    """Ids of all characters that are no white space, where each text starts, and how many ids there are."""
    dense = ["".join(text.split()) for text in texts]
    starts = np.concatenate([[0], np.cumsum([len(text) for text in dense], dtype=np.int64)])
    points = np.frombuffer("".join(dense).encode("utf-32-le", "surrogatepass"), "<u4")
    table = np.zeros(int(points.max(initial=0)) + 1, np.int32)
    table[points] = 1
    width = max(1, int(table.sum()))
    np.cumsum(table, out=table)
    return table[points] - np.int32(1), starts, width


def numbered(texts: Iterable[Text]) -> tuple[NDArray[np.int32], NDArray[np.int64], dict[Hashable, int]]:
    """Ids of all tokens by first appearance, where each text starts, and the tokens."""
    known: dict[Hashable, int] = {}
    ids: list[int] = []
    starts = [0]
    for text in texts:
        tokens = "".join(text.split()) if isinstance(text, str) else text
        try:
            ids += [known.setdefault(token, len(known)) for token in tokens]
        except TypeError as error:
            raise TypeError(f"tokens must be hashable; got {tokens!r}") from error
        starts.append(len(ids))
    return np.array(ids, np.int32), np.array(starts, np.int64), known


def _str_token(token: Hashable) -> str:
    if not isinstance(token, str):
        raise TypeError(f"weight='chars' needs tokens that are str; got {token!r} of type {type(token).__name__}")
    return token


def _sorted_grams(
    grams: NDArray[np.int64], rows: NDArray[np.int64], count: int, unique: bool
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """N-grams ordered by text and number, without repetitions if ``unique``, and their texts."""
    span = int(grams.max(initial=0)) + 1
    if span * max(1, count) < 2**63:  # one number for both: several times faster than sorting by two keys
        joint = rows * span + grams
        joint.sort()
        rows = joint // span
        grams = joint - rows * span
    else:
        order = np.lexsort((grams, rows))
        grams, rows = grams[order], rows[order]
    if unique and len(grams):
        new = np.concatenate([[True], (grams[1:] != grams[:-1]) | (rows[1:] != rows[:-1])])
        grams, rows = grams[new], rows[new]
    return grams, rows


def _bounds(rows: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """Where each text starts among sorted text numbers."""
    return np.searchsorted(rows, np.arange(count + 1)).astype(np.int64)
