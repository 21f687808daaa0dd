import copy

import pytest
import torch
from torch import nn

from kexue.adversarial import LipschitzCritic, lipschitz_report


def network(act=None, dtype=torch.float64):
    torch.manual_seed(0)
    act = act or nn.ReLU()
    return nn.Sequential(nn.Linear(2, 32), act, nn.Linear(32, 32), act, nn.Linear(32, 1)).to(dtype)


def pairs(n=24, dtype=torch.float64):
    g = torch.Generator().manual_seed(1)
    real, fake = torch.randn(2, n, 2, generator=g, dtype=torch.float64).to(dtype)
    return real, 2 * fake + 1


def step_critic():
    """|x| with different slopes on the two sides of 0, plus 1: GN jumps at 0 by a known amount."""
    net = nn.Sequential(nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 1)).double()
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[1.0], [-1.0]]))
        net[0].bias.zero_()
        net[2].weight.copy_(torch.tensor([[1.0, 3.0]]))
        net[2].bias.fill_(1.0)
    return net


def test_a_known_jump_is_measured():
    real, fake = torch.tensor([[2.0]]).double(), torch.tensor([[-1.5]]).double()
    report = lipschitz_report(LipschitzCritic(step_critic(), "gn"), real, fake, repeats=0)
    assert report.jump_max == pytest.approx(1 / (1 + 1) - 1 / (3 + 1), abs=1e-6)
    assert report.jump_share == 1
    assert report.secant_max > 1e6
    assert report.slope_max == pytest.approx((3 / (3 + 5.5)) ** 2, abs=0.7)
    assert report.slope_max <= 1
    plain = lipschitz_report(LipschitzCritic(step_critic(), "none"), real, fake, repeats=0)
    assert plain.jump_max == plain.jump_share == 0
    assert plain.slope_max == pytest.approx(3)
    assert plain.secant_max == pytest.approx(3, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("method", ["none", "sn", "gp", "gn", "gran", "qp"])
def test_only_gradient_normalised_scores_of_piecewise_linear_critics_jump(method, dtype):
    critic = LipschitzCritic(network(dtype=dtype), method)
    report = lipschitz_report(critic, *pairs(dtype=dtype), repeats=0)
    if method in ("gn", "gran"):
        assert report.jump_share > 0.5
        assert report.jump_max > 1e-3
    else:
        assert report.jump_share == 0
    if method in ("gn", "gran", "sn"):
        assert report.slope_max <= 1 + 1e-4
    smooth = LipschitzCritic(network(nn.Tanh(), dtype), method)
    assert lipschitz_report(smooth, *pairs(dtype=dtype), repeats=0).jump_share == 0


def test_slopes_are_those_of_autograd():
    critic = LipschitzCritic(network(), "gn", scale=3.0)
    real, fake = pairs()
    report = lipschitz_report(critic, real, fake, repeats=0)
    x = real.clone().requires_grad_()
    (g,) = torch.autograd.grad(critic(x).sum(), x)
    torch.testing.assert_close(report.slopes[0], g.norm(dim=1))
    assert report.slopes.shape == (3, 24)
    assert report.slope_max == pytest.approx(float(report.slopes.max()))
    assert report.slope_mean == pytest.approx(float(report.slopes.mean()))


@pytest.mark.parametrize("method", ["sn", "gn", "gp", "clip"])
def test_nothing_of_the_critic_changes_and_the_costs_are_measured(method):
    critic = LipschitzCritic(network(), method)
    before = copy.deepcopy(critic.state_dict())
    report = lipschitz_report(critic, *pairs(), repeats=1)
    torch.testing.assert_close(critic.state_dict(), before, rtol=0, atol=0)
    assert all(p.grad is None and p.requires_grad for p in critic.parameters())
    assert report.cost_ratio > 0
    assert report.generator_ratio > 0
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert lipschitz_report(critic, *pairs(), repeats=0).slope_max == pytest.approx(report.slope_max, rel=0.5)


def test_the_report_says_whether_one_derivative_is_enough():
    assert lipschitz_report(LipschitzCritic(network()), *pairs(), repeats=0).first_order
    smooth = lipschitz_report(LipschitzCritic(network(nn.GELU())), *pairs(), repeats=0)
    assert not smooth.first_order
    assert "GELU" in str(smooth)
    asked = lipschitz_report(LipschitzCritic(network(), first_order=False), *pairs(), repeats=0)
    assert not asked.first_order
    assert lipschitz_report(LipschitzCritic(network(nn.GELU()), "clip"), *pairs(), repeats=0).first_order


def test_the_figure_shows_slopes_and_profile(tmp_path):
    from matplotlib.figure import Figure

    report = lipschitz_report(LipschitzCritic(network()), *pairs(), repeats=0)
    figure = Figure()
    report.plot(figure)
    assert [len(axis.get_title()) > 0 for axis in figure.axes] == [True, True]
    figure.savefig(tmp_path / "report.png")
    assert report.position.shape == report.profile.shape
    assert report.profile.abs().max() <= 1
    assert "slope max" in str(report)


def test_bad_input_is_refused():
    critic = LipschitzCritic(network())
    real, fake = pairs()
    with pytest.raises(TypeError, match="must be a LipschitzCritic; got Sequential"):
        lipschitz_report(critic.net, real, fake)
    with pytest.raises(ValueError, match="as many rows"):
        lipschitz_report(critic, real, fake[:3])
    with pytest.raises(ValueError, match="points must be at least 2; got 1"):
        lipschitz_report(critic, real, fake, points=1)
    with pytest.raises(ValueError, match="must have rows; got 0"):
        lipschitz_report(critic, real[:0], fake[:0])
    with pytest.raises(ValueError, match="statistics of the batch"):
        lipschitz_report(LipschitzCritic(nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 1)).double()), real, fake)
