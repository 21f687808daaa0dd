"""Rescaled parameters against groups with their own rate, and what may go wrong on the way."""

import copy
import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrize

from kexue.training import fit, load_checkpoint, param_groups, save_checkpoint, scale_lr_, unscale_lr_
from reference.layerwise_learning_rates import Lion

A, LR, STEPS = 0.1, 1e-2, 50
DATA = torch.Generator().manual_seed(3)
X = torch.randn(64, 20, dtype=torch.float64, generator=DATA)
Y = X.sum(1, keepdim=True).sin()


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(20, 8), nn.Tanh(), nn.Linear(8, 1)).double()


def run(model, optimizer):
    for _ in range(STEPS):
        optimizer.zero_grad()
        (model(X) - Y).square().mean().backward()
        optimizer.step()
    return torch.cat([model[0].weight.detach().flatten(), model[0].bias.detach(), model[2].weight.detach().flatten()])


def with_groups(make, options, decay):
    model = net()
    groups = [{"params": model[0].parameters(), "lr": LR * A}, {"params": model[2].parameters()}]
    return run(model, make(groups, lr=LR, **options, **({"weight_decay": decay} if decay else {})))


def rescaled(make, options, decay, kind, eps_factor=1.0, decay_factor=1.0):
    """One rate for everything; the first layer is rescaled, and its eps and decay are corrected."""
    model = net()
    scale_lr_(model[0], A, kind)
    first, second = {"params": model[0].parameters()}, {"params": model[2].parameters()}
    if "eps" in options:
        first["eps"] = options["eps"] * eps_factor
    if decay:
        first["weight_decay"], second["weight_decay"] = decay * decay_factor, decay
    return run(model, make([first, second], lr=LR, **options))


def difference(make, options, decay, kind, **factors):
    return (with_groups(make, options, decay) - rescaled(make, options, decay, kind, **factors)).abs().max().item()


EPS = {"eps": 1e-4}
RIGHT = {
    "sgd": (torch.optim.SGD, {}, 0.0, "sgd", {}),
    "sgd with a penalty": (torch.optim.SGD, {}, 0.1, "sgd", {"decay_factor": A}),
    "momentum": (torch.optim.SGD, {"momentum": 0.9}, 0.0, "momentum", {}),
    "nesterov with a penalty": (
        torch.optim.SGD, {"momentum": 0.9, "nesterov": True}, 0.1, "nesterov", {"decay_factor": A}
    ),
    "adam without eps": (torch.optim.Adam, {"eps": 0.0}, 0.0, "adam", {}),
    "adam": (torch.optim.Adam, EPS, 0.0, "adam", {"eps_factor": A}),
    "adam with a penalty": (torch.optim.Adam, EPS, 0.1, "adam", {"eps_factor": A, "decay_factor": A**2}),
    "adamw": (torch.optim.AdamW, EPS, 0.1, "adamw", {"eps_factor": A, "decay_factor": A}),
    "adamw, fused": (torch.optim.AdamW, {**EPS, "fused": True}, 0.1, "adamw", {"eps_factor": A, "decay_factor": A}),
    "rmsprop": (torch.optim.RMSprop, EPS, 0.1, "rmsprop", {"eps_factor": A, "decay_factor": A**2}),
    "rmsprop with momentum": (torch.optim.RMSprop, {**EPS, "momentum": 0.9}, 0.0, "rmsprop", {"eps_factor": A}),
    "lion": (Lion, {}, 0.1, "lion", {"decay_factor": A}),
}  # fmt: skip
WRONG = {
    "sgd with lam = a": (torch.optim.SGD, {}, 0.0, "adam", {}),
    "adam with lam = sqrt(a)": (torch.optim.Adam, {"eps": 0.0}, 0.0, "sgd", {}),
    "rmsprop with lam = sqrt(a)": (torch.optim.RMSprop, {"eps": 0.0}, 0.0, "sgd", {}),
    "lion with lam = sqrt(a)": (Lion, {}, 0.0, "sgd", {}),
    "adamw, decay as it was": (torch.optim.AdamW, EPS, 0.1, "adamw", {"eps_factor": A}),
}


