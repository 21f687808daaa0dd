"""Tables behind 1 - P of the common sector, made once in a process, in about a tenth of a second.

With t = 1/x (or n - 1/x, since the density f_n of the sum of n uniform numbers is symmetric) two formulas serve:

- ``pieces``, for n < SMOOTH_MIN: between whole numbers f_n is a polynomial. With u = t - floor(t) its coefficients of
  u^j (1-u)^(n-1-j) are positive, hence no digit is lost in making and summing them.
- ``rate`` and ``correction``, for SMOOTH_MIN <= n <= SMOOTH_MAX: H = log((n-1)! t^(1-n) f_n(t)) is
  n phi(r) + c(r, 1/n) with r = t/n, phi the large-deviation rate and c a smooth function, c(r, 0) = log(r / sqrt(v))
  with v the variance of the tilted uniform number. phi is computed in decimal arithmetic and its constant terms are
  pairs of numbers that are added, since n multiplies its error. c comes from f_n's recursion in positive terms at a few
  n; both are polynomials in r on intervals of 1/64, and c one in 1/n.

The relative error of 1 - P stays below 3e-14, as found with exact rational numbers (n <= 1000) and 60 digits (beyond).
"""

from __future__ import annotations

import math
from decimal import MAX_EMAX, MIN_EMIN, ROUND_HALF_EVEN, Context, Decimal, localcontext

import numpy as np

from kexue.words._numba import compiled

SMOOTH_MIN, SMOOTH_MAX = 64, 2**15
INTERVALS = 32  # of r, on (0, 1/2); in the first one H is 0 to 1e-24
TERMS = 14  # of a polynomial in r
NODES = np.array([64, 66, 72, 84, 108, 160, 320])  # n of the recursion; about Chebyshev's points in 1/n
RESCALE = 32  # steps of the recursion, each a factor below 2 * 320, that float64 holds
LN2_HIGH, LN2_LOW = 0.6931471803691238, 1.9082149292705877e-10  # the first times an exponent is exact

Tables = tuple[np.ndarray, np.ndarray, np.ndarray]

_njit = compiled(nogil=True, error_model="numpy")


