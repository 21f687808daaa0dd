"""Residual attention scores (RealFormer) switched on in a transformers model, for as long as a block lasts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from kexue.attention.registry import register_attention

__all__ = ["use_residual_attention"]

NAME = "kexue_realformer"


def _configurations(model: Any) -> list[Any]:
    """The configurations of a model and its parts, each before those inside it."""
    found: list[Any] = []

    def visit(config: Any) -> None:
        if config is not None and all(config is not x for x in found):
            found.append(config)
            for name in getattr(config, "sub_configs", None) or ():
                visit(getattr(config, name, None))

    for module in model.modules():
        if hasattr(module, "set_attn_implementation"):
            visit(module.config)
    return found


@contextmanager
def use_residual_attention(model: Any) -> Iterator[Any]:
    """Run a transformers model with attention scores summed over its layers inside the block.

    The same as ``model.set_attn_implementation("kexue_realformer")``, with the previous implementation restored on
    exit, also after an exception. No parameters are added. A model that was trained without residual scores computes
    something else with them: train or fine-tune it this way. Models that were built from one configuration object
    share their implementation, so this switches all of them.

    Args:
        model: A ``PreTrainedModel`` whose attention goes through transformers' ``AttentionInterface`` (BERT, RoBERTa,
            Llama, ...).

    Yields:
        The model.

    Raises:
        TypeError: Not such a model.
        ValueError: Its attention cannot be replaced, or gradient checkpointing is on: a single layer that is computed
            again would add to a finished sum.

    Reference:
        https://spaces.ac.cn/archives/8027

    Example:
        >>> import torch
        >>> from transformers import BertConfig, BertModel
        >>> sizes = dict(hidden_size=8, num_attention_heads=2, num_hidden_layers=2, intermediate_size=8, vocab_size=9)
        >>> model = BertModel(BertConfig(**sizes)).eval()
        >>> with use_residual_attention(model):
        ...     out = model(torch.arange(6)[None]).last_hidden_state
        >>> out.shape, model.config._attn_implementation
        (torch.Size([1, 6, 8]), 'sdpa')
    """
    if not hasattr(model, "set_attn_implementation"):
        raise TypeError(f"model must be a transformers PreTrainedModel; got {type(model).__name__}")
    if any(getattr(m, "gradient_checkpointing", False) for m in model.modules()):
        raise ValueError(
            "residual scores cannot work with gradient checkpointing of single layers; call "
            "model.gradient_checkpointing_disable() first"
        )
    register_attention()
    from kexue.attention._hf_residual import forget

    before = [(config, config._attn_implementation) for config in _configurations(model)]
    try:
        model.set_attn_implementation(NAME)
        if model.config._attn_implementation != NAME:
            raise ValueError(f"the attention of {type(model).__name__} cannot be replaced by transformers' interface")
        yield model
    finally:
        for config, name in before:  # a configuration hands its value on to those inside it, which come later
            config._attn_implementation = name
        forget(model)
