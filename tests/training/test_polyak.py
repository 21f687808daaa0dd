"""PolyakSGD: the flow's Euler step as an optimizer of torch."""

import math

import pytest
import torch
from torch import nn

from kexue.training import GradientFlow, PolyakSGD


def example(y):
    return y * (y - 1) * (y - 3) ** 2 + 1.62276


def closure_of(optimizer, function):
    def closure():
        optimizer.zero_grad()
        loss = function()
        loss.backward()
        return loss

    return closure


@pytest.mark.parametrize("by", ["closure", "loss", "position"])
def test_steps_are_those_of_the_flow(by):
    start = torch.tensor(4.0, dtype=torch.float64)
    path = GradientFlow(lambda: example(start), start, "polyak", cap=500.0).integrate(3.0, 0.01)
    y = start.clone().requires_grad_()
    optimizer = PolyakSGD([y], target=0.0, cap=500.0, lr=0.01)
    for k in range(300):
        closure = closure_of(optimizer, lambda: example(y))
        if by == "loss":
            loss = optimizer.step(loss=closure())
        else:
            loss = optimizer.step(closure if by == "closure" else closure())
        assert float(loss.detach()) == float(path.losses[k])
    assert float(y.detach()) == pytest.approx(float(path.final), rel=1e-12)


def test_the_norm_is_that_of_all_groups_and_each_has_its_rate():
    a, b = (torch.tensor(x, requires_grad=True) for x in ([3.0, 0.0], [4.0]))
    optimizer = PolyakSGD([{"params": [a]}, {"params": [b], "lr": 0.5, "target": 2.5}], cap=10.0)
    loss = a.square().sum() / 2 + b.square().sum() / 2  # 12.5, |g| = 5
    loss.backward()
    assert optimizer.step(loss=loss) is loss
    torch.testing.assert_close(a.detach(), torch.tensor([3.0 - 12.5 / 25 * 3, 0.0]))
    torch.testing.assert_close(b.detach(), torch.tensor([4.0 - 0.5 * 10.0 / 25 * 4]))


def test_the_cap_bounds_the_step():
    x = torch.tensor([1e-6], dtype=torch.float64, requires_grad=True)
    optimizer = PolyakSGD([x], cap=100.0, lr=0.5)
    (x.square().sum() / 2 + 1).backward()
    optimizer.step(loss=1.0)
    assert x.item() == pytest.approx(1e-6 - 0.5 * 100)


def test_an_interpolating_model_reaches_its_target_without_a_rate():
    g = torch.Generator().manual_seed(0)
    inputs = torch.randn(10, 20, generator=g)
    targets = torch.randn(10, 1, generator=g)
    model = nn.Linear(20, 1)
    optimizer = PolyakSGD(model.parameters())
    for _ in range(300):
        loss = optimizer.step(closure_of(optimizer, lambda: (model(inputs) - targets).square().mean()))
    assert loss < 1e-8


@pytest.mark.parametrize("size", [1e-44, 1e-30, 1.0, 1e25])
def test_gradients_of_any_size(size):
    x = torch.tensor([1.0, 1.0], requires_grad=True)
    x.grad = torch.tensor([3.0, 4.0]) * size
    norm = float(x.grad.double().norm())
    PolyakSGD([x], cap=1.0).step(loss=0.5)
    expected = 1 - 0.5 * min(1 / norm, 1.0) * x.grad.double() / norm
    torch.testing.assert_close(x.detach().double(), expected, rtol=1e-6, atol=1e-6)


def test_no_gradient_no_motion():
    x, y = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    x.grad = torch.zeros(2)
    optimizer = PolyakSGD([x, y])
    optimizer.step(loss=3.0)
    assert torch.equal(x.detach(), torch.ones(2))
    assert torch.equal(y.detach(), torch.ones(2))
    x.grad = torch.ones(2)
    optimizer.step(loss=0.0)
    assert torch.equal(x.detach(), torch.ones(2))


