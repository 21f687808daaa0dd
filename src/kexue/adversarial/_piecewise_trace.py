"""The trace of a critic by torch.fx, and when it may be trusted.

A graph shows calls on tensors, nothing else of a forward: what it leaves out (modes, random numbers, assignments in
place, settings that change later) is looked after here, so that a critic without a faithful graph is differentiated
twice.
"""

from __future__ import annotations

import operator
import random
import types
import weakref
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from kexue.adversarial._piecewise_rules import ALIASES, MAPS, MODULES, WEIGHTED, Unsupported

ASSIGNED: dict[Any, Any] = {  # what changes its first argument, and what gives the same value
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
}


def _table_type(module: nn.Module) -> bool:
    """Whether the module is one of the table and computes what its type says."""
    kind = type(module)
    if kind not in MODULES and parametrize.is_parametrized(module):  # a subclass that torch makes
        kind = kind.__mro__[1]
    return kind in MODULES and "forward" not in module.__dict__


def _modes() -> tuple[bool, ...]:
    return torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda")


class _Proxy(fx.Proxy):
    """Keeps ``h += y`` apart from ``h + y``, which torch.fx takes for the same: another name of h may see it."""

    def _assign(self, target: Any, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", target, (self, other), {})

    def __iadd__(self, other: Any) -> fx.Proxy:
        return self._assign(operator.iadd, other)

    def __isub__(self, other: Any) -> fx.Proxy:
        return self._assign(operator.isub, other)

    def __imul__(self, other: Any) -> fx.Proxy:
        return self._assign(operator.imul, other)

    def __itruediv__(self, other: Any) -> fx.Proxy:
        return self._assign(operator.itruediv, other)


class _Tracer(fx.Tracer):
    def trace(self, *args: Any, **kwargs: Any) -> fx.Graph:
        self.modes = _modes()
        return super().trace(*args, **kwargs)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if _modes() != self.modes:  # a graph does not show it
            raise Unsupported("a part under no_grad or autocast of its own")
        return super().create_node(*args, **kwargs)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return _table_type(m) or (super().is_leaf_module(m, module_qualified_name) and type(m) is not nn.ModuleList)


def _trace(net: nn.Module) -> fx.Graph:
    """The graph of a critic. Raises Unsupported."""
    if "forward" in net.__dict__:  # torch.fx would trace that of the class
        raise Unsupported("a forward of its own")
    before = random.getstate(), torch.get_rng_state()
    try:
        with torch.enable_grad():
            graph = _Tracer().trace(net)
    except Unsupported:
        raise
    except Exception as error:  # fx raises whatever the user's forward raises on proxies
        raise Unsupported(f"a forward that torch.fx cannot trace ({type(error).__name__})") from error
    if random.getstate() != before[0] or not torch.equal(torch.get_rng_state(), before[1]):
        random.setstate(before[0])
        torch.set_rng_state(before[1])
        raise Unsupported("a forward that draws random numbers")
    return graph


OF_TORCH = frozenset(nn.Module().__dict__) - {"training"}  # attributes of every module
PLAIN = frozenset({bool, int, float, str, type(None), torch.dtype, torch.device})
LONG = 100  # items; a trace costs less than a copy
BY_IDENTITY = (Tensor, nn.Module, type, types.FunctionType, types.BuiltinFunctionType, types.MethodType)


def _setting(value: Any, opaque: list[Any]) -> Any:
    """A copy of an attribute, to be compared later; what is long or of the user's own is added to ``opaque``."""
    if type(value) in PLAIN:
        return value
    if isinstance(value, list | tuple) and len(value) <= LONG:
        return [_setting(v, opaque) for v in value]
    if isinstance(value, dict) and len(value) <= LONG:
        return [(_setting(k, opaque), _setting(v, opaque)) for k, v in value.items()]
    if not isinstance(value, BY_IDENTITY):
        opaque.append(value)
    return id(value)


def _signature(modules: dict[str, nn.Module]) -> tuple[list[Any], bool]:
    """What a trace depends on: the modules, and the settings of those that are traced through; is that all of it?"""
    found: list[Any] = list(_modes()[1:])
    opaque: list[Any] = []
    for name, module in modules.items():
        found.append((name, id(module), type(module), module.__dict__.get("inplace")))
        if not _table_type(module):
            found.extend([(k, _setting(v, opaque)) for k, v in module.__dict__.items() if k not in OF_TORCH])
    return found, not opaque


def _single_call() -> fx.Graph:
    """The graph of a critic that is itself a module of the table."""
    graph = fx.Graph()
    graph.output(graph.call_module("", (graph.placeholder("x"),)))
    return graph


class Program:
    """A traced critic: nodes of torch.fx in order, checked as far as this is possible without inputs."""

    def __init__(self, net: nn.Module, modules: dict[str, nn.Module]) -> None:
        graph = _single_call() if _table_type(net) else _trace(net)
        self.nodes = list(graph.nodes)
        self.overwrite: set[fx.Node] = set()  # activations that may write over their input
        placeholders = [n for n in self.nodes if n.op == "placeholder"]
        for node in self.nodes:
            if node.op == "get_attr":
                raise Unsupported(f"a direct use of the parameter {node.target}")
            self._check_in_place(node, modules)
        if len(placeholders) != 1 or not isinstance(self.nodes[-1].args[0], fx.Node):
            raise Unsupported("a forward that does not take one tensor and return one")
        self.input, self.output = placeholders[0], self.nodes[-1].args[0]
        self.calls = [str(node.target) for node in self.nodes if node.op == "call_module"]
        foreign = [type(modules[name]).__name__ for name in self.calls if not _table_type(modules[name])]
        if foreign:
            raise Unsupported(foreign[0])
        self.steps = [(n, list(n.all_input_nodes)) for n in self.nodes if n.op not in ("placeholder", "output")]
        for node, inputs in self.steps:
            if node.op == "call_module" and (len(inputs) != 1 or len(node.args) != 1 or node.kwargs):
                raise Unsupported(f"a call of {node.target} with other arguments than one tensor")
        last = {n: i for i, (_, inputs) in enumerate(self.steps) for n in inputs}
        self.done = [[n for n in inputs if last[n] == i] for i, (_, inputs) in enumerate(self.steps)]

    def _check_in_place(self, node: fx.Node, modules: dict[str, nn.Module]) -> None:
        module: Any = modules.get(str(node.target)) if node.op == "call_module" else None
        before: Any = node.args[0] if node.args else None
        if not isinstance(before, fx.Node):
            return
        name = str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", "")
        changes = getattr(module, "inplace", False) or node.kwargs.get("inplace", False)
        if changes or node.target in ASSIGNED or (name.endswith("_") and not name.endswith("__")):
            source: Any = before
            while len(source.users) == 1 and self._may_share(source, modules):
                source = source.args[0]
            if len(source.users) > 1:
                raise Unsupported("an operation in place on a value that is used again")
        elif module is not None and len(before.users) == 1 and before.op == "call_module":
            fresh = isinstance(modules[str(before.target)], WEIGHTED)  # a value of its own
            self.overwrite |= {node} if fresh else set()

    def _may_share(self, node: fx.Node, modules: dict[str, nn.Module]) -> bool:
        """Whether a value may lie in the memory of the one that it is made of."""
        if not node.args or not isinstance(node.args[0], fx.Node):
            return False
        if node.op == "call_module":
            return isinstance(modules[str(node.target)], ALIASES)
        return node.op == "call_method" or getattr(node.target, "__name__", "") in MAPS


_PROGRAMS: weakref.WeakKeyDictionary[nn.Module, tuple[list[Any], Program | Unsupported]] = weakref.WeakKeyDictionary()


def program_of(net: nn.Module, modules: dict[str, nn.Module]) -> Program:
    """The trace of a critic, kept until one of its modules or settings changes. Raises Unsupported."""
    signature, complete = _signature(modules)
    known, found = _PROGRAMS.get(net, (None, None))
    if known != signature or (isinstance(found, Program) and not complete):
        try:
            found = Program(net, modules)
        except Unsupported as error:
            found = Unsupported(*error.args)  # without the traceback, which holds the critic
        _PROGRAMS[net] = (signature, found)
    if not isinstance(found, Program):
        raise Unsupported(*(() if found is None else found.args))
    return found
