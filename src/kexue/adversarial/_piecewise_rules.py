"""Operations of piecewise-linear critics: forwards, backwards, and along a direction, without a graph.

With its kinks held fixed, an operation is affine in its input. A rule is one call of one operation; it knows

    forward(h)              the value; remembers which piece each entry is on
    pull(delta)             the backward signal of its inputs
    push(a, v)              the affine map on v, with its constant terms (biases) multiplied by a, row by row
    gradients(delta, a, v)  what its weights get when v flows in, biases count a times, and delta flows back

The kinks follow torch's own conventions (the slope of ReLU at 0 is 0), so that gradients agree with autograd
everywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm


class Unsupported(Exception):
    """The critic has an operation without a rule; the message says which."""


def by_row(a: Tensor, like: Tensor) -> Tensor:
    """One factor a row (B,), in the dtype of ``like`` (B, ...) and ready to be multiplied with it."""
    return a.to(like.dtype).view(-1, *[1] * (like.dim() - 1))


class Rule:
    """One call of one operation. ``saved`` holds the tensors that the backward pass needs."""

    weights: tuple[Any, ...] = ()  # tensors, None for a missing bias
    saved: tuple[Tensor, ...] = ()

    def forward(self, *h: Tensor) -> Tensor:
        """Value of the operation."""
        raise NotImplementedError

    def pull(self, delta: Tensor) -> tuple[Tensor, ...]:
        """Backward signals of the inputs."""
        raise NotImplementedError

    def push(self, a: Tensor | None, *v: Tensor) -> Tensor:
        """Affine map with constants multiplied by ``a`` (B,); None counts as 0."""
        raise NotImplementedError

    def gradients(self, delta: Tensor, a: Tensor | None, *v: Tensor) -> tuple[Tensor | None, ...]:
        """One entry for each of ``weights``."""
        return ()


class LinearRule(Rule):
    """x W' + c."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weights = (weight, bias)

    def forward(self, *h: Tensor) -> Tensor:
        if h[0].dim() < 2:
            raise Unsupported("a linear layer that takes the rows for features")
        return F.linear(h[0], *self.weights)

    def pull(self, delta: Tensor) -> tuple[Tensor, ...]:
        weight = self.weights[0]
        return (delta @ weight,)

    def push(self, a: Tensor | None, *v: Tensor) -> Tensor:
        weight, bias = self.weights
        out = F.linear(v[0], weight)
        if bias is None or a is None:
            return out
        if out.dim() == 2:
            return out.addr_(a.to(out.dtype), bias)
        return out.addcmul_(by_row(a, out), bias)

    def gradients(self, delta: Tensor, a: Tensor | None, *v: Tensor) -> tuple[Tensor | None, ...]:
        rows = delta.flatten(0, -2)
        weight = rows.T @ v[0].flatten(0, -2)
        bias = self.weights[1]
        if bias is None or a is None:
            return weight, None
        summed = delta if delta.dim() == 2 else delta.flatten(1, -2).sum(1)
        return weight, a.to(delta.dtype) @ summed


