"""Divergences of normals against torch.distributions and POT, and the Frechet distance against square roots."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import scipy.linalg
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

from benchmarks.harness import Table, compare, installed
from kexue.stats import Gaussian, frechet_distance, kl, w2

SECTION = "Divergences of normals"
FEATURES = ((512, 2048), (512, 170), (2048, 4096), (2048, 682))  # width, rows
SIZES = ((1000, 16), (100, 64), (8, 256), (1, 512))


def problem(batch: int, n: int, gradient: bool, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    g = torch.Generator().manual_seed(n)
    made = []
    for _ in range(2):
        a = torch.randn(batch, n, n, generator=g, dtype=torch.float64) / n**0.5
        made += [torch.randn(batch, n, generator=g, dtype=torch.float64), a @ a.mT + 0.1 * torch.eye(n).double()]
    return [x.to(dtype).requires_grad_(gradient) for x in made]


def step(function: Callable[..., Tensor], inputs: list[Tensor], gradient: bool) -> Callable[[], object]:
    def run() -> object:
        value = function(*inputs).sum()
        return torch.autograd.grad(value, inputs) if gradient else value

    return run


def ours(function: Callable[..., Tensor], mp: Tensor, sp: Tensor, mq: Tensor, sq: Tensor) -> Tensor:
    return function(Gaussian(mp, sp), Gaussian(mq, sq))


def pot(mp: Tensor, sp: Tensor, mq: Tensor, sq: Tensor) -> Tensor:
    import ot

    return ot.gaussian.bures_wasserstein_distance(mp, mq, sp, sq, paired=True) ** 2


def torch_kl(mp: Tensor, sp: Tensor, mq: Tensor, sq: Tensor) -> Tensor:
    # The registered function of torch itself, whatever is registered now.
    from torch.distributions.kl import _kl_multivariatenormal_multivariatenormal as peer

    return peer(MultivariateNormal(mp, sp), MultivariateNormal(mq, sq))


def pair(
    name: str,
    peer: str,
    theirs: Callable[..., Tensor],
    mine: Callable[..., Tensor],
    size: Any,
    gradient: bool,
    dtype: torch.dtype,
) -> Table:
    batch, n = size
    inputs = problem(batch, n, gradient, dtype)
    digits = str(dtype).removeprefix("torch.")
    contenders = {f"{name}, checked inputs": step(partial(ours, mine), inputs, gradient)}
    if peer.startswith("torch") or installed("ot"):
        contenders = {peer: step(theirs, inputs, gradient), **contenders}
    kind = "forward and backward" if gradient else "forward"
    return compare(
        f"{name}, {kind}: {batch} pairs of dimension {n}, {digits}",
        f"{kind}, {digits}, one thread; both start from covariances.",
        contenders,
        peer=peer,
        packages=("torch", "POT") if installed("ot") else ("torch",),
        repeats=5,
    )


def frechet(n: int, rows: int) -> Table:
    rng = np.random.default_rng(0)
    mix = rng.standard_normal((n, n)) / n**0.5
    x, y = rng.standard_normal((rows, n)) @ mix, rng.standard_normal((rows, n)) @ mix * 1.1 + 0.1

    def moments() -> tuple[Any, Any, Any]:
        return x.mean(0) - y.mean(0), np.cov(x.T), np.cov(y.T)

    def root() -> float:
        d, a, b = moments()
        return float(d @ d + np.trace(a) + np.trace(b) - 2 * np.trace(scipy.linalg.sqrtm(a @ b)).real)

    def eigenvalues() -> float:
        d, a, b = moments()
        roots = torch.linalg.eigvals(torch.from_numpy(a) @ torch.from_numpy(b)).sqrt().real.sum()
        return float(d @ d + np.trace(a) + np.trace(b) - 2 * roots)

    contenders: dict[str, Callable[[], object]] = {
        "scipy.linalg.sqrtm of the product": root,
        "eigenvalues of the product": eigenvalues,
        "frechet_distance": lambda: frechet_distance(x, y),
    }
    return compare(
        f"Frechet distance of {rows} and {rows} features of width {n}",
        "From features to the number, float64, one thread.",
        contenders,
        peer="scipy.linalg.sqrtm of the product",
        packages=("numpy", "scipy", "torch"),
        repeats=1 if n > 1000 else 3,
    )


def run() -> list[Table]:
    """All comparisons of this room."""
    tables = []
    for dtype, size, gradient in product((torch.float64, torch.float32), SIZES, (False, True)):
        tables.append(pair("w2", "POT bures_wasserstein_distance", pot, w2, size, gradient, dtype))
        tables.append(pair("kl", "torch.distributions", torch_kl, kl, size, gradient, dtype))
    return [*tables, *(frechet(*case) for case in FEATURES)]
