"""What the functions that score texts share: checks of ids and masks, and evaluation without dropout."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from kexue.attention.gated_attention import check_padding_mask


def check_ids(input_ids: Any, vocab_size: int | None = None) -> None:
    """Raise unless ``input_ids`` are integers (B, T), below ``vocab_size`` if it is given."""
    if not isinstance(input_ids, Tensor):
        raise TypeError(f"input_ids must be a tensor; got {type(input_ids).__name__}")
    if input_ids.is_floating_point() or input_ids.dtype == torch.bool or input_ids.is_complex():
        raise TypeError(f"input_ids must be integers; got dtype {input_ids.dtype}")
    if input_ids.dim() != 2:
        raise ValueError(f"input_ids must be (B, T); got shape {tuple(input_ids.shape)}")
    if vocab_size is not None and input_ids.numel():
        low, high = (int(x) for x in torch.aminmax(input_ids))
        if low < 0 or high >= vocab_size:
            raise ValueError(f"input_ids must be in [0, {vocab_size}); got values from {low} to {high}")


def check_mask(attention_mask: Any, input_ids: Tensor) -> Tensor | None:
    """The mask as bool (B, T), or None."""
    if attention_mask is None:
        return None
    return check_padding_mask("attention_mask", attention_mask, (input_ids.shape[0], input_ids.shape[1]))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; afterwards every module is in the mode that it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