class ConvRule(Rule):
    """A convolution with zero padding."""

    def __init__(self, module: Any, weight: Tensor, bias: Tensor | None) -> None:
        self.weights = (weight, bias)
        self.stride, self.dilation, self.groups = list(module.stride), list(module.dilation), module.groups
        self.padding = _padding(module)

    def _convolve(self, x: Tensor, bias: Tensor | None) -> Tensor:
        none = [0] * len(self.stride)
        return torch.convolution(
            x, self.weights[0], bias, self.stride, self.padding, self.dilation, False, none, self.groups
        )

    def _backward(self, delta: Tensor, x: Tensor, wanted: list[bool]) -> Any:
        none = [0] * len(self.stride)
        return torch.ops.aten.convolution_backward(
            delta, x, self.weights[0], None, self.stride, self.padding, self.dilation, False, none, self.groups, wanted
        )

    def forward(self, *h: Tensor) -> Tensor:
        self.shape = h[0].shape
        if h[0].dim() != len(self.stride) + 2:
            raise Unsupported("a convolution that takes the rows for channels")
        return self._convolve(h[0], self.weights[1])

    def pull(self, delta: Tensor) -> tuple[Tensor, ...]:
        shape_only = delta.new_empty(self.shape)  # values take no part; of an expanded number torch makes a copy
        return (self._backward(delta, shape_only, [True, False, False])[0],)

    def push(self, a: Tensor | None, *v: Tensor) -> Tensor:
        out, bias = self._convolve(v[0], None), self.weights[1]
        if bias is None or a is None:
            return out
        return out.addcmul_(by_row(a, out), bias.view(-1, *[1] * (out.dim() - 2)))

    def gradients(self, delta: Tensor, a: Tensor | None, *v: Tensor) -> tuple[Tensor | None, ...]:
        weight = self._backward(delta, v[0], [False, True, False])[1]
        bias = self.weights[1]
        if bias is None or a is None:
            return weight, None
        return weight, a.to(delta.dtype) @ delta.flatten(2).sum(2)


