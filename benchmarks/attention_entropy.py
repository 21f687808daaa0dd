"""Entropy-invariant attention against plain SDPA and against the eager form of the ports in use."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.harness import Table, compare, peak_memory
from kexue.attention import entropy_invariant_attention

SECTION = "Entropy-invariant attention"
PLAIN = "F.scaled_dot_product_attention, ordinary scale"
Inputs = tuple[Tensor, Tensor, Tensor]


def eager(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """What ports in the style of bert4keras do: whole score matrix, mask added as a large constant, then the factor."""
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    keys = k.shape[-2]
    allowed = torch.ones(1, 1, 1, keys, dtype=q.dtype) if mask is None else mask[:, None, None, :].to(q.dtype)
    if causal:
        allowed = allowed * torch.ones(keys, keys, dtype=q.dtype).tril()
    scores = scores + (1 - allowed) * -1e4
    n = allowed.sum(-1, keepdim=True)
    scores = scores * (n.clamp(min=16).log() / math.log(512))
    return scores.softmax(-1) @ v


def step(function: Callable[[Tensor, Tensor, Tensor], Tensor], inputs: Inputs, upstream: Tensor) -> Callable[[], None]:
    """Forward and backward."""

    def call() -> None:
        torch.autograd.grad(function(*inputs), inputs, upstream)

    return call


def table(n: int, causal: bool, padded: bool, repeats: int) -> Table:
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 8, n, 64, generator=g).requires_grad_() for _ in range(3))
    upstream = torch.randn(1, 8, n, 64, generator=g)
    mask = torch.arange(n)[None] >= n // 10 if padded else None
    four = None
    if mask is not None:
        four = mask[:, None, None, :]
        if causal:
            four = four & torch.ones(n, n, dtype=torch.bool).tril()

    def plain(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(a, b, c, attn_mask=four, is_causal=causal and four is None)

    def ours(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        return entropy_invariant_attention(a, b, c, causal=causal, key_padding_mask=mask)

    contenders = {
        PLAIN: step(plain, (q, k, v), upstream),
        "entropy_invariant_attention": step(ours, (q, k, v), upstream),
        "eager, as the ports": step(lambda a, b, c: eager(a, b, c, mask, causal), (q, k, v), upstream),
    }
    kind = f"{'causal' if causal else 'bidirectional'}{', left padding' if padded else ''}"
    memory = {name: {"peak memory, MiB": f"{peak_memory(one):.1f}"} for name, one in contenders.items()}
    return compare(
        f"n = {n}, {kind}",
        "B 1, H 8, D 64, float32, forward and backward, one thread.",
        contenders,
        peer=PLAIN,
        packages=("torch",),
        repeats=repeats,
        extra=memory,
    )


def run() -> list[Table]:
    """All comparisons of this room."""
    return [
        table(256, False, False, 101),
        table(256, True, False, 101),
        table(1024, False, False, 15),
        table(1024, True, False, 15),
        table(1024, False, True, 15),
        table(1024, True, True, 15),
        table(2048, False, False, 5),
        table(2048, True, False, 5),
    ]
