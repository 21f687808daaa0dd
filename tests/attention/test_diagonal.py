import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kexue.attention import diagonal_attention
from reference import one_pass_mlm as reference


def tensors(batch, heads, rows, keys, width=4, value=3, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    shapes = ((batch, heads, rows, width), (batch, heads, keys, width), (batch, heads, keys, value))
    return [torch.randn(s, generator=g, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


def upstream(out):
    return torch.randn(out.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64).to(out.dtype)


def compare(inputs, got, want):
    torch.testing.assert_close(got, want)
    g = upstream(want)
    torch.testing.assert_close(torch.autograd.grad(got, inputs, g), torch.autograd.grad(want, inputs, g))


@settings(max_examples=40, deadline=None)
@given(st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 8), st.integers(0, 3)), st.booleans(),
       st.booleans(), st.sampled_from([None, 0.7, -1.5]), st.integers(0, 10**6))  # fmt: skip
def test_values_and_every_gradient_equal_the_reference(shape, padded, chosen, scale, seed):
    batch, heads, rows, more = shape
    inputs = tensors(batch, heads, rows, rows + more, seed=seed)
    g = torch.Generator().manual_seed(seed)
    mask = torch.rand(batch, rows + more, generator=g) < 0.5 if padded else None
    own = torch.randint(-1, rows + more + 1, (batch, rows), generator=g) if chosen else None
    got = diagonal_attention(*inputs, mask, own=own, scale=scale)
    compare(inputs, got, reference.diagonal_attention(*inputs, mask, own, scale))


def test_own_may_be_shared_by_the_batch():
    inputs, own = tensors(2, 2, 2, 5), torch.tensor([4, 1])
    got = diagonal_attention(*inputs, own=own)
    compare(inputs, got, reference.diagonal_attention(*inputs, own=own.expand(2, 2)))


def test_visible_self_is_ordinary_attention():
    q, k, v = tensors(2, 2, 5, 5)
    mask = torch.arange(5)[None] < torch.tensor([[3], [5]])
    expected = torch.softmax((q @ k.mT / 2).masked_fill(~mask[:, None, None], -torch.inf), -1) @ v
    torch.testing.assert_close(diagonal_attention(q, k, v, mask, self_visible=True), expected)
    torch.testing.assert_close(diagonal_attention(q, k, v, self_visible=True), torch.softmax(q @ k.mT / 2, -1) @ v)


@pytest.mark.parametrize("rows", [1, 2, 31, 512, 513])  # torch's kernel works in blocks of 512 keys
@pytest.mark.parametrize("more", [0, 1])
@pytest.mark.parametrize("padded", [False, True])
def test_the_own_key_has_no_influence_to_the_last_bit_and_no_gradient(rows, more, padded):
    q, k, v = (x.detach() for x in tensors(2, 2, rows, rows + more, dtype=torch.float32))
    mask = None
    if padded:
        mask = torch.ones(2, rows + more, dtype=torch.bool)
        mask[1, -(rows // 2) - 1 :] = False
    before = diagonal_attention(q, k, v, mask)
    for i in {0, rows // 2, rows - 1}:
        loud_k, loud_v = k.clone(), v.clone()
        loud_k[:, :, i + more], loud_v[:, :, i + more] = 1e3, -1e9
        after = diagonal_attention(q, loud_k, loud_v, mask)
        assert torch.equal(after[:, :, i], before[:, :, i])
        if rows > 1 and not padded:
            assert not torch.equal(after, before)
        leaves = k.clone().requires_grad_(), v.clone().requires_grad_()
        out = diagonal_attention(q, *leaves, mask)[:, :, i]
        for grad in torch.autograd.grad(out.square().sum(), leaves):
            assert not grad[:, :, i + more].any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_rows_that_see_no_key_are_0_with_gradient_0(dtype):
    inputs = tensors(3, 2, 2, 2, dtype=dtype)
    mask = torch.tensor([[True, True], [True, False], [False, False]])
    out = diagonal_attention(*inputs, mask)
    assert out.dtype == dtype
    assert not out[1, :, 0].any()  # the only other key is padding
    assert out[1, :, 1].any()
    assert not out[2].any()
    for grad in torch.autograd.grad(out.sum(), inputs):
        assert torch.isfinite(grad).all()
        assert not grad[2].any()
    alone = diagonal_attention(*tensors(1, 2, 1, 1, dtype=dtype))
    assert torch.equal(alone, torch.zeros_like(alone))


def test_gradcheck():
    mask = torch.tensor([[True, True, False, True]])
    assert torch.autograd.gradcheck(lambda *x: diagonal_attention(*x, mask), tensors(1, 2, 3, 4))


@pytest.mark.parametrize("shape", [(0, 2, 3, 3), (2, 2, 0, 0), (2, 2, 0, 4), (2, 0, 3, 3)])
def test_empty_shapes(shape):
    inputs = tensors(*shape)
    out = diagonal_attention(*inputs)
    assert out.shape == (*shape[:3], 3)
    out.sum().backward()
    assert all(torch.equal(x.grad, torch.zeros_like(x)) for x in inputs)


def test_no_keys_at_all():
    q, k, v = tensors(2, 1, 3, 0)
    assert torch.equal(diagonal_attention(q, k, v, own=torch.zeros(3, dtype=torch.long)), q.new_zeros(2, 1, 3, 3))


def test_dropout_drops_and_keeps_the_mean():
    q, k, v = (x.detach() for x in tensors(1, 1, 6, 6))
    torch.manual_seed(0)
    draws = torch.stack([diagonal_attention(q, k, v, dropout_p=0.5) for _ in range(3000)])
    error = draws.std(0) / 3000**0.5
    assert draws.std(0).min() > 0
    assert ((draws.mean(0) - diagonal_attention(q, k, v)).abs() < 5 * error).all()


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"q": torch.zeros(1, 2, 3)}, ValueError, "q must have 4 dimensions"),
        ({"k": [1.0]}, TypeError, "k must be a tensor; got list"),
        ({"k": torch.zeros(1, 2, 3, 4, dtype=torch.float64)}, TypeError, "one dtype"),
        ({"k": torch.zeros(1, 2, 3, 5)}, ValueError, r"k must be \(B, H, S, D\) = \(1, 2, S, 4\)"),
        ({"v": torch.zeros(1, 2, 4, 4)}, ValueError, "v must be"),
        ({"q": torch.zeros(1, 2, 4, 4)}, ValueError, "at least as many rows as q, 4, without own; got 3"),
        ({"key_padding_mask": torch.ones(1, 4)}, ValueError, r"shape \(1, 3\); got \(1, 4\)"),
        ({"key_padding_mask": torch.full((1, 3), 0.5)}, ValueError, "1 .takes part. and 0 only"),
        ({"own": torch.zeros(3)}, TypeError, "own must be a tensor of integers; got torch.float32"),
        ({"own": torch.zeros(2, 3, dtype=torch.long)}, ValueError, r"own must have shape \(3,\) or \(1, 3\)"),
        ({"scale": float("nan")}, ValueError, "scale must be finite"),
        ({"dropout_p": 1.0}, ValueError, "dropout_p must be below 1"),
    ],
)
def test_bad_input_is_rejected(change, error, words):
    given = {name: torch.zeros(1, 2, 3, 4) for name in "qkv"} | change
    with pytest.raises(error, match=words):
        diagonal_attention(**given)


def test_inputs_are_not_changed():
    inputs = [x.detach() for x in tensors(2, 2, 3, 3)]
    mask = torch.tensor([[True, False, False], [True, True, True]])
    copies = [x.clone() for x in (*inputs, mask)]
    diagonal_attention(*inputs, mask)
    assert all(torch.equal(a, b) for a, b in zip(copies, (*inputs, mask), strict=True))
