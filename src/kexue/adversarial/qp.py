"""GAN-QP (二次势 GAN): a divergence of samples that needs no Lipschitz constraint and never saturates.

Source: 科学空间 6163 (不用L约束又不会梯度消失的GAN,了解一下?) and 6214 (BiGAN-QP:简单清晰的编码&生成模型).

For any distance d and lam > 0, with D = T(x_r) - T(x_f) over pairs (real x_r ~ p, fake x_f ~ q):

    L[p, q] = max over T of E[ D - D^2 / (2 lam d(x_r, x_f)) ]          >= 0, and 0 only for p = q
    critic:     minimise mean( -D + D^2 / (2 lam d) )
    generator:  minimise mean( D )

Two point masses at distance d have L = lam d / 2, so the generator is pulled from any distance; the usual GAN's
divergence is log 2 there, whatever d. With power 2m the square becomes lam d (D / (lam d))^2m / 2m, and the maximum
(1 - 1/2m) lam d at D = lam d. The quadratic term is never part of the generator's loss: through d it would pull every
fake to the real one that it happens to be paired with.

What we do differently, and why: d carries no gradient whatever comes in; the quotient is computed in float32 also under
autocast; lam d is kept above 1e-8, so that a pair of equal samples counts 0 instead of 0 / 0; a distance of the user's
own is checked to be symmetric and not negative, on which the theory rests.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kexue._checks import check_int, check_real
from kexue._tensors import check_float, compute_dtype
from kexue.models._views import joins, uses_batch_statistics

__all__ = ["QPCritic", "QPLoss"]

EPS = 1e-8  # least lam * d
METRICS = ("l1", "l2")
Metric = str | Callable[[Tensor, Tensor], Tensor]
Samples = Tensor | Sequence[Tensor]


def check_metric(metric: Any) -> None:
    """Raise unless ``metric`` names a distance or is one."""
    if not callable(metric) and metric not in METRICS:
        raise ValueError(f"metric must be 'l1', 'l2' or a callable (x_r, x_f) -> (B,); got {metric!r}")


def check_power(power: Any) -> None:
    """Raise unless ``power`` is even and at least 2."""
    check_int("power", power, 2)
    if power % 2:
        raise ValueError(f"power must be even; got {power}")


def scores_of(name: str, scores: Any) -> Tensor:
    """Scores (B,) from (B,) or (B, 1)."""
    check_float(name, scores)
    if scores.dim() == 2 and scores.shape[1] == 1:
        return scores[:, 0]
    if scores.dim() != 1:
        raise ValueError(f"{name} must have shape (B,) or (B, 1); got {tuple(scores.shape)}")
    return scores


class QPLoss:
    """The two losses of GAN-QP, for scores of paired samples.

    Row i of the reals is paired with row i of the fakes: any random pairing serves. With the two-argument form of the
    critic hand over T(x_r, x_f) as ``score_real`` and T(x_f, x_r) as ``score_fake``.

    Args:
        lam: lam; it scales the critic, and results hardly depend on it.
        metric: d: "l1" mean |x_r - x_f| or "l2" sqrt(mean (x_r - x_f)^2) over all dimensions but the first, or a
            callable ``(x_r, x_f) -> (B,)``, symmetric and not negative.
        power: 2, or another even number.
        validate: Look for values that are not finite (and for a callable that is no distance); never done under
            ``torch.compile``. False saves a GPU from waiting.

    Raises:
        TypeError: An argument of another kind.
        ValueError: ``lam`` not positive, ``power`` odd or below 2, another metric.

    Reference:
        https://spaces.ac.cn/archives/6163

    Example:
        >>> loss = QPLoss(lam=10.0)
        >>> x_real, x_fake = torch.zeros(2, 3), torch.ones(2, 3)  # d = 1: the best critic has a difference of 10
        >>> loss.critic(torch.tensor([10.0, 10.0]), torch.tensor([0.0, 0.0]), x_real, x_fake)
        tensor(-5.)
        >>> loss.generator(torch.tensor([10.0, 10.0]), torch.tensor([0.0, 0.0]))
        tensor(10.)
    """

    def __init__(self, lam: float = 10.0, metric: Metric = "l1", power: int = 2, *, validate: bool = True) -> None:
        check_real("lam", lam, above=0.0)
        check_metric(metric)
        check_power(power)
        if not isinstance(validate, bool):
            raise TypeError(f"validate must be a bool; got {validate!r}")
        self.lam, self.metric, self.power, self.validate = float(lam), metric, int(power), validate

    def __repr__(self) -> str:
        return f"QPLoss(lam={self.lam:g}, metric={self.metric!r}, power={self.power})"

    def critic(self, score_real: Tensor, score_fake: Tensor, x_real: Samples, x_fake: Samples) -> Tensor:
        """What the critic minimises; minus its value is a lower bound of L[p, q].

        Args:
            score_real: T(x_r), (B,) or (B, 1).
            score_fake: T(x_f), the same.
            x_real: (B, ...). A sequence of such tensors makes pairs of several parts, whose distances are added:
                ``(x, E(x))`` against ``(G(z), z)`` is BiGAN-QP.
            x_fake: The same shapes. No gradient flows into samples.

        Returns:
            Mean over the pairs, 0 for none; float32 (float64 if the scores are).

        Raises:
            TypeError: Something is no floating tensor.
            ValueError: Sizes that differ; with ``validate`` also scores or samples that are not finite, and a metric
                that is negative or not symmetric.
        """
        real, fake = self._scores(score_real, score_fake)
        with torch.autocast(real.device.type, enabled=False):
            norm = self._norm(x_real, x_fake, real)
            delta = real - fake
            ratio = delta / norm
            if self.power == 2:
                rows = delta * (0.5 * ratio - 1)
            else:
                rows = delta * (ratio ** (self.power - 1) / self.power - 1)
            loss = rows.sum() / max(rows.shape[0], 1)
        self._check_finite(loss, score_real=real, score_fake=fake, distance=norm)
        return loss

    def generator(self, score_real: Tensor, score_fake: Tensor) -> Tensor:
        """What the generator minimises. Gradients reach both scores: in BiGAN-QP T(x, E(x)) trains the encoder.

        Args:
            score_real: T(x_r), (B,) or (B, 1).
            score_fake: T(x_f), the same.

        Returns:
            mean(T(x_r) - T(x_f)), 0 for no pair; float32 (float64 if the scores are).

        Raises:
            TypeError: Something is no floating tensor.
            ValueError: Sizes that differ, or, with ``validate``, scores that are not finite.
        """
        real, fake = self._scores(score_real, score_fake)
        loss = (real - fake).sum() / max(real.shape[0], 1)
        self._check_finite(loss, score_real=real, score_fake=fake)
        return loss

    def distance(self, x_real: Samples, x_fake: Samples) -> Tensor:
        """The distance of each pair.

        Args:
            x_real: (B, ...), or a sequence of such tensors, whose distances are added.
            x_fake: The same shapes.

        Returns:
            (B,), in float32 (float64 if the samples are), without a gradient.

        Raises:
            TypeError: Something is no floating tensor.
            ValueError: Shapes that differ, or a metric that returns another shape, negative values, or another value
                when its arguments are exchanged.
        """
        with torch.autocast(_device(x_real), enabled=False):
            return self._distance(x_real, x_fake)

    def _distance(self, x_real: Samples, x_fake: Samples) -> Tensor:
        real, fake = _parts("x_real", x_real), _parts("x_fake", x_fake)
        if len(real) != len(fake):
            raise ValueError(f"x_real and x_fake must have as many parts; got {len(real)} and {len(fake)}")
        total: Tensor | None = None
        for a, b in zip(real, fake, strict=True):
            if a.shape != b.shape:
                raise ValueError(
                    f"x_real and x_fake must have the same shape; got {tuple(a.shape)} and {tuple(b.shape)}"
                )
            with torch.no_grad():
                d = self._part_distance(a, b)
            if total is not None and d.shape != total.shape:
                raise ValueError(f"all parts must have {total.shape[0]} rows; got {d.shape[0]}")
            total = d if total is None else total + d
        if total is None:
            raise ValueError("x_real and x_fake must have at least one part; got an empty sequence")
        return total

    def _scores(self, score_real: Any, score_fake: Any) -> tuple[Tensor, Tensor]:
        real, fake = scores_of("score_real", score_real), scores_of("score_fake", score_fake)
        if real.shape != fake.shape:
            raise ValueError(f"real and fake batches must have the same size; got {real.shape[0]} and {fake.shape[0]}")
        dtype = compute_dtype(real, fake)
        return real.to(dtype), fake.to(dtype)

    def _norm(self, x_real: Samples, x_fake: Samples, scores: Tensor) -> Tensor:
        d = self._distance(x_real, x_fake)
        if d.shape != scores.shape:
            raise ValueError(f"there must be one score for each of the {d.shape[0]} samples; got {scores.shape[0]}")
        return (d.to(scores.dtype) * self.lam).clamp_(min=EPS)

    def _part_distance(self, a: Tensor, b: Tensor) -> Tensor:
        if not isinstance(self.metric, str):
            return self._own_distance(a, b)
        difference = (a.to(compute_dtype(a, b)) - b).reshape(a.shape[0], a[:1].numel() or 1)  # (B, all the rest)
        if self.metric == "l1":
            return difference.abs().mean(1)
        return difference.square().mean(1).sqrt()

    def _own_distance(self, a: Tensor, b: Tensor) -> Tensor:
        metric: Any = self.metric
        d = metric(a, b)
        if not isinstance(d, Tensor) or tuple(d.shape) != (a.shape[0],):
            found = tuple(d.shape) if isinstance(d, Tensor) else type(d).__name__
            raise ValueError(f"metric must return a tensor of shape ({a.shape[0]},); got {found}")
        d = d.detach().to(compute_dtype(a, b))
        if self.validate and not torch.compiler.is_compiling():
            if bool((d < 0).any()):
                raise ValueError(f"metric must not be negative; got {float(d.min()):.6g}")
            back = metric(b, a).detach().to(d.dtype)
            if not torch.allclose(d, back, rtol=1e-3, atol=1e-6, equal_nan=True):
                row = int((d - back).abs().argmax())
                raise ValueError(
                    f"metric must be symmetric; got {float(d[row]):.6g} for a pair and {float(back[row]):.6g} for its "
                    "exchange"
                )
        return d

    def _check_finite(self, loss: Tensor, **terms: Tensor) -> None:
        if not self.validate or torch.compiler.is_compiling():
            return
        # An infinite distance leaves the loss finite: it only takes the quadratic term away.
        distance = terms.get("distance")
        fine = torch.isfinite(loss)
        if bool(fine if distance is None else fine & torch.isfinite(distance.sum())):
            return
        for name, value in terms.items():
            bad = ~torch.isfinite(value)
            if bool(bad.any()):
                raise ValueError(f"{name} must be finite; got {int(bad.sum())} of {value.numel()} values that are not")
        raise ValueError(f"the loss is {float(loss)}: the scores are too large for the distances of their pairs")


def _device(x: Any) -> str:
    first = x[0] if isinstance(x, Sequence) and x else x
    return first.device.type if isinstance(first, Tensor) else "cpu"


def _parts(name: str, x: Any) -> list[Tensor]:
    parts = [x] if isinstance(x, Tensor) else list(x) if isinstance(x, Sequence) else None
    if parts is None:
        raise TypeError(f"{name} must be a tensor or a sequence of tensors; got {type(x).__name__}")
    for part in parts:
        check_float(name, part)
        if part.dim() == 0:
            raise ValueError(f"{name} must have shape (B, ...); got a single number")
        if part.numel() == 0 and part.shape[0]:
            raise ValueError(f"{name} must have at least one entry in each row; got shape {tuple(part.shape)}")
    return parts


class QPCritic(nn.Module):
    """A network with the losses of GAN-QP, for :class:`AdversarialTrainer`.

    Args:
        net: (B, ...) -> (B,) or (B, 1); no constraint on it.
        loss: The losses; None: ``QPLoss()``.

    Raises:
        TypeError: ``net`` is no module or ``loss`` no QPLoss.

    Example:
        >>> critic = QPCritic(nn.Linear(3, 1), QPLoss(lam=1.0, metric="l2"))
        >>> critic.critic_loss(torch.zeros(4, 3), torch.ones(4, 3)).shape
        torch.Size([])
    """

    def __init__(self, net: nn.Module, loss: QPLoss | None = None) -> None:
        super().__init__()
        if not isinstance(net, nn.Module):
            raise TypeError(f"net must be a torch.nn.Module; got {type(net).__name__}")
        if loss is not None and not isinstance(loss, QPLoss):
            raise TypeError(f"loss must be a QPLoss; got {type(loss).__name__}")
        self.net, self.loss = net, loss or QPLoss()

    def forward(self, x: Tensor) -> Tensor:
        """Scores of samples (B, ...)."""
        return self.net(x)

    def critic_loss(self, x_real: Tensor, x_fake: Tensor) -> Tensor:
        """What the critic minimises, for row i paired with row i; one pass where no layer looks across the batch."""
        net = self.net
        if x_real.shape == x_fake.shape and not uses_batch_statistics(net) and joins(net, "auto"):
            both = net(torch.cat([x_real, x_fake]))
            real, fake = both[: len(x_real)], both[len(x_real) :]
        else:
            real, fake = net(x_real), net(x_fake)
        return self.loss.critic(real, fake, x_real, x_fake)

    def generator_loss(self, x_fake: Tensor) -> Tensor:
        """What the generator minimises: mean(-T(G(z))), as T(x_r) has no gradient for it."""
        scores = scores_of("scores", self.net(x_fake))
        return -scores.to(compute_dtype(scores)).sum() / max(len(scores), 1)
