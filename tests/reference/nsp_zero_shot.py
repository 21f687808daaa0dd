"""Next-sentence scores by definition: one pair at a time, every head and every query on its own, float64."""

import math

import numpy as np


def linear(weights, name, x):
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def layer_norm(weights, name, x, eps):
    mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return (x - mean) / np.sqrt(variance + eps) * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def gelu(x):
    return np.array([value / 2 * (1 + math.erf(value / math.sqrt(2))) for value in x.flat]).reshape(x.shape)


def attention(q, k, v, heads):
    width = q.shape[1] // heads
    out = np.zeros_like(q)
    for head in range(heads):
        own = slice(head * width, (head + 1) * width)
        for row in range(len(q)):
            scores = [float(q[row, own] @ k[other, own]) / math.sqrt(width) for other in range(len(k))]
            top = max(scores)
            parts = [math.exp(score - top) for score in scores]
            for other, part in enumerate(parts):
                out[row, own] += part / sum(parts) * v[other, own]
    return out


def bert_logits(model, ids, segments):
    """(2,) logits of one pair under a BertForNextSentencePrediction."""
    config = model.config
    weights = {name: value.detach().double().numpy() for name, value in model.state_dict().items()}
    pre = "bert.embeddings."
    x = np.stack(
        [
            weights[f"{pre}word_embeddings.weight"][token]
            + weights[f"{pre}position_embeddings.weight"][position]
            + weights[f"{pre}token_type_embeddings.weight"][segment]
            for position, (token, segment) in enumerate(zip(ids, segments, strict=True))
        ]
    )
    x = layer_norm(weights, f"{pre}LayerNorm", x, config.layer_norm_eps)
    for number in range(config.num_hidden_layers):
        layer = f"bert.encoder.layer.{number}."
        q, k, v = (linear(weights, f"{layer}attention.self.{part}", x) for part in ("query", "key", "value"))
        mixed = linear(weights, f"{layer}attention.output.dense", attention(q, k, v, config.num_attention_heads))
        x = layer_norm(weights, f"{layer}attention.output.LayerNorm", x + mixed, config.layer_norm_eps)
        inner = gelu(linear(weights, f"{layer}intermediate.dense", x))
        x = layer_norm(
            weights,
            f"{layer}output.LayerNorm",
            x + linear(weights, f"{layer}output.dense", inner),
            config.layer_norm_eps,
        )
    pooled = np.tanh(linear(weights, "bert.pooler.dense", x[0]))
    return linear(weights, "cls.seq_relationship", pooled)


def pair(tokenizer, first, second):
    """[CLS] a [SEP] b [SEP] and segments."""
    a = tokenizer.convert_tokens_to_ids(tokenizer.tokenize(first))
    b = tokenizer.convert_tokens_to_ids(tokenizer.tokenize(second))
    ids = [tokenizer.cls_token_id, *a, tokenizer.sep_token_id, *b, tokenizer.sep_token_id]
    return ids, [0] * (len(a) + 2) + [1] * (len(b) + 1)


def table(model, tokenizer, texts, prompts, prefix):
    """(N, P) log-odds, index 0 = IsNext."""
    out = np.zeros((len(texts), len(prompts)))
    for row, text in enumerate(texts):
        for column, prompt in enumerate(prompts):
            logits = bert_logits(model, *pair(tokenizer, *((prompt, text) if prefix else (text, prompt))))
            out[row, column] = logits[0] - logits[1]
    return out


def samples_contrast(scores, new, cuts):
    """Classes of ``new``: the number of thresholds sorted(scores)[cut] that are not above."""
    ranked = sorted(scores)
    thresholds = [ranked[cut] if cut < len(ranked) else math.inf for cut in cuts]
    return [sum(threshold <= q for threshold in thresholds) for q in new]
