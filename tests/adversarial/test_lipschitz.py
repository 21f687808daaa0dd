import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from kexue.adversarial import (
    LipschitzCritic,
    clip_weights_,
    gradient_normalize,
    gradient_penalty,
    w_div_penalty,
)
from reference import gradient_normalization as reference

METHODS = ("none", "clip", "sn", "gp", "gp1", "r1", "div", "gn", "gran", "qp")


def network(act=None, dtype=torch.float64, seed=0, norm=None):
    torch.manual_seed(seed)
    act = act or nn.LeakyReLU(0.2)
    layers = [nn.Linear(3, 8), act, nn.Linear(8, 8), *([norm] if norm else []), act, nn.Linear(8, 1)]
    return nn.Sequential(*layers).to(dtype)


def rows(n=6, dtype=torch.float64, seed=1, *shape):
    g = torch.Generator().manual_seed(seed)
    real, fake = torch.randn(2, n, *(shape or (3,)), generator=g, dtype=torch.float64).to(dtype)
    return real, fake + 0.5


def gradients(loss, net):
    return torch.autograd.grad(loss, list(net.parameters()), allow_unused=True)


def assert_same(found, expected, net):
    torch.testing.assert_close(found, expected)
    for a, b in zip(gradients(found, net), gradients(expected, net), strict=True):
        a, b = (torch.zeros(1) if g is None else g for g in (a, b))
        torch.testing.assert_close(a.double() + 0 * b, b.double() + 0 * a)


@pytest.mark.parametrize("act", [None, nn.Softplus()])
@pytest.mark.parametrize("kind", ["gp", "gp1", "r1"])
@pytest.mark.parametrize("first_order", ["auto", False])
def test_gradient_penalty_equals_the_reference(act, kind, first_order):
    net = network(act)
    real, fake = rows()
    u = torch.rand(6, 1, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    points = real if kind == "r1" else u * real + (1 - u) * fake
    net[-1].weight.data /= reference.slopes(net, points).mean().detach()  # slopes on both sides of 1
    found = gradient_penalty(
        net, real, fake, kind, 3.0, generator=torch.Generator().manual_seed(3), first_order=first_order
    )
    assert_same(found, reference.penalty(net, points, kind, 3.0), net)


@pytest.mark.parametrize("act", [None, nn.Softplus()])
@pytest.mark.parametrize(("k", "p"), [(2.0, 6.0), (1.0, 2.0), (0.5, 3.5)])
def test_w_div_penalty_equals_the_reference_with_unequal_batches(act, k, p):
    net = network(act)
    real, fake = rows()
    assert_same(w_div_penalty(net, real, fake[:4], k, p), reference.w_div(net, real, fake[:4], k, p), net)


def test_the_norm_is_over_all_axes_of_an_image():
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 1)).double()
    real, fake = rows(5, torch.float64, 1, 3, 2, 2)
    n = net[1].weight.norm()
    torch.testing.assert_close(gradient_penalty(net, real, fake, lam=1.0), (n - 1) ** 2)
    torch.testing.assert_close(w_div_penalty(net, real, fake), 2 * n**6)


def test_a_penalty_on_normalised_scores_is_differentiated_twice():
    net = network()
    real, fake = rows()
    for method in METHODS:
        critic = LipschitzCritic(net, method, scale=1.0 if method == "gn" else 1.5).eval()
        if method not in ("sn", "gn", "gran"):
            gradient_penalty(critic, real, fake, "r1", first_order=True)  # the network's own slope, one derivative
        found = gradient_penalty(critic, real, fake, "r1")
        if method == "gn":
            expected = reference.penalty(lambda x: reference.normalize(net, x, "gn", 1e-12), real, "r1", 10.0)
            assert_same(found, expected, net)
        elif method != "sn":
            expected = reference.penalty(critic._twice_differentiable, real, "r1", 10.0)
            torch.testing.assert_close(found, expected)


