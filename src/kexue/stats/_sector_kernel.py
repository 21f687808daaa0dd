"""Compiled evaluation of the common sector's distribution: four formulas, each where it loses no digits.

With a = theta / period and x = 1 - a, P = P(all n points in the sector) and Q = 1 - P:

- ``_series``: P as the alternating sum, where lambda = n a^(n-1) < 0.7 (its condition number is at most e^lambda);
- elsewhere Q = (n-1)! x^(n-1) f_n(1/x) with the density f_n of the sum of n uniform numbers: for n < 64 ``_piece``, its
  polynomials with positive coefficients; to n = 2^15 ``_smooth``, an interpolated large-deviation expansion (both from
  ``_sector_table.py``);
- ``_contour``: beyond, the same f_n from its moment generating function on the vertical line through the saddle.
  Its exponent n (ln(nx) - 1 + K(-b) + b/(nx)) is a difference of large numbers; with eps = b / (e^b - 1) it equals
  n (log1p(-e^-b) - log1p(-eps) - eps), which has full relative precision also for n = 1e9.

A power n - 1 multiplies the rounding error of its base by n - 1. All bases are therefore pairs (high, low) of numbers
that are added ("double-double"), which is why these kernels must be compiled without fast-math.
"""

from __future__ import annotations

import math

from kexue.stats._sector_table import SMOOTH_MAX, SMOOTH_MIN, offset
from kexue.words._numba import compiled

SERIES_BELOW = 0.7
SPLIT = 134217729.0  # 2^27 + 1 (Dekker)
LN2 = math.log(2.0)
HALF_LOG_2PI = 0.5 * math.log(2.0 * math.pi)

# What evaluate() computes.
CDF, SF, LOGCDF, LOGSF, PDF, LOGPDF = range(6)

_njit = compiled(nogil=True, error_model="numpy")
_expansion = compiled(nogil=True, error_model="numpy", fastmath={"contract"})  # fused multiply-adds: no pairs here


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
    first, shift = h**half, m * (low / h)
    return first * (1.0 + shift if abs(shift) < 1e-9 else math.exp(shift)), first if m == 2.0 * half else first * h


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
def _series(n, ah, al, xh, logs):  # type: ignore[no-untyped-def]
    """P, or with ``logs`` log P, by the alternating sum, relative to its first term n a^(n-1)."""
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
    if logs:
        return math.log(n) + (n - 1.0) * _log(ah, al) + math.log1p(total)
    first, second = _power(ah, al, n - 1.0)
    return n * first * second * (1.0 + total)


@_njit
def _piece(n, xh, xl, th, tl, pieces, logs):  # type: ignore[no-untyped-def]
    """Q or log Q for n < SMOOTH_MIN: the polynomial of u = t - floor(t), 0 < t <= n/2 is 1/x or n - 1/x."""
    k = math.floor(th)
    start = offset(n) + k * n
    u, rest = (th - k) + tl, (1.0 - (th - k)) - tl
    value = 0.0
    if u <= 0.5:
        v = u / rest
        for j in range(start + n - 1, start - 1, -1):
            value = value * v + pieces[j]
        bh, bl = _sum(1.0, k - th)
        bl -= tl
    else:
        v = rest / u
        for j in range(start, start + n):
            value = value * v + pieces[j]
        bh, bl = th - k, tl
    ph, pl = _product(bh, xh)
    pl += bh * xl + bl * xh
    if logs:
        return math.log(value) + (n - 1.0) * _log(ph, pl)
    first, second = _power(ph, pl, n - 1.0)
    return value * first * second


@_expansion
def _polynomials(u, w, rate, correction):  # type: ignore[no-untyped-def]
    """The interval's rate without its constant, and the correction, at u and w = SMOOTH_MIN / n."""
    last = correction.shape[0] - 1
    phi, shift = rate[last + 1], 0.0
    for i in range(last, -1, -1):
        inner = correction[i, -1]
        for k in range(correction.shape[1] - 2, -1, -1):
            inner = inner * w + correction[i, k]
        shift = shift * u + inner
        if i > 0 and i < last:
            phi = phi * u + rate[i + 1]
    return phi * u, shift


@_njit
def _smooth(n, xh, xl, th, tl, reflected, rate, correction, logs):  # type: ignore[no-untyped-def]
    """Q or log Q for SMOOTH_MIN <= n <= SMOOTH_MAX by the tables of r = t / n."""
    rh, rl = _quotient(th, tl, n, 0.0)
    interval = min(int(64.0 * rh), rate.shape[0] - 1)
    u = 128.0 * ((rh - (interval + 0.5) / 64.0) + rl)
    phi, shift = _polynomials(u, SMOOTH_MIN / n, rate[interval], correction[interval])
    high, low = _product(n, rate[interval, 0])
    low += n * (rate[interval, 1] + phi) + shift
    if logs:
        log = high + low
        if reflected:
            ph, pl = _product(th, xh)  # (t x)^(n-1), t x = n x - 1
            log += (n - 1.0) * _log(ph, pl + th * xl + tl * xh)
        return log
    high, low = _sum(high, low)
    value = math.exp(high) * (1.0 + low)
    if reflected:
        ph, pl = _product(th, xh)
        first, second = _power(ph, pl + th * xl + tl * xh, n - 1.0)
        value = value * first * second
    return value


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
    step = 0.7 / math.sqrt(n * slope)  # the sum of a normal density is exact to 1e-17 up to there
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
def _tail(n, ah, al, xh, xl, tables, log_p, log_q):  # type: ignore[no-untyped-def]
    """(True, P) where that is the smaller one or easy, else (False, Q); as logarithms if wanted; n >= 2, 0 < a < 1."""
    pieces, rate, correction = tables
    size = float(n)
    wh, wl = _product(size, xh)
    wh, wl = _sum(wh, wl + size * xl)
    uh, ul = _sum(wh, -1.0)
    uh, ul = _sum(uh, ul + wl)  # n x - 1
    if uh <= 0.0:  # one of n gaps is at least 1/n
        return False, -math.inf if log_q else 0.0
    if math.log(size) + (size - 1.0) * math.log(ah) < math.log(SERIES_BELOW):
        return True, _series(size, ah, al, xh, log_p)
    if uh <= xh:  # n - 1 <= 1/x <= n
        if log_q:
            return False, (size - 1.0) * _log(uh, ul)
        first, second = _power(uh, ul, size - 1.0)
        return False, first * second
    reflected = wh < 2.0  # f_n(t) = f_n(n - t): the shorter side
    if reflected:
        th, tl = _quotient(uh, ul, xh, xl)
    else:
        th, tl = _quotient(1.0, 0.0, xh, xl)
    if n < SMOOTH_MIN:
        return False, _piece(n, xh, xl, th, tl, pieces, log_q)
    if n <= SMOOTH_MAX:
        return False, _smooth(size, xh, xl, th, tl, reflected, rate, correction, log_q)
    log = _contour(size, xh, xl, th, tl, reflected)
    return False, log if log_q else math.exp(log)


