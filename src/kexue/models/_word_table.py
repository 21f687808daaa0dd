"""The table of word embeddings of a model, and the other places that hold its memory (tied decoders)."""

from __future__ import annotations

import copy
from contextlib import suppress
from typing import Any

from torch import Tensor, nn

__all__ = ["find_table", "own_config", "retie", "untie"]


def find_table(model: Any) -> nn.Parameter:
    """The weight (V, D) of the input embeddings.

    Raises:
        TypeError: No model with a configuration and input embeddings.
        ValueError: A table that cannot be rewritten here: on meta, sharded, computed, not floating, or read as input by
            more than one module.
    """
    kind = type(model).__name__
    if not isinstance(model, nn.Module) or not hasattr(model, "config") or not hasattr(model, "get_input_embeddings"):
        hint = "; pass its .module" if isinstance(getattr(model, "module", None), nn.Module) else ""
        raise TypeError(f"model must be a transformers or kexue model with a config; got {kind}{hint}")
    embedding: Any = None
    with suppress(NotImplementedError):
        embedding = model.get_input_embeddings()  # type: ignore[operator]
    if not isinstance(embedding, nn.Embedding):
        raise ValueError(f"{kind} must have word embeddings in an nn.Embedding; got {type(embedding).__name__}")
    weight = embedding._parameters.get("weight")
    if weight is None:
        raise ValueError(f"the word embeddings of {kind} must be a parameter; theirs are computed from others")
    if hasattr(weight, "placements"):
        raise ValueError(
            f"the word embeddings of {kind} must be whole in this process; got a sharded tensor (DTensor): correct the "
            "model before it is sharded"
        )
    if weight.is_meta:
        raise ValueError(
            f"the word embeddings of {kind} must have memory; got a table on the meta device: load the weights first"
        )
    if weight.shape != (embedding.num_embeddings, embedding.embedding_dim):
        raise ValueError(
            f"the word embeddings of {kind} must be whole, {(embedding.num_embeddings, embedding.embedding_dim)}; got "
            f"shape {tuple(weight.shape)} (a model that is sharded already?)"
        )
    if not weight.is_floating_point() or weight.element_size() < 2:
        dtypes = "float64, float32, bfloat16 or float16"
        raise ValueError(f"the word embeddings of {kind} must be {dtypes}; got {weight.dtype}")
    if _output(model) is embedding:
        raise ValueError(f"{kind} uses its input embeddings themselves as decoder; a decoder of its own can be untied")
    for module, _ in _holders(model, weight):
        if isinstance(module, nn.Embedding) and module is not embedding:
            raise ValueError(f"the word embeddings of {kind} must be read by one module; got several that share them")
    return weight


def _output(model: Any) -> Any:
    """The decoder over the vocabulary, or None."""
    return model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None


def _memory(x: Tensor) -> tuple[int, int]:
    """First address and the one past the last."""
    reach = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True)) + 1
    return x.data_ptr(), x.data_ptr() + (reach * x.element_size() if x.numel() else 0)


def _holders(model: nn.Module, weight: nn.Parameter) -> list[tuple[nn.Module, str]]:
    """Every (module, attribute) that holds memory of ``weight``, as this parameter or as another."""
    start, stop = _memory(weight)
    found = []
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is None or p.is_meta or hasattr(p, "placements") or p.device != weight.device:
                continue
            first, last = _memory(p)
            if first < stop and start < last:
                found.append((module, name))
    return found


def own_config(model: Any) -> Any:
    """Give the model a configuration of its own: another model may have been built from the same object."""
    old, new = model.config, copy.deepcopy(model.config)
    for module in model.modules():
        if module.__dict__.get("config") is old:
            module.config = new
    return new


def _mapping(model: Any) -> dict[str, str]:
    """Names of parameters that transformers ties because of ``tie_word_embeddings``: target -> source."""
    expanded = getattr(model, "get_expanded_tied_weights_keys", None)  # since version 5
    return {} if expanded is None else expanded(all_submodels=True)


def _place(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    parent, _, attribute = name.rpartition(".")
    return model.get_submodule(parent), attribute


def _refresh(model: Any) -> None:
    """Bring what transformers remembers of tied weights in line with the configuration."""
    for module in model.modules():
        if hasattr(module, "all_tied_weights_keys"):
            module.all_tied_weights_keys = _mapping(module)


def untie(model: Any, weight: nn.Parameter, config: Any) -> None:
    """Give every decoder that shares the table a copy, and say so in the configuration.

    With the table transformers unties the two biases of a BERT-like head, of which only the decoder's is read: it keeps
    its parameter, and the other becomes a copy that is not trained. Otherwise a saved model would lose one of them.
    """
    table, output, pairs = model.get_input_embeddings(), _output(model), _mapping(model)
    copies: dict[int, nn.Parameter] = {}
    for module, name in _holders(model, weight):
        if module is not table:
            p = getattr(module, name)
            if id(p) not in copies:
                copies[id(p)] = nn.Parameter(p.detach().clone(), requires_grad=p.requires_grad)
            setattr(module, name, copies[id(p)])
    for target, source in pairs.items():
        (module, name), (other, theirs) = _place(model, target), _place(model, source)
        p = getattr(module, name)
        if isinstance(p, nn.Parameter) and p is getattr(other, theirs):
            trained = p.requires_grad and module is not output
            setattr(other, theirs, nn.Parameter(p.detach().clone(), requires_grad=trained))
    config.tie_word_embeddings = False
    _refresh(model)


def retie(model: Any, weight: nn.Parameter, config: Any) -> None:
    """Undo :func:`untie`; the table and the decoders must hold the same values."""
    config.tie_word_embeddings = True
    for target, source in _mapping(model).items():
        (module, name), (other, theirs) = _place(model, target), _place(model, source)
        if getattr(other, theirs) is not weight:  # a bias: the decoder's is the one that was read, and trained
            setattr(other, theirs, getattr(module, name))
    _output(model).weight = weight
    model.tie_weights()
    _refresh(model)
