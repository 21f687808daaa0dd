"""The distribution of the smallest sector against exact rational numbers."""

import decimal
import itertools
import math
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kexue.stats import _sector_kernel as kernel
from kexue.stats import _sector_table as sector_table
from kexue.stats import common_sector, common_sector_probability, halfspace_probability
from reference import common_sector as reference

TOLERANCE = 1e-13
# Fractions of the circle around every change of formula: a = 1/2, 1/x = n - 1 and n, both sides of the median.
SIZES = (2, 3, 4, 5, 8, 20, 63, 64, 65, 120, 200)


def places(n):
    found = {0.01, 0.3, 0.4999, 0.5, 0.5001, 0.6, 2 / 3, 0.75, 0.9}
    found |= {1 - c / n for c in (1.001, 1.2, 1.7, 2.0, 2.5)} | {
        1 - (math.log(n) + c) / n for c in (-2, -1, 0, 0.4, 2, 5)
    }
    return sorted(a for a in found if 0 < a < 1)


def log_error(got, exact):
    return abs(got - exact) / max(abs(exact), 1e-300)


@pytest.mark.parametrize("n", SIZES)
def test_both_tails_and_the_density_equal_exact_rationals(n):
    d = common_sector(n, period=1)
    for a in places(n):
        p, f = reference.probability(n, a), reference.density(n, a)
        for got, exact in ((d.cdf(a), p), (d.sf(a), 1 - p), (d.pdf(a), f)):
            if exact == 0 or float(exact) > 1e-300:
                assert reference.relative_error(got, exact) < TOLERANCE, (n, a, got)


@pytest.mark.parametrize("a", [0.51, 0.9931, 0.9945, 0.9962, 0.998, 0.9985])
def test_a_thousand_points_keep_13_digits_on_both_tails(a):
    a = float(np.float32(a))  # few digits: faster rational numbers
    d, p = common_sector(1000, period=1), reference.probability(1000, a)
    assert reference.relative_error(d.cdf(a), p) < TOLERANCE
    if float(1 - p) > 1e-300:
        assert reference.relative_error(d.sf(a), 1 - p) < TOLERANCE
    assert log_error(d.logcdf(a) if a < 0.9931 else d.logsf(a), reference.log(p if a < 0.9931 else 1 - p)) < TOLERANCE


def test_the_upper_tail_keeps_its_digits_between_the_nodes_of_the_tables():
    random = np.random.default_rng(0)
    for n in random.integers(64, 260, 60):
        x = np.float32(random.uniform(1.2, math.log(n)) / n)  # few digits: fast rational numbers
        d, q = common_sector(int(n), period=1), 1 - reference.probability(int(n), 1 - float(x))
        if float(q) > 1e-300:
            assert reference.relative_error(d.sf(1 - float(x)), q) < 4e-14
        assert log_error(d.logsf(1 - float(x)), reference.log(q)) < 4e-14


@pytest.mark.parametrize("period", [1.7e308, 1e-300, 3e-308])
def test_circles_of_any_size(period):
    for n in (2, 5, 100):
        d, unit = common_sector(n, period), common_sector(n, 1)
        for a in (0.25, 0.5625, 0.96875):
            for name in ("cdf", "sf", "logcdf", "logsf"):
                assert getattr(d, name)(a * period) == pytest.approx(getattr(unit, name)(a), rel=1e-13, abs=0)
            if period > 1:
                assert d.pdf(a * period) == pytest.approx(unit.pdf(a) / period, rel=1e-13, abs=1e-320)
            assert d.logpdf(a * period) == pytest.approx(unit.logpdf(a) - math.log(period), rel=1e-13)
        assert d.ppf(0.3) == pytest.approx(unit.ppf(0.3) * period, rel=1e-14, abs=0)


