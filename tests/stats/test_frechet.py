import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kexue.stats import FrechetAccumulator, Gaussian, frechet_distance, w2
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


def test_states_are_copies_and_are_checked():
    x = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
    acc = FrechetAccumulator(x)
    state = acc.state_dict()
    acc.update(x + 1)
    other = FrechetAccumulator()
    other.load_state_dict(state)
    assert other.count == 20
    torch.testing.assert_close(other.compute(x), torch.zeros((), dtype=torch.float64), rtol=0, atol=1e-12)
    other.load_state_dict(FrechetAccumulator().state_dict())
    assert other.count == 0
    bad = [
        {"count": 20},
        state | {"moment": torch.zeros(2, 2)},
        state | {"count": 0},
        state | {"mean": torch.zeros(1, 3)},
    ]
    for broken in bad:
        with pytest.raises(ValueError, match="state must have"):
            acc.load_state_dict(broken)
    with pytest.raises(TypeError, match="moment"):
        acc.load_state_dict(state | {"moment": None})
    assert acc.count == 40


def test_streams_of_low_rank_are_exact_and_large_ones_agree():
    g = torch.Generator().manual_seed(0)
    x, y = (torch.randn(n, 12, generator=g).double() for n in (4, 5))
    torch.testing.assert_close(
        FrechetAccumulator(x).compute(FrechetAccumulator(y)), frechet_distance(x, y), rtol=1e-12, atol=0
    )
    a, b = (torch.randn(200, 140, generator=g).double() for _ in range(2))
    direct = w2(Gaussian(a.mean(0), torch.cov(a.T)), Gaussian(b.mean(0), torch.cov(b.T)))
    torch.testing.assert_close(frechet_distance(a, b), direct, rtol=1e-10, atol=0)
