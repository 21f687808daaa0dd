"""Token ids at the door: integers inside the vocabulary, or an error that names them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray


def id_array(name: str, ids: Any) -> NDArray[Any]:
    """``ids`` (tensor, array or nested lists) as a numpy array of integers; tensors share memory where they can.

    Raises:
        TypeError: They are no integers.
        ValueError: Lists of different lengths.
    """
    try:
        array = ids.detach().cpu().numpy() if isinstance(ids, torch.Tensor) else np.asarray(ids)
    except ValueError:
        raise ValueError(f"{name} must have rows of one length, padded where they differ; got ragged lists") from None
    if array.size == 0 and not isinstance(ids, (torch.Tensor, np.ndarray)):
        array = array.astype(np.int64)  # numpy makes floats of an empty list
    if array.dtype.kind not in "iu":
        raise TypeError(f"{name} must be integers; got {array.dtype}")
    return array


def check_ids(name: str, ids: NDArray[Any], vocab_size: int) -> None:
    """Raise ValueError unless every id is in [0, vocab_size).

    On a GPU an id outside of the embedding kills the process at some later moment, without saying which one it was.
    """
    if ids.size == 0 or (ids.min() >= 0 and ids.max() < vocab_size):
        return
    wrong = (ids < 0) | (ids >= vocab_size)
    values = sorted(set(ids[wrong].tolist()))
    place = tuple(int(i) for i in np.argwhere(wrong)[0])
    listing = ", ".join(map(str, values[:5])) + (", ..." if len(values) > 5 else "")
    raise ValueError(
        f"{name} must be in [0, {vocab_size}); got {listing} ({int(wrong.sum())} in all, the first at "
        f"{place[0] if len(place) == 1 else place})"
    )


def join(name: str, texts: Iterable[Any], vocab_size: int | None) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """Ids of all texts in one row, and the length of each text; a bad text or id is named.

    Args:
        name: What the texts are, for the message.
        texts: Sequences of ids.
        vocab_size: Size of the vocabulary; None: any id that is not negative and fits into 32 bits.
    """
    limit = 1 << 31 if vocab_size is None else int(vocab_size)
    arrays = []
    for number, text in enumerate(texts):
        array = text if isinstance(text, np.ndarray) else id_array(f"{name}[{number}]", text)
        if array.ndim != 1:
            raise ValueError(f"{name}[{number}] must be one sequence of ids; got shape {array.shape}")
        if array.dtype.kind not in "iu":
            raise TypeError(f"{name}[{number}] must be integers; got {array.dtype}")
        arrays.append(array)
    sizes = np.array([len(array) for array in arrays], np.int64)
    tokens = np.concatenate(arrays) if arrays else np.zeros(0, np.int32)
    if tokens.size and not (tokens.min() >= 0 and tokens.max() < limit):
        for number, array in enumerate(arrays):
            check_ids(f"{name}[{number}]", array, limit)
    return tokens.astype(np.int32), sizes


def check_id(name: str, value: Any, vocab_size: int | None) -> int:
    """One id as an int."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be an integer; got {value!r} of type {type(value).__name__}")
    number = int(value.__index__())
    if number < 0 or (vocab_size is not None and number >= vocab_size):
        limit = "at least 0" if vocab_size is None else f"in [0, {vocab_size})"
        raise ValueError(f"{name} must be {limit}; got {number}")
    return number


def ranges(sizes: NDArray[Any]) -> NDArray[np.int64]:
    """0 ... sizes[0] - 1, 0 ... sizes[1] - 1, and so on, in one row.

    Example:
        >>> ranges(np.array([3, 0, 2])).tolist()
        [0, 1, 2, 0, 1]
    """
    ends = np.cumsum(sizes, dtype=np.int64)
    total = int(ends[-1]) if len(ends) else 0
    return np.arange(total) - np.repeat(ends - sizes, sizes)
