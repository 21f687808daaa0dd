"""Divergences of diagonal and low-rank-plus-diagonal normals in O(n) and O(n r^2), in differentiable operations.

With C = I + F' D^-1 F (r x r), the inverse of D + F F' is D^-1 - D^-1 F C^-1 F' D^-1 (Woodbury), and its ln det is
ln det D + ln det C.
Isotropic diagonals s^2 I on both sides let W2 be restricted to the joint span of the two factors, at most 2 r
dimensions; outside it both are multiples of the identity.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kexue._tensors import once_differentiable
from kexue.stats import _bures_kernel as kernel
from kexue.stats._gaussian_kernel import dense, log_excess
from kexue.stats.gaussian import Gaussian


class _LogDet(torch.autograd.Function):
    """ln det with the gradient S^-1; -inf and 0 for a singular matrix."""

    @staticmethod
    def forward(ctx: Any, s: Tensor) -> Tensor:
        factor, ok = kernel.cholesky(s)
        ctx.save_for_backward(s, ok)
        value = 2 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return torch.where(ok, value, -torch.inf)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        s, ok = ctx.saved_tensors
        keep = ok[..., None, None]
        eye = torch.eye(s.shape[-1], dtype=s.dtype, device=s.device)
        return torch.where(keep, grad[..., None, None] * torch.linalg.inv(torch.where(keep, s, eye)), 0.0)


def log_determinant(p: Gaussian) -> Tensor:
    """Of the covariance."""
    if p._tril is not None:
        return 2 * p._tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    if p._diag is not None and p._factor is None:
        return p._diag.log().sum(-1)
    if woodbury(p):
        return LowRank(p, p.dtype).logdet
    return _LogDet.apply(p._matrix())


def diagonal(p: Gaussian) -> bool:
    """Whether the covariance is a diagonal alone."""
    return p._diag is not None and p._factor is None


def woodbury(p: Gaussian) -> bool:
    """Whether the covariance is a positive diagonal plus a factor that is worth it, or a diagonal alone."""
    if p._diag is None or torch.compiler.is_compiling():
        return p._diag is not None and p._factor is None
    if p._factor is None:
        return True
    return 2 * p._factor.shape[-1] < p.dim and bool((p._diag > 0).all())


class LowRank:
    """Inverse, determinant and trace products of D + F F'; for a diagonal alone r = 0."""

    def __init__(self, p: Gaussian, dtype: torch.dtype) -> None:
        if p._diag is None:
            raise ValueError("LowRank needs a diagonal; got a Gaussian without one")
        empty = p._diag.new_zeros(*p._diag.shape, 0)
        self._set(p._diag.to(dtype), (empty if p._factor is None else p._factor).to(dtype))

    @classmethod
    def of(cls, diag: Tensor, factor: Tensor) -> LowRank:
        """From D and F."""
        out = object.__new__(cls)
        out._set(diag, factor)
        return out

    def _set(self, diag: Tensor, factor: Tensor) -> None:
        self.d, self.f = diag, factor
        self.scaled = self.f / self.d.unsqueeze(-1)
        inner = self.f.mT @ self.scaled
        inner = inner + torch.eye(self.f.shape[-1], dtype=self.f.dtype, device=self.f.device)
        self.c = torch.linalg.cholesky(inner)
        # S^-1 = D^-1 - W W'
        self.w = torch.linalg.solve_triangular(self.c.mT, self.scaled, upper=True, left=False)

    @property
    def logdet(self) -> Tensor:
        """Of S."""
        return self.d.log().sum(-1) + 2 * self.c.diagonal(dim1=-2, dim2=-1).log().sum(-1)

    def quadratic(self, x: Tensor) -> Tensor:
        """X' S^-1 x for x (..., n)."""
        return (x.square() / self.d).sum(-1) - (x.unsqueeze(-2) @ self.w).square().sum((-2, -1))

    def trace_with(self, other: LowRank) -> Tensor:
        """tr(S^-1 R) for R = D' + F' F''."""
        plain = (other.d / self.d).sum(-1) + (other.f.square() / self.d.unsqueeze(-1)).sum((-2, -1))
        less = (self.w.square() * other.d.unsqueeze(-1)).sum((-2, -1))
        return plain - less - (self.w.mT @ other.f).square().sum((-2, -1))


