import math
import sys

import pytest
import torch

from kexue.losses import LinearZLPR, linear_zlpr, zlpr_loss


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def batch(rows=7, n=30, width=5, dtype=torch.float64):
    g = generator()
    hidden = torch.randn(rows, width, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(n, width, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    bias = torch.randn(n, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    labels = torch.randint(n, (rows, 4), generator=g)
    labels[:, 3] = labels[:, 0]
    labels[1:3, 1:] = -1
    labels[:1] = -1
    return hidden, weight, bias, labels


def targets(labels, n):
    hot = torch.zeros(*labels.shape[:-1], n + 1).scatter(-1, labels.masked_fill(labels < 0, n), 1.0)[..., :n]
    soft = (0.8 * hot + 0.1 * torch.rand(hot.shape, generator=generator(1))).double()
    return {"indices": labels, "bool": hot > 0, "soft": soft}


def usual(hidden, weight, target, bias=None, **options):
    scores = hidden @ weight.T if bias is None else hidden @ weight.T + bias
    return zlpr_loss(scores, target, indices=target.dtype == torch.long, **options)


@pytest.mark.parametrize("form", ["indices", "bool", "soft"])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("chunk_bytes", "scale"), [(1, 1.0), (500, 30.0), (1 << 25, 1.0), (1 << 25, 30.0)])
def test_equals_the_loss_of_the_scores_with_every_gradient(form, reduction, with_bias, chunk_bytes, scale):
    hidden, weight, bias, labels = batch()
    weight = (weight.detach() * scale).requires_grad_()
    target = targets(labels, 30)[form]
    edge = torch.randn(7, 1, generator=generator(2), dtype=torch.float64).requires_grad_()
    leaves = (hidden, weight, edge, *((bias,) if with_bias else ()))
    upstream = torch.linspace(-0.5, 2.0, 7, dtype=torch.float64) if reduction == "none" else torch.tensor(1.7).double()
    keywords = {"bias": bias if with_bias else None, "reduction": reduction, "threshold": edge}
    got = linear_zlpr(hidden, weight, target, chunk_bytes=chunk_bytes, **keywords)
    want = usual(hidden, weight, target, **keywords)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, leaves, upstream), torch.autograd.grad(want, leaves, upstream))


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_gradcheck_and_only_what_is_needed(reduction):
    hidden, weight, bias, labels = batch(4, 9, 3)
    assert torch.autograd.gradcheck(
        lambda h, w, b: linear_zlpr(h, w, labels % 9, b, reduction=reduction, chunk_bytes=80), (hidden, weight, bias)
    )
    for free in (hidden, weight, bias):
        for x in (hidden, weight, bias):
            x.requires_grad_(x is free)
        (grad,) = torch.autograd.grad(linear_zlpr(hidden, weight, labels % 9, bias).sum(), free)
        (want,) = torch.autograd.grad(usual(hidden, weight, labels % 9, bias).sum(), free)
        torch.testing.assert_close(grad, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision(dtype):
    hidden, weight, bias, labels = batch(40, 200, 16, dtype)
    loss = linear_zlpr(hidden, weight, labels, bias, chunk_bytes=5000)
    leaves = [x.detach().double().requires_grad_() for x in (hidden, weight, bias)]
    want = usual(*leaves[:2], labels, leaves[2])
    assert loss.dtype == torch.float32
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype]
    assert float(loss.detach()) == pytest.approx(float(want.detach()), rel=tolerance)
    grads = torch.autograd.grad(loss, (hidden, weight, bias)), torch.autograd.grad(want, leaves)
    for got, exact in zip(*grads, strict=True):
        assert got.dtype == dtype
        assert float((got.double() - exact).norm() / exact.norm()) < tolerance


def test_autocast_takes_its_products_in_low_precision():
    hidden, weight, bias, labels = batch(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = linear_zlpr(hidden, weight, labels, bias)
    low = torch.addmm(bias.bfloat16(), hidden.bfloat16(), weight.bfloat16().T)
    torch.testing.assert_close(loss, zlpr_loss(low, labels, indices=True))
    assert [x.dtype for x in torch.autograd.grad(loss, (hidden, weight, bias))] == [torch.float32] * 3


@pytest.mark.parametrize("form", ["indices", "soft"])
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float64), (torch.float64, torch.float32)])
def test_where_one_is_float64_all_is(form, dtypes):
    hidden, weight, bias, labels = batch()
    hidden, *rest = (x.detach() for x in (hidden, weight, bias))
    leaves = [x.requires_grad_() for x in (hidden.to(dtypes[0]), *(x.to(dtypes[1]) for x in rest))]
    target = targets(labels, 30)[form]
    got = linear_zlpr(leaves[0], leaves[1], target, leaves[2])
    wide = [x.detach().double().requires_grad_() for x in leaves]
    want = usual(wide[0], wide[1], target, wide[2])
    torch.testing.assert_close(got, want)
    for x, y in zip(torch.autograd.grad(got, leaves), torch.autograd.grad(want, wide), strict=True):
        torch.testing.assert_close(x.double(), y, rtol=1e-6, atol=1e-7)


