"""gradient_transform with optimizers: names, order, removal, closures, mixed precision, accumulation, the loop."""

import copy
import gc
import importlib.util
import pickle
import weakref

import pytest
import torch
from torch import nn

from kexue.training import (
    add_noise,
    clip_norm,
    clip_value,
    fit,
    freeze,
    gradient_transform,
    joint,
    param_groups,
    sign,
    zero,
)  # fmt: skip
from reference import layerwise_learning_rates as plain
from training.layered import Classifier, batches, chain


def inputs(seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(16, n, generator=generator, dtype=torch.float64) for n in (3, 1)]


def loss(model, scale=1.0):
    x, y = inputs()
    return (model(x) - y).square().mean() * scale


def gradients(model):
    return {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}


def weights(model):
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def sgd(model, **options):
    return torch.optim.SGD(param_groups(model, 1.0, weight_decay=0.0), **options)


def stepped(transforms, make=sgd):
    """Gradients before and after one step, and the model."""
    model = chain()
    optimizer = make(model)
    handle = gradient_transform(optimizer, transforms)
    loss(model).backward()
    before = gradients(model)
    optimizer.step()
    return before, gradients(model), model, handle


def test_all_rules_that_match_act_in_their_order():
    before, after, model, _ = stepped({"*.weight": clip_norm(0.1, p=1), "*": clip_value(0.01), "0.bias": sign()})
    names = [n for n in before if n.endswith("weight")]
    first = dict(zip(names, plain.clip_norm([before[n] for n in names], 0.1, 1), strict=True))
    expected = dict(zip(before, plain.clip_value([first.get(n, g) for n, g in before.items()], 0.01), strict=True))
    expected["0.bias"] = expected["0.bias"].sign()
    start = weights(chain())
    for name, want in expected.items():
        torch.testing.assert_close(after[name], want, rtol=1e-12, atol=1e-15)
        torch.testing.assert_close(model.get_parameter(name).detach(), start[name] - want, rtol=1e-12, atol=1e-15)


def test_calls_add_up_and_each_can_be_removed():
    model = chain()
    optimizer = sgd(model)
    calls = []

    def note(mark):
        return lambda name, parameter, gradient: (calls.append(mark), gradient)[1]

    first, second, third = (gradient_transform(optimizer, {"0.bias": note(mark)}) for mark in "abc")
    for expected in (["a", "b", "c"], ["a", "c"], ["c"], []):
        calls.clear()
        loss(model).backward()
        optimizer.step()
        assert calls == expected
        {3: second, 2: first, 1: third, 0: first}[len(expected)].remove()
    with gradient_transform(optimizer, {"0.bias": note("d")}):
        optimizer.step()
    optimizer.step()
    assert calls == ["d"]


def test_functions_get_name_parameter_and_gradient():
    model, seen = chain(), {}

    def function(name, parameter, gradient):
        seen[name] = (parameter, gradient.clone())
        assert not torch.is_grad_enabled()
        return 2 * gradient if name.endswith("bias") else gradient

    optimizer = sgd(model)
    gradient_transform(optimizer, function)
    loss(model).backward()
    before = gradients(model)
    own = {n: p.grad for n, p in model.named_parameters()}
    optimizer.step()
    assert list(seen) == list(before)
    for name, p in model.named_parameters():
        assert seen[name][0] is p
        assert torch.equal(seen[name][1], before[name])
        assert torch.equal(p.grad, before[name] * (2 if name.endswith("bias") else 1))
        assert p.grad is own[name]  # written into, so that views of a common buffer stay views


