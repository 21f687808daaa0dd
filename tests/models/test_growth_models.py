"""Growing what the library builds: every head, options of the families, what comes with a model, files, the plan."""

import copy

import numpy as np
import pytest
import torch
import transformers as t

from kexue.models import (
    GAUAlphaModel,
    extend_positions,
    grow,
    plan_growth,
    tie_positions,
    verify_growth,
)
from reference.growth_models import KINDS, LIMIT, build, difference, padded, state, tokens

pytestmark = pytest.mark.slow


# Heads, structure, and what comes with a model

HEADS = {
    "bert": [t.BertModel, t.BertForPreTraining, t.BertForSequenceClassification, t.BertForTokenClassification,
             t.BertForQuestionAnswering, t.BertForNextSentencePrediction, t.BertLMHeadModel],
    "roberta": [t.RobertaModel, t.RobertaForCausalLM, t.RobertaForSequenceClassification,
                t.RobertaForTokenClassification, t.RobertaForQuestionAnswering],
    "gpt2": [t.GPT2Model, t.GPT2ForSequenceClassification, t.GPT2ForTokenClassification, t.GPT2ForQuestionAnswering],
    "llama": [t.LlamaModel, t.LlamaForSequenceClassification, t.LlamaForTokenClassification,
              t.LlamaForQuestionAnswering],
    "gau": [GAUAlphaModel],
}  # fmt: skip


@pytest.mark.parametrize(("kind", "cls"), [(kind, cls) for kind, many in HEADS.items() for cls in many])
def test_every_head(kind, cls):
    change = {"num_labels": 2, "pad_token_id": 1} if kind != "gau" else {}
    if cls in (t.BertLMHeadModel, t.RobertaForCausalLM):
        change["is_decoder"] = True
    model = build(kind, cls, **change)
    convention = ["copy"] if kind == "gau" else ["copy", "orthogonal"]
    for name in convention:
        big = grow(model, 2, convention=name, noise=0.1)
        report = verify_growth(model, big, **padded(), convention=name)
        assert (report.max_abs_uncast if report.dtype_limited else report.max_abs) < LIMIT
    if kind in ("gpt2", "llama", "gau"):
        big = grow(model, hidden_size=48, depth=3)
        assert difference(model, big) < LIMIT


@pytest.mark.parametrize(("kind", "cls"), [("bert", t.BertForMultipleChoice), ("roberta", t.RobertaForMultipleChoice)])
def test_multiple_choice(kind, cls):
    model = build(kind, cls)
    assert difference(model, grow(model, 3), input_ids=tokens(6).view(2, 3, 12)) < LIMIT


@pytest.mark.parametrize("tied", [True, False])
def test_a_second_head_on_the_norm_of_a_tied_one(tied):
    model = build("gpt2", t.GPT2DoubleHeadsModel, tie_word_embeddings=tied, num_labels=1)
    ids = tokens(4).view(2, 2, 12)
    for options in ({"width": 3}, {"hidden_size": 40}, {"width": 2, "convention": "orthogonal"}):
        report = verify_growth(model, grow(model, **options), ids)
        assert report.max_abs < LIMIT
        assert {"logits", "mc_logits"} <= set(report.outputs)
    for key in ("summary_use_proj", "summary_proj_to_labels"):
        with pytest.raises(ValueError, match="summary_use_proj"):
            grow(build("gpt2", t.GPT2DoubleHeadsModel, num_labels=1, **{key: False}), 2)


def test_a_model_without_a_pooler_stays_without():
    model = t.BertModel(build("bert").config, add_pooling_layer=False).double().eval()
    big = grow(model, 2)
    assert big.pooler is None
    assert difference(model, big) < LIMIT


@pytest.mark.parametrize("options", [{"width": 2, "heads": "wider"}, {"width": 3}, {"hidden_size": 40}, {"depth": 5}])
@pytest.mark.parametrize(
    "change",
    [
        {"scale_attn_weights": False}, {"scale_attn_by_inverse_layer_idx": True}, {"n_inner": 70},
        {"activation_function": "relu"}, {"reorder_and_upcast_attn": True, "attn_implementation": "eager"},
    ],
)  # fmt: skip
def test_options_of_gpt2(change, options):
    model = build("gpt2", **change)
    big = grow(model, **options)
    assert difference(model, big) < LIMIT


