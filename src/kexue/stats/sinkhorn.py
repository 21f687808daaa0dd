"""Entropic transport with a proven bracket of the exact cost (Sinkhorn 算法).

Source: an extension of 科学空间 6280 (从Wasserstein距离、对偶理论到WGAN); Cuturi 2013, https://arxiv.org/abs/1306.0895;
debiasing: Feydy et al., https://arxiv.org/abs/1810.08278; rounding: Altschuler et al., https://arxiv.org/abs/1705.09634.

    OT_eps = min <C, plan> + eps KL(plan | p q^T)
    f_i = -eps log sum_j q_j exp((g_j - c_ij) / eps),   g_j in the same way
    plan_ij = p_i q_j exp((f_i + g_j - c_ij) / eps)
    S_eps(X, Y) = OT_eps(X, Y) - OT_eps(X, X) / 2 - OT_eps(Y, Y) / 2

What we do differently: eps falls from the range of the costs to its value, each stage starting with an update in the
log domain, from which the kernel exp((f + g - C) / eps) follows without another exponential; further updates are matrix
products with factors that are absorbed into f and g before they leave the range, so that no eps under- or overflows,
over-relaxed by what the fall of the error says (https://arxiv.org/abs/1711.01851). The problems of a cloud and itself
are solved at once for the one factor that they have.
The result always carries a bracket of the cost *without* entropy: the plan rounded to exact marginals bounds it from
above, the c-transform of f from below, converged or not.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kexue._checks import check_int, check_real
from kexue.stats._ground import (
    Array,
    Metric,
    attach,
    check_metric,
    check_pair,
    costs_of,
    is_traced,
    tensor_costs,
    to_array,
    to_points,
    to_weights,
)
from kexue.stats.certificate import project
from kexue.stats.transport import _round, weight_tensor
from kexue.stats.wasserstein import check_weights_pair, pair_of_tensors

__all__ = ["Sinkhorn", "sinkhorn"]

FALL = 4.0  # factor between the stages of eps
WARM = 10  # updates of a stage that only prepares the next one
REACH = 1e30  # factors beyond are absorbed
AGAIN = 16  # updates after which over-relaxation is chosen anew
MOST = 1.99  # over-relaxation
THETA = 2 / 3  # damping of the self problems, for which |1 - THETA (1 + s)| <= 1/3


@dataclass(frozen=True)
class Sinkhorn:
    """What :func:`sinkhorn` found: numpy and floats for arrays, tensors for tensors.

    Attributes:
        cost: OT_eps; of tensors it is differentiable.
        divergence: S_eps, which is 0 for equal clouds, or None without ``debias``; differentiable for tensors.
        lower: Proven lower bound of the exact cost sum plan_ij d(x_i, y_j)^p (for p = 2: of the squared distance).
        upper: Proven upper bound, the cost of a plan with exact marginals.
        plan: (n, m) entropic plan; its column sums are exact, its row sums up to ``marginal_error``.
        f: (n,) row potentials.
        g: (m,) column potentials.
        marginal_error: L1 error of the marginals, relative to the total mass.
        n_iter: Updates of both potentials, of the last run of all stages.
        converged: Whether the error came below ``tol``. None under torch.compile.
    """

    cost: Any
    divergence: Any
    lower: Any
    upper: Any
    plan: Any
    f: Any
    g: Any
    marginal_error: Any
    n_iter: Any
    converged: bool | None


def _update(costs: Array, f: Array, p: Array, eps: float) -> tuple[Array, Array]:
    """Update g_j = -eps log sum_i p_i exp((f_i - c_ij) / eps) and the kernel exp((f + g - C) / eps) (n, m)."""
    kernel = np.subtract(f[:, None], costs)
    kernel /= eps
    top = kernel.max(0)
    kernel -= top
    np.exp(kernel, out=kernel)
    total = p @ kernel
    kernel /= total
    return -eps * (np.log(total) + top), kernel


def _relaxation(omega: float, rate: float) -> float:
    """Better factor of over-relaxation, if updates with ``omega`` shrink the error by ``rate``: Young's formula.

    rho = (rate + omega - 1)^2 / (rate omega^2) is the rate of plain updates, and 2 / (1 + sqrt(1 - rho)) best for it.
    """
    if not omega - 1 < rate < 1:  # the factor is not too small, or the error does not shrink
        return omega if rate < 1 else 1.0
    rho = min((rate + omega - 1) ** 2 / (rate * omega**2), 1.0)
    return min(2 / (1 + np.sqrt(1 - rho)), MOST)


def _stage(
    costs: Array, f: Array, p: Array, q: Array, eps: float, tol: float, limit: int
) -> tuple[Array, Array, Array, float, int]:
    """Updates at one eps: f, g, plan, marginal error, number of updates. The column sums of the plan are exact."""
    g, kernel = _update(costs, f, p, eps)
    u, v, used, omega = np.ones(len(p)), np.ones(len(q)), 0, 1.0
    exact, since, before, wait = True, 0, np.inf, AGAIN  # updates since omega was chosen, the error then, the next time
    while True:
        rows = kernel @ (q * v)
        error = float(p @ abs(u * rows - 1.0))
        if error <= tol or used >= limit:
            if exact:
                break
            with np.errstate(divide="ignore", over="ignore"):
                last = 1.0 / ((p * u) @ kernel)
            if np.isfinite(last).all():
                v, exact, omega = last, True, 1.0
                continue
        before = error if since == 0 else before
        used, since = used + 1, since + 1
        if since == wait:
            omega = _relaxation(omega, (error / before) ** (1 / wait))
            since, before, wait = 0, error, int(AGAIN + 4 / (2 - omega))
        with np.errstate(all="ignore"):
            new = u * (u * rows) ** -omega
            columns = (p * new) @ kernel
            other = v * (v * columns) ** -omega
        if new.max() < REACH and new.min() > 1 / REACH and other.max() < REACH and other.min() > 1 / REACH:
            u, v, exact = new, other, omega == 1
            continue
        g = g + eps * np.log(v)  # start again from g in the log domain, where nothing can leave the range
        f, _ = _update(costs.T, g, q, eps)
        g, kernel = _update(costs, f, p, eps)
        u, v, exact, omega, since, before, wait = np.ones(len(p)), np.ones(len(q)), True, 1.0, 0, np.inf, AGAIN
    kernel *= (p * u)[:, None]
    kernel *= q * v
    return f + eps * np.log(u), g + eps * np.log(v), kernel, error, used


def _mirror(costs: Array, p: Array, eps: float, tol: float, limit: int) -> tuple[Array, Array, float, float]:
    """Plan, potential, OT_eps and marginal error of a cloud and itself, where f = g: damped updates of one factor.

    For symmetric costs >= 0 with zeros on the diagonal, so that the factors exp(f / eps) stay below 1 / sqrt(p). An
    update to the power theta shrinks the error by |1 - theta (1 + s)| with s in [0, 1] for a positive kernel.
    """
    with np.errstate(over="ignore"):
        kernel = costs / -eps
    np.exp(kernel, out=kernel)
    u, used = 1.0 / np.sqrt(kernel @ p), 0
    while True:
        rows = u * (kernel @ (p * u))
        error = float(p @ abs(rows - 1.0))
        if error <= tol or used >= limit:
            break
        u, used = u * rows**-THETA, used + 1
    f, side = eps * np.log(u), p * u
    kernel *= side[:, None]
    kernel *= side
    return kernel, f, float(2 * (p @ f) - eps * (p @ rows - 1.0)), error


def _stages(costs: Array, eps: float) -> list[float]:
    """Falling eps, the last one as given."""
    start, found = float(costs.max() - costs.min()), [eps]
    while found[0] * FALL < start:
        found.insert(0, found[0] * FALL)
    return found


def _entropic(
    costs: Array, p: Array, q: Array, eps: float, tol: float, max_iter: int, start: Array | None = None
) -> tuple[Array, Array, Array, float, float, int]:
    """Plan, f, g, OT_eps, error, updates for weights with total 1; points without mass get potentials at the end.

    ``start`` (n,) are row potentials to start from, at the last eps; without them eps falls.
    """
    keep, kept = p > 0, q > 0
    whole = bool(keep.all() and kept.all())
    part = costs if whole else np.ascontiguousarray(costs[np.ix_(keep, kept)])
    a, b = p[keep], q[kept]
    f, used = np.zeros(len(a)) if start is None else start[keep], 0
    for stage in _stages(part, eps) if start is None else [eps]:
        last = stage == eps
        limit, goal = (max_iter, tol) if last else (WARM, max(tol, 0.05))
        f, g, inner, error, count = _stage(part, f, a, b, stage, goal, limit)
        used += count
    cost = float(a @ f + b @ g - eps * (inner.sum() - 1.0))
    if whole:
        return inner, f, g, cost, error, used
    plan = np.zeros(costs.shape)
    plan[np.ix_(keep, kept)] = inner
    wide, high = np.empty(len(p)), np.empty(len(q))
    wide[keep], high[kept] = f, g
    if not keep.all():
        wide[~keep] = _update(costs[np.ix_(~keep, kept)].T, g, b, eps)[0]
    if not kept.all():
        high[~kept] = _update(costs[np.ix_(keep, ~kept)], f, a, eps)[0]
    return plan, wide, high, cost, error, used


def _is_distance(costs: Array, eps: float) -> bool:
    """Whether the costs of a cloud and itself are what ``_mirror`` needs, as those of a callable may not be."""
    if costs.min() < 0 or costs.diagonal().max() > eps:
        return False
    return bool(abs(costs - costs.T).max() <= 1e-6 * costs.max())


def _self_entropic(
    costs: Array, p: Array, eps: float, tol: float, max_iter: int, named: bool
) -> tuple[Array, Array, float, float]:
    """Plan, (f + g) / 2, OT_eps and error of a cloud and itself; ``named`` costs are those of a known metric."""
    if not named and not _is_distance(costs, eps):
        plan, f, g, cost, error, _ = _entropic(costs, p, p, eps, tol, max_iter)
        return plan, (f + g) / 2, cost, error
    keep = p > 0
    if keep.all():
        return _mirror(costs, p, eps, tol, max_iter)
    plan, f, cost, error = _mirror(costs[np.ix_(keep, keep)], p[keep], eps, tol, max_iter)
    wide, full = np.empty(len(p)), np.zeros(costs.shape)
    wide[keep], full[np.ix_(keep, keep)] = f, plan
    wide[~keep] = _update(costs[np.ix_(keep, ~keep)], f, p[keep], eps)[0]
    return full, wide, cost, error


def _same(between: Array, p: Array, q: Array) -> bool:
    """Whether both clouds hold the same points with the same masses: at distance 0 from a partner, one to one."""
    if between.shape[0] != between.shape[1] or between.min(1).any():
        return False
    moved = np.zeros(len(q))
    np.add.at(moved, between.argmin(1), p)
    return bool((abs(moved - q) <= 1e-12 * q.max()).all())


def _solve(
    between: Array,
    within: tuple[Array, Array] | None,
    a: Array,
    b: Array,
    eps: float,
    tol: float,
    max_iter: int,
    named: bool,
) -> tuple[Any, ...]:
    """(plan, f, g), (cost, divergence, lower, upper, error, updates) and for ``within`` the plans and potentials."""
    total = float(a.sum())
    p, q = a / total, b / float(b.sum())
    selves, halves, worst, start = [], 0.0, 0.0, None
    if within is not None:
        for costs, w in zip(within, (p, q), strict=True):
            inner, h, own, off = _self_entropic(costs, w, eps, tol, max_iter, named)
            halves, worst = halves + own / 2, max(worst, off)
            selves += [inner if total == 1 else inner * total, h]
        start = selves[1] if _same(between, p, q) else None  # updates are slow there, and this is the solution
    plan, f, g, cost, error, used = _entropic(between, p, q, eps, tol, max_iter, start)
    worst, divergence = max(worst, error), float("nan") if within is None else cost - halves
    f1, g1 = project(between, f, None if p.all() else p > 0)
    lower = float(p @ f1 + q @ g1)
    upper = float(np.vdot(_round(plan, p, q), between))
    upper = max(upper, lower)  # equal up to rounding
    if worst > tol:
        warnings.warn(
            f"sinkhorn stopped after max_iter = {max_iter} updates with a marginal error of {worst:.2g} "
            f"(tol = {tol:g}); the exact cost lies between {total * lower:g} and {total * upper:g}",
            RuntimeWarning,
            stacklevel=4,
        )
    numbers = total * cost, total * divergence, total * lower, total * upper, error, used
    return (plan if total == 1 else plan * total, f, g), numbers, selves


def _solve_tensors(
    between: Tensor,
    within: list[Tensor],
    a: Tensor,
    b: Tensor,
    eps: float,
    tol: float,
    max_iter: int,
    normalize: bool,
    named: bool,
) -> list[Tensor]:
    costs = to_array("the costs", between, (2,))
    own = tuple(to_array("the costs", x, (2,)) for x in within)
    p, q = to_weights(a, b, costs.shape[0], costs.shape[1], normalize, "ab")
    arrays, numbers, selves = _solve(costs, own or None, p, q, eps, tol, max_iter, named)  # type: ignore[arg-type]
    made = [torch.from_numpy(np.ascontiguousarray(x)) for x in (*arrays, *selves)]
    return [x.to(between.device) for x in (torch.tensor(numbers, dtype=torch.float64), *made)]


@torch.library.custom_op("kexue::sinkhorn", mutates_args=())
def _sinkhorn_op(
    between: Tensor,
    within: list[Tensor],
    a: Tensor,
    b: Tensor,
    eps: float,
    tol: float,
    max_iter: int,
    normalize: bool,
    named: bool,
) -> list[Tensor]:
    return _solve_tensors(between, within, a, b, eps, tol, max_iter, normalize, named)


@_sinkhorn_op.register_fake
def _(between, within, a, b, eps, tol, max_iter, normalize, named):  # type: ignore[no-untyped-def]
    n, m = between.shape
    shapes = [(6,), (n, m), (n,), (m,)] + ([(n, n), (n,), (m, m), (m,)] if within else [])
    return [between.new_empty(shape, dtype=torch.float64) for shape in shapes]


def sinkhorn(
    X: Any,
    Y: Any,
    eps: float = 0.05,
    p: float = 1,
    metric: Metric = "euclidean",
    weights: Any = None,
    *,
    debias: bool = True,
    normalize: bool = False,
    tol: float = 1e-6,
    max_iter: int = 2000,
) -> Sinkhorn:
    """Entropic transport cost and divergence of two clouds, with a proven bracket of the exact cost.

    Computed in float64 on the CPU, with two to three (n, m) matrices in memory (and (n, n), (m, m) with ``debias``).

    Args:
        X: (n, D) points, or (n,) numbers; array or tensor.
        Y: (m, D) points.
        eps: Strength of the entropy, in units of the cost d^p.
        p: The cost is the p-th power of the distance; at least 1.
        metric: As in :func:`kexue.stats.wasserstein`.
        weights: Pair (a, b) of masses with equal totals; None (also for one of them) is uniform.
        debias: Also compute S_eps, which takes two more (quick) runs.
        normalize: Divide the weights by their totals; without it unequal totals are an error.
        tol: Marginal error at which to stop, relative to the total mass.
        max_iter: Updates at the last eps; beyond there is a warning with the bracket, which holds all the same.

    Returns:
        :class:`Sinkhorn`; ``cost`` and ``divergence`` of tensors are float32 (float64 for float64) and differentiable
        for X, Y and the weights, by the envelope theorem (exact at convergence).

    Raises:
        TypeError: Not numbers.
        ValueError: Not finite, empty, shapes that do not fit, weights that are no weights, eps not positive, p < 1.

    Reference:
        https://spaces.ac.cn/archives/6280, https://arxiv.org/abs/1810.08278

    Example:
        >>> found = sinkhorn([0.0, 1.0, 2.0], [0.5, 1.5, 4.0], eps=0.1)
        >>> found.lower <= 1.0 <= found.upper, found.converged  # the exact cost is (.5 + .5 + 2) / 3 = 1
        (True, True)
    """
    check_real("eps", eps, above=0.0)
    check_real("p", p, minimum=1.0)
    check_real("tol", tol, above=0.0)
    check_int("max_iter", max_iter, 1)
    check_metric(metric)
    a, b = check_weights_pair(weights)
    eps, power, tol = float(eps), float(p), float(tol)
    if not any(isinstance(x, Tensor) for x in (X, Y, a, b)):
        u, v = to_points("X", X), to_points("Y", Y)
        check_pair(u, v)
        a, b = to_weights(a, b, len(u), len(v), normalize, "ab")
        within = (costs_of(u, u, metric, power), costs_of(v, v, metric, power)) if debias else None
        (plan, f, g), found, _ = _solve(
            costs_of(u, v, metric, power), within, a, b, eps, tol, max_iter, isinstance(metric, str)
        )
        cost, divergence, lower, upper, error, used = found
        return Sinkhorn(
            cost, divergence if debias else None, lower, upper, plan, f, g, error, int(used), error <= tol
        )  # fmt: skip
    if not isinstance(X, Tensor) and not isinstance(Y, Tensor):
        device = next(w.device for w in (a, b) if isinstance(w, Tensor))
        X = torch.from_numpy(to_points("X", X)).to(device)
    x, y, dtype = pair_of_tensors(X, Y)
    a = weight_tensor("a", a, len(x), x.device, normalize)
    b = weight_tensor("b", b, len(y), x.device, normalize)
    between = tensor_costs(x, y, metric, power)
    own = [tensor_costs(z, z, metric, power) for z in (x, y)] if debias else []
    run = _sinkhorn_op if is_traced() else _solve_tensors
    costs = between.detach(), [c.detach() for c in own]
    numbers, plan, f, g, *selves = run(
        *costs, a.detach(), b.detach(), eps, tol, max_iter, normalize, isinstance(metric, str)
    )
    value = attach(numbers[0], (between, plan), (a, f), (b, g))
    cost = value.to(dtype)
    divergence = None
    if debias:
        inner_x, fx, inner_y, fy = selves
        parts = (between, plan), (own[0], -inner_x / 2), (own[1], -inner_y / 2), (a, f - fx), (b, g - fy)
        divergence = attach(numbers[1], *parts).to(dtype)
    error, used = numbers[4], numbers[5]
    converged = None if is_traced() else bool(error <= tol)
    return Sinkhorn(
        cost, divergence, numbers[2], numbers[3], plan.to(dtype), f.to(dtype), g.to(dtype), error, used, converged
    )  # fmt: skip
