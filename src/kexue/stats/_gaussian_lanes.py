"""Many small normals at once: numba kernels with the batch as the lanes of the vector unit.

LAPACK's overhead for each matrix dominates up to some 64 dimensions. Here eight matrices lie interleaved, entry by entry,
so that every step of a textbook algorithm is one vector operation on eight of them: Householder's tridiagonal form, QL
with implicit shifts (each lane with its own block and shift), triangular solves. Every step is
``y += sum over t of a_t x_t`` on contiguous columns. Everything is in float64, and no lane depends on another.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from torch import Tensor

from kexue.words._numba import compiled

W = 8  # lanes
EPS = 2.0**-52
SWEEPS = 60  # for one eigenvalue; two are usual

_exact = compiled(nogil=True, error_model="numpy")
_VECTOR = ir.VectorType(ir.DoubleType(), W)
_I64 = ir.IntType(64)


class _Emitter:
    """Vector instructions on a flat float64 array, addressed by the number of an entry."""

    def __init__(self, context: Any, builder: Any, kind: Any, array: Any) -> None:
        self.builder = builder
        self.data = context.make_array(kind)(context, builder, array).data

    def pointer(self, index: Any) -> Any:
        return self.builder.bitcast(self.builder.gep(self.data, [index]), _VECTOR.as_pointer())

    def load(self, index: Any) -> Any:
        value = self.builder.load(self.pointer(index))
        value.align = 8
        return value

    def store(self, value: Any, index: Any) -> None:
        self.builder.store(value, self.pointer(index)).align = 8

    def madd(self, a: Any, b: Any, c: Any) -> Any:
        """A b + c."""
        return self.builder.fadd(self.builder.fmul(a, b, flags=("contract",)), c, flags=("contract",))

    def loop(self, count: Any, body: Callable[[Any], None]) -> None:
        """``body(offset)`` for each of ``count`` >= 1 vectors."""
        builder = self.builder
        head = builder.block
        loop, done = builder.append_basic_block("lanes"), builder.append_basic_block("done")
        builder.branch(loop)
        builder.position_at_end(loop)
        k = builder.phi(_I64)
        k.add_incoming(_I64(0), head)
        body(builder.mul(k, _I64(W)))
        following = builder.add(k, _I64(1))
        k.add_incoming(following, builder.block)
        builder.cbranch(builder.icmp_signed("<", following, count), loop, done)
        builder.position_at_end(done)


def _adder(terms: int) -> Any:
    """``y[k] += sum over t < terms of a[t] x_t[k]`` for k < count."""

    @intrinsic
    def add(typing, w, y, x, step_x, a, step_a, count):  # type: ignore[no-untyped-def]
        i64 = types.int64
        signature = types.void(w, i64, i64, i64, i64, i64, i64)

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            emit = _Emitter(context, builder, signature.args[0], args[0])
            _, y, x, step_x, a, step_a, count = args

            def nth(start: Any, step: Any, t: int) -> Any:
                return builder.add(start, builder.mul(step, _I64(t * W)))

            factors = [emit.load(nth(a, step_a, t)) for t in range(terms)]
            starts = [nth(x, step_x, t) for t in range(terms)]

            def body(offset: Any) -> None:
                place = builder.add(y, offset)
                total = emit.load(place)
                for factor, start in zip(factors, starts, strict=True):
                    total = emit.madd(factor, emit.load(builder.add(start, offset)), total)
                emit.store(total, place)

            emit.loop(count, body)
            return context.get_dummy_value()

        return signature, generate

    return add


_add1, _add2, _add4 = _adder(1), _adder(2), _adder(4)


@intrinsic
def _rotate(typing, w, x, y, cs, count):  # type: ignore[no-untyped-def]
    """``x, y = s y' + c x', c y' - s x'`` with y' = y, x' = x; c at ``cs``, s behind it."""
    i64 = types.int64
    signature = types.void(w, i64, i64, i64, i64)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        emit = _Emitter(context, builder, signature.args[0], args[0])
        _, x, y, cs, count = args
        c, s = emit.load(cs), emit.load(builder.add(cs, _I64(W)))
        minus = builder.fneg(s)

        def body(offset: Any) -> None:
            px, py = builder.add(x, offset), builder.add(y, offset)
            a, b = emit.load(px), emit.load(py)
            emit.store(emit.madd(s, b, builder.fmul(c, a)), px)
            emit.store(emit.madd(c, b, builder.fmul(minus, a)), py)

        emit.loop(count, body)
        return context.get_dummy_value()

    return signature, generate


@intrinsic
def _ql_step(typing, w, d, e, state, i):  # type: ignore[no-untyped-def]
    """One rotation of QL between i and i + 1, in the lanes whose block reaches beyond i; others get c = 1, s = 0.

    ``d`` and ``e`` are the places of d[i] and e[i]; ``state`` holds c, s, g, p and the ends of the blocks.
    """
    i64 = types.int64
    signature = types.void(w, i64, i64, i64, i64)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        emit = _Emitter(context, builder, signature.args[0], args[0])
        _, d, e, state, i = args
        places = [builder.add(state, _I64(k * W)) for k in range(7)]
        cos, sin, g, p, end, keep_c, keep_s = (emit.load(k) for k in places)
        d0, d1 = emit.load(d), emit.load(builder.add(d, _I64(W)))
        e0, e1 = emit.load(e), emit.load(builder.add(e, _I64(W)))

        def same(x: float) -> Any:
            return ir.Constant(_VECTOR, [x] * W)

        number = builder.sitofp(i, ir.DoubleType())
        undefined = ir.Constant(_VECTOR, ir.Undefined)
        wide = builder.insert_element(undefined, number, ir.IntType(32)(0))
        wide = builder.shuffle_vector(wide, undefined, ir.Constant(ir.VectorType(ir.IntType(32), W), [0] * W))
        active = builder.fcmp_ordered("<", wide, end)
        f, b = builder.fmul(keep_s, e0), builder.fmul(keep_c, e0)
        name = f"llvm.sqrt.v{W}f64"
        root = builder.module.globals.get(name)
        if root is None:
            root = ir.Function(builder.module, ir.FunctionType(_VECTOR, [_VECTOR]), name=name)
        r = builder.call(root, [emit.madd(f, f, builder.fmul(g, g))])
        zero = builder.fcmp_ordered("==", r, same(0.0))
        inverse = builder.fdiv(same(1.0), builder.select(zero, same(1.0), r))
        s = builder.fmul(f, inverse)
        c = builder.select(zero, same(1.0), builder.fmul(g, inverse))
        q = builder.fsub(d1, p)
        t = emit.madd(builder.fsub(d0, q), s, builder.fmul(builder.fmul(same(2.0), c), b))
        new_p = builder.fmul(s, t)
        new_g = builder.fsub(builder.fmul(c, t), b)

        def put(new: Any, old: Any, place: Any) -> None:
            emit.store(builder.select(active, new, old), place)

        put(r, e1, builder.add(e, _I64(W)))
        put(builder.fadd(q, new_p), d1, builder.add(d, _I64(W)))
        put(c, same(1.0), places[0])
        put(s, same(0.0), places[1])
        put(new_g, g, places[2])
        put(new_p, p, places[3])
        put(c, keep_c, places[5])
        put(s, keep_s, places[6])
        return context.get_dummy_value()

    return signature, generate


@_exact
def _combine(w, y, count, x, step_x, a, step_a, terms):  # type: ignore[no-untyped-def]
    """``y[:count] += sum over t of a[t] x_t[:count]``; steps in vectors."""
    t = 0
    while t + 4 <= terms:
        _add4(w, y, x + t * step_x * W, step_x, a + t * step_a * W, step_a, count)
        t += 4
    while t < terms:
        _add1(w, y, x + t * step_x * W, step_x, a + t * step_a * W, step_a, count)
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

    ``v`` has room for 5 n + 2 vectors: -v, -u, u, v, A v or Q v, and two numbers for each lane.
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
        for i in range(1, m):
            for lane in range(W):
                w[number + lane] += w[column + i * W + lane] * w[column + i * W + lane]
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
        for i in range(1, m):
            for lane in range(W):
                w[plus + i * W + lane] = w[column + i * W + lane] * w[number + W + lane]
        _fill(w, u, m, 0.0)
        _combine(w, u, m, a + ((k + 1) * n + k + 1) * W, n, plus, 1, m)
        for lane in range(W):
            w[number + W + lane] = 0.0
        for i in range(m):
            for lane in range(W):
                w[number + W + lane] += w[u + i * W + lane] * w[plus + i * W + lane]
        for lane in range(W):
            tau = w[number + lane]
            w[number + W + lane] *= 0.5 * tau * tau
        for i in range(m):
            for lane in range(W):
                x = w[plus + i * W + lane]
                y = w[number + lane] * w[u + i * W + lane] - w[number + W + lane] * x
                w[u + i * W + lane] = y
                w[minus_v + i * W + lane] = -x
                w[minus_u + i * W + lane] = -y
        for j in range(m):
            _add2(w, a + ((k + 1 + j) * n + k + 1) * W, u, n, minus_v + j * W, n, m)
        if vectors:
            _fill(w, spare, n - 1, 0.0)
            _combine(w, spare, n - 1, q + ((k + 1) * n + 1) * W, n, plus, 1, m)
            for j in range(m):
                for lane in range(W):
                    w[minus_v + j * W + lane] *= w[number + lane]
                _add1(w, q + ((k + 1 + j) * n + 1) * W, spare, n, minus_v + j * W, n, n - 1)
    if n == 1:
        for lane in range(W):
            w[d + lane] = w[a + lane]


@_exact
def _ql(w, n, d, e, q, state, vectors):  # type: ignore[no-untyped-def]
    """Eigenvalues of the tridiagonal matrices into d, unsorted; ``q`` becomes Q V. Whether every lane converged."""
    _fill(w, e + (n - 1) * W, 1, 0.0)
    for low in range(n):
        done = False
        for _ in range(SWEEPS):
            reach = low
            for lane in range(W):
                end = n - 1
                for i in range(low, n - 1):
                    size = abs(w[d + i * W + lane]) + abs(w[d + (i + 1) * W + lane])
                    if abs(w[e + i * W + lane]) <= EPS * size:
                        end = i
                        break
                reach = max(reach, end)
                g = 0.0
                if end > low:
                    first, edge = w[d + low * W + lane], w[e + low * W + lane]
                    g = (w[d + (low + 1) * W + lane] - first) / (2.0 * edge)
                    g = w[d + end * W + lane] - first + edge / (g + np.copysign(np.sqrt(g * g + 1.0), g))
                w[state + 2 * W + lane] = g
                w[state + 3 * W + lane] = 0.0
                w[state + 4 * W + lane] = end
                w[state + 5 * W + lane] = 1.0
                w[state + 6 * W + lane] = 1.0
            if reach == low:
                done = True
                break
            for i in range(reach - 1, low - 1, -1):
                _ql_step(w, d + i * W, e + i * W, state, i)
                if vectors:
                    _rotate(w, q + (i + 1) * n * W, q + i * n * W, state, n)
            for lane in range(W):
                end = int(w[state + 4 * W + lane])
                if end > low:
                    w[d + low * W + lane] -= w[state + 3 * W + lane]
                    w[e + low * W + lane] = w[state + 2 * W + lane]
                    w[e + end * W + lane] = 0.0
        if not done:
            return False
    return True


@_exact
def _solve_turned(w, rows, x, n, count):  # type: ignore[no-untyped-def]
    """X <- L^-T x for the ``count`` first entries of x (others are zero); L by rows, x may not overlap it."""
    for k in range(count - 1, -1, -1):
        diagonal = rows + (k * n + k) * W
        for lane in range(W):
            w[x + k * W + lane] /= -w[diagonal + lane]
        if k:
            _add1(w, x, rows + k * n * W, n, x + k * W, n, k)
        for lane in range(W):
            w[x + k * W + lane] = -w[x + k * W + lane]


@_exact
def _gram(w, out, x, n, count):  # type: ignore[no-untyped-def]
    """The lower half, by columns, of the sum of x_c x_c' over ``count`` columns."""
    for j in range(n):
        _fill(w, out + (j * n + j) * W, n - j, 0.0)
        _combine(w, out + (j * n + j) * W, n - j, x + j * W, n, x + j * W, n, count)


