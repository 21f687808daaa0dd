"""The kernels for many small and for large normals on the CPU, against the plain path."""

import threading

import pytest
import torch

from kexue.stats import Gaussian, _bures_kernel, kl, w2
from kexue.stats import _gaussian_lanes as lanes

NEVER = 10**9


def draw(count, n, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    a = torch.randn(count, n, n, generator=g, dtype=torch.float64) / n**0.5
    mean = torch.randn(count, n, generator=g, dtype=torch.float64)
    return [x.to(dtype).requires_grad_() for x in (mean, a @ a.mT + 0.2 * torch.eye(n))]


def results(function, inputs):
    value = function(Gaussian(*inputs[:2]), Gaussian(*inputs[2:]))
    gradients = torch.autograd.grad(value, inputs, torch.linspace(1, 2, len(value), dtype=value.dtype))
    with torch.no_grad():
        alone = function(Gaussian(*inputs[:2]), Gaussian(*inputs[2:]))
    return [value.detach(), alone, *gradients]


@pytest.mark.parametrize("function", [kl, w2])
@pytest.mark.parametrize(("count", "n"), [(17, 1), (16, 2), (19, 7), (24, 32), (16, 64), (2, 130)])
def test_kernels_equal_the_plain_path(function, count, n, monkeypatch):
    inputs = [*draw(count, n), *draw(count, n, seed=1)]
    if n > 1:
        with torch.no_grad():  # equal eigenvalues, and a diagonal
            inputs[1][0], inputs[3][0] = torch.eye(n), 4 * torch.eye(n)
            inputs[1][1] = torch.diag(torch.arange(1, n + 1))
    fast = results(function, inputs)
    low = results(function, [x.detach().float().requires_grad_() for x in inputs])
    monkeypatch.setattr(_bures_kernel, "LANES_FROM", NEVER)
    monkeypatch.setattr(_bures_kernel, "LAPACK_FROM", NEVER)
    for x, y, z in zip(fast, results(function, inputs), low, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(z.double(), y, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("function", [kl, w2])
def test_no_row_depends_on_another(function):
    inputs = [x.detach() for x in (*draw(20, 5), *draw(20, 5, seed=1))]
    before = results(function, [x.clone().requires_grad_() for x in inputs])
    eye = torch.eye(5, dtype=torch.float64)
    for row, cov in enumerate((0 * eye, torch.ones(5, 5), 1e150 * eye, 1e-200 * eye)):
        inputs[1][3 * row] = cov
    after = results(function, [x.clone().requires_grad_() for x in inputs])
    keep = [row for row in range(20) if row not in (0, 3, 6, 9)]
    for x, y in zip(before, after, strict=True):
        assert torch.equal(x[keep], y[keep])
        assert not y.isnan().any()


@pytest.mark.parametrize("function", [kl, w2])
def test_kernels_run_in_compiled_graphs(function):
    inputs = [*draw(18, 3), *draw(18, 3, seed=1)]

    def call(mp, sp, mq, sq):
        return function(Gaussian(mp, sp), Gaussian(mq, sq))

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    value, expected = compiled(*inputs), call(*inputs)
    torch.testing.assert_close(value, expected)
    got, want = torch.autograd.grad(value.sum(), inputs), torch.autograd.grad(expected.sum(), inputs)
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y)
    with torch.no_grad():
        torch.testing.assert_close(compiled(*inputs), expected)


def test_rows_alone_or_among_many_agree():
    inputs = [*draw(40, 6), *draw(40, 6, seed=1)]
    for function in (kl, w2):
        many = results(function, inputs)
        few = results(function, [x[:3].detach().requires_grad_() for x in inputs])
        torch.testing.assert_close(many[0][:3], few[0], rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_factors_and_their_ranks(dtype):
    cov = draw(21, 9, dtype=dtype)[1].detach()
    cov[4] = torch.ones(9, 9)
    cov[9] = -torch.eye(9)
    cov[20] = 0
    factor, ok = _bures_kernel.cholesky(cov)
    assert ok.tolist() == [row not in (4, 9, 20) for row in range(21)]
    torch.testing.assert_close((factor @ factor.mT)[ok], cov[ok])
    assert torch.equal(factor, factor.tril())
    assert torch.isfinite(factor).all()
    large = draw(2, 130, dtype=dtype)[1].detach()
    large[1, :, 7] = large[1, 7, :] = 0
    factor, ok = _bures_kernel.cholesky(large)
    assert ok.tolist() == [True, False]
    torch.testing.assert_close(factor[0] @ factor[0].mT, large[0])
    assert torch.equal(factor[0], factor[0].tril())


def test_threads_do_not_disturb_each_other():
    problems = [[x.detach() for x in (*draw(64, 12, seed=s), *draw(64, 12, seed=s + 9))] for s in range(4)]
    alone = [lanes.w2_rows(torch.linalg.cholesky(x[1]), x[3], True) for x in problems]
    found = [None] * 4

    def work(k):
        for _ in range(5):
            found[k] = lanes.w2_rows(torch.linalg.cholesky(problems[k][1]), problems[k][3], True)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for x, y in zip(alone, found, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(x, y, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_asymmetry_is_seen_wherever_it_is(dtype):
    cov = draw(12, 40, dtype=dtype)[1].detach()
    assert Gaussian(torch.zeros(40, dtype=dtype), cov).dim == 40
    for i, j in ((0, 1), (39, 0), (17, 16), (3, 38), (39, 38)):
        bad = cov.clone()
        bad[11, i, j] += 0.1
        with pytest.raises(ValueError, match="symmetric"):
            Gaussian(torch.zeros(40, dtype=dtype), bad)
    bad = cov.clone()
    bad[5] -= 10 * torch.eye(40, dtype=dtype)
    with pytest.raises(ValueError, match="semi-definite"):
        Gaussian(torch.zeros(40, dtype=dtype), bad)


@pytest.mark.parametrize("count", [1, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("unit", [1e-30, 1e-19, 1e19, 1e30])
def test_w2_scales_with_the_covariances(count, dtype, unit):
    mean = torch.zeros(count, 2, dtype=dtype)
    pair = [
        torch.tensor(x, dtype=dtype).expand(count, 2, 2) for x in ([[2.0, 0.5], [0.5, 1]], [[1.0, -0.3], [-0.3, 3]])
    ]
    inputs = [(unit * x).requires_grad_() for x in pair]
    value = w2(*(Gaussian(mean, x) for x in inputs))
    exact = [x.double().requires_grad_() for x in pair]
    expected = w2(*(Gaussian(mean.double(), x) for x in exact))
    torch.testing.assert_close(value.double() / unit, expected, rtol=1e-5, atol=0)
    got, want = torch.autograd.grad(value.sum(), inputs), torch.autograd.grad(expected.sum(), exact)
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=1e-4, atol=1e-5)
