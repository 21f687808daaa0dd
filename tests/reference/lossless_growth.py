"""Lossless growth, slow: every weight by products with explicit duplication matrices, and a Llama in NumPy float64.

E (N, n) copies a small vector into a large one, A = E^T / copies takes the mean of the copies. A layer that maps x to
W x is grown to E_out W A_in, an axis that stays has E = A = I.
"""

import numpy as np


def repeated(n, k):
    """a, a, b, b."""
    return np.kron(np.eye(n), np.ones((k, 1)))


def tiled_heads(heads, width, k):
    """Whole heads one after another, k times."""
    return np.kron(np.ones((k, 1)), np.eye(heads * width))


def strided_heads(heads, width, k):
    """Coordinate pair (i, i + width / 2) of every head to (k i, k i + k width / 2); the others are 0."""
    half = width // 2
    out = np.zeros((heads * width * k, heads * width))
    for head in range(heads):
        for part in range(2):
            for i in range(half):
                out[head * width * k + part * half * k + k * i, head * width + part * half + i] = 1
    return out


def mean_of(copies):
    """What reads copies: their mean."""
    return (copies / copies.sum(0)).T


class Grown:
    """Grown weights of one model by name; ``linear`` and so on are called with names and matrices."""

    def __init__(self, state, k):
        self.state, self.k, self.new = {n: np.asarray(v, np.float64) for n, v in state.items()}, k, {}

    def linear(self, name, rows, columns, scale=1.0, conv=False):
        w = self.state[f"{name}.weight"]
        w = scale * rows @ (w.T if conv else w) @ mean_of(columns)
        self.new[f"{name}.weight"] = w.T if conv else w
        if f"{name}.bias" in self.state:
            self.new[f"{name}.bias"] = scale * rows @ self.state[f"{name}.bias"]

    def table(self, name, copies):
        self.new[name] = self.state[name] @ copies.T

    def norm(self, name, copies, scale=1.0):
        for part in ("weight", "bias"):
            if f"{name}.{part}" in self.state:
                self.new[f"{name}.{part}"] = scale * copies @ self.state[f"{name}.{part}"]

    def keep(self, name):
        self.new[name] = self.state[name]


def attention_matrices(heads, groups, width, k, mode, rotary):
    """Rows of q, k, v; columns of the output layer; factor of q and k."""
    if mode == "more":
        q, kv = tiled_heads(heads, width, k), tiled_heads(groups, width, k)
        return q, kv, kv, q, 1.0
    wide_q, wide_kv = repeated(heads * width, k), repeated(groups * width, k)
    if rotary:
        return strided_heads(heads, width, k), strided_heads(groups, width, k), wide_kv, wide_q, k**0.25
    return wide_q, wide_kv, wide_kv, wide_q, k**-0.25


