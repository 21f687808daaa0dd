"""Reproduction for word discovery and sentence templates by minimum entropy (科学空间 5577, with 5476 under it).

Measured on generated text and on the help topics that come with Python, with the rule for each part fixed beforehand:

- Identity. On random complete tables of 2 to 12 units with merged tuples of 1 to 5 units (repeated ones included), the
  gain F is l (H / l - H~ / l~), each term computed from its own table, within 1e-9; and F >= F*. Passes when every
  table does.
- Lexicon. 200 words over an alphabet, Zipf-Mandelbrot, 20 000 lines of 12 words without spaces, WordDiscovery with
  default settings but min_count = 10. F1 of the found words (two characters or more) against the words of two
  characters or more that occur at least 10 times. Passes when F1 > .95 at 400 letters and > .80 at 40 letters, for
  every seed. The author's thresholds (2, 4, 6) are shown for comparison.
- Templates. A grammar of 6 templates and 50 fillers; each hole holds another template with probability .3 (depth 2);
  5 000 sentences. Passes when, for every seed, all 6 are among the first 12 of TemplateMiner with default settings, and
  the tree of TemplateParser over those 6 equals the generating tree for more than 99 % of the unambiguous sentences:
  those with one derivation in the grammar, nested to any depth, as the parser nests. A first version of this rule
  counted derivations to depth 2 only and so called sentences unambiguous that have another, deeper derivation; the
  share by that count is shown, too.
- Merging. Starting from the letters of a generated text, the pair of units with the largest F is merged again and
  again, while it is above 0. Passes when H / l falls at every step.
- Natural text: Python's help without spaces, order 8. The F1 against the words that occur 10 times or more is
  reported; the source gives no figure for it, so it has no part in the verdict.

Verdict: "reproduced" when all parts pass, "partly" when identity and templates do, else "not reproduced". The source's
F1 of .742 on the PKU bakeoff needs its corpora and is not measured here.
"""

from __future__ import annotations

import functools
import itertools
import math
import random
import re
from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np

from kexue.reproduce.runner import Measurement, Verdict
from kexue.words import TemplateMiner, TemplateParser, Tree, WordDiscovery, merge_gain

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CLAIM = (
    "A language is learned by merging what lowers the entropy per character H / l: neighbouring characters become "
    "words, words that belong together at a distance become templates with holes, and nested templates give the "
    "structure of a sentence, all without labels. Merging pays when F > 0; F* = p (ln(p / prod p_i) - 1) bounds F from "
    "below."
)

_MIN_COUNT = 10
_GRAMMAR: tuple[tuple[str | None, ...], ...] = (
    (None, "是", "什么", "意思"),
    ("请问", None, "怎么", "走"),
    ("从", None, "到", None),
    ("为什么", None, "会", None),
    (None, "和", None, "的", "区别"),
    ("如果", None, "就", None),
)
_Derivation = tuple[Any, ...]  # ("word",) or (template, derivations of its holes)


