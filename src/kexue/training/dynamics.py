"""Measuring how near an optimizer is to its flow (优化器与其连续极限的比较); the flows stand in ``flow.py``.

An optimizer with learning rates lr_1, lr_2, ... is at the time lr_1 + ... + lr_k after k steps; with a schedule that is
not lr times k. Its distance from the flow at that time is the error of a numerical method: it falls like lr^p, with p
the order. Source: 科学空间 6261; that the heavy ball has the time sqrt(lr) per step is derived in ``flow.py``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from kexue._checks import check_choice, check_int, check_real
from kexue._tensors import check_float
from kexue.training._dopri5 import Field, State, dopri5_at, tolerances
from kexue.training._flow_steps import RULES, Settings, check_target
from kexue.training._objective import LossFunction, Objective
from kexue.training._vectors import joint_norm
from kexue.training.flow import GradientFlow, Recorder, Trajectory

__all__ = ["Comparison", "OrderReport", "compare_with_flow", "measure_order", "quadratic_flow"]

_LIMITS = {  # fixed-step method -> its flow; the others have none that is smooth
    "euler": "gradient",
    "midpoint": "gradient",
    "rk4": "gradient",
    "polyak": "polyak",
    "heavy_ball": "heavy_ball",
    "nesterov": "heavy_ball",
}
FLOWS = ("gradient", "heavy_ball", "polyak", "sign")
_SUBSTEPS = 64  # Euler steps of the sign flow in one step of the optimizer: no method of high order can cross its jumps


def quadratic_flow(
    a: Tensor, x: Tensor, t: float | Tensor, b: Tensor | None = None, friction: float | None = None
) -> Tensor:
    """The exact flow down x^T A x / 2 - b^T x, in the eigenbasis of A: no steps, no error but rounding.

    Args:
        a: A, (D, D), symmetric; it need not be positive.
        x: (D,) start.
        t: Time, or (N,) times.
        b: (D,), None is 0.
        friction: c of the heavy ball x'' + c x' + A x = b, started at rest; None is the gradient flow x' = b - A x.

    Returns:
        (D,) or (N, D) state at the times.

    Raises:
        TypeError: Tensors that are not floating.
        ValueError: Shapes that do not fit, A not symmetric, friction < 0.

    Example:
        >>> quadratic_flow(torch.diag(torch.tensor([1.0, 4.0])), torch.tensor([1.0, -1.0]), 0.5)
        tensor([ 0.6065, -0.1353])
    """
    check_float("a", a, 2)
    check_float("x", x, 1)
    count = len(x)
    if a.shape != (count, count):
        raise ValueError(f"a must have shape ({count}, {count}), as x has {count} entries; got {tuple(a.shape)}")
    if not torch.allclose(a, a.mT, rtol=1e-5, atol=1e-6 * float(a.detach().abs().max()) if count else 0.0):
        raise ValueError("a must be symmetric; got one that differs from its transpose")
    if b is not None:
        check_float("b", b, 1)
        if b.shape != x.shape:
            raise ValueError(f"b must have shape {tuple(x.shape)}; got {tuple(b.shape)}")
    if friction is not None:
        check_real("friction", friction, minimum=0.0)
    times = torch.as_tensor(t, dtype=x.dtype, device=x.device)
    if times.dim() > 1:
        raise ValueError(f"t must be a number or (N,); got shape {tuple(times.shape)}")
    values, vectors = torch.linalg.eigh(a)
    start = vectors.mT @ x
    push = torch.zeros_like(start) if b is None else vectors.mT @ b
    if friction is None:
        decay = -values * times[..., None]
        small = values.abs() < torch.finfo(x.dtype).tiny
        reach = torch.where(small, times[..., None], -torch.expm1(decay) / values.masked_fill(small, 1))
        modes = decay.exp() * start + reach * push
    else:  # each mode is (x, x', 1)' = M (x, x', 1); the exponential needs no case for critical damping or zero
        m = x.new_zeros(count, 3, 3)
        m[:, 0, 1], m[:, 1, 0], m[:, 1, 1], m[:, 1, 2] = 1, -values, -float(friction), push
        motion = torch.linalg.matrix_exp(m * times[..., None, None, None])
        modes = motion[..., 0, 0] * start + motion[..., 0, 2]
    return modes @ vectors.mT


def _limit(objective: Objective, flow: str, settings: Settings) -> Field:
    """The right side of a smooth flow; for the heavy ball on (x, velocity)."""

    def gradient(state: State) -> State:
        objective.set(state)
        return list(torch._foreach_neg(objective.gradient()[1]))

    def heavy_ball(state: State) -> State:
        half = len(state) // 2
        force = gradient(state[:half])
        speed = state[half:]
        return [v.clone() for v in speed] + list(torch._foreach_add(force, speed, alpha=-settings.friction))

    def polyak(state: State) -> State:
        objective.set(state)
        loss, grads = objective.gradient()
        loss = objective.value() if loss is None else loss
        excess = check_target(float(loss), settings.target, torch.finfo(loss.dtype).eps)
        norm = joint_norm(grads)
        if norm == 0:
            return [torch.zeros_like(g) for g in grads]
        return [(g / norm) * (-excess * min(1 / norm, settings.cap)) for g in grads]

    return {"gradient": gradient, "heavy_ball": heavy_ball, "polyak": polyak}[flow]


def _states(
    objective: Objective, flow: str, settings: Settings, times: Sequence[float], rtol: float | None, atol: float | None
) -> Iterable[State]:
    """States of a smooth flow at times."""
    start = [x.clone() for x in objective.x]
    count = len(start)
    whole = start + [torch.zeros_like(x) for x in start] if flow == "heavy_ball" else start
    rtol, atol = tolerances(rtol, atol, start)
    field = _limit(objective, flow, settings)
    for _, state in dopri5_at(field, whole, times, times[-1], rtol, atol, 100_000):
        yield state[:count]


@dataclass(frozen=True)
class OrderReport:
    """What :func:`measure_order` measured.

    Args:
        hs: Lengths of the steps.
        errors: Distance from the flow at time t, for each h.
        orders: log(error ratio) / log(h ratio) of consecutive lengths.

    Example:
        >>> OrderReport(hs=[0.2, 0.1], errors=[0.04, 0.01], orders=[2.0]).order
        2.0
    """

    hs: list[float]
    errors: list[float]
    orders: list[float]

    @property
    def order(self) -> float:
        """That of the two smallest steps, where the limit is nearest."""
        return self.orders[-1]


def measure_order(
    method: str,
    loss_fn: LossFunction,
    params: Tensor | Iterable[Tensor],
    t: float,
    hs: Sequence[float],
    *,
    exact: Tensor | Sequence[Tensor] | None = None,
    **settings: Any,
) -> OrderReport:
    """Order of a method on your loss: how fast its distance from the flow falls with the length of the step.

    Use float64: in float32 rounding hides the error of small steps.

    Args:
        method: "euler", "midpoint", "rk4", "polyak", "heavy_ball" or "nesterov"; the others have no smooth flow.
        loss_fn: As in :class:`GradientFlow`.
        params: As in :class:`GradientFlow`; they are put back.
        t: Time at which the distance is taken, above 0.
        hs: At least two lengths of steps, falling.
        exact: State of the flow at t; None computes it by "dopri5" to 1e-12.
        **settings: Of the method, as in :class:`GradientFlow`.

    Returns:
        An :class:`OrderReport`.

    Raises:
        TypeError: Wrong kind of argument.
        ValueError: A method without a smooth flow, t <= 0, less than two lengths, or lengths that do not fall.

    Example:
        >>> x = torch.tensor([1.0, -1.0], dtype=torch.float64)
        >>> report = measure_order("midpoint", lambda: (x**2).sum() + (x**4).sum(), x, 1.0, [0.02, 0.01, 0.005])
        >>> round(report.order, 1)
        2.0
    """
    check_choice("method", method, tuple(_LIMITS))
    check_real("t", t, above=0.0)
    steps = [float(h) for h in hs]
    if len(steps) < 2 or any(not a > b > 0 for a, b in pairwise(steps)):
        raise ValueError(f"hs must hold at least two lengths above 0 that fall; got {hs}")
    if not isinstance(params, Tensor):
        params = list(params)
    if settings.get("momentum") is not None:
        raise ValueError("momentum fixes b, so that the limit changes with h; give friction; got momentum too")
    flow = GradientFlow(loss_fn, params, method, **settings)
    objective = flow.objective
    if exact is None:
        with objective.session(keep=False):
            (target,) = _states(objective, _LIMITS[method], flow.settings, [float(t)], 1e-12, 1e-14)
    else:
        target = objective.select([exact] if isinstance(exact, Tensor) else list(exact))
    errors = []
    for h in steps:
        final = flow.integrate(t, h, save_every=0).final
        reached = objective.select([final] if isinstance(final, Tensor) else final)
        errors.append(joint_norm([a.to(b.dtype) - b for a, b in zip(reached, target, strict=True)]))
    orders = [
        math.log(a / b) / math.log(g / h) if a > 0 and b > 0 else math.nan
        for a, b, g, h in zip(errors, errors[1:], steps, steps[1:], strict=False)
    ]
    return OrderReport(steps, errors, orders)


@dataclass(frozen=True, eq=False)
class Comparison:
    """What :func:`compare_with_flow` measured.

    Args:
        optimizer: Path of the optimizer; its times are the sums of the learning rates.
        flow: Path of the flow, at the same times.
        distance: (steps + 1,) Euclidean distance of the two.

    Example:
        >>> x = torch.tensor([1.0], requires_grad=True)
        >>> found = compare_with_flow(lambda p: torch.optim.SGD(p, lr=0.5), lambda: x.square().sum() / 2, x, steps=2)
        >>> found.optimizer.points[:, 0], found.flow.points[:, 0]
        (tensor([1.0000, 0.5000, 0.2500]), tensor([1.0000, 0.6065, 0.3679]))
    """

    optimizer: Trajectory
    flow: Trajectory
    distance: Tensor

    @property
    def times(self) -> Tensor:
        """(steps + 1,) sums of the learning rates."""
        return self.optimizer.times


def compare_with_flow(
    make_optimizer: Callable[[list[Tensor]], Optimizer],
    loss_fn: LossFunction,
    params: Tensor | Iterable[Tensor],
    steps: int,
    *,
    flow: str = "gradient",
    make_scheduler: Callable[[Optimizer], Any] | None = None,
    rtol: float | None = None,
    atol: float | None = None,
) -> Comparison:
    """Distance of a torch optimizer from its continuous limit, step by step.

    Runs the optimizer, then the flow from the same start to the same times; parameters and their ``.grad`` are put
    back. The loss should be the same function at every step (no dropout, no changing batches).

    Args:
        make_optimizer: Makes the optimizer of the parameters, for example ``lambda p: torch.optim.SGD(p, lr=0.1)``.
        loss_fn: As in :class:`GradientFlow`.
        params: As in :class:`GradientFlow`.
        steps: Steps of the optimizer, at least 1.
        flow: "gradient" x' = -g; "heavy_ball" x'' + c x' + g = 0 with the time sqrt(lr) per step and c =
            (1 - momentum) / sqrt(lr), for SGD with momentum and a constant rate; "polyak", for :class:`PolyakSGD`;
            "sign" x' = -sign(g), for Adam with small betas (in 64 Euler steps for each of the optimizer).
        make_scheduler: Makes a schedule of the learning rate, which is stepped after each step of the optimizer.
        rtol: Relative tolerance of the flow, as in :class:`GradientFlow`.
        atol: Absolute tolerance of the flow.

    Returns:
        A :class:`Comparison`.

    Raises:
        TypeError: Wrong kind of argument.
        ValueError: steps < 1; groups with different rates; a heavy ball without momentum or with a changing rate.
        FloatingPointError: The optimizer diverges.

    Example:
        >>> w = torch.tensor([1.0, -1.0], dtype=torch.float64, requires_grad=True)
        >>> def distance(lr):
        ...     loss = lambda: (w.cos() + w.square()).sum()
        ...     return compare_with_flow(lambda p: torch.optim.SGD(p, lr), loss, w, round(1 / lr)).distance[-1]
        >>> round(float(distance(0.01) / distance(0.005)), 1)  # order 1
        2.0
    """
    check_choice("flow", flow, FLOWS)
    check_int("steps", steps, 1)
    objective = Objective(loss_fn, params)
    with objective.session(keep=False):
        start = [x.clone() for x in objective.x]
        path, settings = _run_optimizer(make_optimizer, make_scheduler, objective, steps, flow)
        objective.set(start)
        objective.evaluations = 0
        recorder = Recorder(objective, steps + 1)
        times = path.times.tolist()
        states = (
            _sign_states(objective, times, settings)
            if flow == "sign"
            else _states(objective, flow, settings, times, rtol, atol)
        )
        for time, state in zip(times, states, strict=True):
            objective.set(state)
            recorder.point(time)
            recorder.loss(objective.value())
        reference = recorder.trajectory()
    gaps = [
        (a.double() - b.double()).reshape(steps + 1, a[0].numel()).square().sum(1).cpu()
        for a, b in zip(path.path, reference.path, strict=True)
    ]
    return Comparison(path, reference, torch.stack(gaps).sum(0).sqrt())


def _sign_states(objective: Objective, times: Sequence[float], settings: Settings) -> Iterable[State]:
    yield objective.x
    for a, b in pairwise(times):
        rule = RULES["sign"](objective, settings, (b - a) / _SUBSTEPS)
        for _ in range(_SUBSTEPS):
            rule.step(rule.h)
        yield objective.x


def _run_optimizer(
    make_optimizer: Callable[[list[Tensor]], Optimizer],
    make_scheduler: Callable[[Optimizer], Any] | None,
    objective: Objective,
    steps: int,
    flow: str,
) -> tuple[Trajectory, Settings]:
    """Path of the optimizer, and the constants of the flow that its groups imply."""
    grads = [p.grad for p in objective.free]
    try:
        for p in objective.free:
            p.grad = None
        optimizer = make_optimizer(list(objective.free))
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"make_optimizer must return a torch Optimizer; got {type(optimizer).__name__}")
        scheduler = None if make_scheduler is None else make_scheduler(optimizer)
        settings, rate = _constants(optimizer, flow), _rate(optimizer)
        recorder = Recorder(objective, steps + 1)
        time = 0.0

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = objective.loss_fn()
            loss.backward()
            return loss

        for k in range(steps):
            recorder.point(time)
            recorder.loss(_finite(objective.value(), k))
            lr = _rate(optimizer)
            if flow == "heavy_ball" and lr != rate:
                raise ValueError(f"the heavy ball needs a constant rate; got {rate:g}, then {lr:g} in step {k + 1}")
            time += math.sqrt(lr) if flow == "heavy_ball" else lr
            optimizer.step(closure)  # type: ignore[arg-type]  # the loss is a tensor, as torch's own take it
            if scheduler is not None:
                scheduler.step()
        recorder.point(time)
        recorder.loss(_finite(objective.value(), steps))
        return recorder.trajectory(), settings
    finally:
        for p, grad in zip(objective.free, grads, strict=True):
            p.grad = grad


def _finite(loss: Tensor, step: int) -> Tensor:
    if not bool(loss.isfinite()):
        raise FloatingPointError(f"the loss is {float(loss)} after {step} steps of the optimizer")
    return loss


def _rate(optimizer: Optimizer) -> float:
    rates = {float(group["lr"]) for group in optimizer.param_groups}
    if len(rates) > 1:
        raise ValueError(f"all groups must have one rate: the flow has one time; got {sorted(rates)}")
    return rates.pop()


def _constants(optimizer: Optimizer, flow: str) -> Settings:
    group = optimizer.param_groups[0]
    if flow == "heavy_ball":
        b = float(group.get("momentum", 0.0))
        if not 0 < b < 1:
            raise ValueError(f"flow 'heavy_ball' needs an optimizer with a momentum in (0, 1); got {b:g}")
        return Settings(friction=(1 - b) / math.sqrt(_rate(optimizer)))
    if flow == "polyak":
        return Settings(target=float(group.get("target", 0.0)), cap=float(group.get("cap", 1000.0)))
    return Settings()
