"""Running both views through a module in one pass, with the batch statistics of two.

Two views of a batch can share one forward pass: one matrix product instead of two, half as many calls. Only layers that
look across the batch notice. Batch normalisation is such a layer: over both views together its statistics mix. Here
each ``nn.BatchNorm`` of the module normalises the halves one after the other while the pass runs, which gives the
values, the gradients and the running statistics of two passes.

Whether other code looks across the batch cannot be seen from outside. So the pass is shared by itself only if every
part is a layer of torch that is known not to (``ROWWISE``); anything else runs twice, unless the caller vouches for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

__all__ = ["VIEWS", "joins", "run_both", "run_joined", "uses_batch_statistics"]

VIEWS = ("auto", "apart", "split", "mixed")
# Exact types, as a subclass may do anything. Not here: layers that draw random numbers or choose their batch axis.
ROWWISE: frozenset[type[nn.Module]] = frozenset(
    {
        nn.Sequential, nn.Identity, nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding,
        nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.LayerNorm, nn.GroupNorm,
        nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d,
        nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d,
        nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d,
        nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Tanh,
        nn.Sigmoid, nn.LogSigmoid, nn.Softplus, nn.Softsign, nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid,
    }
)  # fmt: skip


def _looks_at_batch(m: nn.Module) -> bool:
    return isinstance(m, nn.modules.batchnorm._BatchNorm) and (m.training or m.running_mean is None)


def uses_batch_statistics(module: nn.Module) -> bool:
    """Whether the module holds a batch normalisation that would look at the batch now."""
    return any(map(_looks_at_batch, module.modules()))


def _is_rowwise(m: nn.Module) -> bool:
    """Whether one module, its children aside, is known to treat the rows one by one (batch normalisation apart)."""
    if type(m) is nn.Flatten:
        known = m.start_dim >= 1
    elif type(m) is nn.Embedding:
        known = m.max_norm is None  # which changes the weights in passing
    else:
        known = type(m) in ROWWISE
    return known and not (m._forward_hooks or m._forward_pre_hooks or "forward" in m.__dict__)


def joins(part: nn.Module, views: str) -> bool:
    """Whether the part may see both views in one pass."""
    if views == "apart" or (views != "mixed" and torch.compiler.is_compiling()):  # a trace cannot hold the exchange
        return False
    return views != "auto" or all(map(_is_rowwise, part.modules()))


def _halves(forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """What stands in for the forward of a batch normalisation: the same, for each half of the rows."""
    return lambda x: torch.cat([forward(half) for half in x.chunk(2)])


@contextmanager
def _split_statistics(part: nn.Module) -> Iterator[None]:
    exchanged = [(m, m.__dict__.get("forward")) for m in part.modules() if _looks_at_batch(m)]
    try:
        for m, _ in exchanged:
            m.__dict__["forward"] = _halves(m.forward)
        yield
    finally:
        for m, own in exchanged:
            if own is None:
                m.__dict__.pop("forward", None)
            else:
                m.__dict__["forward"] = own


def run_joined(part: nn.Module, both: Tensor, views: str) -> Tensor:
    """One pass over rows (2 B, ...) that hold the first view and then the second."""
    if views == "mixed":
        return part(both)
    with _split_statistics(part):
        return part(both)


def run_both(part: nn.Module, both: Tensor, views: str) -> Tensor:
    """The part's output for such rows, in one pass where :func:`joins` allows it, else in two."""
    if joins(part, views):
        return run_joined(part, both, views)
    return torch.cat([part(half) for half in both.chunk(2)])