def test_a_penalty_sees_what_a_subclass_or_a_hook_makes_of_the_scores():
    class Tripled(LipschitzCritic):
        def forward(self, x):
            return super().forward(x) * 3

    net, (x, _) = network(), rows()
    expected = 9 * gradient_penalty(net, x, x, "r1")
    torch.testing.assert_close(gradient_penalty(Tripled(net, "none"), x, x, "r1"), expected)
    critic = LipschitzCritic(net, "none")
    critic.register_forward_hook(lambda module, args, out: out * 3)
    torch.testing.assert_close(gradient_penalty(critic, x, x, "r1"), expected)
    tripled = Tripled(net, "gn", first_order=False)
    torch.testing.assert_close(
        gradient_penalty(tripled, x, x, "r1"), 9 * gradient_penalty(LipschitzCritic(net, "gn"), x, x, "r1")
    )


@pytest.mark.parametrize("loss", ["bce", "hinge", "wasserstein"])
@pytest.mark.parametrize("method", METHODS)
def test_losses_equal_their_formulas(method, loss):
    net, scale = network(), 1.7
    real, fake = rows()
    critic = LipschitzCritic(net, method, loss, scale, lam=2.0, k=1.5, p=3.0).eval()
    kind = {"gn": 1e-12, "gran": 0.1}

    def score(x):
        if method in kind:
            return scale * reference.normalize(net, x, method, kind[method])
        if method == "sn":
            return critic(x)
        return scale * net(x).squeeze(1)

    r, f = score(real), score(fake)
    if method == "qp":
        expected, generator = reference.qp(r, f, real, fake, 2.0), -f.mean()
    elif loss == "bce":
        expected = torch.log1p(torch.exp(-r)).mean() + torch.log1p(torch.exp(f)).mean()
        generator = torch.log1p(torch.exp(-f)).mean()
    elif loss == "hinge":
        expected, generator = (1 - r).clamp(min=0).mean() + (1 + f).clamp(min=0).mean(), -f.mean()
    else:
        expected, generator = f.mean() - r.mean(), -f.mean()
    if method in ("gp", "gp1"):
        u = torch.rand(6, 1, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        expected = expected + reference.penalty(net, u * real + (1 - u) * fake, method, 2.0)
    if method == "r1":
        expected = expected + reference.penalty(net, real, "r1", 2.0)
    if method == "div":
        expected = expected + reference.w_div(net, real, fake, 1.5, 3.0)
    found = critic.critic_loss(real, fake, generator=torch.Generator().manual_seed(3))
    assert_same(found, expected, net)
    torch.testing.assert_close(critic.generator_loss(fake), generator)
    moving = fake.clone().requires_grad_()
    (to_fake,) = torch.autograd.grad(critic.generator_loss(moving), moving)
    values = score(moving).sum() if loss != "bce" or method == "qp" else (-torch.log1p(torch.exp(-score(moving)))).sum()
    torch.testing.assert_close(to_fake, torch.autograd.grad(-values / 6, moving)[0])


@pytest.mark.parametrize("method", METHODS)
def test_critic_loss_reaches_only_the_critic_and_generator_loss_only_the_fakes(method):
    net = network()
    critic = LipschitzCritic(net, method)
    real, fake = (x.requires_grad_() for x in rows())
    critic.critic_loss(real, fake).backward()
    assert real.grad is None
    assert fake.grad is None
    assert net[0].weight.grad.abs().sum() > 0
    critic.zero_grad()
    critic.generator_loss(fake).backward()
    assert fake.grad.abs().sum() > 0
    assert all(p.grad is None for p in net.parameters())
    assert all(p.requires_grad for p in net.parameters())


@pytest.mark.parametrize("method", METHODS)
def test_training_lowers_the_critic_loss_and_separates_real_from_fake(method):
    critic = LipschitzCritic(network(), method, "wasserstein", bound=0.3)
    real, fake = rows(64)
    fake = fake + 2
    optimizer = torch.optim.Adam(critic.net.parameters(), 1e-2)
    first = None
    for _ in range(60):
        loss = critic.critic_loss(real, fake, generator=torch.Generator().manual_seed(0))
        first = loss.item() if first is None else first
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        critic.constrain_()
    assert loss.item() < first
    assert critic(real).mean() > critic(fake).mean()
    if method == "clip":
        assert all(p.abs().max() <= 0.3 for p in critic.net.parameters())


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.1, 10.0), st.sampled_from([nn.LeakyReLU(0.2), nn.Tanh()]))
def test_gn_is_bounded_by_1_and_does_not_feel_a_factor_of_the_critic(seed, factor, act):
    net = network(act, seed=seed)
    x = rows(5, seed=seed)[0]
    y = gradient_normalize(net, x)
    assert (y.abs() <= 1).all()
    torch.testing.assert_close(gradient_normalize(lambda z: factor * net(z), x), y, rtol=1e-4, atol=1e-4)


