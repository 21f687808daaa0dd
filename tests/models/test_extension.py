"""Extending models of transformers, tiny and random: n = 16 trained positions."""

import json

import pytest
import torch
import transformers as t
from torch import nn

from kexue.models import HierarchicalPositionEmbedding, extend_positions, hierarchical_positions, tie_positions

N = 16
BERT = {"vocab_size": 40, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
ROBERTA = {**BERT, "max_position_embeddings": N + 2, "pad_token_id": 1}
PLAIN = {**BERT, "max_position_embeddings": N}
DISTIL = {"vocab_size": 40, "dim": 8, "hidden_dim": 8, "n_layers": 1, "n_heads": 2, "max_position_embeddings": N}
MODELS = {
    "bert": (t.BertModel, t.BertConfig, PLAIN),
    "bert with a head": (t.BertForMaskedLM, t.BertConfig, PLAIN),
    "roberta": (t.RobertaModel, t.RobertaConfig, ROBERTA),
    "roberta with a head": (t.RobertaForSequenceClassification, t.RobertaConfig, ROBERTA),
    "albert": (t.AlbertModel, t.AlbertConfig, {**PLAIN, "embedding_size": 4}),
    "electra": (t.ElectraModel, t.ElectraConfig, {**PLAIN, "embedding_size": 4}),
    "distilbert": (t.DistilBertModel, t.DistilBertConfig, DISTIL),
    "camembert": (t.CamembertModel, t.CamembertConfig, ROBERTA),
    "xlm-r": (t.XLMRobertaModel, t.XLMRobertaConfig, ROBERTA),
    "mpnet": (t.MPNetModel, t.MPNetConfig, ROBERTA),
    "gpt2": (
        t.GPT2LMHeadModel, t.GPT2Config, {"vocab_size": 40, "n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": N}
    ),
}  # fmt: skip
pytestmark = pytest.mark.slow  # each builds a model


def build(name="bert", **change):
    model, config, sizes = MODELS[name]
    torch.manual_seed(0)
    return model(config(**{**sizes, **change})).eval()


def tokens(rows, length, seed=0):
    return torch.randint(5, 40, (rows, length), generator=torch.Generator().manual_seed(seed))


def output(model, ids, **inputs):
    with torch.no_grad():
        return model(ids, **inputs)[0]


def table_of(model):
    (found,) = [m for n, m in model.named_modules() if n.split(".")[-1] in ("position_embeddings", "wpe")]
    return found


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", list(MODELS))
def test_every_kind_reads_longer_texts_and_short_ones_keep_their_bits(name, tied):
    model, short = build(name), tokens(2, N)
    before, old = output(model, short), table_of(model)
    weight, offset = old.weight, 0 if old.padding_idx is None else old.padding_idx + 1
    assert extend_positions(model, 50, tied=tied) is model
    assert torch.equal(output(model, short), before)
    assert torch.isfinite(output(model, tokens(2, 50))).all()
    assert model.config.max_position_embeddings == 50 + offset
    new = table_of(model)
    assert isinstance(new, HierarchicalPositionEmbedding if tied else nn.Embedding)
    assert (new.weight is weight) is tied
    rows = new(torch.arange(offset, offset + 50))
    torch.testing.assert_close(rows, hierarchical_positions(weight[offset:], 50))
    if offset:
        assert not new(torch.tensor(offset - 1)).any()
        assert new.padding_idx == offset - 1


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", list(MODELS))
def test_plain_transformers_loads_what_was_saved_and_it_can_be_tied_again(name, tied, tmp_path):
    model, ids = extend_positions(build(name), 50, alpha=0.3, tied=tied), tokens(2, 50)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert type(table_of(loaded)) is nn.Embedding
    assert torch.equal(output(loaded, ids), output(model, ids))
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["hierarchical_positions"] == {"alpha": 0.3, "n": N, "tied": tied}
    with pytest.raises(ValueError, match="extended already"):
        extend_positions(loaded, 60)
    tie_positions(loaded)
    assert isinstance(table_of(loaded), HierarchicalPositionEmbedding)
    torch.testing.assert_close(output(loaded, ids), output(model, ids))
    assert tie_positions(loaded) is loaded
    loaded.save_pretrained(tmp_path / "again")
    again = type(model).from_pretrained(tmp_path / "again").eval()
    torch.testing.assert_close(output(again, ids), output(model, ids))


def test_every_place_of_a_tied_table_learns_and_an_optimizer_keeps_working():
    model = build()
    weight = model.embeddings.position_embeddings.weight
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    extend_positions(model, N * N)
    ids = torch.tensor([[37]])  # one token at position 37 = 2 * 16 + 5
    model(ids, position_ids=torch.tensor([[37]])).last_hidden_state.square().sum().backward()
    assert sorted(weight.grad.any(1).nonzero()[:, 0].tolist()) == [0, 2, 5]
    torch.testing.assert_close(weight.grad[0], -weight.grad[2])
    before = weight.detach().clone()
    optimizer.step()
    assert (weight != before).any(1).nonzero()[:, 0].tolist() == [0, 2, 5]


@pytest.mark.parametrize("name", ["roberta", "mpnet"])
def test_padding_keeps_its_row(name):
    model = extend_positions(build(name), 40)
    ids = tokens(2, 30)
    mask = torch.ones_like(ids)
    long = torch.cat([ids, torch.full((2, 5), 1)], 1)
    longer = torch.cat([mask, torch.zeros(2, 5, dtype=torch.long)], 1)
    torch.testing.assert_close(output(model, long, attention_mask=longer)[:, :30], output(model, ids))
    model.train()
    model(long, attention_mask=longer)[0].square().sum().backward()
    table = table_of(model)
    assert not table.weight[1].any()
    assert not table.weight.grad[1].any()


def test_the_position_decides_and_not_the_length():
    model, ids = extend_positions(build(), 50), tokens(1, 3)
    whole = output(model, torch.cat([tokens(1, 30), ids], 1))
    late = torch.tensor([[15, 16, 49]])
    rows = model.embeddings.position_embeddings(late)
    torch.testing.assert_close(
        rows[0], hierarchical_positions(model.embeddings.position_embeddings.weight, 50)[late[0]]
    )
    assert torch.isfinite(output(model, ids, position_ids=late)).all()
    assert torch.isfinite(whole).all()


def test_decoding_with_a_cache_runs_past_the_trained_positions():
    model, prompt = extend_positions(build("gpt2"), 60), tokens(2, 10)
    ids = prompt
    for _ in range(20):
        ids = torch.cat([ids, output(model, ids)[:, -1:].argmax(-1)], 1)
    got = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=20, do_sample=False, eos_token_id=None,
        pad_token_id=0,
    )  # fmt: skip
    assert torch.equal(got, ids)


