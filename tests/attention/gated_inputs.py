"""Inputs of the tests of gated attention."""

import torch

from kexue.attention import _gated_kernel


def normal(*shape, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype).requires_grad_()


def operands(batch=3, rows=7, keys=7, dtype=torch.float64):
    sizes = ((batch, rows, 4), (batch, keys, 4), (batch, keys, 5), (batch, rows, 5))
    return tuple(normal(*size, seed=i, dtype=dtype) for i, size in enumerate(sizes))


def padding(kind, batch, length):
    """A mask, or None; the last sample is fully padded unless it is the only one."""
    if kind == "none":
        return None
    place = torch.arange(length)
    g = torch.Generator().manual_seed(5)
    mask = {
        "right": place < torch.arange(length, length - batch, -1)[:, None],
        "left": place >= torch.arange(batch)[:, None],
        "holes": torch.rand(batch, length, generator=g) < 0.6,
    }[kind]
    if batch > 1:
        mask[-1] = False
    return mask


def small_tiles(monkeypatch):
    for name, value in (("ROWS", 8), ("CAUSAL_ROWS", 4), ("NARROWEST", 2), ("BUDGET", 48)):
        monkeypatch.setattr(_gated_kernel, name, value)
