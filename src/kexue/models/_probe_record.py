"""What a probe notes while the model runs: one record for each call of a module."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from kexue._tensors import compute_dtype
from kexue.attention.gated_attention import GatedAttentionUnit
from kexue.models._attention_watch import AttentionWatch, row_entropy

__all__ = ["Call", "Recorder", "first_float", "rms"]

_BLOCKS = (nn.ModuleList, nn.Sequential)


def rms(x: Tensor) -> float | None:
    """Root mean square of all entries, in float32 (float64 stays), without overflow or underflow; None of nothing."""
    x = x.detach()
    if x.is_nested:
        x = x.values()
    x = x.to_dense() if x.is_sparse else x
    if x.numel() == 0:
        return None
    wide = compute_dtype(x)
    norm = float(torch.linalg.vector_norm(x, dtype=wide))
    if not 1e-12 < norm < 1e18:  # squares may have left the range: once more, relative to the largest entry
        top = float(x.abs().amax())
        if top == 0 or not math.isfinite(top):
            return top
        norm = top * float(torch.linalg.vector_norm(x.to(wide) / top))
    return norm / math.sqrt(x.numel())


def first_float(value: Any) -> Tensor | None:
    """The first floating tensor of an output or of arguments: tensor, tuple, list, mapping or dataclass, nested."""
    if isinstance(value, Tensor):
        return value if value.is_floating_point() else None
    items: Any = ()
    if isinstance(value, Mapping):
        items = value.values()
    elif isinstance(value, tuple | list):
        items = value
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        items = [getattr(value, field.name) for field in dataclasses.fields(value)]
    return next((x for x in map(first_float, items) if x is not None), None)


@dataclasses.dataclass(eq=False)
class Call:
    """One call of a module.

    Attributes:
        name: Of the module.
        module: The module.
        depth: Number of calls around this one.
        stack: Key of the list of blocks that it is a member of, in this call of their owner; None: of none.
        inside: Whether a member of such a list is being called around this one.
        previous: The call before this one in the same list, unless both have the same input.
        source: First floating argument.
        rms_in: Of that argument.
        rms_out: Of the first floating tensor of the output; None: it has none, or none with entries.
        edge: Where the gradient of that tensor arrives.
        entropy: Sum over heads and queries that take part, and their number.
    """

    name: str
    module: nn.Module
    depth: int
    stack: tuple[str, int] | None
    inside: bool
    previous: Call | None
    source: Tensor | None
    rms_in: float | None
    rms_out: float | None = None
    edge: GradientEdge | None = None
    entropy: tuple[float, int] = (0.0, 0)

    @property
    def gain(self) -> float | None:
        """Output against what came before; see :func:`kexue.models.probe`."""
        base = self.rms_in if self.previous is None else self.previous.rms_out
        if self.rms_out is None or base is None:
            return None
        if base == 0:
            return math.nan if self.rms_out == 0 else math.inf
        return self.rms_out / base

    @property
    def mean_entropy(self) -> float | None:
        """Mean over heads and queries, None without any."""
        total, count = self.entropy
        return total / count if count else None


class Recorder:
    """Hooks on all modules of a model.

    Args:
        model: The model.
        masks: Tokens that take part, (B, T) bool, of the encoder (or the only part) and of the decoder; None: all.
    """

    def __init__(self, model: nn.Module, masks: tuple[Tensor | None, Tensor | None]) -> None:
        self.calls: list[Call] = []
        self._model, self._masks = model, masks
        self._active: list[Call] = []
        self._last: dict[tuple[str, int], Call] = {}
        self._paused = False
        self._watch = AttentionWatch(self._attended, lambda: len(self._active))

    @contextlib.contextmanager
    def record(self) -> Iterator[None]:
        """Record the calls made inside."""
        handles = []
        names = dict(self._model.named_modules())
        try:
            for name, module in names.items():
                if isinstance(module, torch.jit.ScriptModule):
                    continue  # takes no hooks
                parent = names.get(name.rpartition(".")[0]) if name else None
                stack = name.rpartition(".")[0] if isinstance(parent, _BLOCKS) else None
                handles.append(module.register_forward_pre_hook(self._enter(name, stack), with_kwargs=True))
                handles.append(module.register_forward_hook(self._leave, with_kwargs=True))
            with self._watch:
                yield
        finally:
            for handle in handles:
                handle.remove()
            self._active.clear()
            for call in self.calls:
                call.source = None

    def _enter(self, name: str, stack: str | None) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            if self._paused:
                return
            source = first_float((args, kwargs))
            around = self._active[-1] if self._active else None
            inside = around is not None and (around.inside or around.stack is not None)
            key = None if stack is None else (stack, id(around))
            previous = None if key is None else self._last.get(key)
            base = previous
            if previous is not None and source is not None and previous.source is source:
                base = None  # branches side by side, each reading the same tensor
            call = Call(
                name, module, len(self._active), key, inside, base, source, None if source is None else rms(source)
            )
            if key is not None:
                if previous is not None:
                    previous.source = None
                self._last[key] = call
            else:
                call.source = None
            self.calls.append(call)
            self._active.append(call)

        return hook

    def _leave(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        if self._paused or not any(call.module is module for call in self._active):
            return None
        while self._active[-1].module is not module:  # calls that raised an error which the model caught
            self._active.pop()
        call = self._active[-1]
        if isinstance(module, GatedAttentionUnit):
            self._gated(module, args, kwargs)
        self._active.pop()
        self._watch.leave(len(self._active) + 1)
        out = first_float(output)
        if out is None:
            return None
        call.rms_out = rms(out)
        if not out.requires_grad:
            return None
        if out is output and out._is_view():
            # what is written into a view in place rewrites the history of its base: the edge below would be cut off
            output = out = out.clone()
        call.edge = get_gradient_edge(out)
        return output

    def _gated(self, module: GatedAttentionUnit, args: Any, kwargs: Any) -> None:
        """The unit has no matrix of weights: compute it once more, without dropout."""
        if module.chunk_size is not None or module.normalization in ("relu2_n", "relu2_const"):
            return
        dropout, module.attention_dropout, self._paused = module.attention_dropout, 0.0, True
        try:
            with torch.no_grad(), torch._C.DisableTorchFunction():
                weights = module.attend(*args, **kwargs)[1]
        finally:
            module.attention_dropout, self._paused = dropout, False
        mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
        keep = None if mask is None or not module.self_attention else mask != 0
        self._attended(row_entropy(weights), keep, None)

    def _attended(self, entropies: Tensor, keep: Tensor | None, seen: Tensor | None) -> None:
        """Note the entropies (..., T) of an attention under the module that computes it."""
        if self._paused or not self._active:
            return
        plain = (nn.Softmax, nn.Dropout, nn.Identity)
        call = next(c for c in reversed(self._active) if not isinstance(c.module, plain) or c is self._active[0])
        mask = self._tokens(call, entropies)
        keep = mask if keep is None else keep if mask is None else mask & keep
        if mask is None and seen is not None:
            keep = seen if keep is None else keep & seen
        if keep is not None:
            entropies = entropies[keep.expand_as(entropies)]
        total, count = call.entropy
        call.entropy = (total + float(entropies.double().sum()), count + entropies.numel())

    def _tokens(self, call: Call, entropies: Tensor) -> Tensor | None:
        """The batch's own mask as (..., T) of this attention, None if it has none that fits."""
        mask = self._masks["decoder" in call.name.split(".")]
        t, lead = entropies.shape[-1], math.prod(entropies.shape[:-1])
        if mask is None or mask.shape[1] != t or lead % mask.shape[0]:
            return None
        repeated = mask.to(entropies.device).repeat_interleave(lead // mask.shape[0], 0)
        return repeated.view(entropies.shape)
