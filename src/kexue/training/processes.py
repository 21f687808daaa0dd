"""The processes of one run (分布式训练): who takes part, and what they tell each other.

Under ``torchrun`` every process calls ``fit`` with the same arguments. The environment says how many there are; the
process group is made here, unless the caller has made one, and stays until the process ends. Rank 0 alone touches the
disk, so that no shared file system is needed. What fails on one rank has to be known on all of them, or the others
would wait in the next collective for ever: hence :meth:`Processes.first` and :meth:`Processes.agree`.
"""

from __future__ import annotations

import atexit
import gc
import os
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")

_ENVIRONMENT = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class Processes:
    """One of ``world`` processes; with one process every method is the plain call.

    Args:
        rank: This process.
        world: How many there are.
        device: Where the tensors live that are exchanged.
    """

    def __init__(self, rank: int = 0, world: int = 1, device: torch.device | None = None) -> None:
        self.rank = rank
        self.world = world
        self.device = torch.device("cpu") if device is None else device

    def totals(self, *numbers: float) -> list[float]:
        """The numbers, each summed over all processes in float64."""
        if self.world == 1:
            return list(numbers)
        kind = torch.float32 if self.device.type == "mps" else torch.float64
        summed = torch.tensor(numbers, dtype=kind, device=self.device)
        dist.all_reduce(summed)
        return summed.tolist()

    def share(self, value: T) -> T:
        """Rank 0's value, on every rank."""
        if self.world == 1:
            return value
        box = [value if self.rank == 0 else None]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]  # type: ignore[return-value]

    def gather(self, value: T) -> list[T]:
        """The values of all ranks, on every rank."""
        if self.world == 1:
            return [value]
        box: list[Any] = [None] * self.world
        dist.all_gather_object(box, value)
        return box

    def broadcast_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Overwrite ``tensor`` with rank 0's."""
        if self.world > 1 and tensor.numel():
            moved = tensor.to(self.device).contiguous()  # itself where nothing has to be done
            dist.broadcast(moved.view(-1).view(torch.uint8), src=0)  # bytes: gloo does not know every dtype
            if moved is not tensor:
                tensor.copy_(moved)
        return tensor

    def first(self, function: Callable[[], T]) -> T:
        """Run ``function`` on rank 0; every rank gets its value, or raises what it raised.

        The value and the exception travel as pickles: keep them small.
        """
        if self.world == 1:
            return function()
        value: Any = None
        error: Exception | None = None
        if self.rank == 0:
            try:
                value = function()
            except Exception as caught:
                error = caught
        value, shared = self.share((value, _portable(error)))
        if error is not None:
            raise error
        if shared is not None:
            raise shared
        return value

    def agree(self, error: Exception | None, doing: str, failed: bool | None = None) -> None:
        """Raise on every rank if one of them has an error: its own there, a RuntimeError that names it elsewhere.

        Args:
            error: What went wrong here.
            doing: What was being done, for the message.
            failed: Whether any rank has an error, when that is known already.
        """
        if self.world > 1:
            if failed is None:
                failed = self.totals(error is not None)[0] > 0
            if failed:
                told = self.gather(None if error is None else f"{type(error).__name__}: {error}")
                if error is None:
                    rank, text = next((rank, text) for rank, text in enumerate(told) if text is not None)
                    raise RuntimeError(f"rank {rank} failed {doing}: {text}")
        if error is not None:
            raise error


def _portable(error: Exception | None) -> Exception | None:
    """The exception without its traceback, as one that survives pickling."""
    if error is None:
        return None
    try:
        copy = pickle.loads(pickle.dumps(error))
    except Exception:
        copy = None
    return copy if type(copy) is type(error) else RuntimeError(f"rank 0: {type(error).__name__}: {error}")


@contextmanager
def joined(device: torch.device) -> Iterator[Processes]:
    """The processes of this run: those of the caller's process group, else those of torchrun, else this one alone.

    Args:
        device: Device of the model; it decides the backend (gloo, and for CUDA also nccl).

    Raises:
        ValueError: The environment of torchrun is incomplete or says something impossible.
    """
    if not dist.is_available():
        yield Processes()
        return
    made = not dist.is_initialized()
    if made:
        if _world_of_environment() == 1:
            yield Processes()
            return
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
        # It stays for the next run: a rank that is early would find the old rendezvous still open.
        atexit.register(_leave)
    # Counts and messages go through the host where a backend for it exists: no wait for the accelerator.
    host = made or "cpu" in str(dist.get_backend_config())
    try:
        yield Processes(dist.get_rank(), dist.get_world_size(), torch.device("cpu") if host else device)
    except Exception:
        atexit.unregister(_leave)  # the others may be inside a collective, and leaving could wait for them
        raise


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
        gc.collect()  # a group that a cycle keeps alive would end with its threads running, which aborts the process


def _world_of_environment() -> int:
    """How many processes torchrun has started; 1 without torchrun."""
    given = {name: os.environ.get(name) for name in _ENVIRONMENT}
    if given["WORLD_SIZE"] is None or given["RANK"] is None:
        return 1
    try:
        rank, world = int(given["RANK"]), int(given["WORLD_SIZE"])
    except ValueError:
        rank, world = -1, -1
    if not 0 <= rank < world:
        raise ValueError(
            f"RANK and WORLD_SIZE must be integers with 0 <= RANK < WORLD_SIZE; got {given['RANK']!r} and "
            f"{given['WORLD_SIZE']!r} in the environment"
        )
    missing = [name for name in _ENVIRONMENT if given[name] is None]
    if world > 1 and missing:
        raise ValueError(
            f"WORLD_SIZE is {world}, but {' and '.join(missing)} is not set; start the processes with torchrun, or "
            "unset RANK and WORLD_SIZE"
        )
    return world
