"""The training loop (训练循环): exact resume, atomic checkpoints, progress, metrics, orderly interruption.

    for step in range(start, steps):
        seed the generators from (seed, step, rank)
        loss = model(**batches(step));  loss.backward();  clip;  optimizer.step();  one line of metrics
        save every so many steps, and when a signal came

Everything that a step needs is a function of its number, so that resuming means: load the last checkpoint, go on. A run
that was killed ends with the weights of one that was not, bit for bit on a CPU with the same number of threads.
Nothing wraps the data, so there is nothing whose position could be lost.

Under ``torchrun`` the same call trains with several processes, by DDP or FSDP2. Rank r of W takes the batches r, W + r,
2W + r, ...: W processes do what one process does with ``accumulate`` W times as large, up to the order of additions,
noise included. The loss is the mean over all predicted items of all ranks, whatever their number on each. Rank 0 alone
writes and speaks; a signal, an exception or a bad number on one rank ends the run on all of them at the same step.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from kexue._checks import check_choice, check_int, check_real
from kexue._progress import progress
from kexue.training.blocks import Compiled
from kexue.training.display import Display
from kexue.training.interrupt import TrainingInterrupted, deferred_signals
from kexue.training.numbering import batch_source, numbering_of
from kexue.training.optimizers import OptimizerSpec, build_optimizers, trained
from kexue.training.order import check_seed, kept_random_state
from kexue.training.processes import joined
from kexue.training.run import Run
from kexue.training.schedule import lr_factor
from kexue.training.step import Stepper, clip_gradients, finite, has_bf16, read_loss, train_mode
from kexue.training.strategies import STRATEGIES, class_name, shard_, strategy_of

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
    strategy: str = "ddp",
    per_rank: bool | None = None,
    compile: bool = False,
    fingerprint: str | None = None,
    keep: int = 2,
    on_step: Callable[[dict[str, Any]], bool | None] | None = None,
    label: str = "training",
    show_progress: bool | None = None,
) -> FitResult:
    """Train ``model`` in place; called again after a crash, it continues where the last checkpoint is.

    The model is called as ``model(**batch)`` and returns its loss: a scalar tensor, an object or mapping with ``loss``,
    or a tuple that begins with it. It may also give ``num_items``, the number of predicted items that the loss is the
    mean of; then a step with several batches or processes is normalised by their total. The model stays on its device,
    and the tensors of a batch are moved there. Dropout and other users of the global generators are seeded by
    (seed, step).

    ``out`` receives ``metrics.jsonl`` (one line per step) and the folders ``step-N`` (see
    :mod:`kexue.training.checkpoint`). SIGINT and SIGTERM let the step finish, save, and raise
    :class:`TrainingInterrupted`, when called in the main thread.

    Args:
        model: Module to train; a loss with parameters of its own belongs inside.
        batches: Sequence of dicts, used in turn and again from the start; or a function from the number of the batch,
            from 0, to a dict. Make noise in it from :func:`numpy_generator` or :func:`torch_generator`. With several
            processes see ``per_rank``.
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
        precision: "fp32", "bf16" for autocast, or "auto": bf16 on a GPU or CPU that has instructions for it.
        strategy: What several processes do: "ddp" keeps the whole model on each; "fsdp" shards it, block by block, and
            leaves it sharded (its parameters are DTensors). A single process ignores it.
        per_rank: With several processes: False if the function ``batches`` does not know the rank; then it is called
            with the numbers of this rank's batches. True if it gives this rank's own part of a batch; then it is called
            with the same number on all ranks. None finds out by comparing batch 0 between the ranks.
        compile: Compile each block with ``torch.compile(dynamic=False)``. Every new shape of a batch is compiled anew,
            so give few shapes. Goes on eagerly, with a warning, where compiling fails.
        fingerprint: Any text that identifies data and model; a run with another one is not continued.
        keep: Checkpoints that stay.
        on_step: Called after each step with its line of metrics, on every rank; returning True saves and ends the run.
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
    check_choice("precision", precision, ("fp32", "bf16", "auto"))
    check_choice("strategy", strategy, STRATEGIES)
    if lr is not None:
        check_real("lr", lr, above=0.0)
    if clip is not None:
        check_real("clip", clip, above=0.0)
    if fingerprint is not None and not isinstance(fingerprint, str):
        raise TypeError(f"fingerprint must be a str or None; got {type(fingerprint).__name__}")
    flags = {"resume": resume, "compile": compile, "per_rank": per_rank, "show_progress": show_progress}
    for name, flag in flags.items():
        if not isinstance(flag, bool) and not (flag is None and name in ("per_rank", "show_progress")):
            raise TypeError(f"{name} must be a bool; got {flag!r}")
    if on_step is not None and not callable(on_step):
        raise TypeError(f"on_step must be callable or None; got {type(on_step).__name__}")
    batch_at, length = batch_source(batches)
    device = trained(model)[0].device
    low = torch.bfloat16 if precision == "bf16" or (precision == "auto" and has_bf16(device)) else None
    folder = Path(out)
    with joined(device) as processes:
        compiled = Compiled(model, steps) if compile else None
        if strategy == "fsdp" and processes.world > 1:
            shard_(model, processes, device, low)
        optimizers = build_optimizers(model, optimizer, lr, weight_decay)
        numbering = numbering_of(batch_at, length, accumulate, processes, per_rank, seed, device)
        config = {
            "model": f"{class_name(model)} with {sum(p.numel() for p in model.parameters())} parameters",
            "batches": length,
            "steps": int(steps),
            "seed": seed,
            "schedule": schedule,
            "warmup": int(warmup),
            "clip": None if clip is None else float(clip),
            "batches per step": int(accumulate) * (1 if numbering.per_rank else processes.world),
            "precision": "fp32" if low is None else "bf16",
            "fingerprint": fingerprint,
            **_optimizer_config(optimizers),
        }
        run = Run(folder, model, optimizers, config, processes, keep)
        run.open(resume)
        stepper = Stepper(
            strategy_of(strategy, model, read_loss, processes), numbering, seed, device, low, trained(model)
        )
        if compiled is not None:
            stepper.retry = compiled.gave_up
        try:
            factor = partial(lr_factor, steps=steps, warmup=warmup, schedule=schedule)
            return _train(run, stepper, steps, save_every, clip, factor, on_step, label, show_progress)
        finally:
            if compiled is not None:
                compiled.undo()


