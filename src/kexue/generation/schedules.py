"""Temperatures over the steps of simulated annealing (退火计划).

Source: 科学空间 8084; UPSA (Liu et al. 2020) for the linear one.

    geometric      tau_t = max(tau_min, tau_0 c^t)
    logarithmic    tau_t = max(tau_min, tau_0 / log(t + 2))
    linear         tau_t = max(tau_min, tau_0 - C t)

A schedule is a callable ``(t, steps) -> tau`` for t = 0 ... steps - 1. At tau = 0 annealing is hill climbing.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from kexue._checks import check_real

__all__ = ["Constant", "Geometric", "Linear", "Logarithmic", "Schedule"]

Schedule = Callable[[int, int], float]


def _check(tau: float, tau_min: float) -> None:
    check_real("tau", tau, above=0.0)
    check_real("tau_min", tau_min, above=0.0)
    if tau_min > tau:
        raise ValueError(f"tau_min must be at most tau, {tau}; got {tau_min}")


class Geometric:
    """tau falls by the same factor in every step.

    Args:
        tau: Temperature of the first step, above 0.
        tau_min: The lowest temperature, above 0.
        c: Factor of a step, in (0, 1]; None: such that tau_min is reached in the last step.

    Raises:
        ValueError: Values out of range.

    Example:
        >>> [round(Geometric(1.0, 0.01)(t, 5), 3) for t in range(5)]
        [1.0, 0.316, 0.1, 0.032, 0.01]
    """

    def __init__(self, tau: float, tau_min: float, c: float | None = None) -> None:
        _check(tau, tau_min)
        if c is not None:
            check_real("c", c, above=0.0)
            if c > 1:
                raise ValueError(f"c must be at most 1; got {c}")
        self.tau, self.tau_min, self.c = float(tau), float(tau_min), c

    def __call__(self, t: int, steps: int) -> float:
        """Temperature of step t out of ``steps``."""
        if self.c is not None:
            return max(self.tau_min, self.tau * self.c**t)
        return max(self.tau_min, self.tau * (self.tau_min / self.tau) ** (t / max(1, steps - 1)))


class Logarithmic:
    """tau falls as 1 / log t: the schedule of the convergence theorem, too slow for practice.

    Args:
        tau: Numerator, above 0.
        tau_min: The lowest temperature, above 0.

    Raises:
        ValueError: Values out of range.

    Example:
        >>> [round(Logarithmic(1.0)(t, 1000), 2) for t in (0, 10, 999)]
        [1.44, 0.4, 0.14]
    """

    def __init__(self, tau: float, tau_min: float = 1e-6) -> None:
        _check(tau, tau_min)
        self.tau, self.tau_min = float(tau), float(tau_min)

    def __call__(self, t: int, steps: int) -> float:
        """Temperature of step t."""
        return max(self.tau_min, self.tau / math.log(t + 2))


class Linear:
    """tau falls by the same amount in every step.

    Args:
        tau: Temperature of the first step, above 0.
        slope: C, at least 0.
        tau_min: The lowest temperature, above 0.

    Raises:
        ValueError: Values out of range.

    Example:
        >>> [round(Linear()(t, 100), 4) for t in (0, 50, 99)]
        [0.03, 0.015, 0.0003]
    """

    def __init__(self, tau: float = 3e-2, slope: float = 3e-4, tau_min: float = 1e-6) -> None:
        _check(tau, tau_min)
        check_real("slope", slope, minimum=0.0)
        self.tau, self.slope, self.tau_min = float(tau), float(slope), float(tau_min)

    def __call__(self, t: int, steps: int) -> float:
        """Temperature of step t."""
        return max(self.tau_min, self.tau - self.slope * t)


class Constant:
    """The same temperature in every step; 0 is hill climbing.

    Args:
        tau: Temperature, at least 0.

    Raises:
        ValueError: A negative one.

    Example:
        >>> Constant(0.0)(3, 10)
        0.0
    """

    def __init__(self, tau: float = 0.0) -> None:
        check_real("tau", tau, minimum=0.0)
        self.tau = float(tau)

    def __call__(self, t: int, steps: int) -> float:
        """The temperature."""
        return self.tau
