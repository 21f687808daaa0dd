"""Losses that stay right at extreme logits, in low precision and at large class counts."""
