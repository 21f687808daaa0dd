"""Attention of this package inside transformers models: ``model.set_attn_implementation("kexue_linear")``."""

from __future__ import annotations

import functools
import importlib
from typing import Any

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

    _refuse_where_ignored()
    for name, path in _IMPLEMENTATIONS.items():
        module = importlib.import_module(path)
        AttentionInterface.register(name, module.attention_forward)
        AttentionMaskInterface.register(name, module.attention_mask)
    return tuple(_IMPLEMENTATIONS)


def _refuse_where_ignored() -> None:
    """Make transformers refuse our names for models that have attention code of their own, as it does for "sdpa".

    Such a model would take our mask, which it does not understand, and compute something else without a word.
    """
    from kexue._transformers import PreTrainedModel

    original = getattr(PreTrainedModel, "get_correct_attn_implementation", None)
    if original is None or hasattr(original, "_kexue"):
        return

    @functools.wraps(original)
    def checked(self: Any, requested_attention: Any, *args: Any, **kwargs: Any) -> Any:
        exchangeable = getattr(self, "_can_set_attn_implementation", lambda: True)
        if requested_attention in _IMPLEMENTATIONS and not exchangeable():
            raise ValueError(
                f"the attention of {type(self).__name__} cannot be exchanged: it does not use transformers' attention "
                f"interface; got {requested_attention!r}"
            )
        return original(self, requested_attention, *args, **kwargs)

    checked._kexue = True  # type: ignore[attr-defined]
    PreTrainedModel.get_correct_attn_implementation = checked  # type: ignore[method-assign]
