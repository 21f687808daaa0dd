"""Optimizers as dynamical systems (优化算法的动力学视角): the flows that their steps approximate.

Source: 科学空间 6261 (从动力学角度看优化算法(三):一个更整体的视角). With L the loss and g its gradient:

    gradient flow   x' = -g                     dL/dt = -|g|^2
    sign flow       x' = -sign(g)               dL/dt = -|g|_1   (Adam with betas 0)
    Polyak flow     x' = -(g/|g|) (L - target) min(1/|g|, cap);  while |g| > 1/cap, d(L - target)/dt = -(L - target)
    heavy ball      x'' + c x' + g = 0

Gradient descent is Euler's method for the first, with h the learning rate; the order of a method says how fast its
distance from the flow falls with h:

    euler       x -= h g                                                   order 1
    midpoint    x -= h g(x - h/2 g)                                        order 2
    rk4         four gradients, classical                                  order 4
    dopri5      Dormand-Prince with step control                           to the tolerances rtol, atol
    sign        x -= h sign(g)
    polyak      x -= h (L - target) min(1/|g|, cap) g/|g|                  order 1
    heavy_ball  v <- b v - h^2 g,          x += v;  b = 1 - c h            order 1, to x'' + c x' + g = 0
    nesterov    v <- b v - h^2 g(x + b v), x += v                          order 1, to the same
    adagrad     s += g^2,                  x -= h g / (sqrt(s) + eps)
    rmsprop     s <- decay s + (1 - decay) g^2, x -= h g / (sqrt(s) + eps)

torch.optim.SGD with momentum b and rate lr is the heavy ball with h = sqrt(lr). The last two are the optimizers with
rate h, step by step; they have no flow in this time: as h falls, Adagrad gets nowhere by a given time, since s sums
over steps. Differences from the article: L - target in the place of L, and 0/0 is no motion, in every method.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from kexue._checks import check_choice, check_int, check_real
from kexue._tensors import compute_dtype
from kexue.training._dopri5 import dopri5, dopri5_at, tolerances
from kexue.training._flow_steps import RULES, Rule, Settings, check_target
from kexue.training._objective import GradientFunction, LossFunction, Objective

__all__ = ["METHODS", "GradientFlow", "Trajectory"]

METHODS = ("euler", "midpoint", "rk4", "dopri5", "sign", "polyak", "adagrad", "rmsprop", "heavy_ball", "nesterov")
_MOST_BYTES = 2**30  # of kept points, unless save_every says otherwise
_BLOCK = 128  # steps between two looks at the losses, so that a GPU need not wait for the host after each


@dataclass(frozen=True, eq=False)
class Trajectory:
    """The path that :meth:`GradientFlow.integrate` followed.

    Args:
        times: (N,) float64, from 0 to t.
        losses: (N,) loss at these times, float64 or float32.
        path: For each of params, its values at these times, (N, *shape).
        single: params was one tensor, not a list.
        evaluations: Gradients that were computed.

    Example:
        >>> x = torch.tensor([1.0, 2.0])
        >>> path = GradientFlow(lambda: x.square().sum() / 2, x).integrate(t=1.0, h=0.5)
        >>> path.times, path.points[1], path.final
        (tensor([0.0000, 0.5000, 1.0000], dtype=torch.float64), tensor([0.5000, 1.0000]), tensor([0.2500, 0.5000]))
    """

    times: Tensor
    losses: Tensor
    path: list[Tensor]
    single: bool
    evaluations: int

    @cached_property
    def points(self) -> Any:
        """State at each of ``times``: (N, *shape) for one tensor, else a list of N lists of tensors."""
        if self.single:
            return self.path[0]
        return [list(point) for point in zip(*(p.unbind(0) for p in self.path), strict=True)]

    @cached_property
    def final(self) -> Any:
        """State at the end: a tensor or a list of tensors, as params were."""
        last = [p[-1].clone() for p in self.path]
        return last[0] if self.single else last


class Recorder:
    """Collects points and losses: into memory of a known size, or a list."""

    def __init__(self, objective: Objective, size: int | None) -> None:
        self.objective = objective
        self._size = size
        self._views = [p.detach() for p in objective.params]
        self._kept: list[list[Tensor]] = []
        self._losses: list[Tensor] = []
        self._times: list[float] = []
        if size is not None:
            self._buffers = [v.new_empty((size, *v.shape)) for v in self._views]
            self._rows = self._next_rows(size)

    def _next_rows(self, size: int) -> Iterator[tuple[Tensor, ...]]:
        for start in range(0, size, _BLOCK):
            yield from zip(*(b[start : start + _BLOCK].unbind(0) for b in self._buffers), strict=True)

    def point(self, time: float) -> None:
        """Keep where the parameters stand."""
        self._times.append(time)
        if self._size is None:
            self._kept.append([v.clone() for v in self._views])
        else:
            torch._foreach_copy_(next(self._rows), self._views)

    def loss(self, loss: Tensor) -> None:
        """Keep the loss of the last point."""
        self._losses.append(loss)

    def trajectory(self) -> Trajectory:
        if self._size is None:
            path = [torch.stack(values) for values in zip(*self._kept, strict=True)]
        else:
            path = self._buffers
        losses = torch.stack(self._losses)
        return Trajectory(
            torch.tensor(self._times, dtype=torch.float64),
            losses.to(compute_dtype(losses)),
            path,
            self.objective.single,
            self.objective.evaluations,
        )


class GradientFlow:
    """An optimizer as a path in continuous time: integrates the flow that goes down a loss.

    The parameters are moved while :meth:`integrate` runs, because the loss reads them, and put back afterwards (also
    after an error or Ctrl-C), unless ``in_place=True``. The gradients of the parameters (``.grad``) are not touched.
    Nothing can be differentiated through the path. The loss should be a function of the parameters: with dropout or
    fresh batches each call sees another one, which Euler's steps stand (that is SGD) and the other methods do not.

    Args:
        loss_fn: Function without arguments that reads the parameters and returns a scalar tensor.
        params: Tensor, or iterable of tensors such as ``model.parameters()``: leaves, float64, float32 or half
            precision (whose state is kept in float32). Parameters with ``requires_grad=False`` stay where they are; a
            tensor that the loss does not depend on has gradient 0.
        method: "euler", "midpoint", "rk4", "dopri5", "sign", "polyak", "adagrad", "rmsprop", "heavy_ball" or
            "nesterov".
        grad_fn: Gradient in closed form, in the place of autograd: a function without arguments that returns a tensor
            or one for each of params. It and ``loss_fn`` are called under ``torch.no_grad()`` then, ``loss_fn`` only
            for the points that are kept (and by "polyak").
        rtol: Relative tolerance of "dopri5"; None is 1e-8, in float32 1e-5.
        atol: Absolute tolerance of "dopri5"; None is 1e-10, in float32 1e-7.
        target: Smallest value of the loss, for "polyak"; a loss below it is an error.
        cap: Largest factor in the place of 1/|g|, for "polyak".
        friction: c of "heavy_ball" and "nesterov", with c h <= 1.
        momentum: b of "heavy_ball" and "nesterov" in [0, 1), in the place of 1 - friction h.
        decay: Decay of "rmsprop" in [0, 1).
        eps: Added to the root by "adagrad" and "rmsprop".

    Raises:
        TypeError: Wrong kind of argument; params that are not real floating tensors.
        ValueError: A value out of range; no parameter that can move; parameters that share memory.

    Reference:
        https://spaces.ac.cn/archives/6261

    Example:
        >>> x = torch.tensor([1.0, -1.0, 0.5], dtype=torch.float64)
        >>> def loss():
        ...     return (torch.tensor([1.0, 4.0, 9.0]) * x.square()).sum() / 2
        >>> GradientFlow(loss, x, method="rk4").integrate(t=1.0, h=0.01).final
        tensor([ 3.6788e-01, -1.8316e-02,  6.1705e-05], dtype=torch.float64)
        >>> torch.exp(torch.tensor([-1.0, -4.0, -9.0])) * x
        tensor([ 3.6788e-01, -1.8316e-02,  6.1705e-05], dtype=torch.float64)
    """

    def __init__(
        self,
        loss_fn: LossFunction,
        params: Tensor | Iterable[Tensor],
        method: str = "euler",
        *,
        grad_fn: GradientFunction | None = None,
        rtol: float | None = None,
        atol: float | None = None,
        target: float = 0.0,
        cap: float = 1000.0,
        friction: float = 1.0,
        momentum: float | None = None,
        decay: float = 0.9,
        eps: float = 1e-8,
    ) -> None:
        check_choice("method", method, METHODS)
        for name, value in (("rtol", rtol), ("atol", atol)):
            if value is not None:
                check_real(name, value, above=0.0)
        check_real("target", target)
        check_real("cap", cap, above=0.0)
        check_real("friction", friction, above=0.0)
        for name, value in (("momentum", momentum), ("decay", decay)):
            if value is not None:
                check_real(name, value, minimum=0.0)
                if value >= 1:
                    raise ValueError(f"{name} must be below 1; got {value!r}")
        check_real("eps", eps, minimum=0.0)
        self.method = method
        self._rtol, self._atol = rtol, atol
        self.settings = Settings(
            float(target), float(cap), float(friction), None if momentum is None else float(momentum), decay, eps
        )
        self.objective = Objective(loss_fn, params, grad_fn)

    def __repr__(self) -> str:
        count = sum(p.numel() for p in self.objective.params)
        return f"GradientFlow({count} parameters, method={self.method!r})"

    def integrate(
        self,
        t: float,
        h: float | None = None,
        *,
        save_every: int | None = None,
        in_place: bool = False,
        max_steps: int = 100_000,
    ) -> Trajectory:
        """Follow the flow from where the parameters are, for a time t.

        Args:
            t: Length of the path in time, 0 or more. It is reached exactly: the last step is shorter if t is not a
                multiple of h.
            h: Length of a step, above 0. "dopri5" chooses its steps by itself: h is then the distance of the points
                that are kept, and None keeps the ends of its steps.
            save_every: Keep every so many points (the first and the last always); 0 keeps only these two. None is 1,
                or as many as it takes to stay below 1 GiB, with a warning. Memory: kept points times parameters.
            in_place: Leave the parameters at the end of the path.
            max_steps: Steps that "dopri5" may try.

        Returns:
            A :class:`Trajectory` with ``times``, ``points``, ``losses`` and ``final``.

        Raises:
            TypeError: Wrong kind of argument, or ``loss_fn`` returns no tensor.
            ValueError: t < 0; h <= 0; c h > 1; a loss that is no scalar, has no gradient, or lies below the target.
            FloatingPointError: Loss or gradient is NaN or infinite; the message names the time.
            RuntimeError: "dopri5" needs more than ``max_steps``.

        Example:
            >>> w = torch.nn.Linear(2, 1, bias=False)
            >>> path = GradientFlow(lambda: w.weight.square().sum(), w.parameters()).integrate(t=1.0, h=0.1)
            >>> len(path.points), path.final[0].shape
            (11, torch.Size([1, 2]))
        """
        check_real("t", t, minimum=0.0)
        check_int("max_steps", max_steps, 1)
        if save_every is not None:
            check_int("save_every", save_every, 0)
        if h is not None:
            check_real("h", h, above=0.0)
        elif self.method != "dopri5":
            raise TypeError(f"h must be a number, the length of a step of method {self.method!r}; got None")
        t, h = float(t), None if h is None else float(h)
        if self.method in ("heavy_ball", "nesterov") and self.settings.momentum is None and h is not None:
            b = 1 - self.settings.friction * h
            if not 0 <= b < 1:
                raise ValueError(
                    "b = 1 - friction * h must be in [0, 1); "
                    f"got {b:g} with friction={self.settings.friction:g}, h={h:g}"
                )
        with self.objective.session(keep=in_place):
            if self.method == "dopri5":
                return self._adaptive(t, h, save_every, max_steps)
            return self._fixed(t, h or 0.0, save_every)

    def _keep_every(self, steps: int, save_every: int | None) -> int:
        """Steps from one kept point to the next; 0 becomes a step past the end."""
        if save_every == 0 or steps == 0:
            return max(steps, 1)
        if save_every is not None:
            return int(save_every)
        size = sum(p.numel() * p.element_size() for p in self.objective.params) + 100
        most = max(_MOST_BYTES // size - 1, 1)
        every = -(-steps // most)
        if every > 1:
            warnings.warn(
                f"keeping all {steps + 1} points would take {(steps + 1) * size / 2**30:.1f} GiB; every {every}th is "
                "kept; choose by save_every",
                stacklevel=4,
            )
        return every

    def _fixed(self, t: float, h: float, save_every: int | None) -> Trajectory:
        objective = self.objective
        whole, rest = split_steps(t, h)
        count = whole + (rest > 0)
        every = self._keep_every(count, save_every)
        recorder = Recorder(objective, -(-count // every) + 1)
        rule = RULES[self.method](objective, self.settings, h)
        watch = _Watch(objective, rule, h)

        def look(time: float) -> Tensor:
            loss = objective.value()
            recorder.loss(loss)
            watch.add(loss, time)
            return loss

        k = 0
        while k < count:
            keep = k % every == 0
            if keep:
                recorder.point(k * h)
                if not rule.gives_loss:
                    look(k * h)
            run = min(every - k % every, _BLOCK - k % _BLOCK, whole - k) if k < whole else 1
            losses = rule.advance(run, h if k < whole else rest)
            for i, loss in enumerate(losses):
                watch.add(loss, (k + i) * h)
            if keep and rule.gives_loss:
                recorder.loss(losses[0])
            k += run
            if k % _BLOCK == 0:
                watch.check(k * h)
        recorder.point(t)
        last = look(t)
        watch.check(t)
        if self.method == "polyak":  # the steps have looked at the points before
            check_target(float(last), self.settings.target, torch.finfo(last.dtype).eps)
        return recorder.trajectory()

    def _adaptive(self, t: float, h: float | None, save_every: int | None, max_steps: int) -> Trajectory:
        objective = self.objective
        recorder = Recorder(objective, None)

        def keep(state: Sequence[Tensor], time: float) -> None:
            objective.set(state)
            loss = objective.value()
            if not math.isfinite(float(loss)):
                raise FloatingPointError(f"the loss is {float(loss)} at t = {time:g}")
            recorder.point(time)
            recorder.loss(loss)

        def field(state: list[Tensor]) -> list[Tensor]:
            objective.set(state)
            return list(torch._foreach_neg(objective.gradient()[1]))

        start = [x.clone() for x in objective.x]
        keep(start, 0.0)
        if t == 0:
            return recorder.trajectory()
        rtol, atol = tolerances(self._rtol, self._atol, start)
        if h is not None:
            whole, rest = split_steps(t, h)
            count = whole + (rest > 0)
            every = self._keep_every(count, save_every)
            times = chain((k * h for k in range(every, count, every)), (t,))
            for time, state in dopri5_at(field, start, times, t, rtol, atol, max_steps):
                keep(state, time)
            return recorder.trajectory()
        for number, (_, end, state, _) in enumerate(dopri5(field, start, t, rtol, atol, max_steps), 1):
            if end == t or (save_every != 0 and number % (save_every or 1) == 0):
                keep(state, end)
        return recorder.trajectory()


class _Watch:
    """Raises when a loss or gradient is not finite; looks at the values of many steps at once."""

    def __init__(self, objective: Objective, rule: Rule, h: float) -> None:
        self.objective, self._rule, self._h = objective, rule, h
        self._losses: list[Tensor] = []
        self._times: list[float] = []

    def add(self, loss: Tensor, time: float) -> None:
        """A loss that was seen."""
        self._losses.append(loss)
        self._times.append(time)

    def check(self, now: float) -> None:
        """Look at what was seen since the last check, and at the last gradient and the state."""
        hint = f"; steps of h = {self._h:g} may be too long (Euler's method is stable below 2 / the largest curvature)"
        if self._losses:
            losses = torch.stack(self._losses)
            bad = ~losses.isfinite()
            if bad.any():
                i = int(bad.nonzero()[0, 0])
                raise FloatingPointError(f"the loss is {float(losses[i])} at t = {self._times[i]:g}{hint}")
        self._losses, self._times = [], []
        for name, tensors in (("gradient", self._rule.gradients), ("state", self.objective.x)):
            if not all(_finite(x) for x in tensors):
                raise FloatingPointError(f"the {name} is not finite at t = {now:g} or shortly before{hint}")


def _finite(x: Tensor) -> bool:
    """Whether all entries are finite, in one pass without temporaries."""
    return not x.numel() or all(math.isfinite(float(end)) for end in x.aminmax())


def split_steps(t: float, h: float) -> tuple[int, float]:
    """Number of whole steps of length h in t, and the rest; a rest that is only rounding counts as none."""
    ratio = t / h
    if not math.isfinite(ratio):
        raise ValueError(f"t / h must be finite; got t={t!r}, h={h!r}")
    whole = round(ratio)
    if whole and abs(ratio - whole) <= 1e-12 * ratio:
        return whole, 0.0
    whole = math.floor(ratio)
    return whole, t - whole * h
