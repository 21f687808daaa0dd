"""What can be wrong with a workspace, said so that the user knows what to do."""

from __future__ import annotations


class WorkspaceError(ValueError):
    """A workspace cannot be built, opened or queried; the message says what is wrong and what to do.

    Example:
        >>> raise WorkspaceError("notes: not a kexue workspace")
        Traceback (most recent call last):
        kexue.workbench.errors.WorkspaceError: notes: not a kexue workspace
    """
