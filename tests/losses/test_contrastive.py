import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from kexue.losses import (
    FlatNCELoss,
    FlatNegativesRankingLoss,
    InfoNCELoss,
    info_nce,
    nt_xent,
)
from reference import contrastive as reference


def pair(rows=7, width=5, dtype=torch.float64, seed=0, noise=1.0):
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(rows, width, generator=g, dtype=torch.float64)
    k = q + noise * torch.randn(rows, width, generator=g, dtype=torch.float64)
    return q.to(dtype).requires_grad_(), k.to(dtype).requires_grad_()


def more(*shape, seed=9):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).requires_grad_()


def with_gradients(loss, expected, inputs, reduction):
    """Two tuples to be compared: value and gradients, for an upstream gradient that differs between rows."""
    if reduction == "none":
        upstream = torch.linspace(0.5, 2.0, len(expected), dtype=torch.float64)
    else:
        expected, upstream = expected.mean() if reduction == "mean" else expected.sum(), torch.tensor(1.7).double()
    return tuple((x, *torch.autograd.grad(x, inputs, upstream)) for x in (loss, expected))


@pytest.mark.parametrize("temperature", [0.5, 0.05, 0.02])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("mode", ["info", "flat"])
@pytest.mark.parametrize("masked", [False, True])
def test_in_batch_negatives_equal_the_formula(temperature, reduction, mode, masked):
    q, k = pair()
    mask = torch.rand(7, 7, generator=torch.Generator().manual_seed(2)) < 0.7 if masked else None
    keywords = {"temperature": temperature, "mode": mode, "margin": 0.2}
    loss = info_nce(q, k, reduction=reduction, negative_mask=mask, **keywords)
    torch.testing.assert_close(
        *with_gradients(loss, reference.info_nce(q, k, mask=mask, **keywords), (q, k), reduction)
    )
    loss = info_nce(q, k, reduction=reduction, negative_mask=mask, symmetric=True, **keywords)
    turned = None if mask is None else mask.T
    both = (reference.info_nce(q, k, mask=mask, **keywords) + reference.info_nce(k, q, mask=turned, **keywords)) / 2
    torch.testing.assert_close(*with_gradients(loss, both, (q, k), reduction))


@pytest.mark.parametrize("temperature", [0.5, 0.02])
@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("mode", ["info", "flat"])
@pytest.mark.parametrize("form", ["shared", "both", "own"])
def test_given_negatives_equal_the_formula(temperature, reduction, mode, form):
    q, k = pair()
    negatives = more(7, 4, 5) if form == "own" else more(4, 5)
    mask = torch.rand(7, 11 if form == "both" else 4, generator=torch.Generator().manual_seed(2)) < 0.7
    mask[:, -1] = True
    keywords = {"temperature": temperature, "mode": mode, "in_batch": form == "both"}
    loss = info_nce(q, k, negatives, reduction=reduction, negative_mask=mask, **keywords)
    torch.testing.assert_close(
        *with_gradients(loss, reference.info_nce(q, k, negatives, mask=mask, **keywords), (q, k, negatives), reduction)
    )


def test_several_positives_average_their_losses():
    q, first = pair()
    second, negatives = more(7, 5, seed=4), more(6, 5)
    loss = info_nce(q, torch.stack([first, second], 1), negatives, temperature=0.3, reduction="none")
    expected = [reference.info_nce(q, k, negatives, temperature=0.3, mode="info") for k in (first, second)]
    torch.testing.assert_close(*with_gradients(loss, sum(expected) / 2, (q, first, second, negatives), "none"))


@pytest.mark.parametrize("temperature", [0.5, 0.02])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("mode", ["info", "flat"])
@pytest.mark.parametrize("rows", [2, 9])
def test_views_equal_the_formula(temperature, reduction, mode, rows):
    q, k = pair(rows)
    loss = nt_xent(q, k, temperature, mode, reduction=reduction)
    torch.testing.assert_close(
        *with_gradients(loss, reference.nt_xent(q, k, temperature=temperature, mode=mode), (q, k), reduction)
    )


@pytest.mark.parametrize("budget", [None, 64])
@pytest.mark.parametrize("rows", [3, 4, 10, 13, 16])
def test_tiles_and_blocks_change_nothing(monkeypatch, budget, rows):
    from kexue.losses import _contrast_kernel as kernel

    q, k = pair(rows, seed=rows)
    negatives = more(5, 5)

    def results():
        made = [
            nt_xent(q, k, 0.3, reduction="none"),
            nt_xent(q, k, 0.02, reduction="none"),
            info_nce(q, k, temperature=0.3, symmetric=True, reduction="none"),
            info_nce(q, k, negatives, temperature=0.3, in_batch=True, reduction="none"),
        ]
        return [(x, torch.autograd.grad(x.square().sum(), (q, k))) for x in made]

    whole = results()
    monkeypatch.setattr(kernel, "TILE", 4)  # 6 rows or more: several tiles
    if budget is not None:
        monkeypatch.setattr(kernel, "BUDGET", budget)
    torch.testing.assert_close(results(), whole)


