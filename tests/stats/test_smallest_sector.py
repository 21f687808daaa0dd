"""Tensors, smallest sectors of points and the circular range test."""

import math

import numpy as np
import pytest
import torch

from kexue.stats import circular_range_test, common_sector, common_sector_probability, smallest_sector


def brute_force(angles, period):
    """The smallest width over all points as starts."""
    return min((max((b - a) % period for b in angles), a % period) for a in angles)


@pytest.mark.parametrize("period", [math.tau, 360.0, 24.0])
@pytest.mark.parametrize("n", [1, 2, 3, 10])
def test_smallest_sector_equals_brute_force(n, period):
    angles = np.random.default_rng(n).uniform(-2, 3, (4, 5, n)) * period
    start, width = smallest_sector(angles, period=period)
    for index in np.ndindex(4, 5):
        expected = brute_force(angles[index], period)
        assert width[index] == pytest.approx(expected[0], abs=1e-12 * period)
        assert start[index] == pytest.approx(expected[1], abs=1e-12 * period)


def test_sector_contains_all_points_and_starts_within_the_circle():
    start, width = smallest_sector([-1e-20, 0.1, 6.2])
    assert 0 <= start < math.tau
    assert width == pytest.approx(0.1 + math.tau - 6.2)
    assert smallest_sector([2.0, 2.0, 2.0]) == (2.0, 0.0)
    assert smallest_sector([0, 90, 180, 270], period=360)[1] == 270


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("period", [0.1, 360, math.tau])
def test_a_start_just_below_the_period_is_not_rounded_up_to_it(dtype, period):
    start, _ = smallest_sector(torch.tensor([[-1e-5 * period], [-0.5 * period]], dtype=dtype), period=period)
    assert start.dtype == dtype
    assert (start.double() < period).all()
    assert float(start[1]) == pytest.approx(period / 2, rel=1e-2)


def test_narrow_sectors_keep_their_digits():
    assert smallest_sector([1.0, 1.0 + 2**-40])[1] == 2**-40
    assert smallest_sector([359.0, 359.0 + 2**-40], period=360)[1] == 2**-40


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_probability_of_tensors_keeps_dtype_and_has_the_density_as_gradient(dtype):
    theta = torch.tensor([[-1.0, 0.5, 3.0], [4.0, 5.0, 7.0]], dtype=dtype).T.requires_grad_()  # not contiguous
    p = common_sector_probability(6, theta)
    (grad,) = torch.autograd.grad(p.sum(), theta)
    assert p.dtype == grad.dtype == dtype
    exact = theta.detach().double().numpy()
    tolerance = {torch.float64: 1e-15, torch.float32: 1e-7, torch.bfloat16: 1e-2, torch.float16: 1e-3}[dtype]
    np.testing.assert_allclose(p.detach().double(), common_sector(6).cdf(exact), rtol=tolerance, atol=tolerance**2)
    np.testing.assert_allclose(grad.double(), common_sector(6).pdf(exact), rtol=tolerance, atol=tolerance**2)


def test_numbers_of_points_may_be_a_tensor():
    n, theta = torch.tensor([[1], [2], [30]]), torch.tensor([3.0, 5.5], dtype=torch.float64, requires_grad=True)
    p = common_sector_probability(n, theta)
    np.testing.assert_array_equal(p.detach(), common_sector_probability(n.numpy(), theta.detach().numpy()))
    (grad,) = torch.autograd.grad(p.sum(), theta)
    np.testing.assert_allclose(grad, sum(common_sector(k).pdf(theta.detach().numpy()) for k in (1, 2, 30)), rtol=1e-14)
    assert common_sector_probability(n, 3.0).dtype == torch.get_default_dtype()
    assert common_sector_probability(4, torch.tensor(180), period=360) == 0.5
    assert common_sector_probability(4, torch.ones(0, 3)).shape == (0, 3)


@pytest.mark.parametrize("n", [3, 70, 2000])
def test_gradcheck(n):
    centre = common_sector(n, period=1).ppf([0.1, 0.6, 0.9])
    theta = torch.tensor(centre, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda t: common_sector_probability(n, t, period=1), theta, eps=1e-8, atol=1e-4 * n, rtol=1e-4
    )


