"""Certificate of a transport plan: a gap that is proven by weak duality (对偶间隙证书).

Source: 科学空间 6280 (从Wasserstein距离、对偶理论到WGAN).

    primal  min <C, plan>  over plans >= 0 with marginals p and q
    dual    max <p, f> + <q, g>  over f_i + g_j <= c_ij

Any feasible f, g bounds the cost of every plan from below. The potentials of a solver are feasible up to rounding only
(or not at all for points without mass), so they are projected first, by two c-transforms:
g_j = min_i (c_ij - f_i), then f_i = min_j (c_ij - g_j). The bound therefore holds whatever the solver did.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from kexue.stats._ground import Array, check_finite, to_array, to_weights

__all__ = ["Certificate", "certificate"]

LARGE = 2**15  # costs from which compiled passes pay
TIGHT = 1e-14  # relative slack that a second transform is not worth


@dataclass(frozen=True)
class Certificate:
    """What :func:`certificate` found.

    Attributes:
        primal: <C, plan>.
        dual: <p, f> + <q, g> of the projected potentials: a lower bound of the cost of every plan.
        gap: primal - dual, of a plan with the right marginals at least 0: the plan is at most so much dearer than the
            best one. Other plans may cost less than they should, which shows as a gap below 0.
        marginal_error: L1 distance of the plan's row sums from p plus that of its column sums from q.
        feasible: Whether the plan is one (non-negative, with these marginals) and f, g as given are feasible,
            all to a relative 1e-9.
        f: (n,) projected potentials.
        g: (m,) projected potentials.
    """

    primal: float
    dual: float
    gap: float
    marginal_error: float
    feasible: bool
    f: Array
    g: Array


def row_transform(costs: Array, g: Array) -> Array:
    """The c-transform of g: f_i = min_j (c_ij - g_j)."""
    if costs.size < LARGE:
        return (costs - g).min(1)
    from kexue.stats._certificate_kernel import rows_min

    return rows_min(costs, g, np.arange(len(costs)))


def project(costs: Array, f: Array, keep: Any = None) -> tuple[Array, Array]:
    """Feasible (f, g) from any f: g is its c-transform, f then that of g.

    ``keep`` (n,) bool: only these rows take part in the first transform, all get a potential in the second.
    """
    if costs.size >= LARGE:
        from kexue.stats._certificate_kernel import columns_min

        g = columns_min(costs, f, np.ones(len(f), bool) if keep is None else keep)
    else:
        g = (costs - f[:, None] if keep is None else costs[keep] - f[keep, None]).min(0)
    return row_transform(costs, g), g


def _cut(costs: Array, f: Array, keep: Any) -> tuple[Array, float]:
    """Return f with the same c-transform but for a shift, and the shift: f far above the costs drowns their digits."""
    top = int(np.where(keep, f, -np.inf).argmax())
    shift = float(f[top])
    if float(abs(f[keep]).max()) <= 4 * float(abs(costs[top]).max()):
        return f, 0.0
    # a row that lies further below the top one than the costs span is the smallest in no column
    with np.errstate(over="ignore"):
        return np.maximum(f - shift, float(costs.min()) - float(costs.max())), shift


def _survey(costs: Array, f: Array, keep: Any, plan: Array) -> tuple[Array, Array, float, float, Array, Array]:
    """Projected f and g; <C, plan>, the least entry of the plan, its row and its column sums."""
    n, m = costs.shape
    if costs.size < LARGE:
        f1, g1 = project(costs, f, keep)
        return f1, g1, float(np.vdot(plan, costs)), float(plan.min()), plan.sum(1), plan.sum(0)
    from kexue.stats._certificate_kernel import rows_min, survey

    g1, rows, columns, first = np.empty(m), np.zeros(n), np.zeros(m), np.empty(n, np.int64)
    primal, least, check = survey(costs, f, keep, plan, plan.view(np.uint64), g1, rows, columns, first)
    if check != 0:  # or sums that overflow
        check_finite("C", costs)
        check_finite("plan", plan)
    # A second transform cannot raise f_i if c_ij = f_i + g_j for some j. A row of an optimal plan has such a j where it
    # sends something, so that only the other rows have to be read again.
    slack = costs[np.arange(n), first] - g1[first] - f
    again = np.flatnonzero(~keep | (first < 0) | (slack > TIGHT * max(abs(g1).max(), abs(f[keep]).max())))
    f1 = f.copy()
    f1[again] = rows_min(costs, g1, again)
    return f1, g1, float(primal), float(least), rows, columns


def certificate(C: Any, plan: Any, f: Any, g: Any, p: Any = None, q: Any = None) -> Certificate:
    """Check a plan and potentials from any solver; the gap is a proof.

    One pass over the costs and the plan, and a second one over the rows whose potential it can raise (none at the
    optimum), without temporary matrices.

    Args:
        C: (n, m) finite costs, array or tensor.
        plan: (n, m) plan.
        f: (n,) row potentials; what they lack in feasibility is repaired, at the price of a larger gap.
        g: (m,) column potentials as the solver gave them; they enter ``feasible`` only.
        p: (n,) weights; None is uniform with total 1.
        q: (m,) weights of equal total.

    Returns:
        :class:`Certificate`.

    Raises:
        TypeError: Not numbers.
        ValueError: Shapes that do not fit, numbers that are not finite, weights that are no weights.

    Reference:
        https://spaces.ac.cn/archives/6280

    Example:
        >>> found = certificate([[0.0, 1.0], [1.0, 0.0]], [[0.5, 0.0], [0.0, 0.5]], [0.0, 0.0], [0.0, 0.0])
        >>> found.gap, found.feasible
        (0.0, True)
    """
    costs, flow = to_array("C", C, (2,), finite=False), to_array("plan", plan, (2,), finite=False)
    n, m = costs.shape
    if flow.shape != costs.shape:
        raise ValueError(f"plan must have the shape of C, {costs.shape}; got {flow.shape}")
    if costs.size < LARGE:  # with more the pass finds out
        check_finite("C", costs)
        check_finite("plan", flow)
    rows, columns = to_array("f", f, (1,)), to_array("g", g, (1,))
    if rows.shape != (n,) or columns.shape != (m,):
        raise ValueError(f"f and g must have shapes ({n},) and ({m},); got {rows.shape} and {columns.shape}")
    a, b = to_weights(p, q, n, m)
    keep = a > 0  # potentials of points without mass bound nothing: solvers leave them at 0, which may be too high
    cut, shift = _cut(costs, rows, keep)
    f1, g1, primal, least, row_sums, column_sums = _survey(costs, cut, keep, flow)
    violation = float((columns + shift - g1).max())  # g_j - min_i (c_ij - f_i), the largest f_i + g_j - c_ij
    if not keep.all():
        violation = max(violation, float((rows[~keep, None] + columns - costs[~keep]).max()))
    scale = max(float(abs(x).max()) for x in (rows, columns, f1, g1))
    dual = float(a @ f1 + b @ g1)
    error = float(abs(row_sums - a).sum() + abs(column_sums - b).sum())
    total = float(a.sum())
    fits = error <= 1e-9 * total and least >= -1e-9 * total
    gap = max(primal - dual, 0.0) if fits else primal - dual  # below 0 by rounding only
    return Certificate(primal, dual, gap, error, fits and violation <= 1e-9 * scale, f1, g1)
