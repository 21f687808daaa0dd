"""The one Transformer stack of this package (通用的 Transformer 主干): what all heads and objectives share.

    pre-norm    x <- x + Attn(norm(x));  x <- x + FFN(norm(x));  norm after the last layer
    post-norm   x <- norm(x + Attn(x));  x <- norm(x + FFN(x));  norm of the embeddings

Queries, keys and values come from one matrix, rows [q; k; v]. Attention is torch's fused kernel, without a mask tensor
unless some token is padded. Batches are padded, ``input_ids`` (B, T), or packed: all tokens in one row (N,) and the
boundaries of the texts in ``cu_seqlens`` (B + 1,); then no layer spends anything on padding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kexue._tensors import check_float
from kexue._transformers import BaseModelOutputWithPast, Cache, DynamicCache, PreTrainedModel
from kexue.models._packing import Packing
from kexue.models._passes import OWN, Pass, attend, attention_mask_of, padding_mask, rotary_tables
from kexue.models.configuration import KexueConfig
from kexue.models.one_pass import begin, look

__all__ = ["Attention", "Embeddings", "FeedForward", "KexueModel", "KexuePreTrainedModel", "Layer", "make_norm"]

_ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
    "swiglu": F.silu,
}


def make_norm(config: KexueConfig) -> nn.Module:
    """A norm over the width D."""
    kind = nn.LayerNorm if config.norm == "layer" else nn.RMSNorm
    return kind(config.hidden_size, eps=config.norm_eps)


def activation(config: KexueConfig) -> Any:
    """The elementwise function of the configuration."""
    return _ACTIVATIONS[config.act]


class Embeddings(nn.Module):
    """Token + position + segment embeddings, optionally normed."""

    def __init__(self, config: KexueConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.token = nn.Embedding(config.vocab_size, width)
        self.position = nn.Embedding(config.max_position, width) if config.position == "learned" else None
        self.segment = nn.Embedding(config.type_vocab_size, width) if config.type_vocab_size else None
        self.bos_key = nn.Embedding(1, width) if config.attn_mode == "diagonal" and config.bos_key else None
        self.norm = make_norm(config) if config.embedding_norm else None
        self.dropout = config.dropout

    def forward(self, x: Tensor, positions: Tensor, segments: Tensor | None) -> Tensor:
        """Token vectors (..., D), positions (...) and segments (...) -> (..., D)."""
        if self.position is not None:
            x = x + self.position(positions)
        if self.segment is not None:
            x = x + (self.segment.weight[0] if segments is None else self.segment(segments))
        if self.norm is not None:
            x = self.norm(x)
        return F.dropout(x, self.dropout, self.training)


class Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, config: KexueConfig, index: int) -> None:
        super().__init__()
        width = config.hidden_size
        self.config, self.layer_idx, self.num_heads = config, index, config.num_heads
        self.is_causal = config.attn_mode == "causal"
        self.qkv = nn.Linear(width, 3 * width, bias=config.bias)
        self.out = nn.Linear(width, width, bias=config.bias)
        self.out.ends_sublayer = True  # type: ignore[assignment]  # its starting weights are smaller

    def forward(
        self, x: Tensor, now: Pass, keys: Tensor | None = None, values: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """(B, T, D) or packed (N, D) -> the same, and the weights (B, H, T, K) if asked for.

        In "diagonal" mode keys and values, (B, K, H, d) or (K, H, d), are given, and x makes the queries only.
        """
        if keys is not None and values is not None:
            out, weights = look(self, x, keys, values, now)
            return self.out(out.flatten(-2)), weights
        heads = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))  # (..., 3, H, d)
        q, k, v = heads.unbind(-3)
        out, weights = attend(self, q, k, v, now)
        return self.out(out.flatten(-2)), weights


class FeedForward(nn.Module):
    """Two linear maps with an activation between them, or three for "swiglu"."""

    def __init__(self, config: KexueConfig) -> None:
        super().__init__()
        width, inner = config.hidden_size, config.intermediate_size
        self.gate = nn.Linear(width, inner, bias=config.bias) if config.act == "swiglu" else None
        self.up = nn.Linear(width, inner, bias=config.bias)
        self.down = nn.Linear(inner, width, bias=config.bias)
        self.down.ends_sublayer = True  # type: ignore[assignment]
        self.activation = activation(config)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        if self.gate is not None:
            return self.down(self.activation(self.gate(x)) * self.up(x))
        return self.down(self.activation(self.up(x)))


class Layer(nn.Module):
    """Attention and feed-forward sub-layers with their residual sums and norms."""

    def __init__(self, config: KexueConfig, index: int) -> None:
        super().__init__()
        self.attention = Attention(config, index)
        self.attention_norm = make_norm(config)
        self.feed_forward = FeedForward(config)
        self.feed_forward_norm = make_norm(config)
        self.post_norm, self.dropout = config.post_norm, config.dropout

    def forward(
        self, x: Tensor, now: Pass, keys: Tensor | None = None, values: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """(B, T, D) or packed (N, D) -> the same, and the attention weights if asked for."""
        mixed, weights = self.attention(x if self.post_norm else self.attention_norm(x), now, keys, values)
        x = x + F.dropout(mixed, self.dropout, self.training)
        if self.post_norm:
            x = self.attention_norm(x)
        y = self.feed_forward(x if self.post_norm else self.feed_forward_norm(x))
        x = x + F.dropout(y, self.dropout, self.training)
        return (self.feed_forward_norm(x) if self.post_norm else x), weights


class KexuePreTrainedModel(PreTrainedModel):
    """What the models of this family share: loading, saving, starting weights."""

    config_class = KexueConfig
    base_model_prefix = "kexue"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_attention_backend = True
    _no_split_modules = ["Layer"]  # noqa: RUF012

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        """True; transformers guesses it from the text of the source file."""
        return True

    def _init_weights(self, module: nn.Module) -> None:
        """Starting weights; transformers keeps torch's init functions from touching parameters that were loaded."""
        given = self.config.initializer_range
        if isinstance(module, nn.Linear):
            std = module.in_features**-0.5 if given is None else given
            if getattr(module, "decodes", False):  # the table of embeddings, or one like it
                std = 0.02 if given is None else given
            if getattr(module, "ends_sublayer", False):
                std /= (2 * self.config.num_layers) ** 0.5
            nn.init.normal_(module.weight, std=std)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.02 if given is None else given)
        elif isinstance(module, nn.LayerNorm | nn.RMSNorm):
            nn.init.ones_(module.weight)
            if isinstance(module, nn.LayerNorm) and module.bias is not None:
                nn.init.zeros_(module.bias)


