"""Feature maps of linear attention (线性注意力的核函数): sim(q, k) = phi_q(q) . phi_k(k).

Source: 科学空间 7546 (线性Attention的探索:Attention必须有个Softmax吗?), with the exponential activation of 8338;
Katharopoulos et al. 2020 (elu + 1), Shen et al. 2018 (softmax on both sides).

A map is a Module that answers three questions about itself: how many features it gives, whether the similarity that it
defines can be negative, and whether a key is mapped without looking at other keys (only then can it be causal). Maps
whose features are exponentials return them as logarithms: the contraction then subtracts a running maximum, so that
nothing overflows, in training as in step-by-step decoding, and later keys never touch earlier outputs.

Shapes: B batch, T time (tokens), H heads, D width, M features.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kexue._checks import check_choice

__all__ = ["FEATURE_MAPS", "FeatureMap"]

LOG2E = math.log2(math.e)
MIN_NORM = 1e-12  # a shorter vector has no direction: it counts as zero


class FeatureMap(nn.Module):
    """The pair of maps (phi_q, phi_k) that a linear attention consists of; subclass it for your own kernel.

    Attributes:
        log_space: :meth:`query` and :meth:`key` return logarithms of the features.
        positive: sim(q, k) >= 0 for all q and k, so that weights can be normalised.
        causal: The features of a key depend on that key alone.

    Example:
        >>> class Squares(FeatureMap):
        ...     def query(self, q):
        ...         return q.square()
        ...     key = query
        >>> from kexue.attention import linear_attention
        >>> linear_attention(torch.ones(1, 1, 3, 2), torch.ones(1, 1, 3, 2), torch.ones(1, 1, 3, 4), Squares()).shape
        torch.Size([1, 1, 3, 4])
    """

    log_space: bool = False
    positive: bool = True
    causal: bool = True

    def num_features(self, dim: int) -> int:
        """Number of features M of vectors of width ``dim``."""
        return dim

    def positive_for(self, q: Tensor, k: Tensor) -> bool:
        """Whether sim >= 0 for these inputs; asked only where it is not so for all (:attr:`positive`).

        Args:
            q: (B, H, T, D).
            k: (B, G, S, D), G the heads of k and v.
        """
        return self.positive

    def start(self, q: Tensor, k: Tensor, mask: Tensor | None) -> None:
        """Called once before queries and keys are mapped, except where a state is continued; does nothing by itself.

        Args:
            q: (B, H, T, D).
            k: (B, G, S, D), G the heads of k and v.
            mask: (B, S), True = takes part; None = all.
        """

    def exponent(self, dim: int, dtype: torch.dtype, device: torch.device) -> Tensor | None:
        """Weight (M, D + 2) such that the features are exp(weight [x; |x|^2; 1]), if there is one.

        Then normalised attention maps them chunk by chunk and never holds those of the whole sequence. A factor that
        all features of a query share may be left out.
        """
        return None

    def query_factor(self, q: Tensor) -> Tensor | None:
        """Logarithm (B, H, T, 1) of what :meth:`query` leaves out since all features of a query share it, or None.

        Only asked for by maps in log space with ``normalize=False``; otherwise it cancels.
        """
        return None

    def query(self, q: Tensor) -> Tensor:
        """Features of queries.

        Args:
            q: (B, H, T, D), float32 or float64.

        Returns:
            (B, H, T, M), or their logarithms (:attr:`log_space`). A factor that all features of a query share cancels.
        """
        raise NotImplementedError(f"{type(self).__name__} must define query(q)")

    def key(self, k: Tensor) -> Tensor:
        """Features of keys.

        Args:
            k: (B, H, T, D), float32 or float64.

        Returns:
            (B, H, T, M), or their logarithms (:attr:`log_space`). A factor must be shared by all keys of all calls.
        """
        raise NotImplementedError(f"{type(self).__name__} must define key(k)")


class _Elu1(torch.autograd.Function):
    """Saves the features alone: phi' = min(phi, 1). exp2 is vectorised everywhere, exp is not."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        phi = x.clamp(max=0).mul_(LOG2E).exp2_().add_(x.clamp(min=0))
        ctx.save_for_backward(phi)
        return phi

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0] * ctx.saved_tensors[0].clamp(max=1)


def elu1(x: Tensor) -> Tensor:
    """Elu(x) + 1 without the cancellation of expm1(x) + 1: exp(x) keeps its relative precision down to underflow."""
    return _Elu1.apply(x)


