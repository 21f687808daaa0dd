"""A few Newton steps on the penalised cross-entropy, from the closed form ("polish").

    f(V, b) = sum_i w_i CE(softmax(V x_i + b), y_i) / n + a |V|^2 / (2 n),   n = sum_i w_i

in features of mean 0 and variance 1 within classes, with a = 1, or 2 for two classes. This is the penalty of
scikit-learn's LogisticRegression(C=1) on such features (which has one vector for two classes, twice as long as each of
ours); it keeps the steps finite where classes are separable. The step solves H d = g by conjugate gradients, whose
products with H need two passes over the rows each, and no matrix of C D x C D numbers. A step that does not lower f is
halved until it does. Before the first one all logits are divided by a temperature, a power of 2, since the closed form
is over-confident on data that are not normal.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kexue.stats._class_rule import LinearRule, Scaled, correlation, scaled
from kexue.stats._moments import Array, Moments

CG_STEPS = 30
CG_TOLERANCE = 1e-3
HALVINGS = 20


class _Problem:
    """Cross-entropy in scaled features; parameters are (C, A + 1), the bias last."""

    def __init__(self, X: Any, y: NDArray[np.intp], weight: Array | None, s: Scaled, classes: int) -> None:
        self.X = X[:, s.active]
        if isinstance(X, np.ndarray):
            self.X = (self.X - s.centre[s.active]) / s.scale
            self.unit, self.offset = np.ones(len(s.active)), np.zeros(len(s.active))
        else:  # sparse stays sparse: the scale goes to the weights
            self.unit, self.offset = 1 / s.scale, s.centre[s.active] / s.scale
        self.y, self.weight = y, np.ones(len(y)) if weight is None else weight
        self.n = float(self.weight.sum())
        self.decay = (2.0 if classes == 2 else 1.0) / self.n

    def apply(self, V: Array) -> Array:
        return self.X @ (V[:, :-1] * self.unit).T + (V[:, -1] - V[:, :-1] @ self.offset)

    def adjoint(self, E: Array) -> Array:
        total = E.sum(0)
        weights = (self.X.T @ E).T * self.unit - total[:, None] * self.offset
        return np.concatenate([weights, total[:, None]], 1) / self.n

    def value(self, V: Array) -> tuple[float, Array]:
        """Value of f and the probabilities."""
        Z = self.apply(V)
        Z -= Z.max(1, keepdims=True)
        P = np.exp(Z)
        total = P.sum(1)
        loss = np.log(total) - Z[np.arange(len(Z)), self.y]
        P /= total[:, None]
        return float(self.weight @ loss / self.n + 0.5 * self.decay * (V[:, :-1] ** 2).sum()), P

    def gradient(self, V: Array, P: Array) -> Array:
        E = P.copy()
        E[np.arange(len(E)), self.y] -= 1
        g = self.adjoint(E * self.weight[:, None])
        g[:, :-1] += self.decay * V[:, :-1]
        return g

    def curvature(self, d: Array, P: Array) -> Array:
        A = self.apply(d)
        A -= (P * A).sum(1, keepdims=True)
        h = self.adjoint(P * A * self.weight[:, None])
        h[:, :-1] += self.decay * d[:, :-1]
        return h


def newton(rule: LinearRule, X: Any, y: NDArray[np.intp], weight: Array | None, m: Moments, steps: int) -> LinearRule:
    """The rule after ``steps`` Newton steps; memory: a copy of X in float64 and four times (N, C)."""
    s = scaled(m)
    problem = _Problem(X, y, weight, s, len(rule.bias))
    V = np.concatenate([rule.weights[:, s.active] * s.scale, rule.bias[:, None]], 1)
    R = correlation(m.pooled(), problem.n, s) + (s.means.T * s.priors) @ s.means
    V, f, P = _temper(problem, V)
    for _ in range(steps):
        g = problem.gradient(V, P)
        h = max(
            float(problem.weight @ (P * (1 - P)).mean(1)) / problem.n, 1e-6
        )  # the Hessian is about h R in each class
        inverse = np.linalg.inv(h * R + np.eye(len(R)) * (h * 1e-8 + problem.decay))
        d = _conjugate_gradients(lambda v, P=P: problem.curvature(v, P), g, inverse, h)
        rate = 1.0
        for _ in range(HALVINGS):
            trial, P_new = problem.value(V - rate * d)
            if trial < f:
                V, f, P = V - rate * d, trial, P_new
                break
            rate /= 2
        else:
            break  # at the minimum, up to rounding
    weights = np.zeros_like(rule.weights)
    weights[:, s.active] = V[:, :-1] / s.scale
    return LinearRule(weights, V[:, -1].copy(), rule.centre, rule.common, rule.shrinkage)


def _temper(problem: _Problem, V: Array) -> tuple[Array, float, Array]:
    """V times the power of 2 that lowers f most, with f and the probabilities.

    Where all probabilities are 0 or 1 the Hessian is that of the penalty alone: a step from there goes astray.
    """
    f, P = problem.value(V)
    for factor in (0.5, 2.0):
        while True:
            trial, P_new = problem.value(factor * V)
            if not trial < f:
                break
            V, f, P = factor * V, trial, P_new
    return V, f, P


def _conjugate_gradients(product: Any, g: Array, inverse: Any, h: float) -> Array:
    """Approximate solution of H d = g."""

    def precondition(r: Array) -> Array:
        return np.concatenate([r[:, :-1] @ inverse, r[:, -1:] / h], 1)

    d, r = np.zeros_like(g), g.copy()
    z = precondition(r)
    p, rz = z, float((r * z).sum())
    target = CG_TOLERANCE**2 * rz
    for _ in range(CG_STEPS):
        if rz <= target:
            break
        q = product(p)
        curvature = float((p * q).sum())
        if curvature <= 0:  # only the direction that adds one number to every bias, by rounding
            break
        a = rz / curvature
        d, r = d + a * p, r - a * q
        z = precondition(r)
        rz, old = float((r * z).sum()), rz
        p = z + (rz / old) * p
    return d
