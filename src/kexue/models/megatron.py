"""GPT-2 from the shards of Megatron, as CPM-LM was released (Megatron 分片合并).

Source: Scientific Spaces article 7912; the layout of Megatron-LM's first GPT-2 and of the CPM-LM release.

Formula, for n shards of a model of width D. The table of words and the maps into the heads and into the inner layer are
cut by output: their rows are joined. ``attention.dense`` and ``mlp.dense_4h_to_h`` are cut by input: their columns are
joined. ``query_key_value`` is no plain cut: each shard holds [q; k; v] of its own heads, D/n rows each, so that the
parts are joined for q, k and v apart. Everything else (positions, norms, the biases of the maps that are cut by input)
is the same in every shard and taken from the first.

What we do differently, and why:
- The published script joins ``query_key_value`` as a whole, which shuffles heads between q, k and v, and leaves out
  biases; the ports are right but for a fixed number of two shards. Here any number is merged, and every name and every
  shape is checked before anything is built.
- The number of heads stands in no tensor; a wrong one gives fluent nonsense and must be given.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kexue._checks import check_int
from kexue.models.bridges import load_strictly
from kexue.models.family import KexueConfig, KexueForCausalLM

__all__ = ["from_megatron_gpt2", "megatron_state", "merge_shards", "unwrap"]

_WORDS, _POSITIONS = "word_embeddings.weight", "position_embeddings.weight"
_LAYER = re.compile(r"transformer\.layers\.(0|[1-9]\d*)\.")
_PARTS = (
    "input_layernorm", "post_attention_layernorm", "attention.query_key_value", "attention.dense",
    "mlp.dense_h_to_4h", "mlp.dense_4h_to_h",
)  # fmt: skip
_OURS = (
    "attention_norm", "feed_forward_norm", "attention.qkv", "attention.out", "feed_forward.up", "feed_forward.down",
)  # fmt: skip
_KINDS = ("weight", "bias")
_SHOWN = 4  # names in an error message


def _names(layers: int) -> list[str]:
    blocks = (f"transformer.layers.{i}.{part}.{kind}" for i in range(layers) for part in _PARTS for kind in _KINDS)
    return [_WORDS, _POSITIONS, *blocks, *(f"transformer.final_layernorm.{kind}" for kind in _KINDS)]


def unwrap(shard: Any) -> Mapping[str, Tensor]:
    """The weights of one shard, which DeepSpeed writes below "module" and Megatron below "model"."""
    for key in ("module", "model"):
        if isinstance(shard, Mapping) and isinstance(shard.get(key), Mapping):
            return unwrap(shard[key])
    if not isinstance(shard, Mapping):
        raise TypeError(f"a shard must be a dict of tensors; got {type(shard).__name__}")
    return shard


def _list(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _check_names(shards: Sequence[Mapping[str, Tensor]]) -> int:
    """The number of layers; every shard has exactly the tensors of so many."""
    found = [m for name in shards[0] if isinstance(name, str) and (m := _LAYER.match(name))]
    layers = 1 + max((int(m[1]) for m in found), default=-1)
    # A single absurd number must not make a list of billions of names.
    if layers > len(shards[0]):
        raise ValueError(f"shard 0 has a layer {layers - 1} but only {len(shards[0])} tensors")
    if not layers:
        raise ValueError(
            "shard 0 has no tensor transformer.layers.0.*; expected the names of Megatron's GPT-2, got "
            + (_list(sorted(map(str, shards[0]))) or "an empty dict")
        )
    expected = _names(layers)
    for number, shard in enumerate(shards):
        missing = [name for name in expected if name not in shard]
        extra = sorted(str(name) for name in set(shard) - set(expected))
        if missing:
            raise ValueError(f"shard {number} lacks {_list(missing)} of a GPT-2 of {layers} layers")
        if extra:
            raise ValueError(f"shard {number} has {_list(extra)}, which a GPT-2 of {layers} layers has not")
        for name in expected:
            value = shard[name]
            if not isinstance(value, Tensor):
                raise TypeError(f"{name} of shard {number} must be a tensor; got {type(value).__name__}")
            if not value.is_floating_point():
                raise ValueError(f"{name} of shard {number} must hold floating numbers; got {value.dtype}")
            first = shards[0][name]
            if value.dtype != first.dtype:
                raise ValueError(f"{name} is {first.dtype} in shard 0 and {value.dtype} in shard {number}")
            if value.shape != first.shape:
                raise ValueError(
                    f"{name} is {tuple(first.shape)} in shard 0 and {tuple(value.shape)} in shard {number}"
                )
    return layers


def _check_tables(shard: Mapping[str, Tensor], count: int) -> tuple[int, int]:
    """V and D of the whole model."""
    words, positions = shard[_WORDS], shard[_POSITIONS]
    for name, table in ((_WORDS, words), (_POSITIONS, positions)):
        if table.dim() != 2 or not table.numel():
            raise ValueError(f"{name} must be a table with rows and columns; got shape {tuple(table.shape)}")
    if words.shape[1] != positions.shape[1]:
        raise ValueError(f"{_WORDS} has width {words.shape[1]} and {_POSITIONS} has {positions.shape[1]}")
    return count * len(words), positions.shape[1]


def _check_shapes(shard: Mapping[str, Tensor], layers: int, count: int, num_heads: int) -> int:
    """The shapes of the first shard, which the others share, fit so many shards and heads; the inner width."""
    width = shard[_POSITIONS].shape[1]
    rows = shard["transformer.layers.0.attention.query_key_value.weight"].shape[:1]
    if rows and rows[0] * count != 3 * width:
        hint = ""
        if rows[0] and not 3 * width % rows[0]:
            hint = f"; so many rows make one of {3 * width // rows[0]} shards"
        raise ValueError(
            f"{count} shards of a model of width {width} have 3 * {width} / {count} = {3 * width / count:g} rows in "
            f"query_key_value.weight; got {rows[0]}{hint}"
        )
    if width % (count * num_heads):
        raise ValueError(
            f"the width must be a multiple of shards * num_heads = {count} * {num_heads} = {count * num_heads}; "
            f"got {width}"
        )
    inner = max([0, *shard["transformer.layers.0.mlp.dense_h_to_4h.weight"].shape[:1]])
    if not inner:
        raise ValueError("mlp.dense_h_to_4h.weight must have rows; got none")
    part = width // count
    shapes = {
        "input_layernorm": ((width,), (width,)),
        "post_attention_layernorm": ((width,), (width,)),
        "attention.query_key_value": ((3 * part, width), (3 * part,)),
        "attention.dense": ((width, part), (width,)),
        "mlp.dense_h_to_4h": ((inner, width), (inner,)),
        "mlp.dense_4h_to_h": ((width, inner), (width,)),
    }
    wanted = {
        f"transformer.layers.{i}.{name}.{kind}": shape
        for i in range(layers)
        for name, pair in shapes.items()
        for kind, shape in zip(_KINDS, pair, strict=True)
    }
    wanted |= {f"transformer.final_layernorm.{kind}": (width,) for kind in _KINDS}
    for name, shape in wanted.items():
        if tuple(shard[name].shape) != shape:
            raise ValueError(
                f"{name} must have shape {shape} in each of {count} shards; got {tuple(shard[name].shape)}"
            )
    return count * inner


def _join(name: str, parts: list[Tensor]) -> Tensor:
    """One tensor of the whole model, in memory of its own."""
    if len(parts) == 1 or "layernorm" in name or name == _POSITIONS:
        return parts[0].clone()
    if "query_key_value" in name:  # (3 D/n, ...) each: q, k and v apart
        return torch.cat([p.unflatten(0, (3, -1)) for p in parts], 1).flatten(0, 1)
    if name.endswith(("attention.dense.weight", "mlp.dense_4h_to_h.weight")):
        return torch.cat(parts, 1)
    if name.endswith(("attention.dense.bias", "mlp.dense_4h_to_h.bias")):
        return parts[0].clone()
    return torch.cat(parts, 0)


@torch.no_grad()
def merge_shards(shards: Sequence[Mapping[str, Tensor]], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """One state dict under Megatron's names out of checked shards; see :func:`from_megatron_gpt2`."""
    names = list(shards[0])
    if dtype is None:
        for name in names:
            found = shards[0][name].dtype
            dtype = found if dtype is None else torch.promote_types(dtype, found)
    return {name: _join(name, [shard[name] for shard in shards]).to(dtype) for name in names}


