import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import distributions as td

from kexue.stats import Gaussian, barycenter, bhattacharyya, hellinger, jeffreys, kl, ot_map, renyi, w2
from reference import gaussian_divergences as reference

METHODS = {
    "kl": (kl, reference.kl),
    "jeffreys": (jeffreys, reference.jeffreys),
    "renyi .3": (lambda p, q, **k: renyi(p, q, 0.3, **k), lambda *x: reference.renyi(*x, 0.3)),
    "renyi 1.2": (lambda p, q, **k: renyi(p, q, 1.2, **k), lambda *x: reference.renyi(*x, 1.2)),
    "renyi 1": (lambda p, q, **k: renyi(p, q, 1.0, **k), reference.kl),
    "bhattacharyya": (bhattacharyya, reference.bhattacharyya),
    "hellinger": (hellinger, reference.hellinger),
    "w2": (w2, reference.w2),
    "w2 root": (lambda p, q, **k: w2(p, q, squared=False, **k), lambda *x: reference.w2(*x).sqrt()),
}
every = pytest.mark.parametrize("name", METHODS)


def draw(*batch, n=4, seed=0, spread=0.3, grad=False):
    g = torch.Generator().manual_seed(seed)
    a = torch.randn(*batch, n, n, generator=g, dtype=torch.float64) / n**0.5
    cov = spread * (a @ a.mT) + torch.eye(n, dtype=torch.float64)
    mean = torch.randn(*batch, n, generator=g, dtype=torch.float64)
    return mean.requires_grad_(grad), cov.requires_grad_(grad)


def symmetrised(grads):
    return [(x + x.mT) / 2 if x.dim() > 1 and x.shape[-1] == x.shape[-2] else x for x in grads]


@every
@pytest.mark.parametrize("n", [1, 2, 5])
def test_values_and_every_gradient_equal_the_definition(name, n):
    ours, theirs = METHODS[name]
    inputs = [*draw(3, n=n, grad=True), *draw(3, n=n, seed=1, grad=True)]
    value = ours(Gaussian(*inputs[:2]), Gaussian(*inputs[2:]))
    expected = torch.stack([theirs(*(x[i] for x in inputs)) for i in range(3)])
    torch.testing.assert_close(value, expected)
    upstream = torch.linspace(0.5, 2.0, 3, dtype=torch.float64)
    got, want = (torch.autograd.grad(x, inputs, upstream) for x in (value, expected))
    for a, b in zip(got, [b if b.shape[-1:] != b.shape[-2:-1] else (b + b.mT) / 2 for b in want], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)
    with torch.no_grad():
        torch.testing.assert_close(ours(Gaussian(*inputs[:2]), Gaussian(*inputs[2:])), expected)


def forms(n=9, r=2, seed=0):
    g = torch.Generator().manual_seed(seed)
    mean, d = torch.randn(n, generator=g).double(), 0.5 + torch.rand(n, generator=g).double()
    f = torch.randn(n, r, generator=g).double() / 2
    tril = torch.linalg.cholesky(f @ f.T + torch.diag(d))
    return {
        "cov": (mean, {"cov": f @ f.T + torch.diag(d)}),
        "scale_tril": (mean, {"scale_tril": tril}),
        "diag": (mean, {"diag": d}),
        "low rank": (mean, {"diag": d, "factor": f}),
        "isotropic": (mean, {"diag": torch.full_like(d, 0.7), "factor": f}),
    }


