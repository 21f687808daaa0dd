"""Many small normals at once: numba kernels with the batch as the lanes of the vector unit.

LAPACK's overhead for each matrix dominates up to some 64 dimensions. Here eight matrices lie interleaved, entry by
entry, so that every step of a textbook algorithm is one vector operation on eight of them: triangular solves,
Householder's tridiagonal form, QL with implicit shifts (each lane with its own block and shift). Everything is in
float64, and no lane depends on another.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from kexue.stats._lane_vectors import EPS, W, add1, add2, add4, dot, ends, rotate1, rotate4, scale, sweep
from kexue.words._numba import compiled

SWEEPS = 60  # for one eigenvalue; two are usual

_exact = compiled(nogil=True, error_model="numpy")


@_exact
def _combine(w, y, count, x, step_x, a, step_a, terms):  # type: ignore[no-untyped-def]
    """``y[:count] += sum over t of a[t] x_t[:count]``; steps in vectors."""
    t = 0
    while t + 4 <= terms:
        add4(w, y, x + t * step_x * W, step_x, a + t * step_a * W, step_a, count)
        t += 4
    while t < terms:
        add1(w, y, x + t * step_x * W, step_x, a + t * step_a * W, step_a, count)
        t += 1


@_exact
def _load(w, place, x, first, n):  # type: ignore[no-untyped-def]
    """Interleave up to eight matrices, row by row; lanes beyond the last repeat it."""
    last = x.shape[0] - 1
    for lane in range(W):
        m = x[min(first + lane, last)]
        for i in range(n):
            for j in range(n):
                w[place + (i * n + j) * W + lane] = m[i, j]


@_exact
def _turn(w, source, target, n):  # type: ignore[no-untyped-def]
    """Transpose."""
    for i in range(n):
        for j in range(n):
            a, b = source + (i * n + j) * W, target + (j * n + i) * W
            for lane in range(W):
                w[b + lane] = w[a + lane]


@_exact
def _fill(w, place, count, value):  # type: ignore[no-untyped-def]
    for k in range(place, place + count * W):
        w[k] = value


@_exact
def _tridiagonal(w, a, n, d, e, q, v, vectors):  # type: ignore[no-untyped-def]
    """Householder's form of the symmetric matrices at ``a``: d, e, and the columns of Q at ``q``.

    ``v`` has room for 5 n + 3 vectors: -v, -u, u, v, Q v, and three numbers for each lane.
    """
    minus_v, minus_u, u, plus, spare, number = v, v + n * W, v + 2 * n * W, v + 3 * n * W, v + 4 * n * W, v + 5 * n * W
    if vectors:
        _fill(w, q, n * n, 0.0)
        for i in range(n):
            _fill(w, q + (i * n + i) * W, 1, 1.0)
    for k in range(n - 1):
        m = n - 1 - k
        column = a + (k * n + k + 1) * W
        for lane in range(W):
            w[d + k * W + lane] = w[a + (k * n + k) * W + lane]
            w[number + lane] = 0.0
        if m > 1:
            dot(w, number, column + W, column + W, m - 1)
        for lane in range(W):
            head, tail = w[column + lane], w[number + lane]
            if tail == 0.0:
                w[e + k * W + lane] = head
                w[number + lane] = 0.0  # tau
                w[number + W + lane] = 0.0
            else:
                beta = -np.copysign(np.sqrt(head * head + tail), head)
                w[e + k * W + lane] = beta
                w[number + lane] = (beta - head) / beta
                w[number + W + lane] = 1.0 / (head - beta)
        if m == 1:
            # One entry is left: nothing to eliminate.
            for lane in range(W):
                w[d + (k + 1) * W + lane] = w[a + ((k + 1) * n + k + 1) * W + lane]
            break
        for lane in range(W):
            w[plus + lane] = 1.0
        scale(w, plus + W, column + W, number + W, m - 1)
        _fill(w, u, m, 0.0)
        _combine(w, u, m, a + ((k + 1) * n + k + 1) * W, n, plus, 1, m)
        dot(w, number + W, u, plus, m)
        for lane in range(W):  # u = tau A v - (tau^2 / 2) (v' A v) v
            tau = w[number + lane]
            w[number + W + lane] *= -0.5 * tau * tau
        scale(w, u, u, number, m)
        add1(w, u, plus, n, number + W, n, m)
        for lane in range(W):
            w[number + 2 * W + lane] = -1.0
        scale(w, minus_v, plus, number + 2 * W, m)
        scale(w, minus_u, u, number + 2 * W, m)
        for j in range(m):
            add2(w, a + ((k + 1 + j) * n + k + 1) * W, u, n, minus_v + j * W, n, m)
        if vectors:
            _fill(w, spare, n - 1, 0.0)
            _combine(w, spare, n - 1, q + ((k + 1) * n + 1) * W, n, plus, 1, m)
            scale(w, minus_v, minus_v, number, m)
            for j in range(m):
                add1(w, q + ((k + 1 + j) * n + 1) * W, spare, n, minus_v + j * W, n, n - 1)
    if n == 1:
        for lane in range(W):
            w[d + lane] = w[a + lane]


@_exact
def _ql(w, n, d, e, q, turns, state, vectors):  # type: ignore[no-untyped-def]
    """Eigenvalues of the tridiagonal matrices into d, unsorted; ``q``, by rows, becomes Q V. Whether all converged."""
    _fill(w, e + (n - 1) * W, 1, 0.0)
    for low in range(n - 1):
        done = False
        for _ in range(SWEEPS):
            ends(w, d, e, state + 2 * W, low, n - 1)
            reach = low
            for lane in range(W):
                end = int(w[state + 2 * W + lane])
                reach = max(reach, end)
                g = 0.0
                if end > low:
                    first, edge = w[d + low * W + lane], w[e + low * W + lane]
                    g = (w[d + (low + 1) * W + lane] - first) / (2.0 * edge)
                    g = w[d + end * W + lane] - first + edge / (g + np.copysign(np.sqrt(g * g + 1.0), g))
                w[state + lane] = g
                w[state + W + lane] = 0.0
            if reach == low:
                done = True
                break
            sweep(w, d, e, turns, state, low, reach)
            if vectors:
                row = 0
                while row + 4 <= n:
                    rotate4(w, q + row * n * W, n, turns, low, reach)
                    row += 4
                while row < n:
                    rotate1(w, q + row * n * W, n, turns, low, reach)
                    row += 1
            for lane in range(W):
                end = int(w[state + 2 * W + lane])
                if end > low:
                    w[d + low * W + lane] -= w[state + W + lane]
                    w[e + low * W + lane] = w[state + lane]
                    w[e + end * W + lane] = 0.0
        if not done:
            return False
    return True


@_exact
def _cholesky(s, factor, ok, floor):  # type: ignore[no-untyped-def]
    count, n = s.shape[0], s.shape[1]
    w = np.empty((2 * n * n + n) * W)
    columns, negative, number = 0, n * n * W, 2 * n * n * W  # of L, and of -L
    for first in range(0, count, W):
        _load(w, columns, s, first, n)
        for lane in range(W):
            for j in range(n):
                w[number + j * W + lane] = floor * w[columns + (j * n + j) * W + lane]
        good = np.ones(W, np.bool_)
        for j in range(n):
            place = columns + (j * n + j) * W
            _combine(w, place, n - j, negative + j * W, n, columns + j * W, n, j)
            for lane in range(W):
                pivot, least = w[place + lane], w[number + j * W + lane]
                if not (pivot > least and pivot > 0.0 and pivot < np.inf):
                    good[lane] = False
                    pivot = 1.0
                w[number + j * W + lane] = 1.0 / np.sqrt(pivot)
            scale(w, place, place, number + j * W, n - j)
            for lane in range(W):
                w[number + j * W + lane] = -1.0
            scale(w, negative + (j * n + j) * W, place, number + j * W, n - j)
        for lane in range(min(W, count - first)):
            m = factor[first + lane]
            ok[first + lane] = good[lane]
            for i in range(n):
                for j in range(i + 1):
                    m[i, j] = w[columns + (j * n + i) * W + lane]
                for j in range(i + 1, n):
                    m[i, j] = 0.0


def cholesky(s: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Lower factors (N, n, n), and whether every pivot is above n eps times the entry of the diagonal."""
    matrices = s.detach().contiguous().numpy()
    factor, ok = np.empty_like(matrices), np.empty(len(matrices), np.bool_)
    _cholesky(matrices, factor, ok, s.shape[-1] * eps)
    return torch.from_numpy(factor), torch.from_numpy(ok)


