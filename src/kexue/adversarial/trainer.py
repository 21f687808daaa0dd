"""Training a generator against any critic that brings its losses along (对抗训练)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from kexue._checks import check_int, check_real
from kexue.adversarial._arrays import as_tensor
from kexue.adversarial.games import PlainGame
from kexue.adversarial.loop import History, OnStep, Plan, Samples, play

__all__ = ["AdversarialTrainer", "check_plan", "check_samples"]


def check_samples(name: str, x: Any) -> Tensor:
    """Samples (N, ...) as a tensor: floating and finite, or bytes.

    Raises:
        TypeError: No array or tensor, or numbers of another kind.
        ValueError: No sample, no second dimension, or values that are not finite.
    """
    x = as_tensor(name, x)
    if not x.is_floating_point() and x.dtype != torch.uint8:
        raise TypeError(f"{name} must be floating, or uint8 for 0 to 255; got dtype {x.dtype}")
    if x.dim() < 2 or x.shape[0] == 0 or x.numel() == 0:
        raise ValueError(f"{name} must have shape (N, ...) with at least one sample; got {tuple(x.shape)}")
    if x.is_floating_point() and not bool(torch.isfinite(x).all()):
        raise ValueError(f"{name} must be finite; got {int((~torch.isfinite(x)).sum())} values that are not")
    return x


def check_plan(
    *,
    steps: Any,
    critic_steps: Any,
    batch_size: Any,
    z_dim: Any,
    lr: Any,
    critic_lr: Any,
    betas: Any,
    random_state: Any,
) -> Plan:
    """The plan of a training, or an error about what is wrong with it."""
    counts = {"steps": steps, "critic_steps": critic_steps, "batch_size": batch_size, "z_dim": z_dim}
    for name, value in counts.items():
        check_int(name, value, 1)
    check_real("lr", lr, above=0.0)
    if critic_lr is not None:
        check_real("critic_lr", critic_lr, above=0.0)
    if not isinstance(betas, list | tuple) or len(betas) != 2:
        raise TypeError(f"betas must be two numbers; got {betas!r}")
    for beta in betas:
        check_real("betas", beta, minimum=0.0)
        if beta >= 1:
            raise ValueError(f"betas must be below 1; got {betas!r}")
    check_int("random_state", random_state, 0)
    if random_state >= 1 << 63:
        raise ValueError(f"random_state must be below 2 ** 63; got {random_state}")
    return Plan(
        int(steps), int(critic_steps), int(batch_size), int(z_dim), float(lr),
        float(lr if critic_lr is None else critic_lr), (float(betas[0]), float(betas[1])), int(random_state),
    )  # fmt: skip


class AdversarialTrainer:
    """Train a generator against a critic, both in place.

    Args:
        generator: Maps noise (B, z_dim) to samples.
        critic: Module with ``critic_loss(x_real, x_fake)`` and ``generator_loss(x_fake)``, for example a
            LipschitzCritic around a network; if its method is weight clipping, that is done after each of its steps.
        z_dim: Width of the noise, which is N(0, 1).
        critic_steps: Steps of the critic before each of the generator.
        batch_size: Samples of a step, drawn with replacement.
        lr: Rate of Adam.
        critic_lr: Rate of the critic's Adam; None: the same.
        betas: Of both.
        random_state: Seed of samples and noise; networks keep the weights that they came with.
        show_progress: None shows a bar if standard error is a terminal.

    Attributes:
        history_: Each term of the losses (``critic``, ``generator``) at each step.

    Raises:
        TypeError: In ``fit``: arguments of the wrong kind, a critic without losses.
        ValueError: In ``fit``: settings out of range, samples that are not finite, a generator whose samples have
            another shape than the data.

    Reference:
        https://spaces.ac.cn/archives/6163

    Example:
        >>> class Hinge(nn.Sequential):
        ...     def critic_loss(self, x_real, x_fake):
        ...         return (1 - self(x_real)).relu().mean() + (1 + self(x_fake)).relu().mean()
        ...     def generator_loss(self, x_fake):
        ...         return -self(x_fake).mean()
        >>> trainer = AdversarialTrainer(nn.Linear(2, 3), Hinge(nn.Linear(3, 1)), z_dim=2, batch_size=8)
        >>> trainer.fit(torch.randn(20, 3), steps=5).sample(4).shape
        torch.Size([4, 3])
    """

    def __init__(
        self,
        generator: nn.Module,
        critic: nn.Module,
        z_dim: int,
        *,
        critic_steps: int = 2,
        batch_size: int = 64,
        lr: float = 2e-4,
        critic_lr: float | None = None,
        betas: tuple[float, float] = (0.5, 0.999),
        random_state: int = 0,
        show_progress: bool | None = None,
    ) -> None:
        self.generator, self.critic, self.z_dim = generator, critic, z_dim
        self.critic_steps, self.batch_size = critic_steps, batch_size
        self.lr, self.critic_lr, self.betas = lr, critic_lr, betas
        self.random_state, self.show_progress = random_state, show_progress

    def fit(
        self,
        data: Any,
        steps: int,
        *,
        checkpoint: str | os.PathLike[str] | None = None,
        checkpoint_every: int = 500,
        on_step: OnStep | None = None,
    ) -> Self:
        """Train.

        Args:
            data: (N, ...) real samples, tensor or array, floating, or uint8, whose 0 to 255 stand for -1 to 1.
            steps: Steps of the generator.
            checkpoint: Folder in which the run is saved. Called again with the same arguments and fresh networks after
                a crash or Ctrl-C, ``fit`` continues there and ends with the same weights, bit by bit.
            checkpoint_every: Steps between checkpoints.
            on_step: Called after each step with its terms (``step``, ``critic``, ``generator``, ``seconds``);
                returning True ends the training.

        Raises:
            KeyboardInterrupt: Ctrl-C; the step is finished first, and saved if there is a folder.
            FloatingPointError: A term of a loss is not finite; its step is not applied.
        """
        for name in ("generator", "critic"):
            if not isinstance(getattr(self, name), nn.Module):
                raise TypeError(f"{name} must be a torch.nn.Module; got {type(getattr(self, name)).__name__}")
        for method in ("critic_loss", "generator_loss"):
            if not callable(getattr(self.critic, method, None)):
                raise TypeError(f"the critic must have a method {method}; got {type(self.critic).__name__}")
        plan = check_plan(
            steps=steps, critic_steps=self.critic_steps, batch_size=self.batch_size, z_dim=self.z_dim, lr=self.lr,
            critic_lr=self.critic_lr, betas=self.betas, random_state=self.random_state,
        )  # fmt: skip
        check_int("checkpoint_every", checkpoint_every, 1)
        samples = Samples(check_samples("data", data), _parameter(self.generator))
        game = PlainGame(self.generator, self.critic)
        self.history_: History = play(
            game, samples, plan, folder=None if checkpoint is None else Path(checkpoint), save_every=checkpoint_every,
            settings={"critic": str(getattr(self.critic, "method", ""))}, on_step=on_step,
            show_progress=self.show_progress,
        )  # fmt: skip
        return self

    @torch.no_grad()
    def sample(self, n: int, random_state: int | None = None) -> Tensor:
        """Draw from the generator, in evaluation mode.

        Args:
            n: Number of samples.
            random_state: Seed of the noise; None: that of the trainer.

        Returns:
            (n, ...) samples.
        """
        check_int("n", n, 1)
        return draw(self.generator, n, self.z_dim, self.random_state if random_state is None else random_state)


def _parameter(module: nn.Module) -> Tensor:
    found = next((p for p in module.parameters() if p.is_floating_point()), None)
    if found is None:
        raise ValueError(f"the generator has no parameter; got {type(module).__name__}")
    return found


@torch.no_grad()
def draw(generator: nn.Module, n: int, z_dim: int, seed: int, block: int = 512) -> Tensor:
    """Samples from noise of a seed, in evaluation mode; every module gets its own flag back."""
    check_int("random_state", seed, 0)
    like = _parameter(generator)
    z = torch.randn(n, z_dim, generator=torch.Generator().manual_seed(seed)).to(like.device, like.dtype)
    return in_blocks(generator, z, block)


@torch.no_grad()
def in_blocks(module: nn.Module, x: Tensor, block: int = 512) -> Tensor:
    """The module in evaluation mode, some rows at a time."""
    flags = [(m, m.training) for m in module.modules()]
    module.eval()
    try:
        return torch.cat([module(part) for part in x.split(block)])
    finally:
        for m, flag in flags:
            m.training = flag
