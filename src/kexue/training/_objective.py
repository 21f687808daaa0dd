"""The function that a flow goes down: its parameters, its value and its gradient where they stand."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from kexue._tensors import check_float

__all__ = ["Objective"]

LossFunction = Callable[[], Tensor]
GradientFunction = Callable[[], Tensor | Sequence[Tensor]]


def check_parameters(params: Any) -> list[Tensor]:
    """The tensors that may be moved, as a list; errors name the place of the one that may not."""
    if isinstance(params, Tensor):
        params = [params]
    elif isinstance(params, (nn.Module, str, dict)) or not isinstance(params, Iterable):
        raise TypeError(
            "params must be a tensor or an iterable of tensors, for example model.parameters(); "
            f"got {type(params).__name__}"
        )
    tensors = list(params)
    if not tensors:
        raise ValueError("params must hold at least one tensor; got none")
    for i, p in enumerate(tensors):
        check_float(f"params[{i}]", p)
        if p.layout != torch.strided or p.is_meta:
            raise TypeError(f"params[{i}] must be a dense tensor with values; got layout {p.layout} on {p.device}")
        if not p.is_leaf:
            raise ValueError(f"params[{i}] must be a leaf (not computed from other tensors); got {p.grad_fn}")
        if any(stride == 0 and size > 1 for stride, size in zip(p.stride(), p.shape, strict=True)):
            raise ValueError(f"params[{i}] must have memory of its own for each entry; got strides {p.stride()}")
    _check_overlap(tensors)
    if all(_frozen(p) for p in tensors):
        raise ValueError("params must hold a tensor that may move; got only Parameters with requires_grad=False")
    return tensors


def _frozen(p: Tensor) -> bool:
    return isinstance(p, nn.Parameter) and not p.requires_grad


def _check_overlap(tensors: list[Tensor]) -> None:
    """Raise if two tensors share memory: a step would move the shared entries twice."""
    spans = []
    for i, p in enumerate(tensors):
        if p.numel():
            last = sum((size - 1) * stride for size, stride in zip(p.shape, p.stride(), strict=True))
            spans.append((str(p.device), p.data_ptr(), p.data_ptr() + (last + 1) * p.element_size(), i))
    spans.sort()
    for (device, _, end, i), (other, start, _, j) in pairwise(spans):
        if device == other and start < end:
            raise ValueError(f"params[{min(i, j)}] and params[{max(i, j)}] share memory; give each tensor once")


class Objective:
    """A loss of parameters, read and moved where they are.

    ``x`` holds the state: the memory of the parameters themselves, or a float32 copy of those in half precision, which
    :meth:`publish` rounds into them. Frozen Parameters (``requires_grad=False``) are left out.
    """

    def __init__(self, loss_fn: LossFunction, params: Any, grad_fn: GradientFunction | None = None) -> None:
        if not callable(loss_fn):
            raise TypeError(f"loss_fn must be a function without arguments; got {type(loss_fn).__name__}")
        if grad_fn is not None and not callable(grad_fn):
            raise TypeError(f"grad_fn must be a function without arguments or None; got {type(grad_fn).__name__}")
        self.loss_fn, self.grad_fn = loss_fn, grad_fn
        self.single = isinstance(params, Tensor)
        self.params = check_parameters(params)
        self.moved = [not _frozen(p) for p in self.params]
        self.free = [p for p, moved in zip(self.params, self.moved, strict=True) if moved]
        self.x: list[Tensor] = []
        self.low: list[tuple[Tensor, Tensor]] = []
        self.evaluations = 0

    @contextmanager
    def session(self, keep: bool) -> Iterator[None]:
        """Load the state; afterwards parameters, flags and (unless ``keep`` and all went well) values are as before."""
        flags = [p.requires_grad for p in self.free]
        start = [p.detach().clone() for p in self.free]
        views = [p.detach() for p in self.free]
        self.x = [v if v.dtype in (torch.float32, torch.float64) else v.float() for v in views]
        self.low = [(v, x) for v, x in zip(views, self.x, strict=True) if v is not x]
        self.evaluations = 0
        autograd = self.grad_fn is None
        done = False
        try:
            with torch.inference_mode(False), torch.set_grad_enabled(autograd):
                if autograd:
                    for p in self.free:
                        p.requires_grad_(True)
                yield
            done = True
        finally:
            with torch.no_grad():
                if not (done and keep):
                    for v, s in zip(views, start, strict=True):
                        v.copy_(s)
                for p, flag in zip(self.free, flags, strict=True):
                    p.requires_grad_(flag)
            self.x, self.low = [], []

    def select(self, values: Sequence[Tensor]) -> list[Tensor]:
        """Those of ``values`` (one for each of params) that belong to tensors that move."""
        if len(values) != len(self.params):
            raise ValueError(f"expected one tensor for each of {len(self.params)} params; got {len(values)}")
        return [v for v, moved in zip(values, self.moved, strict=True) if moved]

    def publish(self) -> None:
        """Round the state into parameters of half precision; the others are the state."""
        for view, x in self.low:
            view.copy_(x)

    def set(self, values: Sequence[Tensor]) -> None:
        """Move to a state."""
        torch._foreach_copy_(self.x, list(values))
        self.publish()

    def _evaluate(self) -> Tensor:
        loss = self.loss_fn()
        if not isinstance(loss, Tensor):
            raise TypeError(f"loss_fn must return a tensor; got {type(loss).__name__}")
        if loss.dim():
            if loss.numel() != 1:
                raise ValueError(f"loss_fn must return a scalar; got shape {tuple(loss.shape)}")
            loss = loss.reshape(())
        if not loss.is_floating_point():
            raise TypeError(f"loss_fn must return a real floating scalar; got dtype {loss.dtype}")
        return loss

    def value(self) -> Tensor:
        """The loss here, a scalar without history."""
        return self._evaluate().detach()

    def gradient(self) -> tuple[Tensor | None, list[Tensor]]:
        """Loss (None where a closed form gives the gradient) and gradient here, which nobody may write to."""
        self.evaluations += 1
        if self.grad_fn is not None:
            return None, self.as_gradient(self.grad_fn())
        loss = self._evaluate()
        if not loss.requires_grad:
            raise ValueError("the loss does not depend on params: it has no gradient")
        found = torch.autograd.grad(loss, self.free, allow_unused=True)
        grads = [g for g in found if g is not None]
        if len(grads) < len(found):
            if not grads:
                raise ValueError("the loss does not depend on params: it has no gradient")
            grads = [torch.zeros_like(p) if g is None else g for p, g in zip(self.free, found, strict=True)]
        return loss.detach(), self._like_state(grads)

    def as_gradient(self, made: Any) -> list[Tensor]:
        """What ``grad_fn`` returned, checked: one dense tensor for each that moves."""
        grads = [made] if isinstance(made, Tensor) else list(made)
        if len(grads) == len(self.params) != len(self.free):
            grads = self.select(grads)
        if len(grads) != len(self.free):
            raise ValueError(f"grad_fn must return one tensor for each of {len(self.free)} params; got {len(grads)}")
        for p, g in zip(self.free, grads, strict=True):
            if not isinstance(g, Tensor) or g.shape != p.shape:
                got = tuple(g.shape) if isinstance(g, Tensor) else type(g).__name__
                raise ValueError(f"grad_fn must return tensors shaped like params, {tuple(p.shape)}; got {got}")
        return self._like_state(grads)

    def _like_state(self, grads: list[Tensor]) -> list[Tensor]:
        """Dense, and in the dtype of the state."""
        for i, (x, g) in enumerate(zip(self.x, grads, strict=True)):
            if g.dtype is not x.dtype or g.is_sparse:
                grads[i] = (g.to_dense() if g.is_sparse else g).to(x.dtype)
        return grads
