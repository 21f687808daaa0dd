import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kexue.models import KexueConfig, KexueForMaskedLM, OnePassCache
from models.one_pass_models import MASK, VARIANTS, VOCABULARY, build, texts

CACHED = [name for name in VARIANTS if name != "segments"]


def equals_a_full_pass(cache, model, mask):
    logits = model(cache.input_ids, mask).logits
    torch.testing.assert_close(cache.log_probs(), logits.log_softmax(-1))
    torch.testing.assert_close(cache.token_log_probs(), model.token_log_probs(cache.input_ids, mask))
    torch.testing.assert_close(cache.hidden(), model.kexue(cache.input_ids, mask).last_hidden_state)
    where = torch.tensor([[0, 3], [6, 6], [2, 1]])
    rows = torch.arange(3)[:, None]
    torch.testing.assert_close(cache.log_probs(where), logits.log_softmax(-1)[rows, where])
    torch.testing.assert_close(cache.log_probs([5]), logits.log_softmax(-1)[:, 5:6])


@pytest.mark.parametrize("name", CACHED)
@pytest.mark.parametrize("padded", [False, True])
def test_after_every_edit_the_cache_equals_a_full_pass(name, padded):
    model, ids = build(**VARIANTS[name]), texts()
    mask = torch.arange(7)[None] < torch.tensor([[7], [5], [1]]) if padded else None
    cache = OnePassCache(model, ids, mask)
    equals_a_full_pass(cache, model, mask)
    expected = ids.clone()
    for edit in ([[0, 1], [6, 2], [9, 10]], [[2], [0], [MASK]], [[0, 0, 0], [0, 1, 2], [5, 6, 7]], [[], [], []]):
        cache.edit(*edit)
        for text, position, token in zip(*edit, strict=True):
            expected[text, position] = token
        assert torch.equal(cache.input_ids, expected)
        equals_a_full_pass(cache, model, mask)


@settings(max_examples=15, deadline=None)
@given(
    st.sampled_from(CACHED), st.lists(st.tuples(st.integers(0, 2), st.integers(0, 6), st.integers(0, 29)), max_size=8)
)
def test_any_sequence_of_edits_equals_a_full_pass(name, edits):
    model = build(**VARIANTS[name])
    cache = OnePassCache(model, texts())
    for edit in edits:
        cache.edit(*([x] for x in edit))
    equals_a_full_pass(cache, model, None)


def test_an_edit_does_not_touch_the_prediction_at_its_own_position():
    model = build(dtype=torch.float32)
    cache = OnePassCache(model, texts())
    before = cache.log_probs()
    cache.edit(torch.tensor([1]), torch.tensor([4]), torch.tensor([6]))
    after = cache.log_probs()
    assert torch.equal(after[1, 4], before[1, 4])
    assert torch.equal(after[[0, 2]], before[[0, 2]])
    assert not torch.equal(after[1, 3], before[1, 3])


def test_the_padding_token_of_the_configuration_is_padding():
    model, ids = build(pad_token_id=0), texts()
    ids[1, 4:] = 0
    cache = OnePassCache(model, ids)
    torch.testing.assert_close(cache.token_log_probs(), model.token_log_probs(ids))
    assert not cache.token_log_probs()[1, 4:].any()


def test_the_texts_of_the_caller_are_copied_and_dropout_is_off():
    model, ids = build(dropout=0.5).train(), texts()
    copy = ids.clone()
    cache = OnePassCache(model, ids)
    cache.edit([0], [0], [29])
    assert torch.equal(ids, copy)
    assert model.training
    torch.testing.assert_close(cache.token_log_probs(), model.token_log_probs(cache.input_ids))


@pytest.mark.parametrize("name", ["plain", "no start key", "rope, no start key"])
@pytest.mark.parametrize("shape", [(0, 4), (2, 0), (1, 1)])
def test_small_shapes(name, shape):
    model, ids = build(**VARIANTS[name]), torch.full(shape, 7)
    cache = OnePassCache(model, ids)
    assert cache.log_probs().shape == (*shape, VOCABULARY)
    torch.testing.assert_close(cache.token_log_probs(), model.token_log_probs(ids))


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda c: c.edit([0], [0, 1], [5]), ValueError, "of one length; got 1, 2 and 1"),
        (lambda c: c.edit([0, 0], [1, 1], [5, 6]), ValueError, "edited once"),
        (lambda c: c.edit([3], [0], [5]), ValueError, r"texts must be in \[0, 3\); got values from 3 to 3"),
        (lambda c: c.edit([0], [-1], [5]), ValueError, r"positions must be in \[0, 7\)"),
        (lambda c: c.edit([0], [0], [30]), ValueError, r"tokens must be in \[0, 30\)"),
        (lambda c: c.edit([1], [6], [5]), ValueError, "positions must be of real tokens"),
        (lambda c: c.edit([0.5], [0], [5]), TypeError, "texts must be integers; got dtype torch.float32"),
        (lambda c: c.edit(["a"], [0], [5]), TypeError, "texts must be integers"),
        (lambda c: c.edit(0, 0, 5), ValueError, "texts must have 1 dimensions"),
        (lambda c: c.log_probs([[0], [1]]), ValueError, r"positions must be \(3, n\) or \(n,\); got \(2, 1\)"),
        (lambda c: c.hidden([7]), ValueError, r"positions must be in \[0, 7\)"),
    ],
)
def test_bad_input_is_rejected(call, error, words):
    mask = torch.arange(7)[None] < torch.tensor([[7], [5], [1]])
    cache = OnePassCache(build(), texts(), mask)
    with pytest.raises(error, match=words):
        call(cache)
    assert torch.equal(cache.input_ids, texts())


def test_bad_models_and_texts_are_rejected():
    with pytest.raises(TypeError, match="model must be a KexueForTextAutoencoding; got KexueForMaskedLM"):
        OnePassCache(KexueForMaskedLM(KexueConfig(VOCABULARY, 16, 1, 2)), texts())
    with pytest.raises(ValueError, match="tokens of this model see themselves"):
        OnePassCache(build(self_visible=True), texts())
    with pytest.raises(ValueError, match=r"input_ids must be in \[0, 30\)"):
        OnePassCache(build(), texts() + 30)
    with pytest.raises(ValueError, match="at most max_position = 40 tokens"):
        OnePassCache(build(), texts(1, 41))
