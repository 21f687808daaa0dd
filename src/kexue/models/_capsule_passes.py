"""Capsule routing on the CPU in float32: each pass goes over the inputs once and leaves nothing of their size behind.

``collect`` is one iteration of the routing (scores, softmax over the capsules, weighted sums), ``push`` one iteration
of the gradient. Agreement is measured in base 2: scores are <x_i, q_j> with q scaled by log2(e) / temperature. A call
does the examples (dense weights: the inputs) from ``begin`` to ``end``, so that threads can share the work.

Shared weights: every example (n, i) meets k vectors q_j of its own, in tiles of ``ROWS`` inputs. A tile is copied,
padded with zeros, and transposed; all products are outer products summed in registers.

Dense weights (``dense_...``): the examples stand innermost, x (n, i, B) with B a multiple of 16, so that everything but
the products goes over vectors of them. The votes (k * o, B) of one input are made, used, and overwritten by the next.

This module imports numba, so it is imported where it is needed.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from kexue.words._numba import TILE_COLUMNS, TILE_ROWS, gram_tile, kernel

ROWS = 32  # inputs of a tile
APART = 16  # numbers between rows: at distances of powers of 2 they would compete for a few places of the cache
LN2 = 0.6931471805599453


@njit(inline="always")
def _exp2(x):  # type: ignore[no-untyped-def]
    """2^x for x <= 0, to about 1e-7; unlike the library's it is computed for many numbers at once."""
    x = np.float32(-126.0) if x < np.float32(-126.0) else x  # NaN stays
    n = np.floor(x + np.float32(0.5))
    r = (x - n) * np.float32(0.6931471805599453)
    p = np.float32(1 / 5040)
    p = p * r + np.float32(1 / 720)
    p = p * r + np.float32(1 / 120)
    p = p * r + np.float32(1 / 24)
    p = p * r + np.float32(1 / 6)
    p = p * r + np.float32(0.5)
    p = p * r + np.float32(1.0)
    p = p * r + np.float32(1.0)
    return p * np.int32((np.int32(n) + np.int32(127)) << np.int32(23)).view(np.float32)


@njit(inline="always")
def _up(size, multiple):  # type: ignore[no-untyped-def]
    return (size + multiple - 1) // multiple * multiple


@kernel
def _outer(left, right, out, rows, columns, count):  # type: ignore[no-untyped-def]
    """Add left[:count, :rows].T @ right[:count, :columns] to out; rows a multiple of 4, columns of 16."""
    for column in range(0, columns, TILE_COLUMNS):
        for row in range(0, rows, TILE_ROWS):
            gram_tile(left, row, right, column, out, count)


@kernel
def _softmax(scores, step, count, hard, top, total):  # type: ignore[no-untyped-def]
    """Rows 0, step, ... (count of them) become coefficients, column by column."""
    width = len(top)
    first = scores[0]
    for t in range(width):
        top[t] = first[t]
        total[t] = 0
    for j in range(1, count):
        row = scores[j * step]
        for t in range(width):
            top[t] = row[t] if row[t] > top[t] else top[t]
    if hard:  # the first of equal ones
        for j in range(count):
            row = scores[j * step]
            for t in range(width):
                best = row[t] == top[t] and total[t] == 0
                row[t] = 1 if best else 0
                total[t] = 1 if best else total[t]
        return
    for j in range(count):
        row = scores[j * step]
        for t in range(width):
            e = _exp2(row[t] - top[t])
            row[t] = e
            total[t] += e
    for t in range(width):
        total[t] = np.float32(1) / total[t]
    for j in range(count):
        row = scores[j * step]
        for t in range(width):
            row[t] *= total[t]


@njit(inline="always")
def _copy(source, target, count):  # type: ignore[no-untyped-def]
    """Several times faster on short vectors than an assignment to a slice."""
    for p in range(count):
        target[p] = source[p]


@kernel
def _load(x, start, rows, turned):  # type: ignore[no-untyped-def]
    """A tile of inputs, as it is and transposed; returns how many inputs there were left."""
    count, width = min(ROWS, len(x) - start), x.shape[1]
    for t in range(ROWS):
        row = rows[t]
        if t < count:
            _copy(x[start + t], row, width)
        else:
            row[:] = 0
    for p in range(width):
        column = turned[p]
        for t in range(ROWS):
            column[t] = rows[t, p]
    return count


