"""A model at many parameter vectors at once: each is so many more rows of one batch.

What has no parameters treats rows alone and need not know; the layers with parameters compute with stacked ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from kexue.explain._layers import Layer

__all__ = ["replaced"]


class _Attach(torch.autograd.Function):
    """A tensor as it is; its gradient is kept on the way back."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, one: Tensor, grads: list[Tensor | None], number: int) -> Tensor:
        ctx.grads, ctx.number = grads, number
        ctx.mark_dirty(z)  # no copy, and no view, which a module could not change in place
        return z

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None, None]:
        ctx.grads[ctx.number] = grad
        return grad if ctx.needs_input_grad[0] else None, None, None, None


@contextmanager
def replaced(
    layers: Iterable[Layer],
    values: dict[str, Tensor],
    count: int,
    one: Tensor,
    inputs: list[Tensor],
    grads: list[Tensor | None],
) -> Iterator[None]:
    """Let the layers compute with the parameters of ``count`` points, and note their inputs and output gradients."""

    def forward_of(layer: Layer) -> Callable[[Tensor], Tensor]:
        names = iter(layer.names)
        own = [
            values[next(names)]
            if trained
            else None
            if (p := layer.module._parameters[key]) is None
            else p.expand(count, *p.shape)
            for key, trained in (("weight", layer.weight), ("bias", layer.bias))
            if key in layer.module._parameters or trained
        ]
        weight, bias = (*own, None) if len(own) == 1 else own

        def forward(input: Tensor) -> Tensor:
            inputs.append(input.detach())
            grads.append(None)
            z = _Attach.apply(layer.stacked(input, weight, bias), one, grads, len(inputs) - 1)
            return layer.unstacked(z, input)

        return forward

    layers = list(layers)
    for layer in layers:
        layer.module.forward = forward_of(layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.module.forward
