"""Score function estimator (REINFORCE, 得分函数估计) with baselines.

Source: 科学空间 6705 (漫谈重参数:从正态分布到Gumbel Softmax); Williams 1992; leave-one-out: Kool et al.,
https://openreview.net/forum?id=r1lgTGL5DE

    grad E[f(z)] = E[(f(z) - b) grad log p(z)]   for every b that does not depend on z

It needs no derivative of f and works for discrete z. The baseline b takes variance away. "loo" (the mean of the other
samples) and the running mean of earlier samples do not depend on the sample and leave the estimator unbiased; the
mean of the batch contains the sample itself, which shortens the expected gradient by the factor (N - 1) / N.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kexue._checks import check_choice, check_real
from kexue._tensors import check_float, compute_dtype

__all__ = ["EMABaseline", "score_function_loss"]

BASELINES = ("none", "mean", "loo", "ema")


class EMABaseline:
    """Running mean of the rewards seen so far: a baseline that keeps its state from one call to the next.

    The samples count as one stream, in order: each is compared with the exponential mean of the samples before it, in
    this call and in earlier ones, so the baseline never depends on the sample itself. The mean is corrected for its
    start (as in Adam); the very first sample of all has the baseline 0.

    Args:
        decay: Weight of the past for each sample, in [0, 1).

    Attributes:
        weighted: Exponentially weighted sum of the rewards, None before the first; a tensor of the shape of one sample.
        weight: Sum of the weights, below 1; ``weighted / weight`` is the mean.

    Raises:
        TypeError: ``decay`` is not a number, or the rewards are no floating tensor.
        ValueError: ``decay`` is out of range, or the rewards have no axis of samples or samples of another shape.

    Example:
        >>> baseline = EMABaseline(decay=0.5)
        >>> baseline(torch.tensor([4.0, 4.0, 1.0]))
        tensor([0., 4., 4.])
        >>> baseline(torch.tensor([0.0]))  # (1 + 4 / 2 + 4 / 4) / (1 + 1 / 2 + 1 / 4)
        tensor([2.2857])
    """

    def __init__(self, decay: float = 0.99) -> None:
        check_real("decay", decay, minimum=0.0)
        if decay >= 1:
            raise ValueError(f"decay must be below 1; got {decay}")
        self.decay = float(decay)
        self.weighted: Tensor | None = None
        self.weight = 0.0

    def __call__(self, reward: Tensor) -> Tensor:
        """The baseline of each sample (N, ...), which are then taken into the mean."""
        check_float("reward", reward)
        if reward.dim() == 0:
            raise ValueError("reward must have an axis of samples; got shape ()")
        reward = reward.detach().to(compute_dtype(reward))
        n, d = reward.shape[0], self.decay
        if n == 0:
            return reward.clone()
        old = torch.zeros_like(reward[0]) if self.weighted is None else self.weighted
        if old.shape != reward.shape[1:]:
            raise ValueError(f"rewards must have samples of shape {tuple(old.shape)}; got {tuple(reward.shape[1:])}")
        # row i becomes the sum over j <= i of d^(i - j) (1 - d) r_j, by doubling the reach in each round
        sums = torch.cat([old[None].to(reward), (1 - d) * reward])
        weights = sums.new_full((n + 1,), 1 - d)
        weights[0] = self.weight
        weights = weights.reshape(-1, *[1] * (sums.dim() - 1))
        reach = 1
        while reach <= n and d**reach > 1e-12:
            sums, weights = (torch.cat([x[:reach], x[reach:] + d**reach * x[:-reach]]) for x in (sums, weights))
            reach *= 2
        self.weighted, self.weight = sums[-1].clone(), float(weights[-1])
        before, total = sums[:-1], weights[:-1]
        return torch.where(total > 0, before / total.clamp(min=torch.finfo(total.dtype).tiny), 0.0)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs."""
        return {"decay": self.decay, "weighted": self.weighted, "weight": self.weight}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where :meth:`state_dict` was taken."""
        if set(state) != {"decay", "weighted", "weight"}:
            raise ValueError(f"state must have the keys decay, weighted, weight; got {sorted(state)}")
        self.decay, self.weighted, self.weight = state["decay"], state["weighted"], state["weight"]


def _leave_one_out(reward: Tensor) -> Tensor:
    """Mean of the other samples."""
    n = reward.shape[0]
    if n == 1:
        raise ValueError("baseline='loo' needs at least 2 samples; got 1")
    return (reward.sum(0, keepdim=True) - reward) / max(n - 1, 1)


def _baseline_tensor(value: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    """What a callable baseline gave, as a tensor without gradient."""
    try:
        found = value if isinstance(value, Tensor) else torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        found = None
    if found is None or found.is_complex():
        raise TypeError(f"baseline must give a real tensor or a number; got {value!r}")
    return found.detach().to(device=device, dtype=dtype)


def score_function_loss(
    logp: Tensor,
    reward: Tensor,
    baseline: str | Callable[[Tensor], Tensor | float] = "none",
) -> Tensor:
    """A surrogate whose gradient is the score function estimate: minimise it to increase the expected reward.

    ``-mean((reward - baseline) * logp)``; only ``logp`` gets a gradient.

    Args:
        logp: (N,) log-probability of each sample under the model. Further axes, (N, ...), are problems of their own:
            baselines are taken along the first axis.
        reward: Rewards of the same shape, any real dtype; detached. For a loss, pass its negative.
        baseline: "none"; "mean" of the batch (shortens the expected gradient by (N - 1) / N); "loo", the mean of the
            other samples, unbiased; "ema", the running mean of the samples before it in this call, unbiased; or a
            callable that maps the rewards to baselines of a shape that broadcasts to theirs. An :class:`EMABaseline`
            is such a callable and goes on from one call to the next.

    Returns:
        A scalar in float32 (float64 for float64); 0 for no samples.

    Raises:
        TypeError: Tensors of the wrong kind, a baseline that is neither a name nor callable.
        ValueError: Shapes that do not fit, an unknown baseline, one sample with "loo".

    Example:
        >>> logits = torch.zeros(3, requires_grad=True)
        >>> index = torch.tensor([0, 1, 1, 2])
        >>> loss = score_function_loss(logits.log_softmax(0)[index], torch.tensor([0.0, 1.0, 1.0, 0.0]), "loo")
        >>> loss.backward()
        >>> logits.grad.argmin().item()  # the class with reward rises
        1
    """
    check_float("logp", logp)
    if not isinstance(reward, Tensor) or reward.is_complex():
        raise TypeError(f"reward must be a real tensor; got {getattr(reward, 'dtype', type(reward).__name__)}")
    if logp.dim() == 0 or logp.shape != reward.shape:
        raise ValueError(
            f"logp and reward must have one shape (N, ...); got {tuple(logp.shape)} and {tuple(reward.shape)}"
        )
    if not callable(baseline) and not isinstance(baseline, str):
        raise TypeError(f"baseline must be a name or a callable; got {type(baseline).__name__}")
    dtype = compute_dtype(logp, reward)
    reward = reward.detach().to(dtype)
    if callable(baseline):
        value = _baseline_tensor(baseline(reward), dtype, reward.device)
        fits = value.dim() <= reward.dim() and all(
            a in (1, b) for a, b in zip(reversed(value.shape), reversed(reward.shape), strict=False)
        )
        if not fits:
            raise ValueError(f"baseline must give a shape that fits {tuple(reward.shape)}; got {tuple(value.shape)}")
        reward = reward - value
    else:
        check_choice("baseline", baseline, BASELINES)
        if baseline == "mean":
            reward = reward - reward.sum(0, keepdim=True) / max(reward.shape[0], 1)
        elif baseline == "loo":
            reward = reward - _leave_one_out(reward)
        elif baseline == "ema":
            reward = reward - EMABaseline()(reward)
    return -(reward * logp.to(dtype)).sum() / max(logp.numel(), 1)
