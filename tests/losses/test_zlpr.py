import math
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from kexue.losses import ZLPRLoss, zlpr_loss
from kexue.losses import _zlpr_kernel as kernel
from reference import multilabel_softmax as reference

FORMS = ["bool", "int", "float", "indices"]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def batch(rows=7, n=12, scale=3.0, dtype=torch.float64, seed=0):
    """Scores and the labels of each row; the first row has none, the second has all."""
    g = generator(seed)
    scores = (scale * torch.randn(rows, n, generator=g, dtype=torch.float64)).to(dtype).requires_grad_()
    labels = [torch.randperm(n, generator=g)[: 1 + i % 4].tolist() for i in range(rows)]
    labels[0] = []
    if rows > 1:
        labels[1] = list(range(n))
    return scores, labels


def as_target(labels, n, form, dtype=torch.float64):
    """The labels as a target of one of the forms, with padding, disorder and repetition among the indices."""
    if form == "indices":
        width = max((len(x) for x in labels), default=0) + 2
        padded = [([-1, *x, *x[:1]] + [-1] * width)[:width] for x in labels]
        return torch.tensor(padded, dtype=torch.long).reshape(len(labels), width)
    target = torch.zeros(len(labels), n, dtype=torch.bool)
    for row, x in zip(target, labels, strict=True):
        row[x] = True
    return target.to({"bool": torch.bool, "int": torch.int32, "float": dtype}[form])


def loss_of(scores, labels, form, **options):
    target = as_target(labels, scores.shape[-1], form, scores.dtype)
    return zlpr_loss(scores, target, indices=form == "indices", **options)


