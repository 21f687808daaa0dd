"""Inputs and a small SimSiam for its tests."""

import torch
from torch import nn

from kexue.models import SimSiam

F64 = torch.float64


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def tensors(*shape, count=4, dtype=F64, seed=0):
    g = generator(seed)
    return [torch.randn(*shape, generator=g, dtype=F64).to(dtype) for _ in range(count)]


def mlp(out=6, **options):
    torch.manual_seed(0)
    return SimSiam(nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, out)), out, **options)
