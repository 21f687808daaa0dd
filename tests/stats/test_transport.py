import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kexue.stats import certificate, farkas, transport
from reference import wasserstein_duality as reference


def problem(n, m, seed=0, zeros=False):
    g = np.random.default_rng(seed)
    costs, p, q = g.random((n, m)), g.random(n), g.random(m)
    if zeros:
        p[g.random(n) < 0.3], q[g.random(m) < 0.3] = 0.0, 0.0
        p[0], q[-1] = 0.5, 0.5
    return costs, p / p.sum(), q / q.sum()


def check(found, costs, p, q, tolerance=1e-10):
    """Plan, potentials and gap prove each other."""
    scale = max(1.0, float(abs(costs).max()))
    assert found.status == "optimal"
    assert found.plan.min() >= 0
    np.testing.assert_allclose(found.plan.sum(1), p, atol=1e-12)
    np.testing.assert_allclose(found.plan.sum(0), q, atol=1e-12)
    assert (found.f[:, None] + found.g - costs).max() <= 1e-12 * scale
    assert 0 <= found.gap <= tolerance * scale
    assert found.cost == pytest.approx((found.plan * costs).sum(), abs=1e-12 * scale)
    assert p @ found.f + q @ found.g == pytest.approx(found.cost, abs=tolerance * scale)
    assert abs(found.f.mean()) <= 1e-12 * scale


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 9), st.integers(1, 9), st.integers(0, 10**6), st.sampled_from(["plain", "ties", "signs", "zeros"])
)
def test_cost_and_potentials_are_those_of_the_linear_programme(n, m, seed, kind):
    costs, p, q = problem(n, m, seed, zeros=kind == "zeros")
    if kind == "ties":
        costs = np.floor(3 * costs)
    elif kind == "signs":
        costs = costs - 5
    found = transport(costs, p, q)
    check(found, costs, p, q)
    assert found.cost == pytest.approx(reference.primal(costs, p, q)[0], abs=1e-9)
    assert found.cost == pytest.approx(reference.dual(costs, p, q)[0], abs=1e-9)


def test_plan_is_the_unique_optimum():
    costs, p, q = problem(7, 5, seed=3)
    np.testing.assert_allclose(transport(costs, p, q).plan, reference.primal(costs, p, q)[1], atol=1e-9)


@pytest.mark.parametrize("n", [2, 31, 33, 48, 100])
@pytest.mark.parametrize("kind", ["plain", "ties", "constant", "spread", "signs"])
def test_assignment_is_exact(n, kind):
    from scipy.optimize import linear_sum_assignment

    g = np.random.default_rng(n)
    costs = {
        "plain": g.random((n, n)),
        "ties": g.integers(0, 4, (n, n)).astype(float),
        "constant": np.full((n, n), 2.0),
        "spread": np.exp(6 * g.standard_normal((n, n))),
        "signs": g.standard_normal((n, n)),
    }[kind]
    found = transport(costs)
    check(found, costs, np.full(n, 1 / n), np.full(n, 1 / n), 1e-12)
    rows, columns = linear_sum_assignment(costs)
    assert found.cost == pytest.approx(costs[rows, columns].mean(), abs=1e-13 * max(1.0, abs(costs).max()))
    assert (found.plan > 0).sum() == n  # a permutation


def test_auction_that_is_cut_short_still_ends_in_the_optimum():
    from scipy.optimize import linear_sum_assignment

    from kexue.stats._assignment import assign

    costs = np.random.default_rng(0).random((60, 60))
    rows, columns = linear_sum_assignment(costs)
    for smallest in (1.0, 0.1, 1e-6):  # no auction at all, a coarse one, a fine one
        column, v = assign(costs, 1.0, 5.0, smallest, 3600)
        assert sorted(column) == list(range(60))
        assert costs[np.arange(60), column].sum() == pytest.approx(costs[rows, columns].sum(), abs=1e-12)
        assert ((costs - v).min(1).sum() + v.sum()) == pytest.approx(costs[rows, columns].sum(), abs=1e-12)


