"""SPACES: sparse softmax, copying, and extraction before generation.

1. Sparse losses: the margin that dense cross-entropy forces, under-fitting from scratch, the gain in fine-tuning.
2. Copying: exact entities with and without the constraint, for names seen and not seen in training.
3. The extractor: the order of trained extractor, graph methods and opening pieces, with the oracles.

Each part is a module ``_spaces_*`` that states its conditions, fixed before measuring. Rule: "reproduced" if the
conditions of all parts hold; "partly" if those of at least one part all do; otherwise "not reproduced". What does not
hold is named in the note.
"""

from __future__ import annotations

from typing import Any

from kexue.reproduce import _spaces_copying, _spaces_losses, _spaces_pipeline
from kexue.reproduce.runner import Measurement, Verdict

CLAIM = (
    "Extract first, then generate with copy tags and sparse softmax: truncating the softmax avoids over-learning and "
    "gains in fine-tuning (not from scratch), copy tags keep names exact, and a trained extractor beats graph methods."
)
PARTS = {"losses": _spaces_losses, "copying": _spaces_copying, "extraction": _spaces_pipeline}


def measure(quick: bool, seed: int) -> Measurement:
    """Measure all parts; see the module for the rule.

    Args:
        quick: The small version of each part.
        seed: First seed of each part.
    """
    parts = {name: module.measure(quick, seed) for name, module in PARTS.items()}
    figures: dict[str, Any] = {
        f"{name}: {key}": value for name, part in parts.items() for key, value in part.figures.items()
    }
    conditions = [(f"{name}: {key}", holds) for name, part in parts.items() for key, holds in part.conditions.items()]
    figures["conditions"] = {
        "condition": [key for key, _ in conditions],
        "holds": ["yes" if holds else "no" for _, holds in conditions],
    }
    whole = [all(part.conditions.values()) for part in parts.values()]
    verdict: Verdict = "reproduced" if all(whole) else "partly" if any(whole) else "not reproduced"

    def plot(figure: Any) -> None:
        figure.set_size_inches(13, 4.5)
        for axis, part in zip(figure.subplots(1, len(parts)), parts.values(), strict=True):
            part.draw(axis)

    failed = [key for key, holds in conditions if not holds]
    note = "All conditions hold." if not failed else f"Does not hold: {'; '.join(failed)}."
    return Measurement(figures, verdict, plot, note)