def _padding(module: Any) -> list[int]:
    if module.padding_mode != "zeros":
        raise Unsupported(f"{type(module).__name__} with padding_mode={module.padding_mode!r}")
    if not isinstance(module.padding, str):
        return list(module.padding)
    if module.padding == "valid":
        return [0] * len(module.stride)
    total = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
    if any(t % 2 for t in total):
        raise Unsupported(f"{type(module).__name__} with padding that differs between the two sides")
    return [t // 2 for t in total]


class NormRule(Rule):
    """BatchNorm in evaluation mode: w r (x - m) + c, with m and r from the running statistics."""

    def __init__(self, module: Any, weight: Tensor | None, bias: Tensor | None) -> None:
        self.weights = (weight, bias)
        self.rate = (module.running_var + module.eps).rsqrt()
        self.mean = module.running_mean.clone()

    def _channel(self, c: Tensor, x: Tensor) -> Tensor:
        return c.to(x.dtype).view(-1, *[1] * (x.dim() - 2))

    def _standard(self, a: Tensor | None, x: Tensor) -> Tensor:
        if a is not None:
            x = x - by_row(a, x) * self._channel(self.mean, x)
        return x * self._channel(self.rate, x)

    def forward(self, *h: Tensor) -> Tensor:
        return self.push(h[0].new_ones(len(h[0])), *h)

    def pull(self, delta: Tensor) -> tuple[Tensor, ...]:
        weight = self.weights[0]
        delta = delta * self._channel(self.rate, delta)
        return (delta if weight is None else delta * self._channel(weight, delta),)

    def push(self, a: Tensor | None, *v: Tensor) -> Tensor:
        weight, bias = self.weights
        out = self._standard(a, v[0])
        if weight is not None:
            out = out * self._channel(weight, out)
        if bias is not None and a is not None:
            out = out + by_row(a, out) * self._channel(bias, out)
        return out

    def gradients(self, delta: Tensor, a: Tensor | None, *v: Tensor) -> tuple[Tensor | None, ...]:
        weight, bias = self.weights
        others = [d for d in range(delta.dim()) if d != 1]
        scaled = None if weight is None else (delta * self._standard(a, v[0])).sum(others)
        return scaled, None if bias is None or a is None else (delta * by_row(a, delta)).sum(others)


class PReLURule(Rule):
    """max(x, 0) + w min(x, 0), w one number or one a channel.

    At exactly 0 torch's second derivative uses another slope than its first; this one stays with the first.
    """

    def __init__(self, weight: Tensor) -> None:
        self.weights = (weight,)

    def _slope(self, x: Tensor) -> Tensor:
        weight = self.weights[0]
        return weight.view(-1, *[1] * (x.dim() - 2)) if weight.numel() > 1 else weight

    def forward(self, *h: Tensor) -> Tensor:
        self.saved = (h[0] > 0,)
        return self.push(None, *h)

    def pull(self, delta: Tensor) -> tuple[Tensor, ...]:
        return (torch.where(self.saved[0], delta, delta * self._slope(delta)),)

    def push(self, a: Tensor | None, *v: Tensor) -> Tensor:
        return torch.where(self.saved[0], v[0], v[0] * self._slope(v[0]))

    def gradients(self, delta: Tensor, a: Tensor | None, *v: Tensor) -> tuple[Tensor | None, ...]:
        weight = self.weights[0]
        found = torch.where(self.saved[0], 0, delta * v[0])
        return (found.sum([d for d in range(found.dim()) if d != 1]) if weight.numel() > 1 else found.sum().view(1),)


class LeakyRule(Rule):
    """ReLU (slope 0) and LeakyReLU with a slope >= 0; the value tells the piece, so the input need not be kept."""

    def __init__(self, slope: float, overwrite: bool) -> None:
        self.slope, self.overwrite = slope, overwrite

    def forward(self, *h: Tensor) -> Tensor:
        out = h[0] if self.overwrite else h[0].clone()
        out = torch.relu_(out) if self.slope == 0 else F.leaky_relu_(out, self.slope)
        self.saved = (out,)
        return out

    def _mask(self, x: Tensor) -> Tensor:
        if self.slope == 0:
            return torch.ops.aten.threshold_backward(x, self.saved[0], 0)
        return torch.ops.aten.leaky_relu_backward(x, self.saved[0], self.slope, True)

    def pull(self, delta: Tensor) -> tuple[Tensor, ...]:
        return (self._mask(delta),)

    def push(self, a: Tensor | None, *v: Tensor) -> Tensor:
        x = v[0]
        if not self.overwrite:
            return self._mask(x)
        if self.slope == 0:
            return torch.ops.aten.threshold_backward.grad_input(x, self.saved[0], 0, grad_input=x)
        return torch.ops.aten.leaky_relu_backward.grad_input(x, self.saved[0], self.slope, True, grad_input=x)


class ElementwiseRule(Rule):
    """Any other piecewise-linear function of single entries; torch's own gradient says the slopes."""

    def __init__(self, call: Callable[..., Tensor]) -> None:
        self.call = call

    def forward(self, *h: Tensor) -> Tensor:
        _same_shape(h)
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_() for x in h]
            out = self.call(*leaves)
            slopes = torch.autograd.grad(out, leaves, torch.ones_like(out))
        out = out.detach()
        constant = out.clone()  # what a clamped entry gives, whatever its input
        for x, s in zip(h, slopes, strict=True):
            constant.sub_(x * s)
        self.saved = (constant, *slopes)
        return out

    def pull(self, delta: Tensor) -> tuple[Tensor, ...]:
        return tuple(delta * slope for slope in self.saved[1:])

    def push(self, a: Tensor | None, *v: Tensor) -> Tensor:
        constant, *slopes = self.saved
        out = torch.zeros_like(constant) if a is None else constant * by_row(a, constant)
        for x, s in zip(v, slopes, strict=True):
            out.addcmul_(x, s)
        return out


class MapRule(Rule):
    """A linear map without weights (pooling by the mean, reshapes, sums over axes, residual additions)."""

    def __init__(self, call: Callable[..., Tensor]) -> None:
        self.call = call

    def forward(self, *h: Tensor) -> Tensor:
        with torch.enable_grad():
            self.leaves = [x.detach().requires_grad_() for x in h]
            self.out = self.call(*self.leaves)
        return self.out.detach()

    def pull(self, delta: Tensor) -> tuple[Tensor, ...]:
        found = torch.autograd.grad(self.out, self.leaves, delta)
        del self.out, self.leaves
        return found

    def push(self, a: Tensor | None, *v: Tensor) -> Tensor:
        return self.call(*v)


class AddRule(Rule):
    """x + y and x - y of equal shapes: the residual connection."""

    def __init__(self, sign: int) -> None:
        self.sign = sign

    def forward(self, *h: Tensor) -> Tensor:
        _same_shape(h)
        return self.push(None, *h)

    def pull(self, delta: Tensor) -> tuple[Tensor, ...]:
        return delta, delta if self.sign > 0 else -delta

    def push(self, a: Tensor | None, *v: Tensor) -> Tensor:
        return v[0] + v[1] if self.sign > 0 else v[0] - v[1]


