"""How the gradient of a batch comes about: in one process, or with several by DDP or FSDP (分布式数据并行).

A strategy turns a batch into a loss whose backward pass leaves the gradient in ``p.grad``. With several processes it
also sums: after the last batch of a step each rank has the gradient of the sum of all ranks' losses, divided by the
number of ranks (both torch classes divide), whatever their numbers of predicted items; the loop then divides by the
global number of items. The mean of the ranks' means would be another thing when they differ.

A rank that has nothing to predict, or that failed, still takes part in the reduction of its last batch: DDP gets an
undefined gradient from it (:class:`_Idle`), which neither NaN nor an exception can spoil.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from kexue.training.blocks import blocks
from kexue.training.processes import Processes

STRATEGIES = ("ddp", "fsdp")

LossReader = Callable[[Any, Mapping[str, Any]], tuple[torch.Tensor, float]]


class OneProcess:
    """The model as it is.

    Args:
        model: The module that is trained.
        read_loss: Takes loss and number of items out of what the model returns.
        processes: The processes of the run.
    """

    divides = 1  # by what a gradient is divided when it is summed over the processes
    can_idle = False  # whether a rank can take part in a reduction without having computed a loss

    def __init__(self, model: nn.Module, read_loss: LossReader, processes: Processes) -> None:
        self.model = model
        self.read_loss = read_loss
        self.processes = processes

    def loss(self, batch: Mapping[str, Any]) -> tuple[torch.Tensor, float]:
        """Loss and number of items of one batch."""
        return self.read_loss(self.model(**batch), batch)

    def stepped(self) -> None:
        """Called when the weights have changed."""


class Distributed(OneProcess):
    """With several processes; see the head of this module."""

    def __init__(self, model: nn.Module, read_loss: LossReader, processes: Processes) -> None:
        super().__init__(model, read_loss, processes)
        self.divides = processes.world
        # Persistent buffers (running statistics) are those of rank 0, sent after the step: inside forward, as DDP does
        # it, the broadcast would wait for a rank that has failed.
        stored = model.state_dict()
        self.buffers = [b for name, b in model.named_buffers() if name in stored]

    def reduction(self, last: bool) -> AbstractContextManager[Any]:
        """Context of forward and backward of one batch; the gradients are summed over the ranks on the last one."""
        raise NotImplementedError

    def fetched(self, error: Exception | None, step: int) -> None:
        """Called between fetching a batch and using it, with what went wrong."""

    def idle(self) -> torch.Tensor:
        """What a rank without a loss calls ``backward`` on, so that the others do not wait; needs ``can_idle``."""
        raise NotImplementedError

    def stepped(self) -> None:
        """Send the buffers of rank 0."""
        for buffer in self.buffers:
            self.processes.broadcast_(buffer)


class _Idle(torch.autograd.Function):
    """A zero that hangs on a parameter and has an undefined gradient: the hooks of DDP run, nothing is added."""

    @staticmethod
    def forward(ctx: Any, anchor: torch.Tensor) -> torch.Tensor:
        return anchor.new_zeros(())

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> None:
        return None


class _Loss(nn.Module):
    """The model as DDP sees it: only the loss comes out, so that no other output counts as used."""

    def __init__(self, model: nn.Module, read_loss: LossReader) -> None:
        super().__init__()
        self.model = model
        self.read_loss = read_loss

    def forward(self, batch: Mapping[str, Any] | None) -> tuple[torch.Tensor, float]:
        if batch is not None:
            loss, items = self.read_loss(self.model(**batch), batch)
            if items:
                return loss, items
        return _Idle.apply(next(p for p in self.model.parameters() if p.requires_grad)), 0.0


class DDP(Distributed):
    """Every rank has the whole model; gradients are reduced while the backward pass runs."""

    can_idle = True

    def __init__(self, model: nn.Module, read_loss: LossReader, processes: Processes) -> None:
        super().__init__(model, read_loss, processes)
        known = inspect.signature(nn.parallel.DistributedDataParallel).parameters
        name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
        quiet: dict[str, Any] = {name: False}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning)
            self.ddp = nn.parallel.DistributedDataParallel(
                _Loss(model, read_loss),
                gradient_as_bucket_view=True,
                find_unused_parameters=True,  # a frozen or idle part of a model is no mistake in one process either
                **quiet,
            )

    def reduction(self, last: bool) -> AbstractContextManager[Any]:
        """Gradients stay here until the last batch."""
        return nullcontext() if last else self.ddp.no_sync()

    def loss(self, batch: Mapping[str, Any]) -> tuple[torch.Tensor, float]:
        """Loss and number of items of one batch."""
        return self.ddp(batch)

    def idle(self) -> torch.Tensor:
        """A zero that sends what this rank has gathered before."""
        return self.ddp(None)[0]


class FSDP(Distributed):
    """Every rank has a part of each parameter; a block is put together when it is needed (FSDP2)."""

    def reduction(self, last: bool) -> AbstractContextManager[Any]:
        """Gradients stay here, whole, until the last batch."""
        self.model.set_requires_gradient_sync(last)  # type: ignore[operator]
        return nullcontext()

    def fetched(self, error: Exception | None, step: int) -> None:
        """Here the forward pass already waits for all ranks. What fails in it ends the process, and so the wait."""
        self.processes.agree(error, f"in step {step + 1}, before its forward pass")


def shard_(model: nn.Module, processes: Processes, device: torch.device, low: torch.dtype | None) -> None:
    """Cut the parameters of ``model`` into parts, in place: ``fully_shard`` on each block and on the rest.

    Args:
        model: The model, whole and on its device; one that is sharded already stays as it is.
        processes: The ranks; the weights are those of rank 0.
        device: Device of the model.
        low: Type in which parameters are sent and used, None for their own. Gradients are summed in float32.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

    if isinstance(model, FSDPModule):
        return
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            processes.broadcast_(tensor)
    mesh = init_device_mesh(device.type, (processes.world,))
    options: dict[str, Any] = {"mesh": mesh}
    if low is not None:
        # Inputs stay as they are: autocast, which is on as well, casts what may be cast, targets not among it.
        options["mp_policy"] = MixedPrecisionPolicy(
            param_dtype=low, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
    for block in blocks(model):
        fully_shard(block, **options)
    fully_shard(model, **options)


def is_spread(tensor: Any) -> bool:
    """Whether each rank has a part of the tensor only (a DTensor)."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Any) -> torch.Tensor:
    """The tensor, put together if it is spread over the ranks; then all of them have to ask for it."""
    return tensor.full_tensor() if is_spread(tensor) else tensor


def spread_like(tensor: torch.Tensor, pattern: Any) -> torch.Tensor:
    """A whole tensor spread as ``pattern`` is; all ranks have to call it."""
    if not is_spread(pattern) or tensor.shape != pattern.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = pattern.device_mesh, pattern.placements
    return distribute_tensor(tensor.to(pattern.device), mesh, placements)


def class_name(model: nn.Module) -> str:
    """Name of the model's class; sharding gives it one of its own."""
    name = type(model).__name__
    return name.removeprefix("FSDP") if any(c.__name__ == "FSDPModule" for c in type(model).__mro__) else name


def strategy_of(name: str, model: nn.Module, read_loss: LossReader, processes: Processes) -> OneProcess:
    """The strategy of a run; with one process there is nothing to distribute."""
    if processes.world == 1:
        return OneProcess(model, read_loss, processes)
    return (FSDP if name == "fsdp" else DDP)(model, read_loss, processes)
