"""Attention: linear, random and series features, entropy-invariant scale, gated unit, residual scores."""
