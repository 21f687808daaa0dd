"""Optimizers as flows in plain float64: one step at a time on one numpy vector."""

import numpy as np


def path(method, gradient, loss, x, steps, h, *, c=1.0, decay=0.9, eps=1e-8, cap=1000.0, target=0.0):
    """(steps + 1, D): the points of a fixed-step method, from the formulas."""
    x, points = np.array(x, dtype=np.float64), []
    v, s, b = np.zeros_like(x), np.zeros_like(x), 1 - c * h
    points.append(x.copy())
    for _ in range(steps):
        g = gradient(x)
        if method == "euler":
            x = x - h * g
        elif method == "midpoint":
            x = x - h * gradient(x - h / 2 * g)
        elif method == "rk4":
            k2 = gradient(x - h / 2 * g)
            k3 = gradient(x - h / 2 * k2)
            k4 = gradient(x - h * k3)
            x = x - h * (g + 2 * k2 + 2 * k3 + k4) / 6
        elif method == "sign":
            x = x - h * np.sign(g)
        elif method == "polyak":
            n = np.sqrt((g * g).sum())
            x = x - (h * (loss(x) - target) * min(1 / n, cap) * g / n if n else 0.0)
        elif method == "adagrad":
            s = s + g * g
            x = x - h * g / (np.sqrt(s) + eps)
        elif method == "rmsprop":
            s = decay * s + (1 - decay) * g * g
            x = x - h * g / (np.sqrt(s) + eps)
        elif method == "heavy_ball":
            v = b * v - h * h * g
            x = x + v
        elif method == "nesterov":
            v = b * v - h * h * gradient(x + b * v)
            x = x + v
        points.append(x.copy())
    return np.stack(points)


def dual_norm(g, norm, metric=None):
    """max of <g, v> over |v| = 1."""
    g = np.asarray(g, dtype=np.float64)
    if norm == "spectral":
        return np.linalg.svd(g, compute_uv=False).sum()
    g = g.ravel()
    return {
        "l2": lambda: np.sqrt((g**2).sum()),
        "l1": lambda: np.abs(g).max(),
        "linf": lambda: np.abs(g).sum(),
        "metric": lambda: np.sqrt(g @ np.linalg.solve(metric, g)),
    }[norm]()


def length(v, norm, metric=None):
    """The norm itself."""
    v = np.asarray(v, dtype=np.float64)
    if norm == "spectral":
        return np.linalg.svd(v, compute_uv=False).max()
    v = v.ravel()
    return {
        "l2": lambda: np.sqrt((v**2).sum()),
        "l1": lambda: np.abs(v).sum(),
        "linf": lambda: np.abs(v).max(),
        "metric": lambda: np.sqrt(v @ metric @ v),
    }[norm]()
