"""The checks of user input that the rooms share."""

import math

import numpy as np
import pytest
import torch

from kexue._checks import check_int, check_real


@pytest.mark.parametrize("value", [2, np.int64(2), torch.tensor(2), np.array(2)])
def test_integers_of_any_make_are_integers(value):
    check_int("n", value, 2)
    with pytest.raises(ValueError, match="n must be at least 3; got"):
        check_int("n", value, 3)


@pytest.mark.parametrize("value", [True, 2.0, "2", None, torch.tensor(2.5), torch.tensor([2, 3]), np.array([2, 3])])
def test_what_is_no_integer_is_a_type_error(value):
    with pytest.raises(TypeError, match="n must be an integer; got"):
        check_int("n", value, 0)


@pytest.mark.parametrize("value", [2, 2.0, np.float32(2), torch.tensor(2.0), np.array(2.0)])
def test_numbers_of_any_make_are_numbers(value):
    check_real("x", value, above=1.0, minimum=2.0)
    with pytest.raises(ValueError, match="x must be greater than 2.0; got"):
        check_real("x", value, above=2.0)


@pytest.mark.parametrize("value", [True, "2", None, 2j, torch.ones(2), np.ones(2)])
def test_what_is_no_number_is_a_type_error(value):
    with pytest.raises(TypeError, match="x must be a number; got"):
        check_real("x", value)


@pytest.mark.parametrize("value", [math.nan, -math.inf, 10**400, torch.tensor(math.inf)], ids=lambda v: f"{v}"[:9])
def test_what_is_not_finite_is_a_value_error(value):
    with pytest.raises(ValueError, match="x must be finite; got"):
        check_real("x", value)
