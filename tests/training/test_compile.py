"""Compiling each block: the same losses, the way back, and a warning instead of a failure."""

import pytest
import torch
from torch import nn

from kexue.training import fit, shuffled_batches
from kexue.training.blocks import blocks
from training.ranks import Tagger, data

BATCHES = shuffled_batches(data(), 8)


@pytest.fixture
def without_inductor(monkeypatch):
    """Graphs run as they are: what the compiler makes of them is not what is tested. Counts the compiled modules."""
    compiled, real = [], nn.Module.compile

    def compile(module, **options):
        assert options == {"dynamic": False}
        compiled.append(module)
        real(module, backend="aot_eager", **options)

    monkeypatch.setattr(nn.Module, "compile", compile)
    return compiled


@pytest.mark.slow
def test_each_block_is_compiled_and_given_back(tmp_path, without_inductor):
    expected = fit(Tagger(), BATCHES, steps=6, out=tmp_path / "eager", lr=0.02)
    model = Tagger()
    with pytest.warns(UserWarning, match="compile=True for a run of 6 steps"):
        result = fit(model, BATCHES, steps=6, out=tmp_path / "compiled", lr=0.02, compile=True)
    assert without_inductor == list(model.layers)
    assert all(module._compiled_call_impl is None for module in model.modules())
    assert result.history == pytest.approx(expected.history, abs=1e-6)
    assert list(model.state_dict()) == list(Tagger().state_dict())


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 2])
def test_without_a_compiler_it_goes_on_eagerly_with_a_warning(tmp_path, accumulate):
    from torch._inductor import config

    torch.compiler.reset()
    expected = fit(Tagger(0.3), BATCHES, steps=200, out=tmp_path / "eager", lr=0.02, accumulate=accumulate)
    model = Tagger(0.3)
    with (
        config.patch({"cpp.cxx": (None, "no-such-compiler"), "fx_graph_cache": False}),
        pytest.warns(UserWarning, match="torch.compile failed, training goes on without it; it needs a C"),
    ):
        result = fit(model, BATCHES, steps=200, out=tmp_path / "out", lr=0.02, accumulate=accumulate, compile=True)
    assert result.history == expected.history  # the same noise, although the first batch was begun twice
    assert all(module._compiled_call_impl is None for module in model.modules())


def test_a_failure_of_the_model_itself_is_not_taken_for_one_of_the_compiler(tmp_path, without_inductor):
    class Broken(Tagger):
        def forward(self, input_ids, labels):
            raise RuntimeError("of its own")

    with pytest.warns(UserWarning, match="compile=True"), pytest.raises(RuntimeError, match="of its own"):
        fit(Broken(), BATCHES, steps=2, out=tmp_path, compile=True)


@pytest.mark.parametrize("value", [1, None, "yes"])
def test_bad_values_are_named(tmp_path, value):
    with pytest.raises(TypeError, match=f"compile must be a bool; got {value!r}"):
        fit(Tagger(), BATCHES, steps=2, out=tmp_path, compile=value)


def test_blocks_are_found_from_the_structure():
    import transformers as t

    size = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "vocab_size": 20,
    }
    bert = t.BertForMaskedLM(t.BertConfig(**size))
    assert blocks(bert) == list(bert.bert.encoder.layer)
    gpt = t.GPT2LMHeadModel(t.GPT2Config(vocab_size=20, n_embd=8, n_layer=3, n_head=2))
    assert blocks(gpt) == list(gpt.transformer.h)
    sizes = {"vocab_size": 20, "d_model": 8, "d_kv": 4, "d_ff": 8, "num_heads": 2, "num_layers": 2}
    t5 = t.T5ForConditionalGeneration(t.T5Config(**sizes))
    assert {id(b) for b in blocks(t5)} == {id(b) for b in (*t5.encoder.block, *t5.decoder.block)}
    albert = t.AlbertModel(t.AlbertConfig(**size, embedding_size=8))
    assert len(blocks(albert)) == 1  # its layers are one
    sequence = nn.Sequential(
        nn.Embedding(9, 8), nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 8), 2), nn.Linear(8, 2)
    )
    assert blocks(sequence) == list(sequence[1].layers)
    assert blocks(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))) == []


def test_a_block_that_shares_a_weight_with_the_rest_is_left_out():
    model = Tagger()
    model.layers[1].extra = model.table
    assert blocks(model) == [model.layers[0]]
