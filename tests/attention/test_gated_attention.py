import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attention.gated_inputs import normal, operands, padding, small_tiles
from kexue.attention import _gated_kernel, gated_attention, gated_attention_weights
from kexue.attention._rotary import rotate
from kexue.attention.gated_attention import NORMALIZATIONS
from reference import gated_attention_softmax as reference

OPTIONS = {"base": 9.0, "min_length": 3, "norm_length": 7.0}


@pytest.mark.parametrize("tiles", ["one", "many"])
@pytest.mark.parametrize("mask", ["none", "right", "left", "holes"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_values_and_every_gradient_equal_the_formula(monkeypatch, normalization, causal, mask, tiles):
    if tiles == "many":
        small_tiles(monkeypatch)
    q, k, v, gate = inputs = operands(rows=13, keys=13)
    mask = padding(mask, 3, 13)
    out = gated_attention(q, k, v, gate, normalization=normalization, causal=causal, key_padding_mask=mask, **OPTIONS)
    expected = gate * (reference.weights(q, k, normalization, causal=causal, mask=mask, **OPTIONS) @ v)
    torch.testing.assert_close(out, expected)
    upstream = normal(*out.shape, seed=9).detach()
    torch.testing.assert_close(
        torch.autograd.grad(out, inputs, upstream), torch.autograd.grad(expected, inputs, upstream)
    )


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("keys", [1, 4, 11])
def test_more_or_fewer_keys_than_queries(normalization, keys):
    q, k, v, _ = operands(rows=6, keys=keys)
    mask = padding("holes", 3, keys)
    out = gated_attention(q, k, v, normalization=normalization, key_padding_mask=mask)
    expected = reference.weights(q, k, normalization, mask=mask) @ v
    torch.testing.assert_close(out, expected)
    upstream = normal(*out.shape, seed=9).detach()
    torch.testing.assert_close(
        torch.autograd.grad(out, (q, k, v), upstream), torch.autograd.grad(expected, (q, k, v), upstream)
    )


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_the_matrix_is_that_of_the_formula_and_differentiable(normalization, causal):
    q, k, _, _ = operands()
    mask = padding("holes", 3, 7)
    made = gated_attention_weights(q, k, normalization=normalization, causal=causal, key_padding_mask=mask, **OPTIONS)
    expected = reference.weights(q, k, normalization, causal=causal, mask=mask, **OPTIONS)
    torch.testing.assert_close(made, expected)
    upstream = normal(*made.shape, seed=9).detach()
    torch.testing.assert_close(
        torch.autograd.grad(made, (q, k), upstream), torch.autograd.grad(expected, (q, k), upstream)
    )


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_gradcheck(monkeypatch, normalization, dropout):
    small_tiles(monkeypatch)
    q, k, v, gate = operands(2, 5, 5)

    def function(*x):
        torch.manual_seed(3)  # the same weights are dropped in every call
        return gated_attention(*x, normalization=normalization, causal=True, dropout=dropout, norm_length=5.0)

    assert torch.autograd.gradcheck(function, (q, k, v, gate))


@pytest.fixture
def poisoned_memory():
    """Memory that was not written holds NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("tiles", ["one", "many"])
@pytest.mark.parametrize("mask", ["none", "right", "holes", "all"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_nothing_is_left_unwritten(monkeypatch, poisoned_memory, normalization, causal, mask, tiles):
    if tiles == "many":
        small_tiles(monkeypatch)
    inputs = operands(rows=13, keys=13)
    mask = torch.ones(3, 13, dtype=torch.bool) if mask == "all" else padding(mask, 3, 13)
    out = gated_attention(*inputs, normalization=normalization, causal=causal, key_padding_mask=mask)
    for x in (out, *torch.autograd.grad(out.sum(), inputs)):
        assert torch.isfinite(x).all()


@pytest.mark.slow
@pytest.mark.parametrize("causal", [False, True])
def test_memory_grows_with_the_length_and_not_with_its_square(causal):
    from torch.profiler import ProfilerActivity, profile

    def peak(length):
        q, k, v = (normal(1, length, 8, seed=i, dtype=torch.float32) for i in range(3))
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
            gated_attention(q, k, v, causal=causal, dropout=0.1).sum().backward()
        events = [e for e in trace.profiler.kineto_results.events() if e.name() == "[memory]"]
        current = most = 0
        for event in sorted(events, key=lambda e: e.start_ns()):
            current += event.nbytes()
            most = max(most, current)
        return most / 2**20

    assert peak(4096) < 24  # one matrix of scores would be 64 MiB
    assert peak(8192) < 32  # and 256 MiB


@pytest.mark.parametrize("kind", _gated_kernel.WEIGHTS)
@pytest.mark.parametrize("masked", [False, True])
def test_the_operator_is_registered_correctly(kind, masked):
    q, k, v, _ = operands(2, 5, 5, torch.float32)
    mask = padding("holes", 2, 5) if masked else None
    assert set(
        torch.library.opcheck(
            torch.ops.kexue.gated_attention, (q, k, v, mask, torch.tensor(3), kind, True, 0.2)
        ).values()
    ) == {"SUCCESS"}
    stat = torch.ones(2, 5) if kind != "relu2" else torch.ones(0)
    grad = torch.ones(2, 5, 5)
    args = (grad, *(x.detach() for x in (q, k, v)), mask, None, stat, kind, False, 0.0)
    assert set(torch.library.opcheck(torch.ops.kexue.gated_attention_backward, args).values()) == {"SUCCESS"}


def test_differentiating_twice_is_an_error():
    q, k, v, _ = operands()
    (grad,) = torch.autograd.grad(gated_attention(q, k, v).square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        grad.sum().backward()


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_causal_rows_count_the_keys_they_see(normalization):
    q, k, v, _ = operands(1, 6, 6)
    whole = gated_attention(q, k, v, normalization=normalization, causal=True, min_length=2)
    for i in range(6):
        part = gated_attention(q[:, : i + 1], k[:, : i + 1], v[:, : i + 1], normalization=normalization, min_length=2)
        torch.testing.assert_close(whole[:, i], part[:, i])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_low_precision_computes_in_float32(normalization, dtype):
    low = operands(2, 40, 40, dtype)
    out = gated_attention(*low, normalization=normalization)
    exact = tuple(x.detach().double().requires_grad_() for x in low)
    expected = gated_attention(*exact, normalization=normalization)
    assert out.dtype == dtype
    eps = torch.finfo(dtype).eps
    tolerance = 4 * eps if dtype != torch.float32 else 1e-5
    assert float(((out.double() - expected).norm() / expected.norm()).detach()) < tolerance
    got, want = torch.autograd.grad(out.float().sum(), low), torch.autograd.grad(expected.sum(), exact)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == dtype
        assert float((a.double() - b).norm() / b.norm()) < 8 * eps + 1e-5


@pytest.mark.parametrize("normalization", ["softmax", "softmax_plus", "relu2_sum"])
@pytest.mark.parametrize("size", [1e-12, 1e4, 1e15])
def test_extreme_scores_stay_finite(normalization, size):
    q, k, v, _ = (x.detach() for x in operands(2, 9, 9, torch.float32))
    q = (q * size).requires_grad_()
    out = gated_attention(q, k, v, normalization=normalization)
    out.sum().backward()
    assert torch.isfinite(out).all()
    assert torch.isfinite(q.grad).all()
    exact = gated_attention(q.detach().double(), k.double(), v.double(), normalization=normalization)
    if size < 1e15:  # above, float32 scores have no exact differences left
        torch.testing.assert_close(out.double(), exact, rtol=1e-3, atol=1e-3)


@settings(max_examples=25)
@given(st.sampled_from(NORMALIZATIONS), st.booleans(), st.integers(1, 4), st.integers(1, 40), st.integers(0, 10**6))
def test_samples_do_not_influence_each_other(normalization, causal, batch, length, seed):
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(batch, length, 4, generator=g, dtype=torch.float64) for _ in range(3))
    mask = torch.rand(batch, length, generator=g) < 0.7
    keywords = {"normalization": normalization, "causal": causal}
    whole = gated_attention(q, k, v, key_padding_mask=mask, **keywords)
    for b in range(batch):
        one = slice(b, b + 1)
        single = gated_attention(q[one], k[one], v[one], key_padding_mask=mask[one], **keywords)
        torch.testing.assert_close(whole[one], single)
        if not causal and bool(mask[b].any()):  # padding may lie anywhere: only the kept keys count
            kept = mask[b]
            part = gated_attention(q[one], k[one][:, kept], v[one][:, kept], **keywords)
            torch.testing.assert_close(whole[one], part)


@settings(max_examples=25)
@given(st.integers(1, 30), st.floats(-3, 3), st.integers(0, 10**6))
def test_softmax_rows_are_averages_and_power_functions_have_no_temperature(length, size, seed):
    g = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(1, length, 4, generator=g, dtype=torch.float64) for _ in range(2))
    for normalization in ("softmax", "softmax_plus"):
        rows = gated_attention_weights(q, k, normalization=normalization).sum(-1)
        torch.testing.assert_close(rows, torch.ones_like(rows))
    plain = gated_attention_weights(q, k, normalization="relu2_sum")
    torch.testing.assert_close(gated_attention_weights(10**size * q, k, normalization="relu2_sum"), plain)


def test_softmax_plus_is_softmax_at_its_base_and_stops_at_the_shortest_length():
    q, k, v, _ = operands(1, 20, 20)
    torch.testing.assert_close(gated_attention(q, k, v, base=20.0), gated_attention(q, k, v, normalization="softmax"))
    short = gated_attention(q, k[:, :5], v[:, :5], min_length=16)
    scaled = gated_attention(q * math.log(16) / math.log(512), k[:, :5], v[:, :5], normalization="softmax")
    torch.testing.assert_close(short, scaled)


def test_rotary_scores_depend_on_distances():
    x = normal(1, 1, 6).detach().expand(1, 9, 6)
    scores = rotate(x, 10000.0) @ rotate(x, 10000.0).mT
    torch.testing.assert_close(scores, reference.rotate(x) @ reference.rotate(x).mT)
    for distance in range(9):
        diagonal = scores[0].diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal))


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_dropped_weights_are_zero_and_the_rest_grow(normalization):
    q, k, _, _ = operands(2, 60, 60)
    v = torch.eye(60, dtype=torch.float64).expand(2, 60, 60)  # the output is the matrix of weights
    torch.manual_seed(2)
    dropped = gated_attention(q, k, v, normalization=normalization, dropout=0.25)
    weights = gated_attention_weights(q, k, normalization=normalization)
    positive = weights > 0
    kept = dropped != 0
    assert float(kept[positive].double().mean()) == pytest.approx(0.75, abs=0.03)
    torch.testing.assert_close(dropped[kept], weights[kept] / 0.75)


def test_inputs_are_not_changed():
    inputs = operands()
    mask = padding("holes", 3, 7)
    before = [x.detach().clone() for x in (*inputs, mask)]
    gated_attention(*inputs, causal=True, key_padding_mask=mask).sum().backward()
    for a, b in zip((*inputs, mask), before, strict=True):
        assert torch.equal(a, b)
