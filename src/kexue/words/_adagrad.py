"""Stochastic solution of the PMI regression with Adagrad, as published with the article (科学空间 4671).

Per pair: e = <v_i, u_j> - p, g_i = lambda e u_j, g_j = lambda e v_i, both from the old vectors; first G += g*g, then
v -= eta g / sqrt(G + 1e-8). (GloVe's program adds to G afterwards; the author reports NaNs with that order.) A pair
whose error is not finite is skipped. Pairs are visited row by row in random order of the rows, which keeps one vector
in the first-level cache; the published program shuffles single pairs.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from kexue.words._numba import kernel


@kernel
def epoch(
    order: Any, indptr: Any, indices: Any, weights: Any, targets: Any, v: Any, u: Any, gv: Any, gu: Any, rate: float,
    half: bool,
) -> None:  # fmt: skip
    """Visit every pair once, updating the tables and their sums of squared gradients in place.

    Args:
        order: Rows in the order of the visit.
        indptr: Row starts of the pairs.
        indices: Columns, ascending within a row.
        weights: Weight lambda of each pair.
        targets: Target p of each pair.
        v: (V, D) table of the rows.
        u: (V, D) table of the columns; the same array for one table.
        gv: Sums of squared gradients of ``v``, starting at 1.
        gu: Those of ``u``; the same array for one table.
        rate: Learning rate, of the tables' type.
        half: Visit only columns below the row (one table: each unordered pair once).
    """
    for row in order:
        a, ga = v[row], gv[row]
        for k in range(indptr[row], indptr[row + 1]):
            column = indices[k]
            if half and column >= row:
                break
            b, gb = u[column], gu[column]
            product = a[0] * 0
            for c in range(len(a)):
                product += a[c] * b[c]
            factor = weights[k] * (product - targets[k])
            if not np.isfinite(factor):
                continue
            for c in range(len(a)):
                x, y = factor * b[c], factor * a[c]
                ga[c] += x * x
                gb[c] += y * y
                a[c] -= rate * x / np.sqrt(ga[c] + np.float32(1e-8))
                b[c] -= rate * y / np.sqrt(gb[c] + np.float32(1e-8))
