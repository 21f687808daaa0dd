"""The direct path of a Post-LN stack and the columns of a probe, written out in float64."""

import math

import torch


def skip_gain(r, sublayers):
    """Divide by sqrt(1 + r) once for each sublayer."""
    weight = 1.0
    for _ in range(sublayers):
        weight /= math.sqrt(1.0 + r)
    return weight


def kept_variance(cut=2.0, steps=200_000):
    """Variance of a standard normal variable that is redrawn until |x| <= cut, by the midpoint rule."""
    width = 2 * cut / steps
    points = [-cut + (n + 0.5) * width for n in range(steps)]
    weights = [math.exp(-x * x / 2) for x in points]
    return sum(x * x * w for x, w in zip(points, weights, strict=True)) / sum(weights)


def rms(x):
    numbers = [float(v) for v in x.detach().double().flatten()]
    return math.sqrt(sum(v * v for v in numbers) / len(numbers))


def entropy(probabilities, takes_part=None):
    """Mean over heads, queries that take part and batch; probabilities (B, H, T, S), takes_part (B, T)."""
    total, count = 0.0, 0
    for b in range(probabilities.shape[0]):
        for h in range(probabilities.shape[1]):
            for t in range(probabilities.shape[2]):
                if takes_part is not None and not takes_part[b, t]:
                    continue
                row = [float(p) for p in probabilities[b, h, t].detach().double()]
                total -= sum(p * math.log(p) for p in row if p > 0)
                count += 1
    return total / count


def attention(q, k, visible=None):
    """Probabilities (B, H, T, S) of softmax attention; visible is bool and broadcastable."""
    scores = q.double() @ k.double().mT / math.sqrt(q.shape[-1])
    if visible is not None:
        scores = scores.masked_fill(~visible, -math.inf)
    return torch.softmax(scores, -1)
