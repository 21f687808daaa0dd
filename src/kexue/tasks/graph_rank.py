"""Summaries without training: which pieces a text is about (TextRank 图排序), and an extract of them (抽取).

Source: Mihalcea & Tarau 2004, "TextRank: Bringing Order into Texts", the baseline of an extractor as that of 科学空间
8046 (SPACES:“抽取-生成”式长文本摘要); the penalty of repetition follows Carbonell & Goldstein 1998 (MMR).

Let A (n, G) hold count * idf, idf = ln(n / df) + 1, of n-gram g in piece i, each row divided by its length, W = A A^T
without its diagonal the cosines, s its row sums, d the damping. The ranks are those of a reader who goes on to a
similar piece with probability d:

    x = d W diag(1 / s) x + (1 - d) / n,    sum x = 1

The n-grams are words in lower case, without the punctuation at their ends, and in scripts without spaces pairs of
neighbouring characters.

What we do differently, and why: TextRank compares two sentences by the number of words that both have, divided by the
logarithms of their lengths; the cosine also knows which words are rare. W has n^2 entries and A few, so W is never
formed: W x = A (A^T x) - diag(A A^T) x. With x = sqrt(s) y the system is symmetric and positive definite with condition
(1 + d) / (1 - d), so that some 40 steps of conjugate gradients solve it to 12 digits, whatever n is. What a piece
repeats is the share of its n-grams that the chosen ones have brought, which needs no matrix either.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import sparse

from kexue._checks import check_choice, check_int, check_real
from kexue.tasks._cosines import block_rows, unit_rows
from kexue.tasks._rouge_tokens import Tokenizer, check_tokenizer, cut_by, numbered
from kexue.tasks._text_words import has_chinese, linked_grams
from kexue.tasks.rouge_metric import cut

__all__ = ["select_pieces", "text_rank"]

# The product with W, its row sums (n,), and which pieces have a neighbour at all (n,).
Graph = tuple[Callable[[NDArray[Any]], NDArray[Any]], NDArray[np.float64], NDArray[np.bool_]]
_TOLERANCE = 1e-12  # of the residual, relative to the right-hand side
_STEPS = 10_000


def text_rank(
    pieces: Iterable[str] | Any, damping: float = 0.85, *, tokenizer: Tokenizer | None = None, neighbors: int = 100
) -> NDArray[np.float64]:
    """Rank the pieces of a text by how central they are.

    For texts, time and memory are linear in their n-grams. For vectors, time is O(n^2 D) and memory O(n neighbors)
    and about 32 MB for a block of cosines.

    Args:
        pieces: n pieces, or an (n, D) array or tensor of their vectors. Vectors of length 0 are similar to nothing, and
            only positive cosines count.
        damping: In [0, 1): how much the other pieces decide.
        tokenizer: A function from a piece to its n-grams, instead of words and pairs of characters.
        neighbors: Of vectors, the edges that each piece has: to its nearest ones.

    Returns:
        (n,) ranks, positive, with sum 1. A piece that has nothing in common with another one has the lowest.

    Raises:
        TypeError: Pieces that are no str, vectors that are no numbers, a number that is none.
        ValueError: Vectors that are no matrix or not finite, a damping outside [0, 1), neighbors below 1.

    Reference:
        https://aclanthology.org/W04-3252

    Example:
        >>> text_rank(["猫喜欢吃鱼。", "狗喜欢吃肉。", "猫和狗都喜欢吃。", "今天下雨。"]).argmax()
        np.int64(0)
    """
    check_real("damping", damping, minimum=0)
    if damping >= 1:
        raise ValueError(f"damping must be below 1; got {damping!r}")
    check_int("neighbors", neighbors, 1)
    check_tokenizer(tokenizer)
    if getattr(pieces, "ndim", 1) != 1:
        return _walk(_nearest(_vectors(pieces), int(neighbors)), float(damping))
    return _walk(_similarity(piece_grams(_texts(pieces), tokenizer)), float(damping))


def select_pieces(
    pieces: Iterable[str],
    scores: ArrayLike,
    budget: int,
    unit: Literal["char", "word", "piece"] = "char",
    redundancy: float = 0.5,
    *,
    tokenizer: Tokenizer | None = None,
) -> list[int]:
    """Take the best pieces that fit a budget, without saying the same twice.

    Step by step the piece with the highest ``score * (1 - redundancy * repeated)`` is taken among those that still fit,
    where ``repeated`` is the share of its n-grams that the pieces taken so far have. Memory is linear.

    Args:
        pieces: n pieces.
        scores: (n,) scores that are not negative, such as ranks or probabilities; ``range(n, 0, -1)`` with redundancy 0
            takes the opening.
        budget: How long the extract may be at most. If no piece fits, it is the one with the highest score. Blank
            pieces are not taken.
        unit: What the budget counts: characters, words (as :func:`kexue.tasks.rouge` counts them) or pieces.
        redundancy: In [0, 1]; 0 does not look at repetitions. Otherwise a piece whose n-grams have all been said is
            not taken.
        tokenizer: A function from a piece to its n-grams, instead of words and pairs of characters.

    Returns:
        Indices in the order of the document.

    Raises:
        TypeError: Pieces that are no str, scores that are no numbers, a budget that is no integer.
        ValueError: Scores of another shape, negative or not finite; a budget below 1; a redundancy outside [0, 1].
        ImportError: A budget of words of a Chinese text without jieba (extra ``zh``).

    Example:
        >>> pieces = ["猫喜欢吃鱼。", "猫喜欢吃鱼！", "今天下雨。", "狗喜欢吃肉。"]
        >>> select_pieces(pieces, [0.9, 0.8, 0.1, 0.5], budget=12)
        [0, 3]
    """
    texts = _texts(pieces)
    check_int("budget", budget, 1)
    check_choice("unit", unit, ("char", "word", "piece"))
    check_real("redundancy", redundancy, minimum=0)
    if redundancy > 1:
        raise ValueError(f"redundancy must be at most 1; got {redundancy!r}")
    check_tokenizer(tokenizer)
    values = _numbers("scores", scores).astype(np.float64)
    if values.shape != (len(texts),):
        raise ValueError(f"scores must have one value for each of {len(texts)} pieces; got shape {values.shape}")
    if not (np.isfinite(values).all() and (values >= 0).all()):
        raise ValueError(f"scores must be finite and not negative; got {values.min()} to {values.max()}")
    if not texts:
        return []
    costs = _costs(texts, unit)
    grams = piece_grams(texts, tokenizer) if redundancy else None
    chosen = _chosen(values, costs, int(budget), float(redundancy), grams)
    return sorted(chosen) or [int(np.where(costs > 0, values, -1).argmax())]


def piece_grams(texts: list[str], tokenizer: Callable[[str], Iterable[Any]] | None = None) -> Any:
    """(n, G) sparse table: how often each piece has each n-gram."""
    ids, starts, known = numbered(cut_by(tokenizer or linked_grams, text) for text in texts)
    table = sparse.csr_array((np.ones(len(ids)), ids, starts), (len(texts), max(1, len(known))))
    table.sum_duplicates()
    return table


def _similarity(table: Any) -> Graph:
    """Cosines of the rows, counts times idf."""
    n = table.shape[0]
    holders = np.bincount(table.indices, minlength=table.shape[1])
    rows = np.repeat(np.arange(n), np.diff(table.indptr))
    values = table.data * (np.log(max(1, n) / np.maximum(holders, 1)) + 1)[table.indices]
    values /= np.sqrt(np.bincount(rows, values**2, n))[rows]
    shared = holders[table.indices] > 1  # n-grams of one piece alone make no edge
    edges = np.bincount(rows[shared], minlength=n)
    starts = np.concatenate([[0], np.cumsum(edges)])
    keep = sparse.csr_array((values[shared], table.indices[shared], starts), table.shape)
    back = keep.T.tocsr()
    own = np.bincount(rows[shared], values[shared] ** 2, n)

    def product(x: NDArray[Any]) -> NDArray[Any]:
        return keep @ (back @ x) - own * x

    sums = product(np.ones(n))
    return product, sums, (edges > 0) & (sums > 0)


def _nearest(vectors: NDArray[Any], neighbors: int) -> Graph:
    """Cosines of vectors: of each piece those with its nearest ones, in either direction."""
    n, rows = len(vectors), unit_rows(vectors)
    neighbors = min(neighbors, n - 1)
    found: list[tuple[NDArray[Any], NDArray[Any], NDArray[Any]]] = []
    size = block_rows(n, rows.itemsize)
    for first in range(0, n, size) if neighbors > 0 else ():
        block = rows[first : first + size] @ rows.T
        block[np.arange(len(block)), np.arange(first, first + len(block))] = -1
        columns = np.argpartition(block, n - neighbors, axis=1)[:, n - neighbors :]
        values = np.take_along_axis(block, columns, 1)
        where, k = np.nonzero(values > 0)
        found.append((where + first, columns[where, k], values[where, k]))
    edges = sparse.csr_array((n, n))
    if found:
        left, right, cosine = (np.concatenate(part) for part in zip(*found, strict=True))
        edges = sparse.csr_array((cosine.astype(np.float64), (left, right)), (n, n))
        edges = edges.maximum(edges.T).tocsr()
    sums = np.asarray(edges.sum(axis=1)).ravel()
    return (lambda x: edges @ x), sums, sums > 0


def _walk(graph: Graph, damping: float) -> NDArray[np.float64]:
    """Ranks from the product with W and its row sums, by conjugate gradients."""
    product, sums, linked = graph
    n = len(sums)
    if n == 0:
        return np.zeros(0)
    scale = np.zeros(n)
    scale[linked] = 1 / np.sqrt(sums[linked])
    y = np.zeros(n)
    residual = scale.copy()  # the right-hand side is 1 / sqrt(s): ranks are divided by their sum at the end
    direction = residual.copy()
    power = float(residual @ residual)
    limit = power * _TOLERANCE**2
    for _ in range(_STEPS):
        if power <= limit:
            break
        image = direction - damping * scale * product(scale * direction)
        step = power / float(direction @ image)
        y += step * direction
        residual -= step * image
        power, before = float(residual @ residual), power
        direction = residual + power / before * direction
    ranks = np.where(linked, np.sqrt(np.where(linked, sums, 0)) * y, 1.0)
    result: NDArray[np.float64] = ranks / ranks.sum()
    return result


def _chosen(
    values: NDArray[np.float64], costs: NDArray[np.int64], budget: int, redundancy: float, grams: Any
) -> list[int]:
    """Pieces in the order in which they are taken; pieces that cost nothing are not.

    What a piece is worth only falls, so that the best one is at the top of a heap as soon as its value there is right.
    """
    repeated = np.zeros(len(values), np.int64)
    own = np.ones(len(values), np.int64)
    if grams is not None:
        own = np.maximum(np.diff(grams.indptr), 1)
        holders = grams.T.tocsr()
        said = np.zeros(grams.shape[1], np.bool_)
    heap = [(-value, place) for place, value in enumerate(values.tolist()) if costs[place] > 0]
    heapq.heapify(heap)
    chosen: list[int] = []
    while heap and budget > 0:
        before, place = heap[0]
        now = -float(values[place] * (1 - redundancy * repeated[place] / own[place]))
        if costs[place] > budget or repeated[place] == own[place]:
            heapq.heappop(heap)
        elif now != before:
            heapq.heapreplace(heap, (now, place))
        else:
            heapq.heappop(heap)
            chosen.append(place)
            budget -= int(costs[place])
            if grams is not None:
                new = grams.indices[grams.indptr[place] : grams.indptr[place + 1]]
                for g in new[~said[new]]:
                    repeated[holders.indices[holders.indptr[g] : holders.indptr[g + 1]]] += 1
                said[new] = True
    return chosen


def _costs(texts: list[str], unit: str) -> NDArray[np.int64]:
    if unit == "piece":
        return np.array([not text.isspace() and text != "" for text in texts], np.int64)
    if unit == "word":
        words = cut(list(texts), "word", None, any(has_chinese(text) for text in texts))
        return np.array([len(tokens) for tokens in words], np.int64)
    return np.array([0 if text.isspace() else len(text) for text in texts], np.int64)


def _texts(pieces: Any) -> list[str]:
    if isinstance(pieces, (str, bytes)) or not isinstance(pieces, Iterable):
        raise TypeError(f"pieces must be an iterable of str; got {pieces!r} of type {type(pieces).__name__}")
    texts = list(pieces)
    for text in texts:
        if not isinstance(text, str):
            raise TypeError(f"pieces must be str; got {text!r} of type {type(text).__name__}")
    return texts


def _vectors(vectors: Any) -> NDArray[Any]:
    """(n, D) float32 or float64, checked."""
    array = _numbers("vectors", vectors)
    if array.ndim != 2:
        raise ValueError(f"vectors must be a matrix (pieces, width); got shape {array.shape}")
    array = array.astype(np.float32 if array.dtype.itemsize < 8 and array.dtype.kind == "f" else np.float64)
    if not np.isfinite(array).all():
        raise ValueError("vectors must be finite; got NaN or infinity")
    return array


def _numbers(name: str, given: Any) -> NDArray[Any]:
    """An array or a tensor (which may have a gradient, be on another device, or be bfloat16) as an array."""
    if hasattr(given, "detach"):
        given = given.detach()
        given = (given.float() if str(given.dtype) == "torch.bfloat16" else given).cpu().numpy()
    array = np.asarray(given)
    if array.dtype.kind not in "fiub":
        raise TypeError(f"{name} must be real numbers; got an array of {array.dtype}")
    return array
