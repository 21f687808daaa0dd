"""Polynomials of a score and the symmetric features whose inner product they are.

    sim(x) = sum over m = 0..p of c_m x^m,  x = q.k:   Taylor c_m = 1 / m!,   power (1 + x / p)^p: c_m = C(p, m) / p^m
    x^m = sum over the multisets a of m coordinates of multinomial(a) q^a k^a

so that C(d + p, p) numbers give what the full outer products need sum d^m numbers for. The monomials of degree m are
sorted lexicographically: those whose smallest coordinate is a or later are the last ones, and

    monomials of degree m  =  concatenation over a of  x_a times (monomials of degree m - 1 from coordinate a on)

Degree 2 alone is more often used than all others and has an order of its own, by the distance of its two coordinates on
a circle: all products x_a x_(a + i) with the same i are one slice of x repeated twice, and all i together one operation
on a window that moves over it.

Features here have no multinomial in them: it is a factor of the state instead (:func:`weights`). The root of
c_m / c_(m - 1) goes into the step from degree m - 1 to m.

Shapes: R rows (batch times heads), D width, M features, F tokens of a block.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

KINDS = ("taylor", "power")


def num_monomials(dim: int, degree: int) -> int:
    """Number of monomials of up to ``degree`` in ``dim`` variables, C(dim + degree, degree)."""
    return math.comb(dim + degree, degree)


def level_from(dim: int, degree: int, a: int) -> int:
    """Number of monomials of exactly ``degree`` whose smallest coordinate is ``a`` or later."""
    return math.comb(dim - a + degree - 1, degree) if a < dim else int(degree == 0)


def step(kind: str, degree: int, m: int) -> float:
    """c_m / c_(m - 1)."""
    return 1 / m if kind == "taylor" else (degree - m + 1) / (m * degree)


def power(x: Tensor, n: int) -> Tensor:
    """x^n for n >= 1 by repeated squaring, exactly non-negative for even n."""
    out: Tensor | None = None
    while n:
        if n & 1:
            out = x if out is None else out * x
        n >>= 1
        if n:
            x = x * x
    return x if out is None else out


def _line(x: Tensor, n: int) -> Tensor:
    """1 + x / n, in the place of x."""
    return (x if n == 1 else x.mul_(1 / n)).add_(1)


def _taylor(x: Tensor, degree: int) -> Tensor:
    """1 + x (1 + x / 2 (1 + x / 3 ...)): no coefficient underflows."""
    one = x.new_ones(())
    out = _line(x.clone(), degree) if degree else torch.ones_like(x)
    for m in range(degree - 1, 0, -1):
        out = torch.addcmul(one, x, out, value=1 / m)
    return out


def value(x: Tensor, kind: str, degree: int) -> Tensor:
    """The polynomial at every score; x is overwritten."""
    if kind == "power":
        return power(_line(x, degree), degree)
    if degree == 1:
        return _line(x, 1)
    if degree == 2:  # complete the square
        x = _line(x, 1)
        return torch.addcmul(x.new_full((), 0.5), x, x, value=0.5)
    return _taylor(x, degree)


def value_and_slope(x: Tensor, kind: str, degree: int) -> tuple[Tensor, Tensor]:
    """The polynomial and its derivative at every score; x is overwritten."""
    if kind == "power":
        base = _line(x, degree)
        slope = power(base, degree - 1) if degree > 1 else torch.ones_like(base)
        return slope * base, slope
    if degree == 2:
        slope = _line(x, 1)
        return torch.addcmul(x.new_full((), 0.5), slope, slope, value=0.5), slope
    slope = _taylor(x, degree - 1)
    return _taylor(x, degree), slope


@functools.lru_cache(maxsize=32)
def _multinomials(dim: int, degree: int) -> Tensor:
    """Multinomial coefficients of all monomials of up to ``degree``, (M,) float64, in the order of the features."""
    if degree == 2:
        count = num_monomials(dim, 2)
        out = torch.full((count,), 2.0, dtype=torch.float64)
        out[: 1 + 2 * dim] = 1  # 1, the coordinates, their squares
        return out
    levels = [torch.ones(1, dtype=torch.float64)]
    runs = torch.zeros(1, dtype=torch.float64)  # how often the smallest coordinate of each monomial occurs
    for m in range(1, degree + 1):
        before, size = levels[-1], level_from(dim, m - 1, 0)
        parts, counts = [], []
        for a in range(dim):
            rest = level_from(dim, m - 1, a)
            run = torch.ones(rest, dtype=torch.float64)
            if m > 1:  # those that have a as their smallest coordinate already come first
                same = level_from(dim, m - 2, a)
                run[:same] += runs[size - rest :][:same]
            counts.append(run)
            parts.append(before[size - rest :] * m / run)
        levels.append(torch.cat(parts))
        runs = torch.cat(counts)
    return torch.cat(levels)


def weights(dim: int, degree: int, like: Tensor) -> Tensor:
    """What each product of two features counts for in the kernel, (M, 1), in dtype and on device of ``like``."""
    return _multinomials(dim, degree).to(device=like.device, dtype=like.dtype).unsqueeze(-1)


def features(x: Tensor, kind: str, degree: int) -> Tensor:
    """Features with the roots of all weights in them, in plain differentiable operations.

    Args:
        x: (..., D), such that sim is a function of x.y.
        kind: "taylor" or "power".
        degree: p.

    Returns:
        (..., M).
    """
    dim = x.shape[-1]
    if degree == 2:
        twice = torch.cat([x, x], -1)
        first, second = (math.sqrt(step(kind, 2, m)) for m in (1, 2))
        parts = [x * x, *(math.sqrt(2) * x * twice[..., i : i + dim] for i in range(1, (dim + 1) // 2))]
        if dim % 2 == 0:
            parts.append(math.sqrt(2) * x[..., : dim // 2] * x[..., dim // 2 :])
        return torch.cat([torch.ones_like(x[..., :1]), first * x, first * second * torch.cat(parts, -1)], -1)
    levels = [torch.ones_like(x[..., :1])]
    scale = 1.0  # root of c_m
    out = [levels[0]]
    for m in range(1, degree + 1):
        scale *= math.sqrt(step(kind, degree, m))
        parts = []
        for a in range(dim):
            for j in range(m, 0, -1):  # x_a^j times the monomials of degree m - j in later coordinates
                later = level_from(dim, m - j, a + 1)
                if later:
                    rest = levels[m - j]
                    tail = rest[..., rest.shape[-1] - later :]
                    parts.append(math.sqrt(math.comb(m, j)) * power(x[..., a : a + 1], j) * tail)
        levels.append(torch.cat(parts, -1))
        out.append(scale * levels[-1])
    return torch.cat(out, -1)


class Monomials:
    """Monomials of blocks of tokens and their gradients, in memory that is reused from block to block."""

    def __init__(self, dim: int, kind: str, degree: int, like: Tensor) -> None:
        self.dim, self.degree, self.like = dim, degree, like
        self.m = num_monomials(dim, degree)
        self.roots = [0.0, *(math.sqrt(step(kind, degree, m)) for m in range(1, degree + 1))]
        self.buffers: dict[tuple[int, int, bool], tuple[Tensor, Tensor, list[tuple[Tensor, ...]]]] = {}

    def _buffer(self, rows: int, tokens: int, gradient: bool) -> tuple[Tensor, Tensor, list[tuple[Tensor, ...]]]:
        """(R, M, F) features or gradients, coordinates or their gradients, and views of them."""
        key = (rows, tokens, gradient)
        if key not in self.buffers:
            phi = self.like.new_empty(rows, self.m, tokens)
            if not gradient:
                phi[:, 0] = 1
            self.buffers[key] = (phi, *self._views(phi))
        return self.buffers[key]

    def _views(self, phi: Tensor) -> tuple[Tensor, list[tuple[Tensor, ...]]]:
        raise NotImplementedError

    def build(self, x: Tensor) -> Tensor:
        """Features (R, M, F) of tokens (R, F, D); valid until the next call."""
        raise NotImplementedError

    def back(self, rows: int, tokens: int) -> Tensor:
        """Gradient (R, F, D) of the tokens of the last :meth:`build`, from what is in :meth:`gradient`."""
        raise NotImplementedError

    def gradient(self, rows: int, tokens: int) -> Tensor:
        """Memory (R, M, F) for the gradient of features."""
        return self._buffer(rows, tokens, True)[0]


class _Recursive(Monomials):
    """Any degree, each from the one before."""

    def _views(self, phi: Tensor) -> tuple[Tensor, list[tuple[Tensor, ...]]]:
        sizes = [level_from(self.dim, m, 0) for m in range(self.degree + 1)]
        starts = [sum(sizes[:m]) for m in range(self.degree + 2)]
        x = self.like.new_empty(self.degree + 1, phi.shape[0], self.dim, phi.shape[2])
        views: list[tuple[Tensor, ...]] = []
        for m in range(2, self.degree + 1):
            at = starts[m]
            for a in range(self.dim):
                size = level_from(self.dim, m - 1, a)
                views.append((x[m, :, a : a + 1], phi[:, starts[m] - size : starts[m]], phi[:, at : at + size]))
                at += size
        return x, views

    def build(self, x: Tensor) -> Tensor:
        """Features (R, M, F) of tokens (R, F, D); valid until the next call."""
        phi, coordinates, views = self._buffer(x.shape[0], x.shape[1], False)
        for m in range(1, self.degree + 1):
            torch.mul(x.mT, self.roots[m], out=coordinates[m])
        phi[:, 1 : 1 + self.dim] = coordinates[1]
        for x_a, before, out in views:
            torch.mul(x_a, before, out=out)
        return phi

    def back(self, rows: int, tokens: int) -> Tensor:
        """Gradient (R, F, D) of the tokens of the last :meth:`build`, from what is in :meth:`gradient`."""
        _, _, forward = self._buffer(rows, tokens, False)
        grad, dx, backward = self._buffer(rows, tokens, True)
        for (x_a, before, _), (to_x, to_before, upstream) in zip(reversed(forward), reversed(backward), strict=True):
            to_before.addcmul_(upstream, x_a)
            torch.sum(upstream.mul_(before), 1, keepdim=True, out=to_x)
        out = grad[:, 1 : 1 + self.dim] * self.roots[1]
        for m in range(2, self.degree + 1):
            out.add_(dx[m], alpha=self.roots[m])
        return out.mT


class _Pairs(Monomials):
    """Degree 2, by windows over the coordinates repeated twice."""

    def _views(self, phi: Tensor) -> tuple[Tensor, list[tuple[Tensor, ...]]]:
        rows, d, tokens, offsets, half = phi.shape[0], self.dim, phi.shape[2], (self.dim + 1) // 2, self.dim // 2
        twice = self.like.new_empty(rows, 2 * d, tokens)
        window = twice.as_strided((rows, offsets, d, tokens), (twice.stride(0), tokens, tokens, 1))
        products = phi[:, 1 + d : 1 + d + offsets * d].unflatten(1, (offsets, d))
        views: list[tuple[Tensor, ...]] = [(phi[:, 1 : 1 + d], window, products)]
        views += [(twice[:, i : i + d], products[:, i]) for i in range(offsets)]
        if d % 2 == 0:
            views.append((phi[:, 1 : 1 + half], twice[:, half:d], phi[:, 1 + d + offsets * d :]))
        return twice, views

    def build(self, x: Tensor) -> Tensor:
        """Features (R, M, F) of tokens (R, F, D); valid until the next call."""
        phi, twice, views = self._buffer(x.shape[0], x.shape[1], False)
        first, window, products = views[0]
        torch.mul(x.mT, self.roots[1], out=first)
        torch.mul(x.mT, self.roots[2], out=twice[:, : self.dim])
        twice[:, self.dim :] = twice[:, : self.dim]
        torch.mul(window, first.unsqueeze(1), out=products)
        if self.dim % 2 == 0:
            torch.mul(views[-1][0], views[-1][1], out=views[-1][2])
        return phi

    def back(self, rows: int, tokens: int) -> Tensor:
        """Gradient (R, F, D) of the tokens of the last :meth:`build`, from what is in :meth:`gradient`."""
        _, _, forward = self._buffer(rows, tokens, False)
        _, to_twice, backward = self._buffer(rows, tokens, True)
        (first, window, _), (to_first, _, upstream) = forward[0], backward[0]
        to_twice.zero_()
        if self.dim % 2 == 0:
            (left, right, _), (to_left, to_right, half) = forward[-1], backward[-1]
            to_left.addcmul_(half, right)
            to_right.addcmul_(half, left)
        for to_slice, part in backward[1 : 1 + upstream.shape[1]]:
            to_slice.addcmul_(part, first)
        to_first.add_(upstream.mul_(window).sum(1))
        out = to_twice[:, : self.dim].add_(to_twice[:, self.dim :]).mul_(self.roots[2])
        return out.add_(to_first, alpha=self.roots[1]).mT


def monomials(dim: int, kind: str, degree: int, like: Tensor) -> Monomials:
    """Memory for the features of one kernel at one width, in the dtype and on the device of ``like``."""
    return (_Pairs if degree == 2 else _Recursive)(dim, kind, degree, like)
