"""Slow references of copying: n-grams built at each step, all LCS alignments, the loss in float64."""

from __future__ import annotations

import itertools
import math

import numpy as np


def next_after(source, last):
    """Tokens that follow ``last`` anywhere in the source; None in it stands for no token."""
    n = len(last)
    return {
        source[i + n] for i in range(len(source) - n) if None not in source[i : i + n + 1] and source[i : i + n] == last
    }


class Rule:
    """One hypothesis of the published rule: n, the length of the copied run, and the tokens so far.

    ``source`` holds None where nothing can be copied (padding, special tokens).
    """

    def __init__(self, source, eos, vocabulary):
        self.source, self.eos, self.vocabulary = list(source), set(eos), vocabulary
        self.output, self.n, self.allowed = [], 0, None

    def copy(self):
        other = Rule(self.source, self.eos, self.vocabulary)
        other.output, other.n, other.allowed = list(self.output), self.n, self.allowed
        return other

    def decide(self, copy_logits):
        """The allowed set for the next token, from three numbers."""
        values = [float(v) for v in copy_logits]
        if self.n == 0:
            values[2] = -math.inf
        z = values.index(max(values))
        everything = set(range(self.vocabulary))
        usable = {t for t in self.source if t is not None}
        if z == 0 or not usable:
            self.n, self.allowed = 0, everything
        else:
            found = next_after(self.source, self.output[len(self.output) - self.n :]) if z == 2 else set()
            self.n = self.n + 1 if found else 1
            self.allowed = (found or usable) | self.eos
        return self.allowed

    def take(self, token):
        if token not in self.allowed or token in self.eos:
            self.n = 0
        self.output.append(token)


def step_scores(scores, allowed, top_k):
    """Log-softmax over the top k of the allowed scores, one row as a list."""
    kept = [(-s, v) for v, s in enumerate(scores) if v in allowed and s > -math.inf]
    kept = kept or [(-s, v) for v, s in enumerate(scores) if s > -math.inf]
    kept = sorted(kept)[: top_k or None]
    out = np.full(len(scores), -math.inf)
    if kept:
        total = math.log(sum(math.exp(kept[0][0] - s) for s, _ in kept)) - kept[0][0]
        for s, v in kept:
            out[v] = -s - total
    return out


def alignments(source, target):
    """All longest common subsequences, as tuples of pairs."""
    found = []

    def extend(i, j, pairs):
        found.append(pairs)
        for a in range(i, len(source)):
            for b in range(j, len(target)):
                if source[a] == target[b]:
                    extend(a + 1, b + 1, (*pairs, (a, b)))

    extend(0, 0, ())
    longest = max(map(len, found))
    return [pairs for pairs in found if len(pairs) == longest]


def continued(pairs):
    """How many pairs are the one before plus (1, 1)."""
    return sum(b == (a[0] + 1, a[1] + 1) for a, b in itertools.pairwise(pairs))


def author_pairs(source, target):
    """The published backtracking over the whole table."""
    n, m = len(source), len(target)
    table = [[0] * (m + 1) for _ in range(n + 1)]
    for i in range(1, n + 1):
        for j in range(1, m + 1):
            same = source[i - 1] == target[j - 1]
            table[i][j] = table[i - 1][j - 1] + 1 if same else max(table[i - 1][j], table[i][j - 1])
    pairs, i, j = [], n, m
    while i and j:
        if source[i - 1] == target[j - 1]:
            i, j = i - 1, j - 1
            pairs.append((i, j))
        elif table[i][j - 1] > table[i - 1][j]:
            j -= 1
        else:
            i -= 1
    return tuple(reversed(pairs))


def labels_of(pairs, source, target):
    """Labels of both sides from the pairs."""
    x, y, last = [0] * source, [0] * target, None
    for i, j in pairs:
        x[i] = y[j] = 2 if last == (i - 1, j - 1) else 1
        last = (i, j)
    return x, y


def copy_loss(logits, labels, is_source, weight, source_weight, ignore_index=-100):
    """The loss by two loops, in float64."""
    sums, counts = [0.0, 0.0], [0, 0]
    for row, label, source in zip(logits.reshape(-1, 3), labels.reshape(-1), is_source.reshape(-1), strict=True):
        if label != ignore_index:
            sums[int(source)] += math.log(sum(math.exp(v) for v in row)) - row[label]
            counts[int(source)] += 1
    means = [s / c if c else 0.0 for s, c in zip(sums, counts, strict=True)]
    return weight * (means[0] + source_weight * means[1])
