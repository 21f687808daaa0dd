from __future__ import annotations

import pytest
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForNextSentencePrediction,
    BertForPreTraining,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Model,
)

from kexue.models import (
    KexueConfig,
    KexueForCausalLM,
    KexueForMaskedLM,
    KexueForNextSentence,
    KexueForPreTraining,
    KexueForSequenceClassification,
    KexueModel,
    correct_mask_embedding,
    from_bert,
    from_gpt2,
    uncorrect_mask_embedding,
)

PAIRS = {
    BertForMaskedLM: KexueForMaskedLM,
    BertForNextSentencePrediction: KexueForNextSentence,
    BertForPreTraining: KexueForPreTraining,
    BertForSequenceClassification: KexueForSequenceClassification,
    BertModel: KexueModel,
}


def disturbed(model):
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model.eval()


def bert(kind=BertForMaskedLM, **options):
    torch.manual_seed(0)
    sizes = {"vocab_size": 31, "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4}
    return disturbed(
        kind(
            BertConfig(**(sizes | {"intermediate_size": 40, "max_position_embeddings": 20, "num_labels": 5} | options))
        )
    )


def gpt2(kind=GPT2LMHeadModel, **options):
    torch.manual_seed(0)
    sizes = {"vocab_size": 31, "n_embd": 24, "n_layer": 3, "n_head": 4, "n_positions": 20}
    return disturbed(kind(GPT2Config(**(sizes | {"bos_token_id": 1, "eos_token_id": 2} | options))))


def batch():
    g = torch.Generator().manual_seed(0)
    ids, segments = torch.randint(1, 31, (3, 9), generator=g), torch.randint(0, 2, (3, 9), generator=g)
    return ids, (torch.arange(9) < torch.tensor([9, 5, 1])[:, None]).long(), segments


@pytest.mark.parametrize("kind", PAIRS)
@pytest.mark.parametrize("act", ["gelu", "gelu_new", "relu"])
def test_bert_gives_the_same_logits(kind, act):
    theirs, (ids, mask, segments) = bert(kind, hidden_act=act), batch()
    ours = from_bert(theirs.state_dict(), theirs.config)
    assert type(ours) is PAIRS[kind]
    assert not ours.training
    a, b = theirs(ids, attention_mask=mask, token_type_ids=segments), ours(ids, mask, segments)
    seen = mask.bool()
    if kind is BertForPreTraining:
        assert (a.prediction_logits - b.logits)[seen].abs().max() < 1e-5
        assert (a.seq_relationship_logits - b.next_sentence_logits).abs().max() < 1e-5
    elif kind is BertModel:
        assert (a.last_hidden_state - b.last_hidden_state)[seen].abs().max() < 1e-5
    elif kind is BertForMaskedLM:
        assert (a.logits - b.logits)[seen].abs().max() < 1e-5
    else:
        assert (a.logits - b.logits).abs().max() < 1e-5
    # Without a mask BERT looks at all tokens, also at those with the padding id.
    assert (theirs(ids)[0] - ours(ids)[0 if kind is not BertForPreTraining else "logits"]).abs().max() < 1e-5


@pytest.mark.parametrize("kind", [GPT2LMHeadModel, GPT2Model])
@pytest.mark.parametrize(
    "options", [{}, {"n_inner": 30, "activation_function": "gelu"}, {"tie_word_embeddings": False}]
)
def test_gpt2_gives_the_same_logits(kind, options):
    theirs, (ids, mask, _) = gpt2(kind, **options), batch()
    ours = from_gpt2(theirs.state_dict(), theirs.config)
    assert type(ours) is (KexueForCausalLM if kind is GPT2LMHeadModel else KexueModel)
    a, b = theirs(ids, attention_mask=mask), ours(ids, mask)
    assert (a[0] - b[0])[mask.bool()].abs().max() < 1e-5


def test_gpt2_generates_the_same_tokens_also_with_padding_on_the_left():
    theirs, (ids, _, _) = gpt2(eos_token_id=None), batch()
    ours = from_gpt2(theirs.state_dict(), theirs.config)
    mask = (torch.arange(9) >= torch.tensor([0, 4, 8])[:, None]).long()
    for options in ({}, {"num_beams": 3}):
        a, b = (
            m.generate(ids, attention_mask=mask, max_new_tokens=9, do_sample=False, pad_token_id=0, **options)
            for m in (theirs, ours)
        )
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_dtype_stays_and_the_weights_are_copies(dtype):
    theirs = gpt2().to(dtype)
    ours = from_gpt2(theirs.state_dict(), theirs.config)
    assert all(p.dtype == dtype and p.requires_grad for p in ours.parameters())
    before = theirs.transformer.ln_f.weight.clone()
    with torch.no_grad():
        for p in ours.parameters():
            p.zero_()
    assert torch.equal(theirs.transformer.ln_f.weight, before)
    assert (theirs.transformer.wte.weight != 0).any()


@pytest.mark.parametrize("kind", [BertForMaskedLM, BertForPreTraining])
def test_an_untied_decoder_keeps_the_bias_that_was_read(kind):
    theirs, (ids, _, _) = bert(kind, tie_word_embeddings=False), batch()
    assert not torch.equal(theirs.cls.predictions.bias, theirs.cls.predictions.decoder.bias)
    ours = from_bert(theirs.state_dict(), theirs.config)
    torch.testing.assert_close(ours(ids).logits, theirs(ids)[0], rtol=0, atol=1e-5)
    assert not ours.config.tie_word_embeddings


def test_the_configuration_that_is_given_is_left_alone():
    theirs = bert(tie_word_embeddings=False)
    config = from_bert(bert().state_dict(), theirs.config).config
    ours = from_bert(theirs.state_dict(), config)
    assert config.tie_word_embeddings
    assert not ours.config.tie_word_embeddings
    theirs = gpt2(tie_word_embeddings=False)
    config = from_gpt2(gpt2().state_dict(), theirs.config).config
    ours = from_gpt2(theirs.state_dict(), config)
    assert config.tie_word_embeddings
    assert not ours.config.tie_word_embeddings


def test_a_corrected_table_is_not_corrected_again():
    theirs, (ids, _, _) = bert(), batch()
    before = theirs(ids).logits
    correct_mask_embedding(theirs, mask_token_id=3)
    ours = from_bert(theirs.state_dict(), theirs.config)
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="corrected already"):
        correct_mask_embedding(ours, mask_token_id=3)
    torch.testing.assert_close(uncorrect_mask_embedding(ours)(ids).logits, before, rtol=0, atol=1e-5)


