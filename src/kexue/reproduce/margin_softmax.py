"""Margin softmax: the triangle inequality behind it, and what a margin does for ranking.

The article has no experiment; three things are measured.

1. Property. Random clustered points; triples z1, z3 of one class and z2 of another. Among those that satisfy
   d(z1,c1) + d(z3,c1) + d(z2,c2) < d(z1,c2), how many have d(z1,z3) >= d(z1,z2)? With d = sqrt(1 - cos) and with the
   Euclidean distance there must be none; with d = 1 - cos, which is no metric, there must be some.
2. Digits (scikit-learn): train on the classes 0-4, retrieve among 5-9; share of queries whose nearest other sample
   is of another class, against the margin m of AM-Softmax.
3. Paraphrase retrieval (article 5743, smaller): synthetic groups made from the text that ships with Python; a
   character GRU is trained as a classifier over groups and ranks unseen groups; top-1 of softmax and AM-Softmax.
   Only in the full version.

Rule, fixed before measuring. The property holds if there are 0 violations for both metrics and a counter-example for
1 - cos. The digits part holds if the wrong share at m = .35 is below that at m = 0 by more than one standard error of
the paired difference over the seeds; the paraphrase part holds if top-1 at m = .35 is above that of softmax by more
than one standard error. "reproduced": everything that was run holds; "partly": the property holds and not all of
the rest; otherwise "not reproduced".
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from kexue.losses import MarginSoftmax
from kexue.reproduce._paraphrases import paraphrases
from kexue.reproduce.runner import Measurement, Verdict

CLAIM = (
    "sqrt(1 - cos) is a metric and 1 - cos is not; by the triangle inequality a class margin of the size of the mean "
    "class diameter makes correct classification imply correct ranking, so training with a margin ranks better."
)
MARGINS = (0.0, 0.1, 0.2, 0.35, 0.5, 0.6)


def _property(triples: int, seed: int) -> dict[str, list[Any]]:
    """Triples that satisfy the sufficient condition, and those of them that are ranked wrongly."""
    g = torch.Generator().manual_seed(seed)
    names = ("sqrt(1 - cos)", "euclidean", "1 - cos")
    satisfied, violated = dict.fromkeys(names, 0), dict.fromkeys(names, 0)
    for width in (2, 3, 8, 32):
        n = triples // 4
        centres = torch.randn(2, n, width, generator=g, dtype=torch.float64)
        spread = 0.6 * torch.rand(n, 1, generator=g, dtype=torch.float64)  # from tight to overlapping clusters
        z1, z3, z2 = (
            F.normalize(F.normalize(centres[i], dim=1) + spread * torch.randn(n, width, generator=g).double(), dim=1)
            for i in (0, 0, 1)
        )
        c1, c2 = F.normalize(centres[0], dim=1), F.normalize(centres[1], dim=1)
        for name in names:

            def d(a: Tensor, b: Tensor, name: str = name) -> Tensor:
                euclidean = torch.linalg.vector_norm(a - b, dim=1)  # of unit vectors: sqrt(2 - 2 cos)
                if name == "euclidean":
                    return euclidean
                return euclidean / math.sqrt(2) if name == "sqrt(1 - cos)" else euclidean.square() / 2

            if name == "euclidean":  # on points that are not normalised, where it is another geometry
                length = 0.5 + torch.rand(3, n, 1, generator=g, dtype=torch.float64)
                p1, p3, p2 = z1 * length[0], z3 * length[1], z2 * length[2]
            else:
                p1, p3, p2 = z1, z3, z2
            condition = d(p1, c1) + d(p3, c1) + d(p2, c2) < d(p1, c2)
            satisfied[name] += int(condition.sum())
            violated[name] += int((condition & (d(p1, p3) >= d(p1, p2))).sum())
    return {"distance": list(names), "satisfied": [*satisfied.values()], "ranked wrongly": [*violated.values()]}


@torch.random.fork_rng(devices=[])  # the caller's random state stays as it was
def _digits(margin: float, seed: int, epochs: int) -> float:
    """Share of queries of unseen classes whose nearest other sample is of another class."""
    torch.manual_seed(seed)
    data = load_digits()
    x, y = torch.tensor(data.data / 16.0, dtype=torch.float32), torch.tensor(data.target)
    encoder = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 32))
    head = MarginSoftmax(32, 5, kind="am", scale=30.0, margin=margin)
    optimizer = torch.optim.Adam([*encoder.parameters(), *head.parameters()], 2e-3)
    seen = (y < 5).nonzero().squeeze(1)
    for _ in range(epochs):
        for rows in seen[torch.randperm(len(seen))].split(64):
            loss = head(encoder(x[rows]), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        z = F.normalize(encoder(x[y >= 5]), dim=1)
        nearest = (z @ z.T).fill_diagonal_(-2).argmax(1)
    label = y[y >= 5]
    return float((label[nearest] != label).float().mean())


def _encode(groups: list[list[str]], length: int = 40) -> tuple[Tensor, Tensor]:
    known = {c: i + 2 for i, c in enumerate("abcdefghijklmnopqrstuvwxyz_ ")}  # 0 pads, 1 is unknown
    texts = [(text, label) for label, group in enumerate(groups) for text in group]
    ids = torch.zeros(len(texts), length, dtype=torch.long)
    for row, (text, _) in enumerate(texts):
        codes = [known.get(c, 1) for c in text[:length]]
        ids[row, : len(codes)] = torch.tensor(codes)
    return ids, torch.tensor([label for _, label in texts])


class _CharGRU(nn.Module):
    """Character embedding and GRU; the state after the last character."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(30, 32, padding_idx=0)
        self.gru = nn.GRU(32, width, batch_first=True)

    def forward(self, ids: Tensor) -> Tensor:
        length = (ids > 0).sum(1).clamp(min=1)
        ids = ids[:, : int(length.max())]
        return self.gru(self.embedding(ids))[0][torch.arange(len(ids)), length - 1]


