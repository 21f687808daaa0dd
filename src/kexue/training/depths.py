"""How deep in a model each parameter sits, found from the model's structure alone.

The layers of a Transformer are the entries of a numbered list (``encoder.layer.0``, ``h.0``, ``model.layers.0``). So
the lists whose entries are modules with parts of their own are looked for, not the names of architectures:

    0          embeddings, and what else stands before the layers
    1 ... L    the layers; the pooler and the norm that follows the last layer count as layer L
    L + 1      the head: what stands after the layers. L + 1 also if a model has no head

- What is nested in a layer belongs to it (sub-layers, experts). Layers that share their weights are one layer (ALBERT).
- Lists beside each other in one module are consecutive (``layer1`` to ``layer4`` of a ResNet). Lists in different
  modules (encoder and decoder, text and image) are parallel and end at the same depth L.
- Recurrent networks have their stacked layers; plain chains (``nn.Sequential`` of ``Linear``, or a module with a few
  children) have one layer for each entry with weights, norms counting with the entry before, and end with the head.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from kexue.models._norms import is_norm

__all__ = ["LayerDepths", "layer_depths"]

EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
# Names that decide where order alone would mislead; they are compared with one part of a dotted name.
_HEAD = re.compile(
    r"(.+_)?(heads?|classifiers?|cls|score|predictions?|qa_outputs|logit_scale|logit_bias)|pre_classifier|embed_out"
)
_STEM = re.compile(r"stem|feature_(extractor|projection)")
_EMBEDDING = re.compile(
    r"(.+_)?embed(s|ding|dings|_tokens|_positions)?|wte|wpe|(cls|mask|dist|distillation|register)_tokens?"
)


@dataclass(frozen=True)
class LayerDepths:
    """What :func:`layer_depths` returns.

    Args:
        depth: Depth of each parameter by name, as in ``model.named_parameters()``.
        head: Depth of the head, the number of layers plus one.

    Example:
        >>> LayerDepths({"0.weight": 0, "1.weight": 2}, head=2).head
        2
    """

    depth: dict[str, int]
    head: int


@dataclass(frozen=True)
class _Stack:
    """A list of layers."""

    parent: tuple[str, ...]  # path of the module that the list belongs to
    layers: list[list[str]]  # names of the parameters of each layer
    chain: bool = False  # of plain entries such as Linear


def parameter_names(model: nn.Module) -> dict[str, list[str]]:
    """First name of each parameter -> all of its names (tied tensors have several), in order."""
    first: dict[int, str] = {}
    names: dict[str, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        names.setdefault(first.setdefault(id(p), name), []).append(name)
    return names


def owner(name: str) -> str:
    """Name of the module that a parameter belongs to, also when torch's parametrizations hold it."""
    parts = name.split(".")
    return ".".join(parts[: parts.index("parametrizations")] if "parametrizations" in parts else parts[:-1])


def _named(module: nn.Module, path: tuple[str, ...]) -> list[str]:
    return [name for name, _ in module.named_parameters(prefix=".".join(path), remove_duplicate=False)]


