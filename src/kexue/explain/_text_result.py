"""What :func:`kexue.explain.explain_text` returns, and how it is shown: coloured tokens."""

from __future__ import annotations

import html
import math
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from torch import Tensor

from kexue._files import atomic_path

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["TextExplanation", "TextExplanations"]

_LEAST, _LEAST_PROB = 0.1, 0.02  # where hardly anything changes, nothing is shown in full colour
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all but tabulators and line feeds
RED, BLUE = (214, 39, 40), (31, 119, 180)


@dataclass(frozen=True, eq=False)
class TextExplanation:
    """The scores of the tokens of a text.

    Attributes:
        text: The text.
        tokens: Its T tokens as they stand in it, special ones included.
        scores: (T,) float64. With ``reduce="sum"`` they add up to ``change`` up to ``gap``: positive ones speak for the
            target, negative ones against it.
        fixed: Of each token, whether it is special or a place to be filled in; such tokens are not shown.
        spans: First character and end of each token in the text, (0, 0) of special ones; None: the tokenizer does not
            say.
        target: What was explained, in words.
        target_ids: Its class, or its token ids.
        against: What was subtracted, in words; None: nothing.
        value: The output for the text.
        change: By how much it is larger than at the baseline.
        gap: Size of the difference between the sum of the attributions and ``change``.
        error: Estimate of the L1 error of the attributions.
        converged: Whether both are within the tolerance.
        baseline: The one that was taken: "zero", "pad", "mask", "mean" or "given".
        output: "logit", "log_prob" or "prob".
        reduce: "sum", "l2" or "max".
    """

    text: str
    tokens: list[str]
    scores: Tensor
    fixed: list[bool]
    spans: list[tuple[int, int]] | None
    target: str
    target_ids: list[int]
    against: str | None
    value: float
    change: float
    gap: float
    error: float
    converged: bool
    baseline: str
    output: str
    reduce: str

    @property
    def pieces(self) -> list[tuple[str, float]]:
        """Pieces of the text in order, with their score; 0 for what is between the tokens. Special tokens are left out.

        Tokens of the same characters, such as the bytes of one, are one piece.
        """
        scores = self.scores.tolist()
        own = [place for place, fixed in enumerate(self.fixed) if not fixed]
        if self.spans is None:
            return [(self.tokens[place], scores[place]) for place in own]
        out: list[tuple[str, float]] = []
        done = 0
        for place in own:
            (start, end), score = self.spans[place], scores[place]
            if start > done:
                out.append((self.text[done:start], 0.0))
            if end > max(start, done):
                out.append((self.text[max(start, done) : end], score))
            elif out and end > start:
                old = out[-1][1]
                out[-1] = (out[-1][0], old + score if self.reduce == "sum" else max(old, score))
            done = max(done, end)
        return [*out, (self.text[done:], 0.0)] if done < len(self.text) else out

    @property
    def scale(self) -> float:
        """The score that is shown in full colour: the largest one, but at least 0.1 (of probabilities 0.02)."""
        return max([_LEAST_PROB if self.output == "prob" else _LEAST, *(abs(score) for _, score in self.pieces)])

    def shown(self, scale: float | None = None) -> list[tuple[str, float]]:
        """``pieces`` with their strength in [-1, 1], the score over ``scale``; None: that of this text."""
        scale = self.scale if scale is None else scale
        return [(text, score / scale) for text, score in self.pieces]

    @property
    def headline(self) -> str:
        """What was explained and how well, in a line."""
        what = f"{self.target} rather than {self.against}" if self.against is not None else self.target
        state = "" if self.converged else ", NOT CONVERGED"
        return (
            f"{what}: {self.output.replace('_', '-')} {self.value:.3f}, {self.change:+.3f} from the baseline "
            f"{self.baseline} (gap {self.gap:.1e}{state})"
        )

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON values; numbers that are not finite become null."""
        spans: Sequence[Any] = self.spans if self.spans is not None else [None] * len(self.tokens)
        return {
            "text": self.text,
            "target": self.target,
            "target_ids": self.target_ids,
            "against": self.against,
            "output": self.output,
            "value": _finite(self.value),
            "change": _finite(self.change),
            "gap": _finite(self.gap),
            "error": _finite(self.error),
            "converged": self.converged,
            "baseline": self.baseline,
            "tokens": [
                {"token": token, "score": score, "special": fixed, "start": span and span[0], "end": span and span[1]}
                for token, score, fixed, span in zip(self.tokens, self.scores.tolist(), self.fixed, spans, strict=True)
            ],
        }

    def to_html(self, path: str | os.PathLike[str] | None = None) -> str:
        """The text with coloured tokens as a page; see :meth:`TextExplanations.to_html`."""
        return TextExplanations([self]).to_html(path)


class TextExplanations(Sequence[TextExplanation]):
    """The explanations of several texts, in their order."""

    def __init__(self, found: Iterable[TextExplanation]) -> None:
        self._found = list(found)

    @overload
    def __getitem__(self, place: int) -> TextExplanation: ...
    @overload
    def __getitem__(self, place: slice) -> TextExplanations: ...
    def __getitem__(self, place: int | slice) -> TextExplanation | TextExplanations:
        """One of them, or some."""
        return TextExplanations(self._found[place]) if isinstance(place, slice) else self._found[place]

    def __len__(self) -> int:
        return len(self._found)

    @property
    def scale(self) -> float:
        """The score that is shown in full colour in all of them, so that their colours can be compared."""
        return max((one.scale for one in self), default=1.0)

    def __repr__(self) -> str:
        return f"TextExplanations of {len(self)} texts"

    def to_html(self, path: str | os.PathLike[str] | None = None) -> str:
        """A page that needs nothing else: red tokens speak for the target, blue ones against it.

        Args:
            path: Also write it to this file, whole or not at all.

        Returns:
            The page.
        """
        scale = self.scale
        body = "\n".join(
            f"<section><h2>{html.escape(visible(one.headline))}</h2>\n"
            f"<p>{''.join(map(_span, one.shown(scale)))}</p></section>"
            for one in self
        )
        page = _PAGE.replace("{body}", body)
        if path is not None:
            with atomic_path(Path(path)) as partial:
                Path(partial).write_text(page, encoding="utf-8")
        return page

    def plot(self) -> Figure:
        """A figure of the texts with coloured tokens, for notebooks and papers."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from rich.cells import cell_len

        room = 64  # cells in a line
        lines: list[list[tuple[str, float]]] = []
        heads: dict[int, str] = {}
        for one in self:
            heads[len(lines)] = one.headline
            lines.append([])
            used = 0
            for token, strength in one.shown(self.scale):
                if used + cell_len(token) > room and lines[-1]:
                    lines.append([])
                    used = 0
                lines[-1].append((token, strength))
                used += cell_len(token)
        figure = Figure(figsize=(8, 0.4 + 0.32 * (len(lines) + len(heads))), layout="constrained")
        FigureCanvasAgg(figure)
        axis = figure.add_subplot()
        axis.set_axis_off()
        y = 0.0
        for number, line in enumerate(lines):
            if number in heads:
                axis.text(0, y, heads[number], fontsize=8, color="0.3", va="center", parse_math=False)
                y -= 1
            x = 0
            for token, strength in line:
                width = cell_len(token)
                box = {"facecolor": _mixed(strength), "edgecolor": "none"}
                axis.add_patch(_rectangle(x, y - 0.45, width, 0.9, box))
                axis.text(x + width / 2, y, token.strip(), fontsize=9, ha="center", va="center", parse_math=False)
                x += width
            y -= 1
        axis.set(xlim=(0, room), ylim=(y + 0.4, 0.6))
        return figure


