"""Softmax attention as an infinite-dimensional linear attention (作为无限维的线性Attention): polynomial feature maps.

Source: 科学空间 8601 (Transformer升级之路:5、作为无限维的线性Attention). With the score x = scale * q.k,

    Taylor             e^x ~ sum over m = 0..p of x^m / m!
    exponential limit  e^x ~ (1 + x / p)^p

Both are inner products of features, deterministic, with an error that is known exactly; as p grows the width of the
linear attention tends to infinity and the attention to softmax.

What we do differently, and why:

- Symmetric features: each product of coordinates once, with the root of its multiplicity. The same kernel as the full
  outer products with C(d + p, p) numbers instead of sum d^m: 2145 instead of 4161 for d = 64, p = 2.
- Inside a causal chunk no features are built: the polynomial is evaluated on the scores (``_series_kernel``).
- The error bounds are the exact suprema, from series of positive terms without cancellation, not Lagrange's bound.

When is sim >= 0? Even Taylor polynomials of exp are positive everywhere: at a minimum the derivative, which is the
polynomial without its last term, vanishes, so that the value is x^p / p!. Odd ones rise from -infinity through one
root; (1 + x / p)^p is never negative for even p, and for odd p negative below x = -p. Odd degrees are therefore only
positive on bounded scores, which ``normalize_inputs`` guarantees.

Shapes: B batch, T time (tokens), H heads, D width, M features.
"""

from __future__ import annotations

import math
from fractions import Fraction

import torch
from torch import Tensor

from kexue._checks import check_int, check_real
from kexue.attention import _polynomial as poly
from kexue.attention.feature_maps import MIN_NORM, FeatureMap

__all__ = ["ExpPowerFeatures", "PolynomialFeatures", "TaylorFeatures", "degree_for"]

MAX_BOUND = 700.0  # exp of it is finite


def _exp(x: float) -> float:
    return math.inf if x > 709.0 else math.exp(x)


def _taylor_error(degree: int, r: float, relative: bool) -> float:
    """Supremum over |x| <= r of |e^x - T_p(x)|, at x = r, or of |1 - T_p(x) e^-x|, at x = -r.

    The first is sum over m > p of r^m / m!. The second is the integral of t^p e^t / p! from 0 to r, which is
    r^(p+1) / p! * sum over j of r^j / (j! (p + 1 + j)).
    """
    if r == 0:
        return 0.0
    if r > MAX_BOUND:
        return math.inf
    first = (degree + 1) * math.log(r) - math.lgamma(degree + 1 if relative else degree + 2)
    total, term, j = 0.0, 1.0, 0  # the terms relative to exp(first)
    while True:
        part = term / (degree + 1 + j) if relative else term
        total += part
        j += 1
        term *= r / (j if relative else degree + 1 + j)
        if j > r and part < 1e-17 * total:
            break
    return _exp(first + math.log(total) + 1e-14 * (1 + abs(first)))  # rounding of the logarithms: upwards


def _log_gap(y: float) -> float:
    """Y - log(1 + y) for y >= -1, without cancellation around 0."""
    if y == -1:
        return math.inf
    if abs(y) > 0.1:
        return y - math.log1p(y)
    total, power, n = 0.0, y * y, 2
    while abs(power) / n > 1e-18 * abs(total):
        total += power / n if n % 2 == 0 else -power / n
        power, n = power * y, n + 1
    return total


def _power_error(degree: int, r: float, relative: bool) -> float:
    """Supremum over |x| <= r of |e^x - (1 + x/p)^p|, at x = r, or of |1 - (1 + x/p)^p e^-x|."""
    if r == 0:
        return 0.0
    if r > MAX_BOUND:
        return math.inf

    def above(x: float) -> float:  # 1 - (1 + x/p)^p e^-x for x >= -p
        return -math.expm1(-degree * _log_gap(x / degree))

    slack = 1 + 1e-13
    if not relative:
        return _exp(r) * above(r) * slack
    if r <= degree:
        return max(above(r), above(-r)) * slack
    # beyond x = -p: there 1 is reached, then |1 + x/p|^p e^-x takes over
    beyond = _exp(degree * math.log(r / degree - 1) + r) if r > degree else 0.0
    return max(1.0, beyond - 1 if degree % 2 == 0 else beyond + 1) * slack


