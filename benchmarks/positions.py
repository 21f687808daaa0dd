"""Hierarchical position tables against the form with two gathers that the ports in use have."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.harness import Table, compare
from kexue.models import HierarchicalPositionEmbedding, hierarchical_positions

SECTION = "Hierarchical positions"
PEER = "two gathers"


def gathers(weight: Tensor, m: int, alpha: float) -> Tensor:
    """The published form: u, gathered by block and by place, then mixed."""
    u = (weight - alpha * weight[:1]) / (1 - alpha)
    ids = torch.arange(m)
    return alpha * u[ids // len(weight)] + (1 - alpha) * u[ids % len(weight)]


def backward(function: Callable[[], Tensor], weight: Tensor, upstream: Tensor) -> Callable[[], None]:
    def call() -> None:
        torch.autograd.grad(function(), weight, upstream)

    return call


def table(m: int, repeats: int) -> list[Table]:
    n, width = 512, 768
    weight = torch.randn(n, width, generator=torch.Generator().manual_seed(0))
    learned = weight.clone().requires_grad_()
    upstream, buffer = torch.ones(m, width), torch.empty(m, width)
    source = torch.ones(1, width)
    embedding = HierarchicalPositionEmbedding.from_pretrained(learned.data, length=m)
    ids = torch.arange(m)[None]
    exact = "yes" if torch.equal(hierarchical_positions(weight, m, 0.4)[:n], weight) else "no"
    old = "yes" if torch.equal(gathers(weight, m, 0.4)[:n], weight) else "no"

    def fresh() -> Tensor:
        return torch.empty(m, width).copy_(source)

    forward = compare(
        f"Table of {m} positions from {n}",
        f"D {width}, float32, forward, one thread.",
        {
            PEER: lambda: gathers(weight, m, 0.4),
            "hierarchical_positions": lambda: hierarchical_positions(weight, m, 0.4),
            "limit: one write of the table, new memory": fresh,
            "limit: one write of the table, memory in use": lambda: buffer.copy_(source),
        },
        peer=PEER,
        packages=("torch",),
        repeats=repeats,
        extra={PEER: {"first rows exact": old}, "hierarchical_positions": {"first rows exact": exact}},
    )
    both = compare(
        f"Table of {m} positions from {n}, with the gradient",
        f"D {width}, float32, forward and backward, one thread.",
        {
            PEER: backward(lambda: gathers(learned, m, 0.4), learned, upstream),
            "hierarchical_positions": backward(lambda: hierarchical_positions(learned, m, 0.4), learned, upstream),
            "HierarchicalPositionEmbedding, ids in order": backward(
                lambda: embedding(ids)[0], embedding.weight, upstream
            ),
        },
        peer=PEER,
        packages=("torch",),
        repeats=repeats,
    )
    return [forward, both]


def run() -> list[Table]:
    """All comparisons of this room."""
    return [*table(2048, 41), *table(16384, 9)]
