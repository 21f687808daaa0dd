"""What the layers of one forward pass share, and the attention that is computed with it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kexue._tensors import compute_dtype
from kexue._transformers import AttentionInterface, create_bidirectional_mask, create_causal_mask
from kexue.models._packing import Packing
from kexue.models._sources import Sources

__all__ = ["OWN", "Pass", "attend", "attention_mask_of", "padding_mask", "rotary_tables"]

# Computed here; every other name is looked up among transformers' attention functions.
OWN = (None, "sdpa", "eager")


@dataclass
class Pass:
    """One forward pass.

    Args:
        causal: Tokens see what comes before them only.
        weights: Attention weights are to be returned.
        options: For attention functions of transformers' registry.
        packing: Plan of packed input.
        cache: Keys and values of earlier tokens.
        padding: (B, K) bool, or None if nothing is padded.
        mask: (B or 1, 1, T or 1, K) bool, or what the attention function takes; None: none is needed.
        rotary: Cosines and sines of the positions.
        segments: (B, T), which tokens belong to the source in "prefix" mode.
        sources: Who sees what in "diagonal" mode.
    """

    causal: bool
    weights: bool
    options: dict[str, Any] = field(default_factory=dict)
    packing: Packing | None = None
    cache: Any = None
    padding: Tensor | None = None
    mask: Any = None
    rotary: tuple[Tensor, Tensor] | None = None
    segments: Tensor | None = None
    sources: Sources | None = None


def padding_mask(mask: Any, shape: tuple[int, int]) -> Tensor | None:
    """Check (B, K) and make it bool; None if nothing is padded (asked on the CPU only, it would wait for a device)."""
    if not isinstance(mask, Tensor):
        raise TypeError(f"attention_mask must be a tensor; got {type(mask).__name__}")
    if tuple(mask.shape) != shape:
        raise ValueError(f"attention_mask must have shape {shape}, 1 = takes part; got {tuple(mask.shape)}")
    if mask.dtype != torch.bool:
        mask = mask != 0
    if mask.device.type == "cpu" and not torch.compiler.is_compiling() and bool(mask.all()):
        return None
    return mask


def attention_mask_of(model: Any, x: Tensor, past: int, now: Pass, position_ids: Tensor | None) -> Any:
    """The mask of a padded batch, or None where the kernel needs none."""
    name = model.config._attn_implementation
    if model.config.attn_mode == "prefix":
        return _prefix_mask(x.shape[1], past, now)
    if name not in OWN:
        make = create_causal_mask if now.causal else create_bidirectional_mask
        options = {"past_key_values": now.cache, "position_ids": position_ids} if now.causal else {}
        return make(config=model.config, inputs_embeds=x, attention_mask=now.padding, **options)
    mask = None if now.padding is None else now.padding[:, None, None, :]
    if not now.causal:
        return mask
    length = x.shape[1]
    keys = past + length
    if now.cache is not None:  # a cache of fixed size has more rows than tokens
        sizes = getattr(now.cache, "get_mask_sizes", None)
        keys = max(keys, int(sizes(length, 0)[0]) if sizes is not None else keys)
    if mask is None and keys == past + length and (past == 0 or length == 1):
        return None  # plain causal attention, or one token that sees all
    order = torch.arange(keys, device=x.device) <= torch.arange(past, past + length, device=x.device).unsqueeze(1)
    if mask is None:
        return order[None, None]
    if mask.shape[-1] < keys:
        mask = F.pad(mask, (0, keys - mask.shape[-1]), value=False)
    return order & mask


def _prefix_mask(length: int, past: int, now: Pass) -> Tensor | None:
    """(B, 1, T, K): position i sees j if cumsum(segments)[j] <= cumsum(segments)[i]; None if all see all.

    Padding is not counted, whatever its segment.
    """
    mask = None if now.padding is None else now.padding[:, None, None, :]
    if now.segments is None or length == 1:
        return mask
    segments = now.segments if now.padding is None else now.segments.masked_fill(~now.padding[:, past:], 0)
    count = segments.cumsum(1)
    seen = count[:, None, None, :] <= count[:, None, :, None]
    if past:  # the tokens of a cache come before
        seen = F.pad(seen, (past, 0), value=True)
    return seen if mask is None else seen & mask


def rotary_tables(config: Any, positions: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines (..., T, 1, d / 2) of position * base^(-2 i / d)."""
    width = config.hidden_size // config.num_heads
    dtype = compute_dtype(x)
    steps = torch.arange(0, width, 2, device=x.device, dtype=dtype) / width
    angles = positions.to(dtype)[..., None, None] * config.rope_base**-steps
    return angles.cos(), angles.sin()


def rotate(x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    """Turn the pairs (2i, 2i + 1) of (..., T, H, d); put out as halves, a permutation that q and k share."""
    cos, sin = tables
    even, odd = x[..., 0::2].to(cos.dtype), x[..., 1::2].to(cos.dtype)
    return torch.cat([even * cos - odd * sin, even * sin + odd * cos], -1).to(x.dtype)


def attend(layer: nn.Module, q: Tensor, k: Tensor, v: Tensor, now: Pass) -> tuple[Tensor, Tensor | None]:
    """Attention of (..., T, H, d) queries, keys and values; (..., T, H, d) and the weights if asked for."""
    if now.rotary is not None:
        q, k = rotate(q, now.rotary), rotate(k, now.rotary)
    dropout = layer.config.attention_dropout if layer.training else 0.0  # type: ignore[union-attr]
    if now.packing is not None:
        return now.packing.attend(q, k, v, now.causal, dropout), None  # type: ignore[arg-type]
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if now.cache is not None:
        k, v = now.cache.update(k, v, layer.layer_idx)
    name = layer.config._attn_implementation  # type: ignore[union-attr]
    if name not in OWN:
        return AttentionInterface()[name](
            layer, q, k, v, now.mask, dropout=dropout, scaling=q.shape[-1] ** -0.5, is_causal=now.causal,
            output_attentions=now.weights, **now.options,
        )  # fmt: skip
    plain = now.causal and now.mask is None and q.shape[2] == k.shape[2]
    if not now.weights:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=now.mask, dropout_p=dropout, is_causal=plain)  # type: ignore[arg-type]
        return out.transpose(1, 2), None
    scores = (q @ k.transpose(2, 3)).to(compute_dtype(q)) / math.sqrt(q.shape[-1])
    mask = now.mask
    if plain:
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
    weights = scores.softmax(-1) if mask is None else masked_softmax(scores, mask)
    weights = weights.to(q.dtype)
    out = F.dropout(weights, dropout) @ v  # type: ignore[arg-type]
    return out.transpose(1, 2), weights


def masked_softmax(scores: Tensor, mask: Tensor) -> Tensor:
    """Softmax over what the mask lets through; rows without anything are 0."""
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
    return weights.masked_fill(~mask.any(-1, keepdim=True), 0)
