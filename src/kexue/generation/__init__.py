"""Decoding, tokenizers of released models, text by search and sampling; loaded on first use, as it brings torch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kexue.generation.causal_lm import CausalLM, generate_fast, stream
    from kexue.generation.cpm_tokenizer import CPMTokenizer
    from kexue.generation.filters import filter_logits, token_probabilities
    from kexue.generation.loading import load_causal_lm
    from kexue.generation.prompting import few_shot
    from kexue.generation.roundtrip import RoundTrip, check_roundtrip

__all__ = [
    "CPMTokenizer",
    "CausalLM",
    "RoundTrip",
    "check_roundtrip",
    "few_shot",
    "filter_logits",
    "generate_fast",
    "load_causal_lm",
    "stream",
    "token_probabilities",
]

_MODULES = {
    "CPMTokenizer": "cpm_tokenizer",
    "CausalLM": "causal_lm",
    "RoundTrip": "roundtrip",
    "check_roundtrip": "roundtrip",
    "few_shot": "prompting",
    "filter_logits": "filters",
    "generate_fast": "causal_lm",
    "load_causal_lm": "loading",
    "stream": "causal_lm",
    "token_probabilities": "filters",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(f"kexue.generation.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
