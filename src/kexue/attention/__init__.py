"""Attention: linear, random and series features, entropy-invariant scale, gated unit, residual scores."""

from kexue.attention.feature_maps import FEATURE_MAPS, FeatureMap
from kexue.attention.linear import LinearAttentionState, linear_attention
from kexue.attention.registry import register_attention
from kexue.attention.series import ExpPowerFeatures, TaylorFeatures, degree_for

__all__ = [
    "FEATURE_MAPS",
    "ExpPowerFeatures",
    "FeatureMap",
    "LinearAttentionState",
    "TaylorFeatures",
    "degree_for",
    "linear_attention",
    "register_attention",
]
