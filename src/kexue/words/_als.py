"""Exact alternating solution of the weighted PMI regression: the default solver of :class:`kexue.words.PMIEmbedding`.

With all other vectors fixed, the vector of word i is the solution of a small linear system,

    A_i v_i = b_i
    A_i = sum_{j in N(i)} (lambda_ij - w0) u_j u_j^T + w0 (sum_j u_j u_j^T - u_i u_i^T) + reg_i I
    b_i = sum_{j in N(i)} (lambda_ij p_ij - w0 t0) u_j + w0 t0 (sum_j u_j - u_i)

where N(i) are the words seen with i, p the targets, and w0, t0 weight and target of the pairs never seen, which enter
through one Gram matrix for all words. One table is solved word after word (Gauss-Seidel): the objective cannot rise.
The systems of a block of words are built at the block's start, in parallel, and each is then corrected by the few
changes that happened inside the block, so the result is that of the sequential method and does not depend on the
number of threads.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt

from kexue.words._numba import TILE_COLUMNS, TILE_ROWS, gram_tile, kernel
from kexue.words._pairs import Pairs

_BLOCK = 8  # words whose systems are built together: larger ones leave the cache
_BATCH = 64  # neighbours that are added to a system at a time: two buffers of this many rows fit the first-level cache
_PARTS = 64  # row ranges of the loss, so that its sum does not depend on the threads


@kernel
def _add_products(left: Any, right: Any, count: int, system: Any) -> None:
    """Add left[:count].T @ right[:count] to the upper triangle (in whole tiles)."""
    for column in range(0, system.shape[1], TILE_COLUMNS):
        for row in range(0, column + TILE_COLUMNS, TILE_ROWS):
            gram_tile(left, row, right, column, system, count)


@kernel
def _assemble(
    word: int,
    indptr: Any,
    indices: Any,
    weights: Any,
    targets: Any,
    table: Any,
    gram: Any,
    total: Any,
    w0: float,
    t0: float,
    reg: float,
    system: Any,
    right_side: Any,
    left: Any,
    right: Any,
) -> None:
    """Build the linear system of one word from the vectors ``table`` of the others."""
    width = table.shape[1]
    own = table[word]
    for r in range(width):
        for c in range(width):
            system[r, c] = w0 * (gram[r, c] - own[r] * own[c])
        system[r, r] += reg
        right_side[r] = w0 * t0 * (total[r] - own[r])
    filled = 0
    for k in range(indptr[word], indptr[word + 1]):
        vector = table[indices[k]]
        factor = weights[k] - w0
        share = weights[k] * targets[k] - w0 * t0
        for c in range(width):
            value = vector[c]
            right[filled, c] = value
            left[filled, c] = factor * value
            right_side[c] += share * value
        filled += 1
        if filled == len(left):
            _add_products(left, right, filled, system)
            filled = 0
    if filled > 0:
        _add_products(left, right, filled, system)


@kernel
def _solve(system: Any, vector: Any, negative: Any, scale: Any) -> None:
    """Solve a symmetric system, upper triangle given, by a blocked Cholesky factorisation U^T U.

    ``vector`` holds b, then x.

    A pivot that vanishes up to rounding gives component 0: a solution all the same, as the system is consistent.
    """
    width = len(vector)
    largest = system[0, 0]
    for r in range(width):
        largest = max(largest, system[r, r])
    tiny = largest * scale[0]
    for block in range(0, width, TILE_COLUMNS):
        if block > 0:
            for column in range(block, width, TILE_COLUMNS):
                for row in range(block, block + TILE_COLUMNS, TILE_ROWS):
                    gram_tile(negative, row, system, column, system, block)
        # Loops over slices from 0 on: the compiler vectorises these, not those from a variable start.
        for r in range(block, block + TILE_COLUMNS):
            line = system[r, block:]
            for k in range(block, r):
                upper = system[k, block:]
                factor = upper[r - block]
                for c in range(len(line)):
                    line[c] -= factor * upper[c]
            pivot = line[r - block]
            inverse = pivot * 0
            if pivot > tiny:
                inverse = 1 / np.sqrt(pivot)
            scale[r + 1] = inverse
            minus = negative[r, block:]
            for c in range(len(line)):
                value = line[c] * inverse
                line[c] = value
                minus[c] = -value
    for r in range(width):
        line, rest = system[r, r + 1 :], vector[r + 1 :]
        value = vector[r] * scale[r + 1]
        vector[r] = value
        for c in range(len(line)):
            rest[c] -= line[c] * value
    for r in range(width - 1, -1, -1):
        line, rest = system[r, r + 1 :], vector[r + 1 :]
        value = vector[r]
        for c in range(len(line)):
            value -= line[c] * rest[c]
        vector[r] = value * scale[r + 1]


@kernel
def assemble_block(
    low: int,
    high: int,
    first: int,
    indptr: Any,
    indices: Any,
    weights: Any,
    targets: Any,
    table: Any,
    gram: Any,
    total: Any,
    w0: float,
    t0: float,
    regs: Any,
    systems: Any,
    sides: Any,
    near: Any,
    left: Any,
    right: Any,
) -> None:
    """Build the systems of words low..high of the block that starts at ``first``; note what ties them to each other."""
    for word in range(low, high):
        slot = word - first
        _assemble(
            word, indptr, indices, weights, targets, table, gram, total, w0, t0, regs[word],
            systems[slot], sides[slot], left, right,
        )  # fmt: skip
        for other in range(slot):
            near[slot, other, 0] = w0
            near[slot, other, 1] = w0 * t0
        for k in range(indptr[word], indptr[word + 1]):
            other = indices[k] - first
            if other >= slot:
                break
            if other >= 0:
                near[slot, other, 0] = weights[k]
                near[slot, other, 1] = weights[k] * targets[k]


@kernel
def solve_block(
    first: int,
    count: int,
    table: Any,
    gram: Any,
    total: Any,
    systems: Any,
    sides: Any,
    near: Any,
    changes: Any,
    left: Any,
    negative: Any,
    scale: Any,
) -> None:
    """Solve the words of a block one after the other, each with the new vectors of those before it."""
    width = table.shape[1]
    for slot in range(count):
        side = sides[slot]
        for other in range(slot):
            weight, share = near[slot, other, 0], near[slot, other, 1]
            new, old = changes[2 * other], changes[2 * other + 1]
            for c in range(width):
                left[2 * other, c] = weight * new[c]
                left[2 * other + 1, c] = -weight * old[c]
                side[c] += share * (new[c] - old[c])
        if slot > 0:
            _add_products(left, changes, 2 * slot, systems[slot])
        _solve(systems[slot], side, negative, scale)
        vector = table[first + slot]
        new, old = changes[2 * slot], changes[2 * slot + 1]
        for c in range(width):
            old[c] = vector[c]
            new[c] = side[c]
            vector[c] = side[c]
            total[c] += new[c] - old[c]
        for r in range(width):
            for c in range(width):
                gram[r, c] += new[r] * new[c] - old[r] * old[c]


@kernel
def solve_rows(
    low: int,
    high: int,
    indptr: Any,
    indices: Any,
    weights: Any,
    targets: Any,
    table: Any,
    gram: Any,
    total: Any,
    w0: float,
    t0: float,
    regs: Any,
    out: Any,
    system: Any,
    left: Any,
    right: Any,
    negative: Any,
    scale: Any,
) -> None:
    """Solve words low..high of one table from the other table, which does not change."""
    for word in range(low, high):
        _assemble(
            word, indptr, indices, weights, targets, table, gram, total, w0, t0, regs[word],
            system, out[word], left, right,
        )  # fmt: skip
        _solve(system, out[word], negative, scale)


@kernel
def _errors(
    low: int, high: int, indptr: Any, indices: Any, weights: Any, targets: Any, v: Any, u: Any, t0: float, half: bool
) -> Any:
    """Sums over the observed pairs of rows low..high: of lambda e^2, and of (<v,u> - t0)^2."""
    data = 0.0
    seen = 0.0
    for word in range(low, high):
        a = v[word]
        for k in range(indptr[word], indptr[word + 1]):
            if half and indices[k] >= word:
                break
            b = u[indices[k]]
            product = a[0] * 0
            for c in range(len(a)):
                product += a[c] * b[c]
            error = np.float64(product) - targets[k]
            data += weights[k] * error * error
            seen += (product - t0) * (product - t0)
    return data, seen


def shares(indptr: npt.NDArray[Any], parts: int) -> list[tuple[int, int]]:
    """Row ranges with about equal numbers of pairs."""
    rows = len(indptr) - 1
    cost = indptr[1:] + np.arange(1, rows + 1, dtype=np.int64)
    cuts = np.searchsorted(cost, np.linspace(0, int(cost[-1]), parts + 1)[1:-1]).tolist()
    bounds = sorted({0, *cuts, rows})
    return list(itertools.pairwise(bounds))


def squared_error(pairs: Pairs, v: Any, u: Any, t0: float, run: Callable[..., list[Any]]) -> tuple[float, float]:
    """Sums over the observed pairs: of lambda (<v,u> - p)^2, and of (<v,u> - t0)^2."""
    tasks = [
        (low, high, pairs.indptr, pairs.indices, pairs.weights, pairs.targets, v, u, t0, pairs.one_table)
        for low, high in shares(pairs.indptr, _PARTS)
    ]
    parts = run(_errors, tasks)
    return sum(part[0] for part in parts), sum(part[1] for part in parts)


def objective(
    pairs: Pairs, v: Any, u: Any, data: float, seen: float, w0: float, t0: float, regs: Any, regs_u: Any
) -> float:
    """What the alternating solution minimises; ``data`` and ``seen`` are those of :func:`squared_error`."""
    v, u = np.asarray(v, np.float64), np.asarray(u, np.float64)
    size = len(v)
    own = np.einsum("nd,nd->n", v, u)
    unseen = (
        np.sum((v.T @ v) * (u.T @ u))
        - np.sum(own**2)
        - 2 * t0 * (v.sum(0) @ u.sum(0) - own.sum())
        + t0**2 * size * (size - 1)
    )
    penalty = regs @ np.einsum("nd,nd->n", v, v)
    if pairs.one_table:
        return float(data + w0 * (unseen / 2 - seen) + penalty)
    return float(data + w0 * (unseen - seen) + penalty + regs_u @ np.einsum("nd,nd->n", u, u))


class Threads:
    """Runs tasks on ``n_jobs`` threads (in place when there is one), results in the order of the tasks."""

    def __init__(self, n_jobs: int) -> None:
        self.n_jobs = n_jobs
        self._pool = ThreadPoolExecutor(n_jobs) if n_jobs > 1 else None

    def __call__(self, function: Callable[..., Any], tasks: Sequence[tuple[Any, ...]]) -> list[Any]:
        if self._pool is None:
            return [function(*task) for task in tasks]
        return [future.result() for future in [self._pool.submit(function, *task) for task in tasks]]

    def close(self) -> None:
        """Let the threads end."""
        if self._pool is not None:
            self._pool.shutdown()


class Workspace:
    """Arrays that the kernels reuse; widths are padded to whole tiles with zeros, which stay zeros."""

    def __init__(self, width: int, dtype: Any, n_jobs: int) -> None:
        self.systems = np.zeros((_BLOCK, width, width), dtype)
        self.sides = np.zeros((_BLOCK, width), dtype)
        self.near = np.zeros((_BLOCK, _BLOCK, 2), np.float64)
        self.changes = np.zeros((2 * _BLOCK, width), dtype)
        self.left = [np.zeros((_BATCH, width), dtype) for _ in range(n_jobs)]
        self.right = [np.zeros((_BATCH, width), dtype) for _ in range(n_jobs)]
        self.negative = [np.zeros((width, width), dtype) for _ in range(n_jobs)]
        self.scale = [np.zeros(width + 1, dtype) for _ in range(n_jobs)]
        for scale in self.scale:
            scale[0] = 4 * np.finfo(dtype).eps  # relative size of a pivot that counts as zero


def padded(table: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The table with zero columns up to a multiple of the tile width."""
    size, dim = table.shape
    width = -(-dim // TILE_COLUMNS) * TILE_COLUMNS
    out = np.zeros((size, width), table.dtype)
    out[:, :dim] = table
    return out


def _moments(table: npt.NDArray[Any]) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    exact = table.astype(np.float64)
    return exact.T @ exact, exact.sum(0)


def sweep_one_table(
    pairs: Pairs, table: npt.NDArray[Any], w0: float, t0: float, regs: Any, space: Workspace, run: Threads,
    advance: Callable[[float], None],
) -> None:  # fmt: skip
    """One Gauss-Seidel pass over all words of a (padded) table, in place."""
    size = len(table)
    gram, total = _moments(table)
    arrays = (pairs.indptr, pairs.indices, pairs.weights, pairs.targets, table, gram, total, w0, t0, regs)
    for first in range(0, size, _BLOCK):
        last = min(size, first + _BLOCK)
        cuts = np.linspace(first, last, min(run.n_jobs, last - first) + 1).astype(int).tolist()
        tasks = [
            (
                cuts[k],
                cuts[k + 1],
                first,
                *arrays,
                space.systems,
                space.sides,
                space.near,
                space.left[k],
                space.right[k],
            )
            for k in range(len(cuts) - 1)
        ]
        run(assemble_block, tasks)
        solve_block(
            first, last - first, table, gram, total, space.systems, space.sides, space.near, space.changes,
            space.left[0], space.negative[0], space.scale[0],
        )  # fmt: skip
        advance(last - first)


def sweep_two_tables(
    pairs: Pairs, v: npt.NDArray[Any], u: npt.NDArray[Any], w0: float, t0: float, regs: Any, space: Workspace,
    run: Threads, advance: Callable[[float], None],
) -> None:  # fmt: skip
    """Solve all rows of ``v`` exactly for the given ``u``, in place."""
    gram, total = _moments(u)
    arrays = (pairs.indptr, pairs.indices, pairs.weights, pairs.targets, u, gram, total, w0, t0, regs)
    ranges = shares(pairs.indptr, _PARTS)
    for start in range(0, len(ranges), run.n_jobs):
        group = ranges[start : start + run.n_jobs]
        tasks = [
            (low, high, *arrays, v, space.systems[k], space.left[k], space.right[k], space.negative[k], space.scale[k])
            for k, (low, high) in enumerate(group)
        ]
        run(solve_rows, tasks)
        advance(group[-1][1] - group[0][0])