@every
@pytest.mark.parametrize("first", forms())
@pytest.mark.parametrize("second", forms())
def test_every_pair_of_forms_equals_the_full_covariance(name, first, second):
    ours = METHODS[name][0]
    built = []
    for seed, form in ((0, first), (1, second)):
        mean, parts = forms(seed=seed)[form]
        leaves = [mean.clone().requires_grad_(), *(x.clone().requires_grad_() for x in parts.values())]
        built.append((leaves, Gaussian(leaves[0], **dict(zip(parts, leaves[1:], strict=True)))))
    p, q = built[0][1], built[1][1]
    value = ours(p, q)
    expected = METHODS[name][1](p.mean, p.covariance, q.mean, q.covariance)
    if torch.isnan(expected):  # order above 1 and no density ratio to integrate
        assert value == math.inf
        return
    torch.testing.assert_close(value, expected)
    leaves = built[0][0] + built[1][0]
    full = ours(Gaussian(p.mean, p.covariance), Gaussian(q.mean, q.covariance))  # the definition's root has nan here
    got, want = torch.autograd.grad(value, leaves), torch.autograd.grad(full, leaves)
    torch.testing.assert_close(symmetrised(got), symmetrised(want), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", ["kl", "jeffreys", "renyi .3", "bhattacharyya", "w2"])
@pytest.mark.parametrize("equal", [False, True])
def test_first_and_second_derivatives_agree_with_finite_differences(name, equal):
    ours = METHODS[name][0]
    (m, s), (m2, s2) = draw(n=3), draw(n=3, seed=1)
    if equal:
        s = s2 = torch.eye(3, dtype=torch.float64)

    def function(mp, sp, mq, sq):
        return ours(Gaussian(mp, (sp + sp.mT) / 2), Gaussian(mq, (sq + sq.mT) / 2))

    inputs = [x.clone().requires_grad_() for x in (m, s, m2, s2)]
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


@every
def test_equal_gaussians_have_distance_and_gradient_zero(name):
    ours = METHODS[name][0]
    for cov in (torch.eye(3), draw(n=3)[1].float()):
        inputs = [x.clone().requires_grad_() for x in (torch.ones(3), cov, torch.ones(3), cov)]
        value = ours(Gaussian(*inputs[:2]), Gaussian(*inputs[2:]))
        assert value == 0
        assert all((g == 0).all() for g in torch.autograd.grad(value, inputs))


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1e-2, 1e-4, 1e-6])
def test_close_gaussians_keep_their_relative_precision(name, dtype, size):
    if dtype == torch.float32 and size < 1e-5:
        pytest.skip("rounding of the inputs is larger")
    import mpmath

    ours, n = METHODS[name][0], 3
    mean, cov = draw(n=n)
    g = torch.Generator().manual_seed(4)
    move = torch.randn(n, n, generator=g, dtype=torch.float64)
    other = cov + size * (move + move.T)
    cov, other, mean = cov.to(dtype), other.to(dtype), mean.to(dtype)
    inputs = [x.clone().requires_grad_() for x in (cov, other)]
    value = ours(Gaussian(mean, inputs[0]), Gaussian(mean, inputs[1]))
    gradient = torch.autograd.grad(value, inputs)
    with mpmath.workdps(60):
        a, b = (mpmath.matrix(x.double().tolist()) for x in (cov, other))

        def logdet(x):
            return mpmath.log(mpmath.det(x))

        def trace(x):
            return mpmath.fsum(x[i, i] for i in range(n))

        def order(alpha):
            if alpha == 1:
                return (trace(b**-1 * a) - n + logdet(b) - logdet(a)) / 2
            alpha = mpmath.mpf(alpha)
            mixed = alpha * b + (1 - alpha) * a
            return -(logdet(mixed) - (1 - alpha) * logdet(a) - alpha * logdet(b)) / (2 * (alpha - 1))

        def squared():
            e, v = mpmath.eigsy(a)
            root = v * mpmath.diag([mpmath.sqrt(x) for x in e]) * v.T
            inner = root * b * root
            return trace(a) + trace(b) - 2 * mpmath.fsum(mpmath.sqrt(x) for x in mpmath.eigsy(inner, eigvals_only=True))

        expected = {
            "kl": lambda: order(1),
            "renyi 1": lambda: order(1),
            "renyi .3": lambda: order(0.3),
            "renyi 1.2": lambda: order(1.2),
            "jeffreys": lambda: (trace(b**-1 * a) + trace(a**-1 * b) - 2 * n) / 2,
            "bhattacharyya": lambda: order(0.5) / 2,
            "hellinger": lambda: mpmath.sqrt(-mpmath.expm1(-order(0.5) / 2)),
            "w2": squared,
            "w2 root": lambda: mpmath.sqrt(squared()),
        }[name]()
    tolerance = 1e-5 if dtype == torch.float32 else 1e-8
    assert value.item() == pytest.approx(float(expected), rel=tolerance)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    want = torch.autograd.grad(ours(Gaussian(mean.double(), exact[0]), Gaussian(mean.double(), exact[1])), exact)
    for x, y in zip(gradient, want, strict=True):
        assert (x - y).norm() <= 1e-4 * y.norm()


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 6), st.integers(0, 10**6), st.sampled_from(["jeffreys", "bhattacharyya", "hellinger", "w2"]))
def test_symmetric_divergences_are_symmetric_and_not_negative(n, seed, name):
    p, q = Gaussian(*draw(n=n, seed=seed)), Gaussian(*draw(n=n, seed=seed + 1, spread=3.0))
    ours = METHODS[name][0]
    torch.testing.assert_close(ours(p, q), ours(q, p), rtol=1e-9, atol=1e-12)
    assert ours(p, q) > 0


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 5), st.integers(0, 10**6), st.sampled_from(["kl", "jeffreys", "renyi .3", "hellinger"]))
def test_densities_do_not_depend_on_units(n, seed, name):
    (m, s), (m2, s2) = draw(n=n, seed=seed), draw(n=n, seed=seed + 1)
    a = torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 3 * torch.eye(n)
    p, q = Gaussian(m, s), Gaussian(m2, s2)
    turned = [Gaussian(a @ x, a @ y @ a.T) for x, y in ((m, s), (m2, s2))]
    ours = METHODS[name][0]
    torch.testing.assert_close(ours(*turned), ours(p, q), rtol=1e-7, atol=1e-9)


