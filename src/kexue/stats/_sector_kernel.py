"""Compiled evaluation of the common sector's distribution: three formulas, each where it loses no digits.

With a = theta / period and x = 1 - a, P = P(all n points in the sector) and Q = 1 - P:

- ``_series``: P as the alternating sum, where lambda = n a^(n-1) < 0.7 (its condition number is at most e^lambda);
- ``_recursion``: Q = (n-1)! x^(n-1) f_n(1/x) with the density f_n of the sum of n uniform numbers, by its recursion in
  positive terms, for n < 64 and, up to n = 1000, where Q is tiny;
- ``_contour``: the same f_n otherwise, from its moment generating function on the vertical line through the saddle.
  Its exponent n (ln(nx) - 1 + K(-b) + b/(nx)) is a difference of large numbers; with eps = b / (e^b - 1) it equals
  n (log1p(-e^-b) - log1p(-eps) - eps), which has full relative precision also for n = 1e9.

A power n - 1 multiplies the rounding error of its base by n - 1. All bases are therefore pairs (high, low) of numbers
that are added ("double-double"), which is why these kernels must be compiled without fast-math.
"""

from __future__ import annotations

import math

import numpy as np

from kexue.words._numba import compiled

CONTOUR_MIN, RECURSION_MAX = 64, 1000
CONTOUR_LOG = -25.0  # the relative error of the contour's Q grows with |log Q|; below, the recursion where it can
SERIES_BELOW = 0.7
RESCALE = 32  # steps of the recursion, each a factor of at most 2 * RECURSION_MAX, that float64 holds
SPLIT = 134217729.0  # 2^27 + 1 (Dekker)
LN2 = math.log(2.0)
HALF_LOG_2PI = 0.5 * math.log(2.0 * math.pi)

# What evaluate() computes.
CDF, SF, LOGCDF, LOGSF, PDF, LOGPDF = range(6)

_njit = compiled(nogil=True, error_model="numpy")


@_njit
def _product(a, b):  # type: ignore[no-untyped-def]
    """Product of two numbers as a pair."""
    p = a * b
    c = SPLIT * a
    a1 = c - (c - a)
    c = SPLIT * b
    b1 = c - (c - b)
    a2, b2 = a - a1, b - b1
    return p, ((a1 * b1 - p) + a1 * b2 + a2 * b1) + a2 * b2


@_njit
def _sum(a, b):  # type: ignore[no-untyped-def]
    """Sum of two numbers as a pair."""
    s = a + b
    v = s - a
    return s, (a - (s - v)) + (b - v)


@_njit
def _quotient(ah, al, bh, bl):  # type: ignore[no-untyped-def]
    """The pair a divided by the pair b."""
    q = ah / bh
    p, e = _product(q, bh)
    low = ((ah - p) - e + al - q * bl) / bh
    return _sum(q, low)


@_njit
def _power(h, low, m):  # type: ignore[no-untyped-def]
    """(h + low)^m for m >= 0, in two factors whose product may underflow where neither does."""
    if h <= 0.0:
        return (1.0, 1.0) if m == 0 else (0.0, 1.0)
    half = float(math.floor(0.5 * m))  # a float: numba would raise to an integer power by repeated multiplication
    return h**half * math.exp(m * (low / h)), h ** (m - half)


@_njit
def _log(h, low):  # type: ignore[no-untyped-def]
    return math.log(h) + low / h if h > 0.0 else -math.inf


@_njit
def _fractions(theta, ph, pl):  # type: ignore[no-untyped-def]
    """The pairs a = theta / period and x = 1 - a; 0 < theta < period."""
    ah, al = _quotient(theta, 0.0, ph, pl)
    d, e = _sum(ph, -theta)
    d, e = _sum(d, e + pl)
    xh, xl = _quotient(d, e, ph, pl)
    return ah, al, xh, xl