@_exact
def _inverse_pivots(w, rows, out, n):  # type: ignore[no-untyped-def]
    """-1 / L[k, k] for every k, then -1."""
    for k in range(n):
        for lane in range(W):
            w[out + k * W + lane] = -1.0 / w[rows + (k * n + k) * W + lane]
    _fill(w, out + n * W, 1, -1.0)


@_exact
def _solve_turned(w, rows, pivots, x, n, count):  # type: ignore[no-untyped-def]
    """X <- L^-T x for the ``count`` first entries of x (the others are zero), L by rows."""
    for k in range(count - 1, -1, -1):
        scale(w, x + k * W, x + k * W, pivots + k * W, 1)  # minus the result, until the end
        if k:
            add1(w, x, rows + k * n * W, n, x + k * W, n, k)
    scale(w, x, x, pivots + n * W, count)


@_exact
def _solve(w, columns, pivots, x, n, start):  # type: ignore[no-untyped-def]
    """X <- L^-1 x for x with zeros before ``start``, L by columns."""
    for k in range(start, n):
        scale(w, x + k * W, x + k * W, pivots + k * W, 1)
        if k < n - 1:
            add1(w, x + (k + 1) * W, columns + (k * n + k + 1) * W, n, x + k * W, n, n - 1 - k)
    scale(w, x + start * W, x + start * W, pivots + n * W, n - start)


