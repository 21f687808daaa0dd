"""Decoding, tokenizers of released models, text by search and sampling; loaded on first use, as it brings torch."""

from __future__ import annotations

import importlib
from typing import Any

__all__: list[str] = []

_MODULES: dict[str, str] = {}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(f"kexue.generation.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
