"""The margin family: what replaces the cosine of the target, psi(cos theta_t), and its slope.

Formulas, with c = cos theta and margin m:

    softmax    c
    am         c - m                                        (AM-Softmax, CosFace)
    arc        cos(theta + m); c - m sin m where theta + m > pi, which keeps it monotone       (AAM, ArcFace)
    a          (-1)^k cos(m theta) - 2k for theta in [k pi/m, (k+1) pi/m]                      (A-Softmax, SphereFace)
    simpler_a  min(cos(m theta), c)                         (article 5743)
    combined   cos(m1 theta + m2) - m3
    metric     f(c) - m with f(c) = -sqrt(1 - c); the scores of the other classes are f as well       (article 8656)

cos(m theta) for an integer m is the Chebyshev polynomial T_m(c) with the slope m U_(m-1)(c): no arccos, exact slope.
The slopes of arc and metric are infinite at |c| = 1: in them 1 - c^2 is clamped at 1e-7 and 1 - c at 1e-6; psi itself
is exact. The gradient on the sphere stays bounded because the tangent vanishes at the same rate. For the other classes
of metric the clamp is in the score as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kexue._checks import check_choice, check_int, check_real

KINDS = ("softmax", "am", "arc", "a", "simpler_a", "combined", "metric")
SQUARED_SINE = 1e-7  # smallest 1 - cos^2
GAP = 1e-6  # smallest 1 - cos of kind "metric"
Kind = str | Callable[[Tensor], Tensor]
_DEFAULTS: dict[str, Any] = {"softmax": 0.0, "am": 0.35, "arc": 0.5, "a": 4, "simpler_a": 4, "metric": 0.35}


def resolve_margin(kind: Kind, margin: Any) -> Any:
    """Check ``kind`` and ``margin`` together and fill in the default margin of the kind."""
    if callable(kind):
        if margin is not None:
            raise ValueError(f"a callable kind holds its own margin; margin must be None, got {margin!r}")
        return None
    check_choice("kind", kind, KINDS)
    if kind == "combined":
        if not isinstance(margin, tuple | list) or len(margin) != 3:
            raise ValueError(f"kind 'combined' takes margin=(m1, m2, m3); got {margin!r}")
        for name, value in zip(("m1", "m2", "m3"), margin, strict=True):
            check_real(name, value)
        return tuple(float(value) for value in margin)
    if margin is None:
        return _DEFAULTS[kind]
    if kind in ("a", "simpler_a"):
        check_int("margin", margin, 1)
        return int(margin)
    if isinstance(margin, Tensor):
        if not margin.is_floating_point():
            raise TypeError(f"margin must be a floating tensor; got dtype {margin.dtype}")
        return margin
    check_real("margin", margin)
    if kind == "arc" and abs(float(margin)) > math.pi:
        raise ValueError(f"the margin of kind 'arc' is an angle of at most pi; got {margin!r}")
    return float(margin)


def check_margin(margin: Any, validate: bool) -> None:
    """Raise unless the entries of a tensor margin are finite; one reduction, as for labels."""
    if isinstance(margin, Tensor) and validate and not torch.compiler.is_compiling():
        bad = margin.detach()[~torch.isfinite(margin.detach())]
        if bad.numel():
            raise ValueError(f"margin must be finite; got {float(bad[0])}")


def margin_of_rows(margin: Any, labels: Tensor, classes: int) -> Any:
    """Turn a tensor margin, () or (C,) or (B,), into one number for each row; (C,) wins when B = C."""
    if not isinstance(margin, Tensor) or margin.dim() == 0:
        return margin
    if tuple(margin.shape) == (classes,):
        return margin[labels]
    if margin.shape == labels.shape:
        return margin
    raise ValueError(
        f"a tensor margin must have shape (), ({classes},) or {tuple(labels.shape)}; got {tuple(margin.shape)}"
    )


def _chebyshev(c: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """T_m(c) and its derivative m U_(m-1)(c) by their recurrences."""
    t0, t1 = torch.ones_like(c), c
    u0, u1 = torch.zeros_like(c), torch.ones_like(c)  # U_(-1), U_0
    for _ in range(m - 1):
        t0, t1 = t1, 2 * c * t1 - t0
        u0, u1 = u1, 2 * c * u1 - u0
    return t1, m * u1


def target_score(c: Tensor, kind: Kind, margin: Any) -> tuple[Tensor, Tensor]:
    """psi(c) and d psi / d c, elementwise; the margin is a number or broadcasts against ``c``.

    Args:
        c: Cosines of the targets in float32 or float64, any shape.
        kind: One of :data:`KINDS` or a callable psi.
        margin: As :func:`resolve_margin` returned it.
    """
    if callable(kind):
        value, pull = torch.func.vjp(kind, c)[:2]
        if not isinstance(value, Tensor) or value.shape != c.shape:
            raise ValueError(f"psi must return a tensor of shape {tuple(c.shape)}; got {value!r}")
        return value, pull(torch.ones_like(value))[0]
    one = torch.ones_like(c)
    if isinstance(margin, Tensor):
        margin = margin.to(c.dtype)
    if kind in ("softmax", "am"):
        return c - margin if kind == "am" else c, one
    if kind == "metric":
        gap = 1 - c
        return -gap.clamp(min=0).sqrt() - margin, 0.5 / gap.clamp(min=GAP).sqrt()
    if kind in ("a", "simpler_a"):
        t, slope = _chebyshev(c, margin)
        if kind == "simpler_a":
            return torch.minimum(t, c), torch.where(t < c, slope, one)
        k = torch.zeros_like(c)
        for j in range(1, margin):
            k = k + (c < math.cos(j * math.pi / margin))
        sign = 1 - 2 * (k % 2)
        return sign * t - 2 * k, sign * slope
    if kind == "combined" and margin[0] != 1.0:
        m1, m2, m3 = (float(x) for x in margin)
        theta = torch.acos(c.clamp(-1.0, 1.0))
        sine = (1 - c * c).clamp(min=SQUARED_SINE).sqrt()
        return torch.cos(m1 * theta + m2) - m3, m1 * torch.sin(m1 * theta + m2) / sine
    m, shift = (margin[1], margin[2]) if kind == "combined" else (margin, 0.0)
    cos_m: Any = m.cos() if isinstance(m, Tensor) else math.cos(m)
    sin_m: Any = m.sin() if isinstance(m, Tensor) else math.sin(m)
    square = 1 - c * c
    value = c * cos_m - square.clamp(min=0).sqrt() * sin_m - shift
    slope = cos_m + c * sin_m / square.clamp(min=SQUARED_SINE).sqrt()
    if kind == "combined":
        return value, slope
    wrapped = c < -cos_m if isinstance(m, Tensor) or m > 0 else torch.zeros_like(c, dtype=torch.bool)
    if isinstance(m, Tensor):
        wrapped = wrapped & (m > 0)  # theta + m never passes pi for a negative m
    return torch.where(wrapped, c - m * sin_m, value), torch.where(wrapped, one, slope)


def score(c: Tensor, kind: Kind) -> Tensor:
    """What stands for a class that is not the target: the cosine, or -sqrt(1 - c) for kind "metric"."""
    return -(1 - c).clamp(min=GAP).sqrt() if kind == "metric" else c
