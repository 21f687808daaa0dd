import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Beta, Categorical, Independent, Normal, Uniform

from kexue.generation import AliasTable, ImportanceSampler, RejectionSampler, Target, inverse_transform
from reference import search_sampling as reference

WEIGHTS = np.array([1.0, 0.0, 4.0, 2.0, 0.5])


class Texts:
    """Uniform texts of one or two tokens out of three, as a proposal."""

    states = reference.texts(3, [1, 2])

    def sample(self, shape):
        return [self.states[i] for i in torch.randint(len(self.states), shape).tolist()]

    def log_prob(self, x):
        return [-math.log(len(self.states))] * len(x)


def categorical_target(x):
    return torch.from_numpy(np.log(WEIGHTS, where=WEIGHTS > 0, out=np.full(5, -np.inf)))[x]


# Rejection


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_rejection_has_the_law_of_the_target_and_any_larger_bound_only_wastes_draws(scale):
    q, n = Categorical(torch.ones(5) / 5), 20000
    sampler = RejectionSampler(categorical_target, q, log_m=math.log(4 * 5 * scale))
    x = sampler.sample(n, seed=0)
    pi = WEIGHTS / WEIGHTS.sum()
    found = torch.bincount(x, minlength=5).numpy() / n
    assert np.abs(found - pi).max() < 5 * math.sqrt(0.25 / n)
    assert found[1] == 0
    wanted = WEIGHTS.sum() / (20 * scale)  # Z / M
    assert sampler.acceptance == pytest.approx(wanted, rel=0.05)
    assert sampler.draws == round(n / sampler.acceptance)


def test_rejection_on_the_line():
    x = RejectionSampler(lambda x: Beta(2.0, 3.0).log_prob(x), Uniform(0.0, 1.0), math.log(1.78)).sample(20000, seed=1)
    assert float(x.mean()) == pytest.approx(0.4, abs=0.01)
    assert float(x.var()) == pytest.approx(0.04, abs=0.002)


def test_rejection_of_texts_with_a_target():
    target = Target(lambda texts: [-float(len(text)) for text in texts], constraint=lambda ids: 1 in ids)
    sampler = RejectionSampler(target, Texts(), log_m=math.log(12.0) - 1)
    states = [state for state in Texts.states if 1 in state]
    pi = reference.law([-float(len(state)) for state in states])
    assert reference.total_variation(sampler.sample(20000, seed=0), states, pi) < 0.02


def test_too_small_bound_raises_or_is_raised():
    q = Categorical(torch.ones(5) / 5)
    with pytest.raises(ValueError, match="exceeds M"):
        RejectionSampler(categorical_target, q, log_m=0.0).sample(100, seed=0)
    sampler = RejectionSampler(categorical_target, q, log_m=0.0, adaptive=True)
    x = sampler.sample(20000, seed=0)
    assert sampler.log_m == pytest.approx(math.log(20))
    assert np.abs(torch.bincount(x, minlength=5).numpy() / 20000 - WEIGHTS / 7.5).max() < 0.02


def test_the_batch_that_raises_the_bound_is_thrown_away():
    q = Categorical(torch.tensor([0.999, 0.001], dtype=torch.float64))
    law = torch.tensor([0.9, 0.1], dtype=torch.float64)
    drawn = []
    for seed in range(400):
        sampler = RejectionSampler(lambda x: law[x].log(), q, log_m=0.0, adaptive=True, batch_size=500)
        x = sampler.sample(5, seed=seed)
        if sampler.log_m > 0:  # the rare draw was met
            drawn.append(x)
    assert len(drawn) > 100
    assert abs(float(torch.cat(drawn).double().mean()) - 0.1) < 0.04


def test_bound_that_is_met_exactly_in_float32_is_valid():
    target = Normal(0.0, 1.0)
    RejectionSampler(lambda x: target.log_prob(x) + 0.3, target, log_m=0.3).sample(50000, seed=0)


def test_hopeless_acceptance_ends_with_its_number():
    q = Categorical(torch.ones(5) / 5)
    with pytest.raises(RuntimeError, match="0 of 3 accepted after 8192 draws"):
        RejectionSampler(categorical_target, q, log_m=60.0, max_draws=5000).sample(3, seed=0)


def test_seed_decides_and_leaves_the_global_generator_alone():
    sampler = RejectionSampler(categorical_target, Categorical(torch.ones(5)), log_m=3.0)
    torch.manual_seed(5)
    before = torch.rand(1)
    torch.manual_seed(5)
    first = sampler.sample(50, seed=3)
    assert torch.equal(torch.rand(1), before)
    assert torch.equal(sampler.sample(50, seed=3), first)
    assert not torch.equal(sampler.sample(50, seed=4), first)
    assert len(sampler.sample(0)) == 0


