"""Gumbel-softmax against torch's: with a gradient, without one, followed by an embedding, and on small tensors."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.harness import Table, compare, peak_memory
from kexue.stats import gumbel_max, gumbel_softmax, st_embedding

SECTION = "Reparameterisation"
ROWS, CLASSES, WIDTH = 256, 10_000, 128
CALLS = 200
TORCH = "F.gumbel_softmax, hard"


def logits() -> Tensor:
    return torch.randn(ROWS, CLASSES, generator=torch.Generator().manual_seed(0))


def memory(contenders: dict[str, Callable[[], object]], *leaves: Tensor) -> dict[str, dict[str, str]]:
    found = {}
    for name, step in contenders.items():
        for x in leaves:
            x.grad = None  # outside the measured call: freeing blocks that the profiler never saw would confuse it
        found[name] = {"peak memory, MiB": f"{peak_memory(step):.1f}"}
    return found


def with_gradient() -> Table:
    x = logits().requires_grad_()

    def step(sample: Callable[[], Tensor]) -> Callable[[], None]:
        def run() -> None:
            x.grad = None
            sample().sum().backward()

        return run

    contenders = {
        TORCH: step(lambda: F.gumbel_softmax(x, 1.0, True)),
        "straight-through": step(lambda: gumbel_softmax(x, 1.0, True)),
        "straight-through, tau .5": step(lambda: gumbel_softmax(x, 0.5, True)),
        "soft": step(lambda: gumbel_softmax(x, 1.0)),
        "Gumbel-Rao, 10 samples": step(lambda: gumbel_softmax(x, 1.0, estimator="rao")),
    }
    return compare(
        "Sample with gradient",
        f"{ROWS} x {CLASSES}, float32, forward and backward, one thread.",
        contenders,
        peer=TORCH,
        packages=("torch",),
        extra=memory(contenders, x),
    )


def without_gradient() -> Table:
    x = logits()
    contenders = {
        TORCH: lambda: F.gumbel_softmax(x, 1.0, True),
        "torch.multinomial of the softmax": lambda: torch.multinomial(torch.softmax(x, 1), 1),
        "gumbel_softmax, hard": lambda: gumbel_softmax(x, 1.0, True),
        "gumbel_max": lambda: gumbel_max(x),
        "gumbel_max, 5 without replacement": lambda: gumbel_max(x, 5),
    }
    return compare(
        "Hard sample without gradient",
        f"{ROWS} x {CLASSES}, float32, one thread.",
        contenders,
        peer=TORCH,
        packages=("torch",),
        extra=memory(contenders),
    )


def small(batch: int) -> Table:
    x = torch.randn(batch, 20, 10, generator=torch.Generator().manual_seed(0)).requires_grad_()

    def steps(sample: Callable[[], Tensor], gradient: bool) -> Callable[[], None]:
        def run() -> None:
            for _ in range(CALLS):
                x.grad = None
                with torch.set_grad_enabled(gradient):
                    y = sample()
                if gradient:
                    y.sum().backward()

        return run

    contenders = {}
    for kind, hard in (("soft", False), ("hard", True)):
        for mode, gradient in (("with gradient", True), ("without", False)):
            ours, theirs = partial(gumbel_softmax, x, 0.5, hard), partial(F.gumbel_softmax, x, 0.5, hard)
            contenders[f"F.gumbel_softmax, {kind}, {mode}"] = steps(theirs, gradient)
            contenders[f"gumbel_softmax, {kind}, {mode}"] = steps(ours, gradient)
    return compare(
        f"Categorical latents, batch of {batch}",
        f"{CALLS} calls on {batch} x 20 x 10, float32, tau .5, one thread; with gradient: forward and backward.",
        contenders,
        peer="F.gumbel_softmax, hard, with gradient",
        packages=("torch",),
    )


def embedding() -> Table:
    x = logits().requires_grad_()
    weight = torch.randn(CLASSES, WIDTH, generator=torch.Generator().manual_seed(1)).requires_grad_()

    def step(out: Callable[[], Tensor]) -> Callable[[], None]:
        def run() -> None:
            x.grad = weight.grad = None
            out().sum().backward()

        return run

    contenders = {
        "F.gumbel_softmax, hard, @ weight": step(lambda: F.gumbel_softmax(x, 1.0, True) @ weight),
        "gumbel_softmax, hard, @ weight": step(lambda: gumbel_softmax(x, 1.0, True) @ weight),
        "st_embedding": step(lambda: st_embedding(x, weight, 1.0)),
    }
    return compare(
        "Embedding of a sampled class",
        f"{ROWS} x {CLASSES}, width {WIDTH}, float32, forward and backward, one thread.",
        contenders,
        peer="F.gumbel_softmax, hard, @ weight",
        packages=("torch",),
        extra=memory(contenders, x, weight),
    )


def run() -> list[Table]:
    """All comparisons of this room."""
    return [with_gradient(), without_gradient(), embedding(), *map(small, (1, 8, 32))]
