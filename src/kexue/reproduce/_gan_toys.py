"""Small adversarial problems: two point masses, a ring of Gaussians, and BiGAN-QP on scikit-learn's digits."""

from __future__ import annotations

import math
import time
import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kexue.adversarial import (
    AdversarialTrainer,
    BiGANQP,
    QPCritic,
    QPLoss,
    gan_networks,
    mode_coverage,
    sample_quality,
)
from kexue.adversarial.judges import Judge
from kexue.stats import frechet_distance, wasserstein

MODES, SPREAD, RADIUS = 8, 0.05, 2.0


@torch.random.fork_rng(devices=[])  # the caller's random state stays as it was
def point_masses(distance: float, lam: float, seed: int) -> tuple[float, float]:
    """Divergence of two point masses that a small critic learns: of GAN-QP, and of the usual GAN (at most log 2)."""
    alpha = torch.zeros(1, 1)
    beta = alpha + distance
    found = []
    for usual in (False, True):
        steps = 1500 if usual else 300  # the usual critic has to grow without bound
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(1, 16), nn.LeakyReLU(0.2), nn.Linear(16, 1))
        optimizer = torch.optim.Adam(net.parameters(), 0.02, fused=True)
        loss = torch.zeros(())
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = 0.02 * (1 - 0.99 * step / steps)
            a, b = net(torch.cat([alpha, beta])).chunk(2)
            if usual:
                loss = F.softplus(-a).mean() + F.softplus(b).mean()
            else:
                loss = QPLoss(lam, validate=False).critic(a, b, alpha, beta)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        value = float(loss.detach())
        found.append(math.log(2) - value / 2 if usual else -value)
    return found[0], found[1]


def ring(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Samples of a ring of Gaussians, and its centres."""
    angle = torch.arange(MODES) * (2 * math.pi / MODES)
    centres = RADIUS * torch.stack([angle.cos(), angle.sin()], 1)
    g = torch.Generator().manual_seed(seed)
    mode = torch.randint(MODES, (count,), generator=g)
    return centres[mode] + SPREAD * torch.randn(count, 2, generator=g), centres


def ring_networks(shape: tuple[int, ...], z_dim: int) -> tuple[nn.Module, nn.Module]:
    """Fully connected, 128-128, an unbounded generator without batch normalisation."""
    generator = nn.Sequential(
        nn.Linear(z_dim, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, shape[0])
    )  # fmt: skip
    return generator, gan_networks(shape, z_dim, (128, 128))[1]


@torch.random.fork_rng(devices=[])
def qp_on_ring(
    seed: int,
    steps: int,
    *,
    critic_steps: int = 1,
    lr: float = 1e-3,
    lam: float = 10.0,
    metric: str = "l1",
    beta: float = 0.9,
) -> tuple[dict[str, float], Tensor]:
    """Modes found, share of samples within 4 standard deviations of one, exact W1, CPU seconds; and samples."""
    data, centres = ring(20_000, 0)
    torch.manual_seed(seed)
    generator, net = ring_networks((2,), 16)
    trainer = AdversarialTrainer(
        generator, QPCritic(net, QPLoss(lam, metric, validate=False)), 16, critic_steps=critic_steps, batch_size=128,
        lr=lr, betas=(0.5, beta), random_state=seed, show_progress=False,
    )  # fmt: skip
    start = time.process_time()
    fake = trainer.fit(data, steps).sample(2000, seed)
    seconds = time.process_time() - start
    found = mode_coverage(fake, centres, 4 * SPREAD)
    w1 = float(wasserstein(fake[:1000].double(), data[:1000].double()))
    return {"modes": found.modes, "within 4 sd": found.inside, "W1": w1, "CPU s": seconds}, fake


def digits() -> tuple[Tensor, Any]:
    """The digits in [-1, 1] as rows of 64, and a judge trained on 1200 of them."""
    from sklearn.datasets import load_digits
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.neural_network import MLPClassifier

    data = load_digits()
    x = (data.data / 8 - 1).astype(np.float32)
    judge = MLPClassifier((64, 32), max_iter=60, random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        judge.fit(x[:1200], data.target[:1200])
    return torch.from_numpy(x), judge


def bigan_on_digits(
    x: Tensor, judge: Any, labels: np.ndarray, seed: int, steps: int, stop_gradient: bool
) -> tuple[dict[str, float], np.ndarray]:
    """Quality of samples, codes and reconstructions of unseen digits; and pairs of pictures (2, n, 8, 8)."""
    from sklearn.neighbors import KNeighborsClassifier

    train, held = x[:1500], x[1500:]
    model = BiGANQP(z_dim=16, lr=5e-4, stop_gradient=stop_gradient, random_state=seed, show_progress=False)
    start = time.process_time()
    model.fit(train, steps=steps)
    seconds = time.process_time() - start
    seen = Judge(judge)
    fake = torch.from_numpy(model.sample(len(x), seed))
    real, features = seen.features(x), seen.features(fake)
    quality = sample_quality(real, features)
    back = model.inverse_transform(model.transform(held))
    z = np.random.default_rng(seed).normal(size=(len(x), 16)).astype(np.float32)
    codes = model.transform(x)
    neighbours = KNeighborsClassifier(5).fit(codes[:1500], labels[:1500])
    return {
        "FID": float(frechet_distance(real, features)),
        "precision": quality.precision,
        "recall": quality.recall,
        "coverage": quality.coverage,
        "classes": float(seen.classes_found(fake) or 0),
        "x-MSE": float(np.square(back - held.numpy()).mean()),
        "z-MSE": float(np.square(model.transform(model.inverse_transform(z)) - z).mean()),
        "5-NN on codes": float(neighbours.score(codes[1500:], labels[1500:])),
        "code std": float(codes.std()),
        "CPU s": seconds,
    }, np.stack([held[:16].numpy(), back[:16]]).reshape(2, -1, 8, 8)
