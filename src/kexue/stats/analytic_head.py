"""A classifier head in closed form (有解析解的逻辑回归): initialise an ``nn.Linear`` in one pass over its features.

Source: 科学空间 8578 (概率视角下的线性模型:逻辑回归有解析解吗?)

The formula is that of ``kexue.stats.analytic``. The weights are (mu_k - c) Sigma^-1 with c the overall mean, not
mu_k Sigma^-1: the probabilities are the same, but numbers that all classes share would cost the head's own precision.
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from kexue._tensors import check_float, compute_dtype
from kexue.stats._class_rule import check_regularisation, linear_rule
from kexue.stats._moments import Array, moments

__all__ = ["analytic_head_"]

INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
Head = TypeVar("Head", bound=nn.Linear)


def set_linear(head: nn.Linear, weight: Array, bias: Array) -> None:
    """Copy weight and bias into a head; ValueError, and the head as it was, if its dtype cannot hold them."""
    values = [torch.from_numpy(x).to(like.dtype) for x, like in ((weight, head.weight), (bias, head.bias))]
    if not all(bool(v.isfinite().all()) for v in values):
        size = max(abs(weight).max(), abs(bias).max())
        raise ValueError(f"weights and bias must fit the dtype of the head, {head.weight.dtype}; got up to {size:.3g}")
    with torch.no_grad():
        head.weight.copy_(values[0])
        head.bias.copy_(values[1])


def analytic_head_(
    head: Head,
    features: Tensor,
    labels: Tensor,
    *,
    shrinkage: str | float = "auto",
    ridge: float = 1e-6,
    ignore_index: int = -100,
) -> Head:
    """Set weight and bias of a linear head to the closed-form classifier of these features.

    Args:
        head: Layer with D inputs, C outputs and a bias, for example ``model.classifier``; its dtype and device stay.
            One output gets the log-odds of label 1 against label 0.
        features: What the head sees, (..., D), any floating dtype; copied to the CPU in float32 (float64).
        labels: Classes in [0, C), integers, of shape (...); every class must occur.
        shrinkage: "auto" or in [0, 1], as in :class:`AnalyticLogisticRegression`.
        ridge: Relative to the mean variance, not negative.
        ignore_index: Label of rows that do not take part.

    Returns:
        The head.

    Raises:
        TypeError: Wrong kind of argument.
        ValueError: Shapes that do not fit, no bias, labels out of range, a class without rows, features that are not
            finite, ``shrinkage`` or ``ridge`` out of range, weights beyond the range of the head's dtype.

    Reference:
        Scientific Spaces, article 8578.

    Example:
        >>> features = torch.tensor([[0.0, 1.0], [1.0, 0.0], [4.0, 5.0], [5.0, 4.5]])
        >>> head = analytic_head_(nn.Linear(2, 2), features, torch.tensor([0, 0, 1, 1]))
        >>> head(torch.tensor([[0.0, 0.0], [5.0, 5.0]])).argmax(1)
        tensor([0, 1])
    """
    if not isinstance(head, nn.Linear):
        raise TypeError(f"head must be an nn.Linear; got {type(head).__name__}")
    if head.bias is None:
        raise ValueError("head must have a bias; got an nn.Linear with bias=False")
    check_float("features", features)
    if features.layout != torch.strided:
        raise TypeError(f"features must be dense; got a tensor of layout {features.layout}")
    if not isinstance(labels, Tensor) or labels.dtype not in INTEGERS:
        raise TypeError(f"labels must be a tensor of integers; got {getattr(labels, 'dtype', type(labels).__name__)}")
    if features.dim() < 2 or features.shape[-1] != head.in_features or features.shape[:-1] != labels.shape:
        raise ValueError(
            f"features must have shape (..., {head.in_features}) and labels (...); got {tuple(features.shape)} and "
            f"{tuple(labels.shape)}"
        )
    check_regularisation(shrinkage, ridge)
    x = features.detach().to("cpu", compute_dtype(features)).reshape(-1, head.in_features).numpy()
    y = labels.detach().cpu().long().reshape(-1).numpy()
    taken = np.flatnonzero(y != ignore_index)
    x, y = x[taken] if len(taken) < len(y) else x, y[taken]
    classes = max(2, head.out_features)
    if len(y) and not (y.min() >= 0 and y.max() < classes):
        bad = y.min() if y.min() < 0 else y.max()
        raise ValueError(f"labels must be in [0, {classes}) or {ignore_index}; got {bad}")
    missing = np.flatnonzero(np.bincount(y, minlength=classes) == 0)
    if len(missing):
        raise ValueError(f"every class needs a row; got none of {missing.tolist()}")
    if not np.isfinite(x.sum(dtype=np.float64)) and not np.isfinite(x).all():
        raise ValueError(f"features must be finite; got {x[~np.isfinite(x)][0]}")
    with np.errstate(all="ignore"):
        kept = moments(x, y, classes)
        fine = np.isfinite(kept.scatter.sum() + kept.means.sum())
    if not fine:
        raise ValueError(f"the squares of features must not exceed float64; got values up to {abs(x).max():.3g}")
    rule = linear_rule(kept, shrinkage, float(ridge), None)
    weight, bias = rule.weights, rule.bias - rule.weights @ rule.centre
    if head.out_features == 1:
        weight, bias = rule.article()
    set_linear(head, weight, bias)
    return head
