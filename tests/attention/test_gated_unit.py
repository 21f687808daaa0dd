import math

import pytest
import torch

from attention.gated_inputs import normal, operands, padding
from kexue.attention import GatedAttentionUnit, gated_attention
from kexue.attention.gated_attention import NORMALIZATIONS
from reference import gated_attention_softmax as reference


@pytest.mark.slow
@pytest.mark.parametrize(("options", "dynamic"), [
    ({}, True), ({"causal": True}, True), ({"normalization": "relu2_n", "bias": True}, False),
    ({"normalization": "relu2_n", "chunk_size": 4, "causal": True}, False), ({"attention_dropout": 0.3}, False),
])  # fmt: skip
def test_the_unit_compiles_as_one_graph(options, dynamic):
    torch.compiler.reset()
    torch.manual_seed(0)
    unit = GatedAttentionUnit(6, key_size=4, **options).train()
    compiled = torch.compile(unit, fullgraph=True, backend="aot_eager", dynamic=dynamic)

    def results(function, x, mask):
        torch.manual_seed(4)
        out = function(x, mask)
        return out, torch.autograd.grad(out.square().sum(), x)

    for length in (5, 9) if dynamic else (9,):
        x, mask = normal(2, length, 6, dtype=torch.float32), padding("right", 2, length)
        torch.testing.assert_close(results(compiled, x, mask), results(unit, x, mask))


@pytest.mark.slow
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_the_compiled_unit_takes_any_length(normalization):
    torch.compiler.reset()
    torch.manual_seed(0)
    unit = GatedAttentionUnit(6, key_size=4, normalization=normalization)
    compiled = torch.compile(unit, fullgraph=True, backend="aot_eager")
    for length in range(20, 32):  # more than torch.compile compiles anew
        x = normal(2, length, 6, dtype=torch.float32)
        torch.testing.assert_close(compiled(x), unit(x))


@pytest.mark.parametrize("options", [
    {}, {"bias": True}, {"offset": False}, {"causal": True}, {"rope": False, "key_size": 3},
    {"normalization": "relu2_n"}, {"expansion": 1.5, "normalization": "relu2_const", "norm_length": 4},
    {"normalization": "relu2_sum"}, {"base": 20.0, "min_length": 2},
])  # fmt: skip
def test_the_unit_equals_the_formula_with_every_gradient(options):
    torch.manual_seed(1)
    unit = GatedAttentionUnit(4, **{"key_size": 6, **options}).double()
    with torch.no_grad():
        for parameter in unit.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    x, mask = normal(3, 6, 4), padding("right", 3, 6)
    inputs = (x, *unit.parameters())
    extra = {key: value for key, value in options.items() if key in ("base", "min_length", "norm_length")}
    shown = torch.ones(3, 1, 1)
    shown[2] = 0  # a sample without a token gives 0, whatever the bias
    out, expected = unit(x, mask), shown * reference.unit(unit, x, mask, **extra)
    torch.testing.assert_close(out, expected)
    upstream = normal(*out.shape, seed=9).detach()
    torch.testing.assert_close(
        torch.autograd.grad(out, inputs, upstream), torch.autograd.grad(expected, inputs, upstream)
    )


@pytest.mark.parametrize("rope", [False, True])
def test_cross_attention_equals_the_formula_with_every_gradient(rope):
    torch.manual_seed(1)
    unit = GatedAttentionUnit(4, key_size=6, rope=rope, self_attention=False, context_dim=5, bias=True).double()
    assert sorted(dict(unit.named_parameters())) == [
        f"{name}.{part}" for name in ("kv_dense", "o_dense", "uq_dense") for part in ("bias", "weight")
    ]
    x, context, mask = normal(3, 4, 4), normal(3, 7, 5, seed=1), padding("holes", 3, 7)
    mask[-1, 0] = True
    inputs = (x, context, *unit.parameters())
    out, expected = unit(x, mask, context), reference.unit(unit, x, mask, context)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(
        torch.autograd.grad(out.square().sum(), inputs), torch.autograd.grad(expected.square().sum(), inputs)
    )


def test_bias_false_drops_the_biases_and_not_the_offsets():
    names = {name for name, _ in GatedAttentionUnit(4, key_size=2).named_parameters()}
    assert names == {
        "i_dense.weight", "o_dense.weight", "q_scaleoffset.weight", "q_scaleoffset.bias", "k_scaleoffset.weight",
        "k_scaleoffset.bias",
    }  # fmt: skip
    names = {name for name, _ in GatedAttentionUnit(4, key_size=2, offset=False).named_parameters()}
    assert names == {"i_dense.weight", "o_dense.weight", "q_scaleoffset.weight", "k_scaleoffset.weight"}


