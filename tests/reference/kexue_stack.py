"""The Kexue stack written out for one text, in float64: loops over heads and tokens, no fused matrix, no mask."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def _norm(config, p: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    if config.norm == "layer":
        centred = x - x.mean(-1, keepdim=True)
        x = centred / (centred.square().mean(-1, keepdim=True) + config.norm_eps).sqrt()
        return x * p[f"{name}.weight"] + p[f"{name}.bias"]
    return x / (x.square().mean(-1, keepdim=True) + config.norm_eps).sqrt() * p[f"{name}.weight"]


def _act(name: str, x: Tensor) -> Tensor:
    if name == "gelu":
        return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))
    if name == "gelu_tanh":
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    if name == "relu":
        return torch.where(x > 0, x, 0 * x)
    return x / (1 + torch.exp(-x))


def _linear(p: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    y = x @ p[f"{name}.weight"].T
    return y + p[f"{name}.bias"] if f"{name}.bias" in p else y


def _turned(x: Tensor, base: float) -> Tensor:
    """Each pair of coordinates of (T, d) as a complex number, times e^(i position base^(-2 i / d))."""
    length, width = x.shape
    rows = []
    for t in range(length):
        row = []
        for i in range(width // 2):
            angle = t * base ** (-2 * i / width)
            a, b = x[t, 2 * i], x[t, 2 * i + 1]
            row += [a * math.cos(angle) - b * math.sin(angle), a * math.sin(angle) + b * math.cos(angle)]
        rows.append(torch.stack(row))
    return torch.stack(rows)


def _attention(config, p: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    width, count = config.hidden_size, config.num_heads
    size = width // count
    fused = _linear(p, f"{name}.qkv", x)
    outputs = []
    for head in range(count):
        part = slice(head * size, (head + 1) * size)
        q, k, v = (fused[:, j * width : (j + 1) * width][:, part] for j in range(3))
        if config.position == "rope":
            q, k = _turned(q, config.rope_base), _turned(k, config.rope_base)
        rows = []
        for t in range(len(x)):
            seen = t + 1 if config.attn_mode == "causal" else len(x)
            weights = torch.exp(k[:seen] @ q[t] / math.sqrt(size))
            rows.append((weights / weights.sum()) @ v[:seen])
        outputs.append(torch.stack(rows))
    return _linear(p, f"{name}.out", torch.cat(outputs, -1))


def _feed_forward(config, p: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    if config.act == "swiglu":
        inner = _act("silu", _linear(p, f"{name}.gate", x)) * _linear(p, f"{name}.up", x)
    else:
        inner = _act(config.act, _linear(p, f"{name}.up", x))
    return _linear(p, f"{name}.down", inner)


def stack(config, p: dict[str, Tensor], ids: Tensor, segments: Tensor) -> Tensor:
    """Hidden states (T, D) of one text; ``p`` holds the float64 parameters of a KexueModel by name."""
    x = p["embeddings.token.weight"][ids]
    if config.position == "learned":
        x = x + p["embeddings.position.weight"][: len(ids)]
    if config.type_vocab_size:
        x = x + p["embeddings.segment.weight"][segments]
    if config.embedding_norm:
        x = _norm(config, p, "embeddings.norm", x)
    for i in range(config.num_layers):
        name = f"layers.{i}"
        if config.post_norm:
            x = _norm(config, p, f"{name}.attention_norm", x + _attention(config, p, f"{name}.attention", x))
            x = _norm(config, p, f"{name}.feed_forward_norm", x + _feed_forward(config, p, f"{name}.feed_forward", x))
        else:
            x = x + _attention(config, p, f"{name}.attention", _norm(config, p, f"{name}.attention_norm", x))
            x = x + _feed_forward(config, p, f"{name}.feed_forward", _norm(config, p, f"{name}.feed_forward_norm", x))
    return x if config.post_norm else _norm(config, p, "final_norm", x)


def masked_loss(config, p: dict[str, Tensor], ids: Tensor, labels: Tensor) -> Tensor:
    """Mean cross entropy of one text under a KexueForMaskedLM with a transform; ``p`` by the names of that model."""
    inner = {name.removeprefix("kexue."): value for name, value in p.items()}
    x = stack(config, inner, ids, torch.zeros_like(ids))
    losses = []
    for t in range(len(ids)):
        if labels[t] != -100:
            h = _norm(config, p, "lm_head.norm", _act(config.act, _linear(p, "lm_head.dense", x[t])))
            scores = p["kexue.embeddings.token.weight"] @ h + p["lm_head.decoder.bias"]
            losses.append(torch.log(torch.exp(scores).sum()) - scores[labels[t]])
    return torch.stack(losses).mean()
