"""ROUGE: how much of a reference summary a summary says, and how much else (ROUGE 摘要评分).

Source: the metric of 科学空间 8046 (SPACES:“抽取-生成”式长文本摘要); Lin 2004, "ROUGE: A Package for Automatic
Evaluation of Summaries".

For token lists h (hypothesis) and r (reference)

    P = overlap / |h|,    R = overlap / |r|,    F = 2 P R / (P + R), 0 where nothing is shared
    rouge-1, rouge-2    1-grams, 2-grams: sets (``unique=True``), or counts, overlap = sum of the smaller ones
    rouge-l             overlap = length of the longest common subsequence, |h| and |r| = lengths
    main                0.2 rouge-1 + 0.4 rouge-2 + 0.4 rouge-l

Units. ``"char"``: a character is a code point, and white space is none. ``"word"``: jieba's dictionary (model for
unknown words off) if one of the two texts has a Chinese character, otherwise runs of letters and digits in lower case.
``weight="chars"`` lets a word count as many times as it has characters, a 2-gram as many as its two words have, and
rouge-l is the heaviest common subsequence. The author's proposal, which he did not build: a law name of 14 characters
is worth 14 when it is matched as a whole and 0 when it is not, while a particle is worth 1.

What we do differently, and why: packages called rouge* give different numbers. With ``unique=False`` all three are
those of ``rouge_score`` with the same tokens, to the last bit. With ``unique=True`` all three are those of
``rouge-chinese``, and rouge-1 and rouge-2 those of ``rouge`` 1.0 (the author's), which however cuts texts at every
ASCII full stop, drops it, and counts distinct tokens of rouge-l; here rouge-l is the plain definition. Texts become
numbers once for a whole corpus, n-grams are sorted numbers that are merged, and the subsequence is found 64 positions
at a time (:mod:`kexue.tasks._rouge_kernel`).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from kexue.tasks._rouge_kernel import overlaps
from kexue.tasks._rouge_tokens import Text, Tokenizer, Tokens, as_tokens, check_unit, cut_by, token_table
from kexue.tasks._text_words import has_chinese, jieba_words, word_list

__all__ = ["rouge", "rouge_corpus"]

_NAMES = ("rouge-1", "rouge-2", "rouge-l")
_SHARES = (0.2, 0.4, 0.4)  # of the main metric
_BATCH = 1 << 22  # characters or tokens that are numbered at a time


def rouge(
    hypothesis: Text,
    reference: Text,
    unit: Literal["char", "word"] = "char",
    unique: bool = True,
    weight: Literal["chars"] | None = None,
    tokenizer: Tokenizer | None = None,
) -> dict[str, float]:
    """Score a summary against a reference.

    Args:
        hypothesis: A text, or a list of hashable tokens, which are taken as they are.
        reference: The same.
        unit: What texts are cut into (see the head of this module); lists of tokens are not cut.
        unique: Compare sets of n-grams, or counts if False.
        weight: ``"chars"``: tokens (which must be str) count by their characters; None: every token counts 1.
        tokenizer: A function from a text to its tokens, instead of ``unit``.

    Returns:
        F1 values in [0, 1]: ``"rouge-1"``, ``"rouge-2"``, ``"rouge-l"`` and ``"main"``. A side without tokens scores 0.

    Raises:
        TypeError: A side that is neither a text nor a list of hashable tokens, weighted tokens that are no str.
        ValueError: An unknown unit or weight.
        ImportError: Words of a Chinese text without jieba (extra ``zh``) and without a tokenizer.

    Reference:
        https://spaces.ac.cn/archives/8046

    Example:
        >>> rouge("中国人民共和国文物保护法", "中国人民共和国未成年人保护法")["rouge-l"]  # 20 / 26
        0.7692307692307692
        >>> words = "根据 《 中国人民共和国未成年人保护法 》 的 有关 规定".split()
        >>> found = rouge(["中国人民共和国未成年人保护法"], words, weight="chars")["rouge-1"]  # P = 1, R = 14 / 23
        >>> found == 2 * (14 / 23) / (1 + 14 / 23)
        True
    """
    scores = rouge_corpus([hypothesis], [reference], unit, unique, weight, tokenizer)
    return {name: float(scores[name][0]) for name in (*_NAMES, "main")}


def rouge_corpus(
    hypotheses: Iterable[Text],
    references: Iterable[Text],
    unit: Literal["char", "word"] = "char",
    unique: bool = True,
    weight: Literal["chars"] | None = None,
    tokenizer: Tokenizer | None = None,
) -> dict[str, NDArray[np.float64]]:
    """Score N summaries, each against its own reference; the mean is the score of the corpus.

    Time is linear in the texts, but for the subsequence: tokens * tokens / 64 a pair, with weights tokens * tokens.

    Args:
        hypotheses: N texts or lists of tokens.
        references: N of them.
        unit: As in :func:`rouge`.
        unique: As in :func:`rouge`.
        weight: As in :func:`rouge`.
        tokenizer: As in :func:`rouge`.

    Returns:
        (N,) arrays: the four F1 values of :func:`rouge`, and ``"rouge-1-precision"``, ``"rouge-1-recall"`` and so on.

    Raises:
        TypeError, ImportError: As :func:`rouge`; a single str instead of many texts.
        ValueError: As :func:`rouge`; not as many hypotheses as references.

    Example:
        >>> scores = rouge_corpus(["苹果很甜", "今天下雨"], ["苹果甜", "昨天下雪"])
        >>> scores["rouge-1"].round(3).tolist(), scores["rouge-1-recall"].tolist(), round(scores["main"].mean(), 3)
        ([0.857, 0.5], [1.0, 0.5], np.float64(0.554))
    """
    check_unit(unit, weight, unique, tokenizer)
    for name, given in (("hypotheses", hypotheses), ("references", references)):
        if isinstance(given, (str, bytes)) or not isinstance(given, Iterable):
            raise TypeError(f"{name} must be an iterable of texts; got {given!r} of type {type(given).__name__}")
    left = [as_tokens("hypothesis", text) for text in hypotheses]
    right = [as_tokens("reference", text) for text in references]
    if len(left) != len(right):
        raise ValueError(f"there must be as many hypotheses as references; got {len(left)} and {len(right)}")
    parts = [
        _pair_scores(left[first:last], right[first:last], unit, bool(unique), weight is not None, tokenizer)
        for first, last in _batches(left, right)
    ]
    figures = np.concatenate(parts) if parts else np.zeros((0, 3, 3))
    scores = {name: figures[:, k, 2] for k, name in enumerate(_NAMES)}
    scores["main"] = main_score(figures[:, :, 2])
    for k, name in enumerate(_NAMES):
        scores |= {f"{name}-precision": figures[:, k, 0], f"{name}-recall": figures[:, k, 1]}
    return scores


def main_score(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """The main metric (N,) of R1, R2 and RL (N, 3)."""
    return _SHARES[0] * scores[:, 0] + _SHARES[1] * scores[:, 1] + _SHARES[2] * scores[:, 2]


def figures_of(tokens: Tokens, left: NDArray[np.int64], right: NDArray[np.int64]) -> NDArray[np.float64]:
    """Precision, recall and F1 (last dimension) of R1, R2 and RL of pairs of texts: (N, 3, 3)."""
    shared = overlaps(
        tokens.ids,
        tokens.starts,
        tokens.ones,
        tokens.one_starts,
        tokens.twos,
        tokens.two_starts,
        tokens.weights,
        tokens.width,
        left,
        right,
    )
    precision = shared / np.maximum(tokens.sizes[left], 1)
    recall = shared / np.maximum(tokens.sizes[right], 1)
    total = precision + recall
    return np.stack(
        [precision, recall, np.where(shared > 0, 2 * precision * recall / np.where(total > 0, total, 1), 0)], 2
    )


def cut(texts: list[Text], unit: str, tokenizer: Tokenizer | None, chinese: bool) -> list[Text]:
    """Texts as lists of tokens, or as str where characters are the tokens; given lists stay."""
    function: Any = tokenizer or (None if unit == "char" else jieba_words if chinese else word_list)
    if function is None:
        return texts
    return [cut_by(function, text) if isinstance(text, str) else text for text in texts]


def _pair_scores(
    left: list[Text], right: list[Text], unit: str, unique: bool, weighted: bool, tokenizer: Tokenizer | None
) -> NDArray[np.float64]:
    if unit == "word" and tokenizer is None:  # both texts of a pair are cut alike
        chinese = [any(isinstance(t, str) and has_chinese(t) for t in pair) for pair in zip(left, right, strict=True)]
        left = [cut([text], unit, None, zh)[0] for text, zh in zip(left, chinese, strict=True)]
        right = [cut([text], unit, None, zh)[0] for text, zh in zip(right, chinese, strict=True)]
    else:
        left, right = cut(left, unit, tokenizer, False), cut(right, unit, tokenizer, False)
    n = len(left)
    return figures_of(token_table([*left, *right], unique, weighted), np.arange(n), np.arange(n, 2 * n))


def _batches(left: list[Text], right: list[Text]) -> list[tuple[int, int]]:
    """Ranges of pairs that are numbered together, so that memory is bounded by a batch or by the longest pair."""
    ranges, first, size = [], 0, 0
    for k, (h, r) in enumerate(zip(left, right, strict=True)):
        if k > first and size + len(h) + len(r) > _BATCH:
            ranges.append((first, k))
            first, size = k, 0
        size += len(h) + len(r)
    if left:
        ranges.append((first, len(left)))
    return ranges
