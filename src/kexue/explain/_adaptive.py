"""Adaptive quadrature along a path whose end-to-end change is known on every sub-interval.

    on any [a, b]   F(a) - F(b) = sum_i integral over [a, b] of slope_i,   slope_i = -grad_i * path'_i

so that the error of the sum is known exactly for the price of F at the ends. A panel is a Gauss-Legendre rule on a
sub-interval; a gradient brings F at its node with it, so that a panel of n nodes has n + 2 values of F on a profile
and n + 1 parts whose sums can be compared. A round evaluates the open panels of all examples. A panel is accepted if

- its share of the gap fits into what the tolerance leaves for the rest of the path, and
- its attributions, in the L1 norm, agree with a coarser rule on the same nodes, and its parts with the profile: the gap
  is one number in which the errors of many features can cancel, and a bump between two nodes is invisible to it.

One that is not is cut where the largest error of a part is. Where F changes by more than a share of its range between
two known places, the place is narrowed by bisection without gradients first. The sizes of the gradients that were seen
inside a panel before it was cut out are remembered: one whose own nodes are all much lower has missed something. The
worst panels are cut first, so that evaluations that run out are missed where it matters least.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kexue.explain._evaluations import Along
from kexue.explain._quadrature import panel_rule

__all__ = ["Integrals", "integrate"]

FIRST = 9  # nodes of the first panel, the whole path: with both ends eleven values of F
LATER = 5  # nodes of the others
JUMP = 0.4  # share of the range of F above which the step between two places is narrowed without gradients
FOOT = 0.02  # the same for a step that is STEEP times as long as one beside it: the foot of a flip
STEEP = 4.5
FLAT = 4.0  # multiple of the tolerance below which steps are left together


@dataclass(eq=False)
class _Panel:
    row: int
    places: list[float]  # where F is known: its ends, and places in between that split it further
    values: list[float]
    cuts: set[float] = field(default_factory=set)  # where it will be cut
    hidden: bool = False  # the values of F do not show why
    heights: dict[float, float] = field(default_factory=dict)  # L1 norms of the slopes that were seen inside

    @property
    def width(self) -> float:
        return self.places[-1] - self.places[0]

    def insert(self, place: float, value: float) -> int:
        """Remember F at a place; its number."""
        at = int(np.searchsorted(self.places, place))
        self.places.insert(at, place)
        self.values.insert(at, value)
        return at


@dataclass
class _Row:
    """What is known of an example."""

    low: float
    high: float
    allowed: float  # what the tolerance of the gap leaves
    whole: float = 0.0  # estimate of the L1 norm of the attributions, from below
    open: float = 1.0  # length of the path that is not accepted yet
    used: int = 2  # evaluations, with those that are planned
    gap: float = 0.0  # sum of the sizes of the gaps
    error: float = 0.0
    size: float = 0.0  # L1 norms of the accepted parts
    profile: dict[float, float] = field(default_factory=dict)

    def see(self, places: list[float], values: list[float]) -> None:
        self.low, self.high = min(self.low, *values), max(self.high, *values)
        self.profile.update(zip(places, values, strict=True))

    def accept(self, width: float, found: _Found) -> None:
        self.gap += found.gap
        self.error += max(found.error, found.gap)
        self.size += found.size
        self.open -= width
        self.allowed = max(0.0, self.allowed - found.gap)


@dataclass
class Integrals:
    """What :func:`integrate` returns.

    Attributes:
        total: (B, ...) contributions, in float32 or float64.
        gap: (B,) sum of the sizes of the gaps of all panels, float64.
        error: (B,) estimate of the L1 error of the contributions, float64.
        size: (B,) sum of the L1 norms of all panels, float64.
        profiles: Of each example, place -> value of F.
    """

    total: Tensor
    gap: Tensor
    error: Tensor
    size: Tensor
    profiles: list[dict[float, float]]


def integrate(
    along: Along, start: list[float], end: list[float], tolerance: list[float], relative: float, max_evals: int
) -> Integrals:
    """Integrate the slopes of all examples from 0 to 1.

    Args:
        along: The function on its paths.
        start: F at 0 of each example.
        end: F at 1.
        tolerance: Largest gap of each example.
        relative: Largest error of the attributions, relative to their L1 norm.
        max_evals: Most evaluations of F for an example, with or without gradient, the two ends among them.

    Returns:
        The integrals. Where the evaluations do not suffice, the last values are taken as they are.
    """
    x = along.x
    noise = 4 * torch.finfo(x.dtype).eps
    # Two places closer than this may be one point; in half precision they still differ in some of many coordinates.
    least = max(min(noise, 1e-4), 1e-12)
    first = max(1, min(FIRST, max_evals - 2))
    rows = [
        _Row(min(a, b), max(a, b), t, profile={0.0: a, 1.0: b}) for a, b, t in zip(start, end, tolerance, strict=True)
    ]
    panels = [_Panel(i, [0.0, 1.0], [a, b]) for i, (a, b) in enumerate(zip(start, end, strict=True))]
    for row in rows:
        row.used += first
    work = along.point(torch.zeros(0, dtype=torch.long, device=x.device), x.new_zeros(0, dtype=torch.float64))[0].dtype
    total = torch.zeros(x.shape, dtype=work, device=x.device)
    nodes = first
    while panels:
        failed: list[_Panel] = []
        evaluated = list(_evaluated(along, panels, nodes))
        for row in rows:
            row.whole = row.size
        for panel, one in evaluated:
            rows[panel.row].see(one.places, one.values)
            if one.error < 0.1 * one.size:  # else its norm says nothing
                rows[panel.row].whole += one.size
        evaluated.sort(key=lambda pair: pair[1].gap)  # small gaps first: they leave more for the others
        worst: list[tuple[float, _Panel, _Found]] = []
        for panel, one in evaluated:
            row = rows[panel.row]
            share = max(0.125, panel.width / max(row.open, panel.width))
            budget = relative * max(1.0, 0.8 * row.whole)
            fits = one.gap <= max(share * row.allowed, noise * max(abs(row.low), abs(row.high)))
            agrees = one.error <= max(share * (budget - row.error), noise * one.size)
            if (fits and agrees) or panel.width <= least:
                total[panel.row] += one.part
                row.accept(panel.width, one)
            else:
                worst.append((max(one.gap / tolerance[panel.row], one.error / budget), panel, one))
        worst.sort(key=lambda entry: -entry[0])  # what the evaluations no longer suffice for should matter least
        for _, panel, one in worst:
            row = rows[panel.row]
            if row.used + 2 * LATER > max_evals:
                total[panel.row] += one.part
                row.accept(panel.width, one)
                continue
            row.used += 2 * LATER  # the least that a cut costs; what it costs more is added when it is known
            failed.append(_broken(panel, one, row))
        _narrow(along, rows, failed, least, max_evals)
        panels = []
        for panel in failed:
            row = rows[panel.row]
            pieces = _cut(panel, FLAT * row.allowed, room=2 + (max_evals - row.used) // LATER)
            row.used += LATER * (len(pieces) - 2)
            panels += pieces
        nodes = LATER
    sums = torch.tensor([[row.gap, row.error, row.size] for row in rows], dtype=torch.float64)
    return Integrals(total, sums[:, 0], sums[:, 1], sums[:, 2], [row.profile for row in rows])


class _Found(NamedTuple):
    """The rule on a panel.

    Attributes:
        places: Of the n nodes.
        values: F there.
        part: (...) contributions.
        gap: Size of what their sum is off by.
        error: Estimate of the L1 error.
        size: L1 norm.
        cuts: Where it should be cut, as numbers of its n + 2 known places.
        hidden: The values of F do not show why: what is wrong cancels in their sum.
        heights: L1 norms of the slopes at the nodes.
        peak: Where the slopes were much larger before, if that is the largest error.
    """

    places: list[float]
    values: list[float]
    part: Tensor
    gap: float
    error: float
    size: float
    cuts: tuple[int, int]
    hidden: bool
    heights: list[float]
    peak: float | None


def _evaluated(along: Along, panels: list[_Panel], n: int) -> Iterator[tuple[_Panel, _Found]]:
    """The panels in blocks, evaluated."""
    rule = panel_rule(n)
    device = along.x.device
    count = max(1, along.block // n)
    for start in range(0, len(panels), count):
        block = panels[start : start + count]
        left = np.array([p.places[0] for p in block])
        width = np.array([p.width for p in block])
        places = left[:, None] + width[:, None] * rule.nodes
        rows = torch.tensor([p.row for p in block], device=device).repeat_interleave(n)
        values, slopes = along.slopes(rows, torch.from_numpy(places).reshape(-1).to(device))
        slopes = slopes.reshape(len(block), n, -1)
        weights = torch.from_numpy(np.stack([rule.weights, rule.null, rule.odd])).to(slopes)
        three = weights @ slopes  # (K, 3, features): by the rule, and how far coarser ones are from it
        parts = (three[:, 0] * torch.from_numpy(width).to(slopes)[:, None]).reshape(len(block), *along.x.shape[1:])
        norm, coarse, odd = (three.abs().sum(-1, dtype=torch.float64).cpu().numpy() * width[:, None]).T
        heights = slopes.abs().sum(-1, dtype=torch.float64).cpu().numpy()
        sums = slopes.sum(-1, dtype=torch.float64).cpu().numpy() * width[:, None]
        known = values.double().cpu().numpy().reshape(len(block), n)
        ends = np.array([[p.values[0], p.values[-1]] for p in block])
        steps = -np.diff(np.concatenate([ends[:, :1], known, ends[:, 1:]], axis=1))
        off = np.abs(sums @ rule.between.T - steps)
        gap = np.abs(sums @ rule.weights + ends[:, 1] - ends[:, 0])
        # The error of the finer rule from the relative distance r to the coarser one: its square, times 10 to be safe.
        # Distances of consecutive degrees fall like powers of one number, so that "odd" says what to expect of "null".
        larger = np.maximum(norm, np.maximum(odd, np.maximum(coarse, off.sum(1))))
        larger = np.where(larger > 0, larger, 1)
        distance = np.maximum(np.maximum(coarse, off.sum(1)), larger * (odd / larger) ** ((n - 1) / max(1, n - 2)))
        error = distance * np.minimum(1.0, 10 * distance / larger)
        # Where a part is off, or, if the features cancel in all parts, around the largest gradient.
        hidden = off.sum(1) < 0.01 * coarse
        first = np.where(hidden, (heights * np.abs(rule.null)).argmax(1), off.argmax(1))
        for k, panel in enumerate(block):
            missed, peak = _missed(panel, heights[k].tolist())
            yield panel, _Found(
                places[k].tolist(), known[k].tolist(), parts[k], float(gap[k]), float(error[k] + missed),
                float(norm[k]), (int(first[k]), int(first[k] + 1 + hidden[k])), bool(hidden[k]),
                heights[k].tolist(), peak if missed > error[k] else None,
            )  # fmt: skip


def _missed(panel: _Panel, heights: list[float]) -> tuple[float, float | None]:
    """L1 norm of what the nodes of a panel miss of the slopes that were seen inside it before, and where."""
    known = ((height, place) for place, height in panel.heights.items() if panel.places[0] < place < panel.places[-1])
    height, peak = max(known, default=(0.0, None))
    return max(0.0, height - 2 * max(heights)) * panel.width / len(heights), peak


def _broken(panel: _Panel, found: _Found, row: _Row) -> _Panel:
    """A panel with all that is known of it, and where it should be cut."""
    places = [panel.places[0], *found.places, panel.places[-1]]
    values = [panel.values[0], *found.values, panel.values[-1]]
    heights = panel.heights | dict(zip(found.places, found.heights, strict=True))
    out = _Panel(panel.row, places, values, {places[i] for i in found.cuts}, found.hidden, heights)
    if found.peak is not None:
        out.cuts = {found.peak}
        out.insert(found.peak, row.profile[found.peak])
    return out


def _narrow(along: Along, rows: list[_Row], panels: list[_Panel], least: float, max_evals: int) -> None:
    """Bisect, without gradients, the steps of panels in which F changes by more than a share of its range."""
    looking = panels
    while looking:
        wanted: list[tuple[_Panel, float]] = []
        for panel in looking:
            row = rows[panel.row]
            span, steps = row.high - row.low, np.diff(panel.places)
            for i, (a, b) in enumerate(itertools.pairwise(panel.places)):
                change = abs(panel.values[i + 1] - panel.values[i])
                near = min(steps[max(0, i - 1)], steps[min(len(steps) - 1, i + 1)])
                large = change > JUMP * span or (change > FOOT * span and b - a > STEEP * near)
                if large and b - a > least and row.used + 1 + LATER <= max_evals:
                    wanted.append((panel, (a + b) / 2))
                    row.used += 1
        values = along.values([panel.row for panel, _ in wanted], [place for _, place in wanted])
        for (panel, place), value in zip(wanted, values, strict=True):
            at = panel.insert(place, value)
            panel.cuts.update(panel.places[at - 1 : at + 2])
            rows[panel.row].see([place], [value])
        looking = list({id(panel): panel for panel, _ in wanted}.values())


def _cut(panel: _Panel, flat: float, room: int) -> list[_Panel]:
    """Pieces of a panel between the places where it is to be cut; flat neighbours together, at most ``room``."""
    marks = [i for i, place in enumerate(panel.places) if place in panel.cuts]
    bounds = [0, *(i for i in marks if 0 < i < len(panel.places) - 1), len(panel.places) - 1]
    changes = [abs(b - a) for a, b in itertools.pairwise(panel.values)]
    sums = [sum(changes[a:b]) for a, b in itertools.pairwise(bounds)]
    while len(sums) > 2:
        pairs = [a + b for a, b in itertools.pairwise(sums)]
        at = int(np.argmin(pairs))
        if (pairs[at] > flat or panel.hidden) and len(sums) <= max(room, 2):
            break
        sums[at : at + 2] = [pairs[at]]
        del bounds[at + 1]
    return [
        _Panel(panel.row, panel.places[a : b + 1], panel.values[a : b + 1], heights=panel.heights)
        for a, b in itertools.pairwise(bounds)
    ]
