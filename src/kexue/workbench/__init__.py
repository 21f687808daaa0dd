"""The main job: build a workspace from raw text, query it, report on it."""

from kexue.workbench.errors import WorkspaceError
from kexue.workbench.search import Hit
from kexue.workbench.workspace import Workspace

__all__ = ["Hit", "Workspace", "WorkspaceError"]
