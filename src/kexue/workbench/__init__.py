"""The main job: build a workspace from raw text, query it, report on it; train language models and use them."""

from kexue.workbench.errors import WorkspaceError
from kexue.workbench.language import Correction, LanguageModel, TextScore
from kexue.workbench.search import Hit
from kexue.workbench.workspace import Workspace

__all__ = ["Correction", "Hit", "LanguageModel", "TextScore", "Workspace", "WorkspaceError"]
