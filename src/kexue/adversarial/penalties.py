"""Penalties on the slope of a critic (梯度惩罚): WGAN-GP and its one-sided form, R1, WGAN-div; and weight clipping.

Source: 科学空间 8757, 4439 (互怼的艺术:从零直达WGAN-GP), 6139 (WGAN-div); Gulrajani et al. 2017 (arXiv 1704.00028),
Mescheder et al. 2018 (arXiv 1801.04406), Wu et al. 2018 (arXiv 1712.01026).

    gp    lam mean (|grad D(y)| - 1)^2             y = u x + (1 - u) x~, u uniform on (0, 1) for each row
    gp1   lam mean max(|grad D(y)| - 1, 0)^2
    r1    lam / 2 mean |grad D(x)|^2               x real
    div   k / 2 (mean |grad D(x)|^p + mean |grad D(x~)|^p)

The norm is over all axes of a row, and has 1e-12 under its root. Piecewise-linear critics are not differentiated twice.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from kexue._checks import check_choice, check_real
from kexue._tensors import check_float
from kexue.adversarial._piecewise import Critic, score_and_square

__all__ = ["clip_weights_", "gradient_penalty", "w_div_penalty"]

KINDS = ("gp", "gp1", "r1")
ROOT_EPS = 1e-12
M = TypeVar("M", bound=nn.Module)


def check_pair(x_real: Any, x_fake: Any, equal_rows: bool) -> None:
    """Raise unless both are floating, of one dtype, and of shapes that fit each other."""
    check_float("x_real", x_real)
    check_float("x_fake", x_fake)
    if x_real.dtype != x_fake.dtype:
        raise TypeError(f"x_real and x_fake must have the same dtype; got {x_real.dtype} and {x_fake.dtype}")
    if x_real.dim() < 2 or x_real.shape[1:] != x_fake.shape[1:]:
        got = f"{tuple(x_real.shape)} and {tuple(x_fake.shape)}"
        raise ValueError(f"x_real and x_fake must have the shapes (B, ...) and (B', ...) of equal rows; got {got}")
    if equal_rows and len(x_real) != len(x_fake):
        raise ValueError(f"x_real and x_fake must have as many rows as each other; got {len(x_real)} and {len(x_fake)}")
    if len(x_real) == 0 or len(x_fake) == 0:
        raise ValueError(f"x_real and x_fake must have rows; got {len(x_real)} and {len(x_fake)}")


def between(x_real: Tensor, x_fake: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """A random point on the segment from each fake to its real row."""
    shape = (len(x_real), *[1] * (x_real.dim() - 1))
    u = torch.rand(shape, generator=generator, device=x_real.device, dtype=x_real.dtype)
    return torch.lerp(x_fake.detach(), x_real.detach(), u)


def slope(square: Tensor) -> Tensor:
    """The norm of a squared norm, with a gradient at 0."""
    return (square + ROOT_EPS).sqrt()


def penalty(square: Tensor, kind: str, lam: float) -> Tensor:
    """The weighted penalty of squared slopes (B,)."""
    if kind == "r1":
        return 0.5 * lam * square.mean()
    excess = slope(square) - 1
    return lam * (excess if kind == "gp" else excess.relu()).square().mean()


def gradient_penalty(
    critic: Critic,
    x_real: Tensor,
    x_fake: Tensor,
    kind: str = "gp",
    lam: float = 10.0,
    *,
    generator: torch.Generator | None = None,
    first_order: bool | str = "auto",
) -> Tensor:
    """Penalty on the slope of a critic, to be added to its loss.

    Differentiable once, in the critic's weights; the points are constants.

    Args:
        critic: (B, ...) -> (B,) or (B, 1), which scores every row by itself.
        x_real: Real rows (B, ...).
        x_fake: Generated rows of the same shape.
        kind: "gp" pulls the slope between real and fake rows towards 1 from both sides, "gp1" only from above, "r1"
            pulls the slope at real rows towards 0.
        lam: Weight; of "r1" half of it counts.
        generator: Draws the points between; torch's own by default.
        first_order: As in :func:`kexue.adversarial.gradient_normalize`.

    Returns:
        Scalar, float32 or float64.

    Raises:
        TypeError: Inputs that are not floating, of different dtypes, or of another dtype than the critic.
        ValueError: An unknown kind, a negative weight, shapes that differ, no rows, a critic with batch statistics or
            without one score a row.

    Reference:
        https://spaces.ac.cn/archives/4439

    Example:
        >>> net = torch.nn.Linear(2, 1)
        >>> _ = torch.nn.init.constant_(net.weight, 3.0)
        >>> loss = gradient_penalty(net, torch.randn(5, 2), torch.randn(5, 2), "r1", lam=1.0)  # 1/2 (9 + 9)
        >>> round(loss.item(), 4)
        9.0
    """
    check_choice("kind", kind, KINDS)
    check_real("lam", lam, minimum=0.0)
    check_pair(x_real, x_fake, equal_rows=kind != "r1")
    points = x_real.detach() if kind == "r1" else between(x_real, x_fake, generator)
    return penalty(score_and_square(critic, points, first_order)[1], kind, float(lam))


def w_div_penalty(
    critic: Critic,
    x_real: Tensor,
    x_fake: Tensor,
    k: float = 2.0,
    p: float = 6.0,
    *,
    first_order: bool | str = "auto",
) -> Tensor:
    """Penalty of the Wasserstein divergence: k / 2 times the mean of |grad D|^p at real plus that at fake rows.

    Args:
        critic: (B, ...) -> (B,) or (B, 1), which scores every row by itself.
        x_real: Real rows (B, ...).
        x_fake: Generated rows (B', ...).
        k: Weight.
        p: Power, at least 1.
        first_order: As in :func:`kexue.adversarial.gradient_normalize`.

    Returns:
        Scalar, float32 or float64, differentiable once in the critic's weights.

    Raises:
        TypeError: Inputs that are not floating, of different dtypes, or of another dtype than the critic.
        ValueError: A negative weight, a power below 1, shapes that differ, no rows, a critic with batch statistics or
            without one score a row.

    Reference:
        https://spaces.ac.cn/archives/6139

    Example:
        >>> net = torch.nn.Linear(1, 1)
        >>> _ = torch.nn.init.constant_(net.weight, 2.0)
        >>> round(w_div_penalty(net, torch.randn(5, 1), torch.randn(5, 1)).item(), 3)  # 2 * 2^6
        128.0
    """
    check_real("k", k, minimum=0.0)
    check_real("p", p, minimum=1.0)
    check_pair(x_real, x_fake, equal_rows=False)
    square = score_and_square(critic, torch.cat([x_real.detach(), x_fake.detach()]), first_order)[1]
    return div(square, len(x_real), float(k), float(p))


def div(square: Tensor, n_real: int, k: float, p: float) -> Tensor:
    """The penalty of squared slopes, those at ``n_real`` real rows first."""
    powers = (square + ROOT_EPS).pow(p / 2)
    return 0.5 * k * (powers[:n_real].mean() + powers[n_real:].mean())


@torch.no_grad()
def clip_weights_(module: M, bound: float = 0.01) -> M:
    """Clamp every parameter to [-bound, bound], in place: the constraint of the first WGAN, after each critic step.

    Args:
        module: The critic.
        bound: Largest absolute value.

    Returns:
        The module.

    Raises:
        TypeError: Not a module.
        ValueError: A bound that is not positive.

    Example:
        >>> bool((clip_weights_(torch.nn.Linear(9, 9)).weight.abs() <= 0.01).all())
        True
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be an nn.Module; got {type(module).__name__}")
    check_real("bound", bound, above=0.0)
    parameters: list[Tensor] = [p for p in module.parameters() if p.is_floating_point()]
    if parameters:
        torch._foreach_clamp_min_(parameters, -float(bound))
        torch._foreach_clamp_max_(parameters, float(bound))
    return module
