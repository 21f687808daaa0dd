"""Linear maps in 8-bit integers."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Int8Linear(nn.Module):
    """A linear map with int8 weights (one scale per output) and int8 inputs (one scale per row), summed exactly.

    Each row has a scale of its own, so that a result does not depend on what else is in the batch.
    """

    scale: Tensor
    weight: Tensor
    bias: Tensor | None

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        scale = linear.weight.detach().float().abs().amax(1).clamp(min=1e-12) / 127
        self.register_buffer("scale", scale)
        self.register_buffer("weight", (linear.weight.detach().float() / scale[:, None]).round().to(torch.int8).t())
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().float())

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D')."""
        rows = x.reshape(-1, x.shape[-1]).float()
        own = rows.abs().amax(1, keepdim=True).clamp(min=1e-12) / 127
        whole = torch._int_mm((rows / own).round_().to(torch.int8), self.weight)
        out = whole.float().mul_(own).mul_(self.scale)
        if self.bias is not None:
            out = out.add_(self.bias)
        return out.to(x.dtype).view(*x.shape[:-1], -1)


def quantized(model: nn.Module, folded: Sequence[nn.Module]) -> nn.Module:
    """A copy whose layers compute in int8; the embeddings, the pooler, the heads and ``folded`` do not."""
    if next(model.parameters()).device.type != "cpu" or not hasattr(torch, "_int_mm"):
        raise ValueError("precision 'int8' needs a model on the CPU and a torch with integer matrix products")
    kept = {"pooler", "cls", "next_sentence", "lm_head"}
    left = {id(part) for part in folded}
    names = [
        name
        for name, part in model.named_modules()
        if type(part) is nn.Linear and not kept & set(name.split(".")) and id(part) not in left
    ]
    model = copy.deepcopy(model)
    for name in names:
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, Int8Linear(model.get_submodule(name)))  # type: ignore[arg-type]
    return model
