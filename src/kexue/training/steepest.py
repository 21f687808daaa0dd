"""Steepest descent in a norm (给定范数下的最速下降方向): which step of length 1 lowers the loss fastest.

Source: 科学空间 6261 (从动力学角度看优化算法(三):一个更整体的视角) for the Euclidean norm and the sign; the others
follow from duality. For a gradient g,

    v = argmin of <g, v> over |v| = 1,   <g, v> = -|g|_dual

    norm of v      v                                          dual norm of g
    l2             -g / |g|                                   l2
    linf           -sign(g): sign descent, Adam with betas 0  l1: sum |g_i|
    l1             -sign(g_i) e_i at the largest |g_i|        linf: max |g_i|
    spectral       -U V^T for g = U S V^T: Muon's direction   nuclear: sum of singular values
    metric G       -G^-1 g / sqrt(g^T G^-1 g): the natural    sqrt(g^T G^-1 g)
                   gradient, scaled to v^T G v = 1

Where several v attain the minimum, the one returned moves no more than it must: entries (singular directions) with
gradient 0 stay 0, and of several largest |g_i| the first moves. g is divided by its largest entry first, so that
neither 1e30 nor 1e-40 over- or underflow.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, overload

import torch
from torch import Tensor

from kexue._checks import check_choice
from kexue._tensors import check_float, compute_dtype, once_differentiable

__all__ = ["steepest_direction"]

NORMS = ("l2", "l1", "linf", "spectral", "metric")


class _PolarFactor(torch.autograd.Function):
    """U V^T of the singular value decomposition, without the directions whose singular values are 0.

    Its derivative at full rank; torch's own of the decomposition divides by differences of singular values, which are 0
    for an orthogonal matrix, though U V^T is smooth there. Where the rank is deficient U V^T jumps; the derivative is
    the one at constant rank then.
    """

    @staticmethod
    def forward(ctx: Any, g: Tensor) -> Tensor:
        u, s, vh = torch.linalg.svd(g, full_matrices=False)
        noise = torch.finfo(g.dtype).eps * max(g.shape)
        kept = s > noise * s[:1]
        u = u * kept
        ctx.save_for_backward(g, u, s, vh, kept)
        out: Tensor = u @ vh
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor]:
        _, u, s, vh, kept = ctx.saved_tensors
        (w,) = grads
        vh = vh * kept[:, None]
        inverse = torch.where(kept, 1 / s.masked_fill(~kept, 1), 0)
        sums = s[:, None] + s
        inner = u.mT @ w @ vh.mT
        turn = (inner - inner.mT) / sums.masked_fill(sums == 0, 1)
        left = (w @ vh.mT - u @ inner) * inverse  # the part of w outside the column space of u
        right = inverse[:, None] * (u.mT @ w - inner @ vh)
        return (u @ turn @ vh + left @ vh + u @ right,)


def _solve(metric: Tensor, g: Tensor) -> Tensor:
    """G^-1 g / sqrt(g^T G^-1 g) for a vector g, G a matrix or the diagonal of one."""
    if metric.dim() == 1:
        # through the roots, so that neither 1e-40 nor 1e30 overflow in between
        half = g / metric.sqrt()
        return half / _length(half) / metric.sqrt()
    lower = torch.linalg.cholesky(metric)
    half = torch.linalg.solve_triangular(lower, g[:, None], upper=False)
    half = half / _length(half)
    return torch.linalg.solve_triangular(lower.mT, half, upper=True)[:, 0]


def _length(x: Tensor) -> Tensor:
    """Euclidean norm, 1 in the place of 0; safe for entries of any size."""
    largest = _largest(x)
    largest = torch.where(largest == 0, 1, largest)
    length = torch.linalg.vector_norm(x / largest) * largest
    return torch.where(length == 0, 1, length)


def _largest(x: Tensor) -> Tensor:
    """The largest |x_i| as a constant."""
    return x.detach().abs().amax()


def _check_gradient(name: str, g: Any) -> None:
    check_float(name, g)
    if g.layout is not torch.strided:
        raise TypeError(f"{name} must be a dense tensor, for example g.to_dense(); got layout {g.layout}")


def _check_metric(metric: Any, shape: torch.Size, count: int) -> Tensor:
    """The metric as (n, n) or, where it is diagonal, (n,)."""
    check_float("metric", metric)
    if metric.shape == (count, count) and metric.shape != shape:
        matrix = True
    elif metric.shape in (shape, (count,)):
        matrix = False
    else:
        raise ValueError(
            f"metric must have shape ({count}, {count}), or that of g for a diagonal one, {tuple(shape)}; "
            f"got {tuple(metric.shape)}"
        )
    metric = metric.to(compute_dtype(metric))
    if torch.compiler.is_compiling() or not count:
        return metric if matrix else metric.reshape(-1)
    if not bool(metric.isfinite().all()):
        raise ValueError("metric must be finite; got NaN or infinity")
    if not matrix:
        if not bool((metric > 0).all()):
            raise ValueError(f"a diagonal metric must be positive; its smallest entry is {float(metric.min()):g}")
        return metric.reshape(-1)
    if not torch.allclose(metric, metric.mT, rtol=1e-5, atol=1e-6 * float(metric.detach().abs().max())):
        raise ValueError("metric must be symmetric; got one that differs from its transpose")
    if int(torch.linalg.cholesky_ex(metric.detach()).info):
        smallest = float(torch.linalg.eigvalsh(metric.detach())[0])
        raise ValueError(f"metric must be positive definite; its smallest eigenvalue is {smallest:g}")
    return metric


@overload
def steepest_direction(g: Tensor, norm: str = "l2", metric: Tensor | None = None) -> Tensor: ...
@overload
def steepest_direction(g: Sequence[Tensor], norm: str = "l2", metric: Tensor | None = None) -> list[Tensor]: ...
def steepest_direction(
    g: Tensor | Sequence[Tensor], norm: str = "l2", metric: Tensor | None = None
) -> Tensor | list[Tensor]:
    """The step of length 1 in a norm that lowers a loss with gradient g fastest.

    Args:
        g: Gradient, a floating tensor of any shape, or a list of tensors that is taken as one vector.
        norm: "l2", "l1" (the whole step in one entry), "linf" (every entry moves by 1), "spectral" (largest singular
            value 1; for one matrix, so flatten a convolution's weight first), or "metric".
        metric: For "metric" (or given alone): G, symmetric and positive definite, of shape (n, n) for the n entries of
            g in order, or of g's shape for a diagonal G. v^T G v = 1.

    Returns:
        v, like g in shape and dtype (half precision is computed in float32). |v| = 1 and <g, v> = -|g|_dual; 0 where
        g = 0. Differentiable in g: l2, spectral and metric (metric also in G) with their derivatives where they are
        smooth, l1 and linf with 0, as they are constant almost everywhere.

    Raises:
        TypeError: g or metric is no floating tensor.
        ValueError: Unknown norm; "spectral" with g not a matrix; a metric of wrong shape, not symmetric or not positive
            definite; NaN or infinity in g (not checked under torch.compile).

    Reference:
        https://spaces.ac.cn/archives/6261

    Example:
        >>> g = torch.tensor([3.0, -4.0])
        >>> steepest_direction(g), steepest_direction(g, "linf"), steepest_direction(g, "l1")
        (tensor([-0.6000,  0.8000]), tensor([-1.,  1.]), tensor([-0., 1.]))
        >>> steepest_direction(g, metric=torch.diag(torch.tensor([9.0, 16.0])))
        tensor([-0.2357,  0.1768])
    """
    check_choice("norm", norm, NORMS)
    if metric is not None and norm not in ("l2", "metric"):
        raise ValueError(f"metric belongs to norm 'metric'; got norm={norm!r}")
    if metric is None and norm == "metric":
        raise ValueError("norm 'metric' needs metric=G; got None")
    if isinstance(g, Tensor):
        _check_gradient("g", g)
        return _direction(g, norm, metric)
    if not isinstance(g, (list, tuple)) or not g:
        raise TypeError(f"g must be a tensor or a list of tensors; got {g if g == [] else type(g).__name__}")
    for i, part in enumerate(g):
        _check_gradient(f"g[{i}]", part)
    if norm == "spectral":
        raise ValueError("norm 'spectral' is that of one matrix; got a list of tensors")
    dtype = compute_dtype(*g)
    vector = torch.cat([part.reshape(-1).to(dtype) for part in g])
    parts = _direction(vector, norm, metric).split([part.numel() for part in g])
    return [v.view_as(part).to(part.dtype) for v, part in zip(parts, g, strict=True)]


def _direction(g: Tensor, norm: str, metric: Tensor | None) -> Tensor:
    if norm == "spectral" and g.dim() != 2:
        raise ValueError(f"norm 'spectral' needs a matrix, for example weight.flatten(1); got shape {tuple(g.shape)}")
    checked = None if metric is None else _check_metric(metric, g.shape, g.numel())
    if g.numel() == 0:
        return torch.zeros_like(g) + g
    wide = g.to(compute_dtype(g) if checked is None else compute_dtype(g, checked))
    largest = _largest(wide)  # every direction is the same for any multiple of g: a constant for the gradient too
    if not torch.compiler.is_compiling() and not bool(largest.isfinite()):
        raise ValueError("g must be finite; got NaN or infinity")
    wide = wide / torch.where(largest == 0, torch.inf, largest)  # g = 0: value and gradient 0
    if checked is not None:
        v = -_solve(checked.to(wide.dtype), wide.reshape(-1)).view_as(wide)
    elif norm == "l2":
        v = -wide / _length(wide)
    elif norm == "linf":
        v = -wide.sign()
    elif norm == "l1":
        flat = wide.reshape(-1)
        places = torch.arange(flat.numel(), device=flat.device)
        v = -(flat.sign() * (places == flat.detach().abs().argmax())).view_as(wide)
    else:
        v = -_PolarFactor.apply(wide)
    return v.to(g.dtype)
