"""CharGRUEncoder: ids, states and gradients against the recurrence written out, padding, Unicode, files."""

import itertools
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch.nn.utils.rnn import pack_padded_sequence

from kexue.models import CharGRUEncoder
from reference import sentence_similarity as reference

VOCAB = "abc深度é\u0301👍 "
TEXTS = ["abc", "", "深度学习", "a", "e\u0301é", "👍🏽 ok", "b" * 100, " "]


def encoder(seed=0, dtype=torch.float32, **sizes):
    torch.manual_seed(seed)
    return CharGRUEncoder(VOCAB, **({"d": 6, "embedding_dim": 5, "maxlen": 8} | sizes)).to(dtype)


def test_defaults_are_those_of_the_article():
    model = CharGRUEncoder("ab")
    assert (model.d, model.embedding_dim, model.maxlen) == (128, 128, 32)
    assert model.embedding.weight.shape == (4, 128)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.text(max_size=12), max_size=6))
def test_ids_are_those_of_looking_every_character_up(texts):
    model = encoder()
    expected = [reference.character_ids(VOCAB, text, 8) for text in texts]
    ids, offsets = model.flat_ids(texts)
    assert [ids[a:b].tolist() for a, b in itertools.pairwise(offsets)] == expected
    padded = model.lookup(texts)
    assert [[i for i in row if i] for row in padded.tolist()] == expected


