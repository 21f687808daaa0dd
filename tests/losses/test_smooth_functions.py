import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kexue.losses import (
    smooth_abs,
    smooth_max,
    smooth_min,
    smooth_relu,
    smooth_step,
    soft_argmax,
    soft_onehot,
)
from reference import smooth_approximations as reference

ARTICLE = torch.tensor([2.0, 1.0, 4.0, 5.0, 3.0], dtype=torch.float64)
ELEMENTWISE = (smooth_abs, smooth_relu, smooth_step)
ALONG = (smooth_max, smooth_min, soft_onehot, soft_argmax)


def scores(*shape, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype).requires_grad_()


def compare(got, expected, *inputs):
    """Value, and every gradient for an upstream gradient that differs between entries."""
    torch.testing.assert_close(got, expected)
    upstream = torch.linspace(0.5, 2, got.numel(), dtype=got.dtype).view(got.shape)
    torch.testing.assert_close(
        torch.autograd.grad(got, inputs, upstream), torch.autograd.grad(expected, inputs, upstream)
    )


def rows(function, x, *args):
    return torch.stack([function(row, *args) for row in x])


@pytest.mark.parametrize("K", [0.1, 1.0, 7.0])
def test_functions_and_gradients_equal_the_formulas(K):
    x = scores(4, 6)
    compare(smooth_max(x, K=K), rows(reference.smooth_max, x, K), x)
    compare(smooth_min(x, K=K), -rows(reference.smooth_max, -x, K), x)
    compare(smooth_abs(x, K=K), reference.smooth_abs(x, K), x)
    compare(smooth_relu(x, K=K), reference.smooth_relu(x, K), x)
    compare(smooth_step(x, K=K), 1 / (1 + torch.exp(-K * x)), x)
    compare(soft_onehot(x, K=K), rows(reference.onehot, x, K), x)
    compare(soft_argmax(x, K=K), rows(reference.soft_argmax, x, K), x)


def test_positions_may_be_numbers_or_points_and_get_a_gradient():
    x, line, points = scores(4, 6), scores(6, seed=1), scores(6, 2, seed=2)
    compare(soft_argmax(x, K=2.0, positions=line), rows(reference.soft_argmax, x, 2.0, line), x, line)
    compare(soft_argmax(x, K=2.0, positions=points), rows(reference.soft_argmax, x, 2.0, points), x, points)
    torch.testing.assert_close(soft_argmax(x, positions=[1, 2, 3, 4, 5, 6]), soft_argmax(x) + 1)
    torch.testing.assert_close(soft_argmax(x.float(), positions=torch.arange(6) * 2), 2 * soft_argmax(x.float()))
    assert soft_argmax(x.float(), positions=line).dtype == torch.float64


@pytest.mark.parametrize("function", ALONG, ids=lambda f: f.__name__)
def test_any_axis_and_memory_layout(function):
    x = scores(3, 5, 4)
    expected = function(x.transpose(1, 2).contiguous())
    if function is soft_onehot:
        expected = expected.transpose(1, 2)
    compare(function(x, 1), expected, x)
    torch.testing.assert_close(function(x, -2), expected)
    torch.testing.assert_close(function(x.transpose(0, 2), 1), expected.transpose(0, -1))


def test_figures_of_the_article_s_example():
    bounds = {1.0: (0.452, 3.734), 4.0: (4.6e-3, 3.982), 16.0: (7e-9, 4.0)}
    for K, (gap, position) in bounds.items():
        assert float(smooth_max(ARTICLE, K=K) - 5) == pytest.approx(gap, rel=0.02)
        assert float(soft_argmax(ARTICLE, K=K) + 1) == pytest.approx(position, abs=5e-4)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=9),
    st.floats(-6, 6).map(lambda e: 10**e),
)
def test_bounds_hold_for_all_magnitudes(values, K):
    x = torch.tensor(values).requires_grad_()
    top, low, n = max(values), min(values), len(values)
    slack = 1e-6 * max(abs(top), abs(low), math.log(n + 1) / K)
    assert top - slack <= float(smooth_max(x, K=K).detach()) <= top + math.log(n) / K + slack
    assert low - math.log(n) / K - slack <= float(smooth_min(x, K=K).detach()) <= low + slack
    assert -slack <= float(soft_argmax(x, K=K).detach()) <= n - 1 + 1e-5 * n
    size = x.detach().abs()
    assert (size - slack <= smooth_abs(x, K)).all()
    assert (smooth_abs(x, K) <= size + math.log(2) / K + slack).all()
    for function in (*ELEMENTWISE, *ALONG):
        (grad,) = torch.autograd.grad(function(x, K=K).sum(), x)
        assert torch.isfinite(grad).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_gradient_of_the_maximum_is_the_softmax(dtype):
    x = scores(5, 9, dtype=dtype)
    (grad,) = torch.autograd.grad(smooth_max(x, K=3.0).sum(), x)
    assert grad.dtype == dtype
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(grad.double(), torch.softmax(3 * x.detach().double(), -1), rtol=4 * eps, atol=eps / 100)


