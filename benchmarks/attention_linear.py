"""Linear attention against softmax and against the ways in which linear attention is written: forward and backward."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.harness import Table, compare, installed, peak_memory
from kexue.attention import linear_attention

SECTION = "Linear attention"
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
BATCHED = "batched chunks of 64, autograd"


def phi(x: Tensor) -> Tensor:
    return F.elu(x) + 1


def cumulative_sum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The article's second route: outer products of every token, summed up over time."""
    q, k = phi(q), phi(k)
    s = torch.einsum("bhtd,bhte->bhtde", k, v).cumsum(2)
    return torch.einsum("bhtd,bhtde->bhte", q, s) / (q * k.cumsum(2)).sum(-1, keepdim=True)


def batched_chunks(q: Tensor, k: Tensor, v: Tensor, c: int = 64) -> Tensor:
    """What pure torch implementations do: all chunks at once, autograd for the backward."""
    q, k = phi(q), phi(k)
    den = (q * k.cumsum(2)).sum(-1, keepdim=True)
    chunks, parts, blocks = (x.unflatten(2, (-1, c)) for x in (q, k, v))
    states = (parts.mT @ blocks).cumsum(2)
    states = torch.cat([torch.zeros_like(states[:, :, :1]), states[:, :, :-1]], 2)
    inside = (chunks @ parts.mT).tril() @ blocks
    return (chunks @ states + inside).flatten(2, 3) / den


