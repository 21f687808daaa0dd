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

from kexue.stats._ground import Array, to_array, to_weights

__all__ = ["Certificate", "certificate"]

BLOCK = 2**17  # costs looked at together, 1 MiB


@dataclass(frozen=True)
class Certificate:
    """What :func:`certificate` found.

    Attributes:
        primal: <C, plan>.
        dual: <p, f> + <q, g> of the projected potentials: a lower bound of the cost of every plan.
        gap: primal - dual. If ``marginal_error`` is 0 the plan is at most so much dearer than the best one.
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


def project(costs: Array, f: Array, keep: Any = None) -> tuple[Array, Array]:
    """Feasible (f, g) from any f: g is its c-transform, f then that of g.

    ``keep`` (n,) bool: only these rows take part in the first transform, all get a potential in the second.
    """
    n, m = costs.shape
    step = max(1, BLOCK // m)
    room = np.empty((min(step, n), m))
    g = np.full(m, np.inf)
    for start in range(0, n, step):
        rows = slice(start, start + step)
        part = np.subtract(costs[rows], f[rows, None], out=room[: len(f[rows])])
        if keep is not None:
            part[~keep[rows]] = np.inf
        np.minimum(g, part.min(0), out=g)
    out = np.empty(n)
    for start in range(0, n, step):
        rows = slice(start, start + step)
        np.subtract(costs[rows], g, out=room[: len(f[rows])]).min(1, out=out[rows])
    return out, g


def certificate(C: Any, plan: Any, f: Any, g: Any, p: Any = None, q: Any = None) -> Certificate:
    """Check a plan and potentials from any solver; the gap is a proof.

    Two passes over the costs, with 1 MiB of scratch memory.

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
    costs, flow = to_array("C", C, (2,)), to_array("plan", plan, (2,))
    n, m = costs.shape
    if flow.shape != costs.shape:
        raise ValueError(f"plan must have the shape of C, {costs.shape}; got {flow.shape}")
    rows, columns = to_array("f", f, (1,)), to_array("g", g, (1,))
    if rows.shape != (n,) or columns.shape != (m,):
        raise ValueError(f"f and g must have shapes ({n},) and ({m},); got {rows.shape} and {columns.shape}")
    a, b = to_weights(p, q, n, m)
    # potentials of points without mass bound nothing: solvers leave them at 0, and they would only lower the others
    f1, g1 = project(costs, rows, None if a.all() else a > 0)
    violation = float((columns - g1).max())  # g_j - min_i (c_ij - f_i), the largest f_i + g_j - c_ij
    if not a.all():
        violation = max(violation, float((rows[a == 0, None] + columns - costs[a == 0]).max()))
    scale = max(float(costs.max()), -float(costs.min()), float(abs(rows).max()), float(abs(columns).max()))
    primal = float(np.vdot(flow, costs))
    dual = float(a @ f1 + b @ g1)
    error = float(abs(flow.sum(1) - a).sum() + abs(flow.sum(0) - b).sum())
    total = float(a.sum())
    feasible = violation <= 1e-9 * scale and error <= 1e-9 * total and float(flow.min()) >= -1e-9 * total
    return Certificate(primal, dual, primal - dual, error, feasible, f1, g1)
