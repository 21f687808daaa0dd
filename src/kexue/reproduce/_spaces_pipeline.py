"""SPACES, part (e): the order of extractors on documentation that every machine has.

Documents are numpy's docstrings without their first line, which is the reference. Of 400 pairs (200 in the small
version) drawn by the seed a quarter is held back; the extractor learns from the rest. All systems get the same pieces
and write what they rank first: the extractor with its learned length, the others one piece, which is what a reference
is long. The oracles know the reference: monotone and independent matching, and the greedy rule.

Rule, fixed before measuring: the mean main metric (words) over the seeds of the trained extractor is above that of
TextRank, this above that of the opening piece, and each of the three oracles is at least .1 above the extractor.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kexue.corpus import installed_documentation
from kexue.reproduce._spaces_part import Part
from kexue.tasks import Summarizer, align_extract, join_pieces, split_pieces, text_rank
from kexue.tasks._summary_data import scores
from kexue.tasks._text_words import tokens

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SYSTEMS = ("opening piece", "TextRank", "trained extractor", "monotone", "independent", "greedy")
ABOVE = 0.1


def _pairs() -> tuple[list[str], list[str]]:
    rest, first = [], []
    for document in installed_documentation(["numpy"]):
        line, _, text = document.text.strip().partition("\n")
        if len(text.strip()) > 200 and len(tokens(line)) > 2 and tokens(text):
            first.append(line.strip())
            rest.append(text.strip())
    return rest, first


def _run(texts: list[str], lines: list[str], count: int, epochs: int, seed: int) -> dict[str, float]:
    order = np.random.default_rng(seed).permutation(len(texts))[:count]
    held, train = order[: count // 4], order[count // 4 :]
    model = Summarizer("en", True, 3, epochs, seed, show_progress=False)
    model.fit([texts[i] for i in train], [lines[i] for i in train])
    documents, wanted = [texts[i] for i in held], [lines[i] for i in held]
    pieces = [split_pieces(text, "en") for text in documents]
    written = {
        "opening piece": [row[0] for row in pieces],
        "TextRank": [row[int(np.argmax(text_rank(row)))] for row in pieces],
        "trained extractor": model.predict(documents),
    }
    for rule in ("monotone", "independent", "greedy"):
        chosen = [
            align_extract(row, split_pieces(line, "en"), rule=rule, unit="word", tokenizer=tokens)
            for row, line in zip(pieces, wanted, strict=True)
        ]
        written[rule] = [join_pieces([row[j] for j in found]) for row, found in zip(pieces, chosen, strict=True)]
    return {name: float(scores(found, wanted, "word").mean()) for name, found in written.items()}


def measure(quick: bool, seed: int) -> Part:
    """Measure the order; see the module for the rule.

    Args:
        quick: One seed, 200 pairs, 4 epochs.
        seed: First of three seeds.
    """
    texts, lines = _pairs()
    seeds = [seed] if quick else [seed, seed + 1, seed + 2]
    found = [_run(texts, lines, *((200, 4) if quick else (400, 10)), s) for s in seeds]
    mean = {name: float(np.mean([one[name] for one in found])) for name in SYSTEMS}
    ours = mean["trained extractor"]

    def draw(axis: Axes) -> None:
        axis.barh(range(len(SYSTEMS)), [mean[name] for name in SYSTEMS], color=["C0"] * 3 + ["C7"] * 3)
        for one in found:
            axis.plot([one[name] for name in SYSTEMS], range(len(SYSTEMS)), "k.", markersize=4)
        axis.set_yticks(range(len(SYSTEMS)), [*SYSTEMS[:3], *(f"oracle, {name}" for name in SYSTEMS[3:])], fontsize=7)
        axis.set(title="(e) extracts: main metric (dots: seeds)")

    return Part(
        {f"main metric, {name}": value for name, value in mean.items()},
        {
            "the trained extractor is above TextRank": ours > mean["TextRank"],
            "TextRank is above the opening piece": mean["TextRank"] > mean["opening piece"],
            "the oracles are well above the extractor": all(mean[name] >= ours + ABOVE for name in SYSTEMS[3:]),
        },
        draw,
    )
