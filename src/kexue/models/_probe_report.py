"""What a probe returns: rows, a table and figures."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kexue._checks import check_choice

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["ProbeReport"]

LONG = 60  # rows; a longer table is shown in brief
_COLUMNS = {"out": "rms_out", "grad": "rms_grad", "gain": "gain", "entropy": "attention_entropy"}
_TITLES = {
    "out": "rms of the output",
    "grad": "rms of the gradient of the output",
    "gain": "growth factor",
    "entropy": "entropy of attention, nats",
}


@dataclass(frozen=True, repr=False)
class ProbeReport:
    """Result of :func:`kexue.models.probe`: ``print(report)``, ``report.rows``, ``report.plot("grad")``.

    Attributes:
        rows: One dict for each call of a module, in the order in which the calls begin; JSON-compatible. Keys: name,
            rms_out, rms_grad, gain, attention_entropy; values that do not exist are None.
        loss: Value of the loss; None if the gradient is that of a random direction.
        title: Class of the model.
        stacks: For each row the list of blocks that it is a member of, "" if none; members of inner lists have "".
        brief: For each row whether a long table shows it: blocks, attention, and what is not inside a block.

    Example:
        >>> import torch
        >>> from kexue.models import probe
        >>> report = probe(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Softmax(-1)), torch.ones(2, 5))
        >>> print(report)
        Sequential: 2 rows
        name  rms out  rms grad  gain  entropy
        0           1     0.194     1        -
        1         0.2         1   0.2        -
    """

    rows: list[dict[str, Any]]
    loss: float | None
    title: str
    stacks: tuple[str, ...]
    brief: tuple[bool, ...]

    def table(self, every: bool = False) -> str:
        """The rows as an aligned table.

        Args:
            every: Show all rows, not only the main ones of a long table.
        """
        short = not every and len(self.rows) > LONG
        shown = [n for n in range(len(self.rows)) if not short or self.brief[n]]
        cells = [["name", "rms out", "rms grad", "gain", "entropy"]]
        for n in shown:
            row = self.rows[n]
            name = row["name"] or f"({self.title})"
            cells.append([name, *(_cell(row[column]) for column in _COLUMNS.values())])
        widths = [max(len(line[c]) for line in cells) for c in range(5)]
        lines = [
            "  ".join([line[0].ljust(widths[0]), *(x.rjust(w) for x, w in zip(line[1:], widths[1:], strict=True))])
            for line in cells
        ]
        loss = "" if self.loss is None else f", loss {self.loss:.4g}"
        lines.insert(0, f"{self.title}: {len(self.rows)} rows{loss}")
        if len(shown) < len(self.rows):
            lines.append(f"({len(self.rows) - len(shown)} rows inside blocks are left out: .table(every=True), .rows)")
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.table()

    def __repr__(self) -> str:
        return f"<ProbeReport of {self.title}, {len(self.rows)} rows>"

    def plot(self, kind: str = "out") -> Figure:
        """Draw one column over the depth of the model.

        Blocks are drawn if the model has a list of at least two, otherwise all rows; scales are logarithmic, except
        that of the entropy.

        Args:
            kind: "out", "grad", "gain" or "entropy", or the key of the rows ("rms_out", ...).

        Returns:
            A matplotlib figure: ``figure.savefig("grad.png")``.

        Raises:
            ValueError: Another kind, or not one number to be drawn.

        Example:
            >>> import torch
            >>> from kexue.models import probe
            >>> layers = [torch.nn.Linear(8, 8) for _ in range(5)]
            >>> figure = probe(torch.nn.Sequential(*layers), torch.randn(4, 8)).plot("grad")
            >>> figure.axes[0].get_ylabel()
            'rms of the gradient of the output'
        """
        kind = next((short for short, column in _COLUMNS.items() if column == kind), kind)
        check_choice("kind", kind, tuple(_COLUMNS))
        column = _COLUMNS[kind]
        chosen = self._drawn(kind)
        if not any(_drawable(self.rows[n][column]) for n in chosen):
            raise ValueError(f"{self.title} has no row with a finite {column} to be drawn; got {len(self.rows)} rows")

        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(max(6.0, min(14.0, 2.5 + 0.3 * len(chosen))), 4.2), layout="constrained")
        FigureCanvasAgg(figure)  # not pyplot: no global state, no display needed
        axes = figure.subplots()
        values = [self.rows[n][column] for n in chosen]
        heights = [v if _drawable(v) else math.nan for v in values]
        if kind == "entropy":
            axes.set_ylim(0, 1.1 * max(h for h in heights if h >= 0) or 1.0)
        elif any(h > 0 for h in heights):
            heights = [h if h > 0 else math.nan for h in heights]
            _logarithmic(axes, [h for h in heights if h > 0])
        names = [self.stacks[n] for n in chosen]
        for start, stop in _runs(names):
            axes.plot(range(start, stop), heights[start:stop], marker="o", markersize=4, label=names[start] or "others")
        if kind == "gain":
            axes.axhline(1.0, color="grey", linewidth=0.8, linestyle=":")
        step = max(1, math.ceil(len(chosen) / 40))
        ticks = list(range(0, len(chosen), step))
        axes.set_xticks(ticks, [_short(self.rows[chosen[n]]["name"] or self.title) for n in ticks])
        if len(chosen) > 6:
            for label in axes.get_xticklabels():
                label.set(rotation=45, ha="right", rotation_mode="anchor")
        axes.tick_params(axis="x", labelsize=7)
        axes.set(ylabel=_TITLES[kind], title=f"{self.title}: {_TITLES[kind]}")
        axes.title.set_fontsize(10)
        return figure

    def _drawn(self, kind: str) -> list[int]:
        """Numbers of the rows that a figure shows."""
        everything = list(range(len(self.rows)))
        if kind == "entropy":
            return [n for n in everything if self.rows[n]["attention_entropy"] is not None]
        blocks = [n for n in everything if self.stacks[n]]
        return blocks if len(blocks) > 1 else everything


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _drawable(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _logarithmic(axes: Any, heights: list[float]) -> None:
    """A logarithmic scale over a factor of 4 at least, so that rounding does not fill the figure."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    low, high = min(heights), max(heights)
    axes.set_yscale("log")
    spread = max(2.0, 1.3 * (high / low) ** 0.5)
    centre = low**0.5 * high**0.5
    if centre / spread > 0:
        axes.set_ylim(centre / spread, centre * spread)
    plain = FuncFormatter(lambda value, _: f"{value:.3g}")
    axes.yaxis.set_major_formatter(plain)
    axes.yaxis.set_minor_formatter(plain if spread < 3.5 else NullFormatter())


def _short(name: str) -> str:
    """The end of a long name, from a dot on."""
    while len(name) > 28 and "." in name:
        name = name.partition(".")[2]
    return name


def _runs(names: list[str]) -> list[tuple[int, int]]:
    """Stretches of equal names."""
    cuts = [0, *(n for n in range(1, len(names)) if names[n] != names[n - 1]), len(names)]
    return [(a, b) for a, b in itertools.pairwise(cuts) if b > a]
