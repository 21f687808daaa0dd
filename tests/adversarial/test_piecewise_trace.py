"""When a trace of a critic may be used: what a graph does not show, and what changes after it was made."""

import copy
import gc
import types
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from kexue.adversarial import gradient_normalize
from kexue.adversarial._piecewise import first_order_obstacle, score_and_square


def critic():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.LeakyReLU(0.2), nn.Linear(8, 8), nn.LeakyReLU(0.2), nn.Linear(8, 1))
    return net.double(), torch.randn(5, 6, dtype=torch.float64).requires_grad_()


def gradients(outputs, net, x):
    """The outputs, and the gradients of a sum that weighs rows differently."""
    total = sum((y * torch.linspace(-1, 2, len(y), dtype=y.dtype)).sum() for y in outputs)
    inputs = [x, *net.parameters()]
    found = torch.autograd.grad(total, inputs, allow_unused=True)
    filled = [torch.zeros_like(p) if g is None else g for g, p in zip(found, inputs, strict=True)]
    return [y.detach() for y in outputs], filled


class Mixed(nn.Module):
    """A forward with one step that must not be taken for an operation on rows."""

    def __init__(self, step):
        super().__init__()
        self.first, self.last, self.step = nn.Linear(4, 4), nn.Linear(4, 1), step

    def forward(self, x):
        return self.last(self.step(self.first(x)))


class Control(nn.Linear):
    def forward(self, x):
        return super().forward(x) if x.sum() > 0 else -super().forward(x)


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.factor = nn.Linear(4, 1), nn.Parameter(torch.tensor(2.0))

    def forward(self, x):
        return self.layer(x) * self.factor


def in_place_twice(x):
    y = x * 1.5
    return F.relu(y, inplace=True) + y


def other_name(h):
    k = h
    h += 0.5
    return h * 2 - k


def through_a_view(h):
    return F.relu_(torch.flatten(h, 1)) + h


class Alias(nn.Module):
    """Dropout returns its very input in evaluation mode."""

    def __init__(self):
        super().__init__()
        self.first, self.drop, self.last = nn.Linear(4, 4), nn.Dropout(), nn.Linear(4, 1)

    def forward(self, x):
        h = self.first(x)
        return self.last(torch.relu_(self.drop(h)) + h)


def partly_frozen(h):
    with torch.no_grad():
        k = h.relu()
    return h + k


def low_precision(h):
    with torch.autocast("cpu", torch.bfloat16):
        return h.relu()


def by_chance(h):
    return h.relu() if torch.rand(()) < 0.5 else -h


def steps(h):
    return torch.div(h, 0.1, rounding_mode="floor") + h


OTHERS = {
    "another name sees +=": lambda: Mixed(other_name),
    "a view changed in place": lambda: Mixed(through_a_view),
    "dropout's input changed in place": lambda: Alias().eval(),
    "a part under no_grad": lambda: Mixed(partly_frozen),
    "a part under autocast": lambda: Mixed(low_precision),
    "random choice": lambda: Mixed(by_chance),
    "division to integers": lambda: Mixed(steps),
    "GELU": lambda: Mixed(nn.GELU()),
    "LayerNorm": lambda: Mixed(nn.LayerNorm(4)),
    "sum over rows": lambda: Mixed(lambda h: h - h.sum(0, keepdim=True)),
    "mean over everything": lambda: Mixed(lambda h: h + h.mean()),
    "product": lambda: Mixed(lambda h: h * h.relu()),
    "broadcast": lambda: Mixed(lambda h: (h - h.unsqueeze(1)).sum(1)),
    "transpose": lambda: Mixed(lambda h: h.t()),
    "control flow": lambda: Control(4, 1),
    "own parameter": Scaled,
    "used after in place": lambda: Mixed(in_place_twice),
    "dropout": lambda: Mixed(nn.Dropout(0.5)),
    "circular padding": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 4)), nn.Conv1d(1, 1, 3, padding=1, padding_mode="circular"), nn.Flatten(), nn.Linear(4, 1)
    ),
    "hook": lambda: hooked(),
    "own forward": lambda: patched(),
}


def hooked():
    net = Mixed(nn.ReLU())
    net.first.register_forward_hook(lambda module, args, out: out.sin())
    return net


def patched():
    net = Mixed(nn.ReLU())
    net.first.forward = lambda x: F.linear(x, net.first.weight.sin())
    return net


@pytest.mark.parametrize("name", OTHERS)
def test_other_critics_are_differentiated_twice(name):
    torch.manual_seed(0)
    net = OTHERS[name]().double()
    x = torch.randn(4, 4, dtype=torch.float64).requires_grad_()
    assert first_order_obstacle(net, x) is not None
    with pytest.raises(ValueError, match="first_order=True needs"):
        gradient_normalize(net, x, first_order=True)
    torch.manual_seed(1)
    found = gradients(score_and_square(net, x), net, x)
    torch.manual_seed(1)
    torch.testing.assert_close(found, gradients(score_and_square(net, x, False), net, x))


