import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import cdist

from kexue.stats import kr_potential, transport, wasserstein
from reference import wasserstein_duality as reference


def clouds(n, m, width, seed=0):
    g = np.random.default_rng(seed)
    a, b = g.random(n) + 0.1, g.random(m) + 0.1
    return g.normal(size=(n, width)), g.normal(size=(m, width)) + 0.5, a / a.sum(), b / b.sum()


@pytest.mark.parametrize("metric", ["euclidean", "cityblock", "chebyshev", "sqeuclidean"])
@pytest.mark.parametrize("p", [1, 2, 3.5])
@pytest.mark.parametrize("width", [1, 3])
def test_value_is_that_of_the_linear_programme(metric, p, width):
    x, y, a, b = clouds(7, 5, width)
    cost = reference.primal(cdist(x, y, metric) ** p, a, b)[0]
    assert wasserstein(x, y, p, metric, (a, b)) == pytest.approx(cost ** (1 / p), rel=1e-9)
    tensor = wasserstein(torch.from_numpy(x), torch.from_numpy(y), p, metric, (a, b))
    assert float(tensor) == pytest.approx(cost ** (1 / p), rel=1e-9)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(-3, 3), min_size=1, max_size=8),
    st.lists(st.integers(-3, 3), min_size=1, max_size=8),
    st.integers(0, 10**6),
    st.sampled_from([1.0, 2.0, 3.0]),
)
def test_line_with_ties_and_zero_masses_equals_moving_mass_step_by_step(x, y, seed, p):
    g = np.random.default_rng(seed)
    x, y = np.array(x, float), np.array(y, float)
    a, b = (g.integers(0, 3, len(v)).astype(float) for v in (x, y))
    a[0], b[-1] = max(a[0], 1.0), max(b[-1], 1.0)
    a, b = a / a.sum(), b / b.sum()
    cost = reference.line(x, y, a, b, p)
    assert wasserstein(x, y, p, weights=(a, b)) ** p == pytest.approx(cost, abs=1e-12)
    assert wasserstein(x, y, p, weights=(a, b)) ** p == pytest.approx(
        transport(cdist(x[:, None], y[:, None]) ** p, a, b).cost, abs=1e-12
    )


@pytest.mark.parametrize("p", [1.0, 2.0, 3.0])
def test_many_points_on_the_line_take_a_kernel_with_the_same_result(p):
    g = np.random.default_rng(0)
    x, y = np.round(3 * g.normal(size=3000), 1), g.normal(size=2500) * 10.0 ** g.integers(-8, 3, 2500)
    x[:3] = -0.0, 0.0, -5.0
    a, b = g.random(3000), g.random(2500)
    a[g.random(3000) < 0.2] = 0
    a, b = a / a.sum(), b / b.sum()
    expected = reference.line(x, y, a, b, p)
    assert wasserstein(x, y, p, weights=(a, b)) ** p == pytest.approx(expected, rel=1e-11)
    tensor = wasserstein(torch.from_numpy(x), y, p, weights=(a, b))
    assert float(tensor) ** p == pytest.approx(expected, rel=1e-11)


def test_sorts_are_stable_for_even_and_crowded_numbers():
    from kexue.stats._line_kernel import sort, sort_with

    g = np.random.default_rng(0)
    crowded = np.array([0.0, -0.0, 1e-310, -1e308, 1e308, -1.5]), np.ones(5), np.floor(9 * g.normal(size=999))
    even = g.normal(size=999), g.permutation(50) / 1e310, np.round(g.random(999), 2), np.array([2.0, 1.0]), np.ones(1)
    for x in (*crowded, *even):
        order = np.argsort(x, kind="stable")
        values, places = sort_with(x, np.arange(len(x)))
        np.testing.assert_array_equal(values, x[order])
        np.testing.assert_array_equal(places, order)
        np.testing.assert_array_equal(sort(x), x[order])
        np.testing.assert_array_equal(sort_with(x, x)[1], x[order])


