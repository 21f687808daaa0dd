from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from kexue.losses import SparseCrossEntropyLoss, _topk_kernel, sparse_cross_entropy, sparse_softmax
from kexue.losses._topk_kernel import nucleus, top_indices
from kexue.losses.sparse_softmax import _differentiable_losses, picked_losses
from reference import spaces_sparse as reference

INF = math.inf


@pytest.fixture(params=["heaps", "torch.topk"])
def way(request, monkeypatch):
    """Both ways to find the largest; the second is that of devices other than the CPU."""
    if request.param != "heaps":
        monkeypatch.setattr(_topk_kernel, "_HEAP_DEVICES", ())
    return request.param


def generator(seed):
    return torch.Generator().manual_seed(seed)


def drawn(rows, n, seed, ties=False, dtype=torch.float64):
    g = generator(seed)
    if ties:
        return torch.randint(-2, 3, (rows, n), generator=g).to(dtype)
    return (2 * torch.randn(rows, n, generator=g, dtype=torch.float64)).to(dtype)


@settings(max_examples=80, deadline=None)
@given(
    rows=st.integers(0, 4),
    n=st.integers(1, 9),
    k=st.integers(1, 11),
    p=st.sampled_from([None, None, 0.13, 0.61, 0.97, 1.0]),
    ties=st.booleans(),
    weighted=st.booleans(),
    smoothing=st.sampled_from([0.0, 0.1, 1.0]),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    seed=st.integers(0, 1000),
)
def test_values_and_gradients_are_those_of_the_reference(rows, n, k, p, ties, weighted, smoothing, reduction, seed):
    scores = drawn(rows, n, seed, ties).requires_grad_()
    g = generator(seed + 1)
    target = torch.randint(n, (rows,), generator=g).masked_fill_(torch.rand(rows, generator=g) < 0.3, -1)
    weight = torch.rand(n, generator=g, dtype=torch.float64) + 0.1 if weighted else None
    kept = {"k": k} if p is None else {"p": p}
    loss = sparse_cross_entropy(
        scores, target, weight=weight, ignore_index=-1, reduction=reduction, label_smoothing=smoothing, **kept
    )
    value, grad = reference.losses(
        scores.detach(), target, weight=weight, smoothing=smoothing, ignore=-1, reduction=reduction, **kept
    )
    torch.testing.assert_close(loss.detach(), value, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.autograd.grad(loss.sum(), scores)[0], grad, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(sparse_softmax(scores.detach(), **kept), reference.softmax(scores, **kept))


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 1500),
    k=st.one_of(st.integers(1, 20), st.integers(1, 700)),
    levels=st.sampled_from([1, 2, 5, 100, None]),
    seed=st.integers(0, 1000),
)
def test_the_largest_are_found_and_ties_go_to_the_lowest_index(n, k, levels, seed):
    k, g = min(k, n), generator(seed)
    scores = torch.randn(3, n, generator=g) if levels is None else torch.randint(levels, (3, n), generator=g).float()
    scores[1] = -scores[1].sort().values  # the worst order for a heap
    scores[2, torch.rand(n, generator=g) < 0.4] = -INF
    want = scores.sort(dim=1, descending=True, stable=True).indices[:, :k].sort(dim=1).values
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        rounded = scores.to(dtype)
        stable = rounded.float().sort(dim=1, descending=True, stable=True).indices[:, :k].sort(dim=1).values
        assert torch.equal(top_indices(rounded, k).sort(dim=1).values, stable)
    if k < n:
        assert torch.equal(_topk_kernel._chosen(scores, k).sort(dim=1).values, want)


@pytest.mark.parametrize("n", [127, 128, 129, 191, 1000, 4096, 4097])
def test_short_and_long_rows_find_the_same(n):
    scores = torch.randn(24, n, generator=generator(n))
    scores[4:8] = scores[4:8].mul(3).round()  # many equal scores
    scores[8:12, 20:] = -INF  # fewer than k scores
    scores[12] = 0
    scores[13:16, 77] = INF
    scores[16] = scores[16].sort().values
    order = scores.sort(dim=1, descending=True, stable=True).indices
    for k in (1, 10, 32, 33):
        assert torch.equal(top_indices(scores, k).sort(dim=1).values, order[:, :k].sort(dim=1).values)