def test_slopes_inside_cells_follow_the_chain_rule():
    net = network()
    x = rows(50)[0].requires_grad_()
    s = net(x).squeeze(1)
    (g,) = torch.autograd.grad(s.sum(), x)
    n, s = g.norm(dim=1), s.detach()
    for kind, slope in (("gn", n**2 / (n + s.abs()) ** 2), ("gran", n**2 / (n**2 + 0.1))):
        (h,) = torch.autograd.grad(gradient_normalize(net, x, kind).sum(), x)
        torch.testing.assert_close(h.norm(dim=1), slope)
        assert (h.norm(dim=1) <= 1 + 1e-12).all()


def test_a_dead_critic_gives_finite_scores_and_gradients():
    for bias, kind, expected in ((0.0, "gn", 0.0), (3.0, "gn", 1.0), (0.0, "gran", 0.0), (3.0, "gran", 0.0)):
        for eps in (None, 0.0):
            net = nn.Linear(2, 1)
            nn.init.zeros_(net.weight)
            nn.init.constant_(net.bias, bias)
            for first_order in (True, False):
                x = torch.randn(3, 2).requires_grad_()
                y = gradient_normalize(net, x, kind, eps, first_order=first_order)
                torch.testing.assert_close(y, torch.full((3,), expected), rtol=0, atol=1e-5)
                found = torch.autograd.grad(y.sum(), [x, *net.parameters()])
                assert all(torch.isfinite(g).all() for g in found)
    constant = nn.Sequential(nn.Linear(2, 1), nn.Threshold(1e9, 0.5))
    assert torch.isfinite(gradient_normalize(constant, torch.randn(3, 2))).all()
    assert (gradient_normalize(lambda z: torch.zeros(len(z)), torch.randn(3, 2)) == 0).all()


def test_qp_of_identical_pairs_is_zero():
    critic = LipschitzCritic(network(), "qp")
    real = rows()[0]
    loss = critic.critic_loss(real, real)
    assert loss == 0
    assert all(torch.isfinite(g).all() for g in gradients(loss, critic.net))


def test_spectral_norm_divides_by_the_largest_singular_value_and_leaves_the_network_alone():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.ConvTranspose2d(4, 2, 2, 2), nn.ReLU(), nn.Flatten(), nn.Linear(128, 1)
    ).double()
    before = copy.deepcopy(net.state_dict())
    state = torch.random.get_rng_state()
    critic = LipschitzCritic(net, "sn")
    assert torch.equal(torch.random.get_rng_state(), state)
    x = torch.randn(3, 1, 10, 10, dtype=torch.float64)[:, :, :6, :6]
    for _ in range(200):
        critic(x)
    expected = copy.deepcopy(net)
    with torch.no_grad():
        for i in (0, 5):
            expected[i].weight.div_(torch.linalg.matrix_norm(net[i].weight.flatten(1), 2))
        expected[2].weight.div_(torch.linalg.matrix_norm(net[2].weight.transpose(0, 1).flatten(1), 2))
    torch.testing.assert_close(critic(x), expected(x).squeeze(1))
    torch.testing.assert_close(net.state_dict(), before, rtol=0, atol=0)
    critic.eval()
    buffers = [b.clone() for b in critic.buffers()]
    critic(x)
    torch.testing.assert_close(list(critic.buffers()), buffers, rtol=0, atol=0)
    other = LipschitzCritic(copy.deepcopy(net), "sn").eval()
    other.load_state_dict(critic.state_dict())
    assert torch.equal(other(x), critic(x))