def relative(value, exact):
    return float((value.detach().double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("threshold", ["none", "number", "scalar", "rows"])
@pytest.mark.parametrize("masked", [False, True])
def test_values_and_gradients_equal_the_formula(form, reduction, threshold, masked):
    scores, labels = batch()
    edge = {
        "none": 0.0,
        "number": 0.7,
        "scalar": torch.tensor(0.7, dtype=torch.float64, requires_grad=True),
        "rows": torch.randn(7, 1, generator=generator(3), dtype=torch.float64).requires_grad_(),
    }[threshold]
    mask = None
    if masked:
        mask = torch.rand(7, 12, generator=generator(4)) < 0.6
        labels = [[j for j in x if mask[i, j]] for i, x in enumerate(labels)]
    loss = loss_of(scores, labels, form, threshold=edge, mask=mask, reduction=reduction)
    edges = edge.expand(7, 1).squeeze(1) if isinstance(edge, torch.Tensor) else torch.full((7,), edge)
    expected = reference.zlpr(scores, labels, edges.double(), mask)
    upstream = torch.linspace(-0.5, 2.0, 7, dtype=torch.float64) if reduction == "none" else torch.tensor(1.7).double()
    expected = {"none": expected, "mean": expected.mean(), "sum": expected.sum()}[reduction]
    inputs = (scores, edge) if isinstance(edge, torch.Tensor) else (scores,)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(
        torch.autograd.grad(loss, inputs, upstream), torch.autograd.grad(expected, inputs, upstream)
    )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("threshold", [0.0, 0.3])
def test_gradcheck(form, threshold):
    scores, labels = batch(4, 6)
    edge = torch.full((4, 1), threshold, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s: loss_of(s, labels, form, reduction="none"), scores)
    assert torch.autograd.gradcheck(lambda s, e: loss_of(s, labels, form, threshold=e), (scores, edge))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [0.1, 8.0, 80.0, 1e4])
def test_any_finite_logits_are_exact_on_the_rounded_values(form, dtype, scale):
    scores, labels = batch(9, 300, scale, dtype)
    loss = loss_of(scores, labels, form, reduction="none")
    wide = scores.detach().double().requires_grad_()
    expected = reference.zlpr(wide, labels)
    assert loss.dtype == torch.float32
    assert float(((loss.double() - expected) / expected).detach().abs().max()) < 1e-6
    (got,), (want,) = torch.autograd.grad(loss.sum(), scores), torch.autograd.grad(expected.sum(), wide)
    assert got.dtype == dtype
    assert relative(got, want) < {torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}[dtype]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("level", [12.0, 16.0, 30.0, 80.0, 1e4])
def test_confident_positives_keep_the_value_and_the_sign_of_the_gradient(form, level):
    n, labels = 2000, [[3, 8, 900, 1999, 4]] * 3
    scores = torch.randn(3, n, generator=generator()) - 6
    scores[:, labels[0]] = level
    scores.requires_grad_()
    loss = loss_of(scores, labels, form, reduction="none")
    wide = scores.detach().double().requires_grad_()
    expected = reference.zlpr(wide, labels)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    (got,), (want,) = torch.autograd.grad(loss.sum(), scores), torch.autograd.grad(expected.sum(), wide)
    assert relative(got, want) < 1e-6
    assert bool((got[:, labels[0]] <= 0).all())


@pytest.mark.parametrize("form", FORMS)
def test_solved_rows_keep_relative_precision(form):
    scores = torch.full((1, 50), -30.0)
    scores[0, 7] = 31.0
    scores.requires_grad_()
    loss = loss_of(scores, [[7]], form)
    assert float(loss.detach()) == pytest.approx(49 * math.exp(-30) + math.exp(-31), rel=1e-6, abs=0)
    (grad,) = torch.autograd.grad(loss, scores)
    assert float(grad[0, 7]) == pytest.approx(-math.exp(-31), rel=1e-5, abs=0)
    assert float(grad[0, 0]) == pytest.approx(math.exp(-30), rel=1e-5, abs=0)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("hidden", [-math.inf, -1e12])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_masked_logits_contribute_nothing(form, hidden, dtype):
    scores, labels = batch(6, 15, 3.0, dtype, seed=2)
    labels[1] = [0, 3]
    out = torch.rand(6, 15, generator=generator(1)) < 0.5
    labels = [[j for j in x if not out[i, j]] for i, x in enumerate(labels)]
    out[4] = True  # a row that is masked completely
    labels[4] = []
    filled = scores.detach().masked_fill(out, hidden if dtype != torch.float16 else -math.inf).requires_grad_()
    by_logit = loss_of(filled, labels, form, reduction="none")
    by_mask = loss_of(scores, labels, form, reduction="none", mask=~out)
    torch.testing.assert_close(by_logit.double(), reference.zlpr(scores, labels, mask=~out), rtol=1e-6, atol=1e-12)
    torch.testing.assert_close(by_logit, by_mask)
    assert float(by_logit[4].detach()) == 0
    a, b = torch.autograd.grad(by_logit.sum(), filled)[0], torch.autograd.grad(by_mask.sum(), scores)[0]
    torch.testing.assert_close(a, b)
    assert not a[out].any()


@pytest.mark.parametrize("form", FORMS)
def test_a_positive_that_is_masked_is_refused_or_contributes_nothing(form):
    scores, labels = torch.randn(2, 6, generator=generator()), [[1, 2], [0]]
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[0, 2] = False
    for hidden in (-math.inf, -1e12):
        filled = scores.masked_fill(~mask, hidden).requires_grad_()
        with pytest.raises(ValueError, match="positive label must take part"):
            loss_of(filled, labels, form)
        lenient = loss_of(filled, labels, form, validate=False, reduction="none")
        torch.testing.assert_close(lenient.double(), reference.zlpr(scores, labels, mask=mask), rtol=1e-6, atol=1e-6)
        assert float(torch.autograd.grad(lenient.sum(), filled)[0][0, 2]) == 0
    with pytest.raises(ValueError, match="positive label must take part"):
        loss_of(scores, labels, form, mask=mask)


@pytest.mark.parametrize("form", FORMS)
def test_rows_without_positives_or_without_negatives(form):
    scores = torch.tensor([[0.5, -1.0], [0.5, -1.0]], requires_grad=True)
    loss = loss_of(scores, [[], [0, 1]], form, reduction="none")
    expected = [math.log(1 + math.exp(0.5) + math.exp(-1)), math.log(1 + math.exp(-0.5) + math.exp(1))]
    torch.testing.assert_close(loss.detach(), torch.tensor(expected))
    (grad,) = torch.autograd.grad(loss.sum(), scores)
    assert bool((grad[0] > 0).all())
    assert bool((grad[1] < 0).all())


@pytest.mark.parametrize("form", FORMS)
def test_no_rows_and_no_labels(form):
    scores, none = torch.randn(0, 4, requires_grad=True), torch.randn(2, 3, 4, requires_grad=True)
    loss = loss_of(scores, [], form)
    loss.backward()
    assert float(loss.detach()) == 0
    assert loss_of(scores, [], form, reduction="none").shape == (0,)
    sparse = zlpr_loss(none, torch.empty(2, 3, 0, dtype=torch.long), indices=True)
    torch.testing.assert_close(sparse, zlpr_loss(none, torch.zeros(2, 3, 4, dtype=torch.bool)))


@pytest.mark.parametrize("form", FORMS)
def test_leading_shapes_and_strides_change_nothing(form):
    scores, labels = batch(6, 10)
    target = as_target(labels, 10, form)
    whole = zlpr_loss(scores, target, indices=form == "indices", reduction="none")
    (want,) = torch.autograd.grad(whole.sum(), scores)
    odd = torch.empty(10, 2, 6, dtype=torch.float64)
    odd[:, 0] = scores.detach().T
    strided = odd[:, 0].T.unflatten(0, (3, 2))
    assert not strided.is_contiguous()
    strided.requires_grad_()
    wide = torch.stack([target, target], -1)[..., 0].unflatten(0, (3, 2))  # not contiguous either
    mask = torch.ones(1, 10, dtype=torch.bool)
    loss = zlpr_loss(strided, wide, indices=form == "indices", reduction="none", mask=mask)
    assert loss.shape == (3, 2)
    torch.testing.assert_close(loss.flatten(), whole)
    torch.testing.assert_close(torch.autograd.grad(loss.sum(), strided)[0].reshape(6, 10), want)
    single = torch.stack([
        zlpr_loss(s, t, indices=form == "indices") for s, t in zip(scores, target, strict=True)
    ])  # fmt: skip
    torch.testing.assert_close(single, whole)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_change_nothing(monkeypatch, form, dtype):
    scores, labels = batch(9, 20, 30.0, dtype)

    def both():
        loss = loss_of(scores, labels, form, reduction="none")
        return loss, *torch.autograd.grad(loss.sum(), scores)

    whole = both()
    monkeypatch.setattr(kernel, "BLOCK", 80)
    tolerance = 1e-6 if dtype == torch.float32 else 8e-3
    torch.testing.assert_close(both(), whole, rtol=tolerance, atol=1e-30)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("hostile", [math.nan, math.inf, 1e4, -1e4, -math.inf])
def test_a_row_does_not_feel_its_neighbours(form, hostile):
    scores, labels = batch(4, 20, 2.0, torch.float32)
    changed = scores.detach().clone()
    changed[0] = hostile  # has no positives
    changed.requires_grad_()
    results = []
    for x in (scores, changed):
        loss = loss_of(x, labels, form, reduction="none", validate=False)
        results.append((loss[1:], torch.autograd.grad(loss[1:].sum(), x)[0][1:]))
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_nan_is_not_hidden():
    scores, labels = batch(3, 6)
    with torch.no_grad():
        scores[1, 2], scores[2, labels[2][0]] = math.nan, math.nan
    for form in FORMS:
        loss = loss_of(scores, labels, form, reduction="none", validate=False)
        assert loss.isnan().tolist() == [False, True, True]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 30), st.floats(0.01, 60.0))
