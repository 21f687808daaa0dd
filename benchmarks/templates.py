"""Sentence templates, their parser, and phrases: against nlp_zero, plain recursion and gensim."""

from __future__ import annotations

import collections
import collections.abc
import itertools
import logging
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

from benchmarks.harness import Row, Table, compare, installed, versions
from kexue.words import PhraseMiner, TemplateMiner, TemplateParser

SECTION = "Sentence templates, parsing, phrases"
_GRAMMAR = (
    ("请问", None, "怎么", "走"), (None, "是", "什么", "意思"), ("从", None, "到", None), ("因为", None, "所以", None),
    (None, "和", None, "的", "区别"), ("如果", None, "就", None),
)  # fmt: skip


def _nlp_zero() -> Any:
    """The author's module, or None. It needs `collections.Iterable`, which left Python with 3.10."""
    if not installed("nlp_zero"):
        return None
    collections.Iterable = collections.abc.Iterable  # type: ignore[attr-defined]
    import nlp_zero.nlp_zero as peer

    logging.getLogger().setLevel(logging.WARNING)
    return peer


def _clauses(count: int) -> list[str]:
    """Clauses of words, separated by spaces: 40 % from a grammar, the others random; 5 000 words, Zipf-Mandelbrot."""
    draw = random.Random(0)
    words = ["".join(chr(0x4E00 + draw.randrange(3000)) for _ in range(draw.choice((1, 2, 2, 3)))) for _ in range(5000)]
    weights = list(itertools.accumulate(1 / (rank + 2.7) for rank in range(len(words))))
    clauses = []
    for _ in range(count):
        if draw.random() < 0.4:
            template = draw.choice(_GRAMMAR)
            parts = [[w] if w else draw.choices(words, cum_weights=weights, k=draw.randint(1, 2)) for w in template]
            clauses.append(" ".join(itertools.chain.from_iterable(parts)))
        else:
            clauses.append(" ".join(draw.choices(words, cum_weights=weights, k=draw.randint(3, 9))))
    return clauses


def _mining() -> Table:
    clauses, more = _clauses(20_000), _clauses(200_000)
    contenders: dict[str, Callable[[], Any]] = {}
    remarks = []
    peer = _nlp_zero()
    if peer is None:
        remarks.append("nlp-zero is not installed; it was left out.")
    else:

        def mine() -> Any:
            finder = peer.Template_Finder(str.split, window=5, min_proba=1e-5, min_pmi=2)
            # Its `filtering` splits at spaces as well; sentences are cut beforehand, words are kept as they are.
            finder.texts = lambda sents, filtering=True: ([peer_split(s)] for s in sents)
            finder.train(clauses)
            finder.find(clauses, remove_weak_grams=False)  # True raises: it iterates over keys as if they were items
            return finder.templates

        peer_split = str.split
        theirs = {tuple(template.words): count for template, count in mine().items() if count >= 10}
        ours = {t.pattern: t.support for t in TemplateMiner(count="paths", max_words=99).fit(clauses).templates_}
        equal = sum(ours.get(pattern) == count for pattern, count in theirs.items())
        remarks.append(
            f"Counted by paths, {equal} of its {len(theirs)} templates of 10 or more have the same count here (ours: "
            f"{len(ours)})."
        )
        contenders["nlp_zero Template_Finder"] = mine
    contenders |= {
        "kexue TemplateMiner": lambda: TemplateMiner().fit(clauses),
        'kexue TemplateMiner, count="paths"': lambda: TemplateMiner(count="paths").fit(clauses),
        "kexue TemplateMiner, 10 x the text": lambda: TemplateMiner().fit(more),
    }
    table = compare(
        "Template mining",
        f"Templates of 20,000 generated clauses ({sum(len(c.split()) for c in clauses):,} words), window 5, "
        "probability 1e-5, PMI 2, support 10; from str, one thread.",
        contenders,
        peer="nlp_zero Template_Finder",
        packages=("numpy", "numba"),
        repeats=5,
        remarks=remarks,
    )
    times = {row.name: row.milliseconds for row in table.rows}
    growth = times["kexue TemplateMiner, 10 x the text"] / times["kexue TemplateMiner"]
    table.remarks.append(f"Ten times the text takes {growth:.1f} times the time.")
    return table


def _recursion(words: tuple[str, ...], log_share: float) -> float:
    """Score of "[X] 的 [X]" alone, found anew for every block."""
    places = [k for k in range(1, len(words) - 1) if words[k] == "的"]
    if not places:
        return -20.0 * (len(words) - 1)
    return max(log_share + _recursion(words[:k], log_share) + _recursion(words[k + 1 :], log_share) for k in places)


