"""Gated attention and softmax: what happens to a model trained at one length on other lengths.

A masked character model (15 % of the characters hidden) on the help text of Python's own ``pydoc_data.topics``, 90 % of
it for training: four gated attention units of width 96 (keys of width 32) with RMS post-norm and tied output, AdamW
3e-3 with 20 steps of warm-up and linear decay, batches of 16 pieces of 64 characters. Trained once with relu2_n
(relu(.)^2 / n) and once with softmax, for each seed, with the same batches. Accuracy on hidden characters of the
held-out text in pieces of 16 to 512 characters, about 16 000 characters for each length. The model of relu2_n is
evaluated a second time with its divisor fixed at the training length, relu(.)^2 / 64, which is the same at 64.

Fewer steps than the article's models by orders of magnitude, so only orderings are compared.

Rule, fixed before measuring. "fixed": on every seed the fixed divisor is more accurate than n at 16 and at 32.
"softmax": on every seed, at 256 and at 512, softmax is more accurate than relu2_n and its lead is larger than at 64.
"reproduced": both hold; "partly": one of them; otherwise "not reproduced". The quick version trains one seed for a few
steps, which shows that everything runs and no more.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kexue.attention import GatedAttentionUnit
from kexue.reproduce.runner import Measurement, Verdict

CLAIM = (
    "Gated attention with relu squared over n does not carry over to other lengths, and dividing by the training "
    "length instead is better on shorter inputs; softmax carries over."
)
LENGTH = 64
LENGTHS = (16, 32, 64, 128, 256, 512)
STEPS, QUICK_STEPS, WARM_UP, BATCH = 300, 20, 20, 16
EVALUATED, QUICK_EVALUATED = 16384, 2048  # characters for each length
WIDTH, KEY, UNITS = 96, 32, 4


class _Network(nn.Module):
    def __init__(self, characters: int, normalization: str) -> None:
        super().__init__()
        self.table = nn.Embedding(characters, WIDTH)
        self.layers = [
            GatedAttentionUnit(WIDTH, key_size=KEY, normalization=normalization, norm_length=LENGTH, offset=False)
            for _ in range(UNITS)
        ]
        self.units = nn.ModuleList(self.layers)

    def forward(self, ids: Tensor) -> Tensor:
        """(B, T) -> (B, T, WIDTH)."""
        x = F.rms_norm(self.table(ids), (WIDTH,))
        for unit in self.layers:
            x = F.rms_norm(x + unit(x), (WIDTH,))
        return x

    def scores(self, x: Tensor) -> Tensor:
        """(N, WIDTH) -> (N, characters)."""
        return x @ self.table.weight.T / math.sqrt(WIDTH)


class _Text:
    def __init__(self) -> None:
        from pydoc_data.topics import topics

        text = "".join(topics.values())
        characters = {c: i for i, c in enumerate(sorted(set(text)))}
        self.ids = torch.tensor([characters[c] for c in text])
        self.mask, self.size = len(characters), len(characters) + 1
        self.cut = int(0.9 * len(text))

    def batch(self, count: int, length: int, held_out: bool, g: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Inputs with hidden characters, the characters, and which are hidden."""
        low, high = (self.cut, len(self.ids)) if held_out else (0, self.cut)
        start = torch.randint(low, high - length, (count, 1), generator=g)
        ids = self.ids[start + torch.arange(length)]
        hidden = torch.rand(ids.shape, generator=g) < 0.15
        return ids.masked_fill(hidden, self.mask), ids, hidden


@torch.random.fork_rng(devices=[])  # the caller's random state stays as it was
def _train(text: _Text, normalization: str, seed: int, steps: int) -> _Network:
    torch.manual_seed(seed)
    network = _Network(text.size, normalization)
    optimizer = torch.optim.AdamW(network.parameters(), 3e-3, weight_decay=0.0)
    g = torch.Generator().manual_seed(seed)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 3e-3 * min(1, (step + 1) / WARM_UP) * (1 - step / steps)
        inputs, ids, hidden = text.batch(BATCH, LENGTH, False, g)
        loss = F.cross_entropy(network.scores(network(inputs)[hidden]), ids[hidden])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network