@pytest.mark.parametrize("name", list(RIGHT))
def test_fifty_steps_equal_a_group_with_its_own_rate(name):
    make, options, decay, kind, factors = RIGHT[name]
    assert difference(make, options, decay, kind, **factors) < 1e-12
    start = torch.cat([p.detach().flatten() for p in list(net().parameters())[:3]])
    moved = (torch.sort(with_groups(make, options, decay)).values - torch.sort(start).values).abs().max()
    assert moved > 1e-3


@pytest.mark.parametrize("name", list(WRONG))
def test_the_wrong_power_and_uncorrected_decay_are_seen(name):
    make, options, decay, kind, factors = WRONG[name]
    assert difference(make, options, decay, kind, **factors) > 1e-3


def test_uncorrected_eps_is_seen():
    assert difference(torch.optim.Adam, EPS, 0.0, "adam") > 1e-6


@settings(max_examples=40, deadline=None)
@given(st.floats(1e-3, 1e3), st.sampled_from(["sgd", "adam", "lion"]), st.integers(0, 10**6))
def test_the_function_is_unchanged_and_comes_back(a, kind, seed):
    model = net(seed)
    before, out = {n: p.detach().clone() for n, p in model.named_parameters()}, model(X)
    assert scale_lr_(model, a, kind) is model
    torch.testing.assert_close(model(X), out, rtol=1e-12, atol=1e-12)
    lam = a**0.5 if kind == "sgd" else a
    torch.testing.assert_close(model[0].parametrizations.weight.original.detach(), before["0.weight"] / lam)
    assert unscale_lr_(model) is model
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), before[name], rtol=1e-15, atol=0)
        assert not hasattr(model[0], "parametrizations")


def test_twice_multiplies_and_kinds_do_not_mix():
    model, once = net(), net()
    scale_lr_(scale_lr_(model, 0.5, "sgd"), 0.2, "momentum")
    scale_lr_(once, 0.1, "sgd")
    for a, b in zip(model.parameters(), once.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-14, atol=0)
    assert len(model[0].parametrizations.weight) == 1
    with pytest.raises(ValueError, match="'weight' of .*Linear is scaled for another kind of optimizer"):
        scale_lr_(model, 0.5, "adam")
    scale_lr_(model[2], 0.5, "sgd")  # a part, after the whole
    torch.testing.assert_close(model(X), net()(X))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(5, 4)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.table.weight
        self.register_buffer("kept", torch.ones(3))

    def forward(self, ids):
        return self.head(self.table(ids))


def test_tied_weights_stay_tied():
    model, ids = Tied(), torch.arange(5)
    out, tensor = model(ids), model.table.weight
    scale_lr_(model, 0.3)
    scale_lr_(model, 0.5)
    assert len(list(model.parameters())) == 1
    assert next(model.parameters()) is tensor  # an optimizer that exists goes on
    torch.testing.assert_close(model(ids), out)
    assert torch.equal(model.kept, torch.ones(3))
    unscale_lr_(model)
    assert model.head.weight is model.table.weight is tensor
    torch.testing.assert_close(model(ids), out)


def test_frozen_parameters_are_left_alone():
    model = net()
    model[0].requires_grad_(False)
    scale_lr_(model, 0.1)
    assert not parametrize.is_parametrized(model[0])
    assert parametrize.is_parametrized(model[2])


def test_state_dicts_carry_the_multiplier(tmp_path):
    model = scale_lr_(net(), 0.3)
    state = model.state_dict()
    assert {n for n in state if n.startswith("0.")} == {
        f"0.parametrizations.{n}.{e}" for n in ("weight", "bias") for e in ("original", "0.multiplier")
    }
    other = scale_lr_(net(1), 0.7)
    other.load_state_dict(state, strict=True)
    assert torch.equal(other(X), model(X))
    with pytest.raises(RuntimeError, match="Missing key"):
        scale_lr_(net(), 0.3).load_state_dict({k: v for k, v in state.items() if "multiplier" not in k})
    with pytest.raises(RuntimeError, match="Missing key"):
        scale_lr_(net(), 0.3).load_state_dict(net().state_dict())
    save_checkpoint(tmp_path, model, [], step=1, loss=0.0, config={})
    load_checkpoint(tmp_path / "step-1").restore(other := scale_lr_(net(1), 0.7), [])
    assert torch.equal(other(X), model(X))


