"""Run a model without a trace: what a forward pass changes is put back."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["as_found", "fixed_random_state", "tensors_in"]

_INTERNAL = frozenset(vars(nn.Module()))  # names that nn.Module itself keeps; training is one of them


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors of nested tuples, lists and mappings, in order."""
    if isinstance(value, Tensor):
        yield value
    elif hasattr(value, "values") and hasattr(value, "keys"):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from tensors_in(item)


class _Attributes:
    """Plain attributes of a module that a forward pass may change: numbers, tensors, lists, dicts and sets."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        found = {name: value for name, value in vars(module).items() if name not in _INTERNAL}
        self.names = set(found)
        self.tensors = {name: value for name, value in found.items() if isinstance(value, Tensor)}
        self.numbers = {name: value for name, value in found.items() if type(value) in (int, float)}
        self.holders = {name: value for name, value in found.items() if type(value) in (list, dict, set)}
        self.contents = [(value, value.copy()) for value in self.holders.values()]

    def lend(self, copies: dict[int, Tensor]) -> None:
        """Put copies in the place of tensors."""
        for name, value in self.tensors.items():
            vars(self.module)[name] = copies.setdefault(id(value), value.clone())

    def restore(self) -> None:
        """Put everything back; tensors that were not there before go."""
        held = vars(self.module)
        for name in [n for n, x in held.items() if isinstance(x, Tensor) and n not in self.names | _INTERNAL]:
            del held[name]
        held.update(self.tensors | self.numbers | self.holders)
        for value, content in self.contents:
            value.clear()
            if isinstance(value, list):
                value.extend(content)
            else:
                value.update(content)


def _rewritten(modules: list[nn.Module]) -> list[Tensor]:
    """Tables that the forward pass itself rewrites in place, and buffers that cannot be exchanged."""
    tables = [m for m in modules if isinstance(m, nn.Embedding | nn.EmbeddingBag) and m.max_norm is not None]
    scripted = [m for m in modules if isinstance(m, torch.jit.ScriptModule)]
    return [*(m.weight for m in tables), *(b for m in scripted for b in m.buffers(recurse=False))]


@contextlib.contextmanager
def as_found(model: nn.Module, training: bool | None = None) -> Iterator[None]:
    """Let every floating parameter require a gradient, switch checkpointing off; put all back at the end.

    Put back: training flags, ``requires_grad``, buffers and plain attributes (numbers, tensors, lists, dicts, sets),
    tables with ``max_norm``. Buffers are exchanged for copies meanwhile, so that the originals are not even written to.
    """
    modules = list(model.modules())
    flags = [(m, m.training) for m in modules]
    checkpointed = [m for m in modules if vars(m).get("gradient_checkpointing") is True]
    wanted = [p for p in model.parameters() if p.is_floating_point() and not p.requires_grad and not p.is_inference()]
    contents = [(w, w.detach().clone()) for w in _rewritten(modules)]
    copies: dict[int, Tensor] = {}  # a tensor that is registered twice stays one
    plain = [m for m in modules if not isinstance(m, torch.jit.ScriptModule)]
    buffers = [(m, dict(m._buffers)) for m in plain]
    attributes = [_Attributes(m) for m in plain]
    try:
        for attribute in attributes:
            attribute.lend(copies)
        for module, held in buffers:
            for name, buffer in held.items():
                if buffer is not None:
                    module._buffers[name] = copies.setdefault(id(buffer), buffer.clone())
        for module in checkpointed:
            setattr(module, "gradient_checkpointing", False)  # noqa: B010
        for p in wanted:
            p.requires_grad_(True)
        if training is not None:
            model.train(training)
        yield
    finally:
        for p in wanted:
            p.requires_grad_(False)
        for module in checkpointed:
            setattr(module, "gradient_checkpointing", True)  # noqa: B010
        for module, held in buffers:
            module._buffers.clear()
            module._buffers.update(held)
        for attribute in attributes:
            attribute.restore()
        for module, flag in flags:
            module.training = flag
        with torch.no_grad():
            for tensor, content in contents:
                tensor.copy_(content)


@contextlib.contextmanager
def fixed_random_state(seed: int, tensors: Iterable[Tensor]) -> Iterator[None]:
    """Draw from ``seed`` on the CPU and on the GPUs that hold the tensors; put all random states back at the end."""
    devices = sorted({t.device.index or 0 for t in tensors if t.device.type == "cuda"})
    plain, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002  (models draw layers to drop from it)
    with torch.random.fork_rng(devices=devices):
        torch.default_generator.manual_seed(seed)
        for index in devices:
            with torch.cuda.device(index):
                torch.cuda.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002
        try:
            yield
        finally:
            random.setstate(plain)
            np.random.set_state(numpy_state)  # noqa: NPY002