def test_the_inner_width_of_gpt2_stays_unset_where_it_is_four_times_the_hidden_one():
    assert grow(build("gpt2"), 2).config.n_inner is None
    assert grow(build("gpt2"), 2, intermediate_size=300).config.n_inner == 300
    assert grow(build("gpt2", n_inner=70), 2).config.n_inner == 140


@pytest.mark.parametrize("kind", ["linear", "llama3", "yarn", "dynamic", "longrope"])
def test_scaled_rotary_positions(kind):
    rope = {
        "linear": {"factor": 2.0},
        "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                   "original_max_position_embeddings": 8},
        "yarn": {"factor": 4.0, "original_max_position_embeddings": 8},
        "dynamic": {"factor": 2.0},
        "longrope": {"factor": 2.0, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4,
                     "original_max_position_embeddings": 10},
    }[kind]  # fmt: skip
    model = build("llama", head_dim=8, rope_parameters={"rope_type": kind, "rope_theta": 1e4, **rope})
    assert difference(model, grow(model, 2)) < LIMIT
    if kind in ("linear", "llama3"):
        assert difference(model, grow(model, 2, heads="wider")) < LIMIT
    else:
        if kind == "yarn":  # so short that the rounded bounds of its ramp happen to agree, which is found by computing
            assert difference(model, grow(model, 2, heads="wider")) < LIMIT
            rope["original_max_position_embeddings"] = 128
            model = build("llama", head_dim=8, rope_parameters={"rope_type": kind, "rope_theta": 1e4, **rope})
        with pytest.raises(ValueError, match=kind):
            grow(model, 2, heads="wider")


def test_new_rotary_coordinates_learn_with_noise():
    model = build("llama")
    big = grow(model, 2, heads="wider", noise=0.1, generator=torch.Generator().manual_seed(0))
    assert difference(model, big) < LIMIT
    big(tokens(), labels=tokens()).loss.backward()
    attention = big.model.layers[0].self_attn
    # Of the halves of a head every second coordinate is new: queries give 0 there, keys whatever the noise gives
    for layer, lowest, highest in ((attention.q_proj, 0.0, 1e-12), (attention.k_proj, 1e-3, 1.0)):
        new = layer.weight.detach().unflatten(0, (-1, 2))[:, 1]
        assert lowest <= float(new.unflatten(1, (-1, 2)).sum(-1).abs().max()) <= highest
    old, new = attention.q_proj.weight.grad.unflatten(0, (-1, 2)).unbind(1)
    assert float(new.norm()) > 1e-3 * float(old.norm())


def test_pairs_under_rotary_positions_are_no_exact_growth():
    model = build("llama")
    with pytest.raises(ValueError, match="rope='pair'"):
        grow(model, 2, heads="wider", rope="pair")
    with pytest.warns(UserWarning, match="other frequencies than before: the function changes"):
        big = grow(model, 2, heads="wider", rope="pair", exact=False)
    report = verify_growth(model, big, **padded())
    assert report.max_abs > 1e-3
    assert not report.dtype_limited
    # With the frequencies of the small model repeated it is exact: the pairs are where the method puts them
    for name in ("inv_freq", "original_inv_freq"):
        setattr(big.model.rotary_emb, name, getattr(model.model.rotary_emb, name).repeat_interleave(2))
    assert difference(model, big) < LIMIT


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama"])
def test_both_implementations_of_attention(kind, attention):
    model = build(kind, attn_implementation=attention)
    big = grow(model, 2)
    assert big.config._attn_implementation == attention
    assert difference(model, big) < LIMIT


