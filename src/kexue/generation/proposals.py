"""Proposals for Metropolis-Hastings over token sequences, each with the probabilities of both directions (提议分布).

Source: 科学空间 8084, 8194.

A proposal is an object with two methods, over *routes* from x to y (two routes may lead to the same y: a token inserted
on either side of an equal one):

    moves(x) -> [(y, q(y<-x), q(x<-y)), ...]          every route; what is missing to 1 is the mass of "nothing to do"
    sample(x, generator) -> (y, log q(y<-x), log q(x<-y))   one route, or None for "nothing to do"

Each route has exactly one way back, and q(x<-y) is the probability of that one. Balance route by route is sufficient
for balance of the whole.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np

from kexue._checks import check_int
from kexue.generation._states import Ids, as_ids

__all__ = ["Proposal", "RandomEdit", "ReplaceToken"]

Route = tuple[Ids, float, float]


class Proposal(Protocol):
    """What :class:`kexue.generation.MetropolisHastings` needs of a proposal."""

    def moves(self, state: Ids) -> Iterable[Route]:
        """Every route (y, q(y<-x), q(x<-y))."""

    def sample(self, state: Ids, generator: np.random.Generator) -> Route | None:
        """One route (y, log q(y<-x), log q(x<-y)); None: nothing to do, stay."""


def as_vocabulary(vocab: int | Sequence[int]) -> Ids:
    """The allowed ids: V means 0 to V - 1."""
    if isinstance(vocab, int | np.integer):
        check_int("vocab", vocab, 1)
        return tuple(range(int(vocab)))
    ids = as_ids(vocab, "vocab")
    if not ids:
        raise ValueError("vocab must hold at least one token; got none")
    if len(set(ids)) < len(ids):
        raise ValueError("vocab must hold each token once; got one twice")
    return ids


class ReplaceToken:
    """Replace the token at a uniform position by a uniform one of the vocabulary: symmetric.

    Args:
        vocab: Allowed ids, or their number V for 0 ... V - 1.

    Raises:
        TypeError: Ids that are no integers.
        ValueError: No ids, or one twice.

    Example:
        >>> [(y, q) for y, q, back in ReplaceToken(2).moves((0, 1))]
        [((0, 1), 0.25), ((1, 1), 0.25), ((0, 0), 0.25), ((0, 1), 0.25)]
    """

    def __init__(self, vocab: int | Sequence[int]) -> None:
        self.vocab = as_vocabulary(vocab)

    def moves(self, state: Ids) -> list[Route]:
        """Every route; a position that holds a token outside the vocabulary has no way back."""
        q = 1 / max(1, len(state) * len(self.vocab))
        allowed = set(self.vocab)
        return [
            ((*state[:i], token, *state[i + 1 :]), q, q if state[i] in allowed else 0.0)
            for i in range(len(state))
            for token in self.vocab
        ]

    def sample(self, state: Ids, generator: np.random.Generator) -> Route | None:
        """One route; None for an empty text."""
        if not state:
            return None
        i = int(generator.integers(len(state)))
        token = self.vocab[int(generator.integers(len(self.vocab)))]
        log_q = -math.log(len(state) * len(self.vocab))
        back = log_q if state[i] in self.vocab else -math.inf
        return (*state[:i], token, *state[i + 1 :]), log_q, back


class RandomEdit:
    """Insert, delete or replace a token (1/3 each), all uniformly: the simplest proposal that changes the length.

    From n tokens an insertion of one of V tokens has probability 1 / (3 (n + 1) V) and its way back, the deletion from
    n + 1 tokens, 1 / (3 (n + 1)). An operation that is impossible (at a bound of the length) means staying: drawing
    another one instead would change the probabilities of both directions.

    Args:
        vocab: Allowed ids, or their number V.
        min_length: Deletions stop here, at least 0.
        max_length: Insertions stop here, at least ``min_length``.

    Raises:
        TypeError: Ids or lengths that are no integers.
        ValueError: No ids, or lengths out of range.

    Example:
        >>> text, log_q, log_back = RandomEdit(4, 1, 3).sample((0, 1), np.random.default_rng(2))  # a deletion
        >>> text, round(1 / math.exp(log_q)), round(1 / math.exp(log_back))
        ((1,), 6, 24)
    """

    def __init__(self, vocab: int | Sequence[int], min_length: int = 1, max_length: int = 32) -> None:
        self.vocab = as_vocabulary(vocab)
        check_int("min_length", min_length, 0)
        check_int("max_length", max_length, min_length)
        self.min_length, self.max_length = min_length, max_length

    def moves(self, state: Ids) -> list[Route]:
        """Every route."""
        n, size = len(state), len(self.vocab)
        routes = [(y, q / 3, back / 3) for y, q, back in ReplaceToken(self.vocab).moves(state)]
        if n < self.max_length:
            there, back = 1 / (3 * (n + 1) * size), 1 / (3 * (n + 1))
            routes += [((*state[:i], t, *state[i:]), there, back) for i in range(n + 1) for t in self.vocab]
        if n > self.min_length:
            there, back = 1 / (3 * n), 1 / (3 * n * size)
            routes += [(state[:i] + state[i + 1 :], there, back if state[i] in self.vocab else 0.0) for i in range(n)]
        return routes

    def sample(self, state: Ids, generator: np.random.Generator) -> Route | None:
        """One route; None where the operation is impossible."""
        n, size = len(state), len(self.vocab)
        operation = int(generator.integers(3))
        if operation == 0:
            route = ReplaceToken(self.vocab).sample(state, generator)
            return None if route is None else (route[0], route[1] - math.log(3), route[2] - math.log(3))
        if operation == 1:
            if n >= self.max_length:
                return None
            i, token = int(generator.integers(n + 1)), self.vocab[int(generator.integers(size))]
            return (*state[:i], token, *state[i:]), -math.log(3 * (n + 1) * size), -math.log(3 * (n + 1))
        if n <= self.min_length:
            return None
        i = int(generator.integers(n))
        back = -math.log(3 * n * size) if state[i] in self.vocab else -math.inf
        return state[:i] + state[i + 1 :], -math.log(3 * n), back