def test_a_list_and_a_string_of_characters_are_the_same_vocabulary():
    assert CharGRUEncoder(list(VOCAB)).lookup(TEXTS).equal(CharGRUEncoder(VOCAB).lookup(TEXTS))
    assert CharGRUEncoder(np.array(list("ab"))).vocab == ["a", "b"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_states_and_every_gradient_agree_with_the_recurrence(dtype):
    model, exact = encoder(dtype=dtype), encoder(dtype=torch.float64)
    exact.load_state_dict({k: v.double() for k, v in model.state_dict().items()})
    weights = torch.randn(len(TEXTS), 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    states = model(TEXTS)
    expected = torch.stack([reference.last_state(exact, reference.character_ids(VOCAB, t, 8)) for t in TEXTS])
    tolerance = 1e-12 if dtype == torch.float64 else 2e-6
    torch.testing.assert_close(states.double(), expected, rtol=tolerance, atol=tolerance)
    (states.double() * weights).sum().backward()
    (expected * weights).sum().backward()
    for (name, p), q in zip(model.named_parameters(), exact.parameters(), strict=True):
        if name == "embedding.weight":
            assert p.grad[0].eq(0).all()
        torch.testing.assert_close(p.grad.double(), q.grad, rtol=tolerance * 10, atol=tolerance * 10, msg=name)


def test_finite_differences_agree_with_the_written_out_backward_pass():
    model = encoder(dtype=torch.float64, d=3, embedding_dim=2)
    ids = model.lookup(TEXTS[:4])
    names = dict(model.named_parameters())

    def states(*values):
        return torch.func.functional_call(model, dict(zip(names, values, strict=True)), (ids,))

    values = [p.detach().clone().requires_grad_() for p in names.values()]
    assert torch.autograd.gradcheck(states, values, fast_mode=True)


def test_the_gradient_can_be_taken_twice_from_one_graph_but_not_be_differentiated():
    model = encoder()
    loss = model(TEXTS).square().sum()
    first = torch.autograd.grad(loss, model.gru.weight_hh_l0, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(loss, model.gru.weight_hh_l0, retain_graph=True)[0])
    grad = torch.autograd.grad(loss, model.gru.weight_hh_l0, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="differentiable once"):
        grad.sum().backward()


def test_the_state_is_that_of_torchs_packed_gru_and_of_autocast():
    model = encoder()
    ids = model.lookup(TEXTS)
    packed = pack_padded_sequence(model.embedding(ids), (ids > 0).sum(1), batch_first=True, enforce_sorted=False)
    torch.testing.assert_close(model(ids), model.gru(packed)[1][0], rtol=1e-5, atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        low = model(ids)
    torch.testing.assert_close(low.float(), model(ids), rtol=0.05, atol=0.05)


def test_padding_and_neighbours_do_not_change_a_state():
    model = encoder(dtype=torch.float64)
    whole = model(TEXTS)
    wide = torch.nn.functional.pad(model.lookup(TEXTS), (0, 7))
    assert torch.equal(model(wide), whole)
    for text, state in zip(TEXTS, whole, strict=True):
        torch.testing.assert_close(model([text])[0], state, rtol=1e-12, atol=1e-12)


def test_padding_gets_no_gradient_and_nan_in_its_embedding_is_never_read():
    model = encoder()
    ids = model.lookup(TEXTS)
    with torch.no_grad():
        model.embedding.weight[0] = torch.nan
    states = model(ids)
    states.sum().backward()
    assert torch.isfinite(states).all()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_no_row_an_empty_text_and_a_row_of_padding():
    model = encoder()
    assert model([]).shape == (0, 6)
    assert model.encode([]).shape == (0, 6)
    assert model.lookup([]).shape == (0, 0)
    assert model(torch.zeros(2, 0, dtype=torch.long)).tolist() == [[0.0] * 6] * 2
    assert model(torch.tensor([[0, 0], [2, 0]]))[0].eq(0).all()
    assert torch.equal(model([""]), model(torch.tensor([[1]])))  # one unknown character
    assert not model([""]).eq(0).all()


def test_only_the_first_maxlen_characters_are_read():
    model = encoder()
    assert torch.equal(model(["abcabcab" + "c" * 100_000]), model(["abcabcab"]))
    assert model.lookup(["b" * 100]).shape == (1, 8)


def test_encode_gives_the_states_in_order_whatever_the_batch():
    model = encoder()
    expected = model(TEXTS).detach().numpy()
    for size in (1, 3, 100):
        found = model.encode(TEXTS, batch_size=size)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_equal_inputs_give_equal_bits():
    model = encoder()
    assert torch.equal(model(TEXTS), model(TEXTS))


@pytest.mark.parametrize(
    ("vocab", "error", "match"),
    [
        ("", ValueError, "at least one character; got none"),
        ("aba", ValueError, "'a' twice"),
        (["ab"], ValueError, "one character.*'ab'"),
        (["a", ""], ValueError, "one character.*''"),
        (["\ud800"], ValueError, "surrogate"),
        ([1], TypeError, "1 of type int"),
        (b"ab", TypeError, "bytes"),
        (None, TypeError, "NoneType"),
        ({"a": 1}, TypeError, "dict"),
    ],
)
def test_bad_vocabularies_are_refused(vocab, error, match):
    with pytest.raises(error, match=match):
        CharGRUEncoder(vocab)


@pytest.mark.parametrize("name", ["d", "embedding_dim", "maxlen"])
def test_bad_sizes_are_refused(name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1; got 0"):
        CharGRUEncoder("ab", **{name: 0})
    with pytest.raises(TypeError, match=name):
        CharGRUEncoder("ab", **{name: 2.5})


@pytest.mark.parametrize(
    ("ids", "error", "match"),
    [
        (torch.tensor([[2, 99]]), ValueError, r"lie in \[0, 11\); got values from 2 to 99"),
        (torch.tensor([[-1]]), ValueError, "from -1"),
        (torch.tensor([[0, 2]]), ValueError, "stand behind"),
        (torch.tensor([[2, 0, 3]]), ValueError, "stand behind"),
        (torch.tensor([2, 3]), ValueError, r"shape \(B, T\); got \(2,\)"),
        (torch.tensor([[2.0]]), TypeError, "float32"),
        (torch.tensor([[True]]), TypeError, "bool"),
        ("abc", TypeError, r"write \[text\]"),
        (["a", None], TypeError, "None of type NoneType"),
    ],
)
def test_bad_ids_and_texts_are_refused(ids, error, match):
    with pytest.raises(error, match=match):
        encoder()(ids)


def test_saving_and_loading_gives_the_same_states(tmp_path):
    model = encoder()
    model.save(tmp_path)
    loaded = CharGRUEncoder.load(tmp_path)
    assert loaded.vocab == model.vocab
    assert torch.equal(loaded(TEXTS), model(TEXTS))
    other = encoder(seed=1)
    other.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(other(TEXTS), model(TEXTS))


def test_folders_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(ValueError, match="encoder.json"):
        CharGRUEncoder.load(tmp_path)
    encoder().save(tmp_path)
    head = json.loads((tmp_path / "encoder.json").read_text())
    (tmp_path / "encoder.json").write_text(json.dumps(head | {"format": 99}))
    with pytest.raises(ValueError, match="expected format 1"):
        CharGRUEncoder.load(tmp_path)
    (tmp_path / "encoder.json").write_text(json.dumps(head | {"d": 7}))
    with pytest.raises(ValueError, match="size mismatch"):
        CharGRUEncoder.load(tmp_path)
    (tmp_path / "encoder.json").write_text(json.dumps(head))
    weights = load_file(tmp_path / "encoder.safetensors")
    weights.pop("embedding.weight")
    save_file(weights, tmp_path / "encoder.safetensors")
    with pytest.raises(ValueError, match="embedding.weight"):
        CharGRUEncoder.load(tmp_path)
