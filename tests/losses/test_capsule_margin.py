import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kexue.losses import capsule_margin_loss
from reference.capsule_routing import margin_loss


def batch(rows=5, classes=4, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    scores = torch.rand(rows, classes, generator=g, dtype=torch.float64).to(dtype)
    return scores.requires_grad_(), torch.rand(rows, classes, generator=g) < 0.4


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=6),
    st.floats(0, 0.4),
    st.floats(0.5, 1),
    st.floats(0, 2),
)
def test_equals_the_written_out_sum(pairs, low, high, lam):
    scores, targets = zip(*pairs, strict=True)
    got = capsule_margin_loss(torch.tensor([scores]).double(), torch.tensor([targets]), high, low, lam)
    assert float(got) == pytest.approx(margin_loss(scores_in_float32(scores), targets, high, low, lam), abs=1e-12)


def scores_in_float32(scores):
    return torch.tensor(scores).double().tolist()


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_reductions_and_gradient(reduction):
    scores, targets = batch()
    rows = torch.tensor([margin_loss(s.tolist(), t.tolist()) for s, t in zip(scores, targets, strict=True)]).double()
    want = {"none": rows, "mean": rows.mean(), "sum": rows.sum()}[reduction]
    torch.testing.assert_close(capsule_margin_loss(scores, targets, reduction=reduction), want)
    assert torch.autograd.gradcheck(lambda s: capsule_margin_loss(s, targets, reduction=reduction), scores)


def test_targets_of_every_kind_and_leading_shapes():
    scores, targets = batch(6)
    want = capsule_margin_loss(scores, targets)
    for dtype in (torch.long, torch.uint8, torch.float32, torch.bfloat16):
        torch.testing.assert_close(capsule_margin_loss(scores, targets.to(dtype)), want)
    torch.testing.assert_close(capsule_margin_loss(scores.view(2, 3, 4), targets.view(2, 3, 4)), want)
    assert capsule_margin_loss(scores[0], targets[0]).shape == ()
    soft = torch.full_like(scores, 0.3).detach().requires_grad_()
    assert torch.autograd.gradcheck(capsule_margin_loss, (scores, soft))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_is_reduced_in_float32(dtype):
    scores, targets = batch(3000, 8, dtype)
    loss = capsule_margin_loss(scores, targets, reduction="sum")
    loss.backward()
    assert loss.dtype == torch.float32
    assert scores.grad.dtype == dtype
    torch.testing.assert_close(
        loss.double(), capsule_margin_loss(scores.detach().double(), targets, reduction="sum"), rtol=1e-5, atol=0
    )


def test_perfect_scores_cost_nothing_and_no_rows_give_zero():
    targets = torch.tensor([[1, 0], [0, 0]])
    assert capsule_margin_loss(torch.tensor([[0.95, 0.05], [0.1, 0.0]]), targets) == 0
    empty = torch.zeros(0, 3, requires_grad=True)
    loss = capsule_margin_loss(empty, torch.zeros(0, 3))
    loss.backward()
    assert loss == 0


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"scores": [0.5]}, TypeError, "scores must be a tensor; got list"),
        ({"scores": torch.ones(2, 3, dtype=torch.long)}, TypeError, "floating"),
        ({"scores": torch.tensor(0.5)}, ValueError, "classes"),
        ({"targets": [1, 0, 0]}, TypeError, "targets must be a tensor; got list"),
        ({"targets": torch.tensor([0, 1])}, ValueError, r"shape of scores, \(2, 3\); got \(2,\)"),
        ({"targets": torch.full((2, 3), 2)}, ValueError, r"\[0, 1\]; got values from 2.0"),
        ({"targets": torch.full((2, 3), -1)}, ValueError, r"\[0, 1\]"),
        ({"targets": torch.full((2, 3), torch.nan)}, ValueError, "nan"),
        ({"targets": torch.ones(2, 3, dtype=torch.complex64)}, TypeError, "complex64"),
        ({"m_plus": "x"}, TypeError, "m_plus must be a number; got 'x'"),
        ({"m_plus": 0.1}, ValueError, "m_minus must be less than m_plus; got 0.1 and 0.1"),
        ({"m_minus": -0.1}, ValueError, "m_minus"),
        ({"lam": -1}, ValueError, "lam must be at least 0"),
        ({"lam": torch.nan}, ValueError, "lam must be finite"),
        ({"reduction": "max"}, ValueError, "'none', 'mean', 'sum'; got 'max'"),
    ],
)
def test_bad_input_is_refused(change, error, message):
    good = {"scores": torch.rand(2, 3), "targets": torch.zeros(2, 3)}
    with pytest.raises(error, match=message):
        capsule_margin_loss(**{**good, **change})


def test_inputs_stay_as_they_are():
    scores, targets = batch()
    before = scores.detach().clone(), targets.clone()
    capsule_margin_loss(scores, targets).backward()
    assert torch.equal(scores, before[0])
    assert torch.equal(targets, before[1])
