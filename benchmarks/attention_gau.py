"""The gated attention unit against quadratic forms of it: forward and backward, one thread."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.harness import Table, compare, installed, peak_memory
from kexue.attention import GatedAttentionUnit, gated_attention

SECTION = "Gated attention unit"
KEY = 128
EAGER = "eager quadratic form"
FLASH = "FLASH-pytorch"


def eager_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, normalization: str, causal: bool, p: float
) -> Tensor:
    """The published formula as the ports write it: every step makes a new (B, T, T) tensor."""
    n = q.shape[1]
    scores = torch.einsum("bmd,bnd->bmn", q, k) / KEY**0.5
    shown = mask[:, None] & torch.ones(n, n, dtype=torch.bool).tril() if causal else mask[:, None]
    count = shown.sum(-1, keepdim=True)
    scores = scores.masked_fill(~shown, -1e4)
    if normalization == "softmax_plus":
        weights = torch.softmax(scores * count.log() / math.log(512), -1)
    else:
        weights = torch.relu(scores) ** 2 / count
    return torch.einsum("bmn,bnd->bmd", F.dropout(weights, p), v)


class Eager(nn.Module):
    """A unit around :func:`eager_attention`."""

    def __init__(self, dim: int, normalization: str, causal: bool, dropout: float = 0.0) -> None:
        super().__init__()
        self.width, self.options = 2 * dim, (normalization, causal, dropout)
        self.i_dense = nn.Linear(dim, 4 * dim + KEY, bias=False)
        self.o_dense = nn.Linear(2 * dim, dim, bias=False)
        self.gamma = nn.Parameter(torch.ones(2, KEY))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """(B, T, D) and (B, T) -> (B, T, D)."""
        u, v, z = F.silu(self.i_dense(x)).split([self.width, self.width, KEY], -1)
        angle = torch.arange(x.shape[1])[:, None] * 10000.0 ** -(torch.arange(0, KEY, 2) / KEY)
        sin, cos = angle.sin(), angle.cos()
        turned = []
        for gamma in self.gamma:
            even, odd = (z * gamma)[..., 0::2], (z * gamma)[..., 1::2]
            turned.append(torch.cat([even * cos - odd * sin, even * sin + odd * cos], -1))
        return self.o_dense(u * eager_attention(turned[0], turned[1], v, mask, *self.options))


class Step:
    """Forward and backward with fresh gradients."""

    def __init__(self, call: Callable[[], Tensor], leaves: Iterable[Tensor]) -> None:
        self.call, self.leaves = call, list(leaves)

    def clear(self) -> None:
        """Drop the gradients."""
        for x in self.leaves:
            x.grad = None

    def __call__(self) -> None:
        """One step; the old gradients are dropped first."""
        self.clear()
        self.call().sum().backward()

    def memory(self) -> dict[str, str]:
        """Peak memory of one step, gradients included."""
        self.clear()  # outside the measured call: freeing blocks that the profiler never saw would confuse it
        return {"peak memory, MiB": f"{peak_memory(self):.0f}"}


def product_speed() -> float:
    """Multiplications and additions per millisecond in one large product, one thread."""
    a, b = torch.randn(1536, 1536), torch.randn(1536, 1536)
    out, best = torch.empty(1536, 1536), math.inf
    for _ in range(6):
        start = time.process_time()
        torch.mm(a, b, out=out)
        best = min(best, time.process_time() - start)
    return 1536**3 / best / 1e3


def limit(batch: int, length: int, width: int, dim: int, causal: bool) -> str:
    """What the products alone cost: nothing can be faster without fewer of them."""
    products = length * length * (3 * width + 3 * KEY) * (0.5 if causal else 1)
    products += 3 * length * dim * (3 * width + KEY)  # the linear maps of the unit
    return f"The products alone take {batch * products / product_speed():.0f} ms at the speed of one large product."


def table(title: str, workload: str, steps: dict[str, Step], repeats: int, remark: str) -> Table:
    memory = {name: step.memory() for name, step in steps.items()}
    packages = ("torch", FLASH) if installed("flash_pytorch") else ("torch",)
    return compare(
        title, f"{workload}, float32, a padding mask given, forward and backward.", steps, peer=EAGER,
        packages=packages, repeats=repeats, extra=memory, remarks=[remark],
    )  # fmt: skip


def operator(length: int, normalization: str, causal: bool = False, repeats: int = 5) -> Table:
    """q, k, v given; no linear maps."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, length, width, requires_grad=True) for width in (KEY, KEY, 1536))
    mask = torch.ones(1, length, dtype=torch.bool)
    steps = {
        EAGER: Step(lambda: eager_attention(q, k, v, mask, normalization, causal, 0.0), (q, k, v)),
        "gated_attention": Step(
            lambda: gated_attention(q, k, v, normalization=normalization, causal=causal, key_padding_mask=mask),
            (q, k, v),
        ),
    }
    return table(
        f"The operator alone, {normalization}{', causal' * causal}, T = {length}",
        f"B 1, E 1536, s {KEY}",
        steps,
        repeats,
        limit(1, length, 1536, 0, causal),
    )


