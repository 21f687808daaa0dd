"""Divergences between multivariate normals (KL散度、Jeffreys、Rényi、巴氏距离、Hellinger), with closed-form gradients.

Source: 科学空间 8512 (两个多元正态分布的KL散度、巴氏距离和W距离)

    KL(p|q)        = 1/2 [d' Sq^-1 d - ln det(Sq^-1 Sp) + tr(Sq^-1 Sp) - n],  d = mu_p - mu_q
    Jeffreys       = KL(p|q) + KL(q|p)
    Renyi          = a/2 d' Sa^-1 d - 1/(2 (a - 1)) ln[det Sa / (det Sp^(1-a) det Sq^a)],  Sa = a Sq + (1 - a) Sp
    Bhattacharyya  = -ln integral sqrt(p q) = half of Renyi at a = 1/2
    Hellinger      = sqrt(1 - exp(-Bhattacharyya))

What is different here: forms that do not cancel when p is close to q, gradients from the factors of the forward pass
instead of differentiation through a Cholesky factorisation, and +inf instead of nan for singular covariances: two
normals of unequal support are at an infinite distance, two of the same subspace are compared on it. An infinite value
has gradient 0.

Every function takes :class:`Gaussian` or the normals of torch.distributions; KL registers itself there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch import distributions as td

from kexue._checks import check_real
from kexue.stats import _gaussian_structured as structured
from kexue.stats._gaussian_kernel import dense
from kexue.stats.gaussian import Gaussian, as_gaussian

__all__ = ["bhattacharyya", "hellinger", "jeffreys", "kl", "renyi"]

BUDGET = 2**24  # entries of covariances in one block of pairs: 128 MiB in float64


def _shifted(p: Gaussian, dim: int) -> Gaussian:
    """With a new batch axis of length 1 before or after the last one."""
    out = object.__new__(Gaussian)
    ready = (
        None
        if torch.compiler.is_compiling() or structured.diagonal(p) or p._factor is not None
        else p._factors(p.dtype)
    )

    def move(x: Any, event: int) -> Any:
        if x is None:
            return None
        if x.dim() == event:  # one for the whole batch: broadcasts as it is
            return x
        return x.unsqueeze(dim - event)

    out._mean, out._cov, out._tril = move(p._mean, 1), move(p._cov, 2), move(p._tril, 2)
    out._diag, out._factor = move(p._diag, 1), move(p._factor, 2)
    out._cholesky = None if ready is None else (move(ready[0], 2), move(ready[1], 0))
    shape = list(p.batch_shape)
    shape.insert(len(shape) + 1 + dim, 1)
    out.batch_shape = torch.Size(shape)
    return out


def _slice(p: Gaussian, rows: slice) -> Gaussian:
    """Part of the last batch axis."""
    out = object.__new__(Gaussian)
    count = len(range(p.batch_shape[-1])[rows])

    def part(x: Any, event: int) -> Any:
        if x is None or x.dim() == event or x.shape[-1 - event] == 1:
            return x
        return x.narrow(-1 - event, rows.start, count)

    out._mean, out._cov, out._tril = part(p._mean, 1), part(p._cov, 2), part(p._tril, 2)
    out._diag, out._factor = part(p._diag, 1), part(p._factor, 2)
    ready = p._cholesky
    out._cholesky = None if ready is None else (part(ready[0], 2), part(ready[1], 0))
    out.batch_shape = torch.Size([*p.batch_shape[:-1], count])
    return out


def prepare(p: Any, q: Any) -> tuple[Gaussian, Gaussian]:
    """Both as Gaussians of one dimension."""
    p, q = as_gaussian("p", p), as_gaussian("q", q)
    if p.dim != q.dim:
        raise ValueError(f"p and q must have the same number of dimensions; got {p.dim} and {q.dim}")
    return p, q


def apply(p: Any, q: Any, pairwise: bool, function: Callable[[Gaussian, Gaussian], Tensor]) -> Tensor:
    """Call ``function`` on broadcast batches, or on all pairs by blocks."""
    p, q = prepare(p, q)
    if not pairwise:
        try:
            torch.broadcast_shapes(p.batch_shape, q.batch_shape)
        except RuntimeError:
            raise ValueError(
                f"batch shapes of p and q must broadcast; got {tuple(p.batch_shape)} and {tuple(q.batch_shape)}"
            ) from None
        return function(p, q)
    if not p.batch_shape or not q.batch_shape:
        raise ValueError(
            f"pairwise needs a batch on both sides; got shapes {tuple(p.batch_shape)} and {tuple(q.batch_shape)}"
        )
    if not torch.compiler.is_compiling():
        for g in (p, q):
            if not structured.diagonal(g) and g._factor is None:
                g._factors(g.dtype)  # once for each covariance, before the blocks
    total = q.batch_shape.numel() * p.dim**2 * max(p.batch_shape[:-1].numel(), 1)
    step = max(1, BUDGET // max(total, 1))
    columns = _shifted(q, -2)
    count = p.batch_shape[-1]
    blocks = [slice(start, start + step) for start in range(0, max(count, 1), step)]
    return torch.cat([function(_shifted(_slice(p, rows), -1), columns) for rows in blocks], -2)


def _entropic(kind: str, p: Gaussian, q: Gaussian, alpha: float = 1.0) -> Tensor:
    dtype = torch.promote_types(p.dtype, q.dtype)
    delta = p._mean.to(dtype) - q._mean.to(dtype)
    value = structured.entropic(kind, delta, p, q, alpha)
    if value is None:
        matrices = p._matrix().to(dtype), q._matrix().to(dtype)
        value = dense(delta, *matrices, p._factors(dtype), q._factors(dtype), kind, alpha)
    return value.expand(torch.broadcast_shapes(p.batch_shape, q.batch_shape))


def kl(p: Gaussian | td.Distribution, q: Gaussian | td.Distribution, pairwise: bool = False) -> Tensor:
    """Kullback-Leibler divergence KL(p|q) in nats.

    Args:
        p: Batch shape (...,), or (..., P) for ``pairwise``.
        q: Batch shape that broadcasts with that of ``p``, or (..., Q).
        pairwise: All pairs, (..., P, Q); each covariance is factored once, and at most ``BUDGET`` entries of
            covariances are expanded at a time (without gradients).

    Returns:
        (...,), in float32, or float64 if either side is. +inf where the supports differ.

    Raises:
        TypeError: Neither a Gaussian nor a normal of torch.distributions.
        ValueError: Dimensions or batch shapes that do not match.

    Example:
        >>> p = Gaussian(torch.ones(2), torch.eye(2))
        >>> kl(p, Gaussian(torch.zeros(2), torch.eye(2)))
        tensor(1.)
    """
    return apply(p, q, pairwise, lambda a, b: _entropic("renyi", a, b))


def jeffreys(p: Gaussian | td.Distribution, q: Gaussian | td.Distribution, pairwise: bool = False) -> Tensor:
    """Jeffreys divergence KL(p|q) + KL(q|p); arguments as for :func:`kl`.

    Args:
        p: Batch shape (...,).
        q: Batch shape that broadcasts.
        pairwise: All pairs.

    Example:
        >>> jeffreys(Gaussian(torch.ones(2), torch.eye(2)), Gaussian(torch.zeros(2), torch.eye(2)))
        tensor(2.)
    """
    return apply(p, q, pairwise, lambda a, b: _entropic("jeffreys", a, b))


def renyi(
    p: Gaussian | td.Distribution, q: Gaussian | td.Distribution, alpha: float = 0.5, pairwise: bool = False
) -> Tensor:
    """Renyi divergence of order ``alpha``; KL at 1, twice the Bhattacharyya distance at 1/2.

    Args:
        p: Batch shape (...,).
        q: Batch shape that broadcasts.
        alpha: Order, positive. Above 1 the divergence is +inf where alpha Sq + (1 - alpha) Sp is not positive definite.
        pairwise: All pairs, as for :func:`kl`.

    Raises:
        ValueError: ``alpha`` that is not positive and finite, and as for :func:`kl`.

    Example:
        >>> p, q = Gaussian(torch.zeros(1), torch.eye(1)), Gaussian(torch.zeros(1), torch.eye(1) / 4)
        >>> renyi(p, q, 2.0), round(renyi(q, p, 2.0).item(), 4)
        (tensor(inf), 0.4133)
    """
    check_real("alpha", alpha, above=0.0)
    alpha = float(alpha)
    return apply(p, q, pairwise, lambda a, b: _entropic("renyi", a, b, alpha))


def bhattacharyya(p: Gaussian | td.Distribution, q: Gaussian | td.Distribution, pairwise: bool = False) -> Tensor:
    """Bhattacharyya distance -ln of the integral of sqrt(p q); arguments as for :func:`kl`.

    Args:
        p: Batch shape (...,).
        q: Batch shape that broadcasts.
        pairwise: All pairs.

    Example:
        >>> bhattacharyya(Gaussian(torch.zeros(2), torch.eye(2)), Gaussian(torch.full((2,), 2.0), torch.eye(2)))
        tensor(1.)
    """
    return 0.5 * renyi(p, q, 0.5, pairwise)


def _root(x: Tensor) -> Tensor:
    """Square root with the gradient 0 at 0."""
    positive = x > 0
    return torch.where(positive, torch.where(positive, x, 1.0).sqrt(), 0.0)


def hellinger(p: Gaussian | td.Distribution, q: Gaussian | td.Distribution, pairwise: bool = False) -> Tensor:
    """Hellinger distance H in [0, 1] (not its square), gradient 0 at p = q; arguments as for :func:`kl`.

    Args:
        p: Batch shape (...,).
        q: Batch shape that broadcasts.
        pairwise: All pairs.

    Example:
        >>> p = Gaussian(torch.zeros(2), torch.eye(2))
        >>> hellinger(p, p), round(hellinger(p, Gaussian(torch.full((2,), 2.0), torch.eye(2))).item(), 4)
        (tensor(0.), 0.7951)
    """
    x = bhattacharyya(p, q, pairwise)
    # The derivative of expm1 is made of its result, which is -1 for distant normals: exp keeps the small gradient.
    return _root(torch.where(x > 1, 1 - torch.exp(-x), -torch.expm1(-x)))


def _registered(p: Any, q: Any) -> Tensor:
    for x in (p, q):
        if isinstance(x, td.Independent) and not (
            isinstance(x.base_dist, td.Normal) and x.reinterpreted_batch_ndims == 1
        ):
            raise NotImplementedError(
                f"KL of Independent({type(x.base_dist).__name__}, {x.reinterpreted_batch_ndims}) "
                "and a multivariate normal"
            )
    return kl(p, q)


def register() -> None:
    """Let ``torch.distributions.kl_divergence`` use :func:`kl` for multivariate normals, mixed pairs included.

    Independent against Independent stays with torch: it is elementwise there too, and serves other families as well.
    """
    types: tuple[type, ...] = (td.MultivariateNormal, td.LowRankMultivariateNormal, td.Independent)
    for first in types:
        for second in types:
            if not (first is second is td.Independent):
                td.register_kl(first, second)(_registered)


register()
