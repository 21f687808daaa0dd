"""InfoNCE and FlatNCE in plain float64, row by row."""

import torch


def log_xi(positive, negatives):
    """log of the sum over the negatives of exp(s_j - s_t), for one row."""
    return torch.log(torch.exp(negatives - positive).sum())


def value(v, mode):
    """FlatNCE is log xi, InfoNCE is log(1 + xi)."""
    return v if mode == "flat" else torch.log1p(torch.exp(v))


def unit(x):
    """Rows of length 1."""
    return x / x.norm(dim=-1, keepdim=True)


def info_nce(q, k, negatives=None, *, temperature, mode, mask=None, margin=0.0, in_batch=None):
    """Loss of each row, (N,)."""
    q, k = unit(q), unit(k)
    in_batch = negatives is None if in_batch is None else in_batch
    losses = []
    for i in range(len(q)):
        positive = ((q[i] * k[i]).sum() - margin) / temperature
        scores, keep = [], []
        if in_batch:
            scores.append(k @ q[i] / temperature)
            keep.append(torch.arange(len(k)) != i)
        if negatives is not None:
            own = unit(negatives if negatives.dim() == 2 else negatives[i])
            scores.append(own @ q[i] / temperature)
            keep.append(torch.ones(len(own), dtype=torch.bool))
        keep = torch.cat(keep) if mask is None else torch.cat(keep) & mask[i]
        losses.append(value(log_xi(positive, torch.cat(scores)[keep]), mode))
    return torch.stack(losses)


def nt_xent(z1, z2, *, temperature, mode):
    """Loss of each of the 2N views, (2N,)."""
    z = unit(torch.cat([z1, z2]))
    n, losses = len(z1), []
    for i in range(2 * n):
        partner = (i + n) % (2 * n)
        others = [j for j in range(2 * n) if j not in (i, partner)]
        losses.append(value(log_xi(z[i] @ z[partner] / temperature, z[others] @ z[i] / temperature), mode))
    return torch.stack(losses)
