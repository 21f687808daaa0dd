"""One step of each fixed-step method; the formulas stand in ``flow.py``.

A rule is called with the length of the step, moves the objective's state, and returns the loss that it came across
(None where a closed form gives the gradient). ``gives_loss`` says whether that is the loss before the step, so that the
driver need not evaluate it again. Gradients are never written to: they may be the memory of something else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kexue.training._objective import Objective
from kexue.training._vectors import joint_norm, step_along_

__all__ = ["RULES", "Rule", "Settings", "check_target"]


@dataclass(frozen=True)
class Settings:
    """Constants of the methods, checked by ``GradientFlow``."""

    target: float = 0.0
    cap: float = 1000.0
    friction: float = 1.0
    momentum: float | None = None
    decay: float = 0.9
    eps: float = 1e-8


def check_target(loss: float, target: float, eps: float) -> float:
    """The loss above the target, not below 0; raise if it is negative beyond rounding."""
    excess = loss - target
    if excess < -16 * eps * max(1.0, abs(target)):
        raise ValueError(f"target must be at most the smallest value of the loss; got target={target:g}, loss {loss:g}")
    return max(excess, 0.0)


class Rule:
    """A method at work on an objective, in steps of length h (the last may be shorter)."""

    def __init__(self, objective: Objective, settings: Settings, h: float) -> None:
        self.objective, self.settings, self.h = objective, settings, h
        self.gradients: list[Tensor] = []  # the last ones, for the check that they are finite

    @property
    def gives_loss(self) -> bool:
        """Whether ``step`` returns the loss before the step."""
        return self.objective.grad_fn is None

    def gradient(self) -> Tensor | None:
        """Evaluate; the gradient is in ``gradients``."""
        self.gradients = []  # their memory serves the new ones
        loss, self.gradients = self.objective.gradient()
        return loss

    def step(self, h: float) -> Tensor | None:
        """Move by a step of length h."""
        raise NotImplementedError

    def advance(self, count: int, h: float) -> list[Tensor]:
        """Move by ``count`` steps; the losses that ``step`` returned."""
        losses = [self.step(h) for _ in range(count)]
        return [loss for loss in losses if loss is not None]


class Euler(Rule):
    """x -= h g."""

    def step(self, h: float) -> Tensor | None:
        loss = self.gradient()
        torch._foreach_add_(self.objective.x, self.gradients, alpha=-h)
        self.objective.publish()
        return loss

    def advance(self, count: int, h: float) -> list[Tensor]:
        objective = self.objective
        if objective.grad_fn is None or len(objective.x) > 1 or objective.low:
            return super().advance(count, h)
        (x,) = objective.x  # one tensor and a closed form: little but the two calls, which decide for a small one
        gradient, shape, dtype = objective.grad_fn, x.shape, x.dtype
        for _ in range(count):
            g: Any = gradient()
            if g.__class__ is not Tensor or g.shape != shape or g.dtype is not dtype or g.is_sparse:
                (g,) = objective.as_gradient(g)
            x.sub_(g, alpha=h)
        self.gradients = [g]
        objective.evaluations += count
        return []


class Sign(Rule):
    """x -= h sign(g)."""

    def step(self, h: float) -> Tensor | None:
        loss = self.gradient()
        torch._foreach_add_(self.objective.x, torch._foreach_sign(self.gradients), alpha=-h)
        self.objective.publish()
        return loss


class Midpoint(Rule):
    """x -= h g(x - h/2 g)."""

    def step(self, h: float) -> Tensor | None:
        objective = self.objective
        start = [x.clone() for x in objective.x]
        loss = self.gradient()
        objective.set(torch._foreach_add(start, self.gradients, alpha=-0.5 * h))
        self.gradient()
        objective.set(torch._foreach_add(start, self.gradients, alpha=-h))
        return loss


class RungeKutta4(Rule):
    """The classical method with four gradients."""

    def step(self, h: float) -> Tensor | None:
        objective = self.objective
        start = [x.clone() for x in objective.x]
        loss = self.gradient()
        total = torch._foreach_add(start, self.gradients, alpha=-h / 6)
        for reach, weight in ((h / 2, h / 3), (h / 2, h / 3), (h, h / 6)):
            objective.set(torch._foreach_add(start, self.gradients, alpha=-reach))
            self.gradient()
            torch._foreach_add_(total, self.gradients, alpha=-weight)
        objective.set(total)
        return loss


class Polyak(Rule):
    """x -= h (L - target) min(1/|g|, cap) g/|g|."""

    gives_loss = True

    def step(self, h: float) -> Tensor | None:
        found = self.gradient()
        loss = self.objective.value() if found is None else found
        excess = check_target(float(loss), self.settings.target, torch.finfo(loss.dtype).eps)
        norm = joint_norm(self.gradients)
        if norm > 0:
            amount = h * excess * min(1 / norm, self.settings.cap)
            step_along_(self.objective.x, self.gradients, norm, amount)
            self.objective.publish()
        return loss


class HeavyBall(Rule):
    """v <- b v - h^2 g, x <- x + v, with b = 1 - c h."""

    def __init__(self, objective: Objective, settings: Settings, h: float) -> None:
        super().__init__(objective, settings, h)
        self._v = [torch.zeros_like(x) for x in objective.x]
        momentum = self.settings.momentum
        self._friction = self.settings.friction if momentum is None else (1 - momentum) / self.h
        self._b = 1 - self._friction * self.h if momentum is None else momentum

    def _velocity(self, h: float) -> float:
        """Value of b for a step of length h; v is the distance of one step, which a shorter one shortens."""
        if h == self.h:
            return self._b
        torch._foreach_mul_(self._v, h / self.h)
        return 1 - self._friction * h

    def step(self, h: float) -> Tensor | None:
        b = self._velocity(h)
        loss = self.gradient()
        torch._foreach_mul_(self._v, b)
        torch._foreach_add_(self._v, self.gradients, alpha=-h * h)
        torch._foreach_add_(self.objective.x, self._v)
        self.objective.publish()
        return loss


class Nesterov(HeavyBall):
    """As the heavy ball, with g at x + b v."""

    gives_loss = False  # but the one at x + b v

    def step(self, h: float) -> Tensor | None:
        objective = self.objective
        b = self._velocity(h)
        start = [x.clone() for x in objective.x]
        torch._foreach_mul_(self._v, b)
        objective.set(torch._foreach_add(start, self._v))
        loss = self.gradient()
        torch._foreach_add_(self._v, self.gradients, alpha=-h * h)
        objective.set(torch._foreach_add(start, self._v))
        return loss


class Adagrad(Rule):
    """s += g^2, x -= h g / (sqrt(s) + eps)."""

    def __init__(self, objective: Objective, settings: Settings, h: float) -> None:
        super().__init__(objective, settings, h)
        self._s = [torch.zeros_like(x) for x in objective.x]

    def _accumulate(self) -> None:
        torch._foreach_addcmul_(self._s, self.gradients, self.gradients)

    def step(self, h: float) -> Tensor | None:
        objective = self.objective
        loss = self.gradient()
        self._accumulate()
        roots = torch._foreach_sqrt(self._s)
        torch._foreach_add_(roots, self.settings.eps)
        for root in roots:
            root.masked_fill_(root == 0, torch.inf)  # 0/0 is no motion
        torch._foreach_addcdiv_(objective.x, self.gradients, roots, value=-h)
        objective.publish()
        return loss


class RMSprop(Adagrad):
    """s <- decay s + (1 - decay) g^2, x -= h g / (sqrt(s) + eps)."""

    def _accumulate(self) -> None:
        decay = self.settings.decay
        torch._foreach_mul_(self._s, decay)
        torch._foreach_addcmul_(self._s, self.gradients, self.gradients, value=1 - decay)


RULES: dict[str, type[Rule]] = {
    "euler": Euler,
    "midpoint": Midpoint,
    "rk4": RungeKutta4,
    "sign": Sign,
    "polyak": Polyak,
    "adagrad": Adagrad,
    "rmsprop": RMSprop,
    "heavy_ball": HeavyBall,
    "nesterov": Nesterov,
}