@_exact
def _gram(w, out, x, n, count, triangular):  # type: ignore[no-untyped-def]
    """The lower half, by columns, of the sum of x_c x_c' over ``count`` columns; ``triangular``: x_c[c + 1:] is 0."""
    for j in range(n):
        start = j if triangular else 0
        _fill(w, out + (j * n + j) * W, n - j, 0.0)
        place = x + (start * n + j) * W
        _combine(w, out + (j * n + j) * W, n - j, place, n, place, n, count - start)


@_exact
def _inverse(w, rows, pivots, out, x, n):  # type: ignore[no-untyped-def]
    """The lower half of (L L')^-1, by columns; x is scratch."""
    _fill(w, x, n * n, 0.0)
    for k in range(n):  # row k of L^-1
        _fill(w, x + (k * n + k) * W, 1, 1.0)
        _solve_turned(w, rows, pivots, x + k * n * W, n, k + 1)
    _gram(w, out, x, n, n, True)


@_exact
def _store_symmetric(w, place, minus, out, first, n, factor):  # type: ignore[no-untyped-def]
    """``out = factor (X - Y)``, whose lower halves lie at the two places, by columns."""
    for lane in range(min(W, out.shape[0] - first)):
        m = out[first + lane]
        for j in range(n):
            for i in range(j, n):
                k = (j * n + i) * W + lane
                x = factor * (w[place + k] - w[minus + k])
                m[i, j] = x
                m[j, i] = x


