"""Attention of this package inside transformers models: ``model.set_attn_implementation("kexue_linear")``."""

from __future__ import annotations

import importlib

__all__ = ["register_attention"]

# name -> module with ``attention_forward`` (transformers' attention function) and ``attention_mask`` (its mask builder)
_IMPLEMENTATIONS: dict[str, str] = {
    "kexue_linear": "kexue.attention._hf_linear",
    "kexue_performer": "kexue.attention._hf_performer",
    "kexue_entropy": "kexue.attention._hf_entropy",
    "kexue_realformer": "kexue.attention._hf_residual",
}


def register_attention() -> tuple[str, ...]:
    """Add the attention functions of this package to transformers' registry; model code stays as it is.

    Afterwards ``model.set_attn_implementation(name)`` and ``from_pretrained(..., attn_implementation=name)`` know them.
    What an implementation cannot honour (dropout of weights it does not have, biases, windows) is refused when the
    model runs.

    Returns:
        The names.

    Example:
        >>> "kexue_linear" in register_attention()
        True
        >>> from transformers import BertConfig, BertModel
        >>> sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
        >>> model = BertModel(BertConfig(vocab_size=50, **sizes)).eval()
        >>> model.set_attn_implementation("kexue_linear")
        >>> import torch
        >>> model(torch.tensor([[1, 2, 3]])).last_hidden_state.shape
        torch.Size([1, 3, 32])
    """
    from kexue._transformers import AttentionInterface, AttentionMaskInterface

    for name, path in _IMPLEMENTATIONS.items():
        module = importlib.import_module(path)
        AttentionInterface.register(name, module.attention_forward)
        AttentionMaskInterface.register(name, module.attention_mask)
    return tuple(_IMPLEMENTATIONS)
