"""Linear attention, one query at a time, in float64 and plain Python loops."""

import math

import numpy as np


def elu1(x):
    return np.where(x >= 0, x + 1, np.exp(np.minimum(x, 0)))


def softmax(x, axis=-1):
    e = np.exp(x - x.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)


def unit(x):
    norm = math.sqrt(float((x * x).sum()))
    return x / norm if norm > 0 else np.zeros_like(x)


# name -> similarity of one query and one key
SIMILARITIES = {
    "elu1": lambda q, k: elu1(q) @ elu1(k),
    "exp": lambda q, k: np.exp(q) @ np.exp(k),
    "softmax_d": lambda q, k: softmax(q) @ softmax(k),
    "softmax_exp": lambda q, k: softmax(q) @ np.exp(k),
    "relu": lambda q, k: (np.maximum(q, 0) + 1e-3) @ (np.maximum(k, 0) + 1e-3),
    "relu2": lambda q, k: (np.maximum(q, 0) ** 2 + 1e-3) @ (np.maximum(k, 0) ** 2 + 1e-3),
    "cosine1": lambda q, k: 1 + unit(q) @ unit(k),
}


def attention(q, k, v, similarity, causal=False, mask=None, normalize=True):
    """q (T, D), k (S, D), v (S, E), mask (S,) -> (T, E); the queries are the last ones."""
    rows = []
    for i in range(len(q)):
        last = len(k) - len(q) + i if causal else len(k) - 1
        seen = [j for j in range(last + 1) if mask is None or mask[j]]
        weights = [similarity(q[i], k[j]) for j in seen]
        total = sum(weights) if normalize else 1.0
        row = np.zeros(v.shape[1])
        for weight, j in zip(weights, seen, strict=True):
            row = row + (weight / total if total else 0.0) * v[j]
        rows.append(row)
    return np.array(rows).reshape(len(q), v.shape[1])


def efficient_attention(q, k, v, mask=None):
    """Softmax over D on q, over time on k (Shen et al. 2018)."""
    live = np.ones(len(k), bool) if mask is None else mask
    if not live.any():
        return np.zeros((len(q), v.shape[1]))
    return softmax(q) @ (softmax(k[live], 0).T @ v[live])
