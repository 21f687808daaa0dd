"""The slow, obvious forms: the corrected table row by row, its inverse by the 2 x 2 system, and column masking."""

import math

import torch


def corrected(table, mask_id, select=0.15, split=(0.8, 0.1, 0.1), random_ids=None):
    """E'_i = (1 - s) E_i + s (a_mask E_m + a_keep E_i + a_rand mean_j E_j), float64."""
    table = table.double()
    ids = range(len(table)) if random_ids is None else sorted(set(random_ids))
    mean = sum(table[j] for j in ids) / len(ids)
    mask, keep, rand = split
    rows = [(1 - select) * row + select * (mask * table[mask_id] + keep * row + rand * mean) for row in table]
    return torch.stack(rows)


def original(table, mask_id, select=0.15, split=(0.8, 0.1, 0.1), random_ids=None):
    """Solve for the mean and for E_m, then for every row."""
    table = table.double()
    ids = range(len(table)) if random_ids is None else sorted(set(random_ids))
    mean = sum(table[j] for j in ids) / len(ids)
    mask, keep, rand = split
    own = 1 - select + select * keep
    # mean' = (own + s a_rand) mean + s a_mask E_m,   E_m' = (own + s a_mask) E_m + s a_rand mean
    system = torch.tensor(
        [[own + select * rand, select * mask], [select * rand, own + select * mask]], dtype=torch.float64
    )
    mean, masked = torch.linalg.solve(system, torch.stack([mean, table[mask_id]]))
    return torch.stack([(row - select * (mask * masked + rand * mean)) / own for row in table])


def monte_carlo(table, mask_id, token, draws, select, split, generator):
    """Mean embedding of one token over many corruptions."""
    total = torch.zeros(table.shape[1], dtype=torch.float64)
    for _ in range(draws):
        row = token
        if torch.rand((), generator=generator) < select:
            kind = torch.rand((), generator=generator)
            if kind < split[0]:
                row = mask_id
            elif kind >= split[0] + split[1]:
                row = int(torch.randint(len(table), (), generator=generator))
        total += table[row].double()
    return total / draws


def count(n, numerator, denominator):
    """ceil((1 - numerator / denominator) n) in whole numbers."""
    return -((numerator - denominator) * n // denominator)


class Encoder(torch.nn.Module):
    """A Post-LN encoder that masks attention columns by setting them to 0 after the softmax and renormalising."""

    def __init__(self, vocabulary, width, heads, layers, length):
        super().__init__()
        self.heads = heads
        self.tokens, self.places = torch.nn.Embedding(vocabulary, width), torch.nn.Embedding(length, width)
        self.maps = torch.nn.ModuleList(torch.nn.Linear(width, width) for _ in range(6 * layers))

    def forward(self, ids, columns, position_ids):
        x = self.tokens(ids) + self.places(position_ids)
        batch, length, width = x.shape
        for first in range(0, len(self.maps), 6):
            q, k, v, out, up, down = self.maps[first : first + 6]
            heads = [f(x).view(batch, length, self.heads, -1).transpose(1, 2) for f in (q, k, v)]
            weights = (heads[0] @ heads[1].mT / math.sqrt(width // self.heads)).softmax(-1)
            weights = weights * columns[:, None, None]
            weights = weights / weights.sum(-1, keepdim=True)
            x = x + out((weights @ heads[2]).transpose(1, 2).flatten(2))
            x = torch.nn.functional.layer_norm(x, (width,))
            x = x + down(torch.relu(up(x)))
        return x
