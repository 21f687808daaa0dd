"""Score and squared slope of a critic, with gradients; without double backward where the critic is piecewise linear.

For a critic D made of affine maps and kinks, the gradient g in x is constant within a cell, so that a loss L of the
score s = D(x) and of q = |g|^2, with a = dL/ds and b = dL/dq of each row, has

    dL/dx = a g
    dL/dW = sum over rows of delta (a h + t)',   dL/dc = sum over rows of a delta,   t the tangent of 2 b g

where h are the activations, delta the backward signals of s, and t passes through the layers without their biases,
on the pieces that h is on. a h + t is again a forward pass with the kinks held fixed: it starts from a x + 2 b g and
multiplies biases by a. One step is thus a forward pass, a backward pass for the input, this second forward pass, and
one product for each weight; h need not be kept. Kinks follow torch's conventions, so this equals double backward, at
kinks too.

The critic is traced once by torch.fx; a critic with an operation that has no rule in ``_piecewise_rules.py`` is
differentiated twice.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules import module as torch_module
from torch.nn.modules.batchnorm import _BatchNorm

from kexue._tensors import as_recorded, check_float, compute_dtype, once_differentiable
from kexue.adversarial._piecewise_rules import (
    Rule,
    Unsupported,
    by_row,
    function_rule,
    module_rule,
    module_weights,
)
from kexue.adversarial._piecewise_trace import ASSIGNED, Program, program_of

Critic = nn.Module | Callable[[Tensor], Tensor]
OF_SHAPES = (
    operator.mul,
    operator.add,
    operator.sub,
    operator.floordiv,
    operator.getitem,
)  # what shapes may go through
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def has_hooks(module: nn.Module) -> bool:
    """Whether a call of the module does more than its forward."""
    return any(module.__dict__.get(hooks) for hooks in HOOKS)


def _modules(net: nn.Module) -> dict[str, nn.Module]:
    return dict(net.named_modules(remove_duplicate=False))


class _Run:
    """One evaluation of a program: the rules of its calls, in order, with their places."""

    def __init__(
        self, program: Program, modules: dict[str, nn.Module], groups: list[tuple[Tensor | None, ...]]
    ) -> None:
        self.program, self.modules, self.groups = program, modules, groups
        self.rules: list[tuple[Rule, fx.Node, list[fx.Node]]] = []

    def forward(self, x: Tensor) -> Tensor:
        """The scores."""
        values: dict[fx.Node, Any] = {self.program.input: x}
        groups, rows = iter(self.groups), len(x)
        for (node, inputs), done in zip(self.program.steps, self.program.done, strict=True):
            if node.op == "call_module":
                rule = module_rule(self.modules[str(node.target)], next(groups), node in self.program.overwrite)
            else:
                inputs = [n for n in inputs if isinstance(values[n], Tensor)]
                known = self._of_shape(node, inputs, values)
                if known is not None:
                    values[node] = known
                    continue
                rule = self._function(node, inputs, values)
            out = rule.forward(*[values[n] for n in inputs])
            if out.dim() == 0 or out.shape[0] != rows:
                raise Unsupported(f"{node.format_node()}, which changes the number of rows")
            values[node] = out
            self.rules.append((rule, node, inputs))
            for n in done:
                del values[n]
        return values[self.program.output]

    def _of_shape(self, node: fx.Node, inputs: list[fx.Node], values: dict[fx.Node, Any]) -> Any:
        """The number or shape that a node stands for, None if it is a tensor."""
        args: Any = fx.map_arg(node.args, lambda n: values[n])
        target: Any = node.target
        if node.op == "call_method" and node.target in ("size", "dim"):
            return getattr(args[0], str(node.target))(*args[1:])
        if node.op == "call_function" and node.target is getattr and args[1] in ("shape", "ndim"):
            return getattr(*args)
        if node.op == "call_function" and not inputs and node.target in OF_SHAPES:
            return target(*args)
        return None

    def _function(self, node: fx.Node, inputs: list[fx.Node], values: dict[fx.Node, Any]) -> Rule:
        """The rule of a function or method."""
        fixed = {n: values[n] for n in node.all_input_nodes if n not in inputs}
        target: Any = ASSIGNED.get(node.target, node.target) if node.op == "call_function" else node.target

        def arguments(*tensors: Tensor | None) -> tuple[Any, Any]:
            table = {**fixed, **dict(zip(inputs, tensors, strict=True))}
            args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), lambda n: table[n])
            return args, {k: v for k, v in kwargs.items() if k != "inplace"}  # which is known to change no value

        def call(*tensors: Tensor) -> Tensor:
            args, kwargs = arguments(*tensors)
            if node.op == "call_method":
                return getattr(args[0], str(node.target))(*args[1:], **kwargs)
            return target(*args, **kwargs)

        name = str(node.target) if node.op == "call_method" else getattr(target, "__name__", str(target))
        args, kwargs = arguments(*[None] * len(inputs))
        tensors = sum(n is not None for n in _tensor_places(node, inputs))
        if tensors != len(inputs):  # x + x
            raise Unsupported(f"the function {name} of the same value twice")
        return function_rule(name, call, list(args), kwargs, tensors)

    def backward(self, delta: Tensor, keep: bool) -> tuple[Tensor, list[Tensor]]:
        """Gradient of the scores in x, and (keep) the backward signals of the calls that have weights, last first."""
        signals: dict[fx.Node, Tensor] = {self.program.output: delta}
        kept = []
        for rule, node, inputs in reversed(self.rules):
            if node not in signals:  # a value that nothing uses
                raise Unsupported(f"{node.format_node()}, which the score does not use")
            delta = signals.pop(node)
            if keep and rule.weights:
                kept.append(delta)
            for n, d in zip(inputs, rule.pull(delta), strict=True):
                signals[n] = signals[n] + d if n in signals else d
        return signals[self.program.input], kept

    def weight_gradients(self, a: Tensor | None, v: Tensor, signals: list[Tensor]) -> list[Tensor | None]:
        """Second forward pass, from v = a x + 2 b g: the gradients of all weights in order."""
        values = {self.program.input: v}
        last = {n: i for i, (_, _, inputs) in enumerate(self.rules) for n in inputs}
        found: list[Tensor | None] = []
        for i, (rule, node, inputs) in enumerate(self.rules):
            given = [values[n] for n in inputs]
            if rule.weights:
                found.extend(rule.gradients(signals.pop(), a, *given))
            if not signals:  # what comes after the last weights is not needed
                break
            values[node] = rule.push(a, *given)
            for n in inputs:
                if last[n] == i:
                    values.pop(n, None)
        return found


def _tensor_places(node: fx.Node, inputs: list[fx.Node]) -> list[fx.Node]:
    """Every place among the arguments that takes one of the tensors."""
    found: list[fx.Node] = []
    fx.map_arg((node.args, dict(node.kwargs)), lambda n: found.append(n) if n in inputs else None)
    return found


def _check_scores(out: Any, x: Tensor) -> None:
    if not isinstance(out, Tensor):
        raise TypeError(f"the critic must return a tensor; got {type(out).__name__}")
    if out.shape[:1] != x.shape[:1] or any(n != 1 for n in out.shape[1:]):  # (B, 1, 1, 1) is what convolutions leave
        raise ValueError(f"the critic must return (B,) or (B, 1); got {tuple(out.shape)} for B = {len(x)}")


def _full_precision(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Autocast off; its casts are made before."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else contextlib.nullcontext()


class _ScoreAndSquare(torch.autograd.Function):
    """(x, *weights) -> (scores (B,), squared norms of their gradients in x (B,))."""

    @staticmethod
    def forward(ctx: Any, run: _Run, x: Tensor, *weights: Tensor | None) -> tuple[Tensor, Tensor]:
        with _full_precision(x):
            ctx.learns = any(ctx.needs_input_grad[2:])
            score = run.forward(x)
            _check_scores(score, x)
            gradient, signals = run.backward(torch.ones_like(score), ctx.learns)
            dtype = compute_dtype(x)
            square = gradient.flatten(1).to(dtype).square().sum(1)
        pieces = [rule.saved for rule, _, _ in run.rules] if ctx.learns else []
        for rule, _, _ in run.rules:
            rule.saved = ()
        ctx.run, ctx.counts, ctx.signals = run, [len(p) for p in pieces], len(signals)
        ctx.save_for_backward(x, gradient, *weights, *signals, *(t for p in pieces for t in p))
        ctx.weights = len(weights)
        ctx.set_materialize_grads(False)
        return score.reshape(len(x)).to(dtype, copy=True), square

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, a: Tensor | None, b: Tensor | None) -> tuple[Tensor | None, ...]:
        x, gradient, *rest = ctx.saved_tensors
        signals, pieces = rest[ctx.weights : ctx.weights + ctx.signals], iter(rest[ctx.weights + ctx.signals :])
        none: list[Tensor | None] = [None] * ctx.weights
        if a is None and b is None:
            return None, None, *none
        to_x = None if a is None or not ctx.needs_input_grad[1] else gradient * by_row(a, gradient)
        if not ctx.learns:
            return None, to_x, *none
        with _full_precision(x):
            for (rule, _, _), count in zip(ctx.run.rules, ctx.counts, strict=True):
                rule.saved = tuple(next(pieces) for _ in range(count))
            start = torch.zeros_like(x) if b is None else gradient * by_row(2 * b, gradient)
            if a is not None:
                start.addcmul_(x, by_row(a, x))
            found = ctx.run.weight_gradients(a, start, signals)
        for rule, _, _ in ctx.run.rules:
            rule.saved = ()
        needed = ctx.needs_input_grad[2:]
        return None, to_x, *(g if need else None for g, need in zip(found, needed, strict=True))


def _first_order(net: nn.Module, x: Tensor, modules: dict[str, nn.Module]) -> tuple[Tensor, Tensor]:
    if torch._C._are_functorch_transforms_active():
        raise Unsupported("a transform of torch.func")
    if torch_module._has_any_global_hook():
        raise Unsupported("a hook on all modules")
    for name, module in modules.items():
        if has_hooks(module):
            raise Unsupported(f"a hook on {name or 'the critic'}")
    program = program_of(net, modules)
    groups = [module_weights(modules[name]) for name in program.calls]  # once: a parametrization computes them anew
    if torch.is_autocast_enabled(x.device.type):  # the casts are recorded, the gradients return to the weights' dtype
        dtype = torch.get_autocast_dtype(x.device.type)
        if x.dtype != torch.float64:
            x, groups = x.to(dtype), [tuple(None if w is None else w.to(dtype) for w in g) for g in groups]
    recorded = as_recorded(x, *(w for g in groups for w in g))
    run = _Run(program, modules, [tuple(None if w is None else w.detach() for w in g) for g in groups])
    return _ScoreAndSquare.apply(run, *recorded)


def scores(net: Critic, x: Tensor) -> Tensor:
    """Plain scores (B,), float32 or float64."""
    out = net(x)
    _check_scores(out, x)
    return out.reshape(len(x)).to(compute_dtype(out))


def _second_order(net: Critic, x: Tensor) -> tuple[Tensor, Tensor]:
    """Score and squared slope by double backward."""
    recording = torch.is_grad_enabled()
    net = getattr(net, "_twice_differentiable", net)
    if torch._C._are_functorch_transforms_active():  # which know no requires_grad_

        def summed(rows: Tensor) -> tuple[Tensor, Tensor]:
            out = scores(net, rows)
            return out.sum(), out

        found, s = torch.func.grad(summed, has_aux=True)(x)
        return s, found.flatten(1).to(compute_dtype(x)).square().sum(1)
    with torch.enable_grad():
        leaf = x if recording and x.requires_grad else x.detach().requires_grad_()
        s = scores(net, leaf)
        gradient = None
        if s.requires_grad:
            (gradient,) = torch.autograd.grad(s.sum(), leaf, create_graph=recording, allow_unused=True)
        if gradient is None:  # a critic that ignores its input
            gradient = torch.zeros_like(leaf)
        square = gradient.flatten(1).to(compute_dtype(x)).square().sum(1)
    return (s, square) if recording else (s.detach(), square.detach())


def check_critic(net: Any, modules: dict[str, nn.Module] | None = None) -> None:
    """Raise TypeError unless the critic is callable, ValueError if it uses the statistics of the batch.

    Args:
        net: The critic.
        modules: Its modules by name, if they are known.
    """
    if not callable(net):
        raise TypeError(f"the critic must be an nn.Module or a function; got {type(net).__name__}")
    if isinstance(net, nn.Module):
        for name, module in (modules or _modules(net)).items():
            if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None):
                raise ValueError(
                    f"the critic must score every row by itself; got {type(module).__name__} ({name or 'the critic'}) "
                    "with the statistics of the batch, which has no gradient of single rows; use another "
                    "normalisation, or call eval()"
                )


def check_rows(name: str, x: Any, net: Any) -> None:
    """Raise unless x is a floating tensor (B, ...) in the dtype of the critic."""
    check_float(name, x)
    if x.dim() < 2:
        raise ValueError(f"{name} must have shape (B, ...) with at least 2 dimensions; got {tuple(x.shape)}")
    if isinstance(net, nn.Module) and not torch.is_autocast_enabled(x.device.type):
        parameter = next((p for p in net.parameters() if p.is_floating_point()), None)
        if parameter is not None and parameter.dtype != x.dtype:
            raise TypeError(f"{name} must have the critic's dtype {parameter.dtype}; got {x.dtype}")


def check_first_order(first_order: Any) -> None:
    """Raise unless ``first_order`` is "auto", True or False."""
    if not (isinstance(first_order, bool) or first_order == "auto"):
        raise ValueError(f"first_order must be 'auto', True or False; got {first_order!r}")


def score_and_square(
    net: Critic, x: Tensor, first_order: bool | str = "auto", *, checked: bool = False
) -> tuple[Tensor, Tensor]:
    """Scores (B,) and squared norms (B,) of their gradients in x, both differentiable in x and in the weights.

    Args:
        net: (B, ...) -> (B,) or (B, 1), row by row.
        x: Inputs, not changed.
        first_order: "auto" uses the rule of piecewise-linear critics where it applies, False differentiates twice,
            True raises ValueError where the rule does not apply.
        checked: Whether :func:`check_rows` has seen ``x``.
    """
    check_first_order(first_order)
    if not checked:
        check_rows("x", x, net)
    if torch.compiler.is_compiling():  # a break in the graph: neither torch.fx nor double backward can be traced
        return torch.compiler.disable(_score_and_square)(net, x, first_order)
    return _score_and_square(net, x, first_order)


def _score_and_square(net: Critic, x: Tensor, first_order: bool | str) -> tuple[Tensor, Tensor]:
    net = getattr(net, "_orig_mod", net)  # what torch.compile wraps
    modules = _modules(net) if isinstance(net, nn.Module) else {}
    check_critic(net, modules)
    inner, scale = getattr(net, "_scaled_network", (None, 1.0))  # a LipschitzCritic whose scores are those of a network
    if inner is not None:
        score, square = _score_and_square(inner, x, first_order)
        return score * scale, square * scale**2
    if torch.is_inference_mode_enabled():  # slopes need a graph, which inference mode cannot make
        with torch.inference_mode(False), torch.no_grad():
            return _score_and_square(net, x.clone(), first_order)
    if first_order is False:
        return _second_order(net, x)
    try:
        if not isinstance(net, nn.Module):
            raise Unsupported("a function that is no nn.Module")
        return _first_order(net, x, modules)
    except Unsupported as error:
        if first_order is True:
            raise ValueError(f"first_order=True needs a critic of known piecewise-linear layers; got {error}") from None
        return _second_order(net, x)


def first_order_obstacle(net: Any, x: Tensor) -> str | None:
    """Why the first-order rule does not apply to a critic, None if it does."""
    try:
        score_and_square(net, x.detach(), first_order=True)
    except ValueError as error:
        return str(error)
    return None


@contextlib.contextmanager
def frozen(net: Any) -> Iterator[None]:
    """No gradients for the weights of a critic within the block, as for a generator's step."""
    learning = [p for p in net.parameters() if p.requires_grad] if isinstance(net, nn.Module) else []
    for p in learning:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in learning:
            p.requires_grad_(True)
