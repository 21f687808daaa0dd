"""Megatron's shards and CPM's rules of text, written out plainly."""

import torch


def gpt2(vocabulary=20, width=16, layers=2, positions=12, inner=None, dtype=torch.float32, seed=0):
    """Random weights of a whole GPT-2 under Megatron's names."""
    g = torch.Generator().manual_seed(seed)
    inner = 4 * width if inner is None else inner
    shapes = {"word_embeddings.weight": (vocabulary, width), "position_embeddings.weight": (positions, width)}
    for i in range(layers):
        base = f"transformer.layers.{i}."
        for name, rows, columns in (
            ("attention.query_key_value", 3 * width, width),
            ("attention.dense", width, width),
            ("mlp.dense_h_to_4h", inner, width),
            ("mlp.dense_4h_to_h", width, inner),
        ):
            shapes[f"{base}{name}.weight"] = (rows, columns)
            shapes[f"{base}{name}.bias"] = (rows,)
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{base}{name}.weight"] = shapes[f"{base}{name}.bias"] = (width,)
    shapes["transformer.final_layernorm.weight"] = shapes["transformer.final_layernorm.bias"] = (width,)
    return {name: torch.randn(shape, generator=g).mul(0.2).to(dtype) for name, shape in shapes.items()}


def shard(whole, count):
    """Cut a whole model into ``count`` shards, row by row."""
    width = whole["position_embeddings.weight"].shape[1]
    parts = []
    for rank in range(count):
        part = {}
        for name, value in whole.items():
            rows = value.shape[0] // count
            mine = range(rank * rows, (rank + 1) * rows)
            if "query_key_value" in name:
                third = width // count
                mine = [k * width + rank * third + r for k in range(3) for r in range(third)]
                part[name] = torch.stack([value[r] for r in mine])
            elif "word_embeddings" in name or "dense_h_to_4h" in name:
                part[name] = torch.stack([value[r] for r in mine])
            elif name.endswith(("attention.dense.weight", "dense_4h_to_h.weight")):
                columns = value.shape[1] // count
                part[name] = torch.stack([value[:, rank * columns + c] for c in range(columns)], 1)
            else:
                part[name] = value.clone()
        parts.append(part)
    return parts


def to_transformers(whole):
    """The same weights under the names and in the layout of transformers' GPT-2."""
    names = {
        "input_layernorm": "ln_1", "post_attention_layernorm": "ln_2", "attention.query_key_value": "attn.c_attn",
        "attention.dense": "attn.c_proj", "mlp.dense_h_to_4h": "mlp.c_fc", "mlp.dense_4h_to_h": "mlp.c_proj",
    }  # fmt: skip
    out = {
        "transformer.wte.weight": whole["word_embeddings.weight"],
        "transformer.wpe.weight": whole["position_embeddings.weight"],
        "transformer.ln_f.weight": whole["transformer.final_layernorm.weight"],
        "transformer.ln_f.bias": whole["transformer.final_layernorm.bias"],
        "lm_head.weight": whole["word_embeddings.weight"],
    }
    for name, value in whole.items():
        if name.startswith("transformer.layers."):
            _, _, number, rest = name.split(".", 3)
            part, kind = rest.rsplit(".", 1)
            matrix = value.dim() == 2
            out[f"transformer.h.{number}.{names[part]}.{kind}"] = value.T.contiguous() if matrix else value
    return out


def logits(whole, ids, heads):
    """(T,) ids -> (T, V) float64: one position and one head at a time."""
    w = {name: value.double() for name, value in whole.items()}
    width = w["position_embeddings.weight"].shape[1]
    size = width // heads

    def norm(x, name):
        centred = x - x.mean()
        scale = torch.sqrt((centred * centred).mean() + 1e-5)
        return centred / scale * w[name + ".weight"] + w[name + ".bias"]

    def linear(x, name):
        return w[name + ".weight"] @ x + w[name + ".bias"]

    def gelu(x):
        return 0.5 * x * (1 + torch.tanh(0.7978845608028654 * (x + 0.044715 * x**3)))

    xs = [w["word_embeddings.weight"][i] + w["position_embeddings.weight"][t] for t, i in enumerate(ids)]
    layer = 0
    while (base := f"transformer.layers.{layer}.") + "input_layernorm.weight" in w:
        qkv = [linear(norm(x, base + "input_layernorm"), base + "attention.query_key_value") for x in xs]
        after = []
        for t, x in enumerate(xs):
            out = []
            for h in range(heads):
                q = qkv[t][h * size : (h + 1) * size]
                ks = [p[width + h * size : width + (h + 1) * size] for p in qkv[: t + 1]]
                vs = [p[2 * width + h * size : 2 * width + (h + 1) * size] for p in qkv[: t + 1]]
                weights = torch.stack([q @ k / size**0.5 for k in ks]).softmax(0)
                out.append(sum(a * v for a, v in zip(weights, vs, strict=True)))
            after.append(x + linear(torch.cat(out), base + "attention.dense"))
        xs = [
            x + linear(gelu(linear(norm(x, base + "post_attention_layernorm"), base + "mlp.dense_h_to_4h")),
                       base + "mlp.dense_4h_to_h")
            for x in after
        ]  # fmt: skip
        layer += 1
    return torch.stack([w["word_embeddings.weight"] @ norm(x, "transformer.final_layernorm") for x in xs])


def marked(text, cut):
    """What sentencepiece gets: words with marks in place of spaces and line breaks, joined by spaces."""
    words = []
    for word in cut(text):
        words.append("".join({" ": "\u2582", "\n": "\u2583"}.get(c, c) for c in word))
    return " ".join(words)


def encode(text, cut, processor):
    """Ids of a text by the rules of the release; id 3 for a line break whatever the piece of that id is called."""
    ids = []
    for number, piece in zip(*(processor.encode(marked(text, cut), out_type=kind) for kind in (int, str)), strict=True):
        ids.append(3 if piece == "\u2583" else number)
    return ids
