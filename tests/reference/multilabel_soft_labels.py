"""Multi-label softmax cross-entropy with soft labels in plain float64: log(1 + sum t e^-s) + log(1 + sum (1-t) e^s)."""

import torch


def zlpr(scores, target, threshold=None, mask=None):
    """Losses (N,) of scores and weights (N, n); threshold (N,) or None; mask (N, n). No score may exceed some 700."""
    losses = []
    for i in range(len(scores)):
        s = scores[i].double() - (0.0 if threshold is None else threshold[i].double())
        t = target[i].double()
        use = s > -1e11
        if mask is not None:
            use = use & mask[i]
        s, t = s[use], t[use]
        losses.append(torch.log1p((t * torch.exp(-s)).sum()) + torch.log1p(((1 - t) * torch.exp(s)).sum()))
    return torch.stack(losses)