def test_many_points_of_equal_mass_on_the_line():
    g = np.random.default_rng(1)
    x, y = g.normal(size=3000), g.standard_cauchy(3000)
    expected = abs(np.sort(x) - np.sort(y)).mean()
    assert wasserstein(x, y) == pytest.approx(expected, rel=1e-12)
    points = torch.from_numpy(x).requires_grad_()
    out = wasserstein(points, torch.from_numpy(y))
    out.backward()
    assert float(out.detach()) == pytest.approx(expected, rel=1e-12)
    signs = np.empty(3000)
    signs[np.argsort(x)] = np.sign(np.sort(x) - np.sort(y))
    np.testing.assert_allclose(points.grad, signs / 3000, atol=1e-15)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 10**6), st.sampled_from([1.0, 2.0]))
def test_line_gradients_for_the_masses_are_feasible_potentials(n, m, seed, p):
    g = np.random.default_rng(seed)
    x, y = np.floor(3 * g.normal(size=n)), np.floor(3 * g.normal(size=m))
    a, b = (torch.from_numpy(g.dirichlet(np.ones(k))).requires_grad_() for k in (n, m))
    cost = wasserstein(torch.from_numpy(x), torch.from_numpy(y), p, weights=(a, b)) ** p
    if float(cost.detach()) == 0:
        return
    f, h = (grad.numpy() for grad in torch.autograd.grad(cost, (a, b)))
    assert (f[:, None] + h - abs(x[:, None] - y) ** p).max() <= 1e-9
    assert a.detach().numpy() @ f + b.detach().numpy() @ h == pytest.approx(float(cost.detach()))


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 3), st.integers(0, 10**6), st.sampled_from([1, 2]))
def test_it_is_a_distance(n, m, width, seed, p):
    x, y, a, b = clouds(n, m, width, seed)
    z, _, c, _ = clouds(4, 1, width, seed + 1)
    xy, yx = wasserstein(x, y, p, weights=(a, b)), wasserstein(y, x, p, weights=(b, a))
    assert xy == pytest.approx(yx, rel=1e-9)
    assert wasserstein(x, x, p, weights=(a, a)) == pytest.approx(0, abs=1e-9)
    assert xy <= wasserstein(x, z, p, weights=(a, c)) + wasserstein(z, y, p, weights=(c, b)) + 1e-9
    shift = np.full(width, 2.0)
    assert wasserstein(x, x + shift, p, weights=(a, a)) == pytest.approx(np.linalg.norm(shift))
    assert wasserstein(3 * x, 3 * y, p, weights=(a, b)) == pytest.approx(3 * xy, rel=1e-9)


@pytest.mark.parametrize("width", [1, 2])
@pytest.mark.parametrize("p", [1, 2, 3])
def test_every_gradient(width, p):
    x, y, a, b = (torch.from_numpy(v).requires_grad_() for v in clouds(6, 4, width))

    def run(x, y, s, t):
        return wasserstein(x, y, p, weights=(s.softmax(0), t.softmax(0)))

    assert torch.autograd.gradcheck(run, (x, y, a, b))
    for metric in ("cityblock", "chebyshev", "sqeuclidean"):
        assert torch.autograd.gradcheck(lambda x, y, m=metric: wasserstein(x, y, p, m), (x, y))
    callables = lambda u, v: (u - v).abs().pow(1.5).sum(), lambda u, v: torch.cdist(u, v).sqrt()
    for metric in callables:
        assert torch.autograd.gradcheck(lambda x, y, m=metric: wasserstein(x, y, p, m), (x, y))


@pytest.mark.parametrize("shape", [(5,), (5, 1), (5, 2)])
@pytest.mark.parametrize("p", [1, 2, 3])
def test_equal_clouds_have_distance_0_and_finite_gradients(shape, p):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).requires_grad_()
    out = wasserstein(x, x.detach().flip(0), p)
    out.backward()
    assert float(out.detach()) == 0
    assert torch.equal(x.grad, torch.zeros_like(x))


