"""Depths of parameters: what the structure of many kinds of models says."""

import re
import warnings

import pytest
import torch
import transformers as t
from torch import nn

from kexue.models import GAUAlphaConfig, GAUAlphaForMaskedLM
from kexue.training import LayerDepths, layer_depths, scale_lr_

BERT = {
    "vocab_size": 40, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 3, "num_attention_heads": 2,
    "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
T5 = {"vocab_size": 40, "d_model": 8, "d_kv": 4, "d_ff": 8, "num_heads": 2}
BART = {f"{side}_{what}": 2 for side in ("encoder", "decoder") for what in ("layers", "attention_heads", "ffn_dim")}
GPT2 = {"vocab_size": 40, "n_embd": 8, "n_head": 2, "n_positions": 16, "bos_token_id": None, "eos_token_id": None}
VIT = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8, "image_size": 8}
ENCODER = r"encoder\.layer\.(\d+)\."
# name: (model, number of layers, pattern of layer names, names -> depth counted from the head)
MODELS = {
    "bert": (
        lambda: t.BertForSequenceClassification(t.BertConfig(**BERT)), 3, ENCODER,
        {"bert.embeddings.LayerNorm.weight": 4, "bert.pooler.dense.weight": 1, "classifier.bias": 0},
    ),
    "bert with a tied head": (
        lambda: t.BertForMaskedLM(t.BertConfig(**BERT)), 3, ENCODER,
        {"bert.embeddings.word_embeddings.weight": 4, "cls.predictions.transform.LayerNorm.weight": 0},
    ),
    "bert without a head": (
        lambda: t.BertModel(t.BertConfig(**BERT)), 3, ENCODER,
        {"embeddings.word_embeddings.weight": 4, "pooler.dense.weight": 1},
    ),
    "bert with one layer": (
        lambda: t.BertModel(t.BertConfig(**{**BERT, "num_hidden_layers": 1})), 1, ENCODER,
        {"embeddings.word_embeddings.weight": 2},
    ),
    "roberta": (
        lambda: t.RobertaForMaskedLM(t.RobertaConfig(**BERT)), 3, ENCODER,
        {"roberta.embeddings.position_embeddings.weight": 4, "lm_head.layer_norm.weight": 0},
    ),
    "distilbert": (
        lambda: t.DistilBertForMaskedLM(t.DistilBertConfig(vocab_size=40, dim=8, hidden_dim=8, n_layers=2, n_heads=2)),
        2, r"transformer\.layer\.(\d+)\.", {"vocab_layer_norm.weight": 0, "vocab_transform.bias": 0},
    ),
    "electra": (
        lambda: t.ElectraForPreTraining(t.ElectraConfig(**BERT, embedding_size=4)), 3, ENCODER,
        {"electra.embeddings_project.weight": 4, "discriminator_predictions.dense.weight": 0},
    ),
    "albert, which shares its layers": (
        lambda: t.AlbertForSequenceClassification(t.AlbertConfig(**BERT, embedding_size=4)), 1,
        r"albert_layer_groups\.(\d+)\.",
        {"albert.encoder.embedding_hidden_mapping_in.weight": 2, "albert.pooler.weight": 1, "classifier.weight": 0},
    ),
    "opt, whose last norm is listed before the layers": (
        lambda: t.OPTForCausalLM(
            t.OPTConfig(**{**BERT, "ffn_dim": 8, "word_embed_proj_dim": 8, "max_position_embeddings": 16})
        ),
        3, r"decoder\.layers\.(\d+)\.",
        {"model.decoder.final_layer_norm.weight": 1, "model.decoder.embed_positions.weight": 4},
    ),
    "deberta": (
        lambda: t.DebertaV2ForSequenceClassification(
            t.DebertaV2Config(**BERT, relative_attention=True, pos_att_type=["c2p"], norm_rel_ebd="layer_norm")
        ), 3, ENCODER,
        {"deberta.encoder.rel_embeddings.weight": 4, "deberta.encoder.LayerNorm.weight": 1, "pooler.dense.bias": 1},
    ),
    "gpt2": (
        lambda: t.GPT2LMHeadModel(t.GPT2Config(**GPT2, n_layer=2)), 2, r"\.h\.(\d+)\.",
        {"transformer.wte.weight": 3, "transformer.wpe.weight": 3, "transformer.ln_f.bias": 1},
    ),
    "llama": (
        lambda: t.LlamaForCausalLM(t.LlamaConfig(**BERT)), 3, r"model\.layers\.(\d+)\.",
        {"model.embed_tokens.weight": 4, "model.norm.weight": 1, "lm_head.weight": 0},
    ),
    "t5, untied": (
        lambda: t.T5ForConditionalGeneration(t.T5Config(**T5, num_layers=3, tie_word_embeddings=False)), 3,
        r"coder\.block\.(\d+)\.",
        {"shared.weight": 4, "encoder.final_layer_norm.weight": 1, "decoder.final_layer_norm.weight": 1},
    ),
    "bart": (
        lambda: t.BartForConditionalGeneration(t.BartConfig(vocab_size=40, d_model=8, **BART)), 2,
        r"coder\.layers\.(\d+)\.",
        {"model.shared.weight": 3, "model.decoder.embed_positions.weight": 3},
    ),
    "vit": (
        lambda: t.ViTForImageClassification(t.ViTConfig(**VIT, patch_size=4)), 2, r"layers?\.(\d+)\.",
        {"vit.embeddings.cls_token": 3, "vit.layernorm.weight": 1, "classifier.weight": 0},
    ),
    "swin": (
        lambda: t.SwinForImageClassification(
            t.SwinConfig(image_size=32, patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=4)
        ), 2, r"swin\.encoder\.layers\.(\d+)\.", {"swin.embeddings.norm.weight": 3, "swin.layernorm.weight": 1},
    ),
    "wav2vec2": (
        lambda: t.Wav2Vec2ForCTC(
            t.Wav2Vec2Config(
                **{**BERT, "vocab_size": 12, "num_hidden_layers": 2}, conv_dim=(8, 8), conv_stride=(2, 2),
                conv_kernel=(3, 3), num_feat_extract_layers=2, num_conv_pos_embeddings=4,
                num_conv_pos_embedding_groups=2,
            )
        ), 2, r"wav2vec2\.encoder\.layers\.(\d+)\.",
        {"wav2vec2.feature_extractor.conv_layers.1.conv.weight": 3, "wav2vec2.masked_spec_embed": 3, "lm_head.bias": 0},
    ),
    "gau-alpha": (
        lambda: GAUAlphaForMaskedLM(
            GAUAlphaConfig(
                vocab_size=40, hidden_size=8, intermediate_size=16, num_hidden_layers=2, attention_key_size=4
            )
        ), 2, ENCODER, {"gau_alpha.embeddings.token_type_embeddings.weight": 3},
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", list(MODELS))
def test_models_of_transformers_and_our_own(name):
    build, layers, pattern, others = MODELS[name]
    torch.manual_seed(0)
    model = build()
    found = layer_depths(model)
    assert found.head == layers + 1
    assert list(found.depth) == [n for n, _ in model.named_parameters()]
    inside = {n: int(m[1]) for n in found.depth if (m := re.search(pattern, n))}
    assert set(inside.values()) == set(range(layers))
    assert {n: found.depth[n] for n in inside} == {n: number + 1 for n, number in inside.items()}
    assert {n: found.head - found.depth[n] for n in others} == others
    assert all(0 <= depth <= found.head for depth in found.depth.values())


@pytest.mark.slow
def test_stacks_of_different_length_end_at_the_same_depth():
    found = layer_depths(t.T5ForConditionalGeneration(t.T5Config(**T5, num_layers=1, num_decoder_layers=3)))
    blocks = {n.split(".layer.")[0]: d for n, d in found.depth.items() if ".layer." in n}
    assert blocks == {"encoder.block.0": 3, "decoder.block.0": 1, "decoder.block.1": 2, "decoder.block.2": 3}
    two = t.CLIPModel(t.CLIPConfig(text_config=BERT, vision_config={**VIT, "patch_size": 4}, projection_dim=8))
    found = layer_depths(two)
    assert found.depth["logit_scale"] == found.depth["text_projection.weight"] == found.head == 4
    assert found.depth["text_model.final_layer_norm.weight"] == found.depth["vision_model.post_layernorm.weight"] == 3
    assert found.depth["vision_model.encoder.layers.0.mlp.fc1.weight"] == 2


def block(width=8):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.TransformerEncoderLayer(width, 2, 8)


def depths(model):
    found = layer_depths(model)
    return found.head, {n.split(".")[0]: d for n, d in found.depth.items()}


def test_plain_chains():
    chain = nn.Sequential(
        nn.Embedding(4, 4), nn.Linear(4, 4), nn.LayerNorm(4), nn.ReLU(), nn.Linear(4, 4), nn.BatchNorm1d(4),
        nn.Linear(4, 2),
    )  # fmt: skip
    assert depths(chain) == (3, {"0": 0, "1": 1, "2": 1, "4": 2, "5": 2, "6": 3})
    assert depths(nn.Linear(2, 2)) == (1, {"weight": 1, "bias": 1})
    assert depths(nn.Sequential(nn.Linear(2, 2))) == (1, {"0": 1})
    assert layer_depths(nn.ReLU()) == LayerDepths({}, 1)
    named = nn.ModuleDict({"words": nn.Embedding(4, 4), "hidden": nn.Linear(4, 4), "out": nn.Linear(4, 2)})
    assert depths(named) == (2, {"words": 0, "hidden": 1, "out": 2})
    nested = nn.ModuleDict({"net": nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2)), "out": nn.Linear(2, 1)})
    assert layer_depths(nested).depth == {
        "net.0.weight": 1, "net.0.bias": 1, "net.2.weight": 2, "net.2.bias": 2, "out.weight": 3, "out.bias": 3
    }  # fmt: skip


