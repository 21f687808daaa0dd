"""Summaries by a trained summarizer, with the pieces that they were made of."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from kexue.workbench.summary_text import Summary, chosen, unwrapped

if TYPE_CHECKING:
    from kexue.tasks import Summarizer

__all__ = ["summarize_by_model"]


def summarize_by_model(model: Summarizer, text: str, length: int | None = None, most: int | None = None) -> Summary:
    """Summarise a text by a trained summarizer.

    Args:
        model: The summarizer.
        text: The text.
        length: Most characters; None: as was learned. One piece is taken even if all are longer. Trimmers and
            generators take no such orders, so with one of them the summary is made of whole pieces.
        most: Most pieces; None: as was learned.
    """
    from kexue.tasks.pieces import join_pieces, piece_spans

    flat = unwrapped(text)
    spans = piece_spans(flat, model._separators)
    if not spans:
        return Summary("", [], "trained")
    pieces = [flat[start:stop] for start, stop in spans]
    values = probabilities_of(model, pieces)
    if length is not None or most is not None:
        taken, method = _within(pieces, values, length, most), "trained"
    else:
        taken, method = _usual(model, pieces, values)
    found = chosen(flat, spans, taken, values.tolist())
    if method == "trained":
        return Summary(join_pieces(piece.text for piece in found), found, method)
    return Summary(" ".join(model.predict([flat])[0].split()), found, method)


def probabilities_of(model: Summarizer, pieces: list[str]) -> NDArray[np.float32]:
    """How likely each piece belongs into the summary."""
    from kexue.tasks._summary_extractor import Pieces, probabilities

    return probabilities(model._labelers, Pieces.joined([model._encode(pieces)]))


def _usual(model: Summarizer, pieces: list[str], values: NDArray[np.float32]) -> tuple[list[int], str]:
    """The pieces that the summary of :meth:`Summarizer.predict` is made of, and how it is made of them."""
    from kexue.tasks._summary_extractor import passing
    from kexue.tasks._text_words import tokens
    from kexue.tasks.summarizer import EXTRACTION

    if model.uses_generator_:
        return passing(values, EXTRACTION), "generated"
    words = [tokens(piece) for piece in pieces]
    if model._trimmer is not None:
        return model._trimmer.extract(values, words), "trimmed"
    return model._selection(values, words), "trained"


def _within(pieces: list[str], values: NDArray[np.float32], length: int | None, most: int | None) -> list[int]:
    """The likeliest pieces that fit, none twice; at least one."""
    sizes = np.array([len(piece) for piece in pieces])
    left = int(sizes.sum()) if length is None else length
    order = np.argsort(-values, kind="stable")
    fitting = order[sizes[order] <= left]
    taken: list[int] = []
    seen: set[str] = set()
    for j in (fitting if len(fitting) else order[:1]).tolist():
        if most is not None and len(taken) == most:
            break
        if pieces[j] in seen or (taken and sizes[j] > left):
            continue
        taken.append(j)
        seen.add(pieces[j])
        left -= int(sizes[j])
    return sorted(taken)
