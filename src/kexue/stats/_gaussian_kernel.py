"""Divergences of full-covariance normals and their gradients in closed form, row by row of a flat batch.

With Delta = mu_p - mu_q, D = Sp - Sq, beta = 1 - alpha and Sa = alpha Sq + beta Sp (the Renyi divergence; alpha = 1 is
KL, half of alpha = 1/2 is Bhattacharyya):

    value    alpha/2 Delta' Sa^-1 Delta + (1/2 beta) (ln det Sa - beta ln det Sp - alpha ln det Sq)
    d Sp     alpha/2 Sa^-1 D Sp^-1 - alpha beta/2 v v',   v = Sa^-1 Delta
    d Sq   - alpha/2 Sa^-1 D Sq^-1 - alpha^2/2 v v'

Determinants and traces cancel when p is close to q. Rows where that happens are computed again in float64 from the
eigenvalues e of Lq^-1 D Lq^-T: 1/2 sum(h(e) - h(beta e) / beta), h(e) = e - log1p(e). Rows whose covariance is
singular are restricted to its range; unequal supports give +inf, with a gradient of 0.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kexue._tensors import as_recorded
from kexue.stats._bures_kernel import (
    Four,
    TransportMap,
    cholesky,
    double_factor,
    lanes,
    nothing,
    solve_turned,
    symmetric,
    w2_rows,
)


def log_excess(e: Tensor) -> Tensor:
    """h(e) = e - log1p(e) >= 0 to full relative precision, for e > -1."""
    near = e.abs() < 0.25
    small = torch.where(near, e, 0.0)
    r = small / (2 + small)  # log1p(e) = 2 atanh(r), and e - 2 r = r e
    r2 = r.square()
    series = torch.zeros_like(r)
    for k in range(21, 1, -2):
        series = series * r2 + 1.0 / k
    large = torch.where(near, 1.0, e)
    return torch.where(near, r * small - 2 * r * r2 * series, large - torch.log1p(large))


def _logdet(factor: Tensor) -> Tensor:
    return 2 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)


def _solve(factor: Tensor, x: Tensor) -> Tensor:
    return torch.linalg.solve_triangular(factor, x, upper=False)


def _kl(delta: Tensor, lp: Tensor, lq: Tensor, make: bool) -> tuple[Tensor, ...]:
    n = delta.shape[-1]
    x = _solve(lq, torch.cat([lp, delta.unsqueeze(-1)], -1))
    spread = 0.5 * (x[..., :n].square().sum((-2, -1)) + _logdet(lq) - _logdet(lp) - n)
    quadratic = 0.5 * x[..., n].square().sum(-1)
    if not make:
        return quadratic, spread, nothing(x), nothing(x), nothing(x)
    z = solve_turned(lq, x)  # Sq^-1 (Lp, Delta): its square holds both terms of the gradient
    inverse = torch.cholesky_inverse(lq)
    grad_p = (inverse - torch.cholesky_inverse(lp)).mul_(0.5)
    grad_q = torch.baddbmm(inverse, z, z.mT, beta=0.5, alpha=-0.5)
    return quadratic, spread, z[..., n].contiguous(), grad_p, grad_q


def _renyi(
    delta: Tensor, sp: Tensor, sq: Tensor, lp: Tensor, lq: Tensor, alpha: float, make: bool
) -> tuple[Tensor, ...]:
    beta = 1 - alpha
    mixed, info = torch.linalg.cholesky_ex(alpha * sq + beta * sp)
    valid = info == 0
    if alpha > 1:
        mixed = torch.where(valid[..., None, None], mixed, torch.eye(mixed.shape[-1], dtype=sp.dtype, device=sp.device))
    y = _solve(mixed, delta.unsqueeze(-1))
    quadratic = alpha / 2 * y.square().sum((-2, -1))
    spread = (_logdet(mixed) - beta * _logdet(lp) - alpha * _logdet(lq)) / (2 * beta)
    if alpha > 1:
        spread = torch.where(valid, spread, torch.inf)
    if not make:
        return quadratic, spread, nothing(y), nothing(y), nothing(y)
    v = solve_turned(mixed, y)
    inverse = torch.cholesky_inverse(mixed)
    square = v @ v.mT
    grad_p = 0.5 * (inverse - torch.cholesky_inverse(lp)) - alpha * beta / 2 * square
    grad_q = alpha / (2 * beta) * (inverse - torch.cholesky_inverse(lq)) - alpha**2 / 2 * square
    grads = [alpha * v.squeeze(-1), grad_p, grad_q]
    if alpha > 1:
        grads = [torch.where(valid.view(-1, *[1] * (g.dim() - 1)), g, 0.0) for g in grads]
    return quadratic, spread, grads[0], grads[1], grads[2]


def _close_renyi(delta: Tensor, sp: Tensor, sq: Tensor, alpha: float, make: bool) -> Four:
    """The form without cancellation, for covariances of full rank; alpha = 1 is KL."""
    beta = 1 - alpha
    difference = sp - sq
    lq = torch.linalg.cholesky(sq)
    e = torch.linalg.eigvalsh(symmetric(_solve(lq, _solve(lq, difference).mT)))
    e = e.clamp(min=torch.finfo(e.dtype).eps - 1)
    spread = log_excess(e)
    valid = torch.ones(e.shape[:-1], dtype=torch.bool, device=e.device)
    if beta:
        valid = (beta * e > -1).all(-1)
        spread = spread - log_excess(torch.where(valid[..., None], beta * e, 0.0)) / beta
    mixed = sq + beta * difference
    if not bool(valid.all()):
        mixed = torch.where(valid[..., None, None], mixed, sq)
    la, info = torch.linalg.cholesky_ex(mixed)
    valid = valid & (info == 0)
    y = _solve(la, delta.unsqueeze(-1))
    value = 0.5 * spread.sum(-1) + alpha / 2 * y.square().sum((-2, -1))
    value = torch.where(valid, value, torch.inf)
    if not make:
        return value, nothing(y), nothing(y), nothing(y)
    v = solve_turned(la, y)
    inverse = torch.cholesky_inverse(la)
    square = v @ v.mT
    lp = torch.linalg.cholesky(sp)
    common = alpha / 2 * inverse @ difference
    grad_p = symmetric(common @ torch.cholesky_inverse(lp)) - alpha * beta / 2 * square
    grad_q = -symmetric(common @ torch.cholesky_inverse(lq)) - alpha**2 / 2 * square
    keep = valid[..., None, None]
    return (
        value,
        torch.where(valid[..., None], alpha * v.squeeze(-1), 0.0),
        torch.where(keep, grad_p, 0.0),
        torch.where(keep, grad_q, 0.0),
    )


def _jeffreys(delta: Tensor, sp: Tensor, sq: Tensor, lp: Tensor, lq: Tensor, make: bool) -> Four:
    """The spread is |Lq^-1 D Lp^-T|^2 / 2: nothing cancels."""
    column = delta.unsqueeze(-1)
    difference = sp - sq
    x = _solve(lp, _solve(lq, difference).mT)
    yp, yq = _solve(lp, column), _solve(lq, column)
    value = 0.5 * (x.square().sum((-2, -1)) + yp.square().sum((-2, -1)) + yq.square().sum((-2, -1)))
    if not make:
        return value, nothing(value), nothing(value), nothing(value)
    vp, vq = solve_turned(lp, yp), solve_turned(lq, yq)
    ip, iq = torch.cholesky_inverse(lp), torch.cholesky_inverse(lq)
    grad_p = 0.5 * (symmetric((ip + iq) @ difference @ ip) - vp @ vp.mT)
    grad_q = -0.5 * (symmetric((ip + iq) @ difference @ iq) + vq @ vq.mT)
    return value, (vp + vq).squeeze(-1), grad_p, grad_q


def _restricted(delta: Tensor, sp: Tensor, sq: Tensor, kind: str, alpha: float, make: bool, eps: float) -> Four:
    """One row with a singular covariance, in float64: +inf unless both have the same support.

    ``eps`` is that of the dtype in which the covariances were given: their zero eigenvalues are zero to its rounding.
    """
    n = delta.shape[0]
    unit = (sp.diagonal() + sq.diagonal()).sqrt()
    unit = torch.where(unit > 0, unit, 1.0)
    a, b, shift = sp / unit[:, None] / unit, sq / unit[:, None] / unit, delta / unit
    tolerance = 16 * n * eps
    w, basis = torch.linalg.eigh(a + b)
    inside = w > tolerance
    outside = basis[:, ~inside]
    basis = basis[:, inside]
    rank = basis.shape[1]
    value = delta.new_full((), torch.inf)
    grads = [x.new_zeros(x.shape) for x in (delta, sp, sq)]
    reach = 8 * eps**0.5 * float(shift.abs().max())
    if not bool((torch.abs(outside.mT @ shift) > reach).any()):
        a, b = symmetric(basis.mT @ a @ basis), symmetric(basis.mT @ b @ basis)
        full = all(rank == 0 or float(torch.linalg.eigvalsh(x)[0]) > tolerance for x in (a, b))
        if full:
            one = (basis.mT @ shift)[None], a[None], b[None]
            if kind == "jeffreys":
                found = _jeffreys(*one, torch.linalg.cholesky(one[1]), torch.linalg.cholesky(one[2]), make)
            else:
                found = _close_renyi(*one, alpha, make)
            value = found[0][0]
            if make:
                grads = [
                    basis @ found[1][0] / unit,
                    basis @ found[2][0] @ basis.mT / unit[:, None] / unit,
                    basis @ found[3][0] @ basis.mT / unit[:, None] / unit,
                ]
    return value, grads[0], grads[1], grads[2]


def _or_identity(ok: Tensor, x: Tensor) -> Tensor:
    return torch.where(ok[:, None, None], x, torch.eye(x.shape[-1], dtype=x.dtype, device=x.device))


def _put(target: Four, rows: Tensor, source: Four, make: bool) -> None:
    for x, y in zip(target[: 4 if make else 1], source, strict=False):
        x[rows] = y.to(x.dtype)


def _least_pivot(factor: Tensor, s: Tensor) -> Tensor:
    """Rows in which a variable is explained by others but for less than 1/1000: float32 is not enough there."""
    pivots = factor.diagonal(dim1=-2, dim2=-1).square()
    return (pivots < 1e-3 * s.diagonal(dim1=-2, dim2=-1)).any(-1)


def _entropic(kind: str, delta: Tensor, sp: Tensor, sq: Tensor, factors: Any, alpha: float, make: bool) -> Four:
    (lp, ok_p), (lq, ok_q) = factors
    ok = ok_p & ok_q
    regular = bool(ok.all())
    first, second = sp, sq
    if not regular:  # anything that has an inverse does where the result is replaced below
        lp, lq, first, second = (_or_identity(ok, x) for x in (lp, lq, sp, sq))
    exact = kind == "renyi" and alpha == 1 and lanes(sp)  # many small rows: a kernel in float64
    if kind == "jeffreys":
        out = _jeffreys(delta, sp, sq, lp, lq, make)
    else:
        if alpha != 1:
            parts = _renyi(delta, first, second, lp, lq, alpha, make)
        elif exact:
            from kexue.stats import _gaussian_lanes

            parts = _gaussian_lanes.kl_rows(delta, double_factor(sp, lp), double_factor(sq, lq), make)
        else:
            parts = _kl(delta, lp, lq, make)
        quadratic, spread = parts[:2]
        value, *grads = (x.to(sp.dtype) for x in (quadratic + spread, *parts[2:]))
        out = value, grads[0], grads[1], grads[2]
        limit = 1e-2 if spread.dtype == torch.float32 else 1e-4
        if alpha != 1:
            limit = limit * max(1.0, 0.1 / abs(1 - alpha))
        close = ok & (spread < limit * sp.shape[-1])
        if bool(close.any()):
            rows = close.nonzero().squeeze(1)
            again = _close_renyi(delta[rows].double(), sp[rows].double(), sq[rows].double(), alpha, make)
            _put(out, rows, again, make)
    if sp.dtype == torch.float32 and not exact:
        ill = ok & (_least_pivot(lp, sp) | _least_pivot(lq, sq))
        if bool(ill.any()):
            rows = ill.nonzero().squeeze(1)
            shift, a, b = delta[rows].double(), sp[rows].double(), sq[rows].double()
            _put(out, rows, _entropic(kind, shift, a, b, [cholesky(a), cholesky(b)], alpha, make), make)
    if not regular:
        eps = torch.finfo(sp.dtype).eps
        for row in (~ok).nonzero().squeeze(1).tolist():
            one = _restricted(delta[row].double(), sp[row].double(), sq[row].double(), kind, alpha, make, eps)
            _put(out, row, one, make)
    return out


def divergence(
    delta: Tensor,
    sp: Tensor,
    sq: Tensor,
    lp: Tensor | None,
    ok_p: Tensor | None,
    lq: Tensor | None,
    ok_q: Tensor | None,
    kind: str,
    alpha: float,
    make: bool,
) -> Four:
    """Values (N,) and gradients of delta (N, n), sp and sq (N, n, n); empty gradients unless ``make``."""
    factors = [
        cholesky(s) if factor is None or ok is None else (factor, ok)
        for s, factor, ok in ((sp, lp, ok_p), (sq, lq, ok_q))
    ]
    if kind == "w2":
        return w2_rows(delta, sp, sq, factors, make)
    return _entropic(kind, delta, sp, sq, factors, alpha, make)


@torch.library.custom_op(
    "kexue::gaussian_divergence",
    mutates_args=(),
    schema=(
        "(Tensor delta, Tensor sp, Tensor sq, str kind, float alpha, bool make) -> (Tensor, Tensor, Tensor, Tensor)"
    ),
)
def _divergence_op(delta: Tensor, sp: Tensor, sq: Tensor, kind: str, alpha: float, make: bool) -> Four:
    """One node in a compiled graph: which rows are computed again depends on their values."""
    return divergence(delta, sp, sq, None, None, None, None, kind, alpha, make)


@_divergence_op.register_fake
def _(delta: Tensor, sp: Tensor, sq: Tensor, kind: str, alpha: float, make: bool) -> Four:
    value = delta.new_empty(delta.shape[0])
    if not make:
        return value, delta.new_empty(0), delta.new_empty(0), delta.new_empty(0)
    return value, torch.empty_like(delta), sp.new_empty(sp.shape), sq.new_empty(sq.shape)


def plain(delta: Tensor, sp: Tensor, sq: Tensor, kind: str, alpha: float) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of :func:`divergence` in differentiable operations, for covariances of full rank."""
    if kind == "w2":
        eye = torch.eye(sp.shape[-1], dtype=sp.dtype, device=sp.device)
        return 2 * delta, eye - TransportMap.apply(sp, sq), eye - TransportMap.apply(sq, sp)
    difference = sp - sq
    column = delta.unsqueeze(-1)
    ip, iq = torch.linalg.inv(sp), torch.linalg.inv(sq)
    if kind == "jeffreys":
        vp, vq = ip @ column, iq @ column
        common = (ip + iq) @ difference
        grad_p = 0.5 * (symmetric(common @ ip) - vp @ vp.mT)
        return (vp + vq).squeeze(-1), grad_p, -0.5 * (symmetric(common @ iq) + vq @ vq.mT)
    beta = 1 - alpha
    inverse = torch.linalg.inv(sq + beta * difference)
    v = inverse @ column
    common, square = alpha / 2 * inverse @ difference, v @ v.mT
    grad_p = symmetric(common @ ip) - alpha * beta / 2 * square
    return alpha * v.squeeze(-1), grad_p, -symmetric(common @ iq) - alpha**2 / 2 * square