def test_sizes_and_starting_values_are_those_of_the_paper():
    torch.manual_seed(0)
    unit = GatedAttentionUnit(400, bias=True)
    assert unit.i_dense.weight.shape == (2 * 800 + 128, 400)
    assert unit.o_dense.weight.shape == (400, 800)
    assert float(unit.i_dense.weight.detach().std()) == pytest.approx(400**-0.5, rel=0.01)
    assert float(unit.o_dense.weight.detach().std()) == pytest.approx(800**-0.5, rel=0.01)
    assert bool((unit.q_scaleoffset.weight == 1).all())
    assert not any(bool(b.any()) for name, b in unit.named_parameters() if name.endswith("bias"))


def test_an_identity_attention_is_a_gated_linear_unit():
    unit = GatedAttentionUnit(4, key_size=6, causal=True).double()
    x = normal(3, 1, 4)  # one token: A = 1
    u, v, _ = torch.nn.functional.silu(unit.i_dense(x)).split([8, 8, 6], -1)
    torch.testing.assert_close(unit(x), unit.o_dense(u * v))


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("causal", [False, True])
def test_padding_changes_nothing(normalization, side, causal):
    unit = GatedAttentionUnit(6, key_size=4, normalization=normalization, causal=causal, rope=side == "right").double()
    x = normal(2, 5, 6)
    junk = 1e3 * normal(2, 4, 6, seed=3)
    taken, left = torch.ones(2, 5, dtype=torch.bool), torch.zeros(2, 4, dtype=torch.bool)
    order = 1 if side == "right" else -1
    padded, mask = torch.cat([x, junk][::order], 1), torch.cat([taken, left][::order], 1)
    part = slice(0, 5) if side == "right" else slice(4, 9)
    torch.testing.assert_close(unit(padded, mask)[:, part], unit(x))
    torch.testing.assert_close(unit(padded, mask.long())[:, part], unit(x))
    (grad,) = torch.autograd.grad(unit(padded, mask)[:, part].square().sum(), junk)
    assert not grad.any()


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("length", [9, 300])
def test_later_tokens_do_not_change_earlier_outputs_bitwise(normalization, length):
    torch.manual_seed(0)
    unit = GatedAttentionUnit(6, key_size=4, normalization=normalization, causal=True)
    x = normal(1, length, 6, dtype=torch.float32).detach()
    for place in (1, length // 2, length - 1):
        changed = x.clone()
        changed[:, place] = 7.0
        first, second = unit(x), unit(changed)
        assert torch.equal(first[:, :place], second[:, :place])
        assert not torch.equal(first[:, place], second[:, place])


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_fully_padded_samples_give_zero_and_no_gradient(normalization, bias):
    unit = GatedAttentionUnit(6, key_size=4, normalization=normalization, bias=bias)
    if bias:
        torch.nn.init.ones_(unit.o_dense.bias)
    x, mask = normal(2, 5, 6, dtype=torch.float32), torch.ones(2, 5, dtype=torch.bool)
    mask[1] = False
    out = unit(x, mask)
    (grad,) = torch.autograd.grad(out.square().sum(), x)
    assert not out[1].any()
    assert not grad[1].any()
    assert torch.isfinite(grad).all()
    assert out[0].any()


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("shape", [(0, 5, 6), (2, 0, 6), (0, 0, 6), (2, 1, 6)])
def test_empty_and_single_inputs(normalization, shape):
    unit = GatedAttentionUnit(6, key_size=4, normalization=normalization)
    x = normal(*shape, dtype=torch.float32)
    for mask in (None, torch.ones(shape[:2], dtype=torch.bool)):
        out = unit(x, mask)
        out.sum().backward()
        assert out.shape == shape
        assert torch.isfinite(out).all()
    assert unit.attend(x)[1].shape == (shape[0], shape[1], shape[1])
    cross = GatedAttentionUnit(6, key_size=4, normalization=normalization, self_attention=False)
    assert not cross(normal(2, 3, 6, dtype=torch.float32), None, torch.zeros(2, 0, 6)).any()


def test_autocast_leaves_the_scores_in_float32():
    torch.manual_seed(0)
    unit = GatedAttentionUnit(16, key_size=8)
    x = normal(2, 30, 16, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = unit(x)
    out.float().sum().backward()
    plain = unit(x).detach()
    assert float((out.detach().float() - plain).norm() / plain.norm()) < 2e-2
    assert torch.isfinite(x.grad).all()


def test_dropout_is_drawn_again_in_the_backward_pass_and_off_in_evaluation():
    torch.manual_seed(0)
    unit = GatedAttentionUnit(6, key_size=4, attention_dropout=0.5)
    x = normal(2, 300, 6, dtype=torch.float32)
    torch.manual_seed(1)
    first = unit(x)
    torch.manual_seed(1)
    assert torch.equal(first, unit(x))
    assert not torch.equal(first, unit(x))
    plain = GatedAttentionUnit(6, key_size=4)
    plain.load_state_dict(unit.state_dict())
    assert torch.equal(unit.eval()(x), plain(x))


def test_the_matrix_of_a_unit_is_the_one_it_uses():
    unit = GatedAttentionUnit(6, key_size=4, attention_dropout=0.3).eval()
    x, mask = normal(2, 5, 6, dtype=torch.float32), padding("right", 2, 5)
    out, weights = unit.attend(x, mask)
    torch.testing.assert_close(out, unit(x, mask))
    torch.testing.assert_close(weights[0].sum(-1), torch.ones(5))
    assert not weights[1].any()
    out, weights = unit.train().attend(x)
    assert bool((weights == 0).any())


def test_initial_size_of_the_output():
    """LeCun weights, standard normal input: E silu = .2066, E silu^2 = .3557 (article 8990)."""
    torch.manual_seed(0)
    h = torch.nn.functional.silu(torch.randn(10**6, dtype=torch.float64))
    assert float(h.mean()) == pytest.approx(0.2066, abs=2e-3)
    assert float(h.square().mean()) == pytest.approx(0.3557, abs=3e-3)
    with torch.no_grad():
        n = 512
        for s, own_tolerance in ((128, 0.25), (1024, 0.06)):  # q . k of a token with itself settles as s grows
            unit = GatedAttentionUnit(1024, key_size=s, normalization="relu2_n")
            x = torch.randn(2, n, 1024)
            u, v, (q, k) = unit._project(x, None)
            formula = s * 0.3557**3 / n
            own = ((q * k).sum(-1, keepdim=True) / math.sqrt(s)).square() / n
            alone = unit.o_dense(u * v * own).square().mean().sqrt()
            assert float(alone) == pytest.approx(formula, rel=own_tolerance)  # the only key that the article counts
            if s == 128:  # the 511 others add up, as silu has a mean
                assert 2 < float(unit(x).square().mean().sqrt()) / formula < 3


@pytest.mark.parametrize("size", [1e-3, 1e5])
def test_scaling_all_weights_scales_the_relu2_output_by_the_seventh_power(size):
    """Exactly where silu is homogeneous: lambda x / 2 at small lambda, lambda relu(x) at large lambda."""
    torch.manual_seed(0)
    unit = GatedAttentionUnit(32, key_size=16, normalization="relu2_n").double()
    x = torch.randn(2, 20, 32, dtype=torch.float64)

    def output(factor):
        scaled = GatedAttentionUnit(32, key_size=16, normalization="relu2_n").double()
        scaled.load_state_dict(unit.state_dict())
        with torch.no_grad():
            scaled.i_dense.weight.mul_(factor)
            scaled.o_dense.weight.mul_(factor)
        return scaled(x)

    ratio = (output(2 * size).norm() / output(size).norm()).detach()
    assert math.log2(float(ratio)) == pytest.approx(7, abs=0.02)


def chunked(unit, x, mask):
    """FLASH in plain float64, token by token."""
    e, s, c = unit.width, unit.key_size, unit.chunk_size
    h = reference.silu(x @ unit.i_dense.weight.T)
    u, v, z = h[..., :e], h[..., e : 2 * e], h[..., 2 * e :]
    q, k, far_q, far_k = (
        reference.rotate(z * part.weight + part.bias)
        for part in (unit.q_scaleoffset, unit.k_scaleoffset, unit.far_q_scaleoffset, unit.far_k_scaleoffset)
    )
    out = torch.zeros_like(v)
    for b in range(x.shape[0]):
        for i in range(x.shape[1]):
            near = torch.zeros(e, dtype=torch.float64)
            far, tokens = torch.zeros(e, dtype=torch.float64), 0
            for j in range(x.shape[1]):
                if not mask[b, j]:
                    continue
                if i // c == j // c and not (unit.causal and j > i):
                    near = near + torch.clamp(q[b, i] @ k[b, j] / math.sqrt(s), min=0) ** 2 / c * v[b, j]
                if not unit.causal or j // c < i // c:
                    far = far + far_q[b, i] @ far_k[b, j] * v[b, j]
                    tokens += 1
            out[b, i] = near + far / max(tokens, 1)
    return (u * out) @ unit.o_dense.weight.T


@pytest.mark.parametrize("mask", ["none", "right", "holes"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("chunk", [1, 3, 4, 20])
def test_chunks_equal_the_formula_with_every_gradient(chunk, causal, mask):
    torch.manual_seed(1)
    unit = GatedAttentionUnit(4, key_size=6, normalization="relu2_n", causal=causal, chunk_size=chunk).double()
    with torch.no_grad():
        for parameter in unit.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    x, mask = normal(3, 10, 4), padding(mask, 3, 10)
    inputs = (x, *unit.parameters())
    out = unit(x, mask)
    expected = chunked(unit, x, torch.ones(3, 10, dtype=torch.bool) if mask is None else mask)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(  # one causal chunk has no linear part: gradients of its scales are 0
        torch.autograd.grad(out.square().sum(), inputs),
        torch.autograd.grad(expected.square().sum(), inputs, materialize_grads=True),
    )


def test_chunks_are_causal_bitwise_and_empty_inputs_pass():
    torch.manual_seed(0)
    unit = GatedAttentionUnit(6, key_size=4, normalization="relu2_n", causal=True, chunk_size=8)
    x = normal(1, 50, 6, dtype=torch.float32).detach()
    for place in (1, 8, 30, 49):
        changed = x.clone()
        changed[:, place] = 7.0
        first, second = unit(x), unit(changed)
        assert torch.equal(first[:, :place], second[:, :place])
        assert not torch.equal(first[:, place], second[:, place])
    for shape in ((0, 5, 6), (2, 0, 6), (2, 1, 6)):
        assert unit(torch.ones(shape)).shape == shape
    with pytest.raises(ValueError, match="no matrix"):
        unit.attend(x)


BAD_UNITS = [
    ({"dim": 0}, ValueError, "dim must be at least 1; got 0"),
    ({"dim": 4.0}, TypeError, "dim must be an integer"),
    ({"expansion": 0}, ValueError, "expansion"),
    ({"expansion": 1.5, "dim": 5}, ValueError, "1.5 \\* 5"),
    ({"key_size": 5}, ValueError, "key_size must be even .* got 5"),
    ({"key_size": 0}, ValueError, "key_size"),
    ({"normalization": "relu2"}, ValueError, "normalization must be one of .*got 'relu2'"),
    ({"attention_dropout": 1.0}, ValueError, "dropout must be below 1; got 1.0"),
    ({"attention_dropout": -0.1}, ValueError, "dropout"),
    ({"base": 1.0}, ValueError, "base"),
    ({"min_length": 1}, ValueError, "min_length"),
    ({"norm_length": 0}, ValueError, "norm_length"),
    ({"rope_base": math.nan}, ValueError, "rope_base"),
    ({"context_dim": 3}, ValueError, "self_attention=False"),
    ({"self_attention": False, "causal": True}, ValueError, "causal"),
    ({"chunk_size": 0, "normalization": "relu2_n"}, ValueError, "chunk_size"),
    ({"chunk_size": 4}, ValueError, "chunk_size needs normalization='relu2_n'.*got 'softmax_plus'"),
    ({"chunk_size": 4, "normalization": "relu2_n", "attention_dropout": 0.1}, ValueError, "attention_dropout=0"),
]


@pytest.mark.parametrize(("options", "error", "message"), BAD_UNITS)
def test_bad_units_are_rejected(options, error, message):
    with pytest.raises(error, match=message):
        GatedAttentionUnit(**{"dim": 4, "key_size": 2, **options})


def test_bad_calls_are_rejected():
    unit = GatedAttentionUnit(4, key_size=2)
    x = torch.zeros(2, 3, 4)
    for bad, error in ((torch.zeros(2, 4), ValueError), (torch.zeros(2, 3, 5), ValueError), (x.long(), TypeError)):
        with pytest.raises(error, match="x must"):
            unit(bad)
    with pytest.raises(ValueError, match=r"attention_mask must have shape \(2, 3\); got \(2, 1, 3\)"):
        unit(x, torch.ones(2, 1, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match="got values from -10000 to 0"):
        unit(x, torch.tensor([[0.0, 0.0, -1e4]] * 2))
    with pytest.raises(TypeError, match="attention_mask must be a tensor; got list"):
        unit(x, [[True] * 3] * 2)
    with pytest.raises(ValueError, match="self_attention=False"):
        unit(x, None, x)
    cross = GatedAttentionUnit(4, key_size=2, self_attention=False, context_dim=5)
    with pytest.raises(TypeError, match="context must be a tensor; got NoneType"):
        cross(x)
    with pytest.raises(ValueError, match=r"\(2, S, 5\)"):
        cross(x, None, torch.zeros(2, 3, 4))
    q, k, v, gate = operands()
    for call in (
        lambda: gated_attention(q, k[:, :, :3], v),
        lambda: gated_attention(q, k[:2], v),
        lambda: gated_attention(q, k, v[:, :3]),
        lambda: gated_attention(q, k, v, gate[:, :3]),
        lambda: gated_attention(q[:, :3], k, v, causal=True),
        lambda: gated_attention(q, k, v, dropout=1.5),
        lambda: gated_attention(q[0], k, v),
    ):
        with pytest.raises(ValueError, match="got"):
            call()
