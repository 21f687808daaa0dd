"""Exponential noise, fast and never 0 or infinite.

Gumbel noise is -log E with E ~ Exp(1), and noise is what Gumbel-softmax costs: torch's ``exponential_`` takes most of
the time of ``F.gumbel_softmax``. Here E = -log1p(-u) with u on a grid of 2^-31 or finer that keeps its *relative*
precision near 0: among 50 000 classes the winner is decided between values of E around 2e-5, which a grid of 2^-24
resolves to three digits only. float32 on the CPU has a kernel with a generator of its own (``_noise_kernel.py``); one
draw of the torch generator gives it its state, so that ``torch.manual_seed`` and ``generator=`` still rule. Float64 and
other devices use a second torch generator, started in the same way.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor


def check_generator(generator: Any) -> None:
    """Raise TypeError unless ``generator`` is a torch.Generator or None."""
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator or None; got {type(generator).__name__}")


def draw_seed(generator: torch.Generator | None) -> Tensor:
    """A scalar int64 tensor that :class:`Noise` starts from; the only thing that is drawn from the generator."""
    device = "cpu" if generator is None else generator.device
    return torch.randint(2**63 - 1, (), generator=generator, device=device)


def draw_uniform(rows: int, generator: torch.Generator | None, device: torch.device) -> Tensor:
    """One number in [0, 1) for each row, float64."""
    source = torch.device("cpu") if generator is None else generator.device
    # not torch.rand: with a generator argument, None included, it takes no symbolic size, which a graph for any number
    # of rows has
    return torch.empty(rows, device=source, dtype=torch.float64).uniform_(generator=generator).to(device)


@functools.cache
def _kernel() -> Any:
    """The kernel of float32 on the CPU; loading it compiles or reads machine code, so only when it is needed."""
    from kexue.stats import _noise_kernel

    return _noise_kernel


def draw_exponential(seed: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """The first noise of :class:`Noise` on the CPU, with as little around it as possible."""
    out = torch.empty(shape, dtype=dtype)
    if dtype != torch.float32:
        return Noise(seed, dtype, out.device).exponential_(out)
    _kernel().fill_from(int(seed), out.view(-1).numpy())
    return out


class Noise:
    """A stream of exponential noise.

    Args:
        seed: What :func:`draw_seed` gave; equal seeds give equal streams.
        dtype: float32 or float64.
        device: Where the noise is needed.
    """

    def __init__(self, seed: Tensor, dtype: torch.dtype, device: torch.device) -> None:
        self._fill: Any = None
        if device.type == "cpu" and dtype == torch.float32:
            self._fill, self._state = _kernel().fill, _kernel().start(int(seed))
        else:
            self._generator = torch.Generator(device).manual_seed(int(seed))

    def exponential_(self, out: Tensor) -> Tensor:
        """Fill a contiguous tensor with E ~ Exp(1)."""
        if self._fill is not None:
            self._fill(self._state, out.view(-1).numpy())
            return out
        bits, kind = (63, torch.int64) if out.dtype == torch.float64 else (31, torch.int32)
        out.copy_(torch.empty(out.shape, dtype=kind, device=out.device).random_(generator=self._generator))
        # Integers next to 2^bits round up to it, which would give infinity; 0 would give 0.
        limits = torch.finfo(out.dtype).eps / 2 - 1.0, -(2.0 ** -(bits + 1))
        return out.mul_(-(2.0**-bits)).clamp_(*limits).log1p_().neg_()