@pytest.mark.parametrize("mode", ["info", "flat"])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_gradcheck(mode, reduction):
    q, k = pair(4, 3)
    negatives, own = more(3, 3), more(4, 2, 3)
    keywords = {"temperature": 0.5, "mode": mode, "reduction": reduction}
    assert torch.autograd.gradcheck(lambda a, b: info_nce(a, b, **keywords), (q, k))
    assert torch.autograd.gradcheck(lambda a, b: info_nce(a, b, symmetric=True, margin=0.1, **keywords), (q, k))
    assert torch.autograd.gradcheck(lambda a, b, c: info_nce(a, b, c, **keywords), (q, k, negatives))
    assert torch.autograd.gradcheck(lambda a, b, c: info_nce(a, b, c, **keywords), (q, k, own))
    assert torch.autograd.gradcheck(lambda a, b: nt_xent(a, b, **keywords), (q, k))


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 9), st.integers(0, 10**6), st.floats(0.05, 1.0))
def test_flat_gradient_is_the_info_gradient_without_its_weight(rows, seed, temperature):
    q, k = pair(rows, seed=seed)
    v = info_nce(q, k, temperature=temperature, mode="flat", reduction="none")
    flat = torch.autograd.grad(v[0], q, retain_graph=True)[0]
    info = torch.autograd.grad(info_nce(q, k, temperature=temperature, reduction="none")[0], q)[0]
    torch.testing.assert_close(info, flat * torch.sigmoid(v[0].detach()))


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 12), st.integers(0, 10**6))
def test_permuting_the_batch_permutes_the_losses_and_info_is_cross_entropy(rows, seed):
    q, k = pair(rows, seed=seed)
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
    loss = info_nce(q, k, temperature=0.2, reduction="none")
    torch.testing.assert_close(info_nce(q[order], k[order], temperature=0.2, reduction="none"), loss[order])
    views = nt_xent(q, k, 0.2, reduction="none")
    permuted = nt_xent(q[order], k[order], 0.2, reduction="none")
    torch.testing.assert_close(permuted, torch.cat([views[:rows][order], views[rows:][order]]))
    scores = F.normalize(q) @ F.normalize(k).T / 0.2
    torch.testing.assert_close(loss, F.cross_entropy(scores, torch.arange(rows), reduction="none"))


def test_report_changes_the_value_and_not_the_gradient():
    q, k = pair()
    for mode, report in (("flat", "info"), ("info", "flat")):
        for call in (
            lambda **kw: info_nce(q, k, temperature=0.2, **kw),
            lambda **kw: nt_xent(q, k, 0.2, **kw),
            lambda **kw: info_nce(q, k[:, None], k.detach(), temperature=0.2, **kw),
        ):
            shown = call(mode=mode, report=report)
            torch.testing.assert_close(shown, call(mode=report))
            torch.testing.assert_close(torch.autograd.grad(shown, (q, k)), torch.autograd.grad(call(mode=mode), (q, k)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [4, 16, 256])
def test_solved_batches_keep_a_correct_gradient(dtype, rows):
    q, k = pair(rows, 128, dtype, noise=0.1)
    loss = nt_xent(q, k, 0.05)
    got = torch.autograd.grad(1024 * loss, (q, k))
    q64, k64 = (x.detach().double().requires_grad_() for x in (q, k))
    expected = reference.nt_xent(q64, k64, temperature=0.05, mode="flat").mean()
    want = torch.autograd.grad(1024 * expected, (q64, k64))
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 3e-3, torch.float16: 3e-3}[dtype]
    for a, b in zip(got, want, strict=True):
        assert a.dtype == dtype
        assert float((a.double() - b).norm() / b.norm()) < tolerance
    assert loss.dtype == torch.float32
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)


def test_info_mode_keeps_the_value_where_cross_entropy_rounds_to_zero():
    q = torch.eye(4)
    loss = info_nce(q, q, temperature=0.04)
    assert float(F.cross_entropy(q @ q.T / 0.04, torch.arange(4))) == 0
    assert float(loss) == pytest.approx(3 * math.exp(-25), rel=1e-5)


def test_zero_rows_have_no_gradient_and_stay_finite():
    q, k = pair(4, 3, torch.float16)
    with torch.no_grad():
        q[1] = 0
    loss = info_nce(q, k)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(k.grad).all()
    assert not q.grad[1].any()


def test_vectors_whose_squares_overflow_have_the_direction_they_have():
    q, k = (x.detach() for x in pair(dtype=torch.float32))
    negatives = more(7, 3, 5).detach().float()
    plain = info_nce(q, k), nt_xent(q, k), info_nce(q, k, negatives)
    long = 1e20 * q
    torch.testing.assert_close((info_nce(long, k), nt_xent(long, k), info_nce(long, k, negatives)), plain)
    torch.testing.assert_close(info_nce(q, 1e20 * k, 1e20 * negatives), plain[2])


