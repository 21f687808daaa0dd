"""The best segmentation by trying all of them."""

import math


def segmentations(text):
    if not text:
        yield []
        return
    for n in range(1, len(text) + 1):
        for rest in segmentations(text[n:]):
            yield [text[:n], *rest]


def score(words, vocabulary, unknown=None):
    """Log-probability of a segmentation; -inf when a longer piece is no word."""
    total = math.log(sum(vocabulary.values()))
    value = 0.0
    for word in words:
        if word in vocabulary:
            value += math.log(vocabulary[word]) - total
        elif len(word) == 1:
            value += -total if unknown is None else unknown
        else:
            return -math.inf
    return value


def best_score(text, vocabulary, unknown=None):
    return max(score(words, vocabulary, unknown) for words in segmentations(text))
