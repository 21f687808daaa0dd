"""An encoder on the kept tokens is the encoder on all tokens with masked attention columns."""

import pytest
import torch
import transformers as t

from kexue.models import (
    GAUAlphaConfig,
    GAUAlphaModel,
    KexueConfig,
    KexueForMaskedLM,
    KexueForSequenceClassification,
    KexueModel,
    column_mask_equivalent,
    drop_token,
    gather_tokens,
)
from reference import mlm_dropout as reference

CLS, SEP, PAD = 2, 3, 0


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def batch(lengths, width=None, seed=0):
    """[CLS] ... [SEP] rows of these lengths, padded on the right."""
    width = max(lengths) if width is None else width
    ids = torch.randint(5, 40, (len(lengths), width), generator=generator(seed))
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    ids[:, :1] = CLS
    for row, length in enumerate(lengths):
        if length:
            ids[row, length - 1] = SEP
    return ids.masked_fill(~mask, PAD), mask


def bert(kind, config, layers=3, **options):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_attention_heads": 4, "intermediate_size": 32, "vocab_size": 40}
    model = kind(config(num_hidden_layers=layers, max_position_embeddings=64, **sizes, **options))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    return model


def kexue(kind=KexueModel, layers=3, **options):
    torch.manual_seed(0)
    model = kind(KexueConfig(40, 16, layers, 4, max_position=64, **options))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    return model


ENCODERS = {
    "bert": lambda: bert(t.BertModel, t.BertConfig),
    "bert, 12 layers": lambda: bert(t.BertModel, t.BertConfig, 12),
    "roberta": lambda: bert(t.RobertaModel, t.RobertaConfig, pad_token_id=1),
    "modernbert": lambda: bert(
        t.ModernBertModel, t.ModernBertConfig, pad_token_id=0, bos_token_id=2, eos_token_id=3, cls_token_id=2,
        sep_token_id=3, global_attn_every_n_layers=1,
    ),
    "gpt2": lambda: t.GPT2Model(t.GPT2Config(vocab_size=40, n_embd=16, n_layer=3, n_head=4, n_positions=64)),
    "kexue": kexue,
    "kexue, 24 layers": lambda: kexue(layers=24),
    "kexue, rope": lambda: kexue(position="rope", norm="rms", act="swiglu"),
    "kexue, causal": lambda: kexue(attn_mode="causal"),
    "kexue, Post-LN": lambda: kexue(post_norm=True),
    "kexue, masked language model": lambda: kexue(KexueForMaskedLM),
    "kexue, classifier": lambda: kexue(KexueForSequenceClassification, num_labels=3),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", list(ENCODERS))
def test_dropping_tokens_is_masking_attention_columns_in_every_layer(name, padded):
    model = ENCODERS[name]().train()
    next(model.children()).eval()
    flags = [m.training for m in model.modules()]
    ids, mask = batch([20, 11, 16]) if padded else batch([20, 20, 20])
    for rate in (0.15, 0.75):
        dropped = drop_token(ids, rate, mask, protect=(CLS, SEP), generator=generator())
        assert column_mask_equivalent(model, ids, dropped) < 1e-5
        assert column_mask_equivalent(model.double(), ids, dropped) < 1e-12
        model.float()
    assert [m.training for m in model.modules()] == flags


def test_without_the_positions_it_is_another_function():
    model, (ids, mask) = kexue(), batch([20, 20])
    dropped = drop_token(ids, 0.5, mask, generator=generator())
    moved = dropped._replace(position_ids=torch.arange(10).expand(2, 10))
    assert column_mask_equivalent(model, ids, moved) > 1e-2


def test_the_equivalence_holds_for_the_definition_with_renormalised_weights():
    torch.manual_seed(0)
    model = reference.Encoder(40, 16, 4, 5, 32).double()

    def encoder(tokens, attention_mask, position_ids):
        return model(tokens, attention_mask.double(), position_ids)

    ids, mask = batch([20, 15])
    dropped = drop_token(ids, 0.6, mask, generator=generator())
    assert column_mask_equivalent(encoder, ids, dropped) < 1e-12


def test_dropping_before_and_after_the_embedding_gives_the_same():
    model, (ids, mask) = bert(t.BertModel, t.BertConfig).eval(), batch([20, 12])
    tokens, positions, _, kept = drop_token(ids, 0.4, mask, generator=generator())
    after = gather_tokens(model.embeddings(ids), kept)
    assert torch.equal(model.embeddings(tokens, position_ids=positions), after)


def test_vectors_and_further_inputs_are_compared_too():
    model, (ids, mask) = kexue(type_vocab_size=2), batch([20, 12])
    segments = (torch.arange(20) > 7).long().expand(2, 20)
    vectors = model.embeddings.token(ids).detach()
    dropped = drop_token(vectors, 0.4, mask, generator=generator())
    assert column_mask_equivalent(model, vectors, dropped, token_type_ids=segments) < 1e-5
    assert column_mask_equivalent(model, vectors, drop_token(vectors, 0.0, mask), token_type_ids=segments) == 0
    offset = torch.arange(20) + 5
    dropped = drop_token(ids, 0.4, mask, position_ids=offset, generator=generator())
    assert column_mask_equivalent(model, ids, dropped, position_ids=offset) < 1e-5


def test_column_masking_refuses_what_it_cannot_compare():
    model, (ids, mask) = kexue(), batch([20, 12])
    dropped = drop_token(ids, 0.4, mask, generator=generator())
    with pytest.raises(TypeError, match="from drop_token; got tuple"):
        column_mask_equivalent(model, ids, tuple(dropped))
    with pytest.raises(ValueError, match="of these tokens"):
        column_mask_equivalent(model, ids + 1, dropped)
    with pytest.raises(TypeError, match="must return a tensor"):
        column_mask_equivalent(lambda *a, **k: {"x": 1}, ids, dropped)
    with pytest.raises(ValueError, match=r"outputs must be \(B, T, ...\)"):
        column_mask_equivalent(lambda x, **k: x.new_zeros(7), ids, dropped)


def test_models_that_count_positions_themselves_are_told_apart():
    ids = batch([20, 20])[0]
    dropped = drop_token(ids, 0.5, generator=generator())
    bias = bert(t.MPNetModel, t.MPNetConfig)  # relative positions by place in the row
    assert column_mask_equivalent(bias, ids, dropped) > 1e-2
    with pytest.raises(TypeError, match="position_ids"):
        column_mask_equivalent(GAUAlphaModel(GAUAlphaConfig(40, 8, 16, 2, 4)), ids, dropped)