@_exact
def _store_symmetric(w, place, out, first, n, unit, scale):  # type: ignore[no-untyped-def]
    """``out = unit I + scale X`` for X whose lower half lies at ``place``, by columns."""
    for lane in range(min(W, out.shape[0] - first)):
        m = out[first + lane]
        for j in range(n):
            for i in range(j, n):
                x = scale * w[place + (j * n + i) * W + lane]
                m[i, j] = x
                m[j, i] = x
            m[j, j] += unit


@_exact
def _w2(lp, sq, spread, low, grad_p, grad_q, make):  # type: ignore[no-untyped-def]
    count, n = sq.shape[0], sq.shape[1]
    size = n * n * W
    w = np.empty(6 * size + (8 * n + 16) * W)
    rows, columns, s, b, m, q = 0, size, 2 * size, 3 * size, 4 * size, 5 * size
    d = 6 * size
    e, v, state = d + n * W, d + 2 * n * W, d + (7 * n + 2) * W
    scale = state + 8 * W
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
            w[scale + lane] = 0.0
        for j in range(n):
            for lane in range(W):
                w[scale + lane] += w[m + (j * n + j) * W + lane]
        for lane in range(W):
            total = w[scale + lane]
            w[scale + W + lane] = 1.0 / total if total > 0.0 else 1.0
        for j in range(n):  # scaled to a trace of 1, both halves
            for i in range(j, n):
                for lane in range(W):
                    x = w[m + (j * n + i) * W + lane] * w[scale + W + lane]
                    w[m + (j * n + i) * W + lane] = x
                    w[m + (i * n + j) * W + lane] = x
        _tridiagonal(w, m, n, d, e, q, v, make)
        if not _ql(w, n, d, e, q, state, make):
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
            unit, roots = np.sqrt(1.0 / w[scale + W + lane]), 0.0
            for i in range(n):
                root = np.sqrt(max(w[d + i * W + lane], EPS * top)) * unit
                roots += root
                w[d + i * W + lane] = root
            traces = 0.0
            for i in range(n):
                traces += w[s + (i * n + i) * W + lane]
                for j in range(i + 1):
                    traces += w[rows + (i * n + j) * W + lane] * w[rows + (i * n + j) * W + lane]
            if first + lane < count:
                low[first + lane] = not least >= EPS**0.7 * top
                spread[first + lane] = traces - 2.0 * roots
        if not make:
            continue
        for i in range(n):  # y = L^-T v sqrt(s) into s, u = L v / sqrt(s) into b
            _fill(w, b + i * n * W, n, 0.0)
            for j in range(n):
                for lane in range(W):
                    root = np.sqrt(w[d + i * W + lane])
                    x = w[q + (i * n + j) * W + lane]
                    w[s + (i * n + j) * W + lane] = x * root
                    w[q + (i * n + j) * W + lane] = x / root
            _solve_turned(w, rows, s + i * n * W, n, n)
            for j in range(n):
                _add1(w, b + (i * n + j) * W, columns + (j * n + j) * W, n, q + (i * n + j) * W, n, n - j)
        _gram(w, m, s, n, n)
        _store_symmetric(w, m, grad_p, first, n, 1.0, -1.0)
        _gram(w, m, b, n, n)
        _store_symmetric(w, m, grad_q, first, n, 1.0, -1.0)


def w2_rows(lp: Tensor, sq: Tensor, make: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Squared W2 without the means, where an eigenvalue is too small for it, and both gradients (empty unless made)."""
    count, n = sq.shape[:2]
    spread, low = np.empty(count), np.empty(count, np.bool_)
    shape = (count, n, n) if make else (0, 1, 1)
    grads = np.empty(shape), np.empty(shape)
    _w2(_matrices(lp), _matrices(sq), spread, low, *grads, make)
    return torch.from_numpy(spread), torch.from_numpy(low), torch.from_numpy(grads[0]), torch.from_numpy(grads[1])


@_exact
def _asymmetry(s, gap, scale):  # type: ignore[no-untyped-def]
    tile = 16  # rows of both triangles stay in the cache
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
