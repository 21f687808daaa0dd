"""One loss first, another one from a given step or epoch on (先用一个损失训练,再换另一个).

Source: 科学空间 6620: smooth metrics such as F1 are fine-tuned from a model trained with cross-entropy, since their
gradient is small and biased where the model does not separate yet.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from kexue._checks import check_int

__all__ = ["SwitchLoss"]


class SwitchLoss(nn.Module):
    """Uses ``first`` until the switch and ``then`` from it on.

    Steps are counted by itself, one for each call in training mode (so a batch in two micro-batches is two steps).
    Epochs are told by :meth:`set_epoch`. In evaluation mode nothing is counted and the loss in force is used. The
    counters are part of the state_dict, so that a resumed run does not start over. Under torch.compile use
    ``at_epoch``, which makes two graphs; a counter of steps makes one for every step.

    Args:
        first: Any callable loss; a Module is registered.
        then: The same.
        at_step: Calls that use ``first``; 0: none.
        at_epoch: Epochs, counted from 0, that use ``first``. One of both must be given.

    Attributes:
        steps: Calls in training mode so far.
        epoch: What :meth:`set_epoch` said last, 0 at the start.

    Raises:
        TypeError: A loss that is not callable, or a switch that is no integer.
        ValueError: Not exactly one of at_step and at_epoch, or a negative one.

    Example:
        >>> import torch
        >>> from torch.nn import functional as F
        >>> from kexue.losses import smooth_f1_loss
        >>> loss = SwitchLoss(F.binary_cross_entropy_with_logits, smooth_f1_loss, at_epoch=30)
        >>> for epoch in (29, 30):
        ...     loss.set_epoch(epoch)
        ...     print(loss.switched, loss(torch.zeros(2), torch.tensor([1.0, 0.0])))
        False tensor(0.6931)
        True tensor(0.5000)
    """

    def __init__(
        self,
        first: Callable[..., Any],
        then: Callable[..., Any],
        *,
        at_step: int | None = None,
        at_epoch: int | None = None,
    ) -> None:
        super().__init__()
        for name, loss in (("first", first), ("then", then)):
            if not callable(loss):
                raise TypeError(f"{name} must be callable; got {type(loss).__name__}")
        if (at_step is None) == (at_epoch is None):
            raise ValueError(f"exactly one of at_step and at_epoch must be given; got {at_step!r} and {at_epoch!r}")
        for name, value in (("at_step", at_step), ("at_epoch", at_epoch)):
            if value is not None:
                check_int(name, value, 0)
        self.first, self.then, self.at_step, self.at_epoch = first, then, at_step, at_epoch
        self.steps, self.epoch = 0, 0
        self._late = at_epoch == 0

    @property
    def switched(self) -> bool:
        """Whether the next call uses ``then``."""
        return self.steps >= self.at_step if self.at_step is not None else self._late

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch begins, counted from 0."""
        check_int("epoch", epoch, 0)
        self.epoch = int(epoch)
        self._late = self.at_epoch is not None and self.epoch >= self.at_epoch  # what a compiled graph depends on

    def extra_repr(self) -> str:
        """What print shows."""
        return f"at_step={self.at_step}" if self.at_step is not None else f"at_epoch={self.at_epoch}"

    def get_extra_state(self) -> Tensor:
        """The counters, for the state_dict; plain numbers otherwise, so that a step costs no synchronisation."""
        return torch.tensor([self.steps, self.epoch])

    def set_extra_state(self, state: Tensor) -> None:
        """Restore the counters."""
        self.steps, epoch = (int(v) for v in state)
        self.set_epoch(epoch)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The loss in force, called with the same arguments."""
        loss = self.then if self.switched else self.first
        if self.training and self.at_step is not None:
            self.steps += 1
        return loss(*args, **kwargs)