def test_under_no_grad_no_gradient_is_made(monkeypatch):
    hidden, weight, bias, labels = batch()
    want = linear_zlpr(hidden, weight, labels, bias).detach()

    def forbidden(*_):
        raise AssertionError("a gradient was made")

    monkeypatch.setattr(sys.modules[linear_zlpr.__module__], "_ones", forbidden)
    with torch.no_grad():
        torch.testing.assert_close(linear_zlpr(hidden, weight, labels, bias), want)


def test_leading_shapes_no_rows_and_a_masked_label():
    hidden, weight, bias, labels = batch(6)
    want = linear_zlpr(hidden, weight, labels, bias, reduction="none")
    three = linear_zlpr(hidden.reshape(2, 3, 5), weight, labels.reshape(2, 3, 4), bias, reduction="none")
    torch.testing.assert_close(three.flatten(), want)
    empty = linear_zlpr(hidden[:0], weight, labels[:0], bias)
    torch.testing.assert_close(torch.autograd.grad(empty, weight)[0], torch.zeros_like(weight))
    assert float(empty.detach()) == 0
    free = next(j for j in range(30) if j not in labels)
    closed = bias.detach().clone()
    closed[free] = -math.inf
    keep = [j for j in range(30) if j != free]
    shifted = torch.where(labels > free, labels - 1, labels)
    torch.testing.assert_close(
        linear_zlpr(hidden, weight, labels, closed), linear_zlpr(hidden, weight[keep], shifted, bias[keep])
    )


def test_backward_runs_again_and_not_through_its_gradient():
    hidden, weight, bias, labels = batch()
    loss = linear_zlpr(hidden, weight, labels, bias)
    first = torch.autograd.grad(loss, weight, retain_graph=True)[0].clone()
    torch.testing.assert_close(torch.autograd.grad(2 * loss, weight, retain_graph=True)[0], 2 * first)
    (grad,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        grad.square().sum().backward()


def test_module_is_the_function():
    hidden, _, _, labels = batch(dtype=torch.float32)
    head = LinearZLPR(5, 30, threshold=0.3, reduction="sum", chunk_bytes=300)
    want = zlpr_loss(head.scores(hidden), labels, indices=True, threshold=0.3, reduction="sum")
    torch.testing.assert_close(head(hidden, labels), want)
    other = LinearZLPR(5, 30, bias=False)
    assert other.bias is None
    torch.testing.assert_close(other(hidden, labels), usual(hidden, other.weight, labels))
    assert "num_labels=30, bias=False" in repr(other)


@pytest.mark.slow
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_compiles_as_one_graph_and_gives_the_same(reduction):
    hidden, weight, bias, labels = batch(dtype=torch.float32)

    def function(h, w, b):
        return linear_zlpr(h, w, labels, b, reduction=reduction, chunk_bytes=500)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    got, want = compiled(hidden, weight, bias), function(hidden, weight, bias)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(*(torch.autograd.grad(x.sum(), (hidden, weight, bias)) for x in (got, want)))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"hidden": torch.randn(2, 4)}, ValueError, r"\(..., 3\), the width of weight; got \(2, 4\)"),
        ({"hidden": torch.ones(2, 3, dtype=torch.long)}, TypeError, "int64"),
        ({"weight": torch.randn(0, 3)}, ValueError, r"got shape \(0, 3\)"),
        ({"weight": torch.randn(3)}, ValueError, "2 dimensions"),
        ({"bias": torch.randn(4)}, ValueError, "5 entries, one for each row of weight; got 4"),
        ({"target": torch.tensor([[0], [5]])}, ValueError, "from 0 to 5"),
        ({"target": torch.zeros(3, 1, dtype=torch.long)}, ValueError, r"got \(3, 1\)"),
        ({"target": torch.zeros(2, 4, dtype=torch.bool)}, ValueError, r"\(2, 5\); got \(2, 4\)"),
        ({"target": torch.full((2, 5), 1.5)}, ValueError, "from 1.5"),
        ({"target": torch.rand(2, 5, requires_grad=True)}, ValueError, "must not require a gradient"),
        ({"target": [[0], [1]]}, TypeError, "list"),
        ({"threshold": torch.ones(3, 1)}, ValueError, r"got \(3, 1\)"),
        ({"reduction": "avg"}, ValueError, "'avg'"),
        ({"chunk_bytes": 0}, ValueError, "chunk_bytes"),
        ({"ignore_index": "x"}, TypeError, "'x'"),
    ],
)
def test_bad_input_is_rejected_with_expected_and_received(change, error, message):
    arguments = {"hidden": torch.randn(2, 3), "weight": torch.randn(5, 3), "target": torch.tensor([[0], [4]])} | change
    with pytest.raises(error, match=message):
        linear_zlpr(**arguments)


def test_bad_modules_are_rejected():
    for options, message in (({"in_features": 0}, "in_features"), ({"num_labels": 0}, "num_labels")):
        with pytest.raises(ValueError, match=message):
            LinearZLPR(**({"in_features": 2, "num_labels": 3} | options))
    with pytest.raises(ValueError, match="'avg'"):
        LinearZLPR(2, 3, reduction="avg")
    with pytest.raises(ValueError, match="finite"):
        LinearZLPR(2, 3, threshold=math.nan)
