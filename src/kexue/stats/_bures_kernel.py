"""2-Wasserstein distance of full covariances and its gradients in closed form, row by row of a flat batch.

W2 is tr Sp + tr Sq - 2 sum sqrt(eig(Lp' Sq Lp)), with the gradients I - T. No eigengap is ever a denominator. Rows in
which it cancels, or whose eigenvalues are too small to be resolved, go through |Lp - Lq O|^2 with the polar factor O.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kexue._tensors import once_differentiable

LANES_FROM, LANES_TO = 16, 64  # least number of rows and most dimensions for the kernels of small matrices
LAPACK_FROM = 128  # dimensions
Four = tuple[Tensor, Tensor, Tensor, Tensor]


def transpose_product(x: Tensor) -> Tensor:
    """X X', symmetric."""
    return x @ x.mT


def gram(x: Tensor) -> Tensor:
    """X' X for x (..., N, n) without a gradient: only one half is multiplied, by blocks."""
    n = x.shape[-1]
    if n < 128:
        return x.mT @ x
    h = n // 2
    left, right = x[..., :h], x[..., h:]
    out = x.new_empty(*x.shape[:-2], n, n)
    out[..., :h, :h], out[..., h:, h:] = gram(left), gram(right)
    corner = right.mT @ left
    out[..., h:, :h], out[..., :h, h:] = corner, corner.mT
    return out


def symmetric(x: Tensor) -> Tensor:
    """(X + X') / 2."""
    return (x + x.mT) / 2


def _plain_cpu(s: Tensor) -> bool:
    """Whether numpy may see the values."""
    return s.device.type == "cpu" and not torch.compiler.is_compiling()


def lanes(s: Tensor) -> bool:
    """Whether there are enough small matrices for the kernels of :mod:`kexue.stats._gaussian_lanes`."""
    return _plain_cpu(s) and s.shape[0] >= LANES_FROM and s.shape[-1] <= LANES_TO


def large(s: Tensor) -> bool:
    """Whether the matrices are worth the functions of :mod:`kexue.stats._gaussian_lapack`."""
    return _plain_cpu(s) and s.shape[-1] >= LAPACK_FROM


def cholesky(s: Tensor) -> tuple[Tensor, Tensor]:
    """Lower factor and, for each row, whether it stands for a matrix of full rank (to working precision).

    The square of a pivot over the diagonal entry is the part of a variable that its predecessors do not explain, which
    does not depend on units.
    """
    n = s.shape[-1]
    flat = s.reshape(-1, n, n)
    if lanes(flat):
        from kexue.stats import _gaussian_lanes

        factor, ok = _gaussian_lanes.cholesky(flat, torch.finfo(s.dtype).eps)
        return factor.view(s.shape), ok.view(s.shape[:-2])
    if large(flat):
        from kexue.stats import _gaussian_lapack

        factor, found = _gaussian_lapack.cholesky(flat)
        factor, found = factor.view(s.shape), found.view(s.shape[:-2])
    else:
        factor, info = torch.linalg.cholesky_ex(s)
        found = info == 0
    diagonal = s.diagonal(dim1=-2, dim2=-1)
    pivots = factor.diagonal(dim1=-2, dim2=-1).square()
    floor = n * torch.finfo(s.dtype).eps
    return factor, found & (pivots > floor * diagonal).all(-1)


def solve_turned(factor: Tensor, x: Tensor) -> Tensor:
    return torch.linalg.solve_triangular(factor.mT, x, upper=True)


def nothing(x: Tensor) -> Tensor:
    return x.new_empty(0)


def _trace(x: Tensor) -> Tensor:
    return x.diagonal(dim1=-2, dim2=-1).sum(-1)


