"""FlatNCE: what floating point does to InfoNCE in a solved batch.

1. Precision. Trained-like embeddings (width 128, second view = first + 0.1 noise), the scores rounded to a dtype;
   relative error of the gradient with respect to the scores, row by row, against float64 on the same rounded scores.
   "cross-entropy" is what libraries call InfoNCE, "paper" is exp(v - stop_gradient(v)) of the published code.
2. Training (full version only). SimCLR on scikit-learn's digits (noise and shifts as views), batch 8 to 256, in
   float32, the same number of samples; accuracy of a linear probe with cross-entropy, InfoNCE and FlatNCE.

Rule, fixed before measuring. The table holds if in float32, wherever the median xi is below 1e-6, cross-entropy is
off by more than 10 % while FlatNCE is off by less than 1e-6. The training holds if at batch 8 and 16 the mean
accuracy of FlatNCE over the seeds is not below that of cross-entropy. "reproduced": all that was run holds;
"partly": only the table; otherwise "not reproduced".
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from torch.nn import functional as F

from kexue.losses import flat_cross_entropy, nt_xent
from kexue.reproduce.runner import Measurement, Verdict

CLAIM = (
    "In small batches the positive dominates and InfoNCE loses its gradient to rounding; FlatNCE = log xi keeps it, so "
    "that contrastive learning does not suffer from a small batch."
)


def _paper(scores: Tensor, target: Tensor) -> Tensor:
    """exp(v - stop_gradient(v)) on rounded differences, as published."""
    difference = scores - scores.gather(1, target[:, None])
    v = torch.logsumexp(difference.scatter(1, target[:, None], -math.inf), 1)
    return torch.exp(v - v.detach())


FORMS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], str]] = {
    "cross-entropy": (lambda s, t: F.cross_entropy(s, t, reduction="none"), "info"),
    "InfoNCE": (lambda s, t: flat_cross_entropy(s, t, mode="info", reduction="none"), "info"),
    "FlatNCE": (lambda s, t: flat_cross_entropy(s, t, reduction="none"), "flat"),
    "paper": (_paper, "flat"),
}


def _exact(scores: Tensor, target: Tensor, mode: str) -> Tensor:
    """The gradient with respect to the scores in float64, from its formula."""
    others = scores.scatter(1, target[:, None], -math.inf)
    v = torch.logsumexp(others, 1, keepdim=True) - scores.gather(1, target[:, None])
    gradient = torch.softmax(others, 1).scatter(1, target[:, None], -1.0)
    return gradient if mode == "flat" else gradient * torch.sigmoid(v)


def _precision(pairs: int, temperature: float, dtype: torch.dtype, seed: int) -> tuple[float, dict[str, float], float]:
    g = torch.Generator().manual_seed(seed)
    a = torch.randn(pairs, 128, generator=g, dtype=torch.float64)
    b = a + 0.1 * torch.randn(pairs, 128, generator=g, dtype=torch.float64)
    z = F.normalize(torch.cat([a, b]), dim=1)
    n = 2 * pairs
    full = z @ z.T / temperature
    keep = ~torch.eye(n, dtype=torch.bool)  # a view is no candidate for itself
    scores = full[keep].view(n, n - 1).to(dtype)
    partner = (torch.arange(n) + pairs) % n
    target = partner - (partner > torch.arange(n)).long()
    xi = (scores.double() - scores.double().gather(1, target[:, None])).exp().sum(1) - 1
    errors = {}
    lost = 0.0
    for name, (form, mode) in FORMS.items():
        s = scores.clone().requires_grad_()
        (got,) = torch.autograd.grad(form(s, target).sum(), s)
        want = _exact(scores.double(), target, mode)
        errors[name] = float(((got.double() - want).norm(dim=1) / want.norm(dim=1)).mean())
        if name == "cross-entropy":
            lost = float((got.gather(1, target[:, None]) == 0).double().mean())
    return float(xi.median()), errors, lost


def _shifted(images: Tensor) -> Tensor:
    """All images moved by -1, 0 or 1 pixel in both directions, (9, N, 64)."""
    return torch.stack([images.roll((dy, dx), (1, 2)).flatten(1) for dy in (-1, 0, 1) for dx in (-1, 0, 1)])


def _views(shifted: Tensor, rows: Tensor, g: torch.Generator) -> Tensor:
    """A random shift and noise."""
    shift = torch.randint(-1, 2, (len(rows), 2), generator=g)
    moved = shifted[3 * (shift[:, 0] + 1) + shift[:, 1] + 1, rows]
    return moved + 0.1 * torch.randn(moved.shape, generator=g)


def _cross_entropy(z1: Tensor, z2: Tensor, temperature: float) -> Tensor:
    z = F.normalize(torch.cat([z1, z2]), dim=1)
    scores = (z @ z.T / temperature).fill_diagonal_(-math.inf)
    return F.cross_entropy(scores, (torch.arange(len(z)) + len(z1)) % len(z))


LOSSES: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "cross-entropy": _cross_entropy,
    "InfoNCE": lambda a, b, t: nt_xent(a, b, t, "info"),
    "FlatNCE": lambda a, b, t: nt_xent(a, b, t, "flat"),
}


@torch.random.fork_rng(devices=[])  # the caller's random state stays as it was
def _probe(loss_name: str, batch: int, seed: int, epochs: int = 10) -> float:
    """Accuracy of logistic regression on the features after contrastive training."""
    data = load_digits()
    images, labels = torch.tensor(data.images / 16.0, dtype=torch.float32), data.target
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed)).numpy()
    train, test = order[:1200], order[1200:]
    shifted = _shifted(images)
    torch.manual_seed(seed)
    g = torch.Generator().manual_seed(seed)
    encoder = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64))
    projection = nn.Sequential(nn.ReLU(), nn.Linear(64, 32))
    optimizer = torch.optim.Adam([*encoder.parameters(), *projection.parameters()], 1e-3)
    for _ in range(epochs):
        for rows in torch.tensor(train)[torch.randperm(len(train), generator=g)].split(batch):
            if len(rows) < 2:
                continue
            z = projection(encoder(_views(shifted, rows.repeat(2), g)))
            loss = LOSSES[loss_name](z[: len(rows)], z[len(rows) :], 0.07)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        features = encoder(images.flatten(1)).numpy()
    probe = LogisticRegression(max_iter=2000).fit(features[train], labels[train])
    return float(probe.score(features[test], labels[test]))


def measure(quick: bool, seed: int) -> Measurement:
    """Measure the claim; see the module for the rule.

    Args:
        quick: Only the precision table.
        seed: First of three seeds.
    """
    columns: dict[str, list[Any]] = {"pairs": [], "temperature": [], "dtype": [], "xi": []}
    errors: dict[str, list[Any]] = {name: [] for name in FORMS}
    lost: list[float] = []
    for pairs in (4, 16, 256):
        for temperature in (0.05, 0.5):
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                xi, found, share = _precision(pairs, temperature, dtype, seed)
                for name, value in zip(columns, (pairs, temperature, str(dtype)[6:], xi), strict=True):
                    columns[name].append(value)
                for name, value in found.items():
                    errors[name].append(value)
                lost.append(share)
    decisive = [
        i for i, (d, x) in enumerate(zip(columns["dtype"], columns["xi"], strict=True)) if d == "float32" and x < 1e-6
    ]
    table_holds = bool(decisive) and all(
        errors["cross-entropy"][i] > 0.1 and errors["FlatNCE"][i] < 1e-6 for i in decisive
    )
    figures: dict[str, Any] = {
        "gradient error": {**columns, **errors, "positive's gradient exactly 0": lost},
        "rows that decide": len(decisive),
        "largest FlatNCE error in half precision": max(
            e for e, d in zip(errors["FlatNCE"], columns["dtype"], strict=True) if d != "float32"
        ),
    }
    batches, seeds = (8, 16, 64, 256), [seed, seed + 1, seed + 2]
    accuracy: dict[str, list[list[float]]] = {}
    training_holds = True
    if not quick:
        accuracy = {name: [[_probe(name, b, s) for s in seeds] for b in batches] for name in LOSSES}
        mean = {name: [float(np.mean(x)) for x in rows] for name, rows in accuracy.items()}
        training_holds = all(mean["FlatNCE"][i] >= mean["cross-entropy"][i] for i in (0, 1))
        spread = {
            f"{name} standard error": [float(np.std(x, ddof=1) / math.sqrt(len(x))) for x in rows]
            for name, rows in accuracy.items()
        }
        figures["digits, linear probe"] = {"batch": list(batches), **mean, **spread}

    def plot(figure: Any) -> None:
        axis = figure.add_subplot(111 if quick else 121)
        rows = [i for i, t in enumerate(columns["temperature"]) if t == 0.05]
        ticks = [f"{columns['pairs'][i]}\n{columns['dtype'][i]}" for i in rows]
        for name, values in errors.items():
            axis.semilogy(range(len(rows)), [max(values[i], 1e-9) for i in rows], marker="o", label=name)
        axis.set_xticks(range(len(rows)), ticks, fontsize=6)
        axis.set(title="gradient error, temperature .05", xlabel="pairs, dtype")
        axis.legend(fontsize=7)
        if not quick:
            axis = figure.add_subplot(122)
            for name, values in accuracy.items():
                axis.errorbar(
                    batches, np.mean(values, 1), np.std(values, 1, ddof=1) / math.sqrt(3), marker="o", label=name
                )
            axis.set_xscale("log", base=2)
            axis.set(xlabel="batch", title="digits: accuracy of a linear probe")
            axis.legend(fontsize=7)

    verdict: Verdict = "not reproduced"
    if table_holds:
        verdict = "reproduced" if training_holds else "partly"
    note = "Errors are means over rows. " + (
        "Training only runs in full." if quick else f"Training: three seeds from {seed}, equal numbers of samples."
    )
    return Measurement(figures, verdict, plot, note)
