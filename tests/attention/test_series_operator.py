import importlib.util
import math
import sys
from pathlib import Path

import pytest
import torch

from kexue.attention import (
    ExpPowerFeatures,
    LinearAttention,
    LinearAttentionState,
    TaylorFeatures,
    _series_kernel,
    _series_loops,
    linear_attention,
)
from reference import infinite_dimensional_attention as reference

FORMS = {"taylor": TaylorFeatures, "power": ExpPowerFeatures}


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def inputs(b=2, heads=4, own=2, t=9, s=9, d=3, e=4, dtype=torch.float64):
    shapes = ((b, heads, t, d), (b, own, s, d), (b, own, s, e))
    return [normal(*shape, seed=i, dtype=dtype).requires_grad_() for i, shape in enumerate(shapes)]


def holes(b, s):
    mask = torch.rand(b, s, generator=torch.Generator().manual_seed(7)) < 0.6
    mask[:, 0] = True
    return mask


@pytest.fixture(params=["as it is", "small blocks"])
def blocks(request, monkeypatch):
    """Blocks so small that short sequences have several of each kind."""
    if request.param == "small blocks":
        for name, value in (("ROWS", 2), ("COLUMNS", 3), ("FEATURE_BLOCK", 60)):
            monkeypatch.setattr(_series_loops, name, value)


@pytest.fixture(params=["one chunk", "chunks of 4"])
def chunks(request, monkeypatch):
    """Both forms: tiles of scores only, and the state (between chunks when causal)."""
    whole = request.param == "one chunk"

    def length(t, s, d, e, degree, causal, initial, wanted):
        return (s if whole else 4) if causal else int(whole)

    monkeypatch.setattr(_series_kernel, "chunk_length", length)


# The operator against the formula


@pytest.mark.parametrize("kind", FORMS)
@pytest.mark.parametrize("p", [1, 2, 3, 4])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_values_and_gradients_equal_the_formula(kind, p, causal, masked, blocks, chunks):
    q, k, v = inputs()
    mask = holes(2, 9) if masked else None
    normalize = p % 2 == 0
    got = linear_attention(
        q, k, v, FORMS[kind](p, scale=0.8), causal=causal, key_padding_mask=mask, eps=0.05, normalize=normalize
    )
    want = reference.attention(q, k, v, kind, p, 0.8, causal, mask, 0.05, normalize)
    up = normal(*want.shape, seed=9)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, (q, k, v), up), torch.autograd.grad(want, (q, k, v), up))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("t", [1, 5, 9])
def test_earlier_tokens_count_whether_in_the_state_or_before_the_first_query(causal, masked, t, blocks, chunks):
    q, k, v = inputs(t=t)
    k0, v0 = (x.requires_grad_() for x in (normal(2, 2, 6, 3, seed=5), normal(2, 2, 6, 4, seed=6)))
    phi = TaylorFeatures(2)
    mask = holes(2, 9) if masked else None
    first = normal(2, 2, 6, 3, seed=8)
    _, state = linear_attention(first, k0, v0, phi, causal=causal, return_state=True)
    got = linear_attention(q, k, v, phi, causal=causal, key_padding_mask=mask, initial_state=state)
    want = reference.attention(q, k, v, "taylor", 2, 3**-0.5, causal, mask, before=(k0, v0))
    up, leaves = normal(*want.shape, seed=9), (q, k, v, k0, v0)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, leaves, up), torch.autograd.grad(want, leaves, up))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_operator_equals_the_plain_form_with_states_in_and_out(causal, normalize, masked, blocks, chunks):
    q, k, v = inputs(t=7)
    s, z = normal(2, 2, 10, 4, seed=3).requires_grad_(), normal(2, 2, 10, seed=4).abs().requires_grad_()
    results = []
    for backend in ("operator", "plain"):
        out, state = linear_attention(
            q, k, v, TaylorFeatures(2), causal=causal, key_padding_mask=holes(2, 9) if masked else None,
            initial_state=(s, z), return_state=True, normalize=normalize, eps=20.0, backend=backend,
        )  # fmt: skip
        made = (out, *state[:2])
        ups = [normal(*x.shape, seed=20 + i) for i, x in enumerate(made)]
        results.append((made, torch.autograd.grad(made, (q, k, v, s, z), ups)))
    torch.testing.assert_close(results[0], results[1])


