"""What growth refuses, and why."""

import pytest
import torch
import transformers as t

from kexue.attention import register_attention
from kexue.models import (
    grow,
    plan_growth,
)
from reference.growth_models import LIMIT, build, difference, tokens

pytestmark = pytest.mark.slow


# What is refused


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"width": 0}, ValueError, "width must be at least 1; got 0"),
        ({"width": -2}, ValueError, "at least 1"),
        ({"width": 1.5}, ValueError, r"whole number; got 1.5.*hidden_size"),
        ({"width": True}, TypeError, "width"),
        ({"width": "2"}, TypeError, "width"),
        ({"depth": 2}, ValueError, "nothing to grow"),
        ({"hidden_size": 32}, ValueError, "nothing to grow"),
        ({"depth": 1}, ValueError, "depth must be at least 2"),
        ({"hidden_size": 16}, ValueError, "hidden_size must be at least 32.*got 16"),
        ({"intermediate_size": 8}, ValueError, "intermediate_size must be at least"),
        ({"hidden_size": 64.0}, TypeError, "hidden_size"),
        ({"width": 2, "hidden_size": 80}, ValueError, "hidden_size 64; got hidden_size=80"),
        ({"hidden_size": 37}, ValueError, "whole copies of the 4 heads of width 8"),
        ({"hidden_size": 37, "heads": "wider"}, ValueError, "heads='wider' keeps 4 heads.*got 37"),
        ({"heads": "many"}, ValueError, "heads must be one of 'more', 'wider'"),
        ({"convention": "plain"}, ValueError, "convention"),
        ({"rope": "none"}, ValueError, "rope"),
        ({"noise": -0.1}, ValueError, "noise"),
        ({"noise": float("nan")}, ValueError, "noise"),
        ({"noise": "much"}, TypeError, "noise"),
        ({"exact": 1}, TypeError, "exact"),
        ({"generator": 3}, TypeError, "generator"),
    ],
)
def test_arguments_out_of_range(options, error, text):
    with pytest.raises(error, match=text):
        grow(build("gpt2"), **options)


def test_groups_of_heads_that_do_not_divide():
    with pytest.raises(ValueError, match="2 of keys; take a multiple of 16"):
        grow(build("llama"), hidden_size=40 + 8 + 8 + 1)
    with pytest.raises(ValueError, match="multiple of 32, for rotary"):
        grow(build("llama"), hidden_size=48, heads="wider")


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_post_norm_models_cannot_do_everything(kind):
    model = build(kind)
    with pytest.raises(ValueError, match="deeper exactly"):
        grow(model, depth=4)
    with pytest.raises(ValueError, match="no multiple"):
        grow(model, hidden_size=40)
    with pytest.warns(UserWarning, match="stack of layers is repeated: the function changes"):
        deep = grow(model, depth=5, exact=False)
    assert deep.config.num_hidden_layers == 5
    base = deep.base_model.encoder.layer
    for i in range(5):
        expected = model.base_model.encoder.layer[i % 2].output.dense.weight
        assert torch.equal(base[i].output.dense.weight, expected)
    assert difference(model, deep) > 1e-3
    with pytest.warns(UserWarning, match="fills hold the mean of the biases.*the function changes"):
        wide = grow(model, hidden_size=40, exact=False)
    assert 1e-6 < difference(model, wide) < 10
    assert plan_growth(model, hidden_size=40, exact=False).notes


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama"])
def test_wider_heads_are_not_exact_behind_feature_maps(kind):
    register_attention()
    off = {name: 0.0 for name in ("attention_probs_dropout_prob", "attn_pdrop") if name in vars(build(kind).config)}
    model = build(kind, **off)
    for name in ("kexue_linear", "kexue_performer"):
        model.set_attn_implementation(name)
        with pytest.raises(ValueError, match=f"heads='wider' is not exact with the attention '{name}'"):
            grow(model, heads="wider")
        with pytest.warns(UserWarning, match=f"{name} maps.*the function changes"):
            wide = grow(model, heads="wider", exact=False)
        inputs = {"input_ids": tokens()}
        assert difference(model, wide, **inputs) > 1e-5
        assert difference(model, grow(model), **inputs) < LIMIT
    model.set_attn_implementation("kexue_entropy")  # a softmax: only the inner product counts
    assert difference(model, grow(model, heads="wider"), **inputs) < LIMIT


def test_gau_alpha_has_one_head_and_no_gain():
    with pytest.raises(ValueError, match="one head of keys"):
        grow(build("gau"), 2, heads="wider")
    with pytest.raises(ValueError, match="no gain"):
        grow(build("gau"), 2, convention="orthogonal")


def test_other_models_are_named_and_refused():
    for config in (
        t.T5Config(vocab_size=20, d_model=8, d_ff=8, num_layers=1, num_heads=2, d_kv=4),
        t.BloomConfig(vocab_size=20, hidden_size=8, n_layer=1, n_head=2),
        t.MixtralConfig(vocab_size=20, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
                        num_key_value_heads=1, num_local_experts=2),
    ):  # fmt: skip
        model = t.AutoModel.from_config(config)
        with pytest.raises(ValueError, match=f"bert.*gpt2.*llama.*got '{config.model_type}'"):
            grow(model, 2)
    for thing in (torch.nn.Linear(2, 2), None, "gpt2", t.GPT2Config()):
        with pytest.raises(TypeError, match="model must be a transformers PreTrainedModel; got"):
            grow(thing, 2)
    with pytest.raises(ValueError, match="cross-attention"):
        grow(build("gpt2", add_cross_attention=True), 2)


def test_parameters_that_the_configuration_does_not_describe():
    model = build("gpt2")
    model.transformer.h[0].mlp.lora_A = torch.nn.Linear(32, 2)
    with pytest.raises(ValueError, match=r"unknown: transformer\.h\.0\.mlp\.lora_A\.bias.*adapters"):
        grow(model, 2)
    model = build("bert")
    del model.bert.encoder.layer[1].output.dense
    with pytest.raises(ValueError, match=r"missing: bert\.encoder\.layer\.1\.output\.dense"):
        grow(model, 2)
    model = build("llama")
    model.model.layers[0].self_attn.q_proj = torch.nn.Linear(32, 24, bias=False).double()
    with pytest.raises(ValueError, match="q_proj.*pruned"):
        grow(model, 2)
    model = build("gpt2")
    model.transformer.h[0].ln_1.register_buffer("extra", torch.ones(3))
    with pytest.raises(ValueError, match="extra"):
        grow(model, 2)


def test_shared_and_quantised_parameters():
    model = build("gpt2")
    model.transformer.h[1].mlp.c_fc.weight = model.transformer.h[0].mlp.c_fc.weight
    with pytest.raises(ValueError, match="shared parameters"):
        grow(model, 2)
    model = build("gpt2")
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    with pytest.raises(ValueError, match="tie_word_embeddings"):
        grow(model, 2)
    model = build("gpt2")
    model.lm_head = torch.nn.Linear(32, 50, bias=False)
    model.config.tie_word_embeddings = False
    assert difference(model.double(), grow(model, 2)) < LIMIT
    model = build("llama")
    weight = model.model.layers[0].mlp.up_proj.weight
    model.model.layers[0].mlp.up_proj.weight = torch.nn.Parameter(weight.to(torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match="quantised.*up_proj"):
        grow(model, 2)


def test_models_without_values():
    with torch.device("meta"):
        model = t.GPT2LMHeadModel(build("gpt2").config)
    with pytest.raises(ValueError, match="meta"):
        grow(model, 2)
    assert plan_growth(model, 2).config.n_embd == 64  # a plan needs none
