"""Steepest directions: optimal by brute force and by duality, at any scale, and with the right derivatives."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from kexue.training import steepest_direction
from reference.optimizer_dynamics import dual_norm, length

NORMS = ("l2", "l1", "linf", "spectral", "metric")


def matrix(rows=5, columns=4, seed=0, dtype=torch.float64):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def positive(count, seed=3):
    root = matrix(count, count, seed)
    return root @ root.T + 0.1 * torch.eye(count, dtype=torch.float64)


def metric_of(norm, count):
    return {"metric": positive(count)} if norm == "metric" else {}


@pytest.mark.parametrize("shape", [(5, 4), (1, 7), (7, 1), (1, 1), (6, 6)])
@pytest.mark.parametrize("norm", NORMS)
def test_the_direction_has_length_one_and_attains_minus_the_dual_norm(norm, shape):
    g = matrix(*shape)
    options = metric_of(norm, g.numel())
    v = steepest_direction(g, norm, **options)
    metric = options["metric"].numpy() if options else None
    assert v.shape == g.shape
    assert length(v, norm, metric) == pytest.approx(1, rel=1e-12)
    assert float((g * v).sum()) == pytest.approx(-dual_norm(g, norm, metric), rel=1e-12)


@pytest.mark.parametrize("norm", NORMS)
def test_no_random_step_of_length_one_does_better(norm):
    g = matrix(3, 2)
    options = metric_of(norm, 6)
    metric = options["metric"].numpy() if options else None
    best = float((g * steepest_direction(g, norm, **options)).sum())
    rng = np.random.default_rng(0)
    tried = rng.normal(size=(3000, 3, 2)) * rng.choice([0.0, 1.0, 1.0], size=(3000, 3, 2))
    sizes = np.array([length(v, norm, metric) for v in tried])
    values = (tried * g.numpy()).sum((1, 2))[sizes > 0] / sizes[sizes > 0]
    assert best <= values.min() + 1e-12
    assert values.min() < 0.6 * best  # the search was no idle one


@given(
    entries=st.lists(st.floats(-1e3, 1e3).filter(lambda x: x == 0 or abs(x) > 1e-3), min_size=1, max_size=8),
    scale=st.sampled_from([1.0, 1e-300, 1e-160, 1e250]),
    norm=st.sampled_from(["l2", "l1", "linf", "metric"]),
)
def test_the_direction_depends_on_no_scale(entries, scale, norm):
    g = torch.tensor(entries, dtype=torch.float64)
    options = metric_of(norm, len(entries))
    v = steepest_direction(g, norm, **options)
    torch.testing.assert_close(steepest_direction(g * scale, norm, **options), v, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(steepest_direction(-g, norm, **options), -v, rtol=1e-12, atol=1e-12)
    if g.any():
        assert float((g * v).sum()) == pytest.approx(
            -dual_norm(g, norm, options["metric"].numpy() if options else None), rel=1e-9
        )
    else:
        assert not v.any()


@pytest.mark.parametrize("size", [1e-42, 1e-38, 1e-30, 1e30, 3e38])
@pytest.mark.parametrize("norm", NORMS)
def test_extreme_float32_gradients_do_not_overflow(norm, size):
    g = torch.tensor([[1.0, -0.5], [0.25, 1.0]])
    options = metric_of(norm, 4)
    v = steepest_direction((g.double() * size).float(), norm, **options)
    torch.testing.assert_close(v, steepest_direction(g, norm, **options), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_zero_and_empty_gradients_give_zero(norm, dtype):
    for shape in ((2, 3), (0, 3), (0, 0)):
        g = torch.zeros(shape, dtype=dtype, requires_grad=True)
        count = g.numel()
        v = steepest_direction(g, norm, **metric_of(norm, count))
        assert v.dtype == dtype
        assert torch.equal(v, g)
        (slope,) = torch.autograd.grad(v.sum(), g)
        assert not slope.any()
    assert steepest_direction(torch.tensor(-3.0)).item() == 1
    assert steepest_direction(torch.tensor(-3.0), metric=torch.tensor(4.0)).item() == 0.5


def test_ties_and_zeros_move_no_more_than_they_must():
    g = torch.tensor([0.0, -2.0, 2.0, 1.0])
    assert steepest_direction(g, "l1").tolist() == [0, 1, 0, 0]
    assert steepest_direction(g, "linf").tolist() == [0, 1, -1, -1]
    low = torch.outer(torch.tensor([1.0, 2.0, 2.0]), torch.tensor([3.0, 4.0])).double()  # rank 1
    v = steepest_direction(low, "spectral")
    torch.testing.assert_close(v, -low / 15)
    assert torch.linalg.matrix_rank(v) == 1
    q = torch.linalg.qr(matrix(4, 4)).Q
    torch.testing.assert_close(steepest_direction(3 * q, "spectral"), -q)


def test_metric_is_the_natural_gradient_at_length_one():
    g, metric = matrix(1, 6)[0], positive(6)
    v = steepest_direction(g, "metric", metric)
    natural = -torch.linalg.solve(metric, g)
    torch.testing.assert_close(v, natural / (natural @ metric @ natural).sqrt())
    torch.testing.assert_close(steepest_direction(g, metric=metric), v)
    torch.testing.assert_close(steepest_direction(g, metric=1e-200 * metric), 1e100 * v)
    diagonal = metric.diag()
    torch.testing.assert_close(steepest_direction(g, metric=diagonal), steepest_direction(g, metric=diagonal.diag()))
    square = g.view(2, 3)
    torch.testing.assert_close(steepest_direction(square, metric=metric), v.view(2, 3))
    torch.testing.assert_close(
        steepest_direction(square, metric=diagonal.view(2, 3)).flatten(), steepest_direction(g, metric=diagonal)
    )
    torch.testing.assert_close(steepest_direction(g, metric=torch.eye(6).double()), steepest_direction(g))
    tiny = steepest_direction(torch.tensor([1.0, 1.0]), metric=torch.tensor([1e-40, 1.0]))
    assert torch.isfinite(tiny).all()


@pytest.mark.parametrize("norm", ["l2", "l1", "linf", "metric"])
def test_a_list_is_one_vector(norm):
    g = matrix(3, 4)
    parts = [g[0, :2], g[0, 2:].float(), g[1:], torch.zeros(0)]
    rounded = torch.cat([p.double().flatten() for p in parts])
    options = metric_of(norm, 12)
    v = steepest_direction(parts, norm, **options)
    assert [(x.shape, x.dtype) for x in v] == [(x.shape, x.dtype) for x in parts]
    whole = steepest_direction(rounded, norm, **options)
    torch.testing.assert_close(torch.cat([x.double().flatten() for x in v]), whole, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("shape", [(5, 3), (3, 5), (4, 4), (1, 3), (3, 1)])
@pytest.mark.parametrize("norm", ["l2", "spectral", "metric"])
def test_derivatives_agree_with_finite_differences(norm, shape):
    g = matrix(*shape).requires_grad_()
    options = metric_of(norm, g.numel())
    if options:
        root = options["metric"].clone().requires_grad_()
        diagonal = root.detach().diag().clone().requires_grad_()
        both = torch.autograd.gradcheck(lambda g, m: steepest_direction(g, metric=(m + m.T) / 2), (g, root))
        assert both
        assert torch.autograd.gradcheck(lambda g, m: steepest_direction(g.flatten(), metric=m), (g, diagonal))
    else:
        assert torch.autograd.gradcheck(lambda g: steepest_direction(g, norm), g)


def test_the_polar_factor_is_differentiable_at_equal_singular_values():
    q = torch.linalg.qr(matrix(4, 4)).Q.requires_grad_()
    assert torch.autograd.gradcheck(lambda g: steepest_direction(g, "spectral"), q)
    out = steepest_direction(q, "spectral")
    (slope,) = torch.autograd.grad(out[0, 0], q, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        slope.sum().backward()
    low = torch.outer(torch.ones(3), torch.ones(2)).double().requires_grad_()
    steepest_direction(low, "spectral")[0, 0].backward()
    assert torch.isfinite(low.grad).all()


@pytest.mark.parametrize("norm", ["l1", "linf"])
def test_directions_that_are_constant_have_derivative_zero(norm):
    g = matrix().requires_grad_()
    (slope,) = torch.autograd.grad(steepest_direction(g, norm).square().sum(), g)
    assert not slope.any()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_once(norm, dtype):
    g = matrix(dtype=dtype)
    options = metric_of(norm, g.numel())
    exact = steepest_direction(g.float(), norm, **{k: x.float() for k, x in options.items()})
    assert torch.equal(steepest_direction(g, norm, **{k: x.float() for k, x in options.items()}), exact.to(dtype))


@pytest.mark.slow
@pytest.mark.parametrize("norm", NORMS)
def test_compiles_as_one_graph(norm):
    torch.compiler.reset()
    g, options = matrix().requires_grad_(), metric_of(norm, 20)

    def function(g):
        return steepest_direction(g, norm, **options)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(g), function(g))
    expected = torch.autograd.grad(function(g)[0].sum(), g)
    torch.testing.assert_close(torch.autograd.grad(compiled(g)[0].sum(), g), expected)


def test_one_step_along_each_direction_lowers_a_models_loss():
    model = nn.Linear(6, 3)
    inputs, targets = torch.randn(20, 6), torch.randn(20, 3)
    for norm in ("l2", "l1", "linf", "spectral"):
        loss = nn.functional.mse_loss(model(inputs), targets)
        (g,) = torch.autograd.grad(loss, model.weight)
        with torch.no_grad():
            model.weight.add_(steepest_direction(g, norm), alpha=1e-3)
        assert nn.functional.mse_loss(model(inputs), targets) < loss


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: steepest_direction(torch.ones(2), "l3"), ValueError, "norm must be one of 'l2', .*; got 'l3'"),
        (lambda: steepest_direction([1.0]), TypeError, r"g\[0\] must be a tensor; got float"),
        (lambda: steepest_direction([]), TypeError, r"a list of tensors; got \[\]"),
        (lambda: steepest_direction(3.0), TypeError, "got float"),
        (lambda: steepest_direction(torch.ones(2).long()), TypeError, "floating tensor; got dtype torch.int64"),
        (lambda: steepest_direction(torch.ones(2).to_sparse()), TypeError, "dense tensor, .*layout torch.sparse_coo"),
        (lambda: steepest_direction([torch.eye(2).to_sparse()]), TypeError, r"g\[0\] must be a dense tensor"),
        (lambda: steepest_direction(torch.ones(2) * 1j), TypeError, "floating tensor; got dtype torch.complex64"),
        (lambda: steepest_direction(torch.ones(2), "spectral"), ValueError, r"needs a matrix, .*; got shape \(2,\)"),
        (lambda: steepest_direction(torch.ones(2, 2, 3, 3), "spectral"), ValueError, r"weight.flatten\(1\)"),
        (lambda: steepest_direction([torch.ones(2, 2)], "spectral"), ValueError, "one matrix; got a list"),
        (lambda: steepest_direction(torch.ones(2), "metric"), ValueError, "needs metric=G; got None"),
        (lambda: steepest_direction(torch.ones(2), "l1", torch.eye(2)), ValueError, "belongs to norm 'metric'; got"),
        (lambda: steepest_direction(torch.ones(2), metric=torch.eye(3)), ValueError, r"\(2, 2\), or .*; got \(3, 3\)"),
        (lambda: steepest_direction(torch.ones(2), metric=-torch.eye(2)), ValueError, "smallest eigenvalue is -1"),
        (lambda: steepest_direction(torch.ones(2), metric=torch.zeros(2, 2)), ValueError, "positive definite"),
        (lambda: steepest_direction(torch.ones(2), metric=torch.tensor([1.0, 0.0])), ValueError, "smallest entry is 0"),
        (lambda: steepest_direction(torch.ones(2), metric=torch.tensor([[1.0, 0.9], [0, 1]])), ValueError, "symmetric"),
        (lambda: steepest_direction(torch.ones(2), metric=torch.eye(2) / 0), ValueError, "metric must be finite"),
        (lambda: steepest_direction(torch.ones(2), metric=[1, 2]), TypeError, "metric must be a tensor; got list"),
        *(
            (lambda n=n, x=x: steepest_direction(torch.tensor([[1.0, x]]), n), ValueError, "g must be finite")
            for n in ("l2", "l1", "linf", "spectral")
            for x in (float("nan"), float("inf"))
        ),
    ],
)
def test_bad_input_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()