def identity(tables: int, seed: int) -> dict[str, float]:
    """Largest error of F on random tables, and the least of F - F*."""
    rng = np.random.default_rng(seed)
    worst, least = 0.0, math.inf
    for _ in range(tables):
        size = int(rng.integers(2, 13))
        counts, lengths = rng.integers(1, 500, size), rng.integers(1, 6, size)
        units, times = np.unique(rng.integers(0, size, int(rng.integers(1, 6))), return_counts=True)
        joint = int(rng.integers(0, (counts[units] // times).min() + 1))
        left = counts.copy()
        left[units] -= times * joint
        before, mean = _cost(counts, lengths)
        after, _ = _cost(np.append(left, joint), np.append(lengths, (lengths[units] * times).sum()))
        total = counts.sum()
        gain = merge_gain(joint / total, counts[units] / total, times)
        worst = max(worst, abs(gain - mean * (before - after)))
        least = min(least, gain - merge_gain(joint / total, counts[units] / total, times, exact=False))
    return {"error of F": worst, "least F - F*": least}


def _cost(counts: Any, lengths: Any) -> tuple[float, float]:
    """H / l and l."""
    share = counts / counts.sum()
    entropy = -np.sum(share[share > 0] * np.log(share[share > 0]))
    mean = float((share * lengths).sum())
    return float(entropy) / mean, mean


def language(letters: int, lines: int, seed: int) -> tuple[list[str], Counter[str]]:
    """Lines of 12 words without spaces, and how often each word is in them."""
    draw = random.Random(seed)
    alphabet = [chr(0x4E00 + k) for k in range(letters)]
    words: dict[str, None] = {}
    while len(words) < 200:
        words["".join(draw.choices(alphabet, k=draw.choice((1, 2, 2, 2, 3, 3, 4))))] = None
    weights = list(itertools.accumulate(1 / (rank + 2.7) for rank in range(200)))
    sentences = [draw.choices(list(words), cum_weights=weights, k=12) for _ in range(lines)]
    return ["".join(sentence) for sentence in sentences], Counter(word for line in sentences for word in line)


def agreement(found: dict[str, int], truth: Counter[str]) -> float:
    """F1 of the words of two characters or more."""
    ours = {word for word in found if len(word) > 1}
    theirs = {word for word, count in truth.items() if len(word) > 1 and count >= _MIN_COUNT}
    return 2 * len(ours & theirs) / max(1, len(ours) + len(theirs))


def lexicon(letters: int, lines: int, seed: int) -> dict[str, float]:
    """F1 with default settings and with the author's thresholds."""
    texts, truth = language(letters, lines, seed)
    return {
        "F1": agreement(WordDiscovery(min_count=_MIN_COUNT).fit(texts).vocabulary_, truth),
        "F1, thresholds 2, 4, 6": agreement(
            WordDiscovery(min_count=_MIN_COUNT, min_pmi=(2, 4, 6)).fit(texts).vocabulary_, truth
        ),
    }


def natural_text() -> float:
    """F1 on Python's help topics without spaces."""
    from pydoc_data.topics import topics

    lines = [re.findall(r"[a-z]+", line) for text in topics.values() for line in text.lower().split("\n\n")]
    truth = Counter(word for line in lines for word in line)
    texts = ["".join(line) for line in lines]
    return agreement(WordDiscovery(order=8, min_count=_MIN_COUNT).fit(texts).vocabulary_, truth)


def sentences(count: int, seed: int) -> list[tuple[list[str], _Derivation]]:
    """Sentences of the grammar with their derivations."""
    draw = random.Random(seed)
    fillers = [f"物{k}" for k in range(50)]

    def make(depth: int) -> tuple[list[str], _Derivation]:
        template = draw.choice(_GRAMMAR)
        words: list[str] = []
        holes = []
        for item in template:
            if item is not None:
                words.append(item)
                continue
            if depth > 1 and draw.random() < 0.3:
                inner, derivation = make(depth - 1)
            else:
                inner = [draw.choice(fillers)]
                derivation = (inner[0],)
            words += inner
            holes.append(derivation)
        return words, (template, *holes)

    return [make(2) for _ in range(count)]


def derivations(words: list[str], depth: int) -> int:
    """In how many ways the grammar gives these words, templates nested to ``depth``."""

    @functools.cache
    def block(start: int, stop: int, depth: int) -> int:
        filler = stop == start + 1 and words[start].startswith("物")
        return int(filler) + sum(ways(template, start, stop, depth) for template in _GRAMMAR if depth > 0)

    def ways(template: tuple[str | None, ...], start: int, stop: int, depth: int) -> int:
        if not template:
            return int(start == stop)
        if template[0] is not None:
            return ways(template[1:], start + 1, stop, depth) if words[start:stop][:1] == [template[0]] else 0
        rest = ((end, ways(template[1:], end, stop, depth)) for end in range(start + 1, stop + 1))
        return sum(count * block(start, end, depth - 1) for end, count in rest if count)

    return block(0, len(words), depth)


def _derivation(tree: Tree) -> _Derivation:
    if tree.template is None:
        return tuple(tree.words)
    return (tree.template, *map(_derivation, tree.children))


def templates(count: int, seed: int) -> dict[str, float]:
    """How many of the templates are found, and the share of right trees."""
    corpus = sentences(count, seed)
    miner = TemplateMiner().fit([words for words, _ in corpus])
    first = [template for template in miner.templates_[:12] if template.pattern in _GRAMMAR]
    parser = TemplateParser(first)
    figures: dict[str, float] = {"of 6 in the first 12": len(first)}
    for name, limit in (("", None), (" to depth 2", 2)):
        clear = [(w, derivation) for w, derivation in corpus if derivations(w, limit or len(w)) == 1]
        right = sum(_derivation(parser.parse(w)) == derivation for w, derivation in clear)
        figures[f"unambiguous sentences{name}"] = len(clear)
        figures[f"right trees{name}"] = right / max(1, len(clear))
    return figures


def merging(lines: int, steps: int, seed: int) -> dict[str, list[float]]:
    """H, l and H / l along greedy merging by F, from letters on."""
    texts, _ = language(40, lines, seed)
    rows: list[list[Any]] = [list(text) for text in texts]
    path: dict[str, list[float]] = {"H": [], "l": [], "H / l": []}
    for _ in range(steps + 1):
        counts = Counter(itertools.chain.from_iterable(rows))
        cost, mean = _cost(np.array(list(counts.values())), np.array([len(unit) for unit in counts]))
        for name, value in (("H", cost * mean), ("l", mean), ("H / l", cost)):
            path[name].append(value)
        pairs: Counter[tuple[str, str]] = Counter()
        for row in rows:
            previous: Any = None
            for pair in itertools.pairwise(row):
                if pair == previous and pair[0] == pair[1]:
                    previous = None  # "ha ha ha" holds "ha ha" once
                    continue
                pairs[pair] += 1
                previous = pair
        total = sum(counts.values())
        gains = {}
        for (a, b), joint in pairs.items():
            parts, times = ([counts[a]], [2]) if a == b else ([counts[a], counts[b]], [1, 1])
            if joint * total > math.e * counts[a] * counts[b] / 2 and joint > 1:
                gains[a, b] = merge_gain(joint / total, [part / total for part in parts], times)
        best = max(gains, key=lambda pair: (gains[pair], pair), default=None)
        if best is None or gains[best] <= 0:
            break
        for row in rows:
            i = 0
            while i + 1 < len(row):
                if row[i] == best[0] and row[i + 1] == best[1]:
                    row[i : i + 2] = [best[0] + best[1]]
                i += 1
    return path


def measure(quick: bool = False, seed: int = 0) -> Measurement:
    """Measure all parts.

    Args:
        quick: 1 seed and smaller texts, instead of 3 seeds.
        seed: First seed.

    Returns:
        Figures, verdict and plot.
    """
    seeds = range(seed, seed + (1 if quick else 3))
    lines, count = (5_000, 1_000) if quick else (20_000, 5_000)
    exact = [identity(300 if quick else 2_000, s) for s in seeds]
    words = {letters: [lexicon(letters, lines, s) for s in seeds] for letters in (400, 40)}
    found = [templates(count, s) for s in seeds]
    paths = [merging(200 if quick else 500, 40 if quick else 150, s) for s in seeds]
    falls = [all(b < a for a, b in itertools.pairwise(path["H / l"])) and len(path["H / l"]) > 1 for path in paths]
    passes = {
        "identity": all(e["error of F"] < 1e-9 and e["least F - F*"] > -1e-15 for e in exact),
        "lexicon, 400 letters": all(row["F1"] > 0.95 for row in words[400]),
        "lexicon, 40 letters": all(row["F1"] > 0.80 for row in words[40]),
        "templates found": all(row["of 6 in the first 12"] == 6 for row in found),
        "trees": all(row["right trees"] > 0.99 for row in found),
        "merging": all(falls),
    }
    verdict: Verdict = "not reproduced"
    if all(passes.values()):
        verdict = "reproduced"
    elif passes["identity"] and passes["templates found"] and passes["trees"]:
        verdict = "partly"
    figures: dict[str, Any] = {
        **{f"{name} passes": str(value) for name, value in passes.items()},
        "F1 on Python's help without spaces, order 8": natural_text(),
        "identity by seed": {name: [row[name] for row in exact] for name in exact[0]},
        **{
            f"{letters} letters by seed": {n: [row[n] for row in rows] for n in rows[0]}
            for letters, rows in words.items()
        },
        "templates by seed": {name: [row[name] for row in found] for name in found[0]},
        "merging by seed": {
            "steps": [len(path["H"]) - 1 for path in paths],
            "H / l of letters": [path["H / l"][0] for path in paths],
            "H / l at the end": [path["H / l"][-1] for path in paths],
        },
    }
    path = paths[0]

    def plot(figure: Figure) -> None:
        for axes, name in zip(figure.subplots(1, 3), path, strict=True):
            axes.plot(path[name])
            axes.set(
                xlabel="merges", title={"H": "H, nats per unit", "l": "l, letters per unit"}.get(name, "cost H / l")
            )

    note = (
        f"{len(seeds)} seeds from {seed}; {lines} lines for the lexicon, {count} sentences for the templates. Not "
        "measured: the F1 of .742 on the PKU bakeoff, which needs the source's corpora."
    )
    return Measurement(figures, verdict, plot, note)
