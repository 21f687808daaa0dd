"""Gradient descent that can be played again: the loss, the optimiser's step as a pure function, and the stored path."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from kexue._progress import progress
from kexue.explain._layer_gram import Gradients

__all__ = ["Path", "Settings", "loss_gradient", "loss_of", "train"]
_CHECK = 16  # steps between checks for numbers that are not finite


def loss_of(loss: str, out: Tensor, y: Tensor) -> Tensor:
    """The mean loss over the samples.

    Args:
        loss: "mse" (squared error, summed over the outputs), "bce" (logits; summed over the outputs) or "ce" (logits).
        out: (N, C).
        y: (N, C); for "ce" one-hot.
    """
    if loss == "mse":
        return (out - y).square().sum() / len(out)
    if loss == "bce":
        return F.binary_cross_entropy_with_logits(out, y, reduction="sum") / len(out)
    return -(out.log_softmax(-1) * y).sum() / len(out)


def loss_gradient(loss: str, out: Tensor, y: Tensor) -> Tensor:
    """The gradient of the mean loss with respect to the outputs (..., N, C), at any number of points at once."""
    n = out.shape[-2]
    if loss == "mse":
        return (out - y) * (2 / n)
    return ((out.sigmoid() if loss == "bce" else out.softmax(-1)) - y) / n


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
        every: Steps between checkpoints; all steps where the path is stored.
        thetas: (every + 1, P) parameters, from the last checkpoint on.
        scales: (every, P) Adam's preconditioner there.
        last: Parameters after the training.
        checkpoints: Step -> parameters and buffers before it.
        losses: (S,) before each step, float64.
        steps: Steps that were done.
    """

    settings: Settings
    x: Tensor
    y: Tensor
    batches: Tensor | None
    every: int
    thetas: Tensor
    scales: Tensor | None
    last: Tensor
    checkpoints: dict[int, tuple[Tensor, list[Tensor]]] = field(default_factory=dict)
    losses: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.float64))
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
                self.thetas[0], buffers = self.checkpoints[start]
                for step in range(start, stop):
                    buffers, _ = advance(self, gradients, step, step - start, buffers)
            count = stop - start
            yield start, self.thetas[: count + 1], None if self.scales is None else self.scales[:count]


def advance(
    path: Path, gradients: Gradients, step: int, here: int, buffers: list[Tensor]
) -> tuple[list[Tensor], Tensor]:
    """One step of the optimiser from row ``here`` of the path to the next: the new buffers, and the loss before."""
    theta, out = path.thetas[here], path.thetas[here + 1]
    settings = path.settings
    x, y = path.rows(step)
    gradients.move(theta)
    with torch.enable_grad():
        logits = gradients.model(x).reshape(len(x), -1)
        values = logits.detach()
        loss, upstream = loss_of(settings.loss, values, y), loss_gradient(settings.loss, values, y)
        found = torch.autograd.grad(logits, gradients.parameters, upstream, allow_unused=True)
    flat = [
        p.new_zeros(p.numel()) if g is None else g.reshape(-1) for g, p in zip(found, gradients.parameters, strict=True)
    ]
    if settings.weight_decay:  # parameters that are not used do not decay, as in torch.optim
        own = theta.split(gradients.sizes)
        flat = [
            f if g is None else f.add(v, alpha=settings.weight_decay) for f, g, v in zip(flat, found, own, strict=True)
        ]
    gradient = torch.cat(flat)
    if settings.optimizer == "adam":
        (b1, b2), (m, v) = settings.betas, buffers
        m = m * b1 + gradient * (1 - b1)
        v = v * b2 + gradient.square() * (1 - b2)
        scale = ((v.sqrt() / math.sqrt(1 - b2 ** (step + 1)) + settings.eps) * (1 - b1 ** (step + 1))).reciprocal()
        path.scales[here] = scale  # type: ignore[index]
        torch.sub(theta, scale * m, alpha=settings.lr, out=out)
        return [m, v], loss
    if settings.momentum:
        gradient = buffers[0] * settings.momentum + gradient
        buffers = [gradient]
    torch.sub(theta, gradient, alpha=settings.lr, out=out)
    return buffers, loss


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
    theta, steps, adam = gradients.theta(), settings.steps, settings.optimizer == "adam"
    fits = theta.numel() * theta.element_size() * (steps + 1 + adam * steps) <= memory
    every = steps if fits else math.ceil(math.sqrt(steps))
    path = Path(
        settings,
        x,
        y,
        batches,
        every,
        thetas=theta.new_empty(every + 1, theta.numel()),
        scales=theta.new_empty(every, theta.numel()) if adam else None,
        last=theta,
    )
    buffers = [torch.zeros_like(theta) for _ in range(settings.buffers)]
    losses: list[Tensor] = []
    interruption, checked = None, 0
    try:
        with progress("training", steps) as bar:
            for step in range(steps):
                here = step % every
                if here == 0:
                    path.checkpoints[step] = (path.last, buffers)
                    path.thetas[0] = path.last
                buffers, loss = advance(path, gradients, step, here, buffers)
                losses.append(loss)
                path.steps = step + 1
                if here + 1 == every or path.steps % _CHECK == 0:
                    path.last = path.thetas[here + 1].clone()
                    _check_finite(path, checked, losses)
                    checked = path.steps
                bar.advance()
    except KeyboardInterrupt as stop:
        interruption = stop
    if path.steps > checked:
        path.last = path.thetas[(path.steps - 1) % every + 1].clone()
        _check_finite(path, checked, losses)
    if losses:
        path.losses = torch.stack(losses[: path.steps]).double()
    return path, interruption


def _check_finite(path: Path, checked: int, losses: list[Tensor]) -> None:
    """Raise FloatingPointError if one of the steps after the first ``checked`` ones left a parameter not finite."""
    start = checked % path.every
    made = path.thetas[start + 1 : start + 1 + path.steps - checked]
    finite = torch.isfinite(made).all(1)
    if not bool(finite.all()):
        step = checked + int((~finite).nonzero()[0])
        raise FloatingPointError(
            f"training diverged at step {step + 1} of {path.settings.steps}: its parameters are not finite (loss "
            f"{float(losses[step]):g} before it); use a smaller lr than {path.settings.lr:g}"
        )