def test_one_point_of_two_stays_put():
    x = torch.tensor([[0.0, 0.0], [5.0, 0.0]], requires_grad=True)
    wasserstein(x, torch.tensor([[0.0, 0.0], [5.0, 2.0]]), 2).backward()
    assert torch.isfinite(x.grad).all()
    assert not x.grad[0].any()


def test_points_far_away_and_tiny_ones():
    x = torch.tensor([[0.0, 0.0], [0.0, 1e-30]], requires_grad=True)
    out = wasserstein(x, torch.tensor([[3e-30, 0.0], [3e30, 4e30]]))
    out.backward()
    assert float(out.detach()) == pytest.approx(2.5e30, rel=1e-6)
    assert torch.isfinite(x.grad).all()
    assert wasserstein([1e12, 1e12 + 1], [1e12 + 2, 1e12 + 3]) == 2


@pytest.mark.parametrize("metric", ["euclidean", "cityblock", "chebyshev", "sqeuclidean"])
@pytest.mark.parametrize("width", [1, 2])
def test_powers_of_tiny_and_huge_distances_stay_in_range(metric, width):
    x, y, a, b = clouds(7, 5, width)
    twice = metric == "sqeuclidean"
    for p in (1, 2, 8):
        plain = wasserstein(x, y, p, metric, (a, b))
        for size in (1e-150, 1e150) if twice else (1e-300, 1e-200, 1e200, 1e300):
            unit = size**2 if twice else size
            assert wasserstein(size * x, size * y, p, metric, (a, b)) / unit == pytest.approx(plain, rel=1e-9)
            points = torch.from_numpy(size * x).requires_grad_()
            masses = torch.from_numpy(a).requires_grad_()
            found = wasserstein(points, size * y, p, metric, (masses, b))
            (slope,) = torch.autograd.grad(found, masses, retain_graph=True)
            (same,) = torch.autograd.grad(wasserstein(x, y, p, metric, (masses, b)), masses)
            torch.testing.assert_close(slope / unit, same, rtol=1e-8, atol=1e-12)
            assert float(found.detach()) / unit == pytest.approx(plain, rel=1e-9)
            (grad,) = torch.autograd.grad(found, points)
            (expected,) = torch.autograd.grad(wasserstein(points / size, y, p, metric, (a, b)), points)
            torch.testing.assert_close(grad / unit, expected, rtol=1e-8, atol=0)


def test_distances_beyond_float64_are_refused():
    for pair in (([1.7e308], [-1.7e308]), ([[1.7e308, 0.0]], [[-1.7e308, 1.0]])):
        with pytest.raises(ValueError, match="overflow"):
            wasserstein(*pair)
        with pytest.raises(ValueError, match="overflow"):
            wasserstein(*(torch.tensor(v, dtype=torch.float64) for v in pair))
    with pytest.raises(ValueError, match="overflow"):
        wasserstein([1e200], [-1e200], metric="sqeuclidean")


def test_totals_other_than_1_scale_the_cost_not_the_distance():
    x, y, a, b = clouds(6, 4, 1)
    for points in ((x, y), (np.hstack([x, x]), np.hstack([y, y]))):
        one = wasserstein(*points, 2, weights=(a, b))
        assert wasserstein(*points, 2, weights=(9 * a, 9 * b)) == pytest.approx(3 * one)
        assert wasserstein(*points, 2, weights=(9 * a, 4 * b), normalize=True) == pytest.approx(one)
    assert wasserstein(x, x + 1, weights=(np.full(6, 2.0), np.full(6, 2.0))) == pytest.approx(12)