def map_parts(lp: Tensor, sq: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """K with K K' = Sp and K' Sq K = diag(s^2), K^-T, and s: T = K^-T s K^-1, the reverse map is K s^-1 K'."""
    w, v = torch.linalg.eigh(symmetric(lp.mT @ sq @ lp))
    return lp @ v, solve_turned(lp, v), w.clamp_min(0).sqrt()


def floored(s: Tensor) -> Tensor:
    """Roots for a denominator: one below sqrt(eps) of the largest is not resolved, and could be 0."""
    info = torch.finfo(s.dtype)
    return torch.maximum(s, (info.eps**0.5 * s.amax(-1, keepdim=True)).clamp_min(info.tiny))


def eigen_factor(s: Tensor, floor: float = 0.0) -> tuple[Tensor, Tensor]:
    """V and sqrt(w), with S = V w V': the factor of a singular matrix is V sqrt(w)."""
    w, v = torch.linalg.eigh(s)
    w = w.clamp_min(0)
    if floor:
        w = torch.maximum(w, floor * w.amax(-1, keepdim=True))
    return v, w.sqrt()


def lifted(sp: Tensor, sq: Tensor) -> tuple[Tensor, Tensor]:
    """Both covariances with eigenvalues of at least eps times the largest, so that both maps exist."""
    (vp, rp), (vq, rq) = eigen_factor(sp), eigen_factor(sq)
    eps = torch.finfo(sp.dtype).eps
    top = torch.maximum(rp.amax(-1, keepdim=True), rq.amax(-1, keepdim=True))
    top = torch.where(top > 0, top, 1.0)
    made = []
    for v, r in ((vp, rp), (vq, rq)):
        own = r.amax(-1, keepdim=True)
        floor = eps**0.5 * torch.where(own > 0, own, top)
        made.append(transpose_product(v * torch.maximum(r, floor).unsqueeze(-2)))
    return made[0], made[1]


def _robust_w2(sp: Tensor, sq: Tensor, make: bool) -> tuple[Tensor, Tensor, Tensor]:
    """In float64, by the polar factor: exact for close, ill-conditioned and singular covariances."""
    eye = torch.eye(sp.shape[-1], dtype=sp.dtype, device=sp.device)
    unit = torch.maximum(_trace(sp), _trace(sq))
    unit = torch.where(unit > 0, unit, 1.0)
    sp, sq = sp / unit[:, None, None], sq / unit[:, None, None]
    factors = []
    for s in (sp, sq):
        factor, ok = cholesky(s)
        if not bool(ok.all()):
            v, root = eigen_factor(s)
            factor = torch.where(ok[:, None, None], factor, v * root.unsqueeze(-2))
        factors.append(factor)
    lp, lq = factors
    u, _, vh = torch.linalg.svd(lq.mT @ lp)
    same = (sp == sq).all(-1).all(-1)
    value = torch.where(same, 0.0, unit * (lp - lq @ (u @ vh)).square().sum((-2, -1)))
    if not make:
        return value, nothing(value), nothing(value)
    p, q = lifted(sp, sq)
    k, turned, s = map_parts(torch.linalg.cholesky(p), q)
    root = floored(s).sqrt().unsqueeze(-2)
    grad_p, grad_q = eye - transpose_product(turned * root), eye - transpose_product(k / root)
    same = same[:, None, None]
    return value, torch.where(same, 0.0, grad_p), torch.where(same, 0.0, grad_q)


def double_factor(s: Tensor, factor: Tensor) -> Tensor:
    """The Cholesky factor of s in float64; the given one, if that is what it is or if there is no better one."""
    if factor.dtype == torch.float64:
        return factor
    better, ok = cholesky(s.double())
    return torch.where(ok[:, None, None], better, factor.double())


def _spread(sp: Tensor, sq: Tensor, lp: Tensor, make: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """W2 without the means, rows in which an eigenvalue is too small to be resolved, and both gradients."""
    if lanes(sp):
        from kexue.stats import _gaussian_lanes

        return _gaussian_lanes.w2_rows(double_factor(sp, lp), sq, make)
    eps = torch.finfo(sp.dtype).eps
    if large(sp):
        from kexue.stats import _gaussian_lapack

        w, v = _gaussian_lapack.congruent_eigen(lp, sq, make)
    else:
        moment = lp.mT @ sq @ lp
        w, v = torch.linalg.eigh(moment) if make else (torch.linalg.eigvalsh(moment), lp)
    top = w[..., -1:].clamp_min(0)
    s = torch.maximum(w, eps * top).sqrt()
    spread = _trace(sp) + _trace(sq) - 2 * s.sum(-1)
    low = ~(w[..., 0] >= eps**0.7 * top.squeeze(-1))
    if not make:
        return spread, low, nothing(sp), nothing(sp)
    root = s.sqrt().unsqueeze(-2)
    eye = torch.eye(sp.shape[-1], dtype=sp.dtype, device=sp.device)
    y, u = solve_turned(lp, v * root), (lp @ v) / root
    return spread, low, torch.baddbmm(eye, y, y.mT, alpha=-1), torch.baddbmm(eye, u, u.mT, alpha=-1)


def w2_rows(delta: Tensor, sp: Tensor, sq: Tensor, factors: Any, make: bool) -> Four:
    (lp, ok_p), (_, ok_q) = factors
    tp, tq = _trace(sp), _trace(sq)
    size = tp * tq  # of the eigenvalues that are computed; beyond the range of the dtype they would be 0 or inf
    far = 1e28 if sp.dtype == torch.float32 else 1e200
    ok = ok_p & ok_q & (size > 1 / far) & (size < far)
    first, second = sp, sq
    if not bool(ok.all()):
        keep, eye = ok[:, None, None], torch.eye(sp.shape[-1], dtype=sp.dtype, device=sp.device)
        first, second, lp = (torch.where(keep, x, eye) for x in (sp, sq, lp))
    spread, low, *grads = _spread(first, second, lp, make)
    again = ~ok | low | (spread < (1e-2 if spread.dtype == torch.float32 else 1e-4) * (tp + tq))
    spread, *grads = (x.to(sp.dtype) for x in (spread, *grads))
    if bool(again.any()):
        rows = again.nonzero().squeeze(1)
        value, grad_p, grad_q = _robust_w2(sp[rows].double(), sq[rows].double(), make)
        spread[rows] = value.to(sp.dtype)
        if make:
            grads[0][rows], grads[1][rows] = grad_p.to(sp.dtype), grad_q.to(sp.dtype)
    value = spread + delta.square().sum(-1)
    return value, 2 * delta if make else nothing(delta), grads[0], grads[1]


class TransportMap(torch.autograd.Function):
    """T with T Sp T = Sq, for covariances of full rank.

    From T Sp T = Sq: dT Sp T + T Sp dT = dSq - T dSp T, which the basis K of :func:`map_parts` makes diagonal with the
    denominators s_i + s_j: sums, never differences.
    """

    @staticmethod
    def forward(ctx: Any, sp: Tensor, sq: Tensor) -> Tensor:
        factor, _ = torch.linalg.cholesky_ex(sp)
        k, turned, s = map_parts(factor, sq)
        t = transpose_product(turned * s.sqrt().unsqueeze(-2))
        ctx.save_for_backward(sp, sq, k, turned, s, t)
        return t

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        _, _, k, turned, s, t = ctx.saved_tensors
        s = floored(s)
        inner = turned.mT @ symmetric(grad) @ turned / (s.unsqueeze(-1) + s.unsqueeze(-2))
        out = symmetric(k @ inner @ k.mT)
        return -(t @ out @ t), out
