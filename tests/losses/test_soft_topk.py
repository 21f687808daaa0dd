import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kexue.losses import soft_topk
from reference import smooth_approximations as reference


def scores(*shape, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype).requires_grad_()


def compare(got, expected, *inputs, **tolerance):
    torch.testing.assert_close(got, expected, **tolerance)
    upstream = torch.linspace(-1, 2, got.numel(), dtype=got.dtype).view(got.shape)
    torch.testing.assert_close(
        torch.autograd.grad(got, inputs, upstream), torch.autograd.grad(expected, inputs, upstream), **tolerance
    )


@pytest.mark.parametrize("K", [0.01, 1.0, 8.0])
@pytest.mark.parametrize(("n", "k"), [(2, 1), (7, 1), (7, 3), (7, 4), (7, 6), (300, 20), (300, 290)])
def test_value_and_gradient_equal_bisection(n, k, K):
    x = scores(5, n)
    compare(soft_topk(x, k, K=K), torch.stack([reference.topk(row, k, K) for row in x]), x)


@pytest.mark.parametrize("K", [0.5, 4.0])
@pytest.mark.parametrize("k", [0, 1, 3, 7])
def test_the_recursion_is_the_article_s(k, K):
    x = scores(5, 7)
    got = soft_topk(x, k, K=K, method="recursive")
    torch.testing.assert_close(got.sum(-1), torch.full((5,), float(k), dtype=torch.float64))
    if k:
        compare(got, torch.stack([reference.topk_recursive(row, k, K) for row in x]), x)


def test_the_recursion_inverts_the_order_where_the_default_keeps_it():
    x = torch.tensor([2.0, 1.0, 4.0, 5.0, 3.0])
    recursive, default = soft_topk(x, 2, K=4.0, method="recursive"), soft_topk(x, 2, K=4.0)
    assert float(recursive[2]) == pytest.approx(0.995, abs=5e-4)
    assert float(recursive[3]) == pytest.approx(0.982, abs=5e-4)
    assert default[3] > default[2] > default[4] > default[0] > default[1]
    spread = 16 * scores(200, 10).detach()
    assert float(soft_topk(spread, 9, method="recursive").max()) > 1.5
    assert float(soft_topk(spread, 9).max()) <= 1


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10**6),
    st.integers(1, 40),
    st.floats(0, 1),
    st.floats(-4, 6).map(lambda e: 10**e),
    st.sampled_from(["normal", "heavy", "ties", "outlier"]),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_sum_range_order_and_symmetry_hold_for_all_rows(seed, n, share, K, kind, dtype):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(3, n, generator=g, dtype=torch.float64)
    if kind == "heavy":
        x = x / torch.randn(3, n, generator=g, dtype=torch.float64)
    elif kind == "ties":
        x = x.round()
    elif kind == "outlier":
        x[:, 0] += 1e4
    x = x.to(dtype)
    k = round(share * n)
    p = soft_topk(x, k, K=K)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(
        p.double().sum(-1), torch.full((3,), float(k), dtype=torch.float64), rtol=8 * eps, atol=20 * eps
    )
    assert ((p >= 0) & (p <= 1)).all()
    order = x.argsort(-1)
    rise = p.gather(-1, order).diff(dim=-1)
    assert (rise >= -2 * eps).all()  # vector and scalar units may round the exponential differently
    equal = x.gather(-1, order).diff(dim=-1) == 0
    assert (rise[equal] <= 2 * eps).all()
    torch.testing.assert_close(1 - soft_topk(-x, n - k, K=K), p, rtol=0, atol=1e-5 if dtype == torch.float32 else 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e10, 1e30])
def test_magnitudes_far_from_one_are_solved(scale, dtype):
    x = (scores(4, 50).detach() * scale).to(dtype).requires_grad_()
    for K in (1e-30, 1e-6, 1.0, 1e6, 1e30):
        p = soft_topk(x, 7, K=K)
        torch.testing.assert_close(p.sum(-1), torch.full((4,), 7.0, dtype=dtype))
        (grad,) = torch.autograd.grad((p * torch.arange(50)).sum(), x)
        assert torch.isfinite(grad).all()
    hard = torch.zeros(4, 50, dtype=dtype).scatter(1, x.topk(7).indices, 1.0)
    torch.testing.assert_close(soft_topk(x, 7, K=min(1e5 / scale, 1e30)), hard, rtol=0, atol=1e-5)