@_exact
def _w2(lp, sq, spread, low, grad_p, grad_q, make):  # type: ignore[no-untyped-def]
    count, n = sq.shape[0], sq.shape[1]
    size = n * n * W
    w = np.empty(6 * size + (10 * n + 9) * W)
    rows, columns, s, b, m, q = 0, size, 2 * size, 3 * size, 4 * size, 5 * size
    d = 6 * size
    e, v, turns = d + n * W, d + 2 * n * W, d + (7 * n + 3) * W
    state, traces, pivots = turns + 2 * n * W, turns + (2 * n + 3) * W, turns + (2 * n + 5) * W
    for first in range(0, count, W):
        _load(w, rows, lp, first, n)
        _load(w, s, sq, first, n)
        _turn(w, rows, columns, n)
        for j in range(n):  # b = S L, m = L' b
            _fill(w, b + j * n * W, n, 0.0)
            _combine(w, b + j * n * W, n, s + j * n * W, n, columns + (j * n + j) * W, 1, n - j)
            _fill(w, m + (j * n + j) * W, n - j, 0.0)
            _combine(w, m + (j * n + j) * W, n - j, rows + (j * n + j) * W, n, b + (j * n + j) * W, 1, n - j)
        for lane in range(W):
            w[traces + lane] = 0.0
        for j in range(n):
            for lane in range(W):
                w[traces + lane] += w[m + (j * n + j) * W + lane]
        for lane in range(W):
            total = w[traces + lane]
            w[traces + W + lane] = 1.0 / total if total > 0.0 else 1.0
        for j in range(n):  # scaled to a trace of 1, both halves
            for i in range(j, n):
                for lane in range(W):
                    x = w[m + (j * n + i) * W + lane] * w[traces + W + lane]
                    w[m + (j * n + i) * W + lane] = x
                    w[m + (i * n + j) * W + lane] = x
        _tridiagonal(w, m, n, d, e, b, v, make)
        if make:
            _turn(w, b, q, n)
        converged = _ql(w, n, d, e, q, turns, state, make)
        if make:
            _turn(w, q, m, n)
        if not converged:
            low[first : first + W] = True
            spread[first : first + W] = 0.0
            if make:
                grad_p[first : first + W] = 0.0
                grad_q[first : first + W] = 0.0
            continue
        for lane in range(W):
            least = top = w[d + lane]
            for i in range(1, n):
                x = w[d + i * W + lane]
                least, top = min(least, x), max(top, x)
            top = max(top, 0.0)
            unit, roots = np.sqrt(1.0 / w[traces + W + lane]), 0.0
            for i in range(n):
                root = np.sqrt(max(w[d + i * W + lane], EPS * top)) * unit
                roots += root
                w[d + i * W + lane] = root
            both = 0.0
            for i in range(n):
                both += w[s + (i * n + i) * W + lane]
                for j in range(i + 1):
                    both += w[rows + (i * n + j) * W + lane] * w[rows + (i * n + j) * W + lane]
            if first + lane < count:
                low[first + lane] = not least >= EPS**0.7 * top
                spread[first + lane] = both - 2.0 * roots
        if not make:
            continue
        _inverse_pivots(w, rows, pivots, n)
        for i in range(n):  # y = L^-T v sqrt(s) into s, u = L v / sqrt(s) into b
            vector = m + i * n * W
            for lane in range(W):
                root = np.sqrt(w[d + i * W + lane])
                w[state + lane], w[state + W + lane] = root, 1.0 / root
            scale(w, s + i * n * W, vector, state, n)
            scale(w, vector, vector, state + W, n)
            _solve_turned(w, rows, pivots, s + i * n * W, n, n)
            _fill(w, b + i * n * W, n, 0.0)
            for j in range(n):
                add1(w, b + (i * n + j) * W, columns + (j * n + j) * W, n, vector + j * W, n, n - j)
        _fill(w, rows, n * n, 0.0)
        for j in range(n):
            _fill(w, rows + (j * n + j) * W, 1, 1.0)
        _gram(w, m, s, n, n, False)
        _store_symmetric(w, rows, m, grad_p, first, n, 1.0)
        _gram(w, m, b, n, n, False)
        _store_symmetric(w, rows, m, grad_q, first, n, 1.0)


