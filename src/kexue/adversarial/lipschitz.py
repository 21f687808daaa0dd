"""One switch for how a critic is kept Lipschitz (判别器的 L 约束).

Source: 科学空间 8757 (WGAN新方案:通过梯度归一化来实现L约束), and 6051, 4439, 6139, 6163 on the other methods.

    none   nothing
    clip   weights clamped to [-bound, bound] after each step
    sn     every weight divided by its largest singular value
    gp     lam (|grad D| - 1)^2 between real and fake rows; gp1 only where the slope is above 1
    r1     lam / 2 |grad D|^2 at real rows
    div    k / 2 |grad D|^p at real and at fake rows
    gn     D / (|grad D| + |D|) in place of D, gran D |grad D| / (|grad D|^2 + eps)
    qp     no constraint, the quadratic potential of GAN-QP in place of the loss

Real rows get high scores. What we do differently: scores and slopes come from one pass where they are needed at the
same points, and piecewise-linear critics are never differentiated twice (see ``_piecewise``).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from kexue._checks import check_choice, check_real
from kexue.adversarial._piecewise import (
    check_critic,
    check_first_order,
    check_rows,
    frozen,
    has_hooks,
    score_and_square,
    scores,
)
from kexue.adversarial._spectral import SpectralNorms
from kexue.adversarial.normalization import check_eps, normalized
from kexue.adversarial.penalties import between, check_pair, clip_weights_, div, penalty
from kexue.adversarial.qp import QPLoss

__all__ = ["LipschitzCritic"]

METHODS = ("none", "clip", "sn", "gp", "gp1", "r1", "div", "gn", "gran", "qp")
LOSSES = ("bce", "hinge", "wasserstein")
BY_GRADIENT = ("gp", "gp1", "r1", "div", "gn", "gran")


def _critic_loss(real: Tensor, fake: Tensor, loss: str) -> Tensor:
    if loss == "bce":
        return F.softplus(-real).mean() + F.softplus(fake).mean()
    if loss == "hinge":
        return F.relu(1 - real).mean() + F.relu(1 + fake).mean()
    return fake.mean() - real.mean()


class LipschitzCritic(nn.Module):
    """A critic with one of ten ways to bound its slope, under one interface.

    ``critic(x)`` gives scores, :meth:`critic_loss` and :meth:`generator_loss` what to minimise, :meth:`constrain_`
    is called after each step of the critic's optimiser (only "clip" needs it).

    Args:
        net: (B, ...) -> (B,) or (B, 1). Methods that use its gradient refuse BatchNorm in training mode.
        method: "none", "clip", "sn", "gp", "gp1", "r1", "div", "gn", "gran" or "qp".
        loss: "bce", "hinge" or "wasserstein"; "gp" and "div" were published with "wasserstein". "qp" has its own loss.
        scale: Factor of the scores: the slope that the method aims at becomes ``scale``. Gradient-normalised
            scores lie in [-scale, scale], and their slope depends on the units of x.
        lam: Weight of the penalty of "gp", "gp1" and "r1", lambda of "qp".
        k: Weight of "div".
        p: Power of "div".
        bound: Of the weights, "clip".
        eps: Of "gn" and "gran", see :func:`kexue.adversarial.gradient_normalize`.
        first_order: See :func:`kexue.adversarial.gradient_normalize`.

    Attributes:
        net: The given critic, unchanged (with "sn" its weights are divided anew for each call).

    Raises:
        TypeError: Not a module, settings that are no numbers.
        ValueError: An unknown method or loss, settings out of range.

    Reference:
        https://spaces.ac.cn/archives/8757

    Example:
        >>> _ = torch.manual_seed(0)
        >>> net = torch.nn.Sequential(torch.nn.Linear(2, 16), torch.nn.LeakyReLU(0.2), torch.nn.Linear(16, 1))
        >>> critic = LipschitzCritic(net, method="gn", loss="hinge")
        >>> real, fake = torch.randn(8, 2), torch.randn(8, 2) + 3
        >>> critic(real).shape, bool((critic(real).abs() <= 1).all())
        (torch.Size([8]), True)
        >>> critic.critic_loss(real, fake).backward()
        >>> critic.generator_loss(fake.requires_grad_()).backward()  # reaches the fakes, not the critic
    """

    def __init__(
        self,
        net: nn.Module,
        method: str = "gn",
        loss: str = "bce",
        scale: float = 1.0,
        *,
        lam: float = 10.0,
        k: float = 2.0,
        p: float = 6.0,
        bound: float = 0.01,
        eps: float | None = None,
        first_order: bool | str = "auto",
    ) -> None:
        super().__init__()
        if not isinstance(net, nn.Module):
            raise TypeError(f"net must be an nn.Module; got {type(net).__name__}")
        check_choice("method", method, METHODS)
        check_choice("loss", loss, LOSSES)
        check_real("scale", scale, above=0.0)
        if method == "qp":
            check_real("lam", lam, above=0.0)
        check_real("lam", lam, minimum=0.0)
        check_real("k", k, minimum=0.0)
        check_real("p", p, minimum=1.0)
        check_real("bound", bound, above=0.0)
        check_eps(eps)
        check_first_order(first_order)
        self.net, self.method, self.loss = net, method, loss
        self.scale, self.lam, self.k, self.p, self.bound = float(scale), float(lam), float(k), float(p), float(bound)
        self.eps, self.first_order = eps, first_order
        self.spectral = SpectralNorms(net) if method == "sn" else None

    def extra_repr(self) -> str:
        """Method, loss and scale."""
        return f"method={self.method!r}, loss={self.loss!r}, scale={self.scale:g}"

    def _score(self, x: Tensor, first_order: bool | str) -> Tensor:
        if self.method in ("gn", "gran"):
            out = normalized(*score_and_square(self.net, x, first_order, checked=True), self.method, self.eps)
        elif self.spectral is not None:
            weights = self.spectral(self.net)
            out = scores(lambda rows: functional_call(self.net, weights, (rows,)), x)
        else:
            out = scores(self.net, x)
        return out if self.scale == 1 else out * self.scale

    def forward(self, x: Tensor) -> Tensor:
        """Scores of rows.

        Args:
            x: (B, ...) in the critic's dtype.

        Returns:
            (B,) float32 or float64, differentiable in ``x`` and in the weights.
        """
        check_rows("x", x, self.net)
        return self._score(x, self.first_order)

    def _as_written(self) -> bool:
        """Whether a call does what this class says: no subclass, no forward or hook of the user's own."""
        return type(self) is LipschitzCritic and "forward" not in self.__dict__ and not has_hooks(self)

    @property
    def _scaled_network(self) -> tuple[nn.Module | None, float]:
        """The network and the factor that make the scores, None if there is more to them."""
        return (None if self.method in ("sn", "gn", "gran") or not self._as_written() else self.net), self.scale

    @property
    def _twice_differentiable(self) -> Callable[[Tensor], Tensor]:
        """The scores in a form whose gradient can be differentiated, for penalties on normalised scores."""
        return partial(self._score, first_order=False) if self._as_written() else self

    def _both(self, x_real: Tensor, x_fake: Tensor) -> tuple[Tensor, Tensor]:
        """Scores of real and of fake rows; in one pass, unless batch statistics would couple them."""
        if any(isinstance(m, _BatchNorm) and m.training for m in self.net.modules()):
            return self._score(x_real, self.first_order), self._score(x_fake, self.first_order)
        both = self._score(torch.cat([x_real, x_fake]), self.first_order)
        return both[: len(x_real)], both[len(x_real) :]

    def critic_loss(self, x_real: Tensor, x_fake: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """What the critic minimises, penalty included.

        Args:
            x_real: Real rows (B, ...).
            x_fake: Generated rows, as many for "gp", "gp1" and "qp"; no gradient reaches them.
            generator: Draws the points of "gp" and "gp1".

        Returns:
            Scalar, float32 or float64.

        Raises:
            TypeError: Inputs that are not floating, or not of the critic's dtype.
            ValueError: Shapes that do not fit, no rows, batch statistics where a method uses gradients.
        """
        check_pair(x_real, x_fake, equal_rows=self.method in ("gp", "gp1", "qp"))
        check_rows("x_real", x_real, self.net)
        if self.method in ("gp", "gp1"):  # before plain scores change its statistics; the others ask for slopes first
            check_critic(self.net)
        real, fake = x_real.detach(), x_fake.detach()
        if self.method == "div":
            score, square = score_and_square(self.net, torch.cat([real, fake]), self.first_order)
            score, n = score * self.scale, len(real)
            return _critic_loss(score[:n], score[n:], self.loss) + div(square, n, self.k, self.p)
        if self.method == "r1":
            score, square = score_and_square(self.net, real, self.first_order)
            others = scores(self.net, fake) * self.scale
            return _critic_loss(score * self.scale, others, self.loss) + penalty(square, "r1", self.lam)
        high, low = self._both(real, fake)
        if self.method == "qp":
            return QPLoss(self.lam, validate=False).critic(high, low, real, fake)
        loss = _critic_loss(high, low, self.loss)
        if self.method in ("gp", "gp1"):
            points = between(real, fake, generator)
            square = score_and_square(self.net, points, self.first_order)[1]
            loss = loss + penalty(square, self.method, self.lam)
        return loss

    def generator_loss(self, x_fake: Tensor) -> Tensor:
        """What the generator minimises; the critic's weights get no gradient.

        Args:
            x_fake: Generated rows (B, ...), with their graph.

        Returns:
            Scalar: the mean of softplus(-score) for "bce", of -score otherwise.

        Raises:
            TypeError: Not floating, or not of the critic's dtype.
            ValueError: No rows, or batch statistics where a method uses gradients.
        """
        check_rows("x_fake", x_fake, self.net)
        if len(x_fake) == 0:
            raise ValueError("x_fake must have rows; got 0")
        with frozen(self.net):
            score = self._score(x_fake, self.first_order)
        return F.softplus(-score).mean() if self.loss == "bce" and self.method != "qp" else -score.mean()

    def constrain_(self) -> LipschitzCritic:
        """Clamp the weights for "clip", nothing otherwise; to be called after each step of the critic's optimiser.

        Returns:
            This critic.
        """
        if self.method == "clip":
            clip_weights_(self.net, self.bound)
        return self