def test_the_buffers_follow():
    model = extend_positions(build("roberta"), 50)
    assert torch.equal(model.embeddings.position_ids, torch.arange(52)[None])
    assert torch.equal(model.embeddings.token_type_ids, torch.zeros(1, 52, dtype=torch.long))
    assert not {"embeddings.position_ids", "embeddings.token_type_ids"} & set(model.state_dict())


def test_the_tokenizer_follows():
    class Tokenizer:
        model_max_length = 512

    tokenizer = Tokenizer()
    extend_positions(build("roberta"), 50, tokenizer=tokenizer)
    assert tokenizer.model_max_length == 50
    with pytest.raises(TypeError, match="tokenizer must have model_max_length; got list"):
        extend_positions(build(), 50, tokenizer=[])


def deberta():
    return t.DebertaV2Model(t.DebertaV2Config(**PLAIN, relative_attention=True, position_biased_input=True))


def rotary_esm():
    return t.EsmModel(t.EsmConfig(**ROBERTA, position_embedding_type="rotary", mask_token_id=3))


def t5():
    return t.T5EncoderModel(t.T5Config(vocab_size=40, d_model=8, d_ff=8, d_kv=4, num_layers=1, num_heads=2))


@pytest.mark.parametrize(
    ("build_model", "message"),
    [
        (lambda: t.LlamaModel(t.LlamaConfig(**BERT)), "no table of learned absolute positions"),
        (lambda: t.RoFormerModel(t.RoFormerConfig(**BERT)), "no table of learned absolute positions"),
        (t5, "no table of learned absolute positions"),
        (lambda: build("distilbert", sinusoidal_pos_embds=True), "sinusoidal_pos_embds=True"),
        (deberta, "relative_attention=True"),
        (rotary_esm, "rotary"),
        (lambda: t.NystromformerModel(t.NystromformerConfig(**PLAIN)), r"got 18 rows, max_position_embeddings=16"),
        (lambda: nn.ModuleList([build(), build()]), "2 position tables"),
    ],
)
def test_models_without_one_learned_table_are_refused(build_model, message):
    with pytest.raises(ValueError, match=message):
        extend_positions(build_model(), 50)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"length": N * N + 1}, ValueError, "length must be at most 256, .*16 positions.*; got 257"),
        ({"length": N}, ValueError, "length must be above 16, .*; got 16"),
        ({"length": 0}, ValueError, "length must be at least 1; got 0"),
        ({"length": 50.0}, TypeError, "length must be an integer"),
        ({"alpha": 0.5}, ValueError, "alpha must not be .5"),
        ({"alpha": 1.0}, ValueError, "alpha must be below 1"),
        ({"alpha": 0}, ValueError, "alpha must be greater than 0"),
        ({"tied": None}, TypeError, "tied must be True or False; got None"),
    ],
)
@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_a_refused_call_leaves_the_model_as_it_was(name, options, error, message):
    model = build(name)
    before, config = output(model, tokens(1, N)), model.config.to_dict()
    with pytest.raises(error, match=message):
        extend_positions(model, **{"length": 50, **options})
    assert torch.equal(output(model, tokens(1, N)), before)
    assert model.config.to_dict() == config
    extend_positions(model, N * N)
    with pytest.raises(ValueError, match="extended already"):
        extend_positions(model, 50)


