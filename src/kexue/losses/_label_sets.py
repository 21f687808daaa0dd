"""Sets of labels, one for each row: multi-hot or indices to a mask of the positives, with checks at the door."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from kexue._checks import check_int
from kexue._tensors import check_float


def _hard(scores: Tensor, target: Tensor, validate: bool) -> Tensor:
    if tuple(target.shape) != tuple(scores.shape):
        raise ValueError(
            f"a multi-hot target must have the shape of the scores, {tuple(scores.shape)}; got {tuple(target.shape)}"
        )
    if target.dtype == torch.bool:
        return target
    if target.is_complex():
        raise TypeError(f"target must be bool, integers or floats; got dtype {target.dtype}")
    if validate and not bool(((target == 0) | (target == 1)).all()):
        wrong = target[(target != 0) & (target != 1)][0].item()
        raise ValueError(f"target must hold 0 and 1 only (soft labels are zlpr_loss's); got {wrong}")
    return target != 0


def _indexed(scores: Tensor, target: Tensor, ignore_index: int, validate: bool) -> Tensor:
    if target.is_floating_point() or target.is_complex() or target.dtype == torch.bool:
        raise TypeError(f"target must be integers with indices=True; got dtype {target.dtype}")
    if target.dim() != scores.dim() or target.shape[:-1] != scores.shape[:-1]:
        raise ValueError(
            f"target must have shape {(*scores.shape[:-1], 'k')} with indices=True; got {tuple(target.shape)}"
        )
    check_int("ignore_index", ignore_index, -(2**63))
    classes = scores.shape[-1]
    target = target.long()
    pad = target == ignore_index
    if validate and target.numel():
        low, high = (int(x) for x in torch.aminmax(target.masked_fill(pad, 0)))
        if low < 0 or high >= classes:
            raise ValueError(
                f"label indices must lie in [0, {classes}) or be ignore_index={ignore_index}; "
                f"got values from {low} to {high}"
            )
    found = torch.zeros((*scores.shape[:-1], classes + 1), dtype=torch.bool, device=scores.device)
    return found.scatter(-1, target.masked_fill(pad, classes), True)[..., :classes]


def split_labels(
    scores: Any, target: Any, indices: bool, ignore_index: int, mask: Tensor | None, validate: bool
) -> tuple[Tensor, Tensor]:
    """Check scores, target and mask of a multi-label loss.

    Returns:
        The scores, -inf where the mask is False, and the positives (..., n) bool.
    """
    check_float("scores", scores)
    if scores.dim() == 0 or scores.shape[-1] == 0:
        raise ValueError(f"scores must have at least one class on the last axis; got shape {tuple(scores.shape)}")
    if not isinstance(target, Tensor):
        raise TypeError(f"target must be a tensor; got {type(target).__name__}")
    validate = validate and not torch.compiler.is_compiling()
    if indices:
        positive = _indexed(scores, target, ignore_index, validate)
    else:
        positive = _hard(scores, target, validate)
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            raise TypeError(f"mask must be a bool tensor (True = takes part); got {getattr(mask, 'dtype', mask)}")
        try:
            mask = mask.expand(scores.shape)
        except RuntimeError:
            raise ValueError(
                f"mask must broadcast to the shape of the scores, {tuple(scores.shape)}; got {tuple(mask.shape)}"
            ) from None
        if validate and bool((positive & ~mask).any()):
            raise ValueError("a label of the target is masked out; mask is False (takes no part) at a positive")
        positive = positive & mask
        scores = scores.masked_fill(~mask, -math.inf)
    if validate and bool((positive & (scores == -math.inf)).any()):
        raise ValueError("a label of the target has score -inf; excluded classes must not be positives")
    return scores, positive
