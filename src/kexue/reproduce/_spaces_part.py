"""One part of the reproduction of a method that makes several claims: its figures, its conditions and its picture."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class Part:
    """What each of the modules ``_spaces_*`` measures.

    Attributes:
        figures: Name -> number.
        conditions: The rule of the part in words -> whether it holds.
        draw: Draws the part on empty axes.
    """

    figures: dict[str, float]
    conditions: dict[str, bool]
    draw: Callable[[Axes], None]
