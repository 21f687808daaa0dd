"""Soft-label ZLPR: its optimum gives the labels back as sigmoid(2 s), and what that means for probabilities.

1. Optimum. Free scores for one row of 8 random labels in (0, 1), minimised by LBFGS in float64 from 100 random starts
   (normal, standard deviation 3); the loss is convex, so all starts must end in one point.
2. Probabilities on unseen rows. 20 Gaussian features, 20 labels that are drawn with probability
   sigmoid(x W - 1.5), 4000 rows for training and 4000 for testing, a linear model, Adam, 40 epochs, three seeds.
   Trained with the probabilities themselves as soft labels (as in distillation), and with the drawn 0/1 labels.
   Expected calibration error (15 bins) and mean negative log-likelihood on drawn test labels for sigmoid(2 s) and
   sigmoid(s), and for binary cross-entropy.

Rule, fixed before measuring. "reproduced": the largest |sigmoid(2 s) - t| of part 1 over all starts is below 1e-6;
"partly": below 1e-3; otherwise "not reproduced". Part 2 is not judged.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from kexue.losses import zlpr_loss, zlpr_proba
from kexue.reproduce.runner import Measurement, Verdict

CLAIM = (
    "With soft labels t the loss log(1 + sum t exp(-s)) + log(1 + sum (1 - t) exp(s)) is least at t = sigmoid(2 s): "
    "the labels are given back, and probabilities are sigmoid(2 s)."
)
BINS = 15
Run = tuple[np.ndarray, np.ndarray]


def _optimum(t: Tensor, start: Tensor) -> Tensor:
    """Scores (1, n) that minimise the loss."""
    s = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [s], max_iter=300, tolerance_grad=1e-14, tolerance_change=1e-16, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = zlpr_loss(s, t)
        loss.backward()
        return loss

    optimizer.step(closure)
    return s.detach()


def _problem(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Features (8000, 20), probabilities and drawn labels (8000, 20)."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(8000, 20, generator=g)
    p = torch.sigmoid(x @ torch.randn(20, 20, generator=g) * 0.5 - 1.5)
    return x, p, torch.bernoulli(p, generator=g)


def _fit(loss: Callable[[Tensor, Tensor], Tensor], x: Tensor, t: Tensor, seed: int, epochs: int) -> Tensor:
    """Test scores of a linear model."""
    g = torch.Generator().manual_seed(seed)
    weight = torch.zeros(20, 20, requires_grad=True)
    bias = torch.zeros(20, requires_grad=True)
    optimizer = torch.optim.Adam([weight, bias], 1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for _ in range(epochs):
        for rows in torch.randperm(4000, generator=g).split(100):
            optimizer.zero_grad()
            loss(x[rows] @ weight + bias, t[rows]).backward()
            optimizer.step()
        schedule.step()
    with torch.no_grad():
        return x[4000:] @ weight + bias


def _calibration(p: np.ndarray, y: np.ndarray) -> tuple[float, float, Run]:
    """Expected calibration error, mean negative log-likelihood, and (mean probability, frequency) of each bin."""
    index = np.minimum((p * BINS).astype(int), BINS - 1)
    count = np.bincount(index, minlength=BINS)
    used = count > 0
    mean = np.bincount(index, p, BINS)[used] / count[used]
    share = np.bincount(index, y, BINS)[used] / count[used]
    error = float((count[used] * np.abs(mean - share)).sum() / count.sum())
    safe = np.clip(p, 1e-12, 1 - 1e-12)
    return error, float(-(y * np.log(safe) + (1 - y) * np.log(1 - safe)).mean()), (mean, share)


def measure(quick: bool, seed: int) -> Measurement:
    """Measure the claim; see the module for the rule.

    Args:
        quick: 10 starts; one seed and 10 epochs for the probabilities.
        seed: First of three seeds.
    """
    starts, epochs, seeds = (10, 10, [seed]) if quick else (100, 40, [seed, seed + 1, seed + 2])
    g = torch.Generator().manual_seed(seed)
    t = torch.rand(1, 8, generator=g, dtype=torch.float64)
    found = torch.cat([_optimum(t, 3 * torch.randn(1, 8, generator=g, dtype=torch.float64)) for _ in range(starts)])
    twice = float((zlpr_proba(found) - t).abs().max())
    once = float((torch.sigmoid(found) - t).abs().max())

    forms: dict[tuple[str, str], tuple[Callable[[Tensor, Tensor], Tensor], bool, Callable[[Tensor], Tensor]]] = {
        ("soft", "ZLPR, sigmoid(2 s)"): (zlpr_loss, True, zlpr_proba),
        ("soft", "ZLPR, sigmoid(s)"): (zlpr_loss, True, torch.sigmoid),
        ("soft", "BCE, sigmoid(s)"): (F.binary_cross_entropy_with_logits, True, torch.sigmoid),
        ("drawn", "ZLPR, sigmoid(2 s)"): (zlpr_loss, False, zlpr_proba),
        ("drawn", "ZLPR, sigmoid(s)"): (zlpr_loss, False, torch.sigmoid),
        ("drawn", "BCE, sigmoid(s)"): (F.binary_cross_entropy_with_logits, False, torch.sigmoid),
    }
    errors: dict[tuple[str, str], list[tuple[float, float]]] = {key: [] for key in forms}
    curves: dict[tuple[str, str], Run] = {}
    for s in seeds:
        x, p, y = _problem(s)
        drawn = y[4000:].double().numpy().ravel()
        scores: dict[tuple[Any, bool], Tensor] = {}
        for key, (loss, soft, probability) in forms.items():
            if (loss, soft) not in scores:
                scores[loss, soft] = _fit(loss, x, p if soft else y, s, epochs)
            error, likelihood, curve = _calibration(probability(scores[loss, soft]).double().numpy().ravel(), drawn)
            errors[key].append((error, likelihood))
            curves.setdefault(key, curve)

    verdict: Verdict = "reproduced" if twice < 1e-6 else "partly" if twice < 1e-3 else "not reproduced"
    calibration = {key: np.array([e for e, _ in v]) for key, v in errors.items()}
    spread = [float(v.std(ddof=1) / math.sqrt(len(v))) if len(v) > 1 else 0.0 for v in calibration.values()]
    figures = {
        "max |sigmoid(2 s) - t|": twice,
        "max |sigmoid(s) - t|": once,
        "largest distance between the optima of two starts": float((found.amax(0) - found.amin(0)).max()),
        "unseen rows": {
            "trained on labels": [labels for labels, _ in forms],
            "probability": [name for _, name in forms],
            "calibration error": [float(v.mean()) for v in calibration.values()],
            "standard error": spread,
            "negative log-likelihood": [float(np.mean([n for _, n in v])) for v in errors.values()],
        },
    }

    def plot(figure: Any) -> None:
        first, second, third = figure.subplots(1, 3)
        order = t[0].argsort()
        first.plot(t[0, order], t[0, order], color="grey", lw=0.8, ls=":")
        first.plot(t[0, order], zlpr_proba(found[:1])[0, order], "o-", label="sigmoid(2 s)")
        first.plot(t[0, order], torch.sigmoid(found[:1])[0, order], "s-", label="sigmoid(s)")
        first.set(title="at the optimum", xlabel="label t", ylabel="probability")
        first.legend(fontsize=7)
        for axis, labels in ((second, "soft"), (third, "drawn")):
            axis.plot([0, 1], [0, 1], color="grey", lw=0.8, ls=":")
            for (kind, name), (mean, share) in curves.items():
                if kind == labels:
                    axis.plot(mean, share, marker="o", ms=3, label=name)
            axis.set(title=f"trained on {labels} labels", xlabel="predicted probability", ylabel="frequency")
            axis.legend(fontsize=6)

    note = f"{starts} starts; probabilities: seeds {seeds[0]} to {seeds[-1]}, {epochs} epochs."
    return Measurement(figures, verdict, plot, note)
