"""Who plays against whom: the losses of the two sides of an adversarial training, as one Module that can be saved."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kexue.adversarial.networks import PairCritic
from kexue.adversarial.qp import QPLoss
from kexue.models._views import joins, uses_batch_statistics

__all__ = ["BiGANGame", "Game", "PlainGame"]

Terms = dict[str, Tensor]  # summed they are the loss of a side


class Game(nn.Module):
    """Two sides: the critic, and the players (generator, encoder) who learn from it."""

    critic: nn.Module

    def critic_terms(self, x: Tensor, z: Tensor) -> Terms:
        """Terms of the critic's loss on real samples and noise; no graph goes through the players."""
        raise NotImplementedError

    def player_terms(self, x: Tensor, z: Tensor) -> Terms:
        """Terms of the players' loss; the critic's weights are frozen meanwhile."""
        raise NotImplementedError

    def after_critic_step(self) -> None:
        """What the critic's method does to its weights after a step."""

    def players(self) -> list[nn.Parameter]:
        """What the players train."""
        frozen = {id(p) for p in self.critic.parameters()}
        return [p for p in self.parameters() if p.requires_grad and id(p) not in frozen]


class PlainGame(Game):
    """Generator against a critic that brings its losses along.

    Args:
        generator: (B, z_dim) -> samples.
        critic: With ``critic_loss(x_real, x_fake)`` and ``generator_loss(x_fake)``, as LipschitzCritic.
    """

    def __init__(self, generator: nn.Module, critic: Any) -> None:
        super().__init__()
        self.generator, self.critic = generator, critic

    def critic_terms(self, x: Tensor, z: Tensor) -> Terms:
        """See :class:`Game`."""
        with torch.no_grad():
            fake = self.generator(z)
        _check_samples(fake, x)
        critic: Any = self.critic
        return {"critic": critic.critic_loss(x, fake)}

    def player_terms(self, x: Tensor, z: Tensor) -> Terms:
        """See :class:`Game`."""
        critic: Any = self.critic
        return {"generator": critic.generator_loss(self.generator(z))}

    def after_critic_step(self) -> None:
        """Weight clipping, where the critic's method is that."""
        constrain = getattr(self.critic, "constrain_", None)
        if callable(constrain):
            constrain()


class BiGANGame(Game):
    """BiGAN-QP: generator and encoder against a critic of pairs; formulas in ``bigan_qp.py``."""

    def __init__(
        self,
        generator: nn.Module,
        encoder: nn.Module,
        critic: nn.Module,
        loss: QPLoss,
        beta_z: float,
        beta_x: float,
        stop_gradient: bool,
    ) -> None:
        super().__init__()
        self.generator, self.encoder, self.critic = generator, encoder, critic
        self.loss, self.beta_z, self.beta_x, self.stop_gradient = loss, beta_z, beta_x, stop_gradient

    def _scores(self, x: Tensor, code: Tensor, fake: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """T(x, E(x)) and T(G(z), z), in one pass where no layer looks across the batch."""
        critic = self.critic
        parts = (critic.features, critic.head) if type(critic) is PairCritic else ()
        if parts and not uses_batch_statistics(critic) and all(joins(part, "auto") for part in parts):
            real, other = critic(torch.cat([x, fake]), torch.cat([code, z])).chunk(2)
            return real, other
        return critic(x, code), critic(fake, z)

    def critic_terms(self, x: Tensor, z: Tensor) -> Terms:
        """See :class:`Game`."""
        with torch.no_grad():
            fake, code = self.generator(z), self.encoder(x)
        _check_samples(fake, x)
        if code.shape != z.shape:
            raise ValueError(f"the encoder must give codes of shape {tuple(z.shape)}; got {tuple(code.shape)}")
        real, other = self._scores(x, code, fake, z)
        return {"critic": self.loss.critic(real, other, (x, code), (fake, z))}

    def player_terms(self, x: Tensor, z: Tensor) -> Terms:
        """See :class:`Game`."""
        fake, code = self.generator(z), self.encoder(x)
        terms = {"generator": self.loss.generator(*self._scores(x, code, fake, z))}
        # Each term teaches one player: in the codes only E learns, in the pictures only G.
        if self.beta_z:
            source = fake.detach() if self.stop_gradient else fake
            terms["codes"] = self.beta_z * F.mse_loss(self.encoder(source), z)
        if self.beta_x:
            source = code.detach() if self.stop_gradient else code
            terms["pictures"] = self.beta_x * F.mse_loss(self.generator(source), x)
        return terms


def _check_samples(fake: Any, x: Tensor) -> None:
    if not isinstance(fake, Tensor) or fake.shape != x.shape:
        found = tuple(fake.shape) if isinstance(fake, Tensor) else type(fake).__name__
        raise ValueError(f"the generator must give samples of shape {tuple(x.shape)}, as the data; got {found}")
