"""Losses over several processes: who brings how many rows, gathering them, and what a class-sharded head holds."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class Ranks:
    """The processes of a group and the rows each brings.

    Args:
        group: A torch.distributed process group.
    """

    def __init__(self, group: Any) -> None:
        self.group = group
        self.size = dist.get_world_size(group)
        self.rank = dist.get_rank(group)

    def reduce(self, tensor: Tensor, how: str) -> None:
        """Combine in place over the group, "max" or "sum"."""
        dist.all_reduce(tensor, dist.ReduceOp.MAX if how == "max" else dist.ReduceOp.SUM, group=self.group)

    def counts(self, rows: int, device: torch.device) -> list[int]:
        """How many rows each process brings."""
        own = torch.tensor([rows], device=device)
        every = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(every, own, group=self.group)
        return [int(x) for x in every]

    def gather(self, rows: Tensor, counts: list[int]) -> Tensor:
        """The rows of all processes, in order of rank; the numbers of rows may differ."""
        padded = rows.new_zeros((max(counts), *rows.shape[1:]))
        padded[: rows.shape[0]] = rows
        every = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(every, padded, group=self.group)
        return torch.cat([x[:n] for x, n in zip(every, counts, strict=True)])

    def own(self, counts: list[int]) -> slice:
        """Where the own rows lie among those of all processes."""
        return slice(sum(counts[: self.rank]), sum(counts[: self.rank + 1]))


class Shards(Ranks):
    """The processes of a group and the classes each holds.

    Args:
        group: A torch.distributed process group.
        classes: Classes of the whole head; the first ``classes % P`` processes hold one more than the others.
    """

    def __init__(self, group: Any, classes: int) -> None:
        super().__init__(group)
        if classes < self.size:
            raise ValueError(f"num_classes must be at least the {self.size} processes of the group; got {classes}")
        share, rest = divmod(classes, self.size)
        self.start = self.rank * share + min(self.rank, rest)
        self.count = share + (self.rank < rest)


class GatherRows(torch.autograd.Function):
    """All rows in the forward; the own slice of the gradient in the backward.

    The head already adds the parts of the gradient that come from other processes' classes, so nothing is summed here.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, shards: Shards, counts: list[int]) -> Tensor:
        """Gather in order of rank."""
        ctx.own = shards.own(counts)
        return shards.gather(rows, counts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Keep the own slice."""
        return grad[ctx.own], None, None


class OwnRows(torch.autograd.Function):
    """The own rows of a result that every process has; the backward gathers the gradients of all rows."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, shards: Shards, counts: list[int]) -> Tensor:
        """Take the own slice."""
        ctx.shards, ctx.counts = shards, counts
        return rows[shards.own(counts)].clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gather, so that each process can run the kernel's backward on all rows."""
        return ctx.shards.gather(grad.contiguous(), ctx.counts), None, None


class GatherShared(torch.autograd.Function):
    """All rows in the forward; in the backward the own slice of the sum over the processes that used them."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, ranks: Ranks, counts: list[int]) -> Tensor:
        """Gather in order of rank."""
        ctx.ranks, ctx.own = ranks, ranks.own(counts)
        return ranks.gather(rows, counts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Sum, then keep the own slice."""
        total = grad.clone(memory_format=torch.contiguous_format)
        ctx.ranks.reduce(total, "sum")
        return total[ctx.own], None, None


class SumOfRanks(torch.autograd.Function):
    """The sum of one number of each process; what came from this process gets the upstream gradient."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, ranks: Ranks) -> Tensor:
        """Sum over the group."""
        total = value.clone()
        ranks.reduce(total, "sum")
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Pass on."""
        return grad, None
