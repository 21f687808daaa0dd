"""Rejection sampling (拒绝采样): exact independent draws from rho by way of draws from q.

Source: 科学空间 8062 (【搜出来的文本】(一)从文本生成到搜索采样).

    accept x ~ q with probability rho(x) / (M q(x)),   M >= sup rho / q;   M / Z draws for each one kept

What differs from the usual script: everything is in logarithms; a ratio above M shows that M is no bound and raises
(a silent cut at 1 would sample another law), or with ``adaptive`` raises M and starts the collection anew; a bound that
accepts next to nothing stops after ``max_draws`` with the acceptance it found.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from kexue._checks import check_int, check_real
from kexue._progress import progress as progress_bar
from kexue.generation._draws import draw, log_ratio, seeded, select, stack

__all__ = ["RejectionSampler"]


class RejectionSampler:
    """Draws from an unnormalised law by accepting draws of a proposal.

    Args:
        target: Callable from a batch of N draws, as ``q.sample((N,))`` gives them, to their (N,) log rho; a
            :class:`kexue.generation.Target` if the draws are texts.
        q: Proposal with ``sample(shape)`` and ``log_prob(x)``, as in torch.distributions, one event for each draw
            (wrap several dimensions in ``Independent``). Its draws may also be a list of texts.
        log_m: log M, a bound of log rho - log q.
        adaptive: Instead of raising at a ratio above M, take the ratio as the new M and start anew. The law is exact
            if the largest ratio has been met by then, which nothing guarantees.
        batch_size: Draws of q at a time.
        max_draws: Draws of q after which ``sample`` gives up.

    Attributes:
        log_m: The bound, raised where ``adaptive`` found it too low.
        draws: Draws of q in the last call that count for the samples.
        acceptance: Share of them that was accepted.

    Raises:
        TypeError: A target that is not callable, a proposal without the two methods, a log_m that is no number.
        ValueError: log_m that is not finite (M <= 0 or infinite), sizes below 1.

    Example:
        >>> q = torch.distributions.Uniform(0.0, 1.0)
        >>> sampler = RejectionSampler(lambda x: torch.log(x), q, log_m=0.0)  # rho(x) = x
        >>> x = sampler.sample(2000, seed=0)
        >>> x.shape, round(float(x.mean()), 1), round(sampler.acceptance, 1)
        (torch.Size([2000]), 0.7, 0.5)
    """

    def __init__(
        self,
        target: Any,
        q: Any,
        log_m: float,
        adaptive: bool = False,
        *,
        batch_size: int = 4096,
        max_draws: int = 10_000_000,
    ) -> None:
        check_real("log_m, the logarithm of M > 0,", log_m)
        check_int("batch_size", batch_size, 1)
        check_int("max_draws", max_draws, 1)
        self.ratio = log_ratio(target, q)
        self.q, self.log_m, self.adaptive = q, float(log_m), bool(adaptive)
        self.batch_size, self.max_draws = batch_size, max_draws
        self.draws, self.acceptance = 0, math.nan

    def sample(self, n: int, seed: int | None = None, progress: bool | None = None) -> Any:
        """Draw n times from rho / Z.

        Args:
            n: Number of draws to keep.
            seed: Seed of this call, which then leaves torch's global generator alone; None: go on with that one.
            progress: Whether to show a bar; None: if standard error is a terminal.

        Returns:
            A tensor (n, ...), or a list if q draws lists.

        Raises:
            ValueError: rho / q above M (without ``adaptive``); NaN or +inf from the target; q without mass at its own
                draw.
            RuntimeError: Fewer than n accepted after ``max_draws``.
        """
        check_int("n", n, 0)
        kept: list[Any] = []
        self.draws, count, total = 0, 0, 0
        if n == 0:  # some distributions refuse to draw nothing
            with seeded(0 if seed is None else seed):
                return draw(self.q, 1)[:0]
        with seeded(seed), progress_bar("rejection", n, progress) as bar:
            while count < n:
                x = draw(self.q, self.batch_size)
                ratio, slack = self.ratio(x)
                total += len(ratio)
                top = float(ratio.max())
                if top > self.log_m + slack:
                    if not self.adaptive:
                        raise ValueError(
                            f"rho / q exceeds M: log ratio {top} against log_m = {self.log_m}; "
                            "give a valid bound, or adaptive=True"
                        )
                    # Nothing of this batch is kept either: that it holds a rare draw is why M was raised.
                    self.log_m, self.draws, kept, count, x, ratio = top, 0, [], 0, x[:0], ratio[:0]
                uniform = torch.rand(len(ratio), dtype=torch.float64).numpy()
                chosen = np.flatnonzero(np.log1p(-uniform) < ratio - self.log_m)[: n - count]
                # The draws after the one that completes the sample do not count.
                self.draws += int(chosen[-1]) + 1 if count + len(chosen) == n else len(ratio)
                if len(chosen):
                    kept.append(select(x, chosen))
                    count += len(chosen)
                bar.advance(len(chosen))
                if count < n and total >= self.max_draws:
                    raise RuntimeError(
                        f"{count} of {n} accepted after {total} draws (acceptance {count / max(1, self.draws):.2g}): "
                        "a closer q or a smaller M is needed, or a Markov chain; max_draws raises the limit"
                    )
        self.acceptance = count / self.draws
        return stack(kept)
