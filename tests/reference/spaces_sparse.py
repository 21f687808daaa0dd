"""Sparse softmax and its cross entropy in plain Python floats, one row at a time, with the gradients by formula."""

import math

import torch


def largest(row, k):
    """Indices of the k largest scores, the better first; of equal scores the one of lower index is better."""
    return sorted(range(len(row)), key=lambda i: (-row[i], i))[:k]


def nucleus(row, p):
    """The smallest set of the largest probabilities whose sum is at least p."""
    top = max(row)
    total = math.fsum(math.exp(s - top) for s in row)
    kept, mass = [], 0.0
    for i in largest(row, len(row)):
        if kept and mass >= p * total:
            break
        kept.append(i)
        mass += math.exp(row[i] - top)
    return kept


def omega(row, k, p):
    return largest(row, k) if p is None else nucleus(row, p) if p < 1 else list(range(len(row)))


def log_sum(values):
    top = max(values)
    return top + math.log(math.fsum(math.exp(v - top) for v in values))


def softmax_row(row, k=10, p=None):
    kept = omega(row, k, p)
    out = [0.0] * len(row)
    if max(row) == -math.inf:
        return out
    total = log_sum([row[i] for i in kept])
    for i in kept:
        out[i] = math.exp(row[i] - total)
    return out


def softmax(scores, k=10, p=None):
    """Rows (R, n) -> (R, n) float64."""
    return torch.tensor([softmax_row(row, k, p) for row in scores.tolist()], dtype=torch.float64).view(scores.shape)


def loss_row(row, target, k=10, p=None, weight=None, smoothing=0.0):
    """Loss of a row and its gradient."""
    n = len(row)
    weight = [1.0] * n if weight is None else weight
    kept = omega(row, k, p)
    total = log_sum([row[i] for i in kept])
    spread = sorted({*kept, target})
    share = {j: smoothing / len(spread) * weight[j] for j in spread} if smoothing else {}
    share[target] = share.get(target, 0.0) + (1 - smoothing) * weight[target]
    loss = sum(amount * (total - row[j]) for j, amount in share.items())
    grad = [0.0] * n
    for i in kept:
        grad[i] += sum(share.values()) * math.exp(row[i] - total)
    for j, amount in share.items():
        grad[j] -= amount
    return loss, grad


def losses(scores, target, k=10, p=None, weight=None, smoothing=0.0, ignore=-100, reduction="mean"):
    """Loss and gradient of rows (R, n), of their sum for "none"."""
    weight = None if weight is None else weight.tolist()
    values, grads, mass = [], [], 0.0
    for row, t in zip(scores.tolist(), target.tolist(), strict=True):
        if t == ignore:
            values.append(0.0)
            grads.append([0.0] * len(row))
            continue
        mass += 1.0 if weight is None else weight[t]
        value, grad = (0.0, [0.0] * len(row)) if max(row) == -math.inf else loss_row(row, t, k, p, weight, smoothing)
        values.append(value)
        grads.append(grad)
    values = torch.tensor(values, dtype=torch.float64)
    grads = torch.tensor(grads, dtype=torch.float64).view(scores.shape)
    if reduction == "none":
        return values, grads
    if reduction == "sum":
        return values.sum(), grads
    return values.sum() / (mass or 1.0), grads / (mass or 1.0)


def linear(hidden, table, target, bias=None, **options):
    """Loss behind a linear map, with the gradients of hidden, table and bias."""
    scores = hidden @ table.T + (0 if bias is None else bias)
    value, grad = losses(scores, target, **options)
    return value, grad @ table, grad.T @ hidden, grad.sum(0)
