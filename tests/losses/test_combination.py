import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from kexue.losses import _combination_kernel as kernel
from kexue.losses import combination_cross_entropy
from reference import label_sets as reference


def rows(n, count=9, scale=1.0, seed=0, dtype=torch.float64):
    """Scores, and sets of labels of unequal sizes."""
    g = torch.Generator().manual_seed(seed)
    scores = scale * torch.randn(count, n, generator=g, dtype=torch.float64)
    positive = torch.rand(count, n, generator=g) < torch.rand(count, 1, generator=g)
    return scores.to(dtype).requires_grad_(), positive


def random_sets(count, n, k, seed=0):
    g = torch.Generator().manual_seed(seed)
    index = torch.stack([torch.randperm(n, generator=g)[:k] for _ in range(count)])
    return index, torch.zeros(count, n, dtype=torch.bool).scatter_(1, index, True)


def compare(loss, expected, inputs):
    upstream = torch.linspace(0.5, 2.0, len(expected), dtype=torch.float64)
    for a, b in zip(
        (loss, *torch.autograd.grad(loss, inputs, upstream)),
        (expected, *torch.autograd.grad(expected, inputs, upstream)),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("n", [1, 2, 3, 5, 8, 11])
@pytest.mark.parametrize("scale", [1.0, 40.0, 1000.0])
def test_value_and_gradient_equal_the_list_of_all_sets(n, scale):
    scores, positive = rows(n, scale=scale, seed=n)
    if n > 3:
        scores = scores.detach().masked_fill((torch.arange(n) % 4 == 2) & ~positive, -torch.inf).requires_grad_()
    loss = combination_cross_entropy(scores, positive, reduction="none")
    compare(loss, reference.combination(scores, positive), [scores])
    bound = int(positive.sum(1).max()) + 1
    torch.testing.assert_close(combination_cross_entropy(scores, positive, bound, reduction="none"), loss)


@pytest.mark.parametrize("n", [1, 2, 5, 8])
@pytest.mark.parametrize("more", [0, 2, 9])
@pytest.mark.parametrize("level", [0.0, -30.0, 30.0])
def test_pad_class_equals_the_list_of_all_sets_up_to_max_k(n, more, level):
    scores, positive = rows(n, scale=3.0, seed=n)
    pad = (level + torch.randn(9, 1, generator=torch.Generator().manual_seed(5), dtype=torch.float64)).requires_grad_()
    most = int(positive.sum(1).max()) + more
    loss = combination_cross_entropy(scores, positive, most, pad_score=pad, reduction="none")
    compare(loss, reference.combination(scores, positive, most, pad[:, 0]), [scores, pad])


def test_gradient_is_the_inclusion_probability_minus_the_label_and_sums_to_zero():
    scores, positive = rows(10)
    scores = scores[:1].detach().requires_grad_()
    positive = (torch.arange(10) < 3)[None]
    combination_cross_entropy(scores, positive).backward()
    inclusion = scores.grad + positive.double()
    table = reference.log_symmetric(scores.detach(), 3)[0]
    for i in range(10):
        others = torch.cat([scores.detach()[:, :i], scores.detach()[:, i + 1 :]], 1)
        without = reference.log_symmetric(others, 2)[0, 2]
        torch.testing.assert_close(inclusion[0, i], torch.exp(scores[0, i].detach() + without - table[3]))
    torch.testing.assert_close(inclusion.sum(), torch.tensor(3.0, dtype=torch.float64))


def test_one_label_is_cross_entropy_and_no_bound_with_pad_is_binary_cross_entropy():
    scores, positive = rows(12, scale=5.0)
    label = torch.arange(9)
    compare(
        combination_cross_entropy(scores, label[:, None], indices=True, reduction="none"),
        F.cross_entropy(scores, label, reduction="none"),
        [scores],
    )
    compare(
        combination_cross_entropy(scores, positive, 12, pad_score=0.7, reduction="none"),
        F.binary_cross_entropy_with_logits(scores - 0.7, positive.double(), reduction="none").sum(1),
        [scores],
    )


@pytest.mark.parametrize(("n", "k"), [(1000, 3), (777, 60), (300, 299), (64, 32)])
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_many_classes_equal_the_recurrence(n, k, scale):
    scores, _ = rows(n, count=3, scale=scale, seed=k)
    index, positive = random_sets(3, n, k)
    expected = reference.log_symmetric(scores, k)[:, k] - (scores * positive).sum(1)
    loss = combination_cross_entropy(scores, index, indices=True, reduction="none")
    compare(loss, expected, [scores])


@pytest.mark.parametrize("budget", [1, 3000, 10**9])
def test_blocks_change_nothing(monkeypatch, budget):
    scores, positive = rows(7, count=17)
    expected = reference.combination(scores, positive)
    monkeypatch.setattr(kernel, "BUDGET", budget)
    compare(combination_cross_entropy(scores, positive, reduction="none"), expected, [scores])


@pytest.mark.parametrize("small", [0, 1, 4])
def test_rescaled_products_equal_plain_ones(monkeypatch, small):
    scores, _ = rows(40, count=4)
    positive = random_sets(4, 40, 9)[1]
    compare_with = reference.log_symmetric(scores, 9)[:, 9] - (scores * positive).sum(1)
    monkeypatch.setattr(kernel, "SMALL", small)
    compare(combination_cross_entropy(scores, positive, reduction="none"), compare_with, [scores])


@pytest.mark.parametrize(("n", "k", "scale", "lift"), [
    (2000, 5, 1.0, 0.0), (2000, 5, 1.0, 8.0), (2000, 300, 3.0, 10.0), (500, 5, 1e4, 0.0), (400, 200, 0.0, 0.0),
    (50, 3, 1e30, 0.0), (50, 5, 10.0, 100.0), (50, 5, 10.0, -100.0),
])  # fmt: skip
def test_float32_keeps_its_precision_at_any_scale(n, k, scale, lift):
    positive = random_sets(4, n, k)[1]
    scores = rows(n, count=4, scale=scale, dtype=torch.float32)[0].detach() + lift * positive
    results = []
    for dtype in (torch.float32, torch.float64):
        x = scores.to(dtype, copy=True).requires_grad_()
        # not validated: positives of -1e30 would be taken for masked ones
        loss = combination_cross_entropy(x, positive, reduction="none", validate=False)
        results += [loss.detach().double(), torch.autograd.grad(loss.sum(), x)[0].double()]
    torch.testing.assert_close(results[0], results[2], rtol=5e-7, atol=2e-6)
    error, size = (results[1] - results[3]).norm(dim=1), results[3].norm(dim=1)
    assert (error <= 3e-6 * size + 1e-37).all()


def test_a_solved_row_keeps_a_gradient_of_full_relative_precision():
    scores = torch.tensor([[20.0, 20.0, -20.0, -20.0]], requires_grad=True)
    combination_cross_entropy(scores, torch.tensor([[1, 1, 0, 0]])).backward()
    small = 2 * torch.exp(torch.tensor(-40.0))  # two exchanges, each exp(-40)
    torch.testing.assert_close(scores.grad, small * torch.tensor([[-1.0, -1.0, 1.0, 1.0]]), rtol=1e-5, atol=0.0)


def test_far_scores_do_not_cost_the_precision_of_near_ones():
    scores = torch.tensor([[1e9, 0.3, 0.1, -0.2], [1e9, 3e8, 0.1, -0.2]])
    positive = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0]])
    expected = [torch.logsumexp(scores[0, 1:], 0) - 0.3, torch.logsumexp(scores[1, 2:], 0) - 0.1]
    torch.testing.assert_close(combination_cross_entropy(scores, positive, reduction="none"), torch.stack(expected))


