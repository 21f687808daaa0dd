"""Token sequences as hashable states, and the few ways in which tokenizers and models are called."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

Ids = tuple[int, ...]


def as_ids(ids: Any, name: str = "a state") -> Ids:
    """A sequence of token ids as a tuple of Python integers, checked."""
    if type(ids) is tuple and all(type(token) is int for token in ids):
        found: Ids = ids
    else:
        if hasattr(ids, "tolist"):  # tensors and arrays
            ids = ids.tolist()
        if isinstance(ids, str | bytes) or not isinstance(ids, Iterable):
            raise TypeError(f"{name} must be a sequence of token ids; got {ids!r} of type {type(ids).__name__}")
        try:
            found = tuple(operator.index(token) for token in ids)
        except TypeError:
            raise TypeError(f"{name} must be a sequence of integers, token ids; got {ids!r}") from None
    if found and min(found) < 0:
        raise ValueError(f"{name} must hold token ids of at least 0; got {min(found)}")
    return found


def as_states(states: Any) -> list[Ids]:
    """A list of token sequences, checked; a tensor or array of shape (N, T) counts as N sequences."""
    if hasattr(states, "tolist"):
        states = states.tolist()
    if isinstance(states, str | bytes) or not isinstance(states, Iterable):
        raise TypeError(f"states must be a list of sequences of token ids; got {type(states).__name__}")
    return [as_ids(state, f"state {i}") for i, state in enumerate(states)]


def encode(tokenizer: Any, text: str) -> Ids:
    """Token ids of a text without special tokens, from a tokenizer of transformers, of tokenizers, or a function."""
    method = getattr(tokenizer, "encode", None)
    if method is None:
        if not callable(tokenizer):
            raise TypeError(f"tokenizer must have encode(text) or be callable; got {type(tokenizer).__name__}")
        method = tokenizer
    plain = _accepts(method, "add_special_tokens")
    ids = method(text, add_special_tokens=False) if plain else method(text)
    return as_ids(getattr(ids, "ids", ids), f"the ids of {text!r}")


def _accepts(function: Any, name: str) -> bool:
    """Whether a callable takes the keyword argument ``name``."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):  # a built-in without a signature, such as the methods of tokenizers.Tokenizer
        return True
    return name in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def forward_options(model: nn.Module) -> dict[str, Any]:
    """Keyword arguments for a forward pass that only wants logits: no key-value cache is built."""
    parameters = inspect.signature(model.forward).parameters
    return {"use_cache": False} if "use_cache" in parameters else {}


def logits_of(output: Any) -> Tensor:
    """The logits of a model's output: a tensor, a ModelOutput, or a tuple that begins with them."""
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if logits is None and isinstance(output, tuple) and output:
        logits = output[0]
    if not isinstance(logits, Tensor) or logits.dim() != 3:
        shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(output).__name__
        raise ValueError(f"the model must return logits of shape (B, T, V); got {shape}")
    return logits


@contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """Dropout off within the block; every module's flag is as before afterwards."""
    training = [module for module in model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True


def log_rho_of(target: Any) -> Callable[[list[Any]], NDArray[np.float64]]:
    """Log rho of a list of states as (N,) float64, from a target object or a callable; NaN and +inf raise."""
    function = getattr(target, "log_rho", target)
    if not callable(function):
        raise TypeError(f"target must be a Target or a callable, states -> log rho; got {type(target).__name__}")

    def log_rho(states: list[Any]) -> NDArray[np.float64]:
        values = vector(function(states), len(states), "target")
        bad = np.isnan(values) | (values == np.inf)
        if bad.any():
            raise ValueError(
                f"log rho must be a number or -inf; got {values[bad][0]} for {states[int(bad.argmax())]!r}"
            )
        return values

    return log_rho


def vector(values: Any, count: int, name: str) -> NDArray[np.float64]:
    """What a user's function returned for ``count`` states, as (N,) float64."""
    if isinstance(values, Tensor):
        values = values.detach().cpu().double().numpy()
    found = np.asarray(values, dtype=np.float64)
    if found.shape != (count,):
        raise ValueError(f"{name} must return one number for each of the {count} states; got the shape {found.shape}")
    return found