def _entries(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """Children that hold parameters; one that is listed twice counts once."""
    return [(name, child) for name, child in module.named_children() if any(True for _ in child.parameters())]


def _composite(module: nn.Module) -> bool:
    return any(module.children()) or isinstance(module, nn.RNNBase)


def _recurrent(module: nn.RNNBase, path: tuple[str, ...]) -> _Stack:
    layers: list[list[str]] = [[] for _ in range(module.num_layers)]
    for name in _named(module, path):
        number = re.search(r"_l(\d+)(_reverse)?\b", name[len(".".join(path)) :])
        layers[int(number[1]) if number else 0].append(name)
    return _Stack(path[:-1], [layer for layer in layers if layer])


def _chain(entries: list[tuple[str, nn.Module]], path: tuple[str, ...]) -> _Stack:
    """One layer for each entry that is neither an embedding (it stands before) nor a norm (part of the one before)."""
    layers: list[list[str]] = []
    for name, child in entries:
        if isinstance(child, EMBEDDINGS):
            continue
        if not (is_norm(child) and layers):
            layers.append([])
        layers[-1] += _named(child, (*path, name))
    return _Stack(path[:-1], layers, chain=True)


def _stacks(module: nn.Module, path: tuple[str, ...] = ()) -> Iterator[_Stack]:
    """The outermost lists of layers."""
    entries = _entries(module)
    if isinstance(module, nn.RNNBase):
        yield _recurrent(module, path)
    elif not isinstance(module, nn.ModuleList | nn.Sequential):
        for name, child in entries:
            yield from _stacks(child, (*path, name))
    elif isinstance(module, nn.ModuleList) and any(_composite(child) for _, child in entries):
        yield _Stack(path[:-1], [_named(child, (*path, name)) for name, child in entries])
    else:
        # A Sequential may also hold what stands before and after its layers: those are of a kind that occurs twice.
        kinds = Counter(type(child) for _, child in entries if _composite(child))
        repeated = [place for place, (_, child) in enumerate(entries) if kinds[type(child)] > 1]
        inner = [stack for name, child in entries for stack in _stacks(child, (*path, name)) if not stack.chain]
        if repeated:
            body: list[list[str]] = []
            for name, child in entries[repeated[0] : repeated[-1] + 1]:
                if _composite(child):
                    body.append([])
                body[-1] += _named(child, (*path, name))
            yield _Stack(path[:-1], body)
        elif inner:
            yield from inner
        elif entries:
            yield _chain(entries, path)


def _fallback(model: nn.Module) -> list[_Stack]:
    """No list at all: the children of the first module that has several."""
    path: tuple[str, ...] = ()
    while len(entries := _entries(model)) == 1:
        path, model = (*path, entries[0][0]), entries[0][1]
    return [_chain(entries, path)]


def _common(a: Sequence[str], b: Sequence[str]) -> int:
    """How many parts two dotted names have in common at their beginning."""
    return next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _off_body(stack: _Stack, stacks: list[_Stack]) -> bool:
    """Whether a list belongs to a head or a stem, by the names below what all lists have in common."""
    paths = [s.layers[0][0].split(".") for s in stacks]
    first = stack.layers[0][0].split(".")
    own = first[min(_common(first, path) for path in paths) :]
    return any(_HEAD.fullmatch(part) or _STEM.fullmatch(part) for part in own)


def _chosen(model: nn.Module) -> list[_Stack]:
    """The lists that count, those beside each other joined."""
    found = [stack for stack in _stacks(model) if stack.layers]
    found = [stack for stack in found if not stack.chain] or found
    found = [stack for stack in found if not _off_body(stack, found)] or found or _fallback(model)
    joined: dict[tuple[str, ...], _Stack] = {}
    for stack in found:
        joined.setdefault(stack.parent, _Stack(stack.parent, [], stack.chain)).layers.extend(stack.layers)
    sizes = {name: p.numel() for name, p in model.named_parameters(remove_duplicate=False)}
    weights = [sum(sizes[name] for layer in stack.layers for name in layer) for stack in joined.values()]
    # A small list beside a large one, such as a projector of two blocks, is no second tower.
    return [s for s, weight in zip(joined.values(), weights, strict=True) if s.layers and weight >= max(weights) / 10]


def layer_depths(model: nn.Module) -> LayerDepths:
    """Depth of each parameter: 0 for embeddings, then the layers, then the head.

    See the head of this module for the rules. A tensor with several names (an embedding that is also the output layer)
    has the lowest depth of its names.

    Args:
        model: Any module; the structure decides, weights are not read.

    Returns:
        The depths of all parameters, frozen ones included, and the depth of the head.

    Raises:
        TypeError: ``model`` is not a Module.

    Example:
        >>> layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        >>> model = nn.ModuleDict(
        ...     {"embed": nn.Embedding(9, 8), "encoder": nn.TransformerEncoder(layer, 3), "out": nn.Linear(8, 2)}
        ... )
        >>> found = layer_depths(model)
        >>> found.head, found.depth["embed.weight"], found.depth["encoder.layers.0.norm1.bias"], found.depth["out.bias"]
        (4, 0, 1, 4)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module; got {type(model).__name__}")
    stacks = _chosen(model)
    names = parameter_names(model)
    order = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    if not stacks:
        return LayerDepths(dict.fromkeys(names, 1), 1)
    layers = max(len(stack.layers) for stack in stacks)
    depth: dict[str, int] = {}
    for stack in stacks:  # all of them end at the same depth
        for number, layer in enumerate(stack.layers, layers - len(stack.layers) + 1):
            depth.update(dict.fromkeys(layer, number))
    head = layers + 1
    rest = _outside(model, stacks, order, head)
    depth |= rest
    if all(stack.chain for stack in stacks) and head not in rest.values():
        head = layers  # a chain ends with the head
    return LayerDepths({first: min(depth[name] for name in every) for first, every in names.items()}, head)


def _outside(model: nn.Module, stacks: list[_Stack], order: list[str], head: int) -> dict[str, int]:
    """Depths of the parameters that are in no list."""
    kinds = dict(model.named_modules(remove_duplicate=False))
    place = {name: number for number, name in enumerate(order)}
    inside = {name for stack in stacks for layer in stack.layers for name in layer}
    starts = [min(place[name] for name in stack.layers[0]) for stack in stacks]
    paths = [stack.layers[0][0].split(".") for stack in stacks]
    head_began = [False] * len(stacks)  # behind which lists
    found: dict[str, int] = {}
    for name in order:
        if name in inside:
            continue
        parts = name.split(".")
        common = [_common(parts, path) for path in paths]
        near = [n for n in range(len(stacks)) if common[n] == max(common)]
        own = parts[max(common) :]
        module = kinds[owner(name)]
        after = place[name] > min(starts[n] for n in near)
        ends = own[0].startswith("final_") or (after and not any(head_began[n] for n in near))
        if "pooler" in own:
            found[name] = head - 1
        elif any(_HEAD.fullmatch(part) for part in own):
            found[name] = head
        elif isinstance(module, EMBEDDINGS) or any(_EMBEDDING.fullmatch(part) for part in own):
            found[name] = 0
        elif ends and is_norm(module) and owner(name).count(".") == max(common):
            found[name] = head - 1  # the norm that ends the stack
        else:
            found[name] = head if after else 0
        if found[name] == head and after:
            for n in near:
                head_began[n] = True
    return found
