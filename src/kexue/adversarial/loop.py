"""The alternating steps of an adversarial training: exact resume, Ctrl-C, progress, as in :func:`kexue.training.fit`.

    repeat: critic_steps times  { critic's terms on new samples and noise; its optimizer steps }
            once                { players' terms on new samples and noise, the critic frozen; their optimizer steps }

The data stay where they are as one tensor, and a batch is one ``index_select``: with small networks a loader would take
longer than the step. Which samples and which noise belong to a step is a function of (seed, step), drawn for many steps
at once; so a run that is continued ends with the weights of one that was not interrupted, bit for bit on a CPU with the
same number of threads.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kexue._progress import progress
from kexue.adversarial.games import Game, Terms
from kexue.training.display import Display
from kexue.training.interrupt import TrainingInterrupted, deferred_signals
from kexue.training.order import kept_random_state, seed_step, torch_generator
from kexue.training.processes import joined
from kexue.training.run import Run
from kexue.training.step import train_mode

__all__ = ["Plan", "Samples", "Stopped", "play"]

_DRAWN = 2**18  # numbers of noise that are drawn at once, at most
_BLOCK = 64  # steps whose samples and noise are drawn at once, at most

History = dict[str, list[float]]
OnStep = Callable[[dict[str, Any]], bool | None]


class Stopped(KeyboardInterrupt):
    """Ctrl-C in a training that is saved nowhere; the weights are those of a whole step."""


@dataclass(frozen=True)
class Plan:
    """How a game is played.

    Args:
        steps: Steps of the players.
        critic_steps: Steps of the critic before each of them.
        batch_size: Samples of a step.
        z_dim: Width of the noise.
        lr: Rate of the players' Adam.
        critic_lr: Rate of the critic's.
        betas: Of both.
        seed: Of samples and noise.
    """

    steps: int
    critic_steps: int
    batch_size: int
    z_dim: int
    lr: float
    critic_lr: float
    betas: tuple[float, float]
    seed: int


class Samples:
    """Data on the device of the networks; bytes stay bytes until they are in a batch.

    Args:
        data: (N, ...), floating or uint8, which stands for -1 to 1.
        like: A parameter of the networks.
    """

    def __init__(self, data: Tensor, like: Tensor) -> None:
        self.dtype = like.dtype
        self.data = data.to(like.device) if data.dtype == torch.uint8 else data.to(like.device, like.dtype)

    def __len__(self) -> int:
        return self.data.shape[0]

    def rows(self, index: Tensor) -> Tensor:
        """The samples of these numbers, floating."""
        return as_floats(self.data.index_select(0, index), self.dtype)

    def digest(self) -> str:
        """Fingerprint of the data."""
        return _digest([self.data])


def as_floats(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Bytes 0 to 255 as -1 to 1; floating samples as they are."""
    return x.to(dtype).div_(127.5).sub_(1) if x.dtype == torch.uint8 else x.to(dtype)


