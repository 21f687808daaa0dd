"""The vocabulary of :class:`kexue.tasks.summary_generator.SummaryGenerator`: words of any script, without loss.

Source: 科学空间 8046 (frequent words as single tokens: better and faster than characters alone) and 7758 (WoBERT).

A text becomes units: a word of a script with spaces, a word or character of one without (words are discovered in the
user's own texts, so no dictionary is needed), a character of punctuation. What lies between two units follows from a
rule ("word word", "word, word", no space in Chinese); where the text differs, a token says so. So every text comes back
to the last character, full-width commas and line breaks included, and most tokens are words.

Rare units have no row of their own. They are numbered within each pair of source and target, in order of appearance in
the source, and token number i means "the i-th rare unit": a name never seen before can be read, pointed at and copied.
Rare units of a target that its source lacks, and those after the last number, are spelled in bytes.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from kexue.words import Segmenter, WordDiscovery

__all__ = ["CLS", "PAD", "SEP", "SummaryVocabulary", "units_of"]

PAD, CLS, SEP, GLUE, SPELL = range(5)
BYTES = 5  # the first of 256
RARE = BYTES + 256  # the first of the numbers of rare units
_SPACES = (" ", "\n", "\t")
_ORDER = 4  # characters of a discovered word, about

# Han, Kana, Thai, Lao, Myanmar, Khmer, Tibetan: scripts without spaces between words
_UNSPACED = (
    "\u0e00-\u0eff\u0f00-\u0fff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf"
    "\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
_UNITS = re.compile(rf"(?P<run>[{_UNSPACED}]+)|(?P<word>[^\W{_UNSPACED}]+)|(?P<space>\s)|(?P<other>.)", re.DOTALL)
_AFTER = frozenset(",.;:!?)]}")  # a space follows before a word
_BEFORE = frozenset("([{")  # a space comes first after a word


def _kind(unit: str) -> str:
    found = _UNITS.match(unit)
    return "other" if found is None else str(found.lastgroup)


def _between(left: str, right: str) -> str:
    """What is expected between two units that are no spaces."""
    if _kind(right) == "word":
        return " " if left in _AFTER or _kind(left) == "word" else ""
    return " " if right in _BEFORE and _kind(left) == "word" else ""


def units_of(text: str, segmenter: Segmenter | None) -> list[str]:
    """The units of a text, white space included; joined they are the text.

    Example:
        >>> units_of("A word, 两词", None)
        ['A', ' ', 'word', ',', ' ', '两', '词']
    """
    found: list[str] = []
    for match in _UNITS.finditer(text):
        unit = match.group()
        if match.lastgroup == "run":
            found += list(unit) if segmenter is None else segmenter.tokenize(unit)
        else:
            found.append(unit)
    return found


class SummaryVocabulary:
    """Texts to ids and back.

    Args:
        counts: Unit -> how often it was seen, most frequent first.
        rare: How many rare units of a pair are numbered.

    Example:
        >>> vocabulary = SummaryVocabulary.learn(["a b, c", "a b"], size=400, min_count=2)
        >>> ids, rare = vocabulary.read("a b, d")
        >>> rare, vocabulary.text(ids, rare)
        ([',', 'd'], 'a b, d')
    """

    def __init__(self, counts: dict[str, int], rare: int = 64) -> None:
        self.counts, self.rare = dict(counts), int(rare)
        self.first = RARE + self.rare
        self.units = [*_SPACES, *(unit for unit in counts if unit not in _SPACES)]
        self._ids = {unit: self.first + i for i, unit in enumerate(self.units)}
        runs = {unit: n for unit, n in self.counts.items() if _kind(unit) == "run"}
        self._segmenter = Segmenter(runs) if runs else None

    @classmethod
    def learn(cls, texts: Iterable[str], size: int = 8000, min_count: int = 3, rare: int = 64) -> SummaryVocabulary:
        """The units that texts have at least ``min_count`` times, the most frequent of them.

        Args:
            texts: Sources and targets.
            size: Number of ids at most; 0 and up to 325 are taken by marks, bytes and numbers.
            min_count: Units seen less often are rare.
            rare: How many rare units of a pair are numbered.
        """
        known = list(texts)
        runs = [m.group() for text in known for m in _UNITS.finditer(text) if m.lastgroup == "run"]
        segmenter = None
        if any(len(run) > 1 for run in runs):
            words = WordDiscovery(order=_ORDER, min_count=max(min_count, 2), progress=False)
            try:
                words.fit(runs)
            except ValueError:  # nothing occurs often enough: characters
                segmenter = None
            else:
                short = {word: n for word, n in words.vocabulary_.items() if len(word) <= _ORDER}
                segmenter = Segmenter(short) if short else None
        counts: Counter[str] = Counter()
        for text in known:
            counts.update(units_of(text, segmenter))
        for unit in [u for u in counts if len(u) > 1 and _kind(u) == "run"]:  # a word that is cut is spelled by these
            if counts[unit] < min_count:
                counts.update(dict.fromkeys(unit, counts.pop(unit)))
        kept = [(u, n) for u, n in counts.items() if n >= min_count and u not in _SPACES]
        kept.sort(key=lambda item: (-item[1], item[0]))
        room = max(0, size - RARE - rare - len(_SPACES))
        return cls(dict(kept[:room]), rare)

    def __len__(self) -> int:
        return self.first + len(self.units)

    def read(self, text: str, rare: Sequence[str] = (), grow: bool = True) -> tuple[list[int], list[str]]:
        """Ids of a text, and the rare units by number.

        Args:
            text: Any text.
            rare: Rare units that have a number already: those of the source.
            grow: Number the ones that are new (a source), or spell them (a target).
        """
        numbers = {unit: i for i, unit in enumerate(rare)}
        ids: list[int] = []
        left: str | None = None  # the last unit, if no white space stands behind it
        spaces: list[str] = []
        for unit in units_of(text, self._segmenter):
            if unit.isspace():
                spaces.append(unit)
                continue
            gap = "".join(spaces)
            expected = "" if left is None else _between(left, unit)
            if gap != expected:
                if gap:
                    for space in spaces:
                        ids += self._ids_of(space, numbers, grow)
                else:
                    ids.append(GLUE)
            ids += self._ids_of(unit, numbers, grow)
            left, spaces = unit, []
        for space in spaces:
            ids += self._ids_of(space, numbers, grow)
        return ids, list(numbers)

    def _ids_of(self, unit: str, numbers: dict[str, int], grow: bool) -> list[int]:
        known = self._ids.get(unit)
        if known is not None:
            return [known]
        if grow and unit not in numbers and len(numbers) < self.rare:
            numbers[unit] = len(numbers)
        if unit in numbers:
            return [RARE + numbers[unit]]
        return [SPELL, *(BYTES + byte for byte in unit.encode("utf-8", "surrogatepass"))]

    def text(self, ids: Iterable[int], rare: Sequence[str] = ()) -> str:
        """The text of ids; marks and numbers without meaning are passed over.

        Args:
            ids: What :meth:`read` gave, or what a model wrote.
            rare: The rare units by number.
        """
        parts: list[str] = []
        left: str | None = None
        for unit in self._spelled(ids, rare):
            if unit is None:  # no space here
                left = None
            elif unit.isspace():
                parts.append(unit)
                left = None
            else:
                if left is not None:
                    parts.append(_between(left, unit))
                parts.append(unit)
                left = unit
        return "".join(parts)

    def _spelled(self, ids: Iterable[int], rare: Sequence[str]) -> Iterable[str | None]:
        """The units, None for the mark between units that stand close."""
        letters: bytearray | None = None
        for token in ids:
            if letters is not None and BYTES <= token < RARE:
                letters.append(token - BYTES)
                continue
            if letters:
                yield _decoded(letters)
            letters = None
            if token == SPELL:
                letters = bytearray()
            elif token == GLUE:
                yield None
            elif RARE <= token < self.first:
                if token - RARE < len(rare):
                    yield rare[token - RARE]
            elif token >= self.first:
                yield self.units[token - self.first]
        if letters:
            yield _decoded(letters)

    def to_json(self) -> dict[str, Any]:
        """Everything that defines the vocabulary."""
        return {"counts": self.counts, "rare": self.rare}

    @classmethod
    def from_json(cls, value: Any) -> SummaryVocabulary:
        """Read what :meth:`to_json` gave; ValueError if it is something else."""
        counts = value.get("counts") if isinstance(value, dict) else None
        rare = value.get("rare") if isinstance(value, dict) else None
        fine = isinstance(counts, dict) and all(isinstance(n, int) and n > 0 for n in counts.values())
        if not fine or not isinstance(rare, int) or rare < 0:
            raise ValueError("expected the vocabulary of a summary generator, an object with counts and rare")
        return cls(counts, rare)  # type: ignore[arg-type]


def _decoded(letters: bytearray) -> str:
    try:
        return letters.decode("utf-8", "surrogatepass")
    except UnicodeDecodeError:
        return letters.decode("utf-8", "replace")
