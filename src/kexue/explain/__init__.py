"""Explanations of what a model does; loaded when they are first used, as they bring torch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kexue.explain.path_kernel import PathKernel

__all__ = ["PathKernel"]

_MODULES = {"PathKernel": "path_kernel"}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(f"kexue.explain.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