def test_autocast_does_not_lower_the_precision():
    q, k = pair(dtype=torch.float32)
    plain = info_nce(q, k), nt_xent(q, k)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = info_nce(q, k), nt_xent(q, k)
    torch.testing.assert_close(cast, plain, rtol=0, atol=0)


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_differentiating_twice_is_an_error(reduction):
    q, k = pair()
    for loss in (info_nce(q, k, reduction=reduction), nt_xent(q, k, reduction=reduction)):
        (grad,) = torch.autograd.grad(loss.sum(), q, create_graph=True)
        with pytest.raises(RuntimeError, match="differentiable once"):
            (grad.square().sum() + k.sum()).backward()


def test_modules_are_the_functions():
    q, k = pair()
    negatives = more(4, 5)
    for module, mode in ((InfoNCELoss, "info"), (FlatNCELoss, "flat")):
        torch.testing.assert_close(module(0.2)(q, k), info_nce(q, k, temperature=0.2, mode=mode))
        torch.testing.assert_close(
            module(0.2, report="info", margin=0.1)(q, k, negatives),
            info_nce(q, k, negatives, temperature=0.2, mode=mode, report="info", margin=0.1),
        )
    assert "temperature=0.2" in repr(FlatNCELoss(0.2))


def test_ranking_loss_takes_columns_of_features():
    table = torch.nn.Embedding(12, 5).double()
    columns = [{"input_ids": torch.arange(start, start + 4)} for start in (0, 4, 8)]
    loss = FlatNegativesRankingLoss(lambda f: {"sentence_embedding": table(f["input_ids"])}, scale=10.0, report="flat")
    a, b, c = table.weight.split(4)
    expected = reference.info_nce(a, b, c, temperature=0.1, mode="flat", in_batch=True).mean()
    torch.testing.assert_close(loss(columns, labels=None), expected)
    two = reference.info_nce(a, b, temperature=0.1, mode="flat").mean()
    torch.testing.assert_close(loss(iter(columns[:2])), two)
    assert loss.get_config_dict() == {"scale": 10.0, "report": "flat"}
    with pytest.raises(ValueError, match="two columns at least; got 1"):
        loss(columns[:1])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": torch.randn(1, 5), "k": torch.randn(1, 5)}, ValueError, "a batch of 1"),
        ({"negatives": torch.randn(0, 5)}, ValueError, "needs a negative"),
        ({"k": torch.randn(3, 5)}, ValueError, r"\(4, 5\); got \(3, 5\)"),
        ({"negatives": torch.randn(3, 6)}, ValueError, r"got \(3, 6\)"),
        ({"negatives": torch.randn(3, 2, 5)}, ValueError, "4 rows"),
        ({"negatives": torch.randn(4, 2, 5), "in_batch": True}, ValueError, "exclude in_batch"),
        ({"negatives": torch.randn(3, 5), "symmetric": True}, ValueError, "in-batch negatives only"),
        ({"in_batch": False}, ValueError, "must be given"),
        ({"negative_mask": torch.ones(4, 4)}, TypeError, "bool"),
        ({"negative_mask": torch.ones(4, 5, dtype=torch.bool)}, ValueError, r"\(4, 4\); got \(4, 5\)"),
        ({"negative_mask": torch.eye(4) > 0}, ValueError, "row 0"),
        ({"negatives": torch.tensor(1.0)}, ValueError, r"got \(\)"),
        ({"k": torch.randn(4, 0, 5), "negatives": torch.randn(3, 5)}, ValueError, "needs a positive"),
        ({"in_batch": "no"}, TypeError, "'no'"),
        ({"temperature": 0.0}, ValueError, "temperature"),
        ({"temperature": 1e-40}, ValueError, "at least 1e-30"),
        ({"temperature": "low"}, TypeError, "temperature"),
        ({"mode": "flatt"}, ValueError, "'flatt'"),
        ({"report": "both"}, ValueError, "'both'"),
        ({"reduction": "avg"}, ValueError, "'avg'"),
        ({"q": torch.ones(4, 5, dtype=torch.long)}, TypeError, "int64"),
    ],
)
def test_bad_input_is_rejected_with_expected_and_received(change, error, message):
    arguments = {"q": torch.randn(4, 5), "k": torch.randn(4, 5)} | change
    with pytest.raises(error, match=message):
        info_nce(**arguments)


def test_symmetric_mask_must_leave_a_negative_in_both_directions():
    q, k = pair(3)
    mask = torch.tensor([[True, True, False], [False, True, True], [False, True, True]])  # column 0 has no negative
    assert torch.isfinite(info_nce(q, k, negative_mask=mask))
    with pytest.raises(ValueError, match="row 0"):
        info_nce(q, k, negative_mask=mask, symmetric=True)


def test_bad_views_are_rejected():
    with pytest.raises(ValueError, match="1 pair"):
        nt_xent(torch.randn(1, 3), torch.randn(1, 3))
    with pytest.raises(ValueError, match="equal shapes"):
        nt_xent(torch.randn(2, 3), torch.randn(3, 3))
