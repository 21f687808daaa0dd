from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from kexue.losses import (
    LinearSparseCrossEntropyLoss,
    _topk_kernel,
    linear_cross_entropy,
    linear_sparse_cross_entropy,
    sparse_cross_entropy,
)
from reference import spaces_sparse as reference


@pytest.fixture(params=["heaps", "torch.topk"])
def way(request, monkeypatch):
    """Both ways to find the largest; the second is that of devices other than the CPU."""
    if request.param != "heaps":
        monkeypatch.setattr(_topk_kernel, "_HEAP_DEVICES", ())
    return request.param


def inputs(n=17, width=5, vocabulary=11, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    hidden, weight, bias = (
        torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
        for shape in ((n, width), (vocabulary, width), (vocabulary,))
    )
    target = torch.randint(vocabulary, (n,), generator=g)
    target[torch.rand(n, generator=g) < 0.3] = -100
    return hidden, weight, bias, target


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(0, 9),
    width=st.integers(0, 4),
    vocabulary=st.integers(1, 12),
    k=st.integers(1, 12),
    numbers=st.sampled_from([1, 7, 30, 10_000]),
    with_bias=st.booleans(),
    weighted=st.booleans(),
    smoothing=st.sampled_from([0.0, 0.2]),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    heaps=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_values_and_gradients_are_those_of_the_reference(
    n, width, vocabulary, k, numbers, with_bias, weighted, smoothing, reduction, heaps, seed
):
    hidden, weight, bias, target = inputs(n, width, vocabulary, seed=seed)
    if not with_bias:
        bias = None
    factor = torch.linspace(0.5, 2, vocabulary, dtype=torch.float64) if weighted else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_topk_kernel, "_HEAP_DEVICES", ("cpu",) if heaps else ())
        loss = linear_sparse_cross_entropy(
            hidden, weight, target, bias, k=k, class_weight=factor, reduction=reduction, label_smoothing=smoothing,
            chunk_bytes=4 * numbers,
        )  # fmt: skip
    value, *wanted = reference.linear(
        hidden.detach(), weight.detach(), target, None if bias is None else bias.detach(), k=k, weight=factor,
        smoothing=smoothing, reduction=reduction,
    )  # fmt: skip
    torch.testing.assert_close(loss.detach(), value, rtol=1e-11, atol=1e-12)
    at = [x for x in (hidden, weight, bias) if x is not None]
    for a, b in zip(torch.autograd.grad(loss.sum(), at), wanted[: len(at)], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


def test_ties_between_blocks_go_to_the_lowest_index(way):
    hidden = torch.ones(3, 2)
    weight = torch.zeros(40, 2)
    weight[33] = 1.0
    grads = []
    for numbers in (5, 40, 1000):
        table = weight.clone().requires_grad_()
        loss = linear_sparse_cross_entropy(hidden, table, torch.full((3,), 33), k=4, chunk_bytes=4 * numbers)
        grads.append(torch.autograd.grad(loss, table)[0])
        assert (grads[-1] != 0).any(1).nonzero().squeeze(1).tolist() == [0, 1, 2, 33]
        torch.testing.assert_close(grads[-1], grads[0])


def test_gradients_agree_with_finite_differences():
    hidden, weight, bias, target = inputs(4, 3, 6)
    for k in (2, 9):
        assert torch.autograd.gradcheck(
            lambda h, w, b, k=k: linear_sparse_cross_entropy(
                h, w, target, b, k=k, reduction="none", label_smoothing=0.1
            ),
            (hidden, weight, bias),
        )


def test_a_second_gradient_is_an_error():
    hidden, weight, bias, target = inputs()
    loss = linear_sparse_cross_entropy(hidden, weight, target, bias, k=3)
    (grad,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once"):
        torch.autograd.grad(grad.square().sum(), weight)


@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_what_is_frozen_gets_no_gradient_and_the_rest_is_right(frozen):
    given_, wanted = inputs()[:3], inputs()[:3]
    target = inputs()[3]
    given_[frozen].requires_grad_(False)
    linear_sparse_cross_entropy(given_[0], given_[1], target, given_[2], k=4).backward()
    sparse_cross_entropy(wanted[0] @ wanted[1].T + wanted[2], target, k=4).backward()
    for place, (x, y) in enumerate(zip(given_, wanted, strict=True)):
        if place == frozen:
            assert x.grad is None
        else:
            torch.testing.assert_close(x.grad, y.grad)


def test_leading_dimensions_of_any_number_and_no_row_that_counts():
    hidden, weight, bias, target = inputs(12)
    flat = linear_sparse_cross_entropy(hidden, weight, target, bias, k=3, reduction="none")
    grid = linear_sparse_cross_entropy(
        hidden.view(2, 3, 2, 5), weight, target.view(2, 3, 2), bias, k=3, reduction="none"
    )
    assert torch.equal(grid, flat.view(2, 3, 2))
    assert (flat[target == -100] == 0).all()
    counted = int(torch.where(target != -100)[0][0])
    one = linear_sparse_cross_entropy(hidden[counted], weight, target[counted], bias, k=3)
    torch.testing.assert_close(one, flat[counted])
    for rows in (0, 3):
        none = torch.full((rows,), -100)
        loss = linear_sparse_cross_entropy(hidden[:rows], weight, none, bias, k=3)
        assert loss == 0
        assert all((g == 0).all() for g in torch.autograd.grad(loss, (hidden, weight, bias)))


def test_nan_is_not_dropped_and_ignored_rows_may_hold_it(way):
    hidden, weight, bias, target = (x.detach() for x in inputs(6, 4, 2000, torch.float32))
    target[:] = torch.tensor([1, -100, 3, 4, 5, 6])
    hidden[1] = math.nan
    weight.requires_grad_()
    loss = linear_sparse_cross_entropy(hidden, weight, target, bias, k=5)
    assert loss.isfinite()
    assert torch.autograd.grad(loss, weight)[0].isfinite().all()
    hidden[2, 0] = math.nan
    losses = linear_sparse_cross_entropy(hidden, weight, target, bias, k=5, reduction="none")
    assert losses.isnan().tolist() == [False, False, True, False, False, False]
    with torch.no_grad():
        bias[1500] = math.nan
    losses = linear_sparse_cross_entropy(hidden, weight, target, bias, k=5, reduction="none")
    assert losses.isnan().tolist() == [True, False, True, True, True, True]


def test_words_with_a_bias_of_minus_infinity_are_masked(way):
    hidden, weight, bias, target = (x.detach() for x in inputs(5, 4, 9))
    target = torch.zeros_like(target)
    bias[3:] = -math.inf
    loss = linear_sparse_cross_entropy(hidden, weight, target, bias, k=6, reduction="none")
    few = linear_sparse_cross_entropy(hidden, weight[:3], target, bias[:3], k=3, reduction="none")
    torch.testing.assert_close(loss, few)
    bias[:] = -math.inf
    assert linear_sparse_cross_entropy(hidden, weight, target, bias, k=6) == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_chooses_by_its_products_and_computes_the_rest_in_float32(dtype):
    hidden, weight, bias, target = inputs(6, 8, 30, dtype, seed=2)
    target = torch.arange(6)
    loss = linear_sparse_cross_entropy(hidden, weight, target, bias, k=4)
    assert loss.dtype == torch.float32
    scores = torch.addmm(bias, hidden, weight.T).float()
    kept = torch.stack([torch.tensor(reference.largest(row, 4)) for row in scores.tolist()])
    h, w, b = (x.detach().double().requires_grad_() for x in (hidden, weight, bias))
    exact = h @ w.T + b
    want = (exact.gather(1, kept).logsumexp(1) - exact.gather(1, target[:, None])[:, 0]).mean()
    torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=1e-6)
    got, wanted = torch.autograd.grad(loss, (hidden, weight, bias)), torch.autograd.grad(want, (h, w, b))
    for x, y in zip(got, wanted, strict=True):
        assert x.dtype == dtype
        torch.testing.assert_close(x.double(), y, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


def test_under_autocast_products_are_in_its_precision_and_the_loss_in_float32():
    hidden, weight, bias, target = inputs(6, 8, 30, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        for k in (4, 30):
            loss = linear_sparse_cross_entropy(hidden, weight, target, bias, k=k)
            assert loss.dtype == torch.float32
            torch.testing.assert_close(
                loss, linear_sparse_cross_entropy(hidden.double(), weight, target, bias, k=k).float(), rtol=0.05, atol=0
            )
            assert all(g.isfinite().all() for g in torch.autograd.grad(loss, (hidden, weight, bias)))


def test_sparse_gradient_is_the_dense_one_and_feeds_sparse_adam():
    hidden, weight, bias, target = inputs(9, 4, 60, torch.float32)
    dense = torch.autograd.grad(linear_sparse_cross_entropy(hidden, weight, target, bias, k=3), weight)[0]
    table = torch.nn.Parameter(weight.detach().clone())
    optimizer = torch.optim.SparseAdam([table], lr=0.1)
    loss = linear_sparse_cross_entropy(hidden, table, target, bias, k=3, sparse_grad=True)
    loss.backward()
    assert table.grad.is_sparse
    assert table.grad.coalesce()._nnz() == table.grad._nnz()  # no word twice
    assert table.grad._nnz() <= 4 * 9
    assert torch.equal(table.grad.to_dense(), dense)
    optimizer.step()
    touched = (dense != 0).any(1)
    assert torch.equal(table[~touched], weight[~touched])
    assert linear_sparse_cross_entropy(hidden, table, target, bias, k=3) < loss
    table.grad = None
    nothing = torch.full((9,), -100)
    linear_sparse_cross_entropy(hidden, table, nothing, k=3, sparse_grad=True).backward()
    assert table.grad._nnz() == 0


class Largest(TorchDispatchMode):
    """Notes the size of the largest tensor that an operation returns."""

    def __init__(self):
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor) and not x.is_sparse:
                self.numbers = max(self.numbers, x.numel())
        return out


def test_the_scores_are_never_held():
    hidden, weight, _, target = inputs(400, 8, 5000, torch.float32)
    with Largest() as seen:
        loss = linear_sparse_cross_entropy(hidden, weight, target, k=5, chunk_bytes=1 << 16)
        torch.autograd.backward(loss)
    assert seen.numbers == weight.numel()  # the table's gradient; the scores are 50 times that


def test_agrees_with_the_dense_head_where_nothing_is_left_out():
    hidden, weight, bias, target = inputs()
    ours = linear_sparse_cross_entropy(hidden, weight, target, bias, k=11)
    theirs = linear_cross_entropy(hidden, weight, target, bias)
    torch.testing.assert_close(ours, theirs)
    at = (hidden, weight, bias)
    torch.testing.assert_close(torch.autograd.grad(ours, at), torch.autograd.grad(theirs, at))


def test_a_row_does_not_depend_on_its_batch():
    hidden, weight, bias, _ = (x.detach() for x in inputs(40, 6, 3000))
    target = torch.arange(40)
    many = linear_sparse_cross_entropy(hidden, weight, target, bias, k=7, reduction="none")
    alone = [linear_sparse_cross_entropy(hidden[i], weight, target[i], bias, k=7) for i in (0, 17, 39)]
    torch.testing.assert_close(many[[0, 17, 39]], torch.stack(alone))


def test_module_is_the_function_and_keeps_its_weight():
    hidden, weight, bias, target = inputs(vocabulary=6)
    factor = torch.linspace(1, 2, 6, dtype=torch.float64)
    module = LinearSparseCrossEntropyLoss(2, class_weight=factor, reduction="sum", label_smoothing=0.1)
    assert module(hidden, weight, target, bias) == linear_sparse_cross_entropy(
        hidden, weight, target, bias, k=2, class_weight=factor, reduction="sum", label_smoothing=0.1
    )
    assert list(module.state_dict()) == ["class_weight"]
    assert not LinearSparseCrossEntropyLoss().state_dict()
    assert "k=2" in repr(module)


H, W, Y = torch.zeros(2, 3), torch.zeros(4, 3), torch.tensor([0, 3])


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: linear_sparse_cross_entropy(H, W[:, :2], Y), ValueError, r"\(2, 3\)"),
        (lambda: linear_sparse_cross_entropy(H, W[0], Y), ValueError, r"\(3,\)"),
        (lambda: linear_sparse_cross_entropy(H, W[:0], Y), ValueError, r"\(0, 3\)"),
        (lambda: linear_sparse_cross_entropy(H.long(), W, Y), TypeError, "int64"),
        (lambda: linear_sparse_cross_entropy(H, None, Y), TypeError, "NoneType"),
        (lambda: linear_sparse_cross_entropy(H, W, Y.float()), TypeError, "float32"),
        (lambda: linear_sparse_cross_entropy(H, W, torch.tensor([0, 4])), ValueError, "4"),
        (lambda: linear_sparse_cross_entropy(H, W, Y[:1]), ValueError, r"\(2,\)"),
        (lambda: linear_sparse_cross_entropy(H, W, Y, torch.zeros(3)), ValueError, "4 entries"),
        (lambda: linear_sparse_cross_entropy(H, W, Y, k=0), ValueError, "0"),
        (lambda: linear_sparse_cross_entropy(H, W, Y, k=True), TypeError, "True"),
        (lambda: linear_sparse_cross_entropy(H, W, Y, k=1.5), TypeError, "1.5"),
        (lambda: linear_sparse_cross_entropy(H, W, Y, class_weight=torch.ones(3)), ValueError, "class_weight"),
        (lambda: linear_sparse_cross_entropy(H, W, Y, chunk_bytes=0), ValueError, "chunk_bytes"),
        (lambda: linear_sparse_cross_entropy(H, W, Y, reduction="max"), ValueError, "max"),
        (lambda: linear_sparse_cross_entropy(H, W, Y, sparse_grad=1), TypeError, "sparse_grad"),
        (lambda: linear_sparse_cross_entropy(H, W, Y, k=4, sparse_grad=True), ValueError, "k = 4"),
        (lambda: LinearSparseCrossEntropyLoss(0), ValueError, "0"),
        (lambda: LinearSparseCrossEntropyLoss(chunk_bytes=1.0), TypeError, "1.0"),
        (lambda: LinearSparseCrossEntropyLoss(label_smoothing=2), ValueError, "2"),
        (lambda: LinearSparseCrossEntropyLoss(class_weight=torch.tensor(1.0)), ValueError, "class_weight"),
        (lambda: LinearSparseCrossEntropyLoss(ignore_index=True), TypeError, "True"),
        (lambda: LinearSparseCrossEntropyLoss(sparse_grad="yes"), TypeError, "yes"),
    ],
)
def test_bad_input_is_named(call, error, words):
    with pytest.raises(error, match=words):
        call()
