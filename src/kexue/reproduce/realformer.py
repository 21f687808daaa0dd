"""RealFormer: residual attention scores in a deep Post-LN encoder that is trained without warm-up.

1. Training. A masked language model of characters on the standard library's help texts (``pydoc_data.topics``): 12
   layers, Post-LN, width 64, 4 heads, Adam at 1e-3 from the first step, 15 % of the characters masked, BERT's
   initialisation (0.02). RealFormer and Post-LN share initial weights, batches and masks. Measured: loss on held-out
   text after 300 steps; the ratio of the gradient norms of the first and the last layer, geometric mean over the
   steps; the mean entropy of the attention of each layer on held-out text.
2. Exactness. Outputs and gradients of the three fused forms against the sum of score matrices, in float64.

Rule, fixed before measuring. (a) The mean held-out loss over the seeds is not higher with RealFormer; (b) the ratio of
the gradient norms is nearer to 1 (mean over the seeds of |log ratio|); (c) with RealFormer the entropy falls with
depth: lower in the last layer than in the first, and Spearman's correlation with depth negative, both for the means
over the seeds; (d) the fused forms are off by less than 1e-12. "reproduced": all four; "partly": (d) and one more at
least; otherwise "not reproduced".
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.nn import functional as F

from kexue.attention import ResidualScores, residual_attention, residual_attention_stack
from kexue.reproduce.runner import Measurement, Verdict

CLAIM = (
    "A residual connection between the attention scores of the layers trains a deep Post-LN Transformer better than "
    "Post-LN alone, with gradients that are more even over the depth and attention that is sparser in later layers."
)
LAYERS, WIDTH, HEADS, LENGTH, BATCH, RATE = 12, 64, 4, 32, 16, 1e-3


class _Layer(nn.Module):
    """A Post-LN layer."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)

    def heads(self, x: Tensor) -> tuple[Tensor, ...]:
        """q, k and v, (B, H, T, D) each."""
        return self.qkv(x).view(*x.shape[:2], 3 * HEADS, WIDTH // HEADS).transpose(1, 2).chunk(3, 1)

    def forward(self, x: Tensor, attended: Tensor) -> Tensor:
        x = self.norm1(x + self.out(attended.transpose(1, 2).flatten(2)))
        return self.norm2(x + self.down(F.gelu(self.up(x))))


class _Encoder(nn.Module):
    """A character encoder with a softmax on top; ``residual`` is the only difference."""

    def __init__(self, vocabulary: int, residual: bool) -> None:
        super().__init__()
        self.residual = residual
        self.tokens, self.positions = nn.Embedding(vocabulary + 1, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.layers = nn.ModuleList(_Layer() for _ in range(LAYERS))
        self.head = nn.Linear(WIDTH, vocabulary)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def forward(self, ids: Tensor, entropies: list[float] | None = None) -> Tensor:
        x = self.norm(self.tokens(ids) + self.positions.weight)
        scores, total = ResidualScores(), None
        for layer in self.layers:
            q, k, v = layer.heads(x)  # type: ignore[operator]
            if not self.residual:
                scores.reset()
            if entropies is not None:  # only when measuring: the matrix itself
                own = q @ k.mT / math.sqrt(WIDTH // HEADS)
                total = own if total is None or not self.residual else total + own
                p = total.softmax(-1)
                entropies.append(float(-(p * p.clamp(min=1e-30).log()).sum(-1).mean()))
            x = layer(x, scores.step(q, k, v))
        out: Tensor = self.head(x)
        return out


def _text() -> tuple[Tensor, int]:
    """The help texts as character numbers, and how many characters there are."""
    from pydoc_data.topics import topics

    text = " ".join(" ".join(topics[key].split()) for key in sorted(topics))
    known = sorted(set(text) & set(map(chr, range(32, 127))))
    number = {c: n for n, c in enumerate(known)}
    return torch.tensor([number.get(c, 0) for c in text]), len(known)


def _masked(data: Tensor, vocabulary: int, g: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """A batch: characters with some masked, the characters, and where the mask is."""
    starts = torch.randint(len(data) - LENGTH, (BATCH, 1), generator=g)
    ids = data[starts + torch.arange(LENGTH)]
    hidden = torch.rand(ids.shape, generator=g) < 0.15
    return ids.masked_fill(hidden, vocabulary), ids, hidden


def _norm(module: nn.Module) -> float:
    return float(torch.stack([p.grad.norm() for p in module.parameters() if p.grad is not None]).norm())


@torch.random.fork_rng(devices=[])  # the caller's random state stays as it was
def _train(residual: bool, seed: int, steps: int) -> dict[str, Any]:
    """Train one model; held-out loss, losses on the way, gradient ratio and entropies."""
    data, vocabulary = _text()
    cut = len(data) * 9 // 10
    torch.manual_seed(seed)
    model = _Encoder(vocabulary, residual)
    optimizer = torch.optim.Adam(model.parameters(), RATE)
    g = torch.Generator().manual_seed(seed)
    losses, ratios = [], []
    for _ in range(steps):
        masked, ids, hidden = _masked(data[:cut], vocabulary, g)
        loss = F.cross_entropy(model(masked)[hidden], ids[hidden])
        optimizer.zero_grad()
        loss.backward()
        ratios.append(math.log(_norm(model.layers[0]) / _norm(model.layers[-1])))
        optimizer.step()
        losses.append(float(loss.detach()))
    held: list[float] = []
    entropies: list[list[float]] = []
    g = torch.Generator().manual_seed(10**6 + seed)
    with torch.no_grad():
        for _ in range(20):
            masked, ids, hidden = _masked(data[cut:], vocabulary, g)
            entropies.append([])
            held.append(float(F.cross_entropy(model(masked, entropies[-1])[hidden], ids[hidden])))
    return {
        "loss": float(np.mean(held)),
        "losses": losses,
        "log ratio": float(np.mean(ratios)),
        "entropy": np.mean(entropies, 0).tolist(),
    }


def _error(got: Tensor, exact: Tensor) -> float:
    return float(((got - exact).norm() / exact.norm()).detach())


def _exactness(seed: int) -> dict[str, list[Any]]:
    """Largest relative error of outputs and gradients of the fused forms, float64, 12 layers, with padding."""
    g = torch.Generator().manual_seed(seed)
    shapes = ((2, 3, 40, 16), (2, 3, 50, 16), (2, 3, 50, 16))
    leaves = [torch.randn(s, generator=g, dtype=torch.float64).requires_grad_() for s in shapes for _ in range(LAYERS)]
    qs, ks, vs = leaves[:LAYERS], leaves[LAYERS : 2 * LAYERS], leaves[2 * LAYERS :]
    keep = torch.rand(2, 50, generator=g) < 0.8
    upstream = [torch.randn(2, 3, 40, 16, generator=g, dtype=torch.float64) for _ in range(LAYERS)]

    def plain() -> list[Tensor]:
        outs, total = [], torch.zeros((), dtype=torch.float64)
        for q, k, v in zip(qs, ks, vs, strict=True):
            total = total + q @ k.mT / 4
            outs.append(total.masked_fill(~keep[:, None, None], -math.inf).softmax(-1) @ v)
        return outs

    def running() -> list[Tensor]:
        scores = ResidualScores()
        return [scores.step(q, k, v, keep) for q, k, v in zip(qs, ks, vs, strict=True)]

    forms: dict[str, Callable[[], list[Tensor]]] = {
        "residual_attention": lambda: [residual_attention(qs, ks, vs[-1], key_padding_mask=keep)],
        "residual_attention_stack": lambda: residual_attention_stack(qs, ks, vs, keep),
        "ResidualScores": running,
    }
    table: dict[str, list[Any]] = {"form": [], "output": [], "gradients": []}
    for name, form in forms.items():
        outs = form()
        expected = plain()[-len(outs) :]
        got, want = (
            torch.autograd.grad(x, leaves, upstream[-len(outs) :], allow_unused=True) for x in (outs, expected)
        )
        pairs = [(a, b) for a, b in zip(got, want, strict=True) if a is not None and b is not None]
        table["form"].append(name)
        table["output"].append(max(_error(a, b) for a, b in zip(outs, expected, strict=True)))
        table["gradients"].append(max(_error(a, b) for a, b in pairs))
    return table


def measure(quick: bool, seed: int) -> Measurement:
    """Measure the claim; see the module for the rule.

    Args:
        quick: One seed and 10 steps: shows that everything runs, says nothing about training.
        seed: First of three seeds.
    """
    seeds = [seed] if quick else [seed, seed + 1, seed + 2]
    steps = 10 if quick else 300
    runs = {name: [_train(name == "RealFormer", s, steps) for s in seeds] for name in ("RealFormer", "Post-LN")}
    names = list(runs)
    loss = {name: [r["loss"] for r in runs[name]] for name in names}
    log_ratio = {name: [r["log ratio"] for r in runs[name]] for name in names}
    entropy = {name: np.mean([r["entropy"] for r in runs[name]], 0) for name in names}
    depth = np.arange(1, LAYERS + 1)
    trend = {name: float(spearmanr(depth, entropy[name]).statistic) for name in names}
    unevenness = {name: float(np.mean(np.abs(log_ratio[name]))) for name in names}
    exact = _exactness(seed)

    lower = float(np.mean(loss["RealFormer"])) <= float(np.mean(loss["Post-LN"]))
    even = unevenness["RealFormer"] < unevenness["Post-LN"]
    real = entropy["RealFormer"]
    sparser = bool(real[-1] < real[0]) and trend["RealFormer"] < 0
    right = max(exact["output"] + exact["gradients"]) < 1e-12
    figures: dict[str, Any] = {
        "training": {
            "model": names,
            "held-out loss": [float(np.mean(loss[n])) for n in names],
            "of each seed": [loss[n] for n in names],
            "gradient, first / last layer": [float(np.exp(np.mean(log_ratio[n]))) for n in names],
            "mean |log ratio|": [unevenness[n] for n in names],
            "entropy, layer 1": [float(entropy[n][0]) for n in names],
            "entropy, layer 12": [float(entropy[n][-1]) for n in names],
            "Spearman with depth": [trend[n] for n in names],
        },
        "relative error of the fused forms, float64": exact,
        "loss not higher": str(lower),
        "gradients more even": str(even),
        "entropy falls with depth": str(sparser),
        "fused forms exact": str(right),
    }

    def plot(figure: Any) -> None:
        left, right_axis = figure.subplots(1, 2)
        for name in names:
            curve = np.mean([r["losses"] for r in runs[name]], 0)
            width = min(10, len(curve))
            smooth = np.convolve(curve, np.ones(width) / width, "valid")
            left.plot(np.arange(len(smooth)) + width, smooth, label=name)
            right_axis.plot(depth, entropy[name], marker="o", label=name)
        left.set(xlabel="step", ylabel="masked loss, nats", title="training loss, mean of 10 steps and of the seeds")
        right_axis.set(xlabel="layer", ylabel="entropy, nats", title="mean attention entropy, held-out text")
        right_axis.axhline(math.log(LENGTH), color="grey", linewidth=0.8, linestyle=":")
        for axis in (left, right_axis):
            axis.title.set_fontsize(9)
            axis.legend(fontsize=8)

    verdict: Verdict = "not reproduced"
    if right and (lower or even or sparser):
        verdict = "reproduced" if lower and even and sparser else "partly"
    note = (
        "One seed and 10 steps only: the training figures mean nothing."
        if quick
        else f"{len(seeds)} seeds from {seed}, 300 steps of {BATCH} x {LENGTH} characters; "
        f"log {LENGTH} = {math.log(LENGTH):.2f} is the entropy of uniform attention (dotted)."
    )
    return Measurement(figures, verdict, plot, note)