@every
def test_all_pairs_and_broadcasting(name, monkeypatch):
    from kexue.stats import divergences

    ours = METHODS[name][0]
    p, q = Gaussian(*draw(4)), Gaussian(*draw(3, seed=1))
    table = ours(p, q, pairwise=True)
    assert table.shape == (4, 3)
    m, s = draw(3, seed=1)
    for j in range(3):
        torch.testing.assert_close(table[:, j], ours(p, Gaussian(m[j], s[j])))
    monkeypatch.setattr(divergences, "BUDGET", 100)
    torch.testing.assert_close(ours(p, q, pairwise=True), table)
    low = Gaussian(draw(4)[0], diag=torch.ones(4))
    torch.testing.assert_close(ours(low, q, pairwise=True)[2], ours(Gaussian(low.mean[2], torch.eye(4)), q))
    assert ours(Gaussian(*draw(0)), q, pairwise=True).shape == (0, 3)
    assert ours(Gaussian(*draw(2, 1)), q).shape == (2, 3)
    with pytest.raises(ValueError, match="batch on both sides"):
        ours(p, Gaussian(m[0], s[0]), pairwise=True)


def test_the_order_of_renyi_is_continuous_at_one():
    p, q = Gaussian(*draw()), Gaussian(*draw(seed=1))
    torch.testing.assert_close(renyi(p, q, 1 + 1e-9), kl(p, q), rtol=1e-7, atol=0)
    torch.testing.assert_close(renyi(p, q, 1 - 1e-9), kl(p, q), rtol=1e-7, atol=0)


