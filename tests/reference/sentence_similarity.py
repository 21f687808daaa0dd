"""Slow, obvious float64 versions: a GRU written out character by character, and retrieval by sorting every row."""

import numpy as np
import torch


def last_state(encoder, ids):
    """State after the last of ``ids`` (list of int), (D,), through autograd in the encoder's dtype."""
    gru, d = encoder.gru, encoder.d
    h = encoder.embedding.weight.new_zeros(d)
    for i in ids:
        x = gru.weight_ih_l0 @ encoder.embedding.weight[i] + gru.bias_ih_l0
        u = gru.weight_hh_l0 @ h + gru.bias_hh_l0
        r = torch.sigmoid(x[:d] + u[:d])
        z = torch.sigmoid(x[d : 2 * d] + u[d : 2 * d])
        n = torch.tanh(x[2 * d :] + r * u[2 * d :])
        h = (1 - z) * n + z * h
    return h


def character_ids(vocab, text, maxlen):
    """Ids of a text by looking every character up; an empty text is one unknown character."""
    return [2 + list(vocab).index(c) if c in vocab else 1 for c in text[:maxlen]] or [1]


def cosine(a, b):
    """Cosine of two vectors; 0 if one of them is zero."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    norms = np.sqrt((a * a).sum()) * np.sqrt((b * b).sum())
    return float((a * b).sum() / norms) if norms > 0 else 0.0


def neighbours(vectors, query):
    """All other rows by falling cosine with row ``query``, of equal cosines the lower row first: (cosine, row)."""
    rows = [(cosine(vectors[query], v), j) for j, v in enumerate(vectors) if j != query]
    return sorted(rows, key=lambda pair: (-pair[0], pair[1]))


def report(vectors, groups, ks, thresholds):
    """What retrieval_report gives, from the sorted neighbours of every row."""
    groups = list(groups)
    rank, answers = [], []
    for i in range(len(groups)):
        order = neighbours(vectors, i)
        places = [p for p, (_, j) in enumerate(order, 1) if groups[j] == groups[i]]
        if places:
            rank.append(places[0])
            answers.append((order[0][0], groups[order[0][1]] == groups[i]))
    n = len(rank)
    out = {f"top{k}": sum(r <= k for r in rank) / n for k in ks}
    out["mean_rank"] = sum(rank) / n
    out["mrr"] = sum(1 / r for r in rank) / n
    out["queries"], out["singletons"] = n, len(groups) - n
    curve = {key: [] for key in ("threshold", "coverage", "precision", "recall", "f1", "accuracy")}
    for t in thresholds:
        answered = [right for score, right in answers if score >= t]
        right = sum(answered)
        silent_and_wrong = sum(not right for score, right in answers if score < t)
        precision = right / len(answered) if answered else 1.0
        recall = right / n
        curve["threshold"].append(t)
        curve["coverage"].append(len(answered) / n)
        curve["precision"].append(precision)
        curve["recall"].append(recall)
        curve["f1"].append(2 * precision * recall / (precision + recall) if right else 0.0)
        curve["accuracy"].append((right + silent_and_wrong) / n)
    out["threshold_curve"] = curve
    out["best_f1"] = max(f1_at(answers, score, n) for score, _ in answers)
    return out


def f1_at(answers, threshold, n):
    """F1 if queries are answered from ``threshold`` on."""
    answered = [right for score, right in answers if score >= threshold]
    return 2 * sum(answered) / (len(answered) + n)
