"""The first-order rule against differentiating twice: every gradient, every operation, and when it must stay away."""

import copy
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from kexue.adversarial import gradient_normalize
from kexue.adversarial._piecewise import score_and_square
from reference import gradient_normalization as reference


class Block(nn.Module):
    def __init__(self, channels, inplace=False):
        super().__init__()
        self.a, self.b = (nn.Conv2d(channels, channels, 3, padding="same") for _ in range(2))
        self.act = nn.ReLU(inplace)

    def forward(self, x):
        return x + self.b(self.act(self.a(F.leaky_relu(x, 0.1))))


class ResNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.blocks = nn.Conv2d(2, 4, 3, padding=1), nn.Sequential(Block(4), Block(4, True))
        self.last = nn.Linear(4, 1)

    def forward(self, x):
        h = F.avg_pool2d(self.blocks(self.first(x)), 2)
        return self.last(torch.relu(h).sum(dim=(2, 3))).squeeze(1)


class Assignments(nn.Module):
    """What changes a value that nothing else uses."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 1)

    def forward(self, x):
        h = self.a(x)
        h += 0.5
        h -= 0.1
        h *= 3
        h /= 2
        out = self.b(F.hardtanh(h, -0.5, 0.9, inplace=True))
        out += self.b(F.relu6(self.a(x), inplace=True))
        return self.c(out)


class Functions(nn.Module):
    """Functions and methods of every group."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(16, 1, bias=False)

    def forward(self, x):
        h = self.a(1 - x.view(x.size(0), -1) * 2)
        h = torch.maximum(h.abs(), self.b(h) - h) / 3 + 0.5
        h = torch.cat([h.clamp(-0.5, 0.7), -h.relu()], dim=1).reshape(x.shape[0], 2, 8)
        return self.c(F.relu6(h.flatten(1))).mean(1)


def mlp(*layers):
    return nn.Sequential(nn.Linear(6, 8), *layers, nn.Linear(8, 1))


def conv(*layers, features=64):
    return nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), *layers, nn.Flatten(), nn.Linear(features, 1))


VECTORS, IMAGES = (5, 6), (4, 2, 4, 4)
CRITICS = {
    "leaky": (lambda: mlp(nn.LeakyReLU(0.2), nn.Linear(8, 8), nn.LeakyReLU(0.2)), VECTORS),
    "relu, in place": (lambda: mlp(nn.ReLU(True), nn.Linear(8, 8, bias=False), nn.ReLU(True)), VECTORS),
    "falling slope": (lambda: mlp(nn.LeakyReLU(-0.5)), VECTORS),
    "prelu": (lambda: mlp(nn.PReLU(), nn.Linear(8, 8), nn.PReLU(8)), VECTORS),
    "hardtanh": (lambda: mlp(nn.Hardtanh(-0.3, 0.4), nn.Linear(8, 8), nn.ReLU6(True)), VECTORS),
    "batch norm, eval": (lambda: mlp(nn.BatchNorm1d(8), nn.ReLU()).eval(), VECTORS),
    "no affine norm, dropout": (lambda: mlp(nn.BatchNorm1d(8, affine=False), nn.Dropout(), nn.ReLU()).eval(), VECTORS),
    "linear": (lambda: nn.Linear(6, 1), VECTORS),
    "tokens": (lambda: nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Flatten(), nn.Linear(12, 1)), (5, 3, 6)),
    "signals": (
        lambda: nn.Sequential(
            nn.Conv1d(3, 4, 3, groups=1), nn.ReLU(), nn.MaxPool1d(2), nn.AvgPool1d(2), nn.Flatten(), nn.Linear(4, 1)
        ),
        (4, 3, 6),
    ),
    "volumes": (
        lambda: nn.Sequential(nn.Conv3d(1, 2, 2), nn.ReLU(), nn.MaxPool3d(2), nn.Flatten(), nn.Linear(2, 1)),
        (3, 1, 3, 3, 3),
    ),
    "conv": (lambda: conv(nn.LeakyReLU(0.2), nn.Conv2d(4, 4, 3, 2, 1, groups=2), nn.ReLU(), features=16), IMAGES),
    "dilated": (lambda: conv(nn.ReLU(), nn.Conv2d(4, 2, 2, (1, 2), (2, 1), 2), features=24), IMAGES),
    "pools": (
        lambda: conv(nn.ReLU(), nn.MaxPool2d(3, 1, 1), nn.AvgPool2d(2), nn.AdaptiveAvgPool2d(1), features=4),
        IMAGES,
    ),
    "padding": (lambda: conv(nn.ReflectionPad2d(1), nn.Upsample(scale_factor=2), nn.Identity(), features=576), IMAGES),
    "shared layer": (
        lambda: (lambda m: nn.Sequential(m, nn.ReLU(), m, nn.ReLU(), nn.Linear(6, 1)))(nn.Linear(6, 6)),
        VECTORS,
    ),
    "spectral": (
        lambda: nn.Sequential(
            nn.utils.parametrizations.spectral_norm(nn.Linear(6, 8)), nn.ReLU(), nn.Linear(8, 1)
        ).eval(),
        VECTORS,
    ),
    "resnet": (ResNet, IMAGES),
    "functions": (Functions, VECTORS),
    "assignments": (Assignments, VECTORS),
}


