"""Steps of constrained critics against one without constraint and against the usual code, differentiated twice."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.harness import Table, compare, peak_memory
from kexue.adversarial import LipschitzCritic

SECTION = "Lipschitz critics"
PLAIN = "no constraint"
OURS = ("qp", "clip", "sn", "gp", "r1", "div", "gn", "gran")


def mlp() -> nn.Module:
    layers = [m for width in (64, 512, 512) for m in (nn.Linear(width, 512), nn.LeakyReLU(0.2))]
    return nn.Sequential(*layers, nn.Linear(512, 1))


def conv() -> nn.Module:
    layers = [m for a, b in ((1, 64), (64, 128), (128, 256)) for m in (nn.Conv2d(a, b, 4, 2, 1), nn.LeakyReLU(0.2))]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(256 * 16, 1))


def slope(score: Tensor, x: Tensor) -> Tensor:
    """As the published codes have it: a graph of the gradient, for a second differentiation."""
    (g,) = torch.autograd.grad(score.sum(), x, create_graph=True)
    return g.flatten(1).norm(dim=1)


def gn_score(net: nn.Module, x: Tensor) -> Tensor:
    if not x.requires_grad:
        x = x.detach().requires_grad_()
    score = net(x).squeeze(1)
    return score / (slope(score, x) + score.abs())


def usual(kind: str, net: nn.Module, real: Tensor, fake: Tensor) -> Tensor:
    both, n = torch.cat([real, fake]), len(real)
    if kind == "GN":
        score = gn_score(net, both)
        return score[n:].mean() - score[:n].mean()
    score = net(both.requires_grad_(kind == "div")).squeeze(1)
    if kind == "GP":
        u = torch.rand(n, *[1] * (real.dim() - 1))
        points = (u * real + (1 - u) * fake).requires_grad_()
        penalty = 10 * (slope(net(points), points) - 1).square().mean()
    else:
        penalty = 2 * slope(score, both).pow(6).mean()
    return score[n:].mean() - score[:n].mean() + penalty


def data(shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    real, fake = torch.randn(2, *shape, generator=g)
    return real, fake * 0.5


def learner(
    net: nn.Module, loss: Callable[[], Tensor], after: Callable[[], object] = lambda: None
) -> Callable[[], None]:
    optimizer = torch.optim.Adam(net.parameters(), 1e-4, betas=(0.0, 0.9))

    def step() -> None:
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
        after()

    return step


def table(title: str, workload: str, contenders: dict[str, Callable[[], None]]) -> Table:
    memory = {name: {"peak memory, MiB": f"{peak_memory(step):.1f}"} for name, step in contenders.items()}
    found = compare(title, workload, contenders, peer=PLAIN, packages=("torch",), extra=memory)
    for row in found.rows:
        row.extra["time, no constraint = 1"] = f"{1 / row.ratio:.2f}"
    return found


def critic_step(name: str, build: Callable[[], nn.Module], shape: tuple[int, ...]) -> Table:
    real, fake = data(shape)
    contenders: dict[str, Callable[[], None]] = {}
    for method in ("none", *OURS):
        critic = LipschitzCritic(build(), method, "wasserstein")
        label = PLAIN if method == "none" else f"LipschitzCritic, {method}"
        contenders[label] = learner(critic.net, lambda critic=critic: critic.critic_loss(real, fake), critic.constrain_)
    for kind in ("GN", "GP", "div"):
        net = build()
        contenders[f"double backward, {kind}"] = learner(net, lambda k=kind, net=net: usual(k, net, real, fake))
    workload = f"{name}, {len(real)} real and {len(real)} generated rows, float32: loss, gradients, Adam; one thread."
    return table(f"Critic step, {name}", workload, contenders)


def generator_side(name: str, build: Callable[[], nn.Module], shape: tuple[int, ...]) -> Table:
    fake = data(shape)[1]

    def step(loss: Callable[[Tensor], Tensor]) -> Callable[[], None]:
        return lambda: loss(fake.clone().requires_grad_()).backward()

    contenders: dict[str, Callable[[], None]] = {}
    for method in ("none", "gn", "gran"):
        critic = LipschitzCritic(build(), method, "wasserstein")
        contenders[PLAIN if method == "none" else f"LipschitzCritic, {method}"] = step(critic.generator_loss)
    net = build().requires_grad_(False)
    contenders["double backward, GN"] = step(lambda x: -gn_score(net, x).mean())
    workload = f"{name}, {len(fake)} generated rows, float32: loss and its gradient in the rows; one thread."
    return table(f"Generator's step through the critic, {name}", workload, contenders)


def run() -> list[Table]:
    """All comparisons of this room."""
    critics = (
        ("MLP 64-512-512-512-1", mlp, (128, 64)),
        ("convolutions 1-64-128-256 on 32 x 32", conv, (32, 1, 32, 32)),
    )
    return [make(*critic) for make in (critic_step, generator_side) for critic in critics]
