"""Checks of user input that several rooms share. Every message names what was expected and what came."""

from __future__ import annotations

import math
import operator
from typing import Any


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raise ValueError unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}; got {value!r}")


def check_int(name: str, value: Any, minimum: int) -> None:
    """Raise TypeError unless ``value`` is an integer, ValueError if it is below ``minimum``."""
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:  # tensors and arrays have __index__ whatever they hold
        number = None
    if number is None:
        raise TypeError(f"{name} must be an integer; got {value!r} of type {type(value).__name__}")
    if number < minimum:
        raise ValueError(f"{name} must be at least {minimum}; got {value}")


def check_real(name: str, value: Any, *, above: float | None = None, minimum: float | None = None) -> None:
    """Raise TypeError unless ``value`` is a real number, ValueError if it is not finite or out of range."""
    try:
        # Floats first, and no math.isfinite below: torch.compile follows both for a number that changes between calls.
        real = isinstance(value, (int, float)) or hasattr(value, "__float__")
        number = float(value) if real and not isinstance(value, bool) else None
    except OverflowError:  # an integer beyond 1e308
        number = math.inf
    except (TypeError, ValueError, RuntimeError):  # a tensor or an array of several numbers
        number = None
    if number is None:
        raise TypeError(f"{name} must be a number; got {value!r} of type {type(value).__name__}")
    if not abs(number) < math.inf:  # written so that NaN fails
        raise ValueError(f"{name} must be finite; got {value!r}")
    if above is not None and not number > above:
        raise ValueError(f"{name} must be greater than {above}; got {value!r}")
    if minimum is not None and not number >= minimum:
        raise ValueError(f"{name} must be at least {minimum}; got {value!r}")