@pytest.mark.parametrize("kind", ["ties", "spread"])
def test_many_equal_masses_that_an_auction_cannot_match_are_left_to_the_simplex(kind, monkeypatch):
    from scipy.optimize import linear_sum_assignment

    from kexue.stats._assignment import assign

    g = np.random.default_rng(0)
    costs = g.integers(0, 3, (200, 200)).astype(float) if kind == "ties" else np.exp(8 * g.normal(size=(200, 200)))
    assert (assign(costs, 1.0, 5.0, 5e-4, 8000)[0] < 0).any()  # shortest paths would take n^3 steps
    best = costs[linear_sum_assignment(costs)].mean()
    found = transport(costs)
    assert found.status == "optimal"
    assert found.cost == pytest.approx(best, rel=1e-12)
    module = sys.modules["kexue.stats.transport"]
    monkeypatch.setattr(module, "_is_optimal", lambda *_: False)  # where the simplex proves nothing, paths finish
    assert transport(costs).cost == pytest.approx(best, rel=1e-12)


@pytest.mark.parametrize("factor", [1e-300, 1e-12, 1e12, 1e300])
@pytest.mark.parametrize("n", [6, 40])
def test_unit_of_the_costs_does_not_matter(factor, n):
    costs, p, q = problem(n, 6 if n == 6 else 40, seed=1)
    if n == 40:
        p = q = None
    plain, scaled = transport(costs, p, q), transport(factor * costs, p, q)
    assert scaled.cost / factor == pytest.approx(plain.cost, rel=1e-12)
    np.testing.assert_allclose(scaled.plan, plain.plan, atol=1e-12)
    assert scaled.gap <= 1e-12 * factor


@pytest.mark.parametrize("kind", ["outliers", "spread", "needed"])
def test_costs_of_very_different_size_are_solved_exactly(kind):
    g = np.random.default_rng(0)
    costs, p, q = problem(50, 50)
    if kind == "outliers":
        costs = np.where(np.eye(50) > 0, 1e12, costs)
    elif kind == "spread":
        costs = np.exp(6 * g.standard_normal((50, 50)))
    else:  # one column can only be reached at a high price
        costs[:, 0] = 1e5
    found = transport(costs, p, q)
    assert found.status == "optimal"
    assert found.gap <= 1e-9 * max(1.0, found.cost)
    assert p @ found.f + q @ found.g == pytest.approx(found.cost, rel=1e-8)


@pytest.mark.parametrize("total", [1e-12, 5.0, 1e12])
def test_unit_of_the_masses_does_not_matter(total):
    costs, p, q = problem(5, 8)
    plain, scaled = transport(costs, p, q), transport(costs, total * p, total * q)
    assert scaled.cost / total == pytest.approx(plain.cost, rel=1e-12)
    np.testing.assert_allclose(scaled.plan / total, plain.plan, atol=1e-12)
    np.testing.assert_allclose(scaled.f, plain.f, atol=1e-12)
    assert transport(costs, 3 * p, 7 * q, normalize=True).cost == pytest.approx(plain.cost, rel=1e-12)


def test_points_without_mass_get_feasible_potentials():
    costs, p, q = problem(12, 9, seed=5, zeros=True)
    found = transport(costs, p, q)
    assert (p == 0).any()
    assert (q == 0).any()
    assert not found.plan[p == 0].any()
    assert not found.plan[:, q == 0].any()
    check(found, costs, p, q)
    more = p.copy()  # the potential is the price of mass there: a little of it changes the cost accordingly
    more[p == 0] += 1e-6
    other = transport(costs, more, q * more.sum(), normalize=False)
    change = 1e-6 * found.f[p == 0].sum() + (more.sum() - 1) * (q @ found.g)
    assert other.cost - found.cost == pytest.approx(change, rel=1e-3)