class PolynomialFeatures(FeatureMap):
    """What both series have in common; use :class:`TaylorFeatures` or :class:`ExpPowerFeatures`.

    Attributes:
        kind: "taylor" or "power".
        degree: p.
        scale: Factor of q.k; None = 1 / sqrt(D).
        normalize_inputs: q and k are divided by their lengths.
        positive: sim >= 0 for all inputs.
    """

    kind: str = ""

    def __init__(self, degree: int, scale: float | None, normalize_inputs: bool) -> None:
        super().__init__()
        if scale is not None:
            check_real("scale", scale, above=0.0)
        if not isinstance(normalize_inputs, bool):
            raise TypeError(f"normalize_inputs must be a bool; got {normalize_inputs!r}")
        self.degree = int(degree)
        self.scale = None if scale is None else float(scale)
        self.normalize_inputs = normalize_inputs
        bound = 1.0 if scale is None else float(scale)  # of |x| for unit vectors; 1 / sqrt(D) is at most 1
        self.positive = self.degree % 2 == 0 or (normalize_inputs and self._positive_from(-bound))

    def _positive_from(self, x: float) -> bool:
        """Whether sim >= 0 from x on, for an odd degree."""
        raise NotImplementedError

    def positive_for(self, q: Tensor, k: Tensor) -> bool:
        """Also an odd degree is not negative on inputs that are short enough, such as unit vectors.

        Their lengths are looked at, which costs a pass over them; not while torch.compile traces.
        """
        if self.positive or self.normalize_inputs or torch.compiler.is_compiling() or not q.numel() or not k.numel():
            return self.positive
        longest = [torch.linalg.vector_norm(x.detach().double(), dim=-1).amax().item() for x in (q, k)]
        bound = self.scale_of(q.shape[-1]) * longest[0] * longest[1] * (1 - 1e-6)  # rounding of unit vectors
        return math.isfinite(bound) and self._positive_from(-bound)

    def scale_of(self, dim: int) -> float:
        """The factor of q.k for vectors of width ``dim``."""
        return dim**-0.5 if self.scale is None else self.scale

    def prepared(self, x: Tensor) -> Tensor:
        """Q or k as they enter the score: unit vectors with ``normalize_inputs``; a zero vector stays zero."""
        if not self.normalize_inputs:
            return x
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return x * torch.where(norm > MIN_NORM, norm.clamp(min=MIN_NORM).reciprocal(), 0.0)

    def num_features(self, dim: int) -> int:
        """C(dim + p, p): the monomials of up to degree p."""
        check_int("dim", dim, 1)
        return poly.num_monomials(dim, self.degree)

    def query(self, q: Tensor) -> Tensor:
        """Features of queries: their products with those of keys are the polynomial of scale * q.k."""
        return poly.features(self.prepared(q) * self.scale_of(q.shape[-1]) ** 0.5, self.kind, self.degree)

    def key(self, k: Tensor) -> Tensor:
        """Features of keys: the same map."""
        return self.query(k)

    def error_bound(self, r: float, relative: bool = False) -> float:
        """The largest error for scores |x| <= r, where x = scale * q.k: a supremum that is attained.

        Args:
            r: At least 0.
            relative: Of |sim(x) - e^x| / e^x instead of the absolute |sim(x) - e^x|. On wide intervals the relative
                error explodes at the negative end, where the weight is tiny.

        Returns:
            The bound; infinite beyond r = 700.

        Raises:
            ValueError: ``r`` is negative or not finite.
        """
        check_real("r", r, minimum=0.0)
        error = _taylor_error if self.kind == "taylor" else _power_error
        return error(self.degree, float(r), relative)

    def extra_repr(self) -> str:
        """What the constructor was given."""
        name = "degree" if self.kind == "taylor" else "power"
        return f"{name}={self.degree}, scale={self.scale}, normalize_inputs={self.normalize_inputs}"


