"""Inputs for the tests of residual scores, and every way to compute them under one signature."""

import torch

from kexue.attention import (
    ResidualScores,
    residual_attention,
    residual_attention_stack,
    residual_attention_step,
)

LAYERS = 3


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def layers(batch=2, heads=2, rows=5, keys=5, width=4, v_width=3, count=LAYERS, seed=0, dtype=torch.float64):
    """qs, ks, vs."""
    shapes = ((rows, width), (keys, width), (keys, v_width))
    return tuple(
        [normal(batch, heads, *s, seed=seed + 100 * i + n, dtype=dtype).requires_grad_() for n in range(count)]
        for i, s in enumerate(shapes)
    )


def padding(batch=2, keys=5, seed=3):
    mask = torch.rand(batch, keys, generator=torch.Generator().manual_seed(seed)) < 0.6
    mask[0] = False  # a sequence that is padding only
    mask[-1, 0] = True
    return mask


def stack(qs, ks, vs, mask=None, causal=False, scale=None, mean=False, detach=False):
    return residual_attention_stack(qs, ks, vs, mask, causal=causal, scale=scale, mean=mean, detach_scores=detach)


def steps(qs, ks, vs, mask=None, causal=False, scale=None, mean=False, detach=False):
    outs, scores = [], None
    for n, (q, k, v) in enumerate(zip(qs, ks, vs, strict=True), 1):
        out, scores = residual_attention_step(
            q, k, v, scores, key_padding_mask=mask, causal=causal, scale=scale, mean_over=n if mean else 1,
            detach_scores=detach,
        )  # fmt: skip
        outs.append(out)
    return outs


def running(qs, ks, vs, mask=None, causal=False, scale=None, mean=False, detach=False):
    scores = ResidualScores(causal=causal, scale=scale, mean=mean, detach_scores=detach)
    return [scores.step(q, k, v, mask) for q, k, v in zip(qs, ks, vs, strict=True)]


def last(mode):
    def function(qs, ks, vs, mask=None, causal=False, scale=None, mean=False, detach=False):
        options = {"causal": causal, "scale": scale, "mean": mean, "detach_scores": detach}
        return [residual_attention(qs[:n], ks[:n], vs[n - 1], mode, mask, **options) for n in range(1, len(qs) + 1)]

    return function


FORMS = {"stack": stack, "steps": steps, "running": running, "mask": last("mask"), "concat": last("concat")}


def gradients(outs, leaves, seed=7):
    """Gradients for an upstream gradient that differs everywhere; 0 for a leaf without one."""
    upstream = [normal(*x.shape, seed=seed + n, dtype=x.dtype) for n, x in enumerate(outs)]
    found = torch.autograd.grad(outs, leaves, upstream, allow_unused=True, retain_graph=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, found, strict=True)]