def test_sparse_gradients_take_the_step_of_dense_ones():
    sparse, dense = nn.Embedding(6, 3, sparse=True), nn.Embedding(6, 3)
    dense.load_state_dict(sparse.state_dict())
    weight = nn.Parameter(torch.ones(3))
    ids = torch.tensor([1, 4, 1])
    results = []
    for table in (sparse, dense):
        w = weight.detach().clone().requires_grad_()
        optimizer = PolyakSGD([*table.parameters(), w])
        loss = (table(ids) * w).square().sum()
        loss.backward()
        optimizer.step(loss=loss)
        results.append([*(p.detach() for p in table.parameters()), w.detach()])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_parameters(dtype):
    x = torch.full((4,), 300.0, dtype=dtype, requires_grad=True)
    x.grad = torch.full((4,), 300.0, dtype=dtype)  # squares overflow in float16
    PolyakSGD([x]).step(loss=180000.0)
    assert x.detach().tolist() == [150.0] * 4


def test_state_dict_schedule_and_loss_as_numbers():
    x = torch.ones(1, requires_grad=True)
    optimizer = PolyakSGD([x], target=-1.0, cap=7.0, lr=0.3)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: 1 / (k + 1))
    x.grad = torch.ones(1)
    assert optimizer.step(loss=1) == 1
    scheduler.step()
    other = PolyakSGD([torch.ones(1, requires_grad=True)])
    other.load_state_dict(optimizer.state_dict())
    group = other.param_groups[0]
    assert (group["target"], group["cap"], group["lr"]) == (-1.0, 7.0, 0.15)


def test_rounding_below_the_target_is_no_motion_and_more_is_refused():
    x = torch.ones(1, requires_grad=True)
    x.grad = torch.ones(1)
    optimizer = PolyakSGD([x], target=2.0)
    optimizer.step(loss=torch.tensor(2.0 - 1e-6))
    assert x.item() == 1
    for loss in (1.9, torch.tensor(1.99)):
        with pytest.raises(ValueError, match="at most the smallest value of the loss; got target=2, loss 1.9"):
            optimizer.step(loss=loss)
    assert x.item() == 1


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda o: o.step(), TypeError, "needs a closure or the loss, and not both.*got closure=None, loss=None"),
        (lambda o: o.step(lambda: 1.0, loss=1.0), TypeError, "and not both.*loss=1.0"),
        (lambda o: o.step(torch.tensor(1.0), loss=1.0), TypeError, "and not both"),
        (lambda o: o.step("1"), TypeError, "a tensor or a number; got str"),
        (lambda o: o.step(torch.ones(2)), ValueError, r"must be a scalar; got shape \(2,\)"),
        (lambda o: o.step(loss="1"), TypeError, "a tensor or a number; got str"),
        (lambda o: o.step(loss=torch.ones(2)), ValueError, r"must be a scalar; got shape \(2,\)"),
        (lambda o: o.step(loss=math.nan), FloatingPointError, "the loss is nan"),
        (lambda o: o.step(lambda: torch.tensor(math.inf)), FloatingPointError, "the loss is inf"),
        (lambda o: o.step(lambda: None), TypeError, "got NoneType"),
        (lambda o: o.add_param_group({"params": [torch.ones(1)], "cap": 0}), ValueError, "cap must be greater"),
    ],
)
def test_bad_steps_are_refused(call, error, message):
    x = torch.ones(1, requires_grad=True)
    x.grad = torch.ones(1)
    with pytest.raises(error, match=message):
        call(PolyakSGD([x]))
    assert x.item() == 1


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_is_refused(value):
    x = torch.ones(2, requires_grad=True)
    x.grad = torch.tensor([1.0, value])
    with pytest.raises(FloatingPointError, match=f"norm of the gradient is {value}"):
        PolyakSGD([x]).step(loss=1.0)
    assert torch.equal(x.detach(), torch.ones(2))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"cap": 0.0}, ValueError, "cap must be greater than 0.0; got 0.0"),
        ({"cap": -1}, ValueError, "cap must be greater"),
        ({"lr": 0}, ValueError, "lr must be greater than 0.0; got 0"),
        ({"lr": math.nan}, ValueError, "lr must be finite"),
        ({"target": -math.inf}, ValueError, "target must be finite"),
        ({"target": None}, TypeError, "target must be a number; got None"),
    ],
)
def test_bad_settings_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        PolyakSGD([torch.ones(1, requires_grad=True)], **options)
