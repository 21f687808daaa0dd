"""Summaries without pairs to learn from: the pieces of a text whose vectors are nearest to that of the whole text.

    score_i = cos(v_i, v) + 0.25 / (1 + i)
    taken one after another: the i of greatest  score_i - 0.5 max over taken j of cos(v_i, v_j)

v_i is the vector of piece i by the encoder of a workspace, v that of the whole text, and the bonus is for the opening:
measured on titles of abstracts (Chinese) and first lines of documentation (English), it is better than centrality alone
and than the opening alone. Time and memory grow with the text, not with its square.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from kexue.workbench.summary_text import Summary, chosen, sentence_spans, unwrapped
from kexue.workbench.tokens import Ragged

if TYPE_CHECKING:
    from kexue.workbench.parts import Parts

__all__ = ["piece_features", "rank_pieces", "summarize_by_vectors", "take_pieces"]

OPENING = 0.25  # bonus of the first piece
REPEATED = 0.5  # how much of the cosine with a piece that was taken already is held against a piece
SAME = 0.95  # cosine from which on a piece says what another has said
FEWEST_WORDS = 3  # of a sentence: fewer are headings, numbers, remains of tables
WORST = 0.5  # of the best score: what is further from the text is not taken to fill the length
SHARE = 0.2  # of the text, the usual length of a summary
LEAST, MOST = 200, 600  # characters: bounds of the usual length
_BLOCK = 1024  # pieces encoded at a time
_CANDIDATES = 2000  # best pieces among which a summary is chosen


def rank_pieces(parts: Parts, pieces: Sequence[str]) -> tuple[NDArray[np.float32], Ragged]:
    """How well each piece stands for the text.

    Args:
        parts: Of the workspace whose encoder is used.
        pieces: Of the text, in order, at least one.

    Returns:
        The scores (N,), and the words of the pieces as ids.
    """
    words = Ragged.from_rows([parts.tokens.lookup(parts.tokenizer(piece)) for piece in pieces])
    whole = parts.encode_ids([words.values])[0]
    scores = np.empty(len(pieces), np.float32)
    for start in range(0, len(pieces), _BLOCK):
        block = range(start, min(start + _BLOCK, len(pieces)))
        scores[start : start + _BLOCK] = parts.encode_ids([words[i] for i in block]) @ whole
    return scores + OPENING / (1 + np.arange(len(pieces), dtype=np.float32)), words


def piece_features(parts: Parts) -> Callable[[list[str]], NDArray[np.float32]]:
    """An encoder for :class:`kexue.tasks.Summarizer`: hashed n-grams, and how each piece stands for the text.

    Args:
        parts: Of the workspace whose vectors are used.

    Returns:
        A function from the N pieces of a text to an (N, D) array.
    """
    from kexue.tasks._piece_features import PieceEncoder

    hashed = PieceEncoder("hash")

    def features(pieces: list[str]) -> NDArray[np.float32]:
        scores, words = rank_pieces(parts, pieces)
        above = scores - scores.mean()
        rank = np.argsort(np.argsort(-scores, kind="stable"), kind="stable")
        vectors = parts.encode_ids([words[i] for i in range(len(pieces))])
        beside = np.zeros(len(pieces), np.float32)
        beside[1:] = (vectors[1:] * vectors[:-1]).sum(1)
        columns = [scores, above, above / max(2 * scores.std(), 1e-3), 1 / (1 + rank), rank / len(pieces), beside]
        return np.hstack([sparse.csr_array(hashed(pieces)).toarray(), np.stack(columns, 1)]).astype(np.float32)

    return features


def candidates(
    pieces: Sequence[str], scores: NDArray[np.float32], counts: NDArray[np.int64], length: int | None
) -> NDArray[np.int64]:
    """The pieces among which is chosen, best first, none twice: real sentences that fit, or the next best there are.

    Args:
        pieces: N pieces, at least one.
        scores: (N,).
        counts: (N,) words.
        length: Most characters; None: any number.
    """
    sizes = np.fromiter(map(len, pieces), np.int64, len(pieces))
    open_ = np.ones(len(pieces), bool)
    for wanted in (counts >= FEWEST_WORDS, sizes <= (length or sizes.max())):
        open_ = open_ & wanted if (open_ & wanted).any() else open_
    some = np.flatnonzero(open_)
    least = WORST * float(scores[some].max())
    out: dict[str, int] = {}
    for i in some[np.argsort(-scores[some], kind="stable")].tolist():
        if out and scores[i] < least:
            break
        out.setdefault(pieces[i], i)
        if len(out) == _CANDIDATES:
            break
    return np.fromiter(out.values(), np.int64, len(out))


def take_pieces(
    sizes: NDArray[np.int64], scores: NDArray[np.float32], vectors: NDArray[np.float32], length: int, most: int | None,
    strict: bool = True,
) -> list[int]:  # fmt: skip
    """Choose pieces that are good and do not repeat each other, within a length; at least one.

    Args:
        sizes: (N,) characters.
        scores: (N,).
        vectors: (N, D), rows of length 1 or 0.
        length: Characters together.
        most: Most pieces; None: as many as fit.
        strict: Whether the length is the most there may be; else a piece is taken if that brings the length nearer.

    Returns:
        Numbers of pieces, in the order in which they were taken.
    """
    near = np.zeros(len(sizes), np.float32)
    free = np.ones(len(sizes), bool)
    taken: list[int] = []
    while free.any() and (most is None or len(taken) < most):
        best = int(np.argmax(np.where(free, scores - REPEATED * near, -np.inf)))
        taken.append(best)
        length -= int(sizes[best])
        free[best] = False
        free &= sizes <= (length if strict else 2 * length)
        near = np.maximum(near, vectors @ vectors[best])
        free &= near < SAME
    return taken


def summarize_by_vectors(
    parts: Parts, text: str, length: int | None = None, most: int | None = None, *, about: int | None = None
) -> Summary:
    """Summarise a text with the vectors of a workspace.

    Args:
        parts: Of the workspace.
        text: The text.
        length: Most characters, unless every sentence is longer: one is taken in any case.
        most: Most sentences; None: as many as fit.
        about: Characters wanted, if there is no ``length``; None: a fifth of the text, at least 200 and at most 600,
            and with ``most`` as many as these have.

    If the length is below that of a sentence on average, parts of sentences are taken.
    """
    from kexue.tasks.pieces import join_pieces, piece_spans

    flat = unwrapped(text)
    spans = sentence_spans(flat)
    if not spans:
        return Summary("", [], "vectors")
    wanted = length or about
    if wanted is None:
        wanted = len(text) if most is not None else int(min(max(SHARE * len(text), LEAST), MOST))
    if wanted * len(spans) < sum(stop - start for start, stop in spans):
        spans = piece_spans(flat)
    pieces = [" ".join(flat[start:stop].split()) for start, stop in spans]
    scores, words = rank_pieces(parts, pieces)
    best = candidates(pieces, scores, words.lengths, wanted if length else None)
    vectors = parts.encode_ids([words[i] for i in best.tolist()])
    sizes = np.array([len(pieces[i]) for i in best])
    taken = best[take_pieces(sizes, scores[best], vectors, wanted, most, strict=length is not None)]
    found = chosen(flat, spans, taken.tolist(), scores.tolist())
    return Summary(join_pieces(piece.text for piece in found), found, "vectors")