def megatron_state(
    shards: Any, num_heads: int | Callable[[tuple[int, int, int]], int], dtype: torch.dtype | None = None
) -> tuple[KexueConfig, dict[str, Tensor]]:
    """Configuration and weights, under the names of :class:`KexueForCausalLM` and in memory of their own.

    Args:
        shards: As in :func:`from_megatron_gpt2`.
        num_heads: H, or a function that gives it for (V, D, L).
        dtype: As in :func:`from_megatron_gpt2`.

    Raises:
        TypeError: As in :func:`from_megatron_gpt2`.
        ValueError: As in :func:`from_megatron_gpt2`.
    """
    if isinstance(shards, Mapping | str | bytes) or not isinstance(shards, Sequence):
        raise TypeError(f"shards must be a list of dicts; got {type(shards).__name__}")
    if not shards:
        raise ValueError("shards must hold at least one dict; got an empty list")
    if not callable(num_heads):
        check_int("num_heads", num_heads, 1)
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"dtype must be a floating torch.dtype or None; got {dtype!r}")
    weights = [unwrap(shard) for shard in shards]
    layers = _check_names(weights)
    vocabulary, width = _check_tables(weights[0], len(weights))
    heads = num_heads((vocabulary, width, layers)) if callable(num_heads) else int(num_heads)
    inner = _check_shapes(weights[0], layers, len(weights), heads)
    config = KexueConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        num_layers=layers,
        num_heads=heads,
        attn_mode="causal",
        max_position=len(weights[0][_POSITIONS]),
        intermediate_size=inner,
        act="gelu_tanh",
        norm_eps=1e-5,
        initializer_range=0.02,
    )
    merged = merge_shards(weights, dtype)
    names = {
        _WORDS: "kexue.embeddings.token.weight",
        _POSITIONS: "kexue.embeddings.position.weight",
        **{f"transformer.final_layernorm.{kind}": f"kexue.final_norm.{kind}" for kind in _KINDS},
    }
    for i in range(layers):
        for theirs, ours in zip(_PARTS, _OURS, strict=True):
            for kind in _KINDS:
                names[f"transformer.layers.{i}.{theirs}.{kind}"] = f"kexue.layers.{i}.{ours}.{kind}"
    return config, {names[name]: value for name, value in merged.items()}