def test_gradients_of_the_state_alone(chunks):
    q, k, v = inputs()
    grads = []
    for backend in ("operator", "plain"):
        _, state = linear_attention(q, k, v, TaylorFeatures(3), causal=True, return_state=True, normalize=False,
                                    backend=backend)  # fmt: skip
        loss = (state.s.square().sum() + state.z.exp().sum()) / 100
        grads.append(torch.autograd.grad(loss, (k, v)))
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("phi", [TaylorFeatures(2), ExpPowerFeatures(3, normalize_inputs=True, scale=2.0)])
def test_gradcheck(phi, chunks):
    q, k, v = inputs(b=1, heads=2, own=1, t=5, s=6, d=2, e=2)
    s = normal(1, 1, phi.num_features(2), 2, seed=3).requires_grad_()
    z = (3 + normal(1, 1, phi.num_features(2), seed=4).abs()).requires_grad_()

    def run(q, k, v, s, z):
        out, state = linear_attention(q, k, v, phi, causal=True, initial_state=(s, z), return_state=True, eps=50.0)
        return out, state.s, state.z

    assert torch.autograd.gradcheck(run, (q, k, v, s, z))


def test_long_sequences_choose_the_state_and_agree_with_tiles(monkeypatch):
    q, k, v = (normal(1, 1, 700, 4, seed=i) for i in range(3))
    assert _series_kernel.chunk_length(700, 700, 4, 4, 2, True, False, False) < 700
    assert _series_kernel.chunk_length(700, 700, 4, 4, 2, False, False, False) == 0
    got = [linear_attention(q, k, v, TaylorFeatures(2), causal=causal) for causal in (True, False)]
    monkeypatch.setattr(_series_kernel, "chunk_length", lambda t, s, *a: s if a[3] else 1)
    torch.testing.assert_close(
        got, [linear_attention(q, k, v, TaylorFeatures(2), causal=causal) for causal in (True, False)]
    )


def test_short_sequences_need_no_features_however_many_there_would_be():
    q, k, v = (normal(1, 1, 20, 64, seed=i).requires_grad_() for i in range(3))
    phi = TaylorFeatures(32)  # 10^25 features
    got = linear_attention(q, k, v, phi, causal=True)
    softmax = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(got, softmax, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        torch.autograd.grad(got.sin().sum(), (q, k, v)), torch.autograd.grad(softmax.sin().sum(), (q, k, v)),
        rtol=1e-5, atol=1e-6,
    )  # fmt: skip
    with pytest.raises(ValueError, match="lower degree"):
        linear_attention(q, k, v, phi, causal=True, return_state=True)


@pytest.mark.parametrize("causal", [False, True])
def test_no_square_matrix_of_scores_exists(causal, monkeypatch):
    path = Path(__file__).parents[2] / "benchmarks" / "harness.py"
    spec = importlib.util.spec_from_file_location("kexue_benchmark_harness_for_series", path)
    harness = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, harness)
    spec.loader.exec_module(harness)
    n = 4096
    x = [normal(1, 1, n, 8, seed=i, dtype=torch.float32).requires_grad_() for i in range(3)]
    phi = TaylorFeatures(8)  # 12870 features of 8 numbers: tiles are cheaper
    assert _series_kernel.chunk_length(n, n, 8, 8, 8, causal, False, False) == (n if causal else 1)
    assert (
        harness.peak_memory(lambda: linear_attention(*x, phi, causal=causal).sum().backward()) < n * n * 4 / 2**20 / 8
    )