def test_short_rows_need_no_heap_unless_they_have_nan_or_ties():
    from kexue.losses._topk_scan import BLOCK, FEW, _take

    def take(row, k=10):
        keys, index = np.empty(k, np.float32), np.empty(k, np.int64)
        seats = np.empty(BLOCK + 4 * k + len(row) // BLOCK + 1, np.int64)
        return _take(row.numpy(), np.empty(BLOCK, np.float32), np.empty(BLOCK, np.int32), seats, keys, index)

    for seed in range(20):
        row = torch.randn(1000, generator=generator(seed))
        assert take(row)
        assert take(row[:128], FEW // 2)
        for place in (0, 500, 999):
            assert not take(row.index_fill(0, torch.tensor([place]), math.nan))
    assert not take(torch.zeros(1000))
    assert not take(torch.full((1000,), -INF))


@settings(max_examples=30, deadline=None)
@given(n=st.integers(2, 1500), k=st.integers(1, 30), places=st.lists(st.integers(0, 1499), min_size=1, max_size=5))
def test_nan_is_among_the_largest_wherever_it_stands(n, k, places):
    k, places = min(k, n - 1), sorted({p % n for p in places})
    scores = torch.randn(1, n, generator=generator(n))
    scores[0, places] = math.nan
    for found in (top_indices(scores, k), _topk_kernel._chosen(scores, k)):
        assert len(found[0].unique()) == k
        assert scores[0, found[0]].isnan().sum() == min(k, len(places))


def test_of_equal_scores_exactly_k_of_the_lowest_index_are_kept(way):
    scores = torch.zeros(2, 2000)
    scores[0, 1500:1503] = 1.0
    scores[1, 70] = -1.0
    kept = sparse_softmax(scores, k=5) > 0
    assert kept[0].nonzero().squeeze(1).tolist() == [0, 1, 1500, 1501, 1502]
    assert kept[1].nonzero().squeeze(1).tolist() == [0, 1, 2, 3, 4]
    assert sparse_softmax(torch.ones(3, 4, 7), k=3, dim=1)[0, :, 0].tolist() == pytest.approx([1 / 3, 1 / 3, 1 / 3, 0])


def test_the_nucleus_is_the_smallest_set_and_needs_no_luck_with_rounding():
    even = torch.zeros(1, 4)
    assert [int(nucleus(even, p)[1].sum()) for p in (0.2, 0.25, 0.26, 0.5, 0.75, 0.76)] == [1, 1, 2, 2, 3, 4]
    assert sparse_softmax(even, p=0.5)[0].tolist() == [0.5, 0.5, 0, 0]
    g = generator(0)
    scores = torch.cat([8 * torch.randn(2, 3000, generator=g), torch.randn(2, 3000, generator=g)])  # few, and many
    for p in (0.3, 0.9, 0.999):
        kept = torch.cat([sparse_softmax(scores[:2], p=p), sparse_softmax(scores[2:], p=p)]) > 0
        assert torch.equal(kept, sparse_softmax(scores, p=p) > 0)
        chance = scores.double().softmax(1)
        for row in range(4):
            inside = chance[row][kept[row]]
            assert inside.sum() >= p - 1e-6
            assert inside.sum() - inside.min() < p + 1e-6
            assert inside.min() >= chance[row][~kept[row]].max()


@pytest.mark.parametrize("spread", [1.0, 8.0])
def test_a_nucleus_of_many_classes_is_that_of_the_reference(spread):
    scores = (spread * drawn(3, 2000, 13)).requires_grad_()
    target = torch.tensor([int(scores[0].argmax()), 5, -100])
    loss = sparse_cross_entropy(scores, target, p=0.8, label_smoothing=0.1)
    value, grad = reference.losses(scores.detach(), target, p=0.8, smoothing=0.1)
    torch.testing.assert_close(loss.detach(), value, rtol=1e-12, atol=0)
    torch.testing.assert_close(torch.autograd.grad(loss, scores)[0], grad, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("k", [7, 50])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("shape", [(7,), (5, 7), (2, 7, 3), (2, 7, 3, 2)])
def test_with_all_classes_it_is_cross_entropy(shape, reduction, smoothing, k):
    g = generator(3)
    scores = torch.randn(shape, generator=g, dtype=torch.float64).requires_grad_()
    target = torch.randint(7, (*shape[:1], *shape[2:]) if len(shape) > 1 else (), generator=g)
    if target.numel() > 1:
        target.view(-1)[0] = -100
    for weight in (None, torch.rand(7, generator=g, dtype=torch.float64)):
        options = {"weight": weight, "reduction": reduction, "label_smoothing": smoothing}
        want = F.cross_entropy(scores, target, **options)
        wanted = torch.autograd.grad(want.sum(), scores)[0]
        for kept in ({"k": k}, {"p": 1.0}):
            loss = sparse_cross_entropy(scores, target, **kept, **options)
            torch.testing.assert_close(loss, want, rtol=1e-13, atol=1e-13)
            torch.testing.assert_close(torch.autograd.grad(loss.sum(), scores)[0], wanted, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(
        sparse_softmax(scores, k=k, dim=min(len(shape) - 1, 1)), scores.softmax(min(len(shape) - 1, 1))
    )


def test_target_outside_omega_is_finite_and_pulled_with_weight_one(way):
    scores = torch.tensor([[4.0, 1.0, 3.0, -2.0]], requires_grad=True)
    loss = sparse_cross_entropy(scores, torch.tensor([3]), k=2)
    assert loss.item() == pytest.approx(math.log(math.exp(4) + math.exp(3)) + 2)
    assert loss.item() >= math.log(2)
    (grad,) = torch.autograd.grad(loss, scores)
    assert grad[0, 3] == -1
    assert grad[0, 1] == 0
    assert grad.sum().item() == pytest.approx(0, abs=1e-7)
    assert sparse_softmax(scores, k=2)[0, 3] == 0


def test_one_kept_score_gives_the_distance_to_the_largest(way):
    scores = drawn(5, 9, 0)
    target = torch.arange(5)
    loss = sparse_cross_entropy(scores, target, k=1, reduction="none")
    torch.testing.assert_close(loss, scores.amax(1) - scores.gather(1, target[:, None])[:, 0])
    assert sparse_cross_entropy(scores, scores.argmax(1), k=1) == 0


@pytest.mark.parametrize("k", [3, 40])
def test_margin_bounds_hold_at_any_scores(k):
    """The target on top and a loss of eps: largest minus the k-th >= log(min(k, n) - 1) - log(e^eps - 1)."""
    for seed in range(20):
        scores = drawn(1, 30, seed)
        target = scores.argmax(1)
        eps = sparse_cross_entropy(scores, target, k=k).item()
        ranked = scores[0].sort(descending=True).values
        size = min(k, 30)
        assert ranked[0] - ranked[size - 1] >= math.log(size - 1) - math.log(math.expm1(eps)) - 1e-12


@pytest.mark.parametrize("kept", [{"k": 3}, {"k": 99}, {"p": 0.8}])
def test_nan_is_not_dropped_and_stays_in_its_row(kept, way):
    scores = drawn(4, 2000, 1, dtype=torch.float32)
    scores[1, 700] = math.nan
    scores[2, 1234] = math.nan
    scores.requires_grad_()
    target = torch.tensor([3, 5, -100, 2])
    loss = sparse_cross_entropy(scores, target, reduction="none", **kept)
    assert loss.isnan().tolist() == [False, True, False, False]
    assert loss[2] == 0
    (grad,) = torch.autograd.grad(loss.nansum(), scores)
    assert (grad[2] == 0).all()
    assert grad[[0, 3]].isfinite().all()
    assert sparse_softmax(scores, **kept).isnan().any(1).tolist() == [False, True, True, False]
    assert sparse_cross_entropy(scores, target, **kept).isnan()


@pytest.mark.parametrize("kept", [{"k": 3}, {"k": 99}, {"p": 0.8}, {"p": 1.0}])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_rows_without_any_score_count_as_loss_zero(kept, smoothing, way):
    scores = drawn(3, 8, 2).requires_grad_()
    masked = torch.where(torch.tensor([[False], [True], [False]]), -INF, scores)
    loss = sparse_cross_entropy(masked, torch.tensor([1, 2, 3]), reduction="none", label_smoothing=smoothing, **kept)
    assert loss[1] == 0
    (grad,) = torch.autograd.grad(loss.sum(), scores)
    assert grad.isfinite().all()
    assert (grad[1] == 0).all()
    assert (sparse_softmax(masked, **kept)[1] == 0).all()


def test_masked_scores_and_a_masked_target(way):
    scores = torch.tensor([[1.0, -INF, 0.5, -INF]], requires_grad=True)
    loss = sparse_cross_entropy(scores, torch.tensor([2]), k=3)
    torch.testing.assert_close(loss, F.cross_entropy(scores, torch.tensor([2])))
    assert torch.autograd.grad(loss, scores)[0].isfinite().all()
    assert sparse_cross_entropy(scores, torch.tensor([3]), k=3) == INF


def test_rows_that_do_not_count_leave_no_trace():
    scores = drawn(4, 6, 3).requires_grad_()
    target = torch.tensor([2, -100, 0, -100])
    some = sparse_cross_entropy(scores[[0, 2]], target[[0, 2]], k=2)
    assert sparse_cross_entropy(scores, target, k=2) == some
    for nothing in (torch.full((4,), -100), target[:0]):
        for reduction in ("mean", "sum"):
            loss = sparse_cross_entropy(scores[: len(nothing)], nothing, k=2, reduction=reduction)
            assert loss == 0
            assert (torch.autograd.grad(loss, scores)[0] == 0).all()


@pytest.mark.parametrize("kept", [{"k": 3}, {"k": 9}, {"p": 0.7}])
def test_gradients_and_second_gradients_agree_with_finite_differences(kept):
    scores = drawn(3, 6, 4).requires_grad_()
    target, weight = torch.tensor([0, -100, 5]), torch.tensor([1.0, 0.5, 2.0, 1.0, 0.3, 0.7], dtype=torch.float64)

    def loss(x):
        return sparse_cross_entropy(x, target, weight=weight, label_smoothing=0.1, **kept)

    assert torch.autograd.gradcheck(loss, scores)
    assert torch.autograd.gradgradcheck(loss, scores)
    assert torch.autograd.gradcheck(lambda x: sparse_softmax(x, dim=0, **kept), scores)
    assert torch.autograd.gradgradcheck(lambda x: sparse_softmax(x, **kept), scores)


@pytest.mark.parametrize("weighted", [False, True])
def test_the_short_way_to_the_gradient_gives_that_of_autograd(weighted):
    picked = drawn(6, 5, 3).requires_grad_()
    index, target = torch.arange(4).expand(6, 4), torch.tensor([0, 3, 7, 2, 1, 8])
    ignored = torch.tensor([False, False, False, True, False, False])
    with torch.no_grad():
        picked[:, 4] -= 20  # a target outside Omega is below it
        picked[0, 4], picked[1, 4], picked[4, 4] = picked[0, 0], picked[1, 3], picked[4, 1]
        picked[5] = -INF
        picked[3, 1] = math.nan
    weight = torch.linspace(0.5, 2, 9, dtype=torch.float64) if weighted else None
    given = (picked, index, None, target, ignored, weight, 0.0)
    ours, usual = picked_losses(*given), _differentiable_losses(*given)
    torch.testing.assert_close(ours, usual)
    pull = drawn(1, 6, 4)[0]
    first = [torch.autograd.grad(loss, picked, pull, create_graph=again, retain_graph=True)[0]
             for loss, again in ((ours, False), (ours, True), (usual, False))]  # fmt: skip
    torch.testing.assert_close(first[0], first[2])
    torch.testing.assert_close(first[1].detach(), first[2])
    assert not first[0].requires_grad
    assert first[1].requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kept", [{"k": 5}, {"k": 200}, {"p": 0.9}])
def test_low_precision_is_reduced_in_float32(dtype, kept):
    scores = drawn(6, 100, 5, dtype=dtype)
    scores[0, 3] = 20.0  # p - 1 is far below the precision of the dtype at 1
    target = torch.tensor([3, 1, 50, 7, 99, 0])
    low, wide = scores.clone().requires_grad_(), scores.double().requires_grad_()
    loss = sparse_cross_entropy(low, target, **kept)
    want = sparse_cross_entropy(wide, target, **kept)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), want, rtol=1e-6, atol=1e-6)
    (got,), (exact,) = torch.autograd.grad(loss, low), torch.autograd.grad(want, wide)
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-6)
    chance = sparse_softmax(scores, **kept)
    assert chance.dtype == dtype
    torch.testing.assert_close(chance.double(), sparse_softmax(wide.detach(), **kept), rtol=1e-2, atol=1e-6)


def test_large_scores_keep_their_digits():
    scores = 1e4 + drawn(5, 40, 12, dtype=torch.float32)
    target = scores.topk(3, dim=1).indices[:, 2]
    for kept in ({"k": 4}, {"k": 40}, {"p": 0.9}):
        low, wide = scores.clone().requires_grad_(), scores.double().requires_grad_()
        loss, want = sparse_cross_entropy(low, target, **kept), sparse_cross_entropy(wide, target, **kept)
        torch.testing.assert_close(loss.double(), want, rtol=1e-6, atol=0)
        (got,), (exact,) = torch.autograd.grad(loss, low), torch.autograd.grad(want, wide)
        torch.testing.assert_close(got.double(), exact, rtol=3e-6, atol=1e-8)


def test_classes_on_axis_one_and_memory_that_is_not_contiguous():
    g = generator(6)
    scores = torch.randn(3, 4, 5, 11, generator=g).permute(0, 3, 2, 1)  # (3, 11, 5, 4)
    target = torch.randint(11, (3, 5, 4), generator=g)
    loss = sparse_cross_entropy(scores, target, k=4, reduction="none")
    rows = scores.permute(0, 2, 3, 1).reshape(-1, 11)
    torch.testing.assert_close(
        loss.flatten(), sparse_cross_entropy(rows.contiguous(), target.flatten(), k=4, reduction="none")
    )
    torch.testing.assert_close(
        sparse_softmax(scores, 4, 1).permute(0, 2, 3, 1).reshape(-1, 11), sparse_softmax(rows.contiguous(), 4)
    )
    before = scores.clone()
    sparse_cross_entropy(scores, target, p=0.5)
    assert torch.equal(scores, before)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64])
