"""The next-sentence logits of many pairs in one stream of tokens, computing of the last layer only what [CLS] needs.

The pairs lie one after the other, (M,) tokens without padding, equal lengths side by side. Against a plain forward:

- no padding: linear maps, norms and activations see M rows; attention takes each run of equal lengths as a block;
- layer 0: a row depends on (token, position, segment) only, and with K prompts per text most rows occur many times, so
  embeddings and the projections to queries, keys and values are computed once for each different row;
- last layer: one query per pair. Its scores against all keys are q (W_k h_j + b_k) = (W_k' q) h_j + constant, and the
  softmax ignores the constant; its value is W_v (sum_j a_j h_j) + b_v. Hence no key and no value is computed: 4 D^2
  products per pair and 2 H D per token instead of 12 D^2 per token.

All of this is algebra, not approximation; only the order of the sums differs. Dropout is never applied.

It replaces a forward only for classes whose forward is known (:func:`cls_forward` returns None otherwise), and the
caller compares it with the model's own forward when a model is loaded.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Run of pairs with equal lengths: number of the first pair, first row, count of pairs, tokens in each.
Run = tuple[int, int, int, int]

#: Families of transformers whose blocks are BERT's: after each part (post-LN), or before it (Megatron).
_POST_NORM, _PRE_NORM = ("bert", "ernie"), ("megatron_bert",)
_ATTENTION = {
    "bert": ("BertSelfAttention", "BertSdpaSelfAttention"),
    "ernie": ("ErnieSelfAttention", "ErnieSdpaSelfAttention"),
    "megatron_bert": ("MegatronBertSelfAttention",),
}
_MODELS = {"bert": "Bert", "ernie": "Ernie", "megatron_bert": "MegatronBert"}


@dataclass(frozen=True)
class Block:
    """One Transformer layer; ``None`` stands for a norm that the layer does not have.

    Attributes:
        project: (M, D) -> queries, keys, values, (M, D) each.
        weights: The matrices (D, D) and biases (D,) of ``project``: queries, keys (no bias is needed), values.
        folded: The modules that these weights belong to.
        out: Linear map of the attended values.
        feed: The feed-forward part without norm and residual.
        norms: Before attention, after its residual, before the feed-forward part, after its residual.
        heads: Number of heads.
        scale: Factor of the scores.
    """

    project: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]
    weights: Callable[[], tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor | None]]
    folded: tuple[nn.Module, ...]
    out: nn.Module
    feed: Callable[[Tensor], Tensor]
    norms: tuple[nn.Module | None, nn.Module | None, nn.Module | None, nn.Module | None]
    heads: int
    scale: float


@dataclass(frozen=True)
class Head:
    """Pooler and next-sentence map: state of [CLS] (N, D) -> logits (N, 2), in float32 at least.

    In a bfloat16 model too, whatever it returns itself: 8 bits of a logit would tie candidates.
    """

    pooler: nn.Module
    last: nn.Module
    sequence: bool  # the pooler takes (N, T, D) and reads the first token

    def __call__(self, states: Tensor) -> Tensor:
        x = states[:, None] if self.sequence else states
        own = next(self.last.parameters()).dtype
        kind = torch.promote_types(own, torch.float32)
        for part in (self.pooler, self.last):
            if kind == own:
                x = part(x.to(kind))
            else:
                wider = {name: value.to(kind) for name, value in part.named_parameters()}
                x = torch.func.functional_call(part, wider, (x.to(kind),))
        return x


def head_of(model: Any) -> Head | None:
    """The head of a model, or None if it is not known."""
    if hasattr(model, "next_sentence") and hasattr(model, "pooler"):
        return Head(model.pooler, model.next_sentence, False)
    base, last = getattr(model, getattr(model, "base_model_prefix", ""), None), getattr(model, "cls", None)
    pooler, last = getattr(base, "pooler", None), getattr(last, "seq_relationship", None)
    return None if pooler is None or last is None else Head(pooler, last, True)


def _norm(norm: nn.Module | None, x: Tensor) -> Tensor:
    return x if norm is None else norm(x)


class ClsForward:
    """Logits (N, 2) of N packed pairs; see the module.

    Args:
        embed: (ids, positions, segments), (U,) each -> (U, D).
        blocks: The layers.
        final: Norm after the last layer, or None.
        head: Pooler and next-sentence map.
    """

    def __init__(
        self,
        embed: Callable[[Tensor, Tensor, Tensor], Tensor],
        blocks: Sequence[Block],
        final: nn.Module | None,
        head: Head,
    ) -> None:
        self.embed, self.blocks, self.final, self.head = embed, list(blocks), final, head

    def __call__(self, ids: Tensor, positions: Tensor, segments: Tensor, lengths: Sequence[int]) -> Tensor:
        """Logits of the pairs.

        Args:
            ids: Tokens of all pairs, (M,); ``lengths`` sums to M.
            positions: Position of each token in its pair, (M,).
            segments: 0 or 1, (M,).
            lengths: Tokens of each pair, (N,), each at least 1.
        """
        return self.head(self.states(ids, positions, segments, lengths))

    def states(self, ids: Tensor, positions: Tensor, segments: Tensor, lengths: Sequence[int]) -> Tensor:
        """The final state of [CLS] of each pair, (N, D): what the pooler reads."""
        runs = _runs(lengths)
        if not runs:
            return self.embed(ids, positions, segments)
        keys = (ids * (max(lengths) + 1) + positions) * 2 + segments
        _, inverse = torch.unique(keys, return_inverse=True)
        chosen = inverse.new_empty(int(inverse.max()) + 1)
        chosen[inverse] = torch.arange(len(ids), device=ids.device)  # any row of each kind: all of them are equal
        different = self.embed(ids[chosen], positions[chosen], segments[chosen])
        x = different[inverse]
        for number, block in enumerate(self.blocks[:-1]):
            if number:
                q, k, v = block.project(_norm(block.norms[0], x))
            else:
                q, k, v = (part[inverse] for part in block.project(_norm(block.norms[0], different)))
            x = _after_attention(block, x, _attend(q, k, v, runs, block))
        x = _last_block(self.blocks[-1], x, runs) if self.blocks else x[_starts(runs, x.device)]
        return _norm(self.final, x)


def _runs(lengths: Sequence[int]) -> list[Run]:
    runs: list[Run] = []
    pair = row = 0
    for length, group in itertools.groupby(lengths):
        count = sum(1 for _ in group)
        runs.append((pair, row, count, int(length)))
        pair, row = pair + count, row + count * int(length)
    return runs


def _starts(runs: list[Run], device: torch.device) -> Tensor:
    """Row of each [CLS]."""
    return torch.cat([row + length * torch.arange(count, device=device) for _, row, count, length in runs])


def _attend(q: Tensor, k: Tensor, v: Tensor, runs: list[Run], block: Block) -> Tensor:
    """Attention within each pair, (M, D)."""
    out = v.new_empty(v.shape)
    for _, row, count, length in runs:
        rows = slice(row, row + count * length)
        a, b, c = (x[rows].view(count, length, block.heads, -1).transpose(1, 2) for x in (q, k, v))
        attended = F.scaled_dot_product_attention(a, b, c, scale=block.scale)
        out[rows].view(count, length, block.heads, -1).copy_(attended.transpose(1, 2))
    return out


def _after_attention(block: Block, x: Tensor, attended: Tensor) -> Tensor:
    x = _norm(block.norms[1], x + block.out(attended))
    return _norm(block.norms[3], x + block.feed(_norm(block.norms[2], x)))


def _last_block(block: Block, x: Tensor, runs: list[Run]) -> Tensor:
    """The last layer for the first row of each pair, (N, D)."""
    starts = _starts(runs, x.device)
    states = _norm(block.norms[0], x)
    query, bias, key, value, value_bias = block.weights()
    q = F.linear(states[starts], query, bias)
    width = q.shape[1] // block.heads
    # (N, H, D): what each head looks for, in the space of the states
    wanted = torch.einsum("nhd,hdw->nhw", q.view(len(q), block.heads, width), key.view(block.heads, width, -1))
    mixed = torch.empty_like(wanted)
    for pair, row, count, length in runs:
        own = states[row : row + count * length].view(count, length, -1)
        scores = (own @ wanted[pair : pair + count].mT).to(torch.promote_types(own.dtype, torch.float32))
        weights = (scores * block.scale).softmax(1).to(own.dtype)  # (count, T, H)
        mixed[pair : pair + count] = weights.mT @ own
    attended = torch.einsum("nhw,hdw->nhd", mixed, value.view(block.heads, width, -1)).flatten(1)
    if value_bias is not None:
        attended = attended + value_bias
    return _after_attention(block, x[starts], attended)


def cls_forward(model: nn.Module) -> ClsForward | None:
    """The fast forward of ``model``, or None if its class, its parts or its settings are not known here.

    None also for a model with hooks (they would not run), a decoder, cross attention, or an attention other than
    transformers' own softmax attentions.
    """
    if any(module._forward_hooks or module._forward_pre_hooks for module in model.modules()):
        return None
    if type(model).__module__.startswith("kexue.models."):
        return _kexue_forward(model)
    return _bert_forward(model)


def _bert_forward(model: Any) -> ClsForward | None:
    family = type(model).__module__.split(".")[-2] if type(model).__module__.startswith("transformers.") else ""
    known = (
        {f"{_MODELS[family]}ForNextSentencePrediction", f"{_MODELS[family]}ForPreTraining"} if family in _MODELS else {}
    )
    if type(model).__name__ not in known:
        return None
    config, base, head = model.config, getattr(model, model.base_model_prefix), head_of(model)
    if head is None:
        return None
    softmax = getattr(config, "_attn_implementation", "eager") in ("eager", "sdpa", "flash_attention_2")
    absolute = getattr(config, "position_embedding_type", "absolute") == "absolute"
    if not softmax or not absolute or config.is_decoder or getattr(config, "add_cross_attention", False):
        return None
    layers = list(base.encoder.layer)
    for layer in layers:
        if type(layer.attention.self).__name__ not in _ATTENTION[family]:
            return None
    last = layers[-1].attention.self if layers else None
    if last is not None and any(type(x) is not nn.Linear for x in (last.query, last.key, last.value)):
        return None  # an adapter in the last layer: there is no single weight to fold in

    def embed(ids: Tensor, positions: Tensor, segments: Tensor) -> Tensor:
        parts = base.embeddings
        x = parts.word_embeddings(ids) + parts.token_type_embeddings(segments) + parts.position_embeddings(positions)
        if getattr(parts, "use_task_id", False):
            x = x + parts.task_type_embeddings(torch.zeros_like(ids))
        return parts.LayerNorm(x) if family in _POST_NORM else x

    blocks = [_bert_block(layer, config.num_attention_heads, family in _PRE_NORM) for layer in layers]
    return ClsForward(embed, blocks, base.encoder.ln if family in _PRE_NORM else None, head)


def _bert_block(layer: Any, heads: int, before: bool) -> Block:
    own, out, up, down = layer.attention.self, layer.attention.output, layer.intermediate, layer.output
    norms = (layer.attention.ln, None, layer.ln, None) if before else (None, out.LayerNorm, None, down.LayerNorm)
    return Block(
        project=lambda x: (own.query(x), own.key(x), own.value(x)),
        weights=lambda: (own.query.weight, own.query.bias, own.key.weight, own.value.weight, own.value.bias),
        folded=(own.query, own.key, own.value),
        out=out.dense,
        feed=lambda x: down.dense(up(x)),
        norms=norms,
        heads=heads,
        scale=own.attention_head_size**-0.5,
    )


def _kexue_forward(model: Any) -> ClsForward | None:
    from kexue.models.stack import Attention, FeedForward, Layer
    from kexue.models.text_heads import KexueForNextSentence, KexueForPreTraining

    head = head_of(model)
    if type(model) not in (KexueForNextSentence, KexueForPreTraining) or head is None:
        return None
    config, base = model.config, model.kexue
    softmax = getattr(config, "_attn_implementation", "eager") in ("eager", "sdpa", "flash_attention_2")
    # rotary positions turn the keys, each by an angle of its own: no single matrix to fold in
    if not softmax or config.position != "learned" or config.attn_mode != "bidirectional":
        return None
    for layer in base.layers:
        kinds = (type(layer), type(layer.attention), type(layer.feed_forward))
        if kinds != (Layer, Attention, FeedForward):
            return None
    if type(base.layers[-1].attention.qkv) is not nn.Linear:
        return None

    def embed(ids: Tensor, positions: Tensor, segments: Tensor) -> Tensor:
        parts = base.embeddings
        x = parts.token(ids) + parts.position(positions)
        if parts.segment is not None:
            x = x + parts.segment(segments)
        return x if parts.norm is None else parts.norm(x)

    blocks = [_kexue_block(layer, config.num_heads) for layer in base.layers]
    return ClsForward(embed, blocks, base.final_norm, head)


def _kexue_block(layer: Any, heads: int) -> Block:
    own, first, second = layer.attention, layer.attention_norm, layer.feed_forward_norm

    def weights() -> tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor | None]:
        query, key, value = own.qkv.weight.chunk(3)
        bias, _, value_bias = (None,) * 3 if own.qkv.bias is None else own.qkv.bias.chunk(3)
        return query, bias, key, value, value_bias

    return Block(
        project=lambda x: own.qkv(x).chunk(3, -1),
        weights=weights,
        folded=(own.qkv,),
        out=own.out,
        feed=layer.feed_forward,
        norms=(None, first, None, second) if layer.post_norm else (first, None, second, None),
        heads=heads,
        scale=(own.config.hidden_size // heads) ** -0.5,
    )
