"""Large matrices on the CPU through scipy's LAPACK, which has what torch does not offer: L' S L in n^3 operations.

Its factorisation and eigenvalues (OpenBLAS) are also faster than those of torch, where that uses MKL on an AMD machine.
Arrays by rows are passed as their transposes by columns: a lower factor L is the upper factor L' there.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from scipy.linalg import lapack
from torch import Tensor

BLOCK = 32  # columns of the reduction to tridiagonal form at a time


def _functions(dtype: torch.dtype) -> tuple[Any, ...]:
    letter = "d" if dtype == torch.float64 else "s"
    return tuple(getattr(lapack, letter + name) for name in ("potrf", "sygst", "syevd"))


def cholesky(s: Tensor) -> tuple[Tensor, Tensor]:
    """Lower factors of (N, n, n), and whether each was found."""
    potrf = _functions(s.dtype)[0]
    matrices = s.detach().contiguous().numpy()
    factor, ok = np.empty_like(matrices), np.empty(len(matrices), np.bool_)
    for i, matrix in enumerate(matrices):
        found, info = potrf(matrix.T, lower=0, clean=1)
        factor[i], ok[i] = found.T, info == 0
    return torch.from_numpy(factor), torch.from_numpy(ok)


def congruent_eigen(lp: Tensor, sq: Tensor, vectors: bool) -> tuple[Tensor, Tensor]:
    """Eigenvalues (N, n), ascending, and eigenvectors (N, n, n) of Lp' Sq Lp, nan where there are none."""
    _, sygst, syevd = _functions(sq.dtype)
    factors, matrices = (x.detach().contiguous().numpy() for x in (lp, sq))
    count, n = matrices.shape[:2]
    w, v = np.empty((count, n), matrices.dtype), np.empty((count, n, n) if vectors else (0, n, n), matrices.dtype)
    # The default is the least that will do, and a reduction without blocks.
    workspace = (BLOCK + 2) * n + (2 * n * n + 6 * n + 1 if vectors else 0)
    for i in range(count):
        product, _ = sygst(matrices[i].T, factors[i].T, itype=2, lower=0)
        w[i], found, info = syevd(product, compute_v=vectors, lower=0, overwrite_a=1, lwork=workspace)
        if info:
            w[i] = np.nan
        if vectors:
            v[i] = found.T
    return torch.from_numpy(w), torch.from_numpy(v).mT