def renyi_diagonal(delta: Tensor, vp: Tensor, vq: Tensor, alpha: float) -> Tensor:
    """Elementwise, without cancellation; alpha = 1 is KL."""
    beta = 1 - alpha
    e = (vp - vq) / vq
    mixed = vq + beta * (vp - vq)
    valid = (mixed > 0).all(-1) if alpha > 1 else None
    if valid is not None:
        mixed = torch.where(valid.unsqueeze(-1), mixed, 1.0)
    spread = log_excess(e)
    if beta:
        inner = beta * e
        if valid is not None:
            inner = torch.where(valid.unsqueeze(-1), inner, 0.0)
        spread = spread - log_excess(inner) / beta
    value = 0.5 * spread.sum(-1) + alpha / 2 * (delta.square() / mixed).sum(-1)
    return value if valid is None else torch.where(valid, value, torch.inf)


def jeffreys_diagonal(delta: Tensor, vp: Tensor, vq: Tensor) -> Tensor:
    """Elementwise."""
    return 0.5 * ((vp - vq).square() / (vp * vq) + delta.square() * (1 / vp + 1 / vq)).sum(-1)


def entropic(kind: str, delta: Tensor, p: Gaussian, q: Gaussian, alpha: float) -> Tensor | None:
    """KL, Renyi or Jeffreys of two structured normals; None where the dense form has to do it."""
    if diagonal(p) and diagonal(q):
        if kind == "jeffreys":
            return jeffreys_diagonal(delta, p._diag, q._diag)
        return renyi_diagonal(delta, p._diag, q._diag, alpha)
    if not (woodbury(p) and woodbury(q)) or alpha > 1:
        return None
    with torch.autocast(delta.device.type, enabled=False):
        dtype = delta.dtype  # sums that cancel: float64 inside, whatever came in
        delta = delta.double()
        a, b = LowRank(p, torch.float64), LowRank(q, torch.float64)
        if kind == "jeffreys":
            quadratic = a.quadratic(delta) + b.quadratic(delta)
            value = 0.5 * (quadratic + b.trace_with(a) + a.trace_with(b)) - p.dim
        elif alpha == 1:
            value = 0.5 * (b.quadratic(delta) - a.logdet + b.logdet + b.trace_with(a) - p.dim)
        else:
            beta = 1 - alpha
            shape = torch.broadcast_shapes(a.f.shape[:-2], b.f.shape[:-2])
            parts = [x.f.expand(*shape, *x.f.shape[-2:]) * w**0.5 for x, w in ((b, alpha), (a, beta))]
            mixed = LowRank.of(alpha * b.d + beta * a.d, torch.cat(parts, -1))
            value = alpha / 2 * mixed.quadratic(delta)
            value = value + (mixed.logdet - beta * a.logdet - alpha * b.logdet) / (2 * beta)
        value = value.clamp(min=0)
    return value.to(dtype)


