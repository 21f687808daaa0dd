"""Sentence templates by listing every maximal path, and parses by trying everything again and again."""

import itertools
import math
from collections import Counter, defaultdict


def edges(sentences, window, min_prob, min_pmi):
    """For each sentence, position -> later positions that it is bound to."""
    words = Counter(word for sentence in sentences for word in sentence)
    pairs = Counter(
        (a, b) for sentence in sentences for i, a in enumerate(sentence) for b in sentence[i + 1 : i + 1 + window]
    )
    total, among = sum(words.values()), sum(pairs.values())
    bound = {
        (a, b)
        for (a, b), count in pairs.items()
        if count / among > min_prob and math.log(count * total**2 / (among * words[a] * words[b])) > min_pmi
    }
    return [
        {i: [j for j in range(i + 1, min(len(s), i + 1 + window)) if (s[i], s[j]) in bound] for i in range(len(s))}
        for s in sentences
    ]


def maximal_paths(graph):
    entered = {j for following in graph.values() for j in following}

    def walk(i):
        if not graph[i]:
            yield (i,)
        for j in graph[i]:
            for rest in walk(j):
                yield (i, *rest)

    return [path for i in graph if i not in entered for path in walk(i)]


def pattern_and_blocks(sentence, path):
    """The template of a path, and what stands in its holes as (begin, end)."""
    pattern, blocks, before = [], [], -1
    for i in path:
        if i > before + 1:
            pattern.append(None)
            blocks.append((before + 1, i))
        pattern.append(sentence[i])
        before = i
    if before < len(sentence) - 1:
        pattern.append(None)
        blocks.append((before + 1, len(sentence)))
    return tuple(pattern), blocks


def mine(sentences, window=5, min_prob=1e-5, min_pmi=2.0, max_words=12):
    """Template -> (sentences, paths, for each hole the blocks (sentence, begin, end))."""
    support, paths, fillers = Counter(), Counter(), defaultdict(set)
    for number, (sentence, graph) in enumerate(
        zip(sentences, edges(sentences, window, min_prob, min_pmi), strict=True)
    ):
        seen = set()
        for path in maximal_paths(graph):
            if len(path) > max_words:
                continue
            pattern, blocks = pattern_and_blocks(sentence, path)
            paths[pattern] += 1
            seen.add(pattern)
            for k, block in enumerate(blocks):
                fillers[pattern, k].add((number, *block))
        support.update(seen)
    return support, paths, fillers


def matches(pattern, words):
    """The positions of the fixed words in every way in which ``pattern`` covers all of ``words``."""

    def walk(k, i):
        if k == len(pattern):
            if i == len(words):
                yield ()
        elif pattern[k] is not None:
            if i < len(words) and words[i] == pattern[k]:
                for rest in walk(k + 1, i + 1):
                    yield (i, *rest)
        else:
            for j in range(i + 1, len(words) + 1):
                yield from walk(k + 1, j)

    return set(walk(0, 0))


def parse(words, templates, null_score=-20.0):
    """(score, template, children) of the best tree, by recursion without memory."""
    total = math.log(sum(templates.values()))
    best = None
    for pattern, support in templates.items():
        if any(word is not None for word in pattern):
            for positions in matches(pattern, words):
                borders = [-1, *positions, len(words)]
                holes = [(a + 1, b) for a, b in itertools.pairwise(borders) if a + 1 < b]
                children = [parse(words[a:b], templates, null_score) for a, b in holes]
                score = math.log(support) - total + sum(child[0] for child in children)
                key = (-round(score, 4), -len(positions), positions)
                if best is None or key < best[0]:
                    best = key, (score, pattern, children)
    return best[1] if best else (null_score * (len(words) - 1), None, [])