# Causality, padding, decoding


def test_later_tokens_do_not_touch_earlier_outputs(blocks, chunks):
    q, k, v = (x.detach().float() for x in inputs(heads=2, d=5))
    phi = TaylorFeatures(2)
    whole = linear_attention(q, k, v, phi, causal=True)
    for j in range(9):
        changed = [x.clone() for x in (q, k, v)]
        for x in changed:
            x[:, :, j:] = 30 * torch.randn_like(x[:, :, j:])
        assert torch.equal(linear_attention(*changed, phi, causal=True)[:, :, :j], whole[:, :, :j])


@pytest.mark.parametrize("causal", [False, True])
def test_what_padded_keys_contain_is_of_no_account(causal, blocks, chunks):
    q, k, v = inputs(t=6)
    mask = holes(2, 9)
    grads = []
    for fill in (0.0, math.nan):
        kf, vf = (torch.where(mask[:, None, :, None], x, fill) for x in (k.detach(), v.detach()))
        kf.requires_grad_(), vf.requires_grad_()
        out, state = linear_attention(
            q, kf, vf, TaylorFeatures(2), causal=causal, key_padding_mask=mask, return_state=True
        )
        grads.append((out, *state[:2], *torch.autograd.grad(out.square().sum(), (q, kf, vf))))
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)
    assert (grads[0][4][~mask[:, None].expand(2, 2, 9)] == 0).all()
    assert (grads[0][5][~mask[:, None].expand(2, 2, 9)] == 0).all()


@pytest.mark.parametrize("causal", [False, True])
def test_the_constant_term_does_not_count_padded_keys(causal, chunks):
    q = torch.zeros(1, 1, 5, 2)  # every score is 0, every weight 1
    v = torch.arange(5.0).view(1, 1, 5, 1)
    mask = torch.tensor([[True, False, True, False, False]])
    out = linear_attention(q, q, v, TaylorFeatures(2), causal=causal, key_padding_mask=mask)
    assert out.flatten().tolist() == ([0, 0, 1, 1, 1] if causal else [1] * 5)


@pytest.mark.parametrize("causal", [False, True])
def test_a_row_without_keys_gives_zero(causal, chunks):
    q, k, v = inputs()
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[0] = False
    mask[1, :3] = False
    out = linear_attention(q, k, v, TaylorFeatures(2), causal=causal, key_padding_mask=mask)
    assert (out[0] == 0).all()
    assert not causal or (out[1, :, :3] == 0).all()
    assert (out[1, :, 3:] != 0).all()
    grads = torch.autograd.grad(out.sum(), (q, k, v))
    assert all(torch.isfinite(x).all() and (x[0] == 0).all() for x in grads)


@pytest.mark.parametrize("normalize", [False, True])
def test_step_by_step_equals_all_at_once(normalize):
    q, k, v = inputs(t=8, s=8)
    phi = ExpPowerFeatures(2)
    whole = linear_attention(q, k, v, phi, causal=True, normalize=normalize)
    state, steps = None, []
    for part in (slice(0, 3), slice(3, 4), slice(4, 5), slice(5, 8)):
        out, state = linear_attention(
            q[:, :, part], k[:, :, part], v[:, :, part], phi, causal=True, initial_state=state, return_state=True,
            normalize=normalize,
        )  # fmt: skip
        assert isinstance(state, LinearAttentionState)
        steps.append(out)
    torch.testing.assert_close(torch.cat(steps, 2), whole)


