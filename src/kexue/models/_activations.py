"""Activations by name, and their moments under a standard normal input: E[f(z)] and E[f(z)^2], z ~ N(0, 1).

A Gauss-Hermite rule loses its precision at a kink (relu: 1e-3 with 100 nodes) and tables of constants cover only the
functions that somebody thought of. Here panels are halved until each agrees with its two halves, all open panels in
one call of the function: 1e-12 for smooth functions and for kinks and jumps wherever they lie. The rule is that of
Gauss and Lobatto, which has nodes at both ends: a jump beside an end is seen, where Gauss-Legendre looks past it.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

Activation = Callable[[Tensor], Tensor]


def _linear(x: Tensor) -> Tensor:
    return x


def _relu2(x: Tensor) -> Tensor:
    return F.relu(x).square()


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Activation] = {
    "linear": _linear,
    "relu": F.relu,
    "leaky_relu": F.leaky_relu,
    "relu6": F.relu6,
    "relu2": _relu2,
    "elu": F.elu,
    "celu": F.celu,
    "selu": F.selu,
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "quick_gelu": _quick_gelu,
    "silu": F.silu,
    "mish": F.mish,
    "tanh": torch.tanh,
    "hardtanh": F.hardtanh,
    "sigmoid": torch.sigmoid,
    "hardsigmoid": F.hardsigmoid,
    "hardswish": F.hardswish,
    "softplus": F.softplus,
    "softsign": F.softsign,
}
EDGE = 16.0  # the normal weighs e^-128 there: room for functions that grow like e^z
COUNT = 16
_BASIS = np.polynomial.legendre.Legendre.basis(COUNT - 1)
NODES = np.concatenate([[-1.0], np.sort(_BASIS.deriv().roots().real), [1.0]])
WEIGHTS = 2 / (COUNT * (COUNT - 1) * _BASIS(NODES) ** 2)
ROUNDS = 48  # halvings: a panel of 1 down to the spacing of doubles
MOST_PANELS = 1 << 16


def activation(f: Any) -> Activation:
    """The function of a name; callables pass.

    Raises:
        TypeError: Neither a name nor a callable.
        ValueError: Unknown name.
    """
    if isinstance(f, str):
        if f not in ACTIVATIONS:
            raise ValueError(f"nonlinearity must be a function or one of {', '.join(ACTIVATIONS)}; got {f!r}")
        return ACTIVATIONS[f]
    if not callable(f):
        raise TypeError(f"nonlinearity must be a name or a function; got {type(f).__name__}")
    return f


@torch.no_grad()
def _panels(f: Activation, left: Tensor, width: Tensor) -> Tensor:
    """(N, 2): integrals of f phi and f^2 phi over the panels [left, left + width]."""
    nodes, weights = torch.from_numpy((NODES + 1) / 2), torch.from_numpy(WEIGHTS / 2)
    z = left[:, None] + width[:, None] * nodes
    value = f(z)
    if not isinstance(value, Tensor) or value.shape != z.shape:
        got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"nonlinearity must map a tensor to one of its shape, {tuple(z.shape)}; got {got}")
    value = value.double()
    if not torch.isfinite(value).all():
        bad = z[~torch.isfinite(value)]
        raise ValueError(f"nonlinearity must be finite in [-{EDGE:g}, {EDGE:g}]; it is not at {float(bad[0]):.3g}")
    weight = torch.exp(-z * z / 2) * (width[:, None] * weights / math.sqrt(2 * math.pi))
    return torch.stack([(value * weight).sum(1), (value * value * weight).sum(1)], 1)


def _integrate(f: Activation) -> tuple[float, float]:
    left = torch.arange(-EDGE, EDGE, dtype=torch.float64, device="cpu")
    width = torch.ones_like(left)
    whole = _panels(f, left, width)
    total = torch.zeros(2, dtype=torch.float64, device="cpu")
    for _ in range(ROUNDS):
        half = width.repeat_interleave(2) / 2
        start = torch.stack([left, left + width / 2], 1).view(-1)
        parts = _panels(f, start, half)
        both = parts.view(-1, 2, 2).sum(1)
        second = float((total + both.sum(0))[1])
        scale = torch.tensor([math.sqrt(second), second], dtype=torch.float64, device="cpu")  # the mean itself may be 0
        done = ((both - whole).abs() <= 1e-15 * scale).all(1)
        total = total + both[done].sum(0)
        keep = (~done).repeat_interleave(2)
        left, width, whole = start[keep], half[keep], parts[keep]
        if not len(left):
            break
        if len(left) > MOST_PANELS:
            raise ValueError("nonlinearity must be a function; its moments do not converge (is it random?)")
    total = total + whole.sum(0)
    return float(total[0]), float(total[1])


_by_name = functools.lru_cache(maxsize=None)(lambda name: _integrate(ACTIVATIONS[name]))


def moments(f: str | Activation) -> tuple[float, float]:
    """E[f(z)] and E[f(z)^2] for z ~ N(0, 1).

    Args:
        f: A name of :data:`ACTIVATIONS` or a function of tensors, applied to each number by itself; it is called with
            float64 tensors.

    Raises:
        TypeError: Neither a name nor a function.
        ValueError: Unknown name; a function that changes the shape, is not finite or is 0 throughout.
    """
    found = activation(f)
    if isinstance(found, nn.Module):  # one with parameters (PReLU) takes tensors of their dtype only
        found = copy.deepcopy(found).to("cpu", torch.float64)
    mean, second = (0.0, 1.0) if f == "linear" else _by_name(f) if isinstance(f, str) else _integrate(found)
    if not second > 0:
        raise ValueError(f"nonlinearity must not be 0 throughout; got E[f(z)^2] = {second}")
    return mean, second