def from_megatron_gpt2(
    shards: Sequence[Mapping[str, Any]], num_heads: int, dtype: torch.dtype | None = None
) -> KexueForCausalLM:
    """A Kexue model with the weights of a GPT-2 in the shards of Megatron, such as CPM-LM.

    Memory: the model, beside the shards.

    Args:
        shards: The state dicts of all model-parallel ranks, in order, with the names ``word_embeddings.weight``,
            ``position_embeddings.weight``, ``transformer.layers.{i}.*`` and ``transformer.final_layernorm.*``; also
            whole checkpoints that hold one below "module" or "model".
        num_heads: H of the whole model; 32 for CPM-LM.
        dtype: Of the model; None keeps that of the shards (float16 in the release), or the widest if they mix several.

    Returns:
        The model in evaluation mode, with memory of its own.

    Raises:
        TypeError: Wrong kind of argument.
        ValueError: Missing, unknown or misshapen tensors, shards that do not belong together, another number of shards
            than the shapes say, or a width that shards * num_heads does not divide.

    Reference:
        Scientific Spaces 7912, https://spaces.ac.cn/archives/7912

    Example:
        >>> D, n = 8, 2  # a random model in two shards
        >>> layer = {
        ...     "input_layernorm": (D,), "post_attention_layernorm": (D,), "attention.query_key_value": (3 * D // n, D),
        ...     "attention.dense": (D, D // n), "mlp.dense_h_to_4h": (4 * D // n, D),
        ...     "mlp.dense_4h_to_h": (D, 4 * D // n),
        ... }
        >>> def shard():
        ...     tensors = {f"transformer.layers.0.{k}.weight": torch.randn(v) for k, v in layer.items()}
        ...     tensors |= {f"transformer.layers.0.{k}.bias": torch.randn(v[0]) for k, v in layer.items()}
        ...     tensors |= {f"transformer.final_layernorm.{k}": torch.randn(D) for k in ("weight", "bias")}
        ...     tensors["word_embeddings.weight"] = torch.randn(30 // n, D)
        ...     return tensors | {"position_embeddings.weight": torch.randn(16, D)}
        >>> model = from_megatron_gpt2([shard(), shard()], num_heads=2)
        >>> model.config.vocab_size, model(torch.tensor([[1, 2, 3]])).logits.shape
        (30, torch.Size([1, 3, 30]))
    """
    check_int("num_heads", num_heads, 1)
    config, state = megatron_state(shards, num_heads, dtype)
    model: KexueForCausalLM = load_strictly(KexueForCausalLM, config, state, copy=False)
    return model
