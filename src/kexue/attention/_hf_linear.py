"""Linear attention inside transformers models: the attention function, its mask, and a cache of constant size.

transformers hands over q, k, v (B, H, T, D) with rotary positions applied (so phi(RoPE(q)): weights stay positive, but
depend on more than relative positions), heads of k and v not repeated. What linear attention cannot do is refused here:
dropout of weights, biases on scores, soft caps, windows, packed sequences, masks that differ from row to row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kexue._transformers import Cache, CacheLayerMixin, bidirectional_mask_function, causal_mask_function
from kexue.attention.feature_maps import FeatureMap
from kexue.attention.linear import LinearAttentionState, linear_attention

__all__ = ["attention_forward", "attention_mask", "run_linear", "state_cache"]

_TAG = "_kexue_state_layer"
_REFUSED = ("sliding_window", "softcap", "position_bias", "s_aux", "alibi")
NAMES = ("kexue_linear", "kexue_performer")


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Any = causal_mask_function,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """The (B, keys) padding mask, or None when nothing is padded; every other kind of mask is refused."""
    if mask_function not in (causal_mask_function, bidirectional_mask_function):
        raise ValueError(
            "linear attention is fully causal or fully bidirectional; this model asks for another mask (a sliding "
            "window, blocks, or several sequences packed into one row; while compiling, transformers cannot tell that "
            "rows are not packed unless it is given an attention_mask, which may be all ones)"
        )
    if mask_function is causal_mask_function and isinstance(q_offset, int) and kv_length > q_length + q_offset:
        raise ValueError(
            f"linear attention cannot work on a preallocated cache: it would see {kv_length} keys after "
            f"{q_length + q_offset} tokens; use LinearAttentionState.for_model(model) or a DynamicCache"
        )
    if attention_mask is None:
        return None
    attention_mask = attention_mask[:, -kv_length:].bool()
    if not torch.compiler.is_compiling() and bool(attention_mask.all()):
        return None
    return attention_mask


def attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Transformers' attention function: the kernel named by ``config.linear_feature_map``, by default "elu1".

    The kernels of the article have no temperature: ``scaling`` is not used.
    """
    feature_map = getattr(getattr(module, "config", None), "linear_feature_map", "elu1")
    return run_linear("kexue_linear", feature_map, module, query, key, value, attention_mask, dropout, kwargs), None


def run_linear(
    name: str,
    feature_map: str | FeatureMap,
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float,
    options: dict[str, Any],
) -> Tensor:
    """What the two implementations share. Returns (B, T, H, E)."""
    if dropout:
        raise ValueError(
            f"{name} has no matrix of weights to drop from; set the attention dropout of the model's configuration "
            f"(attention_probs_dropout_prob, attention_dropout or attn_pdrop) to 0; got {dropout}"
        )
    for option in _REFUSED:
        if options.get(option) is not None:
            raise ValueError(f"{name} cannot honour {option}; got {options[option]!r:.80}")
    if options.get("output_attentions"):
        raise ValueError(f"{name} has no matrix of weights to return; got output_attentions=True")
    if attention_mask is not None and (attention_mask.dim() != 2 or attention_mask.is_floating_point()):
        raise ValueError(
            f"{name} takes a padding mask (batch, keys): it cannot honour biases or masks that differ from row to row; "
            f"got shape {tuple(attention_mask.shape)}, dtype {attention_mask.dtype}"
        )
    causal = options.get("is_causal")
    causal = bool(getattr(module, "is_causal", True) if causal is None else causal)
    layer: StateLayer | None = getattr(key, _TAG, None)
    mask = attention_mask
    if mask is not None:
        if mask.shape[1] < key.shape[2]:
            raise ValueError(
                f"{name} needs a mask for each of the {key.shape[2]} keys; got {mask.shape[1]} (a preallocated cache?)"
            )
        mask = mask[:, mask.shape[1] - key.shape[2] :].bool()
    if layer is None:
        out = linear_attention(query, key, value, feature_map, causal=causal, key_padding_mask=mask)
    else:
        out, state = linear_attention(
            query, key, value, feature_map, causal=causal, key_padding_mask=mask, initial_state=layer.state,
            return_state=True,
        )  # fmt: skip
        layer.state = state
        layer.waiting = False
    return out.transpose(1, 2).contiguous()


class StateLayer(CacheLayerMixin):
    """The cache of one layer: (S, z) instead of keys and values.

    ``update`` returns only the new keys and values; the attention function finds this object on the keys and adds them
    to the state.
    """

    is_sliding = False

    def __init__(self) -> None:
        super().__init__()
        self.state: Any = None
        self.seen = 0
        self.waiting = False  # keys were handed out that no attention function has added yet

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to allocate: the state appears with the first keys."""
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Hand the new keys and values to the attention function, marked with this layer."""
        if self.waiting:
            raise RuntimeError(
                f"a state of linear attention was not used: the attention of the model must be one of {NAMES} while "
                "this cache is in use, and not compiled"
            )
        self.is_initialized = self.waiting = True
        self.seen += key_states.shape[-2]
        setattr(key_states, _TAG, self)
        return key_states, value_states

    def get_seq_length(self) -> int:
        """Number of tokens seen."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(length of the mask, its offset)."""
        return self.seen + query_length, 0

    def get_max_length(self) -> int:
        """No limit."""
        return -1

    def get_max_cache_shape(self) -> int:
        """No limit (name of older versions)."""
        return -1

    def reset(self) -> None:
        """Forget everything."""
        self.state, self.seen, self.waiting = None, 0, False

    def _rows(self, index: Tensor) -> None:
        if self.state is not None:
            self.state = LinearAttentionState(*(x.index_select(0, index.to(x.device)) for x in self.state))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Beam search: take the rows of these beams."""
        self._rows(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows."""
        self._rows(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        if self.state is not None:
            rows = torch.arange(self.state.s.shape[0], device=self.state.s.device)
            self._rows(rows.repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        """A sum cannot give back its last terms."""
        raise ValueError(f"a state of linear attention cannot forget its last tokens; got crop({tokens_to_remove})")

    def offload(self) -> None:
        """A state is small: it stays where it is."""

    def prefetch(self) -> None:
        """A state is small: it stays where it is."""


class StateCache(Cache):
    """One :class:`StateLayer` per layer of a model."""

    def __init__(self, layers: int) -> None:
        super().__init__(layers=[StateLayer() for _ in range(layers)])


def state_cache(model: Any) -> StateCache:
    """See ``LinearAttentionState.for_model``."""
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "get_text_config"):
        raise TypeError(f"model must be a transformers model; got {type(model).__name__}")
    config = config.get_text_config(decoder=True)
    if config._attn_implementation not in NAMES:
        raise ValueError(
            f"a state needs linear attention: call model.set_attn_implementation with one of {NAMES} first; got "
            f"{config._attn_implementation!r}"
        )
    return StateCache(config.num_hidden_layers)
