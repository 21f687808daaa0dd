import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attention.residual_forms import FORMS, LAYERS, gradients, layers, padding
from kexue.attention import ResidualScores, residual_attention, residual_attention_stack, residual_attention_step
from reference import realformer as reference


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(2, 2, 5, 5), (1, 3, 4, 7), (3, 1, 1, 2)])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("mean", "detach"), [(False, False), (True, False), (False, True)])
def test_values_and_every_gradient_equal_the_reference(form, shape, masked, causal, mean, detach, tiling):
    qs, ks, vs = layers(*shape)
    mask = padding(shape[0], shape[3]) if masked else None
    outs = FORMS[form](qs, ks, vs, mask, causal, None, mean, detach)
    expected, _ = reference.realformer(qs, ks, vs, padding=mask, causal=causal, mean=mean, detach=detach)
    torch.testing.assert_close(outs, expected)
    if masked and shape[0] > 1:
        assert not outs[-1][0].any()
    leaves = [*qs, *ks, *vs]
    torch.testing.assert_close(gradients(outs, leaves), gradients(expected, leaves))


@settings(max_examples=25)
@given(
    st.sampled_from(sorted(FORMS)),
    st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 9), st.integers(0, 4)),
    st.integers(1, 4),
    st.booleans(),
    st.floats(-2, 2),
    st.integers(0, 10**6),
)
def test_any_shape_and_scale_equals_the_reference(form, shape, count, causal, scale, seed):
    batch, heads, rows, more = shape
    qs, ks, vs = layers(batch, heads, rows, rows + more, count=count, seed=seed)
    mask = torch.rand(batch, rows + more, generator=torch.Generator().manual_seed(seed)) < 0.7
    outs = FORMS[form](qs, ks, vs, mask, causal, scale)
    expected, _ = reference.realformer(qs, ks, vs, padding=mask, causal=causal, scale=scale)
    torch.testing.assert_close(outs, expected)
    torch.testing.assert_close(gradients(outs, [*qs, *ks, *vs]), gradients(expected, [*qs, *ks, *vs]))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("causal", [False, True])
def test_gradcheck(form, causal):
    qs, ks, vs = layers(1, 2, 3, 4, 2, 2)
    mask = torch.tensor([[True, True, False, True]])
    inputs = (*qs, *ks, *vs)

    def function(*x):
        return tuple(FORMS[form](x[:LAYERS], x[LAYERS : 2 * LAYERS], x[2 * LAYERS :], mask, causal))

    assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.parametrize("form", FORMS)
def test_padding_whatever_it_holds_does_not_get_out(form):
    qs, ks, vs = layers(2, 2, 5, 7)
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[:, 5:] = False
    short = FORMS[form](qs, [k[:, :, :5] for k in ks], [v[:, :, :5] for v in vs])
    torch.testing.assert_close(FORMS[form](qs, ks, vs, mask), short)
    with torch.no_grad():
        for x in (*ks, *vs):
            x[:, :, 5] = torch.nan
            x[:, :, 6] = torch.inf
    outs = FORMS[form](qs, ks, vs, mask)
    torch.testing.assert_close(outs, short)
    assert all(torch.isfinite(g).all() for g in gradients(outs, [*qs, *ks, *vs]))


@pytest.mark.parametrize("form", FORMS)
def test_later_tokens_do_not_change_a_bit_of_causal_outputs(form, tiling):
    qs, ks, vs = layers(rows=9, keys=9, dtype=torch.float32)
    first = FORMS[form](qs, ks, vs, causal=True)
    with torch.no_grad():
        for x in (*qs, *ks, *vs):
            x[:, :, 6:] += 3
    second = FORMS[form](qs, ks, vs, causal=True)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a[:, :, :6], b[:, :, :6])
        assert not torch.equal(a[:, :, 6:], b[:, :, 6:])


@pytest.mark.parametrize("form", FORMS)
def test_a_sequence_in_a_batch_gives_what_it_gives_alone(form, tiling):
    qs, ks, vs = layers(3, 2, 5, 6)
    mask = padding(3, 6)
    outs = FORMS[form](qs, ks, vs, mask)
    for b in range(3):
        one = [[x[b : b + 1] for x in xs] for xs in (qs, ks, vs)]
        torch.testing.assert_close(FORMS[form](*one, mask[b : b + 1]), [x[b : b + 1] for x in outs])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_summed_in_float32(form, dtype):
    qs, ks, vs = layers(rows=16, keys=16, width=8, count=6, dtype=dtype)
    outs = FORMS[form](qs, ks, vs)
    exact = [[x.detach().double().requires_grad_() for x in xs] for xs in (qs, ks, vs)]
    expected = reference.realformer(*exact)[0]
    assert outs[-1].dtype == dtype
    for a, b in zip(outs, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps)
    got, want = gradients(outs, [*qs, *ks, *vs]), gradients(expected, [x for xs in exact for x in xs])
    for a, b in zip(got, want, strict=True):
        assert a.dtype == dtype
        assert float((a.double() - b).norm() / b.norm()) < 4 * torch.finfo(dtype).eps


