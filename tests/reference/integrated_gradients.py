"""Integrated gradients in plain float64: one example at a time, a composite midpoint rule on very many points."""

import torch


def integrated_gradients(f, x, baseline, steps=20_000, path=None):
    """(B, ...) contributions to F(x) - F(baseline); ``f`` maps (N, ...) to (N,)."""
    rows = []
    for i in range(len(x)):
        start, end = x[i].double(), baseline[i].double()
        total = torch.zeros_like(start)
        for part in ((torch.arange(steps, dtype=torch.float64) + 0.5) / steps).split(1000):
            shape = (-1, *[1] * start.dim())
            if path is None:
                points = start + part.view(shape) * (end - start)
                speed = (end - start).expand_as(points)
            else:
                points = torch.stack([path(a)[i] for a in part])
                speed = torch.stack([(path(a + 1e-6)[i] - path(a - 1e-6)[i]) / 2e-6 for a in part])
            points = points.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(f(points).sum(), points)
            total -= (gradient * speed).sum(0) / steps
        rows.append(total)
    return torch.stack(rows)


def riemann(f, x, baseline, alphas, weights):
    """Contributions by a sum over given places of the way from x to the baseline, as in the article."""
    total = torch.zeros_like(x)
    for alpha, weight in zip(alphas, weights, strict=True):
        point = ((1 - alpha) * x + alpha * baseline).requires_grad_()
        (gradient,) = torch.autograd.grad(f(point).sum(), point)
        total += weight * (x - baseline) * gradient
    return total
