"""Means of fan_in and fan_out: what they do to the second moment through 120 linear layers.

The article derives two means and runs no experiment: the geometric one keeps the product of two layers m -> n -> m,
the contraharmonic one (which it calls quadratic) is best for a single layer in the sense of least squares. Measured
here, in float64: log10 of the gain of the second moment, forward and backward, for three stacks of 120 layers (widths
that alternate between 128 and 512; random widths of 64 to 512; a geometric ramp from 512 to 64) and six means,
N(0, 1/M) weights, 8 rows, against what ``predict_gain`` says.

Rule, fixed before measuring. On the alternating stack, forward and backward, the distance between the measured (mean
over the seeds) and the predicted log10 gain is below 0.6 for the geometric mean and below 1.0 for the others:
"reproduced"; "partly": for the geometric mean alone; otherwise "not reproduced". The other two stacks are shown and do
not decide. On the ramp all symmetric means agree, so that it has no winner.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import torch

from kexue.models import predict_gain, variance_scaling_
from kexue.reproduce.runner import Measurement, Verdict

CLAIM = (
    "For layers m -> n -> m the geometric mean of the fans keeps second moments in both directions at any depth; "
    "the arithmetic mean shrinks both; the contraharmonic mean, best for each single layer, is worse once composed. "
    "(The article declares none better and runs no experiment.)"
)
MODES = ("fan_in", "arithmetic", "geometric", "harmonic", "quadratic", "contraharmonic")
LAYERS, ROWS = 120, 8


def _stacks(layers: int) -> dict[str, list[int]]:
    g = torch.Generator().manual_seed(7)
    return {
        "alternating 128/512": [128, 512] * (layers // 2) + [128],
        "random 64..512": torch.randint(64, 513, (layers + 1,), generator=g).tolist(),
        "ramp 512 to 64": [int(512 * (64 / 512) ** (i / layers)) for i in range(layers + 1)],
    }


def _log_gain(start: torch.Tensor, end: torch.Tensor) -> float:
    return float(torch.log10(end.square().mean() / start.square().mean()))


def _measure(widths: list[int], mode: str, seed: int) -> tuple[float, float, list[float]]:
    """log10 gain forward and backward, and forward after each layer."""
    g = torch.Generator().manual_seed(seed)
    x = start = torch.randn(ROWS, widths[0], generator=g, dtype=torch.float64)
    weights, path = [], [0.0]
    for m, n in itertools.pairwise(widths):
        w = torch.empty(n, m, dtype=torch.float64)
        weights.append(variance_scaling_(w, mode, distribution="normal", generator=g))
        x = x @ w.T
        path.append(_log_gain(start, x))
    d = end = torch.randn(ROWS, widths[-1], generator=g, dtype=torch.float64)
    for w in reversed(weights):
        d = d @ w
    return path[-1], _log_gain(end, d), path


def measure(quick: bool, seed: int) -> Measurement:
    """Measure the claim; see the module for the rule.

    Args:
        quick: One seed and 12 layers instead of 120.
        seed: First of five seeds.
    """
    seeds = [seed] if quick else list(range(seed, seed + 5))
    layers = 12 if quick else LAYERS
    stacks = _stacks(layers)
    figures: dict[str, Any] = {}
    paths: dict[str, np.ndarray[Any, Any]] = {}
    errors: dict[str, float] = {}
    for name, widths in stacks.items():
        columns = "mean", "forward", "predicted", "backward", "predicted back", "forward, seeds", "backward, seeds"
        table: dict[str, list[Any]] = {column: [] for column in columns}
        for mode in MODES:
            runs = [_measure(widths, mode, s) for s in seeds]
            forward, backward = ([run[i] for run in runs] for i in (0, 1))
            predicted = predict_gain(widths, mode)
            values = (mode, np.mean(forward), predicted[0], np.mean(backward), predicted[1], forward, backward)
            for column, value in zip(table, values, strict=True):
                table[column].append(value.item() if isinstance(value, np.generic) else value)
            if name.startswith("alternating"):
                paths[mode] = np.mean([run[2] for run in runs], 0)
                off = (abs(np.mean(forward) - predicted[0]), abs(np.mean(backward) - predicted[1]))
                errors[mode] = float(max(off))
        figures[f"log10 gain, {name}"] = table
    figures["distance from the prediction, alternating, geometric"] = errors["geometric"]
    figures["distance from the prediction, alternating, largest"] = max(errors.values())
    exact = errors["geometric"] < 0.6
    others = all(error < 1.0 for mode, error in errors.items() if mode != "geometric")
    verdict: Verdict = "reproduced" if exact and others else "partly" if exact else "not reproduced"
    ramp = figures["log10 gain, ramp 512 to 64"]["forward"][1:]
    figures["spread of the symmetric means on the ramp"] = float(max(ramp) - min(ramp))

    def plot(figure: Any) -> None:
        left, right = figure.subplots(1, 2)
        for mode, path in paths.items():
            top = mode == "fan_in"  # it and the geometric mean lie on one another
            left.plot(np.arange(len(path)), path, "--" if top else "-", label=mode, zorder=3 if top else 2)
        left.set(xlabel="layer", ylabel="log10 of the gain", title="alternating 128/512, forward")
        left.legend(fontsize=8)
        places = np.arange(len(MODES))
        for shift, name in zip((-0.27, 0.0, 0.27), stacks, strict=True):
            right.bar(places + shift, figures[f"log10 gain, {name}"]["forward"], 0.27, label=name)
        right.set(ylabel="log10 of the gain", title=f"forward, after {layers} layers")
        right.set_xticks(places, MODES, rotation=30, ha="right", fontsize=8)
        right.axhline(0, color="grey", linewidth=0.8)
        right.legend(fontsize=8)

    note = (
        f"{len(seeds)} seed(s) from {seed}, {layers} layers, {ROWS} rows, float64. On the ramp the symmetric means "
        "agree: no winner. fan_in holds the forward pass by itself; the geometric mean is symmetric. The mean "
        "of a logarithm is below the logarithm of the mean, which is what is predicted: about .1 in 120 layers."
    )
    return Measurement(figures, verdict, plot, note)
