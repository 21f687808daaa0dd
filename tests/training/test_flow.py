"""GradientFlow: values against the formulas and closed forms, what is kept, and how the parameters come out."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import solve_ivp
from torch import nn

from kexue.training import GradientFlow, measure_order, quadratic_flow
from reference.optimizer_dynamics import path

FIXED = ("euler", "midpoint", "rk4", "sign", "polyak", "adagrad", "rmsprop", "heavy_ball", "nesterov")
CURVES = torch.tensor([1.0, 4.0, 9.0], dtype=torch.float64)


def start(dtype=torch.float64):
    return torch.tensor([1.0037, -2.0019, 0.5043], dtype=dtype)


def quadratic(x, curves=CURVES):
    return lambda: (curves.to(x.dtype) * x.square()).sum() / 2


def rough(x):
    """A loss that is no quadratic, and >= 0."""
    return lambda: (1 + x.square()).log().sum() + (x[0] - x[1]) ** 4 / 4


def rough_numpy(x):
    g = 2 * x / (1 + x * x)
    push = (x[0] - x[1]) ** 3
    g[0] += push
    g[1] -= push
    return g


def rough_value(x):
    return np.log(1 + x * x).sum() + (x[0] - x[1]) ** 4 / 4


@pytest.mark.parametrize("closed", [False, True])
@pytest.mark.parametrize("method", FIXED)
def test_every_method_takes_the_steps_of_its_formula(method, closed):
    x = start()
    grad_fn = (lambda: torch.from_numpy(rough_numpy(x.numpy().copy()))) if closed else None
    found = GradientFlow(rough(x), x, method, grad_fn=grad_fn).integrate(t=0.6, h=0.02)
    expected = path(method, rough_numpy, rough_value, x.numpy(), 30, 0.02)
    np.testing.assert_allclose(found.points.numpy(), expected, rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(found.losses.numpy(), [rough_value(p) for p in expected], rtol=1e-12)
    np.testing.assert_allclose(found.times.numpy(), np.arange(31) * 0.02)
    assert found.evaluations == 30 * {"midpoint": 2, "rk4": 4}.get(method, 1)


@pytest.mark.parametrize("method", FIXED)
def test_a_list_of_tensors_is_one_vector(method):
    x = start()
    parts = [x[:1].clone(), x[1:].clone().reshape(2, 1)]
    whole = GradientFlow(rough(x), x, method).integrate(0.3, 0.02)
    found = GradientFlow(lambda: rough(torch.cat([p.flatten() for p in parts]))(), parts, method).integrate(0.3, 0.02)
    assert len(found.points) == len(found.times) == 16
    for i in range(16):
        assert [p.shape for p in found.points[i]] == [(1,), (2, 1)]
        torch.testing.assert_close(torch.cat([p.flatten() for p in found.points[i]]), whole.points[i])
    assert isinstance(found.final, list)
    assert torch.equal(found.final[1], found.points[-1][1])


@pytest.mark.parametrize(("method", "order"), [("euler", 1), ("midpoint", 2), ("rk4", 4)])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_orders_on_random_quadratics(method, order, seed):
    g = torch.Generator().manual_seed(seed)
    root = torch.randn(4, 4, generator=g, dtype=torch.float64)
    a, b, x = root @ root.T / 4, *torch.randn(2, 4, generator=g, dtype=torch.float64)
    exact = quadratic_flow(a, x, 1.0, b)
    report = measure_order(method, lambda: x @ a @ x / 2 - b @ x, x, 1.0, [0.02, 0.01, 0.005], exact=exact)
    assert report.order == pytest.approx(order, abs=0.05)
    assert len(report.errors) == 3
    assert report.errors == sorted(report.errors, reverse=True)


@pytest.mark.parametrize("method", ["heavy_ball", "nesterov"])
@pytest.mark.parametrize("friction", [0.3, 1.0, 6.0])
def test_momentum_has_order_one_to_the_second_order_equation(method, friction):
    x = start()
    z, eye, a = torch.zeros(3, 3).double(), torch.eye(3).double(), torch.diag(CURVES)
    m = torch.cat([torch.cat([z, eye], 1), torch.cat([-a, -friction * eye], 1)])
    exact = (torch.matrix_exp(m) @ torch.cat([x, z[0]]))[:3]
    torch.testing.assert_close(quadratic_flow(a, x, 1.0, friction=friction), exact)
    report = measure_order(method, quadratic(x), x, 1.0, [0.01, 0.005, 0.0025], exact=exact, friction=friction)
    assert report.order == pytest.approx(1, abs=0.1)
    torch.testing.assert_close(report.errors, measure_order(
        method, quadratic(x), x, 1.0, [0.01, 0.005, 0.0025], friction=friction
    ).errors, rtol=1e-6, atol=1e-9)  # fmt: skip


def test_dopri5_agrees_with_scipy_and_with_the_closed_form():
    x = start()
    found = GradientFlow(rough(x), x, "dopri5", rtol=1e-9, atol=1e-11).integrate(3.0, 0.25)
    exact = solve_ivp(lambda _, y: -rough_numpy(y.copy()), (0, 3), x.numpy(), t_eval=found.times.numpy(),
                      method="DOP853", rtol=1e-12, atol=1e-13).y.T  # fmt: skip
    np.testing.assert_allclose(found.points.numpy(), exact, atol=2e-8)
    assert torch.equal(found.times, torch.arange(13, dtype=torch.float64) * 0.25)
    found = GradientFlow(quadratic(x), x, "dopri5").integrate(2.0)
    expected = torch.exp(-CURVES * found.times[:, None]) * x
    torch.testing.assert_close(found.points, expected, rtol=0, atol=1e-8)
    assert found.times[-1] == 2.0
    torch.testing.assert_close(found.losses, (CURVES * found.points.square()).sum(1) / 2)
    assert len(GradientFlow(quadratic(x), x, "dopri5").integrate(2.0, save_every=0).times) == 2


@pytest.mark.slow
@pytest.mark.parametrize("tolerance", [1e-4, 1e-6, 1e-8])
def test_dopri5_error_follows_its_tolerance(tolerance):
    x = start()
    found = GradientFlow(rough(x), x, "dopri5", rtol=tolerance, atol=tolerance).integrate(3.0, 0.1)
    exact = GradientFlow(rough(x), x, "dopri5", rtol=1e-13, atol=1e-14).integrate(3.0, 0.1)
    error = (found.points - exact.points).abs().max()
    assert error < 20 * tolerance
    assert found.evaluations < exact.evaluations


def test_sign_flow_equals_adam_without_memory_and_sgd_is_euler():
    x = torch.randn(50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for method, make, tolerance in (
        ("sign", lambda p: torch.optim.Adam([p], lr=0.01, betas=(0.0, 0.0), eps=0), 1e-15),
        ("euler", lambda p: torch.optim.SGD([p], lr=0.01), 0.0),
        ("adagrad", lambda p: torch.optim.Adagrad([p], lr=0.01, eps=1e-8), 1e-15),
        ("rmsprop", lambda p: torch.optim.RMSprop([p], lr=0.01, alpha=0.9, eps=1e-8), 1e-15),
    ):
        p = x.clone().requires_grad_()
        optimizer = make(p)
        for _ in range(20):
            optimizer.zero_grad()
            (p**4).sum().backward()
            optimizer.step()
        final = GradientFlow(lambda: (x**4).sum(), x, method).integrate(0.2, 0.01).final
        assert float((final - p.detach()).abs().max()) <= tolerance, method


@pytest.mark.parametrize("nesterov", [False, True])
def test_momentum_is_torchs_with_rate_h_squared(nesterov):
    x = start()
    p = x.clone().requires_grad_()
    optimizer = torch.optim.SGD([p], lr=0.01, momentum=0.7)
    flow = GradientFlow(rough(x), x, "heavy_ball", momentum=0.7)
    if nesterov:  # torch keeps x + b v where the formula has x
        optimizer = torch.optim.SGD([p], lr=0.01, momentum=0.7, nesterov=True)
        flow = GradientFlow(rough(x), x, "nesterov", momentum=0.7)
    for _ in range(10):
        optimizer.zero_grad()
        rough(p)().backward()
        optimizer.step()
    points = flow.integrate(1.0, 0.1).points
    expected = points[-1] + (0.7 * (points[-1] - points[-2]) if nesterov else 0)
    torch.testing.assert_close(expected, p.detach(), rtol=1e-13, atol=1e-13)


def test_sign_flow_loses_the_l1_norm_and_the_gradient_flow_the_squared_l2_norm():
    x = start()
    g = CURVES * x
    for method, rate in (("sign", g.abs().sum()), ("euler", g.square().sum())):
        losses = GradientFlow(quadratic(x), x, method).integrate(1e-6, 1e-6).losses
        assert float((losses[0] - losses[1]) / 1e-6) == pytest.approx(float(rate), rel=1e-4)


def test_polyak_flow_lets_the_loss_decay_exponentially_with_order_one():
    x = start()
    errors = []
    for h in (0.02, 0.01, 0.005):
        losses = GradientFlow(lambda: quadratic(x)() + 3, x, "polyak", target=3.0).integrate(2.0, h).losses - 3
        errors.append(float(losses[-1] / losses[0]) * math.exp(2) - 1)
    assert errors[-1] == pytest.approx(-2.2e-3, abs=2e-4)
    assert math.log2(errors[1] / errors[2]) == pytest.approx(1, abs=0.05)
    assert measure_order("polyak", quadratic(x), x, 1.0, [0.02, 0.01, 0.005]).order == pytest.approx(1, abs=0.05)


def test_the_example_of_the_article_leaves_the_local_minimum():
    y = torch.tensor(4.0, dtype=torch.float64)
    flow = {m: GradientFlow(lambda: y * (y - 1) * (y - 3) ** 2 + 1.62276, y, m) for m in ("polyak", "euler")}
    capped, plain = flow["polyak"].integrate(25, 0.01), flow["euler"].integrate(25, 0.01)
    assert float(capped.final) == pytest.approx(0.407, abs=1e-3)
    assert float(capped.losses[-1]) == pytest.approx(5.5e-7, abs=1e-8)
    assert float(plain.final) == pytest.approx(3, abs=1e-3)
    assert y == 4


@pytest.mark.slow
@settings(max_examples=30)
@given(
    curves=st.lists(st.floats(0.1, 10.0), min_size=1, max_size=4),
    h=st.floats(0.005, 0.19),
    t=st.floats(0.0, 2.0),
    method=st.sampled_from(["euler", "midpoint", "rk4", "dopri5"]),
)
def test_descent_never_rises_and_ends_at_t(curves, h, t, method):
    x = torch.linspace(1, 2, len(curves), dtype=torch.float64)
    found = GradientFlow(quadratic(x, torch.tensor(curves, dtype=torch.float64)), x, method).integrate(t, h)
    assert float(found.times[-1]) == t
    assert (found.times.diff() > 0).all()
    assert (found.losses.diff() <= 1e-12).all()
    assert len(found.points) == len(found.times) == len(found.losses)
    assert torch.equal(found.points[0], torch.linspace(1, 2, len(curves), dtype=torch.float64))


def test_the_last_step_is_shorter_and_exact_for_a_linear_path():
    x = torch.tensor([1.0], dtype=torch.float64)
    found = GradientFlow(lambda: 2 * x.sum(), x).integrate(1.0, 0.3)
    assert found.times.tolist() == pytest.approx([0, 0.3, 0.6, 0.9, 1.0])
    assert found.points[:, 0].tolist() == pytest.approx([1, 0.4, -0.2, -0.8, -1])
    assert GradientFlow(lambda: 2 * x.sum(), x).integrate(0.25, 7.0).final.item() == 0.5
    assert GradientFlow(lambda: 2 * x.sum(), x).integrate(1e-20, 1.0).times.tolist() == [0.0, 1e-20]
    still = GradientFlow(lambda: 2 * x.sum(), x).integrate(0, 0.1)
    assert (still.times.tolist(), still.losses.tolist(), still.final.tolist()) == ([0], [2], [1])
    assert still.evaluations == 0
    assert len(GradientFlow(lambda: 2 * x.sum(), x).integrate(0.1 + 0.1 + 0.1, 0.1).times) == 4  # .30000000000000004


@pytest.mark.parametrize("method", ["heavy_ball", "nesterov"])
def test_a_shorter_last_step_of_momentum_keeps_the_velocity(method):
    x = start()
    exact = quadratic_flow(torch.diag(CURVES), x, 1.0, friction=1.0)
    for h in (0.0101, 0.0099):
        got = GradientFlow(quadratic(x), x, method).integrate(1.0, h).final
        even = GradientFlow(quadratic(x), x, method).integrate(1.0, 0.01).final
        assert (got - exact).norm() == pytest.approx(float((even - exact).norm()), rel=0.05)


@pytest.mark.parametrize("method", [*FIXED, "dopri5"])
@pytest.mark.parametrize(("every", "kept"), [(1, 11), (3, 5), (5, 3), (0, 2), (100, 2)])
def test_save_every_keeps_the_ends_and_changes_nothing_else(method, every, kept):
    x = start()
    whole = GradientFlow(rough(x), x, method).integrate(1.0, 0.1)
    thin = GradientFlow(rough(x), x, method).integrate(1.0, 0.1, save_every=every)
    assert len(thin.times) == len(thin.points) == len(thin.losses) == kept
    index = [round(float(t) * 10) for t in thin.times]
    assert index[0] == 0
    assert index[-1] == 10
    assert torch.equal(thin.points, whole.points[index])
    assert torch.equal(thin.losses, whole.losses[index])


def test_too_many_points_are_thinned_with_a_warning(monkeypatch):
    monkeypatch.setattr("kexue.training.flow._MOST_BYTES", 2000)
    x = start()
    with pytest.warns(UserWarning, match="save_every"):
        found = GradientFlow(rough(x), x).integrate(1.0, 0.01)
    assert len(found.times) == 16  # 124 bytes each
    assert len(GradientFlow(rough(x), x).integrate(1.0, 0.01, save_every=1).times) == 101


@pytest.mark.parametrize("method", [*FIXED, "dopri5"])
def test_parameters_come_back_or_stay_at_the_end(method):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    before = [p.detach().clone() for p in model.parameters()]
    marks = [torch.full_like(p, 7.0) for p in model.parameters()]
    for p, mark in zip(model.parameters(), marks, strict=True):
        p.grad = mark
    inputs = torch.ones(2, 3, dtype=torch.float64)

    def loss():
        return model(inputs).square().mean()

    flow = GradientFlow(loss, model.parameters(), method)
    found = flow.integrate(0.5, 0.05)
    assert all(torch.equal(p, b) and p.grad is m for p, b, m in zip(model.parameters(), before, marks, strict=True))
    assert found.losses.min() < found.losses[0]
    with torch.no_grad():
        again = flow.integrate(0.5, 0.05, in_place=True)
    for p, a, b in zip(model.parameters(), again.final, found.final, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(p, a)
        assert p.requires_grad
    assert float(loss().detach()) == float(found.losses[-1])


@pytest.mark.parametrize("method", [*FIXED, "dopri5"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_an_interrupted_flow_puts_everything_back(method, error):
    x, calls = start(), []

    def loss():
        calls.append(0)
        if len(calls) > 7:
            raise error
        return x.square().sum()

    for in_place in (False, True):
        calls.clear()
        with pytest.raises(error):
            GradientFlow(loss, x, method).integrate(1.0, 0.1, in_place=in_place)
        assert torch.equal(x, start())
        assert not x.requires_grad


def test_inference_mode_and_a_used_graph_are_no_obstacle():
    x = start().requires_grad_()
    with torch.inference_mode():
        found = GradientFlow(quadratic(x), x).integrate(0.1, 0.01)
    assert not found.final.requires_grad
    assert found.final.is_leaf
    found.final.add_(1)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", [*FIXED, "dopri5"])
def test_half_precision_keeps_its_state_in_float32(method, dtype):
    x = start(dtype)
    wide = x.float()
    found = GradientFlow(lambda: rough(x.float())(), x, method).integrate(1.0, 0.001, save_every=100)
    exact = GradientFlow(lambda: rough(wide)(), wide, method).integrate(1.0, 0.001, save_every=100)
    assert found.points.dtype == dtype
    assert found.losses.dtype == torch.float32
    assert x.dtype == dtype
    error = (found.final.float() - exact.final).abs().max()
    assert error < 8 * torch.finfo(dtype).eps  # 1000 steps of 1e-3 in bfloat16 itself would not move at all


def test_mixed_dtypes_shapes_and_unused_tensors():
    a, b, c = torch.ones(2, 1, dtype=torch.float64), torch.ones(()), torch.ones(3)
    found = GradientFlow(lambda: a.square().sum() + b.square(), (p for p in (a, b, c)), "rk4").integrate(1.0, 0.01)
    assert [x.dtype for x in found.final] == [torch.float64, torch.float32, torch.float32]
    assert [x.shape for x in found.final] == [(2, 1), (), (3,)]
    torch.testing.assert_close(found.final[0], torch.full((2, 1), math.exp(-2)).double(), rtol=1e-6, atol=0)
    assert torch.equal(found.final[2], c)
    empty = torch.ones(0)
    assert GradientFlow(lambda: a.sum() + empty.sum(), [a, empty]).integrate(0.1, 0.1).final[1].shape == (0,)


def test_frozen_parameters_stay_and_sparse_gradients_count():
    table, head = nn.Embedding(5, 2, sparse=True), nn.Linear(2, 1)
    head.weight.requires_grad_(False)
    ids = torch.tensor([1, 1, 3])

    def loss():
        return head(table(ids)).square().mean()

    found = GradientFlow(loss, [*table.parameters(), *head.parameters()]).integrate(1.0, 0.1)
    dense = nn.Embedding.from_pretrained(table.weight.detach().clone(), freeze=False)
    expected = GradientFlow(
        lambda: head(dense(ids)).square().mean(), [*dense.parameters(), *head.parameters()]
    ).integrate(1.0, 0.1)
    assert torch.equal(found.final[0], expected.final[0])
    assert torch.equal(found.final[1], head.weight)
    assert not torch.equal(found.final[2], head.bias)
    assert torch.equal(found.final[0][[0, 2, 4]], table.weight[[0, 2, 4]])


def test_a_closed_form_may_return_the_parameter_itself():
    for method in ("midpoint", "rk4", "dopri5", "heavy_ball", "nesterov", "rmsprop"):
        x = start()
        closed = GradientFlow(lambda x=x: x.square().sum() / 2, x, method, grad_fn=lambda x=x: x).integrate(0.5, 0.1)
        auto = GradientFlow(lambda x=x: x.square().sum() / 2, x, method).integrate(0.5, 0.1)
        torch.testing.assert_close(closed.points, auto.points)
    frozen, x = nn.Parameter(torch.ones(2), requires_grad=False), torch.ones(3)
    both = GradientFlow(lambda: x.sum(), [frozen, x], grad_fn=lambda: [torch.zeros(2), torch.ones(3)])
    assert torch.equal(both.integrate(1.0, 0.5).final[1], torch.zeros(3))
    assert torch.equal(both.integrate(1.0, 0.5).final[0], torch.ones(2))


@pytest.mark.parametrize("method", [*FIXED, "dopri5"])
def test_stationary_points_stay_bit_for_bit(method):
    x = torch.tensor([0.0, -0.0, 0.0], dtype=torch.float64)
    found = GradientFlow(lambda: x.square().sum() + 1, x, method, eps=0.0).integrate(1.0, 0.1)
    assert torch.equal(found.final, x)
    assert torch.isfinite(found.points).all()


@pytest.mark.parametrize("size", [1e-300, 1e-40, 1e100])
def test_polyak_direction_of_tiny_and_huge_gradients(size):
    x = torch.tensor([3.0, 4.0], dtype=torch.float64)
    flow = GradientFlow(lambda: 2 + 0 * x.sum(), x, "polyak", cap=1000.0, grad_fn=lambda: x * size)
    moved = flow.integrate(1.0, 1.0).final - x
    amount = 2 * min(1 / (5 * size), 1000.0) if size < 1 else 2 / (5 * size)
    torch.testing.assert_close(moved, -amount * x / 5, rtol=1e-12, atol=1e-12)


def test_evaluation_may_differentiate_by_itself():
    x = start().requires_grad_()

    def penalised():
        value = x.square().sum()
        (g,) = torch.autograd.grad(value, x, create_graph=True)
        return value + g.square().sum()  # 5 |x|^2

    found = GradientFlow(penalised, x, "rk4").integrate(0.1, 0.001)
    torch.testing.assert_close(found.final, math.exp(-1.0) * start(), rtol=1e-8, atol=0)
