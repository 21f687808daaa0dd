"""The weights of a causal language model as the decoder wants them: by name, unchanged, or with int8 matrices."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kexue.generation._decode_kernel import ACTIVATIONS, LAYER_FIELDS, MODEL_FIELDS
from kexue.models import KexueForCausalLM

__all__ = ["Weights", "quantize_rows", "read_weights"]

Named = dict[str, Tensor | None]
_MATRICES = ("qkv", "out", "up", "gate", "down")


@dataclass
class Weights:
    """What a decoding step computes with.

    Args:
        config: The model's KexueConfig.
        layers: For each layer the tensors named in LAYER_FIELDS.
        model: The tensors named in MODEL_FIELDS.
        int8: The matrices are int8 and have scales.
    """

    config: Any
    layers: list[Named]
    model: Named
    int8: bool

    @property
    def table(self) -> Tensor:
        """(V, D) token embeddings."""
        table = self.model["token"]
        if table is None:
            raise RuntimeError("a model without token embeddings was read")
        return table

    def on_kernel(self) -> bool:
        """Whether all weights are where the kernel can take them: float32 (or int8) in the memory of this machine."""
        every = [x for named in (*self.layers, self.model) for x in named.values() if x is not None]
        return all(x.device.type == "cpu" and x.dtype in (torch.float32, torch.int8) for x in every)


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round each row of a matrix to 255 levels, symmetric about 0.

    Args:
        weight: (M, K).

    Returns:
        (M, K) int8 and (M,) scales: the row is scale times the integers, off by at most half a scale.

    Raises:
        ValueError: A weight that is not finite.

    Example:
        >>> integers, scale = quantize_rows(torch.tensor([[1.0, -2.0, 0.51]]))
        >>> integers.tolist(), round(scale.item() * 127, 4)
        ([[64, -127, 32]], 2.0)
    """
    x = weight.detach().to(torch.float32)
    largest = x.abs().amax(1)
    if not bool(largest.isfinite().all()):
        raise ValueError("weights to be quantized must be finite; got NaN or infinity")
    scale = torch.where(largest > 0, largest / 127, 1.0)
    return (x / scale[:, None]).round_().clamp_(-127, 127).to(torch.int8), scale


def read_weights(model: KexueForCausalLM, int8: bool) -> Weights:
    """The weights as they are now; int8 ones are kept until the model's change."""
    plain = _read(model)
    if not int8:
        return plain
    mark = _fingerprint(model)
    kept = _quantized.get(model)
    if kept is None or kept[0] != mark:
        kept = (mark, _quantize(plain))
        _quantized[model] = kept
    return kept[1]


_quantized: weakref.WeakKeyDictionary[nn.Module, tuple[Any, Weights]] = weakref.WeakKeyDictionary()


def _fingerprint(model: nn.Module) -> Any:
    """Changes when a weight does: not everything that writes raises the version number, so sums count as well."""
    return [(p.data_ptr(), p._version, p.dtype, _sum(p.detach())) for p in model.parameters()]


def _sum(x: Tensor) -> float:
    if x.device.type == "cpu" and x.dtype == torch.float32 and x.is_contiguous():
        return float(x.numpy().sum())  # a tenth of the time of torch's
    return float(x.sum(dtype=torch.float64))


def _quantize(plain: Weights) -> Weights:
    layers = []
    for named in plain.layers:
        named = dict(named)
        for name in _MATRICES:
            _quantize_one(named, name)
        layers.append(named)
    model = dict(plain.model)
    _quantize_one(model, "head")
    return Weights(plain.config, layers, model, True)


def _quantize_one(named: Named, name: str) -> None:
    matrix = named[name]
    if matrix is not None:
        named[name], named[f"{name}_scale"] = quantize_rows(matrix)


def _read(model: KexueForCausalLM) -> Weights:
    config, stack = model.config, model.kexue
    if config.act not in ACTIVATIONS:
        raise ValueError(f"act must be one of {', '.join(map(repr, ACTIVATIONS))}; got {config.act!r}")
    layers = []
    every: Any = stack.layers
    for layer in every:
        attention, feed = layer.attention, layer.feed_forward
        parts = {
            "norm1": layer.attention_norm, "qkv": attention.qkv, "out": attention.out,
            "norm2": layer.feed_forward_norm, "up": feed.up, "gate": feed.gate, "down": feed.down,
        }  # fmt: skip
        layers.append(_named(parts, LAYER_FIELDS))
    embeddings = stack.embeddings
    parts = {
        "token": embeddings.token, "position": embeddings.position, "embedding_norm": embeddings.norm,
        "final_norm": stack.final_norm, "head": model.lm_head.decoder,
    }  # fmt: skip
    named = _named(parts, MODEL_FIELDS)
    if embeddings.segment is not None:
        named["segment"] = embeddings.segment.weight.detach()[0].contiguous()
    return Weights(config, layers, named, False)


def _named(parts: dict[str, Any], fields: tuple[str, ...]) -> Named:
    named: Named = dict.fromkeys(fields)
    for name, module in parts.items():
        if module is None:
            continue
        named[name] = module.weight.detach().contiguous()
        bias = getattr(module, "bias", None)
        if bias is not None:
            named[f"{name}_bias"] = bias.detach().contiguous()
    return named
