"""Polyak's step (Polyak 步长): gradient descent whose rate follows from how far the loss is above its minimum.

Source: 科学空间 6261 (从动力学角度看优化算法(三):一个更整体的视角), where it comes out as the flow that lets the loss
decay like e^(-t): x' = -L g/|g|^2. One Euler step of its capped form, with g the gradient of all parameters together:

    x -= lr (L - target) min(1/|g|, cap) g/|g|

Near a stationary point that is no global minimum g -> 0 with L > target, and the uncapped step explodes; the cap bounds
its length by lr cap (L - target), which may still carry x over the barrier. g = 0 is no motion. Unlike in the article
the minimum need not be 0: it is ``target``, and a loss below it is refused, because the step would change its sign.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from kexue._checks import check_real
from kexue.training._flow_steps import check_target
from kexue.training._vectors import joint_norm, step_along_

__all__ = ["PolyakSGD"]


class PolyakSGD(Optimizer):
    """Gradient descent with Polyak's step size, capped: you give the smallest loss in the place of a learning rate.

    Works where the minimum is known, such as interpolation (target 0). The loss goes to :meth:`step`, itself or through
    a closure. Reading the loss and the gradient's norm makes a GPU wait for the host once a step. With mixed
    precision: ``scaler.unscale_(opt)``, then ``scaler.step(opt, loss=loss)`` with the unscaled loss.

    Args:
        params: Tensors or groups, as for every torch optimizer; lr, target and cap can differ by group, the norm is
            that of all gradients.
        target: Smallest value of the loss.
        cap: Largest factor in the place of 1/|g|, above 0.
        lr: Factor of the step, above 0; 1 is Polyak's.

    Raises:
        TypeError: Wrong kind of argument.
        ValueError: cap or lr not above 0, or a value that is not finite.

    Reference:
        https://spaces.ac.cn/archives/6261

    Example:
        >>> x = torch.tensor([3.0, 4.0], requires_grad=True)
        >>> opt = PolyakSGD([x], target=0.0)
        >>> loss = x.square().sum()  # Polyak's step halves the distance
        >>> loss.backward()
        >>> _ = opt.step(loss)
        >>> x.detach()
        tensor([1.5000, 2.0000])
    """

    def __init__(self, params: Iterable[Any], target: float = 0.0, cap: float = 1000.0, lr: float = 1.0) -> None:
        super().__init__(params, {"lr": lr, "target": target, "cap": cap})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its lr, target and cap are checked."""
        values = {**self.defaults, **param_group}
        check_real("target", values["target"])
        check_real("cap", values["cap"], above=0.0)
        check_real("lr", values["lr"], above=0.0)
        super().add_param_group(param_group)

    def step(  # type: ignore[override]  # the loss may come in the place of the closure
        self,
        closure: Callable[[], Tensor | float] | Tensor | float | None = None,
        *,
        loss: Tensor | float | None = None,
    ) -> Tensor | float:
        """Move the parameters once.

        Args:
            closure: Clears the gradients, computes the loss, calls ``backward`` and returns the loss; or, in its place,
                the loss itself, whose ``backward`` was called.
            loss: The loss by its name, for wrappers that pass keywords on, such as GradScaler.

        Returns:
            The loss.

        Raises:
            TypeError: Both or none of closure and loss.
            ValueError: The loss is no scalar, or lies below the target beyond rounding.
            FloatingPointError: Loss or gradient is NaN or infinite. The parameters are unchanged then.
        """
        if (closure is None) == (loss is None):
            raise TypeError(
                "step needs a closure or the loss, and not both: its length follows from the loss; "
                f"got closure={closure!r}, loss={loss!r}"
            )
        if callable(closure):
            with torch.enable_grad():
                loss = closure()
        elif closure is not None:
            loss = closure
        if isinstance(loss, Tensor):
            if loss.numel() != 1:
                raise ValueError(f"the loss must be a scalar; got shape {tuple(loss.shape)}")
            value = float(loss.detach())
            eps = torch.finfo(loss.dtype).eps if loss.is_floating_point() else 0.0
        elif isinstance(loss, (int, float)) and not isinstance(loss, bool):
            value, eps = float(loss), torch.finfo(torch.float64).eps
        else:
            raise TypeError(f"the loss must be a tensor or a number; got {type(loss).__name__}")
        if not math.isfinite(value):
            raise FloatingPointError(f"the loss is {value}")
        self._move(value, eps)
        return loss

    @torch.no_grad()
    def _move(self, value: float, eps: float) -> None:
        pairs = []
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            pairs.append((params, [p.grad.coalesce() if p.grad.is_sparse else p.grad for p in params]))
        excesses = [check_target(value, float(group["target"]), eps) for group in self.param_groups]
        norm = joint_norm([g for _, grads in pairs for g in grads])
        if not math.isfinite(norm):
            raise FloatingPointError(f"the norm of the gradient is {norm}")
        if norm == 0:
            return
        for group, excess, (params, grads) in zip(self.param_groups, excesses, pairs, strict=True):
            amount = float(group["lr"]) * excess * min(1 / norm, float(group["cap"]))
            dense = [i for i, g in enumerate(grads) if not g.is_sparse]
            step_along_([params[i] for i in dense], [grads[i] for i in dense], norm, amount)
            for p, g in zip(params, grads, strict=True):
                if g.is_sparse:
                    p.add_(g / norm, alpha=-amount)