def test_classes_far_below_a_pad_class_change_nothing():
    near = torch.tensor([[3.0, 2.0, -1.0]])
    far = torch.cat([near, torch.full((1, 4), -1e12)], 1)
    for most in (1, 2, 3, 5, 7):
        found, expected = (
            combination_cross_entropy(x, torch.tensor([[0]]), most, pad_score=0.5, indices=True) for x in (far, near)
        )
        torch.testing.assert_close(found, expected)


def test_nan_stays_in_its_row_and_is_not_hidden():
    scores = torch.zeros(3, 4)
    scores[1, 2] = torch.nan
    for options in ({}, {"pad_score": 0.0, "max_k": 2}):
        loss = combination_cross_entropy(scores, torch.eye(4)[:3], reduction="none", **options)
        assert torch.isfinite(loss).tolist() == [True, False, True]
        everywhere = combination_cross_entropy(torch.full((1, 4), torch.nan), torch.eye(4)[:1], **options)
        assert everywhere.isnan()


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 40), st.integers(0, 10**6), st.floats(0.1, 50.0), st.floats(-1e4, 1e4))
def test_shifts_change_nothing_and_classes_may_be_permuted(n, seed, scale, shift):
    scores, positive = rows(n, count=3, scale=scale, seed=seed)
    loss = combination_cross_entropy(scores, positive, reduction="none")
    assert (loss >= 0).all()
    torch.testing.assert_close(
        combination_cross_entropy(scores + shift, positive, reduction="none"), loss, rtol=1e-6, atol=1e-8
    )
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(
        combination_cross_entropy(scores[:, order], positive[:, order], reduction="none"), loss, rtol=1e-8, atol=1e-10
    )


