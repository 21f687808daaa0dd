"""Optimal transport between discrete measures, exact and proven (最优传输、Wasserstein 距离的线性规划).

Source: 科学空间 6280 (从Wasserstein距离、对偶理论到WGAN).

    min <C, plan>  over plan >= 0 with row sums p and column sums q
    = max <p, f> + <q, g>  over f_i + g_j <= c_ij

POT's network simplex (https://pythonot.github.io) solves the general case; equal weights are an assignment, which has a
solver of its own (``_assignment.py``) unless it stalls. What is added: costs are shifted and scaled, so that their
unit does not matter; potentials are projected to exact feasibility, also at points without mass, so that the gap is a
proof; gradients by the envelope theorem: f for p, g for q, the plan for C. Nothing is differentiated through a solver.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kexue._checks import check_int
from kexue._tensors import check_float
from kexue.stats._ground import Array, attach, is_traced, to_array, to_weights, working
from kexue.stats.certificate import project, row_transform

__all__ = ["Transport", "transport"]

MAX_ITER = 10_000_000
CAPS = (1e2, 1e4, 1e6)  # in units of the median cost
ROUNDING = 1e-12  # in units of the median cost
EXACT = 1e-9  # gap of an optimal plan, in the same unit or relative to the cost
READ = 20  # times that shortest paths may read each row, which takes less than POT
SMALL = 32  # points below which POT solves an assignment too: it needs no compiled kernel


@dataclass(frozen=True)
class Transport:
    """What :func:`transport` found: numpy and floats for arrays, tensors for tensors.

    Attributes:
        cost: <C, plan>; of a tensor C (or p, q) it is differentiable.
        plan: (n, m) optimal plan.
        f: (n,) row potentials, feasible with g, of mean 0: the gradient of the cost for p, up to a constant.
        g: (m,) column potentials.
        gap: Proven bound of cost - optimal cost, computed in float64; 0 up to rounding if the status is "optimal".
        status: "optimal", or "inexact" if the solver stopped early or its rounding left a gap (there is a warning too).
            "traced" under torch.compile, where only the warning can tell.
    """

    cost: Any
    plan: Any
    f: Any
    g: Any
    gap: Any
    status: str


def _unit(costs: Array) -> tuple[float, float, float]:
    """Smallest and largest cost, and the typical difference of costs from the smallest one."""
    low, high = float(costs.min()), float(costs.max())
    if not np.isfinite(high - low):
        raise ValueError(f"the costs must span less than 1.8e308; got values from {low} to {high}")
    sample = costs.ravel()[:: (costs.size // 4096) | 1] - low
    scale = float(np.median(sample)) or float(sample.mean()) or high - low or 1.0
    if not np.isfinite((high - low) / scale):
        scale = high - low
    return low, high, scale


def _round(plan: Array, p: Array, q: Array) -> Array:
    """Exact marginals from nearly right ones: shrink what is too much, spread the rest (Altschuler et al. 2017)."""
    rows = plan.sum(1)
    plan = plan * np.minimum(1.0, np.divide(p, rows, out=np.zeros_like(p), where=rows > 0))[:, None]
    columns = plan.sum(0)
    plan *= np.minimum(1.0, np.divide(q, columns, out=np.zeros_like(q), where=columns > 0))
    missing, wanted = np.maximum(p - plan.sum(1), 0.0), np.maximum(q - plan.sum(0), 0.0)
    if missing.sum() > 0:
        plan += np.outer(missing, wanted / max(float(wanted.sum()), np.finfo(float).tiny))
    return plan


def _simplex(costs: Array, p: Array, q: Array, max_iter: int) -> tuple[Array, Array, bool]:
    """Plan, row potentials and whether the network simplex came to its end; weights are positive with total 1."""
    import ot

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its warnings do not name the gap; ours do
        plan, log = ot.emd(p, q, costs, max_iter, log=True, center_dual=False, check_marginals=False)
    done = log["result_code"] == 1
    return plan if done else _round(plan, p, q), np.asarray(log["u"]), done


def _capped(costs: Array, p: Array, q: Array, max_iter: int) -> tuple[Array, Array, bool]:
    """:func:`_simplex` for costs of which some are many orders above the others.

    Its potentials are sums with the largest cost, so that small costs would drown in rounding. Potentials for capped
    costs are feasible for the true ones as well: if the plan avoids what was capped, it is optimal.
    """
    top = float(costs.max())
    best: tuple[Array, Array, bool] | None = None
    least = np.inf
    for cap in [c for c in CAPS if c < top] + [top]:
        plan, u, done = _simplex(np.minimum(costs, cap) if cap < top else costs, p, q, max_iter)
        f, g = project(costs, u)
        cost = float(np.vdot(plan, costs))
        gap = cost - float(p @ f + q @ g)
        if best is None or gap < least:
            best, least = (plan, f, done), gap
        if gap <= EXACT * max(1.0, cost):
            break
    return best  # type: ignore[return-value]


def _is_optimal(costs: Array, plan: Array, u: Array) -> bool:
    """Whether the row potentials prove a plan of equal masses and total 1."""
    f, g = project(costs, u)
    cost = float(np.vdot(plan, costs))
    return cost - float(f.mean() + g.mean()) <= EXACT * cost + ROUNDING


def _matching(costs: Array, low: float, scale: float, limit: int) -> tuple[Array, Array] | None:
    """Columns and column potentials of an optimal assignment, or None if it reads over ``limit`` rows to end."""
    from kexue.stats._assignment import assign

    # no copy if the unit is harmless and the differences keep their digits
    same = 1e-100 < scale < 1e100 and abs(low) < 1e3 * scale
    column, v = assign(costs if same else (costs - low) / scale, scale if same else 1.0, 5.0, 0.1 / len(costs), limit)
    if column.min() < 0:
        return None
    return column, v if same else v * scale + low


def solve(costs: Array, p: Array, q: Array, max_iter: int = MAX_ITER) -> tuple[Array, Array, Array, float, float, bool]:
    """Plan, f, g, cost, gap, and whether the solver came to its end, for checked float64 arrays of equal totals."""
    total = float(p.sum())
    keep, kept = p > 0, q > 0
    whole = bool(keep.all() and kept.all())
    part = costs if whole else costs[np.ix_(keep, kept)]
    a, b = p[keep], q[kept]
    low, high, scale = _unit(part)
    n, done, v = len(a), True, None
    equal = len(b) == n >= SMALL and a.min() == a.max() and b.min() == b.max()
    found = _matching(part, low, scale, READ * n) if equal else None
    if found is None:  # also costs with many ties or of very different size, for which prices alone decide little
        top, scaled = (high - low) / scale, (part - low) / scale
        run = _capped if top > CAPS[0] else _simplex
        inner, u, done = run(scaled, a / total, b / float(b.sum()), max_iter)
        if equal and not (done and _is_optimal(scaled, inner, u)):
            found = _matching(part, low, scale, n * n)
    if found is not None:
        (column, v), done = found, True
        inner = np.zeros((n, n))
        inner[np.arange(n), column] = a[0]
        used = part[np.arange(n), column]
        u, cost = used - v[column], float(used.sum()) * float(a[0])
    else:
        inner *= total
        u = u * scale + low
        cost = float(np.vdot(inner, part))
    f: Array = np.zeros(len(p))
    plan: Array = inner
    if whole and v is not None:  # each row is at its best column: one transform makes up for rounding
        g = v
        f = row_transform(costs, g)
    else:
        f[keep] = u
        if not whole:
            plan = np.zeros(costs.shape)
            plan[np.ix_(keep, kept)] = inner
        f, g = project(costs, f, None if whole else keep)
    mean = float(f.mean())
    f, g = f - mean, g + mean
    gap = max(cost - float(p @ f + q @ g), 0.0)
    if done and gap > EXACT * max(abs(cost), scale * total, abs(low) * total):
        done = False
        warnings.warn(
            f"the costs span too many orders of magnitude; the cost {cost:g} may be up to {gap:.3g} too high",
            RuntimeWarning,
            stacklevel=3,
        )
    elif not done:
        warnings.warn(
            f"the solver stopped after max_iter = {max_iter} steps; the cost {cost:g} is at most {gap:.3g} too high",
            RuntimeWarning,
            stacklevel=3,
        )
    return plan, f, g, cost, gap, done


def _solve_tensors(C: Tensor, p: Tensor, q: Tensor, max_iter: int, normalize: bool) -> tuple[Any, ...]:
    n, m = C.shape
    a, b = to_weights(p, q, n, m, normalize)
    plan, f, g, cost, gap, done = solve(to_array("C", C, (2,)), a, b, max_iter)
    made = [torch.from_numpy(x).to(C.device) for x in (plan, f, g)]
    return *made, C.new_tensor(cost, dtype=torch.float64), C.new_tensor(gap, dtype=torch.float64), done


@torch.library.custom_op("kexue::transport", mutates_args=())
def _transport_op(
    C: Tensor, p: Tensor, q: Tensor, max_iter: int, normalize: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _solve_tensors(C, p, q, max_iter, normalize)[:5]


@_transport_op.register_fake
def _(C, p, q, max_iter, normalize):  # type: ignore[no-untyped-def]
    n, m = C.shape
    return tuple(C.new_empty(shape, dtype=torch.float64) for shape in ((n, m), (n,), (m,), (), ()))


def weight_tensor(name: str, w: Any, count: int, device: torch.device, normalize: bool) -> Tensor:
    """A weight argument as a tensor that keeps its gradient; None is uniform."""
    if w is None:
        return torch.full((count,), 1.0 / count, dtype=torch.float64, device=device)
    if not isinstance(w, Tensor):
        return torch.from_numpy(to_array(name, w, (1,))).to(device)
    if w.is_floating_point():
        check_float(name, w, 1)
    if tuple(w.shape) != (count,):
        raise ValueError(f"{name} must have shape ({count},); got {tuple(w.shape)}")
    # the gradient for the weights as given runs through the division
    return w / w.sum() if normalize and w.is_floating_point() else w


def transport(C: Any, p: Any = None, q: Any = None, *, normalize: bool = False, max_iter: int = MAX_ITER) -> Transport:
    """Cheapest way to move the masses p to the masses q, with the proof that none is cheaper.

    Computed in float64 on the CPU (tensors of other devices are copied there and the results back). Memory: C in
    float64 and up to two more matrices of its size, beside what POT allocates.

    Args:
        C: (n, m) finite costs, of any sign and unit; array or tensor.
        p: (n,) non-negative masses; None is uniform with total 1.
        q: (m,) masses of equal total.
        normalize: Divide p and q by their totals; without it unequal totals are an error.
        max_iter: Steps of the network simplex.

    Returns:
        :class:`Transport`: cost, plan, potentials f and g, gap, status. The results for tensors are float32, or float64
        if an input is; ``cost`` has gradients for C (the plan), p (f) and q (g).

    Raises:
        TypeError: Not numbers.
        ValueError: Not finite, empty, shapes that do not fit, negative masses, unequal totals.

    Reference:
        https://spaces.ac.cn/archives/6280

    Example:
        >>> found = transport([[1.0, 4.0], [3.0, 1.0]], p=[0.25, 0.75], q=[0.5, 0.5])
        >>> found.cost, found.gap, found.status  # a quarter has to go from the second row to the first column
        (1.5, 0.0, 'optimal')
    """
    check_int("max_iter", max_iter, 1)
    if not any(isinstance(x, Tensor) for x in (C, p, q)):
        costs = to_array("C", C, (2,))
        a, b = to_weights(p, q, costs.shape[0], costs.shape[1], normalize)
        plan, f, g, cost, gap, done = solve(costs, a, b, max_iter)
        return Transport(cost, plan, f, g, gap, "optimal" if done else "inexact")
    dtype, device = working(*(x for x in (C, p, q) if isinstance(x, Tensor)))
    if not isinstance(C, Tensor):
        C = torch.from_numpy(to_array("C", C, (2,))).to(device)
    if C.dim() != 2:
        raise ValueError(f"C must have 2 dimensions; got shape {tuple(C.shape)}")
    if 0 in C.shape:
        raise ValueError(f"C must not be empty; got shape {tuple(C.shape)}")
    p = weight_tensor("p", p, C.shape[0], device, normalize)
    q = weight_tensor("q", q, C.shape[1], device, normalize)
    arguments = C.detach(), p.detach(), q.detach(), max_iter, normalize
    if is_traced():
        found, status = _transport_op(*arguments), "traced"
    else:
        *found, done = _solve_tensors(*arguments)
        status = "optimal" if done else "inexact"
    matrix, u, v, value, bound = found
    value = attach(value, (C, matrix), (p, u), (q, v))
    return Transport(value.to(dtype), matrix.to(dtype), u.to(dtype), v.to(dtype), bound, status)
