"""Which modules are normalizations, those of other makers included, and how their gain counts."""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn

__all__ = ["NORMS", "is_norm", "neutral_gain"]

NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)
_CALLED = re.compile(r"norm(?!al)", re.I)  # T5LayerNorm, LlamaRMSNorm, ...; not Normalize or NormalizedLinear


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a norm of torch, or one without submodules that is called a norm and has vectors only.

    A matrix makes it something else, whatever it is called (a "NormLinear").
    """
    if isinstance(module, NORMS):
        return True
    vectors = all(p.numel() == max(p.shape, default=1) for p in module.parameters(recurse=False))
    return bool(_CALLED.search(type(module).__name__)) and vectors and next(module.children(), None) is None


@torch.no_grad()
def neutral_gain(module: nn.Module, name: str, weight: Tensor) -> float:
    """The gain of a norm that changes nothing: 1, or 0 where the module computes (1 + weight) x, as Gemma's does."""
    if isinstance(module, NORMS) or weight.dim() != 1 or not len(weight):
        return 1.0
    x = torch.linspace(-1, 1, len(weight), device=weight.device).to(weight.dtype)[None, None] + 0.01
    try:
        out = torch.func.functional_call(module, {name: torch.ones_like(weight)}, (x,))
        return 0.0 if 1.9 < float(out.float().square().mean().sqrt()) < 2.1 else 1.0
    except Exception:  # it wants something else to be called: nothing is known about it, so the usual reading
        return 1.0
