"""Temperatures for Gumbel-softmax that fall during training (退火).

Source: 科学空间 6705 (漫谈重参数:从正态分布到Gumbel Softmax)

    exp     start (end / start)^(t / steps)
    linear  start + (end - start) t / steps
    cosine  end + (start - end) (1 + cos(pi t / steps)) / 2

all constant at ``end`` from ``steps`` on. The exponential one is the usual max(tau_min, tau_0 e^{-r t}) with
r = log(start / end) / steps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from kexue._checks import check_choice, check_int, check_real

__all__ = ["TemperatureSchedule"]

KINDS = ("exp", "linear", "cosine")


@dataclass(frozen=True)
class TemperatureSchedule:
    """Temperature as a function of the step; no state.

    Args:
        kind: "exp", "linear" or "cosine".
        start: Temperature in step 0, above 0.
        end: Temperature from step ``steps`` on; above 0 for "exp", else at least 0.
        steps: Number of steps from ``start`` to ``end``, at least 1.

    Raises:
        TypeError: Wrong kind of argument.
        ValueError: An unknown kind, a value out of range, a negative step.

    Example:
        >>> tau = TemperatureSchedule("exp", start=1.0, end=0.01, steps=1000)
        >>> tau(0), round(tau(500), 6), tau(1000), tau(10**6)
        (1.0, 0.1, 0.01, 0.01)
    """

    kind: str = "exp"
    start: float = 1.0
    end: float = 0.01
    steps: int = 10_000

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, KINDS)
        check_real("start", self.start, above=0.0)
        check_real("end", self.end, minimum=0.0)
        if self.kind == "exp":
            check_real("end", self.end, above=0.0)
        check_int("steps", self.steps, 1)

    def __call__(self, step: int) -> float:
        """The temperature of a step >= 0."""
        check_int("step", step, 0)
        start, end, done = float(self.start), float(self.end), int(step) / int(self.steps)
        if done <= 0:
            return start
        if done >= 1:
            return end
        if self.kind == "exp":
            return start * (end / start) ** done
        if self.kind == "linear":
            return start + (end - start) * done
        return end + (start - end) * 0.5 * (1.0 + math.cos(math.pi * done))