def test_the_smallest_table_and_what_is_no_model():
    with pytest.raises(ValueError, match="at least 2 positions"):
        extend_positions(build(max_position_embeddings=1), 2)
    assert output(extend_positions(build(max_position_embeddings=2), 4), tokens(1, 4)).shape == (1, 4, 8)
    with pytest.raises(TypeError, match="got str"):
        extend_positions("bert", 50)
    with pytest.raises(TypeError, match="got str"):
        tie_positions("bert")
    bare = nn.Module()
    bare.position_embeddings = nn.Embedding(4, 2)
    with pytest.raises(TypeError, match="with a config; got Module"):
        extend_positions(bare, 8)


def test_a_table_that_was_trained_untied_cannot_be_tied():
    model = extend_positions(build(), 50, tied=False)
    with torch.no_grad():
        model.embeddings.position_embeddings.weight[40] += 0.1
    with pytest.raises(ValueError, match="does not follow from its first 16 positions"):
        tie_positions(model)
    with pytest.raises(ValueError, match="no record"):
        tie_positions(build())
    model.config.hierarchical_positions = {"alpha": 0.4, "n": 3, "tied": True}
    with pytest.raises(ValueError, match="length must be at most 9"):
        tie_positions(model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_models_of_other_dtypes(dtype, tmp_path):
    model = build().to(dtype)
    short = output(model, tokens(1, N))
    extend_positions(model, 50)
    assert torch.equal(output(model, tokens(1, N)), short)
    model.save_pretrained(tmp_path)
    loaded = t.BertModel.from_pretrained(tmp_path, dtype=dtype).eval()
    tie_positions(loaded)
    assert torch.equal(output(loaded, tokens(1, 50)), output(model, tokens(1, 50)))
