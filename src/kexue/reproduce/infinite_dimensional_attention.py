"""Softmax attention as infinite-dimensional linear attention: features, errors, ranks.

1. Features. Products of the symmetric features of TaylorFeatures and ExpPowerFeatures against the polynomial of the
   score, float64; the difference relative to the polynomial of |q|.|k|, the size of the terms that are added up.
2. Errors. Largest relative error against e^x on a dense grid of |x| <= 1, and relative and absolute on |x| <= 4.
3. Ranks. Numerical rank (singular values above 1e-6 of the first, and above rounding) of softmax(Q K^T), 256 tokens of
   width 4, and of the polynomials of degree 2 and 4 at width 2 and of degree 1 to 4 at width 4.
4. For information (full version only). How far the attention weights are from softmax, against positive random features
   (independent directions) with as many features, for scores of standard deviation 1 and 3.

Rule, fixed before measuring. Features hold if the difference is below 1e-12 everywhere. The table holds if every error
on |x| <= 1 rounds to the stated figure. The ranks hold if, for all seeds, that of softmax exceeds the width and those
of the truncations are C(width + p, p). "reproduced": all three; "partly": only the features and one of the others;
otherwise "not reproduced".
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from kexue.attention import ExpPowerFeatures, TaylorFeatures
from kexue.reproduce.runner import Measurement, Verdict

CLAIM = (
    "Softmax attention is linear attention of infinite width: the truncated Taylor series of e^x, or (1 + x/p)^p, has "
    "features of finite size with a controlled error, and the rank of attention is not bounded by the head width."
)

STATED = {  # relative error on |x| <= 1, with the digits that are stated
    "Taylor": {2: "0.36", 4: "0.019", 6: "0.00048", 8: "0.0000068"},
    "power": {2: "0.32", 4: "0.14", 6: "0.09", 8: "0.066"},
}


def _sim(x: Tensor, kind: str, p: int) -> Tensor:
    if kind == "power":
        return (1 + x / p) ** p
    total, term = torch.ones_like(x), torch.ones_like(x)
    for m in range(1, p + 1):
        term = term * x / m
        total = total + term
    return total


def _feature_error(kind: str, d: int, p: int, g: torch.Generator) -> float:
    q, k = (torch.randn(64, d, generator=g, dtype=torch.float64) for _ in range(2))
    phi = (TaylorFeatures if kind == "Taylor" else ExpPowerFeatures)(p, scale=1.0)
    difference = (phi.query(q) @ phi.key(k).T - _sim(q @ k.T, kind, p)).abs()
    return float((difference / _sim(q.abs() @ k.abs().T, kind, p)).max())


def _errors(kind: str, p: int, r: float) -> tuple[float, float]:
    """Largest relative and absolute error on a grid."""
    x = torch.linspace(-r, r, 200001, dtype=torch.float64)
    error = (_sim(x, kind, p) - x.exp()).abs()
    return float((error / x.exp()).max()), float(error.max())


def _rank(matrix: Tensor, tolerance: float) -> int:
    values = torch.linalg.svdvals(matrix)
    return int((values > tolerance * values[0]).sum())


def _scores(d: int, g: torch.Generator) -> Tensor:
    q, k = (torch.randn(256, d, generator=g, dtype=torch.float64) for _ in range(2))
    return q @ k.T / math.sqrt(d)


def _weights_error(d: int, p: int, spread: float, g: torch.Generator) -> tuple[int, float, float]:
    """Features, and the total variation from softmax of the Taylor weights and of random features, mean over rows."""
    q, k = (torch.randn(256, d, generator=g, dtype=torch.float64) * (spread * d**-0.5) ** 0.5 for _ in range(2))
    m = TaylorFeatures(p).num_features(d)
    exact = torch.softmax(q @ k.T, -1)
    omega = torch.randn(d, m, generator=g, dtype=torch.float64)
    features = [(x @ omega - x.square().sum(-1, keepdim=True) / 2).exp() for x in (q, k)]
    errors = []
    for weights in (_sim(q @ k.T, "Taylor", p), features[0] @ features[1].T):
        errors.append(float((weights / weights.sum(-1, keepdim=True) - exact).abs().sum(-1).mean() / 2))
    return m, errors[0], errors[1]


def measure(quick: bool, seed: int) -> Measurement:
    """Measure the claim; see the module for the rule.

    Args:
        quick: One seed instead of three, no comparison with random features.
        seed: First of the seeds.
    """
    seeds = [seed] if quick else [seed, seed + 1, seed + 2]
    cases = [
        (kind, d, p) for kind in ("Taylor", "power") for d, p in ((1, 6), (2, 8), (4, 5), (16, 2), (16, 4), (64, 2))
    ]
    found = [max(_feature_error(kind, d, p, torch.Generator().manual_seed(s)) for s in seeds) for kind, d, p in cases]
    features_hold = max(found) < 1e-12

    table: dict[str, list[Any]] = {"series": [], "p": [], "stated": [], "measured": [], "rounds to it": []}
    wide: dict[str, list[Any]] = {"series": [], "p": [], "relative": [], "absolute": [], "absolute / e^4": []}
    for kind, rows in STATED.items():
        for p, stated in rows.items():
            relative, _ = _errors(kind, p, 1.0)
            digits = len(stated) - 2
            same = f"{relative:.{digits}f}" == stated
            for name, value in zip(table, (kind, p, float(stated), relative, same), strict=True):
                table[name].append(value)
            relative, absolute = _errors(kind, p, 4.0)
            for name, value in zip(wide, (kind, p, relative, absolute, absolute / math.exp(4)), strict=True):
                wide[name].append(value)
    table_holds = all(table["rounds to it"])

    shapes = [(2, 2), (2, 4), (4, 1), (4, 2), (4, 3), (4, 4)]
    ranks: dict[str, list[Any]] = {"width": [], "p": [], "C(width + p, p)": [], "rank, smallest": [], "largest": []}
    spectra: dict[str, Tensor] = {}
    truncations_hold = True
    for d, p in shapes:
        seen = [_rank(_sim(_scores(d, torch.Generator().manual_seed(s)), "Taylor", p), 1e-13) for s in seeds]
        expected = math.comb(d + p, p)
        truncations_hold &= all(r == expected for r in seen)
        for name, value in zip(ranks, (d, p, expected, min(seen), max(seen)), strict=True):
            ranks[name].append(value)
    softmax: list[int] = []
    above_rounding: list[int] = []
    for s in seeds:
        matrix = torch.softmax(_scores(4, torch.Generator().manual_seed(s)), -1)
        softmax.append(_rank(matrix, 1e-6))
        above_rounding.append(_rank(matrix, 1e-13))
    ranks_hold = truncations_hold and min(softmax) > 4
    scores = _scores(4, torch.Generator().manual_seed(seed))
    for p in (1, 2, 3, 4):
        spectra[f"degree {p}"] = torch.linalg.svdvals(_sim(scores, "Taylor", p))
    spectra["softmax"] = torch.linalg.svdvals(torch.softmax(scores, -1))

    figures: dict[str, Any] = {
        "features against polynomial": {
            "series": [c[0] for c in cases], "width": [c[1] for c in cases], "p": [c[2] for c in cases],
            "largest relative difference": found,
        },
        "relative error, |x| <= 1": table,
        "errors, |x| <= 4": wide,
        "rank of the truncations, 256 tokens": ranks,
        "rank of softmax, width 4, above 1e-6": softmax,
        "rank of softmax, width 4, above rounding": above_rounding,
    }  # fmt: skip
    against: dict[str, list[Any]] = {"width": [], "p": [], "spread": [], "features": [], "Taylor": [], "random": []}
    if not quick:
        for d, p, spread in (
            (4, 4, 1),
            (16, 2, 1),
            (16, 4, 1),
            (64, 2, 1),
            (4, 4, 3),
            (16, 2, 3),
            (16, 4, 3),
            (64, 2, 3),
        ):
            rows3 = [_weights_error(d, p, spread, torch.Generator().manual_seed(s)) for s in seeds]
            mean = [sum(row[i] for row in rows3) / len(rows3) for i in (1, 2)]
            for name, value in zip(against, (d, p, spread, rows3[0][0], *mean), strict=True):
                against[name].append(value)
        figures["distance of the weights from softmax (total variation)"] = against

    def plot(figure: Any) -> None:
        axis = figure.add_subplot(121)
        for kind, style in (("Taylor", "o-"), ("power", "s--")):
            at = [i for i, name in enumerate(table["series"]) if name == kind]
            axis.semilogy([table["p"][i] for i in at], [table["measured"][i] for i in at], style, label=kind)
        axis.set_xticks([2, 4, 6, 8])
        axis.set(xlabel="p", title="largest relative error, |x| <= 1")
        axis.legend(fontsize=8)
        axis = figure.add_subplot(122)
        for name, values in spectra.items():
            axis.semilogy(range(1, 101), (values / values[0]).clamp(min=1e-17)[:100], label=name)
        axis.set(xlabel="index", title="singular values, width 4")
        axis.legend(fontsize=8)

    others = int(table_holds) + int(ranks_hold)
    verdict: Verdict = "not reproduced"
    if features_hold and others:
        verdict = "reproduced" if others == 2 else "partly"
    note = f"{len(seeds)} seed(s) from {seed}; ranks of truncations count singular values above 1e-13 of the first."
    return Measurement(figures, verdict, plot, note)
