"""Counting, word discovery, segmentation and tokens: against plain Python loops, jieba and scikit-learn."""

from __future__ import annotations

import itertools
import math
import pydoc_data.topics
import random
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.harness import Table, compare, installed
from benchmarks.peers import kenlm, run_kenlm
from kexue.words import NGramCounter, Segmenter, Tokenizer, WordDiscovery

SECTION = "Counting, word discovery, segmentation, tokens"
_ORDER, _MIN_COUNT, _MIN_PMI = 4, 10, (2.0, 4.0, 6.0)


def _language(lines: int) -> list[str]:
    """Chinese-like text: 20 000 words of 1 to 4 out of 3 000 ideographs, Zipf-Mandelbrot, 20 words a line."""
    draw = random.Random(0)
    lengths = draw.choices((1, 2, 3, 4), (0.1, 0.6, 0.2, 0.1), k=20_000)
    words = ["".join(chr(0x4E00 + min(int(draw.expovariate(1 / 600)), 2999)) for _ in range(n)) for n in lengths]
    weights = list(itertools.accumulate(1 / (rank + 2.7) for rank in range(len(words))))
    return ["".join(draw.choices(words, cum_weights=weights, k=20)) for _ in range(lines)]


def _dictionary_counts(texts: list[str]) -> Counter[str]:
    counts: Counter[str] = Counter()
    for text in texts:
        for n in range(1, _ORDER + 1):
            counts.update(text[i : i + n] for i in range(len(text) - n + 1))
    return counts


def _dictionary_discovery(texts: list[str]) -> dict[str, int]:
    """Count, keep, cut, backtrack, with dictionaries: the published algorithm as one would write it in Python."""
    counts = {gram: count for gram, count in _dictionary_counts(texts).items() if count >= _MIN_COUNT}
    total = sum(map(len, texts))
    strong = set()
    for gram, count in counts.items():
        if len(gram) > 1:
            weakest = min(total * count / (counts[gram[:j]] * counts[gram[j:]]) for j in range(1, len(gram)))
            if math.log(weakest) >= _MIN_PMI[len(gram) - 2]:
                strong.add(gram)
    words: Counter[str] = Counter()
    for text in texts:
        start = reach = 0
        for i in range(len(text)):
            if i >= reach and i > start:
                words[text[start:i]] += 1
                start = i
            for n in range(2, _ORDER + 1):
                if text[i : i + n] in strong:
                    reach = max(reach, i + n)
            reach = max(reach, i + 1)
        words[text[start:]] += 1
    return {
        word: count
        for word, count in words.items()
        if count >= _MIN_COUNT
        and (
            len(word) < 3
            or (
                word in strong
                if len(word) <= _ORDER
                else all(word[i : i + _ORDER] in strong for i in range(len(word) - 3))
            )
        )
    }


def _rates(table: Table, amount: float, unit: str) -> Table:
    for row in table.rows:
        row.extra[unit] = f"{amount / row.milliseconds * 1e3:.3g}"
    return table


def _counting(texts: list[str]) -> Table:
    size = sum(map(len, texts))
    ours = NGramCounter(order=_ORDER).fit(texts)
    if {g: c for n in range(1, _ORDER + 1) for g, c in ours.items(n)} != _dictionary_counts(texts):
        raise RuntimeError("the counters disagree")
    table = compare(
        "Character n-grams",
        f"Exact counts of all grams of 1 to {_ORDER} characters; {size:,} characters of generated Chinese-like text "
        f"({len(ours.alphabet_)} different ones), in memory, one thread. Both give the same table.",
        {
            "collections.Counter": lambda: _dictionary_counts(texts),
            "kexue NGramCounter": lambda: NGramCounter(order=_ORDER).fit(texts),
        },
        peer="collections.Counter",
        packages=("numpy", "numba"),
        repeats=5,
    )
    return _rates(table, size / 1e6, "M characters/s")


def _large() -> list[Table]:
    """Counting against KenLM's program, which is made for large text."""
    if kenlm() is None:
        return []
    texts = _language(120_000)
    size = sum(map(len, texts))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        corpus = folder / "corpus.txt"
        corpus.write_text("\n".join(texts) + "\n", encoding="utf-8")
        peer = "KenLM count_ngrams"
        table = compare(
            "Character n-grams of a larger text",
            f"Exact counts of all grams of 1 to {_ORDER} characters; {size:,} characters of generated Chinese-like "
            "text, one thread; ours from a file. KenLM gets the characters with spaces between them, and "
            "writes its counts of the longest grams.",
            {
                peer: lambda: run_kenlm(folder, texts, _ORDER),
                "kexue NGramCounter": lambda: NGramCounter(order=_ORDER).fit(corpus),
                "kexue NGramCounter, memory 64 MB (on disk)": lambda: NGramCounter(order=_ORDER, memory="64MB").fit(
                    corpus
                ),
            },
            peer=peer,
            packages=("numpy", "numba"),
            repeats=3,
            remarks=["KenLM 0.3.0 as distributed on the package index, compiled here, with --memory=1G."],
        )
    return [_rates(table, size / 1e6, "M characters/s")]


