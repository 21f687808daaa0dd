"""Self-normalised importance sampling (重要性采样): expectations under rho from draws of q.

Source: 科学空间 8062 (【搜出来的文本】(一)从文本生成到搜索采样).

    E_p f ~ sum w_i f(x_i) / sum w_i,   w_i = rho(x_i) / q(x_i);      ESS = (sum w)^2 / sum w^2

The bias is O(1/N). ESS says how many independent draws of p the weighted ones are worth: when a few weights carry
everything the estimate is worthless, however large N is, and a warning says so.

What differs from the article: weights are kept in logarithms with a running maximum, so that no rho overflows and any N
fits into the memory of one batch.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from kexue._checks import check_int
from kexue._progress import progress as progress_bar
from kexue.generation._draws import draw, log_ratio, seeded

__all__ = ["Estimate", "ImportanceSampler"]

_POOR = 0.01  # of N: a smaller effective number of draws is warned about


class Estimate(NamedTuple):
    """An expectation and what it rests on.

    Attributes:
        value: The estimate: a float, or a tensor if f gives more than one number for each draw.
        ess: Effective number of draws, between 1 and N.
    """

    value: Any
    ess: float


class ImportanceSampler:
    """Expectations under an unnormalised law from draws of a proposal.

    Args:
        target: Callable from a batch of N draws, as ``q.sample((N,))`` gives them, to their (N,) log rho.
        q: Proposal with ``sample(shape)`` and ``log_prob(x)``, as in torch.distributions, one event for each draw.
        batch_size: Draws at a time.

    Raises:
        TypeError: A target that is not callable, a proposal without the two methods.
        ValueError: A batch size below 1.

    Example:
        >>> q = torch.distributions.Normal(0.0, 2.0)
        >>> sampler = ImportanceSampler(lambda x: -((x - 1) ** 2) / 2, q)  # a normal law around 1
        >>> value, ess = sampler.estimate(lambda x: x, n=20000, seed=0)
        >>> round(value, 1), ess > 5000
        (1.0, True)
    """

    def __init__(self, target: Any, q: Any, *, batch_size: int = 65536) -> None:
        check_int("batch_size", batch_size, 1)
        self.ratio, self.q, self.batch_size = log_ratio(target, q), q, batch_size

    def estimate(
        self, f: Callable[[Any], Any], n: int = 10_000, seed: int | None = None, progress: bool | None = None
    ) -> Estimate:
        """E f under rho / Z.

        Args:
            f: Callable from a batch of N draws to (N,) or (N, ...) numbers.
            n: Number of draws.
            seed: Seed of this call, which then leaves torch's global generator alone; None: go on with that one.
            progress: Whether to show a bar; None: if standard error is a terminal.

        Returns:
            The value and the effective number of draws; unpacks as ``value, ess``.

        Raises:
            TypeError: f that is not callable.
            ValueError: No draw with rho > 0; NaN or +inf from the target; another number of values of f than draws.

        Warns:
            RuntimeWarning: An effective number of draws below n / 100.
        """
        if not callable(f):
            raise TypeError(f"f must be callable; got {type(f).__name__}")
        value, _, ess = self._sums(f, n, seed, progress)
        if ess < _POOR * n:
            warnings.warn(
                f"the {n} weighted draws are worth {ess:.1f} (ESS, below {_POOR:.0%}): a few carry the estimate; "
                "use a proposal closer to the target",
                RuntimeWarning,
                stacklevel=2,
            )
        return Estimate(float(value) if value.dim() == 0 else value, ess)

    def log_normalizer(self, n: int = 10_000, seed: int | None = None, progress: bool | None = None) -> float:
        """Log Z = log sum rho, from the mean weight (q normalised).

        Args:
            n: Number of draws.
            seed: As for :meth:`estimate`.
            progress: As for :meth:`estimate`.

        Returns:
            The estimate.

        Raises:
            ValueError: As :meth:`estimate`.
        """
        return self._sums(lambda x: np.zeros(len(x)), n, seed, progress)[1]

    def _sums(
        self, f: Callable[[Any], Any], n: int, seed: int | None, progress: bool | None
    ) -> tuple[Tensor, float, float]:
        """Weighted mean of f, log of the mean weight, effective number of draws."""
        check_int("n", n, 1)
        top, first, second = -math.inf, 0.0, 0.0  # sums of w and w^2, divided by exp(top) and exp(2 top)
        weighted: Tensor | None = None
        done = 0
        with seeded(seed), progress_bar("importance", n, progress) as bar:
            while done < n:
                x = draw(self.q, min(self.batch_size, n - done))
                ratio, _ = self.ratio(x)
                values = _values(f(x), len(ratio))
                done += len(ratio)
                bar.advance(len(ratio))
                highest = float(ratio.max())
                if highest == -math.inf:
                    continue
                if highest > top:
                    shrink = math.exp(top - highest) if top > -math.inf else 0.0
                    first, second, top = first * shrink, second * shrink**2, highest
                    weighted = None if weighted is None else weighted * shrink
                w = torch.from_numpy(np.exp(ratio - top))
                # A draw without weight must not spoil the sum where f is infinite or NaN there.
                inside = w > 0
                part = torch.tensordot(w[inside], values[inside], dims=1)
                first, second = first + float(w.sum()), second + float(w.square().sum())
                weighted = part if weighted is None else weighted + part
        if weighted is None:
            raise ValueError(f"rho is 0 at all of the {n} draws of q: the supports do not meet")
        return weighted / first, top + math.log(first / n), first**2 / second


def _values(found: Any, n: int) -> Tensor:
    """(n, ...) float64."""
    values = found.detach().cpu() if isinstance(found, Tensor) else torch.from_numpy(np.asarray(found))
    if values.dim() == 0 or len(values) != n:
        raise ValueError(f"f must give {n} values, one for each draw; got the shape {tuple(values.shape)}")
    return values.double()
