from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kexue.adversarial import QPLoss
from reference import bigan_qp as reference


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("metric", ["l1", "l2"])
@pytest.mark.parametrize("power", [2, 4, 6])
@pytest.mark.parametrize("shape", [(3,), (2, 4, 4), ()])
def test_critic_loss_and_gradient_agree_with_the_reference(metric, power, shape):
    x, y = normal(5, *shape, seed=1), normal(5, *shape, seed=2)
    a, b = ((3 * normal(5, seed=s)).requires_grad_() for s in (3, 4))
    a_, b_ = (s.detach().clone().requires_grad_() for s in (a, b))
    d = [reference.distance(p.numpy(), q.numpy(), metric) for p, q in zip(x, y, strict=True)]
    got = QPLoss(7.0, metric, power).critic(a, b[:, None], x, y)
    want = reference.critic_loss(a_, b_, d, 7.0, power)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    for g, w in zip(torch.autograd.grad(got, (a, b)), torch.autograd.grad(want, (a_, b_)), strict=True):
        torch.testing.assert_close(g, w, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(lambda s, t: QPLoss(7.0, metric, power).critic(s, t, x, y), (a, b))


def test_a_callable_distance_and_pairs_of_several_parts():
    x, y, z, w = (normal(4, 3, seed=s) for s in range(4))
    s, t = normal(4, seed=5), normal(4, seed=6)
    own = QPLoss(metric=lambda a, b: (a - b).abs().amax(1))
    torch.testing.assert_close(own.distance(x, y), (x - y).abs().amax(1))
    both = QPLoss().critic(s, t, (x, z), [y, w])
    d = (x - y).abs().mean(1) + (z - w).abs().mean(1)
    torch.testing.assert_close(both, reference.critic_loss(s, t, d))


def test_the_generator_loss_is_the_mean_difference_and_reaches_both_scores():
    s, t = (normal(6, seed=i).requires_grad_() for i in (0, 1))
    loss = QPLoss().generator(s, t[:, None])
    torch.testing.assert_close(loss, (s - t).mean())
    g, h = torch.autograd.grad(loss, (s, t))
    assert torch.equal(g, torch.full_like(g, 1 / 6))
    assert torch.equal(h, -g)


def test_no_gradient_reaches_the_samples():
    x, y = (normal(3, 2, seed=i).requires_grad_() for i in (0, 1))
    s, t = x.sum(1), y.sum(1)
    (got,) = torch.autograd.grad(QPLoss().critic(s, t, x, y), x)
    d = (x - y).abs().mean(1).detach()
    want = ((s - t) / (10 * d) - 1)[:, None].expand(3, 2) / 3  # through the scores alone
    torch.testing.assert_close(got, want)


@given(d=st.floats(1e-3, 1e3), lam=st.floats(0.1, 100), power=st.sampled_from([2, 4, 6]), share=st.floats(-3, 3))
def test_the_best_critic_of_two_point_masses_has_difference_lam_d(d, lam, power, share):
    loss = QPLoss(lam, power=power)
    x, zero = torch.zeros(1, 2, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)

    def value(scale):
        return -float(loss.critic(zero + scale * lam * d, zero, x, x + d))

    assert math.isclose(value(1.0), (1 - 1 / power) * lam * d, rel_tol=1e-9)
    assert value(share) <= value(1.0) + 1e-9 * lam * d


def test_the_optimal_antisymmetric_critic_is_lipschitz_and_no_other_is_better():
    rng = np.random.default_rng(0)
    p, q, points, lam = rng.dirichlet(np.ones(4)), rng.dirichlet(np.ones(4)), rng.normal(size=(4, 2)), 3.0
    d = np.array([[reference.distance(a, b, "l1") for b in points] for a in points])
    best, divergence = reference.best_two_point(p, q, d, lam)
    assert (np.abs(best) <= lam * d + 1e-12).all()
    assert divergence > 0
    assert reference.best_two_point(p, p, d, lam)[1] == 0
    i, j = (torch.tensor(index) for index in np.indices((4, 4)).reshape(2, -1))
    x, y = torch.tensor(points)[i], torch.tensor(points)[j]
    weight = torch.tensor(np.outer(p, q).ravel())

    def value(delta):  # of a weighted batch, row by row
        zero = torch.zeros(1, dtype=torch.float64)
        rows = [QPLoss(lam).critic(delta[k : k + 1], zero, x[k : k + 1], y[k : k + 1]) for k in range(16)]
        return -float((weight * torch.stack(rows)).sum())

    assert math.isclose(value(torch.tensor(best.ravel())), divergence, rel_tol=1e-9)
    for _ in range(20):
        noise = rng.normal(size=(4, 4)) * 0.1
        assert value(torch.tensor((best + noise - noise.T).ravel())) < divergence


def test_scores_and_samples_swap_like_real_and_fake():
    x, y, s, t = normal(5, 3, seed=0), normal(5, 3, seed=1), normal(5, seed=2), normal(5, seed=3)
    assert torch.equal(QPLoss().critic(s, t, x, y), QPLoss().critic(-t, -s, y, x))


def test_equal_samples_give_zero_and_a_finite_gradient():
    x = torch.ones(2, 3)
    s = torch.zeros(2, requires_grad=True)
    for metric in ("l1", "l2"):
        loss = QPLoss(metric=metric).critic(s, torch.zeros(2), x, x)
        assert loss == 0
        assert torch.isfinite(torch.autograd.grad(loss, s)[0]).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_precision(dtype):
    x, y = normal(8, 5, seed=0, dtype=dtype), normal(8, 5, seed=1, dtype=dtype)
    s, t = ((300 * normal(8, seed=i)).to(dtype) for i in (2, 3))  # squares overflow float16
    loss = QPLoss().critic(s, t, x, y)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    exact = QPLoss().critic(s.double(), t.double(), x.double(), y.double())
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=0)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(QPLoss().critic(s, t, x, y), loss)


