"""GradientFlow and its diagnostics: what is refused, and how the message reads."""

import math

import pytest
import torch
from torch import nn

from kexue.training import GradientFlow


def flow(method="euler", x=None, loss=None, **options):
    x = torch.ones(3, dtype=torch.float64) if x is None else x
    return GradientFlow(loss or (lambda: x.square().sum()), x, method, **options)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"method": "newton"}, ValueError, "method must be one of 'euler', .*; got 'newton'"),
        ({"cap": 0}, ValueError, "cap must be greater than 0.0; got 0"),
        ({"cap": -1.0}, ValueError, "cap must be greater"),
        ({"friction": 0.0}, ValueError, "friction must be greater than 0.0; got 0.0"),
        ({"momentum": 1.0}, ValueError, "momentum must be below 1; got 1.0"),
        ({"momentum": -0.1}, ValueError, "momentum must be at least 0.0; got -0.1"),
        ({"decay": 1.0}, ValueError, "decay must be below 1; got 1.0"),
        ({"eps": -1e-8}, ValueError, "eps must be at least 0.0"),
        ({"rtol": 0}, ValueError, "rtol must be greater than 0.0"),
        ({"atol": math.nan}, ValueError, "atol must be finite"),
        ({"target": "0"}, TypeError, "target must be a number; got '0'"),
        ({"target": -math.inf}, ValueError, "target must be finite"),
        ({"grad_fn": 3}, TypeError, "grad_fn must be a function without arguments or None; got int"),
        ({"loss": 3.0}, TypeError, "loss_fn must be a function without arguments; got float"),
        ({"x": torch.ones(2, dtype=torch.long)}, TypeError, r"params\[0\] must be a floating tensor; got dtype"),
        ({"x": torch.ones(2, dtype=torch.complex64)}, TypeError, r"params\[0\] must be a floating tensor; got dtype"),
        ({"x": []}, ValueError, "at least one tensor; got none"),
        ({"x": nn.Linear(1, 1)}, TypeError, "got Linear"),
        ({"x": {"a": torch.ones(1)}}, TypeError, "got dict"),
        ({"x": 3.0}, TypeError, "got float"),
        ({"x": [torch.ones(1), "a"]}, TypeError, r"params\[1\] must be a tensor; got str"),
        ({"x": torch.ones(1).expand(3)}, ValueError, r"memory of its own .*strides \(0,\)"),
        ({"x": torch.ones(1, requires_grad=True) * 2}, ValueError, "must be a leaf"),
        ({"x": torch.ones(1, device="meta")}, TypeError, "dense tensor with values"),
        ({"x": torch.eye(2).to_sparse()}, TypeError, "dense tensor with values; got layout torch.sparse_coo"),
        ({"x": nn.Parameter(torch.ones(1), requires_grad=False)}, ValueError, "only Parameters with requires_grad"),
    ],
)
def test_bad_settings_are_refused_at_the_door(options, error, message):
    with pytest.raises(error, match=message):
        flow(**{"loss": lambda: torch.zeros(()), **options} if "loss" not in options else options)