def grow_bert(state, config, k, mode):
    """BertForMaskedLM; tied or not by the presence of the decoder."""
    g, d = Grown(state, k), config.hidden_size
    stream, inner = repeated(d, k), repeated(config.intermediate_size, k)
    heads = config.num_attention_heads
    q, key, v, context, scale = attention_matrices(heads, heads, d // heads, k, mode, False)
    for name in ("word", "position", "token_type"):
        g.table(f"bert.embeddings.{name}_embeddings.weight", stream)
    g.norm("bert.embeddings.LayerNorm", stream)
    for i in range(config.num_hidden_layers):
        at = f"bert.encoder.layer.{i}"
        g.linear(f"{at}.attention.self.query", q, stream, scale)
        g.linear(f"{at}.attention.self.key", key, stream, scale)
        g.linear(f"{at}.attention.self.value", v, stream)
        g.linear(f"{at}.attention.output.dense", stream, context)
        g.norm(f"{at}.attention.output.LayerNorm", stream)
        g.linear(f"{at}.intermediate.dense", inner, stream)
        g.linear(f"{at}.output.dense", stream, inner)
        g.norm(f"{at}.output.LayerNorm", stream)
    head = "cls.predictions"
    tied = config.tie_word_embeddings
    g.linear(f"{head}.transform.dense", stream, stream)
    g.norm(f"{head}.transform.LayerNorm", stream, 1 / k if tied else 1.0)
    g.keep(f"{head}.bias")
    if not tied:
        g.linear(f"{head}.decoder", np.eye(config.vocab_size), stream)
    return g.new


def grow_gpt2(state, config, k, mode):
    """GPT2LMHeadModel."""
    g, d = Grown(state, k), config.n_embd
    stream, inner = repeated(d, k), repeated(4 * d, k)
    q, key, v, context, scale = attention_matrices(config.n_head, config.n_head, d // config.n_head, k, mode, False)
    zero = np.zeros_like(q)
    fused = np.block([[scale * q, zero, zero], [zero, scale * key, zero], [zero, zero, v]])
    g.table("transformer.wte.weight", stream)
    g.table("transformer.wpe.weight", stream)
    for i in range(config.n_layer):
        at = f"transformer.h.{i}"
        g.norm(f"{at}.ln_1", stream)
        g.linear(f"{at}.attn.c_attn", fused, stream, conv=True)
        g.linear(f"{at}.attn.c_proj", stream, context, conv=True)
        g.norm(f"{at}.ln_2", stream)
        g.linear(f"{at}.mlp.c_fc", inner, stream, conv=True)
        g.linear(f"{at}.mlp.c_proj", stream, inner, conv=True)
    g.norm("transformer.ln_f", stream, 1 / k if config.tie_word_embeddings else 1.0)
    if not config.tie_word_embeddings:
        g.linear("lm_head", np.eye(config.vocab_size), stream)
    return g.new


def grow_llama(state, config, k, mode):
    """LlamaForCausalLM."""
    g = Grown(state, k)
    stream, inner = repeated(config.hidden_size, k), repeated(config.intermediate_size, k)
    q, key, v, context, scale = attention_matrices(
        config.num_attention_heads, config.num_key_value_heads, config.head_dim, k, mode, True
    )
    g.table("model.embed_tokens.weight", stream)
    for i in range(config.num_hidden_layers):
        at = f"model.layers.{i}"
        g.norm(f"{at}.input_layernorm", stream)
        g.linear(f"{at}.self_attn.q_proj", q, stream, scale)
        g.linear(f"{at}.self_attn.k_proj", key, stream, scale)
        g.linear(f"{at}.self_attn.v_proj", v, stream)
        g.linear(f"{at}.self_attn.o_proj", stream, context)
        g.norm(f"{at}.post_attention_layernorm", stream)
        g.linear(f"{at}.mlp.gate_proj", inner, stream)
        g.linear(f"{at}.mlp.up_proj", inner, stream)
        g.linear(f"{at}.mlp.down_proj", stream, inner)
    g.norm("model.norm", stream, 1 / k if config.tie_word_embeddings else 1.0)
    if not config.tie_word_embeddings:
        g.linear("lm_head", np.eye(config.vocab_size), stream)
    return g.new


def llama_logits(state, config, ids):
    """Logits (T, V) of one text, nothing cast to float32: what the library's model would give without its casts."""
    w = {name: np.asarray(value, np.float64) for name, value in state.items()}
    width, length = config.head_dim, len(ids)
    shared = config.num_attention_heads // config.num_key_value_heads
    base = config.rope_parameters["rope_theta"]
    angles = np.outer(np.arange(length), base ** (-np.arange(0, width, 2) / width))

    def linear(name, x):
        return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0.0)

    def norm(name, x):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + config.rms_norm_eps) * w[f"{name}.weight"]

    def turn(x):
        a, b = x[:, : width // 2], x[:, width // 2 :]
        return np.concatenate([a * np.cos(angles) - b * np.sin(angles), b * np.cos(angles) + a * np.sin(angles)], 1)

    x = w["model.embed_tokens.weight"][ids]
    hidden = np.triu(np.ones((length, length), bool), 1)
    for i in range(config.num_hidden_layers):
        at = f"model.layers.{i}"
        y = norm(f"{at}.input_layernorm", x)
        q, k, v = (linear(f"{at}.self_attn.{n}_proj", y) for n in "qkv")
        heads = []
        for h in range(config.num_attention_heads):
            g = h // shared
            one, two = turn(q[:, h * width : (h + 1) * width]), turn(k[:, g * width : (g + 1) * width])
            scores = np.where(hidden, -np.inf, one @ two.T / np.sqrt(width))
            weights = np.exp(scores - scores.max(1, keepdims=True))
            heads.append(weights / weights.sum(1, keepdims=True) @ v[:, g * width : (g + 1) * width])
        x = x + linear(f"{at}.self_attn.o_proj", np.concatenate(heads, 1))
        y = norm(f"{at}.post_attention_layernorm", x)
        gate = linear(f"{at}.mlp.gate_proj", y)
        x = x + linear(f"{at}.mlp.down_proj", gate / (1 + np.exp(-gate)) * linear(f"{at}.mlp.up_proj", y))
    head = w["model.embed_tokens.weight"] if config.tie_word_embeddings else w["lm_head.weight"]
    return norm("model.norm", x) @ head.T