def test_the_configuration_may_be_a_dict_or_a_kexue_one(tmp_path):
    theirs, (ids, _, _) = bert(), batch()
    ours = from_bert(theirs.state_dict(), theirs.config.to_dict())
    assert torch.equal(from_bert(theirs.state_dict(), ours.config)(ids).logits, ours(ids).logits)
    ours.save_pretrained(tmp_path)
    assert torch.equal(KexueForMaskedLM.from_pretrained(tmp_path).eval()(ids).logits, ours(ids).logits)


def test_a_converted_model_trains_and_stays_tied():
    theirs, (ids, _, _) = bert(), batch()
    ours = from_bert(theirs.state_dict(), theirs.config).train()
    assert ours.lm_head.decoder.weight is ours.kexue.embeddings.token.weight
    ours(ids, labels=ids).loss.backward()
    assert all(p.grad is not None for name, p in ours.named_parameters())


def test_old_names_of_norms_are_understood():
    theirs, (ids, _, _) = bert(), batch()
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): value
        for name, value in theirs.state_dict().items()
    }
    assert torch.equal(
        from_bert(old, theirs.config)(ids).logits, from_bert(theirs.state_dict(), theirs.config)(ids).logits
    )


@pytest.mark.parametrize(("make", "convert"), [(bert, from_bert), (gpt2, from_gpt2)])
def test_every_key_and_shape_is_accounted_for(make, convert):
    theirs = make()
    state = dict(theirs.state_dict())
    stated = (
        "cls.predictions.decoder.weight",
        "cls.predictions.decoder.bias",
        "cls.predictions.bias",
        "lm_head.weight",
    )
    for name in state:
        left = {k: v for k, v in state.items() if k != name}
        if name in stated:  # stated twice, or not at all
            convert(left, theirs.config)
            continue
        with pytest.raises(ValueError, match=name.replace(".", r"\.")):
            convert(left, theirs.config)
    with pytest.raises(ValueError, match=r"unknown.*strange"):
        convert(state | {"strange.weight": torch.zeros(1)}, theirs.config)
    name = "bert.embeddings.position_embeddings.weight" if make is bert else "transformer.wpe.weight"
    with pytest.raises(ValueError, match=r"\(20, 24\).*\(19, 24\)"):
        convert(state | {name: state[name][:19]}, theirs.config)


def test_shapes_of_joined_and_turned_matrices_are_checked():
    theirs = bert()
    state, name = dict(theirs.state_dict()), "bert.encoder.layer.1.attention.self.{}.weight"
    with pytest.raises(ValueError, match=r"query\.weight must be \(24, 24\) and is \(25, 24\)"):
        from_bert(
            state | {name.format("query"): torch.zeros(25, 24), name.format("key"): torch.zeros(23, 24)}, theirs.config
        )
    with pytest.raises(ValueError, match=r"key\.weight must be \(24, 24\) and is \(24, 23\)"):
        from_bert(state | {name.format("key"): torch.zeros(24, 23)}, theirs.config)
    theirs = gpt2()
    with pytest.raises(ValueError, match=r"qkv\.weight must be \(72, 24\) and is \(24,\)"):
        from_gpt2(theirs.state_dict() | {"transformer.h.0.attn.c_attn.weight": torch.zeros(24)}, theirs.config)


@pytest.mark.parametrize(
    ("make", "convert", "options", "message"),
    [
        (bert, from_bert, {"is_decoder": True}, "is_decoder"),
        (bert, from_bert, {"hidden_act": "tanh"}, "'tanh'"),
        (gpt2, from_gpt2, {"scale_attn_by_inverse_layer_idx": True}, "inverse"),
        (gpt2, from_gpt2, {"scale_attn_weights": False}, "scale_attn_weights"),
        (gpt2, from_gpt2, {"activation_function": "tanh"}, "'tanh'"),
    ],
)
def test_options_that_the_stack_does_not_compute(make, convert, options, message):
    theirs = make(**options)
    with pytest.raises(ValueError, match=message):
        convert(theirs.state_dict(), theirs.config)


def test_bad_input():
    theirs = bert()
    with pytest.raises(TypeError, match="mapping"):
        from_bert(theirs, theirs.config)
    with pytest.raises(TypeError, match="names to tensors"):
        from_bert({"a": 1}, theirs.config)
    with pytest.raises(TypeError, match="config"):
        from_gpt2({}, None)
    with pytest.raises(ValueError, match="missing"):
        from_gpt2(theirs.state_dict(), KexueConfig(31, 24, 3, 4, attn_mode="causal"))
