import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kexue.stats import _gumbel_kernel as kernel
from kexue.stats import gumbel_max, gumbel_softmax, kl_to_uniform, rsample_normal, st_embedding
from kexue.stats._noise import Noise, draw_seed, draw_uniform
from reference import reparameterization as reference

CPU = torch.device("cpu")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def logits_like(*shape, dtype=torch.float64, seed=1, scale=2.0):
    return (scale * torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)).to(dtype).requires_grad_()


@pytest.fixture(params=["few numbers", "blocks"])
def path(request, monkeypatch):
    """Both ways to compute, whatever the size."""
    monkeypatch.setattr(kernel, "SMALL", 2**62 if request.param == "few numbers" else -1)


def noise_of(shape, dtype, seed=0):
    """The noise that a call with this seed draws, for logits of one block."""
    return Noise(draw_seed(seeded(seed)), dtype, CPU).exponential_(torch.empty(shape, dtype=dtype)).double()


@pytest.mark.parametrize("tau", [1.0, 0.3, 5.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.usefixtures("path")
def test_soft_sample_and_its_gradient_equal_the_formula(tau, dtype):
    x = logits_like(7, 19, dtype=dtype)
    y = gumbel_softmax(x, tau, generator=seeded())
    exact = x.detach().double().requires_grad_()
    noise = noise_of(x.shape, torch.float64 if dtype == torch.float64 else torch.float32)
    expected = reference.soft_sample(exact, noise, tau)
    tolerance = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=tolerance)
    upstream = torch.randn(7, 19, generator=seeded(5), dtype=torch.float64).to(dtype)
    got = torch.autograd.grad(y, x, upstream)[0]
    want = torch.autograd.grad(expected, exact, upstream.double())[0]
    assert (y.dtype, got.dtype) == (dtype, dtype)
    torch.testing.assert_close(got.double(), want, rtol=10 * tolerance, atol=10 * tolerance / min(tau, 1))


@pytest.mark.parametrize("tau", [1.0, 0.4])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("path")
def test_straight_through_is_the_one_hot_of_the_soft_sample_with_its_gradient(tau, dtype):
    x = logits_like(5, 40, dtype=dtype)
    hard, index = gumbel_softmax(x, tau, True, generator=seeded(), return_index=True)
    soft = gumbel_softmax(x, tau, generator=seeded())
    assert torch.equal(hard, torch.nn.functional.one_hot(index, 40).to(dtype))
    assert torch.equal(soft.gather(1, index[:, None]).squeeze(1), soft.amax(1))
    upstream = torch.randn(5, 40, generator=seeded(5)).to(dtype)
    grads = [torch.autograd.grad(y, x, upstream)[0] for y in (hard, soft)]
    torch.testing.assert_close(*grads)


@pytest.mark.usefixtures("path")
def test_soft_sample_passes_gradcheck_twice():
    x = logits_like(3, 4)
    for tau in (1.0, 0.7):
        function = lambda o, tau=tau: gumbel_softmax(o, tau, generator=seeded())  # noqa: E731
        assert torch.autograd.gradcheck(function, x)
        assert torch.autograd.gradgradcheck(function, x)


@pytest.mark.parametrize("tau", [1.0, 0.3, 4.0])
def test_rao_gradient_is_the_mean_over_noise_with_the_same_winner(tau):
    x, samples = logits_like(6, 5), 4
    y, index = gumbel_softmax(x, tau, generator=seeded(), estimator="rao", rao_samples=samples, return_index=True)
    assert torch.equal(y, torch.nn.functional.one_hot(index, 5).double())
    upstream = torch.randn(6, 5, generator=seeded(5), dtype=torch.float64)
    got = torch.autograd.grad(y, x, upstream)[0]
    u = draw_uniform(7, seeded(), CPU)
    assert index.tolist() == [reference.choose(row, float(v)) for row, v in zip(x.detach(), u[:6], strict=True)]
    noise = Noise((u[6] * 2.0**53).long(), torch.float64, CPU)
    draws = [noise.exponential_(torch.empty(6, 5, dtype=torch.float64)).clone() for _ in range(samples)]
    for i in range(6):
        row = x.detach()[i].clone().requires_grad_()
        soft = [reference.conditional_sample(row, e[i], int(index[i]), tau) for e in draws]
        assert all(int(s.argmax()) == index[i] for s in soft)
        want = torch.autograd.grad(sum(soft) / samples, row, upstream[i])[0]
        torch.testing.assert_close(got[i], want)


def test_rao_agrees_with_straight_through_on_average_and_has_less_variance():
    x = logits_like(1, 5).detach().expand(20_000, 5).clone().requires_grad_()
    value = torch.tensor([1.0, -2.0, 0.5, 3.0, 0.0], dtype=torch.float64)
    grads = {}
    for name in ("st", "rao"):
        y = gumbel_softmax(x, 0.5, True, generator=seeded(3), estimator=name)
        grads[name] = torch.autograd.grad(((y * value).sum(1) ** 2).sum(), x)[0]
    spread = sum(g.var(0) for g in grads.values()) / len(x)
    assert ((grads["st"].mean(0) - grads["rao"].mean(0)).abs() < 4.5 * spread.sqrt()).all()
    assert grads["rao"].var(0).sum() < grads["st"].var(0).sum()


def test_rao_differentiates_once():
    x = logits_like(2, 3)
    y = gumbel_softmax(x, 1.0, estimator="rao", generator=seeded())
    (grad,) = torch.autograd.grad((y * torch.arange(3.0)).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        grad.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("estimator", ["st", "rao"])
def test_blocks_of_rows_change_nothing_but_the_cut_of_the_noise(monkeypatch, dtype, estimator):
    x = logits_like(10, 16, dtype=dtype)  # 16: no noise is dropped at the end of a block
    upstream = torch.randn(10, 16, generator=seeded(5)).to(dtype)

    def run(hard):
        y = gumbel_softmax(x, 0.7, hard, generator=seeded(), estimator=estimator, rao_samples=1)
        return y.detach(), torch.autograd.grad(y, x, upstream)[0]

    monkeypatch.setattr(kernel, "SMALL", -1)
    whole = [run(hard) for hard in (False, True)]
    monkeypatch.setattr(kernel, "BLOCK", 16 if estimator == "rao" else 48)
    torch.testing.assert_close([run(hard) for hard in (False, True)], whole)
    with torch.no_grad():
        torch.testing.assert_close(gumbel_max(x, 3, seeded()), gumbel_max(x.clone(), 3, seeded()))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 300), st.integers(0, 10**6), st.booleans())
