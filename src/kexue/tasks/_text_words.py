"""Texts as words: the three ways in which summaries are compared, described and ranked.

    word_list      ROUGE: letters and digits in a row, with their combining marks
    jieba_words    ROUGE of Chinese: words of jieba's dictionary, and punctuation
    tokens         features: letters and digits in a row, but single characters where no spaces are written
    linked_grams   TextRank: words with what stands inside them (numpy.linalg, it's), but pairs of neighbouring
                   characters where no spaces are written

All of them but jieba's are in lower case.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable

from kexue.words._jieba import jieba_dictionary

__all__ = ["TOKEN", "has_chinese", "jieba_words", "linked_grams", "tokens", "word_list"]

_CHINESE = re.compile("[\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")
# Letters and digits, with the combining marks that Python does not count among them.
_WORD = re.compile("(?:[^\\W_]|[\u0300-\u036f\u0591-\u05bd\u064b-\u065f\u0900-\u0963\u0966-\u0dff\u0e00-\u0e4e])+")
_CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
#: One word of :func:`tokens`.
TOKEN = re.compile(rf"[{_CJK}]|[^\W_{_CJK}]+")
_UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u2e80-\u2fff\u3005-\u3007\u3040-\u312f\u31a0-\u4dbf\u4e00-\ua4cf"
    "\uf900-\ufaff\uff66-\uff9f\U0001b000-\U0001b16f\U00020000-\U0003ffff"
)
# A word ends where white space or a script without spaces begins; inside it anything may stand.
_RUNS = re.compile(
    f"[{_UNSPACED}]+|[^\\W_{_UNSPACED}](?:[^\\s{_UNSPACED}\u3000-\u303f\uff00-\uff65]*[^\\W_{_UNSPACED}])?"
)
_is_unspaced = re.compile(f"[{_UNSPACED}]").match


def has_chinese(text: str) -> bool:
    """Whether a Chinese character occurs."""
    return _CHINESE.search(text) is not None


def word_list(text: str) -> list[str]:
    """Words of a text that writes spaces between them, in lower case.

    Example:
        >>> word_list("Return the 3D-mean, as numpy.mean.")
        ['return', 'the', '3d', 'mean', 'as', 'numpy', 'mean']
    """
    return _WORD.findall(text.lower())


def jieba_words(text: str) -> list[str]:
    """Words of a Chinese text by the dictionary of jieba alone (its model for unknown words is off)."""
    try:
        dictionary = jieba_dictionary()[0]
    except ImportError as error:
        raise ImportError(
            "words of a Chinese text need jieba, which comes with the extra zh (pip install 'kexue[zh]'), "
            "a tokenizer of your own, or lists of tokens"
        ) from error
    return [word for word in dictionary.cut(text, HMM=False) if not word.isspace()]


def tokens(text: str) -> list[str]:
    """Words in lower case; characters where no spaces are written.

    Example:
        >>> tokens("Return the 3D-mean 均值。")
        ['return', 'the', '3d', 'mean', '均', '值']
    """
    return TOKEN.findall(text.lower())


def linked_grams(text: str) -> Iterable[str]:
    """Words in lower case; of runs of letters without spaces, all pairs of neighbours (of a single letter, itself).

    Example:
        >>> list(linked_grams("See (numpy.linalg), it's 中国人。"))
        ['see', 'numpy.linalg', "it's", '中国', '国人']
    """
    for run in _RUNS.findall(text.lower()):
        if len(run) > 1 and _is_unspaced(run):
            yield from map("".join, itertools.pairwise(run))
        else:
            yield run