def test_a_second_derivative_is_an_error_not_silence():
    theta = torch.tensor([4.0], dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(common_sector_probability(4, theta).sum(), theta, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        grad.sum().backward()


def test_gradient_of_the_width_moves_the_two_ends():
    angles = torch.tensor([0.2, 6.0, 1.0, 0.5], dtype=torch.float64, requires_grad=True)
    start, width = smallest_sector(angles)
    assert start.item() == 6.0
    (grad,) = torch.autograd.grad(width, angles)
    assert grad.tolist() == [0.0, -1.0, 1.0, 0.0]


@pytest.mark.parametrize("kind", ["array", "tensor"])
def test_range_test_gives_width_and_its_probability(kind):
    hours = np.array([[23.5, 0.25, 1.0, 2.75, 22.0], [0.0, 5.0, 10.0, 15.0, 20.0]])
    result = circular_range_test(hours if kind == "array" else torch.from_numpy(hours), period=24)
    np.testing.assert_allclose(result.statistic, [4.75, 19.0], rtol=1e-15)
    expected = [5 * (4.75 / 24) ** 4, common_sector(5, 24).cdf(19.0)]
    np.testing.assert_allclose(result.pvalue, expected, rtol=1e-14)
    assert isinstance(result.pvalue, np.ndarray if kind == "array" else torch.Tensor)


def test_p_values_of_uniform_angles_are_uniform():
    from scipy.stats import kstest

    angles = np.random.default_rng(0).uniform(0, 360, (3000, 9))
    assert kstest(circular_range_test(angles, period=360).pvalue, "uniform").pvalue > 1e-3
    assert circular_range_test([1.0]).pvalue == 1.0


@pytest.mark.parametrize("function", [smallest_sector, circular_range_test])
@pytest.mark.parametrize(
    ("angles", "error", "message"),
    [
        ([], ValueError, r"shape \(..., n\) with n >= 1; got \(0,\)"),
        (1.0, ValueError, r"got \(\)"),
        ([1.0, math.inf], ValueError, "finite"),
        ([1.0, math.nan], ValueError, "NaN"),
        (["a"], TypeError, "real numbers"),
        (torch.tensor([True]), TypeError, "bool"),
        (torch.tensor([1.0, math.nan]), ValueError, "finite"),
        (torch.zeros(3, 0), ValueError, r"got \(3, 0\)"),
    ],
)
def test_bad_angles_are_named(function, angles, error, message):
    with pytest.raises(error, match=message):
        function(angles)


@pytest.mark.parametrize(
    ("n", "theta", "error", "message"),
    [
        (torch.tensor([0]), torch.tensor([1.0]), ValueError, "got 0"),
        (torch.tensor([2.0]), torch.tensor([1.0]), TypeError, "dtype torch.float32"),
        (2.5, torch.tensor([1.0]), TypeError, "n must be an integer"),
        (True, torch.tensor([1.0]), TypeError, "n must be an integer"),
        (2, torch.tensor([math.nan]), ValueError, "theta must not be NaN"),
        (torch.tensor([2, 3]), torch.ones(4, 3), ValueError, r"broadcast; got \(2,\) and \(4, 3\)"),
        (2, torch.tensor([True]), TypeError, "theta must be real"),
    ],
)
def test_bad_tensors_are_named(n, theta, error, message):
    with pytest.raises(error, match=message):
        common_sector_probability(n, theta)


def test_the_distribution_takes_tensors_only_without_gradient():
    theta = torch.tensor([4.0, 5.0])
    np.testing.assert_array_equal(common_sector(9).cdf(theta.bfloat16()), common_sector(9).cdf(theta.numpy()))
    with pytest.raises(TypeError, match="theta must be without gradient"):
        common_sector(9).cdf(theta.requires_grad_())


def test_inputs_are_not_changed():
    angles = torch.tensor([9.0, -3.0, 2.0])
    before = angles.clone()
    circular_range_test(angles)
    assert torch.equal(angles, before)
