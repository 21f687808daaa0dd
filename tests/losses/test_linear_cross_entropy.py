from __future__ import annotations

import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from kexue.losses import linear_cross_entropy


def inputs(n=17, width=5, vocabulary=11, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    hidden, weight, bias = (
        torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
        for shape in ((n, width), (vocabulary, width), (vocabulary,))
    )
    labels = torch.randint(vocabulary, (n,), generator=g)
    labels[torch.rand(n, generator=g) < 0.3] = -100
    return hidden, weight, bias, labels


def usual(hidden, weight, bias, labels, reduction):
    scores = hidden @ weight.T + (0 if bias is None else bias)
    losses = F.cross_entropy(scores, labels, reduction="none")
    if reduction == "none":
        return losses
    return losses.sum() / ((labels != -100).sum().clamp(min=1) if reduction == "mean" else 1)


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(0, 9),
    vocabulary=st.integers(1, 7),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    rows=st.integers(1, 4),
    with_bias=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_values_and_gradients_are_those_of_the_usual_way(n, vocabulary, reduction, rows, with_bias, seed):
    hidden, weight, bias, labels = inputs(n, 3, vocabulary, seed=seed)
    if not with_bias:
        bias = None
    ours = linear_cross_entropy(hidden, weight, labels, bias, reduction=reduction, chunk_bytes=4 * vocabulary * rows)
    theirs = usual(hidden, weight, bias, labels, reduction)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    upstream = torch.randn(theirs.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    at = [x for x in (hidden, weight, bias) if x is not None]
    for a, b in zip(
        torch.autograd.grad((ours * upstream).sum(), at),
        torch.autograd.grad((theirs * upstream).sum(), at),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_what_is_frozen_gets_no_gradient_and_the_rest_is_right(frozen):
    given_, wanted = inputs()[:3], inputs()[:3]
    labels = inputs()[3]
    given_[frozen].requires_grad_(False)
    linear_cross_entropy(given_[0], given_[1], labels, given_[2]).backward()
    usual(*wanted, labels, "mean").backward()
    for place, (x, y) in enumerate(zip(given_, wanted, strict=True)):
        if place == frozen:
            assert x.grad is None
        else:
            torch.testing.assert_close(x.grad, y.grad)


def test_gradcheck():
    hidden, weight, bias, labels = inputs(6, 3, 4)
    for reduction in ("mean", "sum", "none"):
        assert torch.autograd.gradcheck(
            lambda h, w, b, r=reduction: linear_cross_entropy(h, w, labels[:6], b, reduction=r, chunk_bytes=32),
            (hidden, weight, bias),
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_sums_in_float32(dtype):
    hidden, weight, bias, labels = inputs(64, 16, 50, dtype)
    loss = linear_cross_entropy(hidden, weight, labels, bias)
    assert loss.dtype == torch.float32
    loss.backward()
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight, bias)]
    theirs = usual(*exact, labels, "mean")
    theirs.backward()
    eps = torch.finfo(dtype).eps
    assert abs(loss.item() - theirs.item()) < 4 * eps
    for x, y in zip((hidden, weight, bias), exact, strict=True):
        assert x.grad.dtype == dtype
        assert (x.grad.double() - y.grad).norm() < 8 * eps * y.grad.norm()


class Largest(TorchDispatchMode):
    """The size of the largest tensor that any operation makes."""

    def __init__(self):
        super().__init__()
        self.size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor):
                self.size = max(self.size, x.numel())
        return out


def test_no_more_than_a_chunk_of_scores_exists():
    n, width, vocabulary, rows = 64, 4, 1000, 8
    hidden, weight, bias, _ = inputs(n, width, vocabulary, torch.float32)
    labels = torch.randint(vocabulary, (n,), generator=torch.Generator().manual_seed(1))
    for reduction in ("mean", "none"):
        with Largest() as seen:
            losses = linear_cross_entropy(
                hidden, weight, labels, bias, reduction=reduction, chunk_bytes=4 * vocabulary * rows
            )
            losses.sum().backward()
        assert seen.size == rows * vocabulary  # the table itself has 4000 entries
    with Largest() as seen:  # the check can fail
        usual(hidden, weight, bias, labels, "mean")
    assert seen.size == n * vocabulary


def test_rows_that_do_not_count_do_not_matter_and_get_no_gradient():
    hidden, weight, bias, labels = inputs()
    poisoned = hidden.detach().clone()
    poisoned[labels == -100] = float("nan")
    poisoned.requires_grad_()
    loss = linear_cross_entropy(poisoned, weight, labels, bias)
    assert torch.equal(loss, linear_cross_entropy(hidden, weight, labels, bias))
    (grad,) = torch.autograd.grad(loss, poisoned)
    assert (grad[labels == -100] == 0).all()
    assert grad.isfinite().all()


def test_no_label_at_all_is_zero_with_zero_gradients():
    hidden, weight, bias, labels = inputs()
    loss = linear_cross_entropy(hidden, weight, torch.full_like(labels, -100), bias)
    loss.backward()
    assert loss.item() == 0
    assert all((x.grad == 0).all() for x in (hidden, weight, bias))


def test_extreme_scores_stay_finite():
    hidden = torch.tensor([[1e4, 0.0], [0.0, 1e4]], requires_grad=True)
    weight = torch.tensor([[1e4, 0.0], [0.0, 1e4], [0.0, 0.0]], requires_grad=True)
    loss = linear_cross_entropy(hidden, weight, torch.tensor([0, 0]))
    loss.backward()
    assert loss.item() == 0.5e8
    assert hidden.grad.isfinite().all()
    assert weight.grad.isfinite().all()


def test_leading_axes_another_index_and_no_gradient_wanted():
    hidden, weight, bias, _ = inputs(12)
    labels = torch.tensor([[0, 1, 9], [9, 9, 2], [4, 5, 6], [7, 8, 9]])
    cube = hidden.detach().view(4, 3, 5)
    out = linear_cross_entropy(cube, weight.detach(), labels, bias.detach(), ignore_index=9, reduction="none")
    assert out.shape == (4, 3)
    scores = cube @ weight.T + bias
    torch.testing.assert_close(out, F.cross_entropy(scores.mT, labels, ignore_index=9, reduction="none"))


def test_under_no_grad_no_gradient_is_made(monkeypatch):
    hidden, weight, bias, labels = inputs()
    want = linear_cross_entropy(hidden, weight, labels, bias).detach()

    def forbidden(*_):
        raise AssertionError("a gradient was made")

    monkeypatch.setattr(sys.modules[linear_cross_entropy.__module__], "_gradients", forbidden)
    with torch.no_grad():
        torch.testing.assert_close(linear_cross_entropy(hidden, weight, labels, bias), want)


def test_autocast_uses_its_dtype_for_the_products():
    hidden, weight, bias, labels = inputs(64, 16, 50, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, labels, bias)
    loss.backward()
    assert hidden.grad.dtype == weight.grad.dtype == torch.float32
    exact = usual(*(x.detach().double() for x in (hidden, weight, bias)), labels, "mean")
    assert 1e-7 < abs(loss.item() - exact.item()) < 0.02


def test_it_compiles_into_one_graph():
    hidden, weight, bias, labels = inputs()
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager")
    a = compiled(hidden, weight, labels, bias, chunk_bytes=4 * 11 * 5)
    b = linear_cross_entropy(hidden, weight, labels, bias)
    torch.testing.assert_close(a, b)
    for x, y in zip(
        torch.autograd.grad(a, (hidden, weight, bias)), torch.autograd.grad(b, (hidden, weight, bias)), strict=True
    ):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_a_second_differentiation_is_an_error(reduction):
    hidden, weight, bias, labels = inputs()
    loss = linear_cross_entropy(hidden, weight, labels, bias, reduction=reduction).sum()
    (grad,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once"):
        grad.sum().backward()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"labels": torch.zeros(17)}, TypeError, "integers"),
        ({"labels": torch.zeros(17, dtype=torch.bool)}, TypeError, "integers"),
        ({"labels": torch.zeros(16, dtype=torch.long)}, ValueError, r"\(17,\)"),
        ({"labels": torch.full((17,), 11)}, ValueError, r"\[0, 11\).*11"),
        ({"labels": torch.full((17,), -1)}, ValueError, "-1"),
        ({"hidden": torch.zeros(17, 6)}, ValueError, "5"),
        ({"hidden": torch.zeros(17, 5, dtype=torch.long)}, TypeError, "floating"),
        ({"weight": torch.zeros(5)}, ValueError, "2 dimensions"),
        ({"bias": torch.zeros(10)}, ValueError, "11"),
        ({"reduction": "avg"}, ValueError, "'avg'"),
        ({"chunk_bytes": 0}, ValueError, "chunk_bytes"),
        ({"ignore_index": 1.5}, TypeError, "ignore_index"),
    ],
)
def test_bad_input(change, error, message):
    hidden, weight, bias, labels = inputs()
    arguments = {"hidden": hidden, "weight": weight, "labels": labels, "bias": bias} | change
    with pytest.raises(error, match=message):
        linear_cross_entropy(**arguments)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("biased", [False, True])