class BatchedBackward(torch.autograd.Function):
    """The same with a backward written by hand."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, c: int) -> Tensor:
        chunks, parts, blocks = (x.unflatten(2, (-1, c)) for x in (q, k, v))
        states, sums = parts.mT @ blocks, parts.sum(3, keepdim=True)
        states, sums = (F.pad(x.cumsum(2), (0, 0, 0, 0, 1, 0))[:, :, :-1] for x in (states, sums))
        scores = (chunks @ parts.mT).tril_()
        den = scores.sum(-1, keepdim=True) + chunks @ sums.mT
        o = (scores @ blocks + chunks @ states) / den
        ctx.save_for_backward(chunks, parts, blocks, o, den, states, sums)
        return o.flatten(2, 3)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, o, den, states, sums = ctx.saved_tensors
        g = grads[0].unflatten(2, (-1, q.shape[3])) / den
        r = -(g * o).sum(-1, keepdim=True)
        pairs, scores = (g @ v.mT + r).tril_(), (q @ k.mT).tril_()
        later_s, later_z = q.mT @ g, (q * r).sum(3, keepdim=True)
        later_s, later_z = (
            F.pad(x.flip(2).cumsum(2).flip(2)[:, :, 1:], (0, 0, 0, 0, 0, 1)) for x in (later_s, later_z)
        )
        dq = pairs @ k + g @ states.mT + r * sums
        dk = pairs.mT @ q + v @ later_s.mT + later_z
        dv = scores.mT @ g + k @ later_s
        return dq.flatten(2, 3), dk.flatten(2, 3), dv.flatten(2, 3), None


def batched_backward(q: Tensor, k: Tensor, v: Tensor, c: int = 128) -> Tensor:
    return BatchedBackward.apply(phi(q), phi(k), v, c)


def performer_pytorch() -> dict[str, Attention]:
    """Causal linear attention of the package, where its compiled extension is missing (it needs CUDA)."""
    if not installed("performer_pytorch"):
        return {}
    from performer_pytorch.performer_pytorch import causal_linear_attention_noncuda

    return {"performer-pytorch": lambda q, k, v: causal_linear_attention_noncuda(phi(q), phi(k), v)}


def causal_softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


class Step:
    """Forward and backward with fresh gradients."""

    def __init__(self, function: Attention, heads: int, length: int, width: int = 64) -> None:
        g = torch.Generator().manual_seed(0)
        self.function = function
        self.inputs = [torch.randn(1, heads, length, width, generator=g).requires_grad_() for _ in range(3)]
        self.upstream = torch.randn(1, heads, length, width, generator=g)

    def __call__(self) -> None:
        """One step."""
        for x in self.inputs:
            x.grad = None
        self.function(*self.inputs).backward(self.upstream)

    def memory(self) -> dict[str, str]:
        """Peak memory of one step in units of q, k, v and o together; gradients of q, k and v are .75 of it."""
        for x in self.inputs:
            x.grad = None
        unit = 4 * self.upstream.nbytes / 2**20
        peak = peak_memory(self)
        return {"peak memory, MiB": f"{peak:.0f}", "in units of (q, k, v, o)": f"{peak / unit:.2f}"}


def table(title: str, workload: str, forms: dict[str, Attention], length: int, peer: str, **options: Any) -> Table:
    steps = {name: Step(function, 8, length) for name, function in forms.items()}
    memory = {name: step.memory() for name, step in steps.items()}
    packages = ("torch", "performer-pytorch") if installed("performer_pytorch") else ("torch",)
    return compare(title, workload, steps, peer=peer, packages=packages, extra=memory, **options)


def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return linear_attention(q, k, v, causal=True)


def causal(length: int, repeats: int) -> Table:
    forms: dict[str, Attention] = {
        BATCHED: batched_chunks,
        "batched chunks of 128, own backward": batched_backward,
        "softmax (torch SDPA)": causal_softmax,
        "kexue linear_attention": ours,
        "kexue linear_attention, exp": lambda q, k, v: linear_attention(q, k, v, "exp", causal=True),
        "kexue linear_attention, cosine1": lambda q, k, v: linear_attention(q, k, v, "cosine1", causal=True),
    }
    if length <= 1024:
        forms["cumulative sum of outer products"] = cumulative_sum
    if length <= 4096:
        forms |= performer_pytorch()
    return table(
        f"Causal, {length} tokens",
        f"B 1, H 8, D 64, elu + 1 unless said, float32, T {length}, forward and backward, one thread.",
        forms,
        length,
        BATCHED,
        repeats=repeats,
    )


def bidirectional(length: int, repeats: int) -> Table:
    def two_products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = phi(q), phi(k)
        return (q @ (k.mT @ v)) / (q @ k.sum(2).unsqueeze(-1))

    return table(
        f"Bidirectional, {length} tokens",
        f"B 1, H 8, D 64, elu + 1, float32, T {length}, forward and backward, one thread.",
        {
            "softmax (torch SDPA)": F.scaled_dot_product_attention,
            "two products, autograd": two_products,
            "kexue linear_attention": lambda q, k, v: linear_attention(q, k, v),
        },
        length,
        "softmax (torch SDPA)",
        repeats=repeats,
    )


def threads() -> Table:
    """Clock time, since that is what threads are for; the same steps with one and two threads, taking turns."""
    before = torch.get_num_threads()
    remarks = []
    try:
        for name, function in ((BATCHED, batched_chunks), ("kexue linear_attention", ours)):
            step, clock = Step(function, 8, 4096), {1: [], 2: []}
            for _ in range(8):
                for count, samples in clock.items():
                    torch.set_num_threads(count)
                    start = time.perf_counter()
                    step()
                    samples.append(time.perf_counter() - start)
            one, two = (1e3 * statistics.median(samples[1:]) for samples in clock.values())
            remarks.append(f"{name}: {one:.1f} ms of clock time with one thread, {two:.1f} ms with two.")
        torch.set_num_threads(2)
        return table(
            "Causal, 4096 tokens, two threads",
            "As above; CPU time of both threads together in the table, clock time below.",
            {BATCHED: batched_chunks, "softmax (torch SDPA)": causal_softmax, "kexue linear_attention": ours},
            4096,
            BATCHED,
            repeats=5,
            remarks=remarks,
        )
    finally:
        torch.set_num_threads(before)


def decoding() -> Table:
    """One token after 4096: a state against a cache of keys."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 8, 4097, 64, generator=g) for _ in range(3))
    _, state = linear_attention(q[:, :, :-1], k[:, :, :-1], v[:, :, :-1], causal=True, return_state=True)
    last = [x[:, :, -1:] for x in (q, k, v)]

    def step() -> None:
        for _ in range(100):
            linear_attention(*last, causal=True, initial_state=state, return_state=True)

    def softmax() -> None:
        for _ in range(100):
            F.scaled_dot_product_attention(last[0], k, v)

    return compare(
        "Decoding",
        "100 steps of one token after 4096 others, B 1, H 8, D 64, float32.",
        {"softmax (torch SDPA) on cached keys": softmax, "kexue linear_attention with a state": step},
        peer="softmax (torch SDPA) on cached keys",
        packages=("torch",),
        extra={
            "softmax (torch SDPA) on cached keys": {"numbers kept": f"{2 * 8 * 4096 * 64:,}"},
            "kexue linear_attention with a state": {"numbers kept": f"{sum(x.numel() for x in state[:2]):,}"},
        },
    )


def run() -> list[Table]:
    """All comparisons of this file."""
    return [
        causal(1024, 9), causal(4096, 7), causal(16384, 3),
        bidirectional(512, 15), bidirectional(4096, 7),
        threads(), decoding(),
    ]  # fmt: skip
