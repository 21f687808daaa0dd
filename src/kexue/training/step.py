"""One optimizer step: forward, backward over its batches, the checks before the weights change."""

from __future__ import annotations

import math
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kexue.training.numbering import Numbering
from kexue.training.order import seed_step
from kexue.training.strategies import Distributed, OneProcess, whole


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


def has_bf16(device: torch.device) -> bool:
    """Whether the device computes in bfloat16 without emulating it."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":  # torch has no public name for these
        names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        return any(bool(getattr(torch.cpu, name, bool)()) for name in names)
    return False


@dataclass
class Sum:
    """What the batches of one step add up to.

    Args:
        loss: Mean over all items.
        items: Predicted items.
        tokens: Entries of ``input_ids``; None without them.
        signal: SIGINT or SIGTERM, if a rank got one.
    """

    loss: torch.Tensor | float
    items: float
    tokens: int | None
    signal: int | None = None


class Stepper:
    """Computes the gradient of a step.

    Args:
        strategy: Gives the loss of a batch.
        numbering: Gives the batch.
        seed: Seed of the noise.
        device: Device of the model.
        autocast: Low precision of the forward pass, or None.
        parameters: What is trained.
    """

    def __init__(
        self,
        strategy: OneProcess,
        numbering: Numbering,
        seed: int,
        device: torch.device,
        autocast: torch.dtype | None,
        parameters: list[nn.Parameter],
    ) -> None:
        self.strategy = strategy
        self.numbering = numbering
        self.seed = seed
        self.device = device
        self.autocast = autocast
        self.parameters = parameters
        self.retry: Callable[[BaseException], bool] = lambda error: False
        self.tokens: int | None = None

    def _batch(self, number: int) -> Mapping[str, Any]:
        batch = self.numbering.batch_at(number)
        if not isinstance(batch, Mapping):
            raise TypeError(f"batch {number} must be a dict of the model's arguments; got {type(batch).__name__}")
        ids = batch.get("input_ids")
        if isinstance(ids, torch.Tensor):
            self.tokens = (self.tokens or 0) + ids.numel()
        return {
            k: v.to(self.device, non_blocking=True) if isinstance(v, torch.Tensor) and v.device != self.device else v
            for k, v in batch.items()
        }

    def _forward(self, batch: Mapping[str, Any]) -> tuple[torch.Tensor, float]:
        context: AbstractContextManager[Any] = nullcontext()
        if self.autocast is not None:
            context = torch.autocast(self.device.type, self.autocast)
        with context:
            return self.strategy.loss(batch)

    def _loss(self, batch: Mapping[str, Any], number: int, rank: int) -> tuple[torch.Tensor, float]:
        try:
            return self._forward(batch)
        except Exception as error:
            if not self.retry(error):
                raise
        seed_step(self.seed, number, rank, self.device)
        return self._forward(batch)

    def __call__(self, step: int, signal_here: int | None, failure: Exception | None) -> Sum:
        """Gradient of one step.

        Args:
            step: Its number, from 0.
            signal_here: The signal that this rank has got.
            failure: What this rank has to report to the others.
        """
        if isinstance(self.strategy, Distributed):
            return self.together(self.strategy, step, signal_here, failure)
        return self.alone(step)

    def alone(self, step: int) -> Sum:
        """Gradient of one step in one process: the mean over all items of its batches."""
        total: torch.Tensor | None = None
        weights = 0.0
        accumulate = self.numbering.accumulate
        self.tokens = None
        for place in range(accumulate):
            number, rank = self.numbering.place(step, place)
            seed_step(self.seed, number, rank, self.device)
            batch = self._batch(number)
            loss, weight = self._loss(batch, number, rank)
            if weight == 0:
                continue  # nothing to predict: the mean over nothing would be NaN
            if accumulate == 1:
                loss.backward()
                return Sum(loss.detach(), weight, self.tokens)
            part = loss * weight
            part.backward()
            total = part.detach() if total is None else total + part.detach()
            weights += weight
        if total is None:
            raise ValueError(
                f"step {step + 1} has nothing to predict: num_items is 0 in all of its {accumulate} batches"
            )
        for p in self.parameters:
            if p.grad is not None:
                p.grad.div_(weights)
        return Sum(total / weights, weights, self.tokens)

    def together(self, strategy: Distributed, step: int, signal_here: int | None, failure: Exception | None) -> Sum:
        """The same with several processes: the mean over all items of all ranks, the same on each of them.

        What fails on one rank before its backward pass is known to all when the gradients have been summed.
        """
        processes = self.numbering.processes
        total: torch.Tensor | float = 0.0
        weights = 0.0
        self.tokens = None
        for place in range(self.numbering.accumulate):
            last = place == self.numbering.accumulate - 1
            with strategy.reduction(last):
                loss, weight = None, 0.0
                if failure is None:
                    try:
                        loss, weight = self._one(strategy, step, place)
                    except Exception as error:
                        if not strategy.can_idle:
                            raise
                        failure = error
                if loss is None and last:
                    loss = strategy.idle()
                if loss is not None:
                    part = loss * weight
                    part.backward()
                    if weight:
                        total = total + part.detach()
                        weights += weight
        total, weights, tokens, silent, failed, interrupts, terminations = processes.totals(
            float(total),
            weights,
            self.tokens or 0,
            self.tokens is None,
            failure is not None,
            signal_here == signal.SIGINT,
            signal_here == signal.SIGTERM,
        )
        processes.agree(failure, f"in step {step + 1}", failed > 0)
        if weights == 0:
            raise ValueError(
                f"step {step + 1} has nothing to predict: num_items is 0 in all of its {self.numbering.accumulate} "
                f"batches on all {processes.world} ranks"
            )
        scale_gradients(self.parameters, strategy.divides / weights)
        received = signal.SIGINT if interrupts else signal.SIGTERM if terminations else None
        return Sum(total / weights, weights, None if silent == processes.world else int(tokens), received)

    def _one(self, strategy: Distributed, step: int, place: int) -> tuple[torch.Tensor, float]:
        number, rank = self.numbering.place(step, place)
        seed_step(self.seed, number, rank, self.device)
        batch: Mapping[str, Any] = {}
        caught: Exception | None = None
        try:
            batch = self._batch(number)
        except Exception as error:
            caught = error
        strategy.fetched(caught, step)
        if caught is not None:
            raise caught
        return self._loss(batch, number, rank)


def scale_gradients(parameters: list[nn.Parameter], factor: float) -> None:
    """Multiply all gradients by ``factor``."""
    dense = []
    for p in parameters:
        if p.grad is None:
            continue
        if p.grad.layout is torch.strided:
            dense.append(p.grad)
        else:
            p.grad.mul_(factor)
    if dense:
        torch._foreach_mul_(dense, factor)


def read_loss(output: Any, batch: Mapping[str, Any]) -> tuple[torch.Tensor, float]:
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
    items = float(items)
    if not 0 <= items < math.inf:
        raise ValueError(f"num_items must be the number of predicted items, at least 0; got {items}")
    return loss.reshape(()), items


def clip_gradients(parameters: list[nn.Parameter], clip: float | None) -> torch.Tensor:
    """Norm of all gradients before the dense ones are scaled down to a norm of at most ``clip``, if there is one."""
    dense, squares = [], []
    for p in parameters:
        if p.grad is None:
            continue
        if p.grad.layout is torch.strided:
            dense.append(p)
        else:
            p.grad = _coalesced(p.grad)  # repeated rows add up before they are squared; the optimizer needs it as well
            squares.append(p.grad.values().float().square().sum())
    if clip is None:
        norm = whole(torch.nn.utils.get_total_norm([p.grad for p in dense if p.grad is not None]))
    else:
        norm = whole(torch.nn.utils.clip_grad_norm_(dense, clip))
    if squares:
        norm = torch.stack([norm.to(squares[0].device).float().square(), *squares]).sum().sqrt()
    return norm


def _coalesced(gradient: torch.Tensor) -> torch.Tensor:
    """The sparse gradient with each row once. autograd forgets when it is so already, and sorting is dear."""
    rows = gradient._indices()
    if gradient.sparse_dim() == 1 and bool((rows[0, 1:] > rows[0, :-1]).all()):
        return torch.sparse_coo_tensor(
            rows, gradient._values(), gradient.shape, is_coalesced=True, check_invariants=False
        )
    return gradient.coalesce()


def finite(loss: torch.Tensor | float, norm: torch.Tensor, step: int, folder: Path) -> tuple[float, float]:
    """Bring both numbers to the host; bad ones end the run before they reach the weights."""
    numbers = (float(loss), norm.item())
    for name, number in zip(("loss", "norm of the gradient"), numbers, strict=True):
        if not math.isfinite(number):
            pointer = folder / "latest"
            saved = pointer.read_text(encoding="utf-8").strip() if pointer.exists() else None
            kept = f"the last checkpoint is {folder / saved}" if saved else "there is no checkpoint yet"
            raise FloatingPointError(
                f"the {name} is {number} in step {step + 1}, which was not applied; {kept}. Lower the learning rate, "
                "lengthen the warm-up, or look for bad values in the batch"
            )
    return numbers