def _digest(tensors: list[Tensor]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for x in tensors:
        digest.update(str((x.dtype, tuple(x.shape))).encode())
        digest.update(x.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def adam(parameters: list[nn.Parameter], lr: float, betas: tuple[float, float]) -> torch.optim.Adam:
    """Adam in one kernel where there is one, else over all tensors at once."""
    fused = all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for p in parameters)
    return torch.optim.Adam(parameters, lr, betas=betas, fused=fused, foreach=None if fused else True)


class _Draws:
    """Samples and noise of every step, from the numbers of the step alone."""

    def __init__(self, plan: Plan, samples: Samples) -> None:
        self.plan, self.samples = plan, samples
        per_step = (plan.critic_steps + 1) * plan.batch_size * plan.z_dim
        self.length = max(1, min(_BLOCK, _DRAWN // per_step))
        self.block = -1

    def __call__(self, step: int, turn: int) -> tuple[Tensor, Tensor]:
        """Real samples and noise of a turn of a step; the players' turn is the last."""
        block, place = divmod(step, self.length)
        if block != self.block:
            plan, device = self.plan, self.samples.data.device
            shape = (self.length, plan.critic_steps + 1, plan.batch_size)
            g = torch_generator(plan.seed, block)
            self.index = torch.randint(len(self.samples), shape, generator=g).to(device)
            self.noise = torch.randn(*shape, plan.z_dim, generator=g).to(device, self.samples.dtype)
            self.block = block
        return self.samples.rows(self.index[place, turn]), self.noise[place, turn]


def _total(terms: Terms, side: str, step: int, where: str) -> tuple[Tensor, dict[str, float]]:
    """Sum of the terms; a number that is not finite ends the run before it reaches the weights."""
    numbers = {name: float(value.detach()) for name, value in terms.items()}
    for name, number in numbers.items():
        if not math.isfinite(number):
            raise FloatingPointError(
                f"the term {name!r} of the {side}'s loss is {number} in step {step + 1}, which was not applied; "
                f"{where}. Lower the learning rate, or look for bad values in the networks"
            )
    parts = list(terms.values())
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum(), numbers


def play(
    game: Game,
    samples: Samples,
    plan: Plan,
    *,
    folder: Path | None = None,
    save_every: int = 500,
    settings: dict[str, Any] | None = None,
    on_step: OnStep | None = None,
    label: str = "training",
    show_progress: bool | None = None,
) -> History:
    """Train in place.

    Args:
        game: The two sides.
        samples: Real samples.
        plan: How it is played.
        folder: Where the run is saved and continued; None: nowhere.
        save_every: Steps between checkpoints.
        settings: What else a run has to keep to be continued, plain JSON.
        on_step: Called after each step with its terms; returning True ends the run, saved.
        label: Beside the progress bar.
        show_progress: None shows the bar if standard error is a terminal.

    Returns:
        Every term of every step, also of the steps before a resume: ``critic``, ``generator``, ...

    Raises:
        FloatingPointError: A term is not finite.
        TrainingInterrupted: After SIGINT or SIGTERM, when everything is saved.
        Stopped: The same without a folder; the weights are those of a whole step.
        ValueError: ``folder`` holds a run with other settings.
    """
    critic_side = [p for p in game.critic.parameters() if p.requires_grad]
    players = game.players()
    for name, found in (("critic", critic_side), ("generator", players)):
        if not found:
            raise ValueError(f"the {name} has no parameter that requires a gradient")
    optimizers = [adam(critic_side, plan.critic_lr, plan.betas), adam(players, plan.lr, plan.betas)]
    device = samples.data.device
    with joined(device) as processes, ExitStack() as stack:
        if processes.world > 1:
            raise ValueError(f"adversarial training takes one process; got {processes.world}")
        stack.enter_context(train_mode(game))
        if plan.batch_size == 1 and any(isinstance(m, nn.BatchNorm1d) and m.training for m in game.modules()):
            raise ValueError("batch_size must be at least 2 where there is batch normalisation; got 1")
        run: Run | None = None
        history: History = {}
        if folder is not None:
            start = _digest([*game.state_dict().values()])
            config = {**vars(plan), "betas": list(plan.betas), "game": type(game).__name__, **(settings or {})}
            config["fingerprint"] = samples.digest() + start
            run = Run(folder, game, list(optimizers), config, processes, keep=1)
            run.open(resume=True)
        done = 0 if run is None else run.done
        stack.enter_context(kept_random_state(device))
        if run is not None and folder is not None:
            stack.enter_context(run.metrics())
            history = _read(folder / "metrics.jsonl")
            run.restore_random_states()
        signals = stack.enter_context(deferred_signals())
        bar = stack.enter_context(progress(label, plan.steps, show_progress))
        display, draws, stopped = Display(bar, done), _Draws(plan, samples), False
        where = "nothing is saved" if folder is None else f"checkpoints are in {folder}"
        while done < plan.steps and not stopped:
            began = time.perf_counter()
            seed_step(plan.seed, done, 0, device)
            numbers = _step(game, draws, plan, optimizers, critic_side, players, done, where)
            done += 1
            for name, number in numbers.items():
                history.setdefault(name, []).append(number)
            record = {"step": done, "loss": numbers["critic"], **numbers, "lr": plan.lr, "items": plan.batch_size}
            record["seconds"] = round(time.perf_counter() - began, 6)
            display.update(record)
            if run is not None:
                run.done, run.loss = done, numbers["critic"]
                run.note(record)
            stopped = on_step is not None and on_step(record) is True
            due = done % save_every == 0 or done == plan.steps or stopped
            saved = run.save() if run is not None and due else None
            if signals.received is not None:
                signals.answered = True
                if run is not None:
                    raise TrainingInterrupted(signals.received, done, saved or run.save())
                raise Stopped(f"training stopped after step {done} of {plan.steps}, which is not saved")
        display.close()
    return history


def _step(
    game: Game,
    draws: _Draws,
    plan: Plan,
    optimizers: list[torch.optim.Adam],
    critic_side: list[nn.Parameter],
    players: list[nn.Parameter],
    step: int,
    where: str,
) -> dict[str, float]:
    """One step of the players and the critic's before it."""
    numbers: dict[str, float] = {}
    for turn in range(plan.critic_steps):
        loss, numbers = _total(game.critic_terms(*draws(step, turn)), "critic", step, where)
        for p in critic_side:
            p.grad = None
        loss.backward()
        optimizers[0].step()
        game.after_critic_step()
    for p in critic_side:  # saves the gradient by the critic's weights, about a third of the step
        p.requires_grad_(False)
    try:
        loss, found = _total(game.player_terms(*draws(step, plan.critic_steps)), "generator", step, where)
        for p in players:
            p.grad = None
        loss.backward()
    finally:
        for p in critic_side:
            p.requires_grad_(True)
    optimizers[1].step()
    return numbers | found


def _read(path: Path) -> History:
    """Terms of the steps that are done; the log has dropped the others."""
    history: History = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        for name, value in json.loads(line).items():
            if name not in ("step", "loss", "lr", "items", "seconds"):
                history.setdefault(name, []).append(value)
    return history
