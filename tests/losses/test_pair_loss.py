import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from kexue.losses import unified_pair_loss
from reference import label_sets as reference


def rows(n=6, count=8, scale=1.0, seed=0):
    g = torch.Generator().manual_seed(seed)
    scores = scale * torch.randn(count, n, generator=g, dtype=torch.float64)
    positive = torch.rand(count, n, generator=g) < torch.linspace(0, 1, count)[:, None]
    return scores.requires_grad_(), positive


@pytest.mark.parametrize(("gamma", "margin"), [(1.0, 0.0), (5.0, 0.3), (0.4, -1.0)])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_value_and_gradient_equal_the_list_of_pairs(gamma, margin, reduction):
    scores, positive = rows()
    assert not positive[0].any()
    assert positive[-1].all()
    loss = unified_pair_loss(scores, positive, gamma, margin, reduction=reduction)
    expected = reference.pair_loss(scores, positive, gamma, margin)
    expected = expected if reduction == "none" else getattr(expected, reduction)()
    upstream = torch.linspace(1, 2, 8).double() if reduction == "none" else torch.tensor(1.3).double()
    torch.testing.assert_close(loss, expected)
    (grad,), (wanted,) = (torch.autograd.grad(x, scores, upstream) for x in (loss, expected))
    torch.testing.assert_close(grad, wanted)
    assert torch.equal(grad[[0, -1]], torch.zeros_like(grad[:2]))


def test_one_positive_is_cross_entropy():
    scores, _ = rows()
    label = torch.arange(8) % 6
    loss = unified_pair_loss(scores, label[:, None], indices=True, reduction="none")
    torch.testing.assert_close(loss, F.cross_entropy(scores, label, reduction="none"))


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 12), st.integers(0, 10**6), st.floats(-1e3, 1e3), st.floats(0.1, 20.0))
def test_shifts_change_nothing_and_the_gradient_sums_to_zero(n, seed, shift, gamma):
    scores, positive = rows(n, seed=seed, scale=3.0)
    loss = unified_pair_loss(scores, positive, gamma, reduction="none")
    shifted = unified_pair_loss(scores + shift, positive, gamma, reduction="none")
    torch.testing.assert_close(shifted, loss, rtol=1e-8, atol=1e-9)
    (grad,) = torch.autograd.grad(loss.sum(), scores)
    torch.testing.assert_close(grad.sum(1), torch.zeros(8, dtype=torch.float64), atol=1e-11, rtol=0)
    assert (grad[~positive] >= 0).all()
    assert (grad[positive] <= 0).all()


def test_excluded_classes_take_no_part():
    scores, positive = rows()
    mask = torch.rand(8, 6, generator=torch.Generator().manual_seed(3)) < 0.6
    positive = positive & mask
    loss = unified_pair_loss(scores, positive, 2.0, 0.1, mask=mask, reduction="none")
    hidden = scores.detach().masked_fill(~mask, -torch.inf).requires_grad_()
    expected = reference.pair_loss(hidden, positive, 2.0, 0.1)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(unified_pair_loss(hidden, positive, 2.0, 0.1, reduction="none"), expected)
    (grad,) = torch.autograd.grad(loss.sum(), scores)
    assert torch.isfinite(grad).all()
    assert (grad[~mask] == 0).all()
    (same,) = torch.autograd.grad(unified_pair_loss(hidden, positive, 2.0, 0.1).mul(8), hidden)
    torch.testing.assert_close(same, grad)
    everything = unified_pair_loss(scores, torch.zeros(8, 6), mask=torch.zeros(6, dtype=torch.bool))
    assert everything == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_extreme_scores_in_low_precision(dtype):
    scores = torch.tensor([[1000.0, -1000.0, 500.0], [-1000.0, 1000.0, 30.0]], dtype=dtype, requires_grad=True)
    loss = unified_pair_loss(scores, torch.tensor([[1, 0, 0], [1, 0, 0]]), 64.0, 0.25, reduction="none")
    loss.sum().backward()
    assert loss.dtype == torch.float32
    assert scores.grad.dtype == dtype
    torch.testing.assert_close(loss, torch.tensor([0.0, 64 * 2000.25]))
    expected = torch.tensor([[0.0, 0.0, 0.0], [-64.0, 64.0, 0.0]], dtype=dtype)
    torch.testing.assert_close(scores.grad, expected)