class TaylorFeatures(PolynomialFeatures):
    """Features of the Taylor polynomial of e^x of degree p, for :func:`~kexue.attention.linear_attention`.

    Even degrees have a positive kernel and can be normalised. An odd degree can with ``normalize_inputs`` if the
    polynomial is not negative on [-scale, scale]: always for scale <= 1, up to 1.596 for degree 3, 2.180 for degree 5;
    without it if the inputs at hand are short enough for that. Degree 1 with ``normalize_inputs`` and scale 1 is the
    kernel ``"cosine1"``.

    Args:
        degree: p, at least 1. Features: C(D + p, p), 2145 for D = 64 and p = 2.
        scale: The score is scale * q.k; default 1 / sqrt(D).
        normalize_inputs: Divide q and k by their lengths, so that |x| <= scale.

    Raises:
        TypeError: ``degree`` is not an integer, ``scale`` is not a number.
        ValueError: ``degree`` below 1, ``scale`` not positive.

    Reference:
        科学空间 8601, https://spaces.ac.cn/archives/8601.

    Example:
        >>> from kexue.attention import linear_attention
        >>> q, k, v = (torch.randn(1, 2, 50, 8, generator=torch.Generator().manual_seed(i)) for i in range(3))
        >>> phi = TaylorFeatures(degree=12)
        >>> softmax = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        >>> (linear_attention(q, k, v, phi, causal=True) - softmax).abs().max().item() < 0.01
        True
        >>> small = TaylorFeatures(degree=2)
        >>> small.num_features(64), round(small.error_bound(1.0), 3), round(small.error_bound(1.0, relative=True), 3)
        (2145, 0.218, 0.359)
    """

    kind = "taylor"

    def __init__(self, degree: int = 2, scale: float | None = None, normalize_inputs: bool = False) -> None:
        check_int("degree", degree, 1)
        super().__init__(degree, scale, normalize_inputs)

    def _positive_from(self, x: float) -> bool:
        exact = Fraction(x)  # the polynomial rises: its value at the left end decides
        total = term = Fraction(1)
        for m in range(1, self.degree + 1):
            term = term * exact / m
            total += term
        return total >= 0


class ExpPowerFeatures(PolynomialFeatures):
    """Features of (1 + x / p)^p, which tends to e^x, for :func:`~kexue.attention.linear_attention`.

    The relative error is about x^2 / (2 p): the Taylor polynomial of the same size is closer by orders of magnitude.
    Even powers have a kernel that is never negative (0 at x = -p) and can be normalised; odd ones with
    ``normalize_inputs`` if scale <= p.

    Args:
        power: p, at least 1. Features: C(D + p, p).
        scale: The score is scale * q.k; default 1 / sqrt(D).
        normalize_inputs: Divide q and k by their lengths, so that |x| <= scale.

    Raises:
        TypeError: ``power`` is not an integer, ``scale`` is not a number.
        ValueError: ``power`` below 1, ``scale`` not positive.

    Reference:
        科学空间 8601, https://spaces.ac.cn/archives/8601.

    Example:
        >>> phi = ExpPowerFeatures(power=4, scale=1.0)
        >>> q, k = torch.tensor([1.0, 2.0]), torch.tensor([0.5, 0.25])
        >>> round((phi.query(q) @ phi.key(k)).item(), 4)  # (1 + 1 / 4)^4
        2.4414
    """

    kind = "power"

    def __init__(self, power: int = 4, scale: float | None = None, normalize_inputs: bool = False) -> None:
        check_int("power", power, 1)
        super().__init__(power, scale, normalize_inputs)

    @property
    def power(self) -> int:
        """The degree, by its other name."""
        return self.degree

    def _positive_from(self, x: float) -> bool:
        return x >= -self.degree


def degree_for(tol: float, bound: float, relative: bool = False) -> int:
    """The smallest even degree whose Taylor polynomial is closer to e^x than ``tol`` for all scores |x| <= ``bound``.

    Args:
        tol: Greater than 0.
        bound: Of |x|, from 0 to 700.
        relative: Measure |T(x) - e^x| / e^x instead of |T(x) - e^x|.

    Returns:
        An even number, at least 2.

    Raises:
        ValueError: ``tol`` is not positive, ``bound`` is negative or so large that e^bound overflows.

    Example:
        >>> degree_for(1e-3, 1.0), degree_for(1e-3, 1.0, relative=True), degree_for(1e-3, 4.0)
        (6, 6, 16)
    """
    check_real("tol", tol, above=0.0)
    check_real("bound", bound, minimum=0.0)
    if bound > MAX_BOUND:
        raise ValueError(f"bound must be at most {MAX_BOUND:g}, since e^bound has to be finite; got {bound}")
    degree = 2
    while _taylor_error(degree, float(bound), relative) >= tol:
        degree += 2
    return degree
