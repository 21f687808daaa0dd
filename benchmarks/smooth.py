"""Smooth metrics and soft top-k against what people write: forward and backward, one thread."""

from __future__ import annotations

import math
from collections.abc import Callable

import numba
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.harness import Table, compare, peak_memory
from kexue.losses import smooth_accuracy_loss, smooth_f1_loss, soft_topk

SECTION = "Smooth approximations"


class Gradient:
    """Forward and backward of a function of one leaf."""

    def __init__(self, function: Callable[[], Tensor], leaf: Tensor, upstream: Tensor | None = None) -> None:
        self.function, self.leaf, self.upstream = function, leaf, upstream

    def __call__(self) -> Tensor:
        """The gradient, which nobody keeps."""
        return torch.autograd.grad(self.function(), self.leaf, self.upstream)[0]


def table(title: str, workload: str, steps: dict[str, Gradient], peer: str, **options: object) -> Table:
    """Compare, with the peak memory of a step in units of the leaf."""
    # glibc hands blocks back to the system until it has seen a large one freed; page faults would drown the rest.
    torch.empty(7_500_000)
    memory = {
        name: {"peak memory, in logits": f"{peak_memory(step) * 2**20 / step.leaf.nbytes:.1f}"}
        for name, step in steps.items()
    }
    return compare(title, workload, steps, peer=peer, packages=("torch",), extra=memory, **options)  # type: ignore[arg-type]


def plain_f1(x: Tensor, t: Tensor, dims: tuple[int, ...]) -> Tensor:
    """The usual code."""
    p = torch.sigmoid(x)
    return (1 - 2 * (p * t).sum(dims) / (p.sum(dims) + t.sum(dims))).mean()


def binary_f1() -> Table:
    """One pool of a million entries."""
    torch.manual_seed(0)
    x = torch.randn(1_000_000, requires_grad=True)
    t = torch.rand(1_000_000) < 0.1
    floats = t.float()
    return table(
        "Smooth F1 and accuracy, two classes",
        "1 000 000 logits, float32; labels bool, for the usual code float32.",
        {
            "sigmoid and one sum": Gradient(lambda: torch.sigmoid(x).sum(), x),
            "binary_cross_entropy_with_logits": Gradient(lambda: F.binary_cross_entropy_with_logits(x, floats), x),
            "F1, usual code": Gradient(lambda: plain_f1(x, floats, (0,)), x),
            "smooth_f1_loss": Gradient(lambda: smooth_f1_loss(x, t), x),
            "smooth_accuracy_loss": Gradient(lambda: smooth_accuracy_loss(x, t), x),
        },
        "sigmoid and one sum",
        repeats=31,
    )


def many_classes() -> Table:
    """Macro F1 and accuracy."""
    torch.manual_seed(0)
    x = torch.randn(1024, 1000, requires_grad=True)
    hot = torch.rand(1024, 1000) < 0.01
    floats, y = hot.float(), torch.randint(1000, (1024,))

    def plain_accuracy() -> Tensor:
        return 1 - torch.softmax(x, -1).gather(1, y[:, None]).mean()

    return table(
        "Smooth macro F1 and accuracy, many classes",
        "1024 rows, 1000 classes, float32.",
        {
            "macro F1, usual code": Gradient(lambda: plain_f1(x, floats, (0,)), x),
            "smooth_f1_loss macro": Gradient(lambda: smooth_f1_loss(x, hot, average="macro"), x),
            "accuracy, usual code": Gradient(plain_accuracy, x),
            "smooth_accuracy_loss": Gradient(lambda: smooth_accuracy_loss(x, y), x),
            "cross_entropy": Gradient(lambda: F.cross_entropy(x, y), x),
        },
        "macro F1, usual code",
        repeats=31,
    )


