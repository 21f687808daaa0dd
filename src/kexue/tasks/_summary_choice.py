"""What the summary generator settles by its pairs: the number of steps, the copy constraint, the length penalty.

    steps     4 passes over the pairs, at least 100 steps, at most 600 or one pass
    pairs     a tenth, 64 at most, is set aside, if there are 50; equal sources stay together
    decoding  with and without the constraint, length penalties 1, 1/2, 0: the highest mean main metric on these

Held-out cross entropy is no guide to the number of steps: it rises after few passes, and again with the sparse loss,
while the texts that are written still become better. What decoding should be depends on the texts: a tag that is wrong
for two tokens of five forbids more right tokens than it saves, and summaries of one language are cut short by the
penalty that makes those of another too long.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from kexue.tasks._summary_data import language_of, number_documents, scores, set_aside

__all__ = ["choose_decoding", "held_back", "usual_steps"]

PASSES, LEAST_STEPS, MOST_STEPS = 4, 100, 600
LEAST_PAIRS, MOST_PAIRS = 50, 64
PENALTIES = (1.0, 0.5, 0.0)


def usual_steps(per_epoch: int) -> int:
    """Optimizer steps for so many batches in a pass.

    Example:
        >>> [usual_steps(n) for n in (1, 50, 200, 1000)]
        [100, 200, 600, 1000]
    """
    return max(LEAST_STEPS, min(MOST_STEPS, PASSES * per_epoch), per_epoch)


def held_back(sources: Sequence[str], seed: int) -> NDArray[np.bool_]:
    """Which pairs are set aside: none if there are fewer than 50 different sources."""
    same = number_documents(sources)
    different = len(np.unique(same))
    found = np.zeros(len(same), np.bool_)
    if different >= LEAST_PAIRS:
        found[set_aside(np.arange(len(same)), same, min(different // 10, MOST_PAIRS), seed)[1]] = True
    return found


def choose_decoding(
    write: Callable[[bool, float], Sequence[str]],
    wanted: Sequence[str],
    constraints: Sequence[bool],
    penalties: Sequence[float],
) -> tuple[bool, float]:
    """The copy constraint and the length penalty with the highest mean main metric; the first of equal ones.

    Args:
        write: The texts for a choice.
        wanted: The targets.
        constraints: What the first may be.
        penalties: What the second may be.
    """
    unit, _ = language_of("auto", wanted)
    choices = [(copy, penalty) for copy in constraints for penalty in penalties]
    return max(choices, key=lambda choice: float(scores(write(*choice), wanted, unit).mean()))
