import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kexue.stats import FrechetAccumulator, frechet_distance
from reference import gaussian_divergences as reference


def features(rows, width=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=g, dtype=torch.float64)
    return torch.randn(rows, width, generator=g, dtype=torch.float64) @ mix + seed


def expected(x, y):
    return reference.w2(x.mean(0), torch.cov(x.T), y.mean(0), torch.cov(y.T))


def accumulated(x):
    out = FrechetAccumulator()
    out.update(x)
    return out


@pytest.mark.parametrize("rows", [(20, 30), (3, 30), (3, 2), (30, 3), (5, 5)])
def test_all_routes_equal_the_covariance_formula(rows):
    x, y = features(rows[0]), features(rows[1], seed=1)
    want = expected(x, y)
    for a in (x, accumulated(x), x.numpy()):
        for b in (y, accumulated(y)):
            torch.testing.assert_close(frechet_distance(a, b), want, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("rows", [(9, 7), (3, 3), (3, 9)])
def test_gradients_reach_the_features(rows):
    x, y = (features(n, seed=i).requires_grad_() for i, n in enumerate(rows))
    assert torch.autograd.gradcheck(frechet_distance, (x, y), atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(frechet_distance(x, y).detach(), frechet_distance(x.detach(), y.detach()))


@settings(deadline=None, max_examples=20)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=6), st.integers(0, 1000))
def test_any_split_and_merge_gives_the_moments_of_all_rows(sizes, seed):
    x = features(sum(sizes) + 2, seed=seed) + 1e6  # a mean far away must not cost precision
    parts = x.split([*sizes, 2])
    one, merged = FrechetAccumulator(), FrechetAccumulator()
    for part in parts:
        one.update(part)
        assert merged.merge(accumulated(part)) is merged
    for acc in (one, merged):
        assert acc.count == len(x)
        g = acc.gaussian()
        torch.testing.assert_close(g.mean, x.mean(0))
        torch.testing.assert_close(g.covariance, torch.cov(x.T), rtol=1e-6, atol=1e-8)


def test_state_round_trip_and_untouched_operands():
    a, b = accumulated(features(9)), accumulated(features(8, seed=1))
    before = float(a.compute(b))
    again = FrechetAccumulator()
    again.load_state_dict(a.state_dict())
    FrechetAccumulator().merge(a).merge(b)
    again.update(features(3))
    assert float(a.compute(b)) == before
    with pytest.raises(ValueError, match="keys"):
        again.load_state_dict({"count": 1})


def test_bad_features_are_rejected_and_change_nothing():
    acc = accumulated(features(5))
    for bad, error in (
        (features(5, 3), ValueError),
        (torch.full((2, 4), torch.nan), ValueError),
        (torch.zeros(2, 4, dtype=torch.long), TypeError),
        ([[1.0] * 4], TypeError),
        (torch.zeros(4), ValueError),
    ):
        with pytest.raises(error):
            acc.update(bad)
    assert acc.count == 5
    with pytest.raises(ValueError, match="width"):
        acc.merge(accumulated(features(5, 3)))
    with pytest.raises(TypeError, match="FrechetAccumulator"):
        acc.merge(features(5))
    with pytest.raises(ValueError, match="2 rows"):
        acc.compute(features(1))
    with pytest.raises(ValueError, match="2 rows"):
        acc.compute(FrechetAccumulator())
    with pytest.raises(ValueError, match="4 and 3"):
        acc.compute(features(9, 3))


def test_the_same_features_are_at_distance_zero_and_low_precision_is_taken():
    x = features(50)
    assert 0 <= frechet_distance(x, x) < 1e-12 * x.square().sum()
    low = x.to(torch.bfloat16)
    torch.testing.assert_close(frechet_distance(low, x), frechet_distance(low.double(), x))
    assert isinstance(frechet_distance(np.asarray(x), x), torch.Tensor)
