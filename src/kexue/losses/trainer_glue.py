"""ZLPR in transformers' Trainer: as ``compute_loss_func``, or as a mixin.

Under gradient accumulation the Trainer calls the loss once per micro-batch, adds the gradients up and divides by
nothing: the loss itself must divide by what all micro-batches hold together. The Trainer passes that as
``num_items_in_batch``, the number of labels that are not -100. For dense labels this is n times the number of rows, so
that :func:`zlpr_compute_loss` is exact, also where the last micro-batch is smaller; for label indices it is not, and
:class:`ZLPRTrainerMixin` makes the Trainer count rows. transformers itself is not imported here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kexue.losses.zlpr import ZLPRLoss

__all__ = ["ZLPRTrainerMixin", "compute_loss_func", "zlpr_compute_loss"]

UNKNOWN = -100  # what transformers takes for "no label here"


def _scores(outputs: Any) -> Tensor:
    """The logits among what a model returns without labels."""
    if isinstance(outputs, Mapping) and "logits" in outputs:
        found = outputs["logits"]
    elif hasattr(outputs, "logits"):
        found = outputs.logits
    elif isinstance(outputs, Sequence) and len(outputs):
        found = outputs[0]
    else:
        found = outputs
    if not isinstance(found, Tensor):
        raise TypeError(f"outputs must be logits, or hold them as 'logits' or first; got {type(outputs).__name__}")
    return found


def _summed(outputs: Any, labels: Any, criterion: ZLPRLoss, mask: Tensor | None = None) -> tuple[Tensor, int]:
    """Sum of the losses of the rows, and their number; dense labels of -100 are masked."""
    scores = _scores(outputs)
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels must be a tensor, the batch's 'labels'; got {type(labels).__name__}")
    if not criterion.indices and labels.dtype != torch.bool:
        known = labels != UNKNOWN
        if not bool(known.all()):
            labels = labels.masked_fill(~known, 0)
            mask = known if mask is None else mask & known
    value = criterion(scores, labels, mask)
    rows = scores.shape[:-1].numel()
    return value * rows if criterion.reduction == "mean" else value, rows


def zlpr_compute_loss(
    outputs: Any,
    labels: Tensor,
    num_items_in_batch: Tensor | int | None = None,
    *,
    criterion: ZLPRLoss | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """ZLPR for ``Trainer(compute_loss_func=zlpr_compute_loss)``, right under gradient accumulation.

    The loss is the mean over the rows of all micro-batches of a step. A :class:`ZLPRLoss` can also be given to the
    Trainer itself, ``Trainer(compute_loss_func=ZLPRLoss(label_smoothing=0.1))``: it calls this function.

    Args:
        outputs: What the model returns: logits (..., n), or a tuple, dict or ModelOutput with them.
        labels: (..., n) multi-hot or soft labels, as in :func:`zlpr_loss`; -100 marks a label that is not known, which
            is masked, and rows then count by the share of their labels that is known. With a criterion for indices
            (..., k), but not with several micro-batches per step: use :class:`ZLPRTrainerMixin`.
        num_items_in_batch: Number of labels that are not -100 in all micro-batches of the step; None: this is the
            only one.
        criterion: A :class:`ZLPRLoss` whose reduction is "mean" (or "sum", which divides by nothing).
        mask: Bool, broadcastable to the logits; True = takes part.

    Returns:
        The share of this micro-batch in the loss of the step.

    Raises:
        TypeError: Outputs without logits or labels that are no tensor.
        ValueError: A criterion with reduction "none", or label indices in several micro-batches.

    Example:
        >>> logits, labels = torch.randn(4, 3), torch.tensor([[1, 0, 0], [0, 1, 1], [0, 0, 0], [1, 1, 0]])
        >>> halves = [zlpr_compute_loss({"logits": logits[i : i + 2]}, labels[i : i + 2], 12) for i in (0, 2)]
        >>> bool((sum(halves) - zlpr_compute_loss(logits, labels)).abs() < 1e-6)
        True
    """
    criterion = _checked(criterion)
    total, rows = _summed(outputs, labels, criterion, mask)
    if criterion.reduction == "sum":
        return total
    own = labels.numel() if labels.dtype == torch.bool else (labels != UNKNOWN).sum()
    if criterion.indices:
        if num_items_in_batch is not None and int(_scalar(num_items_in_batch)) != int(own):
            raise ValueError(
                "num_items_in_batch does not tell the number of rows when labels are indices: use ZLPRTrainerMixin; "
                f"got {int(_scalar(num_items_in_batch))} items in all and {int(own)} in this micro-batch"
            )
        return total / max(rows, 1)
    items = own if num_items_in_batch is None else _scalar(num_items_in_batch)
    if not isinstance(items, Tensor):
        return total * (labels.shape[-1] / max(items, 1))
    return total * (labels.shape[-1] / items.to(total.device, total.dtype).clamp(min=1))


compute_loss_func = zlpr_compute_loss  # under the name of the Trainer's argument


def _scalar(items: Tensor | int) -> Tensor | int:
    """With DataParallel the number comes repeated for each device."""
    return items.reshape(-1)[0] if isinstance(items, Tensor) else items


def _checked(criterion: Any) -> ZLPRLoss:
    criterion = ZLPRLoss() if criterion is None else criterion
    if not isinstance(criterion, ZLPRLoss):
        raise TypeError(f"criterion must be a ZLPRLoss; got {type(criterion).__name__}")
    if criterion.reduction == "none":
        raise ValueError("a Trainer's loss is one number: criterion.reduction must be 'mean' or 'sum'; got 'none'")
    return criterion


class ZLPRTrainerMixin:
    """``class MyTrainer(ZLPRTrainerMixin, Trainer)``: trains with ZLPR on the mean over rows, whatever the labels.

    Like :func:`zlpr_compute_loss`, and also right for label indices padded to any width under gradient accumulation,
    and across devices, because ``num_items_in_batch`` becomes the number of rows.

    Args:
        *args: Arguments of ``Trainer``.
        criterion: A :class:`ZLPRLoss`, for label smoothing or label indices.
        **kwargs: Arguments of ``Trainer``, without ``compute_loss_func``.

    Raises:
        TypeError: A criterion that is no :class:`ZLPRLoss`.
        ValueError: ``compute_loss_func`` was given, or a criterion with a learned threshold that the model does not
            hold, so that nothing would train it.

    Example:
        >>> from transformers import Trainer  # doctest: +SKIP
        >>> class MultiLabelTrainer(ZLPRTrainerMixin, Trainer): ...  # doctest: +SKIP
        >>> trainer = MultiLabelTrainer(model, args, criterion=ZLPRLoss(indices=True))  # doctest: +SKIP
    """

    def __init__(self, *args: Any, criterion: ZLPRLoss | None = None, **kwargs: Any) -> None:
        if kwargs.get("compute_loss_func") is not None:
            raise ValueError("ZLPRTrainerMixin brings its own compute_loss_func; give a criterion instead")
        if not hasattr(super(), "_get_num_items_in_batch"):
            raise TypeError(
                "ZLPRTrainerMixin stands before a Trainer that counts the items of a batch, as in `class "
                f"MyTrainer(ZLPRTrainerMixin, Trainer)`; got bases {[c.__name__ for c in type(self).__mro__[1:]]}"
            )
        self.criterion = _checked(criterion)
        super().__init__(*args, **{**kwargs, "compute_loss_func": self._row_mean})
        model: Any = getattr(self, "model", None)
        known = set() if model is None else {id(p) for p in model.parameters()}
        if any(id(p) not in known for p in self.criterion.parameters()):
            raise ValueError("the criterion's learned threshold must be part of the model, which alone is trained")

    def _row_mean(self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        total, rows = _summed(outputs, labels, self.criterion)
        if self.criterion.reduction == "sum":
            return total
        return total / (max(rows, 1) if num_items_in_batch is None else _scalar(num_items_in_batch))

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        """Rows of all micro-batches; summing over devices is left to the Trainer."""
        rows = []
        for batch in batch_samples:
            if isinstance(batch.get("labels"), Tensor):
                ones = torch.ones(batch["labels"].shape[:-1].numel(), dtype=torch.long, device=batch["labels"].device)
                rows.append({"labels": ones, "shift_labels": ones})
        return super()._get_num_items_in_batch(rows, device)  # type: ignore[misc]
