"""Gradient flows against torchdiffeq, with the same gradients on both sides."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.harness import Table, compare, installed
from kexue.training import GradientFlow, quadratic_flow

SECTION = "Gradient flow"
PEER = "torchdiffeq odeint"
STEPS, H = 1000, 1e-3


def peer(gradient: Callable[[Tensor], Tensor], x: Tensor, steps: int, h: float, every: bool = False) -> Tensor:
    """Euler's method of torchdiffeq: the state at the end, or at every step."""
    from torchdiffeq import odeint

    ends = torch.linspace(0, steps * h, steps + 1 if every else 2, dtype=torch.float64)
    return odeint(lambda _, y: -gradient(y), x, ends, method="euler", options={"step_size": h})


def by_autograd(loss: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The gradient of a loss of a tensor, as users of torchdiffeq write it."""

    def gradient(y: Tensor) -> Tensor:
        with torch.enable_grad():
            y = y.detach().requires_grad_()
            return torch.autograd.grad(loss(y), y)[0]

    return gradient


def difference(a: Tensor, b: Tensor) -> dict[str, str]:
    return {"largest difference from Euler's method": f"{float((a - b).abs().max()):.1e}"}


def small() -> list[Table]:
    """A quadratic in three dimensions: the cost of the calls decides."""
    a = torch.diag(torch.tensor([1.0, 4.0, 9.0], dtype=torch.float64))
    start = torch.tensor([1.0, -1.0, 0.5], dtype=torch.float64)
    x = start.clone().requires_grad_()

    def loss(y: Tensor) -> Tensor:
        return 0.5 * y @ (a @ y)

    automatic = GradientFlow(lambda: loss(x), x)
    closed = GradientFlow(lambda: loss(x), x, grad_fn=lambda: a @ x)
    span, work = STEPS * H, f"f = x^T A x / 2, D 3, float64, {STEPS} steps of Euler's method, one thread"

    def bare() -> Tensor:
        y = start.clone()
        for _ in range(STEPS):
            y = y - H * (a @ y)
        return y

    tables = []
    for title, save, every in (("the end kept", 0, False), ("every point kept", 1, True)):
        ours: dict[str, Callable[[], Tensor]] = {
            "GradientFlow, autograd": lambda save=save: automatic.integrate(span, H, save_every=save).points,
        }
        if installed("torchdiffeq"):
            ours = {PEER: lambda every=every: peer(by_autograd(loss), start, STEPS, H, every), **ours}
        end = ours[PEER]() if PEER in ours else automatic.integrate(span, H, save_every=save).points
        tables.append(
            compare(
                f"Three dimensions, gradient by autograd, {title}",
                f"{work}; losses too in GradientFlow.",
                ours,
                peer=PEER,
                packages=("torch", *(["torchdiffeq"] if installed("torchdiffeq") else [])),
                repeats=7,
                extra={name: difference(run(), end) for name, run in ours.items()},
            )
        )
    forms: dict[str, Callable[[], Tensor]] = {
        "GradientFlow, grad_fn": lambda: closed.integrate(span, H, save_every=0).final,
        "quadratic_flow (exact)": lambda: quadratic_flow(a, start, span),
        "limit: a bare loop": bare,
    }
    if installed("torchdiffeq"):
        forms = {PEER: lambda: peer(lambda y: a @ y, start, STEPS, H)[-1], **forms}
    end = bare()
    tables.append(
        compare(
            "Three dimensions, gradient in closed form",
            f"{work}; the end kept.",
            forms,
            peer=PEER,
            packages=("torch", *(["torchdiffeq"] if installed("torchdiffeq") else [])),
            repeats=7,
            remarks=["quadratic_flow has no error: the difference is that of Euler's method."],
            extra={name: difference(run(), end) for name, run in forms.items()},
        )
    )
    return tables


def large() -> list[Table]:
    """A million parameters in one tensor with a cheap gradient, and an MLP of many tensors."""
    count, steps, h = 1_000_000, 50, 1e-3
    scale = torch.linspace(0.5, 5.0, count)
    start = torch.randn(count, generator=torch.Generator().manual_seed(0))
    x = start.clone().requires_grad_()

    def loss(y: Tensor) -> Tensor:
        return (scale * y * y).sum() * 0.5

    automatic = GradientFlow(lambda: loss(x), x)
    closed = GradientFlow(lambda: loss(x), x, grad_fn=lambda: scale * x)
    torch.manual_seed(0)
    model = nn.Sequential(*(layer for _ in range(6) for layer in (nn.Linear(400, 400), nn.Tanh())))
    inputs, targets = torch.randn(32, 400), torch.randn(32, 400)
    names = [name for name, _ in model.named_parameters()]
    shapes = [p.shape for p in model.parameters()]
    vector = torch.cat([p.detach().flatten() for p in model.parameters()])

    def model_loss(y: Tensor) -> Tensor:
        parts = [v.view(s) for v, s in zip(y.split([s.numel() for s in shapes]), shapes, strict=True)]
        out = torch.func.functional_call(model, dict(zip(names, parts, strict=True)), (inputs,))
        return F.mse_loss(out, targets)

    network = GradientFlow(lambda: F.mse_loss(model(inputs), targets), model.parameters())

    def network_end() -> Tensor:
        return torch.cat([p.flatten() for p in network.integrate(steps * h, h, save_every=0).final])

    tables = []
    cases: list[tuple[str, str, Callable[[], Tensor], Callable[[], Tensor]]] = [
        (
            "A million parameters, gradient by autograd",
            "f = sum a_i x_i^2 / 2, one tensor",
            lambda: peer(by_autograd(loss), start, steps, h)[-1],
            lambda: automatic.integrate(steps * h, h, save_every=0).final,
        ),
        (
            "A million parameters, gradient in closed form",
            "f = sum a_i x_i^2 / 2, one tensor",
            lambda: peer(lambda y: scale * y, start, steps, h)[-1],
            lambda: closed.integrate(steps * h, h, save_every=0).final,
        ),
        (
            "An MLP of a million parameters, gradient by autograd",
            "6 layers of width 400, batch 32, 12 tensors",
            lambda: peer(by_autograd(model_loss), vector, steps, h)[-1],
            network_end,
        ),
    ]
    for title, work, theirs, ours in cases:
        contenders = {PEER: theirs, "GradientFlow": ours} if installed("torchdiffeq") else {"GradientFlow": ours}
        end = next(iter(contenders.values()))()
        tables.append(
            compare(
                title,
                f"{work}, float32, {steps} steps of Euler's method, one thread; the end kept.",
                contenders,
                peer=PEER,
                packages=("torch", *(["torchdiffeq"] if installed("torchdiffeq") else [])),
                repeats=5,
                extra={name: difference(run(), end) for name, run in contenders.items()},
            )
        )
    return tables


def run() -> list[Table]:
    """All comparisons."""
    return [*small(), *large()]
