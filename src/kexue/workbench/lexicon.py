"""Which words a corpus has: the choice that a build and the commands ``kexue words`` share.

Scripts with spaces need no choice. For scripts without (Chinese and its like) the words are discovered from the text,
taken from a segmenter that exists, read off the spaces of text that was cut before, or left out: then characters and
pairs of them have to do.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kexue.words.tokenizer import UNSPACED

if TYPE_CHECKING:
    from kexue.words import CooccurrenceCounter, PMIEmbedding, Segmenter

CHOICES = ("auto", "discover", "characters", "spaces")
MIN_UNSPACED = 0.05  # share of letters of unspaced scripts from which words are discovered
SEGMENTER = "segmenter.json"
_MAX_WORD = 64  # characters; a longer piece between spaces is a clause
_MAX_SPACED = 200_000
_SAMPLE = 24
_RUN = re.compile("[" + "".join(f"{chr(low)}-{chr(high)}" for low, high in UNSPACED) + "]+")


def check_choice_of_words(words: str) -> str:
    """Return one of :data:`CHOICES`, or the absolute path of a segmenter that can be loaded.

    Raises:
        ValueError: It is neither (names the choices, or what is wrong with the file).
        TypeError: Not a str.
    """
    if not isinstance(words, str | os.PathLike):
        raise TypeError(f"words must be a str; got {words!r} of type {type(words).__name__}")
    if words in CHOICES:
        return str(words)
    if not os.path.exists(words):
        raise ValueError(
            f"words must be one of {', '.join(CHOICES)}, or the path of a segmenter or word model; got {str(words)!r}, "
            "and there is no such file"
        )
    load_segmenter(words)
    return os.path.abspath(words)


def load_segmenter(path: str | os.PathLike[str]) -> Segmenter:
    """The segmenter of a word model (a folder) or of one file.

    Raises:
        ValueError: The folder has none, or the file is something else.
    """
    from kexue.words import Segmenter

    file = Path(path)
    if file.is_dir():
        file = file / SEGMENTER
        if not file.is_file():
            raise ValueError(f"{path} holds no vocabulary ({SEGMENTER}); make one with `kexue words vocabulary`")
    return Segmenter.load(file)


def digest_of_words(words: str) -> str | None:
    """Digest of the segmenter that ``words`` names; None for one of :data:`CHOICES`."""
    if words in CHOICES:
        return None
    file = Path(words)
    return hashlib.sha256((file / SEGMENTER if file.is_dir() else file).read_bytes()).hexdigest()


def discovery_min_count(characters: int) -> int:
    """Evidence to ask for a word: it grows with the corpus; a small one must not end without any words."""
    return int(np.clip(round(characters**0.5 / 100), 4, 32))


def decide(words: str, share: float, characters: int, texts: Iterable[str]) -> tuple[Segmenter | None, dict[str, Any]]:
    """Find the words of the unspaced scripts of a corpus.

    Args:
        words: What was asked for: one of :data:`CHOICES` or the path of a segmenter.
        share: Share of letters of unspaced scripts.
        characters: Characters of the corpus.
        texts: The corpus, or a sample of a large one; must be readable again.

    Returns:
        A segmenter or None, and figures that :func:`explain` puts into words.
    """
    from kexue.words import Segmenter, WordDiscovery

    figures: dict[str, Any] = {"words": "characters", "asked": words, "unspaced_share": round(share, 4)}
    segmenter = None
    if words == "spaces":
        counts = _between_spaces(texts)
        segmenter = Segmenter(counts, _MAX_SPACED) if counts else None
        figures["words"] = "spaces"
    elif words not in CHOICES:
        segmenter = load_segmenter(words)
        figures["words"] = "given"
    elif words == "discover" or (words == "auto" and share >= MIN_UNSPACED):
        discovery = WordDiscovery(min_count=discovery_min_count(int(characters * share)))
        try:
            discovery.fit(Unspaced(texts))
        except ValueError:  # nothing was seen often enough: characters and pairs of them have to do
            figures["words"] = "too little text"
        else:
            segmenter = discovery.segmenter()
            figures["words"] = "discovered"
            figures["discovered_words"] = sum(1 for word in discovery.vocabulary_ if len(word) > 1)
            figures["min_count"] = discovery.min_count
            figures["min_pmi"] = [float(value) for value in discovery.min_pmi_]
    if segmenter is not None:
        long = (word for word in segmenter.vocabulary if len(word) > 1 and _RUN.fullmatch(word))
        figures["sample"] = list(itertools.islice(long, _SAMPLE))
    return segmenter, figures


class Unspaced:
    """The runs of unspaced scripts of texts: the thresholds of a mixed corpus must not be chosen for its English."""

    def __init__(self, texts: Iterable[str]) -> None:
        self._texts = texts

    def __iter__(self) -> Iterator[str]:
        for text in self._texts:
            if not text.isascii():
                yield " ".join(_RUN.findall(text))


def _between_spaces(texts: Iterable[str]) -> dict[str, int]:
    """Count what stands between spaces, of unspaced scripts only."""
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(run for run in _RUN.findall(unicodedata.normalize("NFKC", text)) if len(run) <= _MAX_WORD)
    return dict(counts)


def explain(figures: Mapping[str, Any]) -> str:
    """Say in words how the words of a build were chosen; empty for a workspace of an earlier version."""
    found, asked = figures.get("words"), figures.get("asked")
    if found is None:
        return ""
    share = f"{figures['unspaced_share']:.1%} of the letters are of scripts without spaces"
    if asked == "auto":
        side = "at least" if figures["unspaced_share"] >= MIN_UNSPACED else "less than"
        why = f"{share}, {side} {MIN_UNSPACED:.0%}"
    else:
        why = f"asked for by --words {asked}; {share}"
    if found == "discovered":
        thresholds = " / ".join(f"{value:g}" for value in figures["min_pmi"])
        return (
            f"discovered from the text ({why}): {figures['discovered_words']:,} words of two or more characters, each "
            f"seen at least {figures['min_count']} times, pointwise mutual information at least {thresholds}"
        )
    what = {
        "characters": "letters between spaces; of scripts without spaces, characters and pairs of them",
        "spaces": "what stands between the spaces of the text",
        "given": "those of the segmenter that was given",
        "too little text": "characters and pairs of them: no word was seen often enough to be discovered",
    }[found]
    return f"{what} ({why})"


def word_vectors(
    counts: CooccurrenceCounter, *, dim: int = 128, seed: int = 0, n_jobs: int = 1, **options: Any
) -> PMIEmbedding:
    """Fit word vectors with the settings that suit the size of a corpus.

    Args:
        counts: A fitted counter.
        dim: Width; at most one less than there are words.
        seed: Seed of the initial vectors.
        n_jobs: Threads; the result does not depend on it.
        **options: More settings of :class:`kexue.words.PMIEmbedding`.
    """
    import warnings

    from kexue.words import PMIEmbedding

    dim = min(dim, len(counts.vocabulary_) - 1)
    # The penalty of one count is right for millions of words and would leave nothing of a small corpus.
    reg = float(np.clip(np.sum(counts.counts_) / 1e6, 0.01, 1.0))
    model = PMIEmbedding(dim=max(dim, 1), reg=reg, random_state=seed, n_jobs=n_jobs, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on how much is explained: a corpus of ten documents explains little
        return model.fit(counts)


def vector_min_count(words: int) -> int:
    """Evidence to ask for a vector: rare words crowd the answers; the more text, the more can be asked for."""
    return int(np.clip(words // 200_000, 5, 25))


def threads() -> int:
    """Threads for counting and solving, whose results do not depend on their number."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def telling_words(vocabulary: Sequence[str], norms: Any, most: int, among: int = 1500) -> list[str]:
    """Frequent words that say much: of the most frequent ones those with the longest vectors."""
    rows = [row for row in range(min(among, len(vocabulary))) if _says(vocabulary[row])]
    return [vocabulary[row] for row in sorted(rows, key=lambda row: (-float(norms[row]), vocabulary[row]))[:most]]


def _says(word: str) -> bool:
    return len(word) > 1 and not word.isdigit()
