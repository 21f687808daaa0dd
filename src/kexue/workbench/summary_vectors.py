"""Summaries without pairs to learn from: the pieces of a text whose vectors are nearest to that of the whole text.

    score_i = cos(v_i, v) + 0.25 / (1 + i)
    taken one after another: the i of greatest  score_i - 0.5 max over taken j of cos(v_i, v_j)

v_i is the vector of piece i by the encoder of a workspace, v that of the whole text, and the bonus is for the opening:
measured on titles of abstracts (Chinese) and first lines of documentation (English), it is better than centrality alone
and than the opening alone. Time and memory grow with the text, not with its square.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from kexue.workbench.summary_text import Summary, chosen, sentence_spans, unwrapped

if TYPE_CHECKING:
    from kexue.workbench.parts import Parts

__all__ = ["rank_pieces", "summarize_by_vectors", "take_pieces"]

OPENING = 0.25  # bonus of the first piece
REPEATED = 0.5  # how much of the cosine with a piece that was taken already is held against a piece
SHARE = 0.2  # of the text, the usual length of a summary
LEAST, MOST = 200, 600  # characters: bounds of the usual length
_BLOCK = 1024  # pieces encoded at a time
_CANDIDATES = 2000  # best pieces among which a summary is chosen


def rank_pieces(parts: Parts, pieces: Sequence[str]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """How well each piece stands for the text.

    Args:
        parts: Of the workspace whose encoder is used.
        pieces: Of the text, in order.

    Returns:
        The scores (N,) and the vectors of the pieces (N, D).
    """
    rows = [parts.tokens.lookup(parts.tokenizer(piece)) for piece in pieces]
    blocks = [parts.encode_ids(rows[start : start + _BLOCK]) for start in range(0, len(rows), _BLOCK)]
    vectors = np.concatenate(blocks) if blocks else np.zeros((0, 0), np.float32)
    if not len(vectors):
        return np.zeros(0, np.float32), vectors
    whole = parts.encode_ids([np.concatenate(rows)])[0]
    bonus = OPENING / (1 + np.arange(len(pieces), dtype=np.float32))
    return vectors @ whole + bonus, vectors


def take_pieces(
    pieces: Sequence[str], scores: NDArray[np.float32], vectors: NDArray[np.float32], length: int, most: int | None
) -> list[int]:
    """Choose pieces that are good and do not repeat each other, within a length; at least one.

    Args:
        pieces: N pieces.
        scores: (N,).
        vectors: (N, D), rows of length 1 or 0.
        length: Most characters together.
        most: Most pieces; None: as many as fit.

    Returns:
        Numbers of pieces, ascending.
    """
    sizes = np.array([len(piece) for piece in pieces])
    fitting = np.flatnonzero(sizes <= length) if (sizes <= length).any() else np.arange(len(sizes))
    order = fitting[np.argsort(-scores[fitting], kind="stable")[:_CANDIDATES]]
    near = np.zeros(len(order), np.float32)
    seen: set[str] = set()
    open_ = np.ones(len(order), bool)
    taken: list[int] = []
    left = length
    while open_.any() and (most is None or len(taken) < most):
        value = np.where(open_, scores[order] - REPEATED * near, -np.inf)
        best = int(np.argmax(value))
        place = int(order[best])
        open_[best] = False
        if pieces[place] in seen:
            continue
        seen.add(pieces[place])
        taken.append(place)
        left -= int(sizes[place])
        open_ &= sizes[order] <= left
        near = np.maximum(near, vectors[order] @ vectors[place])
    return sorted(taken)


def summarize_by_vectors(parts: Parts, text: str, length: int | None = None, most: int | None = None) -> Summary:
    """Summarise a text with the vectors of a workspace.

    Args:
        parts: Of the workspace.
        text: The text.
        length: Most characters; None: a fifth of the text, at least 200 and at most 600. One sentence is taken even
            if all are longer. Below the mean length of a sentence, parts of sentences are taken.
        most: Most sentences; None: as many as fit.
    """
    from kexue.tasks.pieces import join_pieces, piece_spans

    flat = unwrapped(text)
    spans = sentence_spans(flat)
    if not spans:
        return Summary("", [], "vectors")
    if length is None:
        usual = int(min(max(SHARE * len(text), LEAST), MOST))
        length = usual if most is None else len(text)
    elif length * len(spans) < sum(stop - start for start, stop in spans):
        spans = piece_spans(flat)
    pieces = [" ".join(flat[start:stop].split()) for start, stop in spans]
    scores, vectors = rank_pieces(parts, pieces)
    found = chosen(flat, spans, take_pieces(pieces, scores, vectors, length, most), scores.tolist())
    return Summary(join_pieces(piece.text for piece in found), found, "vectors")
