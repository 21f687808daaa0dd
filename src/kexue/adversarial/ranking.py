"""Compare methods of adversarial training on one's own data: same networks, same steps, several seeds (方法排名).

Every method trains the same generator and the same critic from the same starting weights, on the same samples and
noise. What differs is the loss of the critic and how it is kept Lipschitz. Measured are, in the judge's features:

    fid        Frechet distance of the features, beside the floor: that of two halves of the real samples
    precision, recall, density, coverage    from the nearest neighbours, see quality.py
    w1         exact Wasserstein-1 distance of at most 1000 samples
    classes    classes of the judge that get more than 1 % of the samples; modes of a known mixture instead
    seconds    CPU seconds of the training

A training whose loss is no longer finite counts as failed and says so. One table of one setting is no ranking of
methods: most of them want settings of their own.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from kexue._checks import check_int, check_real
from kexue._progress import progress
from kexue.adversarial.games import BiGANGame, Game, PlainGame
from kexue.adversarial.judges import Judge
from kexue.adversarial.loop import Samples, as_floats, play
from kexue.adversarial.networks import bigan_networks, gan_networks
from kexue.adversarial.qp import QPCritic, QPLoss
from kexue.adversarial.quality import mode_coverage, sample_quality
from kexue.adversarial.trainer import check_plan, check_samples, draw
from kexue.stats import frechet_distance, wasserstein
from kexue.training.order import kept_random_state

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["METHODS", "Ranking", "critic_of", "rank_gans"]

# name -> method and loss of a LipschitzCritic, and its options; None: a game of its own kind
METHODS: dict[str, tuple[str, str, dict[str, Any]] | None] = {
    "sgan": ("none", "bce", {}),
    "wgan-clip": ("clip", "wasserstein", {"bound": 0.1}),
    "wgan-sn": ("sn", "wasserstein", {}),
    "wgan-gp": ("gp", "wasserstein", {}),
    "wgan-gp1": ("gp1", "wasserstein", {}),
    "wgan-div": ("div", "wasserstein", {}),
    "r1": ("r1", "bce", {}),
    "gn": ("gn", "bce", {}),
    "gran": ("gran", "bce", {}),
    "gan-qp": None,
    "bigan-qp": None,
}
DEFAULT = ("sgan", "wgan-clip", "wgan-sn", "wgan-gp", "wgan-div", "gn", "gran", "gan-qp")
QUALITY = ("fid", "precision", "recall", "density", "coverage", "w1")
_TRANSPORTED = 1000  # samples of the exact transport
Networks = Callable[[tuple[int, ...], int], tuple[nn.Module, nn.Module]]


def critic_of(method: str, net: nn.Module) -> nn.Module:
    """The network with the losses of a plain method."""
    if method == "gan-qp":
        return QPCritic(net, QPLoss(validate=False))
    from kexue.adversarial import LipschitzCritic

    settings = METHODS[method]
    if settings is None:
        raise ValueError(f"{method!r} is no method with a plain critic")
    kind, loss, options = settings
    critic: nn.Module = LipschitzCritic(net, method=kind, loss=loss, **options)
    return critic


@dataclass(frozen=True)
class Ranking:
    """What :func:`rank_gans` returns; ``print`` shows its table.

    Args:
        runs: A dict for each training: ``method``, ``seed``, the figures, ``seconds``, ``failed``.
        floor: FID between two halves of the real samples: what no method can be expected to go below.
        total: Number of classes or modes, None if unknown.
        settings: How was trained.
        samples: Some samples of the first seed of each method.

    Example:
        >>> runs = [{"method": "sgan", "seed": 0, "fid": 2.0, "seconds": 1.0, "failed": False}]
        >>> Ranking(runs, floor=0.5).best
        'sgan'
    """

    runs: list[dict[str, Any]]
    floor: float
    total: int | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    samples: dict[str, Tensor] = field(default_factory=dict, repr=False)

    def summary(self) -> list[dict[str, Any]]:
        """A dict for each method, best FID first: medians over the seeds, lowest and highest FID, cost, failures.

        ``cost`` is the ratio of the CPU seconds to those of the cheapest method.
        """
        methods = list(dict.fromkeys(run["method"] for run in self.runs))
        rows = [self._row(method) for method in methods]
        times = [row["seconds"] for row in rows if row["seconds"] > 0 and row["failed"] < row["seeds"]]
        cheapest = min(times, default=math.nan)
        for row in rows:
            row["cost"] = row["seconds"] / cheapest
        return sorted(rows, key=lambda row: (math.isnan(row["fid"]), row["fid"]))

    def _row(self, method: str) -> dict[str, Any]:
        runs = [run for run in self.runs if run["method"] == method]
        row: dict[str, Any] = {"method": method, "seeds": len(runs), "failed": sum(run["failed"] for run in runs)}
        fine = [run for run in runs if not run["failed"]]
        for name in (*QUALITY, "found", "inside"):
            values = [run[name] for run in fine if run.get(name) is not None]
            if values or name == "fid":
                row[name] = float(np.median(values)) if values else math.nan
        found = [run["fid"] for run in fine]
        row["fid_range"] = (min(found), max(found)) if found else (math.nan, math.nan)
        row["seconds"] = float(np.median([run["seconds"] for run in fine or runs]))  # a failed run ends early
        return row

    @property
    def best(self) -> str:
        """The method with the lowest median FID; ValueError if every training failed."""
        first = self.summary()[0]
        if first["failed"] == first["seeds"]:
            raise ValueError(f"no training was completed; got {len(self.runs)} that failed")
        return str(first["method"])

    def __str__(self) -> str:
        found = "found" if self.total is None else f"found of {self.total}"
        names = {**{name: name for name in QUALITY}, "found": found, "inside": "inside", "seconds": "CPU s"}
        names["cost"] = "cost"
        rows = self.summary()
        names = {key: title for key, title in names.items() if any(key in row for row in rows)}
        lines = [["method", *names.values()]]
        for row in rows:
            cells = [f"{row[key]:.3g}" if key in row else "" for key in names]
            lines.append([row["method"] + (f" ({row['failed']} failed)" if row["failed"] else ""), *cells])
        widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
        text = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
        ]
        return "\n".join([*text, f"medians over seeds; FID of two halves of the real samples: {self.floor:.3g}"])

    def figure(self) -> Figure:
        """FID of every run, precision against recall, and cost, as a matplotlib figure."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(10, 4), layout="constrained")  # not pyplot: no global state, no display needed
        FigureCanvasAgg(figure)
        draw_ranking(self, figure)
        return figure


