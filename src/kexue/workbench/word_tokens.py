"""From text to the words that phrases, templates and word vectors are made of: each word once, nothing repeated.

The tokenizer of search gives a Chinese word and then its characters again, so that either can be found. Statistics of
neighbours must not see a word next to its own characters; here they are left out.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from kexue.words.tokenizer import UNSPACED

if TYPE_CHECKING:
    from kexue.words import Segmenter

_RANGES = "".join(f"{chr(low)}-{chr(high)}" for low, high in UNSPACED)
_UNSPACED_LETTER = re.compile(f"[{_RANGES}]")
# Hangul is cut like the others, but it has spaces between its words: it calls for no discovery.
_NO_HANGUL = re.compile(f"(?:(?![\u1100-\u11ff\u3131-\u318e\ua960-\ua97f\uac00-\ud7ff])[{_RANGES}])+")
_NO_LETTERS = bytes(sorted(set(range(128)) - set(string.ascii_letters.encode())))

# A clause ends at a line end, at punctuation of unspaced scripts, at a bracket or quotation mark, and at ASCII
# punctuation that white space or the end follows (3.14 and example.org stay whole).
_CLAUSE = re.compile(r"[\n。．！？；，、：…—～“”「」『』《》〈〉【】（）()\[\]{}\"]+|[.!?;,:]+(?=\s|$)")


class WordTokenizer:
    """Turn text into lower-case words; a ``str -> list[str]`` that fits wherever ``tokenize=`` is asked for.

    Punctuation and white space are dropped. Spaced scripts: words and the parts of identifiers, not stemmed. Unspaced
    scripts (Chinese and its like): the words of the segmenter, or single characters without one.

    Args:
        segmenter: Cuts unspaced scripts into words; None gives their characters.

    Example:
        >>> from kexue.words import Segmenter
        >>> WordTokenizer(Segmenter({"平方": 2, "根": 1}))("Roots: 平方根 of 2.")
        ['roots', '平方', '根', 'of', '2']
        >>> WordTokenizer()("平方根")
        ['平', '方', '根']
    """

    def __init__(self, segmenter: Segmenter | None = None) -> None:
        from kexue.words import Tokenizer

        self.segmenter = segmenter
        self._tokenizer = Tokenizer(segmenter, stem=False, compounds=False)

    def to_config(self) -> dict[str, Any]:
        """What defines the tokenizer, as JSON values."""
        return {"words_of": self._tokenizer.to_config()}

    def __call__(self, text: str) -> list[str]:
        """The words of ``text``, in order."""
        tokens = self._tokenizer(text)
        if text.isascii():
            return tokens
        return without_characters(tokens, self.segmenter is not None)


def without_characters(tokens: Iterable[str], segmented: bool) -> list[str]:
    """Tokens of :class:`kexue.words.Tokenizer` with what stands twice in unspaced scripts left out.

    Args:
        tokens: Each word of an unspaced script followed by its characters.
        segmented: Whether words come from a segmenter; those of pairs of characters give way to the characters.

    Example:
        >>> without_characters(["平方", "平", "方", "根", "run"], True)
        ['平方', '根', 'run']
    """
    words, repeated = [], 0
    for token in tokens:
        if repeated:  # a character of the word before
            repeated -= 1
            continue
        if len(token) > 1 and is_unspaced(token):
            length = _characters(token)
            if length > 1:
                if not segmented:  # a pair, between its two characters
                    continue
                repeated = length
        words.append(token)
    return words


def is_unspaced(word: str) -> bool:
    """Whether a token begins with a letter of an unspaced script.

    Example:
        >>> is_unspaced("平方"), is_unspaced("سلام"), is_unspaced("word")
        (True, False, False)
    """
    return _UNSPACED_LETTER.match(word) is not None


def _characters(word: str) -> int:
    """Characters of a word, marks not counted: they belong to the letter before them."""
    return sum(unicodedata.category(character) not in ("Mn", "Mc") for character in word)


def split_spaces(text: str) -> list[str]:
    """The pieces between white space, for text that is cut into words already."""
    return text.split()


def clauses(text: str) -> Iterator[str]:
    """The pieces of ``text`` between clause punctuation and line ends, those without a letter or digit left out.

    Example:
        >>> list(clauses("你好，世界！It is 3.14, roughly."))
        ['你好', '世界', 'It is 3.14', 'roughly']
    """
    start = 0
    for match in _CLAUSE.finditer(text):
        piece = text[start : match.start()].strip()
        start = match.end()
        if any(map(str.isalnum, piece)):
            yield piece
    piece = text[start:].strip()
    if any(map(str.isalnum, piece)):
        yield piece


def join_words(words: Sequence[str]) -> str:
    """Words in a row: with a space between them, or a dot between two of a script that has none.

    Example:
        >>> join_words(["word", "vectors"]), join_words(["новый", "год"]), join_words(["宝玉", "道"])
        ('word vectors', 'новый год', '宝玉·道')
    """
    out = ""
    for word in words:
        if out:
            out += "·" if is_unspaced(out[-1]) and is_unspaced(word) else " "
        out += word
    return out


def unspaced_share(texts: Iterable[str]) -> float:
    """Share of the letters of the texts that belong to scripts without spaces: ideographs, kana, Thai and their like.

    Example:
        >>> unspaced_share(["平方根 = sqrt(2.0)"]), unspaced_share(["한국어"])
        (0.42857142857142855, 0.0)
    """
    letters = unspaced = 0
    for text in texts:
        if text.isascii():
            letters += len(text.encode().translate(None, _NO_LETTERS))
            continue
        letters += sum(map(str.isalpha, text))
        unspaced += sum(map(str.isalpha, "".join(_NO_HANGUL.findall(text))))
    return unspaced / letters if letters else 0.0
