"""Sentence templates by minimum entropy (最小熵原理:“飞象过河”之句模版), such as "[X] 是 什么 意思".

Source: Scientific Spaces article 5577 (minimum entropy, part 3), its software nlp-zero (article 5597).

Method. In each sentence an edge leads from every word to every later one at most ``window`` words on when the two are
bound: p(a, b) > min_prob and ln(p(a, b) / (p(a) p(b))) > min_pmi. Here p(a, b) is the share of a pair (a before
b within the window) among all such pairs, p(a) that of a word among the words. A maximal path of this graph starts
where no edge leads to and ends where none leads on; a word without edges is a path. It is a template: [X] stands
wherever the path jumps over words, before its first word unless that begins the sentence, and behind its last unless
that ends the sentence.

What we do differently, and why:
- The number of maximal paths grows like 2 to the length of a sentence (three hundred long sentences kept the author's
  program busy for hours). We never list them: templates grow word by word from their beginnings, each kept as the set
  of positions where it can end, and a beginning that too few sentences share is dropped with all that it would become.
- Support therefore counts sentences with at least one such path, which makes the dropping exact. ``count="paths"``
  counts paths as the author does, also without listing them, and refuses a sentence with more than a million.
- Every template comes with its gain F by :func:`kexue.words.merge_gain` (k its number of words, p its sentences per
  word of the text). It breaks ties of support, so that "[X] 是 什么 意思" stands before "[X] 是 [X] 意思", and with
  ``rank="gain"`` the list is sorted by it: frequent single words ("[X] the [X]") then come last, they gain nothing.
"""

from __future__ import annotations

import itertools
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kexue._checks import check_choice, check_int, check_real
from kexue._files import write_json
from kexue.words import _templates as kernels
from kexue.words._display import join_words
from kexue.words._text import encode
from kexue.words.gain import merge_gain
from kexue.words.phrases import read_config

_FORMAT, _VERSION = "kexue.templates", 1
_MOST_PATHS = 1e6  # of one sentence, for count="paths"


@dataclass(frozen=True)
class Corpus:
    """What a template needs to look up its fillers: 4 bytes per word, 8 per sentence, and the bound pairs."""

    ids: NDArray[np.int32]
    offsets: NDArray[np.int64]
    words: list[str]
    numbers: dict[str, int]
    table: NDArray[np.int64]
    window: int

    def blocks(self, pattern: tuple[str | None, ...], gap: int) -> Iterable[str]:
        """What stands in the hole after ``gap`` fixed words, for each sentence of the template."""
        keys, hole = [], 0
        for item in pattern:
            if item is None:
                hole = 1
            else:
                keys.append(2 * self.numbers[item] + hole)
                hole = 0
        found = kernels.blocks(self.ids, self.offsets, self.window, self.table, np.array(keys), hole == 1, gap)
        for begin, end in found.tolist():
            yield join_words([self.words[k] for k in self.ids[begin:end].tolist()])


@dataclass(frozen=True)
class Template:
    """A sentence template.

    Attributes:
        pattern: Its words; None is a hole, which takes one word or more.
        support: Number of sentences (or paths) that have it.
        gain: F in nats per word of the text, what merging the words of the template saves.

    Example:
        >>> print(Template(("请问", None, "怎么", "走"), support=12))
        请问 [X] 怎么 走
    """

    pattern: tuple[str | None, ...]
    support: int
    gain: float = 0.0
    _corpus: Corpus | None = field(default=None, repr=False, compare=False)

    def __str__(self) -> str:
        return " ".join("[X]" if word is None else word for word in self.pattern)

    @property
    def holes(self) -> int:
        """Number of holes."""
        return sum(word is None for word in self.pattern)

    def fillers(self, k: int) -> Counter[str]:
        """The class of expressions that stand in one hole, most frequent first.

        Args:
            k: Number of the hole, from 0, left to right.

        Returns:
            Block of words, joined (with spaces except in Chinese and the like) -> number of times. A sentence counts
            each place that the hole can take in it once.

        Raises:
            ValueError: No such hole, or a template that was loaded or made by hand: the text is not stored with it.
        """
        check_int("k", k, 0)
        if k >= self.holes:
            raise ValueError(f"{str(self)!r} has {self.holes} holes, numbered from 0; got {k}")
        if self._corpus is None:
            raise ValueError(
                "fillers come from the text, which is not saved with a template; fit the miner on it again"
            )
        place = [index for index, word in enumerate(self.pattern) if word is None][k]
        counts = Counter(self._corpus.blocks(self.pattern, place - k))
        return Counter(dict(sorted(counts.items(), key=lambda item: (-item[1], item[0]))))


