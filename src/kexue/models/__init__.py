"""Encoders and the parts they are built from; loaded when they are first used, as they bring torch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kexue.models.bag_encoder import BagEncoder
    from kexue.models.byol import BYOL
    from kexue.models.collapse import CollapseMeter, CollapseReport
    from kexue.models.extension import extend_positions, tie_positions
    from kexue.models.gau_alpha import GAUAlphaConfig, GAUAlphaForMaskedLM, GAUAlphaModel
    from kexue.models.positions import HierarchicalPositionEmbedding, hierarchical_positions
    from kexue.models.simsiam import SimSiam, simsiam_loss

__all__ = [
    "BYOL",
    "BagEncoder",
    "CollapseMeter",
    "CollapseReport",
    "GAUAlphaConfig",
    "GAUAlphaForMaskedLM",
    "GAUAlphaModel",
    "HierarchicalPositionEmbedding",
    "SimSiam",
    "extend_positions",
    "hierarchical_positions",
    "simsiam_loss",
    "tie_positions",
]

_MODULES = {
    "BYOL": "byol",
    "BagEncoder": "bag_encoder",
    "CollapseMeter": "collapse",
    "CollapseReport": "collapse",
    "GAUAlphaConfig": "gau_alpha",
    "GAUAlphaForMaskedLM": "gau_alpha",
    "GAUAlphaModel": "gau_alpha",
    "HierarchicalPositionEmbedding": "positions",
    "SimSiam": "simsiam",
    "extend_positions": "extension",
    "hierarchical_positions": "positions",
    "simsiam_loss": "simsiam",
    "tie_positions": "extension",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(f"kexue.models.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