def _relu(x: Tensor) -> Tensor:
    return F.relu(x) + 1e-3


def _relu2(x: Tensor) -> Tensor:
    return F.relu(x).square() + 1e-3


ACTIVATIONS: dict[Callable[[Tensor], Tensor], str] = {elu1: "elu1", _relu: "relu", _relu2: "relu2"}


class _Elementwise(FeatureMap):
    """The same function of every coordinate on both sides."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function
        self.activation = ACTIVATIONS.get(function)  # the causal operator knows it

    def query(self, q: Tensor) -> Tensor:
        """Features of queries."""
        return self.function(q)

    def key(self, k: Tensor) -> Tensor:
        """Features of keys."""
        return self.function(k)


class _Exp(FeatureMap):
    """e^q . e^k."""

    log_space = True

    def query(self, q: Tensor) -> Tensor:
        """Logarithms of the features of queries."""
        return q

    def key(self, k: Tensor) -> Tensor:
        """Logarithms of the features of keys."""
        return k

    def exponent(self, dim: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """The identity; what all features of a query share cancels."""
        return torch.eye(dim, dim + 2, dtype=dtype, device=device)


class _SoftmaxD(FeatureMap):
    """Softmax over the width on both sides."""

    def query(self, q: Tensor) -> Tensor:
        """Features of queries."""
        return q.softmax(-1)

    def key(self, k: Tensor) -> Tensor:
        """Features of keys."""
        return k.softmax(-1)


class _SoftmaxExp(_Exp):
    """Softmax over the width on q, exp on k: the causal form of efficient attention.

    The normaliser of softmax is shared by all features of a query and cancels, so that the similarity is that of
    ``exp``; only unnormalised outputs differ.
    """

    def query(self, q: Tensor) -> Tensor:
        """Logarithms of the features of queries."""
        return q.log_softmax(-1)


class _SoftmaxQK(FeatureMap):
    """Softmax over the width on q and over time on k (efficient attention): already normalised, never causal."""

    causal = False

    def query(self, q: Tensor) -> Tensor:
        """Features of queries."""
        return q.softmax(-1)

    def key(self, k: Tensor) -> Tensor:
        """Features of keys; keys that do not take part are -inf."""
        top = k.detach().amax(-2, keepdim=True) if k.shape[-2] else k.new_zeros(())
        weights = (k - torch.where(top > -torch.inf, top, 0.0)).exp()
        total = weights.sum(-2, keepdim=True)
        return weights / torch.where(total > 0, total, 1.0)


class _Cosine1(FeatureMap):
    """[1; q / |q|] . [1; k / |k|] = 1 + cos(q, k); a zero vector has no direction and similarity 1 to everything."""

    def num_features(self, dim: int) -> int:
        """One more than the width."""
        return dim + 1

    def query(self, q: Tensor) -> Tensor:
        """Features of queries."""
        size = q.detach().abs().amax(-1, keepdim=True)  # squares of long or short vectors would leave the numbers
        q = torch.where(size > MIN_NORM, q / size.clamp(min=MIN_NORM), 0.0)
        norm = torch.linalg.vector_norm(q, dim=-1, keepdim=True)
        unit = q / norm.clamp(min=0.5)  # at least 1, or 0
        return torch.cat([unit, torch.ones_like(norm)], -1)

    def key(self, k: Tensor) -> Tensor:
        """Features of keys."""
        return self.query(k)


_NAMED: dict[str, Callable[[], FeatureMap]] = {
    "elu1": lambda: _Elementwise(elu1),
    "exp": _Exp,
    "softmax_qk": _SoftmaxQK,
    "softmax_d": _SoftmaxD,
    "softmax_exp": _SoftmaxExp,
    "relu": lambda: _Elementwise(_relu),
    "relu2": lambda: _Elementwise(_relu2),
    "cosine1": _Cosine1,
}

FEATURE_MAPS: Mapping[str, FeatureMap] = {name: make() for name, make in _NAMED.items()}


def feature_map_of(feature_map: str | FeatureMap) -> FeatureMap:
    """The Module behind a name, or the Module itself."""
    if isinstance(feature_map, FeatureMap):
        return feature_map
    if not isinstance(feature_map, str):
        raise TypeError(f"feature_map must be a name or a kexue.attention.FeatureMap; got {type(feature_map).__name__}")
    check_choice("feature_map", feature_map, tuple(FEATURE_MAPS))
    return FEATURE_MAPS[feature_map]
