"""From text to tokens, in any script: the one function that turns documents and queries of the application into words.

Rules, in order:
1. Text that is not ASCII is folded by NFKC (full width to ASCII, compatibility forms); soft hyphens, joiners and
   variation selectors vanish.
2. Spaced scripts: a word is a run of letters, digits, combining marks and underscores, also across single dots and an
   apostrophe between letters. It is split at underscores, dots, changes of case (parseHTML -> parse, HTML; GPUs is the
   plural of GPU) and borders between digits and letters; parts are case-folded, English parts stemmed (:func:`stem`).
   A name of several parts is also kept whole (`train_test_split`), and so is each compound component of a dotted name.
   Clitics ('s, 're, 've, 'll, 'd, 'm) go; don't becomes dont.
3. Unspaced scripts (ideographs, kana, hangul, Thai, Lao, Khmer, Burmese), a letter with its marks being one character:
   with a segmenter each word of two or more characters, followed by its characters (平方 -> 平方, 平, 方); without one
   each character followed by the pair that it begins (平方根 -> 平, 平方, 方, 方根, 根).
4. Emoji and pictographs are tokens of one symbol; skin tones are dropped and joined families fall apart; a flag is its
   two letters. All other symbols and punctuation separate.
5. Bounds: a token has at most 64 characters; of a spaced word beyond 256 characters only the first 256 are used (such
   "words" are data, not language); a number keeps its first 16 digits.

Nothing depends on hashing or on earlier calls: equal settings give equal tokens in every process.
"""

from __future__ import annotations

import functools
import itertools
import re
import unicodedata
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kexue.words._runs import CODE_POINTS, run_table
from kexue.words.segmenter import Segmenter

_FORMAT, _VERSION = "kexue.tokenizer", 1
_MAX_TOKEN, _MAX_WORD, _MAX_DIGITS = 64, 256, 16
_MEMO, _MEMO_WORD = 1 << 17, 64

UNSPACED = (
    (0x0E00, 0x0EFF), (0x1000, 0x109F), (0x1780, 0x17FF), (0x19E0, 0x19FF), (0xA9E0, 0xA9FF), (0xAA60, 0xAA7F),
    (0x1100, 0x11FF), (0x2E80, 0x2FDF), (0x3005, 0x3007), (0x3021, 0x302F), (0x3031, 0x3035), (0x3038, 0x303C),
    (0x3041, 0x30FF), (0x3105, 0x312F), (0x3131, 0x318E), (0x31A0, 0x31FF), (0x3400, 0x4DBF), (0x4E00, 0x9FFF),
    (0xA960, 0xA97F), (0xAC00, 0xD7FF), (0xF900, 0xFAFF), (0x1AFF0, 0x1B16F), (0x20000, 0x3FFFF),
)  # fmt: skip
_EMOJI = (
    (0x203C, 0x203C), (0x2049, 0x2049), (0x231A, 0x231B), (0x23E9, 0x23FA), (0x25FB, 0x25FE), (0x2600, 0x27BF),
    (0x2B05, 0x2B07), (0x2B1B, 0x2B1C), (0x2B50, 0x2B55), (0x1F000, 0x1F1E5), (0x1F200, 0x1F3FA), (0x1F400, 0x1FAFF),
)  # fmt: skip
_INVISIBLE = re.compile("[\u00ad\u200c\u200d\u2060\ufe00-\ufe0f\ufeff\U000e0100-\U000e01ef\U0001f3fb-\U0001f3ff]+")
_CAMEL = re.compile(r"[A-Z]{2,}s(?![a-z])|[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[0-9]+")
_CLITIC = re.compile(r"['’](?:s|re|ve|ll|d|m)$", re.I)
_STEMMED = re.compile(r"[a-z]{3,}")
_VOWEL = re.compile(r"[aeiouy]")


_ASCII = re.compile(r"[A-Za-z0-9_]+(?:[.'][A-Za-z0-9_]+)*")
_BEYOND_BMP = re.compile("[\U00010000-\U0010ffff]")


@functools.cache
def _in_unspaced() -> NDArray[np.bool_]:
    """For each code point, whether it belongs to a run of an unspaced script."""
    table = np.zeros(run_table().size, np.bool_)
    for low, high in UNSPACED:
        table[low : high + 1] = True
    return table & run_table()


