"""BiGAN-QP (编码与生成): one model that samples, encodes, reconstructs, interpolates and finds similar items.

Source: 科学空间 6214 (BiGAN-QP:简单清晰的编码&生成模型); Donahue et al. 2017, https://arxiv.org/abs/1605.09782 (BiGAN).

Pairs (x, E(x)) against (G(z), z), with the critic T(x, z) = head(concat(features(x), z)):

    D    = T(x, E(x)) - T(G(z), z)
    norm = lam (mean|x - G(z)| + mean|E(x) - z|)
    T:     minimise mean( -D + D^2 / (2 norm) )
    G, E:  minimise mean(D) + beta_z mean (z - E(sg G(z)))^2 + beta_x mean (x - G(sg E(x)))^2

sg is the stop-gradient: from the term of z only E learns, from that of x only G. Without the two terms G and E rarely
become inverse to each other; without the stop-gradients the reconstructions blur. A generator that has collapsed cannot
be inverted, so the terms also work against that. T(x, E(x)) is *minimised* by E: that is the game.

What we do differently, and why: real and fake pairs go through T in one pass where no layer looks across the batch; T
is frozen while G and E learn; no graph is built through them while T learns; a killed run continues bit by bit.
"""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.utils.validation import check_is_fitted
from torch import Tensor, nn

from kexue._checks import check_choice, check_int, check_real
from kexue.adversarial import _bigan_files as files
from kexue.adversarial._arrays import as_tensor
from kexue.adversarial.games import BiGANGame
from kexue.adversarial.loop import OnStep, Samples, Stopped, as_floats, play
from kexue.adversarial.networks import bigan_networks
from kexue.adversarial.qp import Metric, QPLoss
from kexue.adversarial.quality import nearest
from kexue.adversarial.trainer import check_plan, check_samples, draw, in_blocks
from kexue.training.interrupt import TrainingInterrupted
from kexue.training.order import kept_random_state

__all__ = ["BiGANQP"]

PARTS = ("generator", "encoder", "critic")


