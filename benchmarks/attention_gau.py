"""The gated attention unit against quadratic forms of it: forward and backward, one thread."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.harness import Table, compare, installed, peak_memory
from kexue.attention import GatedAttentionUnit

SECTION = "Gated attention unit"
KEY = 128
EAGER = "eager quadratic form"
FLASH = "FLASH-pytorch"


class Eager(nn.Module):
    """The published formula as the ports write it: every step makes a new (B, T, T) tensor."""

    def __init__(self, dim: int, normalization: str, causal: bool, dropout: float = 0.0) -> None:
        super().__init__()
        self.width, self.normalization, self.causal, self.dropout = 2 * dim, normalization, causal, dropout
        self.i_dense = nn.Linear(dim, 4 * dim + KEY, bias=False)
        self.o_dense = nn.Linear(2 * dim, dim, bias=False)
        self.gamma = nn.Parameter(torch.ones(2, KEY))

    def turn(self, x: Tensor, sin: Tensor, cos: Tensor) -> Tensor:
        even, odd = x[..., 0::2], x[..., 1::2]
        return torch.cat([even * cos - odd * sin, even * sin + odd * cos], -1)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        n = x.shape[1]
        u, v, z = F.silu(self.i_dense(x)).split([self.width, self.width, KEY], -1)
        angle = torch.arange(n)[:, None] * 10000.0 ** -(torch.arange(0, KEY, 2) / KEY)
        q, k = (self.turn(z * g, angle.sin(), angle.cos()) for g in self.gamma)
        scores = torch.einsum("bmd,bnd->bmn", q, k) / KEY**0.5
        shown = mask[:, None] & torch.ones(n, n, dtype=torch.bool).tril() if self.causal else mask[:, None]
        count = shown.sum(-1, keepdim=True)
        scores = scores.masked_fill(~shown, -1e4)
        if self.normalization == "softmax_plus":
            weights = torch.softmax(scores * count.log() / math.log(512), -1)
        else:
            weights = torch.relu(scores) ** 2 / count
        weights = F.dropout(weights, self.dropout)
        return self.o_dense(u * torch.einsum("bmn,bnd->bmd", weights, v))


class Step:
    """Forward and backward of a unit with fresh gradients."""

    def __init__(self, unit: nn.Module, call: Callable[[Tensor], Tensor], x: Tensor) -> None:
        self.unit, self.call, self.x = unit, call, x

    def clear(self) -> None:
        self.x.grad = None
        self.unit.zero_grad(set_to_none=True)

    def __call__(self) -> None:
        """One step; the old gradients are dropped first."""
        self.clear()
        self.call(self.x).sum().backward()

    def memory(self) -> dict[str, str]:
        """Peak memory of one step."""
        self.clear()  # outside the measured call: freeing blocks that the profiler never saw would confuse it
        return {"peak memory, MiB": f"{peak_memory(self):.0f}"}


def steps(dim: int, batch: int, length: int, normalization: str, causal: bool, dropout: float) -> dict[str, Step]:
    torch.manual_seed(0)
    x = torch.randn(batch, length, dim, requires_grad=True)
    mask = torch.ones(batch, length, dtype=torch.bool)
    ours = GatedAttentionUnit(dim, normalization=normalization, causal=causal, attention_dropout=dropout)
    eager = Eager(dim, normalization, causal, dropout)
    found = {EAGER: Step(eager, lambda x: eager(x, mask), x)}
    if installed("flash_pytorch") and normalization == "relu2_n":
        from flash_pytorch import GAU

        peer = GAU(dim=dim, query_key_dim=KEY, causal=causal, add_residual=False, norm_klass=nn.Identity)
        found[f"{FLASH} GAU"] = Step(peer, lambda x: peer(x, mask=mask), x)
    found["GatedAttentionUnit"] = Step(ours, lambda x: ours(x, mask), x)
    return found


def table(
    dim: int, batch: int, length: int, normalization: str, causal: bool = False, dropout: float = 0.0, repeats: int = 5
) -> Table:
    made = steps(dim, batch, length, normalization, causal, dropout)
    memory = {name: step.memory() for name, step in made.items()}
    extra = ", causal" * causal + f", dropout {dropout:g}" * (dropout > 0)
    return compare(
        f"{normalization}{extra}, T = {length}",
        f"B {batch}, D {dim}, E {2 * dim}, s {KEY}, float32, a padding mask given, forward and backward.",
        made,
        peer=EAGER,
        packages=("torch", FLASH) if installed("flash_pytorch") else ("torch",),
        repeats=repeats,
        extra=memory,
    )


def run() -> list[Table]:
    """All comparisons of this file."""
    return [
        table(768, 4, 512, "softmax_plus"),
    ]
