"""Dormand and Prince's method of order 5 with step control and dense output, on lists of tensors.

Coefficients: Dormand and Prince 1980; the interpolant and the choice of the first step: Hairer, Norsett, Wanner,
"Solving Ordinary Differential Equations I", II.4 to II.6.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

__all__ = ["Field", "State", "dopri5", "dopri5_at", "tolerances"]

State = list[Tensor]
Field = Callable[[State], State]  # may return NaN, where the step was too long; must return tensors of its own

_STAGES = (
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
_ERROR = (71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)
_DENSE = (
    -12715105075 / 11282082432,
    0.0,
    87487479700 / 32700410799,
    -10690763975 / 1880347072,
    701980252875 / 199316789632,
    -1453857185 / 822651844,
    69997945 / 29380423,
)
_SAFETY, _SHRINK, _GROW = 0.9, 0.2, 10.0

Interpolant = Callable[[float], State]


def tolerances(rtol: float | None, atol: float | None, state: Sequence[Tensor]) -> tuple[float, float]:
    """Given ones, else 1e-8 and 1e-10, in float32 1e-5 and 1e-7."""
    double = all(x.dtype == torch.float64 for x in state)
    return (
        (1e-8 if double else 1e-5) if rtol is None else float(rtol),
        (1e-10 if double else 1e-7) if atol is None else float(atol),
    )


def _combine(start: State, slopes: Sequence[State], weights: Sequence[float], h: float) -> State:
    out = [x.clone() for x in start]
    for slope, weight in zip(slopes, weights, strict=False):
        if weight:
            torch._foreach_add_(out, slope, alpha=h * weight)
    return out


def _rms(values: State, scale: State) -> float:
    """Root mean square of values / scale over all entries; NaN counts as infinite."""
    count = sum(v.numel() for v in values)
    total = sum(float((v / s).double().square().sum()) for v, s in zip(values, scale, strict=True))
    root = math.sqrt(total / count) if count and total >= 0 else 0.0 if not count else math.inf
    return root if math.isfinite(root) else math.inf


def _scale(a: State, b: State, rtol: float, atol: float) -> State:
    return [atol + rtol * torch.maximum(x.abs(), y.abs()) for x, y in zip(a, b, strict=True)]


def _first_step(field: Field, x: State, slope: State, t: float, rtol: float, atol: float) -> float:
    scale = _scale(x, x, rtol, atol)
    d0, d1 = _rms(x, scale), _rms(slope, scale)
    h0 = 1e-6 if d0 < 1e-5 or d1 < 1e-5 or d1 == math.inf else 0.01 * d0 / d1
    h0 = min(h0, t)
    change = torch._foreach_sub(field(_combine(x, [slope], [1.0], h0)), slope)
    d2 = _rms(list(change), scale) / h0
    if max(d1, d2) <= 1e-15:
        h1 = max(1e-6, 1e-3 * h0)
    else:
        h1 = (0.01 / max(d1, d2)) ** 0.2
    return min(100 * h0, h1, t) or min(1e-6, t)


def dopri5(
    field: Field, start: State, t: float, rtol: float, atol: float, max_steps: int
) -> Iterator[tuple[float, float, State, Interpolant]]:
    """Follow x' = field(x) from time 0 to t > 0.

    Yields:
        For each accepted step: its first and last time, the state at its end, and a function that gives the state at
        a time within it (order 4).

    Raises:
        FloatingPointError: No finite continuation.
        RuntimeError: More than ``max_steps`` steps were tried.
    """
    now, x = 0.0, [y.clone() for y in start]
    slope = field(x)
    h = _first_step(field, x, slope, t, rtol, atol)
    rejected = False
    for _ in range(max_steps):
        last = now + h >= t * (1 - 1e-14)
        if last:
            h = t - now
        if not last and now + h <= now:
            raise FloatingPointError(
                f"the flow cannot be continued beyond t = {now:g}: it ends there (the loss or its gradient is not "
                f"finite, or not smooth), or rtol={rtol:g}, atol={atol:g} are too small for the precision of params"
            )
        slopes = [slope]
        for weights in _STAGES:
            y = _combine(x, slopes, weights, h)
            slopes.append(field(y))
        error = _combine([torch.zeros_like(v) for v in x], slopes, _ERROR, h)
        size = _rms(error, _scale(x, y, rtol, atol))
        if size > 1:
            h *= max(_SHRINK, _SAFETY * size**-0.2)
            rejected = True
            continue
        begin, end = now, t if last else now + h
        yield begin, end, y, _interpolant(begin, h, x, y, slopes)
        if last:
            return
        now, x, slope = end, y, slopes[-1]
        growth = _GROW if size == 0 else min(_GROW, max(_SHRINK, _SAFETY * size**-0.2))
        h *= min(growth, 1.0) if rejected else growth
        rejected = False
    raise RuntimeError(
        f"dopri5 has tried {max_steps} steps and is at t = {now:g} of {t:g}: the loss is stiff or not smooth here; "
        "raise max_steps, loosen rtol and atol, or use a fixed-step method"
    )


def dopri5_at(
    field: Field, start: State, times: Iterable[float], t: float, rtol: float, atol: float, max_steps: int
) -> Iterator[tuple[float, State]]:
    """States at rising ``times`` in [0, t]; steps do not depend on them."""
    wanted = iter(times)
    time = next(wanted, None)
    while time is not None and time <= 0:
        yield time, start
        time = next(wanted, None)
    if time is None:
        return
    for _, end, state, between in dopri5(field, start, t, rtol, atol, max_steps):
        while time is not None and time <= end:
            yield time, state if time == end else between(time)
            time = next(wanted, None)


def _interpolant(begin: float, h: float, x: State, y: State, slopes: Sequence[State]) -> Interpolant:
    def at(time: float) -> State:
        u = (time - begin) / h
        rise = list(torch._foreach_sub(y, x))
        bend = list(torch._foreach_sub(torch._foreach_mul(slopes[0], h), rise))
        turn = list(torch._foreach_sub(torch._foreach_sub(rise, torch._foreach_mul(slopes[-1], h)), bend))
        rest = _combine([torch.zeros_like(v) for v in x], slopes, _DENSE, h)
        out = [v.clone() for v in x]
        for part, weight in (
            (rise, u),
            (bend, u * (1 - u)),
            (turn, u * u * (1 - u)),
            (rest, u * u * (1 - u) ** 2),
        ):
            torch._foreach_add_(out, part, alpha=weight)
        return out

    return at
