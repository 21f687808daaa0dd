"""The gain of merging units into one, by minimum entropy (最小熵原理:合并单元的收益).

Source: Scientific Spaces article 5476 (minimum entropy, part 2), equations 2.8 to 2.17; the criterion of phrases and
templates under article 5577.

Formula. Units have frequencies p_i and lengths l_i; H = -sum p_i ln p_i, l = sum p_i l_i, and H / l is the cost of a
character. Merge a tuple of k units that occurs with frequency p, unit i standing m_i times in it:

    Z = 1 - (k - 1) p,    H~ / l~ - H / l = -F / l
    F = p ln p - Z ln Z + sum over distinct i of [(p_i - m_i p) ln(p_i - m_i p) - p_i ln p_i]
    F* = p (ln(p / prod p_i^m_i) - 1)  <=  F

What we do differently, and why:
- Multiplicities: the article assumes that all m_i are 1, which is wrong for 哈哈.
- With h(u) = (1 - u) ln(1 - u) + u the same F is F* + sum p_i h(m_i p / p_i) - h((k - 1) p). No term of order 1 is
  left that would have to cancel, so a gain of 1e-12 has as many right digits as one of 0.1. It also shows F >= F* at
  once: h is convex with h(0) = 0 and the p_i sum to at most 1, hence sum p_i h(m_i p / p_i) >= h(k p).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from numpy.typing import NDArray

_SERIES = 0.125  # below it, h is summed as a power series: 18 terms leave less than 1e-17 of the first
_TERMS = tuple(1 / (n * (n - 1)) for n in range(19, 1, -1))
_SLACK = 1 + 8 * np.finfo(np.float64).eps  # 3 * .1 > .3: counts divided by their total may miss the border by this


def _bend(u: NDArray[np.float64]) -> NDArray[np.float64]:
    """h(u) = (1 - u) ln(1 - u) + u = u^2/2 + u^3/6 + ... for u in [0, 1]."""
    small = np.minimum(u, _SERIES)
    series = np.zeros_like(small)
    for term in _TERMS:
        series = series * small + term
    rest = 1 - np.clip(u, _SERIES, 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        direct = np.where(rest > 0, rest * np.log(rest), 0.0) + (1 - rest)
    return np.where(u <= _SERIES, series * small * small, direct)


def _probabilities(name: str, value: npt.ArrayLike) -> NDArray[np.float64]:
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise ValueError(f"{name} must be a rectangular array of numbers; got {value!r}") from error
    if array.dtype.kind not in "fiu" and array.size:
        raise TypeError(f"{name} must be real numbers; got {value!r} of dtype {array.dtype}")
    array = array.astype(np.float64)
    bad = ~((array >= 0) & (array <= 1))
    if bad.any():
        raise ValueError(f"{name} must be probabilities in [0, 1]; got {array[bad].flat[0]}")
    return array


def merge_gain(
    p_joint: npt.ArrayLike, p_parts: npt.ArrayLike, multiplicity: npt.ArrayLike | None = None, exact: bool = True
) -> Any:
    """How much entropy per text is saved when a tuple of units becomes one unit: merge when it is well above 0.

    Args:
        p_joint: Frequency of the tuple, N_a / N, N the number of all units; shape (...). Occurrences must not overlap:
            "ha ha ha" holds "ha ha" once.
        p_parts: Frequencies of its distinct units, shape (..., k), broadcast against ``p_joint`` without the last axis.
        multiplicity: How often each of them stands in the tuple, integers >= 1 that broadcast with ``p_parts``; None is
            once each. The tuple has sum m_i units.
        exact: True gives F, False the lower bound F*, which is close for rare tuples.

    Returns:
        Gain in nats per unit of text, shape (...), a float for shape (). Divided by the mean length of a unit it is the
        fall of the cost per character H / l. A tuple that never occurs gains 0.

    Raises:
        ValueError: Not in [0, 1] (NaN included), a tuple more frequent than a part allows (p_joint > p_i / m_i), no
            parts, a multiplicity below 1, or shapes that do not broadcast.
        TypeError: Not numbers, or a multiplicity that is no integer.

    Reference:
        Scientific Spaces, article 5476.

    Example:
        >>> round(merge_gain(0.02, [0.03, 0.04]), 4)
        0.0512
        >>> round(merge_gain(0.02, [0.05], multiplicity=[2]), 4)  # 哈哈
        0.0453
        >>> merge_gain([0.0, 0.01], [[0.03, 0.04], [0.1, 0.1]]).round(4)
        array([ 0.   , -0.009])
    """
    if not isinstance(exact, (bool, np.bool_)):
        raise TypeError(f"exact must be True or False; got {exact!r}")
    joint, parts = _probabilities("p_joint", p_joint), _probabilities("p_parts", p_parts)
    if parts.ndim == 0 or parts.shape[-1] == 0:
        raise ValueError(f"p_parts must have at least one part on its last axis; got shape {parts.shape}")
    times = np.ones(1, np.int64) if multiplicity is None else np.asarray(multiplicity)
    if times.dtype.kind not in "iu":
        raise TypeError(f"multiplicity must be integers; got {multiplicity!r} of dtype {times.dtype}")
    if (times < 1).any():
        raise ValueError(f"multiplicity must be at least 1; got {times.min()}")
    try:
        p, parts, m = np.broadcast_arrays(joint[..., None], parts, times.astype(np.float64))
    except ValueError:
        raise ValueError(
            f"shapes must broadcast: p_joint (...), p_parts (..., k), multiplicity (..., k); got {joint.shape}, "
            f"{np.shape(p_parts)}, {times.shape}"
        ) from None
    bad = m * p > parts * _SLACK
    if bad.any():
        raise ValueError(
            f"a tuple cannot be more frequent than its parts allow (p_joint <= p_i / m_i); got p_joint {p[bad][0]}, "
            f"p_i {parts[bad][0]}, m_i {int(m[bad][0])}"
        )
    units = m.sum(-1)
    p = p[..., 0]
    if ((units - 1) * p > _SLACK).any():
        raise ValueError(
            f"(k - 1) p_joint must be at most 1, the parts sum to more than 1; got {p_joint!r}, {p_parts!r}"
        )
    occurs = p > 0
    safe = np.where(occurs[..., None], parts, 1.0)
    information = np.log(np.where(occurs, p, 1.0)) - (m * np.log(safe)).sum(-1)
    gain = p * (information - 1)
    if exact:
        share = np.minimum(m * p[..., None] / safe, 1.0)
        excess = (safe * _bend(share)).sum(-1) - _bend(np.minimum((units - 1) * p, 1.0))
        gain = gain + np.where(occurs, excess, 0.0)
    gain = np.where(occurs, gain, 0.0)
    return float(gain) if gain.ndim == 0 else gain