def test_scores_of_low_precision_inputs_are_float32():
    q, k, v = (x[0] for x in layers(dtype=torch.bfloat16))
    assert residual_attention_step(q, k, v)[1].dtype == torch.float32


def test_autocast_changes_nothing():
    qs, ks, vs = layers(dtype=torch.float32)
    for form in FORMS.values():
        plain = form(qs, ks, vs)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert all(torch.equal(a, b) for a, b in zip(form(qs, ks, vs), plain, strict=True))


def test_equal_calls_give_equal_bits_and_leave_the_inputs_alone():
    qs, ks, vs = layers(2, 3, 40, 40, dtype=torch.float32)
    copies = [x.detach().clone() for x in (*qs, *ks, *vs)]
    for form in FORMS.values():
        results = [[*(outs := form(qs, ks, vs, padding(2, 40))), *gradients(outs, [*qs, *ks, *vs])] for _ in range(2)]
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert all(torch.equal(x, y) for x, y in zip((*qs, *ks, *vs), copies, strict=True))


def test_transposed_inputs_and_outputs_are_fine():
    qs, ks, vs = layers(rows=6, keys=6)
    turned = [[x.transpose(1, 2).contiguous().transpose(1, 2) for x in xs] for xs in (qs, ks, vs)]
    for form in FORMS.values():
        torch.testing.assert_close(form(*turned), form(qs, ks, vs))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(0, 2, 5, 5), (2, 2, 0, 5), (2, 0, 5, 5)])
def test_nothing_gives_nothing(form, shape):
    qs, ks, vs = layers(*shape)
    outs = FORMS[form](qs, ks, vs)
    assert outs[-1].shape == (*shape[:3], 3)
    assert all(g.shape == x.shape and not g.any() for g, x in zip(gradients(outs, vs), vs, strict=True))


@pytest.mark.parametrize("form", FORMS)
def test_no_keys_give_zeros(form):
    outs = FORMS[form](*layers(keys=0))
    assert outs[-1].shape == (2, 2, 5, 3)
    assert not outs[-1].any()


def test_sums_of_queries_and_keys_are_the_articles_other_method():
    qs, ks, vs = layers()
    for mask, mean in ((None, False), (padding(), True)):
        out = residual_attention(qs, ks, vs[-1], "qk_residual", mask, mean=mean)
        q, k, count = sum(qs), sum(ks), LAYERS if mean else 1
        expected = reference.realformer([q], [k], [vs[-1]], padding=mask, scale=0.5 / count)[0][0]
        torch.testing.assert_close(out, expected)
        leaves = [*qs, *ks, vs[-1]]
        torch.testing.assert_close(gradients([out], leaves), gradients([expected], leaves))
    alone = residual_attention(qs[:1], ks[:1], vs[0], "qk_residual")
    torch.testing.assert_close(alone, residual_attention(qs[:1], ks[:1], vs[0]))
    assert not torch.allclose(out, residual_attention(qs, ks, vs[-1], key_padding_mask=padding(), mean=True))
    detached = residual_attention(qs, ks, vs[-1], "qk_residual", detach_scores=True)
    assert torch.autograd.grad(detached.sum(), qs[0], allow_unused=True) == (None,)


@pytest.mark.parametrize("mode", ["mask", "concat", "qk_residual"])
def test_gradients_of_different_layers_do_not_share_memory(mode):
    qs, ks, vs = layers()
    residual_attention(qs, ks, vs[-1], mode).sum().backward()
    expected = [x.grad.clone() for x in qs]
    qs[0].grad.zero_()
    assert all(torch.equal(x.grad, g) for x, g in zip(qs[1:], expected[1:], strict=True))


def test_auto_keeps_the_matrix_only_within_the_budget():
    qs, ks, vs = layers()
    size = 2 * 2 * 5 * 5 * 8
    for budget, kept in ((size, True), (size - 1, False)):
        out = residual_attention(qs, ks, vs[-1], budget=budget)
        assert any(x is not None and tuple(x.shape) == (4, 5, 5) for x in out.grad_fn.saved_tensors) == kept
        assert residual_attention(qs, ks, vs[-1], "mask").grad_fn.saved_tensors[1] is not None
    with torch.no_grad():
        assert residual_attention(qs, ks, vs[-1], "mask").grad_fn is None