def test_properties_for_random_rows(seed, n, scale):
    g = generator(seed)
    scores = scale * torch.randn(5, n, generator=g, dtype=torch.float64)
    target = torch.rand(5, n, generator=g) < 0.3
    scores.requires_grad_()
    loss = zlpr_loss(scores, target, reduction="none")
    bce = F.binary_cross_entropy_with_logits(scores, target.double(), reduction="none").sum(1)
    assert bool((loss <= bce * (1 + 1e-9) + 1e-12).all())
    (grad,) = torch.autograd.grad(loss.sum(), scores)
    assert bool((grad.clamp(min=0).sum(1) <= 1 + 1e-12).all())
    assert bool((grad.clamp(max=0).sum(1) >= -1 - 1e-12).all())
    assert bool((grad[target] <= 0).all())
    assert bool((grad[~target] >= 0).all())
    shift = torch.randn(5, 1, generator=g, dtype=torch.float64)
    torch.testing.assert_close(zlpr_loss(scores + shift, target, threshold=shift, reduction="none"), loss)
    order = torch.randperm(n, generator=g)
    torch.testing.assert_close(zlpr_loss(scores[:, order], target[:, order], reduction="none"), loss)


def test_the_loss_of_one_label_is_cross_entropy_with_a_class_at_the_threshold():
    scores, label = batch(5, 8)[0], torch.randint(8, (5, 1), generator=generator(1))
    got = zlpr_loss(scores, label, indices=True, threshold=0.4, reduction="none")
    # log(1 + sum over pairs of e^{s_i - s_j} + sum over negatives of e^{s_i - s_0} + e^{s_0 - s_j})
    apart = torch.exp(0.4 - scores.gather(1, label)[:, 0])
    below = torch.exp(scores - 0.4).scatter(1, label, 0).sum(1)
    pairs = torch.exp(F.cross_entropy(scores, label[:, 0], reduction="none"))
    torch.testing.assert_close(got, torch.log(pairs + below + apart))


