"""Which rows each fold of a cross-validation holds out."""

from __future__ import annotations

import operator
import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.model_selection import check_cv


def held_out(cv: Any, X: Any, y: Any, places: NDArray[np.intp]) -> list[NDArray[np.intp]]:
    """Rows of each fold; every row is in one.

    For a number of folds these are the folds of scikit-learn's StratifiedKFold, found without sorting the labels.

    Args:
        cv: Number of folds, or what scikit-learn takes as ``cv``.
        X: (N, D), for splitters that look at it.
        y: Labels, (N,).
        places: The labels as numbers in [0, C), each of which occurs.

    Raises:
        ValueError: Fewer than 2 folds, more folds than rows in every class, rows held out never or twice, training
            rows that are not all others.
    """
    if isinstance(cv, (int, np.integer)) and not isinstance(cv, bool) and cv >= 2:
        return _stratified(operator.index(cv), places)
    splits = [
        [np.flatnonzero(rows) if rows.dtype == bool else rows for rows in map(np.asarray, split)]
        for split in check_cv(cv, y, classifier=True).split(X, y)
    ]
    folds = [test for _, test in splits]
    times = np.bincount(np.concatenate(folds), minlength=len(y)) if folds else np.zeros(len(y))
    if len(folds) < 2 or not (times == 1).all():
        raise ValueError("cv must hold out every row once, in at least 2 folds; got folds that miss or repeat rows")
    for train, test in splits:  # the models come from all rows minus the fold
        if len(train) + len(test) != len(y):
            raise ValueError(f"cv must train on all {len(y) - len(test)} rows outside a fold; got {len(train)}")
    return folds


def _stratified(folds: int, places: NDArray[np.intp]) -> list[NDArray[np.intp]]:
    rows = [np.flatnonzero(places == k) for k in range(int(places.max()) + 1)]
    rows.sort(key=lambda mine: int(mine[0]))  # classes by their first row
    counts = [len(mine) for mine in rows]
    if max(counts) < folds:
        raise ValueError(f"cv={folds} folds need a class with as many rows; got at most {max(counts)}")
    if min(counts) < folds:
        warnings.warn(
            f"the least populated class has {min(counts)} rows, fewer than the {folds} folds", UserWarning, stacklevel=4
        )
    fold_of = np.empty(len(places), np.int16 if folds < 2**15 else np.int64)
    start = 0
    for mine in rows:
        # of the ranks start ... start + n - 1 among all rows sorted by class, fold i gets those that are i mod folds
        end = start + len(mine)
        share = [(end - i + folds - 1) // folds - (start - i + folds - 1) // folds for i in range(folds)]
        fold_of[mine] = np.repeat(np.arange(folds), share)
        start = end
    return [np.flatnonzero(fold_of == i) for i in range(folds)]