def test_target_may_be_of_any_integer_type(dtype):
    scores = drawn(3, 5, 7)
    loss = sparse_cross_entropy(scores, torch.tensor([0, 4, 2], dtype=dtype), k=2)
    assert loss == sparse_cross_entropy(scores, torch.tensor([0, 4, 2]), k=2)
    assert sparse_cross_entropy(scores, torch.tensor([0, 4, 2]), k=np.int64(2)) == loss


def test_at_most_k_plus_one_entries_of_the_gradient_are_not_zero_and_rows_sum_to_zero():
    scores = drawn(8, 50, 8).requires_grad_()
    target = torch.arange(8) * 6
    (grad,) = torch.autograd.grad(sparse_cross_entropy(scores, target, k=4, reduction="sum"), scores)
    assert ((grad != 0).sum(1) <= 5).all()
    torch.testing.assert_close(grad.sum(1), torch.zeros(8, dtype=torch.float64))
    chance = sparse_softmax(scores, k=4)
    assert ((chance > 0).sum(1) == 4).all()
    torch.testing.assert_close(chance.sum(1), torch.ones(8, dtype=torch.float64))


@pytest.mark.slow
def test_the_loss_on_a_nucleus_compiles_as_one_graph():
    scores, target = drawn(4, 12, 9).requires_grad_(), torch.tensor([3, -100, 11, 0])
    compiled = torch.compile(lambda x: sparse_cross_entropy(x, target, p=0.7), fullgraph=True, backend="aot_eager")
    value, expected = compiled(scores), sparse_cross_entropy(scores, target, p=0.7)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(torch.autograd.grad(value, scores), torch.autograd.grad(expected, scores))


