"""Random features against performer-pytorch: speed, memory and error at the same number of features."""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.harness import Table, compare, installed, peak_memory
from kexue.attention import FavorFeatures, linear_attention

SECTION = "Attention: random features (Performer)"
PEER = "performer-pytorch"
FEATURES = 256


def peer_attention(causal: bool) -> Any:
    from performer_pytorch.performer_pytorch import FastAttention

    with contextlib.redirect_stdout(io.StringIO()):  # it says that its CUDA code is missing
        return FastAttention(64, FEATURES, causal=causal)


def packages() -> tuple[str, ...]:
    return ("torch", PEER) if installed("performer_pytorch") else ("torch",)


class Step:
    """Forward and backward with fresh gradients."""

    def __init__(self, attention: Callable[..., Tensor], *leaves: Tensor) -> None:
        self.attention, self.leaves = attention, leaves

    def __call__(self) -> None:
        """One step; the old gradients are dropped first."""
        for x in self.leaves:
            x.grad = None
        self.attention(*self.leaves).sum().backward()

    def memory(self) -> dict[str, str]:
        """Peak memory of one step beside the gradients."""
        for x in self.leaves:
            x.grad = None
        peak = peak_memory(self)
        return {"memory beside gradients, MiB": f"{peak - sum(x.nbytes for x in self.leaves) / 2**20:.0f}"}


def speed(length: int, causal: bool, repeats: int) -> Table:
    generator = torch.Generator().manual_seed(0)
    leaves = [torch.randn(1, 8, length, 64, generator=generator).requires_grad_() for _ in range(3)]
    steps: dict[str, Step] = {}
    if installed("performer_pytorch"):
        steps[PEER] = Step(peer_attention(causal), *leaves)
    for variant in ("positive", "optimal"):
        phi = FavorFeatures(64, FEATURES, variant=variant, redraw_interval=None, generator=generator)

        def ours(q: Tensor, k: Tensor, v: Tensor, phi: FavorFeatures = phi) -> Tensor:
            return linear_attention(q, k, v, phi, causal=causal)

        steps[f"FavorFeatures {variant}"] = Step(ours, *leaves)
    steps["softmax (F.scaled_dot_product_attention)"] = Step(
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=causal), *leaves
    )
    kind = "causal" if causal else "bidirectional"
    return compare(
        f"Random features, {kind}, T {length}",
        f"B 1, H 8, D 64, M {FEATURES}, float32, one thread, forward and backward.",
        steps,
        peer=PEER,
        packages=packages(),
        repeats=repeats,
        extra={name: step.memory() for name, step in steps.items()},
    )


def errors(size: float, draws: int = 30) -> dict[str, float]:
    """Relative error of the output (root of the mean square over draws) against softmax attention."""
    contenders: dict[str, Callable[[torch.Generator], Callable[..., Tensor]]] = {}

    def ours(**options: Any) -> Callable[[torch.Generator], Callable[..., Tensor]]:
        def make(generator: torch.Generator) -> Callable[..., Tensor]:
            phi = FavorFeatures(64, FEATURES, generator=generator, redraw_interval=None, **options)
            return lambda q, k, v: linear_attention(q, k, v, phi)

        return make

    if installed("performer_pytorch"):
        contenders[PEER] = lambda generator: peer_attention(False)
    contenders |= {
        "FavorFeatures positive": ours(),
        "FavorFeatures optimal": ours(variant="optimal"),
        "FavorFeatures optimal, quantile": ours(variant="optimal", norms="quantile"),
        "uniform averaging": lambda _: lambda q, k, v: v.mean(2, keepdim=True).expand_as(v),
    }
    squares = dict.fromkeys(contenders, 0.0)
    for draw in range(draws):
        torch.manual_seed(draw)
        generator = torch.Generator().manual_seed(draw)
        q, k = (size * torch.randn(1, 4, 128, 64, generator=generator) for _ in range(2))
        v = torch.randn(1, 4, 128, 64, generator=generator)
        exact = F.scaled_dot_product_attention(q, k, v)
        for name, make in contenders.items():
            squares[name] += float((make(generator)(q, k, v) - exact).square().sum() / exact.square().sum())
    return {name: math.sqrt(x / draws) for name, x in squares.items()}


def error_table() -> Table:
    sizes = (0.25, 0.5, 1.0)
    found = {f"error, inputs of size {size:g}": errors(size) for size in sizes}
    names = next(iter(found.values()))
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 4, 128, 64, generator=generator) for _ in range(3))
    calls: dict[str, Callable[[], Any]] = {}
    for name in names:
        if name == PEER:
            peer = peer_attention(False)
            calls[name] = lambda peer=peer: peer(q, k, v)  # type: ignore[misc]
        elif name == "uniform averaging":
            calls[name] = lambda: v.mean(2, keepdim=True).expand_as(v)
        else:
            phi = FavorFeatures(
                64, FEATURES, variant=name.split()[1].rstrip(","), norms="quantile" if "quantile" in name else "chi"
            ).eval()
            calls[name] = lambda phi=phi: linear_attention(q, k, v, phi)  # type: ignore[misc]
    return compare(
        "Random features, error against softmax attention",
        f"B 1, H 4, T 128, D 64, M {FEATURES}, normal q, k of the given size, normal v; error of the output relative "
        "to its norm, root of the mean square over 30 draws. Time: forward.",
        calls,
        peer=PEER,
        packages=packages(),
        repeats=15,
        extra={name: {column: f"{values[name]:.3f}" for column, values in found.items()} for name in names},
        remarks=["Above the error of uniform averaging the features are of no use: size 1 is unit variance."],
    )


def run() -> list[Table]:
    torch.set_num_threads(1)
    return [
        speed(1024, False, 11),
        speed(4096, False, 7),
        speed(1024, True, 3),
        speed(4096, True, 3),
        error_table(),
    ]
