"""A variational autoencoder with categorical latents on scikit-learn's digits, trained with a choice of estimators."""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from kexue.stats import TemperatureSchedule, gumbel_max, gumbel_softmax, kl_to_uniform, score_function_loss

LATENTS, CLASSES, BATCH = 20, 10, 100
ESTIMATORS = ("straight-through", "soft", "score function, leave-one-out")
DRAWS = 2  # samples of each image for leave-one-out


class _Model(nn.Module):
    """64 pixels -> 20 latents of 10 classes -> 64 Bernoulli pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, LATENTS * CLASSES))
        self.decoder = nn.Sequential(nn.Linear(LATENTS * CLASSES, 128), nn.ReLU(), nn.Linear(128, 64))

    def logits(self, x: Tensor) -> Tensor:
        """Of the latents, (..., 20, 10)."""
        return self.encoder(x).unflatten(-1, (LATENTS, CLASSES))

    def distortion(self, y: Tensor, x: Tensor) -> Tensor:
        """-log p(x | y) of each image."""
        out = self.decoder(y.flatten(-2))
        return F.binary_cross_entropy_with_logits(out, x.expand_as(out), reduction="none").sum(-1)


def _loss(model: _Model, x: Tensor, estimator: str, tau: float, beta: float, g: torch.Generator) -> Tensor:
    logits = model.logits(x)
    rate = beta * kl_to_uniform(logits).sum(-1).mean()
    if estimator != ESTIMATORS[2]:
        return model.distortion(gumbel_softmax(logits, tau, estimator == ESTIMATORS[0], generator=g), x).mean() + rate
    many = logits.expand(DRAWS, *logits.shape)
    index = gumbel_max(many, generator=g)
    distortion = model.distortion(F.one_hot(index, CLASSES).to(x.dtype), x)
    logp = many.log_softmax(-1).gather(-1, index[..., None]).squeeze(-1).sum(-1)
    return distortion.mean() + rate + score_function_loss(logp, -distortion, "loo")


@torch.no_grad()
def _elbo(model: _Model, x: Tensor, g: torch.Generator) -> float:
    """With hard samples, four for each image, whatever the model was trained with."""
    logits = model.logits(x)
    index = gumbel_max(logits.expand(4, *logits.shape), generator=g)
    distortion = model.distortion(F.one_hot(index, CLASSES).to(x.dtype), x).mean()
    return -float(distortion + kl_to_uniform(logits).sum(-1).mean())


@torch.random.fork_rng(devices=[])  # the caller's random state stays as it was
def train(estimator: str, seed: int, steps: int, every: int) -> list[float]:
    """ELBO in nats for each held-out image, before training and after each ``every`` steps."""
    pixels = torch.tensor(load_digits().data / 16.0, dtype=torch.float32)
    g = torch.Generator().manual_seed(seed)
    pixels = pixels[torch.randperm(len(pixels), generator=g)]
    learned, held_out = pixels[:1500], pixels[1500:]
    torch.manual_seed(seed)
    model = _Model()
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    tau = TemperatureSchedule("exp", 1.0, 0.1, steps)
    beta = TemperatureSchedule(
        "linear", 1e-3, 1.0, steps // 2
    )  # of the rate: without it the latents are given up early
    curve = [_elbo(model, held_out, g)]
    for step in range(steps):
        x = learned[torch.randint(len(learned), (BATCH,), generator=g)]
        optimizer.zero_grad()
        _loss(model, x, estimator, tau(step), beta(step), g).backward()
        optimizer.step()
        if (step + 1) % every == 0:
            curve.append(_elbo(model, held_out, g))
    return curve