def test_hard_samples_without_gradient_invert_the_distribution_function(classes, seed, masked):
    x = logits_like(3, classes, seed=seed).detach()
    if masked:
        x[:, 1:][torch.rand(3, classes - 1, generator=seeded(seed)) < 0.5] = -math.inf
    u = draw_uniform(3, seeded(seed), CPU)
    expected = [reference.choose(row, float(v)) for row, v in zip(x, u, strict=True)]
    assert gumbel_max(x, generator=seeded(seed)).tolist() == expected
    y = gumbel_softmax(x, 0.5, True, generator=seeded(seed))
    assert torch.equal(y, torch.nn.functional.one_hot(torch.tensor(expected), classes).double())


@pytest.mark.parametrize("u", [0.0, 1.0 - 2.0**-53])
@pytest.mark.parametrize("shared", [False, True])
def test_extreme_uniform_numbers_choose_a_class_that_takes_part(u, shared):
    x = torch.full((2, 400), -math.inf)
    x[:, 130] = x[:, 131] = 0.0
    x = x[:1].expand(2, 400) if shared else x
    index = kernel.invert_cdf(x, torch.full((2,), u, dtype=torch.float64), True)
    assert index.tolist() == [130, 130] if u == 0 else [131, 131]


@pytest.mark.parametrize("estimator", ["st", "rao", "soft"])
@pytest.mark.parametrize("tau", [1.0, 0.2])
@pytest.mark.usefixtures("path")
def test_masked_classes_get_probability_and_gradient_zero(estimator, tau):
    x = logits_like(50, 6, dtype=torch.float32)
    mask = torch.tensor([True, False, True, True, False, True])
    for logits, given_mask in ((x, mask), (x.masked_fill(~mask, -math.inf), None)):
        y = gumbel_softmax(logits, tau, estimator != "soft", generator=seeded(), mask=given_mask, estimator=estimator)
        (grad,) = torch.autograd.grad((y * torch.arange(6.0) ** 2).sum(), x)
        assert (y[:, ~mask] == 0).all()
        assert (grad[:, ~mask] == 0).all()
        assert torch.isfinite(grad).all()
        assert (grad[:, mask] != 0).any()
        torch.testing.assert_close(y.sum(1), torch.ones(50))


