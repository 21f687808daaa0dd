"""Integrated gradients (积分梯度): shares of the inputs in an output that add up, with the error known.

Source: 科学空间 7533 (积分梯度:一种新颖的神经网络可视化方法); Sundararajan, Taly, Yan, "Axiomatic Attribution for Deep
Networks", ICML 2017.

A gradient says how sensitive an output is to an input, not how much of it the input made. Along any path g from x to a
baseline x', g(0) = x and g(1) = x', the change of the output is a sum over the inputs without any approximation:

    F(x) - F(x') = sum_i A_i,   A_i = -int_0^1 [grad F(g(a))]_i g_i'(a) da
    straight line g(a) = (1 - a) x + a x':   A_i = (x - x')_i int_0^1 [grad F(g(a))]_i da

The article takes |A_i| (``absolute=True``) and the mean over a = k/n, k = 1 .. n (``method="right"``).

What differs here: the integral is the difficulty. The output of a trained classifier is two plateaus with a step of
less than a hundredth of the path between them, which a fixed number of nodes hits or misses. The sum above holds on
every part of the path too, so that the error of each part is known for one more value of F; an adaptive rule
(``_adaptive.py``) spends its gradients where F moves and says whether it converged.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kexue._checks import check_choice, check_int, check_real
from kexue._tensors import check_float, compute_dtype
from kexue.explain._adaptive import integrate
from kexue.explain._baselines import baseline_tensor, curve
from kexue.explain._evaluations import Along, modules_of, quiet, straight
from kexue.explain._quadrature import FIXED, fixed_rule

__all__ = ["IntegratedGradients", "integrated_gradients"]

_BLOCK = 128
_NODES = 20  # of the article
_AIM = 0.1  # a gap of tol itself is aimed at, up to changes of 10
_LOOSER = 30.0  # the attributions one by one need fewer digits than their sum


@dataclass(frozen=True)
class IntegratedGradients:
    """What :func:`integrated_gradients` returns; B examples.

    Attributes:
        attributions: Shaped like x; float32, or float64 for float64. They add up to ``change``, up to ``gap``.
        change: (B,) F(x) - F(baseline), float64.
        value: (B,) F(x), float64.
        gap: (B,) size of the difference between the sum of the attributions and ``change``, float64.
        error: (B,) estimate of the L1 norm of the error of the attributions, float64; NaN for the fixed rules other
            than "gauss", which have none.
        converged: (B,) bool: the gaps of the parts of the path together are at most ``tol * max(1, |change|)``, and
            ``error`` is at most ``30 * tol`` times the larger of 1, ``|change|`` and their L1 norm.
        target: (B,) column of the output; None for an output with one number.
        n_grad: Evaluations of f with a gradient, of all examples together.
        n_forward: Evaluations without.
        at_baseline: (B,) bool: F hardly changes along the path except in its last tenth, next to the baseline, or jumps
            there, as for a model that does not see the scale of its input.
    """

    attributions: Tensor
    change: Tensor
    value: Tensor
    gap: Tensor
    error: Tensor
    converged: Tensor
    target: Tensor | None
    n_grad: int
    n_forward: int
    at_baseline: Tensor


@torch.inference_mode(False)
def integrated_gradients(
    f: Callable[..., Tensor],
    x: Tensor,
    baseline: Any = 0.0,
    target: Any = None,
    method: str = "adaptive",
    tol: float = 1e-3,
    max_evals: int = 200,
    *,
    n: int | None = None,
    args: Sequence[Any] = (),
    against: Any = None,
    path: Callable[[Tensor], Tensor] | None = None,
    absolute: bool = False,
    block: int = _BLOCK,
) -> IntegratedGradients:
    """Share an output of f out among the inputs: the shares add up to its change from a baseline to x.

    f is run in evaluation mode with frozen parameters; modules that it is, is bound to or closes over are found, and
    left as they were.

    Args:
        f: ``f(points, *args)`` with points (N, ...) -> (N,) or (N, C). A row of the output must depend on the same row
            of its inputs only.
        x: (B, ...) floating: embeddings instead of ids. Half precision is summed up in float32.
        baseline: What counts as no input: a number, a tensor shaped like x or like a row of it, K of them as
            (K, B, ...) or (K, 1, ...), whose attributions are averaged (expected gradients), or a name. "zero"; "mean",
            the mean of the embeddings of the model in f, or without one of the rows of x; "pad" and "mask", the
            embedding of that token, which the configuration of the model in f must name.
        target: Column of the output: an int, B of them, or None: the largest one at x, which is kept along the path.
        method: "adaptive", or a fixed rule on n nodes of the way from x (0) to the baseline (1): "gauss", "left",
            "right" (that of the article), "midpoint", "trapezoid". Some count from the baseline: their "left" is this
            "right".
        tol: Largest gap, relative to max(1, \\|change\\|); 30 times as much is allowed for the estimated error of the
            attributions one by one.
        max_evals: Most evaluations of f for an example (and baseline), with and without gradient; at least 3.
        n: Nodes of a fixed rule; None: 20.
        args: Further inputs of f with one row for each example, such as masks; they stay the same along the path.
        against: Column whose output is subtracted: why ``target`` rather than this one.
        path: Another path than the straight one, a differentiable function of a number in [0, 1] that returns a tensor
            like x: x at 0 and the baseline at 1, or the other way round.
        absolute: Return the sizes of the attributions, the measure of the article.
        block: Points that f gets at a time; memory grows with it.

    Returns:
        An :class:`IntegratedGradients`.

    Raises:
        TypeError: Wrong kind of argument; integers for x.
        ValueError: Shapes that do not fit, NaN, a target out of range, an output that is not one number or C numbers
            for each example, a gradient that is not finite, or an output that changes but has no gradient.

    Reference:
        https://spaces.ac.cn/archives/7533

    Example:
        >>> x = torch.tensor([[1.0, 2.0, 3.0]])
        >>> found = integrated_gradients(lambda v: v[:, 0] * v[:, 1] + 0.0 * v[:, 2], x)
        >>> found.attributions
        tensor([[1., 1., 0.]])
        >>> bool(found.converged), float(found.change)
        (True, 2.0)
    """
    found = attribute(
        f, x, baseline, target, method, tol, max_evals, n=n, args=args, against=against, path=path, absolute=absolute,
        block=block,
    )  # fmt: skip
    if bool(found.at_baseline.any()):
        warnings.warn(
            f"{int(found.at_baseline.sum())} of {len(x)} examples: the output jumps next to the baseline, or changes "
            "there only, as in a model that does not see the scale of its input; the attributions describe that "
            "jump. Take another baseline, such as 'pad', 'mask' or 'mean'",
            stacklevel=3,
        )
    return found


def attribute(
    f: Any, x: Any, baseline: Any, target: Any, method: str, tol: float, max_evals: int, *, n: int | None = None,
    args: Any = (), against: Any = None, path: Any = None, absolute: bool = False, block: int = _BLOCK,
) -> IntegratedGradients:  # fmt: skip
    """:func:`integrated_gradients` without its warning."""
    if not callable(f):
        raise TypeError(f"f must be callable; got {type(f).__name__}")
    _check_x(x)
    check_choice("method", method, ("adaptive", *FIXED))
    check_real("tol", tol, above=0.0)
    check_int("max_evals", max_evals, 3)
    check_int("block", block, 1)
    if n is not None:
        check_int("n", n, 2 if method == "trapezoid" else 1)
        if method == "adaptive":
            raise ValueError(f"n is the number of nodes of a fixed rule; method='adaptive' chooses its own, got n={n}")
    if not isinstance(absolute, bool):
        raise TypeError(f"absolute must be a bool; got {absolute!r}")
    given = _check_args(args, x)
    modules = modules_of(f)
    x = x.detach().clone()
    with quiet(modules):
        if path is not None:
            if not callable(path):
                raise TypeError(f"path must be callable; got {type(path).__name__}")
            start, point = curve(path, x, baseline)
        else:
            start = baseline_tensor(baseline, x, modules)
            if start.dim() > x.dim():
                shared = {
                    "method": method, "tol": tol, "max_evals": max_evals, "n": n, "args": given, "against": against,
                    "block": block,
                }  # fmt: skip
                return _averaged(f, x, start, target, absolute, shared)
            point = straight(x, start)
        along = Along(f, x, point, given, int(block))
        if not len(x):
            return _nothing(x)
        at_ends = along.first([0.0, 1.0])
        if not bool(torch.isfinite(at_ends).all()):
            bad = (~torch.isfinite(at_ends)).flatten(2).any(-1) if at_ends.dim() > 2 else ~torch.isfinite(at_ends)
            end, row = bad.nonzero()[0].tolist()
            raise ValueError(
                f"f must be finite; got {at_ends[end, row].flatten().tolist()} at "
                f"{'the baseline of ' * end}example {row}"
            )
        along.picked = _columns("target", target, at_ends[0])
        along.against = _columns("against", against, at_ends[0]) if against is not None else None
        value, before = (along.of(out).double().cpu() for out in at_ends)
        change = value - before
        tolerance = tol * change.abs().clamp(min=1.0)
        aim = tol * (_AIM * change.abs()).clamp(min=1.0)
        profiles: list[dict[float, float]]
        if method == "adaptive":
            made = integrate(along, value.tolist(), before.tolist(), aim.tolist(), _LOOSER * tol, int(max_evals))
            total, gaps, error, size, profiles = made.total, made.gap, made.error, made.size, made.profiles
        else:
            total, error, profiles = _fixed(along, method, n or _NODES, value, before)
            size = _flat(total).abs().sum(1).double().cpu()
            gaps = torch.zeros_like(size)
    summed = _flat(total).sum(1, dtype=torch.float64).cpu()
    if along.detached and bool((change != 0).any()):
        raise ValueError("the output of f changes with x but has no gradient with respect to it; is it detached?")
    gap = (summed - change).abs()
    largest = _LOOSER * tol * torch.maximum(change.abs().clamp(min=1.0), size)
    converged = (torch.maximum(gap, gaps) <= tolerance) & ~(error > largest)
    near = _at_baseline(profiles, change, tolerance)
    attributions = total.abs() if absolute else total
    return IntegratedGradients(
        attributions, change, value, gap, error, converged, along.picked, along.n_grad, along.n_forward, near
    )


def _check_x(x: Any) -> None:
    if isinstance(x, Tensor) and not x.is_floating_point():
        raise TypeError(
            f"x must be floating; got {x.dtype}. Ids have no gradient: give their embeddings, or use explain_text"
        )
    check_float("x", x)
    if x.dim() == 0:
        raise ValueError("x must be (B, ...), one row for each example; got shape ()")
    if x.layout != torch.strided:
        raise TypeError(f"x must be a dense tensor; got {x.layout}")
    if not bool(torch.isfinite(x).all()):
        raise ValueError(f"x must be finite; got {int((~torch.isfinite(x)).sum())} values that are not")


def _check_args(args: Any, x: Tensor) -> tuple[Any, ...]:
    if not isinstance(args, tuple | list):
        raise TypeError(f"args must be a tuple of inputs; got {type(args).__name__}")
    for number, one in enumerate(args):
        if isinstance(one, Tensor) and (one.dim() == 0 or len(one) != len(x)):
            raise ValueError(
                f"args[{number}] must have a row for each of the {len(x)} examples; got shape {tuple(one.shape)}"
            )
    return tuple(one.detach() if isinstance(one, Tensor) else one for one in args)


def _columns(name: str, chosen: Any, out: Tensor) -> Tensor | None:
    """(B,) column of each example; None if the output has one number."""
    if out.dim() == 1:
        if chosen is not None:
            raise ValueError(f"{name} chooses a column of outputs (N, C); f returns (N,), so it must be None")
        return None
    b, classes = out.shape
    if classes == 0:
        raise ValueError(f"f must return at least one column; got shape {tuple(out.shape)}")
    if chosen is None:
        return out.argmax(1)
    if not isinstance(chosen, Tensor):
        listed = list(chosen) if isinstance(chosen, Sequence | np.ndarray) and not isinstance(chosen, str) else [chosen]
        for one in listed:
            check_int(name, one, 0)
        chosen = torch.tensor([int(one) for one in listed] if listed is not chosen else chosen)
        chosen = chosen[0] if len(listed) == 1 else chosen
    if chosen.is_floating_point() or chosen.is_complex() or chosen.dtype == torch.bool:
        raise TypeError(f"{name} must be integers; got {chosen.dtype}")
    if chosen.dim() and tuple(chosen.shape) != (b,):
        raise ValueError(f"{name} must be one column or {b}, one for each example; got shape {tuple(chosen.shape)}")
    low, high = int(chosen.min()), int(chosen.max())
    if low < 0 or high >= classes:
        raise ValueError(f"{name} must be in [0, {classes}); got {low if low < 0 else high}")
    return chosen.to(out.device, torch.long).expand(b)


def _fixed(
    along: Along, method: str, n: int, value: Tensor, before: Tensor
) -> tuple[Tensor, Tensor, list[dict[float, float]]]:
    """The integral by a fixed rule, (B, ...); its error (B,), or NaN; what is known of F."""
    nodes, weights = fixed_rule(method, n)
    device, b = along.x.device, len(along.x)
    profiles = [{0.0: v, 1.0: w} for v, w in zip(value.tolist(), before.tolist(), strict=True)]
    total = difference = torch.zeros(along.x.shape, dtype=compute_dtype(along.x), device=device)
    null = None
    if method == "gauss" and n > 1:
        # Up to a factor the difference of order n - 1, exactly 0 for polynomials of degree n - 2.
        null = (1 - 2 * (np.arange(n) % 2)) * np.sqrt(nodes * (1 - nodes) * weights)
        null *= weights[n // 2] / null[n // 2]
        difference = torch.zeros_like(total)
    pairs = [(row, node) for node in range(n) for row in range(b)]
    for start in range(0, len(pairs), along.block):
        part = pairs[start : start + along.block]
        rows = torch.tensor([row for row, _ in part], device=device)
        at = np.array([node for _, node in part])
        values, slopes = along.slopes(rows, torch.from_numpy(nodes[at]).to(device))
        shape = (-1, *(1,) * (total.dim() - 1))
        total.index_add_(0, rows, slopes * torch.from_numpy(weights[at]).to(slopes).view(shape))
        if null is not None:
            difference.index_add_(0, rows, slopes * torch.from_numpy(null[at]).to(slopes).view(shape))
        for (row, node), v in zip(part, values.tolist(), strict=True):
            profiles[row][float(nodes[node])] = v
    error = torch.full((b,), float("nan"), dtype=torch.float64)
    if null is not None:
        coarse, size = (_flat(y).abs().sum(1).double().cpu() for y in (difference, total))
        larger = torch.maximum(coarse, size)
        error = torch.where(larger > 0, coarse * (10 * coarse / larger).clamp(max=1), 0.0)
    return total, error, profiles


def _at_baseline(profiles: list[dict[float, float]], change: Tensor, tolerance: Tensor) -> Tensor:
    """(B,): F is flat up to a tenth of the path from the baseline, or jumps in its last ten-thousandth."""
    near = []
    for profile, whole, small in zip(profiles, change.tolist(), tolerance.tolist(), strict=True):
        inside = [v for a, v in profile.items() if 0.0 < a <= 0.91]
        off = max((abs(v - profile[0.0]) for v in inside), default=0.0)
        flat = len(inside) > 2 and abs(whole) > small and off <= 0.05 * abs(whole)
        jump = max((abs(v - profile[1.0]) for a, v in profile.items() if a >= 1 - 1e-4), default=0.0)
        span = max(profile.values()) - min(profile.values())
        near.append(flat or (jump > small and jump >= 0.25 * span))
    return torch.tensor(near, dtype=torch.bool)


def _averaged(
    f: Any, x: Tensor, baselines: Tensor, target: Any, absolute: bool, shared: dict[str, Any]
) -> IntegratedGradients:
    """Expected gradients: the mean over K baselines, the target being that of x."""
    made: list[IntegratedGradients] = []
    for one in baselines:
        made.append(attribute(f, x, one, target, **shared))
        target = made[0].target
    total = torch.stack([one.attributions for one in made]).mean(0)
    change = torch.stack([one.change for one in made]).mean(0)
    return IntegratedGradients(
        attributions=total.abs() if absolute else total,
        change=change,
        value=made[0].value,
        gap=(_flat(total).sum(1, dtype=torch.float64).cpu() - change).abs(),
        error=torch.stack([one.error for one in made]).mean(0),
        converged=torch.stack([one.converged for one in made]).all(0),
        target=made[0].target,
        n_grad=sum(one.n_grad for one in made),
        n_forward=sum(one.n_forward for one in made),
        at_baseline=torch.stack([one.at_baseline for one in made]).any(0),
    )


def _flat(y: Tensor) -> Tensor:
    """(B, ...) -> (B, features)."""
    return y.flatten(1) if y.dim() > 1 else y[:, None]


def _nothing(x: Tensor) -> IntegratedGradients:
    """The result for no examples; f is not run."""
    none = torch.zeros(0, dtype=torch.float64)
    yes = torch.zeros(0, dtype=torch.bool)
    return IntegratedGradients(x.to(compute_dtype(x)), none, none, none, none, yes, None, 0, 0, yes)