def test_dtypes_layouts_and_kinds_of_points():
    x, y, a, b = clouds(6, 6, 2)
    expected = wasserstein(x, y, 2)
    turned = torch.from_numpy(x.T.copy()).T
    assert float(wasserstein(turned, y, 2)) == pytest.approx(expected, rel=1e-12)
    assert float(wasserstein(x, torch.from_numpy(y), 2)) == pytest.approx(expected, rel=1e-12)
    assert wasserstein(x.tolist(), y.tolist(), 2) == pytest.approx(expected, rel=1e-12)
    assert wasserstein([0, 1], [2, 5]) == 3.0
    weights = torch.from_numpy(a).requires_grad_()
    out = wasserstein(x, y, 1, weights=(weights, b))  # only the masses are tensors
    assert torch.autograd.grad(out, weights)[0].shape == (6,)
    for dtype in (torch.float32, torch.bfloat16):
        low = torch.from_numpy(x).to(dtype).requires_grad_()
        out = wasserstein(low, torch.from_numpy(y).to(dtype), 2)
        out.backward()
        assert out.dtype == torch.float32
        assert low.grad.dtype == dtype
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = wasserstein(torch.from_numpy(x).float(), torch.from_numpy(y).float(), 2)
    torch.testing.assert_close(cast, wasserstein(torch.from_numpy(x).float(), torch.from_numpy(y).float(), 2))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"X": np.zeros((0, 2))}, ValueError, "X must not be empty"),
        ({"X": torch.zeros(0, 2)}, ValueError, "X must not be empty"),
        ({"X": np.zeros((3, 1))}, ValueError, "equal width; got 1 and 2"),
        ({"X": torch.zeros(3, 1)}, ValueError, "equal width; got 1 and 2"),
        ({"X": np.zeros((3, 2, 1))}, ValueError, "1 or 2 dimensions"),
        ({"X": torch.zeros(3, 2, 1)}, ValueError, "1 or 2 dimensions"),
        ({"Y": np.full((3, 2), np.nan)}, ValueError, "Y must be finite; got nan"),
        ({"Y": torch.full((3, 2), torch.inf)}, ValueError, "Y must be finite; got inf"),
        ({"X": "cloud"}, TypeError, "X must hold real numbers"),
        ({"X": torch.zeros(3, 2, dtype=torch.complex64)}, TypeError, "complex64"),
        ({"p": 0.5}, ValueError, "at least 1.0; got 0.5"),
        ({"p": "two"}, TypeError, "'two'"),
        ({"metric": "euclid"}, ValueError, "got 'euclid'"),
        ({"metric": None}, TypeError, "got None"),
        ({"metric": lambda u, v: u}, ValueError, r"\(3, 4\); got shape \(3, 2\)"),
        ({"metric": lambda u, v: -1.0, "p": 2}, ValueError, "non-negative for p = 2"),
        ({"weights": np.ones(3)}, TypeError, "pair"),
        ({"weights": (np.ones(3), np.ones(4))}, ValueError, "a and b must have equal totals; got 3 and 4"),
        ({"weights": (torch.ones(2), None)}, ValueError, r"a must have shape \(3,\)"),
        ({"weights": ([1.0, 1.0, -1.0], None)}, ValueError, "a must be non-negative; got -1.0 at 2"),
    ],
)
def test_bad_input_is_rejected_with_expected_and_received(change, error, message):
    with pytest.raises(error, match=message):
        wasserstein(**({"X": np.zeros((3, 2)), "Y": np.ones((4, 2))} | change))


@pytest.mark.parametrize("metric", ["euclidean", "cityblock", "chebyshev", lambda u, v: abs(u - v).sum() ** 0.5])
@pytest.mark.parametrize("width", [1, 2])
def test_critic_attains_the_distance_and_is_lipschitz(metric, width):
    x, y, a, b = clouds(9, 7, width)
    critic = kr_potential(x, y, metric, (a, b))
    union = np.concatenate([x, y])
    distances = (
        cdist(union, union, metric) if isinstance(metric, str) else [[metric(u, v) for v in union] for u in union]
    )
    best = reference.lipschitz_maximum(np.array(distances), np.concatenate([a, -b]))
    assert critic.value == pytest.approx(best, abs=1e-9)
    assert a @ critic(x) - b @ critic(y) == pytest.approx(best, abs=1e-9)
    assert critic.gap <= 1e-12
    far = 5 * np.random.default_rng(1).normal(size=(40, width))
    values = critic(far)
    apart = cdist(far, far, metric) if isinstance(metric, str) else cdist(far, far, "cityblock") ** 0.5
    assert (abs(values[:, None] - values) - apart).max() <= 1e-9


