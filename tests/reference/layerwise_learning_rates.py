"""Rates per layer and gradient transforms in plain float64: one parameter, one entry at a time."""

import math
from fnmatch import fnmatchcase

import torch


def rate(name, depth, head, lr, layer_decay, rules):
    """lr, once times the decay for each layer between this one and the head, times every rule that matches."""
    for _ in range(head - depth):
        lr *= layer_decay
    for pattern, multiplier in rules.items():
        if fnmatchcase(name, pattern):
            lr *= multiplier
    return lr


def norm(values, p):
    values = [abs(v) for v in values]
    if p == math.inf:
        return max(values, default=0.0)
    return sum(v**p for v in values) ** (1 / p)


def entries(gradients):
    return [v for g in gradients for v in g.flatten().tolist()]


def clip_norm(gradients, c, p=2.0, per_tensor=False):
    if per_tensor:
        return [clip_norm([g], c, p)[0] for g in gradients]
    size = norm(entries(gradients), p)
    return [g * (c / size) if size > c else g.clone() for g in gradients]


def normalize(gradients, p=2.0, per_tensor=False):
    if per_tensor:
        return [normalize([g], p)[0] for g in gradients]
    size = norm(entries(gradients), p)
    return [g / size if size > 0 else g.clone() for g in gradients]


def clip_value(gradients, c):
    clipped = [[max(-c, min(c, v)) for v in g.flatten().tolist()] for g in gradients]
    return [torch.tensor(values, dtype=g.dtype).view(g.shape) for values, g in zip(clipped, gradients, strict=True)]


def clip_quantile(gradients, q, per_tensor=False):
    if per_tensor:
        return [clip_quantile([g], q)[0] for g in gradients]
    found = sorted(abs(v) for v in entries(gradients))
    if not found:
        return gradients
    bound = next(v for place, v in enumerate(found, 1) if place >= q * len(found) - 1e-9)
    return clip_value(gradients, bound)


def centralize(gradients):
    return [torch.stack([row - row.mean() for row in g]) if g.ndim > 1 else g.clone() for g in gradients]


def project(gradients, directions):
    out = []
    for g, d in zip(gradients, directions, strict=True):
        dot = sum(a * b for a, b in zip(g.flatten().tolist(), d.flatten().tolist(), strict=True))
        square = sum(b * b for b in d.flatten().tolist())
        out.append(g - dot / square * d if square else g.clone())
    return out


def train(gradient, theta, rates, kind, steps, decay=0.0, eps=1e-8, momentum=0.9):
    """Weights after some steps; ``gradient(theta)`` gives a list, ``rates`` one number for each tensor.

    kind: sgd, momentum, nesterov, adam, adamw, rmsprop (torch's constants) or lion (0.9, 0.99). Decay is decoupled for
    adamw and lion, an L2 penalty otherwise.
    """
    theta = [x.clone() for x in theta]
    m, v = [torch.zeros_like(x) for x in theta], [torch.zeros_like(x) for x in theta]
    for t in range(1, steps + 1):
        for n, g in enumerate(gradient(theta)):
            if kind in ("adamw", "lion"):
                theta[n] = theta[n] * (1 - rates[n] * decay)
            else:
                g = g + decay * theta[n]
            if kind == "sgd":
                step = g
            elif kind in ("momentum", "nesterov"):
                m[n] = momentum * m[n] + g
                step = g + momentum * m[n] if kind == "nesterov" else m[n]
            elif kind in ("adam", "adamw"):
                m[n] = 0.9 * m[n] + 0.1 * g
                v[n] = 0.999 * v[n] + 0.001 * g * g
                step = m[n] / (1 - 0.9**t) / ((v[n] / (1 - 0.999**t)).sqrt() + eps)
            elif kind == "rmsprop":
                v[n] = 0.99 * v[n] + 0.01 * g * g
                step = g / (v[n].sqrt() + eps)
            else:
                step = (0.9 * m[n] + 0.1 * g).sign()
                m[n] = 0.99 * m[n] + 0.01 * g
            theta[n] = theta[n] - rates[n] * step
    return theta


class Lion(torch.optim.Optimizer):
    """Lion, the plain way."""

    def __init__(self, params, lr, weight_decay=0.0):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                m = self.state[p].setdefault("m", torch.zeros_like(p))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(group["lr"] * (0.9 * m + 0.1 * p.grad).sign())
                m.mul_(0.99).add_(p.grad, alpha=0.01)
