"""A class-sharded head: each process holds some of the classes and sees the rows of all."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class Shards:
    """The processes of a group, the rows each brings, and the classes each holds.

    Args:
        group: A torch.distributed process group.
        classes: Classes of the whole head; the first ``classes % P`` processes hold one more than the others.
    """

    def __init__(self, group: Any, classes: int) -> None:
        self.group = group
        self.size = dist.get_world_size(group)
        self.rank = dist.get_rank(group)
        if classes < self.size:
            raise ValueError(f"num_classes must be at least the {self.size} processes of the group; got {classes}")
        share, rest = divmod(classes, self.size)
        self.start = self.rank * share + min(self.rank, rest)
        self.count = share + (self.rank < rest)

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


class GatherRows(torch.autograd.Function):
    """All rows in the forward; the own slice of the gradient in the backward.

    The head already adds the parts of the gradient that come from other processes' classes, so nothing is summed here.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, shards: Shards, counts: list[int]) -> Tensor:
        """Gather in order of rank."""
        ctx.own = slice(sum(counts[: shards.rank]), sum(counts[: shards.rank + 1]))
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
        return rows[sum(counts[: shards.rank]) : sum(counts[: shards.rank + 1])].clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gather, so that each process can run the kernel's backward on all rows."""
        return ctx.shards.gather(grad.contiguous(), ctx.counts), None, None
