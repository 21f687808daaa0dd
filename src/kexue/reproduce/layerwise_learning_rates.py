"""Layerwise learning rates: the article's rescaled parameters against groups with their own rate.

1. Rates. A net of two layers in float64, 50 steps on a regression; the first layer learns at a = 0.1 times the rate.
   Once as a group with that rate, once rescaled (theta = lam * phi) with one rate for everything. Measured: largest
   difference of the weights afterwards, for each optimizer with the article's lam (and eps and decay corrected as
   ``kexue.training.scale_lr_`` says), with the other lam, and without the corrections.
2. Gradients. The article's function that returns zeros, under which "the model never moves", from the first step and
   after 10 ordinary ones; the same with None. Measured: how far the weights move in 10 steps.

Rule, fixed before measuring; for every one of the seeds. (a) With the article's lam, eps 0 or eps * lam, and corrected
decay, differences are below 1e-12; (b) with the other lam, or with decay uncorrected, they are above 1e-3; (c) zeros
from the first step leave the weights where they are, without decay, under SGD, momentum and Adam. "reproduced": all
three; "partly": (a) and one more; otherwise "not reproduced". The eps that is not corrected, and zeros after ordinary
steps, are reported: the article does not speak of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop

from kexue.reproduce.runner import Measurement, Verdict
from kexue.training import freeze, gradient_transform, param_groups, scale_lr_, zero

CLAIM = (
    "A weight stored as phi and used as lam * phi learns at another rate: with lam = sqrt(a) under SGD and lam = a "
    "under Adam and RMSprop, the rate is multiplied by a. Gradients are free to be replaced: with zeros the model "
    "never moves."
)
A, RATE, STEPS = 0.1, 1e-2, 50


class _Lion(Optimizer):
    """Lion, which torch does not have."""

    def __init__(self, params: Any, lr: float, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                m = self.state[p].setdefault("m", torch.zeros_like(p))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(group["lr"] * (0.9 * m + 0.1 * p.grad).sign())
                m.mul_(0.99).add_(p.grad, alpha=0.01)


# Name, optimizer, its options, kind for scale_lr_, factors of eps and decay for phi, what the rule expects.
Case = tuple[str, Callable[..., Optimizer], dict[str, Any], str, float, float, str]
CASES: list[Case] = [
    ("SGD, lam = sqrt(a)", SGD, {}, "sgd", 1, 1, "right"),
    ("momentum, lam = sqrt(a)", SGD, {"momentum": 0.9}, "momentum", 1, 1, "right"),
    ("Nesterov, penalty * a", SGD, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}, "sgd", 1, A, "right"),
    ("Adam, eps = 0, lam = a", Adam, {"eps": 0.0}, "adam", 1, 1, "right"),
    ("Adam, eps * lam", Adam, {"eps": 1e-4}, "adam", A, 1, "right"),
    ("AdamW, eps * lam, decay * a", AdamW, {"eps": 1e-4, "weight_decay": 0.1}, "adamw", A, A, "right"),
    ("RMSprop, eps * lam, lam = a", RMSprop, {"eps": 1e-4}, "rmsprop", A, 1, "right"),
    ("Lion, decay * a, lam = a", _Lion, {"weight_decay": 0.1}, "lion", 1, A, "right"),
    ("SGD, lam = a", SGD, {}, "adam", 1, 1, "wrong"),
    ("Adam, eps = 0, lam = sqrt(a)", Adam, {"eps": 0.0}, "sgd", 1, 1, "wrong"),
    ("RMSprop, eps = 0, lam = sqrt(a)", RMSprop, {"eps": 0.0}, "sgd", 1, 1, "wrong"),
    ("AdamW, decay as it was", AdamW, {"eps": 0.0, "weight_decay": 0.1}, "adamw", 1, 1, "wrong"),
    ("Adam, eps 1e-8 as it was", Adam, {"eps": 1e-8}, "adam", 1, 1, "reported"),
    ("Adam, eps 1e-4 as it was", Adam, {"eps": 1e-4}, "adam", 1, 1, "reported"),
]


def _net(seed: int) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(20, 8), nn.Tanh(), nn.Linear(8, 1)).double()


def _data(seed: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(64, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return x, x.sum(1, keepdim=True).sin()


def _weights(layer: Any) -> Tensor:
    return torch.cat([layer.weight.detach().flatten(), layer.bias.detach()])


def _run(model: nn.Sequential, optimizer: Optimizer, data: tuple[Tensor, Tensor], steps: int) -> Tensor:
    """All weights after some steps."""
    for _ in range(steps):
        optimizer.zero_grad()
        (model(data[0]) - data[1]).square().mean().backward()
        optimizer.step()
    return torch.cat([_weights(model[0]), _weights(model[2])])


def _difference(case: Case, seed: int) -> float:
    """Largest difference of a weight between the two ways."""
    _, make, options, kind, eps, decay, _ = case
    data, ends = _data(seed), []
    for rescaled in (False, True):
        model = _net(seed)
        if rescaled:
            scale_lr_(model[0], A, kind)
        first: dict[str, Any] = {"params": model[0].parameters()}
        if not rescaled:
            first["lr"] = RATE * A
        for name, factor in (("eps", eps), ("weight_decay", decay)):
            if rescaled and name in options:
                first[name] = options[name] * factor
        optimizer = make([first, {"params": model[2].parameters()}], lr=RATE, **options)
        ends.append(_run(model, optimizer, data, STEPS))
    return float((ends[0] - ends[1]).abs().max())


def _moves(make: Callable[..., Optimizer], decay: float, late: bool, none: bool, seed: int) -> float:
    """Largest change of a weight in 10 steps whose gradients are zeros or None."""
    model, data = _net(seed), _data(seed)
    optimizer = make(param_groups(model, RATE, weight_decay=decay))
    if late:
        _run(model, optimizer, data, 10)
    gradient_transform(optimizer, freeze() if none else zero())
    before = [p.detach().clone() for p in model.parameters()]
    _run(model, optimizer, data, 10)
    return max(float((a - b.detach()).abs().max()) for a, b in zip(before, model.parameters(), strict=True))


FREE: list[tuple[str, Callable[..., Optimizer], float]] = [
    ("SGD", SGD, 0.0),
    ("SGD with momentum", lambda groups: SGD(groups, momentum=0.9), 0.0),
    ("Adam", Adam, 0.0),
    ("AdamW with decay .1", AdamW, 0.1),
]


def measure(quick: bool, seed: int) -> Measurement:
    """Measure the claim; see the module for the rule.

    Args:
        quick: One seed instead of five.
        seed: First seed.
    """
    seeds = [seed] if quick else list(range(seed, seed + 5))
    last = {case[0]: [_difference(case, s) for s in seeds] for case in CASES}
    kinds = {case[0]: case[6] for case in CASES}
    moved = [[max(_moves(m, d, late, none, s) for s in seeds) for late in (False, True) for none in (False, True)]
             for _, m, d in FREE]  # fmt: skip

    exact = all(max(last[name]) < 1e-12 for name, kind in kinds.items() if kind == "right")
    seen = all(min(last[name]) > 1e-3 for name, kind in kinds.items() if kind == "wrong")
    still = all(row[0] == 0.0 for (_, _, decay), row in zip(FREE, moved, strict=True) if not decay)
    figures: dict[str, Any] = {
        "largest difference of a weight after 50 steps": {
            "setting": list(last),
            "rule expects": [kinds[name] for name in last],
            "smallest of the seeds": [min(values) for values in last.values()],
            "largest of the seeds": [max(values) for values in last.values()],
        },
        "largest change of a weight in 10 steps": {
            "optimizer": [name for name, _, _ in FREE],
            "zeros from the start": [row[0] for row in moved],
            "None from the start": [row[1] for row in moved],
            "zeros after 10 steps": [row[2] for row in moved],
            "None after 10 steps": [row[3] for row in moved],
        },
        "right settings below 1e-12": str(exact),
        "wrong settings above 1e-3": str(seen),
        "zeros from the start do not move": str(still),
    }

    def plot(figure: Any) -> None:
        axis = figure.subplots()
        colours = {"right": "tab:blue", "wrong": "tab:red", "reported": "grey"}
        places = list(range(len(last)))[::-1]
        for place, (name, values) in zip(places, last.items(), strict=True):
            axis.plot([max(v, 1e-18) for v in values], [place] * len(values), "o", color=colours[kinds[name]])
        axis.set_xscale("log")
        axis.set_yticks(places, list(last), fontsize=8)
        axis.axvline(1e-12, color="tab:blue", linewidth=0.8, linestyle=":")
        axis.axvline(1e-3, color="tab:red", linewidth=0.8, linestyle=":")
        axis.set(
            xlabel="largest difference of a weight after 50 steps, one point per seed",
            title="rescaled parameters against a group with its own rate (a = 0.1, float64)",
        )
        axis.title.set_fontsize(9)

    verdict: Verdict = "not reproduced"
    if exact and (seen or still):
        verdict = "reproduced" if seen and still else "partly"
    note = (
        f"{len(seeds)} seed{'s' * (len(seeds) > 1)} from {seed}; 20-8-1 net, lr {RATE}, 64 rows. Zeros after ordinary "
        "steps do not stop momentum and Adam, and decoupled decay goes on under zeros: None does stop them."
    )
    return Measurement(figures, verdict, plot, note)