@_exact
def _kl(delta, lp, lq, quadratic, spread, grad, grad_p, grad_q, make):  # type: ignore[no-untyped-def]
    count, n = lp.shape[0], lp.shape[1]
    size = n * n * W
    w = np.empty(7 * size + (3 * n + 4) * W)
    rows_p, rows_q, columns_q, x = 0, size, 2 * size, 3 * size
    inner, first_half, second_half = 4 * size, 5 * size, 6 * size
    shift, pivots = 7 * size, 7 * size + n * W
    other_pivots, total = pivots + (n + 1) * W, pivots + (2 * n + 2) * W
    for first in range(0, count, W):
        _load(w, rows_p, lp, first, n)
        _load(w, rows_q, lq, first, n)
        for lane in range(W):
            row = min(first + lane, count - 1)
            for i in range(n):
                w[shift + i * W + lane] = delta[row, i]
        _turn(w, rows_p, x, n)  # the columns of Lp, and then of Lq^-1 Lp
        _turn(w, rows_q, columns_q, n)
        _inverse_pivots(w, rows_q, pivots, n)
        for j in range(n):
            _solve(w, columns_q, pivots, x + j * n * W, n, j)
        _solve(w, columns_q, pivots, shift, n, 0)
        dot(w, total, x, x, n * n)
        dot(w, total + W, shift, shift, n)
        for lane in range(min(W, count - first)):
            logs = 0.0
            for i in range(n):
                k = (i * n + i) * W + lane
                logs += np.log(w[rows_q + k]) - np.log(w[rows_p + k])
            spread[first + lane] = 0.5 * (w[total + lane] - n) + logs
            quadratic[first + lane] = 0.5 * w[total + W + lane]
        if not make:
            continue
        for j in range(n):  # Sq^-1 (Lp, Delta): its square holds both terms of the gradient
            _solve_turned(w, rows_q, pivots, x + j * n * W, n, n)
        _solve_turned(w, rows_q, pivots, shift, n, n)
        for lane in range(min(W, count - first)):
            for i in range(n):
                grad[first + lane, i] = w[shift + i * W + lane]
        _gram(w, second_half, x, n, n, False)
        for j in range(n):
            add1(w, second_half + (j * n + j) * W, shift + j * W, n, shift + j * W, n, n - j)
        _inverse(w, rows_q, pivots, first_half, inner, n)
        _store_symmetric(w, first_half, second_half, grad_q, first, n, 0.5)
        _inverse_pivots(w, rows_p, other_pivots, n)
        _inverse(w, rows_p, other_pivots, second_half, inner, n)
        _store_symmetric(w, first_half, second_half, grad_p, first, n, 0.5)


def w2_rows(lp: Tensor, sq: Tensor, make: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Squared W2 without the means, where an eigenvalue is too small for it, and both gradients (empty unless made)."""
    count, n = sq.shape[:2]
    spread, low = np.empty(count), np.empty(count, np.bool_)
    shape = (count, n, n) if make else (0, 1, 1)
    grads = np.empty(shape), np.empty(shape)
    _w2(_matrices(lp), _matrices(sq), spread, low, *grads, make)
    first, second = (torch.from_numpy(x) if make else torch.empty(0, dtype=torch.float64) for x in grads)
    return torch.from_numpy(spread), torch.from_numpy(low), first, second


def kl_rows(delta: Tensor, lp: Tensor, lq: Tensor, make: bool) -> tuple[Tensor, ...]:
    """What the means and what the covariances add to KL, and the gradients of delta, Sp and Sq (empty unless made)."""
    count, n = delta.shape
    quadratic, spread, grad = np.empty(count), np.empty(count), np.empty((count if make else 0, n))
    shape = (count, n, n) if make else (0, 1, 1)
    out = quadratic, spread, grad, np.empty(shape), np.empty(shape)
    _kl(_matrices(delta), _matrices(lp), _matrices(lq), *out, make)
    found = [torch.from_numpy(x) for x in out]
    return tuple(found if make else [*found[:2], *(torch.empty(0, dtype=torch.float64) for _ in range(3))])


@_exact
def _asymmetry(s, gap, scale):  # type: ignore[no-untyped-def]
    tile = 8  # rows of both triangles stay in the cache
    n = s.shape[1]
    for row in range(s.shape[0]):
        m = s[row]
        widest = top = 0.0
        for i in range(n):
            top = max(top, abs(m[i, i]))
        for first in range(0, n, tile):
            for start in range(0, first + 1, tile):
                for i in range(first, min(first + tile, n)):
                    for j in range(start, min(start + tile, i)):
                        widest = max(widest, abs(m[i, j] - m[j, i]))
        gap[row], scale[row] = widest, top


def asymmetry(s: Tensor) -> tuple[Tensor, Tensor]:
    """Largest difference between s and its transpose, and largest entry of the diagonal, of contiguous matrices."""
    matrices = s.detach().reshape(-1, *s.shape[-2:]).numpy()
    gap, scale = np.empty(len(matrices), matrices.dtype), np.empty(len(matrices), matrices.dtype)
    _asymmetry(matrices, gap, scale)
    return torch.from_numpy(gap), torch.from_numpy(scale)


def _matrices(x: Tensor) -> Any:
    return x.detach().double().contiguous().numpy()