def test_spectral_norm_bounds_the_slope():
    critic = LipschitzCritic(network(nn.ReLU()), "sn", scale=2.0)
    x = rows(200)[0].requires_grad_()
    for _ in range(100):
        critic(x)
    (g,) = torch.autograd.grad(critic(x).sum(), x)
    assert g.norm(dim=1).max() <= 2 + 1e-6


def test_batch_norm_is_refused_where_gradients_are_used_and_scored_in_separate_batches_elsewhere():
    real, fake = rows()
    for method in METHODS:
        net = network(norm=nn.BatchNorm1d(8))
        critic = LipschitzCritic(net, method, "wasserstein")
        if method in ("gp", "gp1", "r1", "div", "gn", "gran"):
            with pytest.raises(ValueError, match=r"BatchNorm1d \(3\) with the statistics of the batch"):
                critic.critic_loss(real, fake)
            critic.eval()
            assert torch.isfinite(critic.critic_loss(real, fake))
        elif method == "none":
            expected = net(fake).mean() - net(real).mean()
            torch.testing.assert_close(critic.critic_loss(real, fake), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS)
def test_losses_are_float32_and_gradients_have_the_weights_dtype(method, dtype):
    net = network(dtype=dtype)
    exact = copy.deepcopy(net).double()
    real, fake = rows(6, dtype)
    losses = [LipschitzCritic(n, method).eval() for n in (net, exact)]
    g = [torch.Generator().manual_seed(0) for _ in range(2)]
    low = losses[0].critic_loss(real, fake, generator=g[0])
    high = losses[1].critic_loss(real.double(), fake.double(), generator=g[1])
    assert low.dtype == torch.float32
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    if method not in ("gp", "gp1"):  # other points in other dtypes
        torch.testing.assert_close(low.double(), high, rtol=tolerance, atol=tolerance)
    low.backward()
    assert all(p.grad is None or p.grad.dtype == dtype for p in net.parameters())
    assert losses[0](real).dtype == torch.float32


def test_training_under_autocast_gives_float32_gradients():
    for method in METHODS:
        net = network(dtype=torch.float32)
        real, fake = rows(6, torch.float32)
        critic = LipschitzCritic(net, method)
        with torch.autocast("cpu", torch.bfloat16):
            loss = critic.critic_loss(real, fake)
        loss.backward()
        assert loss.dtype == torch.float32
        assert net[0].weight.grad.dtype == torch.float32


def test_clip_weights_clamps_everything_in_place():
    net = network()
    before = copy.deepcopy(net)
    assert clip_weights_(net, 0.1) is net
    for p, q in zip(net.parameters(), before.parameters(), strict=True):
        assert torch.equal(p, q.clamp(-0.1, 0.1))
    assert clip_weights_(nn.ReLU()) is not None