def test_tensors_that_share_memory_are_refused():
    x = torch.ones(4)
    for params in ([x, x], [x, x[1:3]], [x[1:], torch.ones(2), x[:2]]):
        with pytest.raises(ValueError, match="share memory"):
            GradientFlow(lambda: x.sum(), params)
    halves = [x[:2], x[2:]]
    assert GradientFlow(lambda: torch.cat(halves).sum(), halves).integrate(1.0, 1.0).final[1].tolist() == [0, 0]
    shared = torch.nn.Linear(2, 2, bias=False)
    tied = torch.nn.Sequential(shared, shared)
    assert len(GradientFlow(lambda: tied(torch.ones(1, 2)).sum(), tied.parameters()).integrate(0.1, 0.1).final) == 1


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        ({"t": -1.0, "h": 0.1}, ValueError, "t must be at least 0.0; got -1.0"),
        ({"t": math.inf, "h": 0.1}, ValueError, "t must be finite"),
        ({"t": math.nan, "h": 0.1}, ValueError, "t must be finite"),
        ({"t": 1.0, "h": 0}, ValueError, "h must be greater than 0.0; got 0"),
        ({"t": 1.0, "h": -0.1}, ValueError, "h must be greater than 0.0"),
        ({"t": 1.0, "h": "0.1"}, TypeError, "h must be a number"),
        ({"t": 1.0}, TypeError, "h must be a number, the length of a step of method 'euler'; got None"),
        ({"t": 1e300, "h": 1e-300}, ValueError, "t / h must be finite"),
        ({"t": 1.0, "h": 0.1, "save_every": -1}, ValueError, "save_every must be at least 0"),
        ({"t": 1.0, "h": 0.1, "save_every": 1.5}, TypeError, "save_every must be an integer"),
        ({"t": 1.0, "h": 0.1, "max_steps": 0}, ValueError, "max_steps must be at least 1"),
    ],
)
def test_bad_lengths_are_refused(call, error, message):
    with pytest.raises(error, match=message):
        flow().integrate(**call)


@pytest.mark.parametrize("method", ["heavy_ball", "nesterov"])
def test_the_factor_of_momentum_stays_in_its_range(method):
    with pytest.raises(ValueError, match=r"b = 1 - friction \* h must be in \[0, 1\); got -0.5 with friction=5, h=0.3"):
        flow(method, friction=5.0).integrate(3.0, 0.3)
    with pytest.raises(ValueError, match="must be in"):
        flow(method, friction=1e-20).integrate(3.0, 0.3)
    assert flow(method, friction=5.0).integrate(3.0, 0.2).losses[-1] < 1  # b = 0
    assert flow(method, momentum=0.0).integrate(3.0, 0.3).losses[-1] < 1


@pytest.mark.parametrize(
    ("loss", "error", "message"),
    [
        (lambda x: x, ValueError, r"loss_fn must return a scalar; got shape \(3,\)"),
        (lambda x: 1.0, TypeError, "loss_fn must return a tensor; got float"),
        (lambda x: None, TypeError, "loss_fn must return a tensor; got NoneType"),
        (lambda x: torch.ones(()), ValueError, "does not depend on params"),
        (lambda x: torch.ones((), requires_grad=True) * 2, ValueError, "does not depend on params"),
        (lambda x: x.sum().long(), TypeError, "real floating scalar; got dtype torch.int64"),
        (lambda x: x.sum() * 1j, TypeError, "real floating scalar; got dtype torch.complex128"),
    ],
)
@pytest.mark.parametrize("method", ["euler", "rk4", "polyak", "dopri5", "nesterov"])
def test_a_loss_that_is_none_is_refused(loss, error, message, method):
    x = torch.ones(3, dtype=torch.float64)
    with pytest.raises(error, match=message):
        flow(method, x, lambda: loss(x)).integrate(1.0, 0.1)
    assert torch.equal(x, torch.ones(3, dtype=torch.float64))
    assert not x.requires_grad


@pytest.mark.parametrize("method", ["euler", "midpoint", "rk4", "heavy_ball", "nesterov", "adagrad", "sign", "rmsprop"])
@pytest.mark.parametrize("save_every", [0, 1])
def test_a_loss_that_becomes_nan_names_its_time(method, save_every):
    x = torch.ones(1, dtype=torch.float64)
    with pytest.raises(FloatingPointError, match=r"the loss is nan at t = (0\.\d|1)"):
        flow(method, x, lambda: (x - 0.5).sqrt().sum() + 3 * x.sum()).integrate(3.0, 0.1, save_every=save_every)
    assert x.item() == 1


