"""Attention: linear, random and series features, entropy-invariant scale, gated unit, residual scores."""

from kexue.attention.entropy import entropy_invariant_attention, entropy_invariant_scale
from kexue.attention.registry import register_attention

__all__ = ["entropy_invariant_attention", "entropy_invariant_scale", "register_attention"]
