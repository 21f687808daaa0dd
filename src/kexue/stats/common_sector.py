"""Points of a disc in a common sector (圆内随机 n 点同扇形概率): the distribution of the smallest sector angle.

Source: 科学空间 9324 (圆内随机n点在同一个圆心角为θ的扇形的概率); covering a circle with arcs: Stevens 1939; common
half-spaces: Wendel 1962.

Points uniform in a disc have independent uniform angles; they lie in a sector of angle theta if and only if the largest
of the n gaps between neighbours is at least x = 1 - theta / 2 pi of the circle:

    P(n, theta) = sum over k >= 1 with k x < 1 of (-1)^(k-1) C(n, k) (1 - k x)^(n-1)

In floating point this sum is worthless once P is near 1 (n = 200, 358.2 degrees: -1.7e10 for a probability). Here it is
used only where its terms fall quickly; elsewhere 1 - P comes from formulas with positive terms (``_sector_kernel.py``),
so that both tails keep full relative precision, for 1000 million points too.

Angles are radians; ``period`` says otherwise: 360 for degrees, 24 for hours of the day, 1 for fractions of the circle.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from kexue._checks import check_int, check_real
from kexue._tensors import compute_dtype, once_differentiable

__all__ = [
    "CircularRangeResult",
    "CommonSector",
    "circular_range_test",
    "common_sector",
    "common_sector_probability",
    "halfspace_probability",
    "smallest_sector",
]

MOST = 2**53  # points; integers beyond are no float64 numbers
TAU_LOW = 2.4492935982947064e-16  # 2 pi - math.tau
DRAWN = 2**12  # up to so many points a sample is made of exponential numbers, beyond by the quantile
DRAWN_AT_ONCE = 2**20


def _period(period: Any) -> float:
    """The length of the circle, checked."""
    check_real("period", period, above=0.0)
    return float(period)


def _integers(name: str, value: Any, most: int = 2**63 - 1) -> np.ndarray:
    """Integers from 1 to ``most`` as int64, of any shape."""
    if type(value) is int and 1 <= value <= most:  # a shortcut: half of the time of a call with one number
        return np.array(value, dtype=np.int64)
    array = np.asarray(value)
    whole = array.dtype.kind in "iu" or (array.dtype == object and all(type(v) is int for v in array.flat))
    if array.size and not whole:
        raise TypeError(f"{name} must be an integer or an array of integers; got {value!r} of dtype {array.dtype}")
    if array.size and (array.min() < 1 or array.max() > most):
        bad = array.min() if array.min() < 1 else array.max()
        raise ValueError(f"{name} must be from 1 to {most}; got {bad}")
    return array.astype(np.int64)


def _counts(n: Any) -> np.ndarray:
    """Numbers of points, checked."""
    return _integers("n", n, MOST)


def _reals(name: str, value: Any) -> np.ndarray:
    """Real numbers as float64, of any shape; NaN is rejected."""
    if isinstance(value, float) and value == value:  # the same shortcut
        return np.array(value)
    if isinstance(value, Tensor):
        if value.requires_grad:
            raise TypeError(f"{name} must be without gradient here (common_sector_probability has one); got {value!r}")
        value = value.cpu().numpy() if value.dtype != torch.bfloat16 else value.cpu().float().numpy()
    array = np.asarray(value)
    if array.dtype.kind not in "iuf" and array.size:
        raise TypeError(f"{name} must be real numbers; got {value!r} of dtype {array.dtype}")
    array = array.astype(np.float64)
    if np.isnan(array).any():
        raise ValueError(f"{name} must not be NaN; got {int(np.isnan(array).sum())} NaN among {array.size} numbers")
    return array


def _circle(period: float) -> tuple[float, float, float]:
    """The period as (high + low) scale^2, high near 1 and scale a power of 2: products of its size do not overflow."""
    scale = 2.0 ** (math.frexp(period)[1] // 2)
    high = period / scale / scale
    return high, TAU_LOW / scale / scale if period == math.tau else 0.0, scale  # 2 pi is no float64 number


@lru_cache(maxsize=1)
def _compiled() -> tuple[Any, Any]:
    """The kernels and their tables; here, since not everybody who imports the room needs numba."""
    from kexue.stats import _sector_kernel
    from kexue.stats._sector_table import tables

    return _sector_kernel, tables()


def _evaluate(n: np.ndarray, theta: np.ndarray, period: float, kind: str) -> Any:
    """What ``kind`` (a constant of the kernel) says, broadcast over n and theta; a scalar for scalars."""
    kernel, tables = _compiled()
    if n.ndim:
        n, theta = np.broadcast_arrays(n, theta)
    out = np.empty(theta.shape)
    kernel.evaluate(n.ravel(), theta.ravel(), *_circle(period), getattr(kernel, kind), tables, out.reshape(-1))
    return out[()]


def _on_tensors(n: Tensor, theta: Tensor, period: float, kind: str, dtype: torch.dtype) -> Tensor:
    counts, angles = _counts(n.cpu().numpy()), _reals("theta", theta.detach().double().cpu().numpy())
    if kind == "CDF":
        angles = np.maximum(angles, 0.0)
    return torch.from_numpy(np.asarray(_evaluate(counts, angles, period, kind))).to(theta.device, dtype)


@torch.library.custom_op("kexue::common_sector", mutates_args=())
def _sector_op(n: Tensor, theta: Tensor, period: float) -> Tensor:
    return _on_tensors(n, theta, period, "CDF", theta.dtype)


@_sector_op.register_fake
def _(n, theta, period):  # type: ignore[no-untyped-def]
    return theta.new_empty(theta.shape)


@torch.library.custom_op("kexue::common_sector_density", mutates_args=())
def _density_op(n: Tensor, theta: Tensor, period: float) -> Tensor:
    return _on_tensors(n, theta, period, "PDF", compute_dtype(theta))


@_density_op.register_fake
def _(n, theta, period):  # type: ignore[no-untyped-def]
    return theta.new_empty(theta.shape, dtype=compute_dtype(theta))


class _Probability(torch.autograd.Function):
    """P of tensors of equal shape; its gradient with respect to theta is the density."""

    @staticmethod
    def forward(ctx: Any, theta: Tensor, n: Tensor, period: float) -> Tensor:
        ctx.save_for_backward(theta, n)
        ctx.period = period
        return _sector_op(n, theta, period)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        theta, n = ctx.saved_tensors
        density = _density_op(n, theta, ctx.period)
        return (grad.to(density.dtype) * density).to(theta.dtype), None, None


def common_sector_probability(n: Any, theta: Any, *, period: float = math.tau) -> Any:
    """Probability that n points, uniform in a disc or on a circle, lie in a common sector of angle theta.

    Args:
        n: Number of points, an integer from 1 to 2**53 or an array or tensor of them.
        theta: Angle, a number, array or tensor that broadcasts with ``n``; <= 0 gives 0 for n >= 2, a full circle or
            more gives 1. One point always lies in a sector: n = 1 gives 1.
        period: The full circle in the unit of theta: 2 pi for radians, 360 for degrees, 1 for fractions.

    Returns:
        float64 number or array; a tensor, of theta's dtype and device and differentiable in theta (once), if an
        argument is a tensor. Whatever the device, it is computed in float64 on the CPU. Tiny probabilities keep their
        relative precision; for those near 1 use ``common_sector(n).sf``.

    Raises:
        TypeError: n is not integer or theta not real.
        ValueError: n < 1, NaN, shapes that do not broadcast.

    Reference:
        科学空间 9324.

    Example:
        >>> float(common_sector_probability(4, 180, period=360))  # four ducks in one half of the pond
        0.5
        >>> common_sector_probability([2, 3, 4], 180, period=360)
        array([1.  , 0.75, 0.5 ])
    """
    high = _period(period)
    if not isinstance(n, Tensor) and not isinstance(theta, Tensor):
        return _evaluate(_counts(n), np.maximum(_reals("theta", theta), 0.0), high, "CDF")
    if not isinstance(theta, Tensor):
        theta = torch.as_tensor(_reals("theta", theta), device=n.device).to(torch.get_default_dtype())
    elif not theta.is_floating_point():
        if theta.dtype == torch.bool or theta.is_complex():
            raise TypeError(f"theta must be real numbers; got dtype {theta.dtype}")
        theta = theta.to(torch.get_default_dtype())
    if not isinstance(n, Tensor):
        n = torch.as_tensor(n, device=theta.device)
    if n.is_floating_point() or n.is_complex() or n.dtype == torch.bool:
        raise TypeError(f"n must be an integer or a tensor of integers; got dtype {n.dtype}")
    try:
        n, theta = torch.broadcast_tensors(n, theta)
    except RuntimeError:
        raise ValueError(f"n and theta must broadcast; got {tuple(n.shape)} and {tuple(theta.shape)}") from None
    return _Probability.apply(theta, n, high)


class CommonSector:
    """The distribution that :func:`common_sector` returns, frozen for one n, with the methods of scipy.stats.

    Its support is [0, period (1 - 1/n)]. All methods take numbers or arrays; NaN is a ValueError.

    Attributes:
        n: Number of points.
        period: The full circle in the unit of the angles.
    """

    def __init__(self, n: int, period: float = math.tau) -> None:
        check_int("n", n, 1)
        if n > MOST:
            raise ValueError(f"n must be from 1 to 2**53; got {n}")
        self.n = int(n)
        self.period = _period(period)

    def __repr__(self) -> str:
        circle = "" if self.period == math.tau else f", period={self.period:g}"
        return f"common_sector(n={self.n}{circle})"

    def _of(self, theta: Any, kind: str) -> Any:
        return _evaluate(np.asarray(self.n), _reals("theta", theta), self.period, kind)

    def cdf(self, theta: Any) -> Any:
        """P(smallest sector <= theta): all points lie in a sector of angle theta."""
        return self._of(theta, "CDF")

    def sf(self, theta: Any) -> Any:
        """1 - cdf with its own relative precision: arcs of period - theta at the points cover the circle."""
        return self._of(theta, "SF")

    def logcdf(self, theta: Any) -> Any:
        """Logarithm of the cdf, also where that underflows."""
        return self._of(theta, "LOGCDF")

    def logsf(self, theta: Any) -> Any:
        """Logarithm of the sf, also where that underflows."""
        return self._of(theta, "LOGSF")

    def pdf(self, theta: Any) -> Any:
        """Density per unit of angle; for n = 1, where the sector has angle 0, it is 0."""
        return self._of(theta, "PDF")

    def logpdf(self, theta: Any) -> Any:
        """Logarithm of the pdf."""
        return self._of(theta, "LOGPDF")

    def ppf(self, q: Any) -> Any:
        """The angle that the smallest sector stays below with probability q (..., each in [0, 1])."""
        return self._quantile(q, False)

    def isf(self, q: Any) -> Any:
        """The angle that the smallest sector exceeds with probability q; for q near 0 more precise than ppf(1 - q)."""
        return self._quantile(q, True)

    def _quantile(self, q: Any, upper: bool) -> Any:
        kernel, tables = _compiled()
        q = _reals("q", q)
        if q.size and not (q.min() >= 0.0 and q.max() <= 1.0):
            raise ValueError(f"q must lie in [0, 1]; got values from {q.min()} to {q.max()}")
        out = np.empty(q.shape)
        kernel.quantile(self.n, q.ravel(), *_circle(self.period), upper, tables, out.reshape(-1))
        return out[()]

    def _harmonic(self) -> tuple[float, float]:
        """The sums of 1/k and 1/k^2 for k <= n."""
        n = self.n
        if n <= 1000:
            return math.fsum(1.0 / k for k in range(1, n + 1)), math.fsum(1.0 / k**2 for k in range(1, n + 1))
        first = math.log(n) + 0.5772156649015329 + 1.0 / (2.0 * n) - 1.0 / (12.0 * n**2) + 1.0 / (120.0 * n**4)
        return first, math.pi**2 / 6.0 - 1.0 / n + 1.0 / (2.0 * n**2) - 1.0 / (6.0 * n**3) + 1.0 / (30.0 * n**5)

    def mean(self) -> float:
        """The mean, period (1 - H_n / n) with H_n = 1 + 1/2 + ... + 1/n."""
        return self.period * (1.0 - self._harmonic()[0] / self.n)

    def var(self) -> float:
        """Variance; with the second harmonic number it is a difference that loses no digits."""
        first, second = self._harmonic()
        return self.period**2 * max(self.n * second - first**2, 0.0) / (float(self.n) ** 2 * (self.n + 1.0))

    def std(self) -> float:
        """Standard deviation."""
        return math.sqrt(self.var())

    def median(self) -> float:
        """The quantile at 1/2."""
        return float(self.ppf(0.5))

    def support(self) -> tuple[float, float]:
        """Smallest and largest possible angle."""
        return 0.0, self.period - self.period / self.n

    def rvs(self, size: int | tuple[int, ...] | None = None, random_state: Any = None) -> Any:
        """Random smallest sectors: of n exponential gaps up to 4096 points, by the quantile beyond.

        Args:
            size: Shape; None gives one number.
            random_state: numpy Generator or RandomState, or the seed of a Generator.
        """
        if isinstance(random_state, (np.random.Generator, np.random.RandomState)):
            random: Any = random_state
        else:
            random = np.random.default_rng(random_state)
        shape = () if size is None else tuple(np.atleast_1d(size).tolist())
        out = np.empty(shape)
        flat = out.reshape(-1)
        if self.n > DRAWN:
            flat[:] = self.ppf(random.uniform(size=flat.size))
            return out[()]
        step = max(1, DRAWN_AT_ONCE // self.n)
        for start in range(0, flat.size, step):
            gaps = random.standard_exponential((min(step, flat.size - start), self.n))
            largest = gaps.argmax(1)[:, None]
            total = gaps.sum(1)
            np.put_along_axis(gaps, largest, 0.0, 1)  # not 1 - max / sum, which would cancel for n = 2
            flat[start : start + step] = self.period * (gaps.sum(1) / total)
        return out[()]


def common_sector(n: int, period: float = math.tau) -> CommonSector:
    """Distribution of the angle of the smallest sector that holds n random points, in the manner of scipy.stats.

    Args:
        n: Number of points, 1 to 2**53.
        period: The full circle in the unit of the angles: 2 pi for radians, 360 for degrees, 24 for hours.

    Returns:
        :class:`CommonSector` with ``cdf, sf, logcdf, logsf, pdf, logpdf, ppf, isf, mean, var, std, median, support,
        rvs``. Relative errors of both tails are below 4e-14 up to 2^15 points, for 10^9 points below 1e-11, where the
        tail is no smaller than 1e-300. In float64 an angle near the full circle is itself rounded, to 1e-16 of it:
        ``sf(isf(q))`` returns q only to about 1e-16 n.

    Raises:
        TypeError: n is no integer.
        ValueError: n < 1 or a period that is not positive.

    Reference:
        科学空间 9324; Stevens 1939.

    Example:
        >>> D = common_sector(n=50, period=360)
        >>> round(float(D.cdf(330)), 6), round(D.mean(), 3)
        (0.556342, 327.606)
        >>> f"{D.sf(352.5):.3e}"
        '2.342e-68'
    """
    return CommonSector(n, period)


def _as_tensor(angles: Any) -> Tensor:
    """Angles (..., n) as a floating tensor, n >= 1, finite."""
    if not isinstance(angles, Tensor):
        angles = torch.from_numpy(np.array(_reals("angles", angles)))
    elif angles.dtype == torch.bool or angles.is_complex():
        raise TypeError(f"angles must be real numbers; got dtype {angles.dtype}")
    elif not angles.is_floating_point():
        angles = angles.to(torch.get_default_dtype())
    if angles.dim() == 0 or angles.shape[-1] == 0:
        raise ValueError(f"angles must have shape (..., n) with n >= 1; got {tuple(angles.shape)}")
    if not torch.compiler.is_compiling() and not bool(torch.isfinite(angles).all()):
        raise ValueError("angles must be finite; got NaN or infinity")
    return angles


def _sector(angles: Tensor, period: float) -> tuple[Tensor, Tensor]:
    x = torch.remainder(angles.to(compute_dtype(angles)), period)
    x = torch.where(x >= period, torch.zeros_like(x), x).sort(-1).values  # the remainder of -1e-20 is rounded to period
    following = x.roll(-1, -1)
    gaps = torch.cat([x[..., 1:] - x[..., :-1], x[..., :1] + (period - x[..., -1:])], -1)
    largest = gaps.detach().argmax(-1, keepdim=True)
    start, end = following.gather(-1, largest), x.gather(-1, largest)
    # Not period - gap, which would lose the digits of a narrow sector.
    width = torch.where(end >= start, end - start, end + (period - start))
    return start.squeeze(-1), width.squeeze(-1)


def smallest_sector(angles: Any, *, period: float = math.tau) -> tuple[Any, Any]:
    """The smallest sector that holds all angles of a row.

    Args:
        angles: (..., n), finite, any real numbers (taken modulo the period); list, array or tensor.
        period: The full circle in the unit of the angles: 2 pi for radians, 360 for degrees, 24 for hours.

    Returns:
        ``start`` in [0, period) and ``width``, each (...): the sector runs from start to start + width. float64 arrays
        or numbers; tensors of the input's dtype, differentiable, for a tensor. Cost O(n log n).

    Raises:
        TypeError: Angles that are not real.
        ValueError: No angle, NaN or infinity, a period that is not positive.

    Example:
        >>> start, width = smallest_sector([350.0, 10.0, 30.0], period=360)
        >>> float(start), float(width)
        (350.0, 40.0)
    """
    high = _period(period)
    x = _as_tensor(angles)
    start, width = _sector(x, high)
    if isinstance(angles, Tensor):
        start = start.to(x.dtype)
        return start.masked_fill(start >= high, 0.0), width.to(x.dtype)  # fp16 and bf16 may round up to the period
    return start.numpy()[()], width.numpy()[()]


class CircularRangeResult(NamedTuple):
    """What :func:`circular_range_test` returns."""

    statistic: Any
    pvalue: Any


def circular_range_test(angles: Any, *, period: float = math.tau) -> CircularRangeResult:
    """Test of uniformity on the circle against clustering: do the angles fit into too small a sector?

    Args:
        angles: (..., n), finite; one test for each row.
        period: The full circle in the unit of the angles; 24 for times of day in hours.

    Returns:
        ``statistic``, the angle of the smallest sector (the circular range), and ``pvalue``, the probability that n
        uniform angles have one at most as large; each (...), of the kind of the input.

    Raises:
        TypeError: Angles that are not real.
        ValueError: No angle, NaN or infinity, a period that is not positive.

    Example:
        >>> result = circular_range_test([23.5, 0.25, 1.0, 2.75, 22.0], period=24)  # hours: around midnight
        >>> float(result.statistic), round(float(result.pvalue), 5)
        (4.75, 0.00767)
    """
    high = _period(period)
    x = _as_tensor(angles)
    _, width = _sector(x, high)
    if isinstance(angles, Tensor):
        pvalue = common_sector_probability(x.shape[-1], width, period=high)
        return CircularRangeResult(width.to(x.dtype), pvalue.to(x.dtype))
    found = width.numpy()[()]
    return CircularRangeResult(found, common_sector_probability(x.shape[-1], found, period=high))


def halfspace_probability(n: Any, d: Any) -> Any:
    """Probability that n points, symmetric around the centre of a d-dimensional ball, lie in a common half of it.

    Wendel's theorem: 2^(1-n) sum over k < d of C(n-1, k); d = 2 is the half-disc, n / 2^(n-1).

    Args:
        n: Number of points >= 1; integer or array.
        d: Dimension >= 1; integer or array that broadcasts with n.

    Returns:
        float64 number or array. Exactly rounded up to n = 1000, by the incomplete beta function beyond.

    Raises:
        TypeError: n or d is not integer.
        ValueError: n < 1 or d < 1.

    Reference:
        Wendel 1962.

    Example:
        >>> float(halfspace_probability(4, 2)), float(halfspace_probability(4, 3))
        (0.5, 0.875)
    """
    points, dims = np.broadcast_arrays(_counts(n), _integers("d", d))
    out = np.empty(points.shape)
    flat = out.reshape(-1)
    for i, (count, dim) in enumerate(zip(points.ravel().tolist(), dims.ravel().tolist(), strict=True)):
        if dim >= count:
            flat[i] = 1.0
        elif count <= 1000:
            flat[i] = sum(math.comb(count - 1, k) for k in range(dim)) / 2 ** (count - 1)
        else:
            from scipy.special import betainc

            flat[i] = betainc(count - dim, dim, 0.5)
    return out[()]
