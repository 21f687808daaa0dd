"""The loss of SimSiam against the reference in float64 and against gradients written by hand."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kexue.models import simsiam_loss
from kexue.models._cosine import negative_cosines
from models.simsiam_models import F64, generator, tensors
from reference import simsiam_dynamics as reference


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(0, 5), width=st.integers(1, 40), reduction=st.sampled_from(["none", "mean", "sum"]),
    stop=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_loss_and_every_gradient_agree_with_the_reference(rows, width, reduction, stop, seed):
    ours, theirs = (tensors(rows, width, seed=seed) for _ in range(2))
    for x in (*ours, *theirs):
        x.requires_grad_()
    loss = simsiam_loss(*ours, stop_gradient=stop, reduction=reduction)
    targets = [z.detach() if stop else z for z in theirs[2:]]
    expected = reference.loss_rows(*theirs[:2], *targets)
    if reduction != "none":
        expected = expected.sum() / (max(rows, 1) if reduction == "mean" else 1)
    torch.testing.assert_close(loss, expected)
    weights = torch.randn(loss.shape, generator=generator(seed), dtype=F64)
    (loss * weights).sum().backward()
    (expected * weights).sum().backward()
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        if i >= 2 and stop:
            assert a.grad is None
        elif rows:
            torch.testing.assert_close(a.grad, b.grad)


def test_with_the_stop_gradient_the_gradient_is_the_one_by_hand():
    p1, p2, z1, z2 = tensors(4, 3)
    p1.requires_grad_()
    p2.requires_grad_()
    simsiam_loss(p1, p2, z1, z2).backward()
    for p, z in ((p1, z2), (p2, z1)):
        expected = torch.stack([reference.predictor_gradient(a, b) for a, b in zip(p.detach(), z, strict=True)]) / 8
        torch.testing.assert_close(p.grad, expected)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_gradcheck(reduction):
    inputs = [x.requires_grad_() for x in tensors(3, 4)]
    assert torch.autograd.gradcheck(lambda *x: simsiam_loss(*x, stop_gradient=False, reduction=reduction), inputs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [2, 33, 1000])
def test_equal_rows_give_minus_one_exactly(dtype, width):
    (z,) = tensors(50, width, count=1, dtype=dtype)
    loss = simsiam_loss(z, z, z, z, reduction="none")
    assert torch.equal(loss, -torch.ones_like(loss))
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("factor", [1e-8, 1.0, 1e18, 1e30])
@pytest.mark.parametrize("other", [1e-8, 1e30])
def test_lengths_do_not_matter_up_to_the_limits_of_float32(factor, other):
    p1, p2, z1, z2 = tensors(6, 9, dtype=torch.float32)
    expected = simsiam_loss(p1, p2, z1, z2, reduction="none")
    big = [(p * factor).requires_grad_() for p in (p1, p2)]
    loss = simsiam_loss(*big, z1 * other, z2 * other, reduction="none")
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    loss.sum().backward()
    (p1.requires_grad_(), p2.requires_grad_())
    simsiam_loss(p1, p2, z1, z2, reduction="none").sum().backward()
    torch.testing.assert_close(big[0].grad * factor, p1.grad, rtol=1e-4, atol=1e-5)


def test_a_row_without_a_direction_counts_as_zero_and_gets_no_gradient():
    p1, p2, z1, z2 = tensors(3, 4, dtype=torch.float32)
    p1[0], p1[1], z2[2] = 0, 1e-30, 0
    inputs = [x.requires_grad_() for x in (p1, p2, z1, z2)]
    loss = simsiam_loss(*inputs, stop_gradient=False, reduction="none")
    torch.testing.assert_close(loss, reference.loss_rows(*(x.detach().double() for x in inputs)).float())
    loss.sum().backward()
    assert not p1.grad.any()  # its own rows or those of z2 have no direction
    assert not z2.grad.any()
    assert all(torch.isfinite(x.grad).all() for x in inputs)
    assert p2.grad.abs().sum(1).min() > 0


def test_nan_and_infinity_are_not_hidden():
    p, z = tensors(3, 4, count=2, dtype=torch.float32)
    for value in (torch.nan, torch.inf):
        bad = p.clone()
        bad[1, 2] = value
        rows = simsiam_loss(bad, p, z, z, reduction="none")
        assert rows.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_added_up_in_float32(dtype):
    values = tensors(64, 300, dtype=dtype)
    exact = simsiam_loss(*(x.double() for x in values))
    loss = simsiam_loss(*(x.requires_grad_() for x in values))
    torch.testing.assert_close(loss.double(), exact, rtol=0, atol=1e-6)
    loss.backward()
    assert values[0].grad.dtype == dtype


def test_the_torch_form_and_the_kernel_agree():
    from kexue.models._cosine import _numba_rows, _torch_rows

    p, z = tensors(6, 5, count=2)
    p[1] = 0
    for shift, needs in itertools.product((0, 2, 3), ([True, True], [False, True], [True, False])):
        for a, b in zip(_numba_rows(p, z, shift, 0.3, needs), _torch_rows(p, z, shift, 0.3, needs), strict=True):
            torch.testing.assert_close(a, b)
    strided = negative_cosines(p.T.contiguous().T, z, mean=False)
    assert torch.equal(strided, negative_cosines(p, z, mean=False))


def test_differentiating_twice_is_an_error():
    inputs = [x.requires_grad_() for x in tensors(3, 4)]
    (grad,) = torch.autograd.grad(simsiam_loss(*inputs), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        grad.sum().backward()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({0: None}, TypeError, "p1 must be a tensor; got NoneType"),
        ({3: torch.ones(3, 4, dtype=torch.long)}, TypeError, "z2 must be a floating tensor; got dtype torch.int64"),
        ({1: torch.ones(3)}, ValueError, "p2 must have 2 dimensions"),
        ({2: torch.ones(3, 5)}, ValueError, r"z1 must have the shape of p1, \(3, 4\); got \(3, 5\)"),
    ],
)
def test_wrong_inputs_of_the_loss_are_named(change, error, message):
    inputs = [change.get(i, torch.ones(3, 4)) for i in range(4)]
    with pytest.raises(error, match=message):
        simsiam_loss(*inputs)
    with pytest.raises(ValueError, match="reduction must be one of .*; got 'max'"):
        simsiam_loss(*(torch.ones(3, 4) for _ in range(4)), reduction="max")
