"""The gated convolution labeller, one piece and one tap at a time, in float64."""

from __future__ import annotations

import math
from typing import Any

import numpy as np


def labeler(state: dict[str, Any], x: Any, mask: Any, dilations: tuple[int, ...]) -> np.ndarray:
    """Logits (B, T) without dropout from a state_dict as float64 arrays; 0 at padding."""
    out = np.zeros(mask.shape)
    for b in range(x.shape[0]):
        rows = [state["project.weight"] @ (v if m else np.zeros_like(v)) for v, m in zip(x[b], mask[b], strict=True)]
        for k, dilation in enumerate(dilations):
            rows = _block(state, f"blocks.{k}.", rows, mask[b], dilation)
        for t, row in enumerate(rows):
            if mask[b, t]:
                out[b, t] = float(state["head.weight"][0] @ row + state["head.bias"][0])
    return out


def _block(state: dict[str, Any], name: str, rows: list[Any], mask: Any, dilation: int) -> list[Any]:
    weight, bias = state[name + "weight"], state[name + "bias"]
    width, taps = weight.shape[0] // 2, weight.shape[2]
    rows = [row if m else np.zeros_like(row) for row, m in zip(rows, mask, strict=True)]
    found = []
    for t, row in enumerate(rows):
        total = bias.copy()
        for k in range(taps):
            at = t + (k - taps // 2) * dilation
            if 0 <= at < len(rows):
                total = total + weight[:, :, k] @ rows[at]
        gated = np.array([a / (1 + math.exp(-g)) for a, g in zip(total[:width], total[width:], strict=True)])
        y = (gated - gated.mean()) / math.sqrt(gated.var() + 1e-5)
        y = y * state[name + "norm.weight"] + state[name + "norm.bias"]
        kept = state[name + "project.weight"] @ row if name + "project.weight" in state else row
        found.append(kept + float(state[name + "alpha"]) * y)
    return found


def loss(logits: Any, labels: Any, mask: Any) -> float:
    """Mean of -log of the probability of each label over the pieces."""
    terms = [
        -math.log(1 / (1 + math.exp(-z)) if y else 1 / (1 + math.exp(z)))
        for z, y, m in zip(logits.ravel(), labels.ravel(), mask.ravel(), strict=True)
        if m
    ]
    return sum(terms) / max(len(terms), 1)
