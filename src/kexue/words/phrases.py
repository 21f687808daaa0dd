"""Phrases of neighbouring words by minimum entropy (最小熵短语), the window = 1 case of sentence templates.

Source: Scientific Spaces articles 5476 (the gain of merging) and 5577 (templates; neighbours only give phrases).

Formula. N words; c(w) is how often the words w = w_1 ... w_n stand together, counted without overlap; p = c / N:
- the gain F(w) of writing w as one word (see :func:`kexue.words.merge_gain`) must exceed ``min_gain``;
- so must the gain of joining u and v for every way to cut w = u v, and these must be close: their normalised pointwise
  mutual information ln(N c(w) / (c(u) c(v))) / ln(N / c(w)), which is 1 when they never stand apart, is at least
  ``min_npmi``.
The best way to join a sentence is the one that saves most: the sum of F(w) / p(w) over the phrases used is largest.

What we do differently, and why:
- Every cut is tested, not only the whole: "of new york" as a whole saves a lot, but "new york" alone saves that.
- F alone joins "of the" (mutual information 1.5 nats, and 1 is enough). That is good coding and a bad phrase; the
  normalised information tells the two apart and, unlike a threshold in nats, means the same on little and much text.
- "ha ha ha" holds "ha ha" once, not twice.
- Grams are numbered level by level (one sort of packed pairs each) and only grow where both halves are frequent.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kexue._checks import check_int, check_real
from kexue._files import write_json
from kexue.words._numba import kernel
from kexue.words._text import encode
from kexue.words._wordtrie import WordTrie, step
from kexue.words.gain import merge_gain

_FORMAT, _VERSION = "kexue.phrases", 1


@kernel
def _count(grams: NDArray[np.int32], width: int, counts: NDArray[np.int64], seen: NDArray[np.int64]) -> None:
    """Count occurrences that do not overlap, from the left, and note where each gram is first seen."""
    free = np.zeros(counts.size, np.int64)  # where the gram may occur next
    for i in range(grams.size):
        gram = grams[i]
        if gram >= 0 and i >= free[gram]:
            if counts[gram] == 0:
                seen[gram] = i
            counts[gram] += 1
            free[gram] = i + width


@kernel
def _pack(grams: NDArray[np.int32], width: int, ends: NDArray[np.int64]) -> Any:
    """Keys of the grams one word longer whose two halves are both kept, and where they start."""
    keys, places = np.empty(grams.size, np.int64), np.empty(grams.size, np.int64)
    filled, start = 0, 0
    for end in ends:
        for i in range(start, end - width):
            if grams[i] >= 0 and grams[i + 1] >= 0:
                keys[filled] = np.int64(grams[i]) << 32 | grams[i + 1]
                places[filled] = i
                filled += 1
        start = end
    return keys[:filled], places[:filled]


@kernel
def _join(
    words: NDArray[np.int64],
    first: NDArray[np.int64],
    keys: NDArray[np.int64],
    child: NDArray[np.int32],
    closed: NDArray[np.int64],
    saved: NDArray[np.float64],
) -> NDArray[np.int64]:
    """Length of the phrase that starts at each place of the best way, 0 inside phrases.

    Going from the right, a longer phrase wins a tie: of equal ways it is the one whose first phrase is longest.
    """
    n = words.size
    total, length = np.zeros(n + 1), np.ones(n + 1, np.int64)
    for i in range(n - 1, -1, -1):
        total[i] = total[i + 1]
        node = 0
        for j in range(i, n):
            if words[j] < 0:
                break
            node = step(first, keys, child, node, 2 * words[j])
            if node < 0:
                break
            if closed[node] >= 0 and saved[closed[node]] + total[j + 1] >= total[i]:
                total[i] = saved[closed[node]] + total[j + 1]
                length[i] = j + 1 - i
    i = 0
    while i < n:
        for j in range(i + 1, i + length[i]):
            length[j] = 0
        i += length[i]
    return length[:n]


class PhraseMiner:
    """Find phrases of neighbouring words in tokenised text, and join them.

    Args:
        min_count: Least number of occurrences of a phrase.
        min_gain: A phrase is kept when its gain is above this, in nats per word of the text; None is 0, which asks that
            joining pays at all. To ask for g nats per occurrence of a phrase that is seen c times in N words, give
            g * c / N.
        max_length: Most words in a phrase.
        min_npmi: Least normalised mutual information over the cuts of a phrase, in [-1, 1]. None is 0.4, which leaves
            "of the" out; but where ``min_gain`` is given the gain alone decides (-1).

    Attributes:
        phrases_: Tuple of words -> gain F in nats per word of the text; largest gain first, ties by the words.
        counts_: Tuple of words -> occurrences (not overlapping), in the same order.
        total_: Number of words of the text, N.

    Raises:
        ValueError: A parameter out of range, or no words in the text.
        TypeError: A parameter or the text of another type.

    Reference:
        Scientific Spaces, articles 5476 and 5577.

    Example:
        >>> lines = ["she moved to new york city", "new york city is large", "he left new york", "is she large"]
        >>> miner = PhraseMiner(min_count=2).fit([line.split() for line in lines])
        >>> list(miner.phrases_)
        [('new', 'york', 'city'), ('new', 'york'), ('york', 'city')]
        >>> miner.transform("new york city or new york".split())
        ['new_york_city', 'or', 'new_york']
    """

    def __init__(
        self,
        min_count: int = 5,
        min_gain: float | None = None,
        max_length: int = 4,
        min_npmi: float | None = None,
    ) -> None:
        if min_npmi is None:
            min_npmi = 0.4 if min_gain is None else -1.0
        if min_gain is None:
            min_gain = 0.0
        check_int("min_count", min_count, 1)
        check_real("min_gain", min_gain)
        check_int("max_length", max_length, 2)
        check_real("min_npmi", min_npmi, minimum=-1.0)
        if min_npmi > 1:
            raise ValueError(f"min_npmi must be at most 1; got {min_npmi!r}")
        self.min_count = int(min_count)
        self.min_gain = float(min_gain)
        self.max_length = int(max_length)
        self.min_npmi = float(min_npmi)

    def __repr__(self) -> str:
        found = f", {len(self.phrases_)} phrases" if hasattr(self, "phrases_") else ""
        return (
            f"PhraseMiner(min_count={self.min_count}, min_gain={self.min_gain:g}, max_length={self.max_length}, "
            f"min_npmi={self.min_npmi:g}{found})"
        )

    def fit(self, token_lists: Iterable[Sequence[str]]) -> PhraseMiner:
        """Find the phrases.

        Args:
            token_lists: Sentences or documents as sequences of str; phrases do not cross from one into the next. Read
                once. Time is that of sorting the words ``max_length`` times, memory about 40 bytes a word.

        Returns:
            The fitted object.
        """
        text = encode(_sentences(token_lists), None)
        if not text.ids.size:
            raise ValueError("expected token lists with at least one word; got none")
        words, ends = text.words, text.offsets[1:]
        total = text.ids.size
        levels, tallies = [text.ids], [np.bincount(text.ids, minlength=len(words)).astype(np.int64)]
        found: dict[tuple[str, ...], tuple[float, int]] = {}
        for width in range(1, self.max_length):
            previous = levels[-1]
            if width == 1:
                previous = np.where(tallies[0][previous] >= self.min_count, previous, np.int32(-1))
            keys, places = _pack(previous, width, ends)
            distinct, inverse = np.unique(keys, return_inverse=True)
            grams = np.full(total, -1, np.int32)
            grams[places] = inverse
            counts, seen = np.zeros(distinct.size, np.int64), np.zeros(distinct.size, np.int64)
            _count(grams, width + 1, counts, seen)
            kept = counts >= self.min_count
            if not kept.any():
                break
            renumbered = np.where(kept, np.cumsum(kept) - 1, -1).astype(np.int32)
            grams[places] = renumbered[inverse]
            levels.append(grams)
            tallies.append(counts[kept])
            self._keep(found, levels, tallies, seen[kept], words)
        ranking = sorted(found.items(), key=lambda item: (-item[1][0], item[0]))
        self.phrases_: dict[tuple[str, ...], float] = {phrase: gain for phrase, (gain, _) in ranking}
        self.counts_: dict[tuple[str, ...], int] = {phrase: count for phrase, (_, count) in ranking}
        self.total_ = int(total)
        self._index()
        return self

    def _keep(
        self,
        found: dict[tuple[str, ...], tuple[float, int]],
        levels: list[NDArray[np.int32]],
        tallies: list[NDArray[np.int64]],
        seen: NDArray[np.int64],
        words: list[str],
    ) -> None:
        """Add the grams of the last level that pass."""
        width, total, counts = len(levels), float(levels[0].size), tallies[-1]
        passed = np.ones(counts.size, np.bool_)
        for cut in range(1, width):
            left, right = levels[cut - 1][seen], levels[width - cut - 1][seen + cut]
            halves = np.stack([tallies[cut - 1][left], tallies[width - cut - 1][right]], -1)
            same = (left == right) & (2 * cut == width)
            gain = np.empty(counts.size)
            gain[~same] = merge_gain(counts[~same] / total, halves[~same] / total)
            gain[same] = merge_gain(counts[same] / total, halves[same, :1] / total, [2])
            close = np.log(total * counts) - np.log(halves).sum(-1)
            passed &= (gain > self.min_gain) & (close >= self.min_npmi * np.log(total / counts))
        parts = np.stack([levels[0][seen + k] for k in range(width)], -1)[passed]
        counts = counts[passed]
        ordered = np.sort(parts, -1)
        repeats = (ordered[:, 1:] == ordered[:, :-1]).any(-1)
        whole = np.empty(counts.size)
        whole[~repeats] = merge_gain(counts[~repeats] / total, tallies[0][parts[~repeats]] / total)
        for row in np.flatnonzero(repeats):
            distinct, times = np.unique(parts[row], return_counts=True)
            whole[row] = merge_gain(counts[row] / total, tallies[0][distinct] / total, times)
        for gram, count, saved in zip(parts.tolist(), counts.tolist(), whole.tolist(), strict=True):
            if saved > self.min_gain:
                found[tuple(words[k] for k in gram)] = (saved, count)

    def _index(self) -> None:
        self._trie = WordTrie.build(self.phrases_)
        gains = np.fromiter(self.phrases_.values(), np.float64, len(self.phrases_))
        self._saved = gains * self.total_ / np.fromiter(self.counts_.values(), np.float64, len(self.counts_))

    def transform(self, tokens: Sequence[str] | Sequence[Sequence[str]]) -> list[str] | list[list[str]]:
        """Join the phrases of a sentence with "_".

        Where phrases compete, the choice that saves most nats in the whole sentence is taken (the largest sum of
        F(w) N / c(w), exactly, by dynamic programming); of equal ones that whose first phrase is longest. Nothing is
        lost: the words of the result, in order, are those of the input.

        Args:
            tokens: The words of one sentence, or a sequence of such sentences.

        Returns:
            The sentence with phrases joined, or one such list per sentence.
        """
        if not hasattr(self, "phrases_"):
            raise ValueError("this PhraseMiner has no phrases yet; call fit(token_lists) first")
        if isinstance(tokens, (str, bytes)) or not isinstance(tokens, (Sequence, np.ndarray)):
            raise TypeError(f"tokens must be a sequence of str (split the text first); got {type(tokens).__name__}")
        if len(tokens) and all(isinstance(item, (list, tuple)) for item in tokens):
            return [self._transform(item) for item in tokens]
        return self._transform(tokens)

    def _transform(self, tokens: Sequence[Any]) -> list[str]:
        for place, token in enumerate(tokens):
            if not isinstance(token, str):
                raise TypeError(f"token {place} must be a str; got {token!r} of type {type(token).__name__}")
        trie = self._trie
        numbers = np.fromiter((trie.numbers.get(token, -1) for token in tokens), np.int64, len(tokens))
        lengths = _join(numbers, trie.first, trie.keys, trie.child, trie.closed, self._saved).tolist()
        return [
            tokens[i] if length == 1 else "_".join(tokens[i : i + length]) for i, length in enumerate(lengths) if length
        ]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write settings and phrases as one JSON file with a format version, atomically."""
        if not hasattr(self, "phrases_"):
            raise ValueError("this PhraseMiner has no phrases yet; call fit(token_lists) first")
        write_json(
            path,
            {
                "format": _FORMAT,
                "version": _VERSION,
                "min_count": self.min_count,
                "min_gain": self.min_gain,
                "max_length": self.max_length,
                "min_npmi": self.min_npmi,
                "total": self.total_,
                "phrases": [[list(phrase), gain, self.counts_[phrase]] for phrase, gain in self.phrases_.items()],
            },
        )

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> PhraseMiner:
        """Read what :meth:`save` wrote.

        Raises:
            ValueError: Not such a file, damaged, or another format version.
        """
        config = read_config(
            path, _FORMAT, _VERSION, {"min_count", "min_gain", "max_length", "min_npmi", "total", "phrases"}
        )
        miner = cls(config["min_count"], config["min_gain"], config["max_length"], config["min_npmi"])
        try:
            rows = [(tuple(phrase), float(gain), int(count)) for phrase, gain, count in config["phrases"]]
            sound = all(isinstance(word, str) for phrase, _, _ in rows for word in phrase)
        except (TypeError, ValueError):
            sound = False
        if not sound:
            raise ValueError(f"{path} is damaged: phrases must be rows of words, gain and count")
        miner.phrases_ = {phrase: gain for phrase, gain, _ in rows}
        miner.counts_ = {phrase: count for phrase, _, count in rows}
        miner.total_ = int(config["total"])
        miner._index()
        return miner