def draw_ranking(ranking: Ranking, figure: Any) -> None:
    """Draw on an empty figure."""
    rows = ranking.summary()[::-1]  # best on top
    left, right = figure.subplots(1, 2)
    place = {row["method"]: i for i, row in enumerate(rows)}
    left.barh(list(place.values()), [row["fid"] for row in rows], color="#9ecae1", label="median")
    fine = [run for run in ranking.runs if not run["failed"]]
    left.plot([run["fid"] for run in fine], [place[run["method"]] for run in fine], "k.", ms=4, label="a seed")
    left.axvline(max(ranking.floor, 1e-12), color="#d62728", lw=1, label="two halves of the real samples")
    left.set_yticks(range(len(rows)), [f"{row['method']}  ({row['cost']:.2f}x CPU)" for row in rows])
    left.set(xscale="log" if fine else "linear", xlabel="FID (lower is better)")
    left.legend(fontsize=7, loc="lower right")
    for row in (row for row in rows if "precision" in row):
        right.plot(row["recall"], row["precision"], "o")
        right.annotate(
            row["method"], (row["recall"], row["precision"]), xytext=(4, 3), textcoords="offset points", fontsize=8
        )
    right.set(xlabel="recall", ylabel="precision", title="medians over the seeds")
    right.margins(0.15)


