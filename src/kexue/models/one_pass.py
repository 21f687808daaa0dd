"""The streams of the one-pass masked language model (单次前向的 MLM, T-TA): all tokens predicted, none of them seen.

Source: 科学空间 7661 (修改Transformer结构,设计一个更快更好的MLM模型); Shin, Lee, Yoon, Jung, "Fast and Accurate Deep
Bidirectional Language Representations for Unsupervised Learning", ACL 2020.

    S = norm(E + P)                                        keys and values of every layer: W_k S, W_v S
    Q_0 = norm(E[mask] + P),  Q_n = Layer(Q_(n-1), S)      diagonal masked; residual sums, FFN and norms on Q only

Token i enters S_i alone, and Q_i never looks at S_i: there is no path from a token to its own prediction, however deep
the stack. In an ordinary encoder there is one from the second layer on, by way of the neighbours.

What differs from the published code: the keys and values of all layers come from one matrix product,
(N, D) x (D, 2 L D); a learned key before the first token is seen by every query, so that a text of one token has
something to look at; the first queries, equal for all texts, are computed once. Weights have the names and shapes of
the other modes of the stack.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kexue._tensors import compute_dtype
from kexue.attention.diagonal import diagonal_mask, masked_attention
from kexue.models._passes import OWN, Pass, rotary_tables, rotate
from kexue.models._sources import Sources
from kexue.models.configuration import KexueConfig

__all__ = ["begin", "first_queries", "key_value_maps", "keys_and_values", "look", "who_sees_what"]

KeyValue = tuple[Tensor, Tensor]
Rotary = tuple[Tensor, Tensor] | None


def key_value_maps(model: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Weight (2 L D, D) and bias (2 L D,) of the keys and values of all layers, rows [k; v] of each layer in turn."""
    maps = [layer.attention.qkv for layer in model.layers]  # type: ignore[union-attr]
    parts = [maps[0].in_features, 2 * maps[0].in_features]
    weight = torch.cat([m.weight.split(parts)[1] for m in maps])
    return weight, None if maps[0].bias is None else torch.cat([m.bias.split(parts)[1] for m in maps])


def keys_and_values(
    config: KexueConfig, sources: Tensor, maps: tuple[Tensor, Tensor | None], rotary: Rotary
) -> list[KeyValue]:
    """(..., D) sources -> for each layer keys and values (..., H, d); ``rotary``: tables of the sources' places."""
    # One unbind for all: the gradient of an index would be as large as the whole, once for each
    parts = F.linear(sources, *maps).unflatten(-1, (2 * config.num_layers, config.num_heads, -1)).unbind(-3)
    return [(k if rotary is None else rotate(k, rotary), v) for k, v in zip(parts[0::2], parts[1::2], strict=True)]


def first_queries(model: Any, shape: tuple[int, ...], positions: Tensor, segments: Tensor | None) -> Tensor:
    """Q_0, (B, T, D) or (N, D); (1, T, D) where it is the same for all texts."""
    embeddings = model.embeddings
    masked = embeddings.token.weight[model.config.mask_token_id]
    drops = embeddings.training and embeddings.dropout > 0
    if len(shape) == 2 and positions.dim() == 1 and segments is None and not drops:
        shape = (1, shape[1])
    return embeddings(masked.expand(*shape, -1), positions, segments)


def begin(
    model: Any, words: Tensor, positions: Tensor, segments: Tensor | None, now: Pass
) -> tuple[Tensor, list[KeyValue]]:
    """First queries, and keys and values of all layers; ``now`` learns who sees what.

    Args:
        model: A stack with ``attn_mode="diagonal"``.
        words: (B, T, D) or packed (N, D) token vectors.
        positions: (T,), (B or 1, T) or (N,).
        segments: Shaped as the tokens, or None.
        now: The forward pass.

    Returns:
        (B or 1, T, D) or (N, D), and L pairs of (B, K, H, d) or (K, H, d); K is one more than the tokens if there is
        a start key.
    """
    config, embeddings = model.config, model.embeddings
    if now.mask is not None:
        raise ValueError("attention_mask must be (B, T); got one of 4 dimensions")
    if config._attn_implementation not in OWN:
        raise ValueError(
            f"attn_mode='diagonal' has an attention of its own, attn_implementation 'sdpa' or 'eager'; got "
            f"{config._attn_implementation!r}"
        )
    sources = embeddings(words, positions, segments)
    places = positions
    if embeddings.bos_key is not None:
        start = embeddings.bos_key.weight
        start = start if embeddings.norm is None else embeddings.norm(start)
        if now.packing is None:
            start = start.expand(words.shape[0], 1, -1)
        start = F.dropout(start, embeddings.dropout, embeddings.training).to(sources.dtype)
        before = positions.new_full((*positions.shape[:-1], 1), -1)  # the place before the first token
        if now.packing is None:
            sources, places = torch.cat([start, sources], 1), torch.cat([before, places], -1)
        else:
            sources, places = torch.cat([sources, start]), torch.cat([places, before])
    rotary = rotary_tables(config, places, sources) if config.position == "rope" else None
    pairs = keys_and_values(config, sources, key_value_maps(model), rotary)
    now.sources = who_sees_what(config, now, words)
    return first_queries(model, words.shape[:-1], positions, segments), pairs


