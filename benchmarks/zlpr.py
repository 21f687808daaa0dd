"""Multi-label softmax against the forms in common use: forward and backward, one thread."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.harness import Table, compare, peak_memory
from benchmarks.losses import Step
from kexue.losses import linear_zlpr, zlpr_loss

SECTION = "Multi-label softmax"
ROWS, LABELS, POSITIVES = 256, 10_000, 5
DENSE, SPARSE = "common dense form", "published sparse form"


def dense_form(scores: Tensor, target: Tensor) -> Tensor:
    """The form that most copies have: -1e12 on the other side's scores, a column of zeros, two logsumexp."""
    turned = (1 - 2 * target) * scores
    zero = torch.zeros_like(scores[:, :1])
    negative = torch.cat([turned - target * 1e12, zero], 1)
    positive = torch.cat([turned - (1 - target) * 1e12, zero], 1)
    return (torch.logsumexp(negative, 1) + torch.logsumexp(positive, 1)).mean()


def sparse_form(scores: Tensor, indices: Tensor) -> Tensor:
    """The published sparse form: the positives are subtracted from the sum over all scores, clamped at 1e-7."""
    zero = torch.zeros_like(scores[:, :1])
    scores = torch.cat([scores, zero], 1)
    chosen = scores.gather(1, indices)
    every = torch.logsumexp(scores, 1)
    share = torch.exp(torch.logsumexp(chosen, 1) - every)
    negative = every + torch.log(torch.clamp(1 - share, 1e-7, 1))
    return (torch.logsumexp(torch.cat([-chosen, zero], 1), 1) + negative).mean()


def soft_form(scores: Tensor, target: Tensor) -> Tensor:
    """Soft labels through log t and log(1 - t)."""
    zero = torch.zeros_like(scores[:, :1])
    negative = torch.cat([scores + torch.log(1 - target), zero], 1)
    positive = torch.cat([torch.log(target) - scores, zero], 1)
    return (torch.logsumexp(negative, 1) + torch.logsumexp(positive, 1)).mean()


def data() -> tuple[Tensor, Tensor, Tensor]:
    """Scores, label indices, and the same labels as a float multi-hot target."""
    torch.manual_seed(0)
    scores = torch.randn(ROWS, LABELS, requires_grad=True)
    indices = torch.rand(ROWS, LABELS).topk(POSITIVES).indices
    return scores, indices, torch.zeros(ROWS, LABELS).scatter_(1, indices, 1.0)


def in_logits(steps: dict[str, Step], logits: Tensor) -> dict[str, dict[str, str]]:
    """Peak memory of one step of each, in units of the logits."""
    out = {}
    for name, step in steps.items():
        for leaf in step.leaves:
            leaf.grad = None
        out[name] = {"peak memory, logits": f"{peak_memory(step) * 2**20 / logits.nbytes:.2f}"}
    return out


def precision() -> str:
    """The sparse forms against float64, where positives are confident."""
    g = torch.Generator().manual_seed(0)
    indices = torch.rand(64, 2000, generator=g).topk(POSITIVES).indices
    parts = []
    for level in (8.0, 12.0, 16.0, 30.0):
        scores = torch.randn(64, 2000, generator=g).sub_(6).scatter_(1, indices, level)
        wide = scores.double().requires_grad_()
        exact = zlpr_loss(wide, indices, indices=True)
        want = torch.autograd.grad(exact, wide)[0]
        errors = []
        for form in (sparse_form, lambda s, i: zlpr_loss(s, i, indices=True)):
            leaf = scores.clone().requires_grad_()
            loss = form(leaf, indices)
            grad = torch.autograd.grad(loss, leaf)[0].double()
            value = abs(float(loss.detach()) - float(exact.detach())) / float(exact.detach())
            errors.append(f"{value:.0e} and {float((grad - want).norm() / want.norm()):.0e}")
        parts.append(f"at {level:g}: {errors[0]} ({SPARSE}), {errors[1]} (zlpr_loss)")
    return (
        "Relative errors of loss and gradient against float64, float32, 5 positives at a score, 2000 negatives "
        f"from N(-6, 1): {'; '.join(parts)}."
    )


def low_precision() -> str:
    """Loss and gradient in bf16 and fp16 against float64 on the same rounded scores."""
    g = torch.Generator().manual_seed(0)
    base = 8 * torch.randn(64, 2000, generator=g)
    indices = torch.rand(64, 2000, generator=g).topk(POSITIVES).indices
    hot = torch.zeros(64, 2000).scatter_(1, indices, 1.0)
    parts = []
    for dtype in (torch.bfloat16, torch.float16):
        scores = base.to(dtype).requires_grad_()
        wide = scores.detach().double().requires_grad_()
        exact = zlpr_loss(wide, indices, indices=True, reduction="sum")
        want = torch.autograd.grad(exact, wide)[0]
        errors = []
        for loss in (64 * dense_form(scores, hot.to(dtype)), zlpr_loss(scores, indices, indices=True, reduction="sum")):
            grad = torch.autograd.grad(loss, scores)[0].double()
            value = abs(float(loss.detach()) - float(exact.detach())) / float(exact.detach())
            errors.append(f"{value:.0e} and {float((grad - want).norm() / want.norm()):.0e}")
        parts.append(f"{str(dtype).removeprefix('torch.')}: {errors[0]} ({DENSE}), {errors[1]} (zlpr_loss)")
    return f"Relative errors of loss and gradient on scores of scale 8: {'; '.join(parts)}."