class KexueModel(KexuePreTrainedModel):
    """The stack without a head.

    Args:
        config: A :class:`KexueConfig`.

    Example:
        >>> config = KexueConfig(vocab_size=50, hidden_size=16, num_layers=2, num_heads=4)
        >>> model = KexueModel(config).eval()
        >>> mask = torch.tensor([[1, 1, 1, 0]])  # the last token is padding
        >>> model(torch.tensor([[2, 3, 4, 0]]), mask).last_hidden_state.shape
        torch.Size([1, 4, 16])
        >>> packed = model(torch.tensor([2, 3, 4, 5, 6]), cu_seqlens=torch.tensor([0, 3, 5]))  # texts of 3 and 2 tokens
        >>> packed.last_hidden_state.shape
        torch.Size([5, 16])
    """

    def __init__(self, config: KexueConfig) -> None:
        super().__init__(config)
        self.embeddings = Embeddings(config)
        self.layers = nn.ModuleList(Layer(config, index) for index in range(config.num_layers))
        self.final_norm = None if config.post_norm else make_norm(config)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The table of token embeddings."""
        return self.embeddings.token

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the table of token embeddings."""
        self.embeddings.token = value  # type: ignore[assignment]

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        cu_seqlens: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Hidden states of a batch.

        Args:
            input_ids: (B, T) token ids, or packed (N,).
            attention_mask: (B, T), 1 or True = takes part; with a cache (B, past + T). None: all but ``pad_token_id``.
            token_type_ids: Segments, shaped as ``input_ids``; None: 0. In "prefix" mode 0 is the source and 1 what
                follows it; None: 0, after a cache 1.
            position_ids: Shaped as ``input_ids``, (1, T) or (T,); None: 0, 1, ... from the start of each text; in
                "causal" mode the first token that takes part has position 0 (padding on the left); in "prefix" mode
                the tokens that take part are counted (padding anywhere).
            inputs_embeds: (B, T, D) or packed (N, D) instead of ``input_ids``.
            past_key_values: Keys and values of the tokens before these, a cache of transformers ("causal" and
                "prefix" mode).
            use_cache: Return such a cache; None: only if one is given.
            cu_seqlens: (B + 1,) boundaries of packed texts, from 0 to N.
            output_attentions: Also the attention weights (B, H, T, K) of each layer; memory O(T^2); not when packed.
            output_hidden_states: Also the L + 1 hidden states; the last one is normed.
            return_dict: False: a tuple.
            **kwargs: For attention functions of transformers' registry.

        Returns:
            transformers' BaseModelOutputWithPast.

        Raises:
            TypeError: Wrong kind of argument.
            ValueError: Not exactly one of ``input_ids`` and ``inputs_embeds``, shapes that do not fit, ids outside the
                vocabulary (checked on the CPU), texts longer than ``max_position`` with learned positions.
        """
        config = self.config
        words = self._words(input_ids, inputs_embeds, cu_seqlens)
        shape = words.shape[:-1]
        if attention_mask is None and input_ids is not None and config.pad_token_id is not None:
            attention_mask = self._mask_of_padding(input_ids, past_key_values, cu_seqlens)
        wanted = config.output_attentions if output_attentions is None else output_attentions
        now = Pass(causal=config.attn_mode == "causal", weights=bool(wanted), options=kwargs)
        if config.attn_mode == "prefix" and (cu_seqlens is not None or config._attn_implementation not in OWN):
            raise ValueError(
                "attn_mode='prefix' has an attention of its own, attn_implementation 'sdpa' or 'eager', and takes no "
                f"packed input; got {config._attn_implementation!r}{'' if cu_seqlens is None else ' and cu_seqlens'}"
            )
        if cu_seqlens is not None:
            if attention_mask is not None or past_key_values is not None or use_cache or wanted:
                raise ValueError(
                    "packed input takes no attention_mask and no cache, and has no matrices of attention weights; "
                    "got one of them"
                )
            if config._attn_implementation not in OWN:
                raise ValueError(
                    f"packed input has an attention of its own, attn_implementation 'sdpa' or 'eager'; got "
                    f"{config._attn_implementation!r}"
                )
            now.packing = Packing.of(cu_seqlens, shape[0])
            past = 0
        else:
            if (use_cache or past_key_values is not None) and config.attn_mode not in ("causal", "prefix"):
                raise ValueError(f"only attn_mode='causal' has a cache, and 'prefix'; got {config.attn_mode!r}")
            if use_cache and past_key_values is None:
                past_key_values = DynamicCache(config=config)
            past = 0 if past_key_values is None else int(past_key_values.get_seq_length())
            full = getattr(attention_mask, "dtype", None) == torch.bool and attention_mask.dim() == 4  # type: ignore[union-attr]
            if full:  # made by transformers' generate for a cache of fixed size
                now.mask, attention_mask = attention_mask, None
            elif attention_mask is not None:
                attention_mask = padding_mask(attention_mask, (shape[0], past + shape[1]))
            now.cache, now.padding = past_key_values, attention_mask
        positions = self._positions(shape, past, position_ids, attention_mask, now, words.device)
        if token_type_ids is not None:
            token_type_ids = indices("token_type_ids", token_type_ids)
            self._check_segments(token_type_ids, shape)
        if config.attn_mode == "prefix":
            token_type_ids = self._prefix_segments(token_type_ids, shape, past, now, words.device)
        now.rotary = rotary_tables(config, positions, words) if config.position == "rope" else None
        pairs: list[Any] = [(None, None)] * config.num_layers
        if config.attn_mode == "diagonal":
            x, pairs = begin(self, words, positions, token_type_ids, now)
        else:
            if cu_seqlens is None and now.mask is None:
                now.mask = attention_mask_of(self, words, past, now, position_ids)
            x = self.embeddings(words, positions, token_type_ids)
        states = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        hidden: list[Any] = [x.expand(*shape, x.shape[-1])]
        weights: list[Any] = []
        # A layer that is computed again would put its keys and values into the cache again
        again = self.gradient_checkpointing and self.training and now.cache is None
        for layer, (keys, values) in zip(self.layers, pairs, strict=True):
            if again:
                x, matrix = self._gradient_checkpointing_func(layer.__call__, x, now, keys, values)
            else:
                x, matrix = layer(x, now, keys, values)
            hidden.append(x if states else None)
            weights.append(matrix)
        if self.final_norm is not None:
            x = self.final_norm(x)
        output = BaseModelOutputWithPast(
            last_hidden_state=x,
            past_key_values=past_key_values,
            hidden_states=(*hidden[:-1], x) if states else None,
            attentions=tuple(weights) if wanted else None,
        )
        return output if wants_dict(config, return_dict) else output.to_tuple()

    def _words(self, input_ids: Tensor | None, inputs_embeds: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
        """Vectors of the tokens, (B, T, D) or packed (N, D)."""
        if (input_ids is None) == (inputs_embeds is None):
            given = "neither" if input_ids is None else "both"
            raise ValueError(f"exactly one of input_ids and inputs_embeds must be given; got {given}")
        dims, shape = (2, "(B, T)") if cu_seqlens is None else (1, "(N,) with cu_seqlens")
        if input_ids is None:
            check_float("inputs_embeds", inputs_embeds, dims + 1)
            if inputs_embeds.shape[-1] != self.config.hidden_size:  # type: ignore[union-attr]
                raise ValueError(
                    f"inputs_embeds must have width {self.config.hidden_size}; got {tuple(inputs_embeds.shape)}"  # type: ignore[union-attr]
                )
            return inputs_embeds  # type: ignore[return-value]
        input_ids = indices("input_ids", input_ids)
        if input_ids.dim() != dims:
            hint = "" if input_ids.dim() != 1 else "; a packed row needs cu_seqlens"
            raise ValueError(f"input_ids must be {shape}; got shape {tuple(input_ids.shape)}{hint}")
        check_range("input_ids", input_ids, self.embeddings.token.num_embeddings)
        return self.embeddings.token(input_ids)

    def _mask_of_padding(self, input_ids: Tensor, cache: Cache | None, cu_seqlens: Tensor | None) -> Tensor | None:
        """Where the padding token stands, unless that is known in another way or would be half of the truth."""
        if cu_seqlens is not None or (cache is not None and cache.get_seq_length() > 0):
            return None
        return input_ids != self.config.pad_token_id

    def _positions(
        self, shape: torch.Size, past: int, given: Tensor | None, mask: Tensor | None, now: Pass, device: torch.device
    ) -> Tensor:
        limit = self.config.max_position if self.config.position == "learned" else None
        if given is not None:
            given = indices("position_ids", given)
            if tuple(given.shape) not in (tuple(shape), (1, *shape[1:]), tuple(shape[-1:])):
                raise ValueError(f"position_ids must have shape {tuple(shape)}; got {tuple(given.shape)}")
            if limit is not None:
                check_range("position_ids", given, limit)
            return given
        if now.packing is not None:
            longest, positions = now.packing.longest, now.packing.positions
        else:
            longest = past + shape[1]
            positions = torch.arange(past, longest, device=device)
            if mask is not None and self.config.attn_mode == "prefix":
                positions = (mask.cumsum(1) - 1).clamp(min=0)[:, past:]
            elif now.causal and mask is not None:
                first = (mask.cumsum(1) == 0).sum(1, keepdim=True)  # padding on the left
                positions = (positions - first).clamp(min=0)
        if limit is not None and longest > limit:
            raise ValueError(
                f"texts must have at most max_position = {limit} tokens with learned positions; got {longest}"
            )
        return positions

    def _check_segments(self, segments: Tensor, shape: torch.Size) -> None:
        if tuple(segments.shape) != tuple(shape):
            raise ValueError(f"token_type_ids must have shape {tuple(shape)}; got {tuple(segments.shape)}")
        if self.config.attn_mode == "prefix":
            check_range("token_type_ids", segments, 2)
        elif self.embeddings.segment is None:
            if segments.device.type == "cpu" and not torch.compiler.is_compiling() and bool(segments.any()):
                raise ValueError("this model has no segments (type_vocab_size=0); got token_type_ids that are not 0")
        else:
            check_range("token_type_ids", segments, self.embeddings.segment.num_embeddings)

    def _prefix_segments(
        self, segments: Tensor | None, shape: torch.Size, past: int, now: Pass, device: torch.device
    ) -> Tensor | None:
        """Note who belongs to the source; the segments that are embedded."""
        if segments is None and past:
            segments = torch.ones(shape, dtype=torch.long, device=device)
        elif past and device.type == "cpu" and not torch.compiler.is_compiling() and not bool(segments.all()):  # type: ignore[union-attr]
            raise ValueError("after a cache all token_type_ids must be 1: the source is known by then; got 0")
        now.segments = segments
        return None if self.embeddings.segment is None else segments


def indices(name: str, ids: Any) -> Tensor:
    """Integers of any width in a dtype that embeddings take; TypeError for anything else."""
    if not isinstance(ids, Tensor) or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise TypeError(f"{name} must be a tensor of integers; got {getattr(ids, 'dtype', type(ids).__name__)}")
    return ids if ids.dtype == torch.int32 else ids.long()


def check_range(name: str, ids: Tensor, size: int) -> None:
    """Raise ValueError for ids outside [0, size); on the CPU only, elsewhere it would wait for the device."""
    if ids.device.type != "cpu" or not ids.numel() or torch.compiler.is_compiling():
        return
    low, high = torch.aminmax(ids)
    if int(low) < 0 or int(high) >= size:
        wrong = int(low) if int(low) < 0 else int(high)
        raise ValueError(f"{name} must be in [0, {size}); got {wrong}")


def wants_dict(config: Any, return_dict: bool | None) -> bool:
    """Whether an object is to be returned, or a tuple."""
    return bool(getattr(config, "return_dict", True) if return_dict is None else return_dict)