def test_gradients_are_plan_and_potentials():
    costs, p, q = (torch.from_numpy(x).requires_grad_() for x in problem(6, 4, seed=2))
    found = transport(costs, p, q)
    found.cost.backward()
    torch.testing.assert_close(costs.grad, found.plan)
    torch.testing.assert_close(p.grad, found.f)
    torch.testing.assert_close(q.grad, found.g)
    _, f, g = reference.dual(*(x.detach().numpy() for x in (costs, p, q)))
    torch.testing.assert_close(p.grad - p.grad[0], torch.from_numpy(f - f[0]))
    torch.testing.assert_close(q.grad - q.grad[0], torch.from_numpy(g - g[0]))
    logits = [torch.randn(k, dtype=torch.float64, requires_grad=True) for k in (6, 4)]
    assert torch.autograd.gradcheck(
        lambda c, s, t: transport(c, s.softmax(0), t.softmax(0)).cost, (costs.detach().requires_grad_(), *logits)
    )
    raw = [torch.rand(k, dtype=torch.float64, requires_grad=True) for k in (6, 4)]
    assert torch.autograd.gradcheck(lambda s, t: transport(costs.detach(), s, t, normalize=True).cost, raw)


def test_tensors_keep_their_precision_and_stay_as_they_were():
    costs = torch.rand(40, 40, generator=torch.Generator().manual_seed(0))
    wide = transport(costs.double())
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        low = costs.detach().to(dtype, copy=True).requires_grad_()
        before = low.detach().clone()
        found = transport(low)
        found.cost.backward()
        assert found.cost.dtype == found.plan.dtype == found.f.dtype == torch.float32
        assert low.grad.dtype == dtype
        assert torch.equal(low, before)
        exact = transport(low.detach().double())
        torch.testing.assert_close(found.cost.double(), exact.cost, rtol=1e-6, atol=0)
    assert wide.cost.dtype == torch.float64
    assert float(wide.gap) <= 1e-12
    turned = transport(costs.double().T.contiguous().T)
    torch.testing.assert_close(turned.cost, wide.cost)
    weights = torch.softmax(torch.randn(40, generator=torch.Generator().manual_seed(1)), 0)
    assert transport(costs, weights, torch.full((40,), 1 / 40)).status == "optimal"  # totals of float32


def test_a_solver_that_stops_early_says_so_with_the_gap():
    costs, p, q = problem(60, 70)
    with pytest.warns(RuntimeWarning, match="max_iter = 20 .* too high"):
        found = transport(costs, p, q, max_iter=20)
    best = transport(costs, p, q)
    assert found.status == "inexact"
    np.testing.assert_allclose(found.plan.sum(1), p, atol=1e-12)
    np.testing.assert_allclose(found.plan.sum(0), q, atol=1e-12)
    assert 0 < found.cost - best.cost <= found.gap


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([[1.0, np.nan]],), ValueError, r"C must be finite; got nan at \(0, 1\)"),
        (([[1.0, np.inf]],), ValueError, "got inf"),
        ((np.zeros((0, 3)),), ValueError, r"empty; got shape \(0, 3\)"),
        ((np.zeros(3),), ValueError, r"2 dimensions; got shape \(3,\)"),
        (("costs",), TypeError, "real numbers"),
        ((np.ones((2, 2)) * 1j,), TypeError, "complex128"),
        ((torch.ones(2, 2, dtype=torch.complex64),), TypeError, "complex64"),
        ((torch.ones(2),), ValueError, r"2 dimensions; got shape \(2,\)"),
        ((torch.ones(0, 2),), ValueError, "empty"),
        (([[1.0, 2.0]], [1.0, 1.0]), ValueError, r"p must have shape \(1,\); got \(2,\)"),
        (([[1.0, 2.0]], [1.0], [1.5, -0.5]), ValueError, "q must be non-negative; got -0.5 at 1"),
        (([[1.0, 2.0]], [1.0], [0.5, 0.6]), ValueError, "equal totals; got 1 and 1.1"),
        (([[1.0, 2.0]], [1.0], [0.5, 0.5 + 1e-6]), ValueError, "equal totals"),
        (([[1.0, 2.0]], [0.0], [0.0, 0.0]), ValueError, "positive finite total; got 0"),
        (([[1.0, 2.0]], [np.nan], None), ValueError, "p must be finite"),
        (([[-1.7e308, 1.7e308]],), ValueError, "span"),
    ],
)
def test_bad_input_is_rejected_with_expected_and_received(arguments, error, message):
    with pytest.raises(error, match=message):
        transport(*arguments)


