"""SimSiam's training step against the published two passes, and the collapse meter against eigenvalues."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.harness import Table, compare
from kexue.models import CollapseMeter, SimSiam, simsiam_loss

SECTION = "SimSiam"
PEER = "two passes, as published"


class Published(nn.Module):
    """The structure of facebookresearch/simsiam around the same parts: each view on its own, torch's cosine."""

    def __init__(self, model: SimSiam) -> None:
        super().__init__()
        self.encoder = nn.Sequential(model.encoder, model.projector)
        self.predictor = model.predictor
        self.criterion = nn.CosineSimilarity(dim=1)

    def forward(self, x1: Tensor, x2: Tensor) -> Tensor:
        z1, z2 = self.encoder(x1), self.encoder(x2)
        p1, p2 = self.predictor(z1), self.predictor(z2)
        z1, z2 = z1.detach(), z2.detach()
        return -(self.criterion(p1, z2).mean() + self.criterion(p2, z1).mean()) * 0.5


def encoder(kind: str, width: int) -> tuple[nn.Module, int]:
    """An encoder, and the width of its output."""
    if kind == "batch norm":
        return nn.Sequential(nn.Linear(64, 256), nn.BatchNorm1d(256), nn.ReLU(), nn.Linear(256, width)), width
    return nn.Sequential(nn.Linear(64, 256), nn.LayerNorm(256), nn.GELU(), nn.Linear(256, width)), width


def build(kind: str, width: int, views: str) -> SimSiam:
    torch.manual_seed(0)
    backbone, dim = encoder(kind, width)
    if kind == "batch norm":
        return SimSiam(backbone, dim, views=views)
    heads = nn.Sequential(nn.Linear(width, width), nn.LayerNorm(width), nn.GELU(), nn.Linear(width, width))
    predictor = nn.Sequential(nn.Linear(width, width // 4), nn.GELU(), nn.Linear(width // 4, width))
    return SimSiam(backbone, dim, projector=heads, predictor=predictor, output_norm=False, views=views)


def step(model: nn.Module, batch: int) -> Callable[[], None]:
    generator = torch.Generator().manual_seed(1)
    x1, x2 = (torch.randn(batch, 64, generator=generator) for _ in range(2))

    def call() -> None:
        model.zero_grad()
        model(x1, x2).backward()

    return call


def training(kind: str, width: int, batch: int, repeats: int) -> Table:
    norms = "batch norm in encoder, projector and predictor" if kind == "batch norm" else "layer norm, no batch norm"
    contenders = {PEER: step(Published(build(kind, width, "apart")), batch)}
    remarks = []
    if kind == "batch norm":
        remarks.append('"mixed" takes the statistics of batch norm over both views: not the same training.')
    for views in ("auto", "mixed") if kind == "batch norm" else ("auto",):
        contenders[f'SimSiam, views="{views}"'] = step(build(kind, width, views), batch)
    return compare(
        f"Training step, {kind}, D {width}, batch {batch}",
        f"Encoder 64 - 256 - {width}, projector and predictor, {norms}; forward and backward, float32, "
        f"{torch.get_num_threads()} thread(s).",
        contenders,
        peer=PEER,
        packages=("torch", "numba"),
        repeats=repeats,
        remarks=remarks,
    )


def loss(width: int, batch: int) -> Table:
    generator = torch.Generator().manual_seed(0)
    p1, p2, z1, z2 = (torch.randn(batch, width, generator=generator) for _ in range(4))
    p1.requires_grad_()
    p2.requires_grad_()

    def torchs() -> None:
        value = -(F.cosine_similarity(p1, z2).mean() + F.cosine_similarity(p2, z1).mean()) * 0.5
        torch.autograd.grad(value, (p1, p2))

    return compare(
        f"The loss alone, D {width}, batch {batch}",
        f"Forward and gradient by both predictions, float32, {torch.get_num_threads()} thread(s).",
        {
            "torch's cosine_similarity": torchs,
            "simsiam_loss": lambda: torch.autograd.grad(simsiam_loss(p1, p2, z1, z2), (p1, p2)),
        },
        peer="torch's cosine_similarity",
        packages=("torch", "numba"),
        repeats=41,
    )


def meter(rows: int, width: int) -> Table:
    z = torch.randn(rows, width, generator=torch.Generator().manual_seed(0))

    def naive() -> None:
        u = F.normalize(z, dim=1)
        u.std(0).mean() * width**0.5
        values = torch.linalg.svdvals(u - u.mean(0)).square()
        values.sum().square() / values.square().sum()

    def eigenvalues() -> None:
        u = F.normalize(z, dim=1)
        u.std(0).mean() * width**0.5
        values = torch.linalg.eigvalsh(torch.cov(u.T))
        values.sum().square() / values.square().sum()

    return compare(
        f"Collapse meter, N {rows}, D {width}",
        f"std and rank, float32, {torch.get_num_threads()} thread(s).",
        {
            "singular values": naive,
            "eigenvalues of the covariance": eigenvalues,
            "CollapseMeter": lambda: CollapseMeter()(z),
        },
        peer="eigenvalues of the covariance",
        packages=("torch",),
        repeats=7,
    )


def run() -> list[Table]:
    """All comparisons of this room."""
    return [
        training("batch norm", 32, 64, 41),
        training("batch norm", 32, 256, 41),
        training("batch norm", 256, 64, 21),
        training("batch norm", 2048, 64, 7),
        training("batch norm", 2048, 256, 5),
        training("layer norm", 32, 64, 41),
        training("layer norm", 32, 256, 41),
        training("layer norm", 256, 64, 21),
        loss(32, 256),
        loss(256, 256),
        loss(2048, 256),
        meter(2000, 512),
        meter(300, 2048),
    ]