@torch.random.fork_rng(devices=[])  # the caller's random state stays as it was
def _top1(margin: float, seed: int, train: int = 800, valid: int = 300, epochs: int = 16, width: int = 64) -> float:
    """Share of validation sentences whose nearest other sentence is of their group."""
    groups = paraphrases(train + valid, 4, seed)
    (x, y), (vx, vy) = _encode(groups[:train]), _encode(groups[train:])
    torch.manual_seed(seed)
    encoder = _CharGRU(width)
    head = MarginSoftmax(width, train, kind="am", scale=30.0, margin=margin)
    optimizer = torch.optim.Adam([*encoder.parameters(), *head.parameters()], 3e-3)
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).split(100):
            loss = head(encoder(x[rows]), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        z = F.normalize(encoder(vx), dim=1)
        nearest = (z @ z.T).fill_diagonal_(-2).argmax(1)
    return float((vy[nearest] == vy).float().mean())


def _gain(better: list[float], worse: list[float]) -> tuple[float, float]:
    """Mean of the paired differences and its standard error."""
    difference = np.array(better) - np.array(worse)
    return float(difference.mean()), float(difference.std(ddof=1) / math.sqrt(len(difference)))


def measure(quick: bool, seed: int) -> Measurement:
    """Measure the claim; see the module for the rule.

    Args:
        quick: Fewer triples, two margins on the digits, no paraphrase retrieval.
        seed: First of three seeds.
    """
    seeds = [seed, seed + 1, seed + 2]
    table = _property(100_000 if quick else 1_000_000, seed)
    wrong = dict(zip(table["distance"], table["ranked wrongly"], strict=True))
    holds = wrong["sqrt(1 - cos)"] == 0 and wrong["euclidean"] == 0 and wrong["1 - cos"] > 0
    margins = (0.0, 0.35) if quick else MARGINS
    shares = {m: [_digits(m, s, 10 if quick else 30) for s in seeds] for m in margins}
    gain, error = _gain(shares[0.0], shares[0.35])
    parts = [gain > error]
    root = 1 - math.cos(math.pi / 4)
    figures: dict[str, Any] = {
        "triples": table,
        "counter-example for 1 - cos": f"angles 0, 45, 90 degrees: 1 > {root:.3f} + {root:.3f}",
        "digits, unseen classes": {
            "m": list(margins),
            "wrongly ranked": [float(np.mean(shares[m])) for m in margins],
            "standard error": [float(np.std(shares[m], ddof=1) / math.sqrt(len(seeds))) for m in margins],
        },
        "digits: fewer wrong at m = .35 (paired)": [gain, error],
    }
    if not quick:
        softmax, am = ([_top1(m, s) for s in seeds] for m in (0.0, 0.35))
        gain, error = _gain(am, softmax)
        parts.append(gain > error)
        figures["paraphrases, top-1"] = {"seed": seeds, "softmax": softmax, "am m=.35": am}
        figures["paraphrases: more right at m = .35 (paired)"] = [gain, error]

    def plot(figure: Any) -> None:
        axis = figure.add_subplot(121)
        means = np.array([np.mean(shares[m]) for m in margins])
        errors = np.array([np.std(shares[m], ddof=1) / math.sqrt(len(seeds)) for m in margins])
        axis.errorbar(margins, 100 * means, 100 * errors, marker="o", capsize=3)
        axis.set(xlabel="margin m", ylabel="wrongly ranked queries, %", title="digits: trained on 0-4, ranked 5-9")
        axis = figure.add_subplot(122)
        t = np.linspace(0, np.pi, 200)
        axis.plot(np.degrees(t), np.sqrt(1 - np.cos(t)), label="sqrt(1 - cos)")
        axis.plot(np.degrees(t), 1 - np.cos(t), label="1 - cos")
        axis.plot([0, 45, 90], [0, root, 2 * root], "k:", label="two steps of 45 degrees, 1 - cos")
        axis.set(xlabel="angle, degrees", title="a metric grows slower than its steps")
        axis.legend()

    verdict: Verdict = "not reproduced"
    if holds:
        verdict = "reproduced" if all(parts) else "partly"
    note = f"Three seeds from {seed}; intervals are mean and standard error of paired differences."
    return Measurement(figures, verdict, plot, note + (" Paraphrase retrieval only runs in full." if quick else ""))