def test_class_zero_and_another_padding():
    scores, labels = batch(5, 9)
    labels[1] = [0]
    padded = as_target(labels, 9, "indices")
    expected = reference.zlpr(scores, labels)
    torch.testing.assert_close(zlpr_loss(scores, padded, indices=True, reduction="none"), expected)
    for dtype in (torch.int32, torch.uint8, torch.uint16):
        other = padded.masked_fill(padded == -1, 99).to(dtype)
        torch.testing.assert_close(zlpr_loss(scores, other, indices=True, ignore_index=99, reduction="none"), expected)
    reserved = padded.masked_fill(padded == -1, 0)  # the published form: class 0 is padding
    without = [[j for j in x if j] for x in labels]
    torch.testing.assert_close(
        zlpr_loss(scores, reserved, indices=True, ignore_index=0, reduction="none"), reference.zlpr(scores, without)
    )


def test_inputs_are_left_alone_and_backward_runs_again():
    scores, labels = batch(5, 9, dtype=torch.float32)
    mask = torch.ones(5, 9, dtype=torch.bool)
    for form in FORMS:
        target = as_target(labels, 9, form, torch.float32)
        before = scores.detach().clone(), target.clone(), mask.clone()
        loss = zlpr_loss(scores, target, indices=form == "indices", mask=mask, threshold=0.2)
        first = torch.autograd.grad(loss, scores, retain_graph=True)[0]
        kept = first.clone()
        second = torch.autograd.grad(loss * 3, scores, retain_graph=True)[0]
        third = torch.autograd.grad(loss, scores)[0]
        torch.testing.assert_close(second, 3 * kept)
        torch.testing.assert_close(third, kept)
        assert torch.equal(first, kept)
        for x, y in zip((scores.detach(), target, mask), before, strict=True):
            assert torch.equal(x, y)


def test_two_threads_may_run_backward_through_one_graph(monkeypatch):
    scores, labels = batch(dtype=torch.float32)
    loss = loss_of(scores, labels, "indices")
    made, finish = [], kernel.finish

    def gradient():
        made.append(torch.autograd.grad(loss, scores, retain_graph=True)[0])

    def interrupted(*args):
        monkeypatch.setattr(kernel, "finish", finish)
        other = threading.Thread(target=gradient)
        other.start()
        other.join()
        finish(*args)

    monkeypatch.setattr(kernel, "finish", interrupted)
    gradient()
    want = torch.autograd.grad(loss_of(scores, labels, "indices"), scores)[0]
    torch.testing.assert_close(made, [want] * 2)


def test_without_gradient_no_buffer_is_made(monkeypatch):
    scores, labels = batch(5, 9)
    expected = loss_of(scores, labels, "indices").detach()

    def forbidden(*_):
        raise AssertionError("a gradient was prepared")

    monkeypatch.setattr("kexue.losses.zlpr.prepare", forbidden)
    with torch.no_grad():
        torch.testing.assert_close(loss_of(scores, labels, "indices"), expected)
    torch.testing.assert_close(loss_of(scores.detach(), labels, "indices"), expected)