@pytest.mark.parametrize("hard", [False, True])
def test_tau_zero_is_a_hard_sample_without_gradient(hard):
    x = logits_like(4, 5, dtype=torch.float32)
    y = gumbel_softmax(x, 0.0, hard)
    assert not y.requires_grad
    assert ((y == 0) | (y == 1)).all()
    assert (y.sum(1) == 1).all()


@pytest.mark.parametrize("tau", [1e-300, 1e-30, 1e-6, 1e6, 1e300])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
@pytest.mark.usefixtures("path")
def test_extreme_temperatures_and_logits_stay_finite(tau, dtype):
    big = {torch.float64: 1e300, torch.float32: 1e37, torch.float16: 6e4}[dtype]
    x = torch.tensor([[big, -big, 0.0], [-big, -big, -big], [0.0, 0.0, -math.inf]], dtype=dtype, requires_grad=True)
    for estimator in ("st", "rao"):
        for hard in (False, True):
            y = gumbel_softmax(x, tau, hard, estimator=estimator, generator=seeded())
            (grad,) = torch.autograd.grad((y * torch.arange(3.0)).sum(), x)
            assert torch.isfinite(y).all()
            assert torch.isfinite(grad).all()
            torch.testing.assert_close(y.sum(1).float(), torch.ones(3), rtol=2e-3, atol=0)


@pytest.mark.parametrize("dim", [0, 1, 2, -2])
@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.usefixtures("path")
def test_any_axis_holds_the_classes(dim, hard):
    x = logits_like(3, 4, 5).transpose(0, 2)  # not contiguous
    y, index = gumbel_softmax(x, 0.5, hard, dim, seeded(), return_index=True)
    last = gumbel_softmax(x.movedim(dim, -1), 0.5, hard, generator=seeded())
    assert torch.equal(y, last.movedim(-1, dim))
    assert torch.equal(index, y.argmax(dim))
    mask = torch.zeros(y.shape, dtype=torch.bool).index_fill(dim, torch.tensor([1]), True)
    only = gumbel_softmax(x, 0.5, hard, dim, seeded(), mask)
    assert torch.equal(only, mask.double())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options", [{"tau": 1.0}, {"tau": 0.3}, {"tau": 1.0, "hard": True}, {"tau": 0.3, "hard": True}]
)
def test_few_numbers_give_the_sample_of_the_blocks(monkeypatch, dtype, options):
    x = logits_like(2, 3, 7, dtype=dtype, scale=5.0)
    with torch.no_grad():
        x += 1e4  # the noise must not drown in large logits
        x[0, 1, 2:] = -math.inf
    upstream = torch.randn(2, 3, 7, generator=seeded(5)).to(dtype)

    def run():
        y, index = gumbel_softmax(x, generator=seeded(), return_index=True, **options)
        return y.detach(), index, torch.autograd.grad(y, x, upstream)[0]

    assert kernel.is_small(x)
    small = run()
    monkeypatch.setattr(kernel, "SMALL", -1)
    torch.testing.assert_close(small, run())
    if "hard" in options:
        assert torch.equal(small[0], torch.nn.functional.one_hot(small[1], 7).to(dtype))


