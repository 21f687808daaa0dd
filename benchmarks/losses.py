"""Losses against the libraries people use: forward and backward, one thread."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.harness import Table, compare, installed, peak_memory
from kexue.losses import MarginSoftmax, flat_cross_entropy, info_nce, margin_softmax_loss, nt_xent
from kexue.models import RowAdam

SECTION = "Losses"
PML = "pytorch-metric-learning"


class Step:
    """Forward and backward with fresh gradients, several in a row where one is shorter than what a switch costs."""

    def __init__(self, loss: Callable[[], Tensor], *leaves: Tensor, times: int = 1) -> None:
        self.loss, self.leaves, self.times = loss, leaves, times

    def __call__(self) -> None:
        """The steps; old gradients are dropped before each."""
        for _ in range(self.times):
            for x in self.leaves:
                x.grad = None
            self.loss().backward()

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


class Training:
    """One training step of the class vectors: loss, gradient and optimizer."""

    def __init__(self, loss: Callable[[], Tensor], optimizer: torch.optim.Optimizer) -> None:
        self.loss, self.optimizer = loss, optimizer

    def __call__(self) -> None:
        self.optimizer.zero_grad()
        self.loss().backward()
        self.optimizer.step()


def training_step() -> Table:
    """What the optimizer adds: Adam over all class vectors, or over the rows that were sampled."""
    rows, width, classes = 256, 128, 100_000
    torch.manual_seed(0)
    z, labels = torch.randn(rows, width), torch.randint(classes, (rows,))

    def step(optimizer: Callable[..., torch.optim.Optimizer], **options: object) -> Training:
        head = MarginSoftmax(width, classes, **options)  # type: ignore[arg-type]
        return Training(lambda: head(z, labels), optimizer(head.parameters(), lr=1e-3))

    sampled, sparse = {"sample_rate": 0.1}, {"sample_rate": 0.1, "sparse_grad": True}
    steps: dict[str, Training] = {}
    if installed("pytorch_metric_learning"):
        from pytorch_metric_learning.losses import CosFaceLoss

        peer = CosFaceLoss(num_classes=classes, embedding_size=width, margin=0.35, scale=30.0)
        steps["pytorch-metric-learning, Adam"] = Training(
            lambda: peer(z, labels), torch.optim.Adam(peer.parameters(), 1e-3)
        )
    steps |= {
        "MarginSoftmax, Adam": step(torch.optim.Adam),
        "sample_rate .1, Adam": step(torch.optim.Adam, **sampled),
        "sample_rate .1, sparse gradient, SparseAdam": step(torch.optim.SparseAdam, **sparse),
        "sample_rate .1, sparse gradient, RowAdam": step(RowAdam, **sparse),
    }
    return compare(
        "Training step of a margin softmax head",
        f"B {rows}, D {width}, C {classes}, float32: loss, gradient and optimizer step of the class vectors.",
        steps,
        peer="MarginSoftmax, Adam",
        packages=("torch", PML) if installed("pytorch_metric_learning") else ("torch",),
        repeats=5,
    )


def ce_views(z: Tensor, temperature: float) -> Tensor:
    u = F.normalize(z, dim=1)
    scores = (u @ u.T / temperature).fill_diagonal_(-math.inf)
    return F.cross_entropy(scores, (torch.arange(len(z)) + len(z) // 2) % len(z))


def views(pairs: int, times: int, repeats: int) -> Table:
    torch.manual_seed(0)
    z = torch.randn(2 * pairs, 128, requires_grad=True)
    steps = {
        "F.cross_entropy form": Step(lambda: ce_views(z, 0.07), z, times=times),
        "nt_xent info": Step(lambda: nt_xent(*z.split(pairs), 0.07, "info"), z, times=times),
        "nt_xent flat": Step(lambda: nt_xent(*z.split(pairs), 0.07), z, times=times),
        "nt_xent flat, temperature .01": Step(lambda: nt_xent(*z.split(pairs), 0.01), z, times=times),
    }
    return table(
        f"SimCLR layout, 2N = {2 * pairs}",
        f"D 128, temperature .07, float32, forward and backward, {times} in a row.",
        steps,
        "F.cross_entropy form",
        repeats=repeats,
    )


def views_against_pml(pairs: int) -> list[Table]:
    """The cubic peer takes seconds and gigabytes at 2N = 512: in a table of its own, few times."""
    if not installed("pytorch_metric_learning"):
        return []
    from pytorch_metric_learning.losses import NTXentLoss

    torch.manual_seed(0)
    z = torch.randn(2 * pairs, 128, requires_grad=True)
    labels, peer = torch.arange(pairs).repeat(2), NTXentLoss(0.07)
    steps = {
        "pytorch-metric-learning NTXentLoss": Step(lambda: peer(z, labels), z),
        "nt_xent info": Step(lambda: nt_xent(*z.split(pairs), 0.07, "info"), z),
    }
    return [
        table(
            f"SimCLR layout, 2N = {2 * pairs}, against the cubic peer",
            "D 128, temperature .07, float32, forward and backward.",
            steps,
            "pytorch-metric-learning NTXentLoss",
            repeats=3,
        )
    ]


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
    small = [views(64, 20, 15), views(256, 5, 15), views(2048, 1, 5)]
    cubic = [*views_against_pml(64), *views_against_pml(256)]
    return [margin_head(), training_step(), *small, *cubic, pairs_in_batch(), on_scores()]