def test_infinite_where_there_is_no_density_and_never_nan():
    full = Gaussian(torch.zeros(3), torch.eye(3))
    f = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 2.0]], dtype=torch.float64)
    flat = Gaussian(torch.zeros(3).double(), f @ f.T)
    for ours in (kl, jeffreys, renyi, bhattacharyya):
        for p, q in ((flat, full), (full, flat)):
            assert ours(p, q) == math.inf
        assert ours(flat, flat) == 0
        assert ours(flat, Gaussian(torch.tensor([1.0, -1.0, 0.5]).double(), f @ f.T)) == math.inf  # beside the plane
    assert hellinger(full, flat) == 1
    moved = f @ torch.tensor([1.0, 2.0]).double()
    two = Gaussian(moved, 2 * f @ f.T)
    torch.testing.assert_close(
        kl(two, flat),
        reference.kl(*(x.double() for x in (torch.tensor([1.0, 2.0]), 2 * torch.eye(2), torch.zeros(2), torch.eye(2)))),
    )  # in the coordinates of the plane
    point = Gaussian(torch.zeros(2), torch.zeros(2, 2))
    assert kl(point, point) == 0
    assert kl(point, Gaussian(torch.ones(2), torch.zeros(2, 2))) == math.inf
    p, q = Gaussian(torch.zeros(1), 9 * torch.eye(1)), Gaussian(torch.zeros(1), torch.eye(1))
    cov = q.covariance.clone().requires_grad_()
    value = renyi(p, Gaussian(torch.zeros(1), cov), 2.0)
    value.backward()
    assert value == math.inf
    assert cov.grad == 0


def test_singular_covariances_have_a_w2_and_finite_gradients():
    g = torch.Generator().manual_seed(0)
    a, b = (torch.randn(5, 2, generator=g, dtype=torch.float64) for _ in range(2))
    expected = a.square().sum() + b.square().sum() - 2 * torch.linalg.svdvals(a.T @ b).sum()
    zero = torch.zeros(5).double()
    torch.testing.assert_close(w2(Gaussian(zero, a @ a.T), Gaussian(zero, b @ b.T)), expected)
    torch.testing.assert_close(w2(Gaussian(zero, factor=a), Gaussian(zero, factor=b)), expected)
    nothing, eye = torch.zeros(5, 5), torch.eye(5)
    for p, q in ((a @ a.T, eye.double()), (nothing, eye), (nothing, nothing)):
        p, q = p.clone().requires_grad_(), q.clone().requires_grad_()
        value = w2(Gaussian(torch.zeros(5), p), Gaussian(torch.zeros(5), q))
        assert torch.isfinite(value)
        assert all(torch.isfinite(x).all() for x in torch.autograd.grad(value, (p, q)))
    assert w2(Gaussian(torch.zeros(5), nothing), Gaussian(torch.zeros(5), eye)).item() == pytest.approx(5)


@every
def test_ill_conditioned_covariances_in_float32_are_as_good_as_in_float64(name):
    g = torch.Generator().manual_seed(3)
    turn = torch.linalg.qr(torch.randn(4, 4, generator=g))[0]
    thin = (turn * torch.tensor([1.0, 1e-2, 1e-4, 1e-5])) @ turn.T
    wide = torch.eye(4) + torch.ones(4, 4)
    results = []
    for dtype in (torch.float32, torch.float64):
        inputs = [x.to(dtype).requires_grad_() for x in ((thin + thin.T) / 2, wide)]
        value = METHODS[name][0](*(Gaussian(torch.zeros(4, dtype=dtype), x) for x in inputs))
        results.append([value, *torch.autograd.grad(value, inputs)])
    for low, exact in zip(*results, strict=True):
        if torch.isfinite(exact).all():
            assert (low - exact).norm() <= 1e-3 * exact.norm()
        else:
            assert torch.equal(low.double(), exact)


def test_low_rank_in_float32_is_recognised():
    f = torch.randn(6, 2, generator=torch.Generator().manual_seed(0))
    p, q = Gaussian(torch.zeros(6), f @ f.T), Gaussian(f @ torch.ones(2), 2 * f @ f.T)
    small = (torch.zeros(2).double(), torch.eye(2).double(), torch.ones(2).double(), 2 * torch.eye(2).double())
    torch.testing.assert_close(kl(p, q).double(), reference.kl(*small), rtol=1e-4, atol=0)
    assert kl(p, Gaussian(torch.ones(6), f @ f.T)) == math.inf