def _sentences(token_lists: Any) -> Iterable[Any]:
    """Token lists only: a list of str would be taken for texts."""
    if isinstance(token_lists, (str, bytes, Mapping)) or not isinstance(token_lists, Iterable):
        raise TypeError(f"expected an iterable of lists of str; got {type(token_lists).__name__}")
    for number, tokens in enumerate(token_lists):
        if isinstance(tokens, (str, bytes, os.PathLike)):
            raise TypeError(f"item {number} must be a list of str (split the text first); got {tokens!r}")
        yield tokens


def read_config(path: str | os.PathLike[str], kind: str, version: int, keys: set[str]) -> dict[str, Any]:
    """Read a JSON file of the given format and version with exactly these keys besides."""
    try:
        config = json.loads(Path(path).read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not a saved {kind}: {error}") from None
    if not isinstance(config, dict) or config.get("format") != kind:
        found = config.get("format") if isinstance(config, dict) else type(config).__name__
        raise ValueError(f"expected a file of format {kind!r}; got {found!r}")
    if config.get("version") != version:
        raise ValueError(f"expected {kind} format version {version}; got {config.get('version')!r}")
    expected = {"format", "version", *keys}
    if set(config) != expected:
        raise ValueError(f"expected the keys {sorted(expected)}; got {sorted(config)}")
    return config