def test_under_autocast_the_loss_is_that_of_the_scores_it_gets():
    scores, target = drawn(4, 12, 10, dtype=torch.float32), torch.tensor([3, 1, 11, 0])
    with torch.autocast("cpu", torch.bfloat16):
        for kept in ({"k": 3}, {"k": 12}, {"p": 0.7}):
            loss = sparse_cross_entropy(scores, target, **kept)
            assert loss.dtype == torch.float32
            assert sparse_softmax(scores, **kept).dtype == torch.float32
            with torch.autocast("cpu", enabled=False):
                assert loss == sparse_cross_entropy(scores, target, **kept)


def test_module_is_the_function_and_keeps_its_weight():
    weight = torch.tensor([1.0, 2.0, 0.5, 1.0])
    module = SparseCrossEntropyLoss(2, weight=weight, ignore_index=1, reduction="sum", label_smoothing=0.1)
    scores, target = drawn(3, 4, 11, dtype=torch.float32), torch.tensor([0, 1, 3])
    assert module(scores, target) == sparse_cross_entropy(
        scores, target, k=2, weight=weight, ignore_index=1, reduction="sum", label_smoothing=0.1
    )
    other = SparseCrossEntropyLoss(2, weight=torch.ones(4))
    other.load_state_dict(module.state_dict())
    assert torch.equal(other.weight, weight)
    assert not SparseCrossEntropyLoss().state_dict()
    assert "k=2" in repr(module)
    assert "p=0.9" in repr(nn.Sequential(SparseCrossEntropyLoss(p=0.9)))