def who_sees_what(config: KexueConfig, now: Pass, words: Tensor) -> Sources:
    """The masks of a pass over ``words``: (B, T, D), or packed."""
    first = int(config.bos_key)
    if now.packing is None:
        plans = [(words.shape[1], now.padding)]
    else:
        plans = [(index.shape[1], None if mask is None else mask[:, 0, 0]) for index, mask in now.packing.buckets]
    masks = []
    for length, padding in plans:
        own = None if config.self_visible else torch.arange(first, first + length, device=words.device)
        if padding is not None and first:
            padding = F.pad(padding, (1, 0), value=True)
        masks.append(diagonal_mask(own, first + length, padding, never_empty=bool(first)))
    return Sources([visible for visible, _ in masks], [empty for _, empty in masks], first)


def look(layer: Any, x: Tensor, k: Tensor, v: Tensor, now: Pass) -> tuple[Tensor, Tensor | None]:
    """What the queries of a layer see in the sources.

    Args:
        layer: The attention layer.
        x: (B or 1, T, D) or packed (N, D), normed.
        k: (B, K, H, d) or (K, H, d).
        v: As ``k``.
        now: The forward pass.

    Returns:
        (B, T, H, d) or (N, H, d), and (B, H, T, K) weights if they are wanted.
    """
    width = x.shape[-1]
    bias = layer.qkv.bias
    q = F.linear(x, layer.qkv.weight[:width], None if bias is None else bias[:width])
    q = q.unflatten(-1, (layer.num_heads, -1))
    if now.rotary is not None:
        q = rotate(q, now.rotary)
    dropout = layer.config.attention_dropout if layer.training else 0.0
    if now.packing is not None:
        return _look_packed(q, k, v, now, dropout), None
    sources: Any = now.sources
    visible, empty = sources.visible[0], sources.empty[0]
    q, k, v = q.expand(k.shape[0], -1, -1, -1).transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if not now.weights:
        return masked_attention(q, k, v, visible, empty, dropout_p=dropout).transpose(1, 2), None
    scores = (q @ k.mT).to(compute_dtype(q)) * q.shape[-1] ** -0.5
    if visible is not None:
        scores = scores.masked_fill(~visible, -torch.inf)
    weights = scores.softmax(-1)
    if empty is not None:
        weights = weights.masked_fill(empty, 0)
    weights = weights.to(q.dtype)
    return (F.dropout(weights, dropout) @ v).transpose(1, 2), weights


def _look_packed(q: Tensor, k: Tensor, v: Tensor, now: Any, dropout: float) -> Tensor:
    """Texts of like length in one batch, the start key before each."""
    sources, outputs = now.sources, []
    for (index, mask), visible, empty in zip(now.packing.buckets, sources.visible, sources.empty, strict=True):
        b, t = index.shape
        keys = F.pad(index, (1, 0), value=k.shape[0] - 1) if sources.first else index
        rows = q.index_select(0, index.flatten()).unflatten(0, (b, t)).transpose(1, 2)
        near, values = (
            x.index_select(0, keys.flatten()).unflatten(0, tuple(keys.shape)).transpose(1, 2) for x in (k, v)
        )
        out = masked_attention(rows, near, values, visible, empty, dropout_p=dropout).transpose(1, 2)
        outputs.append(out.flatten(0, 1) if mask is None else out[mask[:, 0, 0]])
    return torch.cat(outputs)[now.packing.order] if outputs else q