def test_batches_equal_single_sequences(chunks):
    q, k, v = (x.detach() for x in inputs(b=3))
    phi = TaylorFeatures(4)
    whole = linear_attention(q, k, v, phi, causal=True)
    single = torch.cat([linear_attention(q[i : i + 1], k[i : i + 1], v[i : i + 1], phi, causal=True) for i in range(3)])
    torch.testing.assert_close(single, whole)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "shape", [{"b": 0}, {"t": 0, "s": 0}, {"t": 0}, {"t": 1, "s": 1}, {"heads": 0, "own": 0}, {"e": 0}]
)
def test_empty_and_single(shape, causal, chunks):
    q, k, v = inputs(**shape)
    out, state = linear_attention(q, k, v, TaylorFeatures(2), causal=causal, return_state=True)
    assert out.shape == (*q.shape[:3], v.shape[-1])
    assert state.s.shape == (*k.shape[:2], 10, v.shape[-1])
    grads = torch.autograd.grad(out.sum() + state.s.sum(), (q, k, v))
    assert all(torch.isfinite(x).all() for x in (out, *grads))
    torch.testing.assert_close(out, linear_attention(q, k, v, TaylorFeatures(2), causal=causal, backend="plain"))
    assert linear_attention(q, k, v, TaylorFeatures(2), causal=causal).shape == out.shape


@pytest.mark.parametrize("given", [False, True])
def test_nothing_of_causal_attention_leaves_the_state_as_it_was(given):
    q, k, v = inputs()
    before = linear_attention(q, k, v, TaylorFeatures(2), causal=True, return_state=True)[1] if given else None
    q, k, v = inputs(t=0, s=0)
    options = {"causal": True, "initial_state": before}
    out, after = linear_attention(q, k, v, TaylorFeatures(2), return_state=True, **options)
    assert out.shape == linear_attention(q, k, v, TaylorFeatures(2), **options).shape == (2, 4, 0, 4)
    expected = before or (torch.zeros(2, 2, 10, 4, dtype=q.dtype), torch.zeros(2, 2, 10, dtype=q.dtype))
    torch.testing.assert_close(tuple(after[:2]), tuple(expected[:2]))
    assert [x.shape for x in torch.autograd.grad(out.sum(), (q, k, v))] == [q.shape, k.shape, v.shape]
    layer = LinearAttention(32, 4, TaylorFeatures(2), causal=True)
    assert layer(torch.randn(2, 0, 32)).shape == (2, 0, 32)


def test_bidirectional_without_keys_gives_zero(chunks):
    q, k, v = inputs(s=0)
    out = linear_attention(q, k, v, TaylorFeatures(2))
    assert (out == 0).all()
    assert (torch.autograd.grad(out.sum(), q)[0] == 0).all()


# Precision, layout, compilers


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("causal", [False, True])
def test_low_precision_is_computed_in_float32(dtype, causal, chunks):
    low = [x.detach().to(dtype).requires_grad_() for x in inputs(t=40, s=40)]
    exact = [x.detach().double().requires_grad_() for x in low]
    out = linear_attention(*low, TaylorFeatures(2), causal=causal)
    want = linear_attention(*exact, TaylorFeatures(2), causal=causal)
    assert out.dtype == dtype
    tolerance = torch.finfo(dtype).eps
    torch.testing.assert_close(out.double(), want, rtol=tolerance, atol=tolerance)
    for a, b in zip(torch.autograd.grad(out.float().sum(), low), torch.autograd.grad(want.sum(), exact), strict=True):
        assert a.dtype == dtype
        assert (a.double() - b).norm() < 2 * tolerance * b.norm() + tolerance


