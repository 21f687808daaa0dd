"""Ready gradient transforms (梯度变换): clip, zero, freeze, normalise, noise, centralise, sign, mask, project.

Each function here returns a :class:`Transform` for :func:`kexue.training.gradient_transform`, which runs it on all
gradients that its pattern matches, at once and in place; torch's ``_foreach`` functions do the work of one call per
tensor. A transform can also be called on one gradient, ``clip_value(0.5)(name, parameter, gradient)``, which leaves its
input alone and is differentiable.

Norms, means and products of bf16 and fp16 gradients are accumulated in float32. NaN and infinite gradients are not
hidden: NaN stays NaN, and an infinite norm makes infinite entries NaN, as in ``torch.nn.utils.clip_grad_norm_``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kexue._checks import check_real
from kexue._tensors import compute_dtype

__all__ = [
    "Transform",
    "add_noise",
    "centralize",
    "clip_norm",
    "clip_quantile",
    "clip_value",
    "freeze",
    "joint",
    "mask",
    "normalize",
    "project",
    "sign",
    "zero",
]

Update = Callable[[Sequence[str], Sequence[Tensor], list[Tensor]], Sequence[Tensor | None]]


class Transform:
    """What the functions of this module return.

    Args:
        update: Function from names, parameters and gradients to new gradients, of which None skips the parameter. It
            may work in place.
        text: What ``repr`` shows.
        sparse: Sparse gradients are passed as well; otherwise they are left as they are.

    Example:
        >>> clip_value(0.5)
        clip_value(0.5)
        >>> clip_value(0.5)("weight", torch.zeros(3), torch.tensor([-2.0, 0.1, 2.0]))
        tensor([-0.5000,  0.1000,  0.5000])
    """

    def __init__(self, update: Update, text: str, sparse: bool = False) -> None:
        self.update, self.text, self.sparse = update, text, sparse

    def __call__(self, name: str, parameter: Tensor, gradient: Tensor) -> Tensor | None:
        """New gradient of one parameter."""
        return self.update([name], [parameter], [gradient.clone()])[0]

    def __repr__(self) -> str:
        return self.text


def _alike(gradients: Sequence[Tensor]) -> list[list[int]]:
    """Numbers of the gradients that have one device and one dtype."""
    found: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for number, g in enumerate(gradients):
        found.setdefault((g.device, g.dtype), []).append(number)
    return list(found.values())


def _norms(gradients: list[Tensor], p: float) -> Tensor:
    """(N,) norms of tensors that are alike, float32 for low precision."""
    dtype = compute_dtype(gradients[0])
    if not all(g.numel() for g in gradients):  # torch has no norm of order inf of a tensor without entries
        nothing = gradients[0].new_zeros((), dtype=dtype)
        return torch.stack([_norms([g], p)[0] if g.numel() else nothing for g in gradients])
    if p == math.inf and gradients[0].device.type == "cpu":  # a quarter of the time of the norm
        return torch.stack([g.abs().max() for g in gradients]).to(dtype)
    return torch.stack(list(torch._foreach_norm(gradients, p, dtype=dtype)))


def _scaled(
    gradients: list[Tensor], p: float, per_tensor: bool, factor: Callable[[Tensor, Sequence[int]], Tensor]
) -> list[Tensor]:
    """Multiply the gradients by ``factor(norms, numbers of the gradients)``."""
    parts, made = _alike(gradients), list(gradients)
    # In place, unless somebody differentiates: the norms depend on the tensors that would be overwritten.
    multiply = torch._foreach_mul if torch.is_grad_enabled() else torch._foreach_mul_
    norms = [_norms([gradients[n] for n in part], p) for part in parts]
    total = norms[0]
    if not per_tensor:
        if len(parts) > 1:
            dtype = torch.float64 if any(x.dtype == torch.float64 for x in norms) else torch.float32
            total = torch.cat([x.to(norms[0].device, dtype) for x in norms])
        total = factor(torch.linalg.vector_norm(total, p), [n for part in parts for n in part])
    for part, values in zip(parts, norms, strict=True):
        by = factor(values, part) if per_tensor else total.to(values.device)
        if by.device.type == "cpu" and not torch.compiler.is_compiling() and bool((by == 1).all()):
            continue  # nothing is to be scaled; looking costs nothing here, and on a GPU it would wait
        changed = multiply([gradients[n] for n in part], list(by.unbind()) if per_tensor else by)
        for n, g in zip(part, changed or (), strict=False):
            made[n] = g
    return made


def _check_p(p: Any) -> float:
    if p != math.inf:
        check_real("p", p, minimum=1.0)
    return float(p)


def clip_norm(c: float, p: float = 2.0, per_tensor: bool = False, error_if_nonfinite: bool = False) -> Transform:
    """Scale gradients down to a norm of at most ``c``.

    Args:
        c: Largest norm.
        p: Order of the norm: 1, 2, ``math.inf`` or any number from 1.
        per_tensor: True: the norm of each tensor. False: the joint norm of all tensors that the pattern matches.
        error_if_nonfinite: A norm that is NaN or infinite is an error (this waits for a GPU). Otherwise such a step
            goes on: NaN makes everything NaN, an infinite norm makes finite entries 0. In float32 the norm of order 2
            is infinite from 1.8e19 on, as in torch.

    Returns:
        The transform.

    Raises:
        ValueError: ``c`` is not positive, or ``p`` below 1.

    Example:
        >>> clip_norm(1.0, p=1)("weight", torch.zeros(2), torch.tensor([3.0, -1.0]))
        tensor([ 0.7500, -0.2500])
    """
    check_real("c", c, above=0.0)
    order, limit = _check_p(p), float(c)

    def update(names: Sequence[str], parameters: Sequence[Tensor], gradients: list[Tensor]) -> list[Tensor]:
        def factor(norms: Tensor, numbers: Sequence[int]) -> Tensor:
            if error_if_nonfinite and not bool(torch.isfinite(norms).all()):
                bad = [names[n] for n in numbers if not bool(torch.isfinite(gradients[n]).all())]
                raise RuntimeError(f"{text}: the norm of the gradient is {norms}; not finite: {', '.join(bad)}")
            return torch.clamp(limit / norms, max=1.0)

        return _scaled(gradients, order, per_tensor, factor)

    text = f"clip_norm({limit:g}, p={order:g}{', per_tensor=True' if per_tensor else ''})"
    return Transform(update, text)


def normalize(p: float = 2.0, per_tensor: bool = False) -> Transform:
    """Scale gradients to norm 1; a gradient of zeros stays.

    Args:
        p: Order of the norm, as in :func:`clip_norm`.
        per_tensor: True: each tensor to 1. False: all tensors that the pattern matches together.

    Returns:
        The transform.

    Raises:
        ValueError: ``p`` is below 1.

    Example:
        >>> normalize()("weight", torch.zeros(2), torch.tensor([3.0, -4.0]))
        tensor([ 0.6000, -0.8000])
    """
    order = _check_p(p)

    def factor(norms: Tensor, numbers: Sequence[int]) -> Tensor:
        return torch.where(norms > torch.finfo(norms.dtype).tiny, norms, math.inf).reciprocal()

    return Transform(
        lambda names, parameters, gradients: _scaled(gradients, order, per_tensor, factor),
        f"normalize(p={order:g}{', per_tensor=True' if per_tensor else ''})",
    )


def clip_value(c: float) -> Transform:
    """Clamp every entry to [-c, c].

    Args:
        c: Largest absolute value.

    Returns:
        The transform.

    Raises:
        ValueError: ``c`` is not positive.

    Example:
        >>> clip_value(1.0)("weight", torch.zeros(2), torch.tensor([3.0, -0.5]))
        tensor([ 1.0000, -0.5000])
    """
    check_real("c", c, above=0.0)

    def update(names: Sequence[str], parameters: Sequence[Tensor], gradients: list[Tensor]) -> list[Tensor]:
        torch._foreach_clamp_max_(gradients, float(c))
        torch._foreach_clamp_min_(gradients, -float(c))
        return gradients

    return Transform(update, f"clip_value({float(c):g})")


def clip_quantile(q: float, per_tensor: bool = False) -> Transform:
    """Clamp every entry to the quantile ``q`` of the absolute values: the largest 1 - q of them are cut.

    Args:
        q: In (0, 1]. The bound is the smallest absolute value that at least the fraction q of all do not exceed.
        per_tensor: True: the quantile of each tensor. False: of all entries that the pattern matches (of each device
            and dtype), which are gathered: one more copy of them in memory.

    Returns:
        The transform.

    Raises:
        ValueError: ``q`` is out of range.

    Example:
        >>> clip_quantile(0.75)("weight", torch.zeros(4), torch.tensor([1.0, -2.0, 3.0, 100.0]))
        tensor([ 1., -2.,  3.,  3.])
    """
    check_real("q", q, above=0.0)
    if q > 1:
        raise ValueError(f"q must be at most 1; got {q!r}")

    def update(names: Sequence[str], parameters: Sequence[Tensor], gradients: list[Tensor]) -> list[Tensor]:
        made = list(gradients)
        for part in [[n] for n in range(len(gradients))] if per_tensor else _alike(gradients):
            flat = torch.cat([gradients[n].abs().flatten() for n in part])
            if flat.numel():
                # Rounding must not ask for one entry more: 0.07 * 100 is 7.000000000000001.
                bound = flat.kthvalue(min(max(math.ceil(q * flat.numel() - 1e-9), 1), flat.numel())).values
                for n in part:
                    made[n] = torch.clamp(gradients[n], -bound, bound)
        return made

    return Transform(update, f"clip_quantile({float(q):g}{', per_tensor=True' if per_tensor else ''})")


def zero() -> Transform:
    """Gradients of zero. This is no freeze: momentum goes on, and decoupled weight decay shrinks; see :func:`freeze`.

    Returns:
        The transform.

    Example:
        >>> zero()("weight", torch.zeros(2), torch.ones(2))
        tensor([0., 0.])
    """

    def update(names: Sequence[str], parameters: Sequence[Tensor], gradients: list[Tensor]) -> list[Tensor]:
        torch._foreach_zero_(gradients)
        return gradients

    return Transform(update, "zero()")


def freeze() -> Transform:
    """No gradient: the optimizer passes the parameter over, with its momentum and weight decay, in this step.

    Returns:
        The transform. It acts on sparse gradients as well.

    Example:
        >>> print(freeze()("weight", torch.zeros(2), torch.ones(2)))
        None
    """
    return Transform(lambda names, parameters, gradients: [None] * len(gradients), "freeze()", sparse=True)


def add_noise(std: float, generator: torch.Generator | None = None) -> Transform:
    """Add Gaussian noise.

    Args:
        std: Standard deviation of each entry.
        generator: Source of the noise. None is torch's global one, which :func:`kexue.training.fit` seeds by the number
            of the step, so that a resumed run repeats its noise; the state of another generator is not saved. Several
            processes that train one model need generators with equal seeds.

    Returns:
        The transform.

    Raises:
        ValueError: ``std`` is negative.

    Example:
        >>> a, b = (add_noise(0.1, torch.Generator().manual_seed(0)) for _ in range(2))
        >>> torch.equal(a("weight", torch.zeros(2), torch.ones(2)), b("weight", torch.zeros(2), torch.ones(2)))
        True
    """
    check_real("std", std, minimum=0.0)
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator or None; got {type(generator).__name__}")

    def update(names: Sequence[str], parameters: Sequence[Tensor], gradients: list[Tensor]) -> list[Tensor]:
        noise = [torch.randn(g.shape, generator=generator, dtype=g.dtype, device=g.device) for g in gradients]
        torch._foreach_add_(gradients, noise, alpha=float(std))
        return gradients

    return Transform(update, f"add_noise({float(std):g})")


def centralize() -> Transform:
    """Subtract the mean over the inputs of each output, for matrices and larger (gradient centralization, 2020).

    Returns:
        The transform. Vectors stay as they are.

    Example:
        >>> centralize()("weight", torch.zeros(1, 2), torch.tensor([[1.0, 3.0]]))
        tensor([[-1.,  1.]])
    """

    def centred(g: Tensor) -> Tensor:
        wide = g.to(compute_dtype(g))
        return (wide - wide.mean(list(range(1, g.ndim)), keepdim=True)).to(g.dtype)

    def update(names: Sequence[str], parameters: Sequence[Tensor], gradients: list[Tensor]) -> list[Tensor]:
        return [centred(g) if g.ndim > 1 and g.numel() else g for g in gradients]

    return Transform(update, "centralize()")


def sign() -> Transform:
    """The sign of every entry.

    Returns:
        The transform.

    Example:
        >>> sign()("weight", torch.zeros(3), torch.tensor([3.0, -0.5, 0.0]))
        tensor([ 1., -1.,  0.])
    """

    def update(names: Sequence[str], parameters: Sequence[Tensor], gradients: list[Tensor]) -> list[Tensor]:
        torch._foreach_sign_(gradients)
        return gradients

    return Transform(update, "sign()")


def _looked_up(role: str, given: Tensor | Mapping[str, Tensor], name: str, gradient: Tensor) -> Tensor:
    """The tensor for one parameter, on its device; shapes must agree."""
    if isinstance(given, Mapping):
        if name not in given:
            raise ValueError(f"{role} has no tensor for {name!r}; it has {', '.join(map(repr, list(given)[:5]))}")
        given = given[name]
    try:
        return given.to(gradient.device).expand(gradient.shape)
    except RuntimeError:
        shape = tuple(gradient.shape)
        raise ValueError(f"{role} of {name!r} must fit shape {shape}; got {tuple(given.shape)}") from None


def mask(keep: Tensor | Mapping[str, Tensor]) -> Transform:
    """Zero where ``keep`` is False. Momentum and decoupled weight decay still move these entries, see :func:`zero`.

    Args:
        keep: Boolean tensor that can be broadcast to the gradient, True means "takes part"; or one for each name.

    Returns:
        The transform.

    Raises:
        TypeError: ``keep`` is not boolean.

    Example:
        >>> mask(torch.tensor([True, False]))("weight", torch.zeros(2), torch.ones(2))
        tensor([1., 0.])
    """
    for value in keep.values() if isinstance(keep, Mapping) else [keep]:
        if not isinstance(value, Tensor) or value.dtype != torch.bool:
            raise TypeError(
                f"keep must be boolean tensors; got {value.dtype if isinstance(value, Tensor) else value!r}"
            )

    def update(names: Sequence[str], parameters: Sequence[Tensor], gradients: list[Tensor]) -> list[Tensor]:
        return [g.where(_looked_up("keep", keep, n, g), 0.0) for n, g in zip(names, gradients, strict=True)]

    return Transform(update, "mask(...)")


def project(direction: Tensor | Mapping[str, Tensor] | None = None) -> Transform:
    """Remove the component of each gradient along a direction: g - (g·d / d·d) d.

    Args:
        direction: Tensor that can be broadcast to the gradient, or one for each name. None is the parameter itself, so
            that the step changes the direction of the weights and, to first order, not their norm.

    Returns:
        The transform. A direction of zeros removes nothing.

    Raises:
        TypeError: ``direction`` holds something else than floating tensors.

    Example:
        >>> project()("weight", torch.tensor([2.0, 0.0]), torch.tensor([3.0, 4.0]))
        tensor([0., 4.])
    """
    given = direction.values() if isinstance(direction, Mapping) else [] if direction is None else [direction]
    for value in given:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            raise TypeError(f"direction must be floating tensors or None; got {value!r}")

    def update(names: Sequence[str], parameters: Sequence[Tensor], gradients: list[Tensor]) -> list[Tensor]:
        made = []
        for name, p, g in zip(names, parameters, gradients, strict=True):
            along = p if direction is None else _looked_up("direction", direction, name, g)
            d, wide = along.to(compute_dtype(g)), g.to(compute_dtype(g))
            square = (d * d).sum()
            share = torch.where(square > 0, (wide * d).sum() / torch.where(square > 0, square, 1.0), 0.0)
            made.append((wide - share * d).to(g.dtype))
        return made

    return Transform(update, "project()")


def joint(function: Update) -> Transform:
    """A transform of your own that sees all gradients of its pattern at once.

    Args:
        function: ``function(names, parameters, gradients)``, three lists, returns as many new gradients; None skips a
            parameter. Gradients may be changed in place.

    Returns:
        The transform.

    Raises:
        TypeError: ``function`` is not callable.

    Example:
        >>> def equal_norms(names, parameters, gradients):
        ...     mean = sum(g.norm() for g in gradients) / len(gradients)
        ...     return [g * (mean / g.norm()) for g in gradients]
        >>> joint(equal_norms)
        joint(equal_norms)
    """
    if not callable(function):
        raise TypeError(f"function must be callable; got {function!r}")
    return Transform(function, f"joint({getattr(function, '__name__', function)})")


MAKERS = (
    add_noise, centralize, clip_norm, clip_quantile, clip_value, freeze, joint, mask, normalize, project, sign, zero,
)  # fmt: skip  # each has to be called to give a transform