@pytest.mark.parametrize("n", [1001, 30000, 10**5, 10**9, 2**53])
@pytest.mark.parametrize("offset", [-3.0, -1.0, 0.0, 0.4, 3.0, 30.0])
def test_many_points_agree_with_the_sum_in_60_digits(n, offset):
    mp = pytest.importorskip("mpmath")
    # Offsets from ln n / n; the exact numbers are those of the rounded a that both sides get.
    a = 1 - (math.log(n) + offset) / n
    d = common_sector(n, period=1)
    with mp.workdps(60):
        x = 1 - mp.mpf(a)
        binomial, p = mp.mpf(1), mp.mpf(0)
        for k in (k for k in range(1, 200) if k * x < 1):
            binomial *= mp.mpf(n - k + 1) / k
            p += (-1) ** (k - 1) * binomial * (1 - k * x) ** (n - 1)
        for got, exact in ((d.cdf(a), p), (d.sf(a), 1 - p), (d.logcdf(a), mp.log(p)), (d.logsf(a), mp.log(1 - p))):
            assert abs(got - exact) <= (4e-14 if n <= 30000 else 1e-10) * abs(exact), (got, exact)


@pytest.mark.parametrize(
    ("n", "theta"),
    [(n, theta) for n in (3, 40) for theta in (0.4, 2.0, math.pi, 4.0, 6.1)] + [(1000, 3.2), (1000, 4.0)],
)
def test_radians_use_the_full_precision_of_pi(n, theta):
    p = reference.probability(n, Fraction(theta) / reference.TAU)
    if float(p) > 1e-300:
        assert reference.relative_error(common_sector_probability(n, theta), p) < TOLERANCE
    if float(1 - p) > 1e-300:
        assert reference.relative_error(common_sector(n).sf(theta), 1 - p) < TOLERANCE


def test_logarithms_reach_beyond_the_range_of_floats():
    d = common_sector(2000, period=1)
    high = Fraction(1, 2000) * Fraction(1001, 1000)
    assert log_error(d.logcdf(0.01), reference.log(reference.probability(2000, 0.01))) < 1e-15
    assert d.cdf(0.01) == 0.0
    a = float(1 - high)
    q = (2000 * (1 - Fraction(a)) - 1) ** 1999  # here 1999 <= 1/x <= 2000
    assert log_error(d.logsf(a), reference.log(q)) < 1e-15
    assert d.sf(a) == 0.0


@pytest.mark.parametrize("n", [64, 90, 300, 800, 4000])
def test_three_formulas_for_the_upper_tail_agree(n):
    _, rate, correction = sector_table.tables()
    for offset in (-2.0, -1.0, 0.0):
        x = (math.log(n) + offset) / n
        th, tl = kernel._quotient(1.0, 0.0, x, 0.0)
        got = kernel._smooth(float(n), x, 0.0, th, tl, False, rate, correction, False)
        mantissa, exponent = sector_table.recursion(n, th)
        # The recursion takes the rounded 1/x; d log Q / d log t is at most that of the tail, about n x e^(-offset).
        slope = n * x * math.exp(-offset)
        assert got == pytest.approx(math.ldexp(mantissa, exponent), rel=4e-14 + 2e-16 * slope, abs=0)
        if n > 64:
            assert got == pytest.approx(math.exp(kernel._contour(float(n), x, 0.0, th, tl, False)), rel=1e-13, abs=0)


def test_the_callers_decimal_settings_do_not_reach_the_tables():
    want = sector_table.tables()
    strict = decimal.Context(3, decimal.ROUND_UP, -5, 20, traps=[decimal.FloatOperation, decimal.Inexact])
    with decimal.localcontext(strict):
        got = sector_table.tables()
    for a, b in zip(got, want, strict=True):
        np.testing.assert_array_equal(a, b)


@given(n=st.integers(2, 10**9), u=st.floats(0.0, 1.0), v=st.floats(0.0, 1.0))
@settings(max_examples=60, deadline=None)
def test_monotone_within_bounds_and_complementary(n, u, v):
    d = common_sector(n, period=1)
    a, b = sorted((1 - (1 - u) * min(1.0, 40.0 / n), 1 - (1 - v) * min(1.0, 40.0 / n)))
    p, q = d.cdf(np.array([a, b])), d.sf(np.array([a, b]))
    assert 0 <= p[0] <= p[1] * (1 + 1e-12) <= 1 + 1e-12
    assert 0 <= q[1] <= q[0] * (1 + 1e-12) <= 1 + 1e-12
    np.testing.assert_allclose(p + q, 1.0, atol=1e-15)
    np.testing.assert_allclose(np.exp(d.logcdf(np.array([a, b]))), p, rtol=1e-11, atol=1e-300)
    np.testing.assert_allclose(np.exp(d.logpdf(np.array([a, b]))), d.pdf(np.array([a, b])), rtol=1e-11, atol=1e-300)


