"""What a critic's slope is in fact (判别器斜率的实测): norms of gradients, jumps of the score, the price of a step.

Source: 科学空间 8757.

A gradient-normalised score has a slope of at most 1 inside every cell of a piecewise-linear critic, yet jumps where
two cells meet. Along the segments between real and fake rows, the interval with the largest change of the score is
halved again and again: what a continuous score changes goes to 0 with the width, a jump stays.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kexue._checks import check_int
from kexue._tensors import compute_dtype
from kexue.adversarial._piecewise import check_critic, check_rows, first_order_obstacle, frozen, scores
from kexue.adversarial.lipschitz import BY_GRADIENT, LipschitzCritic
from kexue.adversarial.penalties import between, check_pair

__all__ = ["LipschitzReport", "lipschitz_report"]

HALVINGS = {torch.float64: 34, torch.float32: 12}  # down to a width at which rounding of the points does not show
DIVIDED = 3.0  # a change counts as a jump if it exceeds this many times what the steepest slope allows


@dataclass(frozen=True)
class LipschitzReport:
    """What :func:`lipschitz_report` measured.

    Attributes:
        method: Method of the critic.
        slopes: (3, B) norms of the gradient of the score at real rows, at fake rows and at points between them.
        slope_max: Largest of them.
        slope_mean: Their mean.
        secant_max: Largest |score(x) - score(y)| / |x - y| over the intervals that were looked at, jumps included.
        jumps: (n,) what remains of the largest change on each segment, when its interval has been halved down to
            ``width``.
        jump_max: Largest jump; 0 if no segment has one.
        jump_share: Share of the segments with a jump.
        width: Mean length of the last intervals.
        first_order: Whether the critic's gradients need no double backward.
        obstacle: Why they do, or None.
        cost_ratio: Time of the critic's loss and gradients, as a multiple of that without a constraint.
        generator_ratio: The same of the generator's loss and its gradient in the fakes.
        position: (m,) places on one segment, from real at 0 to fake at 1: the one with the largest jump.
        profile: (m,) scores there.
    """

    method: str
    slopes: Tensor
    slope_max: float
    slope_mean: float
    secant_max: float
    jumps: Tensor
    jump_max: float
    jump_share: float
    width: float
    first_order: bool
    obstacle: str | None
    cost_ratio: float
    generator_ratio: float
    position: Tensor
    profile: Tensor

    def __str__(self) -> str:
        how = "one derivative" if self.first_order else f"double backward ({self.obstacle})"
        return (
            f"{self.method}: slope max {self.slope_max:.4g}, mean {self.slope_mean:.4g}; "
            f"jumps on {self.jump_share:.0%} of the segments, largest {self.jump_max:.3g}; "
            f"steps cost {self.cost_ratio:.2f} (critic) and {self.generator_ratio:.2f} (generator) of those without "
            f"constraint; {how}"
        )

    def plot(self, figure: Any) -> None:
        """Draw the slopes and the profile.

        Args:
            figure: Empty matplotlib figure.
        """
        left, right = figure.subplots(1, 2)
        for name, values in zip(("real", "fake", "between"), self.slopes.float().cpu(), strict=True):
            left.hist(values.numpy(), bins=30, alpha=0.6, label=name)
        left.set(xlabel="norm of the gradient of the score", ylabel="rows", title=f"{self.method}: slope inside cells")
        left.legend()
        right.plot(self.position.cpu().numpy(), self.profile.float().cpu().numpy(), ".", markersize=2)
        right.set(xlabel="from a real row (0) to a fake one (1)", ylabel="score", title="score along a segment")


def _slopes(critic: LipschitzCritic, x: Tensor) -> Tensor:
    """Norm of the gradient of the score, row by row."""
    with torch.enable_grad(), frozen(critic.net):
        leaf = x.detach().requires_grad_()
        s = critic(leaf)
        (g,) = torch.autograd.grad(s.sum(), leaf, allow_unused=True) if s.requires_grad else (None,)
    return x.new_zeros(len(x)) if g is None else g.flatten(1).to(compute_dtype(g)).norm(dim=1)


@torch.no_grad()
def _along(critic: LipschitzCritic, a: Tensor, b: Tensor, t: Tensor) -> Tensor:
    """Scores (n, m) at a + t (b - a), t (n, m)."""
    flat = (a.flatten(1)[:, None] * (1 - t[..., None]) + b.flatten(1)[:, None] * t[..., None]).flatten(0, 1)
    return critic(flat.view(-1, *a.shape[1:]).to(a.dtype)).view(t.shape)


def _jumps(critic: LipschitzCritic, a: Tensor, b: Tensor, points: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of each segment: what remains of the largest change, length and middle of its interval, the largest secant."""
    dtype = compute_dtype(a)
    length = (b - a).flatten(1).to(dtype).norm(dim=1)
    grid = torch.linspace(0, 1, points, device=a.device, dtype=dtype).expand(len(a), points)
    change = _along(critic, a, b, grid).diff(dim=1).abs()
    steepest, place = change.max(1)
    secant = steepest * (points - 1) / length.clamp(min=1e-12)
    low = grid.gather(1, place[:, None]).squeeze(1)
    width = torch.full_like(low, 1 / (points - 1))
    jump = steepest
    for _ in range(HALVINGS[dtype]):
        width = width / 2
        s = _along(critic, a, b, torch.stack([low, low + width, low + 2 * width], 1)).diff(dim=1).abs()
        right = s[:, 1] > s[:, 0]
        low, jump = torch.where(right, low + width, low), s.max(1).values
    return jump, width * length, low + width / 2, secant