@numba.njit(cache=False)
def _isotonic(y: np.ndarray, start: np.ndarray, fit: np.ndarray) -> None:
    """Non-increasing least-squares fit of each row (pool adjacent violators); start[i] = first index of i's block."""
    rows, n = y.shape
    total, size, first = np.empty(n, np.float64), np.empty(n, np.int64), np.empty(n, np.int64)
    for r in range(rows):
        blocks = 0
        for i in range(n):
            total[blocks], size[blocks], first[blocks] = y[r, i], 1, i
            blocks += 1
            while blocks > 1 and total[blocks - 2] * size[blocks - 1] <= total[blocks - 1] * size[blocks - 2]:
                blocks -= 1
                total[blocks - 1] += total[blocks]
                size[blocks - 1] += size[blocks]
        for b in range(blocks):
            for i in range(first[b], first[b] + size[b]):
                fit[r, i] = total[b] / size[b]
                start[r, i] = first[b]


class SortedTopK(torch.autograd.Function):
    """Soft top-k as fast-soft-sort and torchsort have it: projection onto the permutahedron of (1 x k, 0 x n-k).

    Sort, isotonic regression in compiled code, un-sort. The gradient of the regression is the mean over each block.
    """

    @staticmethod
    def forward(ctx, x: Tensor, k: int, strength: float) -> Tensor:  # type: ignore[no-untyped-def]
        """Weights that sum to k."""
        s, order = torch.sort(x / strength, dim=-1, descending=True)
        w = torch.zeros_like(s)
        w[:, :k] = 1
        start, fit = np.empty(s.shape, np.int64), np.empty(s.shape, np.float32)
        _isotonic((s - w).numpy(), start, fit)
        out = torch.empty_like(s).scatter_(1, order, s - torch.from_numpy(fit))
        ctx.save_for_backward(order, torch.from_numpy(start))
        ctx.strength = strength
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
        """Differences from the block's mean."""
        order, start = ctx.saved_tensors
        g = grad.gather(1, order)
        total = torch.zeros_like(g).scatter_add_(1, start, g)
        count = torch.zeros_like(g).scatter_add_(1, start, torch.ones_like(g))
        g = g - (total / count.clamp(min=1)).gather(1, start)
        return torch.empty_like(g).scatter_(1, order, g / ctx.strength), None, None


def bisected(x: Tensor, k: int) -> Tensor:
    """Thirty halvings of the bracket, the code people write; its gradient would go through all of them."""
    with torch.no_grad():
        shift = math.log(x.shape[1] / k - 1)
        low, high = x.amin(1, keepdim=True) + shift, x.amax(1, keepdim=True) + shift
        for _ in range(30):
            middle = (low + high) / 2
            over = torch.sigmoid(x - middle).sum(1, keepdim=True) > k
            low, high = torch.where(over, middle, low), torch.where(over, high, middle)
    return torch.sigmoid(x - (low + high) / 2)


def topk() -> Table:
    """256 rows of 10 000 scores."""
    torch.manual_seed(0)
    x = torch.randn(256, 10_000, requires_grad=True)
    g = torch.randn(256, 10_000)
    return table(
        "Soft top-k",
        "256 rows of 10 000 normal scores, float32, K = 1 unless said.",
        {
            "softmax": Gradient(lambda: torch.softmax(x, -1), x, g),
            "soft_topk, k = 100": Gradient(lambda: soft_topk(x, 100), x, g),
            "soft_topk, k = 100, K = 10": Gradient(lambda: soft_topk(x, 100, K=10.0), x, g),
            "soft_topk, k = 5000": Gradient(lambda: soft_topk(x, 5000), x, g),
            "bisection, k = 100": Gradient(lambda: bisected(x, 100), x, g),
            "sort + isotonic regression, k = 100": Gradient(lambda: SortedTopK.apply(x, 100, 1.0), x, g),
        },
        "softmax",
        repeats=5,
        remarks=[
            "Sort + isotonic regression is the algorithm of fast-soft-sort and torchsort (a projection onto the "
            "permutahedron, O(n log n)), written here with torch's sort and pool-adjacent-violators in numba "
            "(torchsort itself is not a dependency). Its weights are another function of the scores: exactly 0 and 1 "
            "away from the threshold, with no gradient there.",
            "The gradient of the bisection leaves the threshold's part out.",
        ],
    )


def run() -> list[Table]:
    """All comparisons of this room."""
    return [binary_f1(), many_classes(), topk()]
