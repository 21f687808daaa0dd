"""Gradient descent that can be played again: the loss, the optimiser's step as a pure function, and the stored path."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from kexue._progress import progress
from kexue.explain._layer_gram import Gradients

__all__ = ["Path", "Settings", "loss_and_gradient", "train"]


def loss_and_gradient(loss: str, out: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The mean loss over the samples and its gradient.

    Args:
        loss: "mse" (squared error, summed over the outputs), "bce" (logits; summed over the outputs) or "ce" (logits).
        out: (..., N, C).
        y: (..., N, C); for "ce" one-hot.

    Returns:
        Losses (...), gradients with respect to ``out`` (..., N, C).
    """
    n = out.shape[-2]
    if loss == "mse":
        off = out - y
        return off.square().sum((-2, -1)) / n, off * (2 / n)
    if loss == "bce":
        value = F.binary_cross_entropy_with_logits(out, y, reduction="none")
        return value.sum((-2, -1)) / n, (out.sigmoid() - y) / n
    log_p = out.log_softmax(-1)
    return -(log_p * y).sum((-2, -1)) / n, (log_p.exp() - y) / n


@dataclass(frozen=True)
class Settings:
    """How a model is trained."""

    loss: str
    lr: float
    steps: int
    momentum: float = 0.0
    weight_decay: float = 0.0
    optimizer: str = "sgd"
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    @property
    def decay(self) -> float:
        """By how much what an example gave to the buffer fades in a step."""
        return self.betas[0] if self.optimizer == "adam" else self.momentum

    @property
    def rate(self) -> float:
        """What the buffered shares are multiplied by, before Adam's scale."""
        return self.lr * (1 - self.betas[0]) if self.optimizer == "adam" else self.lr

    @property
    def buffers(self) -> int:
        """Vectors that the optimiser keeps."""
        return 2 if self.optimizer == "adam" else int(self.momentum > 0)