@_njit
def _series(n, ah, al, xh):  # type: ignore[no-untyped-def]
    """P and log P by the alternating sum, relative to its first term n a^(n-1)."""
    total, term, k = 0.0, 1.0, 2.0
    while k <= n:
        y = xh / (1.0 - (k - 1.0) * xh)  # (1 - kx) / (1 - (k-1)x) = 1 - y
        if not 0.0 < y < 1.0:
            break
        term *= -(n - k + 1.0) / k * math.exp((n - 1.0) * math.log1p(-y))
        total += term
        if abs(term) < 1e-18:
            break
        k += 1.0
    first, second = _power(ah, al, n - 1.0)
    return n * first * second * (1.0 + total), math.log(n) + (n - 1.0) * _log(ah, al) + math.log1p(total)


@_njit
def _recursion(n, xh, xl, th, tl, scratch):  # type: ignore[no-untyped-def]
    """Q and log Q by the recursion of (m-1)! f_m on the grid t, t-1, ..., where 0 < t <= n/2 is 1/x or n - 1/x."""
    last = math.floor(th)
    g, grid = scratch[0, : last + 2], scratch[1, : last + 1]
    g[:] = 0.0
    g[last] = 1.0
    for j in range(last + 1):
        grid[j] = th - j
    exponent, below, here = 0, 0.0, 0.0
    for m in range(2, n + 1):
        if m == n:
            here, below = g[0], g[1]  # f_(n-1) at t and t - 1: the derivative of f_n
        # Zero where t - j >= m; of no influence on the result where j > n - m.
        begin, end, step = max(0, last - m + 1), min(last, n - m) + 1, float(m)
        t, v = grid[begin:end], g[begin : end + 1]  # views with indices from 0, which the compiler can vectorise
        for j in range(t.size):
            v[j] = t[j] * v[j] + (step - t[j]) * v[j + 1]
        if m % RESCALE == 0 and m < n:
            shift = math.frexp(g[: last + 1].max())[1]
            exponent += shift
            for j in range(last + 1):
                g[j] = math.ldexp(g[j], -shift)
    value = g[0] + tl * (n - 1.0) * (here - below)
    scale = math.frexp(xh)[1]  # powers of 2 apart, so that x^(n-1) neither overflows nor underflows
    first, second = _power(math.ldexp(xh, -scale), math.ldexp(xl, -scale), n - 1.0)
    value, up = math.frexp(value)
    first, more = math.frexp(first)
    value *= first * second
    exponent += up + more + scale * (n - 1)
    value, up = math.frexp(value)
    exponent += up
    return math.ldexp(value, max(exponent, -2000)), math.log(value) + exponent * LN2


@_njit
def _saddle(r):  # type: ignore[no-untyped-def]
    """The b >= 0 with 1/b - 1/(e^b - 1) = r, 0 < r <= 1/2, and minus the slope there.

    The left side is convex with slope -1/12 at 0, so that Newton's method rises from the tangent's root to b.
    """
    b = max(12.0 * (0.5 - r), 1e-6)
    slope = 1.0 / 12.0
    for _ in range(100):
        if b < 0.02:
            mean = 0.5 - b / 12.0 + b**3 / 720.0 - b**5 / 30240.0
            slope = 1.0 / 12.0 - b * b / 240.0 + b**4 / 6048.0
        else:
            e = math.exp(-b)
            mean = 1.0 / b - e / (1.0 - e)
            slope = 1.0 / (b * b) - e / (1.0 - e) ** 2
        step = (mean - r) / slope
        b = max(b + step, 1e-6)
        if abs(step) <= 4e-16 * b:
            break
    return b, slope


