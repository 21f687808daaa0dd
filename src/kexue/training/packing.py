"""Packing documents into rows of one length (装箱), and batches of them without padding.

    concat     documents are joined, each followed by EOS, and cut every T tokens: no empty place, most documents cut
    best-fit   a document stays in one piece unless it is longer than T; the pieces are put, longest first, into the
               fullest row that still has room (best-fit decreasing): few documents cut, hardly a place empty

Source: best-fit packing is from "Fewer Truncations Improve Language Modeling" (arXiv 2404.10830). The number of steps
here depends on the number of different lengths and not of documents: pieces of one length go into all rows of one fill
at once, with exactly the result of taking them one by one.

Rows are given to a model as one stream ``input_ids (N,)`` with the boundaries of its texts, ``cu_seqlens (B + 1,)``,
and positions that begin anew at each of them: no text sees another one, and nothing is padded.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kexue._checks import check_choice, check_int
from kexue.training._token_ids import check_id, join, ranges
from kexue.training.order import batch_indices

__all__ = ["PackedBatches", "PackedDocuments", "pack_documents"]


@dataclass(frozen=True, repr=False)
class PackedDocuments:
    """What :func:`pack_documents` returns: rows of pieces of documents.

    Args:
        tokens: Ids of all rows, one after the other.
        pieces: (S + 1,) where in ``tokens`` each piece begins.
        rows: (N + 1,) with which piece each row begins.
        documents: (S,) the document that a piece comes from.
        length: Longest row T.
        dropped: Tokens left out, the rest of "concat" that fills no row.

    Example:
        >>> packed = pack_documents([[5, 6, 7], [8, 9], [10], [11, 12, 13, 14, 15]], 4)
        >>> packed
        PackedDocuments: 3 rows of 4 tokens from 4 documents, 8.3 % empty, 1 document cut
        >>> [row.tolist() for row in packed]
        [[11, 12, 13, 14], [5, 6, 7, 10], [8, 9, 15]]
    """

    tokens: NDArray[Any]
    pieces: NDArray[np.int64]
    rows: NDArray[np.int64]
    documents: NDArray[np.int64]
    length: int
    dropped: int = 0

    @property
    def waste(self) -> float:
        """Share of the places in the rows that hold no token."""
        places = len(self) * self.length
        return 1.0 - len(self.tokens) / places if places else 0.0

    @property
    def cut(self) -> int:
        """Number of documents that were cut."""
        return int((np.bincount(self.documents) > 1).sum()) if len(self.documents) else 0

    def __len__(self) -> int:
        return len(self.rows) - 1

    def __getitem__(self, row: int) -> NDArray[Any]:
        """Ids of one row."""
        check_int("row", row, 0)
        if row >= len(self):
            raise IndexError(f"row must be below {len(self)}; got {row}")
        return self.tokens[self.pieces[self.rows[row]] : self.pieces[self.rows[row + 1]]]

    def __repr__(self) -> str:
        count, cut = len(np.unique(self.documents)), self.cut
        rest = f", {self.dropped:,} tokens dropped" if self.dropped else ""
        return (
            f"PackedDocuments: {len(self):,} rows of {self.length:,} tokens from {count:,} documents, "
            f"{100 * self.waste:.1f} % empty, {cut:,} document{'' if cut == 1 else 's'} cut{rest}"
        )


def pack_documents(
    documents: Iterable[Any],
    length: int,
    *,
    method: str = "best-fit",
    eos_token_id: int | None = None,
    vocab_size: int | None = None,
) -> PackedDocuments:
    """Put documents into rows of at most ``length`` tokens.

    Memory: the ids of all documents, twice.

    Args:
        documents: Sequences of token ids (lists, arrays, tensors); empty ones are left out.
        length: Longest row T.
        method: "best-fit" or "concat", see the head of this module.
        eos_token_id: Id that follows each document; "concat" needs it, since nothing else separates documents there.
        vocab_size: Size of the vocabulary, to refuse ids outside of it here and not on the GPU.

    Returns:
        The rows.

    Raises:
        TypeError: A document does not consist of integers.
        ValueError: No document has a token, an id is out of range, or "concat" cannot fill one row.

    Example:
        >>> packed = pack_documents([[5, 6, 7], [8, 9], [10]], 4, method="concat", eos_token_id=3)
        >>> [row.tolist() for row in packed], packed.dropped
        ([[5, 6, 7, 3], [8, 9, 3, 10]], 1)
    """
    check_int("length", length, 1)
    check_choice("method", method, ("best-fit", "concat"))
    if eos_token_id is not None:
        eos_token_id = check_id("eos_token_id", eos_token_id, vocab_size)
    elif method == "concat":
        raise ValueError('method="concat" needs eos_token_id: nothing else would separate the documents')
    if vocab_size is not None:
        check_int("vocab_size", vocab_size, 1)
    if not hasattr(documents, "__iter__"):
        raise TypeError(f"documents must be a sequence of sequences of ids; got {documents!r}")
    tokens, sizes = join("documents", documents, vocab_size)
    which = np.flatnonzero(sizes)
    if not len(which):
        raise ValueError(f"documents must hold at least one token; got {len(sizes)} documents without any")
    sizes = sizes[which]
    if eos_token_id is not None:
        longer = np.full(len(tokens) + len(sizes), eos_token_id, np.int32)
        longer[np.arange(len(tokens)) + np.repeat(np.arange(len(sizes)), sizes)] = tokens
        tokens, sizes = longer, sizes + 1
    if method == "concat":
        return _concat(tokens, sizes, which, int(length))
    return _best_fit(tokens, sizes, which, int(length))


def _concat(tokens: NDArray[Any], sizes: NDArray[Any], which: NDArray[Any], length: int) -> PackedDocuments:
    count = len(tokens) // length
    if count == 0:
        raise ValueError(
            f"the documents have {len(tokens)} tokens with their EOS, fewer than one row of length={length}; make it "
            'shorter, or use method="best-fit"'
        )
    kept = count * length
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    bounds = np.union1d(starts[starts < kept], np.arange(0, kept + 1, length))
    rows = np.searchsorted(bounds, np.arange(0, kept + 1, length))
    owner = which[np.searchsorted(starts, bounds[:-1], side="right") - 1]
    return PackedDocuments(tokens[:kept], bounds, rows, owner, length, len(tokens) - kept)


def _best_fit(tokens: NDArray[Any], sizes: NDArray[Any], which: NDArray[Any], length: int) -> PackedDocuments:
    parts = -(-sizes // length)
    owner = np.repeat(np.arange(len(sizes)), parts)
    number = ranges(parts)
    piece_sizes = np.minimum(sizes[owner] - number * length, length)
    piece_starts = (np.cumsum(sizes) - sizes)[owner] + number * length
    row = best_fit(piece_sizes, length)
    order = np.argsort(row, kind="stable")
    piece_sizes, piece_starts = piece_sizes[order], piece_starts[order]
    chosen = np.repeat(piece_starts, piece_sizes) + ranges(piece_sizes)
    bounds = np.concatenate([[0], np.cumsum(piece_sizes)])
    rows = np.searchsorted(row[order], np.arange(int(row.max()) + 2))
    return PackedDocuments(tokens[chosen], bounds, rows, which[owner[order]], length)


def best_fit(sizes: NDArray[Any], capacity: int) -> NDArray[np.int64]:
    """Row of each piece by best-fit decreasing: longest first, into the fullest row with room, else into a new one.

    Args:
        sizes: (S,) lengths of the pieces, between 1 and ``capacity``.
        capacity: Length of a row.
    """
    order = np.argsort(-sizes, kind="stable")
    falling = sizes[order]
    ends = np.append(np.flatnonzero(np.diff(falling)) + 1, len(falling))
    row = np.empty(len(sizes), np.int64)
    free: dict[int, list[NDArray[np.int64]]] = {}  # room that is left -> rows, in groups
    rooms: list[int] = []  # keys of `free`, rising
    made = start = 0
    for end in ends:
        size = int(falling[start])
        while start < end:
            at = bisect_left(rooms, size)
            room = rooms[at] if at < len(rooms) else capacity
            each = room // size  # the row that was filled stays the fullest with room, until there is none left
            needed = -(-(end - start) // each)
            if at < len(rooms):
                groups = free[room]
                group = groups.pop()
                if len(group) > needed:
                    groups.append(group[needed:])
                    group = group[:needed]
                if not groups:
                    del free[room]
                    rooms.pop(at)
            else:
                group = np.arange(made, made + needed)
                made += int(needed)
            placed = min(end - start, len(group) * each)
            row[order[start : start + placed]] = np.repeat(group, each)[:placed]
            start += int(placed)
            full, rest = divmod(int(placed), each)
            for rows, left in ((group[:full], room - each * size), (group[full:], room - rest * size)):
                if len(rows) and left:
                    if left not in free:
                        insort(rooms, left)
                    free.setdefault(left, []).append(rows)
    return row


class PackedBatches:
    """Batches of packed rows for :func:`kexue.training.fit`, in a fresh order each epoch.

    Args:
        packed: From :func:`pack_documents`.
        batch_size: Rows of one batch, over all ranks.
        seed: Seed of the order.
        rank: See :func:`kexue.training.batch_indices`; without it, ``fit`` gives each process batches of its own.
        world: As above.
        drop_last: As above.
        boundaries: True: a stream ``input_ids`` (N,) with ``cu_seqlens`` (B + 1,) and ``position_ids`` (N,), in which
            no text sees another one. False: ``input_ids`` (B, T) of full rows, as "concat" makes them, in which what
            follows an EOS sees what was before.
        labels: Also ``labels``, the ids themselves, as causal models want them. :class:`MaskedBatches` makes its own.

    Example:
        >>> packed = pack_documents([[5, 6, 7], [8, 9], [10], [11, 12, 13, 14, 15]], 4)
        >>> batch = PackedBatches(packed, batch_size=2, seed=0)(0)
        >>> batch["input_ids"].tolist(), batch["cu_seqlens"].tolist(), batch["position_ids"].tolist()
        ([8, 9, 15, 11, 12, 13, 14], [0, 2, 3, 7], [0, 1, 0, 0, 1, 2, 3])
    """

    def __init__(
        self,
        packed: PackedDocuments,
        batch_size: int,
        *,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        drop_last: bool = False,
        boundaries: bool = True,
        labels: bool = True,
    ) -> None:
        if not isinstance(packed, PackedDocuments):
            raise TypeError(f"packed must come from pack_documents; got {type(packed).__name__}")
        if not boundaries and packed.waste > 0:
            raise ValueError(
                f"boundaries=False needs full rows, as method='concat' makes them; {100 * packed.waste:.2g} % are empty"
            )
        self.packed = packed
        self.boundaries = boundaries
        self.labels = labels
        self._order = (batch_size, len(packed), rank, world, drop_last)
        self.seed = seed
        batch_indices(seed, 0, *self._order)  # bad settings show here

    def __call__(self, step: int) -> dict[str, torch.Tensor]:
        """The batch of a step."""
        packed = self.packed
        chosen = batch_indices(self.seed, step, *self._order)
        first, last = packed.rows[chosen], packed.rows[chosen + 1]
        pieces = np.repeat(first, last - first) + ranges(last - first)
        starts = packed.pieces[pieces]
        sizes = packed.pieces[pieces + 1] - starts
        places = ranges(sizes)
        ids = torch.from_numpy(packed.tokens[np.repeat(starts, sizes) + places].astype(np.int64))
        if not self.boundaries:
            batch = {"input_ids": ids.view(len(chosen), packed.length)}
        else:
            bounds = np.zeros(len(sizes) + 1, np.int32)
            np.cumsum(sizes, out=bounds[1:])
            batch = {
                "input_ids": ids,
                "cu_seqlens": torch.from_numpy(bounds),
                "position_ids": torch.from_numpy(places),
            }
        return batch | {"labels": batch["input_ids"].clone()} if self.labels else batch
