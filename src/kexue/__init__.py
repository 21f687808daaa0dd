"""Small, fast, explainable language models from your own text, and the methods behind them.

Importing ``kexue`` is cheap: the rooms (``kexue.words``, ``kexue.losses``, ...) are loaded when they are first used.
"""

from __future__ import annotations

import importlib
from types import ModuleType

__version__ = "0.1.0"

_ROOMS = (
    "attention",
    "catalog",
    "corpus",
    "explain",
    "generation",
    "losses",
    "models",
    "reproduce",
    "stats",
    "tasks",
    "training",
    "words",
    "workbench",
)

__all__ = ["__version__", *_ROOMS]


def __getattr__(name: str) -> ModuleType:
    if name in _ROOMS:
        return importlib.import_module(f"kexue.{name}")
    raise AttributeError(f"module 'kexue' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