# Importance


def test_importance_is_the_expectation_and_ess_its_formula():
    q = Normal(0.5, 2.0)
    sampler = ImportanceSampler(lambda x: -((x - 1) ** 2) / 2, q, batch_size=1000)
    value, ess = sampler.estimate(lambda x: torch.stack([x, x * x], -1), n=20000, seed=0)
    torch.testing.assert_close(value, torch.tensor([1.0, 2.0], dtype=torch.float64), atol=0.05, rtol=0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        x = torch.cat([q.sample((1000,)) for _ in range(20)]).double()
    w = torch.exp(-((x - 1) ** 2) / 2 - q.log_prob(x))
    assert ess == pytest.approx(float(w.sum() ** 2 / (w * w).sum()), rel=1e-4)
    assert float(value[0]) == pytest.approx(float((w * x).sum() / w.sum()), rel=1e-5)
    assert sampler.log_normalizer(20000, seed=0) == pytest.approx(math.log(math.sqrt(2 * math.pi)), abs=0.02)


@pytest.mark.parametrize("shift", [-2000.0, 2000.0])
def test_importance_never_overflows(shift):
    sampler = ImportanceSampler(lambda x: categorical_target(x) + shift, Categorical(torch.ones(5)))
    value, ess = sampler.estimate(lambda x: x == 2, n=20000, seed=0)
    assert isinstance(value, float)
    assert value == pytest.approx(4 / 7.5, abs=0.02)
    assert 1 < ess < 20000


def test_draws_without_weight_cannot_spoil_the_estimate():
    sampler = ImportanceSampler(categorical_target, Categorical(torch.ones(5)))
    value, _ = sampler.estimate(lambda x: torch.where(x == 1, math.nan, 1.0), n=2000, seed=0)
    assert value == pytest.approx(1.0)


def test_few_effective_draws_warn_with_the_number():
    sampler = ImportanceSampler(lambda x: -((x - 8) ** 2) * 20, Normal(0.0, 1.0))
    with pytest.warns(RuntimeWarning, match=r"5000 weighted draws are worth \d+\.\d"):
        _, ess = sampler.estimate(lambda x: x, n=5000, seed=0)
    assert ess < 50


def test_supports_that_do_not_meet():
    with pytest.raises(ValueError, match="rho is 0 at all of the 100"):
        ImportanceSampler(lambda x: x * 0 - math.inf, Normal(0.0, 1.0)).estimate(lambda x: x, n=100)


BAD = [
    (lambda: RejectionSampler(3, Normal(0.0, 1.0), 0.0), TypeError),
    (lambda: RejectionSampler(len, 3, 0.0), TypeError),
    (lambda: RejectionSampler(len, Normal(0.0, 1.0), -math.inf), ValueError),
    (lambda: RejectionSampler(len, Normal(0.0, 1.0), math.nan), ValueError),
    (lambda: RejectionSampler(len, Normal(0.0, 1.0), "1"), TypeError),
    (lambda: RejectionSampler(len, Normal(0.0, 1.0), 0.0, batch_size=0), ValueError),
    (lambda: RejectionSampler(lambda x: x, Normal(0.0, 1.0), 9.0).sample(-1), ValueError),
    (lambda: RejectionSampler(lambda x: x * math.nan, Normal(0.0, 1.0), 9.0).sample(1), ValueError),
    (lambda: RejectionSampler(lambda x: x + math.inf, Normal(0.0, 1.0), 9.0).sample(1), ValueError),
    (lambda: RejectionSampler(lambda x: 0.0, Normal(0.0, 1.0), 9.0).sample(1), ValueError),
    (lambda: RejectionSampler(lambda x: x.sum(-1), Normal(torch.zeros(2), 1.0), 9.0).sample(1), ValueError),
    (lambda: ImportanceSampler(3, Normal(0.0, 1.0)), TypeError),
    (lambda: ImportanceSampler(lambda x: x, Normal(0.0, 1.0)).estimate(3), TypeError),
    (lambda: ImportanceSampler(lambda x: x, Normal(0.0, 1.0)).estimate(lambda x: x, n=0), ValueError),
    (lambda: ImportanceSampler(lambda x: x, Normal(0.0, 1.0)).estimate(lambda x: 1.0, n=10), ValueError),
    (lambda: ImportanceSampler(lambda x: x, Normal(0.0, 1.0)).estimate(lambda x: x[:3], n=10), ValueError),
    (lambda: AliasTable([]), ValueError),
    (lambda: AliasTable([0.0, 0.0]), ValueError),
    (lambda: AliasTable([1.0, -1.0]), ValueError),
    (lambda: AliasTable([1.0, math.nan]), ValueError),
    (lambda: AliasTable([[1.0]]), ValueError),
    (lambda: AliasTable([-math.inf], log=True), ValueError),
    (lambda: AliasTable([1.0]).log_prob(torch.tensor([1])), ValueError),
    (lambda: AliasTable([1.0]).sample((-1,)), ValueError),
    (lambda: inverse_transform([1.0, -1.0], 3), ValueError),
    (lambda: inverse_transform([1.0, 1.0], 3, grid=[1.0, 0.0]), ValueError),
    (lambda: inverse_transform([1.0, 1.0, 1.0], 3, grid=[0.0, 1.0]), ValueError),
    (lambda: inverse_transform(lambda u: 1.0, 3), ValueError),
    (lambda: inverse_transform([1.0], 1.5), TypeError),
]


@pytest.mark.parametrize(("build", "error"), BAD)
def test_bad_arguments(build, error):
    with pytest.raises(error):
        build()


def test_events_of_several_dimensions():
    q = Independent(Normal(torch.zeros(2), torch.ones(2)), 1)
    x = RejectionSampler(lambda x: -(x * x).sum(-1), q, log_m=2.0).sample(5000, seed=0)
    assert x.shape == (5000, 2)
    assert float(x.var()) == pytest.approx(0.5, abs=0.05)


# Inverse transform and alias table


@given(st.lists(st.sampled_from([0.0, 1e-300, 1e-5, 0.3, 1.0, 7.0, 1e300]), min_size=1, max_size=40).filter(any))
@settings(deadline=None, max_examples=60)
def test_alias_table_holds_exactly_the_weights(weights):
    table = AliasTable(weights)
    count = len(weights)
    mass = np.zeros(count)
    for cell in range(count):
        mass[cell] += table._keep[cell] / count
        mass[table._alias[cell]] += (1 - table._keep[cell]) / count
    p = np.array(weights) / max(weights)
    p /= p.sum()
    np.testing.assert_allclose(mass, p, atol=1e-12)
    assert (mass[p == 0] == 0).all()
    np.testing.assert_allclose(table.log_prob(torch.arange(count)).exp(), p, atol=1e-15)


@pytest.mark.parametrize("log", [False, True])
def test_categories_by_inverse_transform_and_alias_table(log):
    weights = np.log(WEIGHTS, where=WEIGHTS > 0, out=np.full(5, -np.inf)) - 1000 if log else WEIGHTS.astype(np.float32)
    for x in (
        inverse_transform(weights, (100, 300), log=log),
        AliasTable(weights, log=log).sample((100, 300), torch.Generator().manual_seed(0)).numpy(),
    ):
        assert x.shape == (100, 300)
        assert x.dtype == np.int64
        assert np.abs(np.bincount(x.ravel(), minlength=5) / 30000 - WEIGHTS / 7.5).max() < 5 * math.sqrt(0.25 / 30000)
    assert AliasTable([2.0]).sample().shape == ()


class Top:
    """A generator at the largest number below 1."""

    def random(self, shape):
        return np.full(shape, np.nextafter(1, 0))


def test_weights_whose_sum_overflows():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert AliasTable([1e308, 1e308]).probs.tolist() == [0.5, 0.5]


def test_weight_zero_is_never_drawn_not_even_by_rounding(monkeypatch):
    monkeypatch.setattr(np.random, "default_rng", lambda seed: Top())
    assert inverse_transform([0.1] * 10 + [0.0], 1)[0] == 9
    assert inverse_transform([1.0, 1.0], 1, grid=[0.0, 1.0])[0] <= 1


def test_line_by_quantile_and_by_density_on_a_grid():
    x = inverse_transform(lambda u: np.tan(np.pi * (u - 0.5)), 20001, seed=1)
    assert abs(np.median(x)) < 0.05
    grid = np.array([-1.0, 0.0, 2.0, 3.0])
    density = np.array([0.0, 2.0, 1.0, 1.0])
    y = inverse_transform(density, 40000, grid=grid, seed=2)
    edges = np.linspace(-1, 3, 33)
    fine = np.interp(np.linspace(-1, 3, 32 * 1000 + 1), grid, density)
    mass = np.add.reduceat(fine[:-1], np.arange(0, 32000, 1000))
    found = np.histogram(y, edges)[0] / 40000
    assert np.abs(found - mass / mass.sum()).max() < 0.01
    z = inverse_transform(lambda x: -(x**2) / 2, 40000, grid=np.linspace(-8, 8, 4001), log=True, seed=3)
    assert float(np.std(z)) == pytest.approx(1, abs=0.02)
    np.testing.assert_array_equal(
        z, inverse_transform(lambda x: -(x**2) / 2, 40000, grid=np.linspace(-8, 8, 4001), log=True, seed=3)
    )
