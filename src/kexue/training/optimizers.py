"""Which optimizer trains which parameter."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from kexue.models._norms import NORMS
from kexue.training.depths import EMBEDDINGS, owner

__all__ = ["default_optimizers"]

OptimizerSpec = Optimizer | Sequence[Optimizer] | Callable[[list[nn.Parameter]], Any]

_DEFAULT_LR = 1e-3


def trained(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that require a gradient; ValueError if there are none."""
    found = [p for p in model.parameters() if p.requires_grad]
    if not found:
        raise ValueError(f"the model has no parameter that requires a gradient; got {type(model).__name__}")
    return found


def undecayed(model: nn.Module, embeddings: bool = False) -> set[nn.Parameter]:
    """Parameters without weight decay: biases and other vectors, norms, and embeddings.

    Args:
        model: The model.
        embeddings: Let embeddings decay, except those with sparse gradients, to which torch cannot add a decay.
    """
    kinds = dict(model.named_modules(remove_duplicate=False))
    spared = set()
    for name, p in model.named_parameters(remove_duplicate=False):
        kind = kinds[owner(name)]
        table = isinstance(kind, EMBEDDINGS) and (not embeddings or kind.sparse)
        if p.ndim < 2 or table or isinstance(kind, NORMS):
            spared.add(p)
    return spared


def default_optimizers(model: nn.Module, lr: float = _DEFAULT_LR, weight_decay: float = 0.01) -> list[Optimizer]:
    """AdamW for a model, and SparseAdam for the tables whose gradients are sparse.

    Weight decay acts on matrices only: not on biases and other vectors, norms and embeddings (also not on an output
    layer that shares its weight with an embedding). The fused kernel is used where it exists.

    Args:
        model: Module whose parameters with ``requires_grad`` are trained.
        lr: Learning rate of all groups.
        weight_decay: Decay of the matrices.

    Returns:
        One or two optimizers; embeddings built with ``sparse=True`` belong to the second kind.

    Raises:
        ValueError: Nothing in the model can be trained.

    Example:
        >>> model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 2))
        >>> [(len(g["params"]), g["weight_decay"]) for o in default_optimizers(model) for g in o.param_groups]
        [(1, 0.01), (2, 0.0)]
        >>> [type(o).__name__ for o in default_optimizers(nn.EmbeddingBag(10, 4, sparse=True))]
        ['SparseAdam']
    """
    sparse: set[nn.Parameter] = set()
    for module in model.modules():
        if isinstance(module, EMBEDDINGS) and module.sparse:
            sparse.update(module.parameters(recurse=False))
    every = trained(model)
    tables = [p for p in every if p in sparse]
    dense = [p for p in every if p not in sparse]
    spared = undecayed(model)
    groups = [
        {"params": [p for p in dense if p not in spared], "weight_decay": weight_decay},
        {"params": [p for p in dense if p in spared], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    optimizers: list[Optimizer] = []
    if groups:
        fused = all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for p in dense)
        optimizers.append(torch.optim.AdamW(groups, lr=lr, fused=fused))
    if tables:
        optimizers.append(torch.optim.SparseAdam(tables, lr=lr))
    return optimizers


def build_optimizers(
    model: nn.Module, spec: OptimizerSpec | None, lr: float | None, weight_decay: float
) -> list[Optimizer]:
    """Optimizers from what the user gave: nothing, one, several, or a function of the parameters."""
    every = trained(model)
    if spec is None:
        return default_optimizers(model, _DEFAULT_LR if lr is None else lr, weight_decay)
    made = spec
    if not isinstance(spec, Optimizer) and callable(spec):
        made = spec(every)
    optimizers = [made] if isinstance(made, Optimizer) else made
    if not isinstance(optimizers, Sequence) or not optimizers or not all(isinstance(o, Optimizer) for o in optimizers):
        raise TypeError(
            "optimizer must be a torch Optimizer, a non-empty list of them, or a callable params -> one of these; "
            f"got {made!r}"
        )
    known = set(model.parameters())
    owned: set[nn.Parameter] = set()
    for p in (p for o in optimizers for group in o.param_groups for p in group["params"]):
        if p not in known:
            raise ValueError(
                f"an optimizer holds a parameter of shape {tuple(p.shape)} that is not in the model, so it would not "
                "be saved; put the model and its loss into one Module"
            )
        if p in owned:
            raise ValueError(f"a parameter of shape {tuple(p.shape)} belongs to two optimizers")
        owned.add(p)
    rates = {float(group["lr"]) for o in optimizers for group in o.param_groups}
    if lr is not None and lr not in rates:
        warnings.warn(
            f"lr={lr} is not used: the given optimizer sets its own rates ({', '.join(map(str, sorted(rates)))})",
            stacklevel=3,
        )
    return list(optimizers)
