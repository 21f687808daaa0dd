"""Losses over sets of labels in plain float64, row by row: all pairs, all subsets."""

import itertools

import torch


def pair_loss(scores, positive, gamma, margin):
    """Loss of each row from the list of its pairs, (N,); classes with score -inf take no part."""
    losses = []
    for s, p in zip(scores, positive, strict=True):
        finite = s > -torch.inf
        terms = [torch.exp(gamma * (a - b + margin)) for a in s[~p & finite] for b in s[p]]
        losses.append(torch.log1p(sum(terms, torch.zeros((), dtype=s.dtype))))
    return torch.stack(losses)


def combination(scores, positive, most=None, pad=None):
    """Loss of each row from the list of all sets, (N,); with ``pad`` (N,) sets of up to ``most`` classes."""
    losses = []
    for i, (s, p) in enumerate(zip(scores, positive, strict=True)):
        k = int(p.sum())
        members = torch.nonzero(s > -torch.inf).flatten().tolist()
        total = []
        for size in [k] if pad is None else range(most + 1):
            extra = 0.0 if pad is None else (most - size) * pad[i]
            total += [s[list(chosen)].sum() + extra for chosen in itertools.combinations(members, size)]
        own = s[p].sum() + (0.0 if pad is None else (most - k) * pad[i])
        losses.append(torch.logsumexp(torch.stack(total), 0) - own)
    return torch.stack(losses)


def log_symmetric(scores, most):
    """log Z_0 .. log Z_most of each row by the positive recurrence, (N, most + 1)."""
    # -1e9 and not -inf for "impossible": logaddexp has no gradient between two infinities
    table = torch.full((len(scores), most + 1), -1e9, dtype=scores.dtype)
    table = table.index_fill(1, torch.tensor(0), 0.0)
    for column in scores.unbind(1):
        table = torch.cat([table[:, :1], torch.logaddexp(table[:, 1:], table[:, :-1] + column[:, None])], 1)
    return table
