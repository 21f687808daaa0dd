"""One door for causal language models, whatever they were saved by (加载因果语言模型).

Source: Scientific Spaces article 7912, whose first pitfall is the wrong template: weights of one kind of GPT-2 in the
graph of another give fluent nonsense. So every name and shape is accounted for, and what is not known is asked for.

Formats: "kexue", a folder of ``save_pretrained``; "transformers", a folder of its GPT-2; "megatron", the shards that
CPM-LM was released as; "state_dict", the weights of a GPT-2 alone. "auto" looks.

What we do differently, and why: torch files are read with ``weights_only``, mapped into memory; the tutorials unpickle
them, which runs whatever the author of the file wanted.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from kexue._checks import check_choice, check_int
from kexue._transformers import GPT2Config
from kexue.generation._weight_files import megatron_files, read_json, read_weights, weights_of_folder
from kexue.generation.causal_lm import CausalLM
from kexue.models import KexueConfig, KexueForCausalLM, from_gpt2
from kexue.models.bridges import load_strictly
from kexue.models.megatron import megatron_state, unwrap

__all__ = ["load_causal_lm"]

FORMATS = ("auto", "kexue", "transformers", "megatron", "state_dict")
# Heads of the two released models, by (V, D, L): CPM-LM and its distilled version.
_KNOWN_HEADS = {(30000, 2560, 32): 32, (30000, 768, 12): 12}


def load_causal_lm(
    path_or_shards: Any,
    format: str = "auto",
    *,
    num_heads: int | None = None,
    config: Any = None,
    dtype: torch.dtype | None = None,
    mmap: bool = True,
) -> CausalLM:
    """Load a causal language model that is ready to generate.

    Nothing is downloaded, and nothing that a file holds is run. Memory: the model, and the pages of the files.

    Args:
        path_or_shards: A folder or a file; a list of files, one for each Megatron shard; a list of their dicts; or a
            state dict. Folders: what ``save_pretrained`` of this package or of transformers' GPT-2 wrote, or files
            ``mp_rank_XX_model_states.pt`` or folders ``mp_rank_XX``, also below the folder of one iteration as in the
            release of CPM-LM (``80000/mp_rank_00_model_states.pt``).
        format: "auto", "kexue", "transformers", "megatron" or "state_dict".
        num_heads: H of Megatron shards, and of a state dict without ``config``: no tensor tells it. None: known for
            CPM-LM (32) and CPM-distill (12).
        config: Of a state dict: a :class:`KexueConfig` or a GPT2Config.
        dtype: Of the weights; None keeps what the file has, float16 for CPM-LM. ``torch.float32`` suits most CPUs.
        mmap: Leave weights on disk until they are copied into the model, where the format allows it.

    Returns:
        The model in evaluation mode, with ``generate_fast``.

    Raises:
        FileNotFoundError: There is no such path.
        TypeError: Wrong kind of argument.
        ValueError: Another format than expected, a pickle that holds more than tensors, missing or unknown weights,
            wrong shapes, or a number of heads that is not known.

    Reference:
        Scientific Spaces 7912, https://spaces.ac.cn/archives/7912

    Example:
        >>> import tempfile
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> sizes = {"vocab_size": 30, "n_positions": 16, "n_embd": 16, "n_layer": 1, "n_head": 2}
        >>> gpt2 = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).eval()
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     gpt2.save_pretrained(folder)
        ...     lm = load_causal_lm(folder)
        >>> ids = torch.tensor([[2, 5, 6]])
        >>> torch.allclose(lm(ids).logits, gpt2(ids).logits, atol=1e-5)
        True
    """
    check_choice("format", format, FORMATS)
    if num_heads is not None:
        check_int("num_heads", num_heads, 1)
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"dtype must be a floating torch.dtype or None; got {dtype!r}")
    source: Any = path_or_shards
    if isinstance(source, str | os.PathLike):
        path = Path(source)
        if not path.exists():
            raise FileNotFoundError(f"{path} does not exist; a folder or a file of weights is expected")
        if path.is_dir():
            return _from_folder(path, format, num_heads, config, dtype, mmap)
        source = read_weights(path, mmap)
        if not isinstance(source, Mapping):
            raise ValueError(f"{path} must hold a dict of tensors; got {type(source).__name__}")
    if format in ("kexue", "transformers"):
        raise ValueError(f"format={format!r} wants a folder with a config.json; got {_kind(path_or_shards)}")
    if isinstance(source, Mapping):
        return _from_dict(source, format, num_heads, config, dtype)
    if isinstance(source, bytes) or not isinstance(source, Sequence):
        raise TypeError(f"expected a path, a list of shards or a state dict; got {type(source).__name__}")
    if format == "state_dict":
        raise ValueError(f"format='state_dict' wants one dict of tensors; got a list of {len(source)}")
    shards = [_shard(item, mmap) for item in source]
    if len(shards) == 1 and format == "auto":
        return _from_dict(shards[0], format, num_heads, config, dtype)
    return _from_megatron(shards, num_heads, dtype)


def _kind(source: Any) -> str:
    return "a file" if isinstance(source, str | os.PathLike) else type(source).__name__


def _shard(item: Any, mmap: bool) -> Mapping[str, Any]:
    value = read_weights(item, mmap) if isinstance(item, str | os.PathLike) else item
    if not isinstance(value, Mapping):
        raise TypeError(f"a shard must be a path or a dict of tensors; got {type(value).__name__}")
    return value


def _from_folder(
    folder: Path, format: str, num_heads: int | None, config: Any, dtype: torch.dtype | None, mmap: bool
) -> CausalLM:
    has_config = (folder / "config.json").is_file()
    if format == "megatron" or (format == "auto" and not has_config):
        return _from_megatron([read_weights(file, mmap) for file in megatron_files(folder)], num_heads, dtype)
    if format == "state_dict":
        return _from_dict(weights_of_folder(folder, mmap), format, num_heads, config, dtype)
    if not has_config:
        raise ValueError(f"format={format!r} wants a config.json in {folder}; there is none")
    settings = read_json(folder / "config.json")
    kinds: dict[str, Any] = {"kexue": KexueConfig, "gpt2": GPT2Config}
    kind = settings.get("model_type")
    wanted = {"kexue": ("kexue",), "transformers": ("gpt2",)}.get(format, tuple(kinds))
    if kind not in wanted:
        raise ValueError(
            f"{folder / 'config.json'} must have a model_type among {', '.join(map(repr, wanted))}; got {kind!r}"
        )
    loaded = kinds[kind].from_dict(settings)
    state = weights_of_folder(folder, mmap)
    if kind == "gpt2":
        return _from_gpt2(state, loaded, dtype)
    return _from_kexue(state, loaded, dtype)


def _from_dict(
    state: Mapping[str, Any], format: str, num_heads: int | None, config: Any, dtype: torch.dtype | None
) -> CausalLM:
    """Weights whose names tell what they are."""
    state = unwrap(state)
    names = {name for name in state if isinstance(name, str)}
    if format == "megatron" or (format == "auto" and any(n.startswith("transformer.layers.") for n in names)):
        return _from_megatron([state], num_heads, dtype)
    if "kexue.embeddings.token.weight" in names:
        if not isinstance(config, KexueConfig):
            raise ValueError(f"a state dict of a Kexue model wants config, a KexueConfig; got {config!r}")
        return _from_kexue(dict(state), config, dtype)
    prefix = "transformer." if "transformer.wte.weight" in names else ""
    if f"{prefix}wte.weight" not in names:
        some = ", ".join(sorted(names)[:4]) or "no names"
        raise ValueError(f"the names are neither those of GPT-2 nor of its Megatron shards nor of Kexue models: {some}")
    return _from_gpt2(dict(state), config or _gpt2_config(state, prefix, num_heads), dtype)


def _gpt2_config(state: Mapping[str, Any], prefix: str, num_heads: int | None) -> GPT2Config:
    """The configuration that the shapes tell, but for the heads."""
    words, positions = state[f"{prefix}wte.weight"], state.get(f"{prefix}wpe.weight")
    for name, table in (("wte", words), ("wpe", positions)):
        if not isinstance(table, torch.Tensor) or table.dim() != 2:
            raise ValueError(f"{prefix}{name}.weight must be a table of vectors; got {_shape(table)}")
    found = (re.match(rf"{re.escape(prefix)}h\.(\d+)\.", n) for n in state if isinstance(n, str))
    layers = len({m[1] for m in found if m})
    heads = _heads(num_heads, len(words), words.shape[1], layers)
    inner = state.get(f"{prefix}h.0.mlp.c_fc.bias")
    return GPT2Config(
        vocab_size=len(words),
        n_positions=len(positions),  # type: ignore[arg-type]
        n_embd=words.shape[1],
        n_layer=layers,
        n_head=heads,
        n_inner=len(inner) if isinstance(inner, torch.Tensor) and inner.dim() == 1 else None,
        bos_token_id=None,
        eos_token_id=None,
    )


def _shape(value: Any) -> str:
    return f"shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__


def _heads(num_heads: int | None, vocabulary: int, width: int, layers: int) -> int:
    heads = num_heads or _KNOWN_HEADS.get((vocabulary, width, layers))
    if heads is None:
        raise ValueError(
            f"num_heads must be given: no tensor tells it, and a model of {layers} layers of width {width} with "
            f"{vocabulary} tokens is no released CPM; got None"
        )
    return heads


def _from_megatron(shards: list[Any], num_heads: int | None, dtype: torch.dtype | None) -> CausalLM:
    config, state = megatron_state(shards, lambda sizes: _heads(num_heads, *sizes), dtype)
    return _model(config, state)


def _from_gpt2(state: dict[str, Any], config: Any, dtype: torch.dtype | None) -> CausalLM:
    model: Any = from_gpt2(state, config)
    new = model.state_dict()
    if not isinstance(model, KexueForCausalLM):  # weights without a head: GPT-2 ties it
        new = {f"kexue.{name}": value for name, value in new.items()}
    return _model(model.config, _cast(new, dtype))


def _from_kexue(state: dict[str, Any], config: KexueConfig, dtype: torch.dtype | None) -> CausalLM:
    if wrong := [name for name, value in state.items() if not isinstance(value, torch.Tensor)]:
        raise TypeError(f"a state dict must map names to tensors; got {wrong[0]!r}: {type(state[wrong[0]]).__name__}")
    if config.attn_mode != "causal":
        raise ValueError(f"a causal language model has attn_mode='causal'; got {config.attn_mode!r}")
    return _model(config, {name: value.clone() for name, value in _cast(state, dtype).items()})


def _cast(state: Mapping[str, torch.Tensor], dtype: torch.dtype | None) -> dict[str, torch.Tensor]:
    return {name: value if dtype is None else value.to(dtype) for name, value in state.items()}


def _model(config: KexueConfig, state: dict[str, torch.Tensor]) -> CausalLM:
    """The class with the decoding engine, around these very tensors."""
    model: CausalLM = load_strictly(CausalLM, config, state, copy=False)
    return model