@kernel
def collect(x, queries, sums, coupling, begin, end, hard):  # type: ignore[no-untyped-def]
    """Inputs (B, n, i), queries (k, B, i) -> sums over the inputs (k, B, i), coefficients (B, n, k) or (0, 0, 0)."""
    capsules, _, width = queries.shape
    padded, wide = _up(capsules, TILE_ROWS), _up(width, TILE_COLUMNS)
    turned_queries = np.zeros((width, padded), np.float32)
    rows, turned = np.zeros((ROWS, wide + APART), np.float32), np.empty((width, ROWS + APART), np.float32)
    scores = np.empty((padded, ROWS), np.float32)
    weights = np.zeros((ROWS, padded), np.float32)
    out = np.empty((padded, wide + APART), np.float32)
    top, total = np.empty(ROWS, np.float32), np.empty(ROWS, np.float32)
    for b in range(begin, end):
        for j in range(capsules):
            for p in range(width):
                turned_queries[p, j] = queries[j, b, p]
        out[:] = 0
        for start in range(0, x.shape[1], ROWS):
            count = _load(x[b], start, rows, turned)
            scores[:] = 0
            _outer(turned_queries, turned, scores, padded, ROWS, width)
            _softmax(scores, 1, capsules, hard, top, total)
            for j in range(capsules):
                for t in range(ROWS):
                    weights[t, j] = scores[j, t]
            if len(coupling):
                for t in range(count):
                    _copy(weights[t], coupling[b, start + t], capsules)
            _outer(weights, rows, out, padded, wide, ROWS)
        for j in range(capsules):
            _copy(out[j], sums[j, b], width)


@kernel
def push(x, vectors, upstream, sums, grad, begin, end, fresh, hard, constant):  # type: ignore[no-untyped-def]
    """One iteration backwards: vectors (k, B, 2, i), the queries and the gradients of the sums.

    Writes sums (k, B, 2, i) of the inputs weighted by the gradients of the scores and by the coefficients, and adds to
    the gradient of the inputs (B, n, i), or begins it if ``fresh``. ``upstream`` is the gradient of the coefficients,
    (B, n, k) or (0, 0, 0); with ``constant`` coefficients have none.
    """
    capsules, _, _, width = vectors.shape
    padded, wide = _up(2 * capsules, TILE_ROWS), _up(width, TILE_COLUMNS)
    pairs, turned_pairs = np.zeros((2 * capsules, wide + APART), np.float32), np.zeros((width, padded), np.float32)
    rows, turned = np.zeros((ROWS, wide + APART), np.float32), np.empty((width, ROWS + APART), np.float32)
    scores = np.empty((padded, ROWS), np.float32)
    weights = np.zeros((ROWS, padded), np.float32)
    out, made = np.empty((padded, wide + APART), np.float32), np.empty((ROWS, wide + APART), np.float32)
    top, total = np.empty(ROWS, np.float32), np.empty(ROWS, np.float32)
    factor = np.float32(LN2)
    for b in range(begin, end):
        for j in range(capsules):
            for m in range(2):
                vector, pair = vectors[j, b, m], pairs[2 * j + m]
                for p in range(width):
                    pair[p] = vector[p]
                    turned_pairs[p, 2 * j + m] = vector[p]
        out[:] = 0
        for start in range(0, x.shape[1], ROWS):
            count = _load(x[b], start, rows, turned)
            scores[:] = 0
            _outer(turned_pairs, turned, scores, padded, ROWS, width)
            _softmax(scores, 2, capsules, hard, top, total)
            if len(upstream):
                for j in range(capsules):
                    for t in range(count):
                        scores[2 * j + 1, t] += upstream[b, start + t, j]
            total[:] = 0
            for j in range(capsules):
                c, dc = scores[2 * j], scores[2 * j + 1]
                for t in range(ROWS):
                    total[t] += c[t] * dc[t]
            for j in range(capsules):
                c, dc = scores[2 * j], scores[2 * j + 1]
                for t in range(ROWS):
                    coefficient = c[t]
                    c[t] = np.float32(0) if constant else (dc[t] - total[t]) * coefficient * factor
                    dc[t] = coefficient
            for j in range(2 * capsules):
                for t in range(ROWS):
                    weights[t, j] = scores[j, t]
            _outer(weights, rows, out, padded, wide, ROWS)
            made[:] = 0
            if not fresh:
                for t in range(count):
                    _copy(grad[b, start + t], made[t], width)
            _outer(scores, pairs, made, ROWS, wide, 2 * capsules)
            for t in range(count):
                _copy(made[t], grad[b, start + t], width)
        for j in range(capsules):
            for m in range(2):
                _copy(out[2 * j + m], sums[j, b, m], width)


@kernel
def _vote(weight, x, padded, votes):  # type: ignore[no-untyped-def]
    """Votes (k * o, B) of one input (i, B) with its matrix (i, k * o)."""
    for p in range(len(weight)):
        _copy(weight[p], padded[p], weight.shape[1])
    votes[:] = 0
    _outer(padded, x, votes, padded.shape[1], x.shape[1], len(x))


