"""The training loop (训练循环): exact resume, atomic checkpoints, progress, metrics, orderly interruption.

    for step in range(start, steps):
        seed the generators from (seed, step, rank)
        loss = model(**batches(step));  loss.backward();  clip;  optimizer.step();  one line of metrics
        save every so many steps, and when a signal came

Everything that a step needs is a function of its number, so that resuming means: load the last checkpoint, go on. A run
that was killed ends with the weights of one that was not, bit for bit on a CPU with the same number of threads.
Nothing wraps the data, so there is nothing whose position could be lost.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer

from kexue._checks import check_choice, check_int, check_real
from kexue._progress import Bar, progress
from kexue.training.checkpoint import newest_checkpoint, remove_all, remove_unfinished, save_checkpoint
from kexue.training.interrupt import TrainingInterrupted, deferred_signals
from kexue.training.metrics import MetricsLog
from kexue.training.optimizers import OptimizerSpec, build_optimizers
from kexue.training.order import check_seed, kept_random_state
from kexue.training.schedule import lr_factor
from kexue.training.step import backward, clip_gradients, finite, train_mode

__all__ = ["FitResult", "fit"]

Batches = Sequence[Mapping[str, Any]] | Callable[[int], Mapping[str, Any]]


@dataclass(frozen=True)
class FitResult:
    """What :func:`fit` returns.

    Args:
        step: Steps that are done.
        loss: Loss of the last step.
        history: Loss of every step since the first, also of the steps before a resume; metrics.jsonl has the rest.
        interrupted: ``on_step`` ended the run before its last step.

    Example:
        >>> FitResult(step=2, loss=0.5, history=[0.75, 0.5], interrupted=False).history[-1]
        0.5
    """

    step: int
    loss: float
    history: list[float] = field(repr=False)
    interrupted: bool


def fit(
    model: nn.Module,
    batches: Batches,
    *,
    steps: int,
    out: str | os.PathLike[str],
    save_every: int = 500,
    lr: float | None = None,
    seed: int = 0,
    resume: bool = True,
    optimizer: OptimizerSpec | None = None,
    schedule: str = "linear",
    warmup: int = 0,
    weight_decay: float = 0.01,
    clip: float | None = 1.0,
    accumulate: int = 1,
    precision: str = "fp32",
    fingerprint: str | None = None,
    keep: int = 2,
    on_step: Callable[[dict[str, Any]], bool | None] | None = None,
    label: str = "training",
    show_progress: bool | None = None,
) -> FitResult:
    """Train ``model`` in place; called again after a crash, it continues where the last checkpoint is.

    The model is called as ``model(**batch)`` and returns its loss: a scalar tensor, an object or mapping with ``loss``,
    or a tuple that begins with it. It may also give ``num_items``, the number of predicted items that the loss is the
    mean of; then a step with several batches is normalised by their total. The model stays on its device, and the
    tensors of a batch are moved there. Dropout and other users of the global generators are seeded by (seed, step).

    ``out`` receives ``metrics.jsonl`` (one line per step) and the folders ``step-N`` (see
    :mod:`kexue.training.checkpoint`). SIGINT and SIGTERM let the step finish, save, and raise
    :class:`TrainingInterrupted`, when called in the main thread.

    Args:
        model: Module to train; a loss with parameters of its own belongs inside.
        batches: Sequence of dicts, used in turn and again from the start; or a function from the number of the batch,
            from 0, to a dict. Make noise in it from :func:`numpy_generator` or :func:`torch_generator`.
        steps: Optimizer steps of the whole run.
        out: Folder of the run, made if missing.
        save_every: Steps between checkpoints; the last step is always saved.
        lr: Learning rate at the top of the schedule; default 1e-3. A given ``optimizer`` has its own rates.
        seed: Seed of the noise.
        resume: True continues a run found in ``out``, False deletes its checkpoints and starts over.
        optimizer: None is AdamW without decay on biases, norms and embeddings, and SparseAdam for embeddings with
            ``sparse=True``. Else an optimizer, a list of them, or a function from the parameters to one of these. Rates
            per layer come from :func:`param_groups`; the schedule scales each group, and the metrics name the largest.
            Transforms of :func:`gradient_transform` run after ``clip``.
        schedule: "constant", "linear" or "cosine", see :func:`lr_factor`.
        warmup: Steps of linear warm-up.
        weight_decay: Decay of the default AdamW.
        clip: Largest norm of all dense gradients together; None switches it off. Sparse gradients are not clipped.
        accumulate: Batches per step; their gradients are averaged by ``num_items``, else by rows.
        precision: "fp32", or "bf16" for autocast.
        fingerprint: Any text that identifies data and model; a run with another one is not continued.
        keep: Checkpoints that stay.
        on_step: Called after each step with its line of metrics; returning True saves and ends the run.
        label: Name beside the progress bar.
        show_progress: None shows the bar if standard error is a terminal.

    Returns:
        Number of steps, loss and its history. A run that was complete already returns at once, with its final weights.

    Raises:
        TypeError: ``model``, ``batches``, a batch, the optimizer or what the model returns is of the wrong kind.
        ValueError: A setting is out of range, ``batches`` is empty, the loss is not a scalar with a gradient, or
            ``out`` holds a run with other settings.
        FloatingPointError: The loss or the gradient is not finite; the weights and the last checkpoint are those of
            before this step.
        OSError: The disk is full or cannot be written; the earlier checkpoints are intact.
        TrainingInterrupted: After SIGINT or SIGTERM, when everything is saved.

    Example:
        >>> import tempfile, torch
        >>> from kexue.training import shuffled_batches
        >>> class Line(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.slope = nn.Parameter(torch.zeros(()))
        ...     def forward(self, x, y):
        ...         return (self.slope * x - y).square().mean()
        >>> x = torch.linspace(-1, 1, 32)
        >>> with tempfile.TemporaryDirectory() as out:
        ...     model = Line()
        ...     result = fit(model, shuffled_batches({"x": x, "y": 3 * x}, 8), steps=200, out=out, lr=0.1)
        >>> result.step, round(model.slope.item(), 2)
        (200, 3.0)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module; got {type(model).__name__}")
    for name, value in (("steps", steps), ("save_every", save_every), ("accumulate", accumulate), ("keep", keep)):
        check_int(name, value, 1)
    seed = check_seed(seed)
    lr_factor(0, steps, warmup=warmup, schedule=schedule)  # refuses bad settings
    check_real("weight_decay", weight_decay, minimum=0.0)
    check_choice("precision", precision, ("fp32", "bf16"))
    if lr is not None:
        check_real("lr", lr, above=0.0)
    if clip is not None:
        check_real("clip", clip, above=0.0)
    if fingerprint is not None and not isinstance(fingerprint, str):
        raise TypeError(f"fingerprint must be a str or None; got {type(fingerprint).__name__}")
    batch_at, length = _batch_source(batches)
    optimizers = build_optimizers(model, optimizer, lr, weight_decay)
    rates = [float(group["lr"]) for o in optimizers for group in o.param_groups]  # at the top of the schedule
    parameters = [p for p in model.parameters() if p.requires_grad]
    device = parameters[0].device
    config = {
        "model": f"{type(model).__name__} with {sum(p.numel() for p in model.parameters())} parameters",
        "batches": length,
        "steps": int(steps),
        "seed": seed,
        "schedule": schedule,
        "warmup": int(warmup),
        "clip": None if clip is None else float(clip),
        "accumulate": int(accumulate),
        "precision": precision,
        "fingerprint": fingerprint,
        **_optimizer_config(optimizers),
    }
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    if not resume:
        remove_all(folder)
    done, loss = _resume(folder, model, optimizers, config)
    groups = [group for o in optimizers for group in o.param_groups]

    def save() -> Path:
        log.sync()
        return save_checkpoint(folder, model, optimizers, step=done, loss=loss, config=config, keep=keep)

    stopped = False
    with (
        train_mode(model),
        kept_random_state(device),
        MetricsLog(folder / "metrics.jsonl", done) as log,
        deferred_signals() as signals,
        progress(label, steps, show_progress) as bar,
    ):
        display = _Display(bar, done)
        while done < steps and not stopped:
            began = time.perf_counter()
            factor = lr_factor(done, steps, warmup=warmup, schedule=schedule)
            for group, rate in zip(groups, rates, strict=True):
                group["lr"] = rate * factor
            for p in parameters:
                p.grad = None
            mean, items = backward(model, batch_at, done, accumulate, seed, precision, device, parameters)
            loss, norm = finite(mean, clip_gradients(parameters, clip), done, folder)
            for o in optimizers:
                o.step()
            done += 1
            seconds = round(time.perf_counter() - began, 6)
            record = {
                "step": done,
                "loss": loss,
                "lr": max(group["lr"] for group in groups),
                "grad_norm": norm,
                "items": items,
            }
            log.write(record | {"seconds": seconds})
            stopped = on_step is not None and on_step(record | {"seconds": seconds}) is True
            display.update(record)
            due = done % save_every == 0 or done == steps or stopped
            saved = save() if due else None
            if signals.received is not None:
                signals.answered = True
                raise TrainingInterrupted(signals.received, done, saved or save())
        display.close()
        for p in parameters:
            p.grad = None
    return FitResult(done, loss, log.losses, done < steps)


def _batch_source(batches: Any) -> tuple[Callable[[int], Any], int | None]:
    """Function from the number of a batch to the batch, and how many there are if that is known."""
    if callable(batches) and not hasattr(batches, "__getitem__"):
        return batches, None
    if isinstance(batches, (Mapping, str)) or not (hasattr(batches, "__getitem__") and hasattr(batches, "__len__")):
        raise TypeError(
            "batches must be a sequence of dicts or a function step -> dict (an iterator cannot be resumed); got "
            f"{type(batches).__name__}"
        )
    length = len(batches)
    if length == 0:
        raise ValueError("batches must hold at least one batch; got an empty sequence")
    return lambda number: batches[number % length], length


def _optimizer_config(optimizers: list[Optimizer]) -> dict[str, Any]:
    """Kinds and plain options of the optimizers, those left out that only choose a kernel."""
    config: dict[str, Any] = {"optimizers": [type(o).__name__ for o in optimizers]}
    for number, o in enumerate(optimizers):
        for place, group in enumerate(o.param_groups):
            for key, value in group.items():
                if key not in ("foreach", "fused") and isinstance(value, (bool, int, float, str, tuple)):
                    config[f"{type(o).__name__} {number} group {place} {key}"] = value
    return config


def _resume(folder: Path, model: nn.Module, optimizers: list[Optimizer], config: dict[str, Any]) -> tuple[int, float]:
    """Load the newest checkpoint of the same run; returns its step and loss."""
    remove_unfinished(folder)
    checkpoint = newest_checkpoint(folder)
    if checkpoint is None:
        return 0, math.nan
    now, then = json.loads(json.dumps(config)), checkpoint.config
    # Options that only one side knows come from another version of torch.
    differing = [key for key in now if key in then and now[key] != then[key]]
    if differing:
        listing = "; ".join(f"{key} was {then[key]!r} and is {now[key]!r}" for key in differing)
        raise ValueError(
            f"{folder} holds a run with other settings: {listing}. Use the old ones to continue it, another folder, or "
            "resume=False to delete it and start over"
        )
    checkpoint.restore(model, optimizers)
    return checkpoint.step, checkpoint.loss


class _Display:
    """Feeds the progress bar at most ten times a second: smoothed loss, items per second, learning rate."""

    def __init__(self, bar: Bar, done: int) -> None:
        bar.advance(done)
        self.bar = bar
        self.start = self.shown = time.monotonic()
        self.loss: float | None = None
        self.items = 0.0
        self.waiting = 0
        self.rate = 0.0

    def update(self, record: Mapping[str, Any]) -> None:
        self.loss = record["loss"] if self.loss is None else 0.95 * self.loss + 0.05 * record["loss"]
        self.items += record["items"]
        self.rate = record["lr"]
        self.waiting += 1
        if time.monotonic() - self.shown > 0.1:
            self.close()

    def close(self) -> None:
        """Show what has not been shown yet."""
        self.shown = time.monotonic()
        if self.waiting:
            speed = self.items / max(self.shown - self.start, 1e-9)
            self.bar.advance(self.waiting, f"loss {self.loss:.4g}, {speed:.3g} items/s, lr {self.rate:.2e}")
            self.waiting = 0
