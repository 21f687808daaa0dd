import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kexue.stats import (
    EMABaseline,
    TemperatureSchedule,
    gradient_stats,
    gumbel_max,
    rsample_normal,
    score_function_loss,
)
from reference import reparameterization as reference


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def sample(n, dtype=torch.float64, seed=0):
    logp = -torch.rand(n, generator=seeded(seed), dtype=torch.float64) * 3
    return logp.to(dtype).requires_grad_(), 2 + torch.randn(n, generator=seeded(seed + 1), dtype=torch.float64)


@pytest.mark.parametrize("baseline", ["none", "mean", "loo", "ema"])
@pytest.mark.parametrize("n", [2, 9, 40])
def test_surrogate_equals_the_formula(baseline, n):
    logp, reward = sample(n)
    loss = score_function_loss(logp, reward, baseline)
    expected = reference.score_function(logp, reward, baseline)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, logp), torch.autograd.grad(expected, logp))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_half_precision_is_summed_in_float32(dtype):
    logp, reward = sample(5000, dtype)
    loss = score_function_loss(logp, reward.to(dtype), "loo")
    assert loss.dtype == torch.float32
    exact = score_function_loss(logp.double(), reward.to(dtype).double(), "loo")
    torch.testing.assert_close(loss.double(), exact, rtol=1e-3, atol=1e-5)
    assert torch.autograd.grad(loss, logp)[0].dtype == dtype


def test_only_the_log_probability_gets_a_gradient():
    logp, reward = sample(6)
    reward.requires_grad_()
    grads = torch.autograd.grad(
        score_function_loss(logp, reward, lambda r: r.mean()), (logp, reward), allow_unused=True
    )
    assert grads[1] is None
    torch.testing.assert_close(grads[0], (reward.mean() - reward).detach() / 6)
    booleans = score_function_loss(logp, reward > 2)
    torch.testing.assert_close(booleans, score_function_loss(logp, (reward > 2).double()).to(booleans))


def test_minimising_raises_the_reward():
    logits, g = torch.zeros(4, requires_grad=True), seeded()
    value = torch.tensor([0.0, 1.0, 2.0, 5.0])
    for _ in range(150):
        index = gumbel_max(logits.expand(32, 4), generator=g)
        loss = score_function_loss(logits.log_softmax(0)[index], value[index], "loo")
        (grad,) = torch.autograd.grad(loss, logits)
        with torch.no_grad():
            logits -= 0.1 * grad
    assert logits.softmax(0)[3] > 0.9


def test_further_axes_are_problems_of_their_own():
    logp, reward = (x.detach().view(5, 4) for x in sample(20))
    for baseline in ("none", "mean", "loo", "ema"):
        whole = score_function_loss(logp, reward, baseline)
        columns = [score_function_loss(logp[:, j], reward[:, j], baseline) for j in range(4)]
        torch.testing.assert_close(whole, torch.stack(columns).mean())


def test_leave_one_out_and_running_mean_are_unbiased_and_the_batch_mean_is_short():
    """Over all 3^3 samples of three draws, weighted by their probabilities: no noise at all."""
    logits = torch.tensor([0.3, -0.5, 1.0], dtype=torch.float64, requires_grad=True)
    value = torch.tensor([1.0, 4.0, -2.0], dtype=torch.float64)
    logp = logits.log_softmax(0)
    exact = torch.autograd.grad((logp.exp() * value).sum(), logits, retain_graph=True)[0]
    triples = torch.cartesian_prod(*[torch.arange(3)] * 3)
    weights = logp.detach()[triples].sum(1).exp()
    for baseline, factor in (("none", 1), ("loo", 1), ("ema", 1), ("mean", 2 / 3), (lambda r: 7.0, 1)):
        loss = sum(w * score_function_loss(logp[t], value[t], baseline) for w, t in zip(weights, triples, strict=True))
        torch.testing.assert_close(-torch.autograd.grad(loss, logits, retain_graph=True)[0], factor * exact)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=5), st.floats(0.0, 0.99), st.integers(0, 10**6))
def test_running_mean_goes_on_from_call_to_call(cuts, decay, seed):
    rewards = torch.randn(sum(cuts), generator=seeded(seed), dtype=torch.float64)
    baseline = EMABaseline(decay)
    got = torch.cat([baseline(part) for part in rewards.split(cuts)])
    expected = reference.ema(rewards.tolist(), decay)
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=1e-6)


def test_running_mean_is_saved_and_restored():
    logp, reward = sample(6)
    first = EMABaseline(0.9)
    score_function_loss(logp, reward, first)
    second = EMABaseline()
    second.load_state_dict(first.state_dict())
    assert torch.equal(second(reward), first(reward))
    assert torch.isfinite(EMABaseline()(torch.full((100_000,), 3.0))).all()
    with pytest.raises(ValueError, match="keys"):
        second.load_state_dict({"decay": 0.9})
    with pytest.raises(ValueError, match="shape"):
        second(torch.zeros(4, 2))


