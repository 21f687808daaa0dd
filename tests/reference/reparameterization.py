"""Gumbel-softmax, its estimators, baselines and schedules in plain float64, from the formulas."""

import math

import torch


def soft_sample(logits, exponential, tau):
    """Softmax of (o + g) / tau with Gumbel noise g = -log E."""
    return torch.softmax((logits - exponential.log()) / tau, -1)


def conditional_sample(logits, exponential, winner, tau):
    """One row's soft sample from noise that makes ``winner`` the argmax; gradients as if the noise were fixed."""
    weights = logits.detach().exp()
    total = weights.sum()
    perturbed = -torch.log(exponential / weights + exponential[winner] / total)
    perturbed = perturbed.index_put((torch.tensor(winner),), total.log() - exponential[winner].log())
    return torch.softmax((logits + (perturbed - logits).detach()) / tau, -1)


def choose(logits, u):
    """Inverse distribution function, class by class."""
    p = torch.softmax(logits.double(), -1)
    running = 0.0
    for i, part in enumerate(p.tolist()):
        running += part
        if u < running:
            return i
    return int(torch.nonzero(p)[-1])


def ema(rewards, decay, past=()):
    """Baseline of each reward: the weighted mean of all before it."""
    seen, out = list(past), []
    for r in rewards:
        weights = [decay ** (len(seen) - 1 - j) for j in range(len(seen))]
        out.append(sum(w * x for w, x in zip(weights, seen, strict=True)) / sum(weights) if seen else 0.0)
        seen.append(r)
    return out


def score_function(logp, reward, baseline):
    """Mean over the samples of -(r - b) log p."""
    n, total = len(reward), 0.0
    r = reward.tolist()
    before = ema(r, 0.99)
    for i in range(n):
        b = {
            "none": 0.0,
            "mean": sum(r) / n,
            "loo": (sum(r) - r[i]) / (n - 1) if n > 1 else math.nan,
            "ema": before[i],
        }[baseline]
        total = total - (r[i] - b) * logp[i]
    return total / n


def kl_to_uniform(logits):
    """Sum of p log(p C), over the classes that take part."""
    kept = logits[logits > -math.inf]
    p = torch.softmax(kept, -1)
    return torch.xlogy(p, p * len(kept)).sum()
