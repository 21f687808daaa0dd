"""Multi-label softmax cross-entropy (多标签 Softmax 交叉熵, ZLPR) with hard, sparse and soft labels.

Source: 科学空间 7359 (将"Softmax+交叉熵"推广到多标签分类问题), 9064 (多标签"Softmax+交叉熵"的软标签版本) and 8888
(the sparse form); Su et al., https://arxiv.org/abs/2208.02955.

With scores s_i, positive set P, negative set Neg and a threshold s_0:

    L = log(e^{s_0} + sum over Neg of e^{s_i}) + log(e^{-s_0} + sum over P of e^{-s_j})

which asks for s_j > s_0 > s_i; with s_0 = 0, predict the labels with s > 0. Soft labels t_i in [0, 1] weigh both sides:

    L = log(1 + sum t_i e^{-s_i}) + log(1 + sum (1 - t_i) e^{s_i}),    optimum t_i = sigmoid(2 s_i)

The loss for a threshold is that of s - s_0. What differs from the common copies: positives are taken out of the sum
over all scores, not subtracted from it afterwards, which fails for confident positives; no -1e12 is added to anything,
no column of zeros appended, no logarithm of a label taken; label indices are padded with -1, class 0 is a class like
any other; sums are float32 whatever the dtype; the gradient is built in the forward pass, in the buffer that is
returned (``_zlpr_kernel.py``).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from kexue._checks import check_choice, check_real
from kexue._tensors import check_float, compute_dtype, once_differentiable
from kexue.losses._common import REDUCTIONS, reduce_loss
from kexue.losses._zlpr_kernel import MASKED, prepare, refuse_masked, run, take

__all__ = ["ZLPRLoss", "zlpr_loss", "zlpr_proba"]


class _ZLPR(torch.autograd.Function):
    """Loss (N,) of scores (N, n); see ``_zlpr_kernel``."""

    @staticmethod
    def forward(
        ctx: Any,
        scores: Tensor,
        target: Tensor,
        threshold: Tensor | None,
        mask: Tensor | None,
        ignore: int | None,
        check: bool,
        gradient: bool,
    ) -> Tensor:
        ctx.ignore, ctx.made = ignore, []
        # A gradient kept in fp16 or bf16 would be rounded twice: it is computed when it is asked for. So is that of a
        # second backward pass, since the first one gives its buffer away.
        if gradient and scores.dtype == compute_dtype(scores) and not torch.compiler.is_compiling():
            loss, slope, made = prepare(scores, target, threshold, mask, ignore, check)
            ctx.made.append(made)
        else:
            loss, slope, *_ = run(scores, target, threshold, mask, None, ignore, (False, False), check)
        ctx.save_for_backward(scores, target, threshold, mask, slope)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        scores, target, threshold, mask, slope = ctx.saved_tensors
        needs = ctx.needs_input_grad
        coef = grad.to(slope.dtype).unsqueeze(1)
        finish = take(ctx.made)
        grad_scores = None if finish is None else finish(coef)
        left = needs[0] and finish is None, needs[1]
        grad_target = None
        if any(left):
            *_, scored, weighed = run(scores, target, threshold, mask, coef, ctx.ignore, left, False)
            grad_scores, grad_target = scored if left[0] else grad_scores, weighed if left[1] else None
        return grad_scores, grad_target, slope * coef if needs[2] else None, None, None, None, None


def _check_scores(scores: Any) -> None:
    check_float("scores", scores)
    if scores.dim() == 0 or scores.shape[-1] == 0:
        raise ValueError(f"scores must be (..., n) with at least one label; got shape {tuple(scores.shape)}")


def check_ignore(ignore_index: Any) -> None:
    """Raise unless the padding is an integer."""
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index must be an integer; got {ignore_index!r}")


def check_target(shape: tuple[int, ...], target: Any, indices: bool, ignore: int, values: bool) -> None:
    """Raise unless the target fits scores of a shape; its values, one reduction, are looked at only if ``values``."""
    if not isinstance(target, Tensor):
        raise TypeError(f"target must be a tensor; got {type(target).__name__}")
    if target.is_complex() or (indices and (target.is_floating_point() or target.dtype == torch.bool)):
        raise TypeError(
            f"target must be {'integer label indices' if indices else 'bool, integers or floats'}; got {target.dtype}"
        )
    n = shape[-1]
    if indices:
        if target.dim() != len(shape) or tuple(target.shape[:-1]) != shape[:-1]:
            raise ValueError(f"label indices must have shape {(*shape[:-1], 'k')}; got {tuple(target.shape)}")
    elif tuple(target.shape) != shape:
        hint = "" if target.is_floating_point() or target.dtype == torch.bool else " (label indices need indices=True)"
        raise ValueError(f"target must have the shape of scores, {shape}; got {tuple(target.shape)}{hint}")
    if not values or not target.numel() or target.dtype == torch.bool:
        return
    if indices:
        target = target.long()  # torch knows little of uint16 and the like
        given = target.masked_fill(target == ignore, 0)
        first, last = (int(edge) for edge in torch.aminmax(given))
        if first < 0 or last >= n:
            raise ValueError(f"label indices must lie in [0, {n}) or be {ignore}; got values from {first} to {last}")
        return
    low, high = (float(edge) for edge in torch.aminmax(target.detach()))
    if not (low >= 0 and high <= 1):  # written so that NaN fails
        kind = "soft labels" if target.is_floating_point() else "a multi-hot target"
        hint = "" if target.is_floating_point() else " (label indices need indices=True)"
        raise ValueError(f"{kind} must lie in [0, 1]; got values from {low:g} to {high:g}{hint}")


def _check_mask(scores: Tensor, mask: Any) -> None:
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise TypeError(f"mask must be a bool tensor (True = takes part); got {getattr(mask, 'dtype', mask)}")
    if not _broadcasts(mask, tuple(scores.shape)):
        raise ValueError(f"mask must be broadcastable to {tuple(scores.shape)}; got {tuple(mask.shape)}")


def _broadcasts(x: Tensor, shape: tuple[int, ...]) -> bool:
    sizes = tuple(x.shape)
    if len(sizes) > len(shape):
        return False
    return all(a in (1, b) for a, b in zip(sizes[::-1], shape[::-1], strict=False))


def check_threshold(batch: tuple[int, ...], threshold: Any) -> None:
    """Raise unless the threshold is a finite number or a floating tensor broadcastable to (*batch, 1)."""
    if not isinstance(threshold, Tensor):
        check_real("threshold", threshold)
        return
    check_float("threshold", threshold)
    if not _broadcasts(threshold, (*batch, 1)):
        raise ValueError(f"threshold must be broadcastable to {(*batch, 1)}; got {tuple(threshold.shape)}")


def threshold_rows(
    threshold: float | Tensor, batch: tuple[int, ...], like: Tensor, dtype: torch.dtype
) -> Tensor | None:
    """The threshold of each row, (N, 1) in ``dtype``; None for 0."""
    count = math.prod(batch)
    if isinstance(threshold, Tensor):
        return threshold.to(dtype).expand(*batch, 1).reshape(count, 1)
    return like.new_full((count, 1), float(threshold), dtype=dtype) if threshold != 0 else None


def zlpr_loss(
    scores: Tensor,
    target: Tensor,
    *,
    threshold: float | Tensor = 0.0,
    indices: bool = False,
    ignore_index: int = -1,
    mask: Tensor | None = None,
    reduction: str = "mean",
    validate: bool = True,
) -> Tensor:
    """Multi-label softmax cross-entropy (ZLPR): every positive above the threshold, every negative below it.

    No class weights and no tuned threshold are needed: predict the labels with ``scores > threshold``. Beside the
    gradient (one buffer of the size of the scores, returned as it is) the memory is a block of some MiB; to find the
    labels of a dense target of numbers, also a bool copy of it, which is gone before the gradient is made. Sparse
    targets are the fastest. The loss is differentiable once.

    Args:
        scores: (..., n) logits; fp16, bf16, float32 or float64. Computed in float32 (float64 stays). A logit of
            -inf or -1e12 counts as masked.
        target: Multi-hot (..., n), bool or integers 0 and 1; or soft labels (..., n) in [0, 1] as floats, which may
            require a gradient; or with ``indices=True`` integer label indices (..., k), padded with ``ignore_index``
            (a repeated index counts once).
        threshold: s_0: a number, or a tensor broadcastable to (..., 1), which may require a gradient.
        indices: The target holds label indices.
        ignore_index: Padding of label indices. One in [0, n) makes that label a negative everywhere.
        mask: Bool, broadcastable to scores; True = takes part. The rest contributes nothing and gets gradient 0.
        reduction: "none" (...), "mean" or "sum" over rows. The mean over no rows is 0.
        validate: Check the values of the target (one reduction) and that no positive is masked (never done under
            torch.compile). When it is off, a masked positive contributes nothing.

    Returns:
        The loss in float32 (float64 for float64 scores).

    Raises:
        TypeError: Wrong kind of argument.
        ValueError: Shapes that do not fit, a label index out of range, a label outside [0, 1] or NaN, a positive that
            is masked, an empty label axis, a threshold that is not finite.

    Reference:
        https://spaces.ac.cn/archives/7359, https://spaces.ac.cn/archives/9064, https://spaces.ac.cn/archives/8888

    Example:
        >>> scores = torch.tensor([[2.0, -1.0, 3.0, -4.0]])
        >>> hard = zlpr_loss(scores, torch.tensor([[True, False, True, False]]))
        >>> sparse = zlpr_loss(scores, torch.tensor([[0, 2, -1]]), indices=True)
        >>> soft = zlpr_loss(scores, torch.tensor([[0.9, 0.1, 1.0, 0.0]]))
        >>> round(float(hard), 4), float(hard) == float(sparse), round(float(soft), 4)
        (0.4964, True, 1.1034)
    """
    check_choice("reduction", reduction, REDUCTIONS)
    _check_scores(scores)
    check_threshold(tuple(scores.shape[:-1]), threshold)
    check_ignore(ignore_index)
    if mask is not None:
        _check_mask(scores, mask)
    check = validate and not torch.compiler.is_compiling()
    check_target(tuple(scores.shape), target, indices, ignore_index, check)
    return _loss(scores, target, threshold, ignore_index if indices else None, mask, reduction, check)


def _loss(
    scores: Tensor,
    target: Tensor,
    threshold: float | Tensor,
    ignore: int | None,
    mask: Tensor | None,
    reduction: str,
    check: bool,
) -> Tensor:
    """The loss for checked arguments."""
    batch, n = scores.shape[:-1], scores.shape[-1]
    rows = scores.reshape(batch.numel(), n)
    flat = target.reshape(batch.numel(), target.shape[-1])
    edge = threshold_rows(threshold, batch, rows, compute_dtype(scores))
    if mask is not None:
        mask = mask.expand(scores.shape).reshape(rows.shape)
    gradient = torch.is_grad_enabled() and scores.requires_grad
    loss = _ZLPR.apply(rows, flat, edge, mask, ignore, check, gradient)
    return reduce_loss(loss.reshape(batch), reduction)


def zlpr_proba(scores: Tensor, threshold: float | Tensor = 0.0) -> Tensor:
    """Probabilities of the labels: sigmoid(2 (s - s_0)), not sigmoid(s).

    Soft labels t are reproduced at the optimum of :func:`zlpr_loss`, where t e^{-s} = (1 - t) e^s. The decision stays
    s > s_0.

    Args:
        scores: (..., n) logits.
        threshold: As in :func:`zlpr_loss`.

    Returns:
        (..., n) in [0, 1], in the dtype of the scores.

    Raises:
        TypeError: Not a floating tensor.
        ValueError: A threshold that does not fit or is not finite.

    Reference:
        https://spaces.ac.cn/archives/9064

    Example:
        >>> zlpr_proba(torch.tensor([0.0, 1.0, -40.0]))
        tensor([5.0000e-01, 8.8080e-01, 1.8049e-35])
    """
    check_float("scores", scores)
    wide = scores.to(compute_dtype(scores))
    if scores.dim() == 0:
        check_real("threshold", threshold)
    else:
        check_threshold(tuple(scores.shape[:-1]), threshold)
    return torch.sigmoid(2 * (wide - threshold)).to(scores.dtype)


class ZLPRLoss(nn.Module):
    """:func:`zlpr_loss` as a Module, with a learned threshold and label smoothing.

    Smoothing replaces the labels by (1 - e) t + e prior. With the prior 1 / n a row carries e more labels in all;
    e / 2 for every label, as for two classes, would shift the threshold when n is large. Labels that are masked (by
    ``mask`` or a logit of -inf or -1e12) stay masked. A smoothed loss takes dense labels inside, whatever the target.

    Args:
        threshold: s_0, a number.
        learn_threshold: Make it a Parameter.
        label_smoothing: e in [0, 1].
        reduction: "none", "mean" or "sum".
        smoothing_prior: "uniform", which is 1 / n, or a tensor (n,) in [0, 1], such as the frequencies of the labels.
        indices: The targets are label indices.
        ignore_index: Padding of label indices.
        validate: As in :func:`zlpr_loss`.

    Raises:
        TypeError: Wrong kind of argument.
        ValueError: A value out of range.

    Reference:
        https://spaces.ac.cn/archives/7359, https://spaces.ac.cn/archives/9064

    Example:
        >>> criterion = ZLPRLoss(label_smoothing=0.1)
        >>> scores = torch.tensor([[2.0, -1.0, 3.0, -4.0]], requires_grad=True)
        >>> loss = criterion(scores, torch.tensor([[1, 0, 1, 0]]))
        >>> loss.backward()
    """

    def __init__(
        self,
        threshold: float = 0.0,
        learn_threshold: bool = False,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
        smoothing_prior: str | Tensor = "uniform",
        *,
        indices: bool = False,
        ignore_index: int = -1,
        validate: bool = True,
    ) -> None:
        super().__init__()
        check_real("threshold", threshold)
        check_real("label_smoothing", label_smoothing, minimum=0.0)
        if label_smoothing > 1:
            raise ValueError(f"label_smoothing must be at most 1; got {label_smoothing}")
        check_choice("reduction", reduction, REDUCTIONS)
        check_ignore(ignore_index)
        self.threshold = nn.Parameter(torch.tensor(float(threshold))) if learn_threshold else float(threshold)
        self.label_smoothing, self.reduction = float(label_smoothing), reduction
        self.indices, self.ignore_index, self.validate = indices, ignore_index, validate
        if isinstance(smoothing_prior, Tensor):
            check_float("smoothing_prior", smoothing_prior, 1)
            if not len(smoothing_prior):
                raise ValueError("smoothing_prior must have at least one entry; got none")
            low, high = (float(edge) for edge in torch.aminmax(smoothing_prior.detach()))
            if not (low >= 0 and high <= 1):
                raise ValueError(f"smoothing_prior must lie in [0, 1]; got values from {low:g} to {high:g}")
            self.register_buffer("smoothing_prior", smoothing_prior.detach().clone())
        else:
            check_choice("smoothing_prior", smoothing_prior, ("uniform",))
            self.smoothing_prior = smoothing_prior

    def extra_repr(self) -> str:
        """What print shows."""
        threshold = self.threshold.item() if isinstance(self.threshold, Tensor) else self.threshold
        return (
            f"threshold={threshold:g}, label_smoothing={self.label_smoothing:g}, "
            f"reduction={self.reduction!r}, indices={self.indices}"
        )

    def forward(
        self,
        scores: Tensor,
        target: Tensor,
        mask: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Loss of a batch; arguments as in :func:`zlpr_loss`.

        With ``num_items_in_batch`` the call is that of transformers' Trainer, ``Trainer(compute_loss_func=criterion)``:
        ``scores`` are the outputs of the model, and :func:`zlpr_compute_loss` takes over.
        """
        if num_items_in_batch is not None or not isinstance(scores, Tensor):
            from kexue.losses.trainer_glue import zlpr_compute_loss  # it imports this module

            return zlpr_compute_loss(scores, target, num_items_in_batch, criterion=self, mask=mask)
        if not self.label_smoothing:
            return zlpr_loss(
                scores, target, threshold=self.threshold, indices=self.indices, ignore_index=self.ignore_index,
                mask=mask, reduction=self.reduction, validate=self.validate,
            )  # fmt: skip
        _check_scores(scores)
        if mask is not None:
            _check_mask(scores, mask)
        check = self.validate and not torch.compiler.is_compiling()
        check_target(tuple(scores.shape), target, self.indices, self.ignore_index, check)
        smooth = self._smoothed(scores, target, mask, check)
        return _loss(scores, smooth, self.threshold, None, mask, self.reduction, False)

    def _smoothed(self, scores: Tensor, target: Tensor, mask: Tensor | None, check: bool) -> Tensor:
        """Dense labels (..., n), smoothed; masked ones are left to the loss."""
        dtype, n = compute_dtype(scores), scores.shape[-1]
        prior = 1 / n if isinstance(self.smoothing_prior, str) else self.smoothing_prior.to(dtype)
        if isinstance(prior, Tensor) and len(prior) != n:
            raise ValueError(f"smoothing_prior must have one entry for each of {n} labels; got {len(prior)}")
        if self.indices:
            valid = target != self.ignore_index
            spare = scores.new_zeros((*scores.shape[:-1], n + 1), dtype=dtype)  # padding goes to a column of its own
            target = spare.scatter(-1, target.long().masked_fill(~valid, n), 1.0)[..., :n]
        else:
            target = target.to(dtype)
        if check:
            hidden = scores.detach() <= MASKED
            if mask is not None:
                hidden |= ~mask
            if bool(((target > 0) & hidden).any()):
                refuse_masked()
        return target * (1 - self.label_smoothing) + self.label_smoothing * prior