def test_no_samples_give_zero():
    for baseline in ("none", "mean", "loo", "ema"):
        logp = torch.zeros(0, requires_grad=True)
        loss = score_function_loss(logp, torch.zeros(0), baseline)
        loss.backward()
        assert loss == 0


@pytest.mark.parametrize(
    ("kind", "message", "call"),
    [
        (ValueError, "shape", lambda: score_function_loss(torch.zeros(3), torch.zeros(4))),
        (ValueError, "shape", lambda: score_function_loss(torch.tensor(0.0), torch.tensor(0.0))),
        (TypeError, "logp", lambda: score_function_loss(torch.zeros(3).long(), torch.zeros(3))),
        (TypeError, "reward", lambda: score_function_loss(torch.zeros(3), [1.0, 2.0, 3.0])),
        (ValueError, "baseline", lambda: score_function_loss(torch.zeros(3), torch.zeros(3), "median")),
        (TypeError, "baseline", lambda: score_function_loss(torch.zeros(3), torch.zeros(3), 0.5)),
        (ValueError, "baseline", lambda: score_function_loss(torch.zeros(3), torch.zeros(3), lambda r: torch.ones(2))),
        (TypeError, "baseline", lambda: score_function_loss(torch.zeros(3), torch.zeros(3), lambda r: None)),
        (TypeError, "baseline", lambda: score_function_loss(torch.zeros(3), torch.zeros(3), lambda r: r + 1j)),
        (ValueError, "axis of samples", lambda: EMABaseline()(torch.tensor(1.0))),
        (ValueError, "at least 2", lambda: score_function_loss(torch.zeros(1), torch.zeros(1), "loo")),
        (ValueError, "decay", lambda: EMABaseline(1.0)),
        (TypeError, "mu", lambda: rsample_normal(0.0, torch.zeros(3))),
        (TypeError, "log_var", lambda: rsample_normal(torch.zeros(3), torch.zeros(3).long())),
        (ValueError, "broadcast", lambda: rsample_normal(torch.zeros(3), torch.zeros(2))),
        (TypeError, "generator", lambda: rsample_normal(torch.zeros(3), torch.zeros(3), 0)),
        (ValueError, "kind", lambda: TemperatureSchedule("step")),
        (ValueError, "start", lambda: TemperatureSchedule(start=0.0)),
        (ValueError, "end", lambda: TemperatureSchedule("exp", end=0.0)),
        (ValueError, "end", lambda: TemperatureSchedule("linear", end=-1.0)),
        (ValueError, "steps", lambda: TemperatureSchedule(steps=0)),
        (TypeError, "steps", lambda: TemperatureSchedule(steps=10.5)),
        (ValueError, "step", lambda: TemperatureSchedule()(-1)),
    ],
)
def test_bad_input_is_refused(kind, message, call):
    with pytest.raises(kind, match=message):
        call()


def test_normal_sample_is_mu_plus_sigma_eps_with_exact_gradients():
    mu, log_var = torch.randn(3, 1, dtype=torch.float64).requires_grad_(), torch.zeros(4).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: rsample_normal(a, b, seeded()), (mu, log_var))
    z = rsample_normal(mu, log_var + math.log(4.0), seeded())
    eps = torch.randn(3, 4, generator=seeded(), dtype=torch.float64)
    torch.testing.assert_close(z, mu + 2 * eps)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_normal_sample_keeps_the_dtype_and_survives_no_variance(dtype):
    mu, log_var = torch.ones(3, dtype=dtype), torch.full((3,), -math.inf, dtype=dtype, requires_grad=True)
    z = rsample_normal(mu, log_var)
    assert torch.equal(z, mu)
    z.sum().backward()
    assert torch.equal(log_var.grad, torch.zeros(3, dtype=dtype))
    assert rsample_normal(mu[:0], log_var[:0]).shape == (0,)
    torch.manual_seed(1)
    first = rsample_normal(mu, mu)
    torch.manual_seed(1)
    assert torch.equal(rsample_normal(mu, mu), first)


@pytest.mark.parametrize("kind", ["exp", "linear", "cosine"])
@pytest.mark.parametrize(("start", "end"), [(1.0, 0.01), (0.1, 2.0)])
def test_schedules_run_from_start_to_end_and_stay_there(kind, start, end):
    tau = TemperatureSchedule(kind, start, end, 10)
    values = [tau(step) for step in range(11)]
    assert (values[0], values[10], tau(11), tau(10**9)) == (start, end, end, end)
    assert values == sorted(values, reverse=start > end)
    assert tau(5) == pytest.approx(math.sqrt(start * end) if kind == "exp" else (start + end) / 2)
    assert tau(2) == pytest.approx(
        {
            "exp": start * math.exp(-math.log(start / end) * 0.2),
            "linear": 0.8 * start + 0.2 * end,
            "cosine": end + (start - end) * (1 + math.cos(0.2 * math.pi)) / 2,
        }[kind]
    )
    assert TemperatureSchedule("linear", 1.0, 0.0, 4)(4) == 0.0


