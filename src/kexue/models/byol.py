"""BYOL (自举式自监督): SimSiam whose targets come from a slow copy of the encoder.

Source: 科学空间 7980 (从动力学角度看优化算法(六):为什么SimSiam不退化?); Grill et al., https://arxiv.org/abs/2006.07733.

The teacher's parameters follow those of encoder and projector: xi <- tau xi + (1 - tau) theta, after each step. tau = 0
is SimSiam, so the average is not what prevents collapse; stop-gradient and predictor are. The loss is SimSiam's; the
paper's, a sum of squared distances over both directions, is 4 + 4 times it. What differs from most ports: the teacher
never reaches an optimizer, and the statistics of its batch norms are its own, taken in its own passes.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from kexue._checks import check_real
from kexue.models.simsiam import SimSiam

__all__ = ["BYOL"]


class BYOL(SimSiam):
    """SimSiam with a teacher: targets are z of a moving average of encoder and projector.

    Call :meth:`update_teacher` after each step of the optimizer. Keep the parameters in float32 or float64: in half
    precision a step of 1 - tau is rounded away.

    Args:
        encoder: As in :class:`SimSiam`; the teacher holds a copy of it.
        dim: Width of the encoder's output.
        tau: Share of the teacher that is kept in an update, 0 to 1. The attribute may be changed during training (the
            paper raises it to 1).
        output_norm: Batch norm on z, which BYOL does not have.
        options: projector, predictor, projection_dim, hidden_dim, bottleneck and views, as in :class:`SimSiam`.

    Raises:
        TypeError: Wrong kind of argument.
        ValueError: A value out of range.

    Reference:
        https://spaces.ac.cn/archives/7980

    Example:
        >>> model = BYOL(torch.nn.Linear(8, 16), dim=16, tau=0.9)
        >>> optimizer = torch.optim.SGD(model.param_groups(lr=0.05))
        >>> model(torch.randn(32, 8), torch.randn(32, 8)).backward()
        >>> optimizer.step()
        >>> model.update_teacher()
    """

    def __init__(
        self, encoder: nn.Module, dim: int, *, tau: float = 0.996, output_norm: bool = False, **options: Any
    ) -> None:
        check_real("tau", tau, minimum=0.0)
        if tau > 1:
            raise ValueError(f"tau must be at most 1; got {tau!r}")
        if "stop_gradient" in options:
            raise TypeError("a teacher gets no gradient: BYOL has no option stop_gradient")
        super().__init__(encoder, dim, output_norm=output_norm, **options)
        self.tau = float(tau)
        self.teacher = nn.ModuleDict(
            {"encoder": copy.deepcopy(self.encoder), "projector": copy.deepcopy(self.projector)}
        ).requires_grad_(False)

    @torch.no_grad()
    def _targets(self, x1: Any, x2: Any, z: Tensor) -> Tensor:
        return self._project(self.teacher["projector"], self._encode(self.teacher["encoder"], x1, x2))

    @torch.no_grad()
    def update_teacher(self) -> None:
        """Move the teacher's parameters towards the trained ones: xi <- tau xi + (1 - tau) theta."""
        for name, teacher in self.teacher.items():
            for slow, fast in zip(teacher.parameters(), getattr(self, name).parameters(), strict=True):
                slow.lerp_(fast, 1 - self.tau)
