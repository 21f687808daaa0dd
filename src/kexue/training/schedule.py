"""Learning rate schedules as pure functions of the step: warm-up, then constant, linear or cosine."""

from __future__ import annotations

import math

from kexue._checks import check_choice, check_int

__all__ = ["SCHEDULES", "lr_factor"]

SCHEDULES = ("constant", "linear", "cosine")


def lr_factor(step: int, steps: int, *, warmup: int = 0, schedule: str = "linear") -> float:
    """Factor on the learning rate in one step.

    Warm-up rises in equal parts from 1/warmup to 1. After it, with p the part of the remaining steps that is done:
    constant 1, linear 1 - p, cosine (1 + cos(pi p)) / 2. No step has factor 0, so that none is wasted.

    Args:
        step: Number of the step, 0 <= step < steps.
        steps: Steps of the whole run.
        warmup: Steps of warm-up, 0 <= warmup <= steps.
        schedule: "constant", "linear" or "cosine".

    Returns:
        A number in (0, 1].

    Raises:
        ValueError: An argument is out of range.

    Example:
        >>> [lr_factor(step, 6, warmup=2) for step in range(6)]
        [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    """
    check_choice("schedule", schedule, SCHEDULES)
    check_int("steps", steps, 1)
    check_int("warmup", warmup, 0)
    check_int("step", step, 0)
    if warmup > steps:
        raise ValueError(f"warmup must be at most steps = {steps}; got {warmup}")
    if step >= steps:
        raise ValueError(f"step must be below steps = {steps}; got {step}")
    if step < warmup:
        return (step + 1) / warmup
    if schedule == "constant":
        return 1.0
    done = (step - warmup) / (steps - warmup)
    return 1.0 - done if schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
