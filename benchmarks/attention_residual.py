"""Residual attention scores against the loop that keeps a matrix for every layer: forward and backward, one thread."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.harness import Table, compare, installed, peak_memory
from kexue.attention import ResidualScores, residual_attention, residual_attention_stack, residual_attention_step

SECTION = "Residual attention scores"
LAYERS, HEADS, WIDTH = 12, 12, 64
SCALE = WIDTH**-0.5


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """The number of threads is the process's business everywhere else."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Stack:
    """q, k, v and upstream gradients of all layers, and the ways to compute the outputs."""

    def __init__(self, length: int) -> None:
        g = torch.Generator().manual_seed(0)
        shape = (LAYERS, 1, HEADS, length, WIDTH)
        self.qs, self.ks, self.vs, self.upstream = (
            [x.clone() for x in (0.7 * torch.randn(shape, generator=g)).unbind(0)] for _ in range(4)
        )
        self.leaves = [*self.qs, *self.ks, *self.vs]
        for x in self.leaves:
            x.requires_grad_()
        self.attend: Any = None  # x-transformers' module, where it is installed

    def eager(self) -> list[Tensor]:
        """The formula, as usually written."""
        outs, total = [], None
        for q, k, v in zip(self.qs, self.ks, self.vs, strict=True):
            own = q @ k.mT * SCALE
            total = own if total is None else total + own
            outs.append(total.softmax(-1) @ v)
        return outs

    def eager_last(self) -> list[Tensor]:
        """The formula for the last layer."""
        total = self.qs[0] @ self.ks[0].mT * SCALE
        for q, k in zip(self.qs[1:], self.ks[1:], strict=True):
            total = total + q @ k.mT * SCALE
        return [total.softmax(-1) @ self.vs[-1]]

    def x_transformers(self) -> list[Tensor]:
        """What ``residual_attn=True`` runs in each layer: Attend with the scores of the layer before."""
        outs, previous = [], None
        for q, k, v in zip(self.qs, self.ks, self.vs, strict=True):
            out, inner = self.attend(q, k, v, prev_attn=previous)
            previous = inner.pre_softmax_attn
            outs.append(out)
        return outs

    def sdpa(self) -> list[Tensor]:
        """The running sum as SDPA's additive mask."""
        outs, total = [], None
        for n, (q, k, v) in enumerate(zip(self.qs, self.ks, self.vs, strict=True)):
            outs.append(F.scaled_dot_product_attention(q, k, v, attn_mask=total))
            if n < LAYERS - 1:
                own = q @ k.mT * SCALE
                total = own if total is None else total + own
        return outs

    def stack(self) -> list[Tensor]:
        """All layers in one pass over the tiles."""
        return residual_attention_stack(self.qs, self.ks, self.vs)

    def running(self) -> list[Tensor]:
        """Layer by layer, as in a network."""
        scores = ResidualScores()
        return [scores.step(q, k, v) for q, k, v in zip(self.qs, self.ks, self.vs, strict=True)]

    def steps(self) -> list[Tensor]:
        """Layer by layer, with the scores handed on."""
        outs, scores = [], None
        for q, k, v in zip(self.qs, self.ks, self.vs, strict=True):
            out, scores = residual_attention_step(q, k, v, scores)
            outs.append(out)
        return outs

    def last(self, mode: str) -> Callable[[], list[Tensor]]:
        """The last layer's output."""
        return lambda: [residual_attention(self.qs, self.ks, self.vs[-1], mode)]

    def step(self, function: Callable[[], list[Tensor]], backward: bool = True) -> Callable[[], object]:
        """Forward, and backward with fresh gradients."""

        def run() -> object:
            for x in self.leaves:
                x.grad = None
            if not backward:
                with torch.no_grad():
                    return function()
            outs = function()
            torch.autograd.backward(outs, self.upstream[-len(outs) :])
            return None

        return run

    def memory(self, function: Callable[[], object]) -> dict[str, str]:
        """Peak memory of one step, and the part of it that is not gradients of q, k and v."""
        for x in self.leaves:
            x.grad = None  # outside the measured call: freeing blocks that the profiler never saw would confuse it
        peak = peak_memory(function)
        gradients = sum(x.grad.nbytes for x in self.leaves if x.grad is not None) / 2**20
        return {"peak memory, MiB": f"{peak:.0f}", "without gradients": f"{peak - gradients:.0f}"}


def contenders(data: Stack) -> dict[str, Callable[[], list[Tensor]]]:
    peers: dict[str, Callable[[], list[Tensor]]] = {}
    if installed("x_transformers"):
        from x_transformers.attend import Attend

        data.attend = Attend(heads=HEADS)
        peers["x-transformers, residual_attn"] = data.x_transformers
    return peers | {
        "eager loop": data.eager,
        "SDPA, sum as mask": data.sdpa,
        "residual_attention_stack": data.stack,
        "ResidualScores, layer by layer": data.running,
        "residual_attention_step": data.steps,
    }


def agreement(data: Stack, functions: dict[str, Callable[[], list[Tensor]]]) -> str:
    """All contenders compute the same; said with the largest difference."""
    with torch.no_grad():
        first, *others = (torch.stack(f()) for f in functions.values())
    difference = max(float((x - first).abs().max()) for x in others)
    return f"Largest difference between the contenders' outputs: {difference:.0e}."


def run() -> list[Table]:
    """All comparisons of this file."""
    tables = []
    packages = ("torch", "x-transformers") if installed("x_transformers") else ("torch",)
    with one_thread():
        for length in (512, 1024):
            data = Stack(length)
            functions = contenders(data)
            work = f"L {LAYERS}, B 1, H {HEADS}, D {WIDTH}, T {length}, float32, one thread."
            remarks = [agreement(data, functions)]
            for backward, title in ((True, "forward and backward"), (False, "forward without gradients")):
                steps = {name: data.step(f, backward) for name, f in functions.items()}
                tables.append(
                    compare(
                        f"Outputs of all layers, T {length}, {title}",
                        work,
                        steps,
                        peer="x-transformers, residual_attn",
                        packages=packages,
                        repeats=3,
                        extra={name: data.memory(f) for name, f in steps.items()} if backward else None,
                        remarks=remarks,
                    )
                )
            last = {
                "eager loop": data.eager_last,
                **{f'residual_attention, "{mode}"': data.last(mode) for mode in ("mask", "concat", "qk_residual")},
            }
            steps = {name: data.step(f) for name, f in last.items()}
            tables.append(
                compare(
                    f"Output of the last layer, T {length}, forward and backward",
                    work,
                    steps,
                    peer="eager loop",
                    repeats=3,
                    packages=("torch",),
                    extra={name: data.memory(f) for name, f in steps.items()},
                    remarks=['"qk_residual" is another function (sums of q and of k), shown for its cost.'],
                )
            )
    return tables
