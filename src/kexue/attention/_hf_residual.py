"""Residual attention scores (RealFormer) as transformers' attention function ``kexue_realformer``.

transformers calls the function for one layer at a time and passes the attention module, not the model. The running
scores of a forward pass live in a *stream*, which layer 0 starts and the following layers continue:

- streams are kept by weak reference to the attention module of layer 0, so each model has its own, and self- and
  cross-attention have different ones; they are local to the thread (DataParallel runs replicas in threads);
- the module of a later layer is tied to its stream when it is first seen: it continues the one stream that waits for
  this layer, with the same configuration object and the same kind of module;
- layers must come in order. Anything else (checkpointing of single layers, a layer called alone) is an error, never a
  wrong sum; layer 0 always starts afresh, also after a forward pass that an exception has cut short.

With cached keys a new query row is scored against all keys in every layer of its own forward pass, so decoding needs
nothing from earlier steps.
"""

from __future__ import annotations

import sys
import threading
import weakref
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from kexue._transformers import sdpa_mask as attention_mask
from kexue.attention.residual import ResidualScores

__all__ = ["attention_forward", "attention_mask", "forget"]

NAME = "kexue_realformer"
_CHECKPOINT = torch.utils.checkpoint.checkpoint.__code__.co_filename
_UNSUPPORTED = ("position_bias", "softcap", "s_aux", "head_mask")


@dataclass
class _Stream:
    """The running scores of one kind of attention of one model in one thread."""

    scores: ResidualScores = field(default_factory=ResidualScores)
    next: int = 0
    members: dict[int, weakref.ref[nn.Module]] = field(default_factory=dict)
    frame: FrameType | None = None  # of the checkpoint function that layer 0 ran in
    finished: bool = False


class _Local(threading.local):
    def __init__(self) -> None:
        self.streams: weakref.WeakKeyDictionary[nn.Module, _Stream] = weakref.WeakKeyDictionary()
        self.first: weakref.WeakKeyDictionary[nn.Module, weakref.ref[nn.Module]] = weakref.WeakKeyDictionary()


_local = _Local()
_traced: dict[tuple[Any, ...], ResidualScores] = {}


def _kind(module: nn.Module) -> tuple[Any, ...]:
    """What the modules of one stream have in common."""
    flags = tuple(getattr(module, name, None) for name in ("is_causal", "is_decoder", "is_cross_attention"))
    return (type(module), id(getattr(module, "config", None)), *flags)


