"""Checkpoints of BERT and GPT-2 as Kexue models (权重转换): every key and shape is accounted for.

A weight that is missing, left over or of another shape is an error, as is an option of the configuration that the stack
does not compute: a wrong guess here gives fluent nonsense, not an exception. The logits agree with those of
transformers to rounding.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from kexue.models.configuration import KexueConfig
from kexue.models.family import (
    KexueForCausalLM,
    KexueForMaskedLM,
    KexueForNextSentence,
    KexueForPreTraining,
    KexueForSequenceClassification,
    KexueModel,
)
from kexue.models.mask_embedding import FLAG, RECORD
from kexue.models.stack import KexuePreTrainedModel

__all__ = ["from_bert", "from_gpt2", "load_strictly"]

_BERT_ACTS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu", "silu": "silu"}


def from_bert(state_dict: Mapping[str, Tensor], config: Any) -> KexuePreTrainedModel:
    """A Kexue model with the weights of a BERT of transformers.

    Args:
        state_dict: Of any of its BERT classes for masked tokens, next sentences, both, sequence classification, or
            of the encoder alone; the keys decide which Kexue model comes back.
        config: Its BertConfig, or a dict or an object with the same attributes; or the :class:`KexueConfig` to use.

    Returns:
        A KexueForMaskedLM, KexueForNextSentence, KexueForPreTraining, KexueForSequenceClassification or KexueModel,
        in evaluation mode, with copies of the weights in their dtype.

    Raises:
        TypeError: ``state_dict`` is no mapping of names to tensors.
        ValueError: Missing or unknown keys, wrong shapes, or options that the stack does not have.

    Example:
        >>> from transformers import BertConfig, BertForMaskedLM
        >>> sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
        >>> bert = BertForMaskedLM(BertConfig(vocab_size=30, **sizes)).eval()
        >>> model = from_bert(bert.state_dict(), bert.config)
        >>> ids = torch.tensor([[2, 5, 6, 3]])
        >>> torch.allclose(model(ids).logits, bert(ids).logits, atol=1e-5)
        True
    """
    state = _state(state_dict)
    kexue = copy.deepcopy(config) if isinstance(config, KexueConfig) else _bert_config(config)
    prefix = "bert." if any(key.startswith("bert.") for key in state) else ""
    names = {
        f"{prefix}embeddings.word_embeddings.weight": "embeddings.token.weight",
        f"{prefix}embeddings.position_embeddings.weight": "embeddings.position.weight",
        f"{prefix}embeddings.token_type_embeddings.weight": "embeddings.segment.weight",
        **_both(f"{prefix}embeddings.LayerNorm", "embeddings.norm"),
    }
    for i in range(kexue.num_layers):
        layer = f"{prefix}encoder.layer.{i}"
        names |= _both(f"{layer}.attention.output.dense", f"layers.{i}.attention.out")
        names |= _both(f"{layer}.attention.output.LayerNorm", f"layers.{i}.attention_norm")
        names |= _both(f"{layer}.intermediate.dense", f"layers.{i}.feed_forward.up")
        names |= _both(f"{layer}.output.dense", f"layers.{i}.feed_forward.down")
        names |= _both(f"{layer}.output.LayerNorm", f"layers.{i}.feed_forward_norm")
    ignored = {f"{prefix}embeddings.position_ids", f"{prefix}embeddings.token_type_ids"}
    heads: dict[str, str] = {}
    pooler = _both(f"{prefix}pooler.dense", "pooler.dense")
    language = any(key.startswith("cls.predictions.") for key in state)
    if language:
        heads |= _both("cls.predictions.transform.dense", "lm_head.dense")
        heads |= _both("cls.predictions.transform.LayerNorm", "lm_head.norm")
        # One tensor, stated once or twice; where they are not tied, the decoder's is the one that is read
        biases = ["cls.predictions.bias", "cls.predictions.decoder.bias"]
        bias = biases[1] if biases[1] in state else biases[0]
        heads[bias] = "lm_head.decoder.bias"
        ignored |= set(biases)
    kind: type[KexuePreTrainedModel]
    if any(key.startswith("cls.seq_relationship.") for key in state):
        kind = KexueForPreTraining if language else KexueForNextSentence
        heads |= _both("cls.seq_relationship", "next_sentence")
    elif any(key.startswith("classifier.") for key in state):
        kind = KexueForSequenceClassification
        heads |= _both("classifier", "classifier")
        if isinstance(state.get("classifier.weight"), Tensor):
            kexue.num_labels = state["classifier.weight"].shape[0]
    else:
        kind = KexueForMaskedLM if language else KexueModel
    if kind in (KexueForMaskedLM, KexueModel):
        ignored |= set(pooler)  # of the encoder alone, and of masked models of old checkpoints, unused
    else:
        heads |= pooler
    inner = "" if kind is KexueModel else "kexue."
    renamed = {key: inner + name for key, name in names.items()} | heads
    new: dict[str, Tensor] = {}
    for i in range(kexue.num_layers):
        for part in ("weight", "bias"):
            keys = [f"{prefix}encoder.layer.{i}.attention.self.{x}.{part}" for x in ("query", "key", "value")]
            found, width = dict(zip(keys, _take(state, keys), strict=True)), kexue.hidden_size
            _check_shapes(found, dict.fromkeys(keys, (width, width) if part == "weight" else (width,)))
            new[f"{inner}layers.{i}.attention.qkv.{part}"] = torch.cat(list(found.values()))
            ignored |= set(keys)
    decoder = state.get("cls.predictions.decoder.weight")
    if decoder is not None:
        renamed["cls.predictions.decoder.weight"] = "lm_head.decoder.weight"
        tied = _take(state, [f"{prefix}embeddings.word_embeddings.weight"])[0]
        kexue.tie_word_embeddings = decoder.shape == tied.shape and torch.equal(decoder, tied)
    _rename(state, renamed, ignored, new)
    return load_strictly(kind, kexue, new)


def from_gpt2(state_dict: Mapping[str, Tensor], config: Any) -> KexuePreTrainedModel:
    """A Kexue model with the weights of a GPT-2 of transformers.

    Args:
        state_dict: Of GPT2LMHeadModel, or of GPT2Model.
        config: Its GPT2Config, or a dict or an object with the same attributes; or the :class:`KexueConfig` to use.

    Returns:
        A KexueForCausalLM, or a KexueModel without a head; in evaluation mode, with copies of the weights.

    Raises:
        TypeError: ``state_dict`` is no mapping of names to tensors.
        ValueError: Missing or unknown keys, wrong shapes, or options that the stack does not have.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=30, n_positions=16, n_embd=16, n_layer=1, n_head=2)).eval()
        >>> model = from_gpt2(gpt2.state_dict(), gpt2.config)
        >>> ids = torch.tensor([[2, 5, 6, 3]])
        >>> torch.allclose(model(ids).logits, gpt2(ids).logits, atol=1e-5)
        True
    """
    state = _state(state_dict)
    kexue = copy.deepcopy(config) if isinstance(config, KexueConfig) else _gpt2_config(config)
    prefix = "transformer." if any(key.startswith("transformer.") for key in state) else ""
    language = "lm_head.weight" in state or prefix != ""
    inner = "kexue." if language else ""
    names = {
        f"{prefix}wte.weight": "embeddings.token.weight",
        f"{prefix}wpe.weight": "embeddings.position.weight",
        **_both(f"{prefix}ln_f", "final_norm"),
    }
    turned = {}  # Conv1D holds (inputs, outputs)
    for i in range(kexue.num_layers):
        layer, ours = f"{prefix}h.{i}", f"layers.{i}"
        names |= _both(f"{layer}.ln_1", f"{ours}.attention_norm") | _both(f"{layer}.ln_2", f"{ours}.feed_forward_norm")
        for theirs, mine in (
            ("attn.c_attn", "attention.qkv"), ("attn.c_proj", "attention.out"),
            ("mlp.c_fc", "feed_forward.up"), ("mlp.c_proj", "feed_forward.down"),
        ):  # fmt: skip
            turned[f"{layer}.{theirs}.weight"] = f"{ours}.{mine}.weight"
            names[f"{layer}.{theirs}.bias"] = f"{ours}.{mine}.bias"
    # Masks that old checkpoints carry along
    ignored = {key for key in state if re.fullmatch(rf"{re.escape(prefix)}h\.\d+\.attn\.(masked_)?bias", key)}
    new = {inner + name: _turned(_take(state, [key])[0]) for key, name in turned.items()}
    renamed = {key: inner + name for key, name in names.items()}
    if "lm_head.weight" in state:
        renamed["lm_head.weight"] = "lm_head.decoder.weight"
        head, table = _take(state, ["lm_head.weight", f"{prefix}wte.weight"])
        kexue.tie_word_embeddings = head.shape == table.shape and torch.equal(head, table)
    _rename(state, renamed, ignored | set(turned), new)
    return load_strictly(KexueForCausalLM if language else KexueModel, kexue, new)


def load_strictly(kind: type[Any], config: KexueConfig, state: dict[str, Tensor], copy: bool = True) -> Any:
    """A model of the class with exactly these weights, in their dtype; a tied decoder may be left out.

    ``copy=False`` takes the tensors themselves: for who has made them, as two copies of a large model need the room.
    """
    with torch.device("meta"):
        model = kind(config)
    expected = {name: tuple(p.shape) for name, p in model.state_dict().items()}
    if config.tie_word_embeddings and "lm_head.decoder.weight" in expected:
        state.setdefault("lm_head.decoder.weight", state.get("kexue.embeddings.token.weight", torch.empty(0)))
    missing = sorted(set(expected) - set(state))
    unknown = sorted(set(state) - set(expected))
    if missing or unknown:
        raise _misfit(missing, unknown)
    _check_shapes(state, expected)
    model.load_state_dict({name: v.clone() if copy else v for name, v in state.items()}, assign=True)
    if config.tie_word_embeddings:
        model.tie_weights()
    for p in model.parameters():
        p.requires_grad_(True)
    return model.eval()


def _check_shapes(state: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]]) -> None:
    wrong = [name for name, shape in expected.items() if tuple(state[name].shape) != shape]
    if wrong:
        lines = (f"{name} must be {expected[name]} and is {tuple(state[name].shape)}" for name in wrong[:4])
        raise ValueError(f"the checkpoint does not fit its configuration: {'; '.join(lines)}")


def _turned(weight: Tensor) -> Tensor:
    return weight.T.contiguous() if weight.dim() == 2 else weight  # another shape is refused later


def _misfit(missing: list[str], unknown: list[str]) -> ValueError:
    parts = []
    for title, names in (("missing", missing), ("unknown", unknown)):
        if names:
            parts.append(f"{title} {', '.join(names[:4])}{f' and {len(names) - 4} more' if len(names) > 4 else ''}")
    return ValueError(f"the checkpoint does not fit: {'; '.join(parts)}")


def _state(state_dict: Any) -> dict[str, Tensor]:
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"state_dict must be a mapping of names to tensors; got {type(state_dict).__name__}")
    for name, value in state_dict.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise TypeError(f"state_dict must map names to tensors; got {name!r}: {type(value).__name__}")
    # Checkpoints converted from TensorFlow call the parameters of norms gamma and beta.
    return {
        re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", name)): value
        for name, value in state_dict.items()
    }


def _both(theirs: str, ours: str) -> dict[str, str]:
    return {f"{theirs}.{part}": f"{ours}.{part}" for part in ("weight", "bias")}


def _take(state: Mapping[str, Tensor], keys: list[str]) -> list[Tensor]:
    absent = [key for key in keys if key not in state]
    if absent:
        raise _misfit(absent, [])
    return [state[key] for key in keys]


def _rename(state: dict[str, Tensor], names: dict[str, str], ignored: set[str], new: dict[str, Tensor]) -> None:
    absent = sorted(key for key in names if key not in state)
    unknown = sorted(key for key in state if key not in names and key not in ignored)
    if absent or unknown:
        raise _misfit(absent, unknown)
    new |= {name: state[key] for key, name in names.items()}


def _options(config: Any) -> Callable[..., Any]:
    if isinstance(config, Mapping):
        return config.get
    if config is None or not hasattr(config, "vocab_size"):
        raise TypeError(f"config must be a configuration of the checkpoint's model; got {type(config).__name__}")
    return lambda name, default=None: getattr(config, name, default)


def _special(get: Callable[..., Any]) -> dict[str, Any]:
    names = ("id2label", "label2id", "problem_type", FLAG, RECORD)  # a corrected table stays marked as such
    kept = {name: copy.deepcopy(get(name)) for name in names if get(name) is not None}
    return kept | {name: get(name) for name in ("bos_token_id", "eos_token_id")}


def _refuse(get: Callable[..., Any], wanted: Mapping[str, Any]) -> None:
    for name, value in wanted.items():
        if get(name, value) not in (value, None):
            raise ValueError(f"the stack computes {name}={value!r} only; got {get(name)!r}")


def _act(name: Any) -> str:
    if name not in _BERT_ACTS:
        raise ValueError(f"the activation must be one of {', '.join(map(repr, _BERT_ACTS))}; got {name!r}")
    return _BERT_ACTS[name]


def _bert_config(config: Any) -> KexueConfig:
    get = _options(config)
    _refuse(get, {"position_embedding_type": "absolute", "is_decoder": False, "add_cross_attention": False})
    return KexueConfig(
        vocab_size=get("vocab_size"),
        hidden_size=get("hidden_size"),
        num_layers=get("num_hidden_layers"),
        num_heads=get("num_attention_heads"),
        max_position=get("max_position_embeddings"),
        mask_token_id=get("mask_token_id"),
        intermediate_size=get("intermediate_size"),
        act=_act(get("hidden_act", "gelu")),
        post_norm=True,
        type_vocab_size=get("type_vocab_size", 2),
        dropout=get("hidden_dropout_prob", 0.1),
        attention_dropout=get("attention_probs_dropout_prob", 0.1),
        norm_eps=get("layer_norm_eps", 1e-12),
        initializer_range=get("initializer_range", 0.02),
        # BERT itself never looks at its padding id: without a mask, all tokens take part.
        pad_token_id=None,
        **_special(get),
    )


def _gpt2_config(config: Any) -> KexueConfig:
    get = _options(config)
    _refuse(
        get,
        {
            "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False,
        },
    )  # fmt: skip
    return KexueConfig(
        vocab_size=get("vocab_size"),
        hidden_size=get("n_embd", get("hidden_size")),
        num_layers=get("n_layer", get("num_hidden_layers")),
        num_heads=get("n_head", get("num_attention_heads")),
        attn_mode="causal",
        max_position=get("n_positions", get("max_position_embeddings")),
        intermediate_size=get("n_inner"),
        act=_act(get("activation_function", "gelu_new")),
        dropout=get("resid_pdrop", 0.1),
        attention_dropout=get("attn_pdrop", 0.1),
        norm_eps=get("layer_norm_epsilon", 1e-5),
        initializer_range=get("initializer_range", 0.02),
        pad_token_id=None,
        **_special(get),
    )