def test_equal_scores_share_and_ties_at_the_threshold_stay_equal():
    for value, K in ((0.0, 1.0), (3.0, 1e6), (-1e30, 1e30)):
        torch.testing.assert_close(soft_topk(torch.full((2, 10), value), 3, K=K), torch.full((2, 10), 0.3))
    p = soft_topk(torch.tensor([1e10, 1e10, 1e10, 0.0, -1e10]), 2, K=1e6)
    torch.testing.assert_close(p, torch.tensor([2 / 3, 2 / 3, 2 / 3, 0, 0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("far", [1e8, 1e16, 1e25, 1e30])
def test_entries_far_away_leave_the_others_as_they_are(far, dtype):
    near = torch.tensor([0.0, 0.0, 1.0, 0.5, 1.0, 1.0, 0.0, -0.25], dtype=dtype)
    above, below = torch.full((3,), far, dtype=dtype), torch.full((2,), -far, dtype=dtype)
    rows = torch.cat([near, above, below]).expand(7, -1)
    for K in (0.001, 0.1, 1.0, 10.0, 1e6):
        if K * far < 1e4:
            continue
        expected = soft_topk(near.expand(7, -1), torch.arange(1, 8), K=K)
        p = soft_topk(rows, torch.arange(4, 11), K=K)
        torch.testing.assert_close(p[:, :8], expected, rtol=0, atol=1e-5 if dtype == torch.float32 else 1e-12)
        assert p[:, 8:11].eq(1).all()
        assert not p[:, 11:].any()


def test_the_threshold_may_be_among_the_far_ones():
    for dtype in (torch.float32, torch.float64):
        x = torch.tensor([-1e30, 1e30, -1e30, 0.0, -1e30], dtype=dtype)
        torch.testing.assert_close(soft_topk(x, 3, K=10.0), torch.tensor([1, 3, 1, 3, 1], dtype=dtype) / 3)
        torch.testing.assert_close(soft_topk(-x, 2, K=10.0), torch.tensor([2, 0, 2, 0, 2], dtype=dtype) / 3)


@pytest.mark.parametrize("method", ["sigmoid", "recursive"])
def test_nothing_everything_and_single_entries(method):
    x = scores(3, 4)
    for k in (0, 4):
        p = soft_topk(x, k, method=method)
        if k == 0 or method == "sigmoid":
            torch.testing.assert_close(p, torch.full((3, 4), k / 4, dtype=torch.float64))
            assert not torch.autograd.grad((p * torch.arange(4)).sum(), x, allow_unused=True, materialize_grads=True)[
                0
            ].any()
    assert soft_topk(x[:, :1], 1, method=method).eq(1).all()
    assert soft_topk(x[:0], 2, method=method).shape == (0, 4)
    torch.testing.assert_close(soft_topk(x[0], 2, method=method), soft_topk(x, 2, method=method)[0])


@pytest.mark.parametrize("method", ["sigmoid", "recursive"])
@pytest.mark.parametrize("k", [1, 2, 3])
def test_masked_entries_have_no_weight_and_no_gradient(method, k):
    x = scores(2, 6)
    kept = torch.tensor([[0, 1, 3, 5], [1, 2, 3, 4]])
    masked = torch.full((2, 6), -math.inf, dtype=torch.float64).scatter(1, kept, x.detach().gather(1, kept))
    masked.requires_grad_()
    short = x.detach().gather(1, kept).requires_grad_()
    p = soft_topk(masked, k, K=2.0, method=method)
    compared = soft_topk(short, k, K=2.0, method=method)
    torch.testing.assert_close(p.gather(1, kept), compared)
    torch.testing.assert_close(p.sum(1), compared.sum(1))
    weights = torch.arange(6).double().expand(2, 6)
    (grad,) = torch.autograd.grad((p * weights).sum(), masked)
    (expected,) = torch.autograd.grad((compared * weights.gather(1, kept)).sum(), short)
    torch.testing.assert_close(grad, torch.zeros_like(grad).scatter(1, kept, expected))


def test_each_row_may_have_its_own_k():
    x = scores(2, 3, 6)
    k = torch.tensor([[0, 1, 2], [4, 5, 6]])
    p = soft_topk(x, k, K=2.0)
    for i in range(2):
        for j in range(3):
            torch.testing.assert_close(p[i, j], soft_topk(x[i, j], int(k[i, j]), K=2.0))
    torch.testing.assert_close(soft_topk(x.transpose(0, 2), k.T, 0, 2.0), p.transpose(0, 2))
    assert torch.equal(soft_topk(x, torch.tensor(2)), soft_topk(x, 2))


def test_blocks_change_nothing(monkeypatch):
    import importlib

    module = importlib.import_module("kexue.losses.soft_topk")
    x = scores(9, 11)
    whole = soft_topk(x, 4)
    monkeypatch.setattr(module, "BLOCK", 25)
    torch.testing.assert_close(soft_topk(x, 4), whole, rtol=1e-12, atol=0)


def test_gradcheck_and_second_derivatives():
    x = scores(3, 5)
    for k in (1, 2, 4):
        assert torch.autograd.gradcheck(lambda v, k=k: soft_topk(v, k, K=1.5), (x,))
        assert torch.autograd.gradgradcheck(lambda v, k=k: soft_topk(v, k, K=1.5), (x,))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_is_computed_in_float32(dtype):
    x = scores(4, 600, dtype=dtype)
    exact = x.detach().double().requires_grad_()
    p, expected = soft_topk(x, 37, K=3.0), soft_topk(exact, 37, K=3.0)
    assert p.dtype == torch.float32
    torch.testing.assert_close(p.double(), expected, rtol=1e-5, atol=1e-6)
    upstream = torch.linspace(-1, 1, 600)
    (grad,) = torch.autograd.grad((p * upstream).sum(), x)
    (want,) = torch.autograd.grad((expected * upstream).sum(), exact)
    assert grad.dtype == dtype
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(grad.double(), want, rtol=eps, atol=2e-6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(soft_topk(x, 37, K=3.0), p)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"k": -1}, ValueError, "at least 0; got -1"),
        ({"k": 5}, ValueError, r"\[0, 4\].*got 5"),
        ({"k": 1.5}, TypeError, "1.5"),
        ({"k": True}, TypeError, "True"),
        ({"k": torch.tensor([1, 2])}, ValueError, r"\(3,\); got \(2,\)"),
        ({"k": torch.tensor([1, 2, 5])}, ValueError, "from 1 to 5"),
        ({"k": torch.tensor([1.0, 2.0, 3.0])}, TypeError, "float32"),
        ({"k": torch.tensor([1, 2, 3]), "method": "recursive"}, ValueError, "one k"),
        ({"K": 0.0}, ValueError, "K"),
        ({"method": "newton"}, ValueError, "'newton'"),
        ({"dim": 2}, ValueError, "got 2"),
        ({"x": torch.zeros(3, 0), "k": 0}, ValueError, "at least one"),
        ({"x": torch.zeros(3, 4, dtype=torch.long)}, TypeError, "int64"),
        ({"x": torch.tensor([[0.0, math.nan, 1.0]])}, ValueError, "NaN"),
        ({"x": torch.tensor([[0.0, math.inf, 1.0]])}, ValueError, "inf"),
        ({"x": torch.tensor([[0.0, 1.0, 2.0], [0.0, -math.inf, -math.inf]])}, ValueError, "row 1 has 1, k is 2"),
    ],
)
def test_bad_input_is_rejected(change, error, message):
    with pytest.raises(error, match=message):
        soft_topk(**({"x": torch.zeros(3, 4), "k": 2} | change))


def test_without_validation_a_short_row_gives_all_it_has():
    x = torch.tensor([[0.0, -math.inf, -math.inf], [2.0, 1.0, 0.0]])
    p = soft_topk(x, 2, validate=False)
    torch.testing.assert_close(p[0], torch.tensor([1.0, 0.0, 0.0]))
    torch.testing.assert_close(p[1], soft_topk(x[1], 2))


@pytest.mark.slow
def test_options_compile_as_one_graph():
    x = scores(3, 6)
    masked = x.detach().clone()
    masked[0, 1] = -math.inf
    masked.requires_grad_()
    k = torch.tensor([1, 5, 0])
    compiled = torch.compile(lambda v, count: soft_topk(v, count, K=2.0), fullgraph=True, backend="aot_eager")
    compare(compiled(masked, k), soft_topk(masked, k, K=2.0), masked)