def _rectangle(x: float, y: float, width: float, height: float, style: dict[str, Any]) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((x, y), width, height, **style)


def _mixed(strength: float) -> tuple[float, float, float]:
    """White mixed with red or blue."""
    color, share = (RED if strength > 0 else BLUE), 0.8 * min(1.0, abs(strength))
    r, g, b = (1 - share + share * c / 255 for c in color)
    return r, g, b


def _span(piece: tuple[str, float]) -> str:
    text, strength = html.escape(visible(piece[0])).replace("\n", "<br>"), piece[1]
    if abs(strength) < 0.0005:  # shown as 0
        return text
    r, g, b = RED if strength > 0 else BLUE
    return f'<span style="background:rgba({r},{g},{b},{0.8 * abs(strength):.3f})" title="{strength:+.3f}">{text}</span>'


def visible(text: str) -> str:
    """A text whose control characters are no longer any, so that it cannot command a terminal."""
    return _CONTROLS.sub("\ufffd", text)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


_PAGE = """<!DOCTYPE html>
<html><head><meta charset="utf-8"><title>Explanation</title><style>
body{font-family:sans-serif;max-width:50em;margin:2em auto;padding:0 1em;color:#222;background:#fff}
h2{font-size:.95em;font-weight:normal;color:#666;margin-bottom:.3em}
p{font-size:1.15em;line-height:1.8;margin-top:0;overflow-wrap:anywhere}
span{border-radius:.2em}
</style></head><body>
<p style="font-size:.9em">Red tokens speak for the prediction, blue ones against it.</p>
{body}
</body></html>
"""
