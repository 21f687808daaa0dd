"""Sets of labels, one for each row: multi-hot or indices to a mask of the positives, with checks at the door."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from kexue.losses._zlpr_kernel import MASKED, refuse_masked
from kexue.losses.zlpr import _check_mask, _check_scores, check_ignore, check_target

__all__ = ["split_labels"]


def split_labels(
    scores: Any, target: Any, indices: bool, ignore_index: int, mask: Tensor | None, validate: bool
) -> tuple[Tensor, Tensor]:
    """Check scores, target and mask of a loss over sets of labels.

    Returns:
        The scores, -inf where the mask is False, and the positives (..., n) bool. Not validated, positives that take no
        part are left out.
    """
    _check_scores(scores)
    check_ignore(ignore_index)
    validate = validate and not torch.compiler.is_compiling()
    check_target(tuple(scores.shape), target, indices, ignore_index, validate)
    if indices:
        classes = scores.shape[-1]
        index = target.long().masked_fill(target == ignore_index, classes)  # padding goes to a column of its own
        positive = torch.zeros((*scores.shape[:-1], classes + 1), dtype=torch.bool, device=scores.device)
        positive = positive.scatter(-1, index, True)[..., :classes]
    elif target.dtype == torch.bool:
        positive = target
    else:
        positive = target != 0
        if validate and target.is_floating_point() and not torch.equal(positive.to(target.dtype), target):
            wrong = float(target[positive & (target != 1)][0])
            raise ValueError(f"target must hold 0 and 1 only (soft labels are for zlpr_loss); got {wrong:g}")
    if mask is not None:
        _check_mask(scores, mask)
        if validate and bool((positive & ~mask).any()):
            refuse_masked()
        positive = positive & mask
        scores = scores.masked_fill(~mask, -math.inf)
    if (
        validate
        and scores.numel()
        and not float(scores.detach().amin()) > MASKED  # written so that a NaN elsewhere hides nothing
        and bool(positive[scores <= MASKED].any())
    ):
        refuse_masked()
    if not validate:
        positive = positive & (scores != -math.inf)
    return scores, positive
