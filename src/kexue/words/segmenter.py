"""Word segmentation by maximum unigram probability (最大概率分词).

Source: the segmenter of word discovery, Scientific Spaces articles 6920 and 5476 (under article 5577).

Formula: over all ways to write the text as words w_1 ... w_k, maximise sum_i ln(c(w_i) / N), N the sum of all counts:
the path of least information. A character that is no word by itself costs ln N (as if seen once).

What we do differently, and why:
- The author scores an unknown character -100, which forbids paths that a probability would allow; -ln N is on the
  same scale as the words and can be set by ``unknown_score``.
- Matching is a double-array trie and the path a forward Viterbi over it, both in numba; nothing recurses.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kexue._checks import check_int, check_real
from kexue._files import atomic_path, write_json
from kexue.words._numba import compiled
from kexue.words._runs import code_points
from kexue.words._trie import Trie

_FORMAT, _VERSION = "kexue.segmenter", 1
_LATIN = re.compile(r"[A-Za-z0-9.]+")


@compiled(nogil=True)
def best_path(
    numbers: NDArray[np.int32],
    points: NDArray[np.uint32],
    base: NDArray[np.int32],
    check: NDArray[np.int32],
    value: NDArray[np.int32],
    scores: NDArray[np.float64],
    unknown: float,
) -> tuple[NDArray[np.int64], float]:
    """Borders (k + 1,) of the best path, from 0 to the length of the text, and its score.

    Of equal scores the one whose last word is longest wins, and so on from the end.
    """
    n = points.size
    total = np.full(n + 1, -np.inf)
    back = np.zeros(n + 1, np.int64)
    total[0] = 0.0
    for i in range(n):
        here = total[i]
        state, known = 0, False
        for j in range(i, n):
            number = numbers[points[j]]
            if number == 0:
                break
            child = base[state] + number
            if check[child] != state:
                break
            state = child
            word = value[state]
            if word >= 0:
                known = known or j == i
                if here + scores[word] > total[j + 1]:
                    total[j + 1] = here + scores[word]
                    back[j + 1] = i
        if not known and here + unknown > total[i + 1]:
            total[i + 1] = here + unknown
            back[i + 1] = i
    k, i = 0, n
    while i > 0:
        i = back[i]
        k += 1
    borders = np.empty(k + 1, np.int64)
    i = n
    for m in range(k, -1, -1):
        borders[m] = i
        i = back[i]
    return borders, total[n]


class Segmenter:
    """Cut text into the most probable words of a vocabulary.

    ``segmenter(text)`` equals ``segmenter.tokenize(text)``, so that a Segmenter fits wherever a tokenizer is asked for.
    The tokens, joined, give the text again, except white space that is not part of a word: it separates and is left
    out. Characters outside the vocabulary (punctuation, too) are tokens of one character.

    Args:
        vocabulary: Word -> count (>= 1).
        max_words: Keep the most frequent words only (equal counts: alphabetical); None keeps all.
        unknown_score: Logarithm of the probability of a character that is no word; None is -ln of the sum of counts.
        merge_latin: Join neighbouring tokens that consist of [A-Za-z0-9.] only, for text that mixes Chinese with Latin
            words, under a vocabulary without them.

    Attributes:
        vocabulary: The words that are used, most frequent first.

    Raises:
        ValueError: An empty vocabulary or word, or a count below 1.
        TypeError: Not a mapping of str to integers.

    Reference:
        Scientific Spaces, articles 5476 and 6920.

    Example:
        >>> segmenter = Segmenter({"雪梨": 5, "和": 9, "苹果": 5, "的": 9, "颜色": 4})
        >>> segmenter.tokenize("雪梨和苹果的颜色")
        ['雪梨', '和', '苹果', '的', '颜色']
        >>> segmenter("苹果, OK")
        ['苹果', ',', 'O', 'K']
    """

    def __init__(
        self,
        vocabulary: Mapping[str, int],
        max_words: int | None = None,
        unknown_score: float | None = None,
        merge_latin: bool = False,
    ) -> None:
        if not isinstance(vocabulary, Mapping):
            raise TypeError(f"vocabulary must map words to counts; got {type(vocabulary).__name__}")
        if max_words is not None:
            check_int("max_words", max_words, 1)
        if unknown_score is not None:
            check_real("unknown_score", unknown_score)
        if not isinstance(merge_latin, bool):
            raise TypeError(f"merge_latin must be True or False; got {merge_latin!r}")
        if not vocabulary:
            raise ValueError("vocabulary must have at least one word; got none")
        for word, count in vocabulary.items():
            if not isinstance(word, str):
                raise TypeError(f"words must be str; got {word!r} of type {type(word).__name__}")
            if not word:
                raise ValueError("words must not be empty; got ''")
            check_int(f"count of {word!r}", count, 1)
        ranking = sorted(((w, int(c)) for w, c in vocabulary.items()), key=lambda item: (-item[1], item[0]))
        self.vocabulary: dict[str, int] = dict(ranking[:max_words])
        self.merge_latin = merge_latin
        self._given_unknown = None if unknown_score is None else float(unknown_score)
        total = math.log(sum(self.vocabulary.values()))
        self.unknown_score = -total if unknown_score is None else float(unknown_score)
        self._scores = np.log(np.fromiter(self.vocabulary.values(), np.float64, len(self.vocabulary))) - total
        self._trie = Trie.build(list(self.vocabulary))

    def __reduce__(self) -> tuple[Any, ...]:
        # Rebuilt rather than copied: the arrays are larger than the words that they come from.
        return (Segmenter, (self.vocabulary, None, self._given_unknown, self.merge_latin))

    def __repr__(self) -> str:
        return f"Segmenter({len(self.vocabulary)} words, unknown_score={self.unknown_score:.3g})"

    def __call__(self, text: str) -> list[str]:
        """The same as :meth:`tokenize`."""
        return self.tokenize(text)

    def _path(self, text: str) -> tuple[NDArray[np.int64], float]:
        if not isinstance(text, str):
            raise TypeError(f"text must be a str; got {type(text).__name__}")
        trie = self._trie
        points = code_points(text)
        return best_path(trie.numbers, points, trie.base, trie.check, trie.value, self._scores, self.unknown_score)

    def tokenize(self, text: str) -> list[str]:
        """Cut ``text`` into words.

        Args:
            text: Any str. Time and memory are linear in its length (16 bytes per character).

        Returns:
            The tokens of the most probable path.
        """
        borders = self._path(text)[0].tolist()
        tokens = [text[a:b] for a, b in itertools.pairwise(borders)]
        if len(text.split(None, 1)) != 1 or text != text.strip():
            tokens = [token for token in tokens if not token.isspace() or token in self.vocabulary]
        return self._join_latin(text, borders) if self.merge_latin else tokens

    def _join_latin(self, text: str, borders: list[int]) -> list[str]:
        joined: list[str] = []
        open_word = False
        for a, b in itertools.pairwise(borders):
            token = text[a:b]
            latin = _LATIN.fullmatch(token) is not None
            if latin and open_word:
                joined[-1] += token
            elif not token.isspace() or token in self.vocabulary:
                joined.append(token)
            open_word = latin
        return joined

    def score(self, text: str) -> float:
        """Logarithm of the probability of the best path of ``text`` (white space counts as unknown characters)."""
        return float(self._path(text)[1])

    def to_config(self) -> dict[str, Any]:
        """Everything that defines the segmenter, as JSON values."""
        return {
            "format": _FORMAT,
            "version": _VERSION,
            "unknown_score": self._given_unknown,
            "merge_latin": self.merge_latin,
            "vocabulary": self.vocabulary,
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Segmenter:
        """Rebuild a segmenter from :meth:`to_config`.

        Raises:
            ValueError: Another format or version, or missing or unexpected keys.
        """
        if not isinstance(config, Mapping) or config.get("format") != _FORMAT:
            found = config.get("format") if isinstance(config, Mapping) else type(config).__name__
            raise ValueError(f"expected a segmenter (format {_FORMAT!r}); got {found!r}")
        if config.get("version") != _VERSION:
            raise ValueError(f"expected segmenter format version {_VERSION}; got {config.get('version')!r}")
        expected = {"format", "version", "unknown_score", "merge_latin", "vocabulary"}
        if set(config) != expected:
            raise ValueError(f"expected the keys {sorted(expected)}; got {sorted(config)}")
        return cls(config["vocabulary"], None, config["unknown_score"], config["merge_latin"])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the segmenter as one JSON file with a format version, atomically."""
        write_json(path, self.to_config())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Segmenter:
        """Read what :meth:`save` wrote.

        Raises:
            ValueError: Not such a file, or another format version.
        """
        try:
            config = json.loads(Path(path).read_text(encoding="utf-8"))
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} is not a saved segmenter: {error}") from None
        return cls.from_config(config)

    def to_jieba_dict(self, path: str | os.PathLike[str]) -> None:
        """Write a dictionary for jieba (`word count` per line), for `jieba.Tokenizer(path)` with `HMM=False`.

        jieba joins neighbouring Latin letters and digits, and may take another one of equally probable paths.

        Raises:
            ValueError: A word contains white space, which jieba's format cannot hold.
        """
        spaced = next((word for word in self.vocabulary if word.split() != [word]), None)
        if spaced is not None:
            raise ValueError(f"a jieba dictionary cannot hold white space; got the word {spaced!r}")
        with atomic_path(path) as temporary:
            lines = (f"{word} {count}\n" for word, count in self.vocabulary.items())
            temporary.write_text("".join(lines), encoding="utf-8")

    def to_hf_tokenizer(self) -> Any:
        """A `transformers.PreTrainedTokenizerFast` that cuts in the same way (imports transformers here).

        It is a Unigram model over the words and over every single character that occurs in one (with the unknown
        score). White space separates; characters that occur in no word become [UNK], neighbouring ones together.
        Special tokens [PAD], [UNK], [CLS], [SEP], [MASK] have ids 0 to 4.
        """
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

        special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        pieces = dict.fromkeys(special, self.unknown_score)
        pieces |= dict(zip(self.vocabulary, self._scores.tolist(), strict=True))
        for character in sorted({c for word in self.vocabulary for c in word}):
            pieces.setdefault(character, self.unknown_score)
        tokenizer = Tokenizer(models.Unigram(list(pieces.items()), unk_id=1, byte_fallback=False))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        tokenizer.decoder = decoders.Fuse()
        return PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            pad_token="[PAD]",
            unk_token="[UNK]",
            cls_token="[CLS]",
            sep_token="[SEP]",
            mask_token="[MASK]",
            clean_up_tokenization_spaces=False,
        )
