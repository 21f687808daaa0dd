"""Capsule layers against the forms of public code: broadcast votes (dense), votes built once (shared).

The contenders are written after XifengGuo/CapsNet-Pytorch and gram-ai/capsule-networks (with the softmax over the
output capsules, which the latter has over the inputs) and, for shared weights, after the author's Keras layer. All use
three iterations. Memory: tensors kept between the passes, without inputs and weights, and the peak during one call.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.harness import Table, compare, peak_memory
from kexue.models import Capsule, squash

SECTION = "Capsules"
CAPSULES, ROUTINGS = 10, 3
GUO, GRAM = "CapsNet-Pytorch's form", "gram-ai's form"
VOTES = "votes built"


def guo(u: Tensor, weight: Tensor) -> Tensor:
    """Inputs (B, n, i), weight (k, n, o, i): one small product for each pair, coefficients without gradient."""
    votes = torch.matmul(weight, u[:, None, :, :, None]).squeeze(-1)  # (B, k, n, o)
    fixed = votes.detach()
    logits = u.new_zeros(votes.shape[:3])
    for _ in range(ROUTINGS - 1):
        c = F.softmax(logits, 1)
        v = squash((c[..., None] * fixed).sum(-2), 1.0)
        logits = logits + (v[:, :, None] * fixed).sum(-1)
    return squash((F.softmax(logits, 1)[..., None] * votes).sum(-2), 1.0)


def gram(u: Tensor, weight: Tensor) -> Tensor:
    """Inputs (B, n, i), weight (k, n, i, o): logits repeated over the width."""
    votes = u[None, :, :, None, :] @ weight[:, None]  # (k, B, n, 1, o)
    logits = torch.zeros_like(votes)
    for t in range(ROUTINGS):
        v = squash((F.softmax(logits, 0) * votes).sum(2, keepdim=True), 1.0)
        if t < ROUTINGS - 1:
            logits = logits + (votes * v).sum(-1, keepdim=True)
    return v[:, :, 0, 0].transpose(0, 1)


def with_votes(u: Tensor, weight: Tensor) -> Tensor:
    """Inputs (B, n, i), weight (i, k * o): the article's rule on votes (B, n, k, o)."""
    votes = (u @ weight).unflatten(-1, (CAPSULES, -1))
    v = votes.sum(1) / CAPSULES
    for _ in range(ROUTINGS - 1):
        c = torch.einsum("bko,bnko->bnk", F.normalize(v, dim=-1), votes).softmax(-1)
        v = torch.einsum("bnk,bnko->bko", c, votes)
    return squash(v)


def saved(function: Callable[[], Tensor], own: tuple[Tensor, ...]) -> float:
    """MiB kept between the passes beside the inputs and the weights."""
    found: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        found[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        function()
    for x in own:
        found.pop(x.untyped_storage().data_ptr(), None)
    return sum(found.values()) / 2**20


def table(
    title: str, workload: str, layers: dict[str, tuple[Callable[[], Tensor], Tensor]], u: Tensor, peer: str
) -> Table:
    def step(layer: Callable[[], Tensor], weight: Tensor) -> Callable[[], None]:
        def run() -> None:
            u.grad = weight.grad = None
            layer().square().sum().backward()

        return run

    steps = {name: step(*layer) for name, layer in layers.items()}
    extra = {}
    for name, (layer, weight) in layers.items():
        u.grad = weight.grad = None
        kept = saved(layer, (u, weight))
        extra[name] = {"saved, MiB": f"{kept:.2f}", "peak memory, MiB": f"{peak_memory(steps[name]):.1f}"}
    return compare(title, workload, steps, peer=peer, packages=("torch",), repeats=5, extra=extra)


def dense() -> Table:
    batch, inputs, d_in, width = 32, 1152, 8, 16
    torch.manual_seed(0)
    u = torch.randn(batch, inputs, d_in, requires_grad=True)
    first = (0.01 * torch.randn(CAPSULES, inputs, width, d_in)).requires_grad_()
    second = first.detach().transpose(2, 3).contiguous().requires_grad_()
    layers: dict[str, tuple[Callable[[], Tensor], Tensor]] = {
        GUO: (lambda: guo(u, first), first),
        GRAM: (lambda: gram(u, second), second),
    }
    for name, options in {
        "K-means": {},
        "Hinton's routing": {"routing": "hinton"},
        "Hinton's routing, coefficients detached": {"routing": "hinton", "detach_routing": True},
    }.items():
        cap = Capsule(d_in, CAPSULES, width, ROUTINGS, False, num_inputs=inputs, **options)
        layers[name] = (lambda cap=cap: cap(u), cap.weight)
    workload = f"B {batch}, {inputs} inputs, {d_in} -> {CAPSULES} x {width}, float32, forward and backward, one thread."
    return table("Dense weights", workload, layers, u, GUO)


def shared(batch: int, inputs: int, d_in: int, width: int) -> Table:
    torch.manual_seed(0)
    u = torch.randn(batch, inputs, d_in, requires_grad=True)
    cap = Capsule(d_in, CAPSULES, width, ROUTINGS)
    weight = cap.weight.detach().clone().requires_grad_()
    layers: dict[str, tuple[Callable[[], Tensor], Tensor]] = {
        VOTES: (lambda: with_votes(u, weight), weight),
        "K-means": (lambda: cap(u), cap.weight),
    }
    workload = f"B {batch}, {inputs} inputs, {d_in} -> {CAPSULES} x {width}, float32, forward and backward, one thread."
    return table(f"Shared weights, {inputs} inputs", workload, layers, u, VOTES)


def run() -> list[Table]:
    """All comparisons."""
    sizes = ((128, 64, 128, 16), (16, 512, 256, 32), (32, 1152, 8, 16))
    return [dense(), *(shared(*size) for size in sizes)]
