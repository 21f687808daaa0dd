"""Tiny models with random weights of standard deviation .3, biases and norms too: what the tests of growth grow."""

import torch
import transformers as t

from kexue.models import GAUAlphaConfig, GAUAlphaForMaskedLM, verify_growth

LIMIT = 1e-9  # largest difference of two float64 models that are the same function

SIZES = {
    "vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 20,
}  # fmt: skip
GPT2 = {"vocab_size": 50, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 20}
GAU = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "attention_key_size": 8}
KINDS = {
    "bert": (t.BertForMaskedLM, t.BertConfig, SIZES),
    "roberta": (t.RobertaForMaskedLM, t.RobertaConfig, {**SIZES, "pad_token_id": 1}),
    "gpt2": (t.GPT2LMHeadModel, t.GPT2Config, GPT2),
    "llama": (t.LlamaForCausalLM, t.LlamaConfig, {**SIZES, "num_key_value_heads": 2}),
    "gau": (GAUAlphaForMaskedLM, GAUAlphaConfig, GAU),
}


def build(kind, cls=None, dtype=torch.float64, seed=0, **change):
    model_class, config, sizes = KINDS[kind]
    made = config(**{**sizes, **change})
    model = (cls or model_class)(made)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model.to(dtype).eval()


def tokens(rows=2, length=12, seed=1):
    return torch.randint(4, 50, (rows, length), generator=torch.Generator().manual_seed(seed))


def padded(rows=2, length=12):
    """Ids and a mask whose later rows end early."""
    ids, mask = tokens(rows, length), torch.ones(rows, length, dtype=torch.long)
    for row in range(1, rows):
        mask[row, length - 2 * row :] = 0
    return {"input_ids": ids, "attention_mask": mask}


def state(model):
    """Parameters by name, shared ones once, as NumPy arrays."""
    return {name: parameter.detach().double().numpy() for name, parameter in model.named_parameters()}


def difference(model, big, **inputs):
    """Largest difference of the outputs; without the library's casts to float32 where they are to blame."""
    report = verify_growth(model, big, **(inputs or padded()))
    return report.max_abs_uncast if report.dtype_limited else report.max_abs
