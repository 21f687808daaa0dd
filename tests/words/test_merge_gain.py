"""The gain of merging against its definition, on complete tables and in many digits."""

import math
from collections import Counter

import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kexue.words import merge_gain


def exact(p, parts, times, digits=60):
    """F as in the article, term by term, in ``digits`` digits."""
    with mpmath.workdps(digits):
        p, parts = mpmath.mpf(p), [mpmath.mpf(q) for q in parts]

        def plain(x):
            return x * mpmath.log(x) if x > 0 else mpmath.mpf(0)

        z = 1 - (sum(times) - 1) * p
        pieces = [plain(q - m * p) - plain(q) for q, m in zip(parts, times, strict=True)]
        return float(plain(p) - plain(z) + sum(pieces))


def cost(counts, lengths):
    """H / l of a table of counts."""
    total = sum(counts.values())
    entropy = -sum(n / total * math.log(n / total) for n in counts.values() if n)
    return entropy / sum(n / total * lengths[unit] for unit, n in counts.items()), sum(
        n / total * lengths[unit] for unit, n in counts.items()
    )


@st.composite
def tables(draw):
    """Counts and lengths of units, a tuple of them, and how often it occurs."""
    units = draw(st.integers(1, 6))
    counts = {u: draw(st.integers(1, 400)) for u in range(units)}
    lengths = {u: draw(st.integers(1, 5)) for u in range(units)}
    parts = tuple(draw(st.lists(st.integers(0, units - 1), min_size=1, max_size=5)))
    most = min(counts[u] // m for u, m in Counter(parts).items())
    return counts, lengths, parts, draw(st.integers(0, most))


@given(tables())
@settings(max_examples=300, deadline=None)
def test_gain_is_the_fall_of_the_cost_per_character(table):
    counts, lengths, parts, joint = table
    total, times = sum(counts.values()), Counter(parts)
    before, mean = cost(counts, lengths)
    merged = {u: n - times.get(u, 0) * joint for u, n in counts.items()}
    merged["joined"] = joint
    after, _ = cost(merged, {**lengths, "joined": sum(lengths[u] for u in parts)})
    gain = merge_gain(joint / total, [counts[u] / total for u in times], list(times.values()))
    assert gain == pytest.approx(mean * (before - after), abs=1e-12)
    assert (
        gain >= merge_gain(joint / total, [counts[u] / total for u in times], list(times.values()), exact=False) - 1e-15
    )


def test_a_repeated_unit_counts_twice():
    # 哈哈: half of all units are 哈, always in pairs.
    counts, lengths = {"哈": 40, "a": 40}, {"哈": 1, "a": 1}
    before, mean = cost(counts, lengths)
    after, _ = cost({"哈": 0, "a": 40, "哈哈": 20}, {**lengths, "哈哈": 2})
    assert merge_gain(20 / 80, [0.5], [2]) == pytest.approx(mean * (before - after), abs=1e-14)
    assert merge_gain(20 / 80, [0.5, 0.5]) != pytest.approx(mean * (before - after), abs=1e-3)


@given(
    st.lists(st.tuples(st.floats(-9, -0.8), st.integers(1, 3)), min_size=2, max_size=4),
    st.floats(-12, -0.01),
)
@settings(max_examples=300, deadline=None)
def test_tiny_frequencies_keep_their_digits(parts, share):
    p_parts, times = [10.0**a for a, _ in parts], [m for _, m in parts]
    p = min(q / m for q, m in zip(p_parts, times, strict=True)) * 10.0**share
    expected = exact(p, p_parts, times)
    # Where F crosses 0 its logarithm cancels against 1: no formula in doubles can have relative digits there.
    assert merge_gain(p, p_parts, times) == pytest.approx(expected, rel=1e-12, abs=1e-14 * p)


@pytest.mark.parametrize(("p", "parts"), [(1e-12, [1e-6, 3e-3]), (1e-12, [2e-12, 5e-12]), (1e-300, [1e-200, 1e-99])])
def test_a_gain_of_1e_12_is_right_to_twelve_digits(p, parts):
    assert merge_gain(p, parts) == pytest.approx(exact(p, parts, [1, 1], 700), rel=1e-12, abs=0)


@given(st.lists(st.floats(0.01, 1), min_size=2, max_size=5), st.floats(0, 1))
@settings(max_examples=200, deadline=None)
def test_the_exact_gain_is_never_below_the_simple_one(weights, share):
    parts = np.array(weights) / max(1.0, sum(weights))
    p = parts.min() * share
    assert merge_gain(p, parts) >= merge_gain(p, parts, exact=False)


def test_the_next_term_for_two_units():
    p, a, b = 1e-5, 0.01, 0.02
    excess = merge_gain(p, [a, b]) - merge_gain(p, [a, b], exact=False)
    assert excess == pytest.approx((1 / a + 1 / b - 1) * p**2 / 2, rel=1e-3)


def test_values_at_the_borders():
    assert merge_gain(0.0, [0.2, 0.3]) == 0.0
    assert merge_gain(0.0, [0.0, 0.0]) == 0.0
    assert merge_gain(0.0, [0.0], exact=False) == 0.0
    assert merge_gain(0.1, [0.3], [3]) == pytest.approx(exact("0.1", ["0.3"], [3]), rel=1e-12)  # 3 * .1 > .3 in doubles
    assert merge_gain(0.5, [0.5, 0.5]) == pytest.approx(math.log(2), rel=1e-14)  # two units, always in pairs
    assert merge_gain(0.25, [0.25]) == 0.0  # a unit by itself


def test_arrays_broadcast_and_a_scalar_gives_a_float():
    parts = np.array([[0.1, 0.2], [0.3, 0.05]])
    both = merge_gain(0.01, parts)
    assert both.shape == (2,)
    grid = merge_gain(np.array([[0.01], [0.02], [0.0]]), parts, [[1, 2], [2, 1]])
    assert grid.shape == (3, 2)
    assert grid[1, 0] == merge_gain(0.02, [0.1, 0.2], [1, 2])
    assert merge_gain([0.01, 0.02], [0.1, 0.2]).shape == (2,)
    assert merge_gain(np.empty(0), np.empty((0, 2))).shape == (0,)
    assert isinstance(merge_gain(0.01, [0.1, 0.2]), float)
    assert isinstance(merge_gain(np.float32(0.01), (0.1, 0.2), exact=False), float)


@pytest.mark.parametrize(
    ("arguments", "error", "names"),
    [
        ((0.3, [0.2, 0.4]), ValueError, "0.3.*0.2"),
        ((0.15, [0.2], [2]), ValueError, "0.15.*0.2.*2"),
        ((math.nan, [0.2]), ValueError, "nan"),
        ((0.1, [math.nan, 0.2]), ValueError, "nan"),
        ((-0.1, [0.2]), ValueError, "-0.1"),
        ((0.1, [1.2]), ValueError, "1.2"),
        ((math.inf, [0.2]), ValueError, "inf"),
        ((0.1, 0.2), ValueError, "last axis"),
        ((0.1, []), ValueError, "at least one part"),
        ((0.1, [0.2], [0]), ValueError, "at least 1; got 0"),
        ((0.1, [0.2], [1.0]), TypeError, "integers"),
        ((0.1, [0.2], [True]), TypeError, "integers"),
        (("0.1", [0.2]), TypeError, "real numbers"),
        ((0.1, ["a"]), TypeError, "real numbers"),
        (([0.1, 0.1], [[0.2], [0.2], [0.2]]), ValueError, "broadcast"),
        ((0.1, [[0.2], [0.2, 0.3]]), ValueError, "rectangular"),
        ((0.9, [0.9, 0.9, 0.9]), ValueError, "sum to more than 1"),
        ((0.1, [0.2], None, 1), TypeError, "exact"),
    ],
)
def test_impossible_frequencies_are_refused(arguments, error, names):
    with pytest.raises(error, match=names):
        merge_gain(*arguments)
