import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from kexue.attention import FavorFeatures, linear_attention
from kexue.attention.favor import best_a, mean_pair_square
from reference import performer as reference

VARIANTS = ("positive", "cosh", "optimal", "trig", "relu")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64).to(dtype)


def qkv(b=2, h=3, t=9, d=4, e=5, size=1.0, dtype=torch.float64):
    return tuple(size * normal(b, h, t, w, seed=i, dtype=dtype) for i, w in enumerate((d, d, e)))


def made(*args, seed=0, **options):
    return FavorFeatures(*args, generator=generator(seed), **options).double().eval()


def estimates(phi, q, k):
    """phi(q).phi(k) of each row of q with the same row of k, through the operator."""
    q, k = q[:, None, None], k[:, None, None]
    return linear_attention(q, k, torch.ones_like(k[..., :1]), phi, normalize=False).flatten()


def omega_of(phi):
    """Directions as the reference wants them: trig and cosh have each of them twice already."""
    return phi.projection.double().numpy()


# --- values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["positive", "cosh", "optimal", "relu"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("scale", [None, 0.8])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_equals_the_matrix_of_estimates(variant, causal, scale, masked):
    q, k, v = qkv()
    phi = made(4, 6, variant=variant, scale=scale)
    mask = torch.rand(2, 9, generator=generator(7)) < 0.7 if masked else None
    out = linear_attention(q, k, v, phi, causal=causal, key_padding_mask=mask)
    a = float(phi._a()) if variant == "optimal" else 0.0
    for b in range(2):
        for h in range(3):
            expected = reference.attention(
                *(x[b, h].numpy() for x in (q, k, v)),
                omega_of(phi), scale=phi.scale, variant=variant, a=a, causal=causal,
                mask=None if mask is None else mask[b].numpy(),
            )  # fmt: skip
            np.testing.assert_allclose(out[b, h].numpy(), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("causal", [False, True])
def test_unnormalised_outputs_are_sums_of_estimates(variant, causal):
    q, k, _ = qkv(1, 1, 5)
    v = torch.eye(5, dtype=torch.float64)[None, None]
    phi = made(4, 6, variant=variant)
    weights = linear_attention(q, k, v, phi, causal=causal, normalize=False)[0, 0]
    x, y = (z[0, 0].numpy() * math.sqrt(phi.scale) for z in (q, k))
    a = float(phi._a()) if variant == "optimal" else 0.0
    for i in range(5):
        for j in range(5):
            expected = 0.0 if causal and j > i else reference.estimate(x[i], y[j], omega_of(phi), variant, a)
            assert float(weights[i, j]) == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_the_default_scale_and_number_of_features():
    for d in (1, 2, 3, 8, 64):
        phi = FavorFeatures(d)
        assert phi.scale == pytest.approx(d**-0.5)
        assert phi.num_features(d) == max(1, int(d * math.log(d)))
        assert len(phi.projection) == phi.num_features(d)
    assert len(FavorFeatures(8, 7, variant="cosh").projection) == 4
    assert len(FavorFeatures(8, 1, variant="trig").projection) == 1


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("d", [1, 2, 5])
@pytest.mark.parametrize("m", [1, 2, 3, 12])
@pytest.mark.parametrize("norms", ["chi", "sqrt_d", "quantile"])
@pytest.mark.parametrize("orthogonal", [False, True])
def test_every_width_and_count_works(variant, d, m, norms, orthogonal):
    q, k, v = qkv(1, 2, 7, d, dtype=torch.float32)
    phi = FavorFeatures(d, m, orthogonal, norms, variant, generator=generator())
    for causal in (False, True):
        out = linear_attention(q, k, v, phi, causal=causal, normalize=variant != "trig")
        assert out.shape == v.shape
        assert out.isfinite().all()
    if variant != "relu":
        assert phi.variance(q, k).isfinite().all()


# --- the estimator, integrated over all draws -------------------------------------------------------------------------


def hermite(count=90):
    nodes, weights = np.polynomial.hermite_e.hermegauss(count)
    return nodes, weights / math.sqrt(2 * math.pi)


def estimate(phi, x, y):
    """phi(x).phi(y) of single vectors, from the features alone."""
    q, k = torch.as_tensor(x)[None], torch.as_tensor(y)[None]
    if not phi.log_space:
        return float((phi.query(q) * phi.key(k)).sum())
    return float((phi.query(q) + phi.query_factor(q) + phi.key(k)).exp().sum())


def line_moments(phi, x, y):
    """Mean and variance over omega in one dimension, by Gauss-Hermite quadrature over each direction."""
    count = len(phi.projection)
    nodes, weights = hermite(90 if count == 1 else 36)
    found, mass = [], []
    for place in np.ndindex(*[len(nodes)] * count):
        phi.projection.copy_(torch.tensor(nodes[list(place)])[:, None])
        found.append(estimate(phi, np.array([x]), np.array([y])))
        mass.append(np.prod(weights[list(place)]))
    mean = np.dot(mass, found)
    return mean, np.dot(mass, np.square(found)) - mean**2


@pytest.mark.parametrize("variant", ["positive", "cosh", "optimal", "trig"])
@pytest.mark.parametrize("m", [1, 2])
@pytest.mark.parametrize(("x", "y"), [(0.4, 0.7), (0.9, -0.5), (-0.8, -0.6), (0.0, 0.0)])
def test_the_estimate_is_unbiased_and_has_the_stated_variance_in_one_dimension(variant, m, x, y):
    phi = made(1, m if variant in ("cosh", "trig") else 1, variant=variant, scale=1.0)
    mean, variance = line_moments(phi, x, y)
    assert mean == pytest.approx(math.exp(x * y), rel=1e-10)
    stated = phi.variance(torch.tensor([x], dtype=torch.float64), torch.tensor([y], dtype=torch.float64))
    assert float(stated) == pytest.approx(variance, rel=1e-8, abs=1e-12)


@pytest.mark.parametrize("variant", ["positive", "cosh", "trig"])
@pytest.mark.slow
def test_an_odd_number_of_features_has_the_stated_moments_too(variant):
    phi = made(1, 2 if variant == "positive" else 3, variant=variant, scale=0.5)
    mean, variance = line_moments(phi, 0.9, 0.5)
    assert mean == pytest.approx(math.exp(0.225), rel=1e-10)
    q, k = torch.tensor([0.9], dtype=torch.float64), torch.tensor([0.5], dtype=torch.float64)
    assert float(phi.variance(q, k, scaled=True)) == pytest.approx(variance, rel=1e-8)


@pytest.mark.parametrize("variant", ["positive", "cosh", "optimal", "trig"])
@pytest.mark.parametrize("orthogonal", [False, True])
@pytest.mark.parametrize("norms", ["chi", "sqrt_d", "quantile"])
@pytest.mark.parametrize("n", [1, 2, 3])
def test_variance_equals_the_integral_over_all_draws_in_the_plane(variant, orthogonal, norms, n):
    x, y = np.array([0.5, -0.3]), np.array([0.4, 0.7])
    phi = made(2, n * (2 if variant in ("cosh", "trig") else 1), orthogonal=orthogonal, norms=norms, variant=variant)
    a = float(phi._a()) if variant == "optimal" else 0.0
    radii = {
        "chi": None,
        "sqrt_d": [math.sqrt(2)] * n,
        "quantile": list(stats.chi(2).ppf(np.arange(1, n + 1) / (n + 1))),
    }[norms]
    mean, variance = reference.plane_moments(x, y, n, orthogonal=orthogonal, radii=radii, variant=variant, a=a)
    if norms == "chi":
        assert mean == pytest.approx(math.exp(x @ y), rel=1e-10)
    stated = float(phi.variance(torch.tensor(x)[None], torch.tensor(y)[None]))
    assert stated == pytest.approx(variance, rel=1e-8)


@pytest.mark.slow
@pytest.mark.parametrize("options", [
    {}, {"variant": "cosh"}, {"variant": "optimal"}, {"variant": "trig"}, {"orthogonal": False}, {"norms": "sqrt_d"},
    {"norms": "quantile", "variant": "optimal"}, {"variant": "cosh", "num_features": 9},
    {"variant": "trig", "num_features": 9},
], ids=str)  # fmt: skip
def test_mean_and_variance_of_many_draws(options):
    """The whole path, draws included: 6000 of them, at norms where the tails are light."""
    phi = made(3, **{"num_features": 8, **options})
    q, k = torch.tensor([[0.5, 0.2, -0.4], [0.3, -0.5, 0.2]], dtype=torch.float64).split(1)
    found = np.array([estimate(phi.redraw_(), q[0].numpy(), k[0].numpy()) for _ in range(6000)])
    variance = float(phi.variance(q, k, scaled=True))
    assert found.var() == pytest.approx(variance, rel=0.1)
    if phi.norms == "chi":
        exact = math.exp(float((q * k).sum()) * phi.scale)
        assert abs(found.mean() - exact) < 4 * math.sqrt(variance / 6000)


def test_variance_is_the_formula_of_the_paper_and_takes_the_vectors_as_they_are():
    q, k = normal(2, 3, 7, 16) / 3, normal(2, 3, 7, 16, seed=1) / 3
    exact = (2 * (q * k).sum(-1)).exp() * torch.expm1((q + k).square().sum(-1)) / 16
    independent = made(16, 16, orthogonal=False)
    torch.testing.assert_close(independent.variance(q, k), exact)
    torch.testing.assert_close(independent.variance(q * 2, k * 2, scaled=True), independent.variance(q, k))  # 16^(-1/4)
    for scale in (0.3, 2.0):
        torch.testing.assert_close(made(16, 16, orthogonal=False, scale=scale).variance(q, k), exact)
    # The paper's bound for orthogonal directions, M <= D.
    gap = (q * k).sum(-1).exp() - (-(q.square() + k.square()).sum(-1) / 2).exp()
    bound = exact - 2 * 15 / (16 * 18) * gap.square()
    assert (made(16, 16).variance(q, k) <= bound).all()
    assert (made(16, 16).variance(q, k) > 0.5 * bound).all()


def test_variance_of_the_optimal_features_is_the_stated_formula():
    q, k = normal(5, 16) / 4, normal(5, 16, seed=1) / 4
    phi = made(16, 16, orthogonal=False, variant="optimal", scale=1.0).calibrate(q, k)
    a, z = float(phi._a()), (q + k).square().sum(-1)
    assert float(phi.mean_square) == pytest.approx(float((q[:, None] + k).square().sum(-1).mean()))
    kappa = (q * k).sum(-1).exp()
    second = kappa**2 * (1 - 4 * a) ** 16 * (1 - 8 * a) ** -8 * ((2 * (1 - 4 * a) / (1 - 8 * a) - 1) * z).exp()
    torch.testing.assert_close(phi.variance(q, k), (second - kappa**2) / 16)
    # The figures of Choromanski's setting: norms 1 and 1.5, cosine 1/2, D = M = 16.
    for norm, plain, best in ((1.0, 1.193, 0.569), (1.5, 53.3, 4.45)):
        x = torch.zeros(1, 16).double()
        y = x.clone()
        x[0, 0], y[0, 0], y[0, 1] = norm, norm / 2, norm * math.sqrt(0.75)
        square = math.exp(norm**2)
        assert float(made(16, 16, orthogonal=False).variance(x, y)) / square == pytest.approx(plain, rel=2e-3)
        phi = made(16, 16, orthogonal=False, variant="optimal", scale=1.0).calibrate(x, y)
        assert float(phi.variance(x, y)) / square == pytest.approx(best, rel=2e-3)


@settings(max_examples=40)
@given(st.integers(1, 40), st.integers(1, 50), st.floats(0.0, 30.0), st.integers(0, 10**6))
def test_orthogonal_directions_never_have_more_variance(d, m, size, seed):
    q, k = size * normal(2, d, seed=seed) / d**0.5, size * normal(2, d, seed=seed + 1) / d**0.5
    for variant in ("positive", "cosh", "optimal"):
        pair = [made(d, m, orthogonal=x, variant=variant).variance(q, k) for x in (True, False)]
        assert (pair[0] >= 0).all()
        assert (pair[0] <= pair[1] * (1 + 1e-9)).all()


@settings(max_examples=40)
@given(st.floats(1e-6, 1e4), st.integers(1, 300))
def test_a_minimises_the_second_moment(level, d):
    def log_second(a):
        return d * math.log1p(-4 * a) - d / 2 * math.log1p(-8 * a) + 2 * (1 - 4 * a) / (1 - 8 * a) * level

    a = float(best_a(torch.tensor(level), d))
    assert a <= 0
    assert log_second(a) <= min(log_second(a * 1.01), log_second(a * 0.99), log_second(0.0)) + 1e-9 * level


def test_variance_of_hostile_vectors():
    q = torch.tensor([[0.0, 0.0], [1e3, 0.0], [1e3, 0.0], [1e20, 1.0]], dtype=torch.float64)
    k = torch.tensor([[0.0, 0.0], [-1e3, 0.0], [1e3, 0.0], [-1e20, 1.0]], dtype=torch.float64)
    for variant in ("positive", "cosh", "optimal"):
        for norms in ("chi", "sqrt_d", "quantile"):
            found = made(2, 4, variant=variant, norms=norms).variance(q, k)
            assert not found.isnan().any()
            assert found[2] == (torch.inf if norms == "chi" else 0)  # fixed lengths never reach exp(1e6)
            assert found[1] == 0  # exp(-2e6): too small for a number
    assert made(2, 4).variance(q[:1], k[:1]) == 0
    assert made(2, 4).variance(q[:0], k[:0]).shape == (0,)
    single = made(2, 4).variance(q[:, None].float(), k.float())
    assert single.shape == (4, 4)
    assert single.dtype == torch.float32


# --- directions -------------------------------------------------------------------------------------------------------


def test_directions_are_orthogonal_in_groups_and_the_last_group_is_cut():
    w = made(8, 20).projection
    cosines = torch.nn.functional.normalize(w) @ torch.nn.functional.normalize(w).T
    for start in (0, 8, 16):
        block = cosines[start : start + 8, start : start + 8]
        torch.testing.assert_close(block, torch.eye(len(block), dtype=torch.float64), atol=1e-6, rtol=0)
    assert cosines[:8, 8:16].abs().max() > 0.1


def test_directions_are_uniform_and_lengths_independent_chi():
    w = made(5, 20000).projection.numpy()
    lengths = np.linalg.norm(w, axis=1)
    assert stats.kstest(lengths, stats.chi(5).cdf).pvalue > 1e-3
    assert stats.kstest(w[:, 2], stats.norm.cdf).pvalue > 1e-3
    assert abs(np.corrcoef(lengths[0::5], lengths[1::5])[0, 1]) < 4 / math.sqrt(4000)
    # QR without the signs of R would leave the first coordinates of the directions one-sided.
    first = w[0::5] / lengths[0::5, None]
    assert (np.abs((first > 0).mean(0) - 0.5) < 4 * 0.5 / math.sqrt(4000)).all()


def test_other_lengths():
    torch.testing.assert_close(made(8, 20, norms="sqrt_d").projection.norm(dim=1), torch.full((20,), 8**0.5).double())
    torch.testing.assert_close(
        made(8, 20, norms="sqrt_d", orthogonal=False).projection.norm(dim=1), torch.full((20,), 8**0.5).double()
    )
    lengths = made(8, 20, norms="quantile").projection.norm(dim=1)
    expected = torch.tensor(stats.chi(8).ppf(np.arange(1, 21) / 21))
    torch.testing.assert_close(lengths.sort().values, expected, atol=1e-5, rtol=1e-5)
    assert not torch.equal(lengths, lengths.sort().values)


def test_a_generator_decides_the_draws_and_layers_differ():
    g, h = generator(3), generator(3)
    torch.manual_seed(1)
    first, second = (FavorFeatures(4, 8, generator=g) for _ in range(2))
    torch.manual_seed(2)
    again = FavorFeatures(4, 8, generator=h)
    assert torch.equal(first.projection, again.projection)
    assert not torch.equal(first.projection, second.projection)
    assert torch.equal(first.redraw_().projection, again.redraw_().projection)
    torch.manual_seed(5)
    one = FavorFeatures(4, 8)
    torch.manual_seed(5)
    assert torch.equal(one.projection, FavorFeatures(4, 8).projection)
    assert torch.equal(one.redraw_(generator(3)).projection, FavorFeatures(4, 8, generator=generator(3)).projection)


# --- redraw -----------------------------------------------------------------------------------------------------------


def draws_of(phi, calls, **options):
    q, k, v = qkv(1, 1, 3, phi.head_dim, dtype=torch.float32)
    seen = []
    for _ in range(calls):
        linear_attention(q, k, v, phi, **options)
        seen.append(phi.projection.clone())
    return seen


def changes(seen, before):
    return [i + 1 for i, (a, b) in enumerate(zip([before, *seen[:-1]], seen, strict=True)) if not torch.equal(a, b)]


def test_every_kth_call_in_training_redraws_and_none_in_eval():
    phi = FavorFeatures(4, 8, redraw_interval=3, generator=generator())
    start = phi.projection.clone()
    assert changes(draws_of(phi, 10), start) == [3, 6, 9]
    now = phi.projection.clone()
    assert changes(draws_of(phi.eval(), 10), now) == []
    assert changes(draws_of(phi.train(), 3), now) == [2]  # the 12th call in training
    never = FavorFeatures(4, 8, redraw_interval=None)
    assert changes(draws_of(never, 5), never.projection.clone()) == []
    always = FavorFeatures(4, 8, redraw_interval=1)
    assert changes(draws_of(always, 3), always.projection.clone()) == [1, 2, 3]


def test_a_call_that_continues_a_state_does_not_redraw():
    phi = FavorFeatures(4, 8, redraw_interval=1, generator=generator())
    q, k, v = qkv(1, 1, 6, dtype=torch.float32)
    _, state = linear_attention(q, k, v, phi, causal=True, return_state=True)
    drawn = phi.projection.clone()
    linear_attention(q, k, v, phi, causal=True, initial_state=state)
    assert torch.equal(drawn, phi.projection)


def test_queries_and_keys_of_one_call_see_the_same_draw():
    phi = FavorFeatures(4, 8, redraw_interval=1, generator=generator())
    q, k, v = qkv(1, 1, 6, dtype=torch.float32)
    out = linear_attention(q, k, v, phi)
    torch.testing.assert_close(out, linear_attention(q, k, v, phi.eval()))


def test_an_interrupted_run_draws_what_the_whole_one_draws():
    whole = FavorFeatures(4, 8, redraw_interval=3, generator=generator(), variant="optimal")
    resumed = FavorFeatures(4, 8, redraw_interval=3, generator=generator(9), variant="optimal")
    draws_of(whole, 4)
    resumed.load_state_dict(whole.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(draws_of(whole, 6), draws_of(resumed, 6), strict=True))
    assert torch.equal(whole.mean_square, resumed.mean_square)


def test_gradients_survive_a_redraw_between_forward_and_backward():
    phi = FavorFeatures(4, 8, generator=generator())
    q, k, v = (x.requires_grad_() for x in qkv(1, 1, 6, dtype=torch.float32))
    expected = torch.autograd.grad(linear_attention(q, k, v, phi).square().sum(), (q, k, v))
    out = linear_attention(q, k, v, phi).square().sum()
    phi.redraw_()
    torch.testing.assert_close(torch.autograd.grad(out, (q, k, v)), expected, rtol=0, atol=0)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_recomputes_with_the_same_draw(reentrant):
    from torch.utils.checkpoint import checkpoint

    q, k, v = (x.requires_grad_() for x in qkv(1, 1, 6, dtype=torch.float32))

    def gradients(wrapped):
        phi = FavorFeatures(4, 8, redraw_interval=2, generator=generator(), variant="optimal")
        found = []
        for _ in range(3):
            if wrapped:
                out = checkpoint(lambda *x: linear_attention(*x, phi), q, k, v, use_reentrant=reentrant)
            else:
                out = linear_attention(q, k, v, phi)
            found += torch.autograd.grad(out.square().sum(), (q, k, v)) if not reentrant else backward(out)
        return found

    def backward(out):
        for x in (q, k, v):
            x.grad = None
        out.square().sum().backward()
        return [x.grad.clone() for x in (q, k, v)]

    torch.testing.assert_close(gradients(True), gradients(False), rtol=0, atol=0)


# --- A of the optimal features ----------------------------------------------------------------------------------------


def test_mean_pair_square_is_the_mean_over_the_pairs_of_a_head():
    q, k = normal(2, 4, 5, 3), normal(2, 2, 7, 3, seed=1)
    mask = torch.rand(2, 7, generator=generator()) < 0.6
    grouped = k.repeat_interleave(2, 1)
    pairs = (q.unsqueeze(3) + grouped.unsqueeze(2)).square().sum(-1)  # (B, H, T, S)
    torch.testing.assert_close(mean_pair_square(q, k, None), pairs.mean())
    per_row = torch.stack([pairs[b][:, :, mask[b]].mean() for b in range(2)])
    torch.testing.assert_close(mean_pair_square(q, k, mask), per_row.mean())
    own = q[:, :2]
    pairs = (own.unsqueeze(3) + own.unsqueeze(2)).square().sum(-1)
    square = torch.ones(2, 5, dtype=torch.bool)
    square[1, 2:] = False
    expected = (pairs[0].mean() + pairs[1][:, :2, :2].mean()) / 2
    torch.testing.assert_close(mean_pair_square(own, own, square), expected)


def test_the_first_call_chooses_a_and_later_ones_keep_it():
    phi = FavorFeatures(4, 64, variant="optimal", generator=generator())
    assert float(phi.mean_square) < 0
    q, k, v = qkv(size=0.3, dtype=torch.float32)
    first = linear_attention(q, k, v, phi)
    chosen = phi.mean_square.clone()
    torch.testing.assert_close(chosen.double(), mean_pair_square(q, k, None) / 2)
    linear_attention(q * 5, k * 5, v, phi.eval())
    assert torch.equal(chosen, phi.mean_square)
    assert torch.equal(first, linear_attention(q, k, v, phi))
    copied = copy.deepcopy(phi)
    linear_attention(q * 5, k * 5, v, copied)
    assert torch.equal(chosen, copied.mean_square)
    loaded = FavorFeatures(4, 64, variant="optimal")
    loaded.load_state_dict(phi.state_dict())
    linear_attention(q * 5, k * 5, v, loaded.eval())
    assert torch.equal(chosen, loaded.mean_square)


def test_a_scheduled_redraw_fits_a_to_its_batch():
    phi = FavorFeatures(4, 64, variant="optimal", redraw_interval=2, generator=generator())
    q, k, v = qkv(size=0.3, dtype=torch.float32)
    linear_attention(q, k, v, phi)
    linear_attention(q * 2, k * 2, v, phi)
    torch.testing.assert_close(phi.mean_square.double(), mean_pair_square(q * 2, k * 2, None) / 2)


def test_padding_and_what_is_not_finite_do_not_touch_a():
    q, k, v = qkv(dtype=torch.float32)
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[:, 6:] = False
    dirty_q, dirty_k, dirty_v = q.clone(), k.clone(), v.clone()
    for x in (dirty_q, dirty_k, dirty_v):
        x[:, :, 6:] = torch.nan
    clean, dirty = (FavorFeatures(4, 8, variant="optimal", generator=generator()) for _ in range(2))
    expected = linear_attention(q[:, :, :6], k[:, :, :6], v[:, :, :6], clean)
    out = linear_attention(dirty_q, dirty_k, dirty_v, dirty, key_padding_mask=mask)
    torch.testing.assert_close(out[:, :, :6], expected)
    torch.testing.assert_close(clean.mean_square, dirty.mean_square)
    nothing = FavorFeatures(4, 8, variant="optimal")
    assert (linear_attention(q, k, v, nothing, key_padding_mask=torch.zeros_like(mask)) == 0).all()
    assert float(nothing.mean_square) < 0
    assert linear_attention(q[:, :, :0], k[:, :, :0], v[:, :, :0], nothing).shape == (2, 3, 0, 5)


def test_without_a_call_or_a_calibration_unit_variance_is_assumed():
    phi = made(16, 8, variant="optimal")
    assert float(phi._a()) == pytest.approx(float(best_a(torch.tensor(2 * 16 / 4.0), 16)))


@pytest.mark.slow
def test_optimal_features_have_a_much_smaller_error_than_plain_ones_in_one_call():
    q, k, v = (0.5 * normal(1, 1, 128, 64, seed=i, dtype=torch.float32) for i in range(3))
    exact = torch.nn.functional.scaled_dot_product_attention(q, k, v)

    def error(variant, **options):
        found = []
        for seed in range(12):
            phi = FavorFeatures(64, 256, variant=variant, generator=generator(seed), **options)
            found.append(float((linear_attention(q, k, v, phi) - exact).square().sum() / exact.square().sum()))
        return math.sqrt(np.mean(found))

    assert error("optimal") < 0.9 * error("positive")
    assert error("optimal") < 0.4


# --- gradients, precision, time ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
def test_gradients_of_queries_keys_and_values_are_exact(variant, causal, normalize):
    if variant == "trig" and normalize:
        pytest.skip("refused")
    q, k, v = (x.requires_grad_() for x in qkv(1, 2, 5, 3, 2, size=0.7))
    phi = made(3, 5, variant=variant).eval()
    mask = torch.tensor([[True, True, False, True, True]])

    def out(q, k, v):
        return linear_attention(q, k, v, phi, causal=causal, normalize=normalize, key_padding_mask=mask)

    assert torch.autograd.gradcheck(out, (q, k, v))


@pytest.mark.parametrize("variant", ["positive", "cosh", "optimal", "relu"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_is_close_to_float64(variant, causal, dtype):
    q, k, v = qkv(t=150, d=16, dtype=dtype)
    phi = made(16, 40, variant=variant)
    exact = linear_attention(q.double(), k.double(), v.double(), phi, causal=causal)
    out = linear_attention(q, k, v, phi.float(), causal=causal)
    assert out.dtype == dtype
    limit = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    assert (out.double() - exact).norm() < limit * exact.norm()


@pytest.mark.parametrize("variant", ["positive", "cosh", "optimal"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("size", [30.0, 1e2, 1e4, 1e8])
def test_large_norms_neither_overflow_nor_blur_queries(variant, causal, size):
    q, k, v = qkv(t=20, dtype=torch.float32)
    phi = made(4, 8, variant=variant).float()
    linear_attention(q, k, v, phi)
    for a, b in ((q * size, k), (q, k * size), (q * size, k * size), (q * 0, k * 0)):
        a, b, c = (x.clone().requires_grad_() for x in (a, b, v))
        out = linear_attention(a, b, c, phi, causal=causal)
        out.sum().backward()
        assert out.isfinite().all()
        assert all(x.grad.isfinite().all() for x in (a, b, c))
        assert (out <= v.amax(2, keepdim=True) + 1e-4).all()
    if size <= 100:  # further out a logarithm of 1e4 is rounded to .001
        exact = linear_attention(q.double() * size, k.double(), v.double(), phi, causal=causal)
        out = linear_attention(q * size, k, v, phi, causal=causal)
        assert (out.double() - exact).abs().amax() < 3e-4


def test_causal_outputs_do_not_depend_on_later_tokens_bitwise():
    q, k, v = qkv(t=150, dtype=torch.float32)
    for variant in ("positive", "optimal", "relu"):
        phi = made(4, 8, variant=variant).float()
        first = linear_attention(q, k, v, phi, causal=True)
        other = [x.clone() for x in (q, k, v)]
        for x in other:
            x[:, :, 70:] = 50 * torch.randn_like(x[:, :, 70:])
        assert torch.equal(linear_attention(*other, phi, causal=True)[:, :, :70], first[:, :, :70])


@pytest.mark.parametrize("variant", ["positive", "cosh", "optimal", "relu"])
@pytest.mark.parametrize("normalize", [False, True])
def test_step_by_step_equals_the_whole(variant, normalize):
    q, k, v = qkv(t=20)
    phi = made(4, 8, variant=variant)
    whole = linear_attention(q, k, v, phi, causal=True, normalize=normalize)
    out, state = linear_attention(
        *(x[:, :, :11] for x in (q, k, v)), phi, causal=True, normalize=normalize, return_state=True
    )
    steps = [out]
    for t in range(11, 20):
        one = (x[:, :, t : t + 1] for x in (q, k, v))
        out, state = linear_attention(
            *one, phi, causal=True, normalize=normalize, initial_state=state, return_state=True
        )
        steps.append(out)
    torch.testing.assert_close(torch.cat(steps, 2), whole)
    assert state.s.shape == (2, 3, 8, 5)


@pytest.mark.parametrize("variant", ["positive", "optimal"])
@pytest.mark.parametrize("causal", [False, True])
def test_padding_changes_nothing_and_a_batch_is_its_rows(variant, causal):
    q, k, v = qkv(t=70)
    phi = made(4, 8, variant=variant)
    linear_attention(q, k, v, phi)
    mask = torch.ones(2, 70, dtype=torch.bool)
    mask[1, 50:] = False
    out = linear_attention(q, k, v, phi, causal=causal, key_padding_mask=mask)
    for b, t in ((0, 70), (1, 50)):
        row = linear_attention(*(x[b : b + 1, :, :t] for x in (q, k, v)), phi, causal=causal)
        torch.testing.assert_close(out[b : b + 1, :, :t], row)
    empty = linear_attention(q, k, v, phi, causal=causal, key_padding_mask=torch.zeros_like(mask))
    assert (empty == 0).all()


def test_heads_of_queries_may_share_keys():
    q, k, v = qkv(h=4)
    phi = made(4, 8)
    for causal in (False, True):
        out = linear_attention(q, k[:, :2], v[:, :2], phi, causal=causal)
        repeated = (x[:, :2].repeat_interleave(2, 1) for x in (k, v))
        torch.testing.assert_close(out, linear_attention(q, *repeated, phi, causal=causal))


@pytest.mark.slow
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("variant", ["positive", "optimal", "relu"])
@pytest.mark.parametrize("causal", [False, True])
def test_compiles_as_one_graph_and_redraws_in_it(training, variant, causal):
    torch.compiler.reset()
    q, k, v = (x.requires_grad_() for x in qkv(1, 2, 40, dtype=torch.float32))
    phis = [
        FavorFeatures(4, 8, variant=variant, redraw_interval=2, generator=generator()).train(training) for _ in range(2)
    ]
    step = torch.compile(
        lambda q, k, v: linear_attention(q, k, v, phis[0], causal=causal), fullgraph=True, backend="aot_eager"
    )
    for _ in range(5):
        out, expected = step(q, k, v), linear_attention(q, k, v, phis[1], causal=causal)
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(
            torch.autograd.grad(out.square().sum(), (q, k, v)),
            torch.autograd.grad(expected.square().sum(), (q, k, v)),
        )
        torch.testing.assert_close(dict(phis[0].state_dict()), dict(phis[1].state_dict()))
    assert int(phis[0].schedule[1]) == (2 if training else 0)


def test_copies_and_the_meta_device():
    phi = FavorFeatures(4, 8, variant="optimal", generator=generator())
    q, k, v = qkv(dtype=torch.float32)
    out = linear_attention(q, k, v, phi)
    assert torch.equal(linear_attention(q, k, v, copy.deepcopy(phi)), out)
    with torch.device("meta"):
        empty = FavorFeatures(4, 8, variant="optimal", norms="quantile")
    assert empty.projection.is_meta
    empty.load_state_dict(phi.state_dict(), assign=True)
    assert torch.equal(linear_attention(q, k, v, empty.eval()), out)
    half = copy.deepcopy(phi).bfloat16()
    assert (linear_attention(q, k, v, half) - out).norm() < 0.02 * out.norm()


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("options", "error", "message"), [
    ({"head_dim": 0}, ValueError, "head_dim must be at least 1; got 0"),
    ({"head_dim": 2.0}, TypeError, "head_dim must be an integer; got 2.0"),
    ({"num_features": 0}, ValueError, "num_features must be at least 1; got 0"),
    ({"num_features": -3}, ValueError, "num_features must be at least 1; got -3"),
    ({"num_features": True}, TypeError, "num_features must be an integer; got True"),
    ({"variant": "sin"}, ValueError, "variant must be one of 'positive', .*got 'sin'"),
    ({"norms": "one"}, ValueError, "norms must be one of 'chi', .*got 'one'"),
    ({"orthogonal": 1}, TypeError, "orthogonal must be a bool; got 1"),
    ({"redraw_interval": 0}, ValueError, "redraw_interval must be at least 1; got 0"),
    ({"scale": 0.0}, ValueError, "scale must be greater than 0.0; got 0.0"),
    ({"scale": -1.0}, ValueError, "scale must be greater than 0.0; got -1.0"),
    ({"scale": math.nan}, ValueError, "scale must be finite; got nan"),
    ({"generator": 3}, TypeError, "generator must be a torch.Generator; got int"),
])  # fmt: skip
def test_wrong_options_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        FavorFeatures(**{"head_dim": 4, **options})


def test_wrong_inputs_are_refused():
    q, k, v = qkv()
    with pytest.raises(ValueError, match="width head_dim = 8 on its last axis; got"):
        linear_attention(q, k, v, FavorFeatures(8))
    with pytest.raises(ValueError, match="scale belongs to the feature map: give it to FavorFeatures; got 0.5"):
        linear_attention(q, k, v, FavorFeatures(4), scale=0.5)
    with pytest.raises(ValueError, match="FavorFeatures can be negative"):
        linear_attention(q, k, v, FavorFeatures(4, variant="trig"))
    with pytest.raises(ValueError, match="k must have width head_dim = 4"):
        FavorFeatures(4).variance(q, k[..., :2])
    with pytest.raises(TypeError, match="q must be a tensor; got list"):
        FavorFeatures(4).variance([1.0], k)
    with pytest.raises(ValueError, match='got "relu"'):
        FavorFeatures(4, variant="relu").variance(q, k)
    with pytest.raises(ValueError, match="only the variant \"optimal\" has an A to choose; got 'positive'"):
        FavorFeatures(4).calibrate(q, k)


def test_inputs_stay_as_they_are():
    q, k, v = qkv()
    before = [x.clone() for x in (q, k, v)]
    phi = FavorFeatures(4, 8, variant="optimal", redraw_interval=1)
    linear_attention(q, k, v, phi, causal=True)
    phi.variance(q, k)
    assert all(torch.equal(a, b) for a, b in zip(before, (q, k, v), strict=True))