def test_targets_as_indices_and_masks_equal_multi_hot():
    scores, _ = rows(9, count=2)
    dense = torch.tensor([[0, 1, 0, 1, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0, 0, 1]])
    index = torch.tensor([[3, 1, 3, -100], [8, -100, -100, -100]])
    loss = combination_cross_entropy(scores, dense, reduction="none")
    for same in (dense.bool(), dense.double(), dense.to(torch.uint8)):
        assert torch.equal(combination_cross_entropy(scores, same, reduction="none"), loss)
    made = combination_cross_entropy(scores, index, indices=True, ignore_index=-100, reduction="none")
    assert torch.equal(made, loss)
    mask = torch.tensor([True, True, True, True, False, False, True, True, True])
    masked = combination_cross_entropy(scores, dense, mask=mask, reduction="none")
    torch.testing.assert_close(masked, combination_cross_entropy(scores[:, mask], dense[:, mask], reduction="none"))
    assert (torch.autograd.grad(masked.sum(), scores)[0][:, ~mask] == 0).all()


def test_any_leading_shape_reductions_and_layout():
    scores, positive = rows(6, count=12)
    loss = combination_cross_entropy(scores, positive, reduction="none")
    folded = combination_cross_entropy(scores.reshape(3, 4, 6), positive.reshape(3, 4, 6), reduction="none")
    assert torch.equal(folded, loss.reshape(3, 4))
    turned = combination_cross_entropy(scores.T.contiguous().T, positive, reduction="none")
    assert torch.equal(turned, loss)
    assert combination_cross_entropy(scores[0], positive[0], reduction="none").shape == ()
    torch.testing.assert_close(combination_cross_entropy(scores, positive), loss.mean())
    torch.testing.assert_close(combination_cross_entropy(scores, positive, reduction="sum"), loss.sum())
    empty = combination_cross_entropy(scores[:0], positive[:0])
    assert empty == 0


def test_rows_without_a_choice_have_loss_and_gradient_zero():
    scores = torch.tensor([[1.0, 2.0], [1.0, 2.0], [0.5, -torch.inf]], requires_grad=True)
    target = torch.tensor([[0, 0], [1, 1], [1, 0]])
    loss = combination_cross_entropy(scores, target, reduction="none")
    loss.sum().backward()
    assert torch.equal(loss, torch.zeros(3))
    assert torch.equal(scores.grad, torch.zeros(3, 2))