def test_a_changed_critic_is_traced_again():
    net, x = critic()
    before = gradient_normalize(net, x)
    net[1] = nn.GELU()
    torch.testing.assert_close(gradient_normalize(net, x), gradient_normalize(net, x, first_order=False))
    net[1] = nn.LeakyReLU(0.2)
    torch.testing.assert_close(gradient_normalize(net, x), before)
    net[1].negative_slope = 0.7
    torch.testing.assert_close(gradient_normalize(net, x), gradient_normalize(net, x, first_order=False))

    class Switch(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.flip = nn.Linear(6, 1), False

        def forward(self, x):
            return -self.layer(x) if self.flip else self.layer(x)

    switch = Switch().double()
    first = gradient_normalize(switch, x)
    switch.flip = True
    torch.testing.assert_close(gradient_normalize(switch, x), -first)


class Settings(nn.Module):
    """A forward that reads settings of every kind."""

    def __init__(self):
        super().__init__()
        self.first, self.last, self.long = nn.Linear(6, 8), nn.Linear(8, 1), [0.0] * 200
        self.act, self.shift, self.options, self.own = F.relu, [0.5], {"factor": 2.0}, types.SimpleNamespace(power=1.0)

    def forward(self, x):
        h = self.act(self.first(x) + self.shift[0] + self.long[150]) * self.options["factor"]
        return self.last(h * self.own.power)


@pytest.mark.parametrize(
    "change",
    [
        lambda net: setattr(net, "act", torch.abs),
        lambda net: net.shift.__setitem__(0, -1.0),
        lambda net: net.long.__setitem__(150, 3.0),
        lambda net: net.options.update(factor=3.0),
        lambda net: setattr(net.own, "power", 3.0),
        lambda net: setattr(net, "forward", lambda x: net.last(net.first(x).abs())),
    ],
)
def test_changed_settings_are_noticed(change):
    net, x = Settings().double(), torch.randn(5, 6, dtype=torch.float64)
    before = gradient_normalize(net, x, first_order=True)
    torch.testing.assert_close(gradient_normalize(net, x, first_order=True), before)
    change(net)
    after = gradient_normalize(net, x)
    assert not torch.allclose(after, before)
    torch.testing.assert_close(after, gradient_normalize(net, x, first_order=False))


def test_tracing_leaves_the_random_state_alone():
    net, x = Mixed(by_chance), torch.randn(3, 4)
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match="draws random numbers"):
        gradient_normalize(net, x, first_order=True)
    assert torch.equal(torch.get_rng_state(), state)


def test_spectral_norm_of_torch_makes_one_iteration_a_call():
    norm = nn.utils.parametrizations.spectral_norm
    torch.manual_seed(0)
    net = nn.Sequential(norm(nn.Linear(6, 8)), nn.ReLU(), norm(nn.Linear(8, 1))).double()
    other, x = copy.deepcopy(net), torch.randn(5, 6, dtype=torch.float64)
    torch.testing.assert_close(
        gradient_normalize(net, x, first_order=True), gradient_normalize(other, x[:], first_order=False)
    )
    torch.testing.assert_close(net.state_dict(), other.state_dict())


def test_transforms_of_torch_func():
    net, x = critic()
    y = gradient_normalize(net, x)
    expected = torch.autograd.grad(y.sum(), [x, *net.parameters()])
    rows = x.detach()
    torch.testing.assert_close(torch.func.grad(lambda z: gradient_normalize(net, z).sum())(rows), expected[0])

    def total(weights):
        return gradient_normalize(lambda z: torch.func.functional_call(net, weights, (z,)), rows).sum()

    found = torch.func.grad(total)({name: p.detach() for name, p in net.named_parameters()})
    torch.testing.assert_close(tuple(found.values()), expected[1:])
    one = torch.func.vmap(lambda row: gradient_normalize(net, row[None])[0])
    torch.testing.assert_close(one(rows), y)


def test_hooks_on_all_modules_are_called():
    net, x = critic()
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, out: seen.append(type(module)))
    try:
        gradient_normalize(net, x)
    finally:
        handle.remove()
    assert nn.Linear in seen


def test_a_copy_of_a_critic_uses_its_own_weights_and_a_traced_critic_can_be_freed():
    net, x = critic()
    gradient_normalize(net, x)
    other = copy.deepcopy(net)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(2)
    torch.testing.assert_close(gradient_normalize(other, x), gradient_normalize(other, x, first_order=False))
    for broken in (False, True):
        net = Mixed(nn.GELU() if broken else nn.ReLU())
        gradient_normalize(net, torch.randn(2, 4)).sum().backward()
        alive = weakref.ref(net)
        del net
        gc.collect()
        assert alive() is None
