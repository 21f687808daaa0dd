"""The margin loss of capsule networks (胶囊网络的边际损失).

Source: Sabour, Frosst and Hinton 2017 (arXiv 1710.09829); 科学空间 5112, whose lambda = 0.25 is the default here (the
paper has 0.5). For scores s_c in [0, 1), the lengths of the capsules, and targets T_c,

    loss = sum_c T_c max(0, m_plus - s_c)^2 + lam (1 - T_c) max(0, s_c - m_minus)^2

Each class has its own pair of margins, so that several or none may be present.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kexue._checks import check_choice, check_real
from kexue._tensors import check_float, compute_dtype
from kexue.losses._common import REDUCTIONS, reduce_loss

__all__ = ["capsule_margin_loss"]


def capsule_margin_loss(
    scores: Tensor,
    targets: Tensor,
    m_plus: float = 0.9,
    m_minus: float = 0.1,
    lam: float = 0.25,
    *,
    reduction: str = "mean",
) -> Tensor:
    """Make the lengths of present classes exceed ``m_plus`` and those of absent ones fall below ``m_minus``.

    Args:
        scores: (..., C), lengths of the capsules.
        targets: (..., C), 1 or True for the classes that are present, 0 for the others; numbers between are weights.
            Other kinds than bool are taken by value; class indices are not (use ``F.one_hot``).
        m_plus: Length that a present class should reach.
        m_minus: Length that an absent class may have.
        lam: Weight of the absent classes.
        reduction: "mean" over the rows, "sum" or "none".

    Returns:
        Loss in float32 (float64 for float64 scores); (...) with "none". Classes are summed; the mean over no rows is 0.

    Raises:
        TypeError: Scores that are no floating tensor, targets that are no tensor, a setting that is no number.
        ValueError: Targets of another shape or outside [0, 1], margins in the wrong order, a negative ``lam``, an
            unknown reduction. The range of the targets is not looked at while torch.compile traces.

    Reference:
        https://spaces.ac.cn/archives/5112

    Example:
        >>> scores = torch.tensor([[0.8, 0.3, 0.05]])
        >>> capsule_margin_loss(scores, torch.tensor([[1, 0, 0]]))  # .1 ** 2 + .25 * .2 ** 2
        tensor(0.0200)
    """
    check_float("scores", scores)
    if scores.dim() < 1:
        raise ValueError(f"scores must have shape (..., classes); got {tuple(scores.shape)}")
    if not isinstance(targets, Tensor):
        raise TypeError(f"targets must be a tensor; got {type(targets).__name__}")
    if targets.is_complex():
        raise TypeError(f"targets must be bool, integers or floating; got dtype {targets.dtype}")
    if targets.shape != scores.shape:
        raise ValueError(f"targets must have the shape of scores, {tuple(scores.shape)}; got {tuple(targets.shape)}")
    _check_margins(m_plus, m_minus, lam)
    check_choice("reduction", reduction, REDUCTIONS)
    dtype = compute_dtype(scores)
    if targets.dtype != torch.bool and targets.numel() and not torch.compiler.is_compiling():
        low, high = (float(x) for x in torch.aminmax(targets.detach()))
        if not (low >= 0 and high <= 1):  # written so that NaN fails
            raise ValueError(f"targets must lie in [0, 1]; got values from {low} to {high}")
    s, present = scores.to(dtype), targets.to(dtype)
    missing = (m_plus - s).clamp(min=0).square()
    excess = (s - m_minus).clamp(min=0).square()
    return reduce_loss((present * missing + lam * (1 - present) * excess).sum(-1), reduction)


def _check_margins(m_plus: Any, m_minus: Any, lam: Any) -> None:
    for name, value in (("m_plus", m_plus), ("m_minus", m_minus)):
        check_real(name, value, minimum=0.0)
    if not m_minus < m_plus:
        raise ValueError(f"m_minus must be less than m_plus; got {m_minus!r} and {m_plus!r}")
    check_real("lam", lam, minimum=0.0)
