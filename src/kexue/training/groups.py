"""Layerwise learning rates (分层的学习率) by parameter groups, for any optimizer of torch.

Source: 科学空间 6418, "让Keras更酷一些!":分层的学习率和自由的梯度. The article rescales weights so that a layer
learns at another rate (``scaled_rates.py`` has this); torch gives each group of parameters its own rate, which is exact
for every optimizer. So the groups are what is made here:

    rate = lr * layer_decay^(depth of the head - depth of the layer) * (product of the rules that match)

What we do differently: parameters with equal rate and decay share one group. One group per tensor, which recipes for
layerwise decay often make, takes the fused kernels of torch apart and costs 6 to 8 times as much per step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from kexue._checks import check_real
from kexue.training.depths import layer_depths, parameter_names
from kexue.training.optimizers import undecayed

__all__ = ["param_groups"]


def check_pattern(role: str, pattern: Any, names: Iterable[str]) -> None:
    """Raise unless ``pattern`` is a glob that matches a name."""
    if not isinstance(pattern, str):
        raise TypeError(f"a pattern of {role} must be a str; got {pattern!r}")
    names = list(names)
    if not any(fnmatchcase(name, pattern) for name in names):
        shown = ", ".join(map(repr, names[:3] + names[-2:] if len(names) > 5 else names))
        raise ValueError(f"the pattern {pattern!r} of {role} matches no parameter; the names are like {shown}")


def _check(lr: Any, layer_decay: Any, rules: Any, weight_decay: Any, no_decay: Any, names: list[str]) -> None:
    check_real("lr", lr, minimum=0.0)
    check_real("weight_decay", weight_decay, minimum=0.0)
    if layer_decay is not None:
        check_real("layer_decay", layer_decay, above=0.0)
        if layer_decay > 1:
            raise ValueError(f"layer_decay must be at most 1; got {layer_decay!r}")
    if not isinstance(rules, Mapping):
        raise TypeError(f"rules must map patterns to multipliers; got {type(rules).__name__}")
    for pattern, multiplier in rules.items():
        check_pattern("rules", pattern, names)
        check_real(f"the multiplier of {pattern!r}", multiplier, minimum=0.0)
    for pattern in no_decay:
        check_pattern("no_decay", pattern, names)


def param_groups(
    model: nn.Module,
    lr: float,
    layer_decay: float | None = None,
    rules: Mapping[str, float] | None = None,
    weight_decay: float = 0.01,
    no_decay: Iterable[str] | None = None,
    *,
    where: Callable[[str, nn.Parameter], bool] | None = None,
) -> list[dict[str, Any]]:
    """Groups of parameters with a rate per layer and per name, for any optimizer.

    Every parameter that requires a gradient is in one group, tied ones once; frozen ones are in none. There are at most
    two groups for each distinct rate, in the order of the model's parameters. The groups hold ``(name, parameter)``
    pairs, so that the optimizer knows the names (``group["param_names"]``).

    Weight decay acts on matrices only, not on biases, other vectors and norms. Embeddings decay, unlike in
    :func:`default_optimizers` (those with sparse gradients cannot); name them in ``no_decay`` if they should not.
    Schedulers, :func:`fit` and transformers' Trainer (``optimizers=(optimizer, None)``) scale the rate of each group
    and keep their ratios.

    Args:
        model: The model.
        lr: Rate of the head, and of everything without ``layer_decay``.
        layer_decay: Factor from each layer to the one before, in (0, 1]; None gives all layers the same rate.
            :func:`layer_depths` shows which depth a parameter has: the head has rate ``lr``, the pooler counts as the
            last layer, embeddings have depth 0.
        rules: Glob pattern of names (``*`` matches dots too) -> multiplier of the rate that ``layer_decay`` gives. The
            rules that match one parameter are multiplied. 0 keeps it where it is as long as the optimizer scales every
            change by the rate, as those of torch do. A tied tensor is matched under each of its names.
        weight_decay: Decay of the matrices; as a setting of the groups it takes precedence over the optimizer's.
        no_decay: Patterns of further names without decay.
        where: Only the parameters for which ``where(name, parameter)`` is true; for optimizers of certain shapes, such
            as Muon, beside a second one for the rest.

    Returns:
        A list of dicts with the keys params, lr and weight_decay.

    Raises:
        TypeError: An argument is of the wrong kind.
        ValueError: A number is out of range, a pattern matches nothing, or there is nothing to train.

    Reference:
        https://spaces.ac.cn/archives/6418

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> groups = param_groups(model, lr=1.0, layer_decay=0.5, rules={"3.*": 10})
        >>> for group in groups:
        ...     print([name for name, _ in group["params"]], group["lr"], group["weight_decay"])
        ['0.weight'] 0.25 0.01
        ['1.weight'] 0.5 0.01
        ['1.bias'] 0.5 0.0
        ['3.weight'] 10.0 0.01
        ['3.bias'] 10.0 0.0
        >>> optimizer = torch.optim.AdamW(groups, fused=True)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module; got {type(model).__name__}")
    if where is not None and not callable(where):
        raise TypeError(f"where must be a function of name and parameter; got {where!r}")
    rules = {} if rules is None else rules
    no_decay = [] if no_decay is None else no_decay
    if isinstance(no_decay, str) or not isinstance(no_decay, Iterable):
        raise TypeError(f"no_decay must be a list of patterns; got {no_decay!r}")
    no_decay = list(no_decay)
    names = parameter_names(model)
    _check(lr, layer_decay, rules, weight_decay, no_decay, [name for every in names.values() for name in every])
    depths = None if layer_decay is None else layer_depths(model)
    spared = undecayed(model, embeddings=True)
    groups: dict[tuple[str, float], dict[str, Any]] = {}
    for name, p in model.named_parameters():
        if not p.requires_grad or not (where is None or where(name, p)):
            continue
        factors = [float(m) for pattern, m in rules.items() if any(fnmatchcase(n, pattern) for n in names[name])]
        rate = float(lr) * math.prod(factors)
        if depths is not None and layer_decay is not None:
            rate *= float(layer_decay) ** (depths.head - depths.depth[name])
        if not math.isfinite(rate):
            raise ValueError(f"the rate of {name!r} must be finite; got {rate} from lr={lr} and multipliers {factors}")
        free = p in spared or any(fnmatchcase(n, pattern) for pattern in no_decay for n in names[name])
        decay = 0.0 if free else float(weight_decay)
        # Equal rates that were reached by different products differ in their last bits only.
        group = groups.setdefault((f"{rate:.12e}", decay), {"params": [], "lr": rate, "weight_decay": decay})
        group["params"].append((name, p))
    if not groups:
        chosen = "" if where is None else " and for which where is true"
        raise ValueError(f"the model has no parameter that requires a gradient{chosen}; got {type(model).__name__}")
    return list(groups.values())
