"""One optimizer step: forward, backward over its batches, the checks before the weights change."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kexue.training.order import seed_step


@contextmanager
def train_mode(model: nn.Module) -> Iterator[None]:
    """Training mode inside the block; every submodule gets its own flag back."""
    flags = [(module, module.training) for module in model.modules()]
    model.train()
    try:
        yield
    finally:
        for module, flag in flags:
            module.training = flag


def backward(
    model: nn.Module,
    batch_at: Callable[[int], Any],
    step: int,
    accumulate: int,
    seed: int,
    precision: str,
    device: torch.device,
    parameters: list[nn.Parameter],
) -> tuple[torch.Tensor, float]:
    """Gradients of one step: the mean over all items of its batches. Returns the loss and the number of items."""
    total: torch.Tensor | None = None
    weights = 0.0
    for number in range(step * accumulate, (step + 1) * accumulate):
        seed_step(seed, number, 0, device)
        batch = batch_at(number)
        if not isinstance(batch, Mapping):
            raise TypeError(f"batch {number} must be a dict of the model's arguments; got {type(batch).__name__}")
        batch = {k: v.to(device, non_blocking=True) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
        context: AbstractContextManager[Any] = nullcontext()
        if precision == "bf16":
            context = torch.autocast(device.type, torch.bfloat16)
        with context:
            loss, weight = _loss(model(**batch), batch)
        if weight == 0:
            continue  # nothing to predict: the mean over nothing would be NaN
        if accumulate == 1:
            loss.backward()
            return loss.detach(), weight
        part = loss * weight
        part.backward()
        total = part.detach() if total is None else total + part.detach()
        weights += weight
    if total is None:
        raise ValueError(f"step {step + 1} has nothing to predict: num_items is 0 in all of its {accumulate} batches")
    for p in parameters:
        if p.grad is not None:
            p.grad.div_(weights)
    return total / weights, weights


def _loss(output: Any, batch: Mapping[str, Any]) -> tuple[torch.Tensor, float]:
    """Loss and number of items from whatever the model returned."""
    items = None
    loss = output
    if isinstance(output, Mapping):
        loss, items = output.get("loss"), output.get("num_items")
    elif isinstance(output, (tuple, list)) and not hasattr(output, "loss"):
        loss = output[0] if output else None
    elif not isinstance(output, torch.Tensor):
        loss, items = getattr(output, "loss", None), getattr(output, "num_items", None)
    if not isinstance(loss, torch.Tensor):
        found = f"a {type(output).__name__}"
        if isinstance(output, Mapping):
            found += f" with {', '.join(map(str, output)) or 'no key'}"
        raise TypeError(
            "the model must return a scalar loss, an object or mapping with `loss`, or a tuple that begins with it; "
            f"got {found}"
        )
    if loss.numel() != 1:
        raise ValueError(f"the loss must be a scalar; got a tensor of shape {tuple(loss.shape)}")
    if not loss.requires_grad:
        raise ValueError("the loss does not depend on any trained parameter: it has no gradient")
    if items is None:
        items = next((len(v) for v in batch.values() if isinstance(v, torch.Tensor) and v.ndim), 1)
    return loss.reshape(()), float(items)


def clip_gradients(parameters: list[nn.Parameter], clip: float | None) -> torch.Tensor | None:
    """Norm of all gradients, after scaling the dense ones down to a norm of at most ``clip``."""
    if clip is None:
        return None
    dense, squares = [], []
    for p in parameters:
        if p.grad is None:
            continue
        if p.grad.layout is torch.strided:
            dense.append(p)
        else:
            p.grad = p.grad.coalesce()  # repeated rows add up before they are squared; the optimizer needs it as well
            squares.append(p.grad.values().float().square().sum())
    norm = torch.nn.utils.clip_grad_norm_(dense, clip)
    if squares:
        norm = torch.stack([norm.to(squares[0].device).float().square(), *squares]).sum().sqrt()
    return norm


def finite(loss: torch.Tensor, norm: torch.Tensor | None, step: int, folder: Path) -> tuple[float, float | None]:
    """Bring both numbers to the host; bad ones end the run before they reach the weights."""
    numbers = (loss.item(), None if norm is None else norm.item())
    for name, number in zip(("loss", "norm of the gradient"), numbers, strict=True):
        if number is not None and not math.isfinite(number):
            pointer = folder / "latest"
            saved = pointer.read_text(encoding="utf-8").strip() if pointer.exists() else None
            kept = f"the last checkpoint is {folder / saved}" if saved else "there is no checkpoint yet"
            raise FloatingPointError(
                f"the {name} is {number} in step {step + 1}, which was not applied; {kept}. Lower the learning rate, "
                "lengthen the warm-up, or look for bad values in the batch"
            )
    return numbers