def test_a_bound_beyond_the_number_of_classes_bounds_nothing():
    scores, positive = rows(5)
    pad = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    results = []
    for most in (5, 6, 10**12, 10**30):
        loss = combination_cross_entropy(scores, positive, most, pad_score=pad)
        results.append(torch.stack([loss.detach(), torch.autograd.grad(loss, pad)[0]]))
    assert all(torch.equal(result, results[0]) for result in results)


def test_unvalidated_positives_that_take_no_part_are_left_out():
    scores = torch.tensor([[-torch.inf, 1.0, 2.0, 0.0]], requires_grad=True)
    for options in ({}, {"pad_score": 0.5, "max_k": 2}):
        loss = combination_cross_entropy(scores, torch.tensor([[1, 1, 0, 0]]), validate=False, **options)
        same = combination_cross_entropy(scores, torch.tensor([[0, 1, 0, 0]]), **options)
        assert torch.equal(loss, same)
        assert torch.isfinite(torch.autograd.grad(loss, scores)[0]).all()


def test_second_derivative_is_an_error():
    scores, positive = rows(5)
    (grad,) = torch.autograd.grad(combination_cross_entropy(scores, positive), scores, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        grad.sum().backward()


@pytest.mark.parametrize(("change", "error", "message"), [
    ({"target": torch.tensor([[2, 0, 0]])}, ValueError, r"\[0, 1\]"),
    ({"target": torch.tensor([[0.5, 0, 0]])}, ValueError, "0.5"),
    ({"target": torch.tensor([[1, 0]])}, ValueError, r"\(1, 3\).*\(1, 2\)"),
    ({"target": [1, 0, 0]}, TypeError, "list"),
    ({"target": torch.tensor([[3]]), "indices": True}, ValueError, r"\[0, 3\)"),
    ({"target": torch.tensor([[-2]]), "indices": True}, ValueError, "-2"),
    ({"target": torch.tensor([[1.0]]), "indices": True}, TypeError, "float32"),
    ({"target": torch.tensor([1]), "indices": True}, ValueError, "shape"),
    ({"scores": torch.zeros(1, 0)}, ValueError, "at least one label"),
    ({"scores": torch.zeros(1, 3, dtype=torch.long)}, TypeError, "floating"),
    ({"scores": torch.tensor([[-torch.inf, 0.0, 0.0]])}, ValueError, "take part"),
    ({"mask": torch.tensor([[False, True, True]])}, ValueError, "take part"),
    ({"mask": torch.ones(1, 3)}, TypeError, "bool"),
    ({"mask": torch.ones(2, 3, dtype=torch.bool)}, ValueError, "broadcast"),
    ({"max_k": 0}, ValueError, "max_k=0"),
    ({"max_k": 1.5}, TypeError, "max_k"),
    ({"max_k": -1}, ValueError, "max_k"),
    ({"pad_score": float("nan")}, ValueError, "finite"),
    ({"pad_score": 1e300}, ValueError, "finite in torch.float32"),
    ({"pad_score": torch.tensor(1e300, dtype=torch.float64)}, ValueError, "finite in torch.float32"),
    ({"pad_score": torch.zeros(2, 1)}, ValueError, "pad_score"),
    ({"pad_score": torch.tensor([[torch.inf]])}, ValueError, "finite"),
    ({"reduction": "max"}, ValueError, "reduction"),
])  # fmt: skip
def test_bad_input_is_rejected(change, error, message):
    arguments = {"scores": torch.zeros(1, 3), "target": torch.tensor([[1, 0, 0]])} | change
    with pytest.raises(error, match=message):
        combination_cross_entropy(**arguments)