def test_none_skips_a_parameter_and_zero_does_not():
    """Zeros keep momentum and decay going; None is a freeze."""
    options = [
        (lambda g: torch.optim.SGD(g, momentum=0.9), False), (torch.optim.Adam, False), (torch.optim.AdamW, False),
        (torch.optim.SGD, True),
    ]  # fmt: skip
    for make, still in options:
        for transform, stays in ((zero(), still), (freeze(), True), (lambda n, p, g: None, True)):
            model = chain()
            optimizer = make(param_groups(model, 0.01, weight_decay=0.0))
            for step in range(4):
                if step == 2:
                    gradient_transform(optimizer, {"0.weight": transform})
                    kept = weights(model)
                optimizer.zero_grad(set_to_none=step % 2 == 0)
                loss(model).backward()
                optimizer.step()
            moved = {n: not torch.equal(p, kept[n]) for n, p in model.named_parameters()}
            assert moved.pop("0.weight") is not stays
            assert all(moved.values())
    model = chain()
    optimizer = torch.optim.AdamW(param_groups(model, 0.01, weight_decay=0.1))
    gradient_transform(optimizer, {"0.weight": zero()})
    loss(model).backward()
    optimizer.step()
    torch.testing.assert_close(model[0].weight.detach(), chain()[0].weight.detach() * (1 - 0.001))


def test_a_frozen_step_is_followed_by_ordinary_ones():
    model, mirror = chain(), chain()
    optimizer, other = sgd(model), sgd(mirror)
    handle = gradient_transform(optimizer, freeze())
    loss(model).backward()
    optimizer.step()
    handle.remove()
    for m, o in ((model, optimizer), (mirror, other)):
        o.zero_grad(set_to_none=False)
        loss(m).backward()
        o.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), mirror.parameters(), strict=True))


