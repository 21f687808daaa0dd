"""The main job: build a workspace from raw text, query it, report on it; train language models and use them.

What needs torch is loaded when it is first used: a search does not wait for it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kexue.workbench.errors import WorkspaceError
from kexue.workbench.search import Hit
from kexue.workbench.workspace import Workspace

if TYPE_CHECKING:
    from kexue.workbench.language import Correction, LanguageModel, TextScore

__all__ = ["Correction", "Hit", "LanguageModel", "TextScore", "Workspace", "WorkspaceError"]


def __getattr__(name: str) -> Any:
    if name in ("Correction", "LanguageModel", "TextScore"):
        from kexue.workbench import language

        return getattr(language, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
