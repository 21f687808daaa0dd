import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kexue.training import lr_factor


@given(st.integers(1, 200), st.data(), st.sampled_from(["constant", "linear", "cosine"]))
def test_factor_rises_to_one_and_then_never_rises_or_vanishes(steps, data, schedule):
    warmup = data.draw(st.integers(0, steps))
    factors = [lr_factor(step, steps, warmup=warmup, schedule=schedule) for step in range(steps)]
    assert max(factors) == 1.0
    assert min(factors) > 0.0
    assert factors[:warmup] == sorted(factors[:warmup])
    assert factors[warmup:] == sorted(factors[warmup:], reverse=True)


def test_shapes_of_the_schedules():
    half = {name: lr_factor(60, 110, warmup=10, schedule=name) for name in ("constant", "linear", "cosine")}
    quarter = lr_factor(35, 110, warmup=10, schedule="cosine")
    assert half["constant"] == 1.0
    assert half["linear"] == pytest.approx(0.5)
    assert half["cosine"] == pytest.approx(0.5)
    assert quarter == pytest.approx((1 + math.sqrt(0.5)) / 2)
    assert lr_factor(4, 110, warmup=10) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("step", "steps", "options", "message"),
    [
        (0, 0, {}, "steps must be at least 1"),
        (5, 5, {}, "step must be below steps = 5; got 5"),
        (0, 5, {"warmup": 6}, "warmup must be at most steps = 5; got 6"),
        (0, 5, {"schedule": "step"}, "schedule must be one of 'constant', 'linear', 'cosine'; got 'step'"),
    ],
)
def test_bad_schedules_are_named(step, steps, options, message):
    with pytest.raises(ValueError, match=message):
        lr_factor(step, steps, **options)
