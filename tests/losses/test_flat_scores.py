import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from kexue.losses import contrastive_diagnostics, flat_cross_entropy, lse0
from reference import contrastive as reference


def scores(*shape, dtype=torch.float64, seed=0, spread=3.0):
    g = torch.Generator().manual_seed(seed)
    return (spread * torch.randn(*shape, generator=g, dtype=torch.float64)).to(dtype).requires_grad_()


def by_rows(s, target):
    rows = [reference.log_xi(row[t], row[torch.arange(len(row)) != t]) for row, t in zip(s, target, strict=True)]
    return torch.stack(rows)


@pytest.mark.parametrize("mode", ["flat", "info"])
def test_equals_the_formula_for_any_leading_shape(mode):
    s = scores(2, 3, 5)
    target = torch.tensor([[0, 4, 2], [1, 1, 3]])
    expected = reference.value(by_rows(s.reshape(6, 5), target.reshape(6)), mode)
    loss = flat_cross_entropy(s, target, mode=mode, reduction="none")
    torch.testing.assert_close(loss, expected.view(2, 3))
    upstream = torch.linspace(0.5, 2, 6, dtype=torch.float64).view(2, 3)
    got = torch.autograd.grad((loss * upstream).sum(), s)
    torch.testing.assert_close(got, torch.autograd.grad((expected.view(2, 3) * upstream).sum(), s))
    assert torch.autograd.gradcheck(lambda x: flat_cross_entropy(x, target, mode=mode, reduction="none"), (s,))


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 9), st.integers(0, 10**6), st.floats(0.1, 30))
def test_info_is_cross_entropy_and_flat_gradient_lacks_its_weight(candidates, seed, spread):
    s = scores(4, candidates, seed=seed, spread=spread)
    target = torch.randint(candidates, (4,), generator=torch.Generator().manual_seed(seed))
    info = flat_cross_entropy(s, target, mode="info", reduction="none")
    torch.testing.assert_close(info, F.cross_entropy(s, target, reduction="none"), atol=1e-9, rtol=1e-7)
    v = flat_cross_entropy(s, target, reduction="none")
    flat, weighted = (torch.autograd.grad(x.sum(), s)[0] for x in (v, info))
    torch.testing.assert_close(weighted, flat * torch.sigmoid(v.detach())[:, None])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradient_survives_where_cross_entropy_loses_the_positive(dtype):
    s = torch.tensor([[20.0, 0.5, -0.25, 1.0]], dtype=dtype, requires_grad=True)
    target = torch.tensor([0])
    naive = torch.autograd.grad(F.cross_entropy(s, target), s)[0]
    assert naive[0, 0] == 0
    got = torch.autograd.grad(flat_cross_entropy(s, target), s)[0]
    exact = torch.tensor([[-1.0, *torch.softmax(s.detach().double()[0, 1:], 0)]])
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), exact.double(), rtol=4 * torch.finfo(dtype).eps, atol=0)


def test_excluded_candidates_get_no_gradient():
    s = torch.tensor([[1.0, -math.inf, 2.0], [1.0, -math.inf, -math.inf]], requires_grad=True)
    loss = flat_cross_entropy(s, torch.tensor([0, 0]), mode="info", reduction="none")
    loss.sum().backward()
    loss = loss.detach()
    assert float(loss[0]) == pytest.approx(math.log1p(math.e))
    assert float(loss[1]) == 0
    assert torch.isfinite(s.grad).all()
    assert not s.grad[:, 1].any()


def test_report_changes_the_value_and_not_the_gradient():
    s, target = scores(4, 5), torch.tensor([0, 1, 2, 3])
    shown = flat_cross_entropy(s, target, report="info")
    torch.testing.assert_close(shown, F.cross_entropy(s, target))
    torch.testing.assert_close(torch.autograd.grad(shown, s), torch.autograd.grad(flat_cross_entropy(s, target), s))


@pytest.mark.parametrize("mode", ["flat", "info"])
def test_a_row_without_negatives_is_solved_whatever_is_reported(mode):
    s = torch.tensor([[1.0, -math.inf, -math.inf], [1.0, 2.0, 3.0]], requires_grad=True)
    shown = flat_cross_entropy(s, torch.tensor([0, 0]), mode=mode, report="info", reduction="none")
    assert float(shown[0].detach()) == 0
    shown.sum().backward()
    assert torch.isfinite(s.grad).all()
    assert s.grad[1].all()
    with pytest.raises(ValueError, match=r"row \[0\] are all -inf"):
        flat_cross_entropy(s, torch.tensor([0, 0]), mode=mode, report="flat")
    assert flat_cross_entropy(s, torch.tensor([0, 0]), report="flat", validate=False) == -math.inf


