"""Encoders and the parts they are built from; loaded when they are first used, as they bring torch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kexue.models.bag_encoder import BagEncoder
    from kexue.models.gau_alpha import GAUAlphaConfig, GAUAlphaForMaskedLM, GAUAlphaModel

__all__ = ["BagEncoder", "GAUAlphaConfig", "GAUAlphaForMaskedLM", "GAUAlphaModel"]

_MODULES = {
    "BagEncoder": "bag_encoder",
    "GAUAlphaConfig": "gau_alpha",
    "GAUAlphaForMaskedLM": "gau_alpha",
    "GAUAlphaModel": "gau_alpha",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(f"kexue.models.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
