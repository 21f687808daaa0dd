"""Exact quadratic flows, measured orders, and optimizers against their flows."""

import math

import pytest
import torch
from torch import nn

from kexue.training import GradientFlow, PolyakSGD, compare_with_flow, measure_order, quadratic_flow


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def symmetric(values, seed=5):
    q = torch.linalg.qr(draw(len(values), len(values), seed=seed)).Q
    return q @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ q.T


def rough(x):
    return lambda: (1 + x.square()).log().sum() + (x[0] - x[1]) ** 4 / 4


SPECTRA = ([1.0, 4.0, 9.0], [0.0, 2.0, -1.0], [0.0, 0.0, 0.0], [0.25, 0.25, 1e-9])  # friction 1: .25 is critical


@pytest.mark.parametrize("values", SPECTRA)
@pytest.mark.parametrize("friction", [None, 0.0, 1.0])
def test_the_quadratic_flow_is_the_matrix_exponential(values, friction):
    a, x, b = symmetric(values), draw(3, seed=1), draw(3, seed=2)
    n = 3 if friction is None else 6
    m = torch.zeros(n + 1, n + 1, dtype=torch.float64)
    if friction is None:
        m[:3, :3], m[:3, 3] = -a, b
    else:
        m[:3, 3:6], m[3:6, :3] = torch.eye(3), -a
        m[3:6, 3:6], m[3:6, 6] = -friction * torch.eye(3), b
    whole = torch.cat([x, torch.zeros(n - 3), torch.ones(1)]).double()
    times = torch.tensor([0.0, 0.3, 2.0], dtype=torch.float64)
    expected = torch.stack([(torch.matrix_exp(m * t) @ whole)[:3] for t in times])
    found = quadratic_flow(a, x, times, b, friction)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(quadratic_flow(a, x, 0.3, b, friction), found[1])


@pytest.mark.parametrize("method", ["midpoint", "rk4", "dopri5"])
def test_flows_of_quadratics_follow_it(method):
    a, x, b = symmetric([0.5, 3.0, -0.2]), draw(3, seed=1), draw(3, seed=2)
    found = GradientFlow(lambda: x @ a @ x / 2 - b @ x, x, method).integrate(1.0, 0.001, save_every=100)
    torch.testing.assert_close(found.points, quadratic_flow(a, x, found.times, b), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.eye(2), torch.ones(3), 1.0), ValueError, r"a must have shape \(3, 3\), .*; got \(2, 2\)"),
        ((torch.tensor([[1.0, 2.0], [0.0, 1.0]]), torch.ones(2), 1.0), ValueError, "symmetric"),
        ((torch.eye(2), torch.ones(2).long(), 1.0), TypeError, "x must be a floating tensor"),
        ((torch.eye(2), torch.ones(2), 1.0, torch.ones(3)), ValueError, r"b must have shape \(2,\); got \(3,\)"),
        ((torch.eye(2), torch.ones(2), 1.0, None, -1.0), ValueError, "friction must be at least 0.0; got -1.0"),
        ((torch.eye(2), torch.ones(2), torch.ones(2, 2)), ValueError, r"t must be a number or \(N,\)"),
    ],
)
def test_bad_quadratics_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        quadratic_flow(*arguments)


@pytest.mark.parametrize(
    ("method", "order"),
    [("euler", 1), ("midpoint", 2), ("rk4", 4), ("heavy_ball", 1), ("nesterov", 1), ("polyak", 1)],
)
def test_orders_on_a_loss_that_is_no_quadratic(method, order):
    x = [torch.tensor(1.5, dtype=torch.float64), torch.tensor([-0.5], dtype=torch.float64)]

    def loss():
        return rough(torch.stack([x[0], x[1][0]]))()

    report = measure_order(method, loss, (p for p in x), 1.0, [0.01, 0.005, 0.0025])
    assert report.order == pytest.approx(order, abs=0.1)
    assert report.hs == [0.01, 0.005, 0.0025]
    assert x[0] == 1.5


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"method": "sign"}, ValueError, "method must be one of 'euler'"),
        ({"method": "dopri5"}, ValueError, "method must be one of 'euler'"),
        ({"t": 0.0}, ValueError, "t must be greater than 0.0"),
        ({"hs": [0.1]}, ValueError, "at least two lengths"),
        ({"hs": [0.1, 0.2]}, ValueError, "that fall"),
        ({"hs": [0.1, 0.0]}, ValueError, "above 0"),
        ({"method": "heavy_ball", "momentum": 0.5}, ValueError, "momentum fixes b"),
        ({"exact": [torch.ones(2), torch.ones(1)]}, ValueError, "each of 1 params; got 2"),
    ],
)
def test_bad_measurements_are_refused(change, error, message):
    x = torch.ones(2, dtype=torch.float64)
    arguments = {"method": "euler", "loss_fn": rough(x), "params": x, "t": 1.0, "hs": [0.2, 0.1], **change}
    with pytest.raises(error, match=message):
        measure_order(**arguments)