@functools.cache
def _pieces(limit: int) -> re.Pattern[str]:
    """What one token or one list of tokens comes from, for text of code points below ``limit``.

    Python tests the ranges beyond U+FFFF one after the other, so that texts without such characters (nearly all) get
    a pattern without them. Built on first use (0.1 s), then shared.
    """
    unspaced = _in_unspaced()[:limit]
    spaced = np.flatnonzero(run_table()[:limit] & ~unspaced)
    letter = f"[A-Za-z0-9_{_char_class(spaced[spaced >= 128].tolist())}]"
    run = f"[{_char_class(np.flatnonzero(unspaced).tolist())}]+"
    emoji = "[" + "".join(f"{chr(low)}-{chr(high)}" for low, high in _EMOJI if low < limit) + "]"
    flag = "|[\U0001f1e6-\U0001f1ff]{2}" if limit > 0x10000 else ""
    return re.compile(rf"{letter}+(?:[.'’]{letter}+)*|{run}|{emoji}{flag}")


@functools.cache
def _clusters() -> re.Pattern[str]:
    """One character with its marks."""
    marks = [c for c in np.flatnonzero(run_table()).tolist() if unicodedata.category(chr(c)) in ("Mn", "Mc")]
    return re.compile(f"(?s:.)[{_char_class(marks)}]*")


def _char_class(codes: list[int]) -> str:
    """The inside of a regular expression's [...] for sorted code points."""
    ranges: list[list[int]] = []
    for code in codes:
        if ranges and code == ranges[-1][1] + 1:
            ranges[-1][1] = code
        else:
            ranges.append([code, code])
    return "".join(rf"\U{low:08x}-\U{high:08x}" for low, high in ranges)


@functools.lru_cache(maxsize=1 << 16)
def stem(word: str) -> str:
    """Cut the commonest English endings, the same way every time.

    Words of a-z only are changed. These steps repeat until nothing changes (so ``stem(stem(w)) == stem(w)``):
    final ie, ies, ied become y after three letters; a final s goes, unless after s, u or i; ed and ing go when at
    least two letters with a vowel are left and no e stands before ed, then a doubled consonant (not l, s, z) is made
    single, and an e is put back after a single s or when only vowel + consonant is left (used -> use); a final e goes,
    unless after e or a single s, or when fewer than three letters were left.

    Args:
        word: A lower-case word.

    Returns:
        The stem: at least two letters for words of at least two letters.

    Example:
        >>> [stem(w) for w in ("matrices", "matrix", "parsing", "parsed", "uses", "queries", "query", "string")]
        ['matric', 'matrix', 'parse', 'parse', 'use', 'query', 'query', 'string']
    """
    if not _STEMMED.fullmatch(word):
        return word
    while True:
        short = _stem_once(word)
        if short == word:
            return word
        word = short


def _stem_once(word: str) -> str:
    for ending in ("ies", "ied", "ie"):
        if word.endswith(ending) and len(word) >= len(ending) + 3:
            return word[: -len(ending)] + "y"
    if word.endswith("s") and len(word) > 3 and word[-2] not in "sui":
        word = word[:-1]
    for ending in ("ing", "ed"):
        rest = word[: -len(ending)]
        if (
            word.endswith(ending)
            and len(rest) >= 2
            and _VOWEL.search(rest)
            and not (ending == "ed" and rest[-1] == "e")
        ):
            if len(rest) == 2:
                # be + ing, do + ing stay whole; us + ed is use + d
                return rest + "e" if rest[0] in "aeiou" and rest[1] not in "aeiouy" else word
            if len(rest) > 3 and rest[-1] == rest[-2] and rest[-1] not in "aeioulsz":
                rest = rest[:-1]
            return rest + "e" if rest[-1] == "s" and rest[-2] not in "su" else rest
    if word.endswith("e") and len(word) > 3 and word[-2] not in "e" and not (word[-2] == "s" and word[-3] != "s"):
        return word[:-1]
    return word


