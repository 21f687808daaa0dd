import warnings

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist

from kexue.stats import sinkhorn, wasserstein
from reference import wasserstein_duality as reference


def clouds(n, m, width=2, seed=0):
    g = np.random.default_rng(seed)
    a, b = g.random(n) + 0.1, g.random(m) + 0.1
    return g.normal(size=(n, width)), g.normal(size=(m, width)) + 0.5, a / a.sum(), b / b.sum()


def expected(x, y, a, b, eps, p):
    return reference.entropic(torch.from_numpy(cdist(x, y) ** p), torch.from_numpy(a), torch.from_numpy(b), eps)


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("eps", [0.4, 1.0, 10.0])
def test_cost_plan_and_divergence_are_those_of_the_formula(eps, p):
    x, y, a, b = clouds(7, 5)
    found = sinkhorn(x, y, eps, p, weights=(a, b), tol=1e-13, max_iter=100_000)
    cost, plan, f, g = expected(x, y, a, b, eps, p)
    assert found.converged
    assert found.cost == pytest.approx(float(cost), abs=1e-10)
    np.testing.assert_allclose(found.plan, plan, atol=1e-10)
    np.testing.assert_allclose(found.f[:, None] + found.g, f[:, None] + g, atol=1e-8)
    own = expected(x, x, a, a, eps, p)[0] / 2 + expected(y, y, b, b, eps, p)[0] / 2
    assert found.divergence == pytest.approx(float(cost - own), abs=1e-10)
    assert sinkhorn(x, y, eps, p, weights=(a, b), debias=False).divergence is None


@pytest.mark.parametrize("eps", [1e-9, 1e-4, 1e-2, 1.0, 1e6])
@pytest.mark.parametrize("updates", [1, 300])
@pytest.mark.parametrize("factor", [1e-8, 1.0, 1e8])
def test_bracket_holds_at_every_eps_converged_or_not(eps, updates, factor):
    x, y, a, b = clouds(30, 20)
    x, y = factor * x, factor * y
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        found = sinkhorn(x, y, eps * factor, weights=(a, b), max_iter=updates)
    exact = wasserstein(x, y, weights=(a, b))
    slack = 1e-12 * factor
    assert np.isfinite([found.cost, found.divergence, found.lower, found.upper]).all()
    assert np.isfinite(found.plan).all()
    assert found.lower - slack <= exact <= found.upper + slack
    np.testing.assert_allclose(found.plan.sum(0), b, atol=1e-9)
    assert abs(found.plan.sum(1) - a).sum() == pytest.approx(found.marginal_error, abs=1e-9)


def test_bracket_closes_as_eps_falls():
    x, y, a, b = clouds(30, 20)
    widths = []
    for eps in (1.0, 0.1, 0.01):
        found = sinkhorn(x, y, eps, weights=(a, b), max_iter=20_000)
        widths.append(found.upper - found.lower)
    assert widths[0] > widths[1] > widths[2]
    assert widths[2] < 0.01


@pytest.mark.parametrize("width", [1, 2])
def test_every_gradient(width):
    x, y, a, b = (torch.from_numpy(v).requires_grad_() for v in clouds(5, 4, width))
    for p, which in ((1, "cost"), (2, "cost"), (1, "divergence"), (2, "divergence")):

        def run(x, y, s, t, p=p, which=which):
            found = sinkhorn(x, y, 0.5, p, weights=(s.softmax(0), t.softmax(0)), tol=1e-13, max_iter=50_000)
            return getattr(found, which)

        assert torch.autograd.gradcheck(run, (x, y, a, b), fast_mode=True)


def test_gradients_equal_those_through_the_formula():
    x, y, a, b = (torch.from_numpy(v) for v in clouds(6, 4))
    costs = torch.cdist(x, y).requires_grad_()
    (expected,) = torch.autograd.grad(reference.entropic(costs, a, b, 0.3, updates=200)[0], costs)
    found = sinkhorn(x, y, 0.3, weights=(a, b), tol=1e-13, max_iter=50_000)
    torch.testing.assert_close(found.plan, expected, atol=1e-8, rtol=0)


def test_divergence_of_equal_clouds_is_0_and_positive_otherwise():
    x, y, a, b = clouds(12, 9)
    assert sinkhorn(x, x, 0.2, weights=(a, a), tol=1e-12, max_iter=50_000).divergence == pytest.approx(0, abs=1e-10)
    assert sinkhorn(x, y, 0.2, weights=(a, b)).divergence > 0.01
    moved = torch.from_numpy(x).requires_grad_()
    sinkhorn(moved, x, 0.2, tol=1e-12, max_iter=50_000).divergence.backward()
    assert float(moved.grad.abs().max()) < 1e-8  # the entropic cost alone would pull the points together


@pytest.mark.parametrize("eps", [1e-9, 1e-3, 0.05, 10.0])
@pytest.mark.parametrize("metric", ["euclidean", "chebyshev"])
def test_divergence_of_a_cloud_in_another_order_is_0(metric, eps):
    x, _, a, _ = clouds(25, 25)
    order = np.random.default_rng(3).permutation(25)
    found = sinkhorn(x, x[order], eps, metric=metric, weights=(a, a[order]), tol=1e-9, max_iter=300)
    assert abs(found.divergence) <= 1e-8
    assert found.converged  # a cold start would take thousands of updates