def test_no_rows_and_strides():
    empty = torch.zeros(0)
    assert QPLoss().critic(empty, empty, torch.zeros(0, 3), torch.zeros(0, 3)) == 0
    assert QPLoss().generator(empty, empty) == 0
    x, y = normal(3, 4, seed=0), normal(3, 4, seed=1)
    strided = QPLoss().critic(x.T[:, 0], y.T[:, 0], x.T, y.T)
    assert torch.equal(strided, QPLoss().critic(x.T[:, 0].contiguous(), y.T[:, 0].contiguous(), x.T.contiguous(), y.T))


@pytest.mark.slow
def test_compiles_as_one_graph():
    x, y = torch.randn(4, 3), torch.randn(4, 3)
    s, t = torch.randn(4, requires_grad=True), torch.randn(4, 1, requires_grad=True)

    def both(s, t):
        loss = QPLoss()
        return loss.critic(s, t, x, y) + loss.generator(s, t)

    torch.compiler.reset()
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(s, t), both(s, t))
    for a, b in zip(torch.autograd.grad(compiled(s, t), (s, t)), torch.autograd.grad(both(s, t), (s, t)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"lam": 0.0}, ValueError, "greater than 0"),
        ({"lam": -1}, ValueError, "greater than 0"),
        ({"lam": math.nan}, ValueError, "finite"),
        ({"lam": "10"}, TypeError, "number"),
        ({"power": 3}, ValueError, "even; got 3"),
        ({"power": 0}, ValueError, "at least 2; got 0"),
        ({"power": 2.0}, TypeError, "integer"),
        ({"metric": "l3"}, ValueError, "'l3'"),
        ({"validate": 1}, TypeError, "bool"),
    ],
)
def test_bad_settings_are_rejected(change, error, message):
    with pytest.raises(error, match=message):
        QPLoss(**change)


def test_bad_batches_are_rejected():
    loss, s, x = QPLoss(), torch.zeros(3), torch.zeros(3, 2)
    for arguments, error, message in [
        ((s, torch.zeros(4), x, x), ValueError, "same size; got 3 and 4"),
        ((s, s, x, torch.zeros(4, 2)), ValueError, r"\(3, 2\) and \(4, 2\)"),
        ((s, s, torch.zeros(4, 2), torch.zeros(4, 2)), ValueError, "4 samples; got 3"),
        ((torch.zeros(3, 2), s, x, x), ValueError, r"\(B,\) or \(B, 1\); got \(3, 2\)"),
        ((s.long(), s, x, x), TypeError, "floating"),
        ((s, s, x.numpy(), x), TypeError, "ndarray"),
        ((s, s, (x, x), x), ValueError, "2 and 1"),
        ((s, s, (), ()), ValueError, "empty"),
        ((s, s, torch.tensor(1.0), torch.tensor(1.0)), ValueError, "single number"),
        ((s, s, torch.zeros(3, 0), torch.zeros(3, 0)), ValueError, r"\(3, 0\)"),
        ((torch.tensor([0.0, math.nan, 0.0]), s, x, x), ValueError, "score_real must be finite; got 1 of 3"),
        ((s, s, x, torch.full((3, 2), math.inf)), ValueError, "distance must be finite; got 3 of 3"),
    ]:
        with pytest.raises(error, match=message):
            loss.critic(*arguments)
    with pytest.raises(ValueError, match="score_fake must be finite"):
        loss.generator(s, s / 0)


def test_a_callable_that_is_no_distance_is_rejected():
    s, x, y = torch.zeros(3), torch.zeros(3, 2), torch.arange(6.0).reshape(3, 2)
    for metric, message in [
        (lambda a, b: (b - a).sum(1), "negative; got -9"),
        (lambda a, b: (b - a).relu().sum(1), "symmetric"),
        (lambda a, b: a - b, r"\(3,\); got \(3, 2\)"),
        (lambda a, b: 1.0, "float"),
    ]:
        with pytest.raises(ValueError, match=message):
            QPLoss(metric=metric).critic(s, s, y, x)
