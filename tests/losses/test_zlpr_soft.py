import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kexue.losses import ZLPRLoss, zlpr_loss, zlpr_proba
from kexue.losses import _zlpr_kernel as kernel
from reference import multilabel_soft_labels as reference


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def batch(rows=6, n=11, scale=3.0, dtype=torch.float64, seed=0):
    """Scores and weights; some weights are 0 or 1, the first row has zeros only, the second ones only."""
    g = generator(seed)
    scores = (scale * torch.randn(rows, n, generator=g, dtype=torch.float64)).to(dtype).requires_grad_()
    target = torch.rand(rows, n, generator=g, dtype=torch.float64)
    target[target < 0.2], target[target > 0.8] = 0, 1
    target[0] = 0
    target[1:2] = 1
    return scores, target.to(dtype).requires_grad_()


def exact(scores, target, **options):
    """The formula in float64 on copies, with its gradients by both, for upstream ones."""
    s, t = (x.detach().double().requires_grad_() for x in (scores, target))
    loss = reference.zlpr(s, t, **options)
    return loss.detach(), *torch.autograd.grad(loss.sum(), (s, t))


def made(scores, target, **options):
    loss = zlpr_loss(scores, target, reduction="none", **options)
    return loss.detach(), *torch.autograd.grad(loss.sum(), (scores, target))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("edge", [False, True])
@pytest.mark.parametrize("scale", [3.0, 40.0])
def test_values_and_gradients_of_scores_and_labels_equal_the_formula(masked, edge, scale):
    scores, target = batch(scale=scale)
    mask, threshold = None, None
    if masked:
        mask = torch.rand(6, 11, generator=generator(4)) < 0.6
        target = (target * mask).detach().requires_grad_()
    if edge:
        threshold = torch.randn(6, 1, generator=generator(3), dtype=torch.float64)
    got = made(scores, target, mask=mask, threshold=0.0 if threshold is None else threshold)
    want = exact(scores, target, mask=mask, threshold=None if threshold is None else threshold[:, 0])
    torch.testing.assert_close(got, want)


def test_gradcheck_with_threshold():
    scores, target = batch(4, 6)
    target = (target.detach() * 0.9 + 0.05).requires_grad_()
    edge = torch.randn(4, 1, generator=generator(3), dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda s, t, e: zlpr_loss(s, t, threshold=e, reduction="none"), (scores, target, edge)
    )
    assert torch.autograd.gradcheck(lambda t: zlpr_loss(scores.detach(), t), target)
    assert torch.autograd.gradcheck(lambda e: zlpr_loss(scores.detach(), target.detach(), threshold=e), edge)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [0.1, 3.0, 12.0])
def test_low_precision_is_exact_on_the_rounded_values(dtype, scale):
    scores, target = batch(8, 200, scale, dtype)
    loss, got, _ = made(scores, target)
    expected, want, _ = exact(scores, target)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    error = float((got.double() - want).norm() / want.norm())
    assert error < {torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}[dtype]


@pytest.mark.parametrize("level", [70.0, 95.0, 1e4])
def test_extreme_logits_follow_the_largest_term_with_a_weight(level):
    # Row 0: the large score is a full label, the very negative one is none, so neither counts.
    scores = torch.tensor([[level, -level, 0.5], [level, -level, 0.5], [-level, level, 0.5]], requires_grad=True)
    target = torch.tensor([[1.0, 0.0, 0.5], [0.25, 0.0, 0.0], [0.25, 1.0, 0.0]])
    loss = zlpr_loss(scores, target, reduction="none")
    small = math.log1p(0.5 * math.exp(-0.5)) + math.log1p(0.5 * math.exp(0.5))
    expected = [small, level + math.log(0.75), level + math.log(0.25) + math.log1p(math.exp(0.5))]
    torch.testing.assert_close(loss.detach(), torch.tensor(expected), rtol=1e-6, atol=0)
    (grad,) = torch.autograd.grad(loss.sum(), scores)
    assert torch.isfinite(grad).all()
    torch.testing.assert_close(grad[1:, 0], torch.tensor([1.0, -1.0]))
    assert not grad[0, :2].abs().gt(1e-30).any()