def _checkpoint_frame() -> FrameType | None:
    """The innermost frame of torch's activation checkpointing that is running, if any."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename != _CHECKPOINT:
        frame = frame.f_back
    return frame


def _layer(module: nn.Module) -> int:
    layer = getattr(module, "layer_idx", None)
    if layer is None:
        raise ValueError(
            f"{NAME} cannot run in this model: its layers are not numbered ({type(module).__name__}.layer_idx is "
            "None), so that it cannot be told which layer is called and whose scores to add to"
        )
    return int(layer)


def _check_keys(module: nn.Module, layer: int, scores: ResidualScores, keys: int) -> None:
    """Raise if the layers before have another number of keys."""
    before = scores.keys
    if before is not None and keys != before:
        raise ValueError(
            f"{NAME} needs the same keys in all layers; layer {layer} ({type(module).__name__}) got {keys}, the layers "
            f"before {before}. The cache of a layer with a sliding window keeps fewer keys than that of a layer "
            "without: call such a model with use_cache=False"
        )


def _out_of_order(module: nn.Module, layer: int, expected: str) -> RuntimeError:
    return RuntimeError(
        f"{NAME} needs all layers of a forward pass in order, from layer 0: {type(module).__name__} of layer {layer} "
        f"was called, {expected} was expected. If gradient checkpointing recomputes single layers, their running sum "
        "of scores is gone: call model.gradient_checkpointing_disable()"
    )


def _stream(module: nn.Module, layer: int) -> _Stream:
    """The stream of this layer, after checking that the layer comes at its turn."""
    local = _local
    if layer == 0:
        stream = local.streams.get(module)
        if stream is None:
            stream = local.streams[module] = _Stream()
            stream.members[0] = weakref.ref(module)
        stream.scores.reset()
        stream.next, stream.finished, stream.frame = 0, False, _checkpoint_frame()
        return stream
    known = local.first.get(module)
    first = None if known is None else known()
    if first is not None and first in local.streams:
        stream = local.streams[first]
        if stream.next != layer:
            turn = f"layer {stream.next}" if not stream.finished else "layer 0 of a new forward pass"
            raise _out_of_order(module, layer, turn)
        return stream
    kind = _kind(module)
    waiting = []
    for start, stream in local.streams.items():
        member = stream.members.get(layer)
        if stream.next == layer and _kind(start) == kind and (member is None or member() is None):
            waiting.append((start, stream))
    if not waiting:
        raise _out_of_order(module, layer, "layer 0 of a new forward pass")
    if len(waiting) > 1:
        raise RuntimeError(
            f"{len(waiting)} models that share one configuration object are in the middle of a forward pass, and layer "
            f"{layer} of {type(module).__name__} could belong to any: run each model once by itself first"
        )
    start, stream = waiting[0]
    stream.members[layer] = weakref.ref(module)
    local.first[module] = weakref.ref(start)
    return stream


def _is_last(module: nn.Module, layer: int) -> bool:
    """Whether no layer follows; False where the configuration leaves it open."""
    config = getattr(module, "config", None)
    layers = getattr(config, "num_hidden_layers", None)
    # A decoder may be deeper than the encoder that num_hidden_layers counts.
    return isinstance(layers, int) and layer == layers - 1 and not getattr(config, "is_encoder_decoder", False)


def forget(model: nn.Module) -> None:
    """Drop the running scores of a model in this thread."""
    for module in model.modules():
        _local.streams.pop(module, None)
        _local.first.pop(module, None)


def _attend_traced(module: nn.Module, layer: int, *args: Any) -> Tensor:
    """While torch.compile traces: streams by kind of module; the layers of a model are traced one after another."""
    kind = _kind(module)
    if layer == 0:
        _traced[kind] = ResidualScores()
    scores = _traced.get(kind)
    if scores is None or len(scores) != layer:
        raise _out_of_order(module, layer, "layer 0" if scores is None else f"layer {len(scores)}")
    _check_keys(module, layer, scores, args[1].shape[2])
    out = scores.attend(*args)
    if _is_last(module, layer):
        del _traced[kind]
    return out


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
    """The attention function: softmax over the scores summed over the layers so far.

    Args:
        module: The attention module; its ``layer_idx`` says which layer it is.
        query: (B, H, T, D).
        key: (B, H / groups, S, D), cached keys included.
        value: (B, H / groups, S, E).
        attention_mask: (B, 1 or H, T, S) bool, True = takes part; None: all, or causal.
        dropout: Share of the probabilities that are dropped.
        scaling: Factor on q·k; None is 1/sqrt(D).
        is_causal: Overrides ``module.is_causal``; only looked at without a mask.
        **kwargs: Other options of transformers; those that change the scores are refused.

    Returns:
        (B, T, H, E), and None instead of the attention weights.

    Raises:
        TypeError: The mask is not bool.
        ValueError: An option that changes the scores, a module without ``layer_idx``, or another number of keys than
            in the layers before.
        RuntimeError: Layers out of order, or activation checkpointing of single layers.
    """
    for name in _UNSUPPORTED:
        if kwargs.get(name) is not None:
            raise ValueError(f"{NAME} does not support {name} of {type(module).__name__}")
    if attention_mask is not None and attention_mask.dtype != torch.bool:
        raise TypeError(f"{NAME} needs a bool attention mask (True = takes part); got {attention_mask.dtype}")
    batch, heads, rows, width = query.shape
    causal = bool(getattr(module, "is_causal", False) if is_causal is None else is_causal)
    causal = causal and rows > 1 and attention_mask is None
    if causal and key.shape[2] > rows:  # a static cache before its first token: the other keys are not there yet
        key, value = key[:, :, :rows], value[:, :, :rows]
    if key.shape[1] != heads:
        groups = heads // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    keep = None if attention_mask is None else attention_mask.expand(batch, -1, -1, -1)
    layer = _layer(module)
    # Windowed and full layers may alternate: then the scores of keys that this layer hides are needed, too.
    whole = not causal or len(set(getattr(getattr(module, "config", None), "layer_types", None) or ())) > 1
    factor = width**-0.5 if scaling is None else float(scaling)
    args = (query, key, value, keep, causal, factor, float(dropout), whole)
    if torch.compiler.is_compiling():
        return _attend_traced(module, layer, *args).transpose(1, 2).contiguous(), None
    stream = _stream(module, layer)
    if _checkpoint_frame() is not stream.frame:
        stream.scores.reset()
        stream.frame = None
        raise RuntimeError(
            f"{NAME} cannot work with activation checkpointing of single layers: layer {layer} would be computed again "
            "with a finished sum of scores. Call model.gradient_checkpointing_disable(), or checkpoint the whole model"
        )
    _check_keys(module, layer, stream.scores, key.shape[2])
    out = stream.scores.attend(*args)
    stream.next = layer + 1
    if _is_last(module, layer):
        stream.scores.reset()  # what the backward pass needs stays with its graph
        stream.finished, stream.frame = True, None
    return out.transpose(1, 2).contiguous(), None