def test_diagnostics_leave_out_excluded_candidates_and_survive_large_scores():
    s = torch.tensor([[1.0, 0.0, -math.inf, 0.0], [1.0, -math.inf, -math.inf, -math.inf]])
    report = contrastive_diagnostics(s, torch.tensor([0, 0]))
    assert report.ess.tolist() == [2.0, 0.0]
    assert report.centred.tolist() == [-1.0, -math.inf]  # log 2 - 1, less the log of 2 negatives
    large = torch.tensor([[0.0, 30000.0, 30000.0, 30001.0]])
    weights = torch.tensor([1.0, 1.0, math.e])
    expected = float(weights.sum() ** 2 / weights.square().sum())
    assert float(contrastive_diagnostics(large, torch.tensor([0])).ess) == pytest.approx(expected, rel=1e-6)


def test_diagnostics_count_what_rounding_loses():
    s = torch.zeros(4, 9)
    s[:, 0] = torch.tensor([0.0, 5.0, 25.0, 40.0])
    report = contrastive_diagnostics(s, torch.zeros(4, dtype=torch.long))
    torch.testing.assert_close(report.xi, 8 * torch.exp(-s[:, 0]))
    torch.testing.assert_close(report.log_xi, math.log(8) - s[:, 0])
    torch.testing.assert_close(report["centred"], -s[:, 0])
    torch.testing.assert_close(report.ess, torch.full((4,), 8.0))
    assert report.pos_gradient_lost == 0.5
    assert contrastive_diagnostics(s.bfloat16(), torch.zeros(4, dtype=torch.long)).pos_gradient_lost == 0.5
    assert contrastive_diagnostics(s.double(), torch.zeros(4, dtype=torch.long)).pos_gradient_lost == 0.25
    s[:, 1] = 4.0
    weights = torch.tensor([math.exp(4.0)] + [1.0] * 7)
    assert float(contrastive_diagnostics(s, torch.zeros(4, dtype=torch.long)).ess[0]) == pytest.approx(
        float(weights.sum() ** 2 / weights.square().sum()), rel=1e-5
    )
    with pytest.raises(KeyError, match="'entropy'"):
        report["entropy"]


@pytest.mark.parametrize(
    ("s", "target", "error", "message"),
    [
        (torch.randn(2, 1), torch.tensor([0, 0]), ValueError, "at least 2 candidates"),
        (torch.tensor(1.0), torch.tensor(0), ValueError, "at least 2 candidates"),
        (torch.randn(2, 3), torch.tensor([0, 3]), ValueError, r"\[0, 3\)"),
        (torch.randn(2, 3), torch.tensor([0]), ValueError, r"\(2,\); got \(1,\)"),
        (torch.randn(2, 3), torch.tensor([0.0, 1.0]), TypeError, "float32"),
        (torch.ones(2, 3, dtype=torch.long), torch.tensor([0, 1]), TypeError, "int64"),
    ],
)
def test_bad_input_is_rejected(s, target, error, message):
    for function in (flat_cross_entropy, contrastive_diagnostics):
        with pytest.raises(error, match=message):
            function(s, target)


def test_lse0_is_exact_for_tiny_huge_and_no_scores():
    u = torch.tensor([[-60.0, -61.0], [500.0, 499.0], [0.5, -math.inf], [-math.inf, -math.inf]], dtype=torch.float64)
    u.requires_grad_()
    got = lse0(u)
    expected = [math.exp(-60) + math.exp(-61), 500 + math.log1p(math.exp(-1)), math.log1p(math.exp(0.5)), 0.0]
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0)
    got.sum().backward()
    assert torch.isfinite(u.grad).all()
    assert float(u.grad[0, 0]) == pytest.approx(math.exp(-60), rel=1e-9)
    assert float(lse0(torch.zeros(0))) == 0
    assert lse0(torch.zeros(3, dtype=torch.float16)).dtype == torch.float32
    assert torch.autograd.gradcheck(lse0, (scores(3, 4),))
