"""The path kernel over a whole training, against the same decomposition with per-example gradients."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from benchmarks.harness import Table, compare, peak_memory
from kexue.explain import PathKernel

SECTION = "Explanation"
TRAIN, TEST, STEPS, RATE = 200, 100, 100, 0.01
POINTS = ((0.5 - 0.15**0.5, 5 / 18), (0.5, 8 / 18), (0.5 + 0.15**0.5, 5 / 18))
TEXTBOOK = "vmap(grad), a kernel at each point"
MEAN = "vmap(grad), mean over the chord first"


class Work:
    """A model and its data; every contender starts from the same parameters and returns the contributions."""

    def __init__(self, widths: tuple[int, ...], dtype: torch.dtype) -> None:
        layers: list[nn.Module] = []
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            for a, b in itertools.pairwise(widths):
                layers += [nn.Linear(a, b), nn.Tanh()]
            self.model = nn.Sequential(*layers[:-1]).to(dtype)
            self.x, self.x_test = (torch.randn(n, widths[0]).to(dtype) for n in (TRAIN, TEST))
            self.y = torch.randn(TRAIN, 1).to(dtype)
        self.start = {name: p.detach().clone() for name, p in self.model.named_parameters()}

    def ours(self) -> Tensor:
        self.model.load_state_dict(self.start)
        pk = PathKernel(self.model).fit(self.x, self.y, lr=RATE, steps=STEPS)
        return pk.contributions(self.x_test)

    def training(self) -> None:
        """Plain training, which every contender contains."""
        self.model.load_state_dict(self.start)
        optimizer = torch.optim.SGD(self.model.parameters(), RATE)
        for _ in range(STEPS):
            optimizer.zero_grad()
            (self.model(self.x) - self.y).square().mean().backward()
            optimizer.step()

    def decompose(self, jacobian: Callable[..., Tensor], mean_first: bool) -> Tensor:
        """Per-example gradients as matrices, of the examples at each step and the test points on its chord."""
        shares = torch.zeros(TEST, TRAIN, dtype=self.x.dtype)
        here = {name: p.clone() for name, p in self.start.items()}
        for _ in range(STEPS):
            with torch.no_grad():
                off = 2 * (functional_call(self.model, here, (self.x,)) - self.y)[:, 0] / TRAIN
            rows = jacobian(here, self.x)
            gradient = (rows.T @ off).split([p.numel() for p in here.values()])
            there = {n: p - RATE * g.view_as(p) for (n, p), g in zip(here.items(), gradient, strict=True)}
            mean: Tensor | float = 0.0
            for u, weight in POINTS:
                points = jacobian({n: (1 - u) * here[n] + u * there[n] for n in here}, self.x_test)
                if mean_first:
                    mean = mean + weight * points
                else:
                    shares -= RATE * weight * (points @ rows.T) * off
            if mean_first:
                shares -= RATE * (mean @ rows.T) * off
            here = there
        return shares

    def vectorised(self, parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        def output(p: dict[str, Tensor], row: Tensor) -> Tensor:
            return functional_call(self.model, p, (row[None],))[0, 0]

        found = vmap(grad(output), (None, 0))(parameters, x)
        return torch.cat([g.flatten(1) for g in found.values()], 1)

    def one_by_one(self, parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        leaves = {n: p.detach().requires_grad_() for n, p in parameters.items()}
        made = []
        for row in x:
            out = functional_call(self.model, leaves, (row[None],))[0, 0]
            made.append(torch.cat([g.flatten() for g in torch.autograd.grad(out, list(leaves.values()))]))
        return torch.stack(made)


def table(widths: tuple[int, ...], dtype: torch.dtype, naive: bool, repeats: int) -> Table:
    work = Work(widths, dtype)
    contenders: dict[str, Callable[[], object]] = {
        TEXTBOOK: lambda: work.decompose(work.vectorised, False),
        MEAN: lambda: work.decompose(work.vectorised, True),
        "PathKernel": work.ours,
        "limit: the training alone": work.training,
    }
    if naive:
        contenders["a backward pass per example"] = lambda: work.decompose(work.one_by_one, True)
    expected = work.decompose(work.vectorised, False)
    extra = {name: {"memory, MiB": f"{peak_memory(contenders[name]):.1f}"} for name in (TEXTBOOK, MEAN, "PathKernel")}
    off = float((work.ours() - expected).abs().max() / expected.abs().max())
    kind = str(dtype).removeprefix("torch.")
    return compare(
        f"Contributions of {TRAIN} examples to {TEST} points, MLP {'-'.join(map(str, widths))}, {kind}",
        f"Training of {STEPS} full-batch steps included, three points on each chord, {kind}, one thread.",
        contenders,
        peer=TEXTBOOK,
        packages=("torch",),
        repeats=repeats,
        extra=extra,
        remarks=[f"Largest difference of the contributions, relative to the largest: {off:.1e}."],
    )


def run() -> list[Table]:
    """All comparisons of this room."""
    return [
        table((64, 64, 1), torch.float64, True, 3),
        table((64, 64, 1), torch.float32, False, 5),
        table((64, 128, 128, 1), torch.float64, False, 3),
    ]
