"""Smooth maximum, absolute value, step, one-hot and argmax (函数光滑化:max、|x|、阶跃、onehot 与 argmax).

Source: 科学空间 6620 (函数光滑化杂谈:不可导函数的可导逼近) and 3290 (寻求一个光滑的最大值函数).

With a sharpness K > 0; each goes to the sharp function as K grows:

    max x     ~  log(sum exp(K x)) / K             between max x and max x + log(n) / K; gradient softmax(K x)
    min x     ~  -smooth_max(-x)
    |x|       ~  log(e^(K x) + e^(-K x)) / K       gradient tanh(K x)
    relu x    ~  log(1 + e^(K x)) / K              gradient sigmoid(K x)
    x > 0     ~  sigmoid(K x)
    onehot    ~  softmax(K x)
    argmax x  ~  sum of i softmax(K x)_i           positions i count from 0

What we do differently: K never multiplies a score before the maximum is taken off, so that nothing overflows; slopes
are computed by their own formulas (torch's automatic ones lose tanh(K x) near 0); fp16 and bf16 are computed, and come
back, in float32, their gradient in their own dtype.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kexue._checks import check_int, check_real
from kexue._tensors import check_float, compute_dtype

__all__ = [
    "smooth_abs",
    "smooth_max",
    "smooth_min",
    "smooth_relu",
    "smooth_step",
    "soft_argmax",
    "soft_onehot",
]

LEAST, MOST = 1e-30, 1e30  # of K: beyond, K or 1 / K times a score of ordinary size leaves float32


def check_sharpness(K: Any) -> float:
    """K as a float; raise unless it is a number in [1e-30, 1e30]."""
    check_real("K", K, above=0.0)
    if not LEAST <= float(K) <= MOST:
        raise ValueError(f"K must lie in [{LEAST:g}, {MOST:g}]; got {K!r}")
    return float(K)


def check_axis(x: Any, dim: Any) -> int:
    """``dim`` counted from the front; raise unless ``x`` is a floating tensor with entries along it."""
    check_float("x", x)
    check_int("dim", dim, -(10**9))
    if not -x.dim() <= dim < x.dim():
        raise ValueError(f"dim must be an axis of x, of shape {tuple(x.shape)}; got {dim}")
    if x.shape[dim] == 0:
        raise ValueError(f"x needs at least one entry along dim {dim}; got shape {tuple(x.shape)}")
    return int(dim) % x.dim()


def _below_top(x: Tensor, dim: int, K: float) -> tuple[Tensor, Tensor]:
    """K (x - max), and the maximum with its axis kept (0 where it is infinite)."""
    top = x.detach().amax(dim, keepdim=True)
    top = torch.where(top.abs() < math.inf, top, 0.0)
    return (x - top) * K, top


def sharp_weights(x: Tensor, dim: int, K: float) -> Tensor:
    """softmax(K x); all zero where every entry is -inf."""
    e = torch.exp(_below_top(x, dim, K)[0])
    total = e.sum(dim, keepdim=True)
    return e / torch.where(total == 0, 1.0, total)


class _SmoothMax(torch.autograd.Function):
    """Saves x alone; its gradient is softmax(K x), which can be differentiated again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, K: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.dim, ctx.sharp = dim, K
        z, top = _below_top(x, dim, K)
        return (torch.exp(z).sum(dim, keepdim=True).log() / K + top).squeeze(dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        return sharp_weights(x, ctx.dim, ctx.sharp) * grad.unsqueeze(ctx.dim), None, None


class _Rounded(torch.autograd.Function):
    """|x| or relu(x) with its corner rounded."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, K: float, two_sided: bool) -> Tensor:
        ctx.save_for_backward(x)
        ctx.sharp, ctx.two_sided = K, two_sided
        size = x.abs()
        rest = torch.log1p(torch.exp(size * (-2 * K if two_sided else -K))) / K
        return rest + (size if two_sided else x.clamp(min=0))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        z = x * ctx.sharp
        return grad * (torch.tanh(z) if ctx.two_sided else torch.sigmoid(z)), None, None


def smooth_max(x: Tensor, dim: int = -1, K: float = 1.0) -> Tensor:
    """Smooth maximum, log(sum exp(K x)) / K: between max x and max x + log(n) / K.

    Args:
        x: Any shape, with at least one entry along ``dim``; entries of -inf do not take part.
        dim: Axis of the maximum.
        K: Sharpness, from 1e-30 to 1e30.

    Returns:
        x without the axis, in float32 (float64 for float64); -inf where all entries are, inf where one is.
        The gradient is softmax(K x).

    Raises:
        TypeError: Not a floating tensor, or K not a number.
        ValueError: No such axis, no entry along it, or K not positive.

    Reference:
        https://spaces.ac.cn/archives/3290

    Example:
        >>> smooth_max(torch.tensor([2.0, 1.0, 4.0, 5.0, 3.0]), K=4.0)
        tensor(5.0046)
    """
    dim, sharp = check_axis(x, dim), check_sharpness(K)
    return _SmoothMax.apply(x.to(compute_dtype(x)), dim, sharp)


def smooth_min(x: Tensor, dim: int = -1, K: float = 1.0) -> Tensor:
    """Smooth minimum, -smooth_max(-x): between min x - log(n) / K and min x.

    Args:
        x: Any shape, with at least one entry along ``dim``; entries of +inf do not take part.
        dim: Axis of the minimum.
        K: Sharpness, from 1e-30 to 1e30.

    Returns:
        x without the axis, in float32 (float64 for float64). The gradient is softmax(-K x).

    Raises:
        TypeError: Not a floating tensor, or K not a number.
        ValueError: No such axis, no entry along it, or K not positive.

    Example:
        >>> smooth_min(torch.tensor([2.0, 1.0, 4.0, 5.0, 3.0]), K=4.0)
        tensor(0.9954)
    """
    dim, sharp = check_axis(x, dim), check_sharpness(K)
    return -_SmoothMax.apply(-x.to(compute_dtype(x)), dim, sharp)


def smooth_abs(x: Tensor, K: float = 1.0) -> Tensor:
    """Smooth absolute value, log(e^(K x) + e^(-K x)) / K: between |x| and |x| + log(2) / K.

    Args:
        x: Any shape.
        K: Sharpness, from 1e-30 to 1e30.

    Returns:
        The shape of x, in float32 (float64 for float64). The gradient is tanh(K x).

    Raises:
        TypeError: Not a floating tensor, or K not a number.
        ValueError: K not positive.

    Example:
        >>> smooth_abs(torch.tensor([-2.0, 0.0]), K=2.0)
        tensor([2.0002, 0.3466])
    """
    check_float("x", x)
    sharp = check_sharpness(K)
    return _Rounded.apply(x.to(compute_dtype(x)), sharp, True)


def smooth_relu(x: Tensor, K: float = 1.0) -> Tensor:
    """Smooth relu, log(1 + e^(K x)) / K: between relu(x) and relu(x) + log(2) / K.

    Args:
        x: Any shape.
        K: Sharpness, from 1e-30 to 1e30.

    Returns:
        The shape of x, in float32 (float64 for float64). The gradient is sigmoid(K x), without a threshold from which
        on it is taken to be 1.

    Raises:
        TypeError: Not a floating tensor, or K not a number.
        ValueError: K not positive.

    Example:
        >>> smooth_relu(torch.tensor([-2.0, 0.0, 3.0]), K=2.0)
        tensor([0.0091, 0.3466, 3.0012])
    """
    check_float("x", x)
    sharp = check_sharpness(K)
    return _Rounded.apply(x.to(compute_dtype(x)), sharp, False)


def smooth_step(x: Tensor, K: float = 1.0) -> Tensor:
    """Smooth step, sigmoid(K x): near 0 below 0, 1/2 at 0, near 1 above.

    Args:
        x: Any shape; subtract a threshold first to count what lies above it.
        K: Sharpness, from 1e-30 to 1e30. The gradient at 0 is K / 4 and vanishes a few 1 / K away.

    Returns:
        The shape of x, in float32 (float64 for float64).

    Raises:
        TypeError: Not a floating tensor, or K not a number.
        ValueError: K not positive.

    Example:
        >>> smooth_step(torch.tensor([-1.0, 0.0, 1.0]), K=4.0)
        tensor([0.0180, 0.5000, 0.9820])
    """
    check_float("x", x)
    sharp = check_sharpness(K)
    return torch.sigmoid(x.to(compute_dtype(x)) * sharp)


def soft_onehot(x: Tensor, dim: int = -1, K: float = 1.0) -> Tensor:
    """Smooth one-hot vector of the maximum, softmax(K x).

    Args:
        x: Any shape, with at least one entry along ``dim``; entries of -inf have weight 0.
        dim: Axis of the maximum.
        K: Sharpness, from 1e-30 to 1e30. Equal maxima share the weight, whatever K is.

    Returns:
        The shape of x, in float32 (float64 for float64); all 0 where every entry is -inf.

    Raises:
        TypeError: Not a floating tensor, or K not a number.
        ValueError: No such axis, no entry along it, or K not positive.

    Example:
        >>> soft_onehot(torch.tensor([1.0, 3.0, 2.0]), K=4.0)
        tensor([3.2932e-04, 9.8169e-01, 1.7980e-02])
    """
    dim, sharp = check_axis(x, dim), check_sharpness(K)
    return sharp_weights(x.to(compute_dtype(x)), dim, sharp)


def soft_argmax(
    x: Tensor,
    dim: int = -1,
    K: float = 1.0,
    positions: Tensor | Sequence[float] | None = None,
) -> Tensor:
    """Smooth argmax: the mean position under softmax(K x).

    Between two equal maxima it is the point halfway, which need not be near either.

    Args:
        x: Any shape, n entries along ``dim``; entries of -inf do not take part.
        dim: Axis of the maximum.
        K: Sharpness, from 1e-30 to 1e30.
        positions: What the entries stand for: (n,) numbers, or (n, D) points; None: 0, 1, ..., n - 1 (the source
            counts from 1). A floating tensor gets its gradient.

    Returns:
        x without the axis (with D as a new last axis for points), in float32 (float64 if x or the positions are). 0
        where every entry is -inf: there is nothing to point at.

    Raises:
        TypeError: Not a floating tensor, K or positions not numbers.
        ValueError: No such axis, no entry along it, K not positive, or positions of another length.

    Example:
        >>> x = torch.tensor([2.0, 1.0, 4.0, 5.0, 3.0])
        >>> soft_argmax(x, K=16.0), soft_argmax(x, K=16.0, positions=[10, 20, 30, 40, 50])
        (tensor(3.0000), tensor(40.))
    """
    dim, sharp = check_axis(x, dim), check_sharpness(K)
    n = x.shape[dim]
    dtype = compute_dtype(x)
    if positions is None:
        points = torch.arange(n, device=x.device, dtype=dtype)
    elif isinstance(positions, Tensor):
        if positions.is_complex() or positions.dtype == torch.bool:
            raise TypeError(f"positions must be numbers; got dtype {positions.dtype}")
        dtype = compute_dtype(x, positions)
        points = positions.to(dtype)
    else:
        try:
            points = torch.tensor(positions, device=x.device, dtype=dtype)
        except (TypeError, ValueError) as problem:
            raise TypeError(f"positions must be numbers or a tensor; got {positions!r}") from problem
    if points.dim() not in (1, 2) or points.shape[0] != n:
        raise ValueError(f"positions must be ({n},) or ({n}, D); got {tuple(points.shape)}")
    weights = sharp_weights(x.to(dtype), dim, sharp).movedim(dim, -1)
    if points.dim() == 1:
        return (weights * points).sum(-1)  # not a matrix product: its precision may be lowered by autocast
    return (weights.unsqueeze(-1) * points).sum(-2)