def unit(
    length: int,
    normalization: str,
    *,
    dim: int = 768,
    batch: int = 1,
    causal: bool = False,
    dropout: float = 0.0,
    repeats: int = 5,
) -> Table:
    """Whole units with their linear maps."""
    torch.manual_seed(0)
    x = torch.randn(batch, length, dim, requires_grad=True)
    mask = torch.ones(batch, length, dtype=torch.bool)
    eager = Eager(dim, normalization, causal, dropout)
    steps = {EAGER: Step(lambda: eager(x, mask), (x, *eager.parameters()))}
    if installed("flash_pytorch") and normalization == "relu2_n":
        from flash_pytorch import GAU

        peer = GAU(
            dim=dim, query_key_dim=KEY, causal=causal, dropout=dropout, add_residual=False, norm_klass=nn.Identity
        )
        steps[f"{FLASH} GAU"] = Step(lambda: peer(x, mask=mask), (x, *peer.parameters()))
    ours = GatedAttentionUnit(dim, normalization=normalization, causal=causal, attention_dropout=dropout)
    steps["GatedAttentionUnit"] = Step(lambda: ours(x, mask), (x, *ours.parameters()))
    extra = ", causal" * causal + f", dropout {dropout:g}" * (dropout > 0)
    return table(
        f"The unit, {normalization}{extra}, D = {dim}, T = {length}",
        f"B {batch}, E {2 * dim}, s {KEY}",
        steps,
        repeats,
        limit(batch, length, 2 * dim, dim, causal),
    )


def chunks(length: int, causal: bool, repeats: int = 5) -> Table | None:
    """FLASH: quadratic inside chunks of 256, linear between them."""
    if not installed("flash_pytorch"):
        return None
    from flash_pytorch import FLASH as Peer

    torch.manual_seed(0)
    x = torch.randn(1, length, 768, requires_grad=True)
    mask = torch.ones(1, length, dtype=torch.bool)
    peer = Peer(dim=768, group_size=256, query_key_dim=KEY, causal=causal, norm_klass=nn.Identity)
    ours = GatedAttentionUnit(768, normalization="relu2_n", causal=causal, chunk_size=256)
    steps = {
        f"{FLASH} FLASH": Step(lambda: peer(x, mask=mask), (x, *peer.parameters())),
        "GatedAttentionUnit, chunk_size 256": Step(lambda: ours(x, mask), (x, *ours.parameters())),
    }
    return compare(
        f"Chunks{', causal' * causal}, D = 768, T = {length}",
        f"B 1, E 1536, s {KEY}, float32, a padding mask given, forward and backward.",
        steps,
        peer=f"{FLASH} FLASH",
        packages=("torch", FLASH),
        repeats=repeats,
        extra={name: step.memory() for name, step in steps.items()},
        remarks=["The peer has no RoPE here and adds its input to the output."],
    )


def run() -> list[Table]:
    """All comparisons of this file."""
    tables = [
        operator(1024, "softmax_plus", repeats=9),
        operator(4096, "softmax_plus", repeats=3),
        operator(4096, "relu2_n", repeats=3),
        operator(4096, "softmax_plus", causal=True, repeats=3),
        unit(512, "relu2_n", batch=2, repeats=7),
        unit(1024, "relu2_n", repeats=7),
        unit(4096, "relu2_n", repeats=3),
        unit(1024, "softmax_plus", causal=True, dropout=0.1, repeats=7),
        unit(1024, "relu2_n", dim=256, repeats=9),
        unit(4096, "relu2_n", dim=256, repeats=3),
        unit(4096, "softmax_plus", dim=256, causal=True, dropout=0.1, repeats=3),
        chunks(4096, False),
        chunks(4096, True),
    ]
    return [made for made in tables if made is not None]
