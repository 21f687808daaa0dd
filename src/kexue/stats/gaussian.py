"""Multivariate normals (多元正态分布): full, factored, diagonal and low-rank-plus-diagonal covariances, in batches.

Source: 科学空间 8512 (两个多元正态分布的KL散度、巴氏距离和W距离)

    entropy  n/2 (1 + ln 2 pi) + 1/2 ln det S

A covariance is kept in the form in which it was given, so that a diagonal costs O(n) and a factor O(n r^2). It is
factored once, when it is checked, and every divergence uses that factor again. Singular covariances are allowed.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch import distributions as td

from kexue._tensors import check_float, compute_dtype
from kexue.stats._bures_kernel import cholesky, eigen_factor, symmetric

__all__ = ["Gaussian"]

NUMBA_FROM = 2**14  # entries of covariances that are worth a compiled check
_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def _check_finite(name: str, x: Tensor) -> None:
    x = x.detach()
    # The sum is finite in the usual case, and one fast operation; it may overflow where the values do not.
    if not bool(x.sum().isfinite()) and not bool(torch.isfinite(x).all()):
        raise ValueError(f"{name} must be finite; got {int((~torch.isfinite(x)).sum())} values that are not")


def _asymmetry(cov: Tensor) -> tuple[Tensor, Tensor]:
    """Largest difference from the transpose, and largest entry of the diagonal: of all, if semi-definite."""
    if cov.numel() >= NUMBA_FROM and cov.device.type == "cpu" and cov.is_contiguous():
        from kexue.stats._gaussian_lanes import asymmetry

        return asymmetry(cov)
    gap = torch.linalg.vector_norm(cov - cov.mT, torch.inf, (-2, -1))
    return gap, cov.diagonal(dim1=-2, dim2=-1).abs().amax(-1)


class Gaussian:
    """A multivariate normal, or a batch of them. Tensors are shared with the caller and must not be changed.

    Args:
        mean: Means, (..., n), floating.
        cov: Covariances, (..., n, n), symmetric and positive semi-definite.
        scale_tril: Lower triangular factors with a positive diagonal, (..., n, n), instead of ``cov``.
        diag: Variances, (..., n), positive; with ``factor`` they may be 0.
        factor: F of the covariance F F' + diag(D), (..., n, r); without ``diag`` it is F F', which is singular for
            r < n.
        validate: Look at the values; the kind and the shape of the arguments are checked always. While torch.compile
            traces, values cannot be looked at.

    Half precision is computed in float32. Leading (batch) dimensions broadcast.

    Raises:
        TypeError: Tensors that are not floating.
        ValueError: None or several forms of the covariance, shapes that do not match, values that are not finite, a
            covariance that is asymmetric or indefinite beyond rounding (relative 1e-8 in float64, 1e-4 in float32),
            variances or a triangle's diagonal that are not positive.

    Example:
        >>> p = Gaussian(torch.zeros(2), torch.eye(2))
        >>> p.covariance.diagonal(), round(p.entropy().item(), 4)
        (tensor([1., 1.]), 2.8379)
        >>> Gaussian(torch.zeros(3), diag=torch.ones(3), factor=torch.ones(3, 1)).covariance[0]
        tensor([2., 1., 1.])
    """

    def __init__(
        self,
        mean: Tensor,
        cov: Tensor | None = None,
        *,
        scale_tril: Tensor | None = None,
        diag: Tensor | None = None,
        factor: Tensor | None = None,
        validate: bool = True,
    ) -> None:
        given: dict[str, Any] = {"mean": mean, "cov": cov, "scale_tril": scale_tril, "diag": diag, "factor": factor}
        forms = [name for name, x in given.items() if x is not None][1:]
        if forms not in (["cov"], ["scale_tril"], ["diag"], ["factor"], ["diag", "factor"]):
            raise ValueError(f"give one of cov, scale_tril, diag, factor, or diag and factor; got {forms or 'none'}")
        for name in ("mean", *forms):
            check_float(name, given[name])
        if mean.dim() == 0 or mean.shape[-1] == 0:
            raise ValueError(f"mean must have shape (..., n) with n >= 1; got {tuple(mean.shape)}")
        n = mean.shape[-1]
        for name in forms:
            shape = tuple(given[name].shape)
            square = name in ("cov", "scale_tril")
            good = shape[-1:] == (n,) if name == "diag" else len(shape) >= 2 and shape[-2] == n
            if not good or (square and shape[-1] != n):
                wanted = f"(..., {n})" if name == "diag" else f"(..., {n}, {n if square else 'r'})"
                raise ValueError(f"{name} must have shape {wanted} for a mean of length {n}; got {shape}")
        if diag is not None and factor is not None and factor.shape[-1] == 0:  # a diagonal, then
            given["factor"], forms = None, ["diag"]
        tensors = [x for x in given.values() if x is not None]
        dtype = compute_dtype(*tensors)
        tolerance = max(_TOLERANCE.get(x.dtype, 1e-4) for x in tensors[1:])
        parts: list[Any] = [None if x is None else x.to(dtype) for x in given.values()]
        mean, cov, scale_tril, diag, factor = parts
        events = ((mean, 1), (cov, 2), (scale_tril, 2), (diag, 1), (factor, 2))
        lead = [x.shape[: x.dim() - event] for x, event in events if x is not None]
        try:
            self.batch_shape = torch.broadcast_shapes(*lead)
        except RuntimeError:
            raise ValueError(f"batch shapes of mean and {', '.join(forms)} must broadcast; got {lead}") from None
        self._mean: Tensor = mean
        self._cov: Any = cov  # a tensor or None, like the next three
        self._tril: Any = scale_tril
        self._diag: Any = diag
        self._factor: Any = factor
        self._cholesky: tuple[Tensor, Tensor] | None = None
        if validate and not torch.compiler.is_compiling():
            for name in ("mean", *forms):
                _check_finite(name, given[name])
        if cov is not None:
            self._cov = self._checked(cov, tolerance, validate)
        elif scale_tril is not None:
            self._tril = self._checked_tril(scale_tril, validate)
        elif diag is not None and validate and not torch.compiler.is_compiling() and diag.numel():
            low = float(diag.detach().min())
            if low < 0 or (low == 0 and factor is None):
                wanted = "positive" if factor is None else "non-negative"
                raise ValueError(f"diag holds variances, which must be {wanted}; got {low}")

    def _checked(self, cov: Tensor, tolerance: float, validate: bool) -> Tensor:
        if torch.compiler.is_compiling() or not validate:
            return symmetric(cov)
        with torch.no_grad():
            gap, scale = _asymmetry(cov)
            if bool((gap > tolerance * scale).any()):
                worst = float((gap / scale).max())
                raise ValueError(f"cov must be symmetric to {tolerance:g} of its largest entry; got {worst:.3g}")
            exact = bool((gap <= 8 * torch.finfo(cov.dtype).eps * scale).all())
        if not exact:  # more than the rounding of a product
            cov = symmetric(cov)
        with torch.no_grad():
            self._cholesky = cholesky(cov.detach())
            bad = ~self._cholesky[1]
            if bool(bad.any()):
                w = torch.linalg.eigvalsh(cov.detach()[bad])
                if bool((w[..., 0] < -tolerance * w.abs().amax(-1)).any()):
                    raise ValueError(
                        f"cov must be positive semi-definite; got an eigenvalue of {float(w.min()):.3g} "
                        f"beside one of {float(w.max()):.3g}"
                    )
        return cov

    def _checked_tril(self, tril: Tensor, validate: bool) -> Tensor:
        if validate and not torch.compiler.is_compiling() and tril.numel():
            low = float(tril.detach().diagonal(dim1=-2, dim2=-1).min())
            if low <= 0:
                raise ValueError(f"scale_tril must have a positive diagonal; got {low}")
            above = float(tril.detach().triu(1).abs().max())
            if above:
                raise ValueError(f"scale_tril must be lower triangular; got {above} above the diagonal")
        return tril

    # ------------------------------------------------------------------------------------------------ constructors

    @classmethod
    def from_torch(cls, distribution: td.Distribution) -> Gaussian:
        """From MultivariateNormal, LowRankMultivariateNormal, Normal (one-dimensional) or Independent(Normal, 1).

        Args:
            distribution: Gradients reach its parameters.

        Raises:
            TypeError: Any other distribution.
        """
        if isinstance(distribution, td.MultivariateNormal):
            mean = distribution.loc
            if "covariance_matrix" in distribution.__dict__:
                return cls(mean, distribution.__dict__["covariance_matrix"])
            return cls(mean, scale_tril=distribution._unbroadcasted_scale_tril)
        if isinstance(distribution, td.LowRankMultivariateNormal):
            return cls(
                distribution.loc,
                diag=distribution._unbroadcasted_cov_diag,
                factor=distribution._unbroadcasted_cov_factor,
            )
        if isinstance(distribution, td.Normal):
            return cls(distribution.loc.unsqueeze(-1), diag=distribution.scale.square().unsqueeze(-1))
        if isinstance(distribution, td.Independent) and isinstance(distribution.base_dist, td.Normal):
            base = distribution.base_dist
            if distribution.reinterpreted_batch_ndims != 1:
                raise TypeError(
                    f"Independent(Normal) must have 1 event dimension; got {distribution.reinterpreted_batch_ndims}"
                )
            return cls(base.loc, diag=base.scale.square())
        raise TypeError(
            "expected MultivariateNormal, LowRankMultivariateNormal, Normal or Independent(Normal, 1); "
            f"got {type(distribution).__name__}"
        )

    @classmethod
    def from_samples(cls, samples: Tensor) -> Gaussian:
        """Mean and covariance (divided by N - 1) of samples.

        Args:
            samples: (..., N, n) with N >= 2; fewer samples than dimensions are kept as a factor, without any n x n
                matrix. Gradients reach them.

        Raises:
            TypeError: Not a floating tensor.
            ValueError: Fewer than two samples, or values that are not finite.
        """
        check_float("samples", samples)
        if samples.dim() < 2 or samples.shape[-2] < 2 or samples.shape[-1] < 1:
            raise ValueError(f"samples must have shape (..., N, n) with N >= 2, n >= 1; got {tuple(samples.shape)}")
        if not torch.compiler.is_compiling():
            _check_finite("samples", samples)
        x = samples.to(compute_dtype(samples))
        count, n = x.shape[-2:]
        mean = x.mean(-2)
        factor = (x - mean.unsqueeze(-2)).mT / math.sqrt(count - 1)
        if count <= n:
            return cls(mean, factor=factor, validate=False)
        with torch.autocast(x.device.type, enabled=False):
            cov = factor @ factor.mT
        return cls(mean, cov)

    # -------------------------------------------------------------------------------------------------- what it holds

    @property
    def mean(self) -> Tensor:
        """Means, (..., n)."""
        return self._mean.expand(*self.batch_shape, self.dim)

    @property
    def dim(self) -> int:
        """Number of dimensions n."""
        return self._mean.shape[-1]

    @property
    def dtype(self) -> torch.dtype:
        """What it is computed in."""
        return self._mean.dtype

    @property
    def covariance(self) -> Tensor:
        """Covariances, (..., n, n)."""
        return self._matrix().expand(*self.batch_shape, self.dim, self.dim)

    def _matrix(self) -> Tensor:
        """The covariance without the batch dimensions that only the mean has."""
        if self._cov is not None:
            return self._cov
        with torch.autocast(self._mean.device.type, enabled=False):
            if self._tril is not None:
                return self._tril @ self._tril.mT
            if self._factor is None:
                return torch.diag_embed(self._diag)
            low = self._factor @ self._factor.mT
            return low if self._diag is None else low + torch.diag_embed(self._diag)

    def _factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
        """Cholesky factor without gradient and where it is one; None while torch.compile traces."""
        if torch.compiler.is_compiling():
            return None
        if self._cholesky is None:
            with torch.no_grad():
                if self._tril is not None:
                    tril = self._tril.detach()
                    self._cholesky = tril, torch.ones(tril.shape[:-2], dtype=torch.bool, device=tril.device)
                else:
                    self._cholesky = cholesky(self._matrix().detach())
        factor, ok = self._cholesky
        return None if factor.dtype != dtype else (factor, ok)

    def __repr__(self) -> str:
        form = "cov" if self._cov is not None else "scale_tril" if self._tril is not None else ""
        form = form or ("diag" if self._factor is None else "factor" if self._diag is None else "diag and factor")
        return f"Gaussian(batch_shape={tuple(self.batch_shape)}, dim={self.dim}, {form}, {self.dtype})"

    # -------------------------------------------------------------------------------------------------------- methods

    def entropy(self) -> Tensor:
        """Differential entropy in nats, (...,); -inf for a singular covariance."""
        from kexue.stats._gaussian_structured import log_determinant

        logdet = log_determinant(self)
        return (0.5 * (self.dim * (1 + math.log(2 * math.pi)) + logdet)).expand(self.batch_shape)

    def rsample(self, shape: tuple[int, ...] = (), generator: torch.Generator | None = None) -> Tensor:
        """Samples that pass gradients to the parameters.

        Args:
            shape: Leading dimensions of the result, before those of the batch.
            generator: Source of randomness.

        Returns:
            (*shape, ..., n).

        Raises:
            ValueError: A singular ``cov`` that requires a gradient: its factor has none; give ``factor`` instead.
        """
        lead = (*shape, *self.batch_shape)

        def noise(width: int) -> Tensor:
            device = self._mean.device if generator is None else generator.device
            eps = torch.empty(*lead, width, dtype=self.dtype, device=device).normal_(generator=generator)
            return eps.to(self._mean.device)

        if self._cov is None and self._tril is None:
            out = self._mean
            if self._diag is not None:
                out = out + self._diag.sqrt() * noise(self.dim)
            if self._factor is not None:
                out = out + (self._factor @ noise(self._factor.shape[-1]).unsqueeze(-1)).squeeze(-1)
            return out
        root = self._tril
        if root is None:
            cov = self._matrix()
            found = self._factors(self.dtype)
            if found is None or bool(found[1].all()):
                root = torch.linalg.cholesky(cov) if found is None or cov.requires_grad else found[0]
            else:
                if cov.requires_grad and torch.is_grad_enabled():
                    raise ValueError("a singular cov has no factor with a gradient; give factor= (and diag=) instead")
                v, scale = eigen_factor(cov.detach())
                root = v * scale.unsqueeze(-2)
        return self._mean + (root @ noise(self.dim).unsqueeze(-1)).squeeze(-1)


def as_gaussian(name: str, x: Any) -> Gaussian:
    """A Gaussian, or one made from a distribution of torch."""
    if isinstance(x, Gaussian):
        return x
    if isinstance(x, td.Distribution):
        try:
            return Gaussian.from_torch(x)
        except TypeError as error:
            raise TypeError(f"{name}: {error}") from None
    raise TypeError(f"{name} must be a Gaussian or a normal of torch.distributions; got {type(x).__name__}")
