"""Farkas' lemma as a program (Farkas 引理): a solution of A x = b with x >= 0, or the proof that there is none.

Source: 科学空间 6280 (从Wasserstein距离、对偶理论到WGAN), where strong duality is derived from it.

Exactly one of the two exists:  x >= 0 with A x = b,  or  y with A^T y <= 0 and b^T y > 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from kexue.stats._ground import Array, to_array

__all__ = ["Alternative", "farkas"]

ROUNDS = 20  # each halves the logarithm of what is left


@dataclass(frozen=True)
class Alternative:
    """Which of the two systems of :func:`farkas` has a solution; the other one is None.

    Attributes:
        x: (n,) with A x = b, x >= 0, or None.
        y: (m,) with A^T y <= 0, b^T y > 0 and entries in [-1, 1], or None.
    """

    x: Array | None
    y: Array | None


def farkas(A: Any, b: Any) -> Alternative:
    """A non-negative solution of A x = b, or a hyperplane that separates b from all A x.

    For demonstration: both are linear programmes, solved to about 1e-7 relative.

    Args:
        A: (m, n) finite matrix.
        b: (m,) right side.

    Returns:
        :class:`Alternative`, of which exactly one is not None.

    Raises:
        TypeError: Not numbers.
        ValueError: Shapes that do not fit, numbers that are not finite.
        RuntimeError: Neither was found to the precision of the solver.

    Reference:
        https://spaces.ac.cn/archives/6280

    Example:
        >>> farkas([[1.0, 1.0]], [2.0]).y is None, farkas([[1.0, 1.0]], [-2.0]).y
        (True, array([-1.]))
    """
    matrix, right = to_array("A", A, (2,)), to_array("b", b, (1,))
    m, n = matrix.shape
    if len(right) != m:
        raise ValueError(f"b must have shape ({m},); got {right.shape}")
    from scipy.optimize import linprog

    # the solver's tolerances are absolute: rows and columns of (A, b) are brought to largest entries of 1
    scaled, size, column = np.column_stack([matrix, right]), np.ones(m), np.ones(n + 1)
    for _ in range(ROUNDS):
        for axis, total in ((1, size), (0, column)):
            top = np.sqrt(abs(scaled).max(axis))
            top[top == 0] = 1.0
            total *= top
            scaled /= np.expand_dims(top, axis)
    scaled, target = scaled[:, :-1], scaled[:, -1]
    found = linprog(np.zeros(n), A_eq=scaled, b_eq=target, bounds=(0, None), method="highs")
    if found.status == 0:
        x = np.maximum(found.x, 0.0)
        if abs(scaled @ x - target).max() <= 1e-6 * max(1.0, float(abs(x).max())):
            return Alternative(x / column[:-1] * column[-1], None)
    found = linprog(-target, A_ub=scaled.T, b_ub=np.zeros(n), bounds=(-1, 1), method="highs")
    if found.status == 0 and -found.fun > 1e-9:
        y = found.x / size  # of the equations as given
        return Alternative(None, y / abs(y).max())
    raise RuntimeError("A x = b lies on the border of what the solver's precision of 1e-7 can decide")
