"""Decoding, tokenizers of released models, text by search and sampling; loaded on first use, as it brings torch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kexue.generation.causal_lm import CausalLM, generate_fast, stream
    from kexue.generation.filters import filter_logits, token_probabilities

__all__ = [
    "CausalLM",
    "filter_logits",
    "generate_fast",
    "stream",
    "token_probabilities",
]

_MODULES = {
    "CausalLM": "causal_lm",
    "filter_logits": "filters",
    "generate_fast": "causal_lm",
    "stream": "causal_lm",
    "token_probabilities": "filters",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(f"kexue.generation.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
