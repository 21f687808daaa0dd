"""The common sector in exact rational arithmetic, straight from inclusion and exclusion."""

import math
from fractions import Fraction

# pi to 60 digits, so that an angle in radians is an exact fraction of the circle far below float64's rounding.
TAU = 2 * Fraction(314159265358979323846264338327950288419716939937510582097494, 10**59)


def probability(n, a):
    """P(n points lie in a sector of the fraction a of the circle), a rational number in [0, 1]."""
    x = 1 - Fraction(a)
    if n == 1 or x <= 0:
        return Fraction(1)
    total, k = Fraction(0), 1
    while k <= n and k * x < 1:
        total += (-1) ** (k - 1) * math.comb(n, k) * (1 - k * x) ** (n - 1)
        k += 1
    return total


def density(n, a):
    """dP/da, term by term."""
    x = 1 - Fraction(a)
    total, k = Fraction(0), 1
    while k <= n and k * x < 1:
        total += (-1) ** (k - 1) * math.comb(n, k) * (n - 1) * k * (1 - k * x) ** (n - 2)
        k += 1
    return total


def halfspace(n, d):
    """Wendel: P(n points of the ball in d dimensions lie in a common half-space)."""
    return Fraction(sum(math.comb(n - 1, k) for k in range(min(d, n))), 2 ** (n - 1))


def log(value):
    """Natural logarithm of a positive rational number, also where it is no float."""
    shift = value.numerator.bit_length() - value.denominator.bit_length()
    scaled = value / Fraction(2) ** shift
    return math.log(scaled) + shift * math.log(2)


def relative_error(got, exact):
    """|got - exact| / exact without rounding."""
    return float(abs(Fraction(got) - exact) / exact) if exact else abs(float(got))
