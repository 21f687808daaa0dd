"""The blocks of a model (its repeated layers): what FSDP shards and torch.compile compiles, one at a time."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from torch import nn

from kexue.training.depths import _chosen

FEW_STEPS = 200  # below this, compiling takes longer than it saves


def blocks(model: nn.Module) -> list[nn.Module]:
    """The layers of a model, found from its structure as in :func:`kexue.training.layer_depths`; each one once.

    A block whose parameters are also used outside of it is left out. A chain of plain layers has no blocks.
    """
    found: dict[int, nn.Module] = {}
    for stack in _chosen(model):
        if stack.chain:
            continue
        for layer in stack.layers:
            paths = [name.split(".")[:-1] for name in layer]
            length = min(map(len, paths))
            same = next((n for n in range(length) if len({path[n] for path in paths}) > 1), length)
            # The list itself is one level below the module that it belongs to, its entries are two below.
            block = model.get_submodule(".".join(paths[0][: min(same, len(stack.parent) + 2)]))
            if block is not model:
                found[id(block)] = block
    owners: dict[int, set[int]] = {}
    inside = {id(part): key for key, block in found.items() for part in block.modules()}
    for module in model.modules():
        for p in module.parameters(recurse=False):
            owners.setdefault(id(p), set()).add(inside.get(id(module), 0))
    return [b for b in found.values() if all(len(owners[id(p)]) == 1 for p in b.parameters())]


class Compiled:
    """Blocks under ``torch.compile``, with the way back.

    Args:
        model: The model; its blocks are compiled in place, or itself when it has none.
        steps: Steps that are to be run.
    """

    def __init__(self, model: nn.Module, steps: int) -> None:
        if steps < FEW_STEPS:
            warnings.warn(
                f"compile=True for a run of {steps} steps: compiling usually takes longer than it saves below about "
                f"{FEW_STEPS}; leave it out",
                stacklevel=4,
            )
        self._modules: Sequence[nn.Module] = blocks(model) or [model]
        for module in self._modules:
            module.compile(dynamic=False)

    def undo(self) -> None:
        """Run eagerly again."""
        for module in self._modules:
            module._compiled_call_impl = None
        self._modules = ()

    def gave_up(self, error: BaseException) -> bool:
        """Whether ``error`` is a failure of the compiler, so that the work can be done again without it."""
        from torch._dynamo.exc import TorchDynamoException

        if not self._modules or not isinstance(error, TorchDynamoException):
            return False
        reason = " ".join(str(error).split())[:300]
        warnings.warn(
            f"torch.compile failed, training goes on without it; it needs a C++ compiler, on a GPU Triton: {reason}",
            stacklevel=4,
        )
        self.undo()
        return True