class BiGANQP(TransformerMixin, BaseEstimator):
    """Learn to generate samples and to encode them, and use both.

    Args:
        generator: Maps codes (B, z_dim) to samples; it is copied, not changed. None builds all three networks for the
            samples (:func:`bigan_networks`).
        encoder: Maps samples to codes (B, z_dim).
        critic: Maps samples and codes to scores (B,) or (B, 1), for example a :class:`PairCritic`; best without batch
            normalisation, which makes it look across the batch.
        z_dim: Width of the codes, whose prior is N(0, 1).
        lam: lam of :class:`QPLoss`; results hardly depend on it.
        beta_z: Weight of the reconstruction of codes; 2 for 128 pixels in the article, 4 for 256.
        beta_x: Weight of the reconstruction of samples; 3 for 128 pixels in the article, 6 for 256.
        stop_gradient: Let each reconstruction teach one network.
        metric: Distance of :class:`QPLoss`, for samples and codes.
        power: Power of :class:`QPLoss`.
        lr: Rate of Adam.
        betas: Of Adam.
        random_state: Seed of the networks that are built, of samples and noise.
        show_progress: None shows a bar if standard error is a terminal.

    Attributes:
        generator_, encoder_, critic_: The trained networks, in evaluation mode.
        codes_: (N, z_dim) codes of the samples that were learned from, for :meth:`neighbors`.
        shape_: Shape of one sample.
        history_: Each term of the losses at each step: ``critic``, ``generator``, ``codes`` and ``pictures`` (the last
            two with their weights).

    Raises:
        TypeError: In ``fit``: arguments of the wrong kind.
        ValueError: In ``fit``: no samples, samples outside -1 to 1 or not finite, settings out of range, networks that
            do not fit them.

    Reference:
        https://spaces.ac.cn/archives/6214

    Example:
        >>> x = np.random.default_rng(0).uniform(-1, 1, (50, 8, 8)).astype(np.float32)
        >>> model = BiGANQP(z_dim=4).fit(x, steps=3, batch_size=16)
        >>> model.sample(2).shape, model.transform(x).shape, model.interpolate(x[0], x[1], 5).shape
        ((2, 8, 8), (50, 4), (5, 8, 8))
    """

    def __init__(
        self,
        generator: Any = None,
        encoder: Any = None,
        critic: Any = None,
        z_dim: int = 64,
        lam: float = 10.0,
        beta_z: float = 4.0,
        beta_x: float = 6.0,
        stop_gradient: bool = True,
        *,
        metric: Metric = "l1",
        power: int = 2,
        lr: float = 2e-4,
        betas: tuple[float, float] = (0.5, 0.999),
        random_state: int = 0,
        show_progress: bool | None = None,
    ) -> None:
        self.generator = generator
        self.encoder = encoder
        self.critic = critic
        self.z_dim = z_dim
        self.lam = lam
        self.beta_z = beta_z
        self.beta_x = beta_x
        self.stop_gradient = stop_gradient
        self.metric = metric
        self.power = power
        self.lr = lr
        self.betas = betas
        self.random_state = random_state
        self.show_progress = show_progress

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.two_d_array = False
        return tags

    def fit(
        self,
        X: Any,
        y: Any = None,
        *,
        steps: int = 2000,
        batch_size: int = 64,
        critic_steps: int = 2,
        checkpoint: str | os.PathLike[str] | None = None,
        checkpoint_every: int = 500,
        on_step: OnStep | None = None,
    ) -> Self:
        """Train.

        Args:
            X: (N, ...) samples in [-1, 1], tensor or array, floating, or uint8, whose 0 to 255 stand for -1 to 1.
            y: Ignored.
            steps: Steps of generator and encoder.
            batch_size: Samples of a step, drawn with replacement.
            critic_steps: Steps of the critic before each of them.
            checkpoint: Folder in which the run is saved. Called again with the same arguments after a crash or Ctrl-C,
                ``fit`` continues there and ends with the same weights, bit by bit, as an undisturbed run.
            checkpoint_every: Steps between checkpoints.
            on_step: Called after each step with its terms (``step``, ``critic``, ``generator``, ``codes``,
                ``pictures``, ``seconds``); returning True ends the training.

        Raises:
            KeyboardInterrupt: Ctrl-C; the step is finished first, and the estimator is usable with its weights. A
                second Ctrl-C stops at once and leaves the estimator as it was before.
            FloatingPointError: A term of a loss is not finite; its step is not applied.
        """
        data = self._samples("X", X)
        plan = check_plan(
            steps=steps, critic_steps=critic_steps, batch_size=batch_size, z_dim=self.z_dim, lr=self.lr, critic_lr=None,
            betas=self.betas, random_state=self.random_state,
        )  # fmt: skip
        check_int("checkpoint_every", checkpoint_every, 1)
        for name in ("beta_z", "beta_x"):
            check_real(name, getattr(self, name), minimum=0.0)
        if not isinstance(self.stop_gradient, bool | np.bool_):
            raise TypeError(f"stop_gradient must be a bool; got {self.stop_gradient!r}")
        loss = QPLoss(self.lam, self.metric, self.power, validate=not isinstance(self.metric, str))
        networks, self._own = self._networks(tuple(data.shape[1:]))
        game = BiGANGame(*networks, loss, float(self.beta_z), float(self.beta_x), bool(self.stop_gradient))
        like = next(networks[0].parameters())
        self._try(networks, as_floats(data[:2], like.dtype).to(like.device))
        settings = {
            "lam": loss.lam, "metric": loss.metric if isinstance(loss.metric, str) else "own", "power": loss.power,
            "beta_z": game.beta_z, "beta_x": game.beta_x, "stop_gradient": game.stop_gradient,
        }  # fmt: skip
        try:
            history = play(
                game, Samples(data, like), plan, folder=None if checkpoint is None else Path(checkpoint),
                save_every=checkpoint_every, settings=settings, on_step=on_step, label="learning to generate",
                show_progress=self.show_progress,
            )  # fmt: skip
        except (TrainingInterrupted, Stopped):  # after a whole step
            self._take(networks, data, {})
            raise
        self._take(networks, data, history)
        return self

    def _take(self, networks: tuple[nn.Module, ...], data: Tensor, history: dict[str, list[float]]) -> None:
        self.generator_, self.encoder_, self.critic_ = (m.eval() for m in networks)
        self.shape_, self.history_ = tuple(data.shape[1:]), history
        self.n_features_in_ = int(np.prod(self.shape_))
        self.codes_ = self._codes(data)

    def _samples(self, name: str, x: Any, shape: tuple[int, ...] | None = None) -> Tensor:
        data = check_samples(name, x)
        if shape is not None and tuple(data.shape[1:]) != shape:
            raise ValueError(f"{name} must have shape (N, {', '.join(map(str, shape))}); got {tuple(data.shape)}")
        if data.is_floating_point():
            low, high = float(data.min()), float(data.max())
            if low < -1.001 or high > 1.001:
                raise ValueError(f"{name} must lie in [-1, 1]; got {low:.4g} to {high:.4g}")
        return data

    def _networks(self, shape: tuple[int, ...]) -> tuple[tuple[nn.Module, nn.Module, nn.Module], bool]:
        """The networks to train, and whether they are built here."""
        given = {name: getattr(self, name) for name in PARTS}
        missing = [name for name, module in given.items() if module is None]
        if len(missing) == 3:
            with kept_random_state(torch.device("cpu")):
                torch.manual_seed(self.random_state)
                return bigan_networks(shape, self.z_dim), True
        if missing:
            raise ValueError(f"give all three networks or none; {', '.join(missing)} missing")
        for name, module in given.items():
            if not isinstance(module, nn.Module):
                raise TypeError(f"{name} must be a torch.nn.Module; got {type(module).__name__}")
            if not any(p.requires_grad for p in module.parameters()):
                raise ValueError(f"the {name} has no parameter that requires a gradient")
        made = copy.deepcopy(tuple(given.values()))  # together, so that what they share stays shared
        return made, False

    def _try(self, networks: tuple[nn.Module, nn.Module, nn.Module], x: Tensor) -> None:
        """Raise ValueError where the networks do not fit the samples."""
        generator, encoder, critic = networks
        code = in_blocks(encoder, x)
        if tuple(code.shape) != (len(x), self.z_dim):
            raise ValueError(f"the encoder must give codes of shape (B, z_dim = {self.z_dim}); got {tuple(code.shape)}")
        fake = in_blocks(generator, code)
        if fake.shape != x.shape:
            raise ValueError(
                f"the generator must give samples of shape (B, {', '.join(map(str, x.shape[1:]))}); "
                f"got {tuple(fake.shape)}"
            )
        flags = [(m, m.training) for m in critic.modules()]
        with torch.no_grad():
            score = critic.eval()(x, code)
        for m, flag in flags:
            m.training = flag
        if tuple(score.shape) not in ((len(x),), (len(x), 1)):
            raise ValueError(f"the critic must give scores of shape (B,) or (B, 1); got {tuple(score.shape)}")

    def _codes(self, data: Tensor) -> NDArray[Any]:
        like = next(self.generator_.parameters())
        blocks = [in_blocks(self.encoder_, as_floats(p.to(like.device), like.dtype)) for p in data.split(512)]
        return torch.cat(blocks).cpu().numpy()

    def sample(self, n: int = 1, random_state: int | None = None) -> NDArray[Any]:
        """Generate samples.

        Args:
            n: Number of samples.
            random_state: Seed of their codes; None: that of the estimator, so that every call gives the same.

        Returns:
            (n, ...) samples.
        """
        check_is_fitted(self, "generator_")
        check_int("n", n, 1)
        seed = self.random_state if random_state is None else random_state
        return draw(self.generator_, n, self.codes_.shape[1], seed).cpu().numpy()

    def transform(self, X: Any) -> NDArray[Any]:
        """Codes of samples.

        Args:
            X: (N, ...) samples in [-1, 1], of the shape that was learned.

        Returns:
            (N, z_dim).
        """
        check_is_fitted(self, "encoder_")
        return self._codes(self._samples("X", X, self.shape_))

    def inverse_transform(self, Z: Any) -> NDArray[Any]:
        """Samples of codes; ``inverse_transform(transform(X))`` reconstructs X.

        Args:
            Z: (N, z_dim) codes.

        Returns:
            (N, ...) samples.
        """
        check_is_fitted(self, "generator_")
        codes = check_samples("Z", Z)
        width = self.codes_.shape[1]
        if codes.dtype == torch.uint8 or tuple(codes.shape[1:]) != (width,):
            raise ValueError(f"Z must be floating codes (N, {width}); got {tuple(codes.shape)}, {codes.dtype}")
        like = next(self.generator_.parameters())
        return in_blocks(self.generator_, codes.to(like.device, like.dtype)).cpu().numpy()

    def interpolate(self, a: Any, b: Any, n: int = 8) -> NDArray[Any]:
        """Samples on the way from a to b: of codes on the straight line between theirs.

        Args:
            a: One sample, with or without a first dimension of 1.
            b: Another.
            n: Number of samples, at least 2.

        Returns:
            (n, ...): the first is the reconstruction of a, the last that of b.
        """
        check_is_fitted(self, "generator_")
        check_int("n", n, 2)
        ends = [self.transform(self._one(name, x))[0] for name, x in (("a", a), ("b", b))]
        share = np.linspace(0, 1, n, dtype=ends[0].dtype)[:, None]
        return self.inverse_transform((1 - share) * ends[0] + share * ends[1])

    def _one(self, name: str, x: Any) -> Tensor:
        x = as_tensor(name, x)
        x = x[None] if tuple(x.shape) == self.shape_ else x
        if tuple(x.shape) != (1, *self.shape_):
            raise ValueError(f"{name} must be one sample of shape {self.shape_}; got {tuple(x.shape)}")
        return x

    def neighbors(self, x: Any, k: int = 5, metric: str = "euclidean") -> tuple[NDArray[Any], NDArray[np.int64]]:
        """The samples learned from that are nearest in code space.

        Args:
            x: (N, ...) samples, or one.
            k: Neighbours of each, at most as many as were learned from.
            metric: "euclidean", or "cosine": 1 - cosine.

        Returns:
            Distances and numbers of the neighbours, (N, k) each, nearest first.
        """
        check_is_fitted(self, "encoder_")
        check_int("k", k, 1)
        check_choice("metric", metric, ("euclidean", "cosine"))
        if k > len(self.codes_):
            raise ValueError(f"k must be at most the {len(self.codes_)} samples learned from; got {k}")
        x = as_tensor("x", x)
        codes = torch.from_numpy(self.transform(x[None] if tuple(x.shape) == self.shape_ else x)).double()
        stored = torch.from_numpy(self.codes_).double()
        if metric == "cosine":
            codes, stored = (c / c.norm(dim=1, keepdim=True).clamp(min=1e-12) for c in (codes, stored))
        distance, number = nearest(codes, stored, k)
        if metric == "cosine":  # |a - b|^2 = 2 - 2 cos for rows of length 1
            distance = distance.square() / 2
        return distance.numpy(), number.numpy()

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the fitted estimator into a folder, replacing an earlier one in one step; no pickle.

        Args:
            folder: The folder; an existing one must be empty or hold an earlier save.
        """
        check_is_fitted(self, "generator_")
        files.save(self, folder)

    @classmethod
    def load(
        cls, folder: str | os.PathLike[str], generator: Any = None, encoder: Any = None, critic: Any = None
    ) -> Self:
        """Read what :meth:`save` wrote.

        Args:
            folder: The folder.
            generator: A module of the same shape, if the networks were the user's own.
            encoder: The same.
            critic: The same.

        Raises:
            ValueError: No complete model, or networks that do not fit it.
        """
        return files.load(cls, folder, (generator, encoder, critic))
