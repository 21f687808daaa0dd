"""Gradient normalisation: what it does to a critic, and what a GAN gains from it.

1. The score. A GN critic trained on scikit-learn's digits: the slope inside cells, and the jump of the score on
   segments between real and generated rows (GN is discontinuous where two cells meet).
2. Digits (full version only). Eight methods, equal networks and steps, three seeds: Frechet distance of the features
   of a classifier. "projection" is <grad D / |grad D|, x>, which the article tries to tell GN's principle from its
   effect.
3. A ring of eight normals (full version only), one seed, with and without a bound on the generator's output: modes,
   share within four standard deviations, exact Wasserstein distance. Reported, not judged.

Rule, fixed before measuring. (a) The largest slope of GN inside cells is at most 1 + 1e-4; (b) its score jumps by more
than 0.01 somewhere; (c) GN's median distance is at most 1.3 times the best median; (d) the projection ranks last.
"reproduced": all that was run of (a) to (d) holds in the full version; "partly": (a) and (b); otherwise "not
reproduced".
"""

from __future__ import annotations

import itertools
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.neural_network import MLPClassifier
from torch import Tensor, nn

from kexue.adversarial import LipschitzCritic, LipschitzReport, lipschitz_report
from kexue.reproduce.runner import Measurement, Verdict
from kexue.stats import frechet_distance, wasserstein

CLAIM = (
    "Dividing a critic's score by the norm of its gradient plus its absolute value bounds the slope by 1 and makes "
    "better GANs than penalties or spectral normalisation; yet the score jumps, so that the bound cannot be the reason."
)
# name -> method and loss of the critic
METHODS = {
    "SGAN": ("none", "bce"),
    "WGAN, weights clipped": ("clip", "wasserstein"),
    "WGAN, spectral norm": ("sn", "wasserstein"),
    "WGAN-GP": ("gp", "wasserstein"),
    "GAN-QP": ("qp", "wasserstein"),
    "GN": ("gn", "bce"),
    "GraN": ("gran", "bce"),
}
PROJECTION = "projection"
STEPS, RING_STEPS = 600, 1500
SPREAD, RADIUS = 0.05, 2.0


def _mlp(sizes: list[int], act: nn.Module, norm: bool = False) -> nn.Sequential:
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(sizes[:-1]):
        layers += [nn.Linear(a, b), *([nn.BatchNorm1d(b)] if norm else []), act]
    return nn.Sequential(*layers, nn.Linear(sizes[-2], sizes[-1]))


class _Projection(LipschitzCritic):
    """<grad D / |grad D|, x> in place of the normalised score."""

    def _score(self, x: Tensor, first_order: bool | str) -> Tensor:
        with torch.enable_grad():
            leaf = x if x.requires_grad else x.detach().requires_grad_()
            (g,) = torch.autograd.grad(self.net(leaf).sum(), leaf, create_graph=True)
        return (g * leaf).sum(1) / (g.square().sum(1) + 1e-12).sqrt()


class _Bounded(nn.Module):
    """Keeps the generator's output within (-3, 3)."""

    def forward(self, x: Tensor) -> Tensor:
        return 3 * torch.tanh(x / 3)


def _critic(name: str, net: nn.Module) -> LipschitzCritic:
    if name == PROJECTION:
        return _Projection(net)
    method, loss = METHODS[name]
    return LipschitzCritic(net, method, loss, bound=0.1)


def _train(
    critic: LipschitzCritic, generator: nn.Module, data: Tensor, steps: int, batch: int, lr: float, seed: int
) -> float:
    """Alternate one step of each; CPU seconds."""
    g = torch.Generator().manual_seed(seed)
    optimizers = [torch.optim.Adam(m.parameters(), lr, betas=(0.5, 0.9), fused=True) for m in (critic.net, generator)]
    start = time.process_time()
    for _ in range(steps):
        with torch.no_grad():
            fake = generator(torch.randn(batch, 16, generator=g))
        real = data[torch.randint(len(data), (batch,), generator=g)]
        optimizers[0].zero_grad()
        critic.critic_loss(real, fake, generator=g).backward()
        optimizers[0].step()
        critic.constrain_()
        optimizers[1].zero_grad()
        critic.generator_loss(generator(torch.randn(batch, 16, generator=g))).backward()
        optimizers[1].step()
    return time.process_time() - start


@torch.no_grad()
def _sample(generator: nn.Module, rows: int, seed: int) -> Tensor:
    generator.eval()
    out: Tensor = generator(torch.randn(rows, 16, generator=torch.Generator().manual_seed(seed)))
    generator.train()
    return out