def test_bad_steps_are_rejected():
    with pytest.raises(ValueError, match="at least 1; got 0"):
        transport([[1.0]], max_iter=0)


def test_certificate_bounds_the_optimum_for_any_potentials():
    costs, p, q = problem(8, 6, seed=7)
    best = transport(costs, p, q)
    g = np.random.default_rng(1)
    for f in (best.f, best.f + g.normal(size=8), np.zeros(8), 1e6 * g.normal(size=8)):
        found = certificate(costs, best.plan, f, best.g, p, q)
        assert (found.f[:, None] + found.g - costs).max() <= 1e-9
        assert found.dual <= best.cost + 1e-9
        assert found.gap >= -1e-9
        assert found.primal == pytest.approx(best.cost)
        assert found.feasible == (f is best.f)
    assert certificate(costs, best.plan, best.f, best.g, p, q).gap <= 1e-12
    assert certificate(torch.from_numpy(costs), torch.from_numpy(best.plan), best.f, best.g, p, q).gap <= 1e-12


def test_certificate_measures_what_is_wrong_with_a_plan():
    costs, p, q = problem(5, 4)
    best = transport(costs, p, q)
    halved = certificate(costs, best.plan / 2, best.f, best.g, p, q)
    assert halved.marginal_error == pytest.approx(1.0)  # half of the mass is missing, in rows and in columns
    assert not halved.feasible
    negative = best.plan.copy()
    negative[:2, :2] += [[0.3, -0.3], [-0.3, 0.3]]
    assert not certificate(costs, negative, best.f, best.g, p, q).feasible
    product = certificate(costs, np.outer(p, q), best.f, best.g, p, q)
    assert product.feasible
    assert product.gap == pytest.approx(p @ costs @ q - best.cost)
    for bad, message in (
        ((best.plan[:2], best.f, best.g), "shape of C"),
        ((best.plan, best.g, best.f), r"\(5,\) and \(4,\)"),
        ((best.plan, best.f * np.nan, best.g), "f must be finite"),
    ):
        with pytest.raises(ValueError, match=message):
            certificate(costs, *bad, p, q)


@pytest.mark.parametrize("kind", ["optimal", "dense", "raw"])
@pytest.mark.parametrize("zeros", [False, True])
def test_compiled_passes_over_large_costs_give_the_same_certificate(monkeypatch, kind, zeros):
    import sys

    costs, p, q = problem(70, 83, zeros=zeros)
    best = transport(costs, p, q)
    plan = np.outer(p, q) if kind == "dense" else best.plan
    f = np.random.default_rng(1).normal(size=70) if kind == "raw" else best.f
    small = certificate(costs, plan, f, best.g, p, q)
    monkeypatch.setattr(sys.modules["kexue.stats.certificate"], "LARGE", 0)
    large = certificate(costs, plan, f, best.g, p, q)
    assert large.feasible == small.feasible == (kind != "raw")
    for name in ("primal", "dual", "gap", "marginal_error"):
        assert getattr(large, name) == pytest.approx(getattr(small, name), abs=1e-13)
    np.testing.assert_allclose(large.f, small.f, atol=1e-13)
    np.testing.assert_array_equal(large.g, small.g)
    for name, broken in (("C", (costs, plan)), ("plan", (costs, plan))):
        bad = [x.copy() for x in broken]
        bad[name == "plan"][3, 80] = np.inf
        with pytest.raises(ValueError, match=rf"{name} must be finite; got inf at \(3, 80\)"):
            certificate(*bad, f, best.g, p, q)


