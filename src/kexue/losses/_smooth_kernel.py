"""One pass over probabilities and labels instead of torch's four; used by ``smooth_metrics.py`` for large CPU tensors.

Arrays are flat and contiguous; labels are uint8 or of the type of the probabilities. Column c of (N, C) is every C-th
entry: the passes go over vectors of a width W that is a multiple of C, so that a few classes do not make short loops.
This module imports numba, so it is imported where it is needed.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from kexue.words._numba import kernel

__all__ = ["column_sums", "flip", "slopes"]

WIDTH = 1024  # of a vector: the sums of three stay in the L1 cache
SHARE = 64  # vectors summed in the type of the probabilities before float64 takes over


@kernel
def _sums(p, t, width):  # type: ignore[no-untyped-def]
    """TP, sum t and sum p, (3, W) float64."""
    total = np.zeros((3, width))
    part = np.zeros((3, width), p.dtype)
    hits, count, mass = part[0], part[1], part[2]
    step = SHARE * width
    for first in range(0, len(p), step):
        part[:] = 0
        for start in range(first, min(first + step, len(p)), width):
            q, labels = p[start : start + width], t[start : start + width]
            for i in range(len(q)):
                label = p.dtype.type(labels[i])
                hits[i] += q[i] * label
                count[i] += label
                mass[i] += q[i]
        total += part
    return total


def column_sums(p: Any, t: Any, columns: int) -> Any:
    """TP, sum t and sum p of each column, (3, C) float64."""
    return _sums(p, t, columns * max(1, WIDTH // columns)).reshape(3, -1, columns).sum(1)


@kernel
def _slopes(p, t, by_hits, by_mass, out):  # type: ignore[no-untyped-def]
    width = len(by_hits)
    one = p.dtype.type(1)
    for start in range(0, len(p), width):
        q, labels, made = p[start : start + width], t[start : start + width], out[start : start + width]
        for i in range(len(q)):
            made[i] = (by_hits[i] * p.dtype.type(labels[i]) + by_mass[i]) * (q[i] * (one - q[i]))


def slopes(p: Any, t: Any, by_hits: Any, by_mass: Any, out: Any) -> None:
    """Gradient by the logits, (t dL/dTP + dL/d(sum p)) p (1 - p), from the two derivatives, (C,)."""
    repeats = max(1, WIDTH // len(by_hits))
    _slopes(p, t, np.tile(by_hits, repeats), np.tile(by_mass, repeats), out)


@kernel
def flip(x, t, out):  # type: ignore[no-untyped-def]
    """-x where the label is not 0; ``out`` may be x."""
    for i in range(len(x)):
        out[i] = -x[i] if t[i] else x[i]
