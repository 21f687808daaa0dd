"""Attention: linear, random and series features, entropy-invariant scale, gated unit, residual scores, no self."""

from kexue.attention.diagonal import diagonal_attention
from kexue.attention.entropy import entropy_invariant_attention, entropy_invariant_scale
from kexue.attention.favor import FavorFeatures
from kexue.attention.feature_maps import FEATURE_MAPS, FeatureMap
from kexue.attention.gated_attention import GatedAttentionUnit, gated_attention, gated_attention_weights
from kexue.attention.linear import LinearAttentionState, linear_attention
from kexue.attention.linear_layer import LinearAttention
from kexue.attention.registry import register_attention
from kexue.attention.residual import (
    ResidualScores,
    residual_attention,
    residual_attention_stack,
    residual_attention_step,
)
from kexue.attention.residual_models import use_residual_attention
from kexue.attention.series import ExpPowerFeatures, TaylorFeatures, degree_for

__all__ = [
    "FEATURE_MAPS",
    "ExpPowerFeatures",
    "FavorFeatures",
    "FeatureMap",
    "GatedAttentionUnit",
    "LinearAttention",
    "LinearAttentionState",
    "ResidualScores",
    "TaylorFeatures",
    "degree_for",
    "diagonal_attention",
    "entropy_invariant_attention",
    "entropy_invariant_scale",
    "gated_attention",
    "gated_attention_weights",
    "linear_attention",
    "register_attention",
    "residual_attention",
    "residual_attention_stack",
    "residual_attention_step",
    "use_residual_attention",
]