def _judge(images: np.ndarray, labels: np.ndarray) -> Callable[[Tensor], np.ndarray]:
    """Features: the second hidden layer of a classifier, 32 numbers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # 60 iterations are enough for features
        found = MLPClassifier((64, 32), max_iter=60, random_state=0).fit(images[:1200], labels[:1200])
    layers = list(zip(found.coefs_, found.intercepts_, strict=True))[:2]

    def features(x: Tensor) -> np.ndarray:
        h = x.double().numpy()
        for weight, bias in layers:
            h = np.maximum(h @ weight + bias, 0)
        return h

    return features


@torch.random.fork_rng(devices=[])  # the caller's random state stays as it was
def _digits(name: str, data: Tensor, steps: int, seed: int) -> tuple[LipschitzCritic, Tensor, float]:
    """A trained critic, as many generated rows as there are real ones, and CPU seconds."""
    torch.manual_seed(seed)
    generator = nn.Sequential(_mlp([16, 256, 256, 64], nn.ReLU(), norm=True), nn.Tanh())
    critic = _critic(name, _mlp([64, 256, 256, 1], nn.LeakyReLU(0.2)))
    seconds = _train(critic, generator, data, steps, 64, 5e-4, seed)
    return critic, _sample(generator, len(data), seed + 1000), seconds


@torch.random.fork_rng(devices=[])
def _ring(name: str, bounded: bool, seed: int) -> tuple[int, float, float, float]:
    """Modes, share within four standard deviations, Wasserstein distance, CPU seconds."""
    g = torch.Generator().manual_seed(0)
    angle = torch.arange(8) * torch.pi / 4
    centres = RADIUS * torch.stack([angle.cos(), angle.sin()], 1)
    data = centres[torch.randint(8, (20_000,), generator=g)] + SPREAD * torch.randn(20_000, 2, generator=g)
    torch.manual_seed(seed)
    generator = nn.Sequential(_mlp([16, 128, 128, 2], nn.ReLU()), *([_Bounded()] if bounded else []))
    critic = _critic(name, _mlp([2, 128, 128, 1], nn.LeakyReLU(0.2)))
    seconds = _train(critic, generator, data, RING_STEPS, 128, 1e-3, seed)
    made = _sample(generator, 2000, seed + 1000)
    nearest, mode = torch.cdist(made, centres).min(1)
    close = nearest < 4 * SPREAD
    counts = torch.bincount(mode[close], minlength=8)
    distance = float(wasserstein(made[:1000].double(), data[:1000].double()))
    return int((counts >= 2).sum()), float(close.double().mean()), distance, seconds


def measure(quick: bool, seed: int) -> Measurement:
    """Measure the claim; see the module for the rule.

    Args:
        quick: Only the slope and the jump, after a short training.
        seed: First of three seeds.
    """
    source = load_digits()
    images = (source.data / 8 - 1).astype(np.float32)
    data = torch.from_numpy(images)
    first = critic, made, _ = _digits("GN", data, 100 if quick else STEPS, seed)
    report = lipschitz_report(critic, data[:64], made[:64], repeats=3)
    smooth, jumps = report.slope_max <= 1 + 1e-4, report.jump_max > 0.01
    figures: dict[str, Any] = {
        "GN, largest slope inside cells": report.slope_max,
        "GN, largest jump of the score": report.jump_max,
        "GN, share of segments with a jump": report.jump_share,
        "GN, largest difference quotient": report.secant_max,
        "GN, cost of a critic step": report.cost_ratio,
        "GN, cost of a generator step": report.generator_ratio,
    }
    distances: dict[str, list[float]] = {}
    verdict: Verdict = "partly" if smooth and jumps else "not reproduced"
    if not quick:
        features = _judge(images, source.target)
        real = features(data)
        figures["two halves of the digits, distance"] = float(frechet_distance(real[::2], real[1::2]))
        seconds: dict[str, list[float]] = {}
        for name in (*METHODS, PROJECTION):
            distances[name], seconds[name] = [], []
            for s in range(seed, seed + 3):
                _, made, spent = first if (name, s) == ("GN", seed) else _digits(name, data, STEPS, s)
                distances[name].append(float(frechet_distance(real, features(made))))
                seconds[name].append(spent)
        median = {name: float(np.median(x)) for name, x in distances.items()}
        figures["digits"] = {
            "method": list(median),
            "median distance": list(median.values()),
            "smallest": [min(x) for x in distances.values()],
            "largest": [max(x) for x in distances.values()],
            "CPU s": [float(np.median(x)) for x in seconds.values()],
        }
        best = min(value for name, value in median.items() if name != PROJECTION)
        figures["GN, median distance / best"] = median["GN"] / best
        good, last = median["GN"] <= 1.3 * best, median[PROJECTION] == max(median.values())
        figures["the projection ranks last"] = "yes" if last else "no"
        contenders = [("SGAN", False), ("GN", False), ("GN", True), ("GraN", False)]
        found = [_ring(name, bounded, seed) for name, bounded in contenders]
        columns = dict(zip(("modes", "within 4 sd", "Wasserstein", "CPU s"), zip(*found, strict=True), strict=True))
        figures["ring"] = {
            "method": [f"{name}, bounded" if bounded else name for name, bounded in contenders],
            **{key: list(values) for key, values in columns.items()},
        }
        if smooth and jumps and good and last:
            verdict = "reproduced"

    note = "The distances and the ring only run in full."
    if not quick:
        note = f"Digits: {STEPS} steps, batch 64, seeds from {seed}, no method tuned. Ring: {RING_STEPS} steps."
    return Measurement(figures, verdict, lambda figure: _plot(figure, report, distances), note)


def _plot(figure: Any, report: LipschitzReport, distances: dict[str, list[float]]) -> None:
    axis = figure.add_subplot(121 if distances else 111)
    axis.plot(report.position.numpy(), report.profile.numpy(), ".", markersize=3)
    axis.set(xlabel="from a real digit (0) to a generated one (1)", ylabel="score", title="GN: the score jumps")
    if distances:
        axis = figure.add_subplot(122)
        for i, values in enumerate(distances.values()):
            axis.plot(values, [i] * 3, "o")
        axis.set_yticks(range(len(distances)), list(distances))
        axis.set_xscale("log")
        axis.set_xticks([2, 5, 10, 20, 40], ["2", "5", "10", "20", "40"])
        axis.set_xticks([], minor=True)
        axis.set(xlabel="Frechet distance of features, three seeds", title="digits")