@pytest.mark.usefixtures("path")
def test_one_row_needs_no_batch_axis():
    x = logits_like(5)
    for options in ({}, {"hard": True}, {"estimator": "rao"}, {"tau": 0.0}):
        y, index = gumbel_softmax(x, generator=seeded(), return_index=True, **options)
        row = gumbel_softmax(x[None], generator=seeded(), return_index=True, **options)
        assert (y.shape, index.shape) == ((5,), ())
        assert torch.equal(y, row[0][0])
        assert index == row[1][0]
    out, index = st_embedding(x, torch.eye(5, dtype=torch.float64), 1.0, return_index=True)
    assert (out.argmax(), index.shape) == (index, ())


def test_gradient_of_a_low_precision_embedding_is_summed_in_float32():
    for tau in (0.0, 1.0):
        weight = torch.ones(1, 2, dtype=torch.bfloat16, requires_grad=True)
        st_embedding(torch.zeros(4096, 1, requires_grad=True), weight, tau).sum().backward()
        assert torch.equal(weight.grad, torch.full((1, 2), 4096.0, dtype=torch.bfloat16))


@pytest.mark.usefixtures("path")
def test_shapes_without_rows_and_with_one_class():
    for estimator in ("st", "rao"):
        x = torch.zeros(0, 3, requires_grad=True)
        y, index = gumbel_softmax(x, 1.0, True, estimator=estimator, return_index=True)
        y.sum().backward()
        assert (y.shape, index.shape, x.grad.shape) == ((0, 3), (0,), (0, 3))
    assert gumbel_max(torch.zeros(2, 0, 3)).shape == (2, 0)
    assert gumbel_max(torch.zeros(0, 3), 2).shape == (0, 2)
    assert gumbel_max(torch.zeros(3)).shape == ()
    assert torch.equal(gumbel_softmax(torch.zeros(4, 1), 0.1), torch.ones(4, 1))
    assert kl_to_uniform(torch.zeros(0, 3)).shape == (0,)


@pytest.mark.usefixtures("path")
def test_seeds_rule_the_samples_and_inputs_are_not_touched():
    x = logits_like(30, 50, dtype=torch.float32)
    before = x.detach().clone()
    for options in ({}, {"hard": True}, {"estimator": "rao"}):
        torch.manual_seed(4)
        first = gumbel_softmax(x, **options)
        second = gumbel_softmax(x, **options)
        torch.manual_seed(4)
        assert torch.equal(gumbel_softmax(x, **options), first)
        assert not torch.equal(first, second)
        g = seeded(4)
        assert torch.equal(gumbel_softmax(x, generator=g, **options), first)
        assert torch.equal(gumbel_softmax(x, generator=g, **options), second)
    assert torch.equal(x, before)


def test_rao_draws_the_same_sample_with_and_without_gradient():
    x = logits_like(30, 50, dtype=torch.float32)
    with torch.no_grad():
        without = gumbel_softmax(x, estimator="rao", generator=seeded())
    assert torch.equal(gumbel_softmax(x, estimator="rao", generator=seeded()), without)


@pytest.mark.usefixtures("path")
def test_autocast_and_inference_mode_change_nothing():
    x, weight = logits_like(6, 9, dtype=torch.float32), logits_like(9, 4, dtype=torch.float32, seed=8)

    def run():
        y, out = gumbel_softmax(x, 0.5, generator=seeded()), st_embedding(x, weight, 0.5, seeded())
        both = y.square().sum() + out.square().sum()
        return y, out, *(torch.autograd.grad(both, (x, weight)) if both.requires_grad else ())

    plain = run()
    with torch.autocast("cpu", torch.bfloat16):
        assert all(torch.equal(a, b) for a, b in zip(run(), plain, strict=True))
    with torch.inference_mode():
        assert torch.equal(gumbel_softmax(x, 0.5, generator=seeded()), plain[0])
        assert torch.equal(gumbel_max(x, generator=seeded()), gumbel_max(x.clone(), generator=seeded()))