def rank_gans(
    X: Any,
    methods: Sequence[str] = DEFAULT,
    judge: Any = None,
    seeds: int | Sequence[int] = 3,
    *,
    steps: int = 1200,
    batch_size: int = 64,
    critic_steps: int = 1,
    z_dim: int = 16,
    lr: float = 5e-4,
    betas: tuple[float, float] = (0.5, 0.9),
    networks: Networks | None = None,
    modes: tuple[Any, float] | None = None,
    samples: int | None = None,
    k: int = 5,
    on_run: Callable[[dict[str, Any]], None] | None = None,
    show_progress: bool | None = None,
) -> Ranking:
    """Train every method with every seed, and compare what they generate.

    Args:
        X: (N, ...) real samples, tensor or array; in [-1, 1] for the networks that are built here.
        methods: Of "sgan", "wgan-clip" (weights within .1), "wgan-sn", "wgan-gp", "wgan-gp1", "wgan-div", "r1", "gn",
            "gran", "gan-qp", "bigan-qp" (which always makes two critic steps, with betas .5 and .999).
        judge: What sees the samples: None takes them as they are; a fitted scikit-learn ``MLPClassifier`` gives the
            features of its last hidden layer, another classifier its scores, and both their classes; a torch Module,
            an object with ``transform`` or a function gives features (N, d).
        seeds: Number of seeds, from 0, or the seeds.
        steps: Steps of the generator.
        batch_size: Samples of a step.
        critic_steps: Steps of the critic before each of them.
        z_dim: Width of the noise.
        lr: Rate of Adam, of both.
        betas: Of Adam.
        networks: ``(shape, z_dim) -> (generator, critic network)``, called once a training under its seed; None builds
            those of :func:`gan_networks`. "bigan-qp" always builds its own.
        modes: Centres (K, ...) and radius of a known mixture, whose modes are counted in the samples themselves.
        samples: Generated samples that are compared; None: as many as there are real ones, at most 5000.
        k: Neighbour that ends a ball, see :func:`sample_quality`.
        on_run: Called with the figures of each training.
        show_progress: None shows a bar if standard error is a terminal.

    Returns:
        A :class:`Ranking`: its table (``print``), ``summary()``, ``figure()``.

    Raises:
        TypeError: Arguments of the wrong kind.
        ValueError: An unknown or repeated method, settings out of range, fewer real samples than k + 2.

    Reference:
        https://spaces.ac.cn/archives/6163, https://spaces.ac.cn/archives/8757

    Example:
        >>> x = torch.randn(200, 2, generator=torch.Generator().manual_seed(0)).tanh()
        >>> ranking = rank_gans(x, ["gan-qp"], seeds=1, steps=3)
        >>> ranking.best, len(ranking.runs)
        ('gan-qp', 1)
    """
    data = check_samples("X", X)
    chosen = _methods(methods)
    used = list(range(int(seeds))) if isinstance(seeds, int | np.integer) and not isinstance(seeds, bool) else seeds
    if not isinstance(used, Sequence) or isinstance(used, str):
        raise TypeError(f"seeds must be a number of seeds or a sequence of them; got {seeds!r}")
    if not used:
        raise ValueError(f"seeds must give at least one seed; got {seeds!r}")
    check_int("k", k, 1)
    if len(data) < k + 2:
        raise ValueError(f"X must have at least k + 2 = {k + 2} samples; got {len(data)}")
    count = min(len(data), 5000) if samples is None else samples
    check_int("samples", count, k + 1)
    plans = {seed: check_plan(
        steps=steps, critic_steps=critic_steps, batch_size=batch_size, z_dim=z_dim, lr=lr, critic_lr=None, betas=betas,
        random_state=seed,
    ) for seed in used}  # fmt: skip
    measure = _Measure(data, Judge(judge), modes, count, k)
    settings = {
        "steps": steps, "batch_size": batch_size, "critic_steps": critic_steps, "z_dim": z_dim, "lr": lr,
        "betas": list(betas), "samples": count, "k": k, "seeds": list(used),
    }  # fmt: skip
    runs: list[dict[str, Any]] = []
    shown: dict[str, Tensor] = {}
    with progress("ranking", len(chosen) * len(used), show_progress) as bar:
        for seed in used:
            for method in chosen:  # in turn, so that the machine's load hits all of them alike
                plan = plans[seed]
                with kept_random_state(torch.device("cpu")):
                    torch.manual_seed(seed)
                    game = _game(method, tuple(data.shape[1:]), z_dim, networks)
                if method == "bigan-qp":
                    plan = type(plan)(**{**vars(plan), "critic_steps": 2, "betas": (0.5, 0.999)})
                generator: Any = game.generator
                held = Samples(data, next(generator.parameters()))
                start, failed = time.process_time(), False
                try:
                    play(game, held, plan, show_progress=False)
                except FloatingPointError:
                    failed = True
                run: dict[str, Any] = {"method": method, "seed": seed, "seconds": time.process_time() - start}
                run |= {"failed": failed}
                if not failed:
                    fake = draw(generator, count, z_dim, seed)
                    run["failed"] = not bool(torch.isfinite(fake).all())
                    if not run["failed"]:
                        run |= measure(fake)
                        shown.setdefault(method, fake[:64])
                runs.append(run)
                if on_run is not None:
                    on_run(run)
                bar.advance(1, method)
    return Ranking(runs, measure.floor, measure.total, settings, shown)