def test_divergence_names_time_and_remedy():
    x = torch.ones(1, dtype=torch.float64)
    with pytest.raises(FloatingPointError, match=r"the loss is inf at t = 77; steps of h = 1 may be too long"):
        flow("euler", x, lambda: 50 * x.square().sum()).integrate(1000.0, 1.0)
    closed = flow("euler", x, lambda: 50 * x.square().sum(), grad_fn=lambda: 100 * x)
    with pytest.raises(FloatingPointError, match="the gradient is not finite at t = 256 or shortly before"):
        closed.integrate(1000.0, 1.0, save_every=0)
    with pytest.raises(FloatingPointError, match="the loss is inf at t = 0"):
        flow("dopri5", x, lambda: x.sum() * math.inf).integrate(1.0)
    with pytest.raises(FloatingPointError, match="cannot be continued beyond t = 0.5"):  # x' = x^2 from 2
        flow("dopri5", x, lambda: -((x + 1) ** 3).sum() / 3).integrate(1.0)
    with pytest.raises(FloatingPointError, match="cannot be continued beyond t = 0: .*gradient is not finite"):
        flow("dopri5", x, lambda: (x - 1).sqrt().sum()).integrate(1.0, 0.1)  # the loss is 0 here, its slope infinite
    assert x.item() == 1


@pytest.mark.parametrize("method", ["sign", "polyak", "adagrad", "euler"])
def test_a_gradient_that_is_nan_does_not_pass_for_no_motion(method):
    x = torch.zeros(2, dtype=torch.float64)
    with pytest.raises(FloatingPointError, match="not finite|the loss is nan"):
        flow(method, x, lambda: (x.abs().sqrt() * 0).sum() + x.sum() + 9).integrate(0.1, 0.1)


def test_a_loss_that_is_not_smooth_ends_dopri5_by_its_limit():
    x = torch.ones(1, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"tried 200 steps and is at t = 1 of 2: .*max_steps"):
        flow("dopri5", x, lambda: x.abs().sum(), rtol=1e-10, atol=1e-12).integrate(2.0, max_steps=200)


@pytest.mark.parametrize("closed", [False, True])
def test_a_loss_below_the_target_is_refused(closed):
    x = torch.ones(2, dtype=torch.float64)
    grad_fn = (lambda: 2 * x) if closed else None
    with pytest.raises(ValueError, match="at most the smallest value of the loss; got target=3, loss 2"):
        flow("polyak", x, target=3.0, grad_fn=grad_fn).integrate(1.0, 0.1)
    assert torch.equal(x, torch.ones(2, dtype=torch.float64))
    for target, t, loss in ((3.0, 0.0, "2"), (1.5, 3.0, "0.78125")):  # the only point, and the last one
        with pytest.raises(ValueError, match=f"got target={target:g}, loss {loss}"):
            flow("polyak", x, target=target, grad_fn=grad_fn).integrate(t, 3.0)
    assert torch.equal(x, torch.ones(2, dtype=torch.float64))
    still = flow("polyak", x, lambda: x.square().sum() - 1e-17, target=2.0).integrate(1.0, 0.1)
    assert torch.equal(still.final, x)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda x: x[:1], r"shaped like params, \(3,\); got \(1,\)"),
        (lambda x: [x, x], "one tensor for each of 1 params; got 2"),
        (lambda x: [1.0], r"shaped like params, \(3,\); got float"),
    ],
)
def test_a_closed_form_of_the_wrong_shape_is_refused(made, message):
    x = torch.ones(3)
    for method in ("euler", "rk4"):
        with pytest.raises(ValueError, match=message):
            flow(method, x, grad_fn=lambda: made(x)).integrate(1.0, 0.1)


def test_a_closed_form_in_another_dtype_or_sparse_is_taken():
    x = torch.ones(3)
    for grad in (torch.ones(3, dtype=torch.float64), torch.ones(3).to_sparse(), torch.ones(3).half()):
        final = flow("euler", x, lambda: x.sum(), grad_fn=lambda grad=grad: grad).integrate(1.0, 0.5).final
        assert torch.equal(final, torch.zeros(3))
