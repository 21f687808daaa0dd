"""Kernels over bags of words, without torch: counting the words of rows and adding up their vectors."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kexue.words._numba import compiled


@compiled()
def count_words(
    values: NDArray[np.int32], offsets: NDArray[np.int64], size: int
) -> tuple[NDArray[np.int32], NDArray[np.float32], NDArray[np.int64]]:
    """Distinct ids of each row in order of first sight, their 1 + log tf, and the new offsets."""
    seen = np.full(size, -1, np.int64)  # where the word stands in the current row
    ids = np.empty(len(values), np.int32)
    weights = np.empty(len(values), np.float32)
    starts = np.zeros(len(offsets), np.int64)
    n = 0
    for row in range(len(offsets) - 1):
        begin = n
        for t in range(offsets[row], offsets[row + 1]):
            word = values[t]
            place = seen[word]
            if place < begin:
                seen[word] = n
                ids[n] = word
                weights[n] = 1
                n += 1
            else:
                weights[place] += 1
        for place in range(begin, n):
            weights[place] = 1 + np.log(weights[place])
        starts[row + 1] = n
    return ids[:n], weights[:n], starts


# Only sums are reordered: NaN and infinity keep their meaning, so that a run that diverges is seen.
FAST = {"reassoc", "contract", "nsz"}


@compiled(fastmath=FAST)
def sum_rows(ids, weights, offsets, table, scale, out):  # type: ignore[no-untyped-def]
    """Add to row i of ``out`` (N, D) the sum of ``weights * scale[ids] * table[ids]`` over the words of document i."""
    width = table.shape[1]
    for row in range(len(offsets) - 1):
        total = out[row]
        for t in range(offsets[row], offsets[row + 1]):
            factor = weights[t] * scale[ids[t]]
            vector = table[ids[t]]
            for d in range(width):
                total[d] += factor * vector[d]
