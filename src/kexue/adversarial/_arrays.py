"""Arrays of the user's as tensors."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor


def as_tensor(name: str, x: Any) -> Tensor:
    """A tensor as it is, without its graph; of an array or a list one of the same numbers, copied where it must be.

    Raises:
        TypeError: Something else, or no real numbers.
    """
    if isinstance(x, Tensor):
        return x.detach()
    if not hasattr(x, "__array__") and not isinstance(x, list | tuple):
        raise TypeError(f"{name} must be an array or a tensor; got {type(x).__name__}")
    array = np.asarray(x)
    if array.dtype.kind not in "fiub" or array.dtype.itemsize > 8:
        raise TypeError(f"{name} must hold real numbers of at most 64 bits; got dtype {array.dtype}")
    # Reversed, foreign and read-only arrays are nothing that torch takes.
    array = np.require(array, array.dtype.newbyteorder("="), ["C", "W"])
    return torch.from_numpy(array)
