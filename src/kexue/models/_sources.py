"""What the layers of a one-pass model share: who sees which source."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

__all__ = ["Sources"]


@dataclass
class Sources:
    """Who sees what in one pass of "diagonal" mode; packed texts have one entry for each bucket, others one.

    Args:
        visible: (B or 1, 1, T or 1, K) bool each, None: everything.
        empty: Queries that see nothing, (B or 1, 1, T or 1, 1) each, or None.
        first: 1 if there is a start key, before the first token or, of packed texts, behind the last; else 0.
    """

    visible: list[Tensor | None]
    empty: list[Tensor | None]
    first: int