def test_problem_of_a_cloud_and_itself_has_two_potentials_if_the_cost_is_not_symmetric():
    x, y, a, b = (torch.from_numpy(v) for v in clouds(5, 4))
    metric = lambda u, v: torch.relu((u - v).sum()) + 0.1  # noqa: E731

    def run(points, masses):
        weights = masses.softmax(0), b
        return sinkhorn(points, y, 0.5, metric=metric, weights=weights, tol=1e-12, max_iter=10_000).divergence

    logits = a.log().requires_grad_()
    sets = (x, a, y, b), (x, a, x, a), (y, b, y, b)
    between, *own = (
        float(reference.entropic(torch.tensor([[float(metric(s, t)) for t in v] for s in u]).double(), p, q, 0.5)[0])
        for u, p, v, q in sets
    )
    assert float(run(x, logits).detach()) == pytest.approx(between - sum(own) / 2, abs=1e-7)
    assert torch.autograd.gradcheck(run, (x.clone().requires_grad_(), logits), fast_mode=True)
    assert float(sinkhorn(x, x, 0.5, metric=metric, weights=(a, a)).divergence) == pytest.approx(0, abs=1e-6)


def test_over_relaxation_is_the_best_one_for_the_rate():
    from kexue.stats.sinkhorn import MOST, _relaxation

    for rho in (0.3, 0.9, 0.99):
        best = 2 / (1 + (1 - rho) ** 0.5)
        assert _relaxation(1.0, rho) == pytest.approx(best)
        omega = (1 + best) / 2  # its rate is the root of (rate + omega - 1)^2 = rate omega^2 rho
        half = rho * omega**2 / 2 + 1 - omega
        assert _relaxation(omega, half + (half**2 - (omega - 1) ** 2) ** 0.5) == pytest.approx(best)
    assert _relaxation(1.8, 0.5) == 1.8  # faster than its own limit: the estimate says nothing
    assert _relaxation(1.8, 1.2) == 1.0  # the error grows
    assert _relaxation(1.0, 1 - 1e-12) == MOST


def test_points_without_mass_change_nothing():
    x, y, a, b = clouds(6, 5)
    plain = sinkhorn(x, y, 0.3, weights=(a, b), tol=1e-12, max_iter=50_000)
    more = sinkhorn(
        np.vstack([x, [[9.0, 9.0]]]), np.vstack([[[8.0, 8.0]], y]), 0.3,
        weights=(np.append(a, 0.0), np.append(0.0, b)), tol=1e-12, max_iter=50_000,
    )  # fmt: skip
    for name in ("cost", "divergence", "lower", "upper"):
        assert getattr(more, name) == pytest.approx(getattr(plain, name), abs=1e-9)
    np.testing.assert_allclose(more.plan[:6, 1:], plain.plan, atol=1e-10)
    distances = cdist([[9.0, 9.0]], y)[0]
    assert more.f[6] == pytest.approx(-0.3 * np.log(b @ np.exp((more.g[1:] - distances) / 0.3)))


def test_totals_scale_everything_but_the_potentials():
    x, y, a, b = clouds(6, 5)
    plain, heavy = (sinkhorn(x, y, 0.3, weights=(k * a, k * b)) for k in (1, 7))
    for name in ("cost", "divergence", "lower", "upper"):
        assert getattr(heavy, name) == pytest.approx(7 * getattr(plain, name))
    np.testing.assert_allclose(heavy.plan, 7 * plain.plan)
    np.testing.assert_allclose(heavy.f, plain.f)
    assert sinkhorn(x, y, 0.3, weights=(2 * a, 3 * b), normalize=True).cost == pytest.approx(plain.cost)


def test_single_points_and_constant_costs():
    found = sinkhorn([[0.0, 0.0]], [[3.0, 4.0]])
    assert (found.cost, found.lower, found.upper) == pytest.approx((5.0, 5.0, 5.0))
    assert sinkhorn([1.0, 1.0], [1.0, 1.0]).divergence == pytest.approx(0, abs=1e-12)


def test_stopping_early_warns_with_the_bracket():
    x, y, _, _ = clouds(20, 20)
    with pytest.warns(RuntimeWarning, match="max_iter = 1 .* lies between"):
        found = sinkhorn(x, y, 0.01, max_iter=1)
    assert not found.converged
    assert found.marginal_error > 1e-6


def test_tensors_keep_their_precision():
    x, y, _, _ = clouds(6, 5)
    exact = sinkhorn(x, y, 0.3)
    for dtype in (torch.float32, torch.bfloat16):
        low = torch.from_numpy(x).to(dtype).requires_grad_()
        found = sinkhorn(low, torch.from_numpy(y).to(dtype), 0.3)
        found.divergence.backward()
        assert found.cost.dtype == found.plan.dtype == torch.float32
        assert low.grad.dtype == dtype
        assert float(found.cost.detach()) == pytest.approx(exact.cost, rel=1e-6 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"eps": 0.0}, ValueError, "eps must be greater than 0.0; got 0.0"),
        ({"eps": "small"}, TypeError, "'small'"),
        ({"p": 0.5}, ValueError, "at least 1.0; got 0.5"),
        ({"tol": 0.0}, ValueError, "tol"),
        ({"max_iter": 0}, ValueError, "max_iter"),
        ({"metric": "euclid"}, ValueError, "'euclid'"),
        ({"X": np.zeros((0, 2))}, ValueError, "empty"),
        ({"X": np.full((3, 2), np.nan)}, ValueError, "X must be finite"),
        ({"X": torch.full((3, 2), torch.nan)}, ValueError, "finite"),
        ({"Y": np.zeros((3, 3))}, ValueError, "equal width; got 2 and 3"),
        ({"weights": ([1.0, 1.0, 1.0], None)}, ValueError, "equal totals; got 3 and 1"),
    ],
)
def test_bad_input_is_rejected_with_expected_and_received(change, error, message):
    with pytest.raises(error, match=message):
        sinkhorn(**({"X": np.zeros((3, 2)), "Y": np.ones((4, 2))} | change))
