import copy
import itertools
import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kexue.attention import FEATURE_MAPS, FeatureMap, LinearAttention, LinearAttentionState, linear_attention
from kexue.attention import _causal_kernel as kernel
from kexue.attention import _causal_operator as operator
from kexue.attention._threads import split_heads
from reference import linear_attention as reference

CAUSAL = tuple(name for name in FEATURE_MAPS if name != "softmax_qk")


def inputs(b=2, h=2, t=10, s=None, d=4, e=3, dtype=torch.float64, seed=0, kv=None, grad=False):
    g = torch.Generator().manual_seed(seed)
    kv, s = kv or h, t if s is None else s
    shapes = ((b, h, t, d), (b, kv, s, d), (b, kv, s, e))
    out = [torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype) for shape in shapes]
    return [x.requires_grad_() for x in out] if grad else out


def expected(q, k, v, name, causal, mask=None, normalize=True):
    groups, out = q.shape[1] // k.shape[1], np.zeros((*q.shape[:3], v.shape[-1]))
    q, k, v = (x.detach().double().numpy() for x in (q, k, v))
    for b, h in itertools.product(range(q.shape[0]), range(q.shape[1])):
        args = (q[b, h], k[b, h // groups], v[b, h // groups])
        live = None if mask is None else mask[b].numpy()
        if name == "softmax_qk":
            out[b, h] = reference.efficient_attention(*args, live)
        else:
            out[b, h] = reference.attention(*args, reference.SIMILARITIES[name], causal, live, normalize)
    return torch.from_numpy(out)


def naive(q, k, v, name, causal, mask=None):
    """The whole matrix of weights with autograd; checked against the loops below."""
    phi = FEATURE_MAPS[name]
    if name == "softmax_qk" and mask is not None:
        k = k.masked_fill(~mask[:, None, :, None], -math.inf)
    phi_q, phi_k = phi.query(q), phi.key(k)
    if phi.log_space:
        phi_q, phi_k = phi_q.exp(), phi_k.exp()
    groups = q.shape[1] // k.shape[1]
    phi_k, v = phi_k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    weights = phi_q @ phi_k.mT
    if mask is not None:
        weights = weights * mask[:, None, None, :]
    if causal:
        weights = weights.tril(k.shape[2] - q.shape[2])
    if name == "softmax_qk":
        return weights @ v
    total = weights.sum(-1, keepdim=True)
    return weights @ v / torch.where(total > 0, total, 1.0)


@pytest.mark.parametrize("backend", ["operator", "plain"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", list(FEATURE_MAPS))
def test_values_are_those_of_the_definition(name, causal, backend):
    if causal and name not in CAUSAL:
        pytest.skip("bidirectional only")
    q, k, v = inputs(h=4, kv=2, t=7, s=9)
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[0, 3], mask[1, :6] = False, False
    for live in (None, mask):
        out = linear_attention(q, k, v, name, causal=causal, key_padding_mask=live, backend=backend)
        torch.testing.assert_close(out, expected(q, k, v, name, causal, live), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("backend", ["operator", "plain"])
@pytest.mark.parametrize("t", [1, 2, 63, 64, 65, 150])
@pytest.mark.parametrize(("name", "causal"), [*((n, True) for n in CAUSAL), *((n, False) for n in FEATURE_MAPS)])
def test_every_gradient_is_that_of_the_whole_matrix(name, causal, t, backend):
    if not causal and (backend == "plain" or t > 2):
        pytest.skip("one path only")
    q, k, v = inputs(h=4, kv=2, t=t, s=t + 3, grad=True)
    mask = torch.rand(2, t + 3, generator=torch.Generator().manual_seed(1)) < 0.7
    mask[1, : 3 + t // 2] = False
    out = linear_attention(q, k, v, name, causal=causal, key_padding_mask=mask, backend=backend)
    weight = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(2))
    want = naive(q, k, v, name, causal, mask)
    torch.testing.assert_close(out, want, rtol=1e-11, atol=1e-12)
    grads = torch.autograd.grad((out * weight).sum(), (q, k, v))
    for a, b in zip(grads, torch.autograd.grad((want * weight).sum(), (q, k, v)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", ["elu1", "exp", "relu2"])
def test_finite_differences_with_states_and_groups(name):
    q, k, v = inputs(b=1, h=2, kv=1, t=5, d=2, e=2, grad=True)
    s, z = torch.rand(1, 1, 2, 2, dtype=torch.float64).requires_grad_(), torch.rand(1, 1, 2, dtype=torch.float64)

    def function(q, k, v, s, z):
        o, state = linear_attention(q, k, v, name, causal=True, initial_state=(s, z), return_state=True)
        return o, *state

    assert torch.autograd.gradcheck(function, (q, k, v, s, z.requires_grad_()))


@pytest.mark.parametrize("backend", ["operator", "plain"])
@pytest.mark.parametrize("name", CAUSAL)
def test_pieces_with_a_state_are_the_whole(name, backend):
    q, k, v = inputs(t=200, d=8, grad=True)
    mask = torch.rand(2, 200, generator=torch.Generator().manual_seed(1)) < 0.8
    mask[1, :70] = False
    whole, last = linear_attention(q, k, v, name, causal=True, key_padding_mask=mask, return_state=True)
    state, parts = None, []
    for a, b in ((0, 50), (50, 51), (51, 140), (140, 140), (140, 200)):
        part, state = linear_attention(
            q[:, :, a:b], k[:, :, a:b], v[:, :, a:b], name, causal=True, key_padding_mask=mask[:, a:b],
            initial_state=state, return_state=True, backend=backend,
        )  # fmt: skip
        parts.append(part)
    pieces = torch.cat(parts, 2)
    torch.testing.assert_close(pieces, whole, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(state.s, last.s, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(state.z, last.z, rtol=1e-11, atol=1e-12)
    weight = torch.randn(whole.shape, dtype=whole.dtype)
    for a, b in zip(
        torch.autograd.grad((pieces * weight).sum() + state.s.sum(), (q, k, v)),
        torch.autograd.grad((whole * weight).sum() + last.s.sum(), (q, k, v)),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_the_recurrence_is_the_parallel_form_at_any_shape(data):
    draw = data.draw
    b, kv, groups = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    t, d, e = draw(st.integers(1, 140)), draw(st.integers(1, 9)), draw(st.integers(1, 9))
    name = draw(st.sampled_from(CAUSAL))
    d = max(d, 2 if name == "cosine1" else 1)  # at width 1 opposite vectors have weight 0: 0 / 0
    q, k, v = inputs(b, kv * groups, t, d=d, e=e, kv=kv, seed=draw(st.integers(0, 99)))
    whole = linear_attention(q, k, v, name, causal=True)
    state, i = None, draw(st.integers(0, t - 1))
    head, state = linear_attention(q[:, :, :i], k[:, :, :i], v[:, :, :i], name, causal=True, return_state=True)
    for j in range(i, min(t, i + 3)):
        step, state = linear_attention(
            q[:, :, j : j + 1], k[:, :, j : j + 1], v[:, :, j : j + 1], name, causal=True, initial_state=state,
            return_state=True,
        )  # fmt: skip
        head = torch.cat([head, step], 2)
    torch.testing.assert_close(head, whole[:, :, : head.shape[2]], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("backend", ["operator", "plain"])
@pytest.mark.parametrize("name", CAUSAL)
def test_later_tokens_change_no_bit_of_earlier_outputs(name, backend):
    q, k, v = inputs(t=150, dtype=torch.float32)
    out = linear_attention(q, k, v, name, causal=True, backend=backend)
    k, v = k.clone(), v.clone()
    k[:, :, 70], v[:, :, 70] = 50.0, -3.0  # a key that dominates everything in log space
    other = linear_attention(q, k, v, name, causal=True, backend=backend)
    assert torch.equal(out[:, :, :70], other[:, :, :70])
    assert not torch.equal(out[:, :, 70:], other[:, :, 70:])
    assert torch.isfinite(other).all()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", list(FEATURE_MAPS))
def test_padding_is_invisible_whatever_it_holds(name, causal):
    if causal and name not in CAUSAL:
        pytest.skip("bidirectional only")
    q, k, v = inputs(b=1, t=80, grad=True)
    mask = torch.arange(80)[None] >= 15
    with torch.no_grad():
        k[:, :, :15], v[:, :, :15] = math.nan, math.inf
    out = linear_attention(q, k, v, name, causal=causal, key_padding_mask=mask)
    alone = linear_attention(q[:, :, 15:], k[:, :, 15:], v[:, :, 15:], name, causal=causal)
    torch.testing.assert_close(out[:, :, 15:], alone, rtol=1e-11, atol=1e-12)
    grads = torch.autograd.grad(out[:, :, 15:].sum(), (q, k, v))
    assert all(torch.isfinite(g).all() for g in grads)
    assert all((g[:, :, :15] == 0).all() for g in grads)


@pytest.mark.parametrize("backend", ["operator", "plain"])
@pytest.mark.parametrize("name", list(FEATURE_MAPS))
def test_a_query_that_sees_nothing_gets_zero(name, backend):
    q, k, v = inputs(t=70, grad=True)
    mask = torch.ones(2, 70, dtype=torch.bool)
    mask[0] = False
    for causal in (False, True) if name in CAUSAL else (False,):
        out = linear_attention(q, k, v, name, causal=causal, key_padding_mask=mask, backend=backend)
        assert (out[0] == 0).all()
        assert torch.isfinite(out).all()
        assert all(torch.isfinite(g).all() for g in torch.autograd.grad(out.sum(), (q, k, v)))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["elu1", "exp", "relu2", "cosine1"])
def test_low_precision_accumulates_in_float32(name, dtype, causal):
    q, k, v = inputs(t=600, d=8, dtype=dtype, grad=True)
    out = linear_attention(q, k, v, name, causal=causal)
    exact = linear_attention(q.double(), k.double(), v.double(), name, causal=causal)
    assert out.dtype == dtype
    assert (out.double() - exact).norm() / exact.norm() < (2**-8 if dtype == torch.bfloat16 else 2**-10)
    for g in torch.autograd.grad(out.float().square().sum(), (q, k, v)):
        assert g.dtype == dtype
        assert torch.isfinite(g).all()


def test_elu1_keeps_very_negative_numbers():
    x = torch.tensor([-80.0, -20.0, -6.0, 0.0, 2.0], dtype=torch.float32)
    q = k = x.view(1, 1, 5, 1)
    v = torch.eye(5).view(1, 1, 5, 5)
    weights = linear_attention(q, k, v, normalize=False, causal=False)[0, 0]
    want = torch.outer(*[torch.where(x >= 0, x.double() + 1, x.double().exp())] * 2)
    assert (weights.double() / want - 1).abs()[1:, 1:].max() < 1e-5
    causal = linear_attention(q, k, v, normalize=False, causal=True)[0, 0]
    assert (causal.double() / want - 1).abs()[1:, 1:].tril().max() < 1e-5 + 1  # zeros above
    assert (causal.double() / want - 1).abs()[2:, 1].max() < 1e-5
    leaf = torch.zeros(1, 1, 2, 1, requires_grad=True)
    linear_attention(leaf, k[:, :, :2], v[:, :, :2], normalize=False, causal=True).sum().backward()
    phi = x[:2].double().exp()
    torch.testing.assert_close(leaf.grad[0, 0, :, 0].double(), phi.cumsum(0), rtol=1e-5, atol=0)  # derivative 1 at 0


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shift", [0.0, 300.0, -300.0])
def test_exponential_maps_do_not_overflow_or_vanish(shift, causal):
    q, k, v = inputs(dtype=torch.float32, t=100)
    plain = linear_attention(q, k, v, "exp", causal=causal)
    torch.testing.assert_close(
        linear_attention(q - shift, k + shift, v, "exp", causal=causal), plain, rtol=1e-3, atol=1e-4
    )


def test_softmax_exp_has_the_weights_of_exp():
    q, k, v = inputs(t=90)
    torch.testing.assert_close(
        linear_attention(q, k, v, "softmax_exp", causal=True), linear_attention(q, k, v, "exp", causal=True)
    )


@pytest.mark.parametrize("backend", ["operator", "plain"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", CAUSAL)
def test_unnormalised_sums_are_those_of_the_definition(name, causal, backend):
    q, k, v = inputs(h=2, kv=1, t=6, grad=True)
    out = linear_attention(q, k, v, name, causal=causal, normalize=False, backend=backend)
    torch.testing.assert_close(out, expected(q, k, v, name, causal, normalize=False))
    if name == "exp":
        want = (q.exp() @ k.exp().mT).tril() @ v if causal else q.exp() @ (k.exp().mT @ v)
        for a, b in zip(
            torch.autograd.grad(out.sin().sum(), (q, k, v)),
            torch.autograd.grad(want.sin().sum(), (q, k, v)),
            strict=True,
        ):
            torch.testing.assert_close(a, b)


def test_weights_are_convex():
    q, k, _ = inputs(t=100)
    for name in CAUSAL:
        rows = linear_attention(q, k, torch.eye(100, dtype=q.dtype).expand(2, 2, 100, 100), name, causal=True)
        torch.testing.assert_close(rows.sum(-1), torch.ones(2, 2, 100, dtype=q.dtype))
        assert (rows >= -1e-12).all()
        assert (rows.triu(1) == 0).all()


def test_scale_multiplies_the_product():
    q, k, v = inputs()
    half = linear_attention(q * 0.5**0.5, k * 0.5**0.5, v, "exp", causal=True)
    torch.testing.assert_close(linear_attention(q, k, v, "exp", causal=True, scale=0.5), half)


def test_zero_vectors_have_similarity_one_to_everything():
    q, k, v = inputs(t=5, grad=True)
    out = linear_attention(q * 0, k, v, "cosine1")
    torch.testing.assert_close(out, v.mean(2, keepdim=True).expand_as(out))
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(out.sum(), (q, k, v)))


@pytest.mark.parametrize("shape", [(0, 2, 5), (2, 2, 0), (0, 0, 3), (1, 1, 1)])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", ["elu1", "exp", "softmax_qk", "cosine1"])
def test_empty_inputs_give_empty_outputs(name, causal, shape):
    if causal and name not in CAUSAL:
        pytest.skip("bidirectional only")
    q, k, v = inputs(*shape, grad=True)
    out = linear_attention(q, k, v, name, causal=causal)
    assert out.shape == (*shape, 3)
    assert torch.isfinite(out).all()
    out.sum().backward()
    mask = torch.zeros(shape[0], shape[2], dtype=torch.bool)
    assert (linear_attention(q, k, v, name, causal=causal, key_padding_mask=mask) == 0).all()


def test_no_keys_at_all_give_zero():
    q, k, v = inputs(t=3, s=0)
    for name in FEATURE_MAPS:
        assert (linear_attention(q, k, v, name) == 0).all()


def test_strided_inputs_of_transformers_are_accepted_and_not_changed():
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs(t=130, dtype=torch.float32))
    copies = [x.clone() for x in (q, k, v)]
    out = linear_attention(q, k, v, causal=True)
    torch.testing.assert_close(out, linear_attention(*(x.contiguous() for x in (q, k, v)), causal=True))
    assert all(torch.equal(a, b) for a, b in zip((q, k, v), copies, strict=True))


def test_a_map_of_your_own():
    class Cubes(FeatureMap):
        def query(self, q):
            return q.abs() ** 3

        key = query

    q, k, v = inputs(t=70)
    weights = ((q.abs() ** 3) @ (k.abs() ** 3).mT).tril()
    want = weights @ v / weights.sum(-1, keepdim=True)
    torch.testing.assert_close(linear_attention(q, k, v, Cubes(), causal=True), want)


BAD = {
    "not a tensor": (lambda q, k, v: linear_attention(q.tolist(), k, v), TypeError, "q must be a tensor"),
    "integers": (lambda q, k, v: linear_attention(q.long(), k, v), TypeError, "floating"),
    "dimensions": (lambda q, k, v: linear_attention(q[0], k, v), ValueError, "4 dimensions"),
    "dtypes": (lambda q, k, v: linear_attention(q.float(), k, v), TypeError, "float32.*float64"),
    "widths": (lambda q, k, v: linear_attention(q[..., :2], k, v), ValueError, "got 2 and 4"),
    "no width": (lambda q, k, v: linear_attention(q[..., :0], k[..., :0], v), ValueError, "at least 1"),
    "times": (lambda q, k, v: linear_attention(q, k, v[:, :, 1:]), ValueError, "agree in batch, heads and time"),
    "batches": (lambda q, k, v: linear_attention(q[:1], k, v), ValueError, "got 1 and 2"),
    "heads": (lambda q, k, v: linear_attention(q[:, :3], k, v), ValueError, "multiple.*3 and 2"),
    "more queries": (
        lambda q, k, v: linear_attention(q, k[:, :, 1:], v[:, :, 1:], causal=True),
        ValueError,
        "10.*got 9",
    ),
    "unknown map": (lambda q, k, v: linear_attention(q, k, v, "gelu"), ValueError, "'elu1'.*got 'gelu'"),
    "not a map": (lambda q, k, v: linear_attention(q, k, v, torch.relu), TypeError, "FeatureMap"),
    "leaks": (lambda q, k, v: linear_attention(q, k, v, "softmax_qk", causal=True), ValueError, r"exp\(k\)"),
    "leaks by state": (
        lambda q, k, v: linear_attention(q, k, v, "softmax_qk", return_state=True),
        ValueError,
        "future",
    ),
    "mask dtype": (
        lambda q, k, v: linear_attention(q, k, v, key_padding_mask=torch.ones(2, 10)),
        TypeError,
        "bool.*float32",
    ),
    "mask shape": (
        lambda q, k, v: linear_attention(q, k, v, key_padding_mask=torch.ones(2, 9, dtype=torch.bool)),
        ValueError,
        r"\(2, 10\); got \(2, 9\)",
    ),
    "eps": (lambda q, k, v: linear_attention(q, k, v, eps=-1.0), ValueError, "eps"),
    "scale": (lambda q, k, v: linear_attention(q, k, v, scale=0.0), ValueError, "scale"),
    "scale of a Module": (
        lambda q, k, v: linear_attention(q, k, v, FEATURE_MAPS["exp"], scale=1.0),
        ValueError,
        "belongs to the feature map",
    ),
    "backend": (lambda q, k, v: linear_attention(q, k, v, backend="triton"), ValueError, "got 'triton'"),
    "state type": (lambda q, k, v: linear_attention(q, k, v, initial_state=q), TypeError, "LinearAttentionState"),
    "state shape": (
        lambda q, k, v: linear_attention(q, k, v, initial_state=(q, k)),
        ValueError,
        r"S of initial_state must have shape \(2, 2, 4, 3\)",
    ),
    "state of three": (lambda q, k, v: linear_attention(q, k, v, initial_state=(q, k, v)), TypeError, "pair"),
    "flag": (
        lambda q, k, v: linear_attention(q, k, v, causal="yes"),
        TypeError,
        "causal must be True or False; got 'yes'",
    ),
}


@pytest.mark.parametrize("case", list(BAD))
def test_bad_input_is_refused_at_the_door(case):
    function, error, message = BAD[case]
    q, k, v = inputs(h=4, kv=2)
    with pytest.raises(error, match=message):
        function(q, k, v)


def test_signed_similarities_are_not_normalised():
    class Signed(FeatureMap):
        positive = False

        def query(self, q):
            return q

        key = query

    q, k, v = inputs()
    with pytest.raises(ValueError, match="normalize=False"):
        linear_attention(q, k, v, Signed())
    torch.testing.assert_close(linear_attention(q, k, v, Signed(), normalize=False), q @ (k.mT @ v))


def test_second_derivatives_are_an_error_of_the_operator_and_exact_in_the_plain_form():
    q, k, v = inputs(b=1, h=1, t=4, d=2, e=2, grad=True)
    (grad,) = torch.autograd.grad(linear_attention(q, k, v, causal=True).square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        grad.sum().backward()
    assert torch.autograd.gradgradcheck(
        lambda q, k, v: linear_attention(q, k, v, "exp", causal=True, backend="plain"), (q, k, v)
    )


def operator_arguments(level):
    q, k, v = inputs(t=70, grad=True)
    s, z = torch.zeros(2, 2, 4, 3, dtype=q.dtype), torch.zeros(2, 2, 4, dtype=q.dtype)
    scale = torch.rand(2, 2, 70, dtype=q.dtype).cummax(-1).values if level else None
    mask = torch.rand(2, 1, 70, 1) < 0.8
    return (q.unsqueeze(2), k, v, mask, scale, s, z, torch.zeros(2, 2, dtype=q.dtype), "elu1", 0.0, True, 64, True)


@pytest.mark.slow
@pytest.mark.parametrize("level", [False, True])
def test_operator_is_registered_correctly(level):
    result = torch.library.opcheck(operator._forward, operator_arguments(level))
    assert set(result.values()) == {"SUCCESS"}


class Causal(torch.nn.Module):
    def forward(self, q, k, v):
        return linear_attention(q, k, v, causal=True)


@pytest.mark.slow
def test_export_sees_one_node_at_any_length():
    q, k, v = inputs(t=64, dtype=torch.float32)
    time = {2: torch.export.Dim("time", min=2, max=4096)}
    exported = torch.export.export(Causal(), (q, k, v), dynamic_shapes=(time, time, time))
    targets = [str(node.target) for node in exported.graph.nodes if node.op == "call_function"]
    assert sum("causal_linear_attention" in target for target in targets) == 1
    assert not any("bmm" in target for target in targets)
    q, k, v = inputs(t=333, dtype=torch.float32)
    torch.testing.assert_close(exported.module()(q, k, v), linear_attention(q, k, v, causal=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["elu1", "exp", "cosine1"])
def test_compiles_with_masks_and_states(name):
    q, k, v = inputs(t=100, dtype=torch.float32, grad=True)
    mask = torch.rand(2, 100, generator=torch.Generator().manual_seed(0)) < 0.9

    def function(q, k, v):
        head, state = linear_attention(
            q[:, :, :60],
            k[:, :, :60],
            v[:, :, :60],
            name,
            causal=True,
            key_padding_mask=mask[:, :60],
            return_state=True,
        )
        tail = linear_attention(
            q[:, :, 60:],
            k[:, :, 60:],
            v[:, :, 60:],
            name,
            causal=True,
            key_padding_mask=mask[:, 60:],
            initial_state=state,
        )
        return torch.cat([head, tail], 2)

    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    out, want = compiled(q, k, v), function(q, k, v)
    torch.testing.assert_close(out, want)
    for a, b in zip(
        torch.autograd.grad(out.sin().sum(), (q, k, v)), torch.autograd.grad(want.sin().sum(), (q, k, v)), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_autocast_does_not_lower_the_sums():
    q, k, v = inputs(t=200, dtype=torch.bfloat16, grad=True)
    want = linear_attention(q, k, v, causal=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = linear_attention(q, k, v, causal=True)
        out.sum().backward()
        assert torch.equal(linear_attention(q, k, v, "exp"), linear_attention(q, k, v, "exp"))
    assert torch.equal(out, want)


@pytest.mark.parametrize("name", ["elu1", "exp"])
def test_threads_change_no_bit_and_not_the_number_of_threads(name):
    q, k, v = inputs(b=3, h=4, t=300, d=32, e=32, dtype=torch.float32, grad=True)
    mask = torch.rand(3, 300, generator=torch.Generator().manual_seed(0)) < 0.9
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            out = linear_attention(q, k, v, name, causal=True, key_padding_mask=mask)
            results.append((out.detach(), *torch.autograd.grad(out.sum(), (q, k, v))))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@given(st.integers(0, 7), st.integers(0, 40), st.integers(1, 12))
def test_blocks_of_heads_cover_every_head_once(batch, heads, rows):
    seen = np.zeros((batch, heads), int)
    for b, h in split_heads(batch, heads, rows):
        assert seen[b, h].size <= rows
        seen[b, h] += 1
    assert (seen == 1).all()


def test_chunks_get_shorter_with_more_work_per_token():
    lengths = [kernel.chunk_length(rows, 64, 64) for rows in (1, 8, 64, 4096)]
    assert lengths == sorted(lengths, reverse=True)
    assert set(lengths) <= {32, 64, 128, 256}


def test_memory_grows_with_the_length_and_holds_no_matrix():
    from torch.profiler import ProfilerActivity, profile

    def peak(t):
        q, k, v = inputs(b=1, h=2, t=t, d=32, e=32, dtype=torch.float32, grad=True)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
            linear_attention(q, k, v, causal=True).sum().backward()
        now = top = 0
        for event in sorted(trace.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
            if event.name() == "[memory]":
                now += event.nbytes()
                top = max(top, now)
        return top / (4 * q.numel() * 4)  # in units of q, k, v and o together

    peaks = [peak(t) for t in (1024, 4096)]
    assert peaks[1] <= 2.2  # gradients included
    assert peaks[1] <= peaks[0] * 1.1


def rank(matrix):
    return int((torch.linalg.svdvals(matrix) > 1e-6 * torch.linalg.svdvals(matrix)[0]).sum())


def test_rank_of_the_weights_is_at_most_the_number_of_features():
    q, k, _ = inputs(b=1, h=1, t=64, d=5)
    eye = torch.eye(64, dtype=q.dtype).view(1, 1, 64, 64)
    assert rank(linear_attention(q, k, eye, "elu1")[0, 0]) == 5
    assert rank(linear_attention(q, k, eye, "cosine1")[0, 0]) == 6
    assert rank(linear_attention(q, k, eye, "elu1", causal=True)[0, 0]) == 64


# The layer


def layer(seed=0, **options):
    torch.manual_seed(seed)
    return LinearAttention(dim=16, heads=4, **options)


@pytest.mark.parametrize("rope", [None, "before", "after_numerator"])
@pytest.mark.parametrize("kv_heads", [None, 2])
def test_layer_decodes_step_by_step(rope, kv_heads):
    module = layer(causal=True, rope=rope, kv_heads=kv_heads)
    x = torch.randn(2, 12, 16)
    whole = module(x)
    first, state = module(x[:, :7], return_state=True)
    parts = [first]
    for i in range(7, 12):
        step, state = module(x[:, i : i + 1], state=state, return_state=True)
        parts.append(step)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-5, atol=1e-6)
    assert isinstance(state[0], LinearAttentionState)
    assert state[1] == 12


def test_rotated_numerator_is_the_formula():
    module = layer(rope="after_numerator").double()
    x = torch.randn(1, 6, 16, dtype=torch.float64)
    q, k, v = (f(x).view(1, 6, 4, 4).transpose(1, 2) for f in (module.q_proj, module.k_proj, module.v_proj))
    phi_q, phi_k = FEATURE_MAPS["elu1"].query(q), FEATURE_MAPS["elu1"].key(k)

    def turn(y):
        pairs = torch.view_as_complex(y.reshape(*y.shape[:-1], 2, 2).contiguous())
        angles = torch.arange(6)[:, None] * 10000.0 ** (-torch.arange(0, 4, 2, dtype=torch.float64) / 4)
        return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2)

    o = (turn(phi_q) @ turn(phi_k).mT) @ v / (phi_q @ phi_k.mT).sum(-1, keepdim=True)
    torch.testing.assert_close(module(x), module.o_proj(o.transpose(1, 2).reshape(1, 6, 16)))


def test_rotary_scores_depend_on_distances_only():
    from kexue.attention._rotary import rotate

    a, b = torch.randn(2, 8, dtype=torch.float64)
    at = [rotate(x[None], positions=torch.tensor([p]))[0] for x, p in ((a, 3), (b, 7), (a, 103), (b, 107))]
    torch.testing.assert_close(at[0] @ at[1], at[2] @ at[3])
    torch.testing.assert_close(at[0].norm(), a.norm())


def test_layer_ignores_padding_and_takes_positions():
    module, x = layer(rope="before"), torch.randn(1, 9, 16)
    mask = torch.arange(9)[None] >= 4
    padded = module(x, mask, positions=torch.arange(-4, 5))
    torch.testing.assert_close(padded[:, 4:], module(x[:, 4:]), rtol=1e-5, atol=1e-6)


def test_layer_is_saved_copied_and_differentiated():
    module, x = layer(feature_map="relu", causal=True), torch.randn(2, 70, 16)
    other = layer(seed=1, feature_map="relu", causal=True)
    other.load_state_dict(module.state_dict(), strict=True)
    for again in (other, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(again(x), module(x))
    module(x).sum().backward()
    assert all(p.grad is not None for p in module.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dim": 10}, "dim=10, heads=4"),
        ({"kv_heads": 3}, "kv_heads=3"),
        ({"rope": "after"}, "got 'after'"),
        ({"rope": "after_numerator", "feature_map": "exp"}, "plain features"),
        ({"rope": "after_numerator", "feature_map": "cosine1"}, "odd number of them, 5"),
        ({"dim": 12, "rope": "before"}, "odd number of them, 3"),
        ({"feature_map": "softmax_qk", "causal": True}, "softmax_exp"),
        ({"feature_map": "tanh"}, "got 'tanh'"),
        ({"heads": 0}, "heads must be at least 1"),
    ],
)
def test_layer_refuses_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        LinearAttention(**{"dim": 16, "heads": 4, **options})


def test_layer_refuses_bad_inputs():
    with pytest.raises(ValueError, match=r"width 16; got shape \(2, 3, 8\)"):
        layer()(torch.randn(2, 3, 8))
    with pytest.raises(ValueError, match="3 dimensions"):
        layer()(torch.randn(2, 16))
    with pytest.raises(TypeError, match="floating"):
        layer()(torch.ones(2, 3, 16, dtype=torch.long))


# Findings of a review


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("backend", ["operator", "plain"])
@pytest.mark.parametrize("name", ["elu1", "exp", "softmax_exp"])
def test_gradients_stay_finite_where_denominators_are_tiny(name, backend, causal):
    q, k, v = inputs(b=1, h=1, t=6, dtype=torch.float32)
    q, k = ((x - 25).requires_grad_() for x in (q, k))
    low = torch.autograd.grad(linear_attention(q, k, v, name, causal=causal, backend=backend).square().sum(), (q, k))
    exact = [x.detach().double().requires_grad_() for x in (q, k)]
    want = torch.autograd.grad(linear_attention(*exact, v.double(), name, causal=causal).square().sum(), exact)
    for a, b in zip(low, want, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("t", [1, 80])
def test_queries_and_keys_of_different_features_find_each_other(t, causal):
    q, k, v = inputs(b=1, h=2, t=t, d=2, dtype=torch.float32)
    q, k = q + torch.tensor([-100.0, 0.0]), k + torch.tensor([0.0, -100.0])
    out = linear_attention(q, k, v, "exp", causal=causal)
    want = linear_attention(q.double(), k.double(), v.double(), "exp", causal=causal)
    torch.testing.assert_close(out.double(), want, rtol=1e-3, atol=1e-4)
    _, state = linear_attention(q, k, v, "exp", return_state=True)
    again = linear_attention(q[:, :, :1], k[:, :, :1], v[:, :, :1], "exp", initial_state=state)
    once = linear_attention(q[:, :, :1], torch.cat([k, k[:, :, :1]], 2), torch.cat([v, v[:, :, :1]], 2), "exp")
    torch.testing.assert_close(again, once, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["elu1", "relu", "exp", "cosine1"])
@pytest.mark.parametrize("groups", [1, 2])
def test_gradients_in_bfloat16_do_not_depend_on_the_rounding_of_the_output(name, groups):
    q, k, v = inputs(b=1, h=2 * groups, kv=2, t=700, d=16, e=8, dtype=torch.bfloat16)
    v = (v + 10).requires_grad_()  # far from 0 the rounding of the output is larger than its differences
    q.requires_grad_(), k.requires_grad_()
    weight = torch.randn(1, 2 * groups, 700, 8, generator=torch.Generator().manual_seed(0))
    low = torch.autograd.grad((linear_attention(q, k, v, name, causal=True).float() * weight).sum(), (q, k, v))
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    want = torch.autograd.grad((linear_attention(*exact, name, causal=True) * weight).sum(), exact)
    for a, b in zip(low, want, strict=True):
        assert (a.double() - b).norm() < 1e-2 * b.norm()


def test_cosines_of_very_long_and_very_short_vectors():
    q, k, v = inputs(t=9, dtype=torch.float32)
    plain = linear_attention(q, k, v, "cosine1")
    torch.testing.assert_close(linear_attention(q * 1e25, k * 1e-9, v, "cosine1"), plain)


@pytest.mark.parametrize("dim", [64, 256])
def test_states_of_the_chunks_take_half_of_q_k_v_and_o_at_most(dim):
    chunk = kernel.chunk_length(8, dim, dim)
    assert dim * dim / chunk <= 4 * dim / 2
