"""How good summaries are beside the reference ones: ROUGE of a summarizer and of what it has to beat."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from kexue.workbench.summary_text import unwrapped

__all__ = ["baselines", "evaluate_summaries", "usual_length", "usual_pieces"]


def usual_length(summaries: Sequence[str]) -> int:
    """The mean length of summaries in characters, at least 1; it is the budget of methods that learn none."""
    return max(1, round(float(np.mean([len(summary) for summary in summaries])))) if summaries else 1


def usual_pieces(summaries: Sequence[str], separators: Any) -> int:
    """How many pieces summaries have on average, at least 1."""
    from kexue.tasks import split_pieces

    return max(1, round(float(np.mean([len(split_pieces(summary, separators)) for summary in summaries]))))


def baselines(texts: Sequence[str], separators: Any, count: int) -> dict[str, list[str]]:
    """Summaries by methods that learn nothing.

    Args:
        texts: The texts.
        separators: Where texts are cut into pieces, see :func:`kexue.tasks.split_pieces`.
        count: Pieces that TextRank takes; a budget of characters would make it take what is short.

    Returns:
        For lead-1, lead-3 and TextRank a summary of each text.
    """
    from kexue.tasks import select_pieces, split_pieces, text_rank
    from kexue.tasks.pieces import join_pieces

    found: dict[str, list[str]] = {"lead-1": [], "lead-3": [], "TextRank": []}
    for text in texts:
        pieces = split_pieces(unwrapped(text), separators)
        found["lead-1"].append(join_pieces(pieces[:1]))
        found["lead-3"].append(join_pieces(pieces[:3]))
        taken = select_pieces(pieces, text_rank(pieces), count, "piece") if pieces else []
        found["TextRank"].append(join_pieces(pieces[i] for i in taken))
    return found


def evaluate_summaries(
    found: Mapping[str, Sequence[str]], references: Sequence[str], unit: str
) -> list[dict[str, Any]]:
    """Compare summaries with the reference ones.

    Args:
        found: Name of a method -> its summary of each text.
        references: The reference summaries.
        unit: "char" or "word", see :func:`kexue.tasks.rouge`.

    Returns:
        A row for each method: name, rouge-1, rouge-2, rouge-l, main (.2, .4 and .4 of them), documents.
    """
    from kexue.tasks._text_words import word_list
    from kexue.tasks.rouge_metric import rouge_corpus

    rows = []
    for name, summaries in found.items():
        # English words also where a text has a Chinese character in it: that is no reason to need a dictionary
        scores = rouge_corpus(summaries, references, unit, tokenizer=None if unit == "char" else word_list)  # type: ignore[arg-type]
        means = {key: round(float(scores[key].mean()), 4) for key in ("rouge-1", "rouge-2", "rouge-l", "main")}
        rows.append({"name": name, **means, "documents": len(references)})
    return rows