def test_autocast_does_not_lower_the_precision():
    scores, labels = batch(5, 9, dtype=torch.float32)
    for form in FORMS:
        plain = loss_of(scores, labels, form)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            cast = loss_of(scores, labels, form)
        torch.testing.assert_close(cast, plain, rtol=0, atol=0)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_differentiating_twice_is_an_error(form, dtype):
    scores, labels = batch(dtype=dtype)
    loss = loss_of(scores, labels, form)
    (grad,) = torch.autograd.grad(loss, scores, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        grad.square().sum().backward()


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_compiles_as_one_graph_and_gives_the_same(form):
    scores, labels = batch(dtype=torch.float32)
    edge = torch.full((7, 1), 0.3, requires_grad=True)
    mask = torch.ones(7, 12, dtype=torch.bool)
    target = as_target(labels, 12, form, torch.float32)

    def function(s, e):
        return zlpr_loss(s, target, indices=form == "indices", threshold=e, mask=mask)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    if form == "indices":  # torch.compile makes a number that changes between calls a symbol
        for number in (0.1, 0.2, 0.3):
            torch.testing.assert_close(compiled(scores, number), function(scores, number))
    value, expected = compiled(scores, edge), function(scores, edge)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(
        torch.autograd.grad(value, (scores, edge)), torch.autograd.grad(expected, (scores, edge))
    )


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"scores": [1.0]}, TypeError, "scores must be a tensor; got list"),
        ({"scores": torch.ones(2, 4, dtype=torch.long)}, TypeError, "int64"),
        ({"scores": torch.tensor(1.0)}, ValueError, r"at least one label; got shape \(\)"),
        ({"scores": torch.ones(2, 0)}, ValueError, r"got shape \(2, 0\)"),
        ({"target": [[1]]}, TypeError, "target must be a tensor; got list"),
        ({"target": torch.ones(2, 4, dtype=torch.complex64)}, TypeError, "complex64"),
        ({"target": torch.ones(2, 3, dtype=torch.bool)}, ValueError, r"\(2, 4\); got \(2, 3\)"),
        ({"target": torch.ones(2, 3, dtype=torch.long)}, ValueError, "indices=True"),
        ({"target": torch.full((2, 4), 2)}, ValueError, "from 2 to 2"),
        ({"target": torch.full((2, 4), -1)}, ValueError, "from -1 to -1"),
        ({"target": torch.full((2, 4), 1.5)}, ValueError, "from 1.5 to 1.5"),
        ({"target": torch.full((2, 4), math.nan)}, ValueError, "nan"),
        ({"target": torch.ones(2, 1), "indices": True}, TypeError, "float32"),
        ({"target": torch.ones(2, 1, dtype=torch.bool), "indices": True}, TypeError, "bool"),
        ({"target": torch.ones(2, dtype=torch.long), "indices": True}, ValueError, r"\(2, 'k'\); got \(2,\)"),
        ({"target": torch.ones(3, 1, dtype=torch.long), "indices": True}, ValueError, r"got \(3, 1\)"),
        (
            {"target": torch.tensor([[0], [4]]), "indices": True},
            ValueError,
            "be -1; got values from 0 to 4",
        ),
        ({"target": torch.tensor([[0], [-2]]), "indices": True}, ValueError, "from -2 to 0"),
        ({"threshold": math.inf}, ValueError, "threshold must be finite"),
        ({"threshold": "low"}, TypeError, "threshold"),
        ({"threshold": torch.ones(2)}, ValueError, r"\(2, 1\); got \(2,\)"),
        ({"threshold": torch.ones(2, 4)}, ValueError, r"got \(2, 4\)"),
        ({"threshold": torch.ones(1, 2, 1)}, ValueError, r"got \(1, 2, 1\)"),
        ({"threshold": torch.ones(2, 1, dtype=torch.long)}, TypeError, "int64"),
        ({"mask": torch.ones(2, 4)}, TypeError, "float32"),
        ({"mask": torch.ones(2, 3, dtype=torch.bool)}, ValueError, r"\(2, 4\); got \(2, 3\)"),
        ({"reduction": "avg"}, ValueError, "'avg'"),
        ({"ignore_index": 1.5}, TypeError, "ignore_index must be an integer; got 1.5"),
        ({"ignore_index": True}, TypeError, "True"),
    ],
)
def test_bad_input_is_rejected_with_expected_and_received(change, error, message):
    arguments = {"scores": torch.randn(2, 4), "target": torch.ones(2, 4, dtype=torch.bool)} | change
    scores, target = arguments.pop("scores"), arguments.pop("target")
    with pytest.raises(error, match=message):
        zlpr_loss(scores, target, **arguments)


def test_module_is_the_function_and_learns_its_threshold():
    scores, labels = batch(dtype=torch.float32)
    sparse, dense = as_target(labels, 12, "indices"), as_target(labels, 12, "bool")
    mask = torch.rand(7, 12, generator=generator(5)) < 2
    torch.testing.assert_close(ZLPRLoss()(scores, dense), zlpr_loss(scores, dense))
    torch.testing.assert_close(
        ZLPRLoss(0.4, reduction="sum", indices=True)(scores, sparse, mask),
        zlpr_loss(scores, sparse, indices=True, threshold=0.4, reduction="sum", mask=mask),
    )
    learned = ZLPRLoss(0.4, learn_threshold=True)
    learned(scores, dense).backward()
    edge = torch.tensor(0.4, requires_grad=True)
    zlpr_loss(scores, dense, threshold=edge).backward()
    torch.testing.assert_close(learned.threshold.grad, edge.grad)
    other = ZLPRLoss(0.0, learn_threshold=True)
    other.load_state_dict(learned.state_dict())
    assert float(other.threshold.detach()) == pytest.approx(0.4)
    assert "threshold=0.4" in repr(learned)
    assert not list(ZLPRLoss(0.4).parameters())
