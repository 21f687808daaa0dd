"""Groups of paraphrases made from the text that ships with Python, for the reproductions that rank sentences.

Six consecutive words of ``pydoc_data.topics`` are a sentence. A copy of it drops each word with 25 % and each character
with 6 %, swaps two neighbouring words with 60 % and inserts a random word with 50 %.
"""

from __future__ import annotations

import random
import re
from pydoc_data.topics import topics


def paraphrases(groups: int, per_group: int, seed: int) -> list[list[str]]:
    """Noisy copies of sentences that do not overlap; a function of the arguments alone.

    Args:
        groups: Number of sentences.
        per_group: Copies of each.
        seed: Seed of the choice and of the noise.
    """
    rng = random.Random(seed)
    words = re.findall(r"[A-Za-z_]{2,}", " ".join(topics.values()))
    made = []
    for start in rng.sample(range(0, len(words) - 8, 8), groups):
        base = [word.lower() for word in words[start : start + 6]]
        copies = []
        for _ in range(per_group):
            kept = [word for word in base if rng.random() > 0.25] or base[:1]
            if rng.random() < 0.6 and len(kept) > 1:
                i = rng.randrange(len(kept) - 1)
                kept[i], kept[i + 1] = kept[i + 1], kept[i]
            kept = ["".join(c for c in word if rng.random() > 0.06) or word for word in kept]
            if rng.random() < 0.5:
                kept.insert(rng.randrange(len(kept) + 1), rng.choice(words).lower())
            copies.append(" ".join(kept))
        made.append(copies)
    return made


def labelled(groups: list[list[str]]) -> tuple[list[str], list[int]]:
    """The sentences of all groups, and the number of the group of each."""
    pairs = [(text, number) for number, group in enumerate(groups) for text in group]
    return [text for text, _ in pairs], [number for _, number in pairs]
