"""``model.set_attn_implementation("kexue_entropy")``: entropy-invariant attention inside transformers models.

Options are read from the model's configuration at every call, so that they are saved with the model:
``entropy_base`` (512), ``entropy_min_length`` (16), ``entropy_mode`` ("train" or "inference"), ``entropy_per_row``
(True), ``entropy_scale_mode`` ("log512") and ``entropy_kappa`` (None); they mean what they mean in
:func:`kexue.attention.entropy_invariant_attention`. The scale of the model takes the place of 1/sqrt(D).

transformers hands over a bool mask (B, 1, T, S) or None; None with a causal module means the plain triangle. Rows
count the keys that their mask shows them, so that padding, packed or windowed sequences and caches need no case.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from kexue._tensors import compute_dtype
from kexue.attention.entropy import Options, attend, causal_factor, factor_rows, factor_shared

__all__ = ["attention_forward", "attention_mask"]

_REFUSED = ("softcap", "position_bias", "s_aux", "cache", "head_mask")  # these change the scores or the layout


def attention_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """Builder of bool masks (B, 1, T, S), True = takes part, or None: that of transformers."""
    from kexue._transformers import sdpa_mask

    return sdpa_mask(*args, **kwargs)


def _options(module: nn.Module) -> Options:
    config = getattr(module, "config", None)
    given = {name: getattr(config, f"entropy_{name}") for name in Options._fields if hasattr(config, f"entropy_{name}")}
    options = Options(**given)
    try:
        options.check()
    except (TypeError, ValueError) as error:
        raise type(error)(f"in the model's configuration (entropy_...): {error}") from error
    return options


def _refuse(kwargs: dict[str, Any], mask: Any) -> None:
    for name in _REFUSED:
        if kwargs.get(name) is not None:
            raise ValueError(f"kexue_entropy does not support {name}; got {type(kwargs[name]).__name__}")
    if kwargs.get("output_attentions"):
        raise ValueError("kexue_entropy has no attention weights; use 'eager' for output_attentions=True")
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.dim() != 4:
        got = f"{mask.dtype} of shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"kexue_entropy needs a bool mask (B, 1, T, S), True = takes part, or None; got {got}")


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention function of transformers' registry.

    Args:
        module: The attention layer; its ``config`` holds the options, its ``is_causal`` says what no mask means.
        query: (B, H, T, D).
        key: (B, G, S, D), G divides H.
        value: (B, G, S, E).
        attention_mask: (B, 1, T, S) bool, True = takes part, or None.
        dropout: Probability of dropping an attention weight.
        scaling: The model's scale of q·k; None is 1/sqrt(D).
        is_causal: Overrides the module's.
        **kwargs: What the model passes besides.

    Returns:
        (B, T, H, E), contiguous; and None in the place of the weights.

    Raises:
        ValueError: Something that this attention cannot honour: soft caps, position biases, attention sinks, paged
            caches, weights, masks that are not bool; an option out of range.
        TypeError: An option of the wrong kind.
    """
    _refuse(kwargs, attention_mask)
    options = _options(module)
    rows, d = query.shape[2], query.shape[3]
    scaling = 1 / math.sqrt(d) if scaling is None else float(scaling)
    factor: float | Tensor
    causal, seen = False, None
    if attention_mask is not None:
        if attention_mask.stride(2) == 0:  # expanded over the rows: they all see the same keys
            attention_mask = attention_mask[:, :, :1]
        n = attention_mask.sum(-1, keepdim=True)
        seen = n > 0
        if not options.per_row:
            n = n.amax(2, keepdim=True)
        factor = factor_rows(n, d, options, compute_dtype(query))
    else:
        causal = rows > 1 and bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
        if causal:  # no mask and S > T only happens before a static cache is filled: its first T places count
            key, value = key[:, :, :rows], value[:, :, :rows]
            factor = causal_factor(1, rows, query, options)
        else:
            factor = factor_shared(key.shape[2], d, options, query)
    out = attend(
        query, key, value, mask=attention_mask, seen=seen, causal=causal, factor=factor, scale=scaling,
        dropout_p=dropout,
    )  # fmt: skip
    return out.transpose(1, 2).contiguous(), None
