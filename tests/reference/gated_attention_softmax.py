"""The gated attention unit in plain float64, sample by sample and row by row."""

import math

import torch


def row_weights(scores, visible, normalization, *, base=512.0, min_length=16, norm_length=512.0):
    """Weights of one row from its scores q . k / sqrt(s), (S,); hidden keys get 0."""
    weights = torch.zeros_like(scores)
    n = int(visible.sum())
    if n == 0:
        return weights
    seen = scores[visible]
    if normalization in ("softmax", "softmax_plus"):
        if normalization == "softmax_plus":
            seen = seen * math.log(max(n, min_length)) / math.log(base)
        made = torch.exp(seen - seen.max().detach())
        made = made / made.sum()
    else:
        made = torch.clamp(seen, min=0) ** 2
        divisor = {"relu2_n": n, "relu2_const": norm_length}.get(normalization)
        if divisor is None:
            divisor = made.sum() if bool(made.sum() > 0) else 1.0
        made = made / divisor
    return weights.masked_scatter(visible, made)


def weights(q, k, normalization, *, causal=False, mask=None, **options):
    """(B, T, S)."""
    samples = []
    for b in range(len(q)):
        rows = []
        for i in range(q.shape[1]):
            visible = torch.ones(k.shape[1], dtype=torch.bool) if mask is None else mask[b].clone()
            if causal:
                visible[i + 1 :] = False
            scores = torch.stack([(q[b, i] * k[b, j]).sum() for j in range(k.shape[1])]) / math.sqrt(q.shape[2])
            rows.append(row_weights(scores, visible, normalization, **options))
        samples.append(torch.stack(rows))
    return torch.stack(samples)


def rotate(x):
    """RoPE on the pairs (2i, 2i + 1), angle t 10000^(-2i / s), (B, T, s)."""
    out = torch.zeros_like(x)
    for t in range(x.shape[1]):
        for pair in range(x.shape[2] // 2):
            angle = t * 10000.0 ** (-2 * pair / x.shape[2])
            a, b = x[:, t, 2 * pair], x[:, t, 2 * pair + 1]
            out[:, t, 2 * pair] = a * math.cos(angle) - b * math.sin(angle)
            out[:, t, 2 * pair + 1] = a * math.sin(angle) + b * math.cos(angle)
    return out


def silu(x):
    """x sigmoid(x)."""
    return x / (1 + torch.exp(-x))


def unit(module, x, mask=None, context=None, **options):
    """A GatedAttentionUnit, from its parameters."""

    def dense(layer, y):
        out = y @ layer.weight.T
        return out if layer.bias is None else out + layer.bias

    def affine(layer, y):
        return y * layer.weight if layer.bias is None else y * layer.weight + layer.bias

    e = module.o_dense.weight.shape[1]
    if context is None:
        h = silu(dense(module.i_dense, x))
        u, v, z = h[..., :e], h[..., e : 2 * e], h[..., 2 * e :]
        q, k = affine(module.q_scaleoffset, z), affine(module.k_scaleoffset, z)
    else:
        h, c = silu(dense(module.uq_dense, x)), silu(dense(module.kv_dense, context))
        u, q, v, k = h[..., :e], h[..., e:], c[..., :e], c[..., e:]
    if module.rope:
        q, k = rotate(q), rotate(k)
    a = weights(q, k, module.normalization, causal=module.causal, mask=mask, **options)
    return dense(module.o_dense, u * (a @ v))
