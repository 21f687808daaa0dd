"""Decoding, tokenizers of released models, text by search and sampling; loaded on first use, as it brings torch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kexue.generation.constraints import (
        AllOf,
        BannedTokens,
        Constraint,
        ContainsKeywords,
        LengthBetween,
        keywords_of,
    )
    from kexue.generation.targets import Target

__all__ = [
    "AllOf",
    "BannedTokens",
    "Constraint",
    "ContainsKeywords",
    "LengthBetween",
    "Target",
    "keywords_of",
]

_MODULES = {
    "AllOf": "constraints",
    "BannedTokens": "constraints",
    "Constraint": "constraints",
    "ContainsKeywords": "constraints",
    "LengthBetween": "constraints",
    "Target": "targets",
    "keywords_of": "constraints",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(f"kexue.generation.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