def hard() -> Table:
    scores, indices, hot = data()
    label, mask = indices[:, 0].contiguous(), hot.bool()

    def step(loss: Callable[[], Tensor]) -> Step:
        return Step(loss, scores)

    steps = {
        DENSE: step(lambda: dense_form(scores, hot)),
        SPARSE: step(lambda: sparse_form(scores, indices)),
        "F.binary_cross_entropy_with_logits": step(lambda: F.binary_cross_entropy_with_logits(scores, hot)),
        "F.cross_entropy, one label": step(lambda: F.cross_entropy(scores, label)),
        "zlpr_loss, indices": step(lambda: zlpr_loss(scores, indices, indices=True)),
        "zlpr_loss, bool target": step(lambda: zlpr_loss(scores, mask)),
        "zlpr_loss, float target": step(lambda: zlpr_loss(scores, hot)),
    }
    memory = in_logits(steps, scores)
    remarks = [precision(), low_precision()]
    if any(map(shutil.which, ("c++", "g++", "clang++"))):
        # Compiled code allocates outside of what the profiler counts: no memory figure.
        for form, name, target in ((dense_form, DENSE, hot), (sparse_form, SPARSE, indices)):
            compiled = torch.compile(form)
            steps[f"{name}, torch.compile"] = step(lambda f=compiled, t=target: f(scores, t))  # type: ignore[misc]
    else:
        remarks.append("No C++ compiler here: torch.compile of the common forms was left out.")
    return compare(
        "Hard labels",
        f"{ROWS} x {LABELS} scores, {POSITIVES} positives in each row, float32, forward and backward.",
        steps,
        peer=DENSE,
        packages=("torch",),
        repeats=11,
        extra=memory,
        remarks=remarks,
    )


def soft() -> Table:
    scores, _, hot = data()
    target = 0.9 * hot + 0.1 / LABELS
    steps = {
        DENSE: Step(lambda: dense_form(scores, hot), scores),
        "form with log t and log(1 - t)": Step(lambda: soft_form(scores, target), scores),
        "zlpr_loss, soft labels": Step(lambda: zlpr_loss(scores, target), scores),
    }
    return compare(
        "Soft labels",
        f"{ROWS} x {LABELS} scores, smoothed labels (0/1 labels for the {DENSE}), float32, forward and backward.",
        steps,
        peer=DENSE,
        packages=("torch",),
        repeats=11,
        extra=in_logits(steps, scores),
    )


def no_gradient() -> Table:
    scores, indices, hot = data()
    scores.requires_grad_(False)

    class Value(Step):
        def __call__(self) -> float:
            with torch.no_grad():
                return float(self.loss())

    steps: dict[str, Step] = {
        DENSE: Value(lambda: dense_form(scores, hot)),
        SPARSE: Value(lambda: sparse_form(scores, indices)),
        "zlpr_loss, indices": Value(lambda: zlpr_loss(scores, indices, indices=True)),
        "zlpr_loss, float target": Value(lambda: zlpr_loss(scores, hot)),
    }
    return compare(
        "Value alone",
        f"{ROWS} x {LABELS} scores, float32, without a gradient.",
        steps,
        peer=DENSE,
        packages=("torch",),
        repeats=11,
        extra=in_logits(steps, scores),
    )


def linear_head() -> Table:
    rows, width, labels = 256, 128, 100_000
    torch.manual_seed(0)
    hidden = torch.randn(rows, width, requires_grad=True)
    weight = torch.randn(labels, width).div_(math.sqrt(width)).requires_grad_()
    bias = torch.zeros(labels, requires_grad=True)
    indices = torch.randint(labels, (rows, POSITIVES))
    leaves = (hidden, weight, bias)
    steps = {
        f"F.linear and {SPARSE}": Step(lambda: sparse_form(F.linear(hidden, weight, bias), indices), *leaves),
        "F.linear and zlpr_loss": Step(
            lambda: zlpr_loss(F.linear(hidden, weight, bias), indices, indices=True), *leaves
        ),
        "linear_zlpr": Step(lambda: linear_zlpr(hidden, weight, indices, bias), *leaves),
        "linear_zlpr, chunks of 16 MiB": Step(
            lambda: linear_zlpr(hidden, weight, indices, bias, chunk_bytes=1 << 24), *leaves
        ),
    }
    return compare(
        "Linear head",
        f"{rows} rows of width {width}, {labels} labels, {POSITIVES} positives in each row, float32, forward and "
        f"backward; the scores are {4 * rows * labels / 2**20:.0f} MiB.",
        steps,
        peer=f"F.linear and {SPARSE}",
        packages=("torch",),
        repeats=5,
        extra={name: step.memory() for name, step in steps.items()},
    )


def run() -> list[Table]:
    """All comparisons of the multi-label losses."""
    return [hard(), soft(), no_gradient(), linear_head()]
