"""FlatNCE on given scores (FlatNCE), and what tells whether a contrastive batch still teaches anything.

Source: 科学空间 8586. With scores s_j and target t: FlatNCE = logsumexp over j != t of s_j, minus s_t = log xi;
InfoNCE = log(1 + xi). See ``contrastive.py`` for the losses on embeddings.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kexue._tensors import check_float
from kexue.losses._common import check_labels, check_modes, contrast_report, reduce_loss, split_scores

__all__ = ["ContrastiveDiagnostics", "contrastive_diagnostics", "flat_cross_entropy"]


def _check_scores(scores: Any, target: Any, validate: bool) -> None:
    check_float("scores", scores)
    if scores.dim() == 0 or scores.shape[-1] < 2:
        raise ValueError(f"scores must have at least 2 candidates on the last axis; got shape {tuple(scores.shape)}")
    check_labels(target, tuple(scores.shape[:-1]), scores.shape[-1], validate)


def flat_cross_entropy(
    scores: Tensor,
    target: Tensor,
    *,
    mode: str = "flat",
    report: str | None = None,
    reduction: str = "mean",
    validate: bool = True,
) -> Tensor:
    """FlatNCE of given scores: log-sum-exp over the other candidates minus the target's score.

    With ``mode="info"`` it is ordinary cross-entropy that stays accurate when the target dominates. One buffer of the
    size of the scores; differentiable once.

    Args:
        scores: (..., K) logits, K >= 2; -inf excludes a candidate.
        target: (...) integers in [0, K).
        mode: Which gradient: "flat" or "info".
        report: Which value is returned; None is the one of ``mode``.
        reduction: "none", "mean" or "sum" over rows.
        validate: Check the range of the targets (one reduction) and that the flat value of every row has a negative;
            never done under torch.compile.

    Returns:
        The loss in float32 (float64 for float64 scores). A row whose other scores are all -inf has the InfoNCE value
        0; its flat value would be -inf.

    Raises:
        TypeError: Wrong kind of argument.
        ValueError: Shapes that do not fit, fewer than 2 candidates, targets out of range, a row without negatives.

    Example:
        >>> flat_cross_entropy(torch.tensor([[30.0, 1.0]]), torch.tensor([0]))
        tensor(-29.)
    """
    report = check_modes(mode, report, reduction)
    _check_scores(scores, target, validate)
    others, chosen = split_scores(scores, target.long())
    if report == "flat" and validate and not torch.compiler.is_compiling():
        empty = (others.detach() == -math.inf).nonzero()
        if len(empty):
            raise ValueError(f"every row needs a negative; the other scores of row {empty[0].tolist()} are all -inf")
    return reduce_loss(contrast_report(others - chosen, mode, report), reduction)


@dataclass(frozen=True)
class ContrastiveDiagnostics:
    """What :func:`contrastive_diagnostics` found; fields can also be read like those of a dict.

    Attributes:
        xi: (...) sum over the negatives of exp(s_j - s_t): how far each row is from solved.
        log_xi: (...) the same as a logarithm, the FlatNCE value.
        centred: (...) log_xi minus the logarithm of the number of negatives (K - 1 without those at -inf): comparable
            between numbers of candidates.
        ess: (...) effective number of negatives, (sum w)^2 / sum w^2, between 1 and K - 1; 0 without negatives.
        pos_gradient_lost: Share of rows where 1 - p_t rounds to 0 in the dtype of the scores, so that the usual
            cross-entropy gives the positive no gradient.
    """

    xi: Tensor
    log_xi: Tensor
    centred: Tensor
    ess: Tensor
    pos_gradient_lost: float

    def __getitem__(self, name: str) -> Any:
        if name not in self.__dataclass_fields__:
            raise KeyError(f"expected one of {', '.join(self.__dataclass_fields__)}; got {name!r}")
        return getattr(self, name)


@torch.no_grad()
def contrastive_diagnostics(scores: Tensor, target: Tensor) -> ContrastiveDiagnostics:
    """Whether a contrastive batch still teaches anything, and whether its gradient survives rounding.

    Args:
        scores: (..., K) logits (similarities divided by the temperature), K >= 2.
        target: (...) integers in [0, K).

    Returns:
        A :class:`ContrastiveDiagnostics`.

    Raises:
        TypeError: Wrong kind of argument.
        ValueError: Shapes that do not fit or targets out of range.

    Example:
        >>> report = contrastive_diagnostics(torch.tensor([[20.0, 0.0, 0.0]]), torch.tensor([0]))
        >>> report.pos_gradient_lost, round(float(report.ess), 3)
        (1.0, 2.0)
    """
    _check_scores(scores, target, True)
    target = target.long()
    lost = torch.softmax(scores, -1).gather(-1, target.unsqueeze(-1)) == 1
    others, chosen = split_scores(scores, target)
    negatives = scores.to(others.dtype).scatter(-1, target.unsqueeze(-1), -math.inf)
    count = (negatives > -math.inf).sum(-1)
    weights = torch.softmax(negatives, -1)
    log_xi = others - chosen
    return ContrastiveDiagnostics(
        xi=log_xi.exp(),
        log_xi=log_xi,
        centred=log_xi - count.clamp(min=1).to(others.dtype).log(),
        ess=torch.where(count > 0, weights.square().sum(-1).reciprocal(), 0.0),
        pos_gradient_lost=float(lost.double().mean()) if lost.numel() else 0.0,
    )