def _same_shape(h: tuple[Tensor, ...]) -> None:
    """Broadcasting could pair different rows."""
    if any(x.shape != h[0].shape for x in h):
        raise Unsupported(f"an operation on shapes {' and '.join(str(tuple(x.shape)) for x in h)}")


class ShiftRule(Rule):
    """A linear map plus a constant: x + 1, 1 - x."""

    def __init__(self, call: Callable[..., Tensor]) -> None:
        self.call = call

    def forward(self, *h: Tensor) -> Tensor:
        zero = torch.zeros((), dtype=h[0].dtype, device=h[0].device)
        self.constant = self.call(zero)
        self.sign = self.call(zero + 1) - self.constant
        return self.call(h[0])

    def pull(self, delta: Tensor) -> tuple[Tensor, ...]:
        return (delta * self.sign,)

    def push(self, a: Tensor | None, *v: Tensor) -> Tensor:
        out = v[0] * self.sign
        return out if a is None else out + by_row(a, out) * self.constant


class MaxPoolRule(Rule):
    """Max pooling: the entry that won is remembered."""

    def __init__(self, call: Callable[..., tuple[Tensor, Tensor]], dims: int) -> None:
        self.call, self.dims = call, dims

    def forward(self, *h: Tensor) -> Tensor:
        out, index = self.call(h[0])
        self.saved, self.shape = (index,), h[0].shape
        return out

    def pull(self, delta: Tensor) -> tuple[Tensor, ...]:
        first = len(self.shape) - self.dims
        flat = delta.new_zeros(*self.shape[:first], self.shape[first:].numel())
        flat.scatter_add_(first, self.saved[0].flatten(first), delta.flatten(first))
        return (flat.view(self.shape),)

    def push(self, a: Tensor | None, *v: Tensor) -> Tensor:
        first = len(self.shape) - self.dims
        return v[0].flatten(first).gather(first, self.saved[0].flatten(first)).view(self.saved[0].shape)