def _discovery(texts: list[str]) -> Table:
    size = sum(map(len, texts))

    def ours() -> dict[str, int]:
        settings: dict[str, Any] = {"order": _ORDER, "min_count": _MIN_COUNT, "min_pmi": _MIN_PMI, "redundancy": None}
        return WordDiscovery(**settings).fit(texts).vocabulary_

    if ours() != _dictionary_discovery(texts):
        raise RuntimeError("the lexicons disagree")
    table = compare(
        "Word discovery",
        f"Lexicon by n-gram solidity, fixed thresholds {_MIN_PMI}, min_count {_MIN_COUNT}, no redundancy removal; the "
        f"same {size:,} characters, one thread. Both give the same {len(ours()):,} words. The last row also chooses "
        "the thresholds and removes redundant words (the default), which the loop does not do.",
        {
            "dictionary loop": lambda: _dictionary_discovery(texts),
            "kexue WordDiscovery": ours,
            "kexue WordDiscovery (auto)": lambda: WordDiscovery(min_count=_MIN_COUNT).fit(texts),
        },
        peer="dictionary loop",
        packages=("numpy", "numba"),
        repeats=5,
    )
    return _rates(table, size / 1e6, "M characters/s")


def _segmentation(texts: list[str]) -> Table:
    text = "\n".join(texts)
    vocabulary = WordDiscovery(min_count=_MIN_COUNT).fit(texts).vocabulary_
    segmenter = Segmenter(vocabulary)
    contenders: dict[str, Callable[[], Any]] = {"kexue Segmenter": lambda: [segmenter(line) for line in texts]}
    packages: tuple[str, ...] = ("numpy", "numba")
    remarks = []
    if installed("jieba"):
        import jieba

        jieba.setLogLevel(60)
        with tempfile.TemporaryDirectory() as folder:
            segmenter.to_jieba_dict(f"{folder}/words.txt")
            peer = jieba.Tokenizer(f"{folder}/words.txt")
            peer.tmp_dir = folder
            peer.initialize()
        equal = sum(peer.lcut(line, HMM=False) == segmenter(line) for line in texts)
        remarks.append(f"{equal} of {len(texts)} lines are cut alike.")
        contenders = {"jieba (HMM=False)": lambda: [peer.lcut(line, HMM=False) for line in texts], **contenders}
        packages = (*packages, "jieba")
    else:
        remarks.append("jieba is not installed (extra zh); it was left out.")
    table = compare(
        "Segmentation",
        f"The most probable words of {len(texts):,} lines, {len(text.encode()) / 1e6:.1f} MB of UTF-8, with the same "
        f"dictionary of {len(vocabulary):,} words, one thread.",
        contenders,
        peer="jieba (HMM=False)",
        packages=packages,
        repeats=5,
        remarks=remarks,
    )
    return _rates(table, len(text.encode()) / 1e6, "MB/s")


def _tokens() -> Table:
    from sklearn.feature_extraction.text import CountVectorizer

    documents = [pydoc_data.topics.topics[key] for key in sorted(pydoc_data.topics.topics)]
    size = sum(len(document.encode()) for document in documents)
    tokenizer, analyze = Tokenizer(), CountVectorizer().build_analyzer()
    table = compare(
        "Tokens of English documentation",
        f"pydoc_data.topics ({len(documents)} documents, {size / 1e6:.2f} MB), one thread, words seen before are "
        "remembered. The peer lower-cases and splits at non-letters only; ours also splits identifiers, keeps them "
        "whole besides, and stems.",
        {
            "scikit-learn analyzer": lambda: [analyze(document) for document in documents],
            "kexue Tokenizer": lambda: [tokenizer(document) for document in documents],
            "kexue Tokenizer, memo empty": lambda: [t(document) for t in [Tokenizer()] for document in documents],
        },
        peer="scikit-learn analyzer",
        packages=("scikit-learn",),
        repeats=7,
    )
    return _rates(table, size / 1e6, "MB/s")


def run() -> list[Table]:
    """Measure everything of this room."""
    texts = _language(12_000)
    return [_counting(texts), *_large(), _discovery(texts), _segmentation(texts), _tokens()]
