"""Adversarial training: the cost of GAN-QP's critic step, the overhead of the trainer, neighbour metrics."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import torch
from scipy.spatial.distance import cdist
from torch import Tensor, nn

from benchmarks.harness import Table, compare, peak_memory
from kexue.adversarial import BiGANQP, QPCritic, QPLoss, bigan_networks, gan_networks, sample_quality
from kexue.adversarial.games import PlainGame
from kexue.adversarial.loop import Plan, Samples, play

SECTION = "Generative adversarial training"
STEPS = 100
Z = 16


def leaky(*sizes: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(sizes):
        layers += [nn.Linear(a, b), nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers[:-1])


def convolutions() -> nn.Sequential:
    layers: list[nn.Module] = []
    for a, b in ((1, 64), (64, 128), (128, 256)):
        layers += [nn.Conv2d(a, b, 5, 2, 2), nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(256 * 16, 1))


def critic_step(title: str, build: Callable[[], nn.Module], batch: int, shape: tuple[int, ...]) -> Table:
    g = torch.Generator().manual_seed(0)
    real, fake = torch.randn(batch, *shape, generator=g), torch.randn(batch, *shape, generator=g)

    def step(loss_of: Callable[[nn.Module], Tensor]) -> Callable[[], None]:
        torch.manual_seed(0)
        net = build()
        optimizer = torch.optim.Adam(net.parameters(), 1e-4, fused=True)

        def run() -> None:
            loss = loss_of(net)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        return run

    def plain(net: nn.Module) -> Tensor:
        a, b = net(torch.cat([real, fake])).chunk(2)
        return b.mean() - a.mean()

    def qp(validate: bool) -> Callable[[nn.Module], Tensor]:
        loss = QPLoss(validate=validate)
        return lambda net: QPCritic(net, loss).critic_loss(real, fake)

    contenders = {
        "Wasserstein, no constraint": step(plain),
        "GAN-QP": step(qp(True)),
        "GAN-QP, validate=False": step(qp(False)),
    }
    return compare(
        title,
        f"Forward, backward and Adam on {batch} real and {batch} fake samples, float32, one thread.",
        contenders,
        peer="Wasserstein, no constraint",
        packages=("torch",),
        repeats=31,
    )


def by_hand(loader: bool) -> Callable[[], None]:
    """GAN-QP on rows of 64, written as short as possible; with or without a DataLoader."""
    data = torch.rand(1797, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    torch.manual_seed(0)
    generator, critic = gan_networks((64,), Z)
    kinds = {} if loader else {"fused": True}
    og = torch.optim.Adam(generator.parameters(), 5e-4, betas=(0.5, 0.9), **kinds)
    od = torch.optim.Adam(critic.parameters(), 5e-4, betas=(0.5, 0.9), **kinds)
    dataset = torch.utils.data.TensorDataset(data)

    def batches() -> object:
        while True:
            if loader:
                yield from torch.utils.data.DataLoader(dataset, 64, shuffle=True, drop_last=True)
            else:
                yield (data[torch.randint(len(data), (64,))],)

    def run() -> None:
        source = iter(batches())  # type: ignore[call-overload]
        for _ in range(STEPS):
            (x,) = next(source)
            with torch.no_grad():
                fake = generator(torch.randn(64, Z))
            a, b = critic(torch.cat([x, fake])).squeeze(1).chunk(2)
            d = a - b
            loss = (-d + d * d / (20 * (x - fake).abs().mean(1) + 1e-8)).mean()
            od.zero_grad()
            loss.backward()
            od.step()
            for p in critic.parameters():
                p.requires_grad_(False)
            loss = -critic(generator(torch.randn(64, Z))).mean()
            og.zero_grad()
            loss.backward()
            og.step()
            for p in critic.parameters():
                p.requires_grad_(True)

    return run


def trainer() -> Table:
    data = torch.rand(1797, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    torch.manual_seed(0)
    generator, net = gan_networks((64,), Z)
    game = PlainGame(generator, QPCritic(net, QPLoss(validate=False)))
    plan = Plan(STEPS, 1, 64, Z, 5e-4, 5e-4, (0.5, 0.9), 0)
    samples = Samples(data, next(generator.parameters()))
    contenders = {
        "minimal loop by hand": by_hand(False),
        "loop with a DataLoader": by_hand(True),
        "AdversarialTrainer": lambda: play(game, samples, plan, show_progress=False),
    }
    return compare(
        "Trainer",
        f"GAN-QP, {STEPS} steps of MLPs 16-256-256-64 and 64-256-256-1, batch 64, one critic step, one thread.",
        contenders,
        peer="minimal loop by hand",
        packages=("torch",),
        repeats=15,
        remarks=[
            "The loop by hand looks at no loss, keeps no history and cannot be continued.",
            "The GAN libraries (torchgan, vegans) train from a DataLoader; they are not installed here.",
        ],
    )


def bigan() -> Table:
    x = torch.rand(1500, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    torch.manual_seed(0)
    generator, encoder, critic = bigan_networks((64,), Z)
    og = torch.optim.Adam([*generator.parameters(), *encoder.parameters()], 5e-4, betas=(0.5, 0.999))
    od = torch.optim.Adam(critic.parameters(), 5e-4, betas=(0.5, 0.999))

    def run() -> None:
        """The published loop: two passes through the critic, whose weights get a gradient in every step."""
        for _ in range(STEPS):
            for turn in range(3):
                real, z = x[torch.randint(len(x), (64,))], torch.randn(64, Z)
                fake, code = generator(z), encoder(real)
                if turn < 2:
                    fake, code = fake.detach(), code.detach()
                d = critic(real, code).squeeze(1) - critic(fake, z).squeeze(1)
                if turn < 2:
                    norm = 10 * ((real - fake).abs().mean(1) + (code - z).abs().mean(1))
                    loss = (-d + 0.5 * d * d / norm).mean()
                    optimizer = od
                else:
                    loss = d.mean() + 4 * (z - encoder(fake.detach())).square().mean()
                    loss = loss + 6 * (real - generator(code.detach())).square().mean()
                    optimizer = og
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()

    model = BiGANQP(z_dim=Z, lr=5e-4, show_progress=False)
    return compare(
        "BiGAN-QP",
        f"{STEPS} steps with two critic steps each on 1500 x 64, batch 64, float32, one thread.",
        {"loop as published": run, "BiGANQP.fit": lambda: model.fit(x, steps=STEPS)},
        peer="loop as published",
        packages=("torch",),
        repeats=5,
        remarks=["BiGANQP.fit also builds its networks and encodes all samples at the end."],
    )


def neighbours() -> Table:
    rng = np.random.default_rng(0)
    real, fake = rng.normal(size=(3000, 64)), rng.normal(size=(3000, 64)) * 1.1

    def full(k: int = 5) -> tuple[float, ...]:
        """The usual code: whole matrices of distances, sorted."""
        r = np.sort(cdist(real, real), 1)[:, k]
        f = np.sort(cdist(fake, fake), 1)[:, k]
        d = cdist(real, fake)
        inside = d <= r[:, None]
        return inside.any(0).mean(), (d <= f).any(1).mean(), inside.sum() / (k * len(fake)), inside.any(1).mean()

    contenders = {"cdist and sort": full, "sample_quality": lambda: sample_quality(real, fake)}
    extra = {"sample_quality": {"peak memory, MiB": f"{peak_memory(contenders['sample_quality']):.0f}"}}
    extra["cdist and sort"] = {"peak memory, MiB": f"{2 * 3000 * 3000 * 8 / 2**20:.0f} (computed)"}
    return compare(
        "Precision, recall, density, coverage",
        "3000 real and 3000 generated rows of 64 features, 5 neighbours, float64, one thread.",
        contenders,
        peer="cdist and sort",
        packages=("torch", "scipy"),
        repeats=5,
        extra=extra,
    )


def run() -> list[Table]:
    """All comparisons of this room."""
    return [
        critic_step("Critic step, MLP 64-512-512-512-1", lambda: leaky(64, 512, 512, 512, 1), 128, (64,)),
        critic_step("Critic step, convolutions 1-64-128-256 on 32 x 32", convolutions, 32, (1, 32, 32)),
        trainer(),
        bigan(),
        neighbours(),
    ]
