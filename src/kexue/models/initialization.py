"""Initial weights of the variance asked for (初始化): truncated normal, variance scaling, means of the two fans.

Source: 科学空间 8620 (浅谈Transformer的初始化、参数化与标准化) and 8725 (初始化方法中非方阵的维度平均策略思考).

    truncated normal at c std       realised variance gamma(c) s^2, gamma(c) = 1 - 2 c phi(c) / (2 Phi(c) - 1)
    y = W f(z), z ~ N(0, 1)         E[y^2] = m sigma^2 E[f(z)^2], so sigma^2 = 1 / (m E[f(z)^2]) keeps the second moment
    both directions                 sigma^2 = 1 / (M(m, n) E[f(z)^2]) with a mean M of m = fan_in and n = fan_out

gamma(2) = 0.7737: a truncated normal that is drawn with std 0.02 has 0.0176. ``std`` is here what comes out.
What differs from ``torch.nn.init``: ``trunc_normal_`` takes its cut-offs as absolute numbers (-2 and 2 by default,
which cuts nothing at std 0.02), does not correct the variance and needs 12 times the CPU time; torch has no mean of the
fans but the arithmetic one, knows fans of grouped and transposed convolutions only by their shape, and has its gains in
a table, where any function goes here.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from kexue._checks import check_choice, check_int, check_real
from kexue.models._activations import Activation, moments
from kexue.models._sampling import (
    check_generator,
    check_scale,
    check_target,
    fill_normal,
    fill_truncated,
    truncated_std,
)

__all__ = ["fan", "predict_gain", "truncated_normal_", "variance_scaling_"]

MEANS: dict[str, Callable[[float, float], float]] = {
    "fan_in": lambda m, n: m,
    "fan_out": lambda m, n: n,
    "arithmetic": lambda m, n: (m + n) / 2,
    "geometric": lambda m, n: math.sqrt(m * n),
    "harmonic": lambda m, n: 2 * m * n / (m + n),
    "quadratic": lambda m, n: math.sqrt((m * m + n * n) / 2),
    "contraharmonic": lambda m, n: (m * m + n * n) / (m + n),
}
DISTRIBUTIONS = ("truncated_normal", "normal", "uniform")


def check_cutoff(cutoff: Any) -> float:
    """Raise unless cutoff is above 0; infinity cuts nothing."""
    if isinstance(cutoff, float) and cutoff == math.inf:
        return math.inf
    check_real("cutoff", cutoff, above=0.0)
    return float(cutoff)


def truncated_normal_(
    w: Tensor,
    std: float = 0.02,
    cutoff: float = 2.0,
    generator: torch.Generator | None = None,
    *,
    mean: float = 0.0,
) -> Tensor:
    """Fill a tensor with a truncated normal whose realised standard deviation is ``std``, in place.

    Costs about what ``torch.nn.init.normal_`` does. The same seed gives the same numbers whatever the strides; they are
    not those of ``torch.nn.init.trunc_normal_``. float64 numbers have 64 random bits, others 32.

    Args:
        w: Tensor of any shape and stride, float64, float32, bfloat16 or float16 (drawn in float32, rounded once).
        std: Standard deviation of what is drawn, whatever the cutoff.
        cutoff: Where the normal is cut, in standard deviations of the normal before it is cut: no number is further
            from the mean than ``cutoff * std / sqrt(gamma(cutoff))``, 2.2737 std at 2; rounding does not lead out.
            Near 0 the uniform distribution results. ``math.inf`` cuts nothing.
        generator: Source of randomness, on the device of ``w``; None is torch's own.
        mean: Middle of the distribution.

    Returns:
        ``w``.

    Raises:
        TypeError: Not a dense real floating tensor; not a number.
        ValueError: std, cutoff or mean out of range, or too small or large for the dtype; an empty tensor, one on the
            meta device or one whose entries share memory; a generator of another device.

    Reference:
        https://spaces.ac.cn/archives/8620

    Example:
        >>> w = truncated_normal_(torch.empty(512, 512), std=0.02, generator=torch.Generator().manual_seed(0))
        >>> f"{float(w.std()):.4f}", bool((w.abs() <= 0.04 * 1.1368473).all())
        ('0.0200', True)
    """
    check_target("w", w)
    check_real("std", std, above=0.0)
    check_real("mean", mean)
    cutoff = check_cutoff(cutoff)
    check_generator(generator, w.device)
    check_truncated(std, cutoff, w.dtype, float(mean))
    fill_truncated(w, float(std), cutoff, generator, float(mean))
    return w


def check_truncated(std: float, cutoff: float, dtype: torch.dtype, mean: float = 0.0) -> None:
    """Raise unless the dtype can hold the truncated normal."""
    widest = 9.0  # nothing is drawn further out, even in float64
    largest = std * math.sqrt(3) if cutoff < 1e-9 else std / truncated_std(cutoff) * min(cutoff, widest)
    check_scale(std, largest, mean, dtype)


def _shape(w: Any) -> tuple[int, ...]:
    if isinstance(w, Tensor):
        return tuple(w.shape)
    if isinstance(w, Sequence) and not isinstance(w, str):
        for size in w:
            check_int("w", size, 0)
        return tuple(int(size) for size in w)
    raise TypeError(f"w must be a tensor or a shape; got {type(w).__name__}")


def fans(shape: tuple[int, ...], groups: int = 1, transposed: bool = False) -> tuple[int, int]:
    """(fan_in, fan_out) of a weight."""
    if len(shape) < 2:
        raise ValueError(f"w must have at least 2 dimensions to have fans; got shape {shape}")
    check_int("groups", groups, 1)
    if 0 in shape:
        raise ValueError(f"fans must be positive; got shape {shape}")
    if shape[0] % groups:
        raise ValueError(f"groups must divide the first dimension, {shape[0]}; got {groups}")
    kernel = math.prod(shape[2:])
    split, whole = shape[0] // groups * kernel, shape[1] * kernel  # the first dimension holds all the groups
    return (split, whole) if transposed else (whole, split)


def mean_of_fans(m: float, n: float, mode: str) -> float:
    """The mean ``mode`` of fan_in m and fan_out n."""
    check_choice("mode", mode, tuple(MEANS))
    return MEANS[mode](m, n)


def fan(w: Tensor | Sequence[int], mode: str = "fan_in", groups: int = 1, transposed: bool = False) -> float:
    """A mean of the fans of a weight.

    Args:
        w: Weight or its shape: (out, in) of a Linear, (out, in / groups, *kernel) of a convolution. fan_in is
            in / groups times the kernel's size, fan_out is out / groups times it; strides do not count.
        mode: "fan_in" m; "fan_out" n; "arithmetic" (m + n) / 2; "geometric" sqrt(m n); "harmonic" 2 m n / (m + n);
            "quadratic" sqrt((m^2 + n^2) / 2); "contraharmonic" (m^2 + n^2) / (m + n).
        groups: Of a grouped convolution.
        transposed: The weight is (in, out / groups, *kernel): a transposed convolution, or GPT-2's Conv1D.

    Returns:
        M(m, n).

    Raises:
        TypeError: Wrong kind of argument.
        ValueError: Unknown mode, fewer than 2 dimensions, a dimension of 0, groups that do not divide.

    Reference:
        https://spaces.ac.cn/archives/8725

    Example:
        >>> fan(torch.empty(512, 128), "geometric"), fan((64, 8, 3, 3), "fan_out", groups=4)
        (256.0, 144.0)
    """
    if not isinstance(transposed, bool):
        raise TypeError(f"transposed must be True or False; got {transposed!r}")
    return float(mean_of_fans(*fans(_shape(w), groups, transposed), mode))


def check_distribution(distribution: str, std: float, cutoff: float, dtype: torch.dtype) -> None:
    """Raise unless the dtype can hold the distribution."""
    if distribution == "truncated_normal":
        check_truncated(std, cutoff, dtype)
    else:
        check_scale(std, std * (math.sqrt(3) if distribution == "uniform" else 9.0), 0.0, dtype)


def draw_(
    w: Tensor, std: float, distribution: str, cutoff: float = 2.0, generator: torch.Generator | None = None
) -> None:
    """Fill a checked tensor with mean 0 and the given realised std."""
    if distribution == "normal":
        fill_normal(w, std, generator)
    else:
        fill_truncated(w, std, cutoff if distribution == "truncated_normal" else 0.0, generator)


def variance_scaling_(
    w: Tensor,
    mode: str = "fan_in",
    nonlinearity: str | Activation = "linear",
    distribution: str = "truncated_normal",
    generator: torch.Generator | None = None,
    groups: int = 1,
    *,
    transposed: bool = False,
    gain: float = 1.0,
    cutoff: float = 2.0,
) -> Tensor:
    """Fill a weight so that second moments survive the layer: std = gain / sqrt(M E[f(z)^2]), in place.

    LeCun is "fan_in", Xavier (Glorot) "arithmetic", He "fan_in" with "relu". No mean is declared better by the article;
    see the page of the method.

    Args:
        w: As in :func:`fan`; dtypes as in :func:`truncated_normal_`.
        mode: The mean M of the fans, as in :func:`fan`.
        nonlinearity: What the layer READS, f(z) of z ~ N(0, 1): "linear" (1), "relu" (1/2), "gelu", "gelu_tanh",
            "silu", "tanh", "sigmoid", "selu", ... or a function of tensors, applied to each number by itself.
        distribution: "truncated_normal", "normal" or "uniform"; all have the same realised std.
        generator: Source of randomness.
        groups: Of a grouped convolution.
        transposed: As in :func:`fan`.
        gain: Factor on the std.
        cutoff: Of the truncated normal.

    Returns:
        ``w``.

    Raises:
        TypeError: Wrong kind of argument.
        ValueError: As in :func:`fan` and :func:`truncated_normal_`; unknown nonlinearity or distribution.

    Reference:
        https://spaces.ac.cn/archives/8620, https://spaces.ac.cn/archives/8725

    Example:
        >>> g = torch.Generator().manual_seed(0)
        >>> w = variance_scaling_(torch.empty(512, 256), nonlinearity="relu", generator=g)
        >>> f"{float(w.var()) * 256:.1f}"  # He: 2 / fan_in
        '2.0'
    """
    check_target("w", w)
    check_choice("distribution", distribution, DISTRIBUTIONS)
    check_real("gain", gain, above=0.0)
    cutoff = check_cutoff(cutoff)
    check_generator(generator, w.device)
    std = float(gain) / math.sqrt(fan(w, mode, groups, transposed) * moments(nonlinearity)[1])
    check_distribution(distribution, std, cutoff, w.dtype)
    draw_(w, std, distribution, cutoff, generator)
    return w


def predict_gain(widths: Sequence[int], mode: str = "geometric") -> tuple[float, float]:
    """What a stack of linear layers does to second moments when each has sigma^2 = 1 / M(fan_in, fan_out).

    Args:
        widths: w_0 ... w_L: layer l maps w_(l-1) to w_l numbers. At least two.
        mode: The mean M, as in :func:`fan`.

    Returns:
        (log_forward, log_backward), both base 10: forward E[x_L^2] = 10^log_forward E[x_0^2] and, for gradients,
        E[g_0^2] = 10^log_backward E[g_L^2]. "geometric" gives log10(w_0 / w_L) / 2 and its negative whatever lies
        between; "fan_in" gives 0 and log10(w_L / w_0).

    Raises:
        TypeError: Widths that are not integers.
        ValueError: Fewer than two widths, one below 1, unknown mode.

    Reference:
        https://spaces.ac.cn/archives/8725

    Example:
        >>> forward, backward = predict_gain([128, 512] * 60 + [128], "arithmetic")
        >>> round(forward, 2), round(backward, 2)
        (-11.63, -11.63)
    """
    check_choice("mode", mode, tuple(MEANS))
    if isinstance(widths, str) or not hasattr(widths, "__iter__"):
        raise TypeError(f"widths must be a sequence of integers; got {type(widths).__name__}")
    sizes = list(widths)
    if len(sizes) < 2:
        raise ValueError(f"widths must name at least 2 widths, of the input and of a layer; got {len(sizes)}")
    for size in sizes:
        check_int("widths", size, 1)
    pairs = [(int(m), int(n)) for m, n in itertools.pairwise(sizes)]
    averages = [MEANS[mode](m, n) for m, n in pairs]
    forward = math.fsum(math.log10(m / average) for (m, _), average in zip(pairs, averages, strict=True))
    backward = math.fsum(math.log10(n / average) for (_, n), average in zip(pairs, averages, strict=True))
    return forward, backward
