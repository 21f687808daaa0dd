"""Nodes and weights on [0, 1] of :func:`kexue.explain.integrated_gradients`, in float64."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["FIXED", "Panel", "fixed_rule", "panel_rule"]

FIXED = ("gauss", "left", "right", "midpoint", "trapezoid")
Array = NDArray[np.float64]


class Panel(NamedTuple):
    """A Gauss-Legendre rule with what says how far to trust it; n nodes, exact for polynomials of degree 2n - 1.

    Attributes:
        nodes: (n,) in (0, 1), ascending.
        weights: (n,).
        null: (n,) weights minus those of the rule without its middle node, which is exact up to degree n - 2.
        odd: (n,) the same one degree lower, 0 for polynomials up to degree n - 3: what is antisymmetric about the
            middle escapes ``null``, what is symmetric ``odd``. All 0 for n < 3.
        between: (n + 1, n): row k integrates the polynomial through the nodes from node k - 1 to node k, where node -1
            is 0 and node n is 1; the rows sum to the weights.
    """

    nodes: Array
    weights: Array
    null: Array
    odd: Array
    between: Array


def _gauss(n: int) -> tuple[Array, Array]:
    nodes, weights = np.polynomial.legendre.leggauss(n)
    return (nodes + 1) / 2, weights / 2


@lru_cache(maxsize=32)
def panel_rule(n: int) -> Panel:
    """The Gauss-Legendre rule with n nodes, n small."""
    nodes, weights = _gauss(n)
    # Differences of order n - 1, the one functional of n values that is 0 for all polynomials of degree n - 2.
    difference = np.array([1 / np.prod(x - np.delete(nodes, i)) for i, x in enumerate(nodes)])
    null = weights[n // 2] * difference / difference[n // 2]
    odd = null * (nodes - 0.5)
    odd *= 0.0 if n < 3 else np.abs(null).sum() / np.abs(odd).sum()
    # Legendre polynomials instead of powers: well conditioned.
    ends = 2 * np.concatenate([[0.0], nodes, [1.0]]) - 1
    basis = np.linalg.inv(np.polynomial.legendre.legvander(2 * nodes - 1, n - 1))  # values at the nodes -> coefficients
    primitive = np.stack(
        [np.polynomial.legendre.legval(ends, np.polynomial.legendre.legint(row)) / 2 for row in np.eye(n)], axis=1
    )
    return Panel(nodes, weights, null, odd, np.diff(primitive, axis=0) @ basis)


def fixed_rule(method: str, n: int) -> tuple[Array, Array]:
    """Nodes and weights of a rule with n nodes over all of [0, 1].

    Args:
        method: "gauss"; "left", nodes k/n from k = 0; "right", from k = 1; "midpoint", (k + 1/2)/n; "trapezoid", both
            ends and a spacing of 1 / (n - 1), n >= 2.
        n: Number of nodes.
    """
    if method == "gauss":
        return _gauss(n)
    if method == "trapezoid":
        weights = np.full(n, 1 / (n - 1))
        weights[[0, -1]] /= 2
        return np.linspace(0, 1, n), weights
    shift = {"left": 0.0, "right": 1.0, "midpoint": 0.5}[method]
    return (np.arange(n) + shift) / n, np.full(n, 1 / n)
