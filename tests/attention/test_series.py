import copy
import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kexue.attention import (
    ExpPowerFeatures,
    TaylorFeatures,
    degree_for,
    linear_attention,
)
from reference import infinite_dimensional_attention as reference

FORMS = {"taylor": TaylorFeatures, "power": ExpPowerFeatures}


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def inputs(b=2, heads=4, own=2, t=9, s=9, d=3, e=4, dtype=torch.float64):
    shapes = ((b, heads, t, d), (b, own, s, d), (b, own, s, e))
    return [normal(*shape, seed=i, dtype=dtype).requires_grad_() for i, shape in enumerate(shapes)]


# Features


@pytest.mark.parametrize(
    ("kind", "d", "p"),
    [(kind, d, p) for kind in FORMS for d, p in
     [(1, 1), (1, 2), (1, 7), (2, 1), (2, 2), (2, 5), (3, 2), (3, 4), (4, 3), (5, 2), (16, 2), (16, 4), (64, 1),
      (64, 2)]],
)  # fmt: skip
def test_products_of_features_are_the_polynomial(kind, d, p):
    q, k = normal(6, d), normal(5, d, seed=1)
    phi = FORMS[kind](p, scale=0.7)
    a, b = phi.query(q), phi.key(k)
    assert a.shape == (6, phi.num_features(d))
    assert phi.num_features(d) == math.comb(d + p, p)
    x = 0.7 * q @ k.T
    size = (0.7 * q.abs() @ k.abs().T + 1) ** p  # what the terms add up to without their signs
    assert ((a @ b.T - reference.sim(x, kind, p)).abs() / size).max() < 1e-14
    if d**p < 1e5:
        full = [torch.stack([reference.full_features(0.7**0.5 * row, kind, p) for row in y]) for y in (q, k)]
        torch.testing.assert_close(a @ b.T, full[0] @ full[1].T, rtol=1e-12, atol=1e-12 * size.max().item())


@pytest.mark.parametrize("d", [1, 4, 64])
def test_the_default_scale_is_that_of_attention(d):
    q, k = normal(d), normal(d, seed=1)
    phi = TaylorFeatures(2)
    x = (q @ k / math.sqrt(d)).item()
    assert (phi.query(q) @ phi.key(k)).item() == pytest.approx(1 + x + x * x / 2, rel=1e-12)


def test_the_state_of_degree_two_has_half_the_size_of_full_outer_products():
    q = normal(1, 1, 3, 64, dtype=torch.float32)
    _, state = linear_attention(q, q, q, TaylorFeatures(2), causal=True, return_state=True)
    assert state.s.numel() == math.comb(66, 2) * 64


# Positivity


@pytest.mark.parametrize("p", range(1, 13))
def test_even_taylor_polynomials_have_no_root_and_odd_ones_have_one(p):
    coefficients = [1 / math.factorial(m) for m in range(p, -1, -1)]
    roots = np.roots(coefficients)
    real = roots[np.abs(roots.imag) < 1e-9 * np.abs(roots)].real
    assert len(real) == p % 2
    assert TaylorFeatures(p).positive == (p % 2 == 0)
    if p % 2:
        bound = -float(real[0])
        assert TaylorFeatures(p, scale=bound * (1 - 1e-6), normalize_inputs=True).positive
        assert not TaylorFeatures(p, scale=bound * (1 + 1e-6), normalize_inputs=True).positive


def test_odd_powers_are_positive_down_to_minus_p():
    assert ExpPowerFeatures(4, scale=100.0).positive
    assert not ExpPowerFeatures(3).positive
    assert ExpPowerFeatures(3, normalize_inputs=True).positive
    assert ExpPowerFeatures(3, scale=3.0, normalize_inputs=True).positive
    assert not ExpPowerFeatures(3, scale=3.001, normalize_inputs=True).positive


def test_signed_kernels_are_refused_unless_not_normalised():
    q, k, v = inputs()
    for phi in (TaylorFeatures(3), ExpPowerFeatures(1), TaylorFeatures(1, scale=1.5, normalize_inputs=True)):
        with pytest.raises(ValueError, match="negative"):
            linear_attention(q, k, v, phi, causal=True)
        assert torch.isfinite(linear_attention(q, k, v, phi, causal=True, normalize=False)).all()


@given(st.sampled_from([2, 4, 6, 8]), st.floats(-50, 50))
def test_even_kernels_are_never_negative(p, x):
    q, k = torch.tensor([[[[x]]]], dtype=torch.float64), torch.ones(1, 1, 1, 1, dtype=torch.float64)
    for kind, form in FORMS.items():
        weight = linear_attention(q, k, k, form(p, scale=1.0), normalize=False).item()
        assert weight >= 0
        assert weight == pytest.approx(float(reference.sim(x, kind, p)), rel=1e-6, abs=1e-9)


# Errors


@pytest.mark.parametrize(
    ("kind", "p", "stated"),
    [("taylor", 2, 0.36), ("taylor", 4, 0.019), ("taylor", 6, 4.8e-4), ("taylor", 8, 6.8e-6),
     ("power", 2, 0.32), ("power", 4, 0.14), ("power", 6, 0.09), ("power", 8, 0.066)],
)  # fmt: skip
def test_relative_errors_on_the_unit_interval(kind, p, stated):
    measured = reference.largest_error(kind, p, 1.0, True)
    assert measured == pytest.approx(stated, rel=0.04)
    assert FORMS[kind](p).error_bound(1.0, relative=True) == pytest.approx(measured, rel=1e-6)


