"""Optimal transport against POT and scipy: assignments, masses, the line, Sinkhorn, the price of a certificate."""

from __future__ import annotations

import tracemalloc
import warnings
from collections.abc import Callable
from functools import partial

import numpy as np
import ot
import torch
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist

from benchmarks.harness import Table, compare
from kexue.stats import certificate, sinkhorn, transport, wasserstein

SECTION = "Optimal transport"
EMD = "ot.emd"
STEPS = 10_000_000


def memory(contenders: dict[str, Callable[[], object]]) -> dict[str, dict[str, str]]:
    """Peak of the arrays of each contender in one call; what compiled code allocates for itself is not seen."""
    found = {}
    for name, function in contenders.items():
        function()
        tracemalloc.start()
        function()
        found[name] = {"peak MiB of arrays": f"{tracemalloc.get_traced_memory()[1] / 2**20:.1f}"}
        tracemalloc.stop()
    return found


def clouds(n: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    g = np.random.default_rng(0)
    return g.normal(size=(n, width)), 1.2 * g.normal(size=(n, width)) + 0.5


def masses(n: int) -> tuple[np.ndarray, np.ndarray]:
    g = np.random.default_rng(1)
    a, b = g.random(n) + 0.1, g.random(n) + 0.1
    return a / a.sum(), b / b.sum()


def exact(n: int, width: int, metric: str, uniform: bool) -> Table:
    costs = cdist(*clouds(n, width), metric)
    p, q = (np.full(n, 1 / n),) * 2 if uniform else masses(n)
    found = transport(costs, p, q)
    contenders: dict[str, Callable[[], object]] = {
        EMD: lambda: ot.emd(p, q, costs, STEPS, log=True),
        "transport (with its certificate)": lambda: transport(costs, p, q),
        "certificate alone": lambda: certificate(costs, found.plan, found.f, found.g, p, q),
    }
    if uniform and n <= 1024:
        contenders["scipy linear_sum_assignment"] = lambda: linear_sum_assignment(costs)
    kind = "equal masses" if uniform else "different masses"
    return compare(
        f"Exact transport, {kind}, n = {n}, D = {width}",
        f"{metric} costs of {n} x {n} normal points, float64, one thread.",
        contenders,
        peer=EMD,
        packages=("POT", "scipy"),
        repeats=3,
        extra=memory(contenders),
        remarks=[
            f"Proven gap of transport: {found.gap:.1e}.",
            "The costs themselves are not counted; what POT's and numba's compiled code allocates is not seen.",
        ],
    )


def line(n: int) -> Table:
    x, y = (z[:, 0] for z in clouds(n, 1))
    a, b = masses(n)
    contenders: dict[str, Callable[[], object]] = {
        "ot.emd2_1d": lambda: ot.emd2_1d(x, y, metric="euclidean"),
        "ot.wasserstein_1d": lambda: ot.wasserstein_1d(x, y),
        "wasserstein": lambda: wasserstein(x, y),
        "ot.emd2_1d, masses": lambda: ot.emd2_1d(x, y, a, b, metric="euclidean"),
        "wasserstein, masses": lambda: wasserstein(x, y, weights=(a, b)),
    }
    return compare(
        f"On the line, n = {n}",
        "W_1, float64, one thread.",
        contenders,
        peer="ot.emd2_1d",
        packages=("POT",),
        extra=memory(contenders),
    )


def gradient(n: int, width: int) -> Table:
    x, y = (torch.from_numpy(z) for z in clouds(n, width))
    x.requires_grad_()

    def step(loss: Callable[[], torch.Tensor]) -> None:
        x.grad = None
        loss().backward()

    uniform = torch.full((n,), 1 / n, dtype=torch.float64)
    contenders: dict[str, Callable[[], object]] = {
        "ot.emd2": partial(step, lambda: ot.emd2(uniform, uniform, ot.dist(x, y, "euclidean"), numItermax=STEPS)),
        "wasserstein": partial(step, lambda: wasserstein(x, y)),
    }
    return compare(
        f"With gradient, n = {n}, D = {width}",
        "W_1 of two clouds of tensors, forward and backward, float64, one thread.",
        contenders,
        peer="ot.emd2",
        packages=("POT", "torch"),
        repeats=3,
    )


def entropic(n: int, width: int) -> Table:
    x, y = clouds(n, width)
    costs = cdist(x, y)
    eps = 0.05 * float(np.median(costs))
    peer = "ot.sinkhorn, sinkhorn_log"

    def theirs() -> object:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ot.sinkhorn([], [], costs, eps, method="sinkhorn_log", stopThr=1e-6, numItermax=2000)

    found, best = sinkhorn(x, y, eps, debias=False), transport(costs).cost
    contenders: dict[str, Callable[[], object]] = {
        peer: theirs,
        "sinkhorn, with its bracket": lambda: sinkhorn(x, y, eps, debias=False),
        "sinkhorn, with divergence": lambda: sinkhorn(x, y, eps),
    }
    return compare(
        f"Sinkhorn, n = {n}, D = {width}",
        "Euclidean costs, eps = .05 of their median, marginal error 1e-6, float64, one thread.",
        contenders,
        peer=peer,
        packages=("POT",),
        repeats=3,
        extra=memory(contenders),
        remarks=[
            f"Bracket of the exact cost {best:.4f}: {found.lower:.4f} to {found.upper:.4f}.",
            "POT measures the marginal error in L2, ours is L1 and so the stricter one. POT computes no bracket.",
        ],
    )


def run() -> list[Table]:
    """All comparisons of this room."""
    return [
        exact(1024, 2, "sqeuclidean", True),
        exact(2048, 2, "sqeuclidean", True),
        exact(2048, 32, "euclidean", True),
        exact(2048, 2, "euclidean", False),
        exact(2048, 32, "euclidean", False),
        line(100_000),
        gradient(1024, 2),
        entropic(512, 2),
        entropic(1024, 32),
    ]
