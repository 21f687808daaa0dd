"""What the rooms that compute with torch share: the precision of reductions, checks of tensors, differentiability."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if any of the tensors is float64, else float32."""
    return torch.float64 if torch.float64 in [x.dtype for x in tensors] else torch.float32


def check_float(name: str, x: Any, dims: int | None = None) -> None:
    """Raise TypeError unless ``x`` is a floating tensor, ValueError unless it has ``dims`` dimensions."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor; got {type(x).__name__}")
    if not x.is_floating_point():
        raise TypeError(f"{name} must be a floating tensor; got dtype {x.dtype}")
    if dims is not None and x.dim() != dims:
        raise ValueError(f"{name} must have {dims} dimensions; got shape {tuple(x.shape)}")


def as_recorded(*tensors: Any) -> tuple[Any, ...]:
    """The tensors (or None), detached where gradients are not recorded.

    A Function that makes its gradients in the forward pass asks ``ctx.needs_input_grad`` whether to; that is true for a
    parameter under ``torch.no_grad`` as well.
    """
    return tensors if torch.is_grad_enabled() else tuple(x if x is None else x.detach() for x in tensors)


class _Once(torch.autograd.Function):
    """Passes gradients on; differentiating them again raises."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(x.view_as(x) for x in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        raise RuntimeError("this function is differentiable once; its gradient cannot be differentiated again")


def once_differentiable(backward: Callable[..., tuple[Tensor | None, ...]]) -> Callable[..., Any]:
    """Make a second differentiation an error.

    torch's decorator of this name only does so if the upstream gradient requires a gradient; a gradient penalty would
    silently lose its effect. The Function must save its differentiable inputs: the gradients are tied to them.
    """

    @functools.wraps(backward)
    def wrapper(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            out = backward(ctx, *grads)
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():  # no create_graph
            return out
        made = [x for x in out if x is not None]
        anchors = [x for x in (*ctx.saved_tensors, *grads) if x is not None and x.requires_grad]
        tied = iter(_Once.apply(len(made), *made, *anchors))
        return tuple(None if x is None else next(tied) for x in out)

    return wrapper
