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
        length: Most characters; None: as was learned. One piece is taken even if all are longer. A
            generator takes no such orders, so with one the summary is made of whole pieces.
        most: Most pieces; None: as was learned.
    """
    from kexue.tasks.pieces import join_pieces

    flat = unwrapped(text)
    pieces = model.explain([flat])[0]
    if not pieces:
        return Summary("", [], "trained")
    values = np.array([piece.probability for piece in pieces])
    whole = length is not None or most is not None
    if whole:
        taken = _within([piece.text for piece in pieces], values, length, most)
    else:
        taken = [i for i, piece in enumerate(pieces) if piece.chosen]
    found = chosen(flat, [(piece.start, piece.stop) for piece in pieces], taken, values.tolist())
    if whole or not model.uses_generator_:
        return Summary(join_pieces(piece.text for piece in found), found, "trained")
    return Summary(" ".join(model.predict([flat])[0].split()), found, "generated")


def _within(pieces: list[str], values: NDArray[np.float64], length: int | None, most: int | None) -> list[int]:
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
