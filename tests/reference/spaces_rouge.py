"""Slow, obvious versions: ROUGE by sets, counters and tables, the published matching, dense TextRank."""

from collections import Counter

import numpy as np


def grams(tokens, n):
    return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]


def f1(overlap, h, r):
    if overlap == 0:
        return 0.0
    precision, recall = overlap / h, overlap / r
    return 2 * precision * recall / (precision + recall)


def subsequence(h, r, weigh=lambda token: 1):
    """Weight of the heaviest common subsequence by the whole table."""
    table = [[0] * (len(r) + 1) for _ in range(len(h) + 1)]
    for i, x in enumerate(h):
        for j, y in enumerate(r):
            table[i + 1][j + 1] = max(table[i][j + 1], table[i + 1][j], table[i][j] + weigh(x) if x == y else 0)
    return table[-1][-1]


def rouge(h, r, unique=True, weighted=False):
    """The four scores of two lists of tokens."""
    weigh = len if weighted else lambda token: 1
    found = {}
    for n in (1, 2):
        a, b = Counter(grams(h, n)), Counter(grams(r, n))
        if unique:
            a, b = Counter(set(a)), Counter(set(b))
        mass = lambda counter: sum(count * sum(map(weigh, gram)) for gram, count in counter.items())  # noqa: E731
        found[f"rouge-{n}"] = f1(mass(a & b), mass(a), mass(b))
    found["rouge-l"] = f1(subsequence(h, r, weigh), sum(map(weigh, h)), sum(map(weigh, r)))
    found["main"] = 0.2 * found["rouge-1"] + 0.4 * found["rouge-2"] + 0.4 * found["rouge-l"]
    return found


def characters(text):
    return [c for c in text if not c.isspace()]


def main(piece, reference):
    return rouge(characters(piece), characters(reference))["main"]


def monotone(T, S, i0=0, j0=0):
    """The published recursion: (i, j)."""
    if not T or not S:
        return []
    i = int(np.argmax([len(s) for s in S]))
    j = int(np.argmax([main(t, S[i]) for t in T]))
    left = monotone(T[: j + 1], S[:i], i0, j0)
    return [*left, (i0 + i, j0 + j), *monotone(T[j:], S[i + 1 :], i0 + i + 1, j0 + j)]


def independent(T, S):
    return [(i, int(np.argmax([main(t, s) for t in T]))) for i, s in enumerate(S)] if T else []


def greedy(T, S):
    """Add the piece that raises R1 + R2 most, with exact fractions so that ties are ties."""
    from fractions import Fraction

    wanted = [set(grams(characters("".join(S)), n)) for n in (1, 2)]
    pieces = [[set(grams(characters(t), n)) for n in (1, 2)] for t in T]

    def score(chosen):
        total = Fraction(0)
        for k in range(2):
            have = set().union(*(pieces[j][k] for j in chosen))
            total += Fraction(2 * len(have & wanted[k]), max(1, len(have) + len(wanted[k])))
        return total

    chosen, best = [], Fraction(0)
    while True:
        scores = [score([*chosen, j]) if j not in chosen else Fraction(-1) for j in range(len(T))]
        if not scores or max(scores) <= best:
            return sorted(chosen)
        best = max(scores)
        chosen.append(scores.index(best))


def split(text, marks="\n。；：，！？"):
    """Cut after each run of one mark (！ and ？ are one run), character by character."""
    pieces, piece = [], ""
    for place, letter in enumerate(text):
        piece += letter
        following = text[place + 1 : place + 2]
        same = following == letter or (letter in "！？" and following in ("！", "？"))
        if letter in marks and not same:
            pieces.append(piece)
            piece = ""
    return [p.strip() for p in [*pieces, piece] if p.strip()]


def walk(W, damping):
    """x = d W diag(1 / s) x + (1 - d) / n, then sum 1."""
    n = len(W)
    s = W.sum(1)
    P = W / np.where(s > 0, s, 1)
    x = np.linalg.solve(np.eye(n) - damping * P, np.full(n, (1 - damping) / n))
    return x / x.sum()


def similarity(pieces):
    """W of lists of n-grams: cosines of counts times idf."""
    names = sorted({gram for piece in pieces for gram in piece})
    n = len(pieces)
    A = np.array([[float(piece.count(name)) for name in names] for piece in pieces]).reshape(n, len(names))
    A *= np.log(n / np.maximum((A > 0).sum(0), 1)) + 1
    lengths = np.linalg.norm(A, axis=1, keepdims=True)
    A /= np.where(lengths > 0, lengths, 1)
    W = A @ A.T
    np.fill_diagonal(W, 0)
    return W
