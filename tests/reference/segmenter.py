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


def redundancy(vocabulary, rule):
    """Longest first: a word whose best segmentation explains it goes, its count goes to the parts."""
    left = dict(vocabulary)
    for word in sorted((w for w in vocabulary if len(w) > 1), key=lambda w: (-len(w), w)):
        count, total = left.pop(word), sum(left.values())
        total += count  # probabilities are those of the lexicon before the word is taken out

        def cost(words, total=total):
            if any(w not in left and len(w) > 1 for w in words):
                return -math.inf
            return sum(math.log(left.get(w, 1) / total) for w in words)

        best = max(segmentations(word), key=cost)
        gain = math.log(count / total) - cost(best)
        if gain > 1 if rule == "article" else gain >= len(word) - 1:
            left[word] = count
        else:
            for part in best:
                left[part] = left.get(part, 0) + count
    return left