@pytest.mark.parametrize("hidden", [-math.inf, -1e12])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masked_logits_without_weight_contribute_nothing(hidden, dtype):
    scores, target = batch(6, 15, 3.0, dtype)
    out = torch.rand(6, 15, generator=generator(1)) < 0.5
    target = target.detach().masked_fill(out, 0).requires_grad_()
    filled = scores.detach().masked_fill(out, hidden).requires_grad_()
    got, want = made(filled, target), made(scores, target, mask=~out)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(got[0].double(), reference.zlpr(scores, target, mask=~out).detach(), rtol=1e-6, atol=0)
    assert not got[1][out].any()
    assert not got[2][out].any()


def test_a_weight_on_a_masked_logit_is_refused_or_contributes_nothing():
    scores, target = batch(dtype=torch.float32)
    mask = torch.ones(6, 11, dtype=torch.bool)
    mask[2, 3] = False
    target = target.detach().clone()
    target[2, 3] = 1e-3
    want = zlpr_loss(scores, target.masked_fill(~mask, 0), mask=mask)
    for hidden in (-math.inf, -1e12):
        filled = scores.detach().masked_fill(~mask, hidden).requires_grad_()
        with pytest.raises(ValueError, match="positive label must take part"):
            zlpr_loss(filled, target)
        got = zlpr_loss(filled, target, validate=False)
        torch.testing.assert_close(got, want)
        assert torch.isfinite(torch.autograd.grad(got, filled)[0]).all()
    with pytest.raises(ValueError, match="positive label must take part"):
        zlpr_loss(scores, target, mask=mask)


def test_tiny_weights_at_very_negative_scores_are_not_lost():
    scores = torch.tensor([[-100.0, 0.0], [-59.0, 0.0], [-600.0, 0.0]], requires_grad=True)
    target = torch.tensor([[1e-21, 0.0], [1e-38, 0.0], [7e-44, 0.0]], requires_grad=True)  # the last one is subnormal
    loss, grad, _ = made(scores, target)
    expected, want, _ = exact(scores, target)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(grad.double(), want, rtol=1e-5, atol=1e-30)


@pytest.mark.parametrize("scale", [3.0, 70.0, 200.0])
def test_the_gradient_of_labels_is_exact_at_large_scores(scale):
    scores, target = batch(8, 30, scale, torch.float32)
    target = (0.1 + 0.8 * target.detach()).requires_grad_()
    _, _, got = made(scores, target)
    _, _, want = exact(scores, target)
    torch.testing.assert_close(got.double(), want, rtol=2e-6, atol=1e-6)


def test_a_threshold_masks_nothing():
    scores, target = batch(dtype=torch.float32)
    loss = zlpr_loss(scores, target, threshold=1e12, reduction="none")
    expected = torch.where((target > 0).any(1), 1e12, 0.0)
    torch.testing.assert_close(loss, expected)
    assert bool(torch.autograd.grad(loss.sum(), target)[0][:, 0].gt(0).any())


