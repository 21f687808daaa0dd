"""Co-occurrence counts by looking at every pair of places: exact fractions, dense, slow."""

from collections import Counter
from fractions import Fraction


def vocabulary(documents, min_count):
    """Words that occur often enough, by descending count, ties alphabetical, and their counts."""
    counts = Counter(word for document in documents for word in document)
    words = sorted((w for w in counts if counts[w] >= min_count), key=lambda w: (-counts[w], w))
    return words, [counts[w] for w in words]


def cooccurrence(documents, words, window, weighting):
    """Dense (V, V) list of Fractions; words outside ``words`` are removed before windowing."""
    index = {word: k for k, word in enumerate(words)}
    matrix = [[Fraction(0)] * len(words) for _ in words]
    for document in documents:
        kept = [index[word] for word in document if word in index]
        for place, a in enumerate(kept):
            for other, b in enumerate(kept):
                distance = abs(place - other)
                if 1 <= distance <= window and a != b:
                    matrix[a][b] += Fraction(1, distance) if weighting == "harmonic" else 1
    return matrix
