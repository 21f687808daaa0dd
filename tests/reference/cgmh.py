"""CGMH over a bigram model as one loop over states, edits and words: slow, obvious, float64."""

import itertools

import numpy as np


def log_p(table, x):
    """Of the whole sentence; index V is the beginning and the end."""
    v = len(table) - 1
    row = (v, *x, v)
    return sum(table[a, b] for a, b in itertools.pairwise(row))


def placements(x, words, ordered):
    """Disjoint places of the keywords; equal keywords in the order of the list."""
    found = []
    for starts in itertools.product(range(len(x)), repeat=len(words)):
        spans = [set(range(s, s + len(w))) for s, w in zip(starts, words, strict=True)]
        if any(x[s : s + len(w)] != w for s, w in zip(starts, words, strict=True)):
            continue
        if any(a & b for a, b in itertools.combinations(spans, 2)):
            continue
        pairs = list(itertools.combinations(range(len(words)), 2))
        if any((ordered or words[i] == words[j]) and starts[i] > starts[j] for i, j in pairs):
            continue
        found.append(starts)
    return found


def all_states(v, low, high, words, ordered):
    """(ids, starts) of all sentences that hold the keywords."""
    texts = [x for n in range(low, high + 1) for x in itertools.product(range(v), repeat=n)]
    return [(x, starts) for x in texts for starts in placements(x, words, ordered)]


def best_words(table, left, count):
    v = len(table) - 1
    row = table[left[-1] if left else v][:v]
    return sorted(range(v), key=lambda j: (-row[j], j))[:count]


def normalised(scores):
    z = np.exp(np.array(scores) - max(scores))
    return z / z.sum()


def proposal(table, left, right, count, eps):
    """The law q of the word between two contexts: the best by p(y | left), weighted by the sentence."""
    v = len(table) - 1
    words = best_words(table, left, count)
    q = np.full(v, eps / v)
    q[words] += (1 - eps) * normalised([log_p(table, (*left, j, *right)) for j in words])
    return q


def matrix(table, states, words, high, low, count, eps, gamma=1.0, ops=(1 / 3, 1 / 3, 1 / 3)):
    """Exact kernel: insert, delete, replace with probabilities ``ops``."""
    index = {state: i for i, state in enumerate(states)}
    p = np.zeros((len(states), len(states)))

    def covered(starts):
        return {i for s, w in zip(starts, words, strict=True) for i in range(s, s + len(w))}

    def inside(starts):
        return {i for s, w in zip(starts, words, strict=True) for i in range(s + 1, s + len(w))}

    for (x, starts), row in index.items():
        n = len(x)
        free = [i for i in range(n) if i not in covered(starts)]
        slots = [i for i in range(n + 1) if i not in inside(starts)]

        def go(y, where, chance, ratio, row=row, x=x):
            accept = min(1.0, np.exp(gamma * (log_p(table, y) - log_p(table, x))) * ratio)
            p[row, index[y, where]] += chance * accept

        if n < high:
            for i in slots:
                q = proposal(table, x[:i], x[i:], count, eps)
                for j in range(len(q)):
                    where = tuple(s + (s >= i) for s in starts)
                    if q[j] > 0:
                        ratio = ops[1] / (len(free) + 1) / (ops[0] / len(slots) * q[j])
                        go((*x[:i], j, *x[i:]), where, ops[0] / len(slots) * q[j], ratio)
        for i in free:
            q = proposal(table, x[:i], x[i + 1 :], count, eps)
            if n > low:
                where = tuple(s - (s > i) for s in starts)
                ratio = ops[0] / (len(slots) - 1) * q[x[i]] / (ops[1] / len(free))
                go((*x[:i], *x[i + 1 :]), where, ops[1] / len(free), ratio)
            for j in range(len(q)):
                if j != x[i] and q[j] > 0:
                    go((*x[:i], j, *x[i + 1 :]), starts, ops[2] / len(free) * q[j], q[x[i]] / q[j])
    p[np.arange(len(p)), np.arange(len(p))] += 1 - p.sum(1)
    return p
