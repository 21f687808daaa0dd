"""Sparse softmax losses against dense cross entropy, the usual top-k forms, entmax, and heads in chunks."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.harness import Table, compare, installed
from benchmarks.losses import Step
from kexue.losses import (
    linear_cross_entropy,
    linear_sparse_cross_entropy,
    sparse_cross_entropy,
)

SECTION = "Sparse softmax"
K = 10
DENSE = "F.cross_entropy"
DENSE_HEAD = "F.linear and F.cross_entropy"


def naive(scores: Tensor, target: Tensor) -> Tensor:
    """The form that is written by hand: topk and logsumexp, the rest by autograd."""
    chosen = scores.gather(1, target.unsqueeze(1)).squeeze(1)
    return (scores.topk(K, dim=1).values.logsumexp(1) - chosen).mean()


class _ByHand(torch.autograd.Function):
    """The same with its gradient written out: zeros, and k + 1 entries."""

    @staticmethod
    def forward(ctx, scores, target):  # type: ignore[no-untyped-def]
        values, index = scores.topk(K, dim=1, sorted=False)
        total = values.logsumexp(1)
        ctx.save_for_backward(index, (values - total.unsqueeze(1)).exp(), target)
        ctx.shape = scores.shape
        return (total - scores.gather(1, target.unsqueeze(1)).squeeze(1)).mean()

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        index, chance, target = ctx.saved_tensors
        out = chance.new_zeros(ctx.shape)
        out.scatter_(1, index, chance * grad / len(target))
        return out.scatter_add_(1, target.unsqueeze(1), (-grad / len(target)).expand(len(target), 1)), None


def data(rows: int, classes: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(rows, classes, requires_grad=True), torch.randint(classes, (rows,))


def scores_table(rows: int, classes: int) -> Table:
    scores, target = data(rows, classes)
    sharp = (8 * scores.detach()).requires_grad_()  # of flat scores a nucleus is half the vocabulary
    steps = {
        DENSE: Step(lambda: F.cross_entropy(scores, target), scores),
        "topk and logsumexp": Step(lambda: naive(scores, target), scores),
        "topk, gradient by hand": Step(lambda: _ByHand.apply(scores, target), scores),
        "sparse_cross_entropy": Step(lambda: sparse_cross_entropy(scores, target, k=K), scores),
        "sparse_cross_entropy, k = 100": Step(lambda: sparse_cross_entropy(scores, target, k=100), scores),
        "sparse_cross_entropy, p = .9, scores times 8": Step(lambda: sparse_cross_entropy(sharp, target, p=0.9), sharp),
    }
    if installed("entmax"):
        from entmax import entmax15_loss, sparsemax_loss

        steps["entmax: sparsemax_loss, k = 100"] = Step(lambda: sparsemax_loss(scores, target, k=100).mean(), scores)
        steps["entmax: entmax15_loss, k = 100"] = Step(lambda: entmax15_loss(scores, target, k=100).mean(), scores)
    return compare(
        f"Loss of {rows} x {classes} scores",
        f"{rows} x {classes} scores, k = {K}, float32, forward and backward, one thread.",
        steps,
        peer=DENSE,
        packages=("torch", "entmax") if installed("entmax") else ("torch",),
        extra={name: step.memory() for name, step in steps.items()},
    )


def head_table(rows: int, width: int, vocabulary: int, repeats: int) -> Table:
    torch.manual_seed(0)
    hidden = torch.randn(rows, width, requires_grad=True)
    weight = torch.randn(vocabulary, width).div_(math.sqrt(width)).requires_grad_()
    target = torch.randint(vocabulary, (rows,))

    def step(loss) -> Step:  # type: ignore[no-untyped-def]
        return Step(lambda: loss(hidden, weight, target), hidden, weight)

    steps = {
        DENSE_HEAD: step(lambda h, w, y: F.cross_entropy(F.linear(h, w), y)),
        "F.linear, topk and logsumexp": step(lambda h, w, y: naive(F.linear(h, w), y)),
        "F.linear and sparse_cross_entropy": step(lambda h, w, y: sparse_cross_entropy(F.linear(h, w), y, k=K)),
        "linear_cross_entropy (dense, chunks)": step(linear_cross_entropy),
        "linear_sparse_cross_entropy": step(lambda h, w, y: linear_sparse_cross_entropy(h, w, y, k=K)),
        "linear_sparse_cross_entropy, sparse_grad": step(
            lambda h, w, y: linear_sparse_cross_entropy(h, w, y, k=K, sparse_grad=True)
        ),
    }
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):
        options = torch.nn.LinearCrossEntropyOptions()
        steps["F.linear_cross_entropy (dense, chunks)"] = step(
            lambda h, w, y: F.linear_cross_entropy(h, w, y, options=options)
        )
    memory = {name: one.memory() for name, one in steps.items()}

    class Product(Step):
        def __call__(self) -> None:
            with torch.no_grad():
                F.linear(hidden, weight)

    steps["the product of F.linear alone"] = Product(lambda: hidden)
    return compare(
        f"Head of {rows} x {width} to {vocabulary}",
        f"{rows} x {width} rows, a table of {vocabulary}, k = {K}, float32, forward and backward, one thread.",
        steps,
        peer=DENSE_HEAD,
        packages=("torch",),
        repeats=repeats,
        extra=memory,
    )


def precision() -> str:
    """The naive form and ours in bf16 against float64, where the target has nearly all the mass."""
    g = torch.Generator().manual_seed(0)
    target = torch.arange(64)
    base = torch.randn(64, 2000, generator=g).scatter_(1, target[:, None], 12.0)
    scores = base.bfloat16().requires_grad_()
    wide = scores.detach().double().requires_grad_()
    exact = naive(wide, target)
    (want,) = torch.autograd.grad(exact, wide)
    errors = []
    for form in (naive, sparse_cross_entropy):
        loss = form(scores, target)
        (grad,) = torch.autograd.grad(loss, scores)
        value = abs(float(loss.detach()) - float(exact.detach())) / float(exact.detach())
        errors.append(f"{value:.0e} and {float((grad.double() - want).norm() / want.norm()):.0e}")
    return (
        "Relative errors of loss and gradient in bf16, target 12 above 2000 scores from N(0, 1): "
        f"{errors[0]} (topk and logsumexp), {errors[1]} (sparse_cross_entropy)."
    )


def run() -> list[Table]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        tables = [scores_table(512, 1000), scores_table(512, 21_128), head_table(512, 256, 21_128, 7)]
        tables.append(head_table(2048, 256, 21_128, 3))
        tables[1].remarks.append(precision())
        return tables
    finally:
        torch.set_num_threads(threads)
