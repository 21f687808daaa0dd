"""Smooth approximations in plain float64, row by row."""

import math

import torch


def smooth_max(row, K):
    return torch.log(torch.exp(K * row).sum()) / K


def smooth_abs(x, K):
    return torch.log(torch.exp(K * x) + torch.exp(-K * x)) / K


def smooth_relu(x, K):
    return torch.log(1 + torch.exp(K * x)) / K


def onehot(row, K):
    e = torch.exp(K * row)
    return e / e.sum()


def soft_argmax(row, K, positions=None):
    positions = range(len(row)) if positions is None else positions
    return sum(p * w for p, w in zip(positions, onehot(row, K), strict=True))


def topk(row, k, K):
    """Threshold by bisection; the gradient by one Newton step, whose derivative is the implicit one."""
    z = K * row
    low, high = (float(v) for v in (z.detach().min() - 50, z.detach().max() + 50))
    for _ in range(200):
        middle = (low + high) / 2
        if float(torch.sigmoid(z.detach() - middle).sum()) > k:
            low = middle
        else:
            high = middle
    p = torch.sigmoid(z - (low + high) / 2)
    t = (low + high) / 2 + (p.sum() - k) / (p * (1 - p)).sum().detach()
    return torch.sigmoid(z - t)


def topk_recursive(row, k, K):
    x = K * (row - row.min())
    p = torch.zeros_like(x)
    for _ in range(k):
        y = (1 - p) * x
        p = p + torch.exp(y) / torch.exp(y).sum()
    return p


def accuracy_loss(logits, labels):
    return torch.stack([1 - onehot(row, 1.0)[y] for row, y in zip(logits, labels, strict=True)])


def f_loss(p, t, beta, smooth):
    """1 - F of one pool."""
    if smooth == 0 and float(t.sum()) == 0:
        return p.sum() * 0
    tp = (p * t).sum()
    if beta == math.inf:
        return 1 - (tp + smooth) / (t.sum() + smooth)
    b2 = beta**2
    return 1 - ((1 + b2) * tp + smooth) / (b2 * t.sum() + p.sum() + smooth)


def f1_loss(logits, t, beta=1.0, average="binary", smooth=0.0):
    if t.dim() < logits.dim():
        p = torch.stack([onehot(row, 1.0) for row in logits])
        t = torch.nn.functional.one_hot(t, logits.shape[1])
    else:
        p = 1 / (1 + torch.exp(-logits))
    t = t.double()
    if average != "macro":
        return f_loss(p, t, beta, smooth)
    return sum(f_loss(p[:, c], t[:, c], beta, smooth) for c in range(logits.shape[1])) / logits.shape[1]