def test_gradient_stats_finds_the_closed_forms_of_the_normal():
    """f = z^2, sigma 1: variance 4 reparameterised, mu^4 + 14 mu^2 + 15 with the score function."""
    mu, g = torch.tensor(1.0, dtype=torch.float64, requires_grad=True), seeded(2)
    zero = torch.zeros((), dtype=torch.float64)

    def score():
        z = rsample_normal(mu.detach(), zero, g)
        return -score_function_loss((-((z - mu) ** 2) / 2).view(1), (z**2).view(1))

    found = gradient_stats(lambda: rsample_normal(mu, zero, g) ** 2, mu, 1500, exact=lambda: mu**2 + 1)
    assert found.variance.item() == pytest.approx(4, rel=0.15)
    assert abs(found.bias) < 4 * found.standard_error
    found = gradient_stats(score, mu, 1500, exact=2 * mu.detach())
    assert found.variance.item() == pytest.approx(30, rel=0.3)
    assert abs(found.bias) < 4 * found.standard_error
    assert mu.grad is None


def test_gradient_stats_are_mean_and_variance_of_the_gradients():
    a, b = torch.zeros(2, 2, requires_grad=True), torch.tensor(1.0, requires_grad=True)
    unused = torch.zeros(1, requires_grad=True)
    factors = iter(torch.tensor([1e6 + 1, 1e6 + 2, 1e6 + 4]))
    found = gradient_stats(lambda: (a.sum() + 2 * b) * next(factors), [a, b, unused], 3, [a + 1e6, b * 2e6, unused])
    mean, variance = 1e6 + 7 / 3, 7 / 3
    torch.testing.assert_close(found.mean, torch.tensor([mean] * 4 + [2 * mean, 0]).double(), rtol=1e-7, atol=0)
    torch.testing.assert_close(found.variance, torch.tensor([variance] * 4 + [4 * variance, 0]).double())
    torch.testing.assert_close(found.bias, torch.tensor([7 / 3] * 4 + [14 / 3, 0]).double(), rtol=0.05, atol=0)
    assert found.total_variance == pytest.approx(8 * variance)
    assert found.mse == pytest.approx(found.bias_norm**2 + found.total_variance)
    single = gradient_stats(lambda: (a**2).sum(), a, 2)
    assert (single.mean.shape, single.variance.shape, single.bias, single.mse) == ((2, 2), (2, 2), None, None)


def test_baselines_may_be_numbers_arrays_or_tensors():
    logp, reward = sample(4)
    expected = score_function_loss(logp, reward - 1.5)
    for value in (1.5, [1.5] * 4, np.full(4, 1.5), torch.tensor(1.5), torch.full((4,), 1.5, requires_grad=True)):
        torch.testing.assert_close(score_function_loss(logp, reward, lambda r, value=value: value), expected)


def test_gradient_stats_take_an_iterator_of_parameters():
    model = torch.nn.Linear(2, 1)
    found = gradient_stats(lambda: model(torch.ones(2)).sum(), model.parameters(), 2)
    assert torch.equal(found.mean, torch.ones(3).double())


def test_gradient_stats_refuse_what_is_no_estimator():
    x = torch.zeros(2, requires_grad=True)
    for kind, message, call in (
        (TypeError, "fn must be callable", lambda: gradient_stats(x, x)),
        (TypeError, "must return a tensor", lambda: gradient_stats(lambda: 1.0, x)),
        (ValueError, "one floating number", lambda: gradient_stats(lambda: x, x)),
        (ValueError, "depends on params", lambda: gradient_stats(lambda: torch.tensor(1.0), x)),
        (
            ValueError,
            "depends on params",
            lambda: gradient_stats(lambda: (2 * torch.ones(2, requires_grad=True)).sum(), x),
        ),
        (ValueError, "at least one tensor", lambda: gradient_stats(lambda: x.sum(), [])),
        (ValueError, "require gradients", lambda: gradient_stats(lambda: x.sum(), x.detach())),
        (TypeError, "params must be tensors", lambda: gradient_stats(lambda: x.sum(), [1.0])),
        (TypeError, "params must be tensors; got NoneType", lambda: gradient_stats(lambda: x.sum(), None)),
        (TypeError, "exact must be tensors; got float", lambda: gradient_stats(lambda: x.sum(), x, 2, 1.0)),
        (TypeError, "exact must be tensors; got float", lambda: gradient_stats(lambda: x.sum(), x, 2, [1.0])),
        (ValueError, "n must be at least 2", lambda: gradient_stats(lambda: x.sum(), x, 1)),
        (ValueError, "exact", lambda: gradient_stats(lambda: x.sum(), x, 2, torch.zeros(3))),
    ):
        with pytest.raises(kind, match=message):
            call()