def test_blocks_in_a_sequential_and_lists_beside_each_other():
    model = nn.Sequential(nn.Embedding(4, 8), block(), block(), nn.LayerNorm(8), nn.Linear(8, 2))
    assert depths(model) == (3, {"0": 0, "1": 1, "2": 2, "3": 2, "4": 3})
    consecutive = nn.ModuleDict(
        {"stem": nn.Linear(8, 8), "stage1": nn.Sequential(block(), block()), "stage2": nn.Sequential(block(), block())}
    )
    consecutive["out"] = nn.Linear(8, 2)
    found = layer_depths(consecutive)
    assert [found.depth[f"{s}.{n}.norm1.bias"] for s in ("stage1", "stage2") for n in (0, 1)] == [1, 2, 3, 4]
    assert (found.depth["stem.bias"], found.depth["out.bias"], found.head) == (0, 5, 5)


def test_torch_encoder_and_recurrent_layers():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        encoder = nn.TransformerEncoder(block(), 3, norm=nn.LayerNorm(8))
    found = layer_depths(encoder)
    assert (found.head, found.depth["layers.2.norm1.weight"], found.depth["norm.weight"]) == (4, 3, 3)
    gru = nn.ModuleDict({"words": nn.Embedding(4, 3), "gru": nn.GRU(3, 5, 2, bidirectional=True)})
    gru["out"] = nn.Linear(10, 2)
    found = layer_depths(gru)
    assert found.head == 3
    assert {found.depth[f"gru.weight_hh_l{n}{r}"] - n for n in (0, 1) for r in ("", "_reverse")} == {1}
    assert (found.depth["words.weight"], found.depth["out.weight"]) == (0, 3)