@pytest.mark.parametrize(
    "metric",
    [
        "sqeuclidean",
        lambda u, v: ((u - v) ** 2).sum(),
        lambda u, v: cdist(u, v, "sqeuclidean"),
        lambda u, v: abs(u - v).sum() ** 1.1,
        lambda u, v: (u - v).sum(),
        lambda u, v: abs(u - v).sum() + 1,
        lambda u, v: max((u - v).sum(), 0.0),
    ],
)
def test_critic_refuses_costs_that_are_no_metric(metric):
    x, y, _, _ = clouds(9, 7, 2)
    with pytest.raises(ValueError, match="metric must"):
        kr_potential(x, y, metric)
    with pytest.raises(ValueError, match="metric must"):
        kr_potential([[0.0, 0.0]], [[1.0, 2.0]], metric)


def test_critic_of_tensors_is_differentiable_in_its_points():
    x, y, _, _ = clouds(9, 7, 2)
    critic = kr_potential(torch.from_numpy(x), torch.from_numpy(y))
    np.testing.assert_allclose(critic(torch.from_numpy(x)), critic(x))
    points = torch.randn(3, 5, 2, dtype=torch.float64, requires_grad=True)
    assert critic(points).shape == (3, 5)
    assert torch.autograd.gradcheck(critic, points)
    (slope,) = torch.autograd.grad(critic(points).sum(), points)
    torch.testing.assert_close(slope.norm(dim=-1), torch.ones(3, 5, dtype=torch.float64))
    assert critic(points.detach()[0, 0]).shape == ()
    assert critic(points.float()).dtype == torch.float32
    assert critic(np.zeros((0, 2))).shape == (0,)
    assert critic(torch.zeros(0, 2)).shape == (0,)
    assert kr_potential([0.0, 1.0], [2.0])(np.zeros((2, 3))).shape == (2, 3)
    with pytest.raises(ValueError, match=r"width 2 on its last axis; got shape \(4, 3\)"):
        critic(np.zeros((4, 3)))


def test_critic_of_tensors_gives_its_metric_tensors():
    x, y, _, _ = (torch.from_numpy(v) for v in clouds(40, 30, 2))
    expected = kr_potential(x, y)
    for metric in (lambda u, v: (u - v).norm(), torch.cdist):
        critic = kr_potential(x, y, metric)
        assert critic.value == pytest.approx(expected.value, rel=1e-6)
        torch.testing.assert_close(critic(x), expected(x), atol=1e-6, rtol=0)
        np.testing.assert_allclose(critic(x.numpy()), expected(x), atol=1e-6)
    with pytest.raises(ValueError, match="triangle"):
        kr_potential(x, y, lambda u, v: (u - v).square().sum())


@pytest.mark.parametrize("n", [50, 5000])
@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy])
def test_far_points_without_mass_on_the_line_change_nothing(n, kind):
    g = np.random.default_rng(0)
    x, y, a, b = g.normal(size=n), g.normal(size=n + 3), g.random(n), g.random(n + 3)
    a[[0, 7]], b[9] = 0.0, 0.0
    x[[0, 7]], y[9] = (-1e12, 1e12), 3e12
    b *= a.sum() / b.sum()
    some, others = a > 0, b > 0
    for p in (1, 2):
        expected = wasserstein(x[some], y[others], p, weights=(a[some], b[others]))
        assert float(wasserstein(kind(x), kind(y), p, weights=(a, b))) == pytest.approx(expected, rel=1e-9)
