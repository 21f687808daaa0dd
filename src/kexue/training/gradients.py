"""Free gradients (自由的梯度): change gradients by name between the backward pass and the step of any optimizer.

Source: 科学空间 6418, "让Keras更酷一些!":分层的学习率和自由的梯度. There a function replaces ``get_gradients`` of
one Keras optimizer object; the update rule is untouched. Here it is a hook before ``step``: it sees the gradients of
all parameters at once, after accumulation. Hooks on tensors would see parts of them.

What we do differently: patterns of names, transforms that compose and can be removed, one ``_foreach`` call for many
tensors. Under mixed precision the gradients are unscaled first, whether GradScaler does it or leaves it to a fused
optimizer. With ``step(closure)`` the transforms run after each call of the closure, since that is what makes the
gradients which the optimizer reads.

A gradient of zeros is not a freeze once there is momentum or decoupled decay: Adam and AdamW keep moving. None is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from kexue.training.groups import check_pattern
from kexue.training.transforms import MAKERS, Transform

__all__ = ["TransformHandle", "gradient_transform"]

PerParameter = Callable[[str, Tensor, Tensor], Tensor | None]
Names = nn.Module | Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]


class TransformHandle:
    """What :func:`gradient_transform` returns; also a context manager that removes the transforms at its end.

    Args:
        handles: Handles of the hooks.

    Example:
        >>> TransformHandle([]).remove()
    """

    def __init__(self, handles: Sequence[Any]) -> None:
        self._handles = handles

    def remove(self) -> None:
        """Take these transforms away; other ones stay. A second call does nothing."""
        for handle in self._handles:
            handle.remove()

    def __enter__(self) -> TransformHandle:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()


def gradient_transform(
    optimizer: Optimizer, transforms: Mapping[str, Any] | Transform | PerParameter, *, names: Names | None = None
) -> TransformHandle:
    """Change the gradients of an optimizer before each of its steps.

    Every rule acts on all parameters that its pattern matches, in the order of the mapping; a parameter that matches
    several passes through all of them. Calling this again adds transforms after the ones that are there. The update
    rule, the optimizer's state and its state_dict are untouched. A copied or unpickled optimizer has no transforms, as
    it has no other hooks of torch.

    Gradients are those that have been accumulated and, with ``torch.amp.GradScaler``, unscaled; a step that the scaler
    skips calls no transform. :func:`kexue.training.fit` clips (``clip=``) before they run. They write into
    ``parameter.grad``. Parameters without a gradient are passed over, and sparse gradients stay as they are (only
    :func:`freeze` acts on them).

    Args:
        optimizer: Any optimizer of torch or one that derives from ``torch.optim.Optimizer``.
        transforms: Glob pattern of names (``*`` matches dots too) -> transform, or one transform for all. A transform
            is one of this room (:func:`clip_norm`, :func:`clip_value`, ...), or any function
            ``(name, parameter, gradient) -> gradient``; if it returns None, the parameter is skipped in this step, with
            its momentum and decay.
        names: Where names come from if the optimizer has none: the model, or names with parameters. Optimizers built
            from :func:`param_groups` or ``model.named_parameters()`` know theirs.

    Returns:
        A handle; ``remove()`` takes the transforms away.

    Raises:
        TypeError: An argument is of the wrong kind. In a step: a transform returned no tensor, or another dtype.
        ValueError: A pattern matches nothing, or names are needed and not known. In a step: a wrong shape or device.

    Reference:
        https://spaces.ac.cn/archives/6418

    Example:
        >>> from kexue.training import clip_norm, clip_value, param_groups
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
        >>> optimizer = torch.optim.SGD(param_groups(model, lr=1.0))
        >>> handle = gradient_transform(optimizer, {"*.weight": clip_norm(1.0, p=1), "*": clip_value(0.5)})
        >>> (100 * model(torch.ones(1, 2))).sum().backward()
        >>> optimizer.step()
        >>> model[1].bias.grad, bool(model[0].weight.grad.abs().sum() + model[1].weight.grad.abs().sum() <= 1.0001)
        (tensor([0.5000]), True)
        >>> handle.remove()
    """
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer; got {type(optimizer).__name__}")
    inner = getattr(optimizer, "optimizer", None)
    if isinstance(inner, Optimizer) and not hasattr(optimizer, "_optimizer_step_pre_hooks"):
        optimizer = inner  # in a wrapper, such as accelerate's, whose own step runs no hooks
    if callable(transforms):
        transforms = {"*": transforms}
    if not isinstance(transforms, Mapping) or not transforms:
        raise TypeError(f"transforms must map patterns to transforms; got {transforms!r}")
    for pattern, transform in transforms.items():
        uncalled = any(transform is make for make in MAKERS)  # clip_value in the place of clip_value(0.5)
        if not callable(transform) or isinstance(transform, type) or uncalled:
            raise TypeError(
                f"the transform of {pattern!r} must be a function (name, parameter, gradient) -> gradient or one of "
                f"clip_norm(...), clip_value(...) and the like; got {transform!r}"
            )
    rules = [(pattern, t if isinstance(t, Transform) else _each(t)) for pattern, t in transforms.items()]
    hook = _Hook(rules, _named(optimizer, names, transforms))
    for pattern in transforms:
        check_pattern("transforms", pattern, hook.known.values())
    return TransformHandle(
        [optimizer.register_step_pre_hook(hook.before), optimizer.register_step_post_hook(hook.after)]
    )


def _named(optimizer: Optimizer, names: Names | None, patterns: Iterable[str]) -> dict[Tensor, str]:
    """Name of each parameter of the optimizer."""
    given: dict[Tensor, str] | None = None
    if names is not None:
        pairs: Any = names.items() if isinstance(names, Mapping) else names
        if isinstance(names, nn.Module):
            pairs = names.named_parameters()
        try:
            given = {p: name for name, p in pairs}
        except (TypeError, ValueError):
            raise TypeError(f"names must be a model, or names with parameters; got {type(names).__name__}") from None
    found: dict[Tensor, str] = {}
    for number, group in enumerate(optimizer.param_groups):
        own = group.get("param_names")
        for place, p in enumerate(group["params"]):
            if given is not None:
                if p not in given:
                    raise ValueError(f"names has no name for parameter {place} of group {number}, {tuple(p.shape)}")
                found[p] = given[p]
            elif own is not None:
                found[p] = own[place]
            else:
                found[p] = f"param_groups[{number}].params[{place}]"
    nameless = given is None and any("param_names" not in group for group in optimizer.param_groups)
    unusable = [pattern for pattern in patterns if pattern != "*"] if nameless else []
    if unusable:
        raise ValueError(
            f"the optimizer does not know the names of its parameters, so {unusable[0]!r} cannot match; pass "
            "names=model, or build it from kexue.training.param_groups(model, ...) or model.named_parameters()"
        )
    return found


def _each(function: PerParameter) -> Transform:
    """A transform from a function of one parameter."""

    def update(names: Sequence[str], parameters: Sequence[Tensor], gradients: list[Tensor]) -> list[Tensor | None]:
        return [function(n, p, g) for n, p, g in zip(names, parameters, gradients, strict=True)]

    return Transform(update, getattr(function, "__name__", repr(function)))


class _Hook:
    """Runs the rules of one call of :func:`gradient_transform`."""

    def __init__(self, rules: list[tuple[str, Transform]], known: dict[Tensor, str]) -> None:
        self.rules = rules
        self.known = known  # names as they were when the rules were made; loading a state may bring others
        self.key: list[int] = []
        self.plan: list[tuple[Transform, list[tuple[str, Tensor]]]] = []
        self.scale: Tensor | None = None

    def before(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Before the step: transform the gradients, or the closure that will make them."""
        place = 1 if len(args) > 1 else "closure"
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if not callable(closure):
            self.run(optimizer)
            return None

        def transformed() -> Any:
            out = closure()
            self.run(optimizer)
            return out

        if place == 1:
            return (args[0], transformed, *args[2:]), kwargs
        return args, {**kwargs, "closure": transformed}

    def after(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """After the step: the scale of the gradients is the optimizer's again."""
        if self.scale is not None:
            optimizer.grad_scale, self.scale = self.scale, None  # type: ignore[attr-defined]

    @torch.no_grad()
    def run(self, optimizer: Optimizer) -> None:
        """Apply all rules to the gradients as they are."""
        found_inf = getattr(optimizer, "found_inf", None)
        if found_inf is not None and bool(found_inf):
            return  # the optimizer will not take this step
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        scale = getattr(optimizer, "grad_scale", None)
        if scale is not None:
            # GradScaler leaves unscaling to optimizers with a fused kernel: do it now, and tell the kernel.
            _unscale(parameters, scale)
            self.scale, optimizer.grad_scale = scale, None  # type: ignore[attr-defined]
        key = [id(p) for p in parameters]
        if key != self.key:
            self.match(optimizer)
            self.key = key
        for transform, members in self.plan:
            _apply(transform, members)

    def match(self, optimizer: Optimizer) -> None:
        """Which parameters each rule acts on; groups may be added to an optimizer at any time."""
        named: dict[Tensor, str] = {}
        for number, group in enumerate(optimizer.param_groups):
            own = group.get("param_names")
            for place, p in enumerate(group["params"]):
                named[p] = self.known.get(p) or (own[place] if own else f"param_groups[{number}].params[{place}]")
        self.plan = [(t, [(n, p) for p, n in named.items() if fnmatchcase(n, pattern)]) for pattern, t in self.rules]


def _unscale(parameters: Iterable[Tensor], scale: Tensor) -> None:
    for p in parameters:
        if p.grad is not None:
            values = p.grad if p.grad.layout is torch.strided else p.grad._values()
            values.mul_(scale.to(values.device).double().reciprocal().to(torch.float32))


def _apply(transform: Transform, members: Sequence[tuple[str, Tensor]]) -> None:
    names, parameters, gradients = [], [], []
    for name, p in members:
        g = p.grad
        if g is not None and (g.layout is torch.strided or transform.sparse):
            names.append(name)
            parameters.append(p)
            gradients.append(g)
    if not names:
        return
    new = transform.update(names, parameters, list(gradients))
    if not isinstance(new, Sequence) or len(new) != len(names):
        got = f"{len(new)} of them" if isinstance(new, Sequence) else f"a {type(new).__name__}"
        raise TypeError(f"{transform!r} must return a list of {len(names)} gradients; got {got}")
    changed = []
    for name, p, g, made in zip(names, parameters, gradients, new, strict=True):
        if made is None:
            p.grad = None
        elif made is not g:
            _check(transform, name, g, made)
            changed.append((g, made))
    if changed:
        memory = {g.untyped_storage().data_ptr() for g in gradients if g.layout is torch.strided}
        # A view of a gradient (g.T), or the gradient of another parameter, must be read before it is written.
        changed = [(g, m.clone() if m.untyped_storage().data_ptr() in memory else m) for g, m in changed]
    for g, made in changed:
        g.copy_(made)


def _check(transform: Transform, name: str, gradient: Tensor, made: Any) -> None:
    what = f"{transform!r} must return a gradient for {name!r}"
    if not isinstance(made, Tensor) or made.layout is not torch.strided:
        raise TypeError(f"{what} (a dense tensor) or None; got {type(made).__name__}")
    if made.dtype != gradient.dtype:
        raise TypeError(f"{what} of dtype {gradient.dtype}; got {made.dtype}")
    if made.shape != gradient.shape:
        raise ValueError(f"{what} of shape {tuple(gradient.shape)}; got {tuple(made.shape)}")
    if made.device != gradient.device:
        raise ValueError(f"{what} on {gradient.device}; got {made.device}")