def test_weights_can_be_assigned_copied_and_cast():
    model = scale_lr_(net(), 0.3)
    with torch.no_grad():
        model[0].weight = torch.ones(8, 20).double()
    torch.testing.assert_close(model[0].weight.detach(), torch.ones(8, 20).double(), rtol=1e-15, atol=0)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(X), model(X))
    assert twin.bfloat16()[0].parametrizations.weight[0].multiplier == 0.3
    assert repr(model[0].parametrizations.weight[0]) == "_Scale(multiplier=0.3, lam=0.3)"


def test_recurrent_attention_and_compiled_modules():
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layer = nn.TransformerEncoderLayer(8, 2, 8, batch_first=True).eval()
    x = torch.randn(2, 3, 8)
    for module in (nn.GRU(8, 4, 2), layer):
        out = module(x)[0]
        scale_lr_(module, 0.3)
        torch.testing.assert_close(module(x)[0], out)
        with torch.no_grad():
            torch.testing.assert_close(module(x)[0], out)
        torch.testing.assert_close(unscale_lr_(module)(x)[0], out)


@pytest.mark.slow
def test_it_compiles_as_one_graph():
    model = scale_lr_(net(), 0.3)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(X), model(X))


def test_the_loop_trains_and_resumes_a_rescaled_model(tmp_path):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net()
            scale_lr_(self.net[0], 0.1, "adam")

        def forward(self, x, y):
            return (self.net(x) - y).square().mean()

    def go(out, stop=None):
        model = Model()
        optimizer = torch.optim.Adam(param_groups(model, 1e-2, layer_decay=0.5))
        result = fit(model, [{"x": X, "y": Y}], steps=8, out=out, save_every=4, optimizer=optimizer,
                     on_step=lambda r: r["step"] == stop)  # fmt: skip
        return model, result

    expected, whole = go(tmp_path / "whole")
    go(tmp_path / "stopped", 6)
    model, result = go(tmp_path / "stopped")
    assert result.history == whole.history
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters(), strict=True))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((net, 0.0), ValueError, "multiplier must be greater than 0.0; got 0.0"),
        ((net, -1.0), ValueError, "multiplier must be greater than 0.0; got -1.0"),
        ((net, math.nan), ValueError, "multiplier must be finite; got nan"),
        ((net, math.inf), ValueError, "multiplier must be finite; got inf"),
        ((net, "0.1"), TypeError, "multiplier must be a number"),
        ((list, 0.1), TypeError, r"module must be a torch\.nn\.Module; got list"),
        ((nn.ReLU, 0.1), ValueError, "no parameter that requires a gradient; got ReLU"),
        ((net, 0.1, "lamb"), ValueError, "must be one of 'sgd', .*'lion'; got 'lamb'. .*use param_groups"),
        ((net, 0.1, "muon"), ValueError, "got 'muon'"),
        ((lambda: net().half(), 1e-9), ValueError, "divided by 1e-09 does not fit torch.float16"),
        ((lambda: net().half(), 1e9), ValueError, r"divided by 1e\+09 does not fit torch.float16"),
        (
            (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)), 0.1), ValueError,
            "'weight' has another parametrization .*_WeightNorm",
        ),
    ],
)  # fmt: skip
def test_bad_input_changes_nothing(arguments, error, message):
    make, *rest = arguments
    model = make()
    before = {n: p.detach().clone() for n, p in model.named_parameters()} if isinstance(model, nn.Module) else {}
    with pytest.raises(error, match=message):
        scale_lr_(model, *rest)
    if isinstance(model, nn.Module):
        assert {n: p.tolist() for n, p in model.named_parameters()} == {n: p.tolist() for n, p in before.items()}


def test_there_must_be_something_to_undo():
    with pytest.raises(ValueError, match="nothing in the module is scaled; got Sequential"):
        unscale_lr_(net())
    with pytest.raises(TypeError, match="module must be"):
        unscale_lr_(3)