@kernel
def _agree(votes, vectors, out, step, width):  # type: ignore[no-untyped-def]
    """Inner products over the o entries of each capsule, into rows 0, step, ... of out."""
    for j in range(len(vectors) // width):
        row = out[j * step]
        row[:] = 0
        for q in range(j * width, (j + 1) * width):
            v, g = votes[q], vectors[q]
            for b in range(len(row)):
                row[b] += v[b] * g[b]


@kernel
def _weigh(c, vectors, out, width):  # type: ignore[no-untyped-def]
    """Add the vectors (k * o, B), weighted by the rows of c (k, B)."""
    for j in range(len(c)):
        row = c[j]
        for q in range(j * width, (j + 1) * width):
            v, s = vectors[q], out[q]
            for b in range(len(row)):
                s[b] += row[b] * v[b]


@kernel
def dense_collect(x, weight, queries, capsules, sums, coupling, begin, end, hard):  # type: ignore[no-untyped-def]
    """Inputs (n, i, B), weight (n, i, k * o), queries (k * o, B); adds to sums (k * o, B).

    Writes the coefficients to coupling (n, k, B), unless that is (0, 0, 0).
    """
    batch, size = x.shape[2], len(queries)
    padded = np.zeros((x.shape[1], _up(size, TILE_ROWS)), np.float32)
    votes = np.empty((padded.shape[1], batch), np.float32)
    scores = np.empty((capsules, batch), np.float32)
    top, total = np.empty(batch, np.float32), np.empty(batch, np.float32)
    for t in range(begin, end):
        _vote(weight[t], x[t], padded, votes)
        _agree(votes, queries, scores, 1, size // capsules)
        _softmax(scores, 1, capsules, hard, top, total)
        if len(coupling):
            coupling[t] = scores
        _weigh(scores, votes, sums, size // capsules)


@kernel
def dense_push(  # type: ignore[no-untyped-def]
    x, weight, queries, slopes, upstream, sums, kept, begin, end, hard, constant
):
    """One iteration backwards, from the gradients of the sums (k * o, B) and of the coefficients (n, k, B) or none.

    Adds to sums (k * o, B) the votes weighted by the gradients of the scores, and writes these and the coefficients to
    kept (2, n, k, B).
    """
    batch, size, capsules = x.shape[2], len(queries), kept.shape[2]
    padded = np.zeros((x.shape[1], _up(size, TILE_ROWS)), np.float32)
    votes = np.empty((padded.shape[1], batch), np.float32)
    top, total = np.empty(batch, np.float32), np.empty(batch, np.float32)
    for t in range(begin, end):
        db, c = kept[0, t], kept[1, t]
        _vote(weight[t], x[t], padded, votes)
        _agree(votes, queries, c, 1, size // capsules)
        _softmax(c, 1, capsules, hard, top, total)
        if constant:
            db[:] = 0
            continue
        _agree(votes, slopes, db, 1, size // capsules)
        if len(upstream):
            db += upstream[t]
        total[:] = 0
        for j in range(capsules):
            row, slope = c[j], db[j]
            for b in range(batch):
                total[b] += row[b] * slope[b]
        for j in range(capsules):
            row, slope = c[j], db[j]
            for b in range(batch):
                slope[b] = (slope[b] - total[b]) * row[b] * np.float32(LN2)
        _weigh(db, votes, sums, size // capsules)


@kernel
def dense_gradient(  # type: ignore[no-untyped-def]
    x, weight, kept, vectors, first, examples, grad, weight_grad, begin, end
):
    """Gradients of the inputs, (n, i, B), and, added to what is there, of the weight (n, i, k * o) or (0, 0, 0).

    The gradient of a vote is first (k * o, B) plus the sum over m of kept (m, n, k, B) times vectors (m, k * o, B).
    """
    _, width, batch = x.shape
    size, capsules = len(first), kept.shape[2]
    turned_weight = np.zeros((size, _up(width, TILE_ROWS)), np.float32)
    turned_x = np.zeros((batch, _up(width, TILE_ROWS)), np.float32)
    slopes, turned = np.empty((size, batch), np.float32), np.zeros((batch, _up(size, TILE_COLUMNS)), np.float32)
    out = np.empty((turned_x.shape[1], batch), np.float32)
    product = np.empty((turned_x.shape[1], turned.shape[1]), np.float32)
    for t in range(begin, end):
        for q in range(size):
            _copy(first[q], slopes[q], batch)
        for m in range(len(kept)):
            _weigh(kept[m, t], vectors[m], slopes, size // capsules)
        for p in range(width):
            row = weight[t, p]
            for q in range(size):
                turned_weight[q, p] = row[q]
        out[:] = 0
        _outer(turned_weight, slopes, out, turned_x.shape[1], batch, size)
        for p in range(width):
            _copy(out[p], grad[t, p], batch)
        if len(weight_grad):
            for b in range(examples):
                row = turned[b]
                for q in range(size):
                    row[q] = slopes[q, b]
                for p in range(width):
                    turned_x[b, p] = x[t, p, b]
            product[:] = 0
            _outer(turned_x, turned, product, turned_x.shape[1], turned.shape[1], examples)
            for p in range(width):
                row = weight_grad[t, p]
                for q in range(size):
                    row[q] += product[p, q]