class TemplateMiner:
    """Find the templates of sentences: fixed words with holes between them.

    Args:
        window: How far apart bound words may stand.
        min_prob: Pairs of words must have a larger share among all pairs than this.
        min_pmi: And a larger mutual information than this, in nats.
        min_support: Least number of sentences (or paths) that a template is found in.
        tokenize: Splits a text into words; None splits at white space. A :class:`Segmenter` is one.
        max_words: Most fixed words of a template; longer ones are left out.
        count: "sentences", or "paths" as in the author's program (then a sentence with more than a million maximal
            paths is refused).
        rank: "support" lists the most frequent templates first, "gain" those that save most.
        max_templates: Templates that are kept. Copies of a long sentence can have millions; then ``min_support`` is
            raised during the search, and a warning tells from which support on the list is complete.

    Attributes:
        templates_: The templates, best first: by support, then gain (``rank="gain"``: gain, then support), largest
            first, then the shorter pattern, then its items, a hole coming before any word.
        complete_: Every template of at least this support is in the list; ``min_support`` unless it had to be raised.
        total_: Number of words of the text.

    Raises:
        ValueError: A parameter out of range, a text without words, a sentence with too many paths.
        TypeError: A parameter or the text of another type.

    Reference:
        Scientific Spaces, articles 5577 and 5597.

    Example:
        >>> fruits = ["雪梨", "苹果", "香蕉", "葡萄", "西瓜"]
        >>> texts = [f"{fruit} 是 什么 意思" for fruit in fruits] + [f"请问 {fruit} 怎么 卖" for fruit in fruits]
        >>> miner = TemplateMiner(min_support=5, min_pmi=1.0).fit(texts)
        >>> for template in miner.templates_[:2]:
        ...     print(template, template.support)
        [X] 是 什么 意思 5
        请问 [X] 怎么 卖 5
        >>> sorted(miner.templates_[0].fillers(0).items())
        [('苹果', 1), ('葡萄', 1), ('西瓜', 1), ('雪梨', 1), ('香蕉', 1)]
    """

    def __init__(
        self,
        window: int = 5,
        min_prob: float = 1e-5,
        min_pmi: float = 2.0,
        min_support: int = 10,
        tokenize: Callable[[str], Sequence[str]] | None = None,
        max_words: int = 12,
        count: str = "sentences",
        rank: str = "support",
        max_templates: int = 100_000,
    ) -> None:
        check_int("window", window, 1)
        check_real("min_prob", min_prob, minimum=0.0)
        check_real("min_pmi", min_pmi)
        check_int("min_support", min_support, 1)
        check_int("max_words", max_words, 1)
        check_int("max_templates", max_templates, 1)
        check_choice("count", count, ("sentences", "paths"))
        check_choice("rank", rank, ("support", "gain"))
        if tokenize is not None and not callable(tokenize):
            raise TypeError(f"tokenize must be a function from str to a list of str, or None; got {tokenize!r}")
        self.window = int(window)
        self.min_prob = float(min_prob)
        self.min_pmi = float(min_pmi)
        self.min_support = int(min_support)
        self.tokenize = tokenize
        self.max_words = int(max_words)
        self.count = count
        self.rank = rank
        self.max_templates = int(max_templates)

    def __repr__(self) -> str:
        found = f", {len(self.templates_)} templates" if hasattr(self, "templates_") else ""
        return (
            f"TemplateMiner(window={self.window}, min_prob={self.min_prob:g}, min_pmi={self.min_pmi:g}, "
            f"min_support={self.min_support}, max_words={self.max_words}, count={self.count!r}, rank={self.rank!r}"
            f"{found})"
        )

    def fit(self, texts: Iterable[str] | Iterable[Sequence[str]]) -> TemplateMiner:
        """Find the templates.

        Args:
            texts: Sentences, as str or as lists of words, each one sentence (split longer texts first), or files
                (`pathlib.Path`) with a sentence a line. Read once. Memory: about 50 bytes a word while fitting, and 4
                bytes per edge.

        Returns:
            The fitted object.
        """
        corpus, counts = self._read(texts)
        first, to, source, steps, paths, total = kernels.graphs(corpus.ids, corpus.offsets, corpus.window, corpus.table)
        by_path = self.count == "paths"
        if by_path and total.max() > _MOST_PATHS:
            number = int(np.argmax(total > _MOST_PATHS))
            raise ValueError(
                f'count="paths" takes at most {_MOST_PATHS:.0f} maximal paths in a sentence; sentence {number} has '
                f'{total[number]:.4g} (use count="sentences", a smaller window or a larger min_pmi)'
            )
        bounds, keys, opened, weight, sentences, complete = kernels.grow(
            corpus.ids,
            corpus.offsets,
            len(corpus.words),
            first,
            to,
            source,
            steps,
            paths,
            self.min_support,
            min(self.max_words, int(np.diff(corpus.offsets).max())),
            by_path,
            self.max_templates,
        )
        if complete > self.min_support:
            warnings.warn(
                f"more than max_templates={self.max_templates} templates, or too many beginnings of some: the list is "
                f"complete for support >= {complete} only. Remove copies of long sentences, or raise min_support.",
                RuntimeWarning,
                stacklevel=2,
            )
        steps_of = [keys[a:b] for a, b in itertools.pairwise(bounds.tolist())]
        gains = _gains(steps_of, sentences, counts, corpus.ids.size)
        found = [
            Template(_pattern(part.tolist(), bool(behind), corpus.words), int(support), float(gain), corpus)
            for part, behind, support, gain in zip(steps_of, opened, weight, gains, strict=True)
        ]
        self.templates_: list[Template] = sorted(found, key=self._key)
        self.complete_ = int(complete)
        self.total_ = int(corpus.ids.size)
        return self

    def _read(self, texts: Any) -> tuple[Corpus, NDArray[np.int64]]:
        """The text as ids by descending count (ties alphabetical), the pairs that are bound, and the counts."""
        text = encode(texts, self.tokenize)
        if not text.ids.size:
            raise ValueError("expected sentences with at least one word; got none")
        if text.ids.size >= 1 << 31:
            raise ValueError(f"expected fewer than 2**31 words; got {text.ids.size}")
        tally = np.bincount(text.ids, minlength=len(text.words)).astype(np.int64)
        order = np.array(sorted(range(len(text.words)), key=text.words.__getitem__))
        order = order[np.argsort(-tally[order], kind="stable")]
        rank = np.empty(order.size, np.int32)
        rank[order] = np.arange(order.size, dtype=np.int32)
        ids, words, counts = rank[text.ids], [text.words[k] for k in order.tolist()], tally[order]
        window = min(self.window, max(1, int(np.diff(text.offsets).max()) - 1))
        keys, pairs, among = kernels.skip_grams(ids, text.offsets, window, len(words), self.min_prob)
        if pairs.size:
            # One quotient of products: for counts of usual size it is exactly 1 for a pair as frequent as by chance.
            chance = float(among) * counts[keys >> 32].astype(np.float64) * counts[keys & 0xFFFFFFFF]
            bound = (pairs / among > self.min_prob) & (np.log(pairs * float(ids.size) ** 2 / chance) > self.min_pmi)
            keys = keys[bound]
        numbers = {word: number for number, word in enumerate(words)}
        return Corpus(ids, text.offsets, words, numbers, kernels.pair_table(keys), window), counts

    def _key(self, template: Template) -> Any:
        worth = (-template.support, -template.gain) if self.rank == "support" else (-template.gain, -template.support)
        return *worth, len(template.pattern), tuple((word is not None, word or "") for word in template.pattern)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write settings and templates as one JSON file with a format version, atomically.

        ``tokenize`` is not stored, and neither is the text: loaded templates have no fillers.
        """
        if not hasattr(self, "templates_"):
            raise ValueError("this TemplateMiner has no templates yet; call fit(texts) first")
        write_json(
            path,
            {
                "format": _FORMAT,
                "version": _VERSION,
                "settings": {name: getattr(self, name) for name in _SETTINGS},
                "complete": self.complete_,
                "total": self.total_,
                "templates": [[list(t.pattern), t.support, t.gain] for t in self.templates_],
            },
        )

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], tokenize: Callable[[str], Sequence[str]] | None = None
    ) -> TemplateMiner:
        """Read what :meth:`save` wrote.

        Args:
            path: The file.
            tokenize: As in the constructor, for another :meth:`fit`.

        Raises:
            ValueError: Not such a file, damaged, or another format version.
        """
        config = read_config(path, _FORMAT, _VERSION, {"settings", "complete", "total", "templates"})
        settings = config["settings"]
        if not isinstance(settings, dict) or set(settings) != set(_SETTINGS):
            raise ValueError(f"{path} is damaged: expected the settings {sorted(_SETTINGS)}; got {settings!r}")
        miner = cls(**settings, tokenize=tokenize)
        try:
            rows = [(tuple(pattern), int(support), float(gain)) for pattern, support, gain in config["templates"]]
            sound = all(word is None or isinstance(word, str) for pattern, _, _ in rows for word in pattern)
        except (TypeError, ValueError):
            sound = False
        if not sound:
            raise ValueError(f"{path} is damaged: templates must be rows of pattern, support and gain")
        miner.templates_ = [Template(*row) for row in rows]
        miner.complete_, miner.total_ = int(config["complete"]), int(config["total"])
        return miner


_SETTINGS = ("window", "min_prob", "min_pmi", "min_support", "max_words", "count", "rank", "max_templates")


def _pattern(keys: list[int], behind: bool, words: list[str]) -> tuple[str | None, ...]:
    pattern: list[str | None] = []
    for key in keys:
        if key & 1:
            pattern.append(None)
        pattern.append(words[key >> 1])
    return (*pattern, None) if behind else tuple(pattern)


def _gains(
    patterns: list[NDArray[np.int64]], sentences: NDArray[np.int64], counts: NDArray[np.int64], total: int
) -> NDArray[np.float64]:
    """F of each template; those with equally many different words are computed together."""
    groups: dict[int, list[int]] = {}
    parts = [Counter(sorted((keys >> 1).tolist())) for keys in patterns]
    for index, part in enumerate(parts):
        groups.setdefault(len(part), []).append(index)
    gains = np.empty(len(patterns))
    for group in groups.values():
        ids = np.array([list(parts[index]) for index in group])
        times = np.array([list(parts[index].values()) for index in group])
        gains[group] = merge_gain(sentences[group] / total, counts[ids] / total, times)
    return gains