def _ratio(device: torch.device, step: Callable[[], Any], plain: Callable[[], Any], repeats: int) -> float:
    """Median time of a step as a multiple of that of another one, in turns."""
    on_cpu = device.type == "cpu"

    def timed(function: Callable[[], Any]) -> float:
        clock = time.process_time if on_cpu else time.perf_counter
        if not on_cpu:
            torch.accelerator.synchronize()
        start = clock()
        function()
        if not on_cpu:
            torch.accelerator.synchronize()
        return clock() - start

    step()
    plain()
    pairs = [(timed(step), timed(plain)) for _ in range(repeats)]
    return statistics.median(a for a, _ in pairs) / max(statistics.median(b for _, b in pairs), 1e-9)


def _gradients(loss: Tensor, inputs: list[Tensor]) -> None:
    if loss.requires_grad and inputs:
        torch.autograd.grad(loss, inputs, allow_unused=True)


def lipschitz_report(
    critic: LipschitzCritic,
    x_real: Tensor,
    x_fake: Tensor,
    *,
    points: int = 257,
    repeats: int = 5,
    generator: torch.Generator | None = None,
) -> LipschitzReport:
    """Measure how steep a critic's scores are, whether they jump, and what its constraint costs.

    Takes about ``B * points`` evaluations of the score. Nothing of the critic changes, nor its gradients.

    Args:
        critic: The critic, in the state in which it is to be judged.
        x_real: Real rows (B, ...).
        x_fake: Generated rows of the same shape; row i of both is a segment.
        points: Places on each segment from which the search for jumps starts.
        repeats: Timed steps; 0 leaves the ratios at NaN.
        generator: Draws the points between.

    Returns:
        A :class:`LipschitzReport`; ``print`` gives one line, ``plot(figure)`` draws.

    Raises:
        TypeError: No LipschitzCritic, inputs that are not floating or not of the critic's dtype.
        ValueError: Shapes that differ, no rows, fewer than 2 points, batch statistics.

    Reference:
        https://spaces.ac.cn/archives/8757

    Example:
        >>> _ = torch.manual_seed(0)
        >>> net = torch.nn.Sequential(torch.nn.Linear(2, 64), torch.nn.ReLU(), torch.nn.Linear(64, 1))
        >>> x = torch.randn(2, 16, 2)
        >>> report = lipschitz_report(LipschitzCritic(net, "gn"), x[0], x[1], repeats=0)
        >>> report.slope_max <= 1, report.jump_max > 0.01, report.first_order
        (True, True, True)
    """
    if not isinstance(critic, LipschitzCritic):
        raise TypeError(f"critic must be a LipschitzCritic; got {type(critic).__name__}")
    check_int("points", points, 2)
    check_int("repeats", repeats, 0)
    check_pair(x_real, x_fake, equal_rows=True)
    check_rows("x_real", x_real, critic.net)
    check_critic(critic.net)
    if torch.is_inference_mode_enabled():  # slopes need a graph, which inference mode cannot make
        with torch.inference_mode(False):
            x_real, x_fake = x_real.clone(), x_fake.clone()
            return lipschitz_report(critic, x_real, x_fake, points=points, repeats=repeats, generator=generator)
    real, fake = x_real.detach(), x_fake.detach()
    buffers = [(b, b.clone()) for b in critic.buffers()]  # the vectors of spectral normalisation move with every call
    try:
        middle = between(real, fake, generator)
        slopes = torch.stack([_slopes(critic, x) for x in (real, fake, middle)])
        jump, width, place, secant = _jumps(critic, real, fake, points)
        allowed = DIVIDED * slopes.max() * width + 64 * torch.finfo(jump.dtype).eps * critic.scale
        is_jump = jump > allowed
        worst = int(torch.where(is_jump, jump, -1).argmax())
        around = torch.linspace(0, 1, 512, device=real.device, dtype=place.dtype)
        close = (place[worst] + torch.linspace(-0.02, 0.02, 256, device=real.device, dtype=place.dtype)).clamp(0, 1)
        position = torch.cat([around, close]).sort().values
        profile = _along(critic, real[worst : worst + 1], fake[worst : worst + 1], position[None])[0]
        needed = critic.method in BY_GRADIENT
        obstacle = first_order_obstacle(critic.net, real) if needed and critic.first_order is not False else None
        if needed and critic.first_order is False:
            obstacle = "first_order=False"
        costs = _costs(critic, real, fake, repeats)
    finally:
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
    return LipschitzReport(
        method=critic.method,
        slopes=slopes,
        slope_max=float(slopes.max()),
        slope_mean=float(slopes.mean()),
        secant_max=float(torch.cat([secant, jump / width.clamp(min=1e-12)]).max()),
        jumps=torch.where(is_jump, jump, 0),
        jump_max=float(torch.where(is_jump, jump, 0).max()),
        jump_share=float(is_jump.double().mean()),
        width=float(width.mean()),
        first_order=obstacle is None,
        obstacle=obstacle,
        cost_ratio=costs[0],
        generator_ratio=costs[1],
        position=position,
        profile=profile,
    )


def _costs(critic: LipschitzCritic, real: Tensor, fake: Tensor, repeats: int) -> tuple[float, float]:
    """Critic's and generator's step as multiples of those of the same network without constraint."""
    if repeats == 0:
        return float("nan"), float("nan")

    def learn(loss: Callable[[], Tensor], parameters: list[Tensor]) -> Callable[[], None]:
        return lambda: _gradients(loss(), parameters)

    weights: list[Tensor] = [p for p in critic.net.parameters() if p.requires_grad]

    def plain_generator(x: Tensor) -> Tensor:
        with frozen(critic.net):
            return -scores(critic.net, x).mean()

    def plain_critic() -> Tensor:
        s = scores(critic.net, torch.cat([real, fake]))
        return s[len(real) :].mean() - s[: len(real)].mean()

    leaf = fake.clone().requires_grad_()
    with torch.enable_grad():
        return (
            _ratio(
                real.device,
                learn(lambda: critic.critic_loss(real, fake), weights),
                learn(plain_critic, weights),
                repeats,
            ),
            _ratio(
                real.device,
                learn(lambda: critic.generator_loss(leaf), [leaf]),
                learn(lambda: plain_generator(leaf), [leaf]),
                repeats,
            ),
        )
