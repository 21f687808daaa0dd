"""Which pieces of a document a summary was made from: the labels of an extractor (摘要片段匹配,抽取标签).

Source: 科学空间 8046 (SPACES:“抽取-生成”式长文本摘要).

Let T be the pieces of the document, S those of the summary and main the score of :func:`kexue.tasks.rouge`.

    independent  the article's rule: each S[i] takes argmax_j main(T[j], S[i])
    monotone     the rule of the author's code: the longest S[i] takes its argmax j; what stands before it in the
                 summary is matched within T[:j + 1], what stands after it within T[j:], and so on: never crossing
    greedy       the rule of SummaRuNNer: add the piece that raises R1 + R2 of the set most, until none does

The first one wins on ties, one piece may serve several, and the labels are all pieces that were taken. The article's
principle is completeness: what the extractor drops, the generator cannot bring back.

What we do differently, and why: the author's recursion asks a ROUGE package for every pair anew. Here all texts become
numbers once, each row of the |S| x |T| table of scores is computed at most once, where it is looked at (so memory is
linear), the recursion is a list of ranges, and the greedy rule keeps counts of what each piece would add.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from kexue._checks import check_choice, check_real
from kexue.tasks._rouge_kernel import greedy_choice
from kexue.tasks._rouge_tokens import Text, Tokenizer, Tokens, as_tokens, check_unit, token_table
from kexue.tasks._text_words import has_chinese
from kexue.tasks.rouge_metric import cut, figures_of, main_score

__all__ = ["align_extract", "align_pairs"]

_RULES = ("monotone", "independent", "greedy")


def align_extract(
    pieces: Iterable[Text],
    reference_pieces: Iterable[Text],
    rule: Literal["monotone", "independent", "greedy"] = "monotone",
    min_score: float = 0.0,
    unit: Literal["char", "word"] = "char",
    tokenizer: Tokenizer | None = None,
) -> list[int]:
    """Find the pieces of a document that its summary was made from.

    Time is O(characters of the document * pieces of the summary) with a 64th for the subsequences, memory is linear.

    Args:
        pieces: The document, as :func:`kexue.tasks.split_pieces` cuts it (or lists of tokens).
        reference_pieces: The summary, cut in the same way.
        rule: See the head of this module.
        min_score: Matches that score less are dropped at the end; with 0, the author's way, a piece of the summary
            that has nothing in common with the document takes the first piece of its range. Under ``"greedy"``: what
            a piece must add to R1 + R2.
        unit: ``"char"`` (the author's choice for matching) or ``"word"``, as in :func:`kexue.tasks.rouge`.
        tokenizer: A function from a text to its tokens, instead of ``unit``.

    Returns:
        Sorted indices into ``pieces``, without repetitions; none without pieces on either side.

    Raises:
        TypeError: Pieces that are no texts, one str instead of many, a ``min_score`` that is no number.
        ValueError: An unknown rule or unit, a negative or infinite ``min_score``.
        ImportError: Words of a Chinese text without jieba (extra ``zh``) and without a tokenizer.

    Reference:
        https://spaces.ac.cn/archives/8046

    Example:
        >>> document = ["原告诉称：", "被告向原告借款三万元，", "约定一年后偿还，", "被告至今未还。", "判决如下："]
        >>> align_extract(document, ["被告借款三万元，", "至今未还。"])
        [1, 3]
    """
    check_choice("rule", rule, _RULES)
    if rule == "greedy":
        tokens, count, _ = _table(pieces, reference_pieces, min_score, unit, tokenizer, flat=True)
        return _greedy(tokens, count, float(min_score))
    return sorted({j for _, j, _ in _matches(pieces, reference_pieces, rule, min_score, unit, tokenizer)})


def align_pairs(
    pieces: Iterable[Text],
    reference_pieces: Iterable[Text],
    rule: Literal["monotone", "independent"] = "monotone",
    min_score: float = 0.0,
    unit: Literal["char", "word"] = "char",
    tokenizer: Tokenizer | None = None,
) -> list[tuple[int, int]]:
    """The matches behind the labels of :func:`align_extract`: (i, j), piece i of the summary with piece j, by i."""
    check_choice("rule", rule, _RULES[:2])
    return [(i, j) for i, j, _ in _matches(pieces, reference_pieces, rule, min_score, unit, tokenizer)]


def _matches(
    pieces: Iterable[Text],
    reference_pieces: Iterable[Text],
    rule: str,
    min_score: float,
    unit: str,
    tokenizer: Tokenizer | None,
) -> list[tuple[int, int, float]]:
    """(i, j, score) of the independent or the monotone rule, by i."""
    tokens, count, lengths = _table(pieces, reference_pieces, min_score, unit, tokenizer, flat=False)
    found = []
    ranges = [(0, count, 0, len(lengths))]  # pieces of the document, pieces of the summary
    while ranges:
        a, b, c, d = ranges.pop()
        if a >= b or c >= d:
            continue
        i = c + int(lengths[c:d].argmax())
        scores = main_score(figures_of(tokens, np.arange(a, b), np.full(b - a, count + i))[:, :, 2])
        j = a + int(scores.argmax())
        found.append((i, j, float(scores[j - a])))
        ranges += [(a, b, c, i), (a, b, i + 1, d)] if rule == "independent" else [(a, j + 1, c, i), (j, b, i + 1, d)]
    return sorted(match for match in found if match[2] >= min_score)


def _table(
    pieces: Iterable[Text],
    reference_pieces: Iterable[Text],
    min_score: float,
    unit: str,
    tokenizer: Tokenizer | None,
    flat: bool,
) -> tuple[Tokens, int, NDArray[np.int64]]:
    """All pieces as one table, those of the document first, their number, and the lengths of those of the summary.

    ``flat`` joins those of the summary to one text.
    """
    check_unit(unit, None, True, tokenizer)
    check_real("min_score", min_score, minimum=0)
    both = []
    for name, given in (("pieces", pieces), ("reference_pieces", reference_pieces)):
        if isinstance(given, (str, bytes)) or not isinstance(given, Iterable):
            raise TypeError(f"{name} must be an iterable of texts; got {given!r} of type {type(given).__name__}")
        both.append([as_tokens(f"each of {name}", text) for text in given])
    document, summary = both
    lengths = np.array([len(text) for text in summary], np.int64)
    chinese = unit == "word" and any(isinstance(text, str) and has_chinese(text) for text in [*document, *summary])
    document, summary = (cut(texts, unit, tokenizer, chinese) for texts in both)
    if flat:
        summary = [[token for text in summary for token in ("".join(text.split()) if isinstance(text, str) else text)]]
    return token_table([*document, *summary], unique=True, weighted=False), len(document), lengths


def _greedy(tokens: Tokens, count: int, min_gain: float) -> list[int]:
    """Labels by the greedy rule; the last text of the table is the summary."""
    keys = np.concatenate([tokens.ones, tokens.twos])  # 2-grams are numbered beyond all 1-grams
    rows = np.concatenate(
        [np.repeat(np.arange(count + 1), np.diff(starts)) for starts in (tokens.one_starts, tokens.two_starts)]
    )
    names, grams = np.unique(keys, return_inverse=True)
    wanted = np.zeros(len(names), np.bool_)
    wanted[grams[rows == count]] = True
    kinds = (names >= tokens.width).astype(np.int64)
    order = np.argsort(rows, kind="stable")
    order = order[rows[order] < count]
    starts = np.searchsorted(rows[order], np.arange(count + 1)).astype(np.int64)
    sizes: NDArray[np.int64] = np.bincount(kinds[wanted], minlength=2).astype(np.int64)
    return sorted(greedy_choice(grams[order].astype(np.int64), starts, wanted, kinds, sizes, min_gain).tolist())
