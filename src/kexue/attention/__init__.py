"""Attention: linear, random and series features, entropy-invariant scale, gated unit, residual scores."""

from kexue.attention.favor import FavorFeatures
from kexue.attention.feature_maps import FEATURE_MAPS, FeatureMap
from kexue.attention.linear import LinearAttentionState, linear_attention
from kexue.attention.registry import register_attention

__all__ = [
    "FEATURE_MAPS",
    "FavorFeatures",
    "FeatureMap",
    "LinearAttentionState",
    "linear_attention",
    "register_attention",
]
