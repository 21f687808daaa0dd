"""Positive orthogonal random features, FAVOR+ (Performer, 正交正随机特征): softmax attention at linear cost, by chance.

Source: 科学空间 7921 (Performer:用随机投影将Attention的复杂度线性化); Choromanski et al. 2020, "Rethinking Attention
with Performers"; the variant "optimal": Likhosherstov et al. 2022, "Chefs' Random Tables".

    exp(x.y) = E[phi(x).phi(y)],  phi(x) = m^(-1/2) [exp(omega_r.x - |x|^2/2)],  omega_r ~ N(0, I_d),  r = 1..m
    optimal:  phi(x) = (1-4A)^(d/4) m^(-1/2) [exp(A |omega_r|^2 + sqrt(1-4A) omega_r.x - |x|^2/2)],  A <= 0
    cosh:     both exp(omega.x) and exp(-omega.x);   trig:  exp(|x|^2/2) cos, sin, which can be negative
    relu:     m^(-1/2) (relu(omega.x) + 1e-3), a kernel of its own

with x = q s^(1/2), y = k s^(1/2), s = 1 / sqrt(d). What we do differently, and why:

- Features stay logarithms until the contraction has subtracted a running maximum: nothing overflows, nothing is added
  to the features (others add 1e-4, which pulls towards uniform weights), and the causal form streams.
- Scale, normaliser and -|x|^2/2 are part of the one matrix product.
- Directions are exactly uniform (QR with the signs of R put right), new ones are drawn from a seed and a counter that
  live in the state_dict: a resumed run draws what the uninterrupted one would have drawn.
- The variance is known exactly (``_favor_variance``), also for orthogonal directions, where the paper has a bound.

Shapes: B batch, T time (tokens), H heads, D width, M features.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kexue._checks import check_choice, check_int, check_real
from kexue._tensors import check_float, compute_dtype
from kexue.attention._favor_variance import Design, exponential_variance, trigonometric_variance
from kexue.attention.feature_maps import FeatureMap

__all__ = ["FavorFeatures"]

VARIANTS = ("positive", "cosh", "optimal", "trig", "relu")
NORMS = ("chi", "sqrt_d", "quantile")
RELU_FLOOR = 1e-3
_STRIDE = 0x9E3779B97F4A7C15  # between the seeds of successive draws: odd, without a pattern


def _radii(count: int, dim: int, norms: str) -> Tensor | None:
    """(count,) or (1,) fixed lengths of the directions; None for random ones."""
    if norms == "chi":
        return None
    if norms == "sqrt_d":
        return torch.full((1,), math.sqrt(dim), dtype=torch.float64, device="cpu")
    from scipy.special import gammaincinv

    levels = torch.arange(1, count + 1, dtype=torch.float64, device="cpu") / (count + 1)
    return torch.from_numpy(2 * gammaincinv(dim / 2, levels.numpy())).sqrt()  # quantiles of chi(d)


def draw(count: int, dim: int, orthogonal: bool, norms: str, seed: int) -> Tensor:
    """(count, dim) random directions with their lengths, float64, drawn on the CPU: the same for every device."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, device="cpu", generator=generator)

    if orthogonal:
        q, r = torch.linalg.qr(normal(-(-count // dim), dim, dim))
        # The decomposition is unique, and q uniform, only when the diagonal of r is positive.
        q = q * torch.where(r.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).unsqueeze(-2)
        units = q.mT.reshape(-1, dim)[:count]
    else:
        units = F.normalize(normal(count, dim), dim=-1)
    radii = _radii(count, dim, norms)
    if radii is None:
        radii = normal(count, dim).norm(dim=-1)
    elif norms == "quantile":
        radii = radii[torch.randperm(count, device="cpu", generator=generator)]
    return units * radii.unsqueeze(-1)


def best_a(mean_square: Tensor, dim: int) -> Tensor:
    """A that minimises the second moment at |x + y|^2 = ``mean_square``, float64."""
    b = 4 * mean_square.double() - 2 * dim
    return -(b + (b.square() + 64 * dim * mean_square.double()).sqrt()) / (32 * dim)


def mean_pair_square(q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
    """Mean of |q_i + k_j|^2 over the pairs of each head, float64; NaN without a pair.

    Args:
        q: (..., H, T, D).
        k: (..., G, S, D); H is a multiple of G.
        mask: (B, S) True = takes part; applied to the queries too where there are as many of them.
    """
    q, k = q.detach(), k.detach()
    q = q.reshape(*k.shape[:-2], -1, *q.shape[-2:])  # (..., G, H / G, T, D)
    sums = []
    for x, heads in ((q, 2), (k, 1)):
        x = x.to(compute_dtype(x))
        count: Any = x.shape[-2]
        if mask is not None and mask.shape[-1] == x.shape[-2]:
            live = mask.view(mask.shape[0], *(1,) * heads, -1, 1)
            x = torch.where(live, x, 0.0)
            count = mask.sum(-1).view(-1, *(1,) * heads, 1)
        sums.append((x.square().sum((-2, -1)).unsqueeze(-1) / count, x.sum(-2) / count))
    (q2, q1), (k2, k1) = sums
    pairs = q2 + k2.unsqueeze(-2) + 2 * (q1 * k1.unsqueeze(-2)).sum(-1, keepdim=True)
    return pairs.double().nanmean()  # NaN: a sequence without a token


def _advance(
    projection: Tensor,
    schedule: Tensor,
    mean_square: Tensor | None,
    q: Tensor,
    k: Tensor,
    mask: Tensor | None,
    interval: int,
    orthogonal: bool,
    norms: str,
    scale: float,
) -> None:
    """Count a call in training; on every ``interval``-th one draw new directions and fit A to its queries and keys."""
    # Activation checkpointing runs the forward again during the backward: it must find what the first run found.
    if torch._C._current_graph_task_id() != -1:
        return
    schedule[2] += 1
    if int(schedule[2]) % interval:
        return
    _redraw(projection, schedule, orthogonal, norms)
    if mean_square is not None:
        _fit(mean_square, q, k, mask, scale)


@torch.no_grad()
def _redraw(projection: Tensor, schedule: Tensor, orthogonal: bool, norms: str) -> None:
    schedule[1] += 1
    seed, number = schedule[:2].tolist()
    projection.copy_(
        draw(projection.shape[0], projection.shape[1], orthogonal, norms, (seed + number * _STRIDE) % 2**63)
    )


@torch.no_grad()
def _fit(mean_square: Tensor, q: Tensor, k: Tensor, mask: Tensor | None, scale: float) -> None:
    found = mean_pair_square(q, k, mask) * scale
    mean_square.copy_(torch.where(found.isfinite(), found, mean_square.double()))


# As one node: the graph of a compiled training step would otherwise depend on a counter.
_scheduled = torch.library.custom_op(
    "kexue::favor_schedule", _advance, mutates_args=("projection", "schedule", "mean_square")
)


@_scheduled.register_fake
def _(
    projection: Tensor,
    schedule: Tensor,
    mean_square: Tensor | None,
    q: Tensor,
    k: Tensor,
    mask: Tensor | None,
    interval: int,
    orthogonal: bool,
    norms: str,
    scale: float,
) -> None:
    return None


class FavorFeatures(FeatureMap):
    """Random features whose expected similarity is exp(q.k / sqrt(D)), for :func:`linear_attention`.

    Directions are drawn anew on every ``redraw_interval``-th call in training mode, before queries and keys are mapped;
    never in eval mode, nor in a call that continues a state. Seed, counter and directions are in the state_dict: after
    loading, evaluation repeats itself and training goes on with the draws that it would have had.

    At a head width of 64 and inputs of unit variance no variant comes near softmax attention with 256 features: see
    :meth:`variance` and the method's page before swapping it into a trained model.

    Args:
        head_dim: D, width of queries and keys.
        num_features: M >= 1; default ``max(1, int(D ln D))``. ``"cosh"`` and ``"trig"`` draw half as many directions
            (rounded up; with an odd M the last direction gives one feature instead of two, without a bias).
        orthogonal: Directions orthogonal in groups of D: lower variance at no cost.
        norms: Lengths of the directions: ``"chi"`` (independent, unbiased), ``"sqrt_d"`` (all equal) or ``"quantile"``
            (evenly spaced quantiles of chi(D), randomly assigned); the last two have less variance and some bias.
        variant: ``"positive"`` (the paper's), ``"cosh"`` (with mirror images), ``"optimal"`` (least variance for the
            norms at hand), ``"trig"`` (can be negative: only with ``normalize=False``, for comparison) or ``"relu"``
            (a kernel of its own, relu(omega.x) + 1e-3).
        redraw_interval: Calls in training mode from one draw to the next; None = never.
        generator: Gives the seed; default torch's global one.
        scale: s of exp(s q.k), positive; default 1 / sqrt(D).

    Attributes:
        projection: (directions, D), a buffer.
        mean_square: Of ``"optimal"``, a buffer: mean of |x + y|^2, x and y being scaled queries and keys, for which A
            is best; negative = not known, then 2 D s (unit variance). :meth:`calibrate` sets it, otherwise the first
            call does with its own queries and keys; after that only a scheduled redraw changes it.

    Raises:
        TypeError: Wrong kind of argument.
        ValueError: A count below 1, an unknown ``norms`` or ``variant``, ``scale`` not positive.

    Reference:
        科学空间 7921; Choromanski et al. 2020, https://arxiv.org/abs/2009.14794.

    Example:
        >>> from kexue.attention import linear_attention
        >>> g = torch.Generator().manual_seed(0)
        >>> q, k, v = (torch.randn(1, 2, 100, 16, generator=g) / 2 for _ in range(3))
        >>> phi = FavorFeatures(16, 256, variant="optimal", generator=g)
        >>> o = linear_attention(q, k, v, feature_map=phi)
        >>> exact = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        >>> bool((o - exact).norm() < 0.15 * exact.norm())
        True
    """

    def __init__(
        self,
        head_dim: int,
        num_features: int | None = None,
        orthogonal: bool = True,
        norms: str = "chi",
        variant: str = "positive",
        redraw_interval: int | None = 1000,
        generator: torch.Generator | None = None,
        scale: float | None = None,
    ) -> None:
        super().__init__()
        check_int("head_dim", head_dim, 1)
        if num_features is not None:
            check_int("num_features", num_features, 1)
        if not isinstance(orthogonal, bool):
            raise TypeError(f"orthogonal must be a bool; got {orthogonal!r}")
        check_choice("norms", norms, NORMS)
        check_choice("variant", variant, VARIANTS)
        if redraw_interval is not None:
            check_int("redraw_interval", redraw_interval, 1)
        if generator is not None and not isinstance(generator, torch.Generator):
            raise TypeError(f"generator must be a torch.Generator; got {type(generator).__name__}")
        if scale is not None:
            check_real("scale", scale, above=0.0)
        self.head_dim = int(head_dim)
        self.features = max(1, int(head_dim * math.log(head_dim))) if num_features is None else int(num_features)
        self.orthogonal, self.norms, self.variant = orthogonal, norms, variant
        self.redraw_interval = None if redraw_interval is None else int(redraw_interval)
        self.scale = self.head_dim**-0.5 if scale is None else float(scale)
        self.log_space = variant not in ("trig", "relu")
        self.positive = variant != "trig"
        self.mirrored = self.features // 2 if variant in ("cosh", "trig") else 0
        self.register_buffer("projection", torch.empty(self.features - self.mirrored, self.head_dim))
        # seed, number of draws since it was set, calls in training mode
        self.register_buffer("schedule", torch.zeros(3, dtype=torch.int64))
        if variant == "optimal":
            self.register_buffer("mean_square", torch.tensor(-1.0))
        self._calibrated = False  # mean_square is known, as something that torch.compile can branch on
        self._seed(generator)

    projection: Tensor
    schedule: Tensor
    mean_square: Tensor

    def extra_repr(self) -> str:
        """What print shows."""
        return (
            f"head_dim={self.head_dim}, num_features={self.features}, orthogonal={self.orthogonal}, "
            f"norms={self.norms!r}, variant={self.variant!r}, redraw_interval={self.redraw_interval}, "
            f"scale={self.scale:g}"
        )

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        if self.variant == "optimal" and not self.mean_square.is_meta:
            self._calibrated = bool(self.mean_square >= 0)

    def _seed(self, generator: torch.Generator | None) -> None:
        device = "cpu" if generator is None else generator.device
        seed = torch.randint(2**62, (), generator=generator, device=device)
        self.schedule[:2] = torch.stack([seed.cpu(), torch.tensor(0, device="cpu")])
        self.projection.copy_(draw(len(self.projection), self.head_dim, self.orthogonal, self.norms, int(seed)))

    @torch.no_grad()
    def redraw_(self, generator: torch.Generator | None = None) -> FavorFeatures:
        """Draw new directions; states made with the old ones become meaningless.

        Args:
            generator: Gives a new seed; default: the next draw of the present one.

        Returns:
            The map itself.

        Example:
            >>> phi = FavorFeatures(4, 8)
            >>> before = phi.projection.clone()
            >>> torch.equal(phi.redraw_().projection, before)
            False
        """
        if generator is None:
            _redraw(self.projection, self.schedule, self.orthogonal, self.norms)
        else:
            self._seed(generator)
        return self

    def calibrate(self, q: Tensor, k: Tensor, key_padding_mask: Tensor | None = None) -> FavorFeatures:
        """Choose A of ``"optimal"`` for these queries and keys: from the mean of |q + k|^2 over all pairs of a head.

        Do it with typical inputs before a comparison, or where outputs must not depend, through this one number, on
        what comes first. States made with another A become meaningless.

        Args:
            q: (..., H, T, D), or (T, D).
            k: (..., G, S, D), H a multiple of G, or (S, D).
            key_padding_mask: (B, S) bool, True = takes part; holds for the queries too if there are as many.

        Returns:
            The map itself; a batch without a finite mean changes nothing.

        Raises:
            TypeError: Not floating tensors.
            ValueError: Another variant than ``"optimal"``, or a wrong width.

        Example:
            >>> phi = FavorFeatures(4, 8, variant="optimal", scale=1.0)
            >>> float(phi.calibrate(torch.ones(3, 4), torch.ones(2, 4)).mean_square)  # |q + k|^2 = 4 * 2^2
            16.0
        """
        if self.variant != "optimal":
            raise ValueError(f'only the variant "optimal" has an A to choose; got {self.variant!r}')
        self._check("q", q)
        self._check("k", k)
        if q.numel() and k.numel():
            _fit(self.mean_square, q, k, key_padding_mask, self.scale)
            self._calibrated = True
        return self

    def start(self, q: Tensor, k: Tensor, mask: Tensor | None = None) -> None:
        """Count the call; redraw if it is time to, choose A if nobody has."""
        self._check("q", q)
        if self.training and self.redraw_interval is not None:
            advance = _scheduled if torch.compiler.is_compiling() else _advance
            mean_square = self.mean_square if self.variant == "optimal" else None
            advance(
                self.projection, self.schedule, mean_square, q, k, mask,
                self.redraw_interval, self.orthogonal, self.norms, self.scale,
            )  # fmt: skip
        if self.variant == "optimal" and not self._calibrated:
            self.calibrate(q, k, mask)

    def num_features(self, dim: int) -> int:
        """M; ``dim`` must be ``head_dim``."""
        if dim != self.head_dim:
            raise ValueError(f"these features are for vectors of width {self.head_dim}; got {dim}")
        return self.features

    def _check(self, name: str, x: Any) -> None:
        check_float(name, x)
        if x.dim() == 0 or x.shape[-1] != self.head_dim:
            raise ValueError(
                f"{name} must have width head_dim = {self.head_dim} on its last axis; got {tuple(x.shape)}"
            )

    def _a(self) -> Tensor:
        """A of the optimal features."""
        level = self.mean_square.double()
        return best_a(torch.where(level >= 0, level, 2 * self.head_dim * self.scale), self.head_dim)

    def _product(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(M, D) and (M,): what is multiplied with and added to unscaled vectors."""
        omega = self.projection.to(dtype)
        if self.variant == "relu":
            return omega * self.scale**0.5, omega.new_zeros(self.features)
        if self.variant == "optimal":
            a = self._a()
            constant = self.head_dim / 4 * torch.log1p(-4 * a) - math.log(self.features) / 2
            bias = a.to(dtype) * omega.square().sum(-1) + constant.to(dtype)
            return omega * (self.scale * (1 - 4 * a)).sqrt().to(dtype), bias
        bias = omega.new_full((self.features,), -math.log(self.features) / 2)
        mirror = omega[: self.mirrored]
        if self.variant == "trig":  # cos(u - pi/2) = sin(u)
            # The last of an odd number gives its cosine or its sine, by a fair coin that neither depends on: the sign
            # of its first coordinate, since cos.cos and sin.sin are even in omega.
            sine = torch.zeros_like(bias)
            sine[len(omega) :] = 1
            sine[self.mirrored : len(omega)] = (omega[self.mirrored :, 0] < 0).to(dtype)
            bias = sine * (-math.pi / 2)
        omega = torch.cat([omega, mirror if self.variant == "trig" else -mirror])
        return omega * self.scale**0.5, bias

    def _map(self, name: str, x: Tensor, own: bool) -> Tensor:
        """Features or their logarithms; ``own``: with the factor exp(-|x|^2 / 2) of the vector itself."""
        self._check(name, x)
        x = x.to(compute_dtype(x))
        weight, bias = self._product(x.dtype)
        if self.variant == "relu":
            return (F.relu(F.linear(x, weight, bias)) + RELU_FLOOR) * self.features**-0.5
        if not own:
            return F.linear(x, weight, bias)
        square = x.square().sum(-1, keepdim=True)
        if self.variant == "trig":
            return F.linear(x, weight, bias).cos() * (square * (self.scale / 2)).exp() * (2 / self.features) ** 0.5
        return F.linear(x, weight, bias) - square * (self.scale / 2)

    def exponent(self, dim: int, dtype: torch.dtype, device: torch.device) -> Tensor | None:
        """The matrix of exponential features."""
        if not self.log_space or self.projection.requires_grad:
            return None
        weight, bias = self._product(dtype)
        return torch.cat([weight, torch.full_like(bias, -self.scale / 2)[:, None], bias[:, None]], 1)

    def query(self, q: Tensor) -> Tensor:
        """Features of queries, or their logarithms without the factor of :meth:`query_factor`."""
        return self._map("q", q, own=not self.log_space)

    def query_factor(self, q: Tensor) -> Tensor | None:
        """The logarithm -|x|^2 / 2 that all features of a query share; left out, as its rounding would not cancel."""
        return q.square().sum(-1, keepdim=True) * (-self.scale / 2) if self.log_space else None

    def key(self, k: Tensor) -> Tensor:
        """Features of keys, or their logarithms."""
        return self._map("k", k, own=True)

    @torch.no_grad()
    def variance(self, q: Tensor, k: Tensor, *, scaled: bool = False) -> Tensor:
        """Variance, over the draws, of the estimate phi(q).phi(k), in closed form.

        For q and k as given: that of the estimate of exp(q.k). The features of this map estimate exp(s q.k);
        ``scaled=True`` gives the variance of that, for the queries and keys that attention is called with. For
        independent ``"positive"`` features it is exp(2 q.k) (exp(|q + k|^2) - 1) / M. Around its own mean where
        ``norms`` brings a bias. For ``"optimal"`` with the A that this map would use now.

        Args:
            q: (..., T, D).
            k: (..., T, D), one for each query; the shapes are broadcast.
            scaled: Multiply q and k by the square root of this map's scale first.

        Returns:
            (..., T) in float32 (float64 for float64 inputs); infinite where it is too large for that.

        Raises:
            TypeError: Not floating tensors.
            ValueError: Widths other than ``head_dim``, or the variant ``"relu"``, which does not estimate exp(q.k).

        Example:
            >>> phi = FavorFeatures(2, 16, orthogonal=False)
            >>> q, k = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
            >>> phi.variance(q, k)  # q.k = 0, |q + k|^2 = 2: (e^2 - 1) / 16
            tensor([0.3993])
            >>> phi.variance(q * 2**-0.25, k * 2**-0.25).allclose(phi.variance(q, k, scaled=True))
            True
        """
        if self.variant == "relu":
            raise ValueError('variance needs a variant that estimates exp(q.k); got "relu"')
        self._check("q", q)
        self._check("k", k)
        factor = self.scale**0.5 if scaled else 1.0
        x, y = torch.broadcast_tensors(q.double() * factor, k.double() * factor)
        radii = _radii(len(self.projection), self.head_dim, self.norms)
        design = Design(
            self.head_dim, self.features, self.mirrored, self.head_dim if self.orthogonal else 1,
            float(self._a()) if self.variant == "optimal" else 0.0, None if radii is None else radii.numpy(),
        )  # fmt: skip
        z = (x + y).square().sum(-1).flatten().cpu().numpy()
        if self.variant == "trig":
            squares = (x.square() + y.square()).sum(-1).flatten().cpu().numpy()
            found = trigonometric_variance(squares, (x - y).square().sum(-1).flatten().cpu().numpy(), z, design)
        else:
            found = exponential_variance((x * y).sum(-1).flatten().cpu().numpy(), z, design)
        dtype = compute_dtype(q, k)
        return torch.from_numpy(found).to(q.device, dtype).view(x.shape[:-1])
