"""Bias and variance of a gradient estimator, measured (梯度估计的偏差与方差).

Source: 科学空间 6705 (漫谈重参数:从正态分布到Gumbel Softmax), which compares estimators by their variance. Here it is
measured, for any surrogate loss, by calling it again and again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kexue._checks import check_int

__all__ = ["GradientStats", "gradient_stats"]

Params = Tensor | Sequence[Tensor]


@dataclass(frozen=True)
class GradientStats:
    """What :func:`gradient_stats` measured, in float64, entry by entry.

    Attributes:
        mean: Mean gradient: the shape of the parameter, or (P,), all entries in order, for a list of parameters.
        variance: Variance of one estimate (divided by n - 1), of the same shape.
        bias: Mean minus the exact gradient, or None without one. It carries the noise of ``standard_error``.
        n: Number of estimates.
    """

    mean: Tensor
    variance: Tensor
    bias: Tensor | None
    n: int

    @property
    def standard_error(self) -> Tensor:
        """Of each entry of the mean, and so of the bias."""
        return (self.variance / self.n).sqrt()

    @property
    def total_variance(self) -> float:
        """Sum of the variances of all entries."""
        return float(self.variance.sum())

    @property
    def bias_norm(self) -> float | None:
        """Length of the bias."""
        return None if self.bias is None else float(self.bias.norm())

    @property
    def mse(self) -> float | None:
        """Expected squared distance of one estimate from the exact gradient: squared bias plus total variance."""
        return None if self.bias is None else float(self.bias.square().sum()) + self.total_variance


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([x.detach().double().reshape(-1) for x in tensors])


def _tensors(name: str, x: Any) -> list[Tensor]:
    """The tensors of a tensor or of an iterable of tensors."""
    found = [x] if isinstance(x, Tensor) or not isinstance(x, Iterable) else list(x)
    for y in found:
        if not isinstance(y, Tensor):
            raise TypeError(f"{name} must be tensors; got {type(y).__name__}")
    return found


def _gradient(loss: Tensor, leaves: Sequence[Tensor], name: str) -> Tensor:
    if not isinstance(loss, Tensor):
        raise TypeError(f"{name} must return a tensor; got {type(loss).__name__}")
    if loss.numel() != 1 or not loss.is_floating_point():
        raise ValueError(f"{name} must return one floating number; got shape {tuple(loss.shape)}, dtype {loss.dtype}")
    grads: Sequence[Tensor | None] = [None]
    if loss.requires_grad:
        grads = torch.autograd.grad(loss.reshape(()), leaves, allow_unused=True)
    if all(g is None for g in grads):
        raise ValueError(f"{name} must return a value that depends on params; got one that does not")
    return _flat([torch.zeros_like(x) if g is None else g for x, g in zip(leaves, grads, strict=True)])


def gradient_stats(
    fn: Callable[[], Tensor],
    params: Params,
    n: int = 1000,
    exact: Tensor | Sequence[Tensor] | Callable[[], Tensor] | None = None,
) -> GradientStats:
    """Mean, variance and bias of the gradient of a random surrogate loss.

    Args:
        fn: Draws new samples in each call and returns a scalar whose gradient is the estimate.
        params: A tensor or a list of tensors that require gradients; their ``.grad`` is left alone.
        n: Number of calls, at least 2.
        exact: The exact gradient (a tensor or a list like ``params``), or a callable that returns the exact expected
            loss, whose gradient is then taken. Without it the result has no bias.

    Returns:
        :class:`GradientStats`.

    Raises:
        TypeError: Wrong kind of argument or result.
        ValueError: No params, params without requires_grad, an exact gradient of another shape, n < 2, a loss that is
            no scalar or does not depend on the params.

    Example:
        >>> from kexue.stats import rsample_normal
        >>> mu, g = torch.tensor(1.0, requires_grad=True), torch.Generator().manual_seed(0)
        >>> stats = gradient_stats(lambda: rsample_normal(mu, torch.zeros(()), g) ** 2, mu, 500, exact=2 * mu)
        >>> bool(abs(stats.bias) < 4 * stats.standard_error), 3 < stats.variance.item() < 5  # exactly 4
        (True, True)
    """
    if not callable(fn):
        raise TypeError(f"fn must be callable; got {type(fn).__name__}")
    single = isinstance(params, Tensor)
    leaves = _tensors("params", params)
    if not leaves:
        raise ValueError("params must hold at least one tensor; got none")
    for x in leaves:
        if not x.requires_grad:
            raise ValueError(f"params must require gradients; got one of shape {tuple(x.shape)} that does not")
    check_int("n", n, 2)
    target = None
    if callable(exact):
        target = _gradient(exact(), leaves, "exact")
    elif exact is not None:
        given = _tensors("exact", exact)
        if [x.shape for x in given] != [x.shape for x in leaves]:
            shapes = [tuple(x.shape) for x in leaves]
            raise ValueError(f"exact must have the shapes of params, {shapes}; got {[tuple(x.shape) for x in given]}")
        target = _flat(given)

    mean = squares = torch.zeros(())
    for i in range(n):  # Welford's recurrence: no cancellation when the mean is large
        gradient = _gradient(fn(), leaves, "fn")
        if i == 0:
            mean, squares = gradient.clone(), torch.zeros_like(gradient)
            continue
        delta = gradient - mean
        mean += delta / (i + 1)
        squares += delta * (gradient - mean)

    def shaped(x: Tensor) -> Tensor:
        return x.reshape(leaves[0].shape) if single else x

    bias = None if target is None else shaped(mean - target)
    return GradientStats(shaped(mean), shaped(squares / (n - 1)), bias, n)