@pytest.mark.parametrize("n", [1, 3, 6])
def test_the_map_carries_one_to_the_other(n):
    p, q = Gaussian(*draw(2, n=n)), Gaussian(*draw(2, n=n, seed=1))
    t, shift = ot_map(p, q)
    torch.testing.assert_close(t @ p.covariance @ t, q.covariance)
    torch.testing.assert_close((t @ p.mean.unsqueeze(-1)).squeeze(-1) + shift, q.mean)
    want = reference.ot_map(p.mean[0], p.covariance[0], q.mean[0], q.covariance[0])
    torch.testing.assert_close((t[0], shift[0]), want)
    torch.testing.assert_close(t, t.mT)
    rest = torch.eye(n, dtype=torch.float64) - t
    cost = (rest @ p.covariance @ rest).diagonal(dim1=-2, dim2=-1).sum(-1)
    torch.testing.assert_close(cost + (p.mean - q.mean).square().sum(-1), w2(p, q))


def test_the_map_has_a_gradient():
    (_, s), (_, s2) = draw(n=3), draw(n=3, seed=1)

    def function(a, b):
        zero = torch.zeros(3, dtype=torch.float64)
        return ot_map(Gaussian(zero, (a + a.mT) / 2), Gaussian(zero, (b + b.mT) / 2))[0]

    assert torch.autograd.gradcheck(function, (s.requires_grad_(), s2.requires_grad_()))
    low = torch.diag(torch.tensor([1.0, 2.0, 0.0]))
    t, _ = ot_map(Gaussian(torch.zeros(3), torch.eye(3)), Gaussian(torch.zeros(3), low))
    torch.testing.assert_close(t @ t, low)


def test_barycentres_minimise_what_they_claim():
    parts = [Gaussian(*draw(n=3, seed=i)) for i in range(3)]
    weights = [0.2, 0.3, 0.5]
    cost = {
        "w2": lambda q: sum(w * w2(p, q) for w, p in zip(weights, parts, strict=True)),
        "kl": lambda q: sum(w * kl(p, q) for w, p in zip(weights, parts, strict=True)),
        "reverse_kl": lambda q: sum(w * kl(q, p) for w, p in zip(weights, parts, strict=True)),
    }
    for metric, function in cost.items():
        best = barycenter(parts, weights, metric)
        leaves = [best.mean.clone().requires_grad_(), best.covariance.clone().requires_grad_()]
        for gradient in torch.autograd.grad(function(Gaussian(*leaves)), leaves):
            assert gradient.abs().max() < 1e-8


def test_barycentres_of_commuting_covariances_average_the_roots():
    a, b = torch.tensor([1.0, 4.0, 9.0]).double(), torch.tensor([4.0, 1.0, 25.0]).double()
    zero = torch.zeros(3).double()
    expected = torch.diag((0.25 * a.sqrt() + 0.75 * b.sqrt()).square())
    dense = [Gaussian(zero, torch.diag(a)), Gaussian(zero, torch.diag(b))]
    torch.testing.assert_close(barycenter(dense, [0.25, 0.75]).covariance, expected)
    thin = [Gaussian(zero, diag=a), Gaussian(zero, diag=b)]
    torch.testing.assert_close(barycenter(thin, [0.25, 0.75]).covariance, expected)
    for metric in ("kl", "reverse_kl"):
        torch.testing.assert_close(
            barycenter(thin, metric=metric).covariance, barycenter(dense, metric=metric).covariance
        )


def test_torch_distributions_use_it():
    (m, s), (m2, s2) = draw(), draw(seed=1)
    f, d = torch.ones(4, 1).double(), torch.full((4,), 0.5).double()
    torches = [
        td.MultivariateNormal(m, s),
        td.MultivariateNormal(m2, scale_tril=torch.linalg.cholesky(s2)),
        td.LowRankMultivariateNormal(m, f, d),
        td.Independent(td.Normal(m2, d), 1),
    ]
    for a in torches:
        for b in torches:
            full = [x.covariance_matrix if hasattr(x, "covariance_matrix") else torch.diag(x.variance) for x in (a, b)]
            expected = reference.kl(a.mean, full[0], b.mean, full[1])
            torch.testing.assert_close(td.kl_divergence(a, b), expected)
            torch.testing.assert_close(kl(a, b), expected)
            torch.testing.assert_close(w2(a, b), w2(Gaussian(a.mean, full[0]), Gaussian(b.mean, full[1])))
    with pytest.raises(NotImplementedError):
        td.kl_divergence(torches[0], td.Independent(td.Laplace(m, d), 1))
    with pytest.raises(TypeError, match="Laplace"):
        kl(td.Laplace(0.0, 1.0), torches[0])


