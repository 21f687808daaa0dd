import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from kexue.models import HierarchicalPositionEmbedding, hierarchical_positions
from reference import hierarchical_positions as reference


def table(n=5, width=3, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, width, generator=g, dtype=torch.float64).to(dtype)


def module(n=5, width=3, offset=0, padding=None, dtype=torch.float64, **options):
    plain = nn.Embedding(n + offset, width, padding_idx=padding, _weight=table(n + offset, width, dtype))
    if padding is not None:
        plain.weight.data[padding] = 0
    return HierarchicalPositionEmbedding.from_pretrained(plain, offset=offset, **options), plain


@given(n=st.integers(2, 9), m=st.integers(1, 81), alpha=st.floats(0.01, 0.99), width=st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_table_equals_the_formula(n, m, alpha, width):
    if alpha == 0.5:
        return
    m = min(m, n * n)
    weight = table(n, width)
    got = hierarchical_positions(weight, m, alpha)
    assert got.shape == (m, width)
    torch.testing.assert_close(got, reference.table(weight, m, alpha), rtol=1e-9, atol=1e-9)
    assert torch.equal(got[:n], weight[:m])


@pytest.mark.parametrize("m", [3, 5, 7, 10, 25])
@pytest.mark.parametrize("alpha", [0.4, 0.9])
def test_gradient_of_the_table_equals_the_formula(m, alpha):
    weight = table().requires_grad_()
    upstream = table(m, 3, seed=1)
    got, want = (
        torch.autograd.grad(f(weight, m, alpha), weight, upstream) for f in (hierarchical_positions, reference.table)
    )
    torch.testing.assert_close(got, want)
    assert torch.autograd.gradcheck(lambda w: hierarchical_positions(w, m, alpha), weight)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_first_rows_are_the_same_bits_in_every_dtype(dtype):
    weight = 100 * table(7, 33, dtype)
    got = hierarchical_positions(weight, 49, 0.4)
    assert got.dtype == dtype
    assert torch.equal(got[:7], weight)
    want = reference.table(weight.double(), 49, 0.4)
    assert (got.double() - want).abs().max() <= torch.finfo(dtype).eps * want.abs().max()


def test_all_positions_differ_unless_alpha_is_a_half():
    got = hierarchical_positions(table(6, 4), 36, 0.4)
    assert torch.pdist(got).min() > 1e-3
    with pytest.raises(ValueError, match="coincide"):
        hierarchical_positions(table(6, 4), 36, 0.5)


@pytest.mark.parametrize("offset", [0, 2])
@pytest.mark.parametrize("ids", [
    [[0, 1, 2, 3, 4]], [[6, 3, 0], [24, 12, 5]], list(range(20)), [list(range(20))], [[2, 3, 4, 5, 6, 7, 8]], [7], 13,
    [[1, 2, 3], [4, 5, 6]],
])  # fmt: skip
def test_every_way_of_asking_gives_the_rows_of_the_table(offset, ids):
    made, plain = module(offset=offset, alpha=0.3)
    ids = torch.tensor(ids) + offset
    whole = torch.cat([plain.weight[:offset], reference.table(plain.weight[offset:], 25, 0.3)])
    torch.testing.assert_close(made.table(), whole)
    out, want = made(ids), whole[ids]
    torch.testing.assert_close(out, want)
    upstream = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(
        torch.autograd.grad(out, made.weight, upstream), torch.autograd.grad(want, plain.weight, upstream)
    )
    assert torch.equal(made(ids.int()), out)


def test_short_inputs_have_the_bits_and_gradients_of_the_plain_embedding():
    made, plain = module(dtype=torch.float32)
    for ids in (torch.tensor([[0, 4, 4, 2]]), torch.tensor([[0, 4, 4, 2, 9]])):
        short = ids[:, :4]
        out = made(ids)[:, :4]
        assert torch.equal(out, plain(short))
        upstream = torch.rand(out.shape)
        got = torch.autograd.grad(out, made.weight, upstream)[0]
        assert torch.equal(got, torch.autograd.grad(plain(short), plain.weight, upstream)[0])


def test_rows_before_the_positions_stay_as_they_are_and_padding_has_no_gradient():
    made, plain = module(offset=2, padding=1)
    ids = torch.tensor([[1, 1, 2, 6, 7, 11, 26], [1, 0, 26, 25, 2, 3, 4]])
    out = made(ids)
    assert not out[ids == 1].any()
    assert torch.equal(out[1, 1], plain.weight[0])
    grad = torch.autograd.grad(out.sum(), made.weight)[0]
    assert not grad[1].any()
    assert grad[2:].any(1).all()


def test_gradients_reach_the_first_vector_the_block_and_the_place():
    made, _ = module(alpha=0.4)
    made(torch.tensor([13])).sum().backward()  # 13 = 2 * 5 + 3
    beta = 0.4 / 0.6
    want = torch.zeros(5, 3, dtype=torch.float64)
    want[0], want[2], want[3] = -beta, beta, 1
    torch.testing.assert_close(made.weight.grad, want)


def test_the_length_limits_the_positions():
    made, _ = module(length=12)
    assert made.num_embeddings == 12
    assert made(torch.tensor([11])).shape == (1, 3)
    for bad in (12, -1):
        with pytest.raises(ValueError, match=rf"position_ids must be in \[0, 12\); got {bad} to {bad}"):
            made(torch.tensor([bad]))
    with pytest.raises(TypeError, match=r"int64 or int32; got torch.float32"):
        made(torch.tensor([1.0]))
    assert made(torch.empty(2, 0, dtype=torch.long)).shape == (2, 0, 3)


@pytest.mark.slow
@pytest.mark.parametrize("offset", [0, 2])
def test_compiles_as_one_graph_and_still_refuses_what_is_too_large(offset):
    made, _ = module(offset=offset, length=12, padding=1 if offset else None)
    torch.compiler.reset()
    compiled = torch.compile(made, fullgraph=True, backend="aot_eager")
    ids = torch.tensor([[0, 3, 11, 8], [1, 2, 10, 5]]) + offset
    torch.testing.assert_close(compiled(ids), made(ids))
    torch.testing.assert_close(
        torch.autograd.grad(compiled(ids).sum(), made.weight), torch.autograd.grad(made(ids).sum(), made.weight)
    )
    for bad in (-1, 12 + offset, 200):
        with pytest.raises((IndexError, RuntimeError)):
            compiled(torch.full_like(ids, bad))


@pytest.mark.parametrize("offset", [0, 2])
@pytest.mark.parametrize("save_table", [False, True])
def test_both_forms_of_the_state_are_loaded(offset, save_table):
    made, _ = module(offset=offset, length=12, save_table=save_table)
    state = made.state_dict()
    assert state["weight"].shape == ((12 if save_table else 5) + offset, 3)
    for other in (True, False):
        again = HierarchicalPositionEmbedding(5 + offset, 3, 12, offset=offset, save_table=other, dtype=torch.float64)
        again.load_state_dict(state)
        assert torch.equal(again.table(), made.table())
        assert again.weight.requires_grad
    if save_table:
        plain = nn.Embedding(12 + offset, 3, dtype=torch.float64)
        plain.load_state_dict(state)
        assert torch.equal(plain.weight, made.table())


def test_a_table_that_was_trained_untied_is_refused():
    made, _ = module(length=12, save_table=True)
    state = made.state_dict()
    state["weight"][9] += 0.01
    with pytest.raises(RuntimeError, match="do not follow from those before with alpha=0.4"):
        made.load_state_dict(state)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):  # rounding is no training
        made.load_state_dict({"weight": made.table().detach().to(dtype).double()})
    with pytest.raises(RuntimeError, match="size mismatch"):
        made.load_state_dict({"weight": torch.zeros(11, 3)})


