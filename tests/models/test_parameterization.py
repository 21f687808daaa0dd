"""Unit activations, scheduled residuals, NTK layers."""

import copy
import io
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from kexue.models import NTKLinear, ScheduledResidual, unit_activation
from kexue.models._activations import ACTIVATIONS
from reference import transformer_initialization as reference


def g(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, dtype=torch.float64, seed=1):
    return torch.randn(*shape, generator=g(seed), dtype=dtype)


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("name", list(ACTIVATIONS))
def test_a_unit_activation_has_second_moment_one(name, center):
    act = unit_activation(name, center)
    mean, second = reference.moments(lambda z: float(act(torch.tensor(z, dtype=torch.float64))), (-3.0, -1.0, 3.0, 6.0))
    assert second == pytest.approx(1, abs=1e-9)
    if center:
        assert mean == pytest.approx(0, abs=1e-9)
    assert not list(act.parameters())


def test_the_figure_of_sigmoid_and_functions_of_ones_own():
    x = normal(100)
    torch.testing.assert_close(unit_activation("sigmoid")(x), torch.sigmoid(x) / math.sqrt(0.293379), rtol=1e-6, atol=0)
    torch.testing.assert_close(unit_activation(torch.sigmoid)(x), unit_activation("sigmoid")(x))
    prelu = nn.PReLU(init=0.5).double()
    act = unit_activation(prelu)
    assert [p is prelu.weight for p in act.parameters()] == [True]  # a module stays trainable
    torch.testing.assert_close(act(x), prelu(x) / math.sqrt((1 + 0.25) / 2))
    assert "sigmoid" in repr(unit_activation("sigmoid"))


def test_an_activation_with_parameters():
    assert unit_activation(nn.PReLU()).scale == pytest.approx((2 / (1 + 0.25**2)) ** 0.5)
    act = unit_activation(nn.PReLU().half())
    assert act(torch.ones(3, dtype=torch.float16)).dtype == torch.float16