def _methods(methods: Any) -> list[str]:
    if isinstance(methods, str) or not isinstance(methods, Sequence):
        raise TypeError(f"methods must be a sequence of names; got {methods!r}")
    for method in methods:
        if method not in METHODS:
            raise ValueError(f"every method must be one of {', '.join(map(repr, METHODS))}; got {method!r}")
    if not methods or len(set(methods)) != len(methods):
        raise ValueError(f"methods must be different, and at least one; got {list(methods)!r}")
    return list(methods)


def _game(method: str, shape: tuple[int, ...], z_dim: int, networks: Networks | None) -> Game:
    """The networks under the current seed, and the game of the method."""
    if method == "bigan-qp":
        return BiGANGame(*bigan_networks(shape, z_dim), QPLoss(validate=False), 4.0, 6.0, True)
    generator, net = (networks or gan_networks)(shape, z_dim)
    return PlainGame(generator, critic_of(method, net))


class _Measure:
    """Figures of generated samples against the real ones."""

    def __init__(self, data: Tensor, judge: Judge, modes: Any, count: int, k: int) -> None:
        self.judge, self.k, self.modes = judge, k, None
        self.total = judge.total
        # as a subset of the order of a seed: the data may come sorted
        order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))
        self.real = judge.features(as_floats(data[order[: max(count, 2)]], torch.float32))
        if modes is not None:
            if not isinstance(modes, list | tuple) or len(modes) != 2:
                raise TypeError(f"modes must be centres and a radius; got {modes!r}")
            centres = torch.as_tensor(modes[0], dtype=torch.float64).flatten(1)
            check_real("radius of modes", modes[1], above=0.0)
            self.modes, self.total = (centres, float(modes[1])), len(centres)
        half = len(self.real) // 2
        self.floor = float(frechet_distance(self.real[:half], self.real[half:])) if half >= 2 else math.nan

    def __call__(self, fake: Tensor) -> dict[str, Any]:
        """Every figure."""
        features = self.judge.features(fake)
        found: dict[str, Any] = {"fid": float(frechet_distance(self.real, features))}
        found |= vars(sample_quality(self.real, features, self.k))
        found["w1"] = float(wasserstein(self.real[:_TRANSPORTED], features[:_TRANSPORTED]))
        if self.modes is not None:
            covered = mode_coverage(fake.detach().cpu().double().flatten(1), *self.modes)
            return {**found, "found": covered.modes, "inside": covered.inside}
        classes = self.judge.classes_found(fake)
        return found if classes is None else {**found, "found": classes}
