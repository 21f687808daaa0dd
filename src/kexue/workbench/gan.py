"""Train a generator on one's own pictures, and judge and show what it makes: ``kexue gan``.

    read -> some pictures held out -> networks trained -> figures -> grids of pictures -> manifest

An interrupted or killed run goes on where it was; the model that stood there before is untouched until the new one
takes its place.
"""

from __future__ import annotations

import json
import math
import shutil
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_model, save_model

from kexue import __version__
from kexue._checks import check_choice, check_int, check_real
from kexue._files import write_json
from kexue.adversarial import AdversarialTrainer, BiGANQP, gan_networks, image_grid, sample_quality
from kexue.adversarial.judges import Judge
from kexue.adversarial.loop import as_floats
from kexue.adversarial.networks import LARGEST_MLP
from kexue.adversarial.ranking import METHODS, critic_of
from kexue.adversarial.trainer import draw
from kexue.stats import frechet_distance
from kexue.training.order import kept_random_state
from kexue.workbench.build import explained
from kexue.workbench.errors import WorkspaceError
from kexue.workbench.pictures import Pictures, read_pictures
from kexue.workbench.targets import begin, check_free, locked, marked, publish, resolved

__all__ = ["MANIFEST", "GanModel", "GanSettings", "train_gan"]

MANIFEST = "gan.json"
BIGAN = "bigan-qp"
_SHOWN, _FEWEST = 8, 20  # pictures in a row; pictures below which nothing is held out


@dataclass(frozen=True)
class GanSettings:
    """What can be chosen; equal settings and pictures give equal models on one machine.

    Args:
        method: "bigan-qp", which also encodes, or a plain method of :func:`kexue.adversarial.rank_gans`.
        steps: Steps of the generator.
        batch_size: Pictures of a step.
        z_dim: Width of the noise; None: 16 for pictures of up to 1024 numbers, 128 for larger ones.
        critic_steps: Steps of the critic before each of the generator; None: 2 for GAN-QP and BiGAN-QP, else 1.
        lr: Rate of Adam; None: 5e-4 for pictures of up to 1024 numbers, 2e-4 for larger ones.
        size: As for :func:`kexue.workbench.pictures.read_pictures`.
        seed: Seed of everything random.

    Raises:
        ValueError: A value out of range.

    Example:
        >>> GanSettings().method
        'bigan-qp'
    """

    method: str = BIGAN
    steps: int = 2000
    batch_size: int = 64
    z_dim: int | None = None
    critic_steps: int | None = None
    lr: float | None = None
    size: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_choice("method", self.method, tuple(METHODS))
        check_int("steps", self.steps, 1)
        check_int("batch_size", self.batch_size, 2)
        for name, least in (("z_dim", 1), ("critic_steps", 1), ("size", 2)):
            if getattr(self, name) is not None:
                check_int(name, getattr(self, name), least)
        if self.lr is not None:
            check_real("lr", self.lr, above=0.0)
        check_int("seed", self.seed, 0)

    def chosen(self, shape: tuple[int, ...]) -> dict[str, Any]:
        """What is trained with, for pictures of a shape."""
        small = math.prod(shape) <= LARGEST_MLP
        qp = self.method in (BIGAN, "gan-qp")
        return {
            "z_dim": self.z_dim or (16 if small else 128),
            "critic_steps": self.critic_steps or (2 if qp else 1),
            "lr": self.lr or (5e-4 if small else 2e-4),
            "betas": (0.5, 0.999) if qp else (0.5, 0.9),
        }


def train_gan(
    source: str | Path | Pictures,
    out: str | Path,
    settings: GanSettings | None = None,
    *,
    force: bool = False,
    skip_bad: bool = False,
    progress: bool | None = None,
    log: Callable[[str], None] | None = None,
) -> Path:
    """Train a generator; called again after an interruption, it continues.

    Args:
        source: "digits", a folder of images, a .npy file, or pictures.
        out: The new folder.
        settings: What can be chosen.
        force: Replace a generator that stands at ``out``.
        skip_bad: Leave out images that cannot be read.
        progress: Show bars; None: if standard error is a terminal.
        log: Takes a line about each step.

    Returns:
        The folder of the finished model.

    Raises:
        WorkspaceError: ``out`` exists and is not to be replaced, or another run is writing it.
        ValueError: A setting out of range, or pictures that cannot be read.
        KeyboardInterrupt: After Ctrl-C, when everything is saved.
    """
    settings, say = settings or GanSettings(), log or (lambda line: None)
    target = resolved(out)
    partial = target.with_name(f".{target.name}.partial")
    with locked(target), explained(partial):
        check_free(target, MANIFEST, "trained generator", force)
        given = isinstance(source, Pictures)
        pictures = source if isinstance(source, Pictures) else read_pictures(
            source, settings.size, skip_bad=skip_bad, log=say
        )  # fmt: skip
        count = len(pictures.data)
        if count < 2:
            raise ValueError(f"at least two pictures are needed; got {count}")
        shape = pictures.shape
        say(f"read      {pictures.source}: {count:,} pictures of {' x '.join(map(str, shape))}")
        chosen = settings.chosen(shape)
        key = {"kexue": __version__, "settings": asdict(settings), "pictures": pictures.digest()}
        begin(partial, key, "pictures", say)
        train, held = _held_out(pictures.data, settings.seed)
        say(f"train     {settings.method}, {settings.steps:,} steps on {len(train):,} pictures")
        trained = _train(train, settings, chosen, partial / "training", progress)
        figures = {"pictures": count, "trained on": len(train), **_figures(trained, pictures, held, settings.seed)}
        say("evaluate  " + ", ".join(f"{name} {value:.4g}" for name, value in figures.items()))
        finished = partial / "model"
        shutil.rmtree(finished, ignore_errors=True)
        finished.mkdir()
        trained.save(finished)
        names = _draw(trained, train, held, settings.seed, finished)
        say(f"draw      {', '.join(names)}")
        manifest = {
            "format": 1, **key, "method": settings.method, "source": "pictures" if given else str(source),
            "shape": list(shape), "trained with": {**chosen, "betas": list(chosen["betas"])}, "figures": figures,
            "files": names,
        }  # fmt: skip
        write_json(finished / MANIFEST, manifest)
        publish(finished, target, partial)
    return target