@torch.no_grad()
def _accuracies(text: _Text, network: _Network, seed: int, characters: int) -> list[float]:
    """Per cent, for each length."""
    found = []
    for length in LENGTHS:
        g = torch.Generator().manual_seed(seed)
        inputs, ids, hidden = text.batch(max(8, characters // length), length, True, g)
        guess = network.scores(network(inputs)[hidden]).argmax(-1)
        found.append(100 * float((guess == ids[hidden]).double().mean()))
    return found


def _curves(text: _Text, seed: int, steps: int, characters: int) -> dict[str, list[float]]:
    """Accuracy at each length: two trained models, one of them evaluated with both divisors."""
    network = _train(text, "relu2_n", seed, steps)
    found = {"relu2 / n": _accuracies(text, network, seed, characters)}
    for unit in network.layers:
        unit.normalization = "relu2_const"
    found["relu2 / 64"] = _accuracies(text, network, seed, characters)
    network = _train(text, "softmax", seed, steps)
    found["softmax"] = _accuracies(text, network, seed, characters)
    return found


def measure(quick: bool, seed: int) -> Measurement:
    """Measure the claim; see the module for the rule.

    Args:
        quick: One seed, few steps.
        seed: First of three seeds.
    """
    text = _Text()
    seeds = [seed] if quick else [seed, seed + 1, seed + 2]
    steps, characters = (QUICK_STEPS, QUICK_EVALUATED) if quick else (STEPS, EVALUATED)
    runs = [_curves(text, s, steps, characters) for s in seeds]
    at = {length: i for i, length in enumerate(LENGTHS)}
    lead = [{n: run["softmax"][i] - run["relu2 / n"][i] for n, i in at.items()} for run in runs]
    gain = [{n: run["relu2 / 64"][at[n]] - run["relu2 / n"][at[n]] for n in LENGTHS} for run in runs]
    fixed = all(g[n] > 0 for g in gain for n in (16, 32))
    softmax = all(x[n] > max(0.0, x[LENGTH]) for x in lead for n in (256, 512))
    mean = {name: [float(np.mean([run[name][i] for run in runs])) for i in at.values()] for name in runs[0]}
    figures: dict[str, Any] = {
        "the fixed divisor is better at 16 and 32": str(fixed),
        "softmax carries over better": str(softmax),
        "accuracy, %": {"length": list(LENGTHS), **mean},
        "points of relu2 / 64 over relu2 / n": {"seed": seeds, **{str(n): [g[n] for g in gain] for n in LENGTHS}},
        "points of softmax over relu2 / n": {"seed": seeds, **{str(n): [x[n] for x in lead] for n in LENGTHS}},
    }
    for s, run in zip(seeds, runs, strict=True):
        figures[f"accuracy, %, seed {s}"] = {"length": list(LENGTHS), **run}

    def plot(figure: Any) -> None:
        axis = figure.add_subplot()
        for name, values in mean.items():
            low, high = ([pick(run[name][i] for run in runs) for i in at.values()] for pick in (min, max))
            axis.plot(LENGTHS, values, marker="o", label=name)
            axis.fill_between(LENGTHS, low, high, alpha=0.2)
        axis.axvline(LENGTH, color="grey", linestyle=":")
        axis.set_xscale("log", base=2)
        axis.set_xticks(LENGTHS, [str(n) for n in LENGTHS])
        axis.set(
            xlabel="length at evaluation (trained at 64)", ylabel="hidden characters guessed, %",
            title=f"mean and range of {len(seeds)} seed{'s' * (len(seeds) > 1)}",
        )  # fmt: skip
        axis.legend()

    verdict: Verdict = "reproduced" if fixed and softmax else "partly" if fixed or softmax else "not reproduced"
    note = f"Seeds {', '.join(map(str, seeds))}; {steps} steps of {BATCH} x {LENGTH} characters for each model."
    return Measurement(figures, verdict, plot, note)
