"""Losses against the libraries people use: forward and backward, one thread."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.harness import Table, compare, installed, peak_memory
from kexue.losses import MarginSoftmax, flat_cross_entropy, info_nce, margin_softmax_loss, nt_xent

SECTION = "Losses"
PML = "pytorch-metric-learning"


class Step:
    """Forward and backward with fresh gradients."""

    def __init__(self, loss: Callable[[], Tensor], *leaves: Tensor) -> None:
        self.loss, self.leaves = loss, leaves

    def __call__(self) -> float:
        """One step; the old gradients are dropped first."""
        for x in self.leaves:
            x.grad = None
        value = self.loss()
        value.backward()
        return float(value.detach())

    def memory(self) -> dict[str, str]:
        """Peak memory of one step, and the part of it that is not gradients of the leaves."""
        for x in self.leaves:
            x.grad = None  # outside the measured call: freeing blocks that the profiler never saw would confuse it
        peak = peak_memory(self)
        gradients = 0.0
        for x in self.leaves:
            if x.grad is not None:
                dense = x.grad.coalesce().values() if x.grad.is_sparse else x.grad
                gradients += dense.nbytes / 2**20
        return {"peak memory, MiB": f"{peak:.1f}", "without gradients": f"{peak - gradients:.1f}"}


def table(title: str, workload: str, steps: dict[str, Step], peer: str, **options: object) -> Table:
    memory = {name: one.memory() for name, one in steps.items()}
    packages = ("torch", PML) if installed("pytorch_metric_learning") else ("torch",)
    return compare(title, workload, steps, peer=peer, packages=packages, extra=memory, **options)  # type: ignore[arg-type]


def error(value: Tensor, exact: Tensor) -> float:
    return float((value.detach().double() - exact).norm() / exact.norm())


def precision() -> list[str]:
    """Loss and gradient of the margin head against float64, at random and at well separated classes."""
    remarks = []
    for name, noise in (("random rows", None), ("well separated classes", 0.05)):
        g = torch.Generator().manual_seed(1)
        weight = torch.randn(2000, 128, generator=g)
        labels = torch.randint(2000, (128,), generator=g)
        z = torch.randn(128, 128, generator=g)
        z = z if noise is None else weight[labels] + noise * z
        results = []
        for dtype in (torch.float32, torch.float64):
            a, b = z.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()
            loss = margin_softmax_loss(a, b, labels)
            results.append((loss.detach(), *torch.autograd.grad(loss, (a, b))))
        errors = [error(low, exact) for low, exact in zip(*results, strict=True)]
        remarks.append(
            f"Relative error against float64 on {name} (B 128, D 128, C 2000): loss {errors[0]:.1e}, gradient of z "
            f"{errors[1]:.1e}, gradient of W {errors[2]:.1e}."
        )
    return remarks


def margin_head() -> Table:
    rows, width, classes = 256, 128, 100_000
    torch.manual_seed(0)
    z = torch.randn(rows, width, requires_grad=True)
    weight = torch.randn(classes, width).mul_(0.05).requires_grad_()
    labels = torch.randint(classes, (rows,))

    def plain() -> Tensor:
        c = F.linear(F.normalize(z), F.normalize(weight))
        c = c.scatter_add(1, labels[:, None], torch.full((rows, 1), -0.35))
        return F.cross_entropy(30 * c, labels)

    steps: dict[str, Step] = {}
    if installed("pytorch_metric_learning"):
        from pytorch_metric_learning.losses import CosFaceLoss

        peer = CosFaceLoss(num_classes=classes, embedding_size=width, margin=0.35, scale=30.0)
        with torch.no_grad():
            peer.W.copy_(weight.T)
        steps["pytorch-metric-learning CosFaceLoss"] = Step(lambda: peer(z, labels), z, peer.W)
    sampled = MarginSoftmax(width, classes, sample_rate=0.1)
    sparse = MarginSoftmax(width, classes, sample_rate=0.1, sparse_grad=True)
    steps |= {
        "plain torch": Step(plain, z, weight),
        "margin_softmax_loss am": Step(lambda: margin_softmax_loss(z, weight, labels), z, weight),
        "margin_softmax_loss arc, scale 64": Step(
            lambda: margin_softmax_loss(z, weight, labels, "arc", 64.0, 0.5), z, weight
        ),
        "MarginSoftmax, sample_rate .1": Step(lambda: sampled(z, labels), z, sampled.weight),
        "MarginSoftmax, sample_rate .1, sparse gradient": Step(lambda: sparse(z, labels), z, sparse.weight),
    }
    return table(
        "Margin softmax head",
        f"B {rows}, D {width}, C {classes}, float32, forward and backward.",
        steps,
        "pytorch-metric-learning CosFaceLoss",
        repeats=5,
        remarks=precision(),
    )


def ce_views(z: Tensor, temperature: float) -> Tensor:
    u = F.normalize(z, dim=1)
    scores = (u @ u.T / temperature).fill_diagonal_(-math.inf)
    return F.cross_entropy(scores, (torch.arange(len(z)) + len(z) // 2) % len(z))


def views(pairs: int) -> Table:
    torch.manual_seed(0)
    z = torch.randn(2 * pairs, 128, requires_grad=True)
    labels = torch.arange(pairs).repeat(2)
    steps: dict[str, Step] = {}
    remarks = []
    if installed("pytorch_metric_learning") and pairs <= 64:  # cubic: seconds and gigabytes at 2N = 512
        from pytorch_metric_learning.losses import NTXentLoss

        peer = NTXentLoss(0.07)
        steps["pytorch-metric-learning NTXentLoss"] = Step(lambda: peer(z, labels), z)
    elif installed("pytorch_metric_learning"):
        remarks.append("pytorch-metric-learning is O(N^3): timed at 2N = 128, and in a table of its own at 512.")
    steps |= {
        "F.cross_entropy form": Step(lambda: ce_views(z, 0.07), z),
        "nt_xent info": Step(lambda: nt_xent(*z.split(pairs), 0.07, "info"), z),
        "nt_xent flat": Step(lambda: nt_xent(*z.split(pairs), 0.07), z),
    }
    return table(
        f"SimCLR layout, 2N = {2 * pairs}",
        "D 128, temperature .07, float32, forward and backward.",
        steps,
        "F.cross_entropy form",
        repeats=5 if pairs > 500 else 41,
        remarks=remarks,
    )


def views_once() -> Table | None:
    """One call of the cubic peer is seconds long; both sides once, at 2N = 512."""
    if not installed("pytorch_metric_learning"):
        return None
    from pytorch_metric_learning.losses import NTXentLoss

    torch.manual_seed(0)
    z = torch.randn(512, 128, requires_grad=True)
    labels, peer = torch.arange(256).repeat(2), NTXentLoss(0.07)
    steps = {
        "pytorch-metric-learning NTXentLoss": Step(lambda: peer(z, labels), z),
        "nt_xent info": Step(lambda: nt_xent(*z.split(256), 0.07, "info"), z),
    }
    return table(
        "SimCLR layout, 2N = 512, against the cubic peer",
        "D 128, temperature .07, float32, forward and backward.",
        steps,
        "pytorch-metric-learning NTXentLoss",
        repeats=3,
    )


def pairs_in_batch() -> Table:
    torch.manual_seed(0)
    q, k = (torch.randn(512, 256, requires_grad=True) for _ in range(2))
    target = torch.arange(512)

    def plain() -> Tensor:
        scores = (F.normalize(q, dim=1) @ F.normalize(k, dim=1).T - 0.2 * torch.eye(512)) * 20
        return (F.cross_entropy(scores, target) + F.cross_entropy(scores.T, target)) / 2

    return table(
        "In-batch negatives, both directions",
        "N 512, D 256, scale 20, margin .2, float32, forward and backward.",
        {
            "F.cross_entropy form": Step(plain, q, k),
            "info_nce symmetric": Step(lambda: info_nce(q, k, temperature=0.05, margin=0.2, symmetric=True), q, k),
        },
        "F.cross_entropy form",
        repeats=41,
    )


def on_scores() -> Table:
    torch.manual_seed(0)
    scores = (5 * torch.randn(512, 4096)).requires_grad_()
    target = torch.randint(4096, (512,))
    return table(
        "Given scores",
        "N 512, K 4096, float32, forward and backward.",
        {
            "F.cross_entropy": Step(lambda: F.cross_entropy(scores, target), scores),
            "flat_cross_entropy": Step(lambda: flat_cross_entropy(scores, target), scores),
            "flat_cross_entropy info": Step(lambda: flat_cross_entropy(scores, target, mode="info"), scores),
        },
        "F.cross_entropy",
        repeats=15,
    )


def run() -> list[Table]:
    """All comparisons of this room."""
    once = views_once()
    cubic = [once] if once else []
    return [margin_head(), views(64), views(256), *cubic, views(2048), pairs_in_batch(), on_scores()]
