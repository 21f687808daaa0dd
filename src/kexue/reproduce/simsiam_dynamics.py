"""SimSiam: what keeps it from collapsing, in a scalar model with closed forms and on scikit-learn's digits.

1. Scalar model: the flow of l = 1/2 (phi theta - theta)^2 from phi = .6, theta = .1, with the stop-gradient, with the
   term that it removes, and with that term alone; each has a conserved quantity and so a limit in closed form. Two more
   starts with the stop-gradient: phi = 1.5 and phi = -.6. Fourth-order Runge-Kutta, step .02.
2. Digits: an encoder 64 - 256 - 32 with batch norm on the hidden layer, a predictor 32 - 16 - 32, batch norm on the
   output or not; SGD at .05, momentum .9, weight decay 1e-4, 800 steps of 256 of the first 1200 images; views are
   turned, scaled, shifted and noisy. All settings of a seed share initial weights and views. Measured in evaluation
   mode on all 1797 images: std, effective rank, and the accuracy of 5 nearest neighbours (leave one out).
3. Second view: E|F(T2 x) - F(T1 x)|^2 / E|F(T x) - F(xbar)|^2 with xbar the mean of 200 views, for a random encoder. To
   first order the ratio is 2, a factor that the learning rate undoes.
4. The article's open question, F(xbar) as the target: gradient through both, stop-gradient only, and with predictor.

Rule, fixed before measuring; means over the seeds. (a) The scalar model comes within 1e-3 of the five limits. (b) With
output norm, rank(full) > 2 rank(no stop-gradient). (c) Without it, std(full) > 10 std(no stop-gradient). (d) The rank
rises with the predictor's rate: 0, x.1, x1, x10. (e) The ratio of the second view is within 5 % of 2 at the smallest
views. (f) With F(xbar) and output norm, the rank with stop-gradient and predictor is > 2 times that of either other;
without output norm and with the gradient through both, std < .1. "reproduced": all; "partly": (a), (b) and (c);
otherwise "not reproduced".
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from kexue.models import CollapseMeter, CollapseReport, SimSiam
from kexue.reproduce.runner import Measurement, Verdict

CLAIM = (
    "Stop-gradient and predictor keep SimSiam from collapsing: the predictor is the fast variable, and its gradient "
    "vanishes before the encoder collapses, while the term that the stop-gradient removes is a fast lane to collapse."
)
DIM, BATCH, RATE, TRAINED = 32, 256, 0.05, 1200
# Setting -> options of SimSiam, factor on the predictor's rate.
SETTINGS: dict[str, tuple[dict[str, Any], float]] = {
    "full": ({}, 1.0),
    "predictor x10": ({}, 10.0),
    "predictor x.1": ({}, 0.1),
    "predictor frozen": ({}, 0.0),
    "no stop-gradient": ({"stop_gradient": False}, 1.0),
    "no predictor": ({"predictor": None}, 1.0),
    "no norm: full": ({"output_norm": False}, 1.0),
    "no norm: no stop-gradient": ({"output_norm": False, "stop_gradient": False}, 1.0),
    "no norm: no predictor": ({"output_norm": False, "predictor": None}, 1.0),
}
MEAN_TARGETS: dict[str, dict[str, Any]] = {
    "gradient through both": {"stop_gradient": False, "predictor": None},
    "stop-gradient only": {"predictor": None},
    "stop-gradient, predictor": {},
    "no norm: gradient through both": {"stop_gradient": False, "predictor": None, "output_norm": False},
}


def _flow(kind: str, phi: float, theta: float, time: float) -> np.ndarray:
    """Trajectory (steps + 1, 2) of (phi, theta)."""

    def rates(phi: float, theta: float) -> tuple[float, float]:
        gap = phi * theta - theta
        own = {"stop-gradient": -gap * phi, "with the extra term": -gap * phi + gap, "extra term alone": gap}
        return -gap * theta, own[kind]

    h, points = 0.02, [(phi, theta)]
    for _ in range(round(time / h)):
        a1, b1 = rates(phi, theta)
        a2, b2 = rates(phi + h / 2 * a1, theta + h / 2 * b1)
        a3, b3 = rates(phi + h / 2 * a2, theta + h / 2 * b2)
        a4, b4 = rates(phi + h * a3, theta + h * b3)
        phi, theta = phi + h / 6 * (a1 + 2 * a2 + 2 * a3 + a4), theta + h / 6 * (b1 + 2 * b2 + 2 * b3 + b4)
        points.append((phi, theta))
    return np.array(points)


def _limits() -> list[tuple[str, float, float, float, float]]:
    """Kind, phi and theta at the start, phi and theta in the limit (from the conserved quantities)."""
    return [
        ("stop-gradient", 0.6, 0.1, 1.0, math.sqrt(1 + 0.1**2 - 0.6**2)),
        ("with the extra term", 0.6, 0.1, 1 - math.sqrt(0.4**2 - 0.1**2), 0.0),
        ("extra term alone", 0.6, 0.1, 0.6 + 0.1**2 / 2, 0.0),
        ("stop-gradient", 1.5, 0.1, math.sqrt(1.5**2 - 0.1**2), 0.0),
        ("stop-gradient", -0.6, 0.1, -math.sqrt(0.6**2 - 0.1**2), 0.0),
    ]


def _view(x: Tensor, generator: torch.Generator, size: float = 1.0) -> Tensor:
    """Turned by up to .25 rad, scaled by up to 15 %, shifted by up to 10 % of the image, noisy; times ``size``."""
    n = len(x)
    turn, scale = (torch.rand(2, n, generator=generator) - 0.5) * size
    turn, scale = turn / 2, 1 + 0.3 * scale
    shift = (torch.rand(n, 2, generator=generator) - 0.5) * 0.4 * size
    cos, sin = turn.cos() * scale, turn.sin() * scale
    matrix = torch.stack([torch.stack([cos, -sin, shift[:, 0]], 1), torch.stack([sin, cos, shift[:, 1]], 1)], 1)
    images = x.view(n, 1, 8, 8)
    grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
    moved = F.grid_sample(images, grid, align_corners=False).flatten(1)
    return moved + 0.05 * size * torch.randn(x.shape, generator=generator)


def _encoder() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 256), nn.BatchNorm1d(256), nn.ReLU(), nn.Linear(256, DIM))


def _model(seed: int, options: dict[str, Any]) -> SimSiam:
    torch.manual_seed(seed)
    return SimSiam(_encoder(), DIM, projector=None, bottleneck=16, **options)


def _train(model: SimSiam, factor: float, batches: list[tuple[Tensor, Tensor]], loss: Callable[..., Tensor]) -> float:
    """Loss at the end, mean of the last tenth of the steps."""
    groups = model.param_groups(lr=RATE, predictor_lr=RATE * factor)
    optimizer = torch.optim.SGD(groups, momentum=0.9, weight_decay=1e-4, fused=True)
    losses = []
    for first, second in batches:
        optimizer.zero_grad()
        value = loss(first, second)
        value.backward()
        optimizer.step()
        losses.append(float(value.detach()))
    return float(np.mean(losses[-max(len(losses) // 10, 1) :]))


@dataclass(frozen=True)
class _Run:
    """Loss at the end, the report on z, and the accuracy of neighbours for z of the mean images."""

    loss: float
    z: CollapseReport
    knn_mean: float = 0.0


def _batches(seed: int, steps: int) -> tuple[list[Tensor], torch.Generator]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(TRAINED, (BATCH,), generator=generator) for _ in range(steps)], generator


def _train_all(
    settings: dict[str, tuple[dict[str, Any], float]], x: Tensor, labels: Tensor, seeds: list[int], steps: int
) -> dict[str, list[_Run]]:
    """Setting -> a run for each seed."""
    runs: dict[str, list[_Run]] = {name: [] for name in settings}
    for seed in seeds:
        rows, generator = _batches(seed, steps)
        pairs = [(_view(x[i], generator), _view(x[i], generator)) for i in rows]
        for name, (options, factor) in settings.items():
            model = _model(seed, options)
            loss = _train(model, factor, pairs, model)
            runs[name].append(_Run(loss, CollapseMeter().measure(model, [x], labels)))
    return runs


def _train_averaged(x: Tensor, mean: Tensor, labels: Tensor, seeds: list[int], steps: int) -> dict[str, list[_Run]]:
    """The same with F(xbar) as the target."""
    runs: dict[str, list[_Run]] = {name: [] for name in MEAN_TARGETS}
    for seed in seeds:
        rows, generator = _batches(seed, steps)
        pairs = [(_view(x[i], generator), mean[i]) for i in rows]
        for name, options in MEAN_TARGETS.items():
            model = _model(seed, options)

            def one_way(view: Tensor, average: Tensor, model: SimSiam = model) -> Tensor:
                p, target = model.predictor(model.project(view)), model.project(average)
                return -F.cosine_similarity(p, target.detach() if model.stop_gradient else target).mean()

            loss = _train(model, 1.0, pairs, one_way)
            z, z_mean = (CollapseMeter().measure(model, [images], labels) for images in (x, mean))
            runs[name].append(_Run(loss, z, z_mean.knn or 0.0))
    return runs


@torch.no_grad()
def _second_view(x: Tensor, seed: int, views: int) -> dict[str, list[float]]:
    model = _model(seed, {}).eval()
    generator = torch.Generator().manual_seed(seed)
    table: dict[str, list[float]] = {"size of the views": [0.05, 0.25, 1.0], "ratio": []}
    for size in table["size of the views"]:
        mean = torch.stack([_view(x, generator, size) for _ in range(views)]).mean(0)
        made = [model.project(_view(x, generator, size)) for _ in range(20)]
        to_mean = sum(float((z - model.project(mean)).square().sum()) for z in made) / 20
        between = sum(float((a - b).square().sum()) for a, b in zip(made[::2], made[1::2], strict=True)) / 10
        table["ratio"].append(between / to_mean)
    return table


def _plot(figure: Any, runs: dict[str, list[_Run]], paths: list[np.ndarray]) -> None:
    left, right = figure.subplots(1, 2)
    for number, (name, found) in enumerate(runs.items()):
        marker = "^" if name.startswith("no norm") else "o"
        ranks, stds = [run.z.rank for run in found], [run.z.std for run in found]
        left.scatter(ranks, stds, s=22, marker=marker, color=f"C{number}", label=name, alpha=0.8)
    left.axhline(CollapseMeter().min_std, color="grey", linewidth=0.8, linestyle=":")
    left.axvline(CollapseMeter().min_rank, color="grey", linewidth=0.8, linestyle=":")
    left.set(
        xlabel="effective rank of 32",
        ylabel="std (1 = isotropic)",
        title="digits, each seed; dotted: the meter's limits",
    )
    left.legend(fontsize=6, loc="center right")
    for path, (kind, *_) in zip(paths, _limits(), strict=True):
        color = {"stop-gradient": "C0", "with the extra term": "C3", "extra term alone": "C1"}[kind]
        label = kind if path[0, 0] == 0.6 else None
        right.plot(path[:, 0], path[:, 1], color=color, label=label, linestyle="-" if label else "--")
        right.plot(*path[-1], "o", color=color, markersize=4)
    right.set(
        xlabel="phi (predictor)", ylabel="theta (encoder)", title="scalar model; dashed: other starts; dot: the end"
    )
    right.legend(fontsize=7)
    for axis in (left, right):
        axis.title.set_fontsize(9)


def measure(quick: bool, seed: int) -> Measurement:
    """Measure the claim; see the module for the rule.

    Args:
        quick: One seed and 20 steps: shows that everything runs, says nothing about training.
        seed: First of the seeds.
    """
    seeds = [seed] if quick else [seed + i for i in range(4)]
    steps, time, views = (20, 100.0, 20) if quick else (800, 400.0, 200)
    digits = load_digits()
    x, labels = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)
    generator = torch.Generator().manual_seed(seed)
    mean = torch.stack([_view(x, generator) for _ in range(views)]).mean(0)

    flows = [(_flow(kind, phi, theta, time), phi_end, theta_end) for kind, phi, theta, phi_end, theta_end in _limits()]
    toy_error = max(float(np.abs(path[-1] - (phi, theta)).max()) for path, phi, theta in flows)
    runs = _train_all(SETTINGS, x, labels, seeds, steps)
    averaged = _train_averaged(x, mean, labels, seeds[:3], steps)
    second = _second_view(x, seed, views)

    def average(reports: list[_Run], what: Callable[[_Run], float]) -> float:
        return float(np.mean([what(run) for run in reports]))

    std = {name: average(found, lambda run: run.z.std) for name, found in {**runs, **averaged}.items()}
    rank = {name: average(found, lambda run: run.z.rank) for name, found in {**runs, **averaged}.items()}
    by_rate = [rank[name] for name in ("predictor frozen", "predictor x.1", "full", "predictor x10")]
    both, only, kept, bare = MEAN_TARGETS
    spread = std["no norm: full"], std["no norm: no stop-gradient"]
    needed = rank[kept] > 2 * max(rank[both], rank[only]) and std[bare] < 0.1
    holds = {
        "(a) scalar model within 1e-3 of its limits": toy_error < 1e-3,
        "(b) rank, full > 2 x no stop-gradient": rank["full"] > 2 * rank["no stop-gradient"],
        "(c) std without norm, full > 10 x no stop-gradient": spread[0] > 10 * spread[1],
        "(d) rank rises with the predictor's rate": by_rate == sorted(by_rate),
        "(e) second view: ratio within 5 % of 2": abs(second["ratio"][0] - 2) < 0.1,
        "(f) F(xbar) needs stop-gradient and predictor": needed,
    }

    def columns(found: dict[str, list[_Run]]) -> dict[str, list[Any]]:
        return {
            "setting": list(found),
            "loss": [average(f, lambda run: run.loss) for f in found.values()],
            "std": [std[name] for name in found],
            "rank": [rank[name] for name in found],
            "rank of each seed": [[round(run.z.rank, 2) for run in f] for f in found.values()],
            "kNN": [average(f, lambda run: run.z.knn or 0.0) for f in found.values()],
            "meter: collapsed": [f"{sum(run.z.collapsed for run in f)} of {len(f)}" for f in found.values()],
        }

    figures: dict[str, Any] = {
        "scalar model": {
            "gradient": [kind for kind, *_ in _limits()],
            "start (phi, theta)": [[phi, theta] for _, phi, theta, *_ in _limits()],
            "limit in closed form": [[phi, theta] for *_, phi, theta in _limits()],
            "measured": [[float(v) for v in path[-1]] for path, *_ in flows],
        },
        "digits": columns(runs),
        "target F(xbar)": {
            **columns(averaged),
            "kNN of F(xbar)": [average(f, lambda run: run.knn_mean) for f in averaged.values()],
        },
        "second view": second,
        "kNN of raw pixels": CollapseMeter()(x, labels).knn,
        **{name: str(value) for name, value in holds.items()},
    }

    def plot(figure: Any) -> None:
        _plot(figure, runs, [path for path, *_ in flows])

    results = list(holds.values())
    verdict: Verdict = "not reproduced"
    if all(results[:3]):
        verdict = "reproduced" if all(results) else "partly"
    note = (
        "One seed and 20 steps only: the figures of the digits mean nothing."
        if quick
        else f"{len(seeds)} seeds from {seed} (3 for F(xbar)), 800 steps. This is about collapse, not about the "
        "quality of the representation: raw pixels do better here. From phi = 1.5 and phi = -.6 the scalar model "
        "collapses with the stop-gradient too: the predictor's start decides, not only its speed."
    )
    return Measurement(figures, verdict, plot, note)
