"""Margin softmax in plain float64: the formula of the article, one class at a time, angles by arccos."""

import math

import torch


def psi(c, kind, margin):
    """psi(theta) from the angle itself; c is a float64 tensor of cosines strictly inside (-1, 1)."""
    theta = torch.acos(c)
    if kind == "softmax":
        return torch.cos(theta)
    if kind == "am":
        return torch.cos(theta) - margin
    if kind == "arc":
        m = torch.as_tensor(margin, dtype=c.dtype)
        return torch.where(theta + m > math.pi, torch.cos(theta) - m * torch.sin(m), torch.cos(theta + m))
    if kind == "a":
        k = torch.floor(margin * theta / math.pi)
        return (1 - 2 * (k % 2)) * torch.cos(margin * theta) - 2 * k
    if kind == "simpler_a":
        return torch.minimum(torch.cos(margin * theta), torch.cos(theta))
    if kind == "combined":
        m1, m2, m3 = margin
        return torch.cos(m1 * theta + m2) - m3
    if kind == "metric":
        return -torch.sqrt(1 - c) - margin
    return kind(c)


def cosines(z, weight):
    """Cosine of every row with every class, (B, C)."""
    z = z / z.norm(dim=1, keepdim=True)
    return z @ (weight / weight.norm(dim=1, keepdim=True)).T


def loss_from_cosines(c, labels, kind, scale, margin, stands_for=None):
    """Loss of each row; ``margin`` is a number or (B,)."""
    rows = torch.arange(len(c))
    scores = -torch.sqrt(1 - c) if kind == "metric" else c
    target = scale * psi(c[rows, labels], kind, margin)
    others = torch.exp(scale * scores)
    if stands_for is not None:
        others = others * stands_for
    others = others.masked_fill(torch.nn.functional.one_hot(labels, c.shape[1]).bool(), 0.0)
    return torch.log1p((others * torch.exp(-target)[:, None]).sum(1))


def margin_softmax(z, weight, labels, kind, scale, margin):
    """Loss of each row, (B,)."""
    return loss_from_cosines(cosines(z, weight), labels, kind, scale, margin)


def dense(z, weight, labels, kind, scale, margin):
    """Loss of each row for soft labels (B, C)."""
    c = cosines(z, weight)
    logits = scale * (labels * psi(c, kind, margin) + (1 - labels) * (-torch.sqrt(1 - c) if kind == "metric" else c))
    return -(labels * (logits - torch.log(torch.exp(logits).sum(1, keepdim=True)))).sum(1)