def test_a_vocabulary_of_several_blocks_in_several_chunks(dtype, biased):
    """The scores are computed by blocks of 768 tokens; extreme ones must not overflow or vanish on the way."""
    g = torch.Generator().manual_seed(0)
    hidden = (torch.randn(7, 5, generator=g, dtype=torch.float64) * 30).to(dtype).requires_grad_()
    weight = torch.randn(2000, 5, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    bias = torch.randn(2000, generator=g, dtype=torch.float64).to(dtype).requires_grad_() if biased else None
    labels = torch.tensor([0, 767, 768, -100, 1535, 1999, 3])
    inputs = [hidden, weight] if bias is None else [hidden, weight, bias]
    loss = linear_cross_entropy(hidden, weight, labels, bias, chunk_bytes=2 * 4 * 2000)
    scores = hidden.double() @ weight.double().T + (0 if bias is None else bias.double())
    expected = torch.nn.functional.cross_entropy(scores, labels)
    tolerance = {torch.float64: 1e-10, torch.float32: 1e-4}[dtype]
    torch.testing.assert_close(loss.double(), expected, rtol=tolerance, atol=tolerance)
    for a, b in zip(torch.autograd.grad(loss, inputs), torch.autograd.grad(expected, inputs), strict=True):
        assert (a - b).norm() < tolerance * (1 + b.norm())
