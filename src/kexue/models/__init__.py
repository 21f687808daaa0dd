"""Encoders and the parts they are built from; loaded when they are first used, as they bring torch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kexue.models.bag_encoder import BagEncoder, RowAdam
    from kexue.models.bridges import from_bert, from_gpt2
    from kexue.models.byol import BYOL
    from kexue.models.capsule import Capsule, CapsulePooler, capsule_routing, squash
    from kexue.models.char_gru import CharGRUEncoder
    from kexue.models.collapse import CollapseMeter, CollapseReport
    from kexue.models.extension import extend_positions, tie_positions
    from kexue.models.family import (
        KexueConfig,
        KexueForCausalLM,
        KexueForMaskedLM,
        KexueForNextSentence,
        KexueForPreTraining,
        KexueForPrefixLM,
        KexueForSequenceClassification,
        KexueForTextAutoencoding,
        KexueModel,
        KexueOutput,
    )
    from kexue.models.gau_alpha import GAUAlphaConfig, GAUAlphaForMaskedLM, GAUAlphaModel
    from kexue.models.gradient_size import gradient_norms
    from kexue.models.growth import GrowthPlan, grow, plan_growth
    from kexue.models.growth_check import GrowthReport, verify_growth
    from kexue.models.growth_files import grow_checkpoint
    from kexue.models.initialization import fan, predict_gain, truncated_normal_, variance_scaling_
    from kexue.models.kept_tokens import gather_attention_bias, gather_tokens
    from kexue.models.mask_embedding import correct_mask_embedding, uncorrect_mask_embedding
    from kexue.models.megatron import from_megatron_gpt2
    from kexue.models.one_pass_cache import OnePassCache
    from kexue.models.parameterization import NTKLinear, ScheduledResidual, unit_activation
    from kexue.models.positions import HierarchicalPositionEmbedding, hierarchical_positions
    from kexue.models.probing import ProbeReport, probe
    from kexue.models.pseudo_likelihood import masked_token_log_probs
    from kexue.models.schemes import (
        DeepNormConstants,
        InitRow,
        deepnorm_constants,
        initialization_plan,
        initialize_model,
    )
    from kexue.models.simsiam import SimSiam, simsiam_loss
    from kexue.models.skip_path import norm_gains, skip_gain
    from kexue.models.suggestions import Candidate, Suggestion
    from kexue.models.token_dropping import DroppedTokens, DropToken, column_mask_equivalent, drop_token

__all__ = [
    "BYOL",
    "BagEncoder",
    "Candidate",
    "Capsule",
    "CapsulePooler",
    "CharGRUEncoder",
    "CollapseMeter",
    "CollapseReport",
    "DeepNormConstants",
    "DropToken",
    "DroppedTokens",
    "GAUAlphaConfig",
    "GAUAlphaForMaskedLM",
    "GAUAlphaModel",
    "GrowthPlan",
    "GrowthReport",
    "HierarchicalPositionEmbedding",
    "InitRow",
    "KexueConfig",
    "KexueForCausalLM",
    "KexueForMaskedLM",
    "KexueForNextSentence",
    "KexueForPreTraining",
    "KexueForPrefixLM",
    "KexueForSequenceClassification",
    "KexueForTextAutoencoding",
    "KexueModel",
    "KexueOutput",
    "NTKLinear",
    "OnePassCache",
    "ProbeReport",
    "RowAdam",
    "ScheduledResidual",
    "SimSiam",
    "Suggestion",
    "capsule_routing",
    "column_mask_equivalent",
    "correct_mask_embedding",
    "deepnorm_constants",
    "drop_token",
    "extend_positions",
    "fan",
    "from_bert",
    "from_gpt2",
    "from_megatron_gpt2",
    "gather_attention_bias",
    "gather_tokens",
    "gradient_norms",
    "grow",
    "grow_checkpoint",
    "hierarchical_positions",
    "initialization_plan",
    "initialize_model",
    "masked_token_log_probs",
    "norm_gains",
    "plan_growth",
    "predict_gain",
    "probe",
    "simsiam_loss",
    "skip_gain",
    "squash",
    "tie_positions",
    "truncated_normal_",
    "uncorrect_mask_embedding",
    "unit_activation",
    "variance_scaling_",
    "verify_growth",
]

_MODULES = {
    "BYOL": "byol",
    "BagEncoder": "bag_encoder",
    "Candidate": "suggestions",
    "Capsule": "capsule",
    "CapsulePooler": "capsule",
    "CharGRUEncoder": "char_gru",
    "CollapseMeter": "collapse",
    "CollapseReport": "collapse",
    "DeepNormConstants": "schemes",
    "DropToken": "token_dropping",
    "DroppedTokens": "token_dropping",
    "GAUAlphaConfig": "gau_alpha",
    "GAUAlphaForMaskedLM": "gau_alpha",
    "GAUAlphaModel": "gau_alpha",
    "GrowthPlan": "growth",
    "GrowthReport": "growth_check",
    "HierarchicalPositionEmbedding": "positions",
    "InitRow": "schemes",
    "KexueConfig": "family",
    "KexueForCausalLM": "family",
    "KexueForMaskedLM": "family",
    "KexueForNextSentence": "family",
    "KexueForPreTraining": "family",
    "KexueForPrefixLM": "family",
    "KexueForSequenceClassification": "family",
    "KexueForTextAutoencoding": "family",
    "KexueModel": "family",
    "KexueOutput": "family",
    "NTKLinear": "parameterization",
    "OnePassCache": "one_pass_cache",
    "ProbeReport": "probing",
    "RowAdam": "bag_encoder",
    "ScheduledResidual": "parameterization",
    "SimSiam": "simsiam",
    "Suggestion": "suggestions",
    "capsule_routing": "capsule",
    "column_mask_equivalent": "token_dropping",
    "correct_mask_embedding": "mask_embedding",
    "deepnorm_constants": "schemes",
    "drop_token": "token_dropping",
    "extend_positions": "extension",
    "fan": "initialization",
    "from_bert": "bridges",
    "from_gpt2": "bridges",
    "from_megatron_gpt2": "megatron",
    "gather_attention_bias": "kept_tokens",
    "gather_tokens": "kept_tokens",
    "gradient_norms": "gradient_size",
    "grow": "growth",
    "grow_checkpoint": "growth_files",
    "hierarchical_positions": "positions",
    "initialization_plan": "schemes",
    "initialize_model": "schemes",
    "masked_token_log_probs": "pseudo_likelihood",
    "norm_gains": "skip_path",
    "plan_growth": "growth",
    "predict_gain": "initialization",
    "probe": "probing",
    "simsiam_loss": "simsiam",
    "skip_gain": "skip_path",
    "squash": "capsule",
    "tie_positions": "extension",
    "truncated_normal_": "initialization",
    "uncorrect_mask_embedding": "mask_embedding",
    "unit_activation": "parameterization",
    "variance_scaling_": "initialization",
    "verify_growth": "growth_check",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(f"kexue.models.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
