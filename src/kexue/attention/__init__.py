"""Attention: linear, random and series features, entropy-invariant scale, gated unit, residual scores."""

from kexue.attention.gated_attention import GatedAttentionUnit, gated_attention, gated_attention_weights

__all__ = ["GatedAttentionUnit", "gated_attention", "gated_attention_weights"]