def test_the_pigeonhole_gives_exactly_one_where_the_sum_explodes():
    assert common_sector_probability(200, 359, period=360) == 1.0  # 200 gaps of less than 1.8 degrees are impossible
    assert common_sector(200, period=360).sf(359) == 0.0
    assert common_sector(200, period=360).logsf(359) == -math.inf
    assert common_sector_probability(4, math.pi) == np.nextafter(0.5, 0)  # math.pi is below pi


def test_angles_outside_and_at_the_ends():
    angles = np.array([-np.inf, -1.0, 0.0, math.tau, 7.0, np.inf])
    np.testing.assert_array_equal(common_sector_probability(5, angles), [0, 0, 0, 1, 1, 1])
    np.testing.assert_array_equal(common_sector(5).sf(angles), [1, 1, 1, 0, 0, 0])
    np.testing.assert_array_equal(common_sector(5).pdf(angles), np.zeros(6))
    np.testing.assert_array_equal(common_sector_probability(1, angles), np.ones(6))
    np.testing.assert_array_equal(common_sector(1).cdf(angles), [0, 0, 1, 1, 1, 1])
    assert common_sector(2, period=1).pdf(0.0) == 2.0
    assert common_sector_probability(3, 5e-324) == 0.0


def test_arrays_broadcast_and_scalars_stay_scalars():
    n, theta = np.array([[2], [5]]), np.linspace(0.1, 6, 7)[::2]
    grid = common_sector_probability(n, theta)
    assert grid.shape == (2, 4)
    for i in range(2):
        for j in range(4):
            assert grid[i, j] == common_sector_probability(int(n[i, 0]), float(theta[j]))
    assert isinstance(common_sector_probability(3, 1), float)
    assert common_sector_probability(np.zeros((0, 1), dtype=int), np.ones(3)).shape == (0, 3)
    assert common_sector(3).cdf([]).shape == (0,)


@pytest.mark.parametrize("n", [2, 3, 10, 200, 1000, 10**6])
@pytest.mark.parametrize("q", [1e-250, 1e-9, 0.02, 0.4, 0.5, 0.6, 0.95, 1 - 1e-9])
def test_quantiles_invert_both_tails(n, q):
    d = common_sector(n, period=1)
    low, high = d.support()
    for angle, back, density in ((d.ppf(q), d.cdf, 1), (d.isf(q), d.sf, -1)):
        assert low <= angle <= high
        # What one rounding of the angle changes, on either side.
        near = back(np.array([np.nextafter(angle, -1), angle, np.nextafter(angle, 2)]))[::density]
        assert near[0] * (1 - 1e-11) <= q <= near[2] * (1 + 1e-11), (near, q)


def test_quantiles_at_the_ends():
    d = common_sector(5, period=360)
    np.testing.assert_array_equal(d.ppf([0.0, 1.0]), [0.0, 288.0])
    np.testing.assert_array_equal(d.isf([0.0, 1.0]), [288.0, 0.0])
    np.testing.assert_array_equal(common_sector(1).ppf([0.0, 0.5, 1.0]), np.zeros(3))
    assert d.median() == d.ppf(0.5)
    with pytest.raises(ValueError, match=r"q must lie in \[0, 1\]; got values from -0.1"):
        d.ppf([-0.1, 0.5])
    with pytest.raises(ValueError, match="NaN"):
        d.ppf(math.nan)


@pytest.mark.parametrize("n", [1, 2, 3, 17, 1000, 1001])
def test_moments_equal_exact_harmonic_numbers(n):
    first, second = sum(Fraction(1, k) for k in range(1, n + 1)), sum(Fraction(1, k * k) for k in range(1, n + 1))
    variance = (first**2 + second) / (n * (n + 1)) - (first / n) ** 2
    d = common_sector(n, period=1)
    assert d.mean() == pytest.approx(float(1 - first / n), rel=1e-14)
    assert d.var() == pytest.approx(float(variance), rel=1e-12)
    assert common_sector(n).var() == pytest.approx(float(variance) * math.tau**2, rel=1e-12)
    assert d.std() ** 2 == pytest.approx(d.var(), rel=1e-14)