def test_slopes_keep_their_digits_near_zero():
    x = torch.tensor([1e-12, -1e-20, 0.0]).requires_grad_()
    (grad,) = torch.autograd.grad(smooth_abs(x, 4.0).sum(), x)
    torch.testing.assert_close(grad, 4 * x.detach(), rtol=1e-6, atol=0)
    y = torch.tensor([60.0], dtype=torch.float64).requires_grad_()
    (grad,) = torch.autograd.grad(smooth_relu(-y).sum(), y)
    assert float(grad) == pytest.approx(-math.exp(-60), rel=1e-12)


def test_second_derivatives_are_right():
    x = scores(3, 4)
    for function in (*ELEMENTWISE, *ALONG):
        assert torch.autograd.gradgradcheck(lambda v, f=function: f(v, K=1.5), (x,))


def test_minus_infinity_does_not_take_part():
    x = scores(3, 5)
    masked = x.detach().clone()
    masked[:, 2] = -math.inf
    masked.requires_grad_()
    for function in (smooth_max, soft_onehot):
        kept = [0, 1, 3, 4]
        got, expected = function(masked, K=2.0), function(x[:, kept], K=2.0)
        torch.testing.assert_close(got if function is smooth_max else got[:, kept], expected)
        (grad,) = torch.autograd.grad(got.square().sum(), masked)
        assert torch.isfinite(grad).all()
        assert not grad[:, 2].any()
    alone = torch.full((2, 4), -math.inf, requires_grad=True)
    assert (smooth_max(alone) == -math.inf).all()
    assert (smooth_min(-alone) == math.inf).all()
    assert not soft_onehot(alone).any()
    assert not soft_argmax(alone).any()
    (grad,) = torch.autograd.grad(soft_argmax(alone).sum() + soft_onehot(alone).sum(), alone)
    assert not grad.isnan().any()
    assert not torch.autograd.grad(smooth_max(alone).sum(), alone)[0].any()


def test_equal_entries_share_the_weight_and_sharpness_may_be_extreme():
    x = torch.full((2, 4), 7.0)
    for K in (1e-30, 1.0, 1e30):
        torch.testing.assert_close(soft_onehot(x, K=K), torch.full((2, 4), 0.25))
        torch.testing.assert_close(soft_argmax(x, K=K), torch.full((2,), 1.5))
    torch.testing.assert_close(smooth_max(torch.tensor([5.0]), K=1e-30), torch.tensor(5.0))
    torch.testing.assert_close(smooth_max(torch.tensor([1e30, -1e30]), K=1e30), torch.tensor(1e30))


def test_low_precision_comes_back_in_float32_and_autocast_changes_nothing():
    x = scores(3, 5, dtype=torch.float32)
    for function in (*ELEMENTWISE, *ALONG):
        for dtype in (torch.bfloat16, torch.float16):
            low = x.detach().to(dtype)
            got = function(low, K=2.0)
            assert got.dtype == torch.float32
            torch.testing.assert_close(got, function(low.float(), K=2.0), rtol=0, atol=0)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            cast = function(x, K=2.0)
        assert torch.equal(cast, function(x, K=2.0))
    assert torch.equal(x.detach(), scores(3, 5, dtype=torch.float32).detach())  # never changed in place


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"K": 0.0}, ValueError, "greater than 0"),
        ({"K": -1.0}, ValueError, "-1.0"),
        ({"K": math.inf}, ValueError, "finite"),
        ({"K": math.nan}, ValueError, "finite"),
        ({"K": 1e31}, ValueError, r"\[1e-30, 1e\+30\]"),
        ({"K": "sharp"}, TypeError, "'sharp'"),
        ({"x": torch.arange(4)}, TypeError, "int64"),
        ({"x": [1.0, 2.0]}, TypeError, "list"),
    ],
)
def test_bad_input_is_rejected(arguments, error, message):
    for function in (*ELEMENTWISE, *ALONG):
        with pytest.raises(error, match=message):
            function(**({"x": torch.zeros(3, 4)} | arguments))


def test_bad_axes_and_positions_are_rejected():
    for function in ALONG:
        with pytest.raises(ValueError, match=r"\(3, 4\); got 2"):
            function(torch.zeros(3, 4), 2)
        with pytest.raises(ValueError, match=r"at least one entry along dim -1; got shape \(3, 0\)"):
            function(torch.zeros(3, 0))
        with pytest.raises(ValueError, match="got 0"):
            function(torch.tensor(1.0), 0)
        with pytest.raises(TypeError, match="dim"):
            function(torch.zeros(3, 4), 1.0)
        assert function(torch.zeros(0, 4)).shape[0] == 0
    with pytest.raises(ValueError, match=r"\(4,\) or \(4, D\); got \(3,\)"):
        soft_argmax(torch.zeros(2, 4), positions=[1, 2, 3])
    with pytest.raises(TypeError, match="numbers"):
        soft_argmax(torch.zeros(2, 4), positions="abcd")
    with pytest.raises(TypeError, match="bool"):
        soft_argmax(torch.zeros(2, 4), positions=torch.ones(4, dtype=torch.bool))


def test_an_infinite_entry_is_the_maximum():
    x = torch.tensor([[math.inf, 1.0], [math.inf, -math.inf], [math.inf, math.inf]])
    assert smooth_max(x).tolist() == [math.inf] * 3
    assert smooth_min(-x).tolist() == [-math.inf] * 3