@dataclass
class Path:
    """The parameters at every step, stored or played again from checkpoints.

    Attributes:
        settings: How the model was trained.
        x: Training inputs (N, ...).
        y: Targets (N, C).
        batches: (S, n) rows of each step; None: all rows in each.
        checkpoints: Step -> parameters and buffers there.
        thetas: (S + 1, P), if stored.
        scales: (S, P) Adam's preconditioner, if stored.
        records: For each use of a layer its inputs and output gradients (S, ...), if stored.
        every: Steps between checkpoints; all steps where the path is stored.
        losses: (S,).
        last: Parameters after the training.
        steps: Steps that were done.
    """

    settings: Settings
    x: Tensor
    y: Tensor
    batches: Tensor | None
    every: int
    thetas: Tensor
    scales: Tensor | None
    records: list[tuple[Tensor, Tensor]] | None
    losses: Tensor
    last: Tensor
    checkpoints: dict[int, tuple[Tensor, list[Tensor]]] = field(default_factory=dict)
    steps: int = 0

    @property
    def first(self) -> Tensor:
        """Parameters before the training."""
        return self.checkpoints[0][0]

    @property
    def members(self) -> int:
        """Examples of a step."""
        return len(self.x) if self.batches is None else self.batches.shape[1]

    def rows(self, step: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets of a step."""
        if self.batches is None:
            return self.x, self.y
        return self.x[self.batches[step]], self.y[self.batches[step]]

    def segments(self, gradients: Gradients, backwards: bool) -> Iterator[tuple[int, Tensor, Tensor | None]]:
        """First step, parameters (L + 1, P) and scales (L, P) of consecutive parts of the path."""
        starts = range(0, self.steps, self.every)
        for start in reversed(starts) if backwards else starts:
            stop = min(start + self.every, self.steps)
            if self.every < self.settings.steps:
                theta, buffers = self.checkpoints[start]
                self.thetas[0] = theta
                for step in range(start, stop):
                    here = step - start
                    buffers, scale, _ = advance(self, gradients, step, self.thetas[here], buffers, self.thetas[here + 1])
                    if self.scales is not None and scale is not None:
                        self.scales[here] = scale
            count = stop - start
            yield start, self.thetas[: count + 1], None if self.scales is None else self.scales[:count]


def advance(
    path: Path, gradients: Gradients, step: int, theta: Tensor, buffers: list[Tensor], out: Tensor
) -> tuple[list[Tensor], Tensor | None, Tensor]:
    """One step of the optimiser from ``theta`` to ``out``: the new buffers, Adam's scale, and the loss before."""
    settings = path.settings
    x, y = path.rows(step)
    gradients.move(theta)
    with torch.enable_grad():
        logits = gradients.model(x).reshape(len(x), -1)
        loss, upstream = loss_and_gradient(settings.loss, logits.detach(), y)
        found = torch.autograd.grad(logits, gradients.parameters, upstream, allow_unused=True)
    flat = [
        g.reshape(-1) if g is not None else p.new_zeros(p.numel())
        for g, p in zip(found, gradients.parameters, strict=True)
    ]
    gradient = torch.cat(flat)
    if settings.weight_decay:
        gradient.add_(theta, alpha=settings.weight_decay)
    if settings.optimizer == "adam":
        (b1, b2), (m, v) = settings.betas, buffers
        m = m * b1 + gradient * (1 - b1)
        v = v * b2 + gradient.square() * (1 - b2)
        scale = ((v.sqrt() / math.sqrt(1 - b2 ** (step + 1)) + settings.eps) * (1 - b1 ** (step + 1))).reciprocal()
        torch.sub(theta, scale * m, alpha=settings.lr, out=out)
        return [m, v], scale, loss
    if settings.momentum:
        gradient = buffers[0] * settings.momentum + gradient
        buffers = [gradient]
    torch.sub(theta, gradient, alpha=settings.lr, out=out)
    return buffers, None, loss


def train(
    gradients: Gradients, settings: Settings, x: Tensor, y: Tensor, batches: Tensor | None, memory: int
) -> tuple[Path, KeyboardInterrupt | None]:
    """Train from the model's current parameters and keep the path.

    Args:
        gradients: The model.
        settings: How to train.
        x: (N, ...).
        y: (N, C).
        batches: (S, n) rows, or None for all rows in each step.
        memory: Bytes for the path; a longer one is kept as checkpoints, about sqrt(S) of them.

    Returns:
        The path, and the interruption that ended it early, if any.

    Raises:
        FloatingPointError: Parameters that are not finite.
    """
    theta, steps = gradients.theta(), settings.steps
    adam, width = settings.optimizer == "adam", theta.element_size()
    size = theta.numel() * width
    whole = size * (steps + 1 + adam * steps)
    every = steps if whole <= memory else math.ceil(math.sqrt(steps))
    path = Path(
        settings,
        x,
        y,
        batches,
        every,
        theta.new_empty(every + 1, theta.numel()),
        theta.new_empty(every, theta.numel()) if adam else None,
        None,
        torch.empty(steps, dtype=torch.float64),
        theta,
    )
    stored = every == steps
    recorder = None
    if stored and not gradients.loose and whole + path.members * steps * gradients.floats_per_row() * width <= memory:
        recorder = _Recorder(gradients, steps, batches is None)
        path.records = recorder.store
    buffers = [torch.zeros_like(theta) for _ in range(settings.buffers)]
    path.thetas[0] = theta
    interruption = None
    try:
        with progress("training", steps) as bar:
            for step in range(steps):
                here = step % every
                if here == 0:
                    path.checkpoints[step] = (path.thetas[0 if step == 0 else every].clone(), buffers)
                    path.thetas[0] = path.checkpoints[step][0]
                if recorder is not None:
                    with recorder.at(step):
                        result = advance(path, gradients, step, path.thetas[here], buffers, path.thetas[here + 1])
                else:
                    result = advance(path, gradients, step, path.thetas[here], buffers, path.thetas[here + 1])
                buffers, scale, loss = result
                if not bool(torch.isfinite(path.thetas[here + 1]).all()):
                    raise FloatingPointError(
                        f"training diverged at step {step + 1} of {steps}: parameters that are not finite, loss "
                        f"{float(loss):g} before the step; use a smaller lr than {settings.lr:g}"
                    )
                if path.scales is not None and scale is not None:
                    path.scales[here] = scale
                path.losses[step] = loss
                path.steps = step + 1
                bar.advance(1, None)
    except KeyboardInterrupt as stop:
        interruption = stop
    here = path.steps - (path.steps - 1) // every * every if path.steps else 0
    path.last = path.thetas[here].clone()
    path.losses = path.losses[: path.steps]
    return path, interruption


class _Recorder:
    """Writes what the training steps leave at the layers, so that it need not be computed again."""

    def __init__(self, gradients: Gradients, steps: int, whole: bool) -> None:
        self._gradients = gradients
        self._fixed = [use.constant and whole for use in gradients.uses]
        self.store: list[tuple[Tensor, Tensor]] = []
        self._steps = steps

    def at(self, step: int) -> AbstractContextManager[None]:
        """Record what the model does in this block as the given step."""
        call = [0]

        def tap(_number: int, a: Tensor, z: Tensor) -> None:
            number = call[0]
            call[0] += 1
            if step == 0:
                kept = 1 if self._fixed[number] else self._steps
                self.store.append((a.new_empty(kept, *a.shape), z.new_zeros(self._steps, *z.shape)))
            inputs, grads = self.store[number]
            if step == 0 or not self._fixed[number]:
                inputs[step if not self._fixed[number] else 0] = a.detach()
            z.register_hook(lambda g: _write(grads[step], g))

        return self._gradients.tapped(tap)


def _write(place: Tensor, value: Tensor) -> None:
    place.copy_(value)