def _train(
    run: Run,
    stepper: Stepper,
    steps: int,
    save_every: int,
    clip: float | None,
    factor_at: Callable[[int], float],
    on_step: Callable[[dict[str, Any]], bool | None] | None,
    label: str,
    show_progress: bool | None,
) -> FitResult:
    """The steps that are left."""
    model, optimizers, processes, parameters = run.model, run.optimizers, run.processes, stepper.parameters
    groups = [group for o in optimizers for group in o.param_groups]
    rates = run.rates
    first = processes.rank == 0
    stopped = False
    with (
        train_mode(model),
        kept_random_state(stepper.device),
        run.metrics() as log,
        deferred_signals() as signals,
        progress(label, steps, show_progress if first else False) as bar,
    ):
        run.restore_random_states()
        display = Display(bar, run.done)
        while run.done < steps and not stopped:
            began = time.perf_counter()
            factor = factor_at(run.done)
            for group, rate in zip(groups, rates, strict=True):
                group["lr"] = rate * factor
            for p in parameters:
                p.grad = None
            found = stepper(run.done, signals.received, run.failure)
            loss, norm = finite(found.loss, clip_gradients(parameters, clip), run.done, run.folder)
            for o in optimizers:
                o.step()
            stepper.strategy.stepped()
            run.done += 1
            run.loss = loss
            record: dict[str, Any] = {
                "step": run.done,
                "loss": loss,
                "lr": max(group["lr"] for group in groups),
                "grad_norm": norm,
                "items": found.items,
            }
            if found.tokens is not None:
                record["tokens"] = found.tokens
            record["seconds"] = round(time.perf_counter() - began, 6)
            run.note(record)
            if on_step is not None:
                stopped = run.answer(on_step, record)
            display.update(record)
            due = run.done % save_every == 0 or run.done == steps or stopped
            saved = run.save() if due else None
            received = signals.received if processes.world == 1 else found.signal
            if received is not None:
                signals.answered = True
                raise TrainingInterrupted(received, run.done, saved or run.save())
        display.close()
        for p in parameters:
            p.grad = None
    return FitResult(run.done, run.loss, log.losses, run.done < steps)


def _optimizer_config(optimizers: list[Optimizer]) -> dict[str, Any]:
    """Kinds and plain options of the optimizers, those left out that only choose a kernel."""
    config: dict[str, Any] = {"optimizers": [type(o).__name__ for o in optimizers]}
    for number, o in enumerate(optimizers):
        for place, group in enumerate(o.param_groups):
            for key, value in group.items():
                if key not in ("foreach", "fused") and isinstance(value, (bool, int, float, str, tuple)):
                    config[f"{type(o).__name__} {number} group {place} {key}"] = value
    return config