def test_an_optimizer_is_compared_at_the_sum_of_its_rates():
    x = draw(4, seed=1)
    found = compare_with_flow(
        lambda p: torch.optim.SGD(p, lr=0.1),
        lambda: x.square().sum() / 2,
        x,
        steps=10,
        make_scheduler=lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.8),
    )
    rates = [0.1 * 0.8**k for k in range(10)]
    torch.testing.assert_close(found.times[1:], torch.tensor(rates, dtype=torch.float64).cumsum(0))
    torch.testing.assert_close(found.flow.points, torch.exp(-found.times)[:, None] * x, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(found.optimizer.final, x * math.prod(1 - r for r in rates))
    gap = (found.optimizer.points - found.flow.points).norm(dim=1)
    torch.testing.assert_close(found.distance, gap)
    assert not x.requires_grad
    assert x.grad is None


@pytest.mark.parametrize(
    ("make", "flow", "order"),
    [
        (lambda lr: lambda p: torch.optim.SGD(p, lr=lr), "gradient", 1),
        (lambda lr: lambda p: torch.optim.SGD(p, lr=lr**2, momentum=1 - 0.8 * lr), "heavy_ball", 1),
        (lambda lr: lambda p: torch.optim.SGD(p, lr=lr**2, momentum=1 - 0.8 * lr, nesterov=True), "heavy_ball", 1),
        (lambda lr: lambda p: PolyakSGD(p, lr=lr), "polyak", 1),
    ],
)
def test_distances_shrink_with_the_rate(make, flow, order):
    x = draw(3, seed=4)
    distances = [
        float(compare_with_flow(make(lr), rough(x), x, round(1 / lr), flow=flow).distance[-1]) for lr in (0.02, 0.01)
    ]
    assert math.log2(distances[0] / distances[1]) == pytest.approx(order, abs=0.15)


@pytest.mark.slow
def test_adam_without_memory_follows_the_sign_flow():
    x = draw(3, seed=4)
    found = compare_with_flow(
        lambda p: torch.optim.Adam(p, lr=0.01, betas=(0.0, 0.0), eps=1e-30), rough(x), x, 100, flow="sign"
    )
    assert float(found.distance.max()) < 0.03  # each coordinate jumps by at most a step
    far = compare_with_flow(lambda p: torch.optim.SGD(p, lr=0.01), rough(x), x, 100, flow="sign")
    assert float(far.distance.max()) > 0.3


def test_models_get_everything_back():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    model[2].bias.requires_grad_(False)
    before = [p.detach().clone() for p in model.parameters()]
    marks = [torch.ones_like(p) for p in model.parameters()]
    for p, mark in zip(model.parameters(), marks, strict=True):
        p.grad = mark
    inputs = torch.ones(2, 3, dtype=torch.float64)
    found = compare_with_flow(
        lambda p: torch.optim.SGD(p, lr=1e-3), lambda: model(inputs).square().mean(), model.parameters(), 10
    )
    assert float(found.distance.max()) < 1e-3
    assert len(found.flow.points) == 11
    assert [p.shape for p in found.optimizer.final] == [p.shape for p in model.parameters()]
    for p, b, mark in zip(model.parameters(), before, marks, strict=True):
        assert torch.equal(p, b)
        assert p.grad is mark
        assert torch.equal(mark, torch.ones_like(mark))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"steps": 0}, ValueError, "steps must be at least 1"),
        ({"flow": "newton"}, ValueError, "flow must be one of 'gradient'"),
        ({"flow": "heavy_ball"}, ValueError, r"momentum in \(0, 1\); got 0"),
        ({"make_optimizer": lambda p: 3}, TypeError, "must return a torch Optimizer; got int"),
        (
            {"make_optimizer": lambda p: torch.optim.SGD([{"params": p[:1]}, {"params": p[1:], "lr": 0.2}], lr=0.1)},
            ValueError,
            "one rate.*got .0.1, 0.2.",
        ),
        (
            {
                "flow": "heavy_ball",
                "make_optimizer": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.5),
                "make_scheduler": lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.5),
            },
            ValueError,
            "constant rate; got 0.1, then 0.05 in step 2",
        ),
        ({"make_optimizer": lambda p: torch.optim.SGD(p, lr=1e200), "steps": 9}, FloatingPointError, "after 1 steps"),
    ],
)
def test_bad_comparisons_are_refused(change, error, message):
    x = [torch.ones(2, dtype=torch.float64), torch.ones(1, dtype=torch.float64)]
    arguments = {
        "make_optimizer": lambda p: torch.optim.SGD(p, lr=0.1),
        "loss_fn": lambda: x[0].square().sum() + x[1].sum(),
        "params": x,
        "steps": 3,
        **change,
    }
    with pytest.raises(error, match=message):
        compare_with_flow(**arguments)
    assert torch.equal(x[0], torch.ones(2, dtype=torch.float64))
    assert x[0].grad is None
