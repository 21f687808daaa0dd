"""Explanations of what a model does; loaded when they are first used, as they bring torch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kexue.explain._text_result import TextExplanation, TextExplanations
    from kexue.explain.attribution import IntegratedGradients, integrated_gradients
    from kexue.explain.path_kernel import PathKernel
    from kexue.explain.similarity import PairExplanation, explain_pair
    from kexue.explain.text import explain_text

__all__ = [
    "IntegratedGradients",
    "PairExplanation",
    "PathKernel",
    "TextExplanation",
    "TextExplanations",
    "explain_pair",
    "explain_text",
    "integrated_gradients",
]

_MODULES = {
    "IntegratedGradients": "attribution",
    "PairExplanation": "similarity",
    "PathKernel": "path_kernel",
    "TextExplanation": "_text_result",
    "TextExplanations": "_text_result",
    "explain_pair": "similarity",
    "explain_text": "text",
    "integrated_gradients": "attribution",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(f"kexue.explain.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