def test_entropy_samples_and_moments():
    for form, (mean, parts) in forms().items():
        p = Gaussian(mean, **parts)
        torch.testing.assert_close(p.entropy(), reference.entropy(p.covariance))
        x = p.rsample((20000,), torch.Generator().manual_seed(0))
        assert x.shape == (20000, 9), form
        again = Gaussian.from_samples(x)
        assert kl(again, p) < 0.01
    few = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(Gaussian.from_samples(few).covariance, torch.cov(few.T))
    assert Gaussian(torch.zeros(2), torch.zeros(2, 2)).entropy() == -math.inf


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@every
def test_low_precision_is_computed_in_float32_with_gradients_in_its_dtype(name, dtype):
    ours = METHODS[name][0]
    inputs = [x.to(dtype).requires_grad_() for x in (*draw(), *draw(seed=1))]
    with torch.autocast("cpu", torch.bfloat16):
        value = ours(Gaussian(*inputs[:2]), Gaussian(*inputs[2:]))
    assert value.dtype == torch.float32
    exact = [x.detach().double().requires_grad_() for x in inputs]
    expected = ours(Gaussian(*exact[:2]), Gaussian(*exact[2:]))
    torch.testing.assert_close(value.double(), expected, rtol=1e-4, atol=1e-5)
    for a, b in zip(torch.autograd.grad(value, inputs), torch.autograd.grad(expected, exact), strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a.double(), b, rtol=2e-2, atol=2e-3)


BAD = [
    ({"mean": torch.zeros(2)}, ValueError, "give one of"),
    ({"mean": torch.zeros(2), "cov": torch.eye(2), "diag": torch.ones(2)}, ValueError, "give one of"),
    ({"mean": torch.zeros(2), "cov": torch.eye(3)}, ValueError, r"\(3, 3\)"),
    ({"mean": torch.zeros(2), "cov": torch.ones(2, 3)}, ValueError, r"\(2, 3\)"),
    ({"mean": torch.zeros(2), "cov": torch.eye(2).long()}, TypeError, "int64"),
    ({"mean": torch.zeros(2), "cov": [[1.0]]}, TypeError, "list"),
    ({"mean": torch.tensor(0.0), "diag": torch.ones(1)}, ValueError, "n >= 1"),
    ({"mean": torch.tensor([0.0, math.nan]), "cov": torch.eye(2)}, ValueError, "finite"),
    ({"mean": torch.zeros(2), "cov": torch.eye(2) * math.inf}, ValueError, "finite"),
    ({"mean": torch.zeros(2), "cov": torch.tensor([[1.0, 0.5], [0.4, 1.0]])}, ValueError, "symmetric"),
    ({"mean": torch.zeros(2), "cov": torch.tensor([[1.0, 2.0], [2.0, 1.0]])}, ValueError, "semi-definite"),
    ({"mean": torch.zeros(2), "cov": -torch.eye(2)}, ValueError, "semi-definite"),
    ({"mean": torch.zeros(2), "diag": torch.tensor([1.0, 0.0])}, ValueError, "positive"),
    ({"mean": torch.zeros(2), "diag": torch.tensor([1.0, -1.0]), "factor": torch.ones(2, 1)}, ValueError, "negative"),
    ({"mean": torch.zeros(2), "scale_tril": -torch.eye(2)}, ValueError, "positive diagonal"),
    ({"mean": torch.zeros(2), "scale_tril": torch.ones(2, 2)}, ValueError, "triangular"),
    ({"mean": torch.zeros(3, 2), "cov": torch.eye(2).expand(4, 2, 2)}, ValueError, "broadcast"),
]


