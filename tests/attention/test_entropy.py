import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.backends.debugging import aot_eager
from torch.nn import functional as F

from kexue.attention import entropy_invariant_attention, entropy_invariant_scale
from reference import entropy_invariant_softmax as reference


def qkv(batch=2, heads=2, rows=5, keys=None, width=4, value=None, groups=None, dtype=torch.float64, seed=0):
    keys, value, groups = keys or rows, value or width, groups or heads
    g = torch.Generator().manual_seed(seed)
    shapes = (batch, heads, rows, width), (batch, groups, keys, width), (batch, groups, keys, value)
    return tuple(torch.randn(*s, generator=g, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes)


def padding(batch, keys, side="both"):
    mask = torch.ones(batch, keys, dtype=torch.bool)
    mask[0, : keys // 3 if side != "right" else 0] = False
    mask[0, keys - (keys // 4 if side != "left" else 0) :] = False
    return mask


def assert_values_and_gradients(inputs, **options):
    out, expected = entropy_invariant_attention(*inputs, **options), reference.attention(*inputs, **options)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(
        torch.autograd.grad(out, inputs, upstream), torch.autograd.grad(expected, inputs, upstream)
    )


@pytest.mark.parametrize("mode", ["train", "inference"])
@pytest.mark.parametrize("scale_mode", ["log512", "kappa", "sphere_exact"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_values_and_gradients_equal_the_formula(mode, scale_mode, causal, padded):
    mask = padding(2, 7) if padded else None
    options = {"base": 3, "min_length": 2, "mode": mode, "scale_mode": scale_mode}
    assert_values_and_gradients(qkv(rows=7), causal=causal, key_padding_mask=mask, **options)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize(("rows", "offset"), [(7, None), (3, None), (1, None), (3, 2), (1, 0)])
def test_causal_rows_count_their_visible_keys(side, per_row, rows, offset):
    inputs = qkv(rows=rows, keys=7, groups=1, value=6)
    options = {"causal": True, "per_row": per_row, "offset": offset, "base": 3, "min_length": 2}
    assert_values_and_gradients(inputs, key_padding_mask=padding(2, 7, side), **options)
    assert_values_and_gradients(inputs, **options)


@pytest.mark.parametrize("value", [1, 4, 9])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_grouped_heads_and_values_of_another_width(value, groups):
    inputs = qkv(heads=4, groups=groups, value=value)
    assert_values_and_gradients(inputs, min_length=2)
    assert_values_and_gradients(inputs, causal=True, kappa=2.5, scale_mode="kappa", min_length=2)


def test_more_queries_than_keys_need_no_causality():
    assert_values_and_gradients(qkv(rows=5, keys=2))


def test_the_clamp_makes_short_rows_as_sharp_as_min_length():
    q, k, v = qkv(rows=9)
    want = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=math.log(16) / math.log(512) / 2)
    torch.testing.assert_close(entropy_invariant_attention(q, k, v, causal=True), want)


def test_at_base_keys_it_is_ordinary_attention():
    q, k, v = qkv(rows=12, dtype=torch.float32)
    ordinary = F.scaled_dot_product_attention(q, k, v)
    assert torch.equal(entropy_invariant_attention(q, k, v, base=12, min_length=2), ordinary)
    longest = {"base": 12, "mode": "inference"}
    assert torch.equal(entropy_invariant_attention(q, k, v, **longest), ordinary)
    causal = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert torch.equal(entropy_invariant_attention(q, k, v, causal=True, **longest), causal)


def test_scale_replaces_the_ordinary_one():
    q, k, v = qkv(rows=5)
    factor = entropy_invariant_scale(5, 4, 512, 2) * 2 * 0.3  # sqrt(4) = 2
    want = F.scaled_dot_product_attention(q, k, v, scale=factor)
    torch.testing.assert_close(entropy_invariant_attention(q, k, v, min_length=2, scale=0.3), want)


def test_decoding_steps_equal_the_whole_pass():
    q, k, v = qkv(rows=24)
    options = {"causal": True, "base": 8, "min_length": 4}
    whole = entropy_invariant_attention(q, k, v, **options)
    steps = [
        entropy_invariant_attention(q[:, :, i : i + 1], k[:, :, : i + 1], v[:, :, : i + 1], **options)
        for i in range(24)
    ]
    torch.testing.assert_close(torch.cat(steps, 2), whole)
    chunks = [
        entropy_invariant_attention(q[:, :, a:b], k[:, :, :b], v[:, :, :b], **options) for a, b in ((0, 9), (9, 24))
    ]
    torch.testing.assert_close(torch.cat(chunks, 2), whole)
    buffer = [F.pad(x, (0, 0, 0, 8), value=99.0) for x in (k, v)]  # a static cache that is not full
    torch.testing.assert_close(entropy_invariant_attention(q, *buffer, offset=0, **options), whole)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("junk", [1e4, math.nan, math.inf])
def test_padding_has_no_influence_and_gets_no_gradient(side, causal, junk):
    q, k, v = qkv(rows=20, dtype=torch.float32)
    pads = (0, 0, 6, 0) if side == "left" else (0, 0, 0, 6)
    mask = F.pad(torch.ones(2, 20, dtype=torch.bool), pads[2:])
    places = mask[0].nonzero()[:, 0]
    long = [F.pad(x.detach(), pads, value=value) for x, value in ((q, 0.0), (k, junk), (v, junk))]
    long = [x.requires_grad_() for x in long]
    options = {"causal": causal, "base": 8, "min_length": 2}
    short = entropy_invariant_attention(q, k, v, **options)
    out = entropy_invariant_attention(*long, key_padding_mask=mask, **options)
    torch.testing.assert_close(out[:, :, places], short)
    upstream = torch.zeros_like(out)
    upstream[:, :, places] = 1.0
    for grad, expected in zip(
        torch.autograd.grad(out, long, upstream), torch.autograd.grad(short.sum(), (q, k, v)), strict=True
    ):
        torch.testing.assert_close(grad[:, :, places], expected)
        assert not grad[:, :, ~mask[0]].any()


@pytest.mark.parametrize("causal", [False, True])
def test_rows_without_keys_are_zero_with_zero_gradient(causal):
    inputs = qkv(rows=6)
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[0] = False
    mask[1, :3] = False
    out = entropy_invariant_attention(*inputs, causal=causal, key_padding_mask=mask)
    grads = torch.autograd.grad(out.square().sum(), inputs)
    assert not out[0].any()
    assert not any(g[0].any() for g in grads)
    assert bool((out[1, :, :3] == 0).all()) is causal
    assert all(torch.isfinite(g).all() for g in grads)


def test_a_sample_gives_the_same_alone_and_in_a_batch():
    inputs = qkv(batch=3, rows=9)
    mask = padding(3, 9)
    whole = entropy_invariant_attention(*inputs, causal=True, key_padding_mask=mask, min_length=2)
    for i in range(3):
        alone = entropy_invariant_attention(
            *(x[i : i + 1] for x in inputs), causal=True, key_padding_mask=mask[i : i + 1], min_length=2
        )
        torch.testing.assert_close(alone[0], whole[i])


def test_later_tokens_do_not_change_earlier_rows_by_a_bit():
    q, k, v = qkv(rows=40, width=16, dtype=torch.float32)
    first = entropy_invariant_attention(q, k, v, causal=True)
    with torch.no_grad():
        for x in (q, k, v):
            x[:, :, 25:] += 3
    second = entropy_invariant_attention(q, k, v, causal=True)
    assert torch.equal(first[:, :, :25], second[:, :, :25])
    assert not torch.equal(first[:, :, 25:], second[:, :, 25:])


def test_inputs_stay_as_they_are():
    inputs = qkv(rows=6)
    mask = padding(2, 6)
    before = [x.detach().clone() for x in (*inputs, mask)]
    entropy_invariant_attention(*inputs, causal=True, key_padding_mask=mask)
    n = torch.tensor([3.0, 900.0])
    entropy_invariant_scale(n, 64)
    assert all(torch.equal(a, b) for a, b in zip(before, (*inputs, mask), strict=True))
    assert n.tolist() == [3.0, 900.0]


@pytest.mark.parametrize(("batch", "rows", "keys"), [(0, 4, 4), (2, 0, 0), (2, 0, 3), (2, 3, 0), (2, 1, 1)])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_empty_inputs_have_empty_or_zero_results(batch, rows, keys, causal, padded):
    if causal and rows > keys:
        pytest.skip("refused")
    q, k, v = (torch.ones(batch, 2, n, 4, requires_grad=True) for n in (rows, keys, keys))
    mask = torch.ones(batch, keys, dtype=torch.bool) if padded else None
    out = entropy_invariant_attention(q, k, v, causal=causal, key_padding_mask=mask)
    out.sum().backward()
    assert out.shape == (batch, 2, rows, 4)
    assert torch.equal(out, torch.ones_like(out) if keys else torch.zeros_like(out))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("causal", [False, True])
def test_half_precision_is_close_to_float64(dtype, causal):
    inputs = qkv(rows=64, width=16, dtype=dtype)
    exact = [x.detach().double() for x in inputs]
    out = entropy_invariant_attention(*inputs, causal=causal, key_padding_mask=padding(2, 64))
    assert out.dtype == dtype
    want = entropy_invariant_attention(*exact, causal=causal, key_padding_mask=padding(2, 64))
    assert (out.double() - want).norm() / want.norm() < 2e-2


def test_dropout_drops_weights_and_keeps_their_mean():
    q, k, v = qkv(batch=1, rows=64, width=8)
    torch.manual_seed(0)
    many = torch.stack([entropy_invariant_attention(q, k, v, dropout_p=0.3) for _ in range(300)]).detach()
    exact = entropy_invariant_attention(q, k, v)
    assert many.std(0).min() > 0
    error = (many.mean(0) - exact).abs() / (many.std(0) / math.sqrt(300))
    assert error.mean() < 1.2  # standard normal: .8


@pytest.mark.parametrize("mode", ["log512", "kappa", "sphere_exact"])
@given(n=st.integers(0, 10**7), d=st.integers(1, 512), base=st.floats(1.1, 1e5), low=st.integers(2, 40))
@settings(max_examples=60, deadline=None)
def test_scale_equals_the_formula_for_numbers_and_tensors(mode, n, d, base, low):
    want = reference.scale(n, d, base, low, mode)
    assert math.isclose(entropy_invariant_scale(n, d, base, low, mode), want, rel_tol=1e-9)
    got = entropy_invariant_scale(torch.tensor([n], dtype=torch.float64), d, base, low, mode)
    assert math.isclose(float(got), want, rel_tol=1e-9)


def test_scale_of_the_article_and_its_types():
    assert entropy_invariant_scale(512, 64) == 0.125
    assert math.isclose(entropy_invariant_scale(1024, 64), 0.125 * 10 / 9)
    assert entropy_invariant_scale(1, 64) == entropy_invariant_scale(16, 64)
    kappa = math.sqrt(64) / math.log(512)
    assert math.isclose(entropy_invariant_scale(77, 64, mode="kappa", kappa=kappa), entropy_invariant_scale(77, 64))
    counts = torch.tensor([[1, 512], [1024, 2048]])
    got = entropy_invariant_scale(counts, 64)
    assert got.shape == counts.shape
    assert got.dtype == torch.float32
    assert entropy_invariant_scale(counts.double(), 64).dtype == torch.float64
    assert entropy_invariant_scale(counts.half(), 64).dtype == torch.float32


def test_sphere_scale_for_few_keys_in_a_wide_space_is_the_square_root_of_the_logarithm():
    d = 10**6
    scale = entropy_invariant_scale(100, d, mode="sphere_exact")
    assert math.isclose(scale, math.sqrt(2 * math.log(100) / d), rel_tol=1e-4)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"base": 1.0}, ValueError, "base must be greater than 1.0; got 1.0"),
        ({"base": math.nan}, ValueError, "base must be finite"),
        ({"min_length": 1}, ValueError, "min_length must be at least 2; got 1"),
        ({"min_length": 2.5}, TypeError, "min_length must be an integer; got 2.5"),
        ({"mode": "test"}, ValueError, "mode must be one of 'train', 'inference'; got 'test'"),
        ({"scale_mode": "log"}, ValueError, "scale_mode must be one of .*; got 'log'"),
        ({"scale_mode": "kappa", "kappa": 0}, ValueError, "kappa must be greater than 0.0; got 0"),
        ({"kappa": 2.0}, ValueError, "kappa needs scale_mode='kappa'"),
        ({"per_row": 1}, TypeError, "per_row must be True or False; got 1"),
        ({"causal": "yes"}, TypeError, "causal must be True or False; got 'yes'"),
        ({"scale": 0.0}, ValueError, "scale must be greater than 0.0; got 0.0"),
        ({"offset": 0}, ValueError, "offset needs causal=True"),
        ({"causal": True, "offset": 3}, ValueError, r"offset \+ queries must be at most 5, .*; got 3 \+ 5"),
        ({"dropout_p": 1.0}, ValueError, "dropout_p must be below 1; got 1.0"),
        ({"key_padding_mask": torch.ones(2, 5)}, TypeError, "must be a bool tensor .*; got torch.float32"),
        ({"key_padding_mask": torch.ones(5, 2).bool()}, ValueError, r"shape \(2, 5\); got \(5, 2\)"),
    ],
)
def test_bad_options_are_refused_at_the_door(change, error, message):
    with pytest.raises(error, match=message):
        entropy_invariant_attention(*qkv(), **change)


def test_bad_tensors_are_refused_at_the_door():
    q, k, v = qkv()
    for bad, error, message in (
        ((q[0], k, v), ValueError, "q must have 4 dimensions"),
        ((q, k.long(), v), TypeError, "k must be a floating tensor"),
        ((q, k, v.float()), TypeError, "one dtype; got torch.float64 and torch.float32 for v"),
        ((q, k[..., :3], v), ValueError, r"equal batch and width; got \(2, 2, 5, 4\) and \(2, 2, 5, 3\)"),
        ((q, k[:1], v[:1]), ValueError, "equal batch"),
        ((q, k[:, :, :3], v), ValueError, "agree in batch, heads and length"),
        (qkv(heads=4, groups=3), ValueError, "the 3 heads of k must divide the 4 heads of q"),
        ((q[..., :0], k[..., :0], v), ValueError, "width of at least 1"),
        ((q, None, v), TypeError, "k must be a tensor; got NoneType"),
    ):
        with pytest.raises(error, match=message):
            entropy_invariant_attention(*bad)
    with pytest.raises(ValueError, match="at least as many keys as queries; got 3 keys, 5 queries"):
        entropy_invariant_attention(q, k[:, :, :3], v[:, :, :3], causal=True)


@pytest.mark.parametrize(
    ("args", "error"),
    [
        ((True, 64), TypeError), ((-1, 64), ValueError), ((2.5, 64), TypeError), ((5, 0), ValueError),
        ((5, 64, 0.5), ValueError), ((5, 64, 512, 1), ValueError), ((5, 64, 512, 16, "inference"), ValueError),
        ((5, 64, 512, 16, "kappa", -1.0), ValueError), ((5, 64, 512, 16, "log512", 1.0), ValueError),
        ((torch.tensor([True]), 64), TypeError), ((torch.tensor([3, -1]), 64), ValueError),
        ((torch.tensor([[3.0], [math.nan]]), 64), ValueError),
    ],
)  # fmt: skip
def test_bad_arguments_of_the_scale_are_refused(args, error):
    with pytest.raises(error):
        entropy_invariant_scale(*args)


@pytest.mark.slow
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_compiles_as_one_graph_with_lengths_that_change(causal, padded):
    def function(q, k, v, mask):
        keep = mask if padded else None
        return entropy_invariant_attention(q, k, v, causal=causal, key_padding_mask=keep)

    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (6, 9, 30, 50):
        inputs, mask = qkv(rows=rows), padding(2, rows)
        torch.testing.assert_close(compiled(*inputs, mask), function(*inputs, mask))


def counted(function):
    """The function compiled, and the list of graphs that this took."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return aot_eager(graph, inputs)

    torch.compiler.reset()
    return torch.compile(function, fullgraph=True, backend=backend), graphs


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["train", "inference"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("per_row", [False, True])
def test_one_graph_serves_all_lengths_without_being_told_that_they_change(mode, causal, per_row):
    def function(q, k, v):
        return entropy_invariant_attention(q, k, v, causal, base=24, mode=mode, per_row=per_row)

    compiled, graphs = counted(function)
    for rows in (20, 21, 40, *range(2, 16)):  # around base and min_length
        inputs = qkv(rows=rows)
        torch.testing.assert_close(compiled(*inputs), function(*inputs))
    assert len(graphs) == 2  # of the first length, and of any


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["train", "inference"])
@pytest.mark.parametrize("causal", [False, True])
def test_exports_for_any_length(mode, causal):
    class Module(torch.nn.Module):
        def forward(self, q, k, v):
            return entropy_invariant_attention(q, k, v, causal, base=24, mode=mode)

    length = torch.export.Dim("length", min=2)
    exported = torch.export.export(Module(), qkv(rows=20), dynamic_shapes=({2: length},) * 3).module()
    for rows in (2, 16, 17, 50):
        torch.testing.assert_close(exported(*qkv(rows=rows)), Module()(*qkv(rows=rows)))


@pytest.mark.slow
def test_compiled_factors_of_low_precision_are_not_rounded():
    inputs = qkv(rows=37, width=64, dtype=torch.bfloat16)
    compiled, _ = counted(entropy_invariant_attention)
    exact = entropy_invariant_attention(*(x.double() for x in inputs))
    errors = [(f(*inputs).double() - exact).norm() for f in (compiled, entropy_invariant_attention)]
    assert errors[0] < 1.5 * errors[1]
