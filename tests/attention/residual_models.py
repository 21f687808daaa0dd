"""Small transformers models, and RealFormer forward passes written by hand with their weights."""

import torch
import transformers

SIZES = {
    "hidden_size": 16,
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "intermediate_size": 24,
    "vocab_size": 30,
    "max_position_embeddings": 40,
    "initializer_range": 0.3,
}


def bert(seed=0, **options):
    torch.manual_seed(seed)
    return transformers.BertModel(transformers.BertConfig(**SIZES | options)).double().eval()


def roberta(seed=0):
    torch.manual_seed(seed)
    return transformers.RobertaModel(transformers.RobertaConfig(**SIZES, pad_token_id=1)).double().eval()


def llama(seed=0, **options):
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(**SIZES | {"num_key_value_heads": 2} | options)
    return transformers.LlamaForCausalLM(config).double().eval()


def batch(seed=0, length=7, padded=2, left=False):
    """Token numbers and a mask; the second sequence has padding."""
    ids = torch.randint(3, 30, (2, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones(2, length, dtype=torch.long)
    if padded:
        mask[1, slice(0, padded) if left else slice(length - padded, length)] = 0
        ids[mask == 0] = 1
    return ids, mask


def split(x, heads):
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def attend(scores, v, keep):
    """The RealFormer formula on scores (B, H, T, S)."""
    weights = torch.softmax(scores.masked_fill(~keep, -1e30), -1) * keep.any(-1, keepdim=True)
    return (weights @ v).transpose(1, 2).flatten(2)


def realformer_bert(model, ids, mask, context=None, context_mask=None):
    """A BERT encoder (or decoder without cache) layer by layer, with the model's weights."""
    x, keep = model.embeddings(ids), mask[:, None, None].bool()
    if context is not None:
        keep = keep & torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
    sums = {"self": 0, "cross": 0}

    def block(layer, name, x, source, keep):
        part = layer.self
        q, k, v = split(part.query(x), 4), split(part.key(source), 4), split(part.value(source), 4)
        sums[name] = sums[name] + q @ k.mT / 2  # head width 4
        return layer.output.LayerNorm(layer.output.dense(attend(sums[name], v, keep)) + x)

    for layer in model.encoder.layer:
        x = block(layer.attention, "self", x, x, keep)
        if context is not None:
            x = block(layer.crossattention, "cross", x, context, context_mask[:, None, None].bool())
        x = layer.output.LayerNorm(layer.output.dense(layer.intermediate(x)) + x)
    return x


def rotate(x, cos, sin):
    """Rotary positions, halves layout."""
    a, b = x.chunk(2, -1)
    return x * cos[:, None] + torch.cat([-b, a], -1) * sin[:, None]


def realformer_llama(model, ids, mask):
    """A Llama decoder layer by layer, with the model's weights: logits."""
    body = model.model
    x, length = body.embed_tokens(ids), ids.shape[1]
    table = body.rotary_emb(x, torch.arange(length)[None])  # the model's own: float32 also in a float64 model
    keep = mask[:, None, None].bool() & torch.ones(length, length, dtype=torch.bool).tril()
    total = 0
    for layer in body.layers:
        part, h = layer.self_attn, layer.input_layernorm(x)
        q = rotate(split(part.q_proj(h), 4), *table)
        k, v = rotate(split(part.k_proj(h), 2), *table), split(part.v_proj(h), 2)
        k, v = k[:, [0, 0, 1, 1]], v[:, [0, 0, 1, 1]]
        total = total + q @ k.mT / 2
        x = x + part.o_proj(attend(total, v, keep))
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    return model.lm_head(body.norm(x))


def forward(model, ids, mask):
    out = model(input_ids=ids, attention_mask=mask)
    return out.logits if hasattr(out, "logits") else out.last_hidden_state


CASES = {
    "bert": (bert, realformer_bert, False),
    "roberta": (roberta, realformer_bert, False),
    "llama": (llama, realformer_llama, True),
}
