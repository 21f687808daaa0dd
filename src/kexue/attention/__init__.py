"""Attention: linear, random and series features, entropy-invariant scale, gated unit, residual scores."""

from kexue.attention.residual import (
    ResidualScores,
    residual_attention,
    residual_attention_stack,
    residual_attention_step,
)

__all__ = [
    "ResidualScores",
    "residual_attention",
    "residual_attention_stack",
    "residual_attention_step",
]