GOOD = torch.zeros(2, 3)
LABELS = torch.tensor([0, 2])


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: sparse_softmax(GOOD, 0), ValueError, "k must be at least 1; got 0"),
        (lambda: sparse_softmax(GOOD, 2.0), TypeError, "2.0"),
        (lambda: sparse_softmax(GOOD, True), TypeError, "True"),
        (lambda: sparse_softmax(GOOD, None), TypeError, "None"),
        (lambda: sparse_softmax(GOOD, 3, p=0.5), ValueError, "not both"),
        (lambda: sparse_softmax(GOOD, p=0.0), ValueError, "0.0"),
        (lambda: sparse_softmax(GOOD, p=1.5), ValueError, "1.5"),
        (lambda: sparse_softmax(GOOD, p=math.nan), ValueError, "nan"),
        (lambda: sparse_softmax(GOOD, p=True), TypeError, "True"),
        (lambda: sparse_softmax(GOOD, 2, 2), ValueError, "dim"),
        (lambda: sparse_softmax(GOOD, 2, -3), ValueError, "dim"),
        (lambda: sparse_softmax(GOOD.long()), TypeError, "int64"),
        (lambda: sparse_softmax([1.0]), TypeError, "list"),
        (lambda: sparse_softmax(torch.tensor(1.0)), ValueError, "at least one dimension; got a number"),
        (lambda: sparse_softmax(torch.zeros(2, 0)), ValueError, "class"),
        (lambda: sparse_cross_entropy(torch.tensor(1.0), LABELS), ValueError, "number"),
        (lambda: sparse_cross_entropy(torch.zeros(2, 0), LABELS), ValueError, "class"),
        (lambda: sparse_cross_entropy(GOOD, LABELS, k=-1), ValueError, "-1"),
        (lambda: sparse_cross_entropy(GOOD, LABELS, k=2, p=0.5), ValueError, "k = 2 and p = 0.5"),
        (lambda: sparse_cross_entropy(GOOD, LABELS.float()), TypeError, "float32"),
        (lambda: sparse_cross_entropy(GOOD, GOOD), TypeError, "float32"),
        (lambda: sparse_cross_entropy(GOOD, LABELS.bool()), TypeError, "bool"),
        (lambda: sparse_cross_entropy(GOOD, [0, 2]), TypeError, "list"),
        (lambda: sparse_cross_entropy(GOOD, torch.tensor([0, 3])), ValueError, "3"),
        (lambda: sparse_cross_entropy(GOOD, torch.tensor([0, -1])), ValueError, "-1"),
        (lambda: sparse_cross_entropy(GOOD, torch.tensor([0, -100]), ignore_index=-1), ValueError, "-100"),
        (lambda: sparse_cross_entropy(GOOD, torch.tensor([0])), ValueError, r"\(2,\)"),
        (lambda: sparse_cross_entropy(GOOD[None], LABELS[None]), ValueError, r"\(1, 3\)"),
        (lambda: sparse_cross_entropy(GOOD, LABELS, reduction="max"), ValueError, "max"),
        (lambda: sparse_cross_entropy(GOOD, LABELS, ignore_index=1.0), TypeError, "1.0"),
        (lambda: sparse_cross_entropy(GOOD, LABELS, label_smoothing=1.1), ValueError, "1.1"),
        (lambda: sparse_cross_entropy(GOOD, LABELS, label_smoothing=-0.1), ValueError, "-0.1"),
        (lambda: sparse_cross_entropy(GOOD, LABELS, weight=torch.ones(2)), ValueError, "3 entries"),
        (lambda: sparse_cross_entropy(GOOD, LABELS, weight=torch.ones(3).long()), TypeError, "int64"),
        (lambda: SparseCrossEntropyLoss(0), ValueError, "0"),
        (lambda: SparseCrossEntropyLoss(5, p=0.5), ValueError, "not both"),
        (lambda: SparseCrossEntropyLoss(weight=torch.ones(2, 2)), ValueError, "2, 2"),
        (lambda: SparseCrossEntropyLoss(weight=torch.tensor(1.0)), ValueError, "1 dim"),
        (lambda: SparseCrossEntropyLoss(ignore_index=1.5), TypeError, "1.5"),
        (lambda: SparseCrossEntropyLoss(reduction="no"), ValueError, "no"),
    ],
)
def test_bad_input_is_named(call, error, words):
    with pytest.raises(error, match=words):
        call()