CONVOLUTIONS: tuple[type, ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
MAX_POOLS: dict[type, tuple[Callable[..., Any], int]] = {
    nn.MaxPool1d: (F.max_pool1d, 1),
    nn.MaxPool2d: (F.max_pool2d, 2),
    nn.MaxPool3d: (F.max_pool3d, 3),
}
MAP_MODULES: tuple[type, ...] = (
    nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d,
    nn.Flatten, nn.Unflatten, nn.Identity, nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d, nn.ReflectionPad1d,
    nn.ReflectionPad2d, nn.ReplicationPad1d, nn.ReplicationPad2d, nn.PixelShuffle, nn.PixelUnshuffle, nn.Upsample,
)  # fmt: skip
# Modules whose value may be their input itself, or a view of it
ALIASES: tuple[Any, ...] = (*MAP_MODULES, nn.modules.dropout._DropoutNd)
ELEMENTWISE_MODULES: tuple[type, ...] = (nn.Hardtanh, nn.ReLU6, nn.Hardshrink)
WEIGHTED: tuple[Any, ...] = (nn.Linear, *CONVOLUTIONS, _BatchNorm)
MODULES: frozenset[Any] = frozenset((
    nn.Linear, *CONVOLUTIONS, *MAX_POOLS, *MAP_MODULES, *ELEMENTWISE_MODULES, nn.ReLU, nn.LeakyReLU, nn.PReLU,
    nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d,
))  # fmt: skip

# Functions and methods by name; torch.x, F.x and x.method share their meaning.
RELU, LEAKY = ("relu", "relu_"), ("leaky_relu", "leaky_relu_")
MAPS = (
    "flatten", "reshape", "view", "unsqueeze", "squeeze", "contiguous", "neg", "avg_pool1d", "avg_pool2d",
    "avg_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d",
)  # fmt: skip
REDUCTIONS, SCALAR_MAPS, SHIFTS = ("sum", "mean"), ("mul", "truediv", "div"), ("add", "sub")
ELEMENTWISE = ("abs", "hardtanh", "relu6", "clamp", "maximum", "minimum")


def module_weights(module: Any) -> tuple[Any, ...]:
    """The weights of a module that has a rule, in the order in which the rule takes them."""
    if isinstance(module, WEIGHTED):
        return module.weight, module.bias
    return (module.weight,) if isinstance(module, nn.PReLU) else ()


def module_rule(module: Any, weights: tuple[Any, ...], overwrite: bool) -> Rule:
    """The rule of one call of a module, with ``weights`` in place of its own."""
    kind: Any = type(module)
    if kind not in MODULES:  # torch makes a subclass of a parametrized module
        kind = kind.__mro__[1]
    if kind is nn.Linear:
        return LinearRule(*weights)
    if kind is nn.ReLU or (kind is nn.LeakyReLU and module.negative_slope >= 0):
        return LeakyRule(0.0 if kind is nn.ReLU else module.negative_slope, overwrite)
    if kind in CONVOLUTIONS:
        return ConvRule(module, *weights)
    if kind is nn.PReLU:
        return PReLURule(*weights)
    if kind in MAX_POOLS:
        pool, dims = MAX_POOLS[kind]
        options = (module.kernel_size, module.stride, module.padding, module.dilation, module.ceil_mode, True)
        return MaxPoolRule(lambda x: pool(x, *options), dims)
    if isinstance(module, nn.modules.dropout._DropoutNd):
        if module.training and module.p > 0:
            raise Unsupported(f"{type(module).__name__} in training mode")
        return MapRule(lambda x: x)
    if kind in MAP_MODULES:
        return MapRule(module)
    if issubclass(kind, _BatchNorm):
        return NormRule(module, *weights)
    if kind in (*ELEMENTWISE_MODULES, nn.LeakyReLU):
        inplace = getattr(module, "inplace", False)
        return ElementwiseRule(lambda x: module(x.clone() if inplace else x))
    raise Unsupported(type(module).__name__)


def function_rule(
    name: str, call: Callable[..., Tensor], args: list[Any], kwargs: dict[str, Any], tensors: int
) -> Rule:
    """The rule of one call of a function or method.

    Args:
        name: Of the function.
        call: The function of its tensors alone.
        args: Arguments; tensors are None.
        kwargs: Keyword arguments.
        tensors: Number of tensors among them.
    """
    if tensors == 1:
        if name in RELU:
            return LeakyRule(0.0, False)
        slope = kwargs.get("negative_slope", args[1] if len(args) > 1 else 0.01)
        if name in LEAKY and slope >= 0:
            return LeakyRule(slope, False)
        if name in MAPS or (name in REDUCTIONS and _within_rows(args, kwargs)):
            return MapRule(call)
        if name in SCALAR_MAPS and not kwargs and (name == "mul" or args[0] is None):
            return MapRule(call)
        if name in SHIFTS:
            return ShiftRule(call)
        if name in ELEMENTWISE and all(not isinstance(x, Tensor) for x in args):
            return ElementwiseRule(call)
    elif name in SHIFTS and not kwargs and len(args) == 2:
        return AddRule(1 if "add" in name else -1)
    elif name == "cat" and kwargs.get("dim", args[1] if len(args) > 1 else 0) > 0:
        return MapRule(call)
    elif name in ("maximum", "minimum") and not kwargs:
        return ElementwiseRule(call)
    raise Unsupported(f"the function {name}")


def _within_rows(args: list[Any], kwargs: dict[str, Any]) -> bool:
    """Whether a sum or mean is over given axes, counted from the front, other than the rows."""
    dim = kwargs.get("dim", args[1] if len(args) > 1 else 0)
    dims = dim if isinstance(dim, tuple | list) else (dim,)
    return bool(dims) and all(isinstance(d, int) and not isinstance(d, bool) and d > 0 for d in dims)