@pytest.mark.usefixtures("path")
def test_graph_may_be_kept_and_used_twice():
    x = logits_like(4, 5, dtype=torch.float32)
    for estimator in ("st", "rao"):
        loss = (gumbel_softmax(x, 0.5, True, generator=seeded(), estimator=estimator) * torch.arange(5.0)).sum()
        first = torch.autograd.grad(loss, x, retain_graph=True)
        torch.testing.assert_close(torch.autograd.grad(loss, x), first)


@pytest.mark.parametrize("tau", [1.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_embedding_equals_the_one_hot_times_the_weight(tau, dtype):
    x, weight = logits_like(2, 3, 7, dtype=dtype), logits_like(7, 4, dtype=dtype, seed=8)
    mask = torch.tensor([True] * 6 + [False])
    out, index = st_embedding(x, weight, tau, seeded(), mask, return_index=True)
    one_hot = gumbel_softmax(x, tau, True, generator=seeded(), mask=mask)
    expected = one_hot @ weight
    assert torch.equal(out, weight[index])
    torch.testing.assert_close(out, expected)
    upstream = torch.randn(2, 3, 4, generator=seeded(5)).to(dtype)
    tolerance = {"rtol": 3e-2, "atol": 3e-2} if dtype == torch.bfloat16 else {}
    got, want = (torch.autograd.grad(v, (x, weight), upstream) for v in (out, expected))
    torch.testing.assert_close(got, want, **tolerance)


def test_embedding_at_tau_zero_teaches_the_weight_alone():
    x, weight = logits_like(5, 7), logits_like(7, 4, seed=8)
    out, index = st_embedding(x, weight, 0.0, return_index=True)
    grads = torch.autograd.grad(out.sum(), (x, weight), allow_unused=True)
    assert grads[0] is None
    torch.testing.assert_close(grads[1], torch.bincount(index, minlength=7).double()[:, None].expand(7, 4))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_divergence_from_uniform_equals_the_formula(dtype):
    x = logits_like(6, 5, dtype=dtype)
    with torch.no_grad():
        x[2, :3] = -math.inf
        x[3] = torch.tensor([2000.0, 0, 0, -2000, 1])
    expected = torch.stack([reference.kl_to_uniform(row.detach().double()) for row in x])
    torch.testing.assert_close(kl_to_uniform(x).double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(kl_to_uniform(x.movedim(1, 0), 0), kl_to_uniform(x))
    mask = torch.tensor([True, False, True, True, True])
    torch.testing.assert_close(kl_to_uniform(x, mask=mask), kl_to_uniform(x[:, mask]))
    (grad,) = torch.autograd.grad(kl_to_uniform(x).sum(), x)
    assert torch.isfinite(grad).all()
    finite = logits_like(3, 4)
    assert torch.autograd.gradcheck(kl_to_uniform, finite)


ERRORS = [
    (ValueError, "tau", lambda x: gumbel_softmax(x, -0.1)),
    (ValueError, "tau", lambda x: gumbel_softmax(x, math.nan)),
    (TypeError, "tau", lambda x: gumbel_softmax(x, "cold")),
    (TypeError, "tau", lambda x: gumbel_softmax(x, torch.tensor(1.0, requires_grad=True))),
    (TypeError, "logits", lambda x: gumbel_softmax([1.0, 2.0])),
    (TypeError, "logits", lambda x: gumbel_softmax(x.long())),
    (ValueError, "axis", lambda x: gumbel_softmax(x, dim=2)),
    (ValueError, "axis", lambda x: gumbel_softmax(torch.tensor(1.0))),
    (ValueError, "at least one class", lambda x: gumbel_softmax(x[:, :0])),
    (ValueError, "row 1 with no class", lambda x: gumbel_softmax(x.index_fill(0, torch.tensor([1]), -math.inf))),
    (ValueError, "row 1 with no class", lambda x: gumbel_softmax(x, mask=torch.tensor([[True], [False]]))),
    (ValueError, "nan", lambda x: gumbel_softmax(x + math.nan, hard=True)),
    (ValueError, "inf", lambda x: gumbel_softmax(x + math.inf)),
    (TypeError, "mask", lambda x: gumbel_softmax(x, mask=torch.ones(3))),
    (ValueError, "mask", lambda x: gumbel_softmax(x, mask=torch.ones(4, dtype=torch.bool))),
    (ValueError, "mask", lambda x: gumbel_softmax(x, mask=torch.ones(2, 2, 3, dtype=torch.bool))),
    (TypeError, "generator", lambda x: gumbel_softmax(x, generator=3)),
    (ValueError, "estimator", lambda x: gumbel_softmax(x, estimator="reinforce")),
    (ValueError, "hard=True", lambda x: gumbel_softmax(x, hard=True, estimator="soft")),
    (ValueError, "rao_samples", lambda x: gumbel_softmax(x, estimator="rao", rao_samples=0)),
    (ValueError, "k must be at most", lambda x: gumbel_max(x, 4)),
    (ValueError, "k = 3 for 2 classes", lambda x: gumbel_max(x.index_fill(1, torch.tensor([1]), -math.inf), 3)),
    (ValueError, "k must be at least 1", lambda x: gumbel_max(x, 0)),
    (ValueError, "no class", lambda x: gumbel_max(torch.full_like(x, -math.inf))),
    (ValueError, "no class", lambda x: gumbel_max(torch.full((3,), -math.inf).expand(4, 3))),
    (ValueError, "no class", lambda x: gumbel_max(torch.full_like(x, -math.inf), 2)),
    (ValueError, "weight", lambda x: st_embedding(x, torch.ones(4, 2), 1.0)),
    (TypeError, "weight", lambda x: st_embedding(x, torch.ones(3, 2).long(), 1.0)),
    (ValueError, "tau", lambda x: st_embedding(x, torch.ones(3, 2), -1.0)),
    (ValueError, "no class", lambda x: st_embedding(torch.full_like(x, -math.inf), torch.ones(3, 2), 1.0)),
    (ValueError, "finite", lambda x: kl_to_uniform(torch.full_like(x, -math.inf))),
    (ValueError, "finite", lambda x: kl_to_uniform(x + math.nan)),
]


@pytest.mark.parametrize("number", range(len(ERRORS)))
def test_bad_input_is_refused_with_what_came(number):
    kind, message, call = ERRORS[number]
    for grad in (False, True):
        with pytest.raises(kind, match=message):
            call(torch.zeros(2, 3).requires_grad_(grad))


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"hard": True, "tau": 0.5}, {"estimator": "rao"}, {"tau": 0.0}], ids=str)
def test_compiled_as_one_graph_it_draws_the_same(options):
    x = logits_like(4, 6, dtype=torch.float32)
    upstream = torch.randn(4, 6, generator=seeded(5))

    def run(function):
        torch.manual_seed(0)
        y = function(x)
        return (y, *(torch.autograd.grad(y, x, upstream) if y.requires_grad else ()))

    plain = lambda o: gumbel_softmax(o, **options)  # noqa: E731
    compiled = torch.compile(plain, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(compiled), run(plain))


@pytest.mark.slow
def test_other_functions_compile_and_the_temperature_may_change():
    x, weight = logits_like(4, 6, dtype=torch.float32), logits_like(6, 3, dtype=torch.float32, seed=3)

    def function(o, w, tau):
        return st_embedding(o, w, tau).sum(), gumbel_max(o), gumbel_max(o, 2), kl_to_uniform(o)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for tau in (1.0, 0.5, 0.25):
        torch.manual_seed(0)
        got = compiled(x, weight, tau)
        torch.manual_seed(0)
        torch.testing.assert_close(got, function(x, weight, tau))


@pytest.mark.slow
def test_compiled_for_any_number_of_rows_it_draws_the_same():
    def function(o):
        y, index = gumbel_softmax(o, 0.5, True, dim=0, return_index=True)
        return y, index, gumbel_softmax(o, estimator="rao"), gumbel_max(o), gumbel_max(o, 2), rsample_normal(o, o)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (3, 500):
        x = logits_like(4, rows, 6, dtype=torch.float32)
        torch.manual_seed(0)
        got = compiled(x)
        torch.manual_seed(0)
        torch.testing.assert_close(got, function(x))