def critic(name, dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    build, shape = CRITICS[name]
    net = build().to(dtype)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.running_mean.uniform_(-0.5, 0.5)
            module.running_var.uniform_(0.5, 2)
        if isinstance(module, nn.BatchNorm1d) and module.affine:
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias)
    x = torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_()
    return net, x


def upstream(n, dtype=torch.float64):
    return torch.linspace(-1.0, 2.0, n, dtype=dtype)


def gradients(outputs, net, x):
    """The outputs, and the gradients of a sum that weighs rows differently."""
    total = sum((y * upstream(len(y), y.dtype)).sum() for y in outputs)
    inputs = [x, *net.parameters()]
    found = torch.autograd.grad(total, inputs, allow_unused=True)
    filled = [torch.zeros_like(p) if g is None else g for g, p in zip(found, inputs, strict=True)]
    return [y.detach() for y in outputs], filled


@pytest.mark.parametrize("name", CRITICS)
def test_score_and_slope_have_the_gradients_of_differentiating_twice(name):
    net, x = critic(name)
    once = gradients(score_and_square(net, x, first_order=True), net, x)
    twice = gradients(score_and_square(net, x, first_order=False), net, x)
    torch.testing.assert_close(once, twice, rtol=1e-9, atol=1e-11)
    assert max(float(g.abs().max()) for g in once[1]) > 0


@pytest.mark.parametrize("name", ["leaky", "conv", "resnet", "functions"])
@pytest.mark.parametrize(("kind", "eps"), [("gn", 1e-12), ("gran", 0.1), ("gn", 0.3), ("gran", 2.0)])
def test_normalised_scores_equal_the_reference(name, kind, eps):
    net, x = critic(name)
    expected = gradients([reference.normalize(net, x, kind, eps)], net, x)
    for first_order in ("auto", True, False):
        found = gradients([gradient_normalize(net, x, kind, eps, first_order=first_order)], net, x)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", ["leaky", "hardtanh", "resnet"])
def test_each_output_alone_has_its_gradients(name):
    net, x = critic(name)
    for i in (0, 1):
        once = gradients(score_and_square(net, x, True)[i : i + 1], net, x)
        torch.testing.assert_close(once, gradients(score_and_square(net, x, False)[i : i + 1], net, x))


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 5), st.integers(1, 4), st.integers(0, 10**6), st.sampled_from(["gn", "gran"]))
def test_random_networks(depth, width, seed, kind):
    torch.manual_seed(seed)
    sizes = [3, *[width] * depth]
    layers = [m for a, b in itertools.pairwise(sizes) for m in (nn.Linear(a, b), nn.LeakyReLU(0.3))]
    net = nn.Sequential(*layers, nn.Linear(width, 1)).double()
    x = torch.randn(4, 3, dtype=torch.float64).requires_grad_()
    once = gradients([gradient_normalize(net, x, kind, first_order=True)], net, x)
    torch.testing.assert_close(once, gradients([gradient_normalize(net, x, kind, first_order=False)], net, x))


@pytest.mark.parametrize("act", [nn.ReLU(), nn.ReLU(True), nn.LeakyReLU(0.2), nn.Hardtanh(), nn.ReLU6()])
def test_at_kinks_the_gradients_are_those_of_torch(act):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), act, nn.Linear(4, 4), act, nn.Linear(4, 1)).double()
    with torch.no_grad():  # integers meet the kinks exactly
        for p in net.parameters():
            p.copy_(torch.randint(-1, 2, p.shape))
    x = torch.randint(-1, 2, (40, 3)).double().requires_grad_()
    hidden = net[0](x)
    assert (hidden == 0).any()
    once = gradients(score_and_square(net, x, True), net, x)
    torch.testing.assert_close(once, gradients(score_and_square(net, x, False), net, x))


def test_tied_maxima_are_those_of_torch():
    net = nn.Sequential(nn.Conv2d(1, 2, 1), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(2, 1)).double()
    x = torch.ones(3, 1, 2, 2, dtype=torch.float64, requires_grad=True)
    once = gradients(score_and_square(net, x, True), net, x)
    torch.testing.assert_close(once, gradients(score_and_square(net, x, False), net, x))


def test_backward_twice_frozen_weights_and_inputs_without_gradient():
    net, x = critic("conv")
    y = gradient_normalize(net, x).sum()
    inputs = [x, *net.parameters()]
    first = torch.autograd.grad(y, inputs, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(y, inputs), first)
    net[0].weight.requires_grad_(False)
    gradient_normalize(net, x.detach()).sum().backward()
    assert net[0].weight.grad is None
    torch.testing.assert_close([p.grad for p in net.parameters()][1:], list(first[2:]))
    net.requires_grad_(False)
    torch.testing.assert_close(torch.autograd.grad(gradient_normalize(net, x).sum(), x)[0], first[0])