def test_autocast_does_not_lower_the_sums():
    q, k, v = (x.detach().float() for x in inputs())
    want = linear_attention(q, k, v, TaylorFeatures(2), causal=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(linear_attention(q, k, v, TaylorFeatures(2), causal=True), want)


def test_strides_do_not_matter_and_inputs_stay(chunks):
    q, k, v = (x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in inputs())
    copies = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    a, b = (linear_attention(*x, TaylorFeatures(2), causal=True) for x in ((q, k, v), copies))
    assert torch.equal(a, b)
    for x, y in zip(
        torch.autograd.grad(a.sin().sum(), (q, k, v)), torch.autograd.grad(b.sin().sum(), copies), strict=True
    ):
        assert torch.equal(x, y)
    assert all(torch.equal(x, y) for x, y in zip((q, k, v), copies, strict=True))


def test_a_second_derivative_is_an_error_and_the_plain_form_has_it():
    q, k, v = inputs(b=1, heads=1, own=1, t=4, s=4, d=2, e=2)
    out = linear_attention(q, k, v, TaylorFeatures(2), causal=True)
    (grad,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="plain"):
        torch.autograd.grad(grad.sum(), q)
    assert torch.autograd.gradgradcheck(
        lambda a, b, c: linear_attention(a, b, c, TaylorFeatures(2), causal=True, backend="plain"), (q, k, v)
    )


@pytest.mark.slow
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("initial", [False, True])
@pytest.mark.parametrize("chunk", [3, 9])
def test_opcheck(causal, initial, chunk):
    q, k, v = inputs(b=1, d=2)
    q = q.view(1, 2, 2, 9, 2).detach().requires_grad_()
    s = normal(1, 2, 6, 4, seed=3).requires_grad_() if initial else None
    z = normal(1, 2, 6, seed=4).abs().requires_grad_() if initial else None
    mask = holes(1, 9)[:, None, :, None]
    chunk = chunk if causal else chunk // 9
    args = (q, k, v, mask, s, z, "taylor", 2, 0.5, causal, 0.1, True, chunk, initial, True)
    assert set(torch.library.opcheck(_series_kernel._forward, args).values()) == {"SUCCESS"}


@pytest.mark.slow
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("backend", ["operator", "plain"])
def test_compiles_as_one_graph(causal, backend):
    q, k, v = inputs(t=8)
    phi = TaylorFeatures(3, scale=1.0, normalize_inputs=True)

    def run(q, k, v):
        out, state = linear_attention(q, k, v, phi, causal=causal, return_state=True, backend=backend)
        return out.square().sum() + state.s.sum() + state.z.sin().sum()

    torch.compiler.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v), run(q, k, v))
    torch.testing.assert_close(
        torch.autograd.grad(compiled(q, k, v), (q, k, v)), torch.autograd.grad(run(q, k, v), (q, k, v))
    )


@pytest.mark.slow
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("degree", [2, 30])
def test_exports_with_any_length_as_one_node(causal, degree):
    class Model(torch.nn.Module):
        def forward(self, q, k, v):
            return linear_attention(q, k, v, TaylorFeatures(degree), causal=causal)

    time = torch.export.Dim("time", min=2, max=10**5)
    example = tuple(normal(1, 2, 12, 4, seed=i) for i in range(3))
    program = torch.export.export(Model(), example, dynamic_shapes=({2: time},) * 3)
    assert sum("kexue" in str(node.target) for node in program.graph.nodes) == 1
    longer = [normal(1, 2, 300, 4, seed=i) for i in range(3)]
    torch.testing.assert_close(program.module()(*longer), Model()(*longer))


@pytest.mark.parametrize("kind", FORMS)
def test_the_operator_and_the_plain_form_have_the_same_state(kind, blocks):
    q, k, v = inputs(d=4)
    phi = FORMS[kind](4)
    _, state = linear_attention(q, k, v, phi, causal=True, return_state=True)
    _, plain = linear_attention(q, k, v, phi, causal=True, return_state=True, backend="plain")
    assert state.s.shape == (2, 2, 70, 4)
    torch.testing.assert_close(tuple(state), tuple(plain))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", FORMS)
def test_degree_one_of_unit_vectors_is_cosine1(causal, kind, chunks):
    q, k, v = inputs()
    with torch.no_grad():
        q[0, 0, 2] = 0  # no direction
    phi = FORMS[kind](1, scale=1.0, normalize_inputs=True)
    results = []
    for feature_map in (phi, "cosine1"):
        out = linear_attention(q, k, v, feature_map, causal=causal)
        results.append((out, *torch.autograd.grad(out.square().sum(), (q, k, v))))
    torch.testing.assert_close(*results)