@pytest.mark.parametrize("offset", [1e4, -1e6])
@pytest.mark.parametrize(("gamma", "margin"), [(1.0, 0.0), (64.0, 0.25)])
def test_what_the_scores_have_in_common_costs_no_precision(offset, gamma, margin):
    scores, positive = rows(count=16)
    single = (scores.detach() + offset).float().requires_grad_()
    double = single.detach().double().requires_grad_()
    loss = unified_pair_loss(single, positive, gamma, margin, reduction="none")
    expected = reference.pair_loss(double, positive, gamma, margin)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-6)
    (grad,), (wanted,) = torch.autograd.grad(loss.sum(), single), torch.autograd.grad(expected.sum(), double)
    torch.testing.assert_close(grad.double(), wanted, rtol=1e-5, atol=1e-6 * gamma)


def test_scores_at_the_end_of_float32():
    far = 3e38
    scores = torch.tensor([[far, -far, 0.0], [-far, far, far], [far, far, far]], requires_grad=True)
    target = torch.tensor([[1, 0, 0], [0, 1, 1], [0, 0, 0]])
    loss = unified_pair_loss(scores, target, 8.0, reduction="none", validate=False)
    assert torch.equal(loss, torch.zeros(3))
    loss.sum().backward()
    assert torch.equal(scores.grad, torch.zeros(3, 3))


def test_unvalidated_positives_that_take_no_part_are_left_out():
    scores = torch.tensor([[-torch.inf, 1.0, 2.0], [-torch.inf, 1.0, 2.0]], requires_grad=True)
    target = torch.tensor([[1, 0, 0], [1, 1, 0]])
    loss = unified_pair_loss(scores, target, reduction="none", validate=False)
    loss.sum().backward()
    torch.testing.assert_close(loss, torch.tensor([0.0, 1.0]).exp().log1p() * torch.tensor([0.0, 1.0]))
    p = torch.sigmoid(torch.tensor(1.0))
    torch.testing.assert_close(scores.grad, torch.tensor([[0.0, 0.0, 0.0], [0.0, -p, p]]))
    mixed = torch.tensor([[torch.nan, 0.0, 0.0], [-torch.inf, 0.0, 0.0]])
    with pytest.raises(ValueError, match="take part"):  # a NaN elsewhere does not hide it
        unified_pair_loss(mixed, target)


def test_a_solved_row_keeps_its_gradient():
    scores = torch.tensor([[20.0, -20.0]], requires_grad=True)
    unified_pair_loss(scores, torch.tensor([[1, 0]])).backward()
    small = torch.exp(torch.tensor(-40.0))
    torch.testing.assert_close(scores.grad, small * torch.tensor([[-1.0, 1.0]]), rtol=1e-5, atol=0.0)


def test_leading_shapes_empty_batches_and_inputs_left_alone():
    scores, positive = rows()
    kept = scores.detach().clone()
    loss = unified_pair_loss(scores, positive, reduction="none")
    assert torch.equal(scores, kept)
    folded = unified_pair_loss(scores.reshape(2, 4, 6), positive.reshape(2, 4, 6), reduction="none")
    assert torch.equal(folded, loss.reshape(2, 4))
    assert unified_pair_loss(scores[:0], positive[:0]) == 0
    assert unified_pair_loss(scores[:0], positive[:0], reduction="none").shape == (0,)


def test_second_derivative_is_an_error():
    scores, positive = rows()
    (grad,) = torch.autograd.grad(unified_pair_loss(scores, positive), scores, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        grad.sum().backward()


@pytest.mark.parametrize(("change", "error", "message"), [
    ({"gamma": 0.0}, ValueError, "gamma"),
    ({"gamma": float("nan")}, ValueError, "gamma"),
    ({"gamma": 1e300}, ValueError, "gamma"),
    ({"gamma": 1e-300}, ValueError, "gamma"),
    ({"margin": -1e300}, ValueError, "margin"),
    ({"margin": float("inf")}, ValueError, "margin"),
    ({"margin": "1"}, TypeError, "margin"),
    ({"target": torch.tensor([[0.3, 0, 0]])}, ValueError, "zlpr_loss"),
    ({"target": torch.tensor([[1, 0, 0, 0]])}, ValueError, "shape"),
    ({"target": torch.tensor([[7]]), "indices": True}, ValueError, r"\[0, 3\)"),
    ({"scores": torch.tensor(1.0)}, ValueError, "at least one label"),
    ({"reduction": "avg"}, ValueError, "reduction"),
])  # fmt: skip
def test_bad_input_is_rejected(change, error, message):
    arguments = {"scores": torch.zeros(1, 3), "target": torch.tensor([[1, 0, 0]])} | change
    with pytest.raises(error, match=message):
        unified_pair_loss(**arguments)