@pytest.mark.parametrize(("keywords", "error", "message"), BAD)
def test_bad_parameters_are_rejected(keywords, error, message):
    with pytest.raises(error, match=message):
        Gaussian(**keywords)


def test_bad_arguments_are_rejected():
    p, q = Gaussian(*draw(2)), Gaussian(*draw(3))
    other = Gaussian(torch.zeros(2), torch.eye(2))
    for ours, _ in METHODS.values():
        with pytest.raises(ValueError, match="broadcast"):
            ours(p, q)
        with pytest.raises(ValueError, match="4 and 2"):
            ours(p, other)
        with pytest.raises(TypeError, match="Tensor"):
            ours(p, torch.zeros(4))
    for alpha in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="alpha"):
            renyi(other, other, alpha)
    for weights, message in (([0.5], "shape"), ([0.7, 0.7], "sum to 1"), ([1.5, -0.5], "non-negative")):
        with pytest.raises(ValueError, match=message):
            barycenter([other, other], weights)
    with pytest.raises(ValueError, match="metric"):
        barycenter([other], metric="tv")
    with pytest.raises(ValueError, match="at least one"):
        barycenter([])
    with pytest.raises(ValueError, match="N >= 2"):
        Gaussian.from_samples(torch.zeros(1, 3))


def test_inputs_are_left_alone():
    inputs = [*draw(2), *draw(2, seed=1)]
    copies = [x.clone() for x in inputs]
    for ours, _ in METHODS.values():
        ours(Gaussian(*inputs[:2]), Gaussian(*inputs[2:]))
    assert all(torch.equal(a, b) for a, b in zip(inputs, copies, strict=True))


@every
def test_a_factor_without_columns_is_a_diagonal(name):
    ours = METHODS[name][0]
    p = Gaussian(torch.zeros(3), diag=torch.ones(3), factor=torch.zeros(3, 0))
    q = Gaussian(torch.ones(3), diag=torch.full((3,), 1.5))
    assert ours(p, p) == 0
    assert ours(p, q) == ours(Gaussian(torch.zeros(3), diag=torch.ones(3)), q)


def test_normals_of_torch_in_one_dimension_or_by_their_precision():
    p = td.Normal(torch.tensor([0.0, 1.0]), torch.tensor([1.0, 2.0]))
    q = td.Normal(0.0, 1.0)
    torch.testing.assert_close(kl(p, q), td.kl_divergence(p, q))
    torch.testing.assert_close(w2(p, q), torch.tensor([0.0, 2.0]))
    assert Gaussian.from_torch(p).batch_shape == (2,)
    precise = td.MultivariateNormal(torch.ones(2), precision_matrix=4 * torch.eye(2))
    torch.testing.assert_close(Gaussian.from_torch(precise).covariance, torch.eye(2) / 4)


@every
def test_singular_rows_of_a_batch_have_gradients_of_both_orders(name):
    flat = torch.eye(3, dtype=torch.float64).repeat(4, 1, 1)
    flat[1, 2, 2] = 0  # the null space of both
    p, q = (2 * flat).requires_grad_(), flat.clone().requires_grad_()
    mean = torch.zeros(3, dtype=torch.float64)
    value = METHODS[name][0](Gaussian(mean, p), Gaussian(mean, q))
    once = torch.autograd.grad(value.sum(), [p, q], retain_graph=True)
    again = torch.autograd.grad(value.sum(), [p, q], create_graph=True)
    for x, y in zip(once, again, strict=True):
        assert x.isfinite().all()
        assert torch.allclose(x, y)
    second = torch.autograd.grad(sum(x.square().sum() for x in again), [p, q])
    assert all(x.isfinite().all() and x[0].abs().sum() > 0 for x in second)


def test_hellinger_of_distant_normals_keeps_its_gradient():
    mean = torch.full((2,), 10.0, requires_grad=True)
    (grad,) = torch.autograd.grad(hellinger(Gaussian(mean, torch.eye(2)), Gaussian(torch.zeros(2), torch.eye(2))), mean)
    assert torch.allclose(grad, torch.full((2,), 10 / 8 * math.exp(-25)), rtol=1e-4, atol=0)