class _RootGap(torch.autograd.Function):
    """(sqrt a - sqrt b)^2 of variances, with 1 - sqrt(b / a) as its gradient; a is floored at eps of the largest."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        total = a.sqrt() + b.sqrt()
        return ((a - b) / torch.where(total > 0, total, 1.0)).square()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        a, b = ctx.saved_tensors
        top = torch.maximum(a.detach().amax(-1, keepdim=True), b.detach().amax(-1, keepdim=True))
        floor = torch.finfo(a.dtype).eps * torch.where(top > 0, top, 1.0)
        ra, rb = (torch.maximum(x, floor).sqrt() for x in (a, b))
        total = ra + rb
        return grad * (a - b) / (total * ra), grad * (b - a) / (total * rb)


def w2_diagonal(vp: Tensor, vq: Tensor) -> Tensor:
    """Of the covariances alone, squared."""
    return root_gap(vp, vq).sum(-1)


def root_gap(vp: Tensor, vq: Tensor) -> Tensor:
    """Elementwise (sqrt a - sqrt b)^2 of variances."""
    shape = torch.broadcast_shapes(vp.shape, vq.shape)
    return _RootGap.apply(vp.expand(shape), vq.expand(shape))


class _FactorTrace(torch.autograd.Function):
    """tr (F' S F)^1/2 for F (..., n, r) and S = L L': the singular values of F' L, zeros without a gradient."""

    @staticmethod
    def forward(ctx: Any, f: Tensor, s: Tensor, factor: Tensor) -> Tensor:
        u, roots, _ = torch.linalg.svd(f.mT @ factor, full_matrices=False)
        tiny = roots <= max(f.shape) * torch.finfo(f.dtype).eps * roots[..., :1]
        inverse = torch.where(tiny, 0.0, 1 / torch.where(tiny, 1.0, roots))
        ctx.save_for_backward(f, s, (u * inverse.unsqueeze(-2)) @ u.mT)
        return roots.sum(-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        f, s, inverse = ctx.saved_tensors
        half = f @ inverse
        wide = grad[..., None, None]
        return wide * (s @ half), wide / 2 * (half @ f.mT), None


class _NuclearNorm(torch.autograd.Function):
    """Sum of the singular values, with the gradient U V' over those that are not zero."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        u, s, vh = torch.linalg.svd(x, full_matrices=False)
        keep = s > max(x.shape[-2:]) * torch.finfo(x.dtype).eps * s[..., :1]
        ctx.save_for_backward(x, (u * keep.unsqueeze(-2)) @ vh)
        return s.sum(-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return (grad[..., None, None] * ctx.saved_tensors[1],)


def w2_factors(p: Gaussian, q: Gaussian) -> Tensor | None:
    """Of the covariances alone, squared, where one of them is F F' of low rank; else None."""
    pure = [x._factor is not None and x._diag is None and x._factor.shape[-1] <= x.dim for x in (p, q)]
    if not any(pure):
        return None
    if not pure[0]:
        p, q = q, p
    shape = torch.broadcast_shapes(p.batch_shape, q.batch_shape)
    dtype = torch.promote_types(p.dtype, q.dtype)
    f = p._factor.to(dtype).expand(*shape, *p._factor.shape[-2:])
    with torch.autocast(f.device.type, enabled=False):
        if all(pure):
            g = q._factor.to(dtype)
            total = f.square().sum((-2, -1)) + g.square().sum((-2, -1))
            return (total - 2 * _NuclearNorm.apply(f.mT @ g)).clamp(min=0)
        s = q._matrix().to(dtype).expand(*shape, q.dim, q.dim)
        with torch.no_grad():
            factor, ok = kernel.cholesky(s)
            if torch.compiler.is_compiling() or not bool(ok.all()):
                v, root = kernel.eigen_factor(s)
                factor = torch.where(ok[..., None, None], factor, v * root.unsqueeze(-2))
        total = f.square().sum((-2, -1)) + s.diagonal(dim1=-2, dim2=-1).sum(-1)
        return (total - 2 * _FactorTrace.apply(f, s, factor)).clamp(min=0)


def _isotropic(p: Gaussian) -> bool:
    return p._diag is None or bool((p._diag == p._diag[..., :1]).all())


def w2_low_rank(p: Gaussian, q: Gaussian) -> Tensor | None:
    """Of the covariances alone, squared, where both are s^2 I + F F' with few columns; else None."""
    if torch.compiler.is_compiling() or p._factor is None or q._factor is None:
        return None
    fp, fq = p._factor, q._factor
    n, width = p.dim, fp.shape[-1] + fq.shape[-1]
    if 2 * width > n or not (_isotropic(p) and _isotropic(q)):
        return None
    with torch.autocast(fp.device.type, enabled=False):
        shape = torch.broadcast_shapes(p.batch_shape, q.batch_shape)
        dtype = torch.promote_types(p.dtype, q.dtype)
        fp, fq = (f.to(dtype).expand(*shape, *f.shape[-2:]) for f in (fp, fq))
        # The basis may count as a constant: the gradient's part outside the span does not reach the factors.
        basis, _ = torch.linalg.qr(torch.cat([fp, fq], -1).detach())
        rest = (1 - basis.square().sum(-1)).clamp(min=0)
        inside, variances = [], []
        for f, g in ((fp, p), (fq, q)):
            s = kernel.transpose_product(basis.mT @ f)
            d = None if g._diag is None else g._diag.to(dtype)
            variances.append(torch.zeros((), dtype=dtype, device=f.device).expand(n) if d is None else d)
            inside.append(s if d is None else s + basis.mT @ (d.unsqueeze(-1) * basis))
        zero = torch.zeros(basis.shape[-1], dtype=dtype, device=basis.device)
        value = dense(zero, kernel.symmetric(inside[0]), kernel.symmetric(inside[1]), None, None, "w2")
        return value + (rest * root_gap(*variances)).sum(-1)
