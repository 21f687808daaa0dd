"""Polynomial attention against full outer products, cumulative sums and softmax: forward and backward, one thread."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.harness import Table, compare, peak_memory
from kexue.attention import TaylorFeatures, linear_attention

SECTION = "Attention: polynomial feature maps"
PEER = "outer products, chunks of 64"


def outer_features(x: Tensor) -> Tensor:
    """The feature map of fla's `based`: 1, x and the full outer product, 1 + D + D^2 numbers."""
    x = x * x.shape[-1] ** -0.25
    second = (x.unsqueeze(-1) * x.unsqueeze(-2)).flatten(-2) / math.sqrt(2)
    return torch.cat([torch.ones_like(x[..., :1]), x, second], -1)


def chunked(q: Tensor, k: Tensor, v: Tensor, chunk: int = 64) -> Tensor:
    """Causal, all chunks at once, differentiated by torch: the usual form in pure torch."""
    b, h, t, e = v.shape
    n = t // chunk
    q, k, v = (x.reshape(b, h, n, chunk, -1) for x in (outer_features(q), outer_features(k), v))
    s, z = (k.mT @ v).cumsum(2), k.sum(-2).cumsum(2)
    s, z = F.pad(s, (0, 0, 0, 0, 1, 0))[:, :, :-1], F.pad(z, (0, 0, 1, 0))[:, :, :-1]
    scores = (q @ k.mT).tril()
    den = q @ z.unsqueeze(-1) + scores.sum(-1, keepdim=True)
    return ((q @ s + scores @ v) / den).view(b, h, t, e)


def cumulative(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal, the sum of phi(k) v^T before every token: T x M x E numbers."""
    q, k = outer_features(q), outer_features(k)
    s = (k.unsqueeze(-1) * v.unsqueeze(-2)).cumsum(2)
    return torch.einsum("bhtm,bhtme->bhte", q, s) / (q * k.cumsum(2)).sum(-1, keepdim=True)


def bidirectional(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Two products."""
    q, k = outer_features(q), outer_features(k)
    return (q @ (k.mT @ v)) / (q @ k.sum(-2).unsqueeze(-1))


class Step:
    """Forward and backward with fresh gradients."""

    def __init__(self, attention: Callable[..., Tensor], inputs: list[Tensor]) -> None:
        self.attention, self.inputs = attention, inputs

    def __call__(self) -> None:
        """One step."""
        for x in self.inputs:
            x.grad = None
        self.attention(*self.inputs).sum().backward()


def causal(heads: int, time: int, width: int, *, sums: bool = False, repeats: int = 5) -> Table:
    """Degree 2."""
    inputs = [torch.randn(1, heads, time, width, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    inputs = [x.requires_grad_() for x in inputs]
    phi = TaylorFeatures(2)
    forms: dict[str, Callable[..., Tensor]] = {PEER: chunked}
    if sums:
        forms["outer products, cumulative sum"] = cumulative
    forms["TaylorFeatures(2), backend plain"] = lambda q, k, v: linear_attention(
        q, k, v, phi, causal=True, backend="plain"
    )
    forms["TaylorFeatures(2)"] = lambda q, k, v: linear_attention(q, k, v, phi, causal=True)
    forms["softmax (scaled_dot_product_attention)"] = lambda q, k, v: F.scaled_dot_product_attention(
        q, k, v, is_causal=True
    )
    return measured(f"Causal, degree 2, D = E = {width}, T = {time}", heads, forms, inputs, repeats)


def measured(
    title: str,
    heads: int,
    forms: dict[str, Callable[..., Tensor]],
    inputs: list[Tensor],
    repeats: int,
    peer: str = PEER,
) -> Table:
    steps = {name: Step(form, inputs) for name, form in forms.items()}
    memory = {}
    for name, step in steps.items():
        for x in inputs:
            x.grad = None  # outside the measured call: freeing blocks that the profiler never saw would confuse it
        memory[name] = {"peak memory, MiB": f"{peak_memory(step):.0f}"}
    width = inputs[0].shape[-1]
    features = f"{math.comb(width + 2, 2)} symmetric features, {1 + width + width**2} of full outer products"
    return compare(
        title,
        f"B 1, H {heads}, float32, forward and backward, one thread; {features}.",
        steps,
        peer=peer,
        packages=("torch",),
        repeats=repeats,
        extra=memory,
    )


def both_ways(heads: int, time: int, width: int) -> Table:
    """Degree 2, every query sees every key."""
    inputs = [torch.randn(1, heads, time, width, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    inputs = [x.requires_grad_() for x in inputs]
    phi = TaylorFeatures(2)
    forms: dict[str, Callable[..., Tensor]] = {
        "outer products": bidirectional,
        "TaylorFeatures(2)": lambda q, k, v: linear_attention(q, k, v, phi),
        "softmax (scaled_dot_product_attention)": F.scaled_dot_product_attention,
    }
    title = f"Bidirectional, degree 2, D = E = {width}, T = {time}"
    return measured(title, heads, forms, inputs, 5, "outer products")


def run() -> list[Table]:
    """All comparisons of this room."""
    return [
        causal(4, 2048, 16, sums=True),
        causal(8, 4096, 16),
        causal(2, 2048, 64, repeats=3),
        causal(2, 4096, 64, repeats=3),
        both_ways(8, 2048, 16),
    ]