class _Encoding:
    """A trained BiGAN-QP."""

    def __init__(self, model: BiGANQP) -> None:
        self.model, self.history = model, model.history_

    def sample(self, n: int, seed: int) -> NDArray[Any]:
        return self.model.sample(n, seed)

    def save(self, folder: Path) -> None:
        self.model.save(folder / "model")


class _Plain:
    """A trained generator without an encoder."""

    def __init__(self, generator: Any, z_dim: int, history: dict[str, list[float]]) -> None:
        self.generator, self.z_dim, self.history = generator, z_dim, history

    def sample(self, n: int, seed: int) -> NDArray[Any]:
        return draw(self.generator, n, self.z_dim, seed).numpy()

    def save(self, folder: Path) -> None:
        save_model(self.generator, str(folder / "generator.safetensors"))
        write_json(folder / "history.json", self.history)


def _train(
    data: NDArray[Any], settings: GanSettings, chosen: dict[str, Any], folder: Path, progress: bool | None
) -> _Encoding | _Plain:
    """The trained networks."""
    every = max(1, min(200, settings.steps // 10))
    if settings.method == BIGAN:
        model = BiGANQP(
            z_dim=chosen["z_dim"], lr=chosen["lr"], betas=chosen["betas"], random_state=settings.seed,
            show_progress=progress,
        )  # fmt: skip
        model.fit(
            data, steps=settings.steps, batch_size=settings.batch_size, critic_steps=chosen["critic_steps"],
            checkpoint=folder, checkpoint_every=every,
        )  # fmt: skip
        return _Encoding(model)
    with kept_random_state(torch.device("cpu")):
        torch.manual_seed(settings.seed)
        generator, net = gan_networks(data.shape[1:], chosen["z_dim"])
        critic = critic_of(settings.method, net)
    trainer = AdversarialTrainer(
        generator, critic, chosen["z_dim"], critic_steps=chosen["critic_steps"], batch_size=settings.batch_size,
        lr=chosen["lr"], betas=chosen["betas"], random_state=settings.seed, show_progress=progress,
    )  # fmt: skip
    trainer.fit(data, settings.steps, checkpoint=folder, checkpoint_every=every)
    return _Plain(generator, chosen["z_dim"], trainer.history_)


def _held_out(data: NDArray[Any], seed: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """A tenth of the pictures for what is measured on unseen ones."""
    order = np.random.default_rng(seed).permutation(len(data))
    count = len(data) // 10 if len(data) >= _FEWEST else 0
    return data[np.sort(order[count:])], data[np.sort(order[:count])]


def _floats(x: NDArray[Any]) -> torch.Tensor:
    return as_floats(torch.from_numpy(x), torch.float32)


def _figures(trained: _Encoding | _Plain, pictures: Pictures, held: NDArray[Any], seed: int) -> dict[str, float]:
    """Quality of the samples, and of the codes where there are any."""
    judge = Judge(_digit_judge(pictures) if pictures.labels is not None else None)
    count = min(len(pictures.data), 5000 if math.prod(pictures.shape) <= LARGEST_MLP else 1000)
    order = np.random.default_rng(seed).permutation(len(pictures.data))[:count]
    real = judge.features(_floats(pictures.data[order]))
    fake = torch.from_numpy(trained.sample(count, seed))
    features = judge.features(fake)
    found: dict[str, float] = {"fid": float(frechet_distance(real, features))}
    if count >= 4:
        found["fid of real halves"] = float(frechet_distance(real[::2], real[1::2]))
    found |= vars(sample_quality(real, features, min(5, count - 1)))
    if (classes := judge.classes_found(fake)) is not None:
        found["classes"] = classes
    if isinstance(trained, _Encoding) and len(held):
        x = _floats(held).numpy()
        back = trained.model.inverse_transform(trained.model.transform(held))
        codes = trained.model.codes_
        found["reconstruction mse, unseen"] = float(np.square(x - back).mean())
        found["mse of the mean picture"] = float(x.var(0).mean())
        found |= {"code mean": float(codes.mean()), "code std": float(codes.std())}
    return found


def _digit_judge(pictures: Pictures) -> Any:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.neural_network import MLPClassifier

    judge = MLPClassifier((64, 32), max_iter=60, random_state=0)
    flat = pictures.data.reshape(len(pictures.data), -1)
    with warnings.catch_warnings():  # 60 passes are enough for a judge
        warnings.simplefilter("ignore", ConvergenceWarning)
        return judge.fit(flat, pictures.labels)


def _draw(trained: _Encoding | _Plain, train: NDArray[Any], held: NDArray[Any], seed: int, folder: Path) -> list[str]:
    """Grids of pictures and the curves of the losses, as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from PIL import Image

    grids: dict[str, Any] = {}
    if train.ndim > 2:
        grids["samples"] = image_grid(trained.sample(_SHOWN * _SHOWN, seed), _SHOWN)
    if train.ndim > 2 and isinstance(trained, _Encoding):
        model, shown = trained.model, held if len(held) >= 2 else train
        x = _floats(shown[: 4 * _SHOWN]).numpy()
        pairs = np.stack([x, model.inverse_transform(model.transform(x))], 1).reshape(-1, *x.shape[1:])
        grids["reconstructions"] = image_grid(pairs, _SHOWN)  # left real, right G(E(x))
        ends = [(x[i], x[i + 1]) for i in range(0, len(x) - 1, 2)][:_SHOWN]
        ways = [np.concatenate([a[None], model.interpolate(a, b, _SHOWN), b[None]]) for a, b in ends]
        grids["interpolations"] = image_grid(np.concatenate(ways), _SHOWN + 2)
        k = min(_SHOWN - 1, len(train))
        near = model.neighbors(x[:_SHOWN], k)[1]
        rows = [np.concatenate([a[None], _floats(train[found]).numpy()]) for a, found in zip(x, near, strict=False)]
        grids["neighbours"] = image_grid(np.concatenate(rows), k + 1)
    for name, grid in grids.items():
        Image.fromarray(grid).save(folder / f"{name}.png")
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.add_subplot()
    for name, values in trained.history.items():
        width = max(1, len(values) // 100)
        smooth = np.convolve(values, np.ones(width) / width, "valid")
        axis.plot(np.arange(width, len(values) + 1), smooth, label=name)
    axis.set(xlabel="step", ylabel="term of the loss (moving mean)")
    axis.legend()
    figure.savefig(folder / "losses.png", dpi=100)
    return [f"{name}.png" for name in (*grids, "losses")]


class GanModel:
    """A generator that ``kexue gan train`` made.

    Args:
        folder: Its folder.

    Attributes:
        info: Settings and figures of the training.
        estimator: The fitted :class:`kexue.adversarial.BiGANQP`; None for a plain method.

    Raises:
        WorkspaceError: There is no model, or it cannot be read.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        path = marked(self.folder, MANIFEST, "trained generator", "kexue gan train digits --out DIR")
        try:
            self.info: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            self.estimator: BiGANQP | None = None
            if self.info["method"] == BIGAN:
                self.estimator = BiGANQP.load(self.folder / "model")
                self._model: _Encoding | _Plain = _Encoding(self.estimator)
            else:
                z_dim = int(self.info["trained with"]["z_dim"])
                with kept_random_state(torch.device("cpu")):
                    generator = gan_networks(self.info["shape"], z_dim)[0]
                load_model(generator, self.folder / "generator.safetensors", strict=True)
                self._model = _Plain(generator.eval(), z_dim, {})
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
            raise WorkspaceError(f"{self.folder} cannot be read ({error}); train it again") from error

    def sample(self, n: int, seed: int = 0) -> NDArray[Any]:
        """Generate pictures.

        Args:
            n: Number of pictures.
            seed: Seed of their noise.

        Returns:
            (n, ...) in [-1, 1].
        """
        return self._model.sample(n, seed)

    def write(self, path: str | Path, n: int = 64, seed: int = 0) -> Path:
        """Generate pictures into a file.

        Args:
            path: A .png for a grid, a .npy for an array in [-1, 1]; its folder is made.
            n: Number of pictures.
            seed: Seed of their noise.

        Raises:
            ValueError: Another ending, or a .png for what are no pictures.
        """
        from PIL import Image

        from kexue._files import atomic_path

        target = Path(path)
        if target.suffix not in (".png", ".npy"):
            raise ValueError(f"the file must end in .png or .npy; got {target.name}")
        x = self.sample(n, seed)
        target.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(target) as temporary, open(temporary, "wb") as file:
            if target.suffix == ".npy":
                np.save(file, x)
            else:
                Image.fromarray(image_grid(x, math.ceil(math.sqrt(n)))).save(file, "PNG")
        return target