@pytest.mark.parametrize(
    ("error", "match", "call"),
    [
        (ValueError, "method must be one of .*got 'wgan'", lambda net, x: LipschitzCritic(net, "wgan")),
        (ValueError, "loss must be one of .*got 'mse'", lambda net, x: LipschitzCritic(net, loss="mse")),
        (ValueError, "scale must be greater than 0", lambda net, x: LipschitzCritic(net, scale=0.0)),
        (ValueError, "scale must be finite", lambda net, x: LipschitzCritic(net, scale=math.nan)),
        (ValueError, "lam must be greater than 0", lambda net, x: LipschitzCritic(net, "qp", lam=0)),
        (ValueError, "bound must be greater than 0", lambda net, x: LipschitzCritic(net, "clip", bound=0)),
        (ValueError, "p must be at least 1", lambda net, x: LipschitzCritic(net, "div", p=0.5)),
        (ValueError, "eps must be at least 0", lambda net, x: LipschitzCritic(net, eps=-1.0)),
        (ValueError, "first_order must be", lambda net, x: LipschitzCritic(net, first_order="yes")),
        (TypeError, "net must be an nn.Module; got function", lambda net, x: LipschitzCritic(lambda z: z)),
        (ValueError, "kind must be one of 'gn', 'gran'", lambda net, x: gradient_normalize(net, x, "sn")),
        (ValueError, "eps must be at least 0", lambda net, x: gradient_normalize(net, x, eps=-1e-3)),
        (ValueError, "first_order must be", lambda net, x: gradient_normalize(net, x, first_order=1)),
        (TypeError, "must be an nn.Module or a function; got int", lambda net, x: gradient_normalize(3, x)),
        (TypeError, "x must be a tensor; got list", lambda net, x: gradient_normalize(net, [1.0])),
        (TypeError, "x must be a floating tensor", lambda net, x: gradient_normalize(net, x.long())),
        (
            TypeError,
            "critic's dtype torch.float64; got torch.float32",
            lambda net, x: gradient_normalize(net, x.float()),
        ),
        (ValueError, r"x must have shape \(B, ...\).*got \(3,\)", lambda net, x: gradient_normalize(net, x[0])),
        (ValueError, r"\(B,\) or \(B, 1\); got \(6, 8\)", lambda net, x: gradient_normalize(net[:2], x)),
        (ValueError, r"\(B,\) or \(B, 1\); got \(6, 8\)", lambda net, x: gradient_normalize(lambda z: net[:2](z), x)),
        (TypeError, "must return a tensor; got tuple", lambda net, x: gradient_normalize(lambda z: (net(z),), x)),
        (ValueError, "kind must be one of 'gp'", lambda net, x: gradient_penalty(net, x, x, "r2")),
        (ValueError, "lam must be at least 0", lambda net, x: gradient_penalty(net, x, x, lam=-1)),
        (ValueError, "as many rows.*got 6 and 5", lambda net, x: gradient_penalty(net, x, x[:5])),
        (ValueError, r"equal rows; got \(6, 3\) and \(6, 2\)", lambda net, x: gradient_penalty(net, x, x[:, :2])),
        (ValueError, "must have rows; got 0 and 0", lambda net, x: gradient_penalty(net, x[:0], x[:0])),
        (TypeError, "same dtype; got torch.float64 and torch.float32", lambda net, x: w_div_penalty(net, x, x.float())),
        (ValueError, "k must be at least 0", lambda net, x: w_div_penalty(net, x, x, k=-1.0)),
        (ValueError, "p must be at least 1", lambda net, x: w_div_penalty(net, x, x, p=0.0)),
        (TypeError, "x_fake must be a floating tensor", lambda net, x: w_div_penalty(net, x, x.int())),
        (ValueError, "as many rows", lambda net, x: LipschitzCritic(net, "qp").critic_loss(x, x[:2])),
        (ValueError, "x_fake must have rows; got 0", lambda net, x: LipschitzCritic(net).generator_loss(x[:0])),
        (TypeError, "module must be an nn.Module; got list", lambda net, x: clip_weights_([x])),
        (ValueError, "bound must be greater than 0", lambda net, x: clip_weights_(net, 0.0)),
    ],
)
def test_bad_input_is_refused_with_what_was_expected_and_received(error, match, call):
    with pytest.raises(error, match=match):
        call(network(), rows()[0])
