"""The edits of CGMH on a batch of sentences with protected keywords: where they may happen, and what they make.

A state is (ids, starts): the tokens, and where each keyword begins. C chains are one ``Batch`` of arrays. Everything
that the acceptance needs is counted here, in the same way for the running chains and for the transition matrix:

    slots(x)      n + 1 less the places inside a keyword of several tokens: n + 1 - sum_k (len_k - 1)
    deletable(x)  tokens outside the keywords: n - sum_k len_k
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kexue.generation._states import Ids
from kexue.generation.constraints import AllOf

OPERATIONS = ("insert", "delete", "replace", "swap", "skip")
INSERT, DELETE, REPLACE, SWAP, SKIP = range(5)

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]
Floats = NDArray[np.float64]


def parts_of(constraint: Any) -> tuple[Any, ...]:
    """The constraints that a composition is made of; none for None."""
    return () if constraint is None else constraint.parts if isinstance(constraint, AllOf) else (constraint,)


@dataclass
class Batch:
    """N states. Tokens past the length are 0.

    Attributes:
        ids: (N, W) token ids.
        lengths: (N,) number of tokens.
        starts: (N, k) first position of each keyword.
    """

    ids: Ints
    lengths: Ints
    starts: Ints

    def __len__(self) -> int:
        return len(self.lengths)

    def rows(self, chosen: Ints | Bools) -> Batch:
        """Some of the states."""
        return Batch(self.ids[chosen], self.lengths[chosen], self.starts[chosen])

    def put(self, rows: Ints, other: Batch) -> None:
        """Overwrite some of the states."""
        self.ids[rows], self.lengths[rows], self.starts[rows] = other.ids, other.lengths, other.starts

    def tuples(self) -> list[Ids]:
        """The token ids alone."""
        return [tuple(row[:n]) for row, n in zip(self.ids.tolist(), self.lengths.tolist(), strict=True)]

    @classmethod
    def of(cls, states: Sequence[tuple[Ids, tuple[int, ...]]], width: int, keywords: int) -> Batch:
        """Arrays of a list of states (ids, starts)."""
        ids = np.zeros((len(states), width), np.int64)
        for row, (tokens, _) in enumerate(states):
            ids[row, : len(tokens)] = tokens
        lengths = np.array([len(tokens) for tokens, _ in states], np.int64)
        starts = np.array([s for _, s in states], np.int64).reshape(len(states), keywords)
        return cls(ids, lengths, starts)


@dataclass(frozen=True)
class Edits:
    """Which edits a list of keywords leaves open.

    Attributes:
        keywords: Token ids of each keyword.
        ordered: They stay in the order of the list.
        low: Least length.
        high: Greatest length, the width of the arrays.
    """

    keywords: tuple[Ids, ...]
    ordered: bool
    low: int
    high: int

    @property
    def widths(self) -> Ints:
        """(k,) tokens of each keyword."""
        return np.array([len(word) for word in self.keywords], np.int64)

    def slots(self, lengths: Ints) -> Ints:
        """(N,) places where a token may be inserted."""
        return lengths + 1 - int((self.widths - 1).sum())

    def deletable(self, lengths: Ints) -> Ints:
        """(N,) tokens that belong to no keyword."""
        return lengths - int(self.widths.sum())

    def possible(self, op: Ints, lengths: Ints) -> Bools:
        """(N,) whether the operation can be carried out at all; swaps are judged one by one."""
        free = self.deletable(lengths)
        return (
            ((op == INSERT) & (lengths < self.high))
            | ((op == DELETE) & (free > 0) & (lengths > self.low))
            | ((op == REPLACE) & (free > 0))
            | (op == SWAP)
        )

    def slot_mask(self, batch: Batch) -> Bools:
        """(N, W + 1) True at places for an insertion: place s lies before token s."""
        place = np.arange(self.high + 1)
        open_ = place <= batch.lengths[:, None]
        for k, width in enumerate(self.widths):
            start = batch.starts[:, k, None]
            open_ &= (place <= start) | (place >= start + width)
        return open_

    def free_mask(self, batch: Batch) -> Bools:
        """(N, W) True at tokens that belong to no keyword."""
        place = np.arange(self.high)
        free = place < batch.lengths[:, None]
        for k, width in enumerate(self.widths):
            start = batch.starts[:, k, None]
            free &= (place < start) | (place >= start + width)
        return free

    def choose(self, batch: Batch, op: Ints, uniform: Floats) -> Ints:
        """(N,) a position for each edit, uniform over those that are open to it."""
        mask = np.where((op == INSERT)[:, None], self.slot_mask(batch), np.pad(self.free_mask(batch), ((0, 0), (0, 1))))
        count = mask.sum(1)
        rank = np.minimum((uniform * count).astype(np.int64), np.maximum(count - 1, 0))
        return (mask.cumsum(1) > rank[:, None]).argmax(1)

    def open_hole(self, batch: Batch, op: Ints, position: Ints) -> Batch:
        """The sentence with a hole (token 0) at ``position``: one token longer where something is inserted.

        The hole and what stands around it are all that a proposal may look at.
        """
        place = np.arange(self.high)
        shifted = np.pad(batch.ids, ((0, 0), (1, 0)))[:, :-1]
        inserting = (op == INSERT)[:, None]
        ids = np.where(inserting & (place > position[:, None]), shifted, batch.ids)
        ids[np.arange(len(batch)), position] = 0
        starts = batch.starts + (inserting & (batch.starts >= position[:, None]))
        return Batch(ids, batch.lengths + (op == INSERT), starts)

    def fill(self, hole: Batch, position: Ints, tokens: Ints) -> Batch:
        """A token into each hole."""
        ids = hole.ids.copy()
        ids[np.arange(len(hole)), position] = tokens
        return Batch(ids, hole.lengths, hole.starts)

    def close(self, hole: Batch, position: Ints) -> Batch:
        """The sentence without the hole, one token shorter."""
        place = np.arange(self.high)
        shifted = np.pad(hole.ids, ((0, 0), (0, 1)))[:, 1:]
        ids = np.where(place >= position[:, None], shifted, hole.ids)
        return Batch(ids, hole.lengths - 1, hole.starts - (hole.starts > position[:, None]))

    def units(self, length: int, starts: Sequence[int]) -> list[tuple[int, int]]:
        """What a swap moves: (begin, end) of each keyword and of each other token, from left to right."""
        ends = {int(start): int(start + width) for start, width in zip(starts, self.widths, strict=True)}
        found, i = [], 0
        while i < length:
            end = ends.get(i, i + 1)
            found.append((i, end))
            i = end
        return found

    def swap(self, ids: Ids, starts: tuple[int, ...], a: int, b: int) -> tuple[Ids, tuple[int, ...]] | None:
        """The state after units ``a`` and ``b`` have changed places; None if that would break the order of keywords."""
        units = self.units(len(ids), starts)
        owner = {start: k for k, start in enumerate(starts)}
        order = list(range(len(units)))
        order[a], order[b] = order[b], order[a]
        tokens: list[int] = []
        moved = [0] * len(starts)
        for unit in order:
            begin, end = units[unit]
            if begin in owner:
                moved[owner[begin]] = len(tokens)
            tokens.extend(ids[begin:end])
        # Equal keywords are told apart by their order alone: the first of the list stands first.
        for word in set(self.keywords):
            same = [k for k, other in enumerate(self.keywords) if other == word]
            for k, start in zip(same, sorted(moved[k] for k in same), strict=True):
                moved[k] = start
        if self.ordered and any(x > y for x, y in itertools.pairwise(moved)):
            return None
        return tuple(tokens), tuple(moved)

    def swap_pairs(self, length: int, starts: tuple[int, ...]) -> Iterator[tuple[int, int, float]]:
        """All pairs of units (a, b) that a swap may draw, with their probabilities.

        One of the two is a keyword, drawn uniformly, if there are keywords: other words need no swap to move about.
        The probability of a pair depends only on which of the two are keywords, so the swap back is as likely.
        """
        units = self.units(length, starts)
        first = [u for u, (begin, _) in enumerate(units) if begin in starts] if starts else range(len(units))
        if len(units) < 2:
            return
        chance = 1.0 / (len(first) * (len(units) - 1))
        for a in first:
            for b in range(len(units)):
                if b != a:
                    yield a, b, chance

    def draw_swap(self, length: int, starts: tuple[int, ...], u: float, v: float) -> tuple[int, int] | None:
        """One pair as in :meth:`swap_pairs`, from two uniform numbers."""
        units = self.units(length, starts)
        first = [i for i, (begin, _) in enumerate(units) if begin in starts] if starts else range(len(units))
        if len(units) < 2:
            return None
        a = first[min(int(u * len(first)), len(first) - 1)]
        b = min(int(v * (len(units) - 1)), len(units) - 2)
        return a, b + (b >= a)

    def enumerate(self, vocab: Sequence[int], high: int) -> Iterator[tuple[Ids, tuple[int, ...]]]:
        """All states with free tokens from ``vocab`` and at most ``high`` tokens."""
        total = int(self.widths.sum())
        for length in range(max(self.low, total), high + 1):
            for starts in self._layouts(length):
                frame = [-1] * length
                for start, word in zip(starts, self.keywords, strict=True):
                    frame[start : start + len(word)] = word
                free = [i for i, token in enumerate(frame) if token < 0]
                for tokens in itertools.product(vocab, repeat=len(free)):
                    for i, token in zip(free, tokens, strict=True):
                        frame[i] = token
                    yield tuple(frame), starts

    def _layouts(self, length: int) -> Iterator[tuple[int, ...]]:
        """All disjoint places of the keywords; equal keywords in the order of the list."""
        k = len(self.keywords)
        gaps = length - int(self.widths.sum())
        orders = [tuple(range(k))] if self.ordered else list(itertools.permutations(range(k)))
        for order in orders:
            rank = {word: place for place, word in enumerate(order)}
            if any(
                self.keywords[i] == self.keywords[j] and rank[i] > rank[j]
                for i, j in itertools.combinations(range(k), 2)
            ):
                continue
            for cut in itertools.combinations_with_replacement(range(gaps + 1), k):
                starts, taken = [0] * k, 0
                for word, before in zip(order, cut, strict=True):
                    starts[word] = before + taken
                    taken += len(self.keywords[word])
                yield tuple(starts)