class _Memo(dict[str, tuple[str, ...]]):
    """Raw piece of text -> its tokens; forgets everything when it is full, which changes speed only."""

    def __init__(self, make: Any) -> None:
        super().__init__()
        self._make = make

    def __missing__(self, raw: str) -> tuple[str, ...]:
        tokens: tuple[str, ...] = self._make(raw)
        if len(raw) <= _MEMO_WORD:
            if len(self) >= _MEMO:
                self.clear()
            self[raw] = tokens
        return tokens


class Tokenizer:
    """Turn any text into tokens: words, parts of identifiers, Chinese words and characters, emoji.

    A Tokenizer is a function ``str -> list[str]`` and fits wherever ``tokenize=`` is asked for. The rules stand at the
    head of this module. Words seen before come from a memo of bounded size.

    Args:
        segmenter: Finds the words of unspaced scripts; it sees folded text. None gives characters and pairs.
        stem: Stem English words.
        compounds: Keep identifiers of several parts also whole.

    Raises:
        TypeError: An argument of another type, or a text that is not a str.

    Example:
        >>> tokenizer = Tokenizer()
        >>> tokenizer("Splitting arrays with train_test_split")
        ['split', 'array', 'with', 'train', 'test', 'split', 'train_test_split']
        >>> tokenizer("平方根 👍")
        ['平', '平方', '方', '方根', '根', '👍']
        >>> tokenizer.parts("numpy.linalg.norm")
        ['numpy', 'linalg', 'norm']
    """

    def __init__(self, segmenter: Segmenter | None = None, *, stem: bool = True, compounds: bool = True) -> None:
        if segmenter is not None and not isinstance(segmenter, Segmenter):
            raise TypeError(f"segmenter must be a Segmenter or None; got {type(segmenter).__name__}")
        for name, value in (("stem", stem), ("compounds", compounds)):
            if not isinstance(value, bool):
                raise TypeError(f"{name} must be True or False; got {value!r}")
        self.segmenter = segmenter
        self.stem = stem
        self.compounds = compounds
        self._tokens = _Memo(functools.partial(self._piece, compounds=compounds))
        self._parts = _Memo(functools.partial(self._piece, compounds=False))

    def __reduce__(self) -> tuple[Any, ...]:
        return (Tokenizer.from_config, (self.to_config(),))

    def __repr__(self) -> str:
        return f"Tokenizer(segmenter={self.segmenter!r}, stem={self.stem}, compounds={self.compounds})"

    def __call__(self, text: str) -> list[str]:
        """Tokenise ``text``.

        Args:
            text: Any str; time is linear in its length.

        Returns:
            Non-empty tokens in the order of the text; a compound follows its parts, a Chinese word comes before its
            characters.
        """
        memo = self._tokens
        return [token for raw in self._split(text) for token in memo[raw]]

    def parts(self, name: str) -> list[str]:
        """The tokens of a name or title, without compounds: ``numpy.linalg.norm`` -> numpy, linalg, norm."""
        memo = self._parts
        return [token for raw in self._split(name) for token in memo[raw]]

    def to_config(self) -> dict[str, Any]:
        """Everything that defines the tokenizer, as JSON values."""
        segmenter = None if self.segmenter is None else self.segmenter.to_config()
        return {
            "format": _FORMAT,
            "version": _VERSION,
            "stem": self.stem,
            "compounds": self.compounds,
            "segmenter": segmenter,
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Tokenizer:
        """Rebuild a tokenizer from :meth:`to_config`.

        Raises:
            ValueError: Another format or version, or missing or unexpected keys.
        """
        if not isinstance(config, Mapping) or config.get("format") != _FORMAT:
            found = config.get("format") if isinstance(config, Mapping) else type(config).__name__
            raise ValueError(f"expected a tokenizer (format {_FORMAT!r}); got {found!r}")
        if config.get("version") != _VERSION:
            raise ValueError(f"expected tokenizer format version {_VERSION}; got {config.get('version')!r}")
        expected = {"format", "version", "stem", "compounds", "segmenter"}
        if set(config) != expected:
            raise ValueError(f"expected the keys {sorted(expected)}; got {sorted(config)}")
        segmenter = None if config["segmenter"] is None else Segmenter.from_config(config["segmenter"])
        return cls(segmenter, stem=config["stem"], compounds=config["compounds"])

    def _split(self, text: str) -> list[str]:
        if not isinstance(text, str):
            raise TypeError(f"text must be a str; got {type(text).__name__}")
        if text.isascii():
            return _ASCII.findall(text)
        text = unicodedata.normalize("NFKC", text)
        if _INVISIBLE.search(text):
            text = _INVISIBLE.sub("", text)
        pattern = _pieces(CODE_POINTS if _BEYOND_BMP.search(text) else 0x10000)
        found: list[str] = []
        for line in text.split("\n"):  # no piece crosses a line; most lines of an English text are ASCII
            found += _ASCII.findall(line) if line.isascii() else pattern.findall(line)
        return found

    def _piece(self, raw: str, compounds: bool) -> tuple[str, ...]:
        """Tokens of one match of the main pattern."""
        if not raw[0].isascii() and _in_unspaced()[ord(raw[0])]:
            return self._unspaced(raw)
        if not any(map(str.isalnum, raw)):
            # emoji and flags; underscores or marks without a letter are nothing
            return (raw,) if not raw.isascii() and unicodedata.category(raw[0]) in ("So", "Sm", "Sk", "Po") else ()
        return tuple(self._spaced(raw[:_MAX_WORD], compounds))

    def _unspaced(self, run: str) -> tuple[str, ...]:
        if self.segmenter is None:
            characters = _characters(run)
            if not characters:
                return ()
            pairs = [a + b for a, b in itertools.pairwise(characters)]
            both = itertools.chain.from_iterable(zip(characters, pairs, strict=False))
            return (*both, characters[-1])
        tokens: list[str] = []
        for word in self.segmenter.tokenize(run):
            characters = _characters(word)
            if len(characters) > 1 and len(word) <= _MAX_TOKEN:
                tokens.append(word)
            tokens.extend(characters)
        return tuple(tokens)

    def _spaced(self, word: str, compounds: bool) -> list[str]:
        if "'" in word or "’" in word:
            word = _CLITIC.sub("", word)
            word = re.sub(r"(?<=n)['’](?=t$)", "", word, flags=re.I)
        tokens: list[str] = []
        for name in re.split(r"['’]", word):
            components = [component for component in name.split(".") if component.strip("_")]
            for component in components:
                tokens += self._name(component.strip("_"), compounds)
            if compounds and len(components) > 1:
                tokens.append(_fold(".".join(c.strip("_") for c in components))[:_MAX_TOKEN])
        return tokens

    def _name(self, name: str, compounds: bool) -> list[str]:
        """Parts of one identifier, then the whole when there are several."""
        pieces = [p for section in name.split("_") if section for p in _cases(section)]
        parts = [self._part(p) for p in pieces]
        parts = [p for p in parts if p]
        if compounds and len(pieces) > 1:
            parts.append(_fold(name)[:_MAX_TOKEN])
        return parts

    def _part(self, piece: str) -> str:
        if len(piece) > 2 and piece[-1] == "s" and piece[:-1].isupper():
            piece = piece[:-1]  # GPUs: the plural of an acronym
        folded = _fold(piece)
        if folded.isdecimal():
            return folded[:_MAX_DIGITS]
        return stem(folded[:_MAX_TOKEN]) if self.stem else folded[:_MAX_TOKEN]


def _characters(run: str) -> list[str]:
    """Letters with their marks; marks without a letter are left out."""
    return [c[: _MAX_TOKEN // 2] for c in _clusters().findall(run) if c[0].isalnum()]


def _fold(word: str) -> str:
    return word.lower() if word.isascii() else unicodedata.normalize("NFKC", word.casefold())


def _cases(word: str) -> list[str]:
    """Split a name without underscores where digits meet letters and where the case changes."""
    if word.isascii():
        return _CAMEL.findall(word)
    # The same rules for every script, on a shadow of the word: A upper, a lower, 0 digit; marks follow their letter.
    shadow = ""
    for character in word:
        if character.isupper() or character.istitle():
            shadow += "A"
        elif character.isdecimal():
            shadow += "0"
        elif unicodedata.category(character)[0] == "M":
            shadow += shadow[-1] if shadow else "a"
        else:
            shadow += "a"
    return [word[m.start() : m.end()] for m in _CAMEL.finditer(shadow)]
