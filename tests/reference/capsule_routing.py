"""Routing by agreement written out, loop by loop, on votes; differentiated by autograd. Use float64."""

import torch


def squash(v, kappa):
    squared = (v * v).sum(-1, keepdim=True) + 1e-7
    return v * squared.sqrt() / (kappa + squared)


def votes(u, weight, capsules, mask=None):
    """u (B, n, i) through (i, k * o) or (n, i, k * o) -> (B, n, k, o)."""
    rows = []
    for example in range(u.shape[0]):
        for i in range(u.shape[1]):
            matrix = weight if weight.dim() == 2 else weight[i]
            # not a product with 0: what is masked may be NaN
            there = mask is None or bool(mask[example, i])
            rows.append(u[example, i] @ matrix if there else torch.zeros_like(matrix[0]))
    return torch.stack(rows).view(u.shape[0], u.shape[1], capsules, -1)


def route(v, routings=3, routing="kmeans", kappa=0.5, temperature=1.0, mask=None, hard=False, detach=False):
    """Votes (B, n, k, o) -> (B, k, o) and coefficients (B, n, k)."""
    capsules = v.shape[2]
    there = torch.ones(v.shape[:2], dtype=torch.bool) if mask is None else mask
    v = torch.where(there[..., None, None], v, torch.zeros_like(v))
    logits = torch.zeros_like(v[..., 0])
    for t in range(routings):
        c = torch.softmax(logits / temperature, 2)
        if hard and t > 0:
            c = torch.nn.functional.one_hot(logits.argmax(2), capsules).to(v.dtype)
        if detach:
            c = c.detach()
        c = torch.where(there[..., None], c, torch.zeros_like(c))
        s = (c[..., None] * v).sum(1)
        if t < routings - 1:
            if routing == "kmeans":
                centre = s / ((s * s).sum(-1, keepdim=True) + 1e-12).sqrt()
            else:
                centre = squash(s, 1.0)
            agreement = (v * centre[:, None]).sum(-1)
            logits = logits + agreement if routing == "hinton" else agreement
    return squash(s, kappa if routing == "kmeans" else 1.0), c


def margin_loss(scores, targets, m_plus=0.9, m_minus=0.1, lam=0.25):
    """Loss of one row of floats."""
    total = 0.0
    for s, t in zip(scores, targets, strict=True):
        total += t * max(0.0, m_plus - s) ** 2 + lam * (1 - t) * max(0.0, s - m_minus) ** 2
    return total
