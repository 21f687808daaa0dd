"""Single passes over large matrices of costs: c-transforms, and everything that a certificate asks about a plan.

A minimum over rows is kept per column, one over columns in 64 lanes, both as plain comparisons, which become vector
code. Blocks of a plan that hold zeros only, nearly all of an optimal one, are skipped after one look.
"""

from __future__ import annotations

import numpy as np

from kexue.words._numba import compiled

LANES = 16
WIDE = 64

_pass = compiled(nogil=True, error_model="numpy", fastmath={"nsz", "reassoc", "contract"})  # tells numbers from NaN


@_pass
def columns_min(costs, f, keep):  # type: ignore[no-untyped-def]
    """Smallest c_ij - f_i of each column (m,), over the rows that ``keep`` (n,) marks."""
    n, m = costs.shape
    out = np.full(m, np.inf)
    for i in range(n):
        if keep[i]:
            row, shift = costs[i], f[i]
            for j in range(m):
                d = row[j] - shift
                out[j] = d if d < out[j] else out[j]
    return out


@_pass
def rows_min(costs, g, which):  # type: ignore[no-untyped-def]
    """Smallest c_ij - g_j of the rows (k,) in ``which``."""
    m = costs.shape[1]
    full = m - m % WIDE
    lanes = np.empty(WIDE)
    out = np.empty(which.shape[0])
    for place in range(which.shape[0]):
        row = costs[which[place]]
        lanes[:] = np.inf
        for start in range(0, full, WIDE):
            for k in range(WIDE):
                d = row[start + k] - g[start + k]
                lanes[k] = d if d < lanes[k] else lanes[k]
        low = np.inf
        for k in range(WIDE):
            low = lanes[k] if lanes[k] < low else low
        for j in range(full, m):
            d = row[j] - g[j]
            low = d if d < low else low
        out[place] = low
    return out


@_pass
def survey(costs, f, keep, plan, bits, g, rows, columns, first):  # type: ignore[no-untyped-def]
    """One pass over costs and plan (n, m): <C, plan>, the plan's least entry, 0 (or NaN if numbers are not finite).

    Fills ``g`` (m,) as :func:`columns_min`, ``rows`` (n,) and ``columns`` (m,), given as zeros, with the sums of the
    plan and ``first`` (n,) with the first column to which each row sends something, -1 for none. ``bits`` are those of
    the plan.
    """
    n, m = costs.shape
    full = m - m % LANES
    primal = check = least = 0.0
    g[:] = np.inf
    for i in range(n):
        row, flow, word = costs[i], plan[i], bits[i]
        if keep[i]:
            shift = f[i]
            for j in range(m):
                d = row[j] - shift
                g[j] = d if d < g[j] else g[j]
        total = 0.0
        for j in range(m):
            total += row[j]
        check += 0.0 * total
        first[i] = -1
        total = 0.0
        for start in range(0, m, LANES):
            seen = np.uint64(start == full)  # what is left of a row is always looked into
            if start < full:
                for k in range(LANES):
                    seen |= word[start + k]
            if seen != 0:
                for j in range(start, min(start + LANES, m)):
                    x = flow[j]
                    total += x
                    primal += x * row[j]
                    columns[j] += x
                    least = x if x < least else least
                    if x > 0 and first[i] < 0:
                        first[i] = j
        rows[i] = total
        check += 0.0 * total
    return primal, least, check
