"""2-Wasserstein distance, optimal maps and barycentres of normals (W距离、最优传输映射、重心).

Source: 科学空间 8512 (两个多元正态分布的KL散度、巴氏距离和W距离)

    W2^2 = |mu_p - mu_q|^2 + tr Sp + tr Sq - 2 tr (Sp^1/2 Sq Sp^1/2)^1/2
    map    x -> mu_q + T (x - mu_p),  T = Lp^-T (Lp' Sq Lp)^1/2 Lp^-1,  T Sp T = Sq

What is different here: no matrix square root is taken. The trace is the sum of sqrt(eig(Lp' Sq Lp)) for any factor of
Sp, the gradients are I - T in closed form, without an eigengap in a denominator, and close covariances go through
|Lp - Lq O|^2, which does not cancel. The gradient of W2 with respect to a singular Sp is infinite where Sq is not
singular: eigenvalues are floored at eps of the largest there, in the gradient only.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch import distributions as td

from kexue._checks import check_choice
from kexue.stats import _bures_kernel as kernel
from kexue.stats import _gaussian_structured as structured
from kexue.stats._gaussian_kernel import dense
from kexue.stats.divergences import _root, apply, prepare
from kexue.stats.gaussian import Gaussian, as_gaussian

__all__ = ["barycenter", "ot_map", "w2"]

METRICS = ("w2", "kl", "reverse_kl")
ROUNDS = 100


def _squared(p: Gaussian, q: Gaussian) -> Tensor:
    dtype = torch.promote_types(p.dtype, q.dtype)
    delta = p._mean.to(dtype) - q._mean.to(dtype)
    if structured.diagonal(p) and structured.diagonal(q):
        value = structured.w2_diagonal(p._diag.to(dtype), q._diag.to(dtype))
        value = value + delta.square().sum(-1)
    else:
        spread = structured.w2_factors(p, q)
        if spread is None:
            spread = structured.w2_low_rank(p, q)
        if spread is not None:
            value = spread + delta.square().sum(-1)
        else:
            matrices = p._matrix().to(dtype), q._matrix().to(dtype)
            value = dense(delta, *matrices, p._factors(dtype), q._factors(dtype), "w2")
    return value.expand(torch.broadcast_shapes(p.batch_shape, q.batch_shape))


def w2(
    p: Gaussian | td.Distribution, q: Gaussian | td.Distribution, squared: bool = True, pairwise: bool = False
) -> Tensor:
    """2-Wasserstein (Frechet) distance.

    Two diagonals cost O(n); s^2 I + F F' against its like, or F F' alone, O(n r^2). Any other mixture, also unequal
    diagonals with factors, is made dense. Forward and backward need one symmetric eigenproblem; without gradients only
    eigenvalues are computed.

    Args:
        p: Batch shape (...,), or (..., P) for ``pairwise``.
        q: Batch shape that broadcasts, or (..., Q).
        squared: Return the square.
        pairwise: All pairs, (..., P, Q), as for :func:`kexue.stats.kl`.

    Returns:
        (...,). The gradient of the distance itself is 0 at p = q, where it has none.

    Raises:
        TypeError: Neither a Gaussian nor a normal of torch.distributions.
        ValueError: Dimensions or batch shapes that do not match.

    Example:
        >>> p, q = Gaussian(torch.zeros(2), torch.eye(2)), Gaussian(torch.ones(2), 4 * torch.eye(2))
        >>> w2(p, q), w2(p, q, squared=False)
        (tensor(4.), tensor(2.))
    """
    value = apply(p, q, pairwise, _squared)
    return value if squared else _root(value)


def _transport(sp: Tensor, sq: Tensor) -> Tensor:
    """T, from covariances with floored eigenvalues (and without gradient) where Sp is singular."""
    if torch.compiler.is_compiling():
        return kernel.TransportMap.apply(sp, sq)
    with torch.no_grad():
        _, ok = kernel.cholesky(sp)
    if not bool(ok.all()):
        with torch.no_grad():
            lift_p, lift_q = kernel.lifted(sp, sq)
        keep = ok[..., None, None]
        sp, sq = torch.where(keep, sp, lift_p), torch.where(keep, sq, lift_q)
    return kernel.TransportMap.apply(sp, sq)


def ot_map(p: Gaussian | td.Distribution, q: Gaussian | td.Distribution) -> tuple[Tensor, Tensor]:
    """The optimal map from p to q: y = x T' + shift.

    Args:
        p: Source, batch shape (...,). A singular covariance is floored at eps of its largest eigenvalue.
        q: Target, a batch shape that broadcasts.

    Returns:
        ``(T, shift)``: symmetric (..., n, n), and (..., n). Differentiable once.

    Raises:
        TypeError: Neither a Gaussian nor a normal of torch.distributions.
        ValueError: Dimensions or batch shapes that do not match.

    Example:
        >>> t, shift = ot_map(Gaussian(torch.ones(2), torch.eye(2)), Gaussian(torch.zeros(2), 4 * torch.eye(2)))
        >>> torch.ones(2) @ t.mT + shift
        tensor([0., 0.])
    """
    p, q = prepare(p, q)
    try:
        shape = torch.broadcast_shapes(p.batch_shape, q.batch_shape)
    except RuntimeError:
        raise ValueError(
            f"batch shapes of p and q must broadcast; got {tuple(p.batch_shape)} and {tuple(q.batch_shape)}"
        ) from None
    dtype = torch.promote_types(p.dtype, q.dtype)
    with torch.autocast(p._mean.device.type, enabled=False):
        if structured.diagonal(p) and structured.diagonal(q):
            t = torch.diag_embed((q._diag.to(dtype) / p._diag.to(dtype)).sqrt())
            t = t.expand(*shape, p.dim, p.dim)
        else:
            n = p.dim
            t = _transport(p._matrix().to(dtype).expand(*shape, n, n), q._matrix().to(dtype).expand(*shape, n, n))
        shift = q.mean.to(dtype) - (t @ p.mean.to(dtype).unsqueeze(-1)).squeeze(-1)
    return t, shift


def _weights(weights: Any, count: int, like: Tensor) -> Tensor:
    if weights is None:
        return torch.full((count,), 1 / count, dtype=like.dtype, device=like.device)
    w = weights if isinstance(weights, Tensor) else torch.as_tensor(weights, dtype=torch.float64)
    if w.is_complex() or w.dtype == torch.bool:
        raise TypeError(f"weights must be numbers; got dtype {w.dtype}")
    if tuple(w.shape) != (count,):
        raise ValueError(f"weights must have shape ({count},), one for each Gaussian; got {tuple(w.shape)}")
    w = w.to(dtype=torch.float64)
    if not bool(torch.isfinite(w).all()) or bool((w < 0).any()):
        raise ValueError(f"weights must be finite and non-negative; got {w.tolist()}")
    if abs(float(w.sum()) - 1) > 1e-5:
        raise ValueError(f"weights must sum to 1; got {float(w.sum())}")
    return w.to(dtype=like.dtype, device=like.device)


def barycenter(gaussians: Sequence[Gaussian | td.Distribution], weights: Any = None, metric: str = "w2") -> Gaussian:
    """The normal with the least weighted sum of divergences from the given ones.

    Args:
        gaussians: At least one, of batch shapes that broadcast.
        weights: One for each, non-negative, of sum 1; equal by default.
        metric: "w2": of squared W2, by the fixed point S <- T S T, T = sum w_k T_(S -> k), to a relative change of
            1e-10 (1e-6 in float32) or 100 rounds. "kl": of KL(p_k|q), the moments of the mixture. "reverse_kl": of
            KL(q|p_k), the average of the precisions.

    Returns:
        A :class:`Gaussian`, differentiable; diagonal if all are, except for "kl".

    Raises:
        TypeError: Neither Gaussians nor normals of torch.distributions; weights that are no numbers.
        ValueError: No Gaussians, dimensions that differ, wrong weights or metric, a singular covariance for
            "reverse_kl".

    Example:
        >>> p, q = Gaussian(torch.zeros(2), torch.eye(2)), Gaussian(torch.ones(2), 9 * torch.eye(2))
        >>> middle = barycenter([p, q], [0.5, 0.5])
        >>> middle.mean, middle.covariance.diagonal()
        (tensor([0.5000, 0.5000]), tensor([4., 4.]))
    """
    check_choice("metric", metric, METRICS)
    if isinstance(gaussians, (Gaussian, td.Distribution)):
        raise TypeError(f"gaussians must be a list of Gaussians; got one {type(gaussians).__name__}")
    found = [as_gaussian(f"gaussians[{i}]", x) for i, x in enumerate(gaussians)]
    if not found:
        raise ValueError("gaussians must hold at least one; got none")
    if len({x.dim for x in found}) > 1:
        raise ValueError(f"gaussians must have the same number of dimensions; got {[x.dim for x in found]}")
    n = found[0].dim
    dtype = reduce(torch.promote_types, (x.dtype for x in found))
    try:
        shape = torch.broadcast_shapes(*(x.batch_shape for x in found))
    except RuntimeError:
        raise ValueError(f"batch shapes must broadcast; got {[tuple(x.batch_shape) for x in found]}") from None
    w = _weights(weights, len(found), found[0]._mean.to(dtype))
    means = torch.stack([x.mean.to(dtype).expand(*shape, n) for x in found])
    column = w.view(-1, *[1] * (means.dim() - 1))
    center = (column * means).sum(0)
    with torch.autocast(means.device.type, enabled=False):
        if all(structured.diagonal(x) for x in found) and metric != "kl":
            v = torch.stack([x._diag.to(dtype).expand(*shape, n) for x in found])
            if metric == "w2":
                return Gaussian(center, diag=(column * v.sqrt()).sum(0).square())
            variance = 1 / (column / v).sum(0)
            return Gaussian(variance * (column * means / v).sum(0), diag=variance)
        covs = torch.stack([x.covariance.to(dtype).expand(*shape, n, n) for x in found])
        wide = column.unsqueeze(-1)
        if metric == "w2":
            return Gaussian(center, _wasserstein_mean(covs, wide), validate=False)
        if metric == "kl":
            delta = (means - center).unsqueeze(-1)
            return Gaussian(center, (wide * (covs + delta @ delta.mT)).sum(0), validate=False)
        ok = kernel.cholesky(covs.detach())[1]
        if not bool(ok.all()):
            raise ValueError(f"reverse_kl needs covariances of full rank; got {int((~ok).sum())} singular ones")
        precisions = torch.linalg.inv(covs)
        cov = kernel.symmetric(torch.linalg.inv((wide * precisions).sum(0)))
        pulled = (wide * precisions @ means.unsqueeze(-1)).sum(0)
        return Gaussian((cov @ pulled).squeeze(-1), cov, validate=False)


def _wasserstein_mean(covs: Tensor, w: Tensor) -> Tensor:
    """The fixed point of S <- T S T with T = sum over k of w_k T_(S -> k); covs (K, ..., n, n)."""
    tolerance = 1e-10 if covs.dtype == torch.float64 else 1e-6
    s = (w * covs).sum(0)
    if not bool(kernel.cholesky(s.detach())[1].all()):  # a common null space: it stays one, to rounding
        with torch.no_grad():
            covs = torch.stack([kernel.lifted(c, s)[0] for c in covs])
            s = (w * covs).sum(0)
    for _ in range(ROUNDS):
        t = (w * _transport(s.expand(covs.shape), covs)).sum(0)
        new = kernel.symmetric(t @ s @ t)
        with torch.no_grad():
            change = (new - s).flatten(-2).norm(dim=-1) <= tolerance * new.flatten(-2).norm(dim=-1)
        s = new
        if bool(change.all()):
            break
    return s