@pytest.mark.parametrize("size", [1e-20, 1.0, 1e20])
@pytest.mark.parametrize("far", [1e-20, 1.0, 1e20, 1e40])
def test_certificate_is_a_bound_for_potentials_of_any_size(size, far):
    costs, p, q = problem(8, 6, seed=4, zeros=True)
    best = transport(size * costs, p, q)
    f = far * np.random.default_rng(2).normal(size=8)
    for potentials in (f, f + 5 * far, np.full(8, far)):
        found = certificate(size * costs, best.plan, potentials, best.g, p, q)
        assert (found.f[:, None] + found.g - size * costs).max() <= 1e-13 * size
        assert found.dual <= best.cost * (1 + 1e-12)
        assert found.gap >= 0
    assert certificate(size * costs, best.plan, best.f, best.g, p, q).gap >= 0  # not below by rounding
    widest = np.where(f > 0, 1.79e308, -1.79e308)  # their difference is beyond float64: no warning, and still a bound
    assert certificate(size * costs, best.plan, widest, best.g, p, q).dual <= best.cost * (1 + 1e-12)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 5), st.integers(1, 7), st.integers(0, 10**6))
def test_farkas_finds_exactly_one_of_the_two(m, n, seed):
    g = np.random.default_rng(seed)
    A = g.normal(size=(m, n))
    solvable = farkas(A, A @ g.random(n))
    assert solvable.y is None
    assert solvable.x.min() >= 0
    found = farkas(A, g.normal(size=m))
    assert (found.x is None) != (found.y is None)
    if found.y is not None:
        assert (A.T @ found.y).max() <= 1e-6
        assert abs(found.y).max() <= 1 + 1e-12


def test_farkas_separates_and_rejects_bad_input():
    found = farkas([[1.0, 2.0], [0.0, 1.0]], [1.0, -1.0])  # the second unknown would have to be -1
    assert found.x is None
    assert (np.array([[1.0, 2.0], [0.0, 1.0]]).T @ found.y).max() <= 1e-12
    assert found.y @ [1.0, -1.0] > 0
    np.testing.assert_allclose(farkas([[1e9, 0.0], [0.0, 1e-9]], [1e9, 1e-9]).x, [1.0, 1.0])
    np.testing.assert_allclose(farkas([[1e-30]], [1e30]).x, [1e60])
    np.testing.assert_allclose(farkas([[1e30]], [1e-30]).x, [1e-60])
    assert farkas([[1e-30, 2.0]], [-1e-30]).x is None
    assert farkas(np.zeros((2, 3)), [0.0, 1.0]).x is None
    np.testing.assert_array_equal(farkas(np.zeros((2, 3)), [0.0, 0.0]).x, np.zeros(3))
    with pytest.raises(ValueError, match=r"\(2,\); got \(3,\)"):
        farkas(np.eye(2), np.ones(3))
    with pytest.raises(ValueError, match="finite"):
        farkas([[np.nan]], [1.0])


def test_certificate_ignores_the_potentials_of_points_without_mass():
    import ot

    costs, p, q = problem(12, 9, seed=5, zeros=True)
    plan, log = ot.emd(p, q, costs, log=True, center_dual=False)
    rows = np.where(p > 0, log["u"], 100.0)
    found = certificate(costs, plan, rows, log["v"], p, q)
    assert found.gap <= 1e-12
    assert not found.feasible
    assert (found.f[:, None] + found.g - costs).max() <= 1e-12