@pytest.mark.parametrize("kind", list(KINDS))
def test_save_and_load(kind, tmp_path):
    model = build(kind)
    options = {"hidden_size": 80} if kind in ("gpt2", "llama") else {"width": 3}
    big = grow(model, **options)
    big.save_pretrained(tmp_path)
    loaded = type(big).from_pretrained(tmp_path, dtype=torch.float64).eval()
    with torch.no_grad():
        assert torch.equal(loaded(**padded()).logits, big(**padded()).logits)
    assert loaded.config.tie_word_embeddings == model.config.tie_word_embeddings
    again = grow(loaded, 2)  # and grown once more
    assert difference(model, again) < LIMIT


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_generation_with_a_cache(kind):
    model = build(kind)
    model.generation_config.max_new_tokens = 7
    model.generation_config.pad_token_id = 0
    big = grow(model, 2, depth=3, heads="wider")
    assert big.generation_config.max_new_tokens == 7
    expected = model.generate(tokens(2, 4), do_sample=False, use_cache=True)
    assert torch.equal(big.generate(tokens(2, 4), do_sample=False, use_cache=True), expected)
    assert torch.equal(big.generate(tokens(2, 4), do_sample=False, use_cache=False), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", list(KINDS))
def test_low_precision_weights_are_rounded_and_no_more(kind, dtype):
    model = build(kind, dtype=dtype)
    exact, rounded = state(grow(model.double(), 3)), grow(model.to(dtype), 3)
    assert {p.dtype for p in rounded.parameters()} == {dtype}
    step = torch.finfo(dtype).eps
    for name, value in state(rounded).items():
        np.testing.assert_allclose(value, exact[name], rtol=step, atol=step * 1e-3, err_msg=name)


def test_everything_else_about_a_model_stays():
    model = build("bert", dtype=torch.float32, finetuning_task="mine", id2label={0: "no", 1: "yes"})
    model.train()
    model.bert.encoder.layer[0].eval()
    model.bert.embeddings.word_embeddings.weight.requires_grad_(False)
    model.gradient_checkpointing_enable()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    config = copy.deepcopy(model.config)
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    big = grow(model, 2)
    assert torch.equal(torch.rand(3), expected), "growth without noise must not touch the global generator"
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.config.to_dict() == config.to_dict()
    assert big.config.finetuning_task == "mine"
    assert big.config.id2label == {0: "no", 1: "yes"}
    assert big.training
    assert not big.bert.encoder.layer[0].attention.training
    assert big.bert.encoder.layer[1].training
    assert big.cls.predictions.decoder.weight is big.bert.embeddings.word_embeddings.weight
    assert not big.cls.predictions.decoder.weight.requires_grad
    assert big.cls.predictions.decoder.bias is big.cls.predictions.bias
    assert all(layer.gradient_checkpointing for layer in big.bert.encoder.layer)
    assert not any(p.is_meta for p in big.parameters())
    assert torch.equal(big.bert.embeddings.position_ids, model.bert.embeddings.position_ids)


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("heads", ["more", "wider"])
def test_buffers_are_those_of_the_configuration(kind, heads):
    if kind == "gau" and heads == "wider":
        pytest.skip("refused")
    big = grow(build(kind, dtype=torch.float32), 2, heads=heads)
    fresh = type(big)(big.config)
    ours, theirs = dict(big.named_buffers()), dict(fresh.named_buffers())
    assert set(ours) == set(theirs)
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name
    big(**padded())  # no buffer is left on the meta device


def test_extended_positions():
    model = extend_positions(build("bert", max_position_embeddings=8), 20)
    with pytest.raises(ValueError, match="tied positions"):
        grow(model, 2)
    model = extend_positions(build("bert", max_position_embeddings=8), 20, tied=False)
    big = grow(model, 2)
    assert difference(model, big) < LIMIT
    tie_positions(big)  # the table still follows from its first rows
    assert difference(model, big) < LIMIT


# The plan


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_plan_from_a_configuration_is_that_of_the_model(kind):
    model = build(kind)
    ours = plan_growth(model, 2, noise=0.1)
    theirs = plan_growth(model.config, 2, noise=0.1, model_class=type(model))
    assert ours.tensors == theirs.tensors
    assert ours.aliases == theirs.aliases
    assert ours.config.to_dict() == theirs.config.to_dict()
    big = grow(model, 2, noise=0.1, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(0)
    for name, recipe in ours.tensors.items():  # tensor by tensor gives the same bits
        out = torch.full(recipe.shape, torch.nan, dtype=torch.float64)
        recipe.write(model.get_parameter(recipe.source), out, generator)
        assert torch.equal(out, big.get_parameter(name)), name
    with pytest.raises(TypeError, match="model_class"):
        plan_growth(model.config, 2)


def test_memory_beside_the_grown_model_is_small(monkeypatch):
    model, made = build("gpt2", n_embd=128), []
    empty = torch.empty

    def counted(*args, **kwargs):
        out = empty(*args, **kwargs)
        made.append(out.numel() if out.device.type == "cpu" else 0)
        return out

    monkeypatch.setattr(torch, "empty", counted)
    big = grow(model, 2)
    assert sum(made) <= sum(p.numel() for p in big.parameters())
