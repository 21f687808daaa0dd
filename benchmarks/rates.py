"""Steps of AdamW with groups of equal rate merged or not, and gradient transforms against loops over parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import Table, compare
from kexue.training import clip_norm, clip_value, gradient_transform, param_groups

SECTION = "Rates per layer and gradient transforms"
TENSORS, WIDTH = 200, 64


class Layers(nn.Module):
    """200 matrices of 64 x 64 in some numbered layers, with gradients."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.layers = nn.ModuleList(nn.ModuleDict() for _ in range(layers))
        for number in range(TENSORS):
            linear = nn.Linear(WIDTH, WIDTH, bias=False)
            linear.weight.data.normal_(0.0, 0.02, generator=generator)
            linear.weight.grad = torch.randn(WIDTH, WIDTH, generator=generator)
            self.layers[number * layers // TENSORS].add_module(str(number), linear)


def step(groups: list[dict[str, Any]], **options: Any) -> Callable[[], Any]:
    # torch writes its settings into the dicts that it is given.
    return torch.optim.AdamW([dict(group) for group in groups], lr=1e-3, **options).step


def each(model: nn.Module) -> list[dict[str, Any]]:
    """One group for each tensor, as recipes for layerwise decay often make."""
    return [{"params": [p], "lr": 1e-3, "weight_decay": 0.01} for p in model.parameters()]


def steps() -> list[Table]:
    model, deep = Layers(10), Layers(24)
    everything = [{"params": list(model.parameters()), "weight_decay": 0.01}]
    rules = {name: 1.0 for name, _ in model.named_parameters()}
    equal = param_groups(model, 1e-3, rules=rules)
    rates = param_groups(deep, 1e-3, layer_decay=0.9)
    peer = "fused, one group"
    return [
        compare(
            f"Step of AdamW, {TENSORS} tensors of {WIDTH} x {WIDTH}",
            "float32, one thread. The groups of param_groups were asked for with a rule for each tensor (equal rates), "
            "and with a decay over 24 layers (24 rates).",
            {
                peer: step(everything, fused=True),
                "fused, a group for each tensor": step(each(model), fused=True),
                f"fused, param_groups, {len(equal)} group of {len(rules)} rules": step(equal, fused=True),
                f"fused, param_groups, {len(rates)} rates": step(rates, fused=True),
                "default, one group": step(everything),
                "default, a group for each tensor": step(each(model)),
            },
            peer=peer,
            packages=("torch",),
            repeats=41,
        )
    ]


def pre_step(model: nn.Module, transform: Any) -> Callable[[], None]:
    """What a transform adds to a step: an optimizer that does nothing."""

    class Idle(torch.optim.Optimizer):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            return None

    optimizer = Idle(model.named_parameters(), {})
    gradient_transform(optimizer, {"*.weight": transform})
    return optimizer.step


def transforms() -> list[Table]:
    model = Layers(10)
    parameters = list(model.parameters())
    gradients: list[Tensor] = [p.grad for p in parameters if p.grad is not None]
    originals = [g.clone() for g in gradients]

    def fresh(function: Callable[[], Any]) -> Callable[[], None]:
        """The same gradients for every call, since clipped ones would not be clipped again."""

        def call() -> None:
            torch._foreach_copy_(gradients, originals)
            function()

        return call

    def loop_norm() -> None:
        for p in parameters:
            torch.nn.utils.clip_grad_norm_([p], 1.0)

    def loop_norm_by_hand() -> None:
        for p in parameters:
            if p.grad is not None:
                p.grad.mul_(torch.clamp(1.0 / (p.grad.norm() + 1e-6), max=1.0))

    def loop_value() -> None:
        for p in parameters:
            torch.nn.utils.clip_grad_value_([p], 0.5)

    def loop_value_by_hand() -> None:
        for p in parameters:
            if p.grad is not None:
                p.grad.clamp_(-0.5, 0.5)

    def python(name: str, parameter: Tensor, gradient: Tensor) -> Tensor:
        return gradient.clamp_(-0.5, 0.5)

    workload = (
        f"{TENSORS} gradients of {WIDTH} x {WIDTH}, float32, one thread; every norm is above the bound. The copy that "
        "brings the gradients back, the hook and its look-ups are included."
    )
    norm, value, copy = "loop with clip_grad_norm_([p])", "loop with clip_grad_value_([p])", "the copy alone"
    return [
        compare(
            "Clipping the norm of each tensor",
            workload,
            {
                norm: fresh(loop_norm),
                "loop by hand": fresh(loop_norm_by_hand),
                "clip_norm(per_tensor=True)": fresh(pre_step(model, clip_norm(1.0, per_tensor=True))),
                "clip_norm(per_tensor=True), bound not reached": fresh(
                    pre_step(model, clip_norm(1e6, per_tensor=True))
                ),
                "clip_norm, joint": fresh(pre_step(model, clip_norm(1.0))),
                "clip_grad_norm_, joint": fresh(lambda: torch.nn.utils.clip_grad_norm_(parameters, 1.0)),
                copy: fresh(lambda: None),
            },
            peer=norm,
            packages=("torch",),
            repeats=61,
        ),
        compare(
            "Clipping values",
            workload,
            {
                value: fresh(loop_value),
                "loop by hand": fresh(loop_value_by_hand),
                "clip_value": fresh(pre_step(model, clip_value(0.5))),
                "a function of one gradient": fresh(pre_step(model, python)),
                copy: fresh(lambda: None),
            },
            peer=value,
            packages=("torch",),
            repeats=61,
        ),
    ]


def run() -> list[Table]:
    """All comparisons of this room."""
    return [*steps(), *transforms()]