class Divergence(torch.autograd.Function):
    """:func:`divergence` with the gradients that the forward pass made."""

    @staticmethod
    def forward(
        ctx: Any,
        delta: Tensor,
        sp: Tensor,
        sq: Tensor,
        lp: Tensor | None,
        ok_p: Tensor | None,
        lq: Tensor | None,
        ok_q: Tensor | None,
        kind: str,
        alpha: float,
    ) -> Tensor:
        make = any(ctx.needs_input_grad[:3])
        if torch.compiler.is_compiling():
            out = _divergence_op(delta, sp, sq, kind, alpha, make)
        else:
            with torch.autocast(delta.device.type, enabled=False):
                out = divergence(delta, sp, sq, lp, ok_p, lq, ok_q, kind, alpha, make)
        if make:
            ctx.save_for_backward(delta, sp, sq, *out)
        ctx.kind, ctx.alpha = kind, alpha
        return out[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        delta, sp, sq, value, *made = ctx.saved_tensors
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph
            with torch.no_grad():
                ok = value.isfinite() & cholesky(sp)[1] & cholesky(sq)[1]
            if bool(ok.all()):
                made = list(plain(delta, sp, sq, ctx.kind, ctx.alpha))
            else:  # gradients of the other rows are constants
                smooth = plain(delta, _or_identity(ok, sp), _or_identity(ok, sq), ctx.kind, ctx.alpha)
                made = [torch.where(ok.view(-1, *[1] * (x.dim() - 1)), x, y) for x, y in zip(smooth, made, strict=True)]
        wide = grad[:, None, None]
        grads = [made[0] * grad[:, None], made[1] * wide, made[2] * wide]
        return *(g if need else None for g, need in zip(grads, ctx.needs_input_grad, strict=False)), *[None] * 6


def dense(
    delta: Tensor,
    sp: Tensor,
    sq: Tensor,
    factor_p: tuple[Tensor, Tensor] | None,
    factor_q: tuple[Tensor, Tensor] | None,
    kind: str,
    alpha: float = 1.0,
) -> Tensor:
    """Divergence of any broadcastable batches, (...,); ``factor``: what :func:`cholesky` gives for the covariance."""
    shape = torch.broadcast_shapes(delta.shape[:-1], sp.shape[:-2], sq.shape[:-2])

    def flat(x: Tensor, dims: int) -> Tensor:
        event = x.shape[x.dim() - dims :]
        return x.expand(shape + event).reshape((shape.numel(), *event))

    factors: list[Tensor | None] = []
    for found in (factor_p, factor_q):
        factors += [None, None] if found is None else [flat(found[0], 2), flat(found[1], 0)]
    out = Divergence.apply(*as_recorded(flat(delta, 1), flat(sp, 2), flat(sq, 2)), *factors, kind, alpha)
    return out.reshape(shape)