@_njit
def _density(n, ah, al, xh, xl, tables, logs):  # type: ignore[no-untyped-def]
    """dP/da or its logarithm: n (n-1) a^(n-2) Q_(n-1)(x/a)."""
    size = float(n)
    covered = 0.0 if logs else 1.0
    yh, yl = _quotient(xh, xl, ah, al)
    if n == 1 or (n == 2 and yh < 1.0):
        return -math.inf if logs else 0.0
    if yh < 1.0:
        bh, bl = _sum(1.0, -yh)
        bh, bl = _sum(bh, bl - yl)
        if bh > 0.0:
            is_p, covered = _tail(n - 1, bh, bl, yh, yl, tables, False, logs)
            if is_p:
                covered = math.log1p(-covered) if logs else 1.0 - covered
    if logs:
        return covered + math.log(size) + math.log(size - 1.0) + (size - 2.0) * _log(ah, al)
    first, second = _power(ah, al, size - 2.0)
    return size * (size - 1.0) * first * covered * second


@_njit
def evaluate(n, theta, ph, pl, scale, kind, tables, out):  # type: ignore[no-untyped-def]
    """Fill ``out`` with what ``kind`` says for each theta and its n or the only n; period = (ph + pl) scale^2."""
    logs = kind in (LOGCDF, LOGSF, LOGPDF)
    count = n[0] if n.size else 1
    for i in range(out.size):
        if n.size > 1:
            count = n[i]
        angle = max(theta[i] / scale / scale, 0.0)
        is_p, value = True, 0.0
        if angle < ph:
            ah, al, xh, xl = _fractions(angle, ph, pl)
        if kind >= PDF:
            if angle < ph and ah > 0.0:
                value = _density(count, ah, al, xh, xl, tables, logs)
            elif theta[i] == 0.0 and count == 2:
                value = LN2 if logs else 2.0
            elif logs:
                value = -math.inf
            out[i] = value - math.log(ph) - 2.0 * math.log(scale) if logs else value / ph / scale / scale
            continue
        if angle >= ph or (count == 1 and theta[i] >= 0.0):
            is_p = False
            value = -math.inf if kind == LOGSF else 0.0
        elif ah > 0.0:
            is_p, value = _tail(count, ah, al, xh, xl, tables, kind == LOGCDF, kind == LOGSF)
        elif kind == LOGCDF:
            value = -math.inf
        if is_p != (kind in (CDF, LOGCDF)):
            value = math.log1p(-value) if logs else 1.0 - value
        out[i] = value


@_njit
def _gap(n, want, is_p, tables):  # type: ignore[no-untyped-def]
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
        found_p, log = _tail(n, ah, al, x, 0.0, tables, is_p, not is_p)
        slope = _density(n, ah, al, x, 0.0, tables, True)
        if found_p != is_p:
            log = math.log1p(-log)
        error = log - want
        if error == 0.0:
            break
        if (error > 0.0) == is_p:
            low = x
        else:
            high = x
        move = error * math.exp(log - slope)
        new = x + move if is_p else x - move
        if not low < new < high:  # also where a tail has underflown
            new = 0.5 * (low + high)
        if abs(new - x) <= 2e-16 * x or new in (low, high):
            x = new
            break
        x = new
    return x


@_njit
def quantile(n, q, ph, pl, scale, upper, tables, out):  # type: ignore[no-untyped-def]
    """Fill ``out`` with theta at which P (``upper`` False) or Q (True) is ``q``, 0 <= q <= 1."""
    size = float(n)
    for i in range(out.size):
        zero, one = (q[i] == 1.0, q[i] == 0.0) if upper else (q[i] == 0.0, q[i] == 1.0)
        if n == 1 or zero:
            out[i] = 0.0
            continue
        if one:
            out[i] = (ph - ph / size) * scale * scale
            continue
        is_p = (q[i] < 0.5) != upper
        want = math.log(q[i])
        if q[i] >= 0.5:
            is_p = upper
            want = math.log1p(-q[i])
        log_p = want if is_p else math.log(-math.expm1(want))
        log_a = (log_p - math.log(size)) / (size - 1.0)
        if log_a <= -LN2:  # a <= 1/2: one term
            angle = ph * math.exp(log_a)
        elif n == 2:
            angle = 0.5 * ph
        else:
            angle = (ph - ph * _gap(n, want, is_p, tables)) + pl
        out[i] = angle * scale * scale