def test_the_relative_error_explodes_at_the_negative_end_and_the_absolute_one_does_not():
    phi = TaylorFeatures(4)
    assert phi.error_bound(4.0, relative=True) == pytest.approx(272, rel=1e-3)
    assert phi.error_bound(4.0) == pytest.approx(math.exp(4) - reference.sim(4.0, "taylor", 4), rel=1e-9)


@given(st.sampled_from(sorted(FORMS)), st.integers(1, 12), st.floats(0.01, 12.0), st.booleans())
def test_bounds_are_attained_and_never_exceeded(kind, p, r, relative):
    bound = FORMS[kind](p).error_bound(r, relative)
    measured = reference.largest_error(kind, p, r, relative)
    noise = 1e-13 * (math.exp(r) + (1 + r) ** p) * (math.exp(r) if relative else 1)  # of the grid's own arithmetic
    assert measured <= bound + noise
    assert bound <= measured * (1 + 1e-3) + noise


@given(st.sampled_from(sorted(FORMS)), st.integers(1, 30), st.floats(1e-9, 0.05))
def test_bounds_of_tiny_errors_do_not_cancel(kind, p, r):
    first = r ** (p + 1) / math.factorial(p + 1) if kind == "taylor" else r**2 / (2 * p) if p > 1 else r**2 / 2
    for relative in (False, True):
        assert FORMS[kind](p).error_bound(r, relative) == pytest.approx(first, rel=3 * r + 1e-9, abs=1e-300)


def test_no_error_at_zero_and_no_bound_at_infinity():
    for form in FORMS.values():
        assert form(2).error_bound(0) == 0
        assert form(2).error_bound(0.0, relative=True) == 0
        assert form(2).error_bound(1e6) == math.inf


@given(st.floats(1e-12, 10.0), st.floats(0.0, 15.0), st.booleans())
def test_degree_for_is_the_smallest(tol, bound, relative):
    p = degree_for(tol, bound, relative)
    assert p >= 2
    assert p % 2 == 0
    assert TaylorFeatures(p).error_bound(bound, relative) < tol
    if p > 2:
        assert TaylorFeatures(p - 2).error_bound(bound, relative) >= tol


# Bad input


@pytest.mark.parametrize("form", FORMS.values())
def test_bad_options_are_named(form):
    for value in (0, -2):
        with pytest.raises(ValueError, match=f"at least 1; got {value}"):
            form(value)
    for value in (2.0, "2", True, None):
        with pytest.raises(TypeError, match="must be an integer"):
            form(value)
    for value in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="scale"):
            form(2, scale=value)
    with pytest.raises(TypeError, match="scale"):
        form(2, scale="1")
    with pytest.raises(TypeError, match="normalize_inputs"):
        form(2, normalize_inputs=1)
    with pytest.raises(ValueError, match="dim must be at least 1; got 0"):
        form(2).num_features(0)
    for value in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="r must be"):
            form(2).error_bound(value)


def test_degree_for_names_bad_values():
    for tol in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="tol"):
            degree_for(tol, 1.0)
    for bound in (-1.0, math.inf, 701.0):
        with pytest.raises(ValueError, match="bound"):
            degree_for(0.1, bound)
    with pytest.raises(TypeError, match="tol"):
        degree_for("0.1", 1.0)


def test_a_state_of_another_map_is_refused():
    q, k, v = inputs()
    _, state = linear_attention(q, k, v, TaylorFeatures(4), causal=True, return_state=True)
    with pytest.raises(ValueError, match="S of initial_state"):
        linear_attention(q, k, v, TaylorFeatures(2), causal=True, initial_state=state)
    with pytest.raises(ValueError, match="scale belongs to the feature map"):
        linear_attention(q, k, v, TaylorFeatures(2), scale=1.0)


def test_maps_can_be_copied_saved_and_printed():
    phi = TaylorFeatures(4, scale=0.5, normalize_inputs=True)
    q = normal(3, 5)
    for other in (copy.deepcopy(phi), pickle.loads(pickle.dumps(phi))):
        assert torch.equal(other.query(q), phi.query(q))
    assert phi.state_dict() == {}
    assert repr(phi) == "TaylorFeatures(degree=4, scale=0.5, normalize_inputs=True)"
    assert repr(ExpPowerFeatures()) == "ExpPowerFeatures(power=4, scale=None, normalize_inputs=False)"


@pytest.mark.parametrize("causal", [False, True])
def test_odd_degrees_are_normalised_where_the_inputs_are_short_enough(causal):
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 2, 70, 5, generator=g) for _ in range(3))
    unit_q, unit_k = torch.nn.functional.normalize(q, dim=-1), torch.nn.functional.normalize(k, dim=-1)
    out = linear_attention(unit_q, unit_k, v, TaylorFeatures(1, scale=1.0), causal=causal)
    torch.testing.assert_close(out, linear_attention(q, k, v, "cosine1", causal=causal))
    linear_attention(1.5**0.5 * unit_q, 1.5**0.5 * unit_k, v, TaylorFeatures(3, scale=1.0), causal=causal)
    with pytest.raises(ValueError, match="can be negative"):
        linear_attention(1.6**0.5 * unit_q, 1.6**0.5 * unit_k, v, TaylorFeatures(3, scale=1.0), causal=causal)
    with pytest.raises(ValueError, match="can be negative"):
        linear_attention(q, k, v, ExpPowerFeatures(1, scale=1.0), causal=causal)
