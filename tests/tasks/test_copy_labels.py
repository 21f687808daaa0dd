"""Copy labels against all alignments of short texts, and the loss of the tags."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kexue.tasks import copy_labels, copy_loss
from reference import spaces_copying as slow

TOKENS = st.lists(st.integers(0, 2), max_size=7)


def as_lists(labels):
    return tuple(side.tolist() for side in labels)


@given(TOKENS, TOKENS)
@settings(max_examples=150, deadline=None)
def test_contiguous_is_the_first_of_the_alignments_with_the_most_continued_pairs(x, y):
    longest = slow.alignments(x, y)
    most = max(map(slow.continued, longest))
    best = min(pairs for pairs in longest if slow.continued(pairs) == most)
    assert as_lists(copy_labels(x, y)) == slow.labels_of(best, len(x), len(y))


@given(st.lists(st.integers(0, 3), max_size=30), st.lists(st.integers(0, 3), max_size=30))
@settings(max_examples=150, deadline=None)
def test_author_follows_the_published_backtracking(x, y):
    pairs = slow.author_pairs(x, y)
    assert as_lists(copy_labels(x, y, "author")) == slow.labels_of(pairs, len(x), len(y))


def test_all_texts_of_two_tokens_up_to_length_four():
    texts = [t for n in range(5) for t in itertools.product("ab", repeat=n)]
    for x, y in itertools.product(texts, texts):
        longest = slow.alignments(x, y)
        most = max(map(slow.continued, longest))
        labels = copy_labels(x, y)[1]
        assert np.count_nonzero(labels) == len(longest[0])
        assert np.count_nonzero(labels == 2) == most


@pytest.mark.parametrize("ties", ["author", "contiguous"])
def test_the_example_of_the_article(ties):
    source, target = ["我", "真的", "非常", "热爱", "我", "的", "祖国"], ["我", "爱", "我", "的", "祖国"]
    assert as_lists(copy_labels(source, target, ties)) == ([1, 0, 0, 0, 1, 2, 2], [1, 0, 1, 2, 2])


def test_ties_differ_where_the_published_rule_breaks_a_run():
    assert as_lists(copy_labels("abcb", "ab", "author")) == ([1, 0, 0, 1], [1, 1])
    assert as_lists(copy_labels("abcb", "ab", "contiguous")) == ([1, 2, 0, 0], [1, 2])


@pytest.mark.parametrize("ties", ["author", "contiguous"])
def test_special_tokens_are_left_out(ties):
    source, target = [101, 7, 8, 102], [101, 7, 8, 102]
    assert copy_labels(source, target, ties)[1].tolist() == [1, 2, 2, 2]
    assert as_lists(copy_labels(source, target, ties, special_ids=(101, 102))) == ([0, 1, 2, 0], [0, 1, 2, 0])
    # a special token between two copied ones ends the run
    assert copy_labels([7, 102, 8], [7, 102, 8], ties, special_ids=[102])[1].tolist() == [1, 0, 1]
    assert copy_labels([7, 102, 8], [7, 8], ties, special_ids=torch.tensor([102]))[1].tolist() == [1, 1]


@pytest.mark.parametrize("ties", ["author", "contiguous"])
def test_kinds_of_input_agree_and_are_not_changed(ties):
    x, y = [5, 6, 7, 5, 9], [6, 7, 9]
    want = as_lists(copy_labels(x, y, ties))
    for kind in (tuple, np.array, torch.tensor, lambda v: np.array(v, np.uint8), lambda v: np.array(list(map(str, v)))):
        a, b = kind(x), kind(y)
        assert as_lists(copy_labels(a, b, ties)) == want
        assert [int(v) for v in a] == x
    assert copy_labels(x, y, ties)[0].dtype == np.int64


@pytest.mark.parametrize("ties", ["author", "contiguous"])
def test_empty_and_equal_texts(ties):
    assert as_lists(copy_labels([], [1], ties)) == ([], [0])
    assert as_lists(copy_labels([1, 2], [], ties)) == ([0, 0], [])
    assert as_lists(copy_labels(np.array([]), [], ties)) == ([], [])
    assert as_lists(copy_labels([1, 2], [3], ties)) == ([0, 0], [0])
    assert as_lists(copy_labels([4, 4, 4], [4, 4, 4], ties)) == ([1, 2, 2], [1, 2, 2])


def test_labels_reject_bad_input():
    with pytest.raises(ValueError, match="'contiguous', 'author'; got 'first'"):
        copy_labels([1], [1], "first")
    with pytest.raises(TypeError, match="source must hold integers or words; got dtype float64"):
        copy_labels(np.array([1.0]), [1])
    with pytest.raises(ValueError, match=r"target must be one-dimensional; got shape \(1, 1\)"):
        copy_labels([1], torch.tensor([[1]]))
    with pytest.raises(TypeError, match="hashable"):
        copy_labels([[1]], [1])
    with pytest.raises(TypeError, match="source must be a sequence of tokens; got int"):
        copy_labels(3, [1])
    with pytest.raises(TypeError, match="target must be a sequence of tokens; got set"):
        copy_labels([1], {1, 2})
    with pytest.raises(TypeError, match="special_ids must be several tokens, such as a tuple; got 5"):
        copy_labels([1], [1], special_ids=5)
    with pytest.raises(TypeError, match="hashable"):
        copy_labels([1], [1], special_ids=[[1]])


def case(seed=0, shape=(3, 7)):
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(*shape, 3, generator=g, dtype=torch.float64)
    labels = torch.randint(0, 3, shape, generator=g)
    labels[torch.rand(shape, generator=g) < 0.2] = -100
    return logits, labels, torch.rand(shape, generator=g) < 0.6


@pytest.mark.parametrize("weights", [(2.0, 1.0), (1.0, 0.0), (0.5, 3.0)])
def test_loss_equals_its_definition(weights):
    logits, labels, is_source = case()
    got = copy_loss(logits, labels, is_source, weight=weights[0], source_weight=weights[1])
    want = slow.copy_loss(logits.numpy(), labels.numpy(), is_source.numpy(), *weights)
    assert got.dtype == torch.float64
    assert float(got) == pytest.approx(want, rel=1e-12)


def test_gradient_is_exact():
    logits, labels, is_source = case(1, (2, 5))
    assert torch.autograd.gradcheck(lambda x: copy_loss(x, labels, is_source), logits.requires_grad_())
    (grad,) = torch.autograd.grad(copy_loss(logits, labels, is_source), logits)
    rows = logits.detach().softmax(-1)
    for i, j in itertools.product(range(2), range(5)):
        if labels[i, j] == -100:
            assert grad[i, j].eq(0).all()
            continue
        same = (is_source == is_source[i, j]) & (labels != -100)
        want = rows[i, j].clone()
        want[labels[i, j]] -= 1
        torch.testing.assert_close(grad[i, j], 2 * want / same.sum())


def test_a_part_without_positions_is_zero():
    logits, labels, is_source = case()
    everywhere = torch.ones_like(is_source)
    assert float(copy_loss(logits, labels, everywhere, source_weight=0.0)) == 0
    logits.requires_grad_()
    nothing = copy_loss(logits, torch.full_like(labels, -100), is_source)
    nothing.backward()
    assert float(nothing.detach()) == 0
    assert logits.grad.eq(0).all()
    assert float(copy_loss(torch.zeros(0, 4, 3), torch.zeros(0, 4).long(), torch.zeros(0, 4).bool())) == 0


def test_ignored_positions_may_hold_nan():
    logits, labels, is_source = case()
    spoiled = torch.where((labels == -100)[..., None], torch.nan, logits).requires_grad_()
    loss = copy_loss(spoiled, labels, is_source)
    loss.backward()
    torch.testing.assert_close(loss.detach(), copy_loss(logits, labels, is_source))
    assert spoiled.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_half_precision_is_reduced_in_float32(dtype):
    logits, labels, is_source = case(2, (8, 64))
    x = logits.to(dtype).requires_grad_()
    loss = copy_loss(x, labels, is_source)
    loss.backward()
    assert loss.dtype == torch.float32
    assert x.grad.dtype == dtype
    torch.testing.assert_close(loss.double(), copy_loss(x.detach().double(), labels, is_source), rtol=1e-6, atol=0)


def test_loss_compiles_whole():
    logits, labels, is_source = case()
    compiled = torch.compile(copy_loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(logits, labels, is_source), copy_loss(logits, labels, is_source))


def test_loss_rejects_bad_input():
    logits, labels, is_source = case()
    with pytest.raises(ValueError, match=r"\(\.\.\., 3\), O B I; got shape \(3, 7, 2\)"):
        copy_loss(logits[..., :2], labels, is_source)
    with pytest.raises(ValueError, match=r"labels must be a tensor of shape \(3, 7\); got \(3, 6\)"):
        copy_loss(logits, labels[:, 1:], is_source)
    with pytest.raises(ValueError, match="0, 1, 2 or -100; got 3"):
        copy_loss(logits, labels.clamp(min=3), is_source)
    with pytest.raises(TypeError, match=r"labels must be integers; got dtype torch\.float32"):
        copy_loss(logits, labels.float(), is_source)
    with pytest.raises(TypeError, match=r"labels must be integers; got dtype torch\.complex64"):
        copy_loss(logits, labels.to(torch.complex64), is_source)
    with pytest.raises(TypeError, match=r"is_source must be bool; got dtype torch\.int64"):
        copy_loss(logits, labels, is_source.long())
    with pytest.raises(TypeError, match=r"copy_logits must be a floating tensor; got dtype torch\.int64"):
        copy_loss(logits.long(), labels, is_source)
    with pytest.raises(ValueError, match=r"source_weight must be at least 0\.0; got -1"):
        copy_loss(logits, labels, is_source, source_weight=-1)
    with pytest.raises(TypeError, match=r"ignore_index must be an integer; got 1\.5"):
        copy_loss(logits, labels, is_source, ignore_index=1.5)