@pytest.mark.parametrize("name", list(ACTIVATIONS))
def test_unit_activations_are_differentiable_and_can_be_saved(name):
    act, x = unit_activation(name, center=True), normal(3, 4).requires_grad_()
    assert torch.autograd.gradcheck(act, x)
    buffer = io.BytesIO()
    torch.save(act, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)(x), act(x))
    assert act(torch.zeros(0, 3)).shape == (0, 3)
    assert act(torch.zeros(2, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_unit_activation_refuses_bad_input():
    with pytest.raises(ValueError, match="must be a function or one of linear.*got 'swish2'"):
        unit_activation("swish2")
    with pytest.raises(TypeError, match="must be a name or a function; got int"):
        unit_activation(2)
    with pytest.raises(TypeError, match="center must be True or False; got 1"):
        unit_activation("tanh", center=1)
    with pytest.raises(ValueError, match="must not be constant with center=True"):
        unit_activation(lambda x: torch.ones_like(x), center=True)


@pytest.mark.parametrize(("step", "final"), [(0.25, 1.0), (0.3, 1.0), (1e-3, 0.0025), (2.0, 1.0)])
def test_the_scheduled_residual_follows_its_schedule_and_freezes(step, final):
    branch, x = nn.Linear(5, 5).double(), normal(3, 5)
    layer = ScheduledResidual(branch, step, final)
    for n, expected in enumerate(reference.scheduled_residual(x, branch, step, final, 7), 1):
        torch.testing.assert_close(layer(x), expected, rtol=1e-6, atol=1e-6)
        assert float(layer.alpha) == pytest.approx(min(n * step, final), rel=1e-6)
    assert not list(layer.parameters(recurse=False))


def test_the_first_forward_is_the_identity_and_evaluation_does_not_count():
    layer, x = ScheduledResidual(nn.Linear(5, 5).double(), 0.25), normal(3, 5)
    assert torch.equal(layer.eval()(x), x)
    assert float(layer.alpha) == 0
    assert torch.equal(layer.train()(x), x)
    with torch.no_grad():
        layer(x)  # no gradient, but training
    assert float(layer.alpha) == 0.5
    expected = x + 0.5 * layer.branch(x)
    for _ in range(3):
        torch.testing.assert_close(layer.eval()(x), expected)
    assert float(layer.alpha) == 0.5


def test_alpha_reaches_one_in_bfloat16_and_does_not_drift():
    layer = ScheduledResidual(nn.Identity(), 1e-3).to(torch.bfloat16)
    x = torch.ones(2, dtype=torch.bfloat16)
    for _ in range(500):
        out = layer(x)
    assert out.dtype == torch.bfloat16
    assert float(layer.alpha) == 0.5
    for _ in range(600):
        layer(x)
    assert float(layer.alpha) == 1
    drift = ScheduledResidual(nn.Identity(), 1e-4)
    for _ in range(9999):
        drift(torch.ones(1))
    assert float(drift.alpha) == pytest.approx(0.9999, abs=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_alpha_ends_exactly_at_final(dtype):
    layer = ScheduledResidual(nn.Identity(), step=0.03, final=0.1).to(dtype)
    for _ in range(5):
        layer(torch.ones(1, dtype=dtype))
    assert torch.equal(layer.alpha, torch.tensor(0.1, dtype=dtype))


def test_an_alpha_set_by_hand_or_a_new_step_goes_on_from_there():
    layer, x = ScheduledResidual(nn.Identity(), 0.125), torch.ones(2)
    layer(x)
    layer.alpha.fill_(0.5)
    seen = [float(layer(x)[0]) - 1 for _ in range(6)]
    assert seen == [0.5, 0.625, 0.75, 0.875, 1.0, 1.0]
    other = ScheduledResidual(nn.Identity(), 0.0625)
    layer.alpha.fill_(0.25)
    other.load_state_dict(layer.state_dict())
    assert [float(other(x)[0]) - 1 for _ in range(3)] == [0.25, 0.3125, 0.375]


@pytest.mark.parametrize("learnable", [False, True])
def test_gradients_with_the_alpha_of_the_forward(learnable):
    layer, x = ScheduledResidual(nn.Linear(4, 4).double(), 0.25, learnable=learnable).double(), normal(3, 4)
    if learnable:
        assert not layer.alpha.any()
        with torch.no_grad():
            layer.alpha.fill_(0.75)
        leaves = [x.requires_grad_(), layer.alpha, *layer.branch.parameters()]

        def f(x, alpha, weight, bias):
            return torch.func.functional_call(layer, {"alpha": alpha, "branch.weight": weight, "branch.bias": bias}, x)

        assert torch.autograd.gradcheck(f, leaves)
    else:
        for alpha in (0, 0.25, 0.5):
            layer.zero_grad()
            layer(x).sum().backward()
            expected = alpha * x.sum(0).expand(4, 4)
            torch.testing.assert_close(layer.branch.weight.grad, expected)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_counts_once_and_gives_the_same_gradients(use_reentrant):
    plain = ScheduledResidual(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)).double(), 0.25)
    saved = copy.deepcopy(plain)
    for step in range(1, 6):
        x, y = normal(3, 4, seed=step).requires_grad_(), normal(3, 4, seed=step).requires_grad_()
        plain.zero_grad()
        saved.zero_grad()
        plain(x).square().sum().backward()
        checkpoint(saved, y, use_reentrant=use_reentrant).square().sum().backward()
        assert float(saved.alpha) == float(plain.alpha) == min(step / 4, 1)
        torch.testing.assert_close(x.grad, y.grad)
        for p, q in zip(plain.parameters(), saved.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad)


def test_a_saved_schedule_goes_on_where_it_was():
    layer, x = ScheduledResidual(nn.Linear(3, 3), 0.125), torch.ones(1, 3)
    for _ in range(3):
        layer(x)
    other = ScheduledResidual(nn.Linear(3, 3), 0.125)
    other.load_state_dict(layer.state_dict(), strict=True)
    assert set(layer.state_dict()) == {"alpha", "count", "branch.weight", "branch.bias"}
    for _ in range(3):
        assert torch.equal(layer(x), other(x))
    assert float(other.alpha) == 0.75
    assert set(ScheduledResidual(nn.Identity(), learnable=True).state_dict()) == {"alpha"}


@pytest.mark.slow
def test_the_schedule_goes_on_under_compile():
    layer, x = ScheduledResidual(nn.Linear(3, 3), 0.25), torch.ones(2, 3)
    torch.compiler.reset()
    compiled = torch.compile(copy.deepcopy(layer), fullgraph=True, backend="aot_eager")
    for _ in range(6):
        torch.testing.assert_close(compiled(x), layer(x))
        assert float(compiled.alpha) == float(layer.alpha)
    compiled(x).sum().backward()


def test_a_branch_with_further_arguments_and_bad_branches():
    class Mixed(nn.Module):
        def forward(self, x, other, scale=1.0):
            return scale * other

    layer = ScheduledResidual(Mixed(), learnable=True)
    with torch.no_grad():
        layer.alpha.fill_(2.0)
    torch.testing.assert_close(layer(torch.ones(2), torch.ones(2), scale=3.0), torch.full((2,), 7.0))
    with pytest.raises(TypeError, match="branch must be a torch.nn.Module; got function"):
        ScheduledResidual(lambda x: x)
    with pytest.raises(ValueError, match="step must be greater than 0"):
        ScheduledResidual(nn.Identity(), step=0)
    with pytest.raises(ValueError, match="final must be greater than 0"):
        ScheduledResidual(nn.Identity(), final=-1.0)
    with pytest.raises(ValueError, match="step must be finite"):
        ScheduledResidual(nn.Identity(), step=math.nan)
    with pytest.raises(TypeError, match="learnable must be True or False"):
        ScheduledResidual(nn.Identity(), learnable=None)
    with pytest.raises(ValueError, match=r"keep the shape of its input, \(2, 3\); got \(2, 4\)"):
        ScheduledResidual(nn.Linear(3, 4))(torch.ones(2, 3))
    with pytest.raises(TypeError, match="branch must return a tensor; got tuple"):
        ScheduledResidual(nn.GRU(3, 3))(torch.ones(2, 3))


def test_the_ntk_layer_is_its_formula():
    layer, x = NTKLinear(5, 3, dtype=torch.float64), normal(4, 5)
    with torch.no_grad():
        layer.bias.copy_(normal(3, seed=3))
    expected = reference.ntk_linear(x.tolist(), layer.weight.tolist(), layer.bias.tolist())
    torch.testing.assert_close(layer(x), torch.tensor(expected, dtype=torch.float64))
    assert torch.autograd.gradcheck(
        lambda x, w, b: torch.func.functional_call(layer, {"weight": w, "bias": b}, x),
        (x.requires_grad_(), layer.weight, layer.bias),
    )
    plain = NTKLinear(5, 3, bias=False, dtype=torch.float64)
    torch.testing.assert_close(plain(x), F.linear(x, plain.weight) / math.sqrt(5))
    assert plain.bias is None


@pytest.mark.parametrize("shape", [(5,), (0, 5), (2, 0, 5), (1, 5), (2, 3, 4, 5)])
def test_the_ntk_layer_takes_any_leading_shape(shape):
    layer, x = NTKLinear(5, 3, dtype=torch.float64), normal(*shape)
    out = layer(x)
    assert out.shape == (*shape[:-1], 3)
    torch.testing.assert_close(out, F.linear(x, layer.weight / math.sqrt(5), layer.bias))
    torch.testing.assert_close(layer(x.mT.contiguous().mT if x.dim() > 1 else x), out)


def test_the_ntk_layer_starts_as_a_linear_layer_of_variance_one_over_m_and_trains_by_the_scaled_rate():
    layer = NTKLinear(400, 300, generator=g())
    assert float(layer.weight.detach().std()) == pytest.approx(1, rel=0.01)
    assert not layer.bias.any()
    assert torch.equal(NTKLinear(400, 300, generator=g()).weight, layer.weight)
    x, target = normal(64, 400, dtype=torch.float32), normal(64, 300, dtype=torch.float32, seed=2)
    assert float(layer(x).detach().square().mean()) == pytest.approx(1, rel=0.05)
    plain = nn.Linear(400, 300)
    with torch.no_grad():
        plain.weight.copy_(layer.weight / 20)
        plain.bias.zero_()
    start = plain.weight.detach().clone()
    for model in (layer, plain):
        F.mse_loss(model(x), target).backward()
        torch.optim.SGD([model.weight], lr=0.1).step()
    ours = (layer.weight.detach() / 20 - start) * 400  # the effective rate is 1 / m of the given one
    torch.testing.assert_close(ours, plain.weight.detach() - start, rtol=1e-2, atol=1e-5)


def test_the_ntk_layer_around_a_linear_one_shares_its_parameters():
    from transformers.pytorch_utils import Conv1D

    linear, conv, x = nn.Linear(6, 4), Conv1D(4, 6), normal(3, 6, dtype=torch.float32)
    for layer in (linear, conv):
        made = NTKLinear.from_linear(layer.eval())
        assert made.weight is layer.weight
        assert made.bias is layer.bias
        assert not made.training
        torch.testing.assert_close(made(x), (layer(x) - layer.bias) / math.sqrt(6) + layer.bias)
    with pytest.raises(TypeError, match="must be an nn.Linear or a Conv1D of transformers; got Conv2d"):
        NTKLinear.from_linear(nn.Conv2d(2, 2, 1))


def test_ntk_layer_refuses_bad_input():
    for arguments, error, message in (
        ((0, 3), ValueError, "in_features must be at least 1; got 0"),
        ((3, 0), ValueError, "out_features must be at least 1; got 0"),
        ((3.0, 2), TypeError, "in_features must be an integer"),
        ((3, 2, None), TypeError, "bias must be True or False; got None"),
    ):
        with pytest.raises(error, match=message):
            NTKLinear(*arguments)
    with pytest.raises(ValueError, match=r"x must have shape \(..., 3\); got \(2, 4\)"):
        NTKLinear(3, 2)(torch.ones(2, 4))
    with pytest.raises(TypeError, match="x must be a floating tensor"):
        NTKLinear(3, 2)(torch.ones(2, 3, dtype=torch.int64))
    assert NTKLinear(3, 2, device="meta").weight.is_meta
