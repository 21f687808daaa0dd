"""Filling tensors with random numbers in place: bounded distributions by the inverse CDF, and the normal one.

On the CPU the bits come from numpy's SFC64, keyed by 128 bits of the torch generator: one call gives two (float32) or
one (float64) number, twice as fast as torch's Mersenne Twister, and every bit is used, where ``uniform_`` has 24. The
rest (scale, erfinv, scale) runs in place on pieces that stay in the L2 cache. Numbers depend on the generator and the
shape only, not on strides or on the size of the pieces.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kexue._tensors import compute_dtype

CHUNK = 1 << 17  # numbers in a piece: 512 KiB of float32. Even, so that pieces share no 64-bit draw
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check_target(name: str, w: Any) -> None:
    """Raise unless ``w`` is a tensor that can be filled in place: real, floating, not empty, one address per entry."""
    if not isinstance(w, Tensor):
        raise TypeError(f"{name} must be a tensor; got {type(w).__name__}")
    if w.dtype not in DTYPES:
        raise TypeError(f"{name} must be of dtype float64, float32, bfloat16 or float16; got {w.dtype}")
    if w.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor; got layout {w.layout}")
    if w.is_meta:
        raise ValueError(f"{name} must have memory; got a tensor on the meta device (see torch.nn.Module.to_empty)")
    if w.numel() == 0:
        raise ValueError(f"{name} must not be empty; got shape {tuple(w.shape)}")
    reach = 0  # strides in rising order: each must step over everything that the smaller ones reach
    for stride, size in sorted(zip(w.stride(), w.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                raise ValueError(
                    f"{name} must have memory of its own for every entry; got strides {w.stride()} for shape "
                    f"{tuple(w.shape)} (an expanded tensor?)"
                )
            reach += stride * (size - 1)


def check_generator(generator: Any, device: torch.device) -> None:
    """Raise unless ``generator`` is None or a generator of the device."""
    if generator is None:
        return
    if not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator or None; got {type(generator).__name__}")
    if generator.device.type != device.type:
        raise ValueError(f"generator must be on the tensor's device, {device.type}; got one on {generator.device.type}")


def check_scale(std: float, largest: float, mean: float, dtype: torch.dtype) -> None:
    """Raise unless numbers of this spread around ``mean`` can be told apart, and held, in ``dtype``."""
    info = torch.finfo(dtype)
    if abs(mean) + largest > info.max:
        raise ValueError(f"std must keep the numbers below {info.max:g}, the largest of {dtype}; got std {std:g}")
    step = max(info.tiny, abs(mean)) * info.eps
    if std < 4 * step:  # rounding would decide the variance
        raise ValueError(f"std must be at least {4 * step:g} for mean {mean:g} in {dtype}; got {std:g}")


@torch.no_grad()
def fill(w: Tensor, draw: Callable[[Tensor], None]) -> None:
    """Call ``draw`` on contiguous pieces in float32 or float64 until ``w`` is full, in the order of its entries."""
    target = w.detach() if w.is_contiguous() else torch.empty(w.shape, dtype=w.dtype, device=w.device)
    flat, wide = target.view(-1), compute_dtype(w)
    size = CHUNK if w.device.type == "cpu" else flat.numel()
    buffer = None if w.dtype == wide else torch.empty(min(size, flat.numel()), dtype=wide, device=w.device)
    for part in flat.split(size):
        if buffer is None:
            draw(part)
        else:  # low precision: drawn in float32, rounded once
            draw(buffer[: part.numel()])
            part.copy_(buffer[: part.numel()])
    if not w.is_contiguous():
        w.detach().copy_(target)


def _uniform(w: Tensor, bound: float, generator: torch.Generator | None) -> Callable[[Tensor], None]:
    """A draw of numbers uniform in [-bound, bound]."""
    if w.device.type != "cpu":

        def draw(part: Tensor) -> None:
            part.uniform_(-bound, bound, generator=generator)

        return draw
    key = torch.empty(2, dtype=torch.int64, device="cpu").random_(-(2**63), None, generator=generator)
    source = np.random.SFC64([int(k) & (2**64 - 1) for k in key])

    def draw_bits(part: Tensor) -> None:
        n = part.numel()
        if part.dtype == torch.float64:
            part.copy_(torch.from_numpy(source.random_raw(n).view(np.int64))).mul_(bound / 2**63)
        else:
            bits = source.random_raw((n + 1) // 2).view(np.int32)[:n]
            part.copy_(torch.from_numpy(bits)).mul_(bound / 2**31)

    return draw_bits


def _inside(low: float, high: float, dtype: torch.dtype) -> tuple[float, float]:
    """The least and the largest number of ``dtype`` in [low, high]: what lies between cannot round out of it."""
    ends = []
    for end, sign in ((low, -1), (high, 1)):
        x = torch.tensor(end, dtype=dtype, device="cpu")
        if sign * float(x) > sign * end:
            x = torch.nextafter(x, torch.full_like(x, -sign * math.inf))
        ends.append(float(x))
    return ends[0], ends[1]


def truncated_std(cutoff: float) -> float:
    """Std of the standard normal cut at -cutoff and cutoff: sqrt(1 - 2 c phi(c) / (2 Phi(c) - 1)).

    Below 1 the quotient loses digits; there it is c times the root of the quotient of the series of int x^2 exp(-x^2/2)
    and of int exp(-x^2/2), which tends to the c / sqrt(3) of the uniform distribution.
    """
    if cutoff >= 1:
        density = math.exp(-cutoff * cutoff / 2) / math.sqrt(2 * math.pi)
        return math.sqrt(1 - 2 * cutoff * density / math.erf(cutoff / math.sqrt(2))) if density else 1.0
    half = -cutoff * cutoff / 2
    terms = [half**j / math.factorial(j) for j in range(20)]
    second = sum(term / (2 * j + 3) for j, term in enumerate(terms))
    return cutoff * math.sqrt(second / sum(term / (2 * j + 1) for j, term in enumerate(terms)))


def fill_truncated(
    w: Tensor, std: float, cutoff: float, generator: torch.Generator | None = None, mean: float = 0.0
) -> None:
    """Fill with the truncated normal of realised ``std``; a cutoff of 0 is its limit, the uniform distribution."""
    wide = compute_dtype(w)
    eps = torch.finfo(wide).eps
    flat = cutoff < math.sqrt(eps) / 4  # the density falls by less than a rounding: uniform
    if flat:
        scale, bound, limit = 1.0, std * math.sqrt(3) * (1 - 2 * eps), std * math.sqrt(3)
    else:
        own = std / truncated_std(cutoff)  # std before truncation
        # Off the end by a few roundings, so that the results stay within the cutoff, and off 1, where erfinv is inf.
        bound = min(math.erf(cutoff / math.sqrt(2)) * (1 - 2 * eps), 1 - eps / 2)
        scale, limit = own * math.sqrt(2), own * cutoff
    low, high = _inside(mean - limit, mean + limit, w.dtype) if w.dtype != wide or mean else (0.0, 0.0)
    draw_uniform = _uniform(w, bound, generator)

    def draw(part: Tensor) -> None:
        draw_uniform(part)
        if not flat:
            part.erfinv_().mul_(scale)
        if mean:
            part.add_(mean)
        if low < high:
            part.clamp_(low, high)

    fill(w, draw)


def fill_normal(w: Tensor, std: float, generator: torch.Generator | None = None) -> None:
    """Fill with N(0, std^2); float32 and float64 in one piece get the bits of ``torch.nn.init.normal_``."""
    if w.is_contiguous() and w.dtype == compute_dtype(w):
        with torch.no_grad():
            w.detach().normal_(0.0, std, generator=generator)
    else:

        def draw(part: Tensor) -> None:
            part.normal_(0.0, std, generator=generator)

        fill(w, draw)
