"""n-gram counts and word discovery by the definition: dictionaries of strings, no packing, no trie."""

import math
import unicodedata
from collections import Counter


def runs(text):
    """Maximal runs of letters (with marks), digits, ideographs, kana, hangul."""
    found, current = [], ""
    for c in text:
        selector = 0xFE00 <= ord(c) <= 0xFE0F or 0xE0100 <= ord(c) <= 0xE01EF
        category = unicodedata.category(c)
        if not selector and (category[0] == "L" or category in ("Nd", "Nl", "Mn", "Mc")):
            current += c
        elif current:
            found.append(current)
            current = ""
    return [*found, current] if current else found


def ngram_counts(texts, order):
    counts = Counter()
    for text in texts:
        for run in runs(text):
            for n in range(1, order + 1):
                counts.update(run[i : i + n] for i in range(len(run) - n + 1))
    return counts


def solid_grams(counts, order, min_count, min_pmi):
    total = sum(c for gram, c in counts.items() if len(gram) == 1)
    strong = set()
    for gram, c in counts.items():
        if len(gram) < 2 or c < min_count:
            continue
        weakest = min(math.log(total * c / (counts[gram[:j]] * counts[gram[j:]])) for j in range(1, len(gram)))
        if weakest >= min_pmi[len(gram) - 2]:
            strong.add(gram)
    return strong


def cut(run, strong, order):
    """A border stays uncut if any strong gram covers it."""
    covered = [False] * len(run)  # covered[i]: the border before character i
    for i in range(len(run)):
        for n in range(2, order + 1):
            if run[i : i + n] in strong and i + n <= len(run):
                for j in range(i + 1, i + n):
                    covered[j] = True
    pieces = [run[0]]
    for i in range(1, len(run)):
        if covered[i]:
            pieces[-1] += run[i]
        else:
            pieces.append(run[i])
    return pieces


def lexicon(texts, order, min_count, min_pmi):
    strong = solid_grams(ngram_counts(texts, order), order, min_count, min_pmi)
    words = Counter(piece for text in texts for run in runs(text) for piece in cut(run, strong, order))

    def kept(word):
        if len(word) < 3:
            return True
        if len(word) <= order:
            return word in strong
        return all(word[i : i + order] in strong for i in range(len(word) - order + 1))

    return {word: count for word, count in words.items() if count >= min_count and kept(word)}


def adjacent_lexicon(texts, min_count, min_pmi, min_proba):
    counts = ngram_counts(texts, 2)
    singles = sum(c for gram, c in counts.items() if len(gram) == 1)
    pairs = sum(c for gram, c in counts.items() if len(gram) == 2)

    def linked(a, b):
        p = counts[a + b] / pairs
        return p > min_proba and math.log(p / (counts[a] / singles * counts[b] / singles)) > min_pmi

    words = Counter()
    for text in texts:
        for run in runs(text):
            piece = run[0]
            for a, b in zip(run, run[1:], strict=False):
                if linked(a, b):
                    piece += b
                else:
                    words[piece] += 1
                    piece = b
            words[piece] += 1
    total = words.total()
    return {word: c for word, c in words.items() if c >= min_count and c / total > min_proba}
