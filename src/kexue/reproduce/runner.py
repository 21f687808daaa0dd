"""Run the reproduction of a method's claim.

Each row of the catalogue has a module ``kexue.reproduce.<slug with underscores>`` that holds

- ``CLAIM``: what the article or paper says, in one or two sentences;
- ``measure(quick: bool, seed: int) -> Measurement``: measure it again, without tuning. Further arguments, with None as
  their default, are inputs that a user may supply (a model, a file).

Everything else (timing, the figure file, the report page, the command line) is done here.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from kexue._checks import check_choice, check_int
from kexue.catalog import METHODS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Verdict = Literal["reproduced", "partly", "not reproduced"]
VERDICTS: tuple[str, ...] = ("reproduced", "partly", "not reproduced")


@dataclass(frozen=True)
class Measurement:
    """What a reproduction module returns.

    Attributes:
        figures: Name -> number, string, or list of them; JSON-compatible. A dict of equal-length lists is a table.
        verdict: "reproduced", "partly" or "not reproduced", decided by the rule that the module documents.
        plot: Draws on an empty matplotlib figure.
        note: What a reader must know to read the figures (seeds, sizes, what was not run).
    """

    figures: Mapping[str, Any]
    verdict: Verdict
    plot: Callable[[Figure], None]
    note: str = ""


@dataclass(frozen=True)
class Reproduction:
    """The result of :func:`run`.

    Attributes:
        slug: Row of the catalogue.
        claim: What the source says.
        figures: What was measured.
        verdict: "reproduced", "partly" or "not reproduced".
        seconds: CPU seconds of the measurement.
        figure_path: PNG file, or None when no folder was given.
        note: Remarks on the figures.
        quick: Whether the small version ran.
        seed: Seed of the run.
    """

    slug: str
    claim: str
    figures: dict[str, Any]
    verdict: str
    seconds: float
    figure_path: Path | None
    note: str = ""
    quick: bool = False
    seed: int = 0


def available() -> list[str]:
    """Slugs of the rows that have a reproduction, in catalogue order."""
    return [slug for slug, method in METHODS.items() if importlib.util.find_spec(method.module) is not None]


def run(
    slug: str, quick: bool = False, seed: int = 0, out: str | Path | None = None, **given: str | Path
) -> Reproduction:
    """Re-measure the claim of one method.

    Args:
        slug: Row of the catalogue, for example ``"flatnce"``.
        quick: Run the small version (a few seconds) instead of the full one (under two minutes on two cores).
        seed: First seed; a reproduction that averages over seeds uses ``seed, seed + 1, ...``.
        out: Folder for the figure ``<slug>.png``; None writes no file.
        **given: The user's own inputs, further arguments of the row's ``measure``: ``model`` and ``data`` of
            nsp-zero-shot.

    Returns:
        A :class:`Reproduction`.

    Raises:
        ValueError: Unknown slug, a row without a reproduction, or inputs that it does not take.
    """
    if slug not in METHODS:
        raise ValueError(f"unknown method {slug!r}; `kexue methods` lists the {len(METHODS)} slugs")
    if slug not in available():
        raise ValueError(f"{slug!r} has no reproduction yet; available: {', '.join(available())}")
    check_int("seed", seed, 0)
    module = importlib.import_module(METHODS[slug].module)
    foreign = sorted(set(given) - set(inspect.signature(module.measure).parameters))
    if foreign:
        raise ValueError(f"the reproduction of {slug!r} takes no {', '.join(foreign)}")
    start = time.process_time()
    result: Measurement = module.measure(quick=quick, seed=seed, **given)
    seconds = time.process_time() - start
    check_choice("verdict", result.verdict, VERDICTS)
    path = None
    if out is not None:
        path = _draw(result, Path(out), slug)
    return Reproduction(
        slug=slug,
        claim=module.CLAIM,
        figures=dict(result.figures),
        verdict=result.verdict,
        seconds=seconds,
        figure_path=path,
        note=result.note,
        quick=quick,
        seed=seed,
    )


def _draw(result: Measurement, folder: Path, slug: str) -> Path:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    figure = Figure(figsize=(8, 4.5), layout="constrained")  # not pyplot: no global state, no display needed
    FigureCanvasAgg(figure)
    result.plot(figure)
    path = folder / f"{slug}.png"
    figure.savefig(path, dpi=120)
    return path
