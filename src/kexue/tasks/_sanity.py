"""Does index 0 of the next-sentence head mean IsNext? A look at pairs whose answer is known."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from kexue.tasks._prompts import check_texts
from kexue.tasks.next_sentence import NextSentenceScorer

#: Pairs that follow each other, each of another subject, so that one's first half never fits another's second half.
BUILT_IN: tuple[tuple[tuple[str, str], ...], ...] = (
    (
        ("the river rose after three days of rain.", "by monday the water had reached the bridge."),
        ("she put the bread into the oven.", "half an hour later the kitchen smelled of it."),
        ("the team lost its first game of the season.", "the players hope to win the next one at home."),
        ("the new phone costs less than the old one.", "its battery lasts longer as well."),
    ),
    (
        ("连续下了三天的雨,河水涨了起来。", "到了星期一,水已经漫到桥边。"),
        ("她把面包放进烤箱。", "半小时后,厨房里满是面包的香味。"),
        ("球队输掉了赛季的第一场比赛。", "球员们希望在主场赢下一场。"),
        ("新手机比旧手机便宜。", "它的电池也更耐用。"),
    ),
)


def check_order(scorer: NextSentenceScorer, pairs: Any, prompts: Sequence[str]) -> None:
    """Warn if the logits seem to stand in the other order.

    Every first text is scored with its own second text and with the others. With a head in the right order its own
    scores clearly higher. Warned is if pairs that follow each other count as not following and score clearly lower than
    the others; or if they do so by a margin that no untrained head has (log-odds below -1) without scoring higher.

    Args:
        scorer: The model.
        pairs: Pairs of texts that follow each other; None: built-in ones in English and Chinese, whichever the
            tokenizer knows; if it knows neither, each prompt followed by itself. An empty list checks nothing.
        prompts: The prompts.

    Raises:
        TypeError: ``pairs`` is not a list of pairs of str.
    """
    found: list[Sequence[tuple[str, str]]]
    if pairs is None:
        chosen: list[Sequence[tuple[str, str]]] = [known for known in BUILT_IN if _known(scorer, known) >= 2 / 3]
        found = chosen or [[(prompt, prompt) for prompt in list(prompts)[:4]]]
    else:
        own_pairs = _given(pairs)
        found = [own_pairs] if own_pairs else []
    for group in found:
        first, second = ([pair[side] for pair in group] for side in (0, 1))
        n = len(group)
        scores = scorer.pairs([a for a in first for _ in second], second * n, show_progress=False).reshape(n, n)
        own = float(np.diag(scores).mean())
        contrast = own - float(scores[~np.eye(n, dtype=bool)].mean()) if n > 1 else 0.0
        if (own < 0 and contrast < -1) or (own < -1 and contrast < 1):
            other = 1 - scorer.is_next_index
            warnings.warn(
                f"the next-sentence head seems to be in reversed order: pairs that follow each other have log-odds "
                f"{own:.2f}, {contrast:+.2f} against pairs that do not, such as {group[0][0]!r} | {group[0][1]!r}. Try "
                f"is_next_index={other}; pass sanity_pairs=[(first, second), ...] in the language of the model to "
                "check it, or sanity_pairs=[] to check nothing",
                UserWarning,
                stacklevel=4,
            )


def _known(scorer: NextSentenceScorer, group: Sequence[tuple[str, str]]) -> float:
    """Share of tokens that the tokenizer knows."""
    unknown = getattr(scorer.tokenizer, "unk_token_id", None)
    ids = [x for row in scorer.encode([text for pair in group for text in pair]) for x in row]
    return sum(x != unknown for x in ids) / len(ids) if ids else 0.0


def _given(pairs: Any) -> list[tuple[str, str]]:
    if isinstance(pairs, str) or not isinstance(pairs, Sequence):
        raise TypeError(f"sanity_pairs must be a list of pairs of str; got {type(pairs).__name__}")
    found = []
    for pair in pairs:
        texts = check_texts("sanity_pairs", pair)
        if len(texts) != 2:
            raise ValueError(f"sanity_pairs must hold pairs of texts; got {pair!r}")
        found.append((texts[0], texts[1]))
    return found
