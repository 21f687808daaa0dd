"""Encoders and the parts they are built from; loaded when they are first used, as they bring torch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kexue.models.bag_encoder import BagEncoder
    from kexue.models.extension import extend_positions, tie_positions
    from kexue.models.gau_alpha import GAUAlphaConfig, GAUAlphaForMaskedLM, GAUAlphaModel
    from kexue.models.initialization import fan, predict_gain, truncated_normal_, variance_scaling_
    from kexue.models.parameterization import NTKLinear, ScheduledResidual, unit_activation
    from kexue.models.positions import HierarchicalPositionEmbedding, hierarchical_positions
    from kexue.models.schemes import (
        DeepNormConstants,
        InitRow,
        deepnorm_constants,
        initialization_plan,
        initialize_model,
    )

__all__ = [
    "BagEncoder",
    "DeepNormConstants",
    "GAUAlphaConfig",
    "GAUAlphaForMaskedLM",
    "GAUAlphaModel",
    "HierarchicalPositionEmbedding",
    "InitRow",
    "NTKLinear",
    "ScheduledResidual",
    "deepnorm_constants",
    "extend_positions",
    "fan",
    "hierarchical_positions",
    "initialization_plan",
    "initialize_model",
    "predict_gain",
    "tie_positions",
    "truncated_normal_",
    "unit_activation",
    "variance_scaling_",
]

_MODULES = {
    "BagEncoder": "bag_encoder",
    "DeepNormConstants": "schemes",
    "GAUAlphaConfig": "gau_alpha",
    "GAUAlphaForMaskedLM": "gau_alpha",
    "GAUAlphaModel": "gau_alpha",
    "HierarchicalPositionEmbedding": "positions",
    "InitRow": "schemes",
    "NTKLinear": "parameterization",
    "ScheduledResidual": "parameterization",
    "deepnorm_constants": "schemes",
    "extend_positions": "extension",
    "fan": "initialization",
    "hierarchical_positions": "positions",
    "initialization_plan": "schemes",
    "initialize_model": "schemes",
    "predict_gain": "initialization",
    "tie_positions": "extension",
    "truncated_normal_": "initialization",
    "unit_activation": "parameterization",
    "variance_scaling_": "initialization",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(f"kexue.models.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