@_njit
def _contour(n, xh, xl, th, tl, reflected):  # type: ignore[no-untyped-def]
    """The logarithm of Q for large n: a trapezoidal sum along the line through the saddle point."""
    lh, ll = _quotient(n, 0.0, th, tl)
    b, slope = _saddle(th / n)
    # The line need not go through the saddle exactly; at b = 0 the formulas below would be 0 / 0.
    b = max(b, min(0.05, 1.0 / math.sqrt(n)))
    q, rest = math.exp(-b), -math.expm1(-b)
    if b < 1.0:
        eps = 1.0 - b / lh
        rate = math.log(rest / b) + math.log(lh) - eps
    else:
        eps = b * q / rest
        rate = math.log1p(-q) - math.log1p(-eps) - eps
    spread = 4.0 * q / rest**2
    step = 0.5 / math.sqrt(n * slope)  # 0.7 would do for a normal density, but not for n = 65
    total = 0.5
    for k in range(1, 4000):
        tau = k * step
        square = math.sin(0.5 * tau) ** 2
        size = math.log1p(spread * square) - math.log1p((tau / b) ** 2)
        phase = math.atan(tau / b) - math.atan2(q * math.sin(tau), rest + 2.0 * q * square) - tau * (th / n)
        magnitude = math.exp(0.5 * n * size)
        total += magnitude * math.cos(n * phase)
        if magnitude < 1e-17:
            break
    w = 1.0 / (n * n)
    stirling = (1.0 / 12.0 - w * (1.0 / 360.0 - w * (1.0 / 1260.0 - w / 1680.0))) / n
    out = n * rate + n * eps * (ll / lh) + stirling
    out += math.log(math.sqrt(2.0 * n / math.pi) * step * total / lh)  # sqrt(2 pi n) / (pi L)
    if reflected:
        ph, pl = _product(th, xh)  # (t x)^(n-1), t x = n x - 1
        out += (n - 1.0) * _log(ph, pl + th * xl + tl * xh)
    return out


@_njit
def _tail(n, ah, al, xh, xl, scratch):  # type: ignore[no-untyped-def]
    """(is_p, value, log value): P where it is the smaller one or easy, else Q; n >= 2, 0 < a < 1."""
    size = float(n)
    wh, wl = _product(size, xh)
    wh, wl = _sum(wh, wl + size * xl)
    uh, ul = _sum(wh, -1.0)
    uh, ul = _sum(uh, ul + wl)  # n x - 1
    if uh <= 0.0:  # one of n gaps is at least 1/n
        return False, 0.0, -math.inf
    if math.log(size) + (size - 1.0) * math.log(ah) < math.log(SERIES_BELOW):
        value, log = _series(size, ah, al, xh)
        return True, value, log
    if uh <= xh:  # n - 1 <= 1/x <= n
        first, second = _power(uh, ul, size - 1.0)
        return False, first * second, (size - 1.0) * _log(uh, ul)
    sh, sl = _quotient(1.0, 0.0, xh, xl)
    reflected = 2.0 * sh > size  # f_n(t) = f_n(n - t): the shorter side
    if reflected:
        sh, sl = _quotient(uh, ul, xh, xl)
    if n >= CONTOUR_MIN:
        log = _contour(size, xh, xl, sh, sl, reflected)
        if log > CONTOUR_LOG or n > RECURSION_MAX:
            return False, math.exp(log), log
    value, log = _recursion(n, xh, xl, sh, sl, scratch)
    return False, value, log


@_njit
def _density(n, ah, al, xh, xl, scratch):  # type: ignore[no-untyped-def]
    """dP/da and its logarithm: n (n-1) a^(n-2) Q_(n-1)(x/a)."""
    if n == 1:
        return 0.0, -math.inf
    size = float(n)
    covered, log = 1.0, 0.0
    yh, yl = _quotient(xh, xl, ah, al)
    if yh < 1.0:
        if n == 2:
            return 0.0, -math.inf
        bh, bl = _sum(1.0, -yh)
        bh, bl = _sum(bh, bl - yl)
        if bh > 0.0:
            is_p, covered, log = _tail(n - 1, bh, bl, yh, yl, scratch)
            if is_p:
                covered, log = 1.0 - covered, math.log1p(-covered)
    first, second = _power(ah, al, size - 2.0)
    log += math.log(size) + math.log(size - 1.0) + (size - 2.0) * _log(ah, al)
    return size * (size - 1.0) * first * covered * second, log


