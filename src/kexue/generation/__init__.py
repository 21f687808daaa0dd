"""Decoding, tokenizers of released models, text by search and sampling; loaded on first use, as it brings torch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kexue.generation.cpm_tokenizer import CPMTokenizer
    from kexue.generation.loading import load_causal_lm
    from kexue.generation.prompting import few_shot
    from kexue.generation.roundtrip import RoundTrip, check_roundtrip

__all__ = [
    "CPMTokenizer",
    "RoundTrip",
    "check_roundtrip",
    "few_shot",
    "load_causal_lm",
]

_MODULES = {
    "CPMTokenizer": "cpm_tokenizer",
    "RoundTrip": "roundtrip",
    "check_roundtrip": "roundtrip",
    "few_shot": "prompting",
    "load_causal_lm": "loading",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(f"kexue.generation.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