def _parsing() -> Table:
    templates = {(None, "的", None): 3, (None, "是", None): 2}
    parser = TemplateParser(templates)
    share = math.log(3 / 5)

    def sentence(count: int) -> list[str]:
        return ["苹果", *(word for _ in range(count) for word in ("的", "颜色"))]

    seconds: dict[str, dict[int, float]] = {"recursion without memory": {}, "kexue TemplateParser": {}}
    functions: dict[str, Callable[[list[str]], Any]] = {
        "recursion without memory": lambda words: _recursion(tuple(words), share),
        "kexue TemplateParser": parser.parse,
    }
    peer = _nlp_zero()
    remarks = []
    if peer is None:
        remarks.append("nlp-zero is not installed; it was left out.")
    else:
        trie = peer.XTrie()
        for pattern, count in templates.items():
            trie[pattern] = count
        other = peer.Parser(trie, str.split)
        seconds = {"nlp_zero Parser": {}, **seconds}
        functions = {"nlp_zero Parser": lambda words: other.parse(" ".join(words)), **functions}
    for name, function in functions.items():
        for count in (4, 5, 6, 7, 8, *((12, 16) if name.startswith("kexue") else ())):
            words, samples = sentence(count), []
            for _ in range(5):
                calls = 200 if name.startswith("kexue") else 1
                start = time.process_time()
                for _ in range(calls):
                    function(words)
                samples.append((time.process_time() - start) / calls)
            seconds[name][count] = statistics.median(samples)
    slow = next(iter(seconds))
    rows = []
    for name, times in seconds.items():
        growth = (times[8] / times[4]) ** (1 / 4)
        at_16 = times.get(16, times[8] * growth**8)
        extra = {str(count): f"{times[count] * 1e3:.3g}" for count in (4, 5, 6, 7)}
        extra["factor per 的"] = f"{growth:.2f}"
        extra["16, ms"] = f"{at_16 * 1e3:.3g}" + ("" if 16 in times else " (extrapolated)")
        rows.append(Row(name, times[8] * 1e3, seconds[slow][8] / times[8], extra))
    found = seconds["kexue TemplateParser"][16]
    for name, times in seconds.items():
        if not name.startswith("kexue"):
            ratio = times[8] * (times[8] / times[4]) ** 2 / found
            remarks.append(f"At 16, {name}, extrapolated by its factor, takes {ratio:,.0f} times as long as ours.")
    return Table(
        "Parsing nested templates",
        'A sentence of 8 times "的" (columns: 4 to 7, milliseconds) under the templates "[X] 的 [X]" and "[X] 是 [X]"; '
        "one thread.",
        slow,
        rows,
        versions("numpy", "numba"),
        remarks,
    )


def _phrases() -> Table:
    draw = random.Random(1)
    words = [f"w{k}" for k in range(20_000)]
    weights = list(itertools.accumulate(1 / (rank + 2.7) for rank in range(len(words))))
    pairs = [draw.sample(words[200:], draw.choice((2, 2, 3))) for _ in range(500)]

    def sentence() -> Iterator[str]:
        for word in draw.choices(words, cum_weights=weights, k=16):
            yield word
            if draw.random() < 0.05:
                yield from draw.choice(pairs)

    lists = [list(sentence()) for _ in range(60_000)]
    planted = {tuple(pair) for pair in pairs}

    def planted_found(found: Any) -> str:
        return f"{len(planted & set(found))} of {len(planted)}"

    contenders: dict[str, Callable[[], Any]] = {}
    extra = {"kexue PhraseMiner": {"planted": planted_found(PhraseMiner().fit(lists).phrases_)}}
    packages: tuple[str, ...] = ("numpy", "numba")
    remarks = ["The planted phrases have two or three words; gensim finds pairs only, unless it is run twice."]
    if installed("gensim"):
        from gensim.models.phrases import Phrases

        def gensim() -> Any:
            return Phrases(lists, min_count=5, threshold=10.0)

        extra["gensim Phrases"] = {"planted": planted_found(tuple(p.split("_")) for p in gensim().export_phrases())}
        contenders["gensim Phrases"] = gensim
        packages = (*packages, "gensim")
    else:
        remarks.append("gensim is not installed (extra bench); it was left out.")
    contenders["kexue PhraseMiner, pairs"] = lambda: PhraseMiner(max_length=2).fit(lists)
    contenders["kexue PhraseMiner"] = lambda: PhraseMiner().fit(lists)
    return compare(
        "Phrases",
        f"{sum(map(len, lists)):,} words in {len(lists):,} token lists, min_count 5; ours with pairs only, and with "
        "up to four words (the default); one thread.",
        contenders,
        peer="gensim Phrases",
        packages=packages,
        repeats=3,
        extra=extra,
        remarks=remarks,
    )


def run() -> list[Table]:
    """Measure everything of this room."""
    return [_mining(), _parsing(), _phrases()]