@_njit
def evaluate(n, theta, ph, pl, kind, out):  # type: ignore[no-untyped-def]
    """Fill ``out`` with what ``kind`` says for each pair of ``n`` and ``theta``; the period is ph + pl."""
    scratch = np.empty((2, RECURSION_MAX // 2 + 4))
    for i in range(out.size):
        if kind >= PDF:
            value, log = 0.0, -math.inf
            if theta[i] == 0.0 and n[i] == 2:
                value, log = 2.0, LN2
            elif 0.0 < theta[i] < ph:
                ah, al, xh, xl = _fractions(theta[i], ph, pl)
                value, log = _density(n[i], ah, al, xh, xl, scratch)
            out[i] = value / ph if kind == PDF else log - math.log(ph)
            continue
        is_p, value, log = True, 0.0, -math.inf
        if theta[i] >= ph or (n[i] == 1 and theta[i] >= 0.0):
            is_p = False
        elif theta[i] > 0.0:
            ah, al, xh, xl = _fractions(theta[i], ph, pl)
            if ah > 0.0:
                is_p, value, log = _tail(n[i], ah, al, xh, xl, scratch)
        if kind in (CDF, SF):
            out[i] = value if is_p == (kind == CDF) else 1.0 - value
        else:
            out[i] = log if is_p == (kind == LOGCDF) else math.log1p(-value)


@_njit
def _gap(n, want, is_p, scratch):  # type: ignore[no-untyped-def]
    """The x with log P (is_p) or log Q equal to ``want``, by Newton's method between bounds; n >= 3."""
    size = float(n)
    # P <= n a^(n-1) and P(x = 1/n) = 1.
    low = 1.0 / size
    high = -math.expm1((want - math.log(size)) / (size - 1.0)) if is_p else 1.0
    high = max(high, low)
    # Near its lower end log Q is (n-1) log(nx - 1), else log(-log Q) is about ln n - n x.
    if is_p:
        x = high
    else:
        near = (1.0 + math.exp(want / (size - 1.0))) / size
        x = min(max((math.log(size) - math.log(-want)) / size, near), 0.5 * (near + 1.0))
        low = max(low, near) if near < 1.0 else low  # Q <= (nx-1)^(n-1)
    x = min(max(x, low), high)
    for _ in range(200):
        ah, al = _sum(1.0, -x)
        found_p, value, log = _tail(n, ah, al, x, 0.0, scratch)
        slope, _log_slope = _density(n, ah, al, x, 0.0, scratch)
        if found_p != is_p:
            value, log = 1.0 - value, math.log1p(-value)
        error = log - want
        if error == 0.0:
            break
        if (error > 0.0) == is_p:
            low = x
        else:
            high = x
        move = error * value / slope if is_p else -error * value / slope
        new = x + move
        if not low < new < high:  # also where a tail has underflown
            new = 0.5 * (low + high)
        if abs(new - x) <= 2e-16 * x or new in (low, high):
            x = new
            break
        x = new
    return x


@_njit
def quantile(n, q, ph, pl, upper, out):  # type: ignore[no-untyped-def]
    """Fill ``out`` with theta at which P (``upper`` False) or Q (True) is ``q``, 0 <= q <= 1."""
    scratch = np.empty((2, RECURSION_MAX // 2 + 4))
    for i in range(out.size):
        size = float(n[i])
        zero, one = (q[i] == 1.0, q[i] == 0.0) if upper else (q[i] == 0.0, q[i] == 1.0)
        if n[i] == 1 or zero:
            out[i] = 0.0
            continue
        if one:
            out[i] = ph - ph / size
            continue
        is_p = (q[i] < 0.5) != upper
        want = math.log(q[i])
        if q[i] >= 0.5:
            is_p = upper
            want = math.log1p(-q[i])
        log_p = want if is_p else math.log(-math.expm1(want))
        log_a = (log_p - math.log(size)) / (size - 1.0)
        if log_a <= -LN2:  # a <= 1/2: one term
            out[i] = ph * math.exp(log_a)
        elif n[i] == 2:
            out[i] = 0.5 * ph
        else:
            x = _gap(n[i], want, is_p, scratch)
            out[i] = (ph - ph * x) + pl
