"""The operators that map random features chunk by chunk, against the plain contraction of the same features."""

import pytest
import torch

from kexue.attention import FavorFeatures, linear_attention
from kexue.attention import _exponential_kernel as kernel


def inputs(t=150, s=None, heads=4, kv_heads=2, d=4, e=5, size=1.0, dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    shapes = (2, heads, t, d), (2, kv_heads, s or t, d), (2, kv_heads, s or t, e)
    q, k, v = (torch.randn(shape, generator=g, dtype=torch.float64) for shape in shapes)
    return tuple(x.to(dtype).requires_grad_() for x in (size * q, size * k, v))


def made(m=7, variant="positive", d=4):
    return FavorFeatures(d, m, variant=variant, generator=torch.Generator().manual_seed(1)).double().eval()


def masks(s, kind):
    mask = torch.ones(2, s, dtype=torch.bool)
    if kind == "right":
        mask[0, s - 30 :] = False
    elif kind == "left":  # more than a chunk, and a whole row
        mask[0, : min(s - 1, 70)] = False
        mask[1] = False
    elif kind == "holes":
        mask = torch.rand(2, s, generator=torch.Generator().manual_seed(2)) < 0.5
    return None if kind == "none" else mask


def results(q, k, v, phi, backend, state=None, **options):
    out, after = linear_attention(q, k, v, phi, backend=backend, return_state=True, initial_state=state, **options)
    z = after.z.exp()  # the sums themselves
    s = after.s * z[..., None]
    weight = torch.linspace(0.5, 1.5, out.numel(), dtype=out.dtype).view_as(out)
    leaves = (q, k, v) if state is None else (q, k, v, *state)
    grads = torch.autograd.grad((out * weight).sum() + (s * s).sum().sqrt() + z.sum(), leaves)
    return out, s, z, *grads


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", ["none", "right", "left", "holes"])
@pytest.mark.parametrize("size", [0.5, 12.0])  # at 12 the level of a feature is exceeded within chunks
def test_values_states_and_gradients_equal_the_plain_contraction(causal, kind, size):
    q, k, v = inputs(size=size)
    phi = made()
    mask = masks(150, kind)
    found = results(q, k, v, phi, "operator", causal=causal, key_padding_mask=mask)
    expected = results(q, k, v, phi, "plain", causal=causal, key_padding_mask=mask)
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("size", [0.5, 12.0])
def test_a_state_before_is_taken_up_and_gets_its_gradient(causal, size):
    phi = made()
    q, k, v = inputs(size=size)
    _, before = linear_attention(*(x.detach() for x in inputs(90, size=size)), phi, return_state=True)
    state = before.s.clone().requires_grad_(), before.z.clone().requires_grad_()

    def run(backend):
        out = linear_attention(q, k, v, phi, causal=causal, backend=backend, initial_state=state)
        return out, *torch.autograd.grad(out.square().sum(), (q, k, v, *state))

    torch.testing.assert_close(run("operator"), run("plain"), rtol=1e-6, atol=1e-8)


def test_queries_of_a_longer_past_are_the_last_ones():
    q, k, v = inputs(70, 150)
    phi = made()
    for kind in ("none", "left"):
        mask = masks(150, kind)
        found = results(q, k, v, phi, "operator", causal=True, key_padding_mask=mask)
        torch.testing.assert_close(found, results(q, k, v, phi, "plain", causal=True, key_padding_mask=mask))


@pytest.mark.parametrize("causal", [False, True])
def test_gradcheck_over_several_chunks(monkeypatch, causal):
    monkeypatch.setattr(kernel, "CHUNK", 2)
    monkeypatch.setattr(kernel, "LIMIT", 0.5)  # the level moves all the time
    q, k, v = inputs(5, heads=2, kv_heads=1, d=2, e=2)
    phi = made(3, d=2)
    mask = torch.tensor([[True, True, False, True, True], [False, True, True, True, False]])
    assert torch.autograd.gradcheck(
        lambda q, k, v: linear_attention(q, k, v, phi, causal=causal, key_padding_mask=mask), (q, k, v)
    )


@pytest.mark.parametrize("limit", [0.0, 5.0, 1e9])
def test_the_limit_changes_nothing(monkeypatch, limit):
    q, k, v = inputs()
    phi = made()
    expected = results(q, k, v, phi, "operator", causal=True)
    monkeypatch.setattr(kernel, "LIMIT", limit)
    torch.testing.assert_close(results(q, k, v, phi, "operator", causal=True), expected)


def test_a_far_larger_key_later_on_does_not_touch_the_bits_before_it():
    q, k, v = (x.detach().float() for x in inputs())
    phi = made().float()
    first = linear_attention(q, k, v, phi, causal=True)
    changed = k.clone()
    changed[:, :, 100] *= 30  # beyond the limit, inside a chunk
    second = linear_attention(q, changed, v, phi, causal=True)
    assert torch.equal(first[:, :, :100], second[:, :, :100])
    assert not torch.equal(first[:, :, 100:], second[:, :, 100:])


def test_queries_and_keys_with_different_largest_features_do_not_lose_each_other():
    """Where one shift for all features would leave a denominator of 0 in float32."""
    phi = made(8, d=2).float()
    with torch.no_grad():
        phi.projection.copy_(torch.tensor([[3.0, 0.0], [0.0, 3.0]]).repeat(4, 1))
    q = torch.tensor([[60.0, 0.0]]).expand(1, 1, 70, 2)
    k = torch.tensor([[0.0, 60.0]]).expand(1, 1, 70, 2)
    v = torch.arange(70.0).view(1, 1, 70, 1)
    for causal in (False, True):
        exact = linear_attention(q.double(), k.double(), v.double(), phi, causal=causal)
        torch.testing.assert_close(linear_attention(q, k, v, phi, causal=causal).double(), exact, rtol=1e-4, atol=1e-3)
    assert float(linear_attention(q, k, v, phi)[0, 0, 0, 0]) == pytest.approx(34.5, rel=1e-4)


def test_second_derivatives_are_refused():
    q, k, v = inputs(5)
    for causal in (False, True):
        out = linear_attention(q, k, v, made(), causal=causal)
        (grad,) = torch.autograd.grad(out.sum(), q, create_graph=True)
        with pytest.raises(RuntimeError, match="differentiable once"):
            grad.sum().backward()


@pytest.mark.parametrize("causal", [False, True])
def test_empty_inputs(causal):
    phi = made()
    for b, h, t in ((0, 2, 5), (2, 0, 5), (2, 2, 0)):
        x = torch.zeros(b, h, t, 4, dtype=torch.float64, requires_grad=True)
        out = linear_attention(x, x, x, phi, causal=causal)
        assert out.shape == x.shape
        out.sum().backward()
        assert x.grad.shape == x.shape
    q, _, _ = inputs(5)
    nothing = torch.zeros(2, 2, 0, 4, dtype=torch.float64)
    assert (linear_attention(q, nothing, nothing, phi) == 0).all()


@pytest.mark.slow
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_operators_are_well_formed(causal, masked):
    q, k, v = (x.float().detach().requires_grad_() for x in inputs(70))
    weight = made().float().exponent(4, torch.float32, torch.device("cpu"))
    mask = masks(70, "holes")[:, None, :, None] if masked else None
    s, z = torch.rand(2, 2, 7, 5).requires_grad_(), torch.rand(2, 2, 7).requires_grad_()
    level = torch.zeros(2, 2, 7)
    grouped = q.view(2, 2, 2, 70, 4)
    if causal:
        assert set(
            torch.library.opcheck(kernel._causal, (grouped, k, v, mask, weight, s, z, level, True)).values()
        ) == {"SUCCESS"}
    else:
        assert set(torch.library.opcheck(kernel.absorb, (k, v, mask, weight, s, z, level)).values()) == {"SUCCESS"}
        assert set(torch.library.opcheck(kernel.read, (grouped, weight, s, z, level)).values()) == {"SUCCESS"}
