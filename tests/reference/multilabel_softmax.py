"""Multi-label softmax cross-entropy with hard labels in plain float64, row by row and label by label."""

import torch


def row(scores, positive, threshold=0.0, mask=None):
    """Loss of one row: scores (n,), a set of label numbers, a threshold, and which labels take part."""
    negatives, positives = [torch.zeros_like(scores[0])], [torch.zeros_like(scores[0])]
    for i, s in enumerate(scores.double() - threshold):
        if mask is not None and not mask[i]:
            continue
        if i in positive:
            positives.append(-s)
        elif s > -1e11:
            negatives.append(s)
    return torch.logsumexp(torch.stack(negatives), 0) + torch.logsumexp(torch.stack(positives), 0)


def zlpr(scores, positives, threshold=None, mask=None):
    """Losses (N,) of scores (N, n) and a list of N lists of label numbers; threshold (N,) or None; mask (N, n)."""
    losses = [
        row(
            scores[i].double(),
            set(positives[i]),
            0.0 if threshold is None else threshold[i].double(),
            None if mask is None else mask[i],
        )
        for i in range(len(scores))
    ]
    return torch.stack(losses)
