"""Attention of this package inside transformers models: ``model.set_attn_implementation("kexue_linear")``."""

from __future__ import annotations

import importlib

__all__ = ["register_attention"]

# name -> module with ``attention_forward`` (transformers' attention function) and ``attention_mask`` (its mask builder)
_IMPLEMENTATIONS: dict[str, str] = {
    "kexue_entropy": "kexue.attention._hf_entropy",
}


def register_attention() -> tuple[str, ...]:
    """Add the attention functions of this package to transformers' registry.

    Returns:
        The names that ``model.set_attn_implementation(name)`` now accepts.
    """
    from kexue._transformers import AttentionInterface, AttentionMaskInterface

    for name, path in _IMPLEMENTATIONS.items():
        module = importlib.import_module(path)
        AttentionInterface.register(name, module.attention_forward)
        AttentionMaskInterface.register(name, module.attention_mask)
    return tuple(_IMPLEMENTATIONS)