@pytest.mark.parametrize("form", FORMS)
def test_differentiating_twice_is_an_error(form):
    qs, ks, vs = layers()
    (grad,) = torch.autograd.grad(FORMS[form](qs, ks, vs)[-1].sum(), qs[-1], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        grad.square().sum().backward()


@pytest.mark.slow
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_compiles_as_one_graph_and_gives_the_same(form, causal):
    torch.compiler.reset()
    qs, ks, vs = layers(dtype=torch.float32)
    mask = padding()
    compiled = torch.compile(lambda a, b, c: FORMS[form](a, b, c, mask, causal), fullgraph=True, backend="aot_eager")
    outs, expected = compiled(qs, ks, vs), FORMS[form](qs, ks, vs, mask, causal)
    torch.testing.assert_close(outs, expected)
    torch.testing.assert_close(gradients(outs, [*qs, *ks, *vs]), gradients(expected, [*qs, *ks, *vs]))


BAD = [
    ({"qs": []}, ValueError, "one layer at least; got an empty list"),
    ({"qs": torch.randn(2, 2, 5, 4)}, TypeError, "list of tensors.*got Tensor"),
    ({"ks": [torch.randn(2, 2, 5, 4)]}, ValueError, "equally many layers; got 2 and 1"),
    ({"qs": [torch.randn(2, 2, 5, 4), torch.randn(2, 1, 5, 4)]}, ValueError, r"\(2, 2, 5, 4\).*\(2, 1, 5, 4\)"),
    ({"ks": [torch.randn(2, 2, 5, 4), torch.randn(2, 2, 6, 4)]}, ValueError, r"\(2, 2, 5, 4\).*\(2, 2, 6, 4\)"),
    ({"ks": [torch.randn(2, 1, 5, 4)] * 2}, ValueError, r"heads of q, \(2, 2\); got \(2, 1\)"),
    ({"ks": [torch.randn(2, 2, 5, 3)] * 2}, ValueError, "width of q, 4, above 0; got 3"),
    ({"v": torch.randn(2, 2, 6, 3)}, ValueError, "as many keys as k, 5; got 6"),
    ({"v": torch.randn(2, 5, 3)}, ValueError, r"4 dimensions; got shape \(2, 5, 3\)"),
    ({"v": torch.randn(2, 2, 5, 3).double()}, TypeError, "float32.*float64"),
    ({"qs": [torch.ones(2, 2, 5, 4, dtype=torch.long)] * 2}, TypeError, "int64"),
    ({"mode": "sum"}, ValueError, "'sum'"),
    ({"key_padding_mask": torch.ones(2, 5)}, TypeError, "bool.*float32"),
    ({"key_padding_mask": torch.ones(2, 4, dtype=torch.bool)}, ValueError, r"\(2, 5\); got \(2, 4\)"),
    ({"scale": float("nan")}, ValueError, "finite"),
    ({"scale": "small"}, TypeError, "'small'"),
    ({"budget": -1}, ValueError, "-1"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_bad_input_is_rejected_with_expected_and_received(change, error, message):
    arguments = {"qs": [torch.randn(2, 2, 5, 4)] * 2, "ks": [torch.randn(2, 2, 5, 4)] * 2, "v": torch.randn(2, 2, 5, 3)}
    with pytest.raises(error, match=message):
        residual_attention(**arguments | change)


def test_bad_input_of_the_other_forms_is_rejected():
    q, k, v = (x[0] for x in layers())
    with pytest.raises(ValueError, match=r"\(2, 2, 5, 5\); got \(2, 1, 5, 5\)"):
        residual_attention_step(q, k, v, torch.zeros(2, 1, 5, 5))
    with pytest.raises(TypeError, match="prev_scores must be a tensor; got list"):
        residual_attention_step(q, k, v, [0.0])
    with pytest.raises(ValueError, match=r"below 1; got 1\.0"):
        residual_attention_step(q, k, v, dropout=1.0)
    with pytest.raises(ValueError, match="mean_over must be at least 1; got 0"):
        residual_attention_step(q, k, v, mean_over=0)
    with pytest.raises(ValueError, match="as many keys as queries, 5; got 3"):
        residual_attention_step(q, k[:, :, :3], v[:, :, :3], causal=True)
    with pytest.raises(ValueError, match="vs must hold as many layers as qs, 2; got 1"):
        residual_attention_stack([q, q], [k, k], [v])
    with pytest.raises(ValueError, match="at least 0"):
        ResidualScores(dropout=-0.1)
