"""Small models with layers, and batches, for the tests of rates and gradients."""

import torch
from torch import nn


def chain():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1)).double()


class Block(nn.Module):
    def __init__(self, width, kind):
        super().__init__()
        self.linear = nn.Linear(width, width, bias=kind != 1)
        self.norm = nn.LayerNorm(width) if kind else nn.RMSNorm(width)


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(20, 6)
        self.dropout = nn.Dropout(0.3)
        self.layers = nn.ModuleList([Block(6, 0), Block(6, 0)])
        self.head = nn.Linear(6, 3)

    def forward(self, ids, labels):
        x = self.dropout(self.table(ids).mean(1))
        for layer in self.layers:
            x = x + layer.norm(torch.tanh(layer.linear(x)))
        return nn.functional.cross_entropy(self.head(x), labels)


def batches(step):
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(20, (8, 5), generator=generator)
    return {"ids": ids, "labels": ids.sum(1) % 3}