def test_the_gradient_of_the_first_order_rule_cannot_be_differentiated_again():
    net, x = critic("leaky")
    (g,) = torch.autograd.grad(gradient_normalize(net, x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        g.square().sum().backward()
    (g,) = torch.autograd.grad(gradient_normalize(net, x, first_order=False).sum(), x, create_graph=True)
    g.square().sum().backward()
    assert net[0].weight.grad.abs().sum() > 0


def test_weights_changed_between_forward_and_backward_are_noticed():
    net, x = critic("leaky")
    y = gradient_normalize(net, x).sum()
    with torch.no_grad():
        net[0].weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


@pytest.mark.parametrize("name", ["leaky", "conv"])
def test_inputs_stay_as_they_are_in_any_layout_and_without_recording(name):
    net, x = critic(name)
    before, version = x.detach().clone(), x._version
    expected = gradient_normalize(net, x)
    strided = torch.stack([x, x], -1)[..., 0]
    assert not strided.is_contiguous()
    torch.testing.assert_close(gradient_normalize(net, strided), expected)
    with torch.no_grad():
        quiet = gradient_normalize(net, x)
        double = gradient_normalize(net, x, first_order=False)
    assert not quiet.requires_grad
    assert not double.requires_grad
    torch.testing.assert_close(quiet, double)
    assert x._version == version
    torch.testing.assert_close(x.detach(), before, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["conv", "resnet", "functions"])
def test_inference_mode_gives_the_same_scores(name):
    net, x = critic(name)
    for first_order in (True, False):
        expected = gradient_normalize(net, x, first_order=first_order)
        with torch.inference_mode():
            torch.testing.assert_close(gradient_normalize(net, x * 1, first_order=first_order), expected)


@pytest.mark.parametrize("name", ["conv", "pools", "padding", "resnet"])
def test_channels_last_images(name):
    net, x = critic(name)
    expected = gradients(score_and_square(net, x, True), net, x)
    net = net.to(memory_format=torch.channels_last)
    last = x.detach().to(memory_format=torch.channels_last).requires_grad_()
    torch.testing.assert_close(gradients(score_and_square(net, last, True), net, last), expected)


def test_a_score_left_by_a_convolution_counts():
    net = nn.Sequential(nn.Conv2d(2, 4, 2, 2), nn.ReLU(), nn.Conv2d(4, 1, 2)).double()
    x = torch.randn(4, 2, 4, 4, dtype=torch.float64)
    flat = nn.Sequential(net, nn.Flatten())
    for first_order in (True, False):
        torch.testing.assert_close(gradient_normalize(net, x, first_order=first_order), gradient_normalize(flat, x))


@pytest.mark.parametrize("name", ["leaky", "conv", "resnet"])
@pytest.mark.parametrize("rows", [0, 1])
def test_no_row_and_one_row(name, rows):
    net, x = critic(name)
    some = x.detach()[:rows].requires_grad_()
    y = gradient_normalize(net, some, first_order=True)
    y.sum().backward()
    assert y.shape == (rows,)
    assert some.grad.shape == some.shape
    assert all(torch.isfinite(p.grad).all() for p in net.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["leaky", "conv"])
def test_half_precision_scores_in_float32_gradients_in_the_weights_dtype(dtype, name):
    net, x = critic(name, dtype)
    exact = copy.deepcopy(net).double()
    y = gradient_normalize(net, x, "gran", first_order=True)
    assert y.dtype == torch.float32
    _, low = gradients([y], net, x)
    wide = x.detach().double().requires_grad_()
    expected, high = gradients([gradient_normalize(exact, wide, "gran")], exact, wide)
    torch.testing.assert_close(y.double(), expected[0], rtol=0.1, atol=0.05)
    for a, b in zip(low, high, strict=True):
        assert a.dtype == dtype
        assert (a.double() - b).norm() < 0.1 * b.norm() + 1e-3


def test_autocast_computes_in_bfloat16_and_returns_gradients_in_float32():
    net, x = critic("conv", torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = gradient_normalize(net, x, first_order=True)
    assert y.dtype == torch.float32
    _, low = gradients([y], net, x)
    _, high = gradients([gradient_normalize(net, x)], net, x)
    for a, b in zip(low, high, strict=True):
        assert a.dtype == torch.float32
        assert 0 < (a - b).norm() < 0.1 * b.norm()


@pytest.mark.slow
def test_under_torch_compile_the_result_is_the_same():
    torch.compiler.reset()
    net, x = critic("leaky", torch.float32)
    compiled = torch.compile(lambda z: gradient_normalize(net, z) * 2, backend="aot_eager")
    torch.testing.assert_close(compiled(x), gradient_normalize(net, x) * 2)
    found = torch.autograd.grad(compiled(x).sum(), [x, *net.parameters()])
    expected = torch.autograd.grad(2 * gradient_normalize(net, x).sum(), [x, *net.parameters()])
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradient_normalize(torch.compile(net, backend="eager"), x), gradient_normalize(net, x))
