"""Tiny models, and the realised std of their parameters."""

import math

import pytest
import torch
import transformers as t
from torch import nn

from kexue.models import initialize_model

D, FF, HEADS, LAYERS, V = 48, 80, 4, 3, 200
HF = {
    "vocab_size": V, "hidden_size": D, "intermediate_size": FF, "num_hidden_layers": LAYERS, "pad_token_id": 1,
    "num_attention_heads": HEADS, "max_position_embeddings": 64, "bos_token_id": 2, "eos_token_id": 3,
}  # fmt: skip
T5 = {
    "vocab_size": V, "d_model": D, "d_ff": FF, "d_kv": 16, "num_layers": LAYERS, "num_heads": 5,
    "decoder_start_token_id": 0, "initializer_factor": 0.5,
}  # fmt: skip
BART = {
    "vocab_size": V, "d_model": D, "encoder_layers": 2, "decoder_layers": 3, "encoder_ffn_dim": FF,
    "decoder_ffn_dim": FF, "encoder_attention_heads": HEADS, "decoder_attention_heads": HEADS,
    "max_position_embeddings": 64,
}  # fmt: skip
GPT2 = {
    "vocab_size": V, "n_embd": D, "n_layer": LAYERS, "n_head": HEADS, "n_inner": FF, "n_positions": 64,
    "bos_token_id": 2, "eos_token_id": 3,
}  # fmt: skip
DISTIL = {
    "vocab_size": V, "dim": D, "hidden_dim": FF, "n_layers": LAYERS, "n_heads": HEADS, "max_position_embeddings": 64
}  # fmt: skip
MODELS = {
    "bert": lambda **k: t.BertForMaskedLM(t.BertConfig(**{**HF, **k})),
    "bert classifier": lambda **k: t.BertForSequenceClassification(t.BertConfig(num_labels=30, **{**HF, **k})),
    "roberta": lambda **k: t.RobertaForSequenceClassification(t.RobertaConfig(num_labels=30, **{**HF, **k})),
    "distilbert": lambda **k: t.DistilBertForMaskedLM(t.DistilBertConfig(**{**DISTIL, **k})),
    "gpt2": lambda **k: t.GPT2LMHeadModel(t.GPT2Config(**{**GPT2, **k})),
    "llama": lambda **k: t.LlamaForCausalLM(t.LlamaConfig(num_key_value_heads=2, **{**HF, **k})),
    "t5": lambda **k: t.T5ForConditionalGeneration(t.T5Config(**{**T5, **k})),
    "bart": lambda **k: t.BartForConditionalGeneration(t.BartConfig(**{**BART, **k})),
    "opt": lambda **k: t.OPTForCausalLM(
        t.OPTConfig(word_embed_proj_dim=D, ffn_dim=FF, **{**HF, "max_position_embeddings": 32, **k})
    ),
    "torch encoder": lambda **k: nn.TransformerEncoder(
        nn.TransformerEncoderLayer(D, HEADS, FF, batch_first=True, **k), LAYERS, enable_nested_tensor=False
    ),
    "torch transformer": lambda **k: nn.Transformer(D, HEADS, 2, 3, FF, batch_first=True, **k),
}  # fmt: skip


def g(seed=0):
    return torch.Generator().manual_seed(seed)


def build(name, **change):
    torch.manual_seed(0)
    return MODELS[name](**change)


def state(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


def stds(model, scheme, draws=8, **options):
    """Realised std of every parameter, over several draws; padding rows left out."""
    squares = {}
    for seed in range(draws):
        initialize_model(model, scheme, g(seed), **options)
        skip = {f"{n}.weight": m.padding_idx for n, m in model.named_modules() if isinstance(m, nn.Embedding)}
        for name, p in model.named_parameters():
            w = p.detach()
            if skip.get(name) is not None:
                assert not w[skip[name]].any()
                w = torch.cat([w[: skip[name]], w[skip[name] + 1 :]])
            squares.setdefault(name, []).append(w.double().square().mean())
    return {name: math.sqrt(sum(values) / draws) for name, values in squares.items()}


def check(model, scheme, expected, **options):
    """``expected(name, parameter)`` is the std that the test asks for."""
    found = stds(model, scheme, **options)
    for name, p in model.named_parameters():
        want = expected(name, p)
        tolerance = 5 / math.sqrt(2 * 8 * p.numel()) + 0.002
        assert found[name] == pytest.approx(want, rel=tolerance, abs=1e-12), name


def norm_or_bias(name, p):
    """1 for gains, 0 for biases, None for the rest."""
    if name.endswith("bias") and "relative" not in name:
        return 0.0
    return 1.0 if p.dim() == 1 else None


def is_table(name):
    return any(k in name for k in ("embeddings.", "embed_", "wte", "wpe", "shared"))
