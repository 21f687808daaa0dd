"""The one-pass masked language model in plain float64: one token at a time, without a mask and without batches."""

import math

import torch


def attend(q, k, v, own, keep, scale=None):
    """One query (D,) over the keys (S, D) that take part and are not its own; 0 if there is none."""
    seen = [j for j in range(len(k)) if j != own and keep[j]]
    if not seen:
        return (v.sum(0) + (q.sum() + k.sum()) * 0) * 0
    scores = torch.stack([q @ k[j] for j in seen]) * (len(q) ** -0.5 if scale is None else scale)
    weights = torch.exp(scores - scores.detach().max())
    return sum(w * v[j] for w, j in zip(weights / weights.sum(), seen, strict=True))


def diagonal_attention(q, k, v, keep=None, own=None, scale=None):
    """(B, H, T, D), (B, H, S, D), (B, H, S, E), (B, S), (B, T) -> (B, H, T, E)."""
    batch, heads, rows, _ = q.shape
    keys = k.shape[2]
    out = []
    for b in range(batch):
        mask = [True] * keys if keep is None else keep[b].tolist()
        for h in range(heads):
            for i in range(rows):
                key = i + keys - rows if own is None else int(own[b, i])
                out.append(attend(q[b, h, i], k[b, h], v[b, h], key, mask, scale))
    return torch.stack(out).view(batch, heads, rows, v.shape[3]) if out else q.new_zeros(*q.shape[:3], v.shape[3])


def normalize(x, weight, bias, kind, eps):
    if kind == "rms":
        return x / torch.sqrt((x * x).mean() + eps) * weight
    centred = x - x.mean()
    out = centred / torch.sqrt((centred * centred).mean() + eps) * weight
    return out if bias is None else out + bias


def activate(x, kind):
    if kind in ("silu", "swiglu"):
        return x / (1 + torch.exp(-x))
    if kind == "relu":
        return torch.where(x > 0, x, torch.zeros_like(x))
    if kind == "gelu_tanh":
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def rotate(x, position, base):
    """One vector (D,), its pairs taken as D / 2 complex numbers."""
    angles = torch.tensor([position * base ** (-i / len(x)) for i in range(0, len(x), 2)], dtype=x.dtype)
    turned = torch.view_as_complex(x.reshape(-1, 2)) * torch.polar(torch.ones_like(angles), angles)
    return torch.view_as_real(turned).flatten()


class OnePass:
    """The model token by token.

    Args:
        p: Parameters by name, without the prefix of the base model.
        config: A KexueConfig.
    """

    def __init__(self, p, config):
        self.p, self.c = p, config

    def linear(self, name, x):
        bias = self.p.get(f"{name}.bias")
        out = self.p[f"{name}.weight"] @ x
        return out if bias is None else out + bias

    def norm(self, name, x):
        return normalize(x, self.p[f"{name}.weight"], self.p.get(f"{name}.bias"), self.c.norm, self.c.norm_eps)

    def embed(self, token, position, segment):
        x = self.p["embeddings.token.weight"][token]
        if self.c.position == "learned":
            x = x + self.p["embeddings.position.weight"][position]
        if self.c.type_vocab_size:
            x = x + self.p["embeddings.segment.weight"][segment]
        return self.norm("embeddings.norm", x)

    def feed_forward(self, name, x):
        if self.c.act == "swiglu":
            inner = activate(self.linear(f"{name}.gate", x), "silu") * self.linear(f"{name}.up", x)
        else:
            inner = activate(self.linear(f"{name}.up", x), self.c.act)
        return self.linear(f"{name}.down", inner)

    def turned(self, x, position):
        """Heads (H, D / H) of a vector, rotated."""
        heads = x.view(self.c.num_heads, -1)
        if self.c.position != "rope":
            return heads
        return torch.stack([rotate(h, position, self.c.rope_base) for h in heads])

    def attention(self, name, x, position, sources, places, own, keep):
        width = self.c.hidden_size
        weight, bias = self.p[f"{name}.qkv.weight"], self.p.get(f"{name}.qkv.bias")
        wq, wk, wv = weight[:width], weight[width : 2 * width], weight[2 * width :]
        bq, bk, bv = (0, 0, 0) if bias is None else (bias[:width], bias[width : 2 * width], bias[2 * width :])
        q = self.turned(wq @ x + bq, position)
        k = torch.stack([self.turned(wk @ s + bk, place) for s, place in zip(sources, places, strict=True)])
        v = torch.stack([wv @ s + bv for s in sources]).view(len(sources), self.c.num_heads, -1)
        heads = [attend(q[h], k[:, h], v[:, h], own, keep) for h in range(self.c.num_heads)]
        return self.linear(f"{name}.out", torch.cat(heads))

    def text(self, ids, keep, positions=None, segments=None):
        """Hidden states (T, D) of one text, before the head."""
        positions = list(range(len(ids))) if positions is None else positions
        segments = [0] * len(ids) if segments is None else segments
        sources = [self.embed(t, p, s) for t, p, s in zip(ids, positions, segments, strict=True)]
        places = list(positions)
        seen = list(keep)
        first = 0
        if self.c.bos_key:  # one place before the first
            sources.insert(0, self.norm("embeddings.norm", self.p["embeddings.bos_key.weight"][0]))
            places.insert(0, -1)
            seen.insert(0, True)
            first = 1
        out = []
        for i in range(len(ids)):
            x = self.embed(self.c.mask_token_id, positions[i], segments[i])
            own = None if self.c.self_visible else i + first
            for number in range(self.c.num_layers):
                name = f"layers.{number}."
                h = x if self.c.post_norm else self.norm(name + "attention_norm", x)
                x = x + self.attention(name + "attention", h, positions[i], sources, places, own, seen)
                x = self.norm(name + "attention_norm", x) if self.c.post_norm else x
                h = x if self.c.post_norm else self.norm(name + "feed_forward_norm", x)
                x = x + self.feed_forward(name + "feed_forward", h)
                x = self.norm(name + "feed_forward_norm", x) if self.c.post_norm else x
            out.append(x if self.c.post_norm else self.norm("final_norm", x))
        return torch.stack(out)