def test_a_layer_that_is_listed_many_times_is_one_layer():
    shared = block()
    model = nn.ModuleDict({"layers": nn.ModuleList([shared] * 6), "out": nn.Linear(8, 2)})
    found = layer_depths(model)
    assert (found.head, found.depth["layers.0.norm1.bias"], found.depth["out.bias"]) == (2, 1, 2)


def test_order_does_not_decide_alone():
    """A head that is registered first, a table that is registered last, a classifier around the whole."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.classifier = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
            self.scale = nn.Parameter(torch.ones(()))
            self.layers = nn.ModuleList([block(), block()])
            self.norm = nn.LayerNorm(8)
            self.experts = nn.Linear(8, 8)
            self.words = nn.Embedding(4, 8)

    found = layer_depths(nn.ModuleDict({"classifier": Model(), "head": nn.Linear(2, 2)}))
    assert {n.split(".")[1]: d for n, d in found.depth.items()} == {
        "classifier": 3, "scale": 0, "layers": 2, "norm": 2, "experts": 3, "words": 0, "weight": 3, "bias": 3
    }  # fmt: skip


def test_parametrized_models_have_the_depths_of_plain_ones():
    model = nn.Sequential(nn.Embedding(4, 8), block(), block(), nn.LayerNorm(8), nn.Linear(8, 2))
    before = depths(model)
    assert depths(scale_lr_(model, 0.5)) == before


def test_something_else_than_a_model_is_refused():
    with pytest.raises(TypeError, match=r"torch\.nn\.Module; got list"):
        layer_depths([nn.Linear(2, 2)])
