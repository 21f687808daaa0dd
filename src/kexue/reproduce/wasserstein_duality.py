"""Strong duality of optimal transport, and the objective of WGAN as its dual.

1. 300 random problems (metric, squared and arbitrary costs; different sizes, ties, points without mass): cost of the
   plan against the value of the potentials, feasibility of both.
2. A single potential f with |f(x) - f(y)| <= c(x, y), by linear programming on the union of supports: the maximum of
   E_p f - E_q f against the transport cost, for the distance and for its square.
3. Farkas' lemma: one of the two systems has a solution, on 100 systems with a solution and 100 without.
4. A critic trained as in WGAN-GP on two fixed clouds in the plane: the W_1 that it estimates, its difference of means
   divided by its largest slope between points of the clouds, against the exact one.

Rule, fixed before measuring. Duality holds if |primal - dual| <= 1e-10 max(1, cost) and every violation is <= 1e-10 in
all problems. Kantorovich-Rubinstein holds if for the distance both agree to 1e-9 and for the square the single
potential is strictly smaller. Farkas holds if all 200 systems get the right answer. The critic
holds if it ends at 85 to 100 % of the exact W_1 for every seed. "reproduced": all four; "partly": the first three;
otherwise "not reproduced".
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from scipy.optimize import linprog
from scipy.spatial.distance import cdist
from torch import nn

from kexue.reproduce.runner import Measurement, Verdict
from kexue.stats import farkas, kr_potential, transport

CLAIM = (
    "The cheapest transport and the best pair of potentials have the same value (strong duality, by Farkas' lemma); "
    "with a distance as cost one 1-Lipschitz function is enough, which is what the critic of a WGAN approximates."
)
KINDS = ("distance", "squared", "arbitrary", "ties", "zero masses")


def _problem(kind: str, g: np.random.Generator) -> tuple[Any, Any, Any]:
    n, m = (int(k) for k in g.integers(2, 40, 2))
    x, y = g.normal(size=(n, 3)), g.normal(size=(m, 3)) + 0.5
    costs = cdist(x, y, "sqeuclidean" if kind == "squared" else "euclidean")
    if kind == "arbitrary":
        costs = g.normal(size=(n, m))
    elif kind == "ties":
        costs = np.floor(2 * costs)
    p, q = g.random(n), g.random(m)
    if kind == "zero masses":
        p[1:][g.random(n - 1) < 0.4], q[1:][g.random(m - 1) < 0.4] = 0.0, 0.0
    return costs, p / p.sum(), q / q.sum()


def _duality(count: int, g: np.random.Generator) -> dict[str, list[Any]]:
    table: dict[str, list[Any]] = {"costs": list(KINDS), "largest gap / max(1, cost)": [], "largest violation": []}
    for kind in KINDS:
        gaps, violations = [0.0], [0.0]
        for _ in range(count // len(KINDS)):
            costs, p, q = _problem(kind, g)
            found = transport(costs, p, q)
            dual = float(p @ found.f + q @ found.g)
            gaps.append(abs(found.cost - dual) / max(1.0, abs(found.cost)))
            violations.append(float((found.f[:, None] + found.g - costs).max()))
            violations.append(float(max(abs(found.plan.sum(1) - p).max(), abs(found.plan.sum(0) - q).max())))
        table["largest gap / max(1, cost)"].append(max(gaps))
        table["largest violation"].append(max(violations))
    return table


def _single_potential(costs: Any, weights: Any) -> float:
    """Largest sum of w_k f_k over |f_k - f_l| <= c_kl."""
    k = len(weights)
    pairs = [(i, j) for i in range(k) for j in range(k) if i != j]
    rows = np.zeros((len(pairs), k))
    for r, (i, j) in enumerate(pairs):
        rows[r, i], rows[r, j] = 1.0, -1.0
    bounds = [(0, 0)] + [(None, None)] * (k - 1)
    right = np.array([costs[i, j] for i, j in pairs])
    return -float(linprog(-weights, A_ub=rows, b_ub=right, bounds=bounds, method="highs-ds").fun)


def _kantorovich(count: int, g: np.random.Generator) -> tuple[float, list[float]]:
    """Largest error for the distance, and the ratios of the single potential to the cost for its square."""
    error, ratios = 0.0, []
    for _ in range(count):
        x, y = g.normal(size=(12, 2)), g.normal(size=(10, 2)) + 0.5
        union, weights = np.concatenate([x, y]), np.concatenate([np.full(12, 1 / 12), np.full(10, -1 / 10)])
        distance = cdist(union, union)
        critic = kr_potential(x, y)
        attained = float(critic(x).mean() - critic(y).mean())
        best = _single_potential(distance, weights)
        error = max(error, abs(best - critic.value), abs(attained - critic.value))
        ratios.append(_single_potential(distance**2, weights) / transport(cdist(x, y, "sqeuclidean")).cost)
    return error, ratios


def _farkas(count: int, g: np.random.Generator) -> int:
    """How many of 2 count systems get the right alternative."""
    right = 0
    for _ in range(count):
        m, n = int(g.integers(2, 7)), int(g.integers(2, 9))
        A = g.normal(size=(m, n))
        b = A @ g.random(n)
        found = farkas(A, b)
        right += found.x is not None and abs(A @ found.x - b).max() < 1e-6 and found.x.min() >= 0
        y = g.normal(size=m)  # every column is turned to its far side, b to its near one: y separates them
        A = A - np.outer(y, np.maximum(A.T @ y, 0.0) * 2 / (y @ y))
        found = farkas(A, y)
        right += found.y is not None and (A.T @ found.y).max() < 1e-6 and float(y @ found.y) > 0
    return int(right)


@torch.random.fork_rng(devices=[])  # the caller's random state stays as it was
def _critic(seed: int, steps: int) -> tuple[list[int], list[float], float]:
    """Steps, share of the exact W_1 that a WGAN-GP critic proves, and its largest slope at the end."""
    g = np.random.default_rng(seed)
    x, y = g.normal(size=(128, 2)), 1.2 * g.normal(size=(128, 2)) + [1.5, 0.5]
    exact = kr_potential(x, y).value
    real, fake = (torch.tensor(z, dtype=torch.float32) for z in (x, y))
    union = torch.cat([real, fake])
    apart = torch.cdist(union, union) + torch.eye(len(union))
    torch.manual_seed(seed)
    critic = nn.Sequential(nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))
    optimizer = torch.optim.Adam(critic.parameters(), 1e-3, betas=(0.5, 0.9))
    at, shares, slope = [], [], 1.0
    for step in range(steps + 1):
        if step % (steps // 20) == 0:
            with torch.no_grad():
                values = critic(union)
                slope = float(((values - values.T).abs() / apart).max())
                shares.append(float(critic(real).mean() - critic(fake).mean()) / slope / exact)
            at.append(step)
        mix = torch.rand(len(real), 1)
        between = (mix * real + (1 - mix) * fake[torch.randperm(len(fake))]).requires_grad_()
        (slopes,) = torch.autograd.grad(critic(between).sum(), between, create_graph=True)
        loss = critic(fake).mean() - critic(real).mean() + 10 * (slopes.norm(dim=1) - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return at, shares, slope


def measure(quick: bool, seed: int) -> Measurement:
    """Measure the claim; see the module for the rule.

    Args:
        quick: A tenth of the problems and no critic.
        seed: Of the problems, and the first of three seeds of the critic.
    """
    g = np.random.default_rng(seed)
    problems, pairs, systems = (30, 2, 10) if quick else (300, 10, 100)
    table = _duality(problems, g)
    duality = max(table["largest gap / max(1, cost)"] + table["largest violation"]) <= 1e-10
    error, ratios = _kantorovich(pairs, g)
    rubinstein = error <= 1e-9 and max(ratios) < 1 - 1e-6
    right = _farkas(systems, g)
    figures: dict[str, Any] = {
        f"{problems} problems": table,
        "distance, one potential: largest error": error,
        "square, one potential: share of the cost": [min(ratios), max(ratios)],
        f"Farkas, right answers of {2 * systems}": right,
    }
    curves: list[tuple[list[int], list[float], float]] = []
    trained = True
    if not quick:
        curves = [_critic(seed + k, 2000) for k in range(3)]
        ends = [shares[-1] for _, shares, _ in curves]
        figures["trained critic, share of W_1 at the end"] = ends
        figures["trained critic, largest slope"] = [slope for _, _, slope in curves]
        figures["trained critic, share without division by the slope"] = [
            shares[-1] * slope for _, shares, slope in curves
        ]
        trained = all(0.85 <= share <= 1 + 1e-4 for share in ends)
    verdict: Verdict = "not reproduced"
    if duality and rubinstein and right == 2 * systems:
        verdict = "reproduced" if trained else "partly"

    def plot(figure: Any) -> None:
        axis = figure.add_subplot(111 if quick else 121)
        _bars(axis)
        if curves:
            axis = figure.add_subplot(122)
            for k, (at, shares, _) in enumerate(curves):
                axis.plot(at, shares, label=f"seed {seed + k}")
            axis.axhspan(0.85, 1.0, color="0.9")
            axis.set(title="trained critic against the exact one", xlabel="steps", ylabel="share of W1", ylim=(0, 1.05))
            axis.legend(fontsize=8)

    note = "The critic only runs in full." if quick else "The critic's share is a lower bound that its slopes prove."
    return Measurement(figures, verdict, plot, note)


def _bars(axis: Any) -> None:
    """Piles of earth before and after, coloured by where they go."""
    places = np.arange(10.0)
    before, after = np.exp(-((places - 2.5) ** 2) / 4), np.exp(-((places - 6) ** 2) / 6)
    before, after = before / before.sum(), after / after.sum()
    plan = transport(abs(places[:, None] - places), before, after).plan
    shades = [(0.15 + 0.08 * k, 0.35, 0.95 - 0.09 * k) for k in range(len(places))]
    low = np.zeros(len(places))
    for j, shade in enumerate(shades):
        axis.bar(places, plan[:, j], 0.8, low, color=shade)
        low = low + plan[:, j]
        axis.bar(places[j], -after[j], 0.8, color=shade)
    axis.axhline(0, color="black", linewidth=0.8)
    axis.set(title="above: before, below: after\ncolour: destination", xlabel="place", ylabel="mass", ylim=(-0.3, 0.35))