def test_the_density_integrates_to_the_moments():
    d, (nodes, weights) = common_sector(7, period=1), np.polynomial.legendre.leggauss(20)
    ends = [0.0, *(1 - 1 / k for k in range(2, 8))]  # a polynomial between the kinks
    got = np.zeros(3)
    for left, right in itertools.pairwise(ends):
        a = left + (right - left) * (nodes + 1) / 2
        got += [np.sum(weights * d.pdf(a) * a**k) * (right - left) / 2 for k in range(3)]
    np.testing.assert_allclose(got, [1.0, d.mean(), d.var() + d.mean() ** 2], rtol=1e-13)


@pytest.mark.parametrize("n", [1, 2, 6, 5000])
def test_samples_follow_the_distribution(n):
    from scipy.stats import kstest

    d = common_sector(n)
    x = d.rvs((20, 100), random_state=3)
    np.testing.assert_array_equal(x, d.rvs((20, 100), random_state=np.random.default_rng(3)))
    assert x.shape == (20, 100)
    if n > 1:
        assert kstest(x.ravel(), d.cdf).pvalue > 1e-3
    else:
        assert not x.any()
    assert np.ndim(d.rvs()) == 0
    assert d.rvs(0).shape == (0,)
    assert d.rvs(2, random_state=np.random.RandomState(0)).shape == (2,)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: common_sector_probability(0, 1.0), ValueError, "n must be from 1 to .*; got 0"),
        (lambda: common_sector_probability([3, -2], 1.0), ValueError, "got -2"),
        (lambda: common_sector_probability(2.5, 1.0), TypeError, "n must be an integer .*2.5"),
        (lambda: common_sector_probability(True, 1.0), TypeError, "n must be an integer"),
        (lambda: common_sector_probability(2**60, 1.0), ValueError, "got 1152921504606846976"),
        (lambda: common_sector_probability([2, 10**20], 1.0), ValueError, "got 100000000000000000000"),
        (lambda: common_sector_probability(3, [1.0, math.nan]), ValueError, "theta must not be NaN; got 1 NaN"),
        (lambda: common_sector_probability(3, "1"), TypeError, "theta must be real numbers; got '1'"),
        (lambda: common_sector_probability(3, 1j), TypeError, "theta must be real"),
        (lambda: common_sector_probability(3, 1.0, period=0), ValueError, "period must be greater than 0"),
        (lambda: common_sector_probability(3, 1.0, period=math.inf), ValueError, "period must be finite"),
        (lambda: common_sector_probability([2, 3], [1.0, 2.0, 3.0]), ValueError, "broadcast"),
        (lambda: common_sector(0), ValueError, "n must be at least 1; got 0"),
        (lambda: common_sector(3.0), TypeError, "n must be an integer; got 3.0"),
        (lambda: common_sector(2**54), ValueError, r"2\*\*53"),
        (lambda: common_sector(3).cdf(math.nan), ValueError, "NaN"),
        (lambda: halfspace_probability(0, 2), ValueError, "got 0"),
        (lambda: halfspace_probability(3, 0), ValueError, "d must be from 1 to .*; got 0"),
        (lambda: halfspace_probability(3, 1.5), TypeError, "d must be an integer"),
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_half_spaces_equal_wendel():
    for n in (1, 2, 3, 7, 40, 1000, 1500):
        for d in (1, 2, 3, 20, 700, 2000):
            assert halfspace_probability(n, d) == pytest.approx(float(reference.halfspace(n, d)), rel=1e-12, abs=0)
    np.testing.assert_allclose(
        halfspace_probability(np.arange(2, 30), 2),
        common_sector_probability(np.arange(2, 30), 0.5, period=1),
        rtol=1e-15,
    )
    assert halfspace_probability(10**9, 5 * 10**8) == pytest.approx(0.5, abs=1e-4)
    assert halfspace_probability([[2], [3]], [1, 2, 3]).shape == (2, 3)


def test_repr_shows_the_arguments():
    assert repr(common_sector(5)) == "common_sector(n=5)"
    assert repr(common_sector(5, 360)) == "common_sector(n=5, period=360)"


@pytest.mark.slow
def test_the_room_imports_without_numba():
    code = "import sys, kexue.stats; print('numba' in sys.modules, 'scipy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.split()[0] == "False"