def test_accumulated_gradients_are_transformed_once():
    model, mirror = chain(), chain()
    optimizer, other = sgd(model), sgd(mirror)
    for m, o in ((model, optimizer), (mirror, other)):
        gradient_transform(o, {"*": clip_norm(0.05)})
        for part in [1.0] if m is mirror else [0.25] * 4:
            loss(m, part).backward()
        o.step()
    for a, b in zip(model.parameters(), mirror.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
    assert sum(p.grad.square().sum() for p in model.parameters()).sqrt().item() == pytest.approx(0.05)


@pytest.mark.parametrize("keyword", [False, True])
@pytest.mark.parametrize("kind", ["lbfgs", "sgd"])
def test_gradients_that_a_closure_makes_are_transformed(kind, keyword):
    model, calls = chain(), []
    named = list(model.named_parameters())
    optimizer = torch.optim.LBFGS(named, lr=0.1, max_iter=5) if kind == "lbfgs" else torch.optim.SGD(named, lr=0.1)
    gradient_transform(optimizer, {"0.*": lambda n, p, g: (calls.append(n), torch.zeros_like(g))[1]})
    handle = gradient_transform(optimizer, {"*": clip_value(1e-3)})
    evaluations = []

    def closure():
        optimizer.zero_grad()
        value = loss(model)
        value.backward()
        evaluations.append(value.item())
        return value

    start = weights(model)
    out = optimizer.step(closure=closure) if keyword else optimizer.step(closure)
    assert out.item() == evaluations[0]
    assert calls == ["0.weight", "0.bias"] * len(evaluations)
    assert torch.equal(model[0].weight, start["0.weight"])
    assert not torch.equal(model[2].weight, start["2.weight"])
    assert max(g.abs().max() for g in gradients(model).values()) <= 1e-3
    handle.remove()
    optimizer.step(closure)
    assert max(g.abs().max() for g in gradients(model).values()) > 1e-3


def test_an_optimizer_whose_step_takes_something_else_than_a_closure():
    class Scaled(torch.optim.Optimizer):
        def __init__(self, params):
            super().__init__(params, {"lr": 1.0})

        @torch.no_grad()
        def step(self, value):
            for group in self.param_groups:
                for p in group["params"]:
                    p.sub_(value * p.grad)

    model = chain()
    optimizer = Scaled(model.named_parameters())
    gradient_transform(optimizer, {"0.*": zero()})
    loss(model).backward()
    optimizer.step(torch.tensor(0.5).double())
    assert torch.equal(model[0].weight, chain()[0].weight)
    assert not torch.equal(model[2].weight, chain()[2].weight)


def test_views_and_swapped_gradients_are_read_before_they_are_written():
    model = chain()
    optimizer = sgd(model)
    square = {"2.weight": lambda n, p, g: g.T, "[02].bias": joint(lambda names, parameters, gradients: gradients[::-1])}
    gradient_transform(optimizer, square)
    loss(model).backward()
    before = gradients(model)
    optimizer.step()
    assert torch.equal(model[2].weight.grad, before["2.weight"].T)
    assert torch.equal(model[0].bias.grad, before["2.bias"])
    assert torch.equal(model[2].bias.grad, before["0.bias"])


# -- names ---------------------------------------------------------------------------------------------


def test_an_optimizer_without_names_takes_the_star_or_names():
    model = chain()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    with pytest.raises(ValueError, match=r"does not know the names .* '\*\.weight' cannot match; pass names=model"):
        gradient_transform(optimizer, {"*.weight": zero()})
    seen = []

    def note(name, parameter, gradient):
        seen.append(name)
        return gradient

    with gradient_transform(optimizer, {"*": note}):
        loss(model).backward()
        optimizer.step()
    assert seen[:2] == ["param_groups[0].params[0]", "param_groups[0].params[1]"]
    for names in (model, dict(model.named_parameters()), model.named_parameters()):
        seen.clear()
        with gradient_transform(optimizer, {"*.weight": note}, names=names):
            optimizer.step()
        assert seen == ["0.weight", "2.weight", "4.weight"]
    with pytest.raises(ValueError, match=r"names has no name for parameter 0 of group 0, \(4, 3\)"):
        gradient_transform(optimizer, {"*": note}, names=nn.Linear(2, 2))
    with pytest.raises(TypeError, match="names must be a model, or names with parameters; got int"):
        gradient_transform(optimizer, {"*": note}, names=3)


def test_groups_that_are_added_and_states_that_are_loaded():
    model, late = chain(), nn.Linear(2, 1).double()
    optimizer = sgd(model)
    gradient_transform(optimizer, {"*.weight": zero()})
    optimizer.add_param_group({"params": [(f"late.{n}", p) for n, p in late.named_parameters()]})
    other = torch.optim.SGD([{"params": [(f"x{n}{k}", p) for k, p in enumerate(g["params"])]}
                             for n, g in enumerate(optimizer.param_groups)], lr=1.0)  # fmt: skip
    optimizer.load_state_dict(other.state_dict())  # brings its names with it, as torch says
    assert optimizer.param_groups[0]["param_names"][0] == "x00"
    start = weights(model)
    (loss(model) + late(torch.ones(1, 2).double()).sum()).backward()
    optimizer.step()
    for name, p in model.named_parameters():
        assert torch.equal(p, start[name]) is name.endswith("weight")


def test_state_dict_copies_and_pickles_are_those_of_the_bare_optimizer():
    model = chain()
    optimizer = torch.optim.AdamW(param_groups(model, 0.1))
    bare = copy.deepcopy(optimizer.state_dict())
    gradient_transform(optimizer, {"0.*": lambda n, p, g: None})
    assert optimizer.state_dict() == bare
    assert pickle.loads(pickle.dumps(optimizer)).state_dict() == bare
    assert not copy.deepcopy(optimizer)._optimizer_step_pre_hooks


def test_a_handle_keeps_nothing_alive():
    model = chain()
    optimizer = sgd(model)
    handle = gradient_transform(optimizer, clip_norm(1.0))
    alive = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert alive() is None
    handle.remove()


# -- gradients that are missing, sparse or wrong -----------------------------------------------------------


def test_missing_and_sparse_gradients_are_passed_over():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.table = nn.Embedding(6, 3, sparse=True)
            self.out, self.unused = nn.Linear(3, 1), nn.Linear(3, 1)

    for frozen in (False, True):
        model = Model()
        optimizer = sgd(model)
        gradient_transform(optimizer, {"*": clip_norm(0.1)} | ({"table.*": freeze()} if frozen else {}))
        start = weights(model)
        model.out(model.table(torch.tensor([1, 1, 4]))).square().sum().backward()
        sparse = model.table.weight.grad.clone()
        optimizer.step()
        assert torch.stack([p.grad.norm() for p in model.out.parameters()]).norm().item() == pytest.approx(0.1)
        assert torch.equal(model.unused.weight, start["unused.weight"])
        expected = start["table.weight"] - (0 if frozen else 1) * sparse.to_dense()
        torch.testing.assert_close(model.table.weight.detach(), expected)


@pytest.mark.parametrize(
    ("transform", "error", "message"),
    [
        (lambda n, p, g: g[:1], ValueError, r"must return a gradient for '0\.weight' of shape \(4, 3\); got \(1, 3\)"),
        (lambda n, p, g: g.float(), TypeError, r"for '0\.weight' of dtype torch\.float64; got torch\.float32"),
        (lambda n, p, g: g.to("meta"), ValueError, r"for '0\.weight' on cpu; got meta"),
        (lambda n, p, g: 0.0, TypeError, r"for '0\.weight' \(a dense tensor\) or None; got float"),
        (lambda n, p, g: g.to_sparse(), TypeError, r"\(a dense tensor\) or None"),
        (joint(lambda n, p, g: g[:1]), TypeError, "must return a list of 6 gradients; got 1 of them"),
        (joint(lambda n, p, g: None), TypeError, "must return a list of 6 gradients; got a NoneType"),
    ],
)
def test_what_a_function_returns_is_checked(transform, error, message):
    model = chain()
    optimizer = sgd(model)
    gradient_transform(optimizer, transform)
    loss(model).backward()
    with pytest.raises(error, match=message):
        optimizer.step()
    assert torch.equal(model[0].weight, chain()[0].weight)


@pytest.mark.parametrize(
    ("transforms", "error", "message"),
    [
        ({"5.*": zero()}, ValueError, r"the pattern '5\.\*' of transforms matches no parameter; .* '0\.weight'"),
        ({1: zero()}, TypeError, "a pattern of transforms must be a str; got 1"),
        ({"*": 0.5}, TypeError, r"the transform of '\*' must be a function .*; got 0\.5"),
        ({"*": nn.ReLU}, TypeError, "must be a function"),
        ({"*": clip_value}, TypeError, r"must be a function .*; got <function clip_value"),
        ({}, TypeError, "transforms must map patterns to transforms"),
        (["*"], TypeError, "transforms must map patterns to transforms"),
    ],
)
def test_bad_rules_are_named(transforms, error, message):
    optimizer = sgd(chain())
    with pytest.raises(error, match=message):
        gradient_transform(optimizer, transforms)
    assert not optimizer._optimizer_step_pre_hooks


def test_something_else_than_an_optimizer_is_refused():
    with pytest.raises(TypeError, match=r"torch\.optim\.Optimizer; got Linear"):
        gradient_transform(nn.Linear(1, 1), clip_norm(1.0))


# -- mixed precision -----------------------------------------------------------------------------------


def scaled_run(fused, scale, unscale_first=False, bad_step=None):
    """Three steps with a scaler; the gradients that a transform saw."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    optimizer = torch.optim.AdamW(param_groups(model, 0.1), fused=fused)
    seen = []
    gradient_transform(optimizer, {"0.*": lambda n, p, g: (seen.append(g.clone()), g)[1]})
    gradient_transform(optimizer, {"*.weight": clip_norm(0.1), "*": clip_value(0.02)})
    scaler = torch.amp.GradScaler("cpu", enabled=scale is not None, init_scale=scale or 1.0)
    for step in range(3):
        optimizer.zero_grad()
        value = model(torch.full((2, 3), 1.0 + step)).square().sum()
        scaler.scale(value * float("inf") if step == bad_step else value).backward()
        if unscale_first:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
    assert not hasattr(optimizer, "grad_scale")
    return weights(model), seen


@pytest.mark.parametrize("fused", [False, True])
def test_a_scaler_changes_nothing(fused):
    expected, seen = scaled_run(fused, None)
    for unscale_first in (False, True):
        got, scaled = scaled_run(fused, 2.0**12, unscale_first)
        assert all(torch.equal(a, b) for a, b in zip(seen, scaled, strict=True))
        assert all(torch.equal(expected[n], got[n]) for n in expected)


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_the_scaler_skips_calls_no_transform(fused):
    assert len(scaled_run(fused, 2.0**12)[1]) == 6
    assert len(scaled_run(fused, 2.0**12, bad_step=1)[1]) == 4


def test_a_scale_that_the_user_has_set_is_his_again_after_the_step():
    model, mirror = nn.Linear(3, 2), nn.Linear(3, 2)
    mirror.load_state_dict(model.state_dict())
    for m, size in ((model, 8.0), (mirror, 1.0)):
        optimizer = torch.optim.AdamW(param_groups(m, 0.1), fused=True)
        if size > 1:
            optimizer.grad_scale = torch.tensor(size)
        gradient_transform(optimizer, {"*": clip_value(0.5)})
        for _ in range(2):
            optimizer.zero_grad()
            (m(torch.ones(2, 3)).sum() * size).backward()
            optimizer.step()
        if size > 1:
            assert optimizer.grad_scale.item() == size
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), mirror.parameters(), strict=True))


@pytest.mark.skipif(not importlib.util.find_spec("accelerate"), reason="accelerate is not installed")
def test_an_optimizer_that_accelerate_wraps():
    from accelerate import Accelerator

    model = nn.Linear(3, 2)
    prepared, optimizer = Accelerator(cpu=True).prepare(model, torch.optim.AdamW(param_groups(model, 0.1)))
    gradient_transform(optimizer, {"bias": freeze()})
    start = weights(model)
    prepared(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    assert torch.equal(model.bias, start["bias"])
    assert not torch.equal(model.weight, start["weight"])


# -- the training loop ---------------------------------------------------------------------------------


def train(out, stop=None, transforms=None, **options):
    model = Classifier()
    optimizer = torch.optim.AdamW(param_groups(model, 0.02, 0.5), fused=True)
    gradient_transform(optimizer, transforms or {"layers.*": add_noise(0.01), "*": clip_norm(0.5), "table.*": sign()})

    def on_step(record):
        return record["step"] == stop

    settings = {"steps": 12, "save_every": 4, "warmup": 3, "optimizer": optimizer, "on_step": on_step} | options
    return model, fit(model, batches, out=out, **settings)


@pytest.mark.parametrize("options", [{}, {"accumulate": 2, "schedule": "cosine"}, {"precision": "bf16"}])
def test_a_resumed_run_with_noise_equals_the_undisturbed_one_bit_for_bit(tmp_path, options):
    expected, whole = train(tmp_path / "whole", **options)
    train(tmp_path / "stopped", stop=6, **options)
    model, result = train(tmp_path / "stopped", **options)
    assert result.history == whole.history
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters(), strict=True))


def test_the_loop_clips_before_the_transforms(tmp_path):
    norms = []

    def note(names, parameters, gradients):
        norms.append(torch.stack([g.norm() for g in gradients]).norm().item())
        return gradients

    _, result = train(tmp_path, transforms=joint(note), clip=0.01, accumulate=2)
    assert len(norms) == result.step
    assert norms == pytest.approx([0.01] * 12, rel=1e-4)
