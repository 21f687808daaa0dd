"""Gradient-normalised critics (梯度归一化): GN-GAN and GraN-GAN.

Source: 科学空间 8757 (WGAN新方案:通过梯度归一化来实现L约束); GN: Wu et al. 2021 (arXiv 2109.02235), GraN: Bhaskara
    et al. 2022 (arXiv 2111.03162).

    GN     D / (|grad D| + |D|)              in [-1, 1]
    GraN   D |grad D| / (|grad D|^2 + eps)

with the 2-norm over all axes of a row. For a piecewise-linear D the gradient is constant within a cell, so that the
slope of GN there is |grad D|^2 / (|grad D| + |D|)^2 <= 1. Across the border of two cells the gradient jumps, and
with it the normalised score: it is not Lipschitz, not even continuous (:func:`kexue.adversarial.lipschitz_report`
measures this).

What we do differently: the usual code differentiates twice, in the critic's step and in the generator's. Here a
piecewise-linear critic needs neither (see ``_piecewise``), with the same gradients.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kexue._checks import check_choice, check_real
from kexue.adversarial._piecewise import Critic, score_and_square

__all__ = ["gradient_normalize"]

KINDS = ("gn", "gran")
EPS = {"gn": 1e-12, "gran": 0.1}


def check_eps(eps: Any) -> None:
    """Raise unless ``eps`` is None or a number that is not negative."""
    if eps is not None:
        check_real("eps", eps, minimum=0.0)


def normalized(score: Tensor, square: Tensor, kind: str, eps: float | None) -> Tensor:
    """The normalised score of a score and a squared slope, both (B,)."""
    value = EPS[kind] if eps is None else float(eps)
    if kind == "gn" and value > 0:
        return score / ((square + value).sqrt() + score.abs())
    slope = square.clamp(min=torch.finfo(square.dtype).tiny).sqrt()  # the root has no gradient at 0
    if kind == "gn":
        return score / (slope + score.abs())
    if value > 0:
        return score * slope / (square + value)
    return torch.where(square > 0, score / slope, 0)


def gradient_normalize(
    net: Critic, x: Tensor, kind: str = "gn", eps: float | None = None, *, first_order: bool | str = "auto"
) -> Tensor:
    """Scores of a critic, normalised by the norm of their gradient.

    Differentiable once, in ``x`` and in the weights. A critic of Linear, Conv, (Leaky)ReLU, PReLU, pooling, reshapes,
    residual additions and the like is differentiated without double backward; others (GELU, attention) are
    differentiated twice.

    Args:
        net: (B, ...) -> (B,) or (B, 1), which scores every row by itself.
        x: Inputs (B, ...) in the critic's dtype.
        kind: "gn", D / (|grad D| + |D|), or "gran", D |grad D| / (|grad D|^2 + eps).
        eps: "gn": added under the root of the norm, default 1e-12. "gran": added to the squared norm, default 0.1.
            With 0, a row without score and slope gives 0.
        first_order: "auto"; True refuses a critic that would be differentiated twice; False always does that, and
            its gradients can be differentiated again.

    Returns:
        (B,) float32, float64 for float64 inputs.

    Raises:
        TypeError: ``net`` is not callable or does not return a tensor, ``x`` is not floating or of another dtype than
            the critic.
        ValueError: An unknown kind, a negative eps, another output than one score a row, BatchNorm with the
            statistics of the batch, or ``first_order=True`` for a critic without a rule.

    Reference:
        https://spaces.ac.cn/archives/8757

    Example:
        >>> net = torch.nn.Linear(2, 1, bias=False)
        >>> net.weight = torch.nn.Parameter(torch.tensor([[3.0, 4.0]]))
        >>> gradient_normalize(net, torch.tensor([[1.0, 1.0], [0.0, -5.0], [0.0, 0.0]])).detach()
        tensor([ 0.5833, -0.8000,  0.0000])
    """
    check_choice("kind", kind, KINDS)
    check_eps(eps)
    score, square = score_and_square(net, x, first_order)
    return normalized(score, square, kind, eps)
