"""Norms of all parameter gradients in one call (各参数梯度的范数), for a look after each ``backward``.

Used beside :func:`kexue.models.probe` (科学空间 8747): which layers get gradients, and how large. The usual loop asks
each parameter for ``.grad.norm()`` and waits for each number; here one ``torch._foreach_norm`` per device and dtype,
and one transfer.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from kexue._tensors import compute_dtype

__all__ = ["gradient_norms"]


def gradient_norms(model: nn.Module, ord: float = 2.0) -> dict[str, float]:
    """Norm of the gradient of each parameter, as ``backward`` has left it.

    Args:
        model: Any module.
        ord: Order of the norm, positive or ``math.inf``.

    Returns:
        Name -> norm, in the order of ``named_parameters``; parameters without a gradient are left out. Half
        precision is added in float32.

    Raises:
        TypeError: Not a module.
        ValueError: An order that is not positive.

    Example:
        >>> layer = torch.nn.Linear(2, 1)
        >>> layer(torch.tensor([[3.0, 4.0]])).sum().backward()
        >>> gradient_norms(layer)
        {'weight': 5.0, 'bias': 1.0}
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module; got {type(model).__name__}")
    if isinstance(ord, bool) or not isinstance(ord, int | float):
        raise TypeError(f"ord must be a number; got {ord!r} of type {type(ord).__name__}")
    if math.isnan(ord) or ord <= 0:
        raise ValueError(f"ord must be positive; got {ord!r}")
    norms: dict[str, float] = {}
    groups: dict[Any, tuple[list[str], list[Tensor]]] = {}
    for name, p in model.named_parameters():
        gradient = p.grad
        if gradient is None:
            continue
        if gradient.is_sparse:
            gradient = gradient.detach().coalesce().values()
        norms[name] = 0.0  # in order; what is empty has norm 0
        if gradient.numel():
            names, gradients = groups.setdefault((gradient.device, gradient.dtype), ([], []))
            names.append(name)
            gradients.append(gradient)
    with torch.no_grad():
        for (_, dtype), (names, gradients) in groups.items():
            wide = compute_dtype(gradients[0])
            found = torch._foreach_norm(gradients, ord, dtype=None if dtype == wide else wide)
            norms.update(zip(names, torch.stack(list(found)).tolist(), strict=True))
    return norms
