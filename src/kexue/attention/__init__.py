"""Attention: linear, random and series features, entropy-invariant scale, gated unit, residual scores."""

from kexue.attention.registry import register_attention
from kexue.attention.residual import (
    ResidualScores,
    residual_attention,
    residual_attention_stack,
    residual_attention_step,
)
from kexue.attention.residual_models import use_residual_attention

__all__ = [
    "ResidualScores",
    "register_attention",
    "residual_attention",
    "residual_attention_stack",
    "residual_attention_step",
    "use_residual_attention",
]