def test_hard_weights_equal_hard_labels():
    scores, _ = batch(dtype=torch.float32, scale=20.0)
    hard = torch.rand(6, 11, generator=generator(2)) < 0.05
    hard[5] = True
    got, want = zlpr_loss(scores, hard.float(), reduction="none"), zlpr_loss(scores, hard, reduction="none")
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)
    torch.testing.assert_close(*(torch.autograd.grad(x.sum(), scores) for x in (got, want)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_sparse_hard_floats_are_found_and_almost_hard_ones_are_not(dtype):
    scores = (4 * torch.randn(5, 64, generator=generator())).to(dtype).requires_grad_()
    hard = torch.zeros(5, 64, dtype=dtype)
    hard[torch.arange(5), torch.arange(5) * 7] = 1
    hard[4] = 0
    assert kernel.labels_of(hard).tolist() == [[0], [7], [14], [21], [-1]]
    almost = hard.clone()
    almost[0, 0] = 1 - torch.finfo(dtype).eps
    dense = hard.clone()
    dense[:, :8] = 1
    for target in (almost, dense):
        assert kernel.labels_of(target) is None
    for target in (hard, almost, dense, -0.0 * hard):
        loss = zlpr_loss(scores, target, reduction="none")
        expected, want, _ = exact(scores, target)
        torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
        (grad,) = torch.autograd.grad(loss.sum(), scores)
        assert float((grad.double() - want).norm() / want.norm()) < max(torch.finfo(dtype).eps, 1e-6)


def test_labels_of_another_dtype_and_stride():
    scores, target = batch(dtype=torch.float32)
    want = zlpr_loss(scores, target)
    turned = target.detach().T.contiguous().T
    torch.testing.assert_close(zlpr_loss(scores, turned), want)
    torch.testing.assert_close(zlpr_loss(scores, target.double()), want)
    low = target.detach().bfloat16()
    torch.testing.assert_close(zlpr_loss(scores, low), zlpr_loss(scores, low.float()))
    three = zlpr_loss(scores.reshape(2, 3, 11), target.reshape(2, 3, 11), reduction="none")
    torch.testing.assert_close(three.mean(), want)


@pytest.mark.parametrize("scale", [1.0, 80.0])
def test_blocks_and_hostile_neighbours_change_nothing(monkeypatch, scale):
    scores, target = batch(9, 20, scale, torch.float32)
    whole = made(scores, target)
    for hostile in (math.nan, math.inf, 1e4, -1e4, -math.inf):
        changed = scores.detach().clone()
        changed[0] = hostile
        got = made(changed.requires_grad_(), target)
        torch.testing.assert_close([x[1:] for x in got], [x[1:] for x in whole], rtol=0, atol=0)
    monkeypatch.setattr(kernel, "BLOCK", 80)
    torch.testing.assert_close(made(scores, target), whole, rtol=1e-6, atol=1e-30)


def test_the_optimum_reproduces_the_labels():
    target = torch.rand(8, generator=generator(), dtype=torch.float64)
    scores = torch.zeros(8, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([scores], lr=1, max_iter=200, tolerance_grad=1e-12, tolerance_change=0.0)

    def closure():
        optimizer.zero_grad()
        loss = zlpr_loss(scores, target)
        loss.backward()
        return loss

    optimizer.step(closure)
    assert float((zlpr_proba(scores.detach()) - target).abs().max()) < 1e-6
    assert float((torch.sigmoid(scores.detach()) - target).abs().max()) > 0.05


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 12), st.floats(0.1, 100.0), st.floats(0.0, 1.0))
def test_convex_in_the_scores_and_stationary_where_the_labels_are_met(seed, n, scale, part):
    g = generator(seed)
    a, b = (scale * torch.randn(n, generator=g, dtype=torch.float64) for _ in range(2))
    target = torch.rand(n, generator=g, dtype=torch.float64)
    between = zlpr_loss(part * a + (1 - part) * b, target)
    chord = part * zlpr_loss(a, target) + (1 - part) * zlpr_loss(b, target)
    assert float(between) <= float(chord) * (1 + 1e-12) + 1e-12
    met = (torch.logit(target, eps=1e-9) / 2).requires_grad_()
    (grad,) = torch.autograd.grad(zlpr_loss(met, target), met)
    assert float(grad.abs().max()) < 1e-7


@pytest.mark.slow
def test_gradient_of_labels_compiles():
    scores, target = batch(dtype=torch.float32)
    compiled = torch.compile(lambda s, t: zlpr_loss(s, t, threshold=0.2), fullgraph=True, backend="aot_eager")
    hard = torch.eye(6, 11, requires_grad=True)  # few ones in each row: as if they were indices
    for labels in (target, hard):
        got, want = compiled(scores, labels), zlpr_loss(scores, labels, threshold=0.2)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(*(torch.autograd.grad(x, (scores, labels)) for x in (got, want)))


@pytest.mark.parametrize("form", ["indices", "bool", "int", "float"])
@pytest.mark.parametrize("prior", ["uniform", "frequencies"])
def test_smoothing_equals_the_loss_of_smoothed_labels(form, prior):
    scores, _ = batch(4, 6, dtype=torch.float32)
    indices = torch.tensor([[0, 5, -1], [2, -1, -1], [-1, -1, -1], [1, 1, 3]])
    hot = torch.zeros(4, 7).scatter(1, indices.masked_fill(indices < 0, 6), 1.0)[:, :6]
    table = torch.tensor([0.5, 0.1, 0.0, 1.0, 0.2, 0.3])
    criterion = ZLPRLoss(
        0.2, label_smoothing=0.1, smoothing_prior=table if prior == "frequencies" else "uniform",
        reduction="none", indices=form == "indices",
    )  # fmt: skip
    target = {"indices": indices, "bool": hot > 0, "int": hot.int(), "float": hot}[form]
    smooth = 0.9 * hot + 0.1 * (table if prior == "frequencies" else 1 / 6)
    loss, want = criterion(scores, target), zlpr_loss(scores, smooth, threshold=0.2, reduction="none")
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(*(torch.autograd.grad(x.sum(), scores) for x in (loss, want)))
    other = ZLPRLoss(label_smoothing=0.1, smoothing_prior=torch.zeros(6)) if prior == "frequencies" else ZLPRLoss()
    other.load_state_dict(criterion.state_dict(), strict=True)


@pytest.mark.parametrize("hidden", [None, -math.inf, -1e12])
def test_smoothing_leaves_masked_labels_alone(hidden):
    scores, target = batch(5, 9, dtype=torch.float32)
    mask = torch.rand(5, 9, generator=generator(8)) < 0.7
    target = target.detach().masked_fill(~mask, 0)
    want = zlpr_loss(scores, (0.8 * target + 0.2 / 9) * mask, mask=mask)
    filled = scores if hidden is None else scores.detach().masked_fill(~mask, hidden).requires_grad_()
    criterion = ZLPRLoss(label_smoothing=0.2)
    loss = criterion(filled, target, mask if hidden is None else None)
    torch.testing.assert_close(loss, want)
    (grad,) = torch.autograd.grad(loss, filled)
    assert not grad[~mask].any()
    wrong = target.masked_fill(~mask, 1.0)
    with pytest.raises(ValueError, match="positive label must take part"):
        criterion(filled, wrong, mask if hidden is None else None)


def test_probabilities():
    scores = torch.tensor([[-3.0, 0.0, 0.5], [200.0, -200.0, 1.0]], dtype=torch.float64)
    torch.testing.assert_close(zlpr_proba(scores), torch.sigmoid(2 * scores))
    edge = torch.tensor([[0.5], [1.0]], dtype=torch.float64)
    torch.testing.assert_close(zlpr_proba(scores, edge), torch.sigmoid(2 * (scores - edge)))
    assert bool(((zlpr_proba(scores, 0.7) > 0.5) == (scores > 0.7)).all())
    assert zlpr_proba(torch.tensor(0.5), 0.5).item() == 0.5
    half = zlpr_proba(torch.tensor([60000.0, -60000.0], dtype=torch.float16))
    assert half.dtype == torch.float16
    assert half.tolist() == [1, 0]
    with pytest.raises(TypeError, match="int64"):
        zlpr_proba(torch.tensor([1]))
    with pytest.raises(ValueError, match=r"got \(2, 3\)"):
        zlpr_proba(scores, torch.ones(2, 3))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"threshold": math.nan}, ValueError, "threshold must be finite"),
        ({"label_smoothing": -0.1}, ValueError, "at least 0"),
        ({"label_smoothing": 1.1}, ValueError, "at most 1; got 1.1"),
        ({"label_smoothing": "much"}, TypeError, "label_smoothing"),
        ({"reduction": "avg"}, ValueError, "'avg'"),
        ({"smoothing_prior": "none"}, ValueError, "'none'"),
        ({"smoothing_prior": torch.tensor([0.5, 1.5])}, ValueError, "from 0.5 to 1.5"),
        ({"smoothing_prior": torch.tensor([0.5, math.nan])}, ValueError, "nan"),
        ({"smoothing_prior": torch.ones(2, 2)}, ValueError, "1 dimensions"),
        ({"smoothing_prior": torch.ones(2, dtype=torch.long)}, TypeError, "int64"),
        ({"smoothing_prior": torch.ones(0)}, ValueError, "at least one"),
        ({"ignore_index": None}, TypeError, "None"),
    ],
)
def test_bad_options_are_rejected(change, error, message):
    with pytest.raises(error, match=message):
        ZLPRLoss(**change)


def test_a_prior_of_another_length_is_rejected():
    with pytest.raises(ValueError, match="each of 3 labels; got 2"):
        ZLPRLoss(label_smoothing=0.1, smoothing_prior=torch.ones(2))(torch.ones(1, 3), torch.ones(1, 3))