def test_an_embedding_is_shared_and_a_tensor_is_copied():
    made, plain = module()
    assert made.weight is plain.weight
    source = table()
    made = HierarchicalPositionEmbedding.from_pretrained(source)
    with torch.no_grad():
        made.weight.zero_()
    assert source.any()
    frozen = nn.Embedding(5, 3)
    frozen.weight.requires_grad_(False)
    assert not HierarchicalPositionEmbedding.from_pretrained(frozen).weight.requires_grad
    assert copy.deepcopy(made)(torch.tensor([20])).shape == (1, 3)


def test_a_fresh_module_starts_like_an_embedding():
    torch.manual_seed(0)
    made = HierarchicalPositionEmbedding(1000, 8, offset=2, padding_idx=1)
    assert abs(float(made.weight.detach().std()) - 1) < 0.05
    assert not made.weight[1].any()
    assert made.length == 998**2
    assert "996004" in repr(made) or "996006" in repr(made)


@pytest.mark.parametrize("alpha", [0, 1, -0.1, 1.5, 0.5, math.nan, math.inf])
def test_bad_alpha_is_refused(alpha):
    for call in (lambda: hierarchical_positions(table(), 9, alpha), lambda: module(alpha=alpha)):
        with pytest.raises(ValueError, match="alpha"):
            call()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: hierarchical_positions(table(), 26, 0.4),
            ValueError,
            "m must be at most 25, .* 5 positions.*; got 26",
        ),
        (lambda: hierarchical_positions(table(), 0, 0.4), ValueError, "m must be at least 1; got 0"),
        (lambda: hierarchical_positions(table(), 7.0, 0.4), TypeError, "m must be an integer"),
        (lambda: hierarchical_positions(table(1), 1, 0.4), ValueError, "at least 2 positions .*; got 1"),
        (lambda: hierarchical_positions(table(0), 1, 0.4), ValueError, "at least 2 positions .*; got 0"),
        (lambda: hierarchical_positions(table()[0], 7, 0.4), ValueError, "weight must have 2 dimensions"),
        (lambda: hierarchical_positions(table().long(), 7, 0.4), TypeError, "floating tensor"),
        (lambda: hierarchical_positions(table(), 7, "x"), TypeError, "alpha must be a number"),
        (lambda: module(n=1), ValueError, "at least 2 positions"),
        (lambda: module(length=26), ValueError, "length must be at most 25"),
        (lambda: module(offset=-1), ValueError, "offset must be at least 0"),
        (lambda: HierarchicalPositionEmbedding(5, 0), ValueError, "embedding_dim must be at least 1"),
        (lambda: HierarchicalPositionEmbedding(5, 3, padding_idx=5), ValueError, "padding_idx must be below 5"),
        (lambda: HierarchicalPositionEmbedding.from_pretrained([1]), TypeError, "nn.Embedding or a tensor; got list"),
        (
            lambda: HierarchicalPositionEmbedding.from_pretrained(nn.Embedding(5, 3, max_norm=1.0)),
            ValueError,
            "with max_norm is not supported",
        ),
    ],
)
def test_bad_arguments_are_refused_at_the_door(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_the_input_table_is_not_changed():
    weight = table()
    before = weight.clone()
    hierarchical_positions(weight, 3, 0.4).zero_()
    hierarchical_positions(weight, 25, 0.4).zero_()
    assert torch.equal(weight, before)
    made, plain = module()
    made(torch.arange(25)).detach().zero_()
    assert torch.equal(F.embedding(torch.arange(5), made.weight), plain.weight)