@_njit
def offset(n):  # type: ignore[no-untyped-def]
    """Where the polynomials of n begin in ``pieces``: sum of m (m // 2 + 1) over m < n."""
    squares = (n - 1) * n * (2 * n - 1) // 6
    return (squares - (n // 2) ** 2) // 2 + (n - 1) * n // 2  # the odd m < n sum to (n // 2)^2


@_njit
def _pieces(limit, out):  # type: ignore[no-untyped-def]
    """(n-1)! f_n on [k, k+1) for k <= n/2: (k+u) of piece k and (n-k-u) of piece k-1 of the previous n, added."""
    old, new = np.zeros((limit, limit)), np.zeros((limit, limit))
    old[0, 0] = 1.0
    for n in range(1, limit):
        if n > 1:
            new[:] = 0.0
            for k in range(n):
                for j in range(n - 1):
                    if k < n - 1:
                        new[k, j] += k * old[k, j]
                        new[k, j + 1] += (k + 1) * old[k, j]
                    if k > 0:
                        new[k, j] += (n - k) * old[k - 1, j]
                        new[k, j + 1] += (n - k - 1) * old[k - 1, j]
            old, new = new, old
        start = offset(n)
        for k in range(n // 2 + 1):
            for j in range(n):
                out[start + k * n + j] = old[k, j] if k < n else 0.0


@_njit
def recursion(n, t):  # type: ignore[no-untyped-def]
    """(n-1)! t^(1-n) f_n(t) as mantissa and exponent of 2, 0 < t <= n/2, on the grid t, t-1, ..."""
    last = math.floor(t)
    g, grid = np.zeros(last + 2), t - np.arange(last + 1)
    g[last] = 1.0
    exponent = 0
    for m in range(2, n + 1):
        # Zero where t - j >= m; of no influence on the result where j > n - m.
        begin, end, step = max(0, last - m + 1), min(last, n - m) + 1, float(m)
        for j in range(begin, end):
            g[j] = (grid[j] * g[j] + (step - grid[j]) * g[j + 1]) / t
        if m % RESCALE == 0:
            shift = math.frexp(g.max())[1]
            exponent += shift
            for j in range(last + 1):
                g[j] = math.ldexp(g[j], -shift)
    value, shift = math.frexp(g[0])
    return value, exponent + shift


@_njit
def _corrections(r, rate, rate_low, nodes, out):  # type: ignore[no-untyped-def]
    """H - n phi at r for the n of ``nodes``."""
    for i in range(r.size):
        for k in range(nodes.size):
            n = nodes[k]
            # r is a multiple of 2^-40: n r is exact.
            value, exponent = recursion(n, n * r[i])
            high = n * rate[i]  # so is this: n has 9 bits, rate 42
            out[k, i] = ((exponent * LN2_HIGH - high) + math.log(value)) + (exponent * LN2_LOW - n * rate_low[i])


def _rate(r: float, guess: Decimal) -> tuple[Decimal, float, Decimal]:
    """phi(r), c(r, 0) and the tilt b with 1/b - 1/(e^b - 1) = r, by Newton's method."""
    b, place = guess, Decimal(r)
    for _ in range(50):
        e = (-b).exp()
        slope = 1 / (b * b) - e / (1 - e) ** 2
        step = (1 / b - e / (1 - e) - place) / slope
        if abs(step) < Decimal("1e-17") * b:
            break
        b += step
    return ((1 - e) / (b * place)).ln() + b * place - 1, math.log(place * place / slope) / 2, b


def _polynomial(u: list[Decimal], values: list[Decimal]) -> list[Decimal]:
    """Coefficients of the polynomial through the points, from Newton's divided differences."""
    size, c = len(u), list(values)
    for k in range(1, size):
        for i in range(size - 1, k - 1, -1):
            c[i] = (c[i] - c[i - 1]) / (u[i] - u[i - k])
    for k in range(size - 2, -1, -1):
        for i in range(k, size - 1):
            c[i] -= u[k] * c[i + 1]
    return c


def tables() -> Tables:
    """``pieces``; ``rate``: an interval's constant as a pair, then its terms; ``correction`` (interval, term, n)."""
    pieces = np.empty(offset(SMOOTH_MIN))
    _pieces(SMOOTH_MIN, pieces)
    rate, correction = np.zeros((INTERVALS, 1 + TERMS)), np.zeros((INTERVALS, TERMS, 1 + NODES.size))
    by_n = np.vander(SMOOTH_MIN / np.append(np.inf, NODES), increasing=True)
    chebyshev = np.cos(np.pi * (np.arange(TERMS) + 0.5) / TERMS)
    # Every setting is ours: the caller's rounding, exponents or traps would change the tables, or stop their making.
    own = Context(36, ROUND_HALF_EVEN, MIN_EMIN, MAX_EMAX, clamp=0, traps=[])
    with localcontext(own):
        for interval in range(1, INTERVALS):
            middle = (interval + 0.5) / 64
            places = np.round((middle + chebyshev / 128) * 2.0**40) * 2.0**-40
            local = (places - middle) * 128  # exact, from -1 to 1
            b, phi, values = Decimal(64) / interval, [], np.empty((1 + NODES.size, TERMS))
            for i, r in enumerate(places.tolist()):
                found, values[0, i], b = _rate(r, b)
                phi.append(found)
            terms = _polynomial([Decimal(u) for u in local.tolist()], phi)
            rate[interval] = [float(terms[0]), float(terms[0] - Decimal(float(terms[0]))), *map(float, terms[1:])]
            high = [round(float(v) * 2**42) / 2**42 for v in phi]
            low = [float(v - Decimal(h)) for v, h in zip(phi, high, strict=True)]
            _corrections(places, np.array(high), np.array(low), NODES, values[1:])
            correction[interval] = np.linalg.solve(np.vander(local, increasing=True), np.linalg.solve(by_n, values).T)
    for table in (pieces, rate, correction):
        table.setflags(write=False)
    return pieces, rate, correction
